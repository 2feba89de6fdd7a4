"""Other libraries' prioritized replay, each as its documentation says to use it."""

import os
import warnings

import numpy as np
from torch import Tensor

from benchmarks.contestants.base import Contestant
from benchmarks.workload import ALPHA, BETA, EPS, Point

NAMES = {"observation": "obs", "next_observation": "next_obs"}  # ours -> the usual ones


class _Peer(Contestant):
    """A peer with arrays: subclasses offer `sample`, `drawn` and `write(index, |td_error|)`."""

    peer = True

    def write(self, index: np.ndarray, td_error: np.ndarray) -> None:
        raise NotImplementedError

    def fill_priorities(self, priority: Tensor) -> None:
        """Set all priorities, a batch at a time, and see by drawing that they hold."""
        values, size = priority.numpy(), max(self.point.batch, 1000)
        for start in range(0, len(values), size):
            part = values[start : start + size]
            self.write(np.arange(start, start + len(part)), part)
        self.priority = priority
        self.check()

    def before_update(self) -> None:
        self.td_error = self.pool.next(Tensor.numpy)[1]
        self.index = self.drawn()
        np.abs(self.td_error, out=self.td_error)

    def update(self) -> None:
        self.write(self.index, self.td_error)

    def before_update_cold(self) -> None:
        self.index, self.td_error = self.pool.next(Tensor.numpy)
        np.abs(self.td_error, out=self.td_error)

    update_cold = update


class Cpprb(_Peer):
    """cpprb: C++ and Cython, NumPy arrays."""

    name = "cpprb"
    requires = "cpprb"

    def __init__(self, point: Point) -> None:
        super().__init__(point)
        import cpprb

        data, priority = self.initial()
        arrays = self._arrays(data)
        fields = {
            key: {"shape": value.shape[1:] or 1, "dtype": value.dtype}
            for key, value in arrays.items()
        }
        self.buffer = cpprb.PrioritizedReplayBuffer(point.capacity, fields, alpha=ALPHA, eps=EPS)
        self.buffer.add(**arrays)
        self.incoming = self._arrays(self.new())
        self.fill_priorities(priority)

    @staticmethod
    def _arrays(data: object) -> dict[str, np.ndarray]:
        return {NAMES.get(key, key): value.numpy() for key, value in data.items()}

    def sample(self) -> None:
        self.batch = self.buffer.sample(self.point.batch, beta=BETA)

    def drawn(self) -> np.ndarray:
        return self.batch["indexes"]

    def write(self, index: np.ndarray, td_error: np.ndarray) -> None:
        self.buffer.update_priorities(index, td_error)

    def extend(self) -> None:
        self.buffer.add(**self.incoming)


class Flashbax(_Peer):
    """flashbax: jax, every call jitted; it draws stratified and gives no weights."""

    name = "flashbax"
    requires = "flashbax"
    note = "jitted; draws stratified; computes no importance-sampling weights"

    def __init__(self, point: Point) -> None:
        super().__init__(point)
        os.environ.setdefault(
            "XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
        )
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import flashbax
            import jax
        # Waking another thread for each call took up to 0.3 ms.
        jax.config.update("jax_cpu_enable_async_dispatch", False)
        self.wait, self.array = jax.block_until_ready, jax.numpy.asarray

        data, priority = self.initial()
        buffer = flashbax.make_prioritised_flat_buffer(
            max_length=point.capacity,
            min_length=1,
            sample_batch_size=point.batch,
            add_sequences=True,
            priority_exponent=ALPHA,
            device="cpu",
        )
        self._add = jax.jit(buffer.add, donate_argnums=0)
        self._write = jax.jit(buffer.set_priorities, donate_argnums=0)

        def split_and_sample(state: object, key: object) -> tuple:
            key, now = jax.random.split(key)
            return buffer.sample(state, now), key

        self._sample = jax.jit(split_and_sample)
        self.key = jax.random.key(point.seed)
        self.state = buffer.init({key: self.array(leaf[0].numpy()) for key, leaf in data.items()})
        chunk = min(point.capacity, 50_000)
        for start in range(0, point.capacity, chunk):
            self.state = self._add(self.state, self._arrays(data[start : start + chunk]))
        self.incoming = self._arrays(self.new())
        self.fill_priorities(priority)

    def _arrays(self, data: object) -> dict[str, object]:
        return {key: self.array(value.numpy()) for key, value in data.items()}

    def sample(self) -> None:
        self.batch, self.key = self.wait(self._sample(self.state, self.key))

    def drawn(self) -> np.ndarray:
        return np.array(self.batch.indices)

    def write(self, index: np.ndarray, td_error: np.ndarray) -> None:
        self.state = self.wait(self._write(self.state, index, td_error))

    def extend(self) -> None:
        self.state = self.wait(self._add(self.state, self.incoming))


class Tianshou(_Peer):
    """tianshou: numba and NumPy; transitions go in one at a time."""

    name = "tianshou"
    requires = "tianshou"
    most = 20_000
    note = f"only {most:,} slots, as it takes transitions one at a time"

    def __init__(self, point: Point) -> None:
        point = Point(**{**vars(point), "capacity": min(point.capacity, self.most)})
        super().__init__(point)
        from tianshou.data import Batch, PrioritizedReplayBuffer

        data, priority = self.initial()
        self._batch = Batch
        self.buffer = PrioritizedReplayBuffer(point.capacity, alpha=ALPHA, beta=BETA)
        np.random.seed(point.seed)  # noqa: NPY002 (tianshou draws from it)
        for transition in self._batches(data):
            self.buffer.add(transition)
        self.incoming = self._batches(self.new())
        self.fill_priorities(priority)

    def _batches(self, data: object) -> list:
        arrays = {key: value.numpy() for key, value in data.items()}
        return [
            self._batch(
                obs=arrays["observation"][i],
                act=arrays["action"][i],
                rew=arrays["reward"][i],
                terminated=arrays["done"][i],
                truncated=False,
                obs_next=arrays["next_observation"][i],
                info={},
            )
            for i in range(len(data))
        ]

    def sample(self) -> None:
        self.batch, self.slots = self.buffer.sample(self.point.batch)

    def drawn(self) -> np.ndarray:
        return self.slots

    def write(self, index: np.ndarray, td_error: np.ndarray) -> None:
        self.buffer.update_weight(index, td_error)

    def extend(self) -> None:
        for transition in self.incoming:
            self.buffer.add(transition)

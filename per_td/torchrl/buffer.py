"""TensorDictPrioritizedReplayBuffer: TorchRL's, on per_td's priorities."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing.context import get_spawning_popen
from pathlib import Path
from typing import Any

import torch
from torchrl.data.replay_buffers import ReplayBuffer, TensorDictReplayBuffer
from torchrl.data.replay_buffers.samplers import RandomSampler, Sampler
from torchrl.data.replay_buffers.storages import Storage

from per_td import validation
from per_td.errors import ConfigurationError
from per_td.torchrl.fast import ColumnCache
from per_td.torchrl.plain import as_plain, from_plain
from per_td.torchrl.reductions import REDUCTIONS
from per_td.torchrl.replay import PrioritizedReplay
from per_td.torchrl.sampler import PrioritizedSampler
from per_td.torchrl.writer import GenerationWriter, slots_of

__all__ = ["TensorDictPrioritizedReplayBuffer"]

_EPS = 1e-8

_OF_SAMPLER = frozenset(
    (
        "alpha",
        "beta",
        "eps",
        "reduction",
        "draw",
        "method",
        "weight_normalization",
        "td_error_unit",
        "max_priority_within_buffer",
    )
)
"""Settings that have no effect on the buffer."""


class TensorDictPrioritizedReplayBuffer(PrioritizedReplay):
    """Drop-in for `torchrl.data.TensorDictPrioritizedReplayBuffer`; nothing compiled is needed.

    Same arguments, same interface. Batches also carry "index_generation", by which a priority
    update that comes too late, when its slot holds another transition, is recognised and dropped.

    A one-dimensional `LazyTensorStorage` or `LazyMemmapStorage` of TensorDicts, without transform,
    prefetch, collate function, sample unit, pinned memory or compilation, is written and read
    column by column, which is several times faster; the results are the same.

    Args:
        alpha: exponent of the priorities; may be set at any time on `sampler`.
        beta: exponent of the importance-sampling weights; may be set at any time on `sampler`.
        priority_key: entry in which losses leave their TD errors.
        eps: added to every priority; None is 1e-8.
        storage: a TorchRL storage, or a callable that makes one; None is a `ListStorage(1000)`.
        sample_unit: as in TorchRL.
        sampler_device: where the priorities live; None follows the storage.
        sync: False leaves the priorities to the process that samples: writers in other processes
            never touch them, and what they wrote is taken up before the next draw.
        collate_fn: as in TorchRL.
        pin_memory: as in TorchRL.
        prefetch: number of batches drawn ahead, by threads.
        transform: as in TorchRL.
        reduction: how several TD errors of one element become one priority: "max", "min", "mean",
            "median", "sum" or "r2d2" (0.9 max + 0.1 mean); None is "max".
        batch_size: of `sample()`.
        dim_extend: as in TorchRL.
        generator: source of the random numbers.
        shared: whether other processes write to the buffer.
        compilable: as in TorchRL.
        transport: as in TorchRL.
        transport_options: as in TorchRL.
        draw: "independent", "stratified" or "without_replacement".
        method: "auto", "tree" or "multinomial".
        weight_normalization: "buffer" as TorchRL does, "batch" or "none".
        td_error_unit: what the losses write: "abs" for |delta|, "squared" for delta^2. See the
            table in docs/torchrl_losses.md.
        max_priority_within_buffer: new elements get the largest priority in the buffer (True), or
            the largest that it ever held.
        sampler: a `per_td.torchrl.PrioritizedSampler` to be used as it is, in place of the one that
            the other arguments describe; its alpha and beta must be those given.

    Raises:
        ConfigurationError: an argument is not one of those accepted (a ValueError).

    Example:
        >>> from tensordict import TensorDict
        >>> from torchrl.data import LazyTensorStorage
        >>> buffer = TensorDictPrioritizedReplayBuffer(
        ...     alpha=0.7, beta=0.5, storage=LazyTensorStorage(10), batch_size=4
        ... )
        >>> _ = buffer.extend(TensorDict({"x": torch.rand(10)}, [10]))
        >>> batch = buffer.sample()
        >>> batch["td_error"] = torch.rand(4)
        >>> buffer.update_tensordict_priority(batch)
    """

    def __init__(
        self,
        *,
        alpha: float,
        beta: float,
        priority_key: Any = "td_error",
        eps: float | None = _EPS,
        storage: Storage | Callable[[], Storage] | None = None,
        sample_unit: Any = None,
        sampler_device: torch.device | str | None = None,
        sync: bool = True,
        collate_fn: Callable[[Any], Any] | None = None,
        pin_memory: bool = False,
        prefetch: int | None = None,
        transform: Any = None,
        reduction: str | None = "max",
        batch_size: int | None = None,
        dim_extend: int | None = None,
        generator: torch.Generator | None = None,
        shared: bool = False,
        compilable: bool = False,
        transport: str = "auto",
        transport_options: dict[str, Any] | None = None,
        draw: str = "independent",
        method: str = "auto",
        weight_normalization: str = "buffer",
        td_error_unit: str = "abs",
        max_priority_within_buffer: bool = False,
        sampler: PrioritizedSampler | None = None,
    ) -> None:
        kept: Storage = self._maybe_make_storage(storage, compilable)
        if not sync and kept.ndim != 1:
            raise ConfigurationError(
                f"sync: expected True for a storage of several dimensions, got False with"
                f" kept.ndim={kept.ndim}"
            )
        capacity = slots_of(kept)
        if sampler is None:
            sampler = PrioritizedSampler(
                capacity,
                alpha,
                beta,
                _EPS if eps is None else eps,
                reduction=validation.one_of("reduction", reduction or "max", REDUCTIONS),
                max_priority_within_buffer=max_priority_within_buffer,
                device=sampler_device,
                draw=draw,
                method=method,
                weight_normalization=weight_normalization,
                td_error_unit=td_error_unit,
            )
        elif (sampler.alpha, sampler.beta) != (alpha, beta):
            raise ConfigurationError(
                f"sampler: expected the buffer's alpha={alpha} and beta={beta},"
                f" got alpha={sampler.alpha} and beta={sampler.beta}"
            )
        _checked(sampler)._follow(kept)
        self._sync = sync
        self._prioritized_sampler = None  # TorchRL's name for the one that it keeps aside
        self._seen_writes = 0
        self._cache = ColumnCache()
        TensorDictReplayBuffer.__init__(
            self,
            priority_key=priority_key,
            storage=kept,
            sampler=sampler,
            sample_unit=sample_unit,
            writer=partial(GenerationWriter, compilable=compilable),
            collate_fn=collate_fn,
            pin_memory=pin_memory,
            prefetch=prefetch,
            transform=transform,
            batch_size=batch_size,
            dim_extend=dim_extend,
            generator=generator,
            shared=shared,
            compilable=compilable,
            transport=transport,
            transport_options=transport_options,
        )

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _OF_SAMPLER:
            raise ConfigurationError(
                f"{name}: expected to be set on the buffer's sampler, got {value!r} for the buffer;"
                f" use buffer.sampler.{name}"
            )
        super().__setattr__(name, value)

    def _initialize_prioritized_sampler(self) -> None:
        if len(self._storage) > 0:
            filled = torch.arange(len(self._storage), device="cpu")
            self._sampler.mark_update(filled, storage=self._storage)

    # --- parts ------------------------------------------------------------------------------------

    def set_sampler(self, sampler: Sampler) -> Sampler:
        """Use another prioritized sampler, in which all that is stored counts as new.

        Returns:
            The sampler used so far.

        Raises:
            ConfigurationError: it is not one of per_td's, or cannot take up the storage's size.
        """
        with self._replay_lock, self._write_lock:
            _checked(sampler)._follow(self._storage)
            previous = ReplayBuffer.set_sampler(self, sampler)
            sampler._rng = self._rng
            self._initialize_prioritized_sampler()
        return previous

    def set_storage(
        self, storage: Storage, collate_fn: Callable[[Any], Any] | None = None
    ) -> Storage:
        """Use another storage, all of whose content counts as new.

        Returns:
            The storage used so far.

        Raises:
            ConfigurationError: its size is not that of the one used so far.
        """
        if storage.max_size != self._storage.max_size:
            raise ConfigurationError(
                f"storage: expected max_size={self._storage.max_size}, got {storage.max_size}"
            )
        with self._replay_lock, self._write_lock:
            previous = ReplayBuffer.set_storage(self, storage, collate_fn)
            previous._attached_entities.remove(self)  # of whose writes it is not told any more
            storage.attach(self)
            self._writer.register_storage(storage)
            self._sampler._empty()
            self._initialize_prioritized_sampler()
        return previous

    # --- state ------------------------------------------------------------------------------------

    def empty(self, empty_write_count: bool = True) -> None:
        """Forget all elements, and the batches that were drawn ahead.

        Args:
            empty_write_count: whether `write_count` starts again from 0.
        """
        with self._futures_lock:
            self._clear_prefetch_queue_locked()
            with self._replay_lock, self._write_lock:
                ReplayBuffer.empty(self, empty_write_count=empty_write_count)
                self._seen_writes = int(self.write_count)

    def stats(self) -> dict[str, int | float | bool]:
        """TorchRL's counters, and how many priorities were stale or refused."""
        stats: dict[str, int | float | bool] = super().stats()
        stats["stale_updates"] = 0
        if isinstance(self._sampler, PrioritizedSampler):
            stats |= self._sampler.stats()
        return stats

    def state_dict(self) -> dict[str, Any]:
        """A snapshot of storage, sampler, writer, transforms and batches drawn ahead.

        It consists of tensors and plain values, which `torch.load(weights_only=True)` reads.
        """
        with self._at_rest():
            state = dict(super().state_dict())
        state["_prefetch_state"] = as_plain(state["_prefetch_state"])
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state.

        Raises:
            CheckpointError: its priorities are of another kind, or of another capacity; nothing is
                changed then.
        """
        self.prioritized_sampler.check_state(state_dict["_sampler"])
        ahead = from_plain(state_dict.get("_prefetch_state"))
        with self._at_rest():
            super().load_state_dict(state_dict | {"_prefetch_state": ahead})
            self._seen_writes = int(self.write_count)

    def dumps(self, path: str | Path) -> None:
        """Write storage, sampler, writer and transforms into the folder `path`."""
        with self._at_rest():
            super().dumps(path)

    def loads(self, path: str | Path) -> None:
        """Take over what `dumps` wrote into the folder `path`.

        Raises:
            CheckpointError: as `load_state_dict`.
        """
        sampler = self.prioritized_sampler
        sampler.check_state(sampler.saved(Path(path) / "sampler"))
        with self._at_rest():
            super().loads(path)
            self._seen_writes = int(self.write_count)

    @contextmanager
    def _at_rest(self) -> Iterator[None]:
        """Keep out all that writes or draws, once the priorities know of every write."""
        with self._futures_lock:
            self.synchronize()  # what draws ahead needs the locks below
            with self._replay_lock, self._write_lock:
                self._catch_up()
                yield

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = ReplayBuffer.__getstate__(self)
        state["_cache"] = ColumnCache()
        if not self._sync and get_spawning_popen() is not None:
            state["_sampler"] = RandomSampler()  # the priorities stay with who samples
        return state


def _checked(sampler: Any) -> PrioritizedSampler:
    if not isinstance(sampler, PrioritizedSampler):
        raise ConfigurationError(
            f"sampler: expected a per_td.torchrl.PrioritizedSampler, got {sampler!r}; for others"
            " there is TorchRL's TensorDictReplayBuffer"
        )
    return sampler

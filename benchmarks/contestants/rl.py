"""TorchRL's buffer: with its own samplers, and with per_td's."""

import contextlib
import os
import warnings
from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor

from benchmarks.contestants.base import Contestant, NotRun
from benchmarks.contestants.learner import Learner, LearnerBetween
from benchmarks.workload import ALPHA, BETA, EPS, Point, transitions


@contextlib.contextmanager
def prioritized() -> Iterator[None]:
    """Raise NotRun if TorchRL's prioritized replay cannot be made inside."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (RuntimeError, NameError, TypeError) as error:
        raise NotRun(f"its tree does not load with this torch ({error})") from error


class _TorchRL(Contestant):
    requires = "torchrl"

    def __init__(self, point: Point) -> None:
        super().__init__(point)
        os.environ.setdefault("RL_LOGGING_LEVEL", "WARNING")
        from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer

        self.buffer = TensorDictReplayBuffer(
            storage=LazyTensorStorage(point.capacity, device=point.device),
            sampler=self.sampler(),
            batch_size=point.batch,
        )
        data, priority = self.initial()
        self.buffer.extend(data)
        self.prioritize(priority)
        self.incoming, self.single = self.new(), self.new()[0]
        self.check()

    def sampler(self) -> object:
        raise NotImplementedError

    def prioritize(self, priority: Tensor) -> None:
        """Set all priorities."""

    def sample(self) -> None:
        self.batch = self.buffer.sample()

    def drawn(self) -> Tensor:
        return self.batch["index"]

    def extend(self) -> None:
        self.buffer.extend(self.incoming)

    def add(self) -> None:
        self.buffer.add(self.single)


class TorchRLUniform(_TorchRL):
    """Uniform replay, as most people use it."""

    name = "TorchRL uniform"

    def sampler(self) -> object:
        from torchrl.data.replay_buffers import RandomSampler

        return RandomSampler()


class TorchRLUniformLearner(LearnerBetween, TorchRLUniform):
    """The same, with a learner in between."""

    name = "TorchRL uniform, learner in between"

    def new(self) -> Tensor:
        return transitions(1, self.point.schema, self.point.device)

    def before_update(self) -> None:
        """Prepare nothing."""

    def update(self) -> None:
        """Do nothing: there are no priorities."""


class InTorchRL(_TorchRL):
    """per_td's sampler in TorchRL's buffer."""

    name = "per_td in TorchRL"

    def sampler(self) -> object:
        from per_td.torchrl import PrioritizedSampler

        return PrioritizedSampler(self.point.capacity, alpha=ALPHA, beta=BETA, eps=EPS)

    def prioritize(self, priority: Tensor) -> None:
        every = torch.arange(len(priority), device=priority.device)
        self.buffer.update_priority(every, priority)
        self.priority = priority

    def before_update(self) -> None:
        self.batch.set("td_error", self.pool.next()[1].abs())

    def update(self) -> None:
        self.buffer.update_tensordict_priority(self.batch)

    def step(self) -> None:
        self.sample()
        self.before_update()
        self.update()

    def before_update_cold(self) -> None:
        self.index, td_error = self.pool.next()
        self.td_error = td_error.abs()

    def update_cold(self) -> None:
        self.buffer.update_priority(self.index, self.td_error)


class TorchRLPrioritized(InTorchRL):
    """TorchRL's own prioritized replay: a C++ extension that only some builds of torch can load."""

    name = "TorchRL prioritized"
    peer = True
    options: ClassVar[dict[str, object]] = {}

    def sampler(self) -> object:
        from torchrl.data.replay_buffers import PrioritizedSampler

        with prioritized():
            return PrioritizedSampler(
                self.point.capacity, alpha=ALPHA, beta=BETA, eps=EPS, **self.options
            )


class _AsInScripts(Contestant):
    """A buffer as TorchRL's own training scripts make it, with a learner between its calls."""

    requires = "torchrl"
    summed = ("extend", "sample", "update")

    def __init__(self, point: Point) -> None:
        super().__init__(point)
        os.environ.setdefault("RL_LOGGING_LEVEL", "WARNING")
        from torchrl.data import LazyMemmapStorage

        self.buffer = self.make(
            storage=LazyMemmapStorage(point.capacity),
            batch_size=point.batch,
            prefetch=3,
            transform=lambda batch: batch.to("cpu"),  # where a GPU would stand
        )
        self.buffer.extend(self.initial()[0])
        self.incoming, self.learner = transitions(1, point.schema), Learner()

    def make(self, **options: object) -> object:
        raise NotImplementedError

    def extend(self) -> None:
        self.buffer.extend(self.incoming)

    def sample(self) -> None:
        self.batch = self.buffer.sample()

    def before_update(self) -> None:
        self.learner.step(self.batch["observation"])
        self.batch.set("td_error", self.pool.next()[1].abs())

    def update(self) -> None:
        self.buffer.update_tensordict_priority(self.batch)


class DropInAsInScripts(_AsInScripts):
    """per_td's drop-in."""

    name = "per_td drop-in"

    def make(self, **options: object) -> object:
        from per_td.torchrl import TensorDictPrioritizedReplayBuffer

        return TensorDictPrioritizedReplayBuffer(alpha=ALPHA, beta=BETA, eps=EPS, **options)


class UniformAsInScripts(_AsInScripts):
    """TorchRL's uniform buffer, whose `update` does nothing."""

    name = "TorchRL uniform, in scripts"

    def make(self, **options: object) -> object:
        from torchrl.data import TensorDictReplayBuffer

        return TensorDictReplayBuffer(**options)


class PrioritizedAsInScripts(_AsInScripts):
    """TorchRL's own prioritized buffer."""

    name = "TorchRL prioritized, in scripts"
    peer = True

    def make(self, **options: object) -> object:
        from torchrl.data import TensorDictPrioritizedReplayBuffer

        with prioritized():
            return TensorDictPrioritizedReplayBuffer(alpha=ALPHA, beta=BETA, eps=EPS, **options)

"""per_td's buffer, and the floor below its `extend`."""

import contextlib
import os
from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor

from benchmarks.contestants.base import Contestant, NotRun, tensor_bytes
from benchmarks.contestants.learner import LearnerBetween
from benchmarks.workload import ALPHA, BETA, EPS, Point, transitions
from per_td import PrioritizedReplayBuffer, SumTree, kernels


def filled_buffer(
    point: Point, data: Tensor, priority: Tensor, **options: object
) -> PrioritizedReplayBuffer:
    """A full buffer; loading a state takes O(N), where writing the priorities would take longer."""
    buffer = PrioritizedReplayBuffer(
        point.capacity,
        point.batch,
        alpha=ALPHA,
        beta=BETA,
        eps=EPS,
        draw=point.draw,
        device=point.device,
        **options,
    )
    buffer.extend(data[:1])
    state = buffer.state_dict()
    state |= {"write_count": len(data), "transitions": dict(data.items()), "priority": priority}
    state |= {"mass": None, "replayed": torch.zeros(len(data), dtype=torch.bool)}
    buffer.load_state_dict(state)
    return buffer


class PerTd(Contestant):
    """per_td as it comes."""

    name = "per_td"
    options: ClassVar[dict[str, object]] = {}

    def __init__(self, point: Point) -> None:
        super().__init__(point)
        data, self.priority = self.initial()
        self.buffer = filled_buffer(point, data, self.priority, **self.options)
        self.incoming, self.single = self.new(), self.new()[0]
        self.check()

    def sample(self) -> None:
        self.batch = self.buffer.sample()

    def drawn(self) -> Tensor:
        return self.batch["index"]

    def before_update(self) -> None:
        _, self.td_error = self.pool.next()

    def update(self) -> None:
        batch = self.batch
        self.buffer.update_priority(batch["index"], self.td_error, batch["generation"])

    def before_update_cold(self) -> None:
        self.index, self.td_error = self.pool.next()

    def update_cold(self) -> None:
        self.buffer.update_priority(self.index, self.td_error)

    def step(self) -> None:
        self.sample()
        self.before_update()
        self.update()

    def extend(self) -> None:
        self.buffer.extend(self.incoming)

    def add(self) -> None:
        self.buffer.add(self.single)

    def facts(self) -> dict[str, tuple[float | None, str]]:
        """Bytes that priorities take."""
        used = tensor_bytes(self.buffer._priorities)
        return {"priority state": (used / self.point.capacity, "bytes per slot")}


def kernels_for(device: str) -> bool:
    """True if buffers on this device have compiled kernels."""
    return SumTree(1, device).compiled


@contextlib.contextmanager
def plain_torch() -> Iterator[None]:
    """Switch compiled kernels off for buffers made inside; NotRun where there are none anyway."""
    if not kernels_for("cpu"):
        raise NotRun("there are no compiled kernels here: per_td is this")
    before = os.environ.get(kernels.VARIABLE)
    os.environ[kernels.VARIABLE] = "off"
    try:
        yield
    finally:
        del os.environ[kernels.VARIABLE]
        if before is not None:
            os.environ[kernels.VARIABLE] = before


class PerTdLearner(LearnerBetween, PerTd):
    """The same, with a learner in between, which writes one transition at a time."""

    name = "per_td, learner in between"

    def new(self) -> Tensor:
        return transitions(1, self.point.schema, self.point.device)


class PlainTorch(PerTd):
    """per_td without its compiled kernels, as where numba is missing."""

    name = "per_td, plain torch"

    def __init__(self, point: Point) -> None:
        with plain_torch():
            super().__init__(point)


class Columns(PerTd):
    """One tensor per field."""

    name = "columns"
    options: ClassVar[dict[str, object]] = {"layout": "columns"}


class Records(PerTd):
    """All fields of a transition side by side."""

    name = "records"
    options: ClassVar[dict[str, object]] = {"layout": "records"}


class CopyColumns(Contestant):
    """The least that writing can cost: the same bytes copied into one tensor per field."""

    name = "copy into columns"

    def __init__(self, point: Point) -> None:
        super().__init__(point)
        self.columns = dict(self.initial()[0].items())
        self.incoming = dict(self.new().items())
        self.at = 0

    @torch.no_grad()
    def extend(self) -> None:
        end = self.at + self.point.batch
        if end > self.point.capacity:
            self.at, end = 0, self.point.batch
        for key, column in self.columns.items():
            column[self.at : end] = self.incoming[key]
        self.at = end

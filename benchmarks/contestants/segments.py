"""All priorities rewritten before every draw, as PufferLib does with its segments of experience.

It keeps some thousands of segments, computes the advantages of all of them anew before each
minibatch, and draws with torch.multinomial. In a graph the new priorities are always the same.
"""

import torch
from torch import Tensor

from benchmarks.contestants import cuda
from benchmarks.contestants.base import Contestant
from benchmarks.workload import ALPHA, BETA, Point, priorities

SETS = 64  # of priorities, in turn


class _Sets:
    """Fresh priorities of all segments, float32 [N] at a time."""

    def __init__(self, point: Point) -> None:
        self.values = priorities(SETS * point.capacity, point.device).view(SETS, -1)
        self.at = 0

    def next(self) -> Tensor:
        self.at = (self.at + 1) % SETS
        return self.values[self.at]


class PerTdAnew(cuda.PerTdEager):
    """per_td: an update of every slot, then a batch."""

    name = "per_td, all anew, eager"

    def __init__(self, point: Point) -> None:
        self.sets = _Sets(point)
        self.every = torch.arange(point.capacity, device=point.device)
        super().__init__(point)

    def step(self) -> None:
        self.buffer.update_priority(self.every, self.sets.next())
        self.sample()


class PerTdAnewGraph(cuda.PerTdGraph):
    """The same in a CUDA graph."""

    name = "per_td, all anew, graph"

    def __init__(self, point: Point) -> None:
        self.anew = _Sets(point).next()
        self.every = torch.arange(point.capacity, device=point.device)
        super().__init__(point)

    def _step(self) -> None:
        self.buffer.update_priority(self.every, self.anew)
        self.sample()


class PufferLib(Contestant):
    """Probabilities of all segments, and torch.multinomial with replacement."""

    name = "PufferLib's way, eager"
    clock = "cuda"

    def __init__(self, point: Point) -> None:
        super().__init__(point)
        data, self.priority = self.initial()
        self.columns = dict(data.items())
        self.sets = _Sets(point)
        self.check()

    def sample(self) -> None:
        mass = torch.nan_to_num(self.priority**ALPHA, 0, 0, 0)
        probability = (mass + 1e-6) / (mass.sum() + 1e-6)
        self.index = index = torch.multinomial(probability, self.point.batch, replacement=True)
        self.weight = (self.point.capacity * probability[index]) ** -BETA
        self.batch = {key: column.index_select(0, index) for key, column in self.columns.items()}

    def drawn(self) -> Tensor:
        return self.index

    def step(self) -> None:
        self.priority = self.sets.next()
        self.sample()


class PufferLibGraph(cuda.Graphed, PufferLib):
    """The same in a CUDA graph."""

    name = "PufferLib's way, graph"

    def _step(self) -> None:
        self.sample()

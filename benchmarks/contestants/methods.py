"""Ways of drawing in proportion to masses, without transitions around them."""

from typing import ClassVar

import torch
from torch import Tensor

from benchmarks.contestants.base import Contestant, NotRun
from benchmarks.contestants.own import plain_torch
from benchmarks.workload import ALPHA, Point
from per_td import SumTree, draws


class _Method(Contestant):
    draws_possible: tuple[str, ...] = ("independent", "without_replacement")
    most: ClassVar[dict[str, int]] = {"without_replacement": 10**6}  # slots; beyond, too slow

    def __init__(self, point: Point) -> None:
        if point.draw not in self.draws_possible:
            raise NotRun(f"it cannot draw {point.draw.replace('_', ' ')}")
        if point.capacity > self.most.get(point.draw, point.capacity):
            raise NotRun("far too slow here")
        super().__init__(point)
        self.priority = self.initial()[1]
        self.mass = self.priority**ALPHA
        self.prepare()
        if point.draw == "independent":
            self.check()

    def prepare(self) -> None:
        """What is to be done before any draw."""

    def drawn(self) -> Tensor:
        """The slots last drawn."""
        return self.index


class Tree(_Method):
    """per_td's sum tree."""

    name = "tree"
    most: ClassVar[dict[str, int]] = {}

    def prepare(self) -> None:
        """Fill the tree."""
        self.tree = SumTree(self.point.capacity, self.point.device)
        self.tree.fill(self.mass)

    def sample(self) -> None:
        """Draw."""
        self.index = self.tree.sample(self.point.batch, draw=self.point.draw)


class PlainTree(Tree):
    """per_td's sum tree without its compiled kernels."""

    name = "tree, plain torch"

    def prepare(self) -> None:
        """Fill the tree."""
        with plain_torch():
            super().prepare()


class Multinomial(_Method):
    """torch.multinomial, in float64, as `method="multinomial"` uses it."""

    name = "multinomial"

    def __init__(self, point: Point) -> None:
        if point.capacity > draws.MULTINOMIAL_LIMIT:
            raise NotRun("torch.multinomial takes at most 2^24 categories")
        super().__init__(point)

    def sample(self) -> None:
        """Draw."""
        self.index = draws.multinomial(self.mass, self.point.batch, self.point.draw)


class CumulativeSum(_Method):
    """The running sum of all masses, and a binary search in it."""

    name = "cumsum + searchsorted"
    draws_possible = ("independent",)

    def sample(self) -> None:
        """Draw."""
        sums = self.mass.cumsum(0, dtype=torch.float64)
        point = torch.rand(self.point.batch, dtype=torch.float64, device=sums.device) * sums[-1]
        self.index = torch.searchsorted(sums, point, right=True)


class ExponentialKeys(_Method):
    """The smallest of Exp(mass) keys: Efraimidis and Spirakis 2006."""

    name = "exponential keys + topk"
    draws_possible = ("without_replacement",)

    def sample(self) -> None:
        """Draw."""
        keys = torch.empty_like(self.mass, dtype=torch.float64).exponential_() / self.mass
        self.index = keys.topk(self.point.batch, largest=False).indices

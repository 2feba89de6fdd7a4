"""Ways of drawing in proportion to masses, without transitions around them."""

from typing import ClassVar

import torch
from torch import Tensor

from benchmarks.contestants.base import Contestant, NotRun
from benchmarks.contestants.own import plain_torch
from benchmarks.workload import ALPHA, Point
from per_td import SumTree, draws


def _limited(mass: Tensor) -> None:
    if len(mass) > draws.MULTINOMIAL_LIMIT:
        raise NotRun("torch.multinomial takes at most 2^24 categories")


def multinomial(mass: Tensor, n: int) -> Tensor:
    """Draw n slots with torch.multinomial in the masses' own dtype."""
    _limited(mass)
    return torch.multinomial(mass, n, replacement=True)


def multinomial64(mass: Tensor, n: int, draw: str = "independent") -> Tensor:
    """Draw n slots as `method="multinomial"` does: in float64."""
    _limited(mass)
    return draws.multinomial(mass, n, draw)


def cumulative_sum(mass: Tensor, n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Draw n slots by the running sum of all masses, and a binary search in it."""
    sums = mass.cumsum(0, dtype=dtype)
    point = torch.rand(n, dtype=dtype, device=sums.device) * sums[-1]
    return torch.searchsorted(sums, point, right=True).clamp_(max=len(sums) - 1)


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
        """Prepare for the draws."""

    def drawn(self) -> Tensor:
        return self.index


class Tree(_Method):
    """per_td's sum tree."""

    name = "tree"
    most: ClassVar[dict[str, int]] = {}

    def prepare(self) -> None:
        self.tree = SumTree(self.point.capacity, self.point.device)
        self.tree.fill(self.mass)

    def sample(self) -> None:
        self.index = self.tree.sample(self.point.batch, draw=self.point.draw)


class PlainTree(Tree):
    """per_td's sum tree without its compiled kernels."""

    name = "tree, plain torch"

    def prepare(self) -> None:
        with plain_torch():
            super().prepare()


class Multinomial(_Method):
    """torch.multinomial, in float64."""

    name = "multinomial"

    def prepare(self) -> None:
        _limited(self.mass)

    def sample(self) -> None:
        self.index = multinomial64(self.mass, self.point.batch, self.point.draw)


class CumulativeSum(_Method):
    """The running sum of all masses, and a binary search in it."""

    name = "cumsum + searchsorted"
    draws_possible = ("independent",)

    def sample(self) -> None:
        self.index = cumulative_sum(self.mass, self.point.batch)


class ExponentialKeys(_Method):
    """The smallest of Exp(mass) keys: Efraimidis and Spirakis 2006."""

    name = "exponential keys + topk"
    draws_possible = ("without_replacement",)

    def sample(self) -> None:
        keys = torch.empty_like(self.mass, dtype=torch.float64).exponential_() / self.mass
        self.index = keys.topk(self.point.batch, largest=False).indices

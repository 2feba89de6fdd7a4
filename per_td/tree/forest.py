"""SumForest: many sum trees of one size in one set of tensors."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from per_td import draws, validation
from per_td.errors import EmptyBufferError, IndexRangeError, PriorityError
from per_td.tree import reference
from per_td.tree.layout import FANOUT, Layout
from per_td.tree.sum_tree import SumTree

__all__ = [
    "ForestLayout",
    "SumForest",
    "as_index_each",
    "as_values_each",
    "named",
    "require_enough_each",
]


@dataclass(frozen=True)
class ForestLayout:
    """Where the trees of a forest lie in one wide tree over all their leaves.

    Each tree takes `width` * 16^`height` leaves, the fewest that hold its slots with a width of at
    most 16. These are the leaves below `width` whole nodes of the level `height` (the leaves being
    level 0), its tops, so that what changes one tree never touches a node of another, up to that
    level; and nothing is drawn from the levels above, where trees share nodes.

    Attributes:
        num_trees: how many trees, S.
        capacity: number of slots of each.
        width, height: as above; the height is at least 1.
        stride: leaves from the first of a tree to the first of the next.
        layout: of the one wide tree over S * stride leaves.
    """

    num_trees: int
    capacity: int
    width: int
    height: int
    stride: int
    layout: Layout

    @classmethod
    def of(cls, capacity: int, num_trees: int) -> "ForestLayout":
        """The layout for `num_trees` trees of `capacity` slots."""
        height = 1
        while FANOUT ** (height + 1) < capacity:
            height += 1
        width = -(-capacity // FANOUT**height)
        stride = width * FANOUT**height
        return cls(num_trees, capacity, width, height, stride, Layout.of(num_trees * stride))

    def tops(self, nodes: Tensor) -> Tensor:
        """The highest nodes of each tree, in the tensor of all nodes: a view [S, width]."""
        start = self.layout.offsets[self.height - 1]
        return nodes[start : start + self.num_trees * self.width].view(self.num_trees, self.width)

    def starts(self, device: torch.device) -> Tensor:
        """The first leaf of each tree, int64 [S, 1]."""
        last = self.num_trees * self.stride
        return torch.arange(0, last, self.stride, device=device).unsqueeze(-1)


class SumForest(SumTree):
    """S sum trees of `capacity` slots each: as S times `SumTree`, at the cost of one.

    `SumTree(capacity, num_trees=S)` makes one. Masses never mix: draws from a tree start at its
    own nodes.

    Args:
        capacity: number of slots of each tree, at least 1.
        device: where the trees live; None is torch's default device.
        num_trees: how many, S, at least 1.

    Raises:
        ConfigurationError: `capacity` or `num_trees` is not a positive integer.

    Example:
        >>> trees = SumTree(5, num_trees=2)
        >>> trees.update([[1, 4], [0, 0]], [[3.0, 1.0], [1.0, 2.0]])
        >>> trees.total.tolist()
        [4.0, 2.0]
        >>> trees[1].tolist()
        [2.0, 0.0, 0.0, 0.0, 0.0]
        >>> trees.sample(10).shape
        torch.Size([2, 10])
    """

    def __init__(
        self, capacity: int, device: torch.device | str | int | None = None, *, num_trees: int
    ) -> None:
        self.forest = ForestLayout.of(
            validation.positive_int("capacity", capacity),
            validation.positive_int("num_trees", num_trees),
        )
        super().__init__(self.forest.layout.capacity, device)
        self.starts = self.forest.starts(self.device)

    @property
    def num_trees(self) -> int:
        """How many trees, S."""
        return self.forest.num_trees

    @property
    def capacity(self) -> int:
        """Number of slots of each tree."""
        return self.forest.capacity

    @property
    def tops(self) -> Tensor:
        """Masses of the highest nodes of each tree, float64 [S, c], a view."""
        return self.forest.tops(self.nodes)

    @property
    def total(self) -> Tensor:
        """Sum of the masses of each tree, float64 [S]."""
        return self.tops.sum(-1)

    def slots(self, leaves: Tensor) -> Tensor:
        """Of a column over all leaves, [leaf_slots], those that are slots: a view [S, capacity]."""
        own = leaves[: self.layout.capacity].view(self.num_trees, self.forest.stride)
        return own[:, : self.capacity]

    def update(self, index: Any, value: Any) -> None:
        """Set the masses of some slots; where one occurs twice, its last value holds.

        Args:
            index: slots in their own tree, integers [S, B].
            value: masses, finite and not negative, [S, B].

        Raises:
            IndexRangeError: an index is not an integer in [0, capacity), or the shape is wrong.
            PriorityError: a value is NaN, infinite or negative, or the shapes differ.
                On CUDA such pairs are skipped instead: to look at them would stop the host.
        """
        index = as_index_each("index", index, self.num_trees, self.device)
        value = as_values_each("value", value, index).flatten()
        valid = validation.require_in_range(index.flatten(), self.capacity)
        valid = valid & validation.require_finite("value", value, low=0.0)
        flat, value = validation.route(
            (index + self.starts).flatten(), value, valid, self.layout.spare
        )
        if not self._put(flat, value, self.layout.leaf_slots):
            self._write(*reference.keep_last(flat, value))

    def find(self, target: Any) -> Tensor:
        """The slots where the cumulative mass of their tree passes the points `target`.

        Args:
            target: points in [0, total of their tree), [S, B]; others as for `SumTree.find`.

        Returns:
            int64 [S, B].

        Raises:
            PriorityError: the shape or dtype is not that of real numbers [S, B].
        """
        return self._find(self._as_points(target, (self.num_trees,)))

    def _find(self, target: Tensor) -> Tensor:
        """`find` for points that may be used up, float64 [S, B], contiguous, at least 0."""
        levels = self.levels[: self.forest.height]
        return reference.find_each(self.leaves, levels, self.tops, target) - self.starts

    def _sample_with_mass(
        self, n: int, generator: torch.Generator | None, draw: str
    ) -> tuple[Tensor, Tensor]:
        """`sample` without the checks of its arguments, with the masses drawn; [S, n] both.

        Raises:
            EmptyBufferError: all masses of a tree are 0, or fewer than n are positive without
                replacement. On CUDA that goes unseen.
        """
        total = self.total
        if validation.can_raise(total) and not (total > 0).all():
            raise EmptyBufferError(
                "expected a positive mass to draw from in each, got only masses of 0 in"
                f" {named(~(total > 0))}"
            )
        if draw == "without_replacement":
            index = self._sample_distinct(n, generator)
        else:
            point = self.points(n, generator)
            if draw == "stratified":
                point = (torch.arange(n, device=self.device) + point) / n
            index = self._find(point * total.unsqueeze(-1))
        mass = self.leaves.index_select(0, (index + self.starts).flatten())
        return index, mass.view(index.shape)

    def points(self, n: int, generator: torch.Generator | None) -> Tensor:
        """Random numbers in [0, 1), float64 [S, n]."""
        shape = self.num_trees, n
        return torch.rand(shape, dtype=torch.float64, device=self.device, generator=generator)

    def _sample_distinct(self, n: int, generator: torch.Generator | None) -> Tensor:
        draws.require_enough(self.capacity, n)
        levels = self.levels[: self.forest.height]
        index, arrival = reference.draw_distinct_each(self.leaves, levels, self.tops, n, generator)
        missing = arrival.isinf()
        if validation.can_raise(missing):
            require_enough_each(n - missing.sum(-1), n)
        index = torch.where(missing, index[:, :1], index) - self.starts
        return index.clamp_(0, self.capacity - 1)


def named(which: Tensor) -> str:
    """The places where `which` [S] holds, for an error: "1 of 3: 2"."""
    places = which.nonzero().flatten().tolist()
    more = ", ..." if len(places) > 10 else ""
    return f"{len(places)} of {len(which)}: {', '.join(map(str, places[:10]))}{more}"


def require_enough_each(drawable: Tensor, n: int) -> None:
    """Refuse to draw `n` without replacement where fewer are `drawable`, int64 [S]."""
    if (drawable < n).any():
        raise EmptyBufferError(
            f"expected at least {n} transitions of positive priority in each to draw {n} without"
            f" replacement, got fewer in {named(drawable < n)}"
        )


def as_index_each(name: str, index: Any, count: int, device: torch.device) -> Tensor:
    """`index`, one row for each of `count`, as int64 [S, B] on `device`.

    Raises:
        IndexRangeError: it is not of an integer dtype, or of another shape.
    """
    index = validation.as_tensor(name, index, IndexRangeError)
    if index.ndim != 2 or len(index) != count:
        raise IndexRangeError(f"{name}: expected shape [{count}, B], got {list(index.shape)}")
    return validation.as_index(index.reshape(-1), device, name).view(index.shape)


def as_values_each(name: str, values: Any, index: Tensor) -> Tensor:
    """`values`, one for each of `index` [S, B], detached, as float32 [S, B] on its device.

    Raises:
        PriorityError: the shape or the dtype is not that of one real number per index.
    """
    values = validation.as_tensor(name, values, PriorityError)
    if values.shape not in (index.shape, (*index.shape, 1)):
        raise PriorityError(
            f"{name}: expected shape {list(index.shape)}, one value per index,"
            f" got {list(values.shape)}"
        )
    flat = validation.as_values(name, values.reshape(-1), index.reshape(-1))
    return flat.view(index.shape)

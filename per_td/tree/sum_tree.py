"""SumTree: the trees on their own; every public call checks its arguments."""

from typing import Any

import torch
from torch import Tensor

from per_td import draws, validation
from per_td.copies import Copied
from per_td.errors import EmptyBufferError, IndexRangeError, PriorityError
from per_td.kernels.parts import Layout
from per_td.tree.trees import Trees


class SumTree(Copied):
    """A fixed number of slots, each with a mass of at least 0, drawn in proportion to mass.

    It is a tree of fan-out 16 with float32 leaves and float64 sums. Every sum is recomputed from
    its children, so no error accumulates. A slot of mass 0 is never drawn. The tree takes 4.5 bytes
    per slot. `len(tree)` is the capacity, and `tree[index]` are masses, float32, as torch indexes.

    Args:
        capacity: number of slots, at least 1.
        device: device of the tree. None is torch's default device.
        num_trees: S makes S independent trees of `capacity` slots each; a call costs about as much
            as one of a single tree. Every argument and result gets a leading dimension [S]. None:
            one tree.

    Raises:
        ConfigurationError: `capacity` or `num_trees` is not a positive integer.
        AllocationError: there is not enough memory.

    Example:
        >>> tree = SumTree(5)
        >>> tree.update([1, 4], [3.0, 1.0])
        >>> tree.total.item()
        4.0
        >>> set(tree.sample(100).tolist()) <= {1, 4}
        True
        >>> trees = SumTree(5, num_trees=2)
        >>> trees.update([[1, 4], [0, 0]], [[3.0, 1.0], [1.0, 2.0]])
        >>> trees.total.tolist()
        [4.0, 2.0]
        >>> trees.sample(10).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        capacity: int,
        device: torch.device | str | int | None = None,
        *,
        num_trees: int | None = None,
    ) -> None:
        capacity = validation.positive_int("capacity", capacity)
        if num_trees is not None:
            num_trees = validation.positive_int("num_trees", num_trees)
        self._lead = () if num_trees is None else (num_trees,)
        layout = Layout.of(capacity, num_trees or 1)
        self._trees = Trees(layout, validation.resolve_device(device))

    def __len__(self) -> int:
        return self.capacity

    @property
    def capacity(self) -> int:
        """Number of slots of each tree."""
        return self._trees.layout.capacity

    @property
    def num_trees(self) -> int | None:
        """Number of trees; None for one tree without a dimension [S]."""
        return self._lead[0] if self._lead else None

    @property
    def device(self) -> torch.device:
        """Device of the tree."""
        return self._trees.device

    @property
    def layout(self) -> Layout:
        """Places of the nodes in memory."""
        return self._trees.layout

    @property
    def leaves(self) -> Tensor:
        """All leaves, float32 [leaf_slots], a view; do not write to it."""
        return self._trees.leaves

    @property
    def nodes(self) -> Tensor:
        """All nodes above the leaves, float64 [node_slots], a view; do not write to it."""
        return self._trees.sums

    @property
    def compiled(self) -> bool:
        """True if the tree uses compiled kernels, False if plain torch."""
        return self._trees.compiled

    @property
    def total(self) -> Tensor:
        """Sum of all masses, float64 [] or [S]."""
        return self._trees.total.view(self._lead)

    @property
    def _masses(self) -> Tensor:
        return self._trees.masses if self._lead else self._trees.masses[0]

    def __getitem__(self, index: Any) -> Tensor:
        """Return copies of the masses of the slots `index`, float32.

        Args:
            index: int, slice or integer tensor.

        Raises:
            IndexRangeError: there are no such slots, or `index` has another type.
        """
        masses = self._masses
        if isinstance(index, Tensor):
            validation.require_plain("index", index, IndexRangeError)
        try:
            return masses[index].clone()
        except (LookupError, OverflowError, RuntimeError, TypeError, ValueError) as error:
            raise IndexRangeError(
                f"index: expected one into masses of shape {list(masses.shape)}, got {index!r}"
            ) from error

    def update(self, index: Any, value: Any) -> None:
        """Set the masses of some slots. If a slot occurs twice, its last value holds.

        Args:
            index: slots, integers [B] or [S, B].
            value: masses, finite and not negative, in the shape of `index`.

        Raises:
            IndexRangeError: an index is not an integer in [0, capacity), or the shape is wrong.
            PriorityError: a value is NaN, infinite or negative, or the shapes differ. On CUDA,
                wrong values and indices are skipped instead: a check would make the host wait.
        """
        index = validation.as_index(index, self.device, lead=self._lead)
        value = validation.as_values("value", value, index)
        self._trees.ops.set_masses(self._trees, index, value)

    def fill(self, value: Any) -> None:
        """Set the masses of all slots at once, in O(N).

        Args:
            value: masses, finite and not negative, float32 [capacity] or [S, capacity].

        Raises:
            PriorityError: a value is NaN, infinite or negative, or the shape or dtype is wrong.
                Nothing is written. On CUDA, a wrong value counts as 0 instead.
        """
        value = validation.as_reals("value", value, self.device, torch.float32)
        expected = self._masses.shape
        if value.shape != expected:
            raise PriorityError(
                f"value: expected shape {list(expected)}, one per slot, got {list(value.shape)}"
            )
        valid = validation.require_finite("value", value, low=0.0)
        self._masses.copy_(torch.where(valid, value, 0.0))
        self._trees.ops.refill(self._trees)

    def find(self, target: Any) -> Tensor:
        """Find the slots at which the cumulative sum of the masses exceeds the points `target`.

        Args:
            target: points in [0, total), [B] or [S, B]. Other points are moved to the nearest end,
                and NaN to 0. If the total is 0, the result is any slot.

        Returns:
            Slots, int64, in the shape of `target`.

        Raises:
            PriorityError: `target` does not hold real numbers [B] or [S, B].
        """
        target = validation.as_reals("target", target, self.device, torch.float64)
        if target.ndim != len(self._lead) + 1 or target.shape[:-1] != self._lead:
            expected = validation.shaped(*self._lead, "B")
            raise PriorityError(f"target: expected shape {expected}, got {list(target.shape)}")
        target = torch.where(target > 0, target, 0.0).contiguous()  # NaN is not
        found: Tensor = self._trees.ops.find(self._trees, target)[0]
        return found

    def sample(
        self, n: int, generator: torch.Generator | None = None, *, draw: str = "independent"
    ) -> Tensor:
        """Draw slots in proportion to their masses.

        Args:
            n: number of draws from each tree.
            generator: source of the random numbers, on the tree's device. None is torch's own.
            draw: "independent": with replacement. "stratified": splits the total mass into n equal
                segments and draws one slot from each, in order. "without_replacement": n different
                slots, distributed as if drawn one by one.

        Returns:
            Slots, int64 [n] or [S, n].

        Raises:
            ConfigurationError: an argument is not accepted.
            EmptyBufferError: all masses are 0, or, without replacement, fewer than n are positive.
                On CUDA, the result then contains a slot of mass 0 or repetitions instead.
        """
        n = validation.positive_int("n", n)
        validation.one_of("draw", draw, draws.DRAWS)
        generator = validation.as_generator(generator, self.device)
        trees = self._trees
        if draw == "without_replacement":
            return trees.draw_distinct(n, generator)[0].view(*self._lead, n)
        shape = (*self._lead, n)
        point = torch.rand(shape, dtype=torch.float64, device=self.device, generator=generator)
        drawn = trees.ops.draw(
            trees,
            point,
            stratified=draw == "stratified",
            beta=0.0,
            normalization="none",
            written=self.capacity,
        )
        if drawn is None:
            raise EmptyBufferError(trees.nothing_to_draw())
        index: Tensor = drawn[0]
        return index

    def check_valid(self) -> None:
        """Check that all sums follow from the masses, for tests and bug reports.

        Raises:
            PerTdError: a sum does not follow; the error names it.
        """
        self._trees.check_valid()

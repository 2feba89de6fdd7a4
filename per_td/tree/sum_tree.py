"""SumTree: masses, their exact sums, and draws in proportion to them."""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from per_td import draws, kernels, validation
from per_td.copies import Copied
from per_td.errors import ConfigurationError, EmptyBufferError, IndexRangeError, PriorityError
from per_td.memory import zeros
from per_td.tree import reference
from per_td.tree.layout import Layout

__all__ = ["SumTree"]


class SumTree(Copied):
    """A fixed number of non-negative masses from which one draws in proportion to mass.

    A tree of fan-out 16 with float32 leaves and float64 sums. Every sum is recomputed from its
    children, so nothing drifts, and a mass of 0 is never drawn. It takes 4.5 bytes per slot.

    Args:
        capacity: number of slots, at least 1.
        device: where the tree lives; None is torch's default device.
        num_trees: S makes S trees of `capacity` slots each, in one set of tensors: everything
            gets a leading dimension [S], see `SumForest`. None: one tree.

    Raises:
        ConfigurationError: `capacity` or `num_trees` is not a positive integer.

    Example:
        >>> tree = SumTree(5)
        >>> tree.update([1, 4], [3.0, 1.0])
        >>> tree.total.item()
        4.0
        >>> set(tree.sample(100).tolist()) <= {1, 4}
        True
    """

    def __new__(cls, *args: Any, num_trees: int | None = None, **settings: Any) -> "SumTree":
        """A `SumForest` where `num_trees` says how many."""
        if num_trees is not None and cls is SumTree:
            from per_td.tree.forest import SumForest  # which is made from this class

            return super().__new__(SumForest)
        return super().__new__(cls)

    @torch.inference_mode(False)
    def __init__(
        self,
        capacity: int,
        device: torch.device | str | int | None = None,
        *,
        num_trees: int | None = None,
    ) -> None:
        if num_trees is not None:
            raise ConfigurationError(
                f"num_trees: expected None, got {num_trees!r}: {type(self).__name__} is one tree"
            )
        self.layout = Layout.of(validation.positive_int("capacity", capacity))
        self.device = validation.resolve_device(device)
        self.leaves = zeros((self.layout.leaf_slots,), torch.float32, self.device)
        self.nodes = self.layout.new_nodes(0.0, torch.float64, self.device)
        self._table = self.layout.table()
        self._depth = len(self.layout.widths)
        self._compiled = kernels.wanted(self.device)
        self._launched = kernels.launched(self.device)
        self._offsets = self._table[0].to(self.device)

    __new__.__wrapped__ = __init__  # type: ignore[attr-defined]  # the signature that users see

    @property
    def kernels(self) -> ModuleType | None:
        """The compiled operations, where they are used; see `per_td.kernels`."""
        return kernels.cpu_unless_tracing() if self._compiled else None

    @property
    def launches(self) -> ModuleType | None:
        """The operations in Triton, where they are used; see `per_td.kernels`."""
        return (
            kernels.cuda_kernels() if self._launched and not torch.compiler.is_compiling() else None
        )

    @property
    def memory(self) -> tuple[int, int, int, int]:
        """Addresses of the leaves, the sums and the table of levels, and how many these are."""
        return (
            self.leaves.data_ptr(),
            self.nodes.data_ptr(),
            self._table.data_ptr(),
            self._depth,
        )

    @property
    def levels(self) -> list[Tensor]:
        """The sums, level by level from the leaves' parents up to the root; views of `nodes`."""
        return self.layout.levels(self.nodes)

    @property
    def capacity(self) -> int:
        """Number of slots."""
        return self.layout.capacity

    def __len__(self) -> int:
        return self.capacity

    @property
    def total(self) -> Tensor:
        """Sum of all masses, a 0-dim float64 tensor."""
        return self.nodes[-1]

    def __getitem__(self, index: Any) -> Tensor:
        """Masses of the slots `index` (int, slice or integer tensor), float32, as torch indexes.

        Raises:
            IndexRangeError: there are no such slots, or it is none of these.
        """
        masses = self.slots(self.leaves)
        try:
            return masses[index]
        except (IndexError, TypeError) as error:
            raise IndexRangeError(
                f"index: expected one into masses of shape {list(masses.shape)}, got {index!r}"
            ) from error

    def check_valid(self) -> None:
        """Look for damage, in O(N); on CUDA the host waits.

        Raises:
            PerTdError: it names the broken invariant: masses are finite, not negative and 0 beyond
                the slots, and every sum follows from its children.
        """
        leaves, slots = self.leaves, self.slots(self.leaves)
        validation.require_valid(
            (leaves.isfinite() & (leaves >= 0)).all(), "masses are finite and at least 0"
        )
        validation.require_valid(
            leaves.count_nonzero() == slots.count_nonzero(), "masses beyond the slots are 0"
        )
        reference.check_nodes("sums", leaves, self.levels, reference.sum_children, rtol=1e-12)

    def slots(self, leaves: Tensor) -> Tensor:
        """Of a column over all leaves, [leaf_slots], those that are slots: a view [capacity]."""
        return leaves[: self.capacity]

    def update(self, index: Any, value: Any) -> None:
        """Set the masses of some slots; where an index occurs twice, its last value holds.

        Args:
            index: slots, integers [B].
            value: masses, finite and not negative, [B].

        Raises:
            IndexRangeError: an index is not an integer in [0, capacity).
            PriorityError: a value is NaN, infinite or negative, or the shapes differ.
                On CUDA such pairs are skipped instead: to look at them would stop the host.
        """
        index = validation.as_index(index, self.device)
        value = validation.as_values("value", value, index)
        if self._put(index, value, self.capacity):
            return
        valid = validation.require_in_range(index, self.capacity)
        valid = valid & validation.require_finite("value", value, low=0.0)
        index, value = validation.route(index, value, valid, self.layout.spare)
        self._write(*reference.keep_last(index, value))

    def _write(self, index: Tensor, value: Tensor) -> None:
        """`update` without its checks: for callers that have made them.

        Args:
            index: int64 [B]; occurrences of the same index must carry the same value.
            value: float32 [B].
        """
        if self._put(index, value, self.layout.leaf_slots):
            return
        self.leaves[index] = value
        reference.refresh(self.leaves, self.levels, index, reference.sum_children)

    def _put(self, index: Tensor, value: Tensor, size: int) -> bool:
        """`update` compiled; False, and nothing is done, where it cannot be or must not be."""
        launches = self.launches
        if launches is not None:
            trees = launches.Trees(self.layout, (self.leaves, self.nodes))
            launches.put(trees, index, value)
            return True
        kernel = self.kernels
        if kernel is None:
            return False
        index, value = index.contiguous(), value.contiguous()
        at = index.data_ptr(), value.data_ptr(), len(index)
        done: bool = kernel.put(*self.memory, *at, size)
        return done

    def fill(self, value: Any) -> None:
        """Set the masses of all slots at once, in O(N).

        Args:
            value: masses, finite and not negative, float32 [capacity].

        Raises:
            PriorityError: a value is NaN, infinite or negative, or the shape or dtype is wrong.
                Nothing has been written then. On CUDA such a value counts as 0 instead: to look at
                it would stop the host.
        """
        value = validation.as_reals("value", value, self.device, torch.float32)
        expected = self.slots(self.leaves).shape
        if value.shape != expected:
            raise PriorityError(
                f"value: expected shape {list(expected)}, one per slot, got {list(value.shape)}"
            )
        valid = validation.require_finite("value", value.flatten(), low=0.0)
        self._fill(torch.where(valid.view(expected), value, 0.0))

    def _fill(self, value: Tensor) -> None:
        """`fill` without its checks: for callers that have made them."""
        self.slots(self.leaves).copy_(value)
        kernel = self.kernels
        if kernel is not None:
            kernel.rebuild(*self.memory)
            return
        reference.refresh_all(self.leaves, self.levels, reference.sum_children)

    def find(self, target: Any) -> Tensor:
        """The slots in which the cumulative mass passes the points `target`.

        Args:
            target: points in [0, total), [B]. Others are moved to the nearest in there, and NaN to
                0. Where the total is 0, some slot is found.

        Returns:
            int64 [B].

        Raises:
            PriorityError: the shape or dtype is not that of real numbers [B].
        """
        return self._find(self._as_points(target, ()))

    def _as_points(self, target: Any, batch: tuple[int, ...]) -> Tensor:
        """`target` as float64 [*batch, B], at least 0; the walk moves inside what is too large.

        Raises:
            PriorityError: see `find`.
        """
        target = validation.as_reals("target", target, self.device, torch.float64)
        if target.ndim != len(batch) + 1 or target.shape[:-1] != batch:
            expected = ", ".join([*map(str, batch), "B"])
            raise PriorityError(f"target: expected shape [{expected}], got {list(target.shape)}")
        return torch.where(target > 0, target, 0.0).contiguous()  # NaN is not

    def _find(self, target: Tensor) -> Tensor:
        """`find` for points that may be used up, float64 [B], contiguous, at least 0."""
        launches = self.launches
        if launches is not None:
            found: Tensor = launches.find(self.leaves, self.nodes, self._offsets, target)
            return found
        kernel = self.kernels
        if kernel is None:
            return reference.find(self.leaves, self.levels, target)
        index, mass = torch.empty_like(target, dtype=torch.int64), target.float()
        at = target.data_ptr(), len(target), index.data_ptr(), mass.data_ptr()
        kernel.find(*self.memory, *at)
        return index

    def sample(
        self,
        n: int,
        generator: torch.Generator | None = None,
        *,
        draw: str = "independent",
    ) -> Tensor:
        """Draw slots in proportion to their masses.

        Args:
            n: how many.
            generator: source of the random numbers, on the tree's device; None is torch's own.
            draw: "independent"; "stratified": one from each n-th of the total mass, in order;
                "without_replacement": n different slots, as one-by-one draws would give them.

        Returns:
            int64 [n].

        Raises:
            EmptyBufferError: all masses are 0, or fewer than n are positive without replacement.
                On CUDA that goes unseen: the result is then an empty slot, or has repetitions.
        """
        validation.positive_int("n", n)
        validation.one_of("draw", draw, draws.DRAWS)
        validation.as_generator(generator, self.device)
        return self._sample_with_mass(n, generator, draw)[0]

    def _sample_with_mass(
        self, n: int, generator: torch.Generator | None, draw: str
    ) -> tuple[Tensor, Tensor]:
        """`sample` without the checks of its arguments, with the masses drawn, float32 [n]."""
        if validation.can_raise(self.leaves) and not self.total > 0:
            raise EmptyBufferError("expected a positive mass to draw from, got only masses of 0")
        launches = self.launches
        if draw == "without_replacement":
            index = self._sample_distinct(n, generator)
        elif launches is not None:
            point = draws.points(n, "independent", self.device, generator)
            tree, stratified = (self.leaves, self.nodes, self._offsets), draw == "stratified"
            drawn: tuple[Tensor, Tensor] = launches.draw(*tree, point, stratified=stratified)
            return drawn
        else:
            index = self._find(draws.points(n, draw, self.device, generator) * self.total)
        return index, self.leaves.index_select(0, index)

    def _sample_distinct(self, n: int, generator: torch.Generator | None) -> Tensor:
        draws.require_enough(self.capacity, n)
        index, arrival = reference.draw_distinct(self.leaves, self.levels, n, generator)
        missing = arrival.isinf()
        if validation.can_raise(missing):
            draws.require_enough(n - int(missing.sum()), n)
        return torch.where(missing, index[0], index).clamp_(max=self.capacity - 1)

"""Distributions: masses computed from priorities, by one class each with the same methods.

`Proportional` is priority^alpha (Schaul et al. 2015, equation 1). `Rank` is rank^-alpha (section
3.3), where rank 1 has the largest priority. The ranks are approximate, like those of the paper's
heap: they are sorted from time to time, and a priority that changes in between gets the rank that
it would have had at the last sort. docs/rank_based.md gives the error.
"""

from typing import Any

import torch
from torch import Tensor

from per_td import validation
from per_td.errors import ConfigurationError
from per_td.tree.trees import Trees
from per_td.weights import mass_of

_SMALLEST_INTERVAL = 256
"""Least number of changes between two sorts by default: fewer are not worth a sort."""


class Proportional:
    """Masses priority^alpha, each of its priority alone."""

    name = "proportional"
    alpha = 0.6
    """Default, from the paper (table 3)."""
    snapshot = 0
    sort_interval: int | None = None
    launches = True
    """True: the CUDA kernels can compute these masses."""

    def exponent(self, alpha: float | Tensor) -> float | Tensor:
        """Exponent of the priorities for this alpha, and alpha for this exponent."""
        return alpha

    def masses(self, trees: Any, priority: Tensor, leaf: Tensor) -> Tensor:
        """Masses of the changed or new priorities of leaves, float32 [B]."""
        return mass_of(priority, trees.exponent(leaf))

    def all_masses(self, trees: Trees) -> Tensor:
        """Masses of all leaves, float32 [leaf_slots], in O(N)."""
        return mass_of(trees.raw, trees.exponent())

    def range_of(self, trees: Trees) -> tuple[Tensor, Tensor, str]:
        """Least and largest mass allowed for each leaf, float32 [leaf_slots], and the rule."""
        mass = mass_of(trees.raw, trees.exponent())
        return mass, mass, "priority^alpha"

    def changed(self, n: int, *, new: bool = False) -> bool:
        """Count changed or new priorities; return True if all masses are due to be recomputed."""
        return False

    def filled(self, n: int) -> None:
        """Note that the first `n` slots are filled, and no others."""

    def state(self, trees: Trees, n: int) -> dict[str, Any] | None:
        """State of the first `n` slots that priorities and masses do not give, or None."""
        return None

    def load(self, trees: Trees, state: dict[str, Any]) -> Tensor | None:
        """Load a `state`; return its masses, or None if they follow from the priorities."""
        return None


class Rank:
    """Masses rank^-alpha, by the order at the last sort.

    At a sort the ranks are a permutation of 1..n: of equal priorities the one in the lower slot
    comes first. Between sorts, the rank of a priority is 1 + the number of larger ones at the last
    sort. A priority of 0 has mass 0, and no rank.

    The host counts changes to decide when to sort, so it costs no sync. A CUDA graph does not
    count: the next sort outside of it includes its changes.

    Args:
        capacity: number of slots; they are filled from the first on.
        sort_interval: changed or new priorities from one sort to the next; None: as many as there
            are filled slots, and at least 256: sorts then cost O(log n) per change.

    Raises:
        ConfigurationError: `sort_interval` is neither None nor a positive integer.
    """

    name = "rank"
    alpha = 0.7
    launches = False

    def __init__(self, capacity: int, sort_interval: int | None) -> None:
        if sort_interval is not None:
            sort_interval = validation.positive_int("sort_interval", sort_interval)
        self.sort_interval, self.snapshot = sort_interval, capacity
        self._filled = self._changes = 0

    def exponent(self, alpha: float | Tensor) -> float | Tensor:
        """Exponent of the ranks for this alpha, and alpha for this exponent."""
        return -alpha

    def masses(self, trees: Any, priority: Tensor, leaf: Tensor) -> Tensor:
        """Masses of the changed or new priorities of leaves by the last sort, float32 [B]."""
        # from the right: equal priorities lie before the place that is found
        below = torch.searchsorted(trees.snapshot, priority.contiguous(), right=True)
        mass = mass_of(self.snapshot + 1 - below, trees.exponent(leaf))
        return torch.where(priority > 0, mass, 0.0)

    def range_of(self, trees: Trees) -> tuple[Tensor, Tensor, str]:
        """Least and largest mass allowed for each leaf, float32 [leaf_slots], and the rule.

        They differ where priorities were equal at the last sort: each of those has its own rank.
        """
        leaf = torch.arange(len(trees.raw), device=trees.device)
        last = self.snapshot - torch.searchsorted(trees.snapshot, trees.raw)
        most = self.masses(trees, trees.raw, leaf)
        least = mass_of(last.clamp(min=1), trees.exponent(leaf))
        least = torch.where(trees.raw > 0, least, 0.0).minimum(most)
        return least, most, "the ranks at the last sort"

    def changed(self, n: int, *, new: bool = False) -> bool:
        """Count changed or new priorities; return True if it is time to sort."""
        if new:
            self._filled = min(self._filled + n, self.snapshot)
        self._changes += n
        return self._changes >= (self.sort_interval or max(self._filled, _SMALLEST_INTERVAL))

    def filled(self, n: int) -> None:
        """Note that the first `n` slots are filled, and no others."""
        self._filled = n

    def all_masses(self, trees: Trees) -> Tensor:
        """Sort; return the masses of all leaves, float32 [leaf_slots], in O(n log n)."""
        self._changes = 0
        priority = trees.raw[: self._filled]
        order = order_of(priority)
        ordered = priority.index_select(0, order)
        trees.snapshot[: self.snapshot - self._filled] = 0
        trees.snapshot[self.snapshot - self._filled :] = ordered.flip(0)
        rank = torch.arange(1, self._filled + 1, device=priority.device)
        mass = mass_of(rank, trees.exponent(order))
        mass = torch.where(ordered > 0, mass, 0.0)
        return torch.zeros_like(trees.leaves).index_copy_(0, order, mass)

    def state(self, trees: Trees, n: int) -> dict[str, Any] | None:
        """State of the first `n` slots that priorities do not give: masses, snapshot, changes."""
        return {
            "mass": trees.leaves[:n].clone(),
            "snapshot": trees.snapshot[self.snapshot - n :].clone(),
            "changes": self._changes,
        }

    def load(self, trees: Trees, state: dict[str, Any]) -> Tensor | None:
        """Load a `state`; return its masses, float32 [n]."""
        n = self._filled = len(state["mass"])
        self._changes = state["changes"]
        trees.snapshot.zero_()[self.snapshot - n :] = state["snapshot"].to(trees.device)
        mass: Tensor = state["mass"].to(trees.device)
        return mass


Distribution = Proportional | Rank
PRIORITIZATIONS = (Proportional.name, Rank.name)


def make(prioritization: str, capacity: int, sort_interval: int | None) -> Distribution:
    """Make the distribution of this name, or raise ConfigurationError."""
    if validation.one_of("prioritization", prioritization, PRIORITIZATIONS) == Rank.name:
        return Rank(capacity, sort_interval)
    if sort_interval is not None:
        raise ConfigurationError(
            f"sort_interval: expected none with prioritization={prioritization!r},"
            f" got {sort_interval!r}"
        )
    return Proportional()


def order_of(priority: Tensor) -> Tensor:
    """Positions of the priorities from the largest to the smallest, int64 [n]; ties keep order.

    The priorities are float32 [n], not negative, n below 2^32.
    """
    if not validation.can_raise(priority):
        return priority.sort(descending=True, stable=True).indices
    # As integers, floats without a sign are in the same order: one key holds priority and position,
    # and numpy sorts such keys in vectors, ten times as fast as torch sorts with indices.
    key = (0x7FFFFFFF - priority.view(torch.int32)).long() << 32
    key += torch.arange(len(key), device=key.device)
    key.numpy().sort()
    return key & 0xFFFFFFFF

"""Distributions: how masses follow from priorities. One class each, with the same methods.

`Proportional` is priority^alpha (Schaul et al. 2015, equation 1). `Rank` is rank^-alpha (section
3.3), where rank 1 has the largest priority. Its order is kept approximately, as the paper does with
its heap: it is taken by sorting from time to time, and what changes in between gets the rank that
it would have had at the last sort. docs/rank_based.md says how far off that is, and what it costs:
a sort of 10^6 priorities takes 41 ms of a CPU core, some 10 us per 256 changes.
"""

from typing import Any

import torch
from torch import Tensor

from per_td import validation
from per_td.errors import ConfigurationError
from per_td.kernels.flags import ALPHA_EXPONENT
from per_td.tree.trees import Trees
from per_td.weights import mass_of

_SMALLEST_INTERVAL = 256
"""Changes between two sorts, at least, by default: fewer are not worth a sort of a young buffer."""


class Proportional:
    """Masses priority^alpha; they follow from each priority alone."""

    name = "proportional"
    alpha = 0.6
    """The paper's choice (table 3)."""
    snapshot = 0
    sort_interval: int | None = None
    launches = True
    """The kernels for CUDA know this distribution."""

    def exponent(self, alpha: float) -> float:
        """Turn alpha into the exponent of whatever masses are powers of."""
        return alpha

    def masses(self, trees: Any, priority: Tensor) -> Tensor:
        """Masses of changed or new priorities, float32 [B]."""
        return mass_of(priority, trees.number(ALPHA_EXPONENT))

    def all_masses(self, trees: Trees) -> Tensor:
        """Masses of all leaves, float32 [leaf_slots], in O(N)."""
        return mass_of(trees.raw, trees.number(ALPHA_EXPONENT))

    def range_of(self, trees: Trees, priority: Tensor) -> tuple[Tensor, Tensor, str]:
        """The least and the largest mass that each may have, float32 [B], and what says so."""
        mass = self.masses(trees, priority)
        return mass, mass, "priority^alpha"

    def changed(self, n: int, *, new: bool = False) -> bool:
        """Count changed or new priorities; True if it is time to compute all masses anew."""
        return False

    def filled(self, n: int) -> None:
        """Take note that the first `n` slots are filled, and no others."""

    def state(self, trees: Trees, n: int) -> dict[str, Any] | None:
        """Return what a state needs beside the priorities and masses of the first `n` slots."""
        return None

    def load(self, trees: Trees, state: dict[str, Any]) -> Tensor | None:
        """Take over a `state`; returns its masses, or None: they follow from the priorities."""
        return None


class Rank:
    """Masses rank^-alpha, by the order at the last sort.

    At a sort the ranks are a permutation of 1..n: of equal priorities the one in the lower slot
    comes first. Between sorts a priority gets the rank that the first one equal to it had, or that
    it would have had: 1 + how many were larger. A priority of 0 has mass 0, and no rank.

    The host counts changes to decide when to sort, so it costs no sync. A CUDA graph does not
    count: what it replays is sorted in by the next sort outside of it.

    Args:
        capacity: number of slots; they are filled from the first on.
        sort_interval: changed or new priorities from one sort to the next; None takes as many as
            there are filled slots, and at least 256: sorts then cost O(log n) per change.

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

    def exponent(self, alpha: float) -> float:
        """Turn alpha into the exponent of ranks."""
        return -alpha

    def masses(self, trees: Any, priority: Tensor) -> Tensor:
        """Masses of changed or new priorities, float32 [B]: by the order at the last sort."""
        # from the right: equal priorities lie before the place that is found
        below = torch.searchsorted(trees.snapshot, priority.contiguous(), right=True)
        mass = mass_of(self.snapshot + 1 - below, trees.number(ALPHA_EXPONENT))
        return torch.where(priority > 0, mass, 0.0)

    def range_of(self, trees: Trees, priority: Tensor) -> tuple[Tensor, Tensor, str]:
        """The least and the largest mass that each may have, float32 [B], and what says so.

        They differ where several were equal at the last sort: each of those has its own rank.
        """
        last = self.snapshot - torch.searchsorted(trees.snapshot, priority.contiguous())
        most = self.masses(trees, priority)
        least = mass_of(last.clamp(min=1), trees.number(ALPHA_EXPONENT))
        least = torch.where(priority > 0, least, 0.0).minimum(most)
        return least, most, "the ranks at the last sort"

    def changed(self, n: int, *, new: bool = False) -> bool:
        """Count changed or new priorities; True if it is time to sort."""
        if new:
            self._filled = min(self._filled + n, self.snapshot)
        self._changes += n
        return self._changes >= (self.sort_interval or max(self._filled, _SMALLEST_INTERVAL))

    def filled(self, n: int) -> None:
        """Take note that the first `n` slots are filled, and no others."""
        self._filled = n

    def all_masses(self, trees: Trees) -> Tensor:
        """Take the order anew; masses of all leaves, float32 [leaf_slots], in O(n log n)."""
        self._changes = 0
        priority = trees.raw[: self._filled]
        order = order_of(priority)
        ordered = priority.index_select(0, order)
        trees.snapshot[: self.snapshot - self._filled] = 0
        trees.snapshot[self.snapshot - self._filled :] = ordered.flip(0)
        rank = torch.arange(1, self._filled + 1, device=priority.device)
        mass = mass_of(rank, trees.number(ALPHA_EXPONENT))
        mass = torch.where(ordered > 0, mass, 0.0)
        return torch.zeros_like(trees.leaves).index_copy_(0, order, mass)

    def state(self, trees: Trees, n: int) -> dict[str, Any] | None:
        """Return masses, snapshot and changes, which do not follow from the priorities."""
        return {
            "mass": trees.leaves[:n].clone(),
            "snapshot": trees.snapshot[self.snapshot - n :].clone(),
            "changes": self._changes,
        }

    def load(self, trees: Trees, state: dict[str, Any]) -> Tensor | None:
        """Take over a `state`; returns its masses, float32 [n]."""
        n = self._filled = len(state["mass"])
        self._changes = state["changes"]
        trees.snapshot.zero_()[self.snapshot - n :] = state["snapshot"].to(trees.device)
        mass: Tensor = state["mass"].to(trees.device)
        return mass


Distribution = Proportional | Rank
PRIORITIZATIONS = (Proportional.name, Rank.name)


def make(prioritization: str, capacity: int, sort_interval: int | None) -> Distribution:
    """Make the distribution of this name.

    Raises:
        ConfigurationError: there is none, or there is a `sort_interval` but nothing to sort.
    """
    if validation.one_of("prioritization", prioritization, PRIORITIZATIONS) == Rank.name:
        return Rank(capacity, sort_interval)
    if sort_interval is not None:
        raise ConfigurationError(
            f"sort_interval: expected none with prioritization={prioritization!r},"
            f" got {sort_interval!r}"
        )
    return Proportional()


def order_of(priority: Tensor) -> Tensor:
    """Positions of `priority` from the largest to the smallest; of equal ones the first is first.

    Args:
        priority: float32 [n], not negative, n below 2^32.

    Returns:
        int64 [n].
    """
    if not validation.can_raise(priority):
        return priority.sort(descending=True, stable=True).indices
    # As integers, floats without a sign are in the same order: one key holds priority and position,
    # and numpy sorts such keys in vectors, ten times as fast as torch sorts with indices.
    key = (0x7FFFFFFF - priority.view(torch.int32)).long() << 32
    key += torch.arange(len(key), device=key.device)
    key.numpy().sort()
    return key & 0xFFFFFFFF

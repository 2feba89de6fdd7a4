"""Rank-based prioritization (Schaul et al. 2015, section 3.3): masses that follow from an order.

The mass of a transition is rank^-alpha, where rank 1 has the largest priority. The order is kept
approximately, as the paper does with its heap: it is taken by sorting from time to time, and what
changes in between gets the rank that it would have had at the last sort. How far off that is, and
what it costs, is in docs/rank_based.md: a sort of 10^6 priorities takes 41 ms of a CPU core, some
10 us per 256 changes.
"""

from typing import Any

import torch
from torch import Tensor

from per_td import validation
from per_td.errors import ConfigurationError
from per_td.memory import zeros
from per_td.weights import mass_of

__all__ = ["DEFAULT_ALPHA", "PRIORITIZATIONS", "RankMasses", "order_of"]

PRIORITIZATIONS = ("proportional", "rank")
DEFAULT_ALPHA = {"proportional": 0.6, "rank": 0.7}
"""The paper's choices (table 3)."""

_SMALLEST_INTERVAL = 256
"""Changes between two sorts, at least, by default: fewer are not worth a sort of a young buffer."""


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


class RankMasses:
    """Masses rank^-alpha of priorities, by the order at the last sort.

    At a sort the ranks are a permutation of 1..n: of equal priorities the one in the lower slot
    comes first. Between sorts a priority gets the rank that the first one equal to it had, or that
    it would have had: 1 + how many were larger. A priority of 0 has mass 0, and no rank.

    When to sort is decided by counting changes on the host, so it costs no sync. A CUDA graph does
    not count: what it replays is sorted in by the next sort outside of it.

    Args:
        capacity: number of slots; they are filled from the first on.
        sort_interval: changed or new priorities from one sort to the next; None takes as many as
            there are filled slots, and at least 256: sorts then cost O(log n) per change.
        device: where the priorities live.

    Raises:
        ConfigurationError: `sort_interval` is neither None nor a positive integer.
    """

    def __init__(self, capacity: int, sort_interval: int | None, device: torch.device) -> None:
        if sort_interval is not None:
            sort_interval = validation.positive_int("sort_interval", sort_interval)
        self.sort_interval = sort_interval
        self.snapshot = zeros((capacity,), torch.float32, device)
        """Priorities at the last sort, ascending, float32 [capacity]; 0 for empty slots."""
        self.filled = 0
        self.changes = 0

    @staticmethod
    def wanted(
        prioritization: str, capacity: int, sort_interval: int | None, device: torch.device
    ) -> "RankMasses | None":
        """One of these for "rank", None for "proportional".

        Raises:
            ConfigurationError: it is neither, or there is a `sort_interval` but nothing to sort.
        """
        if validation.one_of("prioritization", prioritization, PRIORITIZATIONS) == "rank":
            return RankMasses(capacity, sort_interval, device)
        if sort_interval is not None:
            raise ConfigurationError(
                f"sort_interval: expected none with prioritization={prioritization!r},"
                f" got {sort_interval!r}"
            )
        return None

    def of(self, priority: Tensor, alpha: float) -> Tensor:
        """Masses of changed or new priorities, float32 [B]: by the order at the last sort."""
        # from the right: equal priorities lie before the place that is found
        below = torch.searchsorted(self.snapshot, priority.contiguous(), right=True)
        mass = mass_of(len(self.snapshot) + 1 - below, -alpha)
        return torch.where(priority > 0, mass, 0.0)

    def range_of(self, priority: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
        """The least and the largest mass that each of the priorities may have, float32 [B] both.

        They differ where several were equal at the last sort: each of those has its own rank.
        """
        last = len(self.snapshot) - torch.searchsorted(self.snapshot, priority.contiguous())
        most = self.of(priority, alpha)
        return torch.where(priority > 0, mass_of(last.clamp(min=1), -alpha), 0.0).minimum(
            most
        ), most

    def grow(self, n: int) -> None:
        """`n` transitions are new."""
        self.filled = min(self.filled + n, len(self.snapshot))

    def due(self, changes: int) -> bool:
        """Whether it is time to sort, after so many more changes."""
        self.changes += changes
        return self.changes >= (self.sort_interval or max(self.filled, _SMALLEST_INTERVAL))

    def sort(self, priority: Tensor, alpha: float) -> Tensor:
        """Take the order anew, in O(n log n), and the masses of all slots, float32 [capacity]."""
        self.changes = 0
        priority = priority[: self.filled]
        order = order_of(priority)
        ordered = priority.index_select(0, order)
        self.snapshot[: len(self.snapshot) - self.filled] = 0
        self.snapshot[len(self.snapshot) - self.filled :] = ordered.flip(0)
        rank = torch.arange(1, self.filled + 1, device=priority.device)
        mass = torch.where(ordered > 0, mass_of(rank, -alpha), 0.0)
        return torch.zeros_like(self.snapshot).index_copy_(0, order, mass)

    def state(self, mass: Tensor) -> dict[str, Any]:
        """What cannot be had from priorities; `mass` float32 [n] are those of the filled slots."""
        return {
            "mass": mass.clone(),
            "snapshot": self.snapshot[len(self.snapshot) - len(mass) :].clone(),
            "changes": self.changes,
        }

    def load(self, state: dict[str, Any]) -> Tensor:
        """Take over a `state`; returns its masses for all slots, float32 [capacity]."""
        n = self.filled = len(state["mass"])
        self.changes = state["changes"]
        self.snapshot.zero_()[len(self.snapshot) - n :] = state["snapshot"].to(self.snapshot.device)
        mass = torch.zeros_like(self.snapshot)
        mass[:n] = state["mass"].to(mass.device)
        return mass

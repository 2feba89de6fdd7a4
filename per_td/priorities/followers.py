"""Followers of a `PriorityTable`: parts that keep something about its slots up to date.

A table tells its followers which slots have new masses, and which have new transitions. A buffer
that needs none has none.
"""

from typing import Protocol

import torch
from torch import Tensor

from per_td import validation
from per_td.kernels.parts import Layout
from per_td.memory import Zeros
from per_td.tree.trees import Trees

_TINY = torch.finfo(torch.float32).tiny


class Follower(Protocol):
    """A part that follows the changes of a table."""

    def follow(self, slot: Tensor, *, new: bool) -> None:
        """Take up changes of slots, int64 [S, B].

        Args:
            slot: changed, or perhaps changed; others than those of the table stand for none.
            new: they hold new transitions.
        """

    def follow_all(self, *, new: bool) -> None:
        """Take up a change of all slots."""

    def check_valid(self) -> None:
        """Raise PerTdError if it does not agree with the table."""


class SideTrees:
    """Trees over the slots of `main`, with masses that follow from its masses.

    "uniform" is 1 for every slot that can be drawn, so the total is the number of those. "inverse"
    is 1 / mass (LA3P, Saglam et al. 2022, arXiv 2209.00532, section 4). A mass of 0 stays 0.
    """

    def __init__(self, name: str, main: Trees, memory: Zeros) -> None:
        self.name, self._main = name, main
        self.trees = Trees(main.layout, main.device, launches=main.launches, memory=memory)
        self.follow_all(new=False)

    def _masses(self, mass: Tensor) -> Tensor:
        own = torch.ones_like(mass) if self.name == "uniform" else mass.reciprocal().clamp(_TINY)
        return torch.where(mass > 0, own, 0.0)

    def follow(self, slot: Tensor, *, new: bool) -> None:
        """See `Follower`."""
        layout = self._main.layout
        # to take up a slot that has not changed does no harm
        slot = slot.view(layout.groups, -1).clamp(0, layout.capacity - 1)
        mass = self._main.leaves[slot + self._main.starts]
        self.trees.ops.set_masses(self.trees, slot, self._masses(mass))

    def follow_all(self, *, new: bool) -> None:
        """See `Follower`."""
        self.trees.leaves.copy_(self._masses(self._main.leaves))
        self.trees.ops.refill(self.trees)

    def check_valid(self) -> None:
        """See `Follower`."""
        self.trees.check_valid()
        agree = torch.isclose(self.trees.leaves, self._masses(self._main.leaves), rtol=1e-6, atol=0)
        validation.require_valid(agree.all(), f"the {self.name} masses follow from the masses")


class DrawCounts:
    """Counts how often each transition was drawn."""

    def __init__(self, layout: Layout, device: torch.device, memory: Zeros) -> None:
        self._layout = layout
        # one place more in each row, for slots that are none
        self._memory = memory((layout.groups, layout.capacity + 1), torch.int32, device)

    @property
    def counts(self) -> Tensor:
        """Number of draws, int32 [S, capacity], a view."""
        return self._memory[:, : self._layout.capacity]

    def _places(self, slot: Tensor) -> Tensor:
        capacity = self._layout.capacity
        slot = slot.view(self._layout.groups, -1)
        return torch.where((slot < 0) | (slot >= capacity), capacity, slot)

    def draw(self, slot: Tensor) -> Tensor:
        """Count draws of `slot`, int64 [S, B]; return the counts, int32 in the same shape."""
        place = self._places(slot)
        self._memory.scatter_add_(1, place, torch.ones_like(place, dtype=torch.int32))
        return self._memory.gather(1, place).view(slot.shape)

    def follow(self, slot: Tensor, *, new: bool) -> None:
        """See `Follower`."""
        if new:
            self._memory.scatter_(1, self._places(slot), 0)

    def follow_all(self, *, new: bool) -> None:
        """See `Follower`."""
        if new:
            self._memory.zero_()

    def check_valid(self) -> None:
        """See `Follower`."""
        validation.require_valid((self.counts >= 0).all(), "draw counts are at least 0")

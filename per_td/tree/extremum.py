"""Largest and smallest value of a column, kept exact at O(log N) per update."""

from typing import Literal

import torch
from torch import Tensor

from per_td.tree import reference
from per_td.tree.layout import Layout

__all__ = ["ExtremumTree"]


def _max_children(children: Tensor) -> Tensor:
    return children.amax(-1)


def _min_children(children: Tensor) -> Tensor:
    return torch.where(children > 0, children, torch.inf).amin(-1)


class ExtremumTree:
    """The largest, or the smallest positive, of the values in a column that others write.

    Same layout as the `SumTree`, but the leaves are borrowed: after writing to them, say so with
    `refresh` or `refresh_all`.

    Args:
        leaves: the column, float32 [layout.leaf_slots]; 0 stands for "no value".
        layout: layout of the tree over it.
        which: "max" or "min".
    """

    def __init__(self, leaves: Tensor, layout: Layout, which: Literal["max", "min"]) -> None:
        self.leaves = leaves
        self._reduce = _max_children if which == "max" else _min_children
        self._none = 0.0 if which == "max" else torch.inf
        self.nodes = layout.new_nodes(self._none, leaves.dtype, leaves.device)
        self._layout = layout
        self.refresh_all()

    @property
    def _levels(self) -> list[Tensor]:
        return self._layout.levels(self.nodes)

    @property
    def root(self) -> int:
        """Address of `value`."""
        return self.nodes.data_ptr() + 4 * (self.nodes.numel() - 1)

    @property
    def value(self) -> Tensor:
        """The extremum, a 0-dim tensor; 0 for "max" and inf for "min" where there is no value."""
        return self.nodes[-1]

    def refresh(self, index: Tensor) -> None:
        """Take up what was written at the leaves `index`, int64 [B]."""
        reference.refresh(self.leaves, self._levels, index, self._reduce)

    def refresh_all(self) -> None:
        """Take up whatever was written, in O(N)."""
        reference.refresh_all(self.leaves, self._levels, self._reduce)

    def check_valid(self, name: str) -> None:
        """Compare every node with its children, in O(N); see `reference.check_nodes`."""
        reference.check_nodes(name, self.leaves, self._levels, self._reduce, padding=self._none)

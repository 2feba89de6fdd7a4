"""The one memory layout of the wide trees: which node is where.

A tree of fan-out 16 over `capacity` leaves. Level 0 is the leaves; node j of level k + 1 has the
children 16 j ... 16 j + 15 of level k, so parents are found by a division and children lie side by
side in one or two cache lines. The levels above the leaves lie one after the other in a single
tensor, each padded to whole groups of 16 (the root excepted).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from per_td.memory import zeros

__all__ = ["FANOUT", "Layout"]

FANOUT = 16


def _padded(width: int) -> int:
    return -(-width // FANOUT) * FANOUT


@dataclass(frozen=True)
class Layout:
    """Where the nodes of a tree over `capacity` leaves lie.

    Args:
        capacity: number of leaves that can be addressed, at least 1.

    Attributes:
        leaf_slots: leaves allocated. There is always at least one more than `capacity`: the leaf
            `spare`, to which a refused update is sent so that no data-dependent branch is needed.
        widths: nodes in each level above the leaves, from the leaves up; the last is 1, the root.
        offsets: where each of these levels begins in the tensor of nodes.
        node_slots: length of that tensor.
    """

    capacity: int
    leaf_slots: int
    widths: tuple[int, ...]
    offsets: tuple[int, ...]
    node_slots: int

    @classmethod
    def of(cls, capacity: int) -> "Layout":
        """The layout for `capacity` leaves."""
        leaf_slots = _padded(capacity + 1)
        widths, offsets, end = [leaf_slots // FANOUT], [0], 0
        while widths[-1] > 1:
            end += _padded(widths[-1])
            offsets.append(end)
            widths.append(_padded(widths[-1]) // FANOUT)
        return cls(capacity, leaf_slots, tuple(widths), tuple(offsets), end + 1)

    @property
    def spare(self) -> int:
        """Index of the leaf that is written by refused updates and stays empty."""
        return self.capacity

    def table(self) -> Tensor:
        """The offsets and the widths, int64 [2, levels] on the CPU, as the kernels read them."""
        return torch.tensor([self.offsets, self.widths], dtype=torch.int64, device="cpu")

    def levels(self, nodes: Tensor) -> list[Tensor]:
        """Views of the levels in `nodes` [node_slots], from the leaves' parents up to the root."""
        ends = (*self.offsets[1:], self.node_slots)
        return [nodes[start:end] for start, end in zip(self.offsets, ends, strict=True)]

    def new_nodes(self, fill: float, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A tensor [node_slots] for the nodes above the leaves."""
        nodes = zeros((self.node_slots,), dtype, device)
        return nodes.fill_(fill) if fill else nodes

"""The layout of S wide trees, and the block of memory that they and their table share.

A tree of fan-out 16. Level 0 is the leaves; node j of level k + 1 has the children 16 j to
16 j + 15 of level k, so parents are found by a division and children lie side by side in one or two
cache lines. The levels above the leaves lie one after the other in a single tensor, each padded to
whole groups of 16 (the root excepted).

Many trees of one size share these levels. Each tree owns `stride` leaves: those below `width` whole
nodes of the level `height`, its tops. A change in one tree never touches a node of another up to
that level, and nothing is drawn from the levels above. A single tree has one top: the root.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from per_td.errors import PerTdError
from per_td.memory import Zeros

FANOUT = 16

_ALIGNMENT = 64  # 16 leaves of a tree lie in one cache line
_GUARD = 0xA5
"""Fills the bytes between the views of a block; a write past the end of one changes them."""


def _padded(width: int) -> int:
    return -(-width // FANOUT) * FANOUT


@dataclass(frozen=True)
class Layout:
    """Where the nodes of S trees over `capacity` slots each lie.

    Attributes:
        capacity: slots of each tree, at least 1.
        groups: number of trees, S.
        stride: leaves from the first of a tree to the first of the next.
        width: tops of each tree.
        height: level of the tops, at least 1.
        leaf_slots: leaves allocated. There is always at least one more than belong to the trees:
            the leaf `spare`, which takes refused updates, so that no branch depends on data.
        widths: nodes in each level above the leaves, from the leaves up; the last is 1, the root.
        offsets: where each of these levels begins in the tensor of nodes.
        node_slots: length of that tensor.
    """

    capacity: int
    groups: int
    stride: int
    width: int
    height: int
    leaf_slots: int
    widths: tuple[int, ...]
    offsets: tuple[int, ...]
    node_slots: int

    @classmethod
    def of(cls, capacity: int, groups: int = 1) -> "Layout":
        """The layout for `groups` trees of `capacity` slots."""
        height, width, stride = 0, 1, capacity
        if groups > 1:  # the fewest leaves below at most 16 whole nodes
            height = 1
            while FANOUT ** (height + 1) < capacity:
                height += 1
            width = -(-capacity // FANOUT**height)
            stride = width * FANOUT**height
        leaf_slots = _padded(groups * stride + 1)
        widths, offsets, end = [leaf_slots // FANOUT], [0], 0
        while widths[-1] > 1:
            end += _padded(widths[-1])
            offsets.append(end)
            widths.append(_padded(widths[-1]) // FANOUT)
        return cls(
            capacity,
            groups,
            stride,
            width,
            height or len(widths),
            leaf_slots,
            tuple(widths),
            tuple(offsets),
            end + 1,
        )

    @property
    def spare(self) -> int:
        """The leaf that refused updates write; it stays empty."""
        return self.groups * self.stride

    def levels(self, nodes: Tensor) -> list[Tensor]:
        """Views of the levels in `nodes` [node_slots], from the leaves' parents up to the root."""
        ends = (*self.offsets[1:], self.node_slots)
        return [nodes[start:end] for start, end in zip(self.offsets, ends, strict=True)]

    def tops(self, nodes: Tensor) -> Tensor:
        """The highest nodes of each tree in `nodes` [node_slots], a view [S, width]."""
        start = self.offsets[self.height - 1]
        return nodes[start : start + self.groups * self.width].view(self.groups, self.width)

    def slots(self, column: Tensor) -> Tensor:
        """The slots of each tree in a column over all leaves [leaf_slots], a view [S, capacity]."""
        own = column[: self.groups * self.stride].view(self.groups, self.stride)
        return own[:, : self.capacity]

    def starts(self, device: torch.device) -> Tensor:
        """The first leaf of each tree, int64 [S, 1]."""
        return torch.arange(0, self.spare, self.stride, device=device).unsqueeze(-1)


class Block:
    """Named tensors with guard bytes before and after each.

    Each has memory of its own: torch.compile refuses to change views of several dtypes in one.

    Args:
        views: shape and dtype of each, by name. All start as 0.
        device: where the memory is.
        zeros: makes the memory.

    Attributes:
        memory: that of each, uint8, by name. torch moves it when it sends a block to a process.
        record: for the compiled kernels: addresses and lengths, kept by the code that made it.
    """

    def __init__(
        self,
        views: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
        device: torch.device,
        zeros: Zeros,
    ) -> None:
        self._shapes = dict(views)
        self.memory: dict[str, Tensor] = {}
        for name in views:
            start, end = self._place(name)
            length = start + -(-(end - start + 1) // _ALIGNMENT) * _ALIGNMENT
            self.memory[name] = zeros((length,), torch.uint8, device)
        self.record: Any = None
        self._retired: Any = None
        self._views = self._made()
        for _, gap in self._gaps():
            gap.fill_(_GUARD)

    def __getstate__(self) -> dict[str, Any]:
        # the memory may be about to move, and a kernel may still be reading the old record
        self.record, self._retired = None, self.record
        return {"_shapes": self._shapes, "memory": self.memory}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.record, self._retired, self._views = None, None, self._made()

    @property
    def names(self) -> list[str]:
        """The names of the views."""
        return list(self._shapes)

    def __getitem__(self, name: str) -> Tensor:
        return self._views[name]

    def _place(self, name: str) -> tuple[int, int]:
        """Where a view begins and ends in its memory, in bytes."""
        shape, dtype = self._shapes[name]
        return _ALIGNMENT, _ALIGNMENT + torch.Size(shape).numel() * dtype.itemsize

    def _made(self) -> dict[str, Tensor]:
        made = {}
        for name, (shape, dtype) in self._shapes.items():
            start, end = self._place(name)
            made[name] = self.memory[name][start:end].view(dtype).view(shape)
        return made

    def _gaps(self) -> list[tuple[str, Tensor]]:
        """The bytes that belong to no view, and where they are."""
        gaps = []
        for name, memory in self.memory.items():
            start, end = self._place(name)
            gaps += [(f"before {name}", memory[:start]), (f"after {name}", memory[end:])]
        return gaps

    def check_valid(self) -> None:
        """Raise PerTdError if something has written past the end of a view."""
        for where, gap in self._gaps():
            if (gap != _GUARD).any():
                raise PerTdError(f"memory: the guard bytes {where} have been overwritten")

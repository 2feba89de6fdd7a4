"""The parts that operations work on: their interfaces, and the block of memory with wide trees.

The fan-out is 16. Level 0 is the leaves. Node j of level k + 1 has the children 16 j to 16 j + 15
of level k, so a division finds the parent, and children lie side by side in one or two cache lines.
The levels above the leaves lie one after the other in a single tensor, each padded to whole groups
of 16 (the root excepted).

All trees share these levels. Each tree owns `stride` leaves: those below `width` whole nodes, its
tops, of the level `height`. A change in one tree never touches another's nodes up to that level,
and draws never read the levels above. A single tree has one top: the root.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from per_td.errors import PerTdError
from per_td.memory import Zeros

EXPONENT, EPS, MINIMA, BETAS = range(4)
"""Places in a table's settings, float64 [4]: the exponent that gives the masses of all trees, NaN
where each has its own; eps; 1 if the smallest masses are kept up to date; 1 if each tree has a beta
of its own."""

VALUE, GENERATION, MASK, STAMPS, ADD_EPS, SQUARED, NEW, EVER_MAX = (1 << k for k in range(8))
"""Options of `assign`, a bit each; one is unset where its argument is absent."""

STRATIFIED, BY_SIZE, BY_BUFFER = (1 << k for k in range(3))
"""Options of `draw`."""

FANOUT = 16

_ALIGNMENT = 64  # 16 leaves of a tree lie in one cache line
_GUARD = 0xA5
"""Value of the guard bytes between the views of a block."""


def _padded(width: int) -> int:
    return -(-width // FANOUT) * FANOUT


@dataclass(frozen=True)
class Layout:
    """Places of the nodes of S trees over `capacity` slots each.

    Attributes:
        capacity: slots of each tree, at least 1.
        groups: number of trees, S.
        stride: leaves from the first of a tree to the first of the next.
        width: tops of each tree.
        height: level of the tops, at least 1.
        leaf_slots: leaves allocated, at least one more than belong to the trees: the leaf `spare`
            takes refused updates, so that no branch depends on data.
        widths: nodes in each level above the leaves, from the leaves up; the last is 1, the root.
        offsets: first node of each of these levels in the tensor of nodes.
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
        """Make the layout for `groups` trees of `capacity` slots."""
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
        trees = capacity, groups, stride, width, height or len(widths)
        return cls(*trees, leaf_slots, tuple(widths), tuple(offsets), end + 1)

    @property
    def spare(self) -> int:
        """Leaf that takes refused updates; its mass stays 0."""
        return self.groups * self.stride

    def nodes(self, height: int) -> int:
        """Number of nodes of each tree in a level; of leaves, that is 0."""
        return -(-self.stride // FANOUT**height)

    def levels(self, nodes: Tensor) -> list[Tensor]:
        """Views of the levels in `nodes` [node_slots], from the leaves' parents up to the root."""
        ends = (*self.offsets[1:], self.node_slots)
        return [nodes[start:end] for start, end in zip(self.offsets, ends, strict=True)]

    def tops(self, nodes: Tensor) -> Tensor:
        """Tops of each tree in `nodes` [node_slots], a view [S, width]."""
        start = self.offsets[self.height - 1]
        return nodes[start : start + self.groups * self.width].view(self.groups, self.width)

    def slots(self, column: Tensor) -> Tensor:
        """Slots of each tree in a column over all leaves [leaf_slots], a view [S, capacity]."""
        own = column[: self.groups * self.stride].view(self.groups, self.stride)
        return own[:, : self.capacity]

    def starts(self, device: torch.device) -> Tensor:
        """First leaf of each tree, int64 [S, 1]."""
        return torch.arange(0, self.spare, self.stride, device=device).unsqueeze(-1)


class Block:
    """Tensors of these shapes and dtypes, filled with 0, with guard bytes before and after each.

    Each has memory of its own: torch.compile cannot change views of several dtypes in one.

    Attributes:
        memory: memory of each tensor, uint8, by name; torch moves it to send a block to a process.
        record: addresses and lengths for the compiled kernels, kept by the code that made it.
    """

    record: Any
    _retired: Any

    def __init__(
        self,
        views: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
        device: torch.device,
        zeros: Zeros,
    ) -> None:
        memory = {}
        for name, (shape, dtype) in views.items():
            length = torch.Size(shape).numel() * dtype.itemsize
            room = -(-(length + 1) // _ALIGNMENT) * _ALIGNMENT
            memory[name] = zeros((_ALIGNMENT + room,), torch.uint8, device)
        self.__setstate__({"_shapes": dict(views), "memory": memory})
        for _, gap in self._gaps:
            gap.fill_(_GUARD)

    def __getstate__(self) -> dict[str, Any]:
        # the memory may be about to move, and a kernel may still be reading the old record
        self._retired, self.record = self.record, None
        return {"_shapes": self._shapes, "memory": self.memory}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = state["_shapes"]
        self.memory: dict[str, Tensor] = state["memory"]
        self.record = self._retired = None
        self.views: dict[str, Tensor] = {}
        self._gaps: list[tuple[str, Tensor]] = []
        for name, (shape, dtype) in self._shapes.items():
            memory, end = self.memory[name], _ALIGNMENT + torch.Size(shape).numel() * dtype.itemsize
            self.views[name] = memory[_ALIGNMENT:end].view(dtype).view(shape)
            self._gaps += [(f"before {name}", memory[:_ALIGNMENT]), (f"after {name}", memory[end:])]

    def __getitem__(self, name: str) -> Tensor:
        return self.views[name]

    def check_valid(self) -> None:
        """Raise PerTdError if something has written past the end of a view."""
        for where, gap in self._gaps:
            if (gap != _GUARD).any():
                raise PerTdError(f"memory: the guard bytes {where} have been overwritten")


class Trees(Protocol):
    """S trees in a block of memory; see `per_td.tree.Trees`."""

    layout: Layout
    block: Block
    device: torch.device
    starts: Tensor
    leaves: Tensor
    sums: Tensor
    raw: Tensor
    maxima: Tensor
    minima: Tensor
    settings: Tensor
    exponents: Tensor
    ever_max: Tensor
    replayed: Tensor
    refused: Tensor
    keeps_minima: bool

    @property
    def total(self) -> Tensor:
        """Sum of the masses of each tree, float64 [S]."""

    @property
    def largest(self) -> Tensor:
        """Largest priority in each tree, 0 for none, float32 [S]."""

    @property
    def smallest(self) -> Tensor:
        """Smallest positive mass in each tree, inf for none, float32 [S]."""


class Distribution(Protocol):
    """The map from priorities to masses; see `per_td.priorities.distributions`."""

    def masses(self, trees: Any, priority: Tensor, leaf: Tensor) -> Tensor:
        """Masses of the changed or new priorities of leaves, float32 [B]."""


class Rows(Protocol):
    """S rings of rows, one ring after the other in each column."""

    groups: int
    capacity: int
    columns: Sequence[Tensor]
    starts: Tensor
    record: Any


class Frames(Protocol):
    """A ring of frames and what is known of the recent ones; see `per_td.storage.frame_store`.

    Attributes:
        lanes: frames as integers, int64 or uint8 [size + 1, words]; the last row is a spare one.
        factors: factors of the hash, int64 [words].
        size: number of frames.
        depth: frames of a stack, k.
        envs: number of environments E.
        look_back: a frame is known for so many writes of its environment.
        recent: hashes, numbers, and writes that stored them, int64 [3, E + 1, M].
        counters: frames stored, writes, and for the kernels the place among the recent frames of
            the first frame of each last stack, int64 [4, E + 1].
        page: number of frames ever stored, and the first that is not gone, int64 [2].
    """

    lanes: Tensor
    factors: Tensor
    size: int
    depth: int
    envs: int
    look_back: int
    recent: Tensor
    counters: Tensor
    page: Tensor
    record: Any

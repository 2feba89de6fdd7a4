"""The nodes above the leaves on CUDA, in Triton: recomputed from their children, level by level.

The nodes of `per_td.kernels.reference`. Programs that meet in a node write the same
number, so the order in which they run does not matter. The sums, the largest and the smallest
values have the same layout and share their launches; the last levels share one.
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from per_td.kernels.layout import FANOUT, Layout

NODES = 32  # nodes of one program, of 16 children each
TOP = FANOUT**2  # nodes of the widest level that one program recomputes together with those above

_SUM, _MAX, _MIN = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _reduce(children, KIND: tl.constexpr):
    """Nodes [n] of their children [n, 16]: the sum, the largest, or the smallest positive."""
    if KIND == _SUM:
        node = tl.sum(children.to(tl.float64), axis=1)
    elif KIND == _MAX:
        node = tl.max(children, axis=1)
    else:
        node = tl.min(tl.where(children > 0, children, float("inf")), axis=1)
    return node


@triton.jit
def _refresh_nodes(children, start, nodes, offset, node, inside, KIND: tl.constexpr):
    column = tl.arange(0, 16)[None, :]
    group = tl.load(children + start + node[:, None] * 16 + column, mask=inside[:, None], other=0.0)
    tl.store(nodes + offset + node, _reduce(group, KIND), mask=inside)


@triton.jit(do_not_specialize=["n", "slots", "start", "offset", "width", "shift"])
def _level(
    index,
    masses,
    sums,
    values,
    maxima,
    positive,
    minima,
    n,
    slots,
    start,
    offset,
    width,
    shift,
    ALL: tl.constexpr,
    NODES: tl.constexpr,
):
    """Recompute one level of each tree: the nodes above the leaves `index` [n], or ALL.

    Args:
        index: leaves; what is not in [0, slots) is left out.
        masses, values, positive: children in each tree: its leaves, or on higher levels its nodes.
        sums, maxima, minima: nodes of each tree; the latter two may be None.
        n, slots: updates, and leaves.
        start, offset, width: where the children and the level begin, and its nodes.
        shift: which level: nodes are leaves >> shift.
        ALL: whether to recompute the whole level.
        NODES: per program.
    """
    lane = tl.program_id(0) * NODES + tl.arange(0, NODES)
    if ALL:
        inside = lane < width
        node = lane.to(tl.int64)
    else:
        at = tl.load(index + lane, mask=lane < n, other=-1)
        inside = (at >= 0) & (at < slots)
        node = tl.where(inside, at, 0) >> shift
    _refresh_nodes(masses, start, sums, offset, node, inside, _SUM)
    if maxima is not None:
        _refresh_nodes(values, start, maxima, offset, node, inside, _MAX)
    if minima is not None:
        _refresh_nodes(positive, start, minima, offset, node, inside, _MIN)


@triton.jit
def _refresh_top(children, start, nodes, offset, width, KIND: tl.constexpr, LEVELS: tl.constexpr):
    ROWS: tl.constexpr = 16 ** (LEVELS - 1)
    row = tl.arange(0, ROWS)
    group = row[:, None] * 16 + tl.arange(0, 16)[None, :]
    inside = row < width
    level = _reduce(tl.load(children + start + group, mask=inside[:, None], other=0.0), KIND)
    tl.store(nodes + offset + row, level, mask=inside)
    if LEVELS == 3:
        width = tl.cdiv(width, 16)
        offset += width * 16
        row = tl.arange(0, 16)
        level = _reduce(tl.reshape(level, [16, 16]), KIND)
        tl.store(nodes + offset + row, level, mask=row < width)
    if LEVELS > 1:
        root = _reduce(tl.reshape(level, [1, 16]), KIND)
        tl.store(nodes + offset + 16 + tl.arange(0, 1), root)


@triton.jit(do_not_specialize=["start", "offset", "width"])
def _top(
    masses, sums, values, maxima, positive, minima, start, offset, width, LEVELS: tl.constexpr
):
    """Recompute the last levels of each tree, in one program; see `_level`."""
    _refresh_top(masses, start, sums, offset, width, _SUM, LEVELS)
    if maxima is not None:
        _refresh_top(values, start, maxima, offset, width, _MAX, LEVELS)
    if minima is not None:
        _refresh_top(positive, start, minima, offset, width, _MIN, LEVELS)


Tree = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Kinds:
    """Trees of one layout that change together; each a pair of its leaves and its nodes."""

    layout: Layout
    sums: Tree
    maxima: Tree | None = None
    minima: Tree | None = None


def refresh(trees: Kinds, index: Tensor) -> None:
    """Recompute all ancestors of the leaves `index`, int64 [B]; others than leaves are left out."""
    layout, n = trees.layout, len(index)
    widths, offsets = layout.widths, layout.offsets
    pairs: list[tuple[Tensor | None, Tensor | None]] = [
        tree or (None, None) for tree in (trees.sums, trees.maxima, trees.minima)
    ]
    top = next(k for k, width in enumerate(widths) if width <= TOP)
    start = 0
    for k in range(top + 1):
        memory = [side for pair in pairs for side in pair]
        if k == top:
            _top[(1,)](*memory, start, offsets[k], widths[k], LEVELS=len(widths) - k, num_warps=8)
            break
        every = n >= widths[k]  # as many updates as nodes: the whole level is cheaper
        _level[(triton.cdiv(min(n, widths[k]), NODES),)](
            index,
            *memory,
            n,
            layout.leaf_slots,
            start,
            offsets[k],
            widths[k],
            4 * (k + 1),
            ALL=every,
            NODES=NODES,
        )
        pairs = [(nodes, nodes) for _, nodes in pairs]
        start = offsets[k]

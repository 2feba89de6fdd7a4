"""Nodes above the leaves on CUDA, recomputed from their children level by level, in Triton.

Programs that meet in a node write the same number, so their order does not matter. Sums, maxima and
minima have the same layout and share their launches; the last levels share one.
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from per_td.kernels.layout import FANOUT, Layout

NODES = 32  # nodes per program, of 16 children each
TOP = FANOUT**2  # nodes of the widest level that one program recomputes with those above

_SUM, _MAX, _MIN = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _reduce(children, KIND: tl.constexpr):
    """Reduce children [n, 16] to nodes [n]: the sum, the largest, or the smallest positive."""
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
    sums,
    maxima,
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
        index: leaves; others than those in [0, slots) are skipped.
        sums, maxima, minima: children and nodes of each tree; the latter two may be None.
        n, slots: number of updates, and of leaves.
        start, offset, width: first child, first node of the level, and number of its nodes.
        shift: nodes are leaves >> shift.
        ALL: recompute the whole level.
        NODES: nodes per program.
    """
    lane = tl.program_id(0) * NODES + tl.arange(0, NODES)
    if ALL:
        inside = lane < width
        node = lane.to(tl.int64)
    else:
        at = tl.load(index + lane, mask=lane < n, other=-1)
        inside = (at >= 0) & (at < slots)
        node = tl.where(inside, at, 0) >> shift
    _refresh_nodes(sums[0], start, sums[1], offset, node, inside, _SUM)
    if maxima is not None:
        _refresh_nodes(maxima[0], start, maxima[1], offset, node, inside, _MAX)
    if minima is not None:
        _refresh_nodes(minima[0], start, minima[1], offset, node, inside, _MIN)


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
def _top(sums, maxima, minima, start, offset, width, LEVELS: tl.constexpr):
    """Recompute the last levels of each tree, in one program; see `_level`."""
    _refresh_top(sums[0], start, sums[1], offset, width, _SUM, LEVELS)
    if maxima is not None:
        _refresh_top(maxima[0], start, maxima[1], offset, width, _MAX, LEVELS)
    if minima is not None:
        _refresh_top(minima[0], start, minima[1], offset, width, _MIN, LEVELS)


Tree = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Kinds:
    """Trees of one layout that change together, each a pair of leaves and nodes."""

    layout: Layout
    sums: Tree
    maxima: Tree | None = None
    minima: Tree | None = None


def refresh(trees: Kinds, index: Tensor) -> None:
    """Recompute all ancestors of the leaves `index`, int64 [B]; others than leaves are skipped."""
    layout, n, start = trees.layout, len(index), 0
    widths, offsets = layout.widths, layout.offsets
    pairs = [trees.sums, trees.maxima, trees.minima]
    top = next(k for k, width in enumerate(widths) if width <= TOP)
    for k in range(top):
        every = n >= widths[k]  # as many updates as nodes: the whole level is cheaper
        place = start, offsets[k], widths[k], 4 * (k + 1)
        grid = (triton.cdiv(min(n, widths[k]), NODES),)
        _level[grid](index, *pairs, n, layout.leaf_slots, *place, ALL=every, NODES=NODES)
        pairs, start = [pair and (pair[1], pair[1]) for pair in pairs], offsets[k]
    place_of_top = start, offsets[top], widths[top]
    _top[(1,)](*pairs, *place_of_top, LEVELS=len(widths) - top, num_warps=8)

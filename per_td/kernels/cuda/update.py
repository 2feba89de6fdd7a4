"""Changes to the trees on CUDA, in Triton, in few launches at any capacity.

Launches depend on shapes alone and the host never waits, so a CUDA graph can capture them. Results
do not depend on the order in which programs run:

- Of equal indices the last one holds. In a first launch every update raises its slot, read as an
  unsigned integer, to its claim: 2^31 + 1 + its position in the batch. That is more than any
  priority, which is a float without a sign, and more than the claim of any earlier update. In a
  second launch the update whose claim stands writes its priority. This needs no sort, no memory.
- Nodes are recomputed from their children level by level: programs that meet in a node write the
  same number. Sums, maxima and minima share their launches, and the last levels share one.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from per_td.kernels.parts import FANOUT, Layout

FLAT = 256  # updates of one program where they are independent

_TINY = tl.constexpr(torch.finfo(torch.float32).tiny)
_HUGE = tl.constexpr(torch.finfo(torch.float32).max)


# --- nodes ----------------------------------------------------------------------------------------

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
    """Recompute one level of each tree: the nodes leaf >> shift above `index` [n], or ALL.

    Others than leaves in [0, slots) are skipped. `sums`, `maxima` and `minima` are pairs of
    children, from `start` on, and nodes, `width` from `offset` on; the latter two may be None.
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


# --- leaves ---------------------------------------------------------------------------------------


@triton.jit
def _priority(update, lane, inside):
    """|value| + eps, or the value as it is; an update is (index, value, eps or None)."""
    new = tl.load(update[1] + lane, mask=inside, other=0.0)
    if update[2] is not None:
        new = tl.abs(new) + tl.load(update[2]).to(tl.float32)
    return new


@triton.jit
def _claim_of(lane):
    return lane.to(tl.uint32) + 0x80000001


@triton.jit(do_not_specialize=["n", "slots", "capacity"])
def _claim(
    column,
    update,
    live,
    generation,
    written,
    size,
    refused,
    dropped,
    n,
    slots,
    capacity,
    FLAT: tl.constexpr,
):
    """Mark each slot of an `update` [n] in `column` (float32 as uint32) with the last claim.

    Refused and dropped updates claim nothing. They are counted: as `refused` if the slot or value
    is wrong, as `dropped` if not live, or stale.
    """
    lane = tl.program_id(0) * FLAT + tl.arange(0, FLAT)
    inside = lane < n
    at = tl.load(update[0] + lane, mask=inside, other=0)
    new = _priority(update, lane, inside)
    limit = slots
    if size is not None:
        limit = tl.minimum(tl.load(size), slots)
    right = inside & (at >= 0) & (at < limit) & (new >= 0) & (new <= _HUGE)  # NaN is neither
    alive = inside
    if live is not None:
        alive = inside & (tl.load(live + lane, mask=inside, other=0) != 0)
    if generation is not None:
        age = tl.load(written) - 1 - at
        wrapped = age // capacity  # towards 0
        wrapped = tl.where(wrapped * capacity > age, wrapped - 1, wrapped)
        alive = alive & (tl.load(generation + lane, mask=inside, other=0) == wrapped)
    if refused is not None:
        wrong = tl.sum((inside & (right == 0)).to(tl.int64), axis=0)
        tl.atomic_add(refused, wrong, sem="relaxed")
    if dropped is not None:
        late = tl.sum((inside & (alive == 0)).to(tl.int64), axis=0)
        tl.atomic_add(dropped, late, sem="relaxed")
    tl.atomic_max(column + at, _claim_of(lane), mask=right & alive, sem="relaxed")


@triton.jit(do_not_specialize=["n", "slots", "stride"])
def _settle(column, masses, update, alpha, stride, ever_max, n, slots, FLAT: tl.constexpr):
    """Write the value of every update whose claim stands; `masses` and `ever_max` may be None.

    `alpha` is one number, or with a `stride`, not None, one for each tree of so many leaves.

    A slot holds the claim of its last update, or the priority that this has written since. FLAT is
    at least the threads of a program: if two of them did one update, the second might look after
    the first has written.
    """
    lane = tl.program_id(0) * FLAT + tl.arange(0, FLAT)
    inside = lane < n
    at = tl.load(update[0] + lane, mask=inside, other=-1)
    inside = (at >= 0) & (at < slots)
    stands = inside & (tl.load(column + at, mask=inside, other=0) == _claim_of(lane))
    new = tl.where(stands, tl.abs(_priority(update, lane, stands)), 0.0)  # abs: no -0
    tl.store(column + at, new.to(tl.uint32, bitcast=True), mask=stands)
    if masses is not None:
        if stride is not None:
            exponent = tl.load(alpha + at // stride, mask=stands, other=1.0)
        else:
            exponent = tl.load(alpha)
        mass = tl.exp(tl.log(tl.where(new > 0, new, 1.0).to(tl.float64)) * exponent)
        mass = tl.minimum(tl.maximum(mass, _TINY), _HUGE).to(tl.float32)
        tl.store(masses + at, tl.where(new > 0, mass, 0.0), mask=stands)
    if ever_max is not None:  # float32 as int32: without a sign, in the same order
        largest = tl.max(new, axis=0).to(tl.int32, bitcast=True)
        tl.atomic_max(ever_max, largest, sem="relaxed")


def put(trees: Kinds, index: Tensor, value: Tensor) -> None:
    """Set the masses of leaves int64 [B], one after the other, and the sums, all that `trees` has.

    An update is skipped if the index is not that of a tree's leaf, or the value is negative,
    infinite or NaN.
    """
    if len(index):
        update = index.contiguous(), value.contiguous(), None
        column, n, slots = trees.sums[0].view(torch.uint32), len(index), trees.layout.spare
        grid, unused = (triton.cdiv(n, FLAT),), (None,) * 6
        _claim[grid](column, update, *unused, n, slots, slots, FLAT)
        _settle[grid](column, None, update, None, None, None, n, slots, FLAT)
        refresh(trees, index)


def assign(
    trees: Kinds,
    raw: Tensor,
    index: Tensor,
    value: Tensor,
    *,
    alpha: Tensor,
    ever_max: Tensor | None = None,
    eps: Tensor | None = None,
    size: Tensor | int | None = None,
    live: Tensor | None = None,
    generation: Tensor | None = None,
    written: Tensor | None = None,
    refused: Tensor | None = None,
) -> Tensor | int:
    """Set the priorities of the leaves `index` [B], one after the other, their masses and nodes.

    Args:
        trees: the sums, the maxima, and any others.
        raw: the priorities, float32 [leaf_slots].
        index, value: int64 and float32 [B]; TD errors, or without `eps` priorities.
        alpha: exponents of the priorities of each tree, float64 [S], or 0-dim for one tree.
        ever_max: takes the largest priority ever written, float32 [1].
        eps: added to |TD error|, float64, 0-dim.
        size: an index must be below it, a number or int64, 0-dim.
        live: bool [B], False drops an update.
        generation: generations of the transitions meant, int64 [B]; stale updates are dropped.
        written: number of transitions ever written, int64, 0-dim; needed with `generation`.
        refused: counts updates whose slot or priority is out of range or NaN, int64, 0-dim.

    Returns:
        The number of updates dropped, int64, 0-dim, or 0.
    """
    n, slots = len(index), trees.layout.spare
    if not n:
        return 0
    update = index.contiguous(), value.contiguous(), eps
    live = None if live is None else live.contiguous()
    generation = None if generation is None else generation.contiguous()
    dropped = None
    if live is not None or generation is not None:
        dropped = torch.zeros((), dtype=torch.int64, device=index.device)
    limit, size = (min(size, slots), None) if isinstance(size, int) else (slots, size)
    column, grid = raw.view(torch.uint32), (triton.cdiv(n, FLAT),)
    given, counters = (live, generation, written, size), (refused, dropped)
    _claim[grid](column, update, *given, *counters, n, limit, slots, FLAT)
    record = None if ever_max is None else ever_max.view(torch.int32)
    stride = trees.layout.stride if trees.layout.groups > 1 else None
    _settle[grid](column, trees.sums[0], update, alpha, stride, record, n, slots, FLAT)
    refresh(trees, index)
    return 0 if dropped is None else dropped

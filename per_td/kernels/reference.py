"""The operations in plain torch, on any device: kernels must give the same results.

`per_td.kernels.cpu.door` and `per_td.kernels.cuda.launches` have these operations, with these
arguments. An index names a slot in its own tree. S trees take and return tensors of S rows,
flattened or not. Nothing here makes the host wait for a value.
"""

from array import array
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from per_td import validation
from per_td.errors import IndexRangeError, PerTdError
from per_td.kernels.frame_search import store_frames
from per_td.kernels.parts import EPS, FANOUT, Distribution, Rows, Trees
from per_td.weights import importance_weights

__all__ = [
    "assign",
    "assign_new",
    "check_nodes",
    "draw",
    "draw_distinct",
    "find",
    "for_new",
    "gather",
    "generations",
    "mark_replayed",
    "refill",
    "set_masses",
    "sizes",
    "store_frames",
    "weigh",
    "write_rows",
]

_LONGEST = 4096
"""Most numbers of a prefix sum, which adds up as many roundings."""

Reduce = Callable[[Tensor], Tensor]
Runs: TypeAlias = "array[int]"
"""First slot and length of a run of slots for each group, int64."""


# --- nodes ----------------------------------------------------------------------------------------


def _sum(children: Tensor) -> Tensor:
    return children.sum(-1, dtype=torch.float64)


def _max(children: Tensor) -> Tensor:
    return children.amax(-1)


def _min_positive(children: Tensor) -> Tensor:
    return torch.where(children > 0, children, torch.inf).amin(-1)


def _columns(trees: Trees) -> list[tuple[Tensor, Tensor, Reduce]]:
    """Leaves, nodes and the reduction of 16 children to a node, for each kind of node kept."""
    kinds: list[tuple[Tensor, Tensor, Reduce]] = [(trees.leaves, trees.sums, _sum)]
    if len(trees.raw):
        kinds.append((trees.raw, trees.maxima, _max))
        if trees.keeps_minima:
            kinds.append((trees.leaves, trees.minima, _min_positive))
    return kinds


def _refresh(trees: Trees, index: Tensor | None) -> None:
    """Recompute the ancestors of the leaves `index` [B] from their children; None: all nodes."""
    kinds = [(kind, trees.layout.levels(kind[1])) for kind in _columns(trees)]
    for height, width in enumerate(trees.layout.widths):
        # as many updates as nodes: the whole level is cheaper, and so are those above
        index = index >> 4 if index is not None and index.numel() < width else None
        for (leaves, _, reduce), levels in kinds:
            level, groups = levels[height], (leaves, *levels)[height].view(-1, FANOUT)
            if index is None:
                level[:width] = reduce(groups)
            else:  # where an index occurs twice, both write the same
                level.index_copy_(0, index, reduce(groups.index_select(0, index)))


def refill(trees: Trees) -> None:
    """Recompute every node from the leaves and the priorities, in O(N)."""
    _refresh(trees, None)


def check_nodes(trees: Trees) -> None:
    """Raise PerTdError if a node does not follow from its children, in O(N); the host waits."""
    kinds = [("sums", 0.0, 1e-12), ("maxima", 0.0, 0.0), ("minima", torch.inf, 0.0)]
    columns = zip(kinds, _columns(trees), strict=False)
    for (name, padding, rtol), (children, nodes, reduce) in columns:
        for height, level in enumerate(trees.layout.levels(nodes), 1):
            groups = children.view(-1, FANOUT)
            expected = torch.full_like(level, padding)
            expected[: groups.shape[0]] = reduce(groups)
            validation.require_valid(
                torch.isclose(level, expected, rtol=rtol, atol=0.0).all(),
                f"every node of the {name} follows from its 16 children; level {height} does not",
            )
            children = level


def keep_last(index: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Sort indices [B], and give every occurrence of one the value of its last.

    The result may then be written in any order, or in parallel.
    """
    ordered, order = index.sort(stable=True)
    last = torch.searchsorted(ordered, ordered, right=True) - 1
    return ordered, value.index_select(0, order.index_select(0, last))


# --- changes --------------------------------------------------------------------------------------


def set_masses(trees: Trees, index: Tensor, value: Tensor) -> None:
    """Set the masses float32 of slots int64, [S, B]; where a slot occurs twice, the last holds.

    Raises:
        IndexRangeError: an index is not in [0, capacity).
        PriorityError: a value is NaN, infinite or negative. On CUDA such pairs are skipped.
    """
    layout = trees.layout
    slot, value = index.view(layout.groups, -1).clone(), value.view(layout.groups, -1).clone()
    valid = validation.require_slots(slot, layout.capacity)
    valid = valid & validation.require_finite("value", value, low=0.0)
    leaf = torch.where(valid, slot + trees.starts, layout.spare).flatten()
    leaf, value = keep_last(leaf, torch.where(valid, value, 0.0).flatten())
    trees.leaves[leaf] = value
    _refresh(trees, leaf)


def for_new(trees: Trees, *, ever_max: bool) -> Tensor:
    """Priority of new transitions, [S]: the largest, or the largest ever; 1 if that is 0."""
    known = trees.ever_max if ever_max else trees.largest
    return torch.where(known > 0, known, 1.0)


def _write(trees: Trees, distribution: Distribution, leaf: Tensor, priority: Tensor) -> None:
    """Write valid priorities of leaves [n], their masses and their nodes."""
    trees.raw.index_copy_(0, leaf, priority)
    trees.leaves.index_copy_(0, leaf, distribution.masses(trees, priority, leaf))
    _refresh(trees, leaf)
    torch.maximum(trees.ever_max, trees.largest, out=trees.ever_max)


def _require_runs(runs: Runs, groups: int, capacity: int, least: int, most: int) -> None:
    """Raise IndexRangeError unless each group has a run of `least` to `most` slots that exist."""
    if torch.compiler.is_compiling():  # the storage made them
        return
    starts, lengths = runs[::2], runs[1::2]
    right = all(0 <= start < capacity for start in starts)
    right = right and all(least <= n <= most for n in lengths)
    if len(runs) != 2 * groups or not right:
        raise IndexRangeError(
            f"slots: expected {least} to {most}, from one of {capacity} on, in {groups} groups,"
            f" got {list(lengths)} from {list(starts)} on; nothing was written"
        )


def assign_new(trees: Trees, distribution: Distribution, runs: Runs, *, ever_max: bool) -> None:
    """Give runs of slots, which may pass the end of the ring, the priority of new transitions.

    Raises:
        IndexRangeError: a run names slots that do not exist.
    """
    capacity = trees.layout.capacity
    _require_runs(runs, trees.layout.groups, capacity, 0, capacity)
    _write(trees, distribution, *begin_runs(trees, runs, ever_max=ever_max))


def begin_runs(trees: Trees, runs: Runs, *, ever_max: bool) -> tuple[Tensor, Tensor]:
    """Mark runs of slots as not replayed; return their leaves [n] and their new priorities [n]."""
    layout, new, leaves, priorities = trees.layout, for_new(trees, ever_max=ever_max), [], []
    for s in range(layout.groups):
        start, n = runs[2 * s : 2 * s + 2]
        slot = torch.arange(start, start + n, device=trees.device).remainder_(layout.capacity)
        leaves.append(slot + s * layout.stride)
        priorities.append(new[s].expand(n))
    leaf = torch.cat(leaves)
    mark_replayed(trees, leaf, drawn=False)
    return leaf, torch.cat(priorities)


def assign(
    trees: Trees,
    distribution: Distribution,
    index: Tensor,
    value: Tensor | None,
    *,
    written: Tensor | int,
    limit: int,
    generation: Tensor | None = None,
    stamps: Tensor | None = None,
    mask: Tensor | None = None,
    add_eps: bool = False,
    squared: bool = False,
    new: bool = False,
    ever_max: bool = False,
) -> Tensor | int:
    """Set the priorities of slots; where a slot occurs twice, its last value holds.

    Args:
        trees: the trees.
        distribution: turns priorities into masses.
        index: int64 [S, B].
        value: float32 [S, B]; None: the priority of new transitions.
        written: number of transitions ever written, int64 [S], or one number for all.
        limit: an index must be below min(written, limit).
        generation: generations of the transitions meant, int64 [S, B]; stale updates are dropped.
        stamps: current generations of the slots, int64 [limit], for one tree; None computes them
            from `written`.
        mask: bool [S, B]; False leaves a slot alone.
        add_eps, squared: add eps to |value|; take the root of |value| first.
        new: mark the slots as not replayed.
        ever_max: see `for_new`.

    Returns:
        The number of updates dropped.

    Raises:
        IndexRangeError: an index names no filled slot.
        PriorityError: a priority is NaN or infinite. On CUDA such updates are refused and counted.
        PerTdError: there are not `limit` stamps.
    """
    layout = trees.layout
    if stamps is not None and (layout.groups != 1 or len(stamps) != limit):
        raise PerTdError(
            f"expected stamps of one group, of {limit} slots, got {len(stamps)} of {layout.groups}"
        )
    slot = index.view(layout.groups, -1).clone()  # others may write to it meanwhile
    ever = written.view(layout.groups, 1) if isinstance(written, Tensor) else written
    size = sizes(ever, limit)
    wanted = None if mask is None else mask.view(slot.shape)
    if value is None:
        priority = for_new(trees, ever_max=ever_max).unsqueeze(-1).expand(slot.shape)
    else:
        priority = value.view(slot.shape).abs()
        priority = priority.sqrt() if squared else priority
        priority = priority + trees.settings[EPS].float() if add_eps else priority
    named = validation.require_slots(slot, size, wanted)
    right = named & validation.require_finite("td_error", priority, wanted=wanted)
    if not validation.can_raise(slot):
        trees.refused += (~right if wanted is None else wanted & ~right).sum()
    kept = right if wanted is None else right & wanted
    dropped: Tensor | int = 0
    if generation is not None:
        if stamps is None:
            now = generations(slot, ever, layout.capacity)
        else:
            now = stamps[torch.where(named, slot, 0)]  # another slot would end a CUDA process
        stale = generation.view(slot.shape) != now
        stale = stale if wanted is None else stale & wanted
        kept, dropped = kept & ~stale, stale.sum()
    leaf = torch.where(kept, slot + trees.starts, layout.spare).flatten()
    leaf, priority = keep_last(leaf, torch.where(kept, priority, 0.0).flatten())
    if new:
        mark_replayed(trees, leaf, drawn=False)
    _write(trees, distribution, leaf, priority)
    return dropped


def generations(slot: Tensor, written: Tensor | int, capacity: int) -> Tensor:
    """Generations of slots [S, B], int64: overwritten so often; -1 if never written.

    Transition number k, counted from 0, lives in slot k mod capacity; `written` [S, 1] were.
    """
    return (written - 1 - slot).div(capacity, rounding_mode="floor")


# --- draws ----------------------------------------------------------------------------------------


def _child_at(prefix: Tensor, target: Tensor) -> Tensor:
    """Find the children that hold the points `target` [n, k] by prefix sums of masses [n, c].

    It is the first child whose prefix sum lies above the point; at or past the end (rounding), the
    last that adds to the sum. Such a child has a positive mass, so a mass of 0 is never drawn. If
    all masses are 0, it is child 0.
    """
    last = torch.searchsorted(prefix, prefix.amax(-1, keepdim=True))
    return torch.searchsorted(prefix, target, right=True).minimum(last)


def _left(prefix: Tensor, target: Tensor, step: Tensor) -> Tensor:
    """Subtract the masses before the children `step` from the points; see `_child_at`."""
    return target - torch.nn.functional.pad(prefix, (1, 0)).gather(1, step)


def find(trees: Trees, target: Tensor) -> tuple[Tensor, Tensor]:
    """Find the slots in which the cumulative masses reach `target`, and their masses.

    The points lie in [0, total of their tree), float64 [S, B].
    """
    layout = trees.layout
    levels = [trees.leaves, *layout.levels(trees.sums)][: layout.height + 1]
    height, width = layout.height, layout.width
    if trees.device.type == "cpu":  # elsewhere, long prefix sums may fall where a mass is 0
        # begin at a level of which all nodes are no more than the children one step takes
        most = min(FANOUT * target.numel(), _LONGEST * layout.groups)
        while height > 0 and layout.groups * layout.nodes(height - 1) <= most:
            height -= 1
        width = layout.nodes(height)
    tops = levels[height][: layout.groups * width].view(layout.groups, width)
    prefix, point = tops.cumsum(-1, dtype=torch.float64), target.view(layout.groups, -1)
    step = _child_at(prefix, point)
    node = step + trees.starts // FANOUT**height if layout.groups > 1 else step
    for children in reversed(levels[:height]):
        point = _left(prefix, point, step).view(-1, 1)
        groups = children.view(-1, FANOUT).index_select(0, node.view(-1))
        prefix = groups.cumsum(-1, dtype=torch.float64)
        step = _child_at(prefix, point)
        node = torch.add(step, node.view(-1, 1), alpha=FANOUT)
    mass = trees.leaves.index_select(0, node.view(-1)).view(target.shape)
    return (node.view(layout.groups, -1) - trees.starts).view(target.shape), mass


def draw(
    trees: Trees,
    point: Tensor,
    *,
    stratified: bool,
    beta: Tensor | float,
    normalization: str,
    written: Tensor | int,
) -> tuple[Tensor, Tensor] | None:
    """Draw slots int64 for random points, mark them as replayed, and `weigh` them, float32.

    The points lie in [0, 1), float64 [S, B], and may be overwritten. `stratified` moves each into
    its own of B equal parts of the total. None if a tree has only masses of 0 (not on CUDA, where
    the host would wait).
    """
    total = trees.total
    if validation.can_raise(total) and not (total > 0).all():
        return None
    index, mass = find(trees, scaled(point, total, stratified=stratified))
    mark_replayed(trees, index)
    return index, weigh(trees, mass, beta=beta, normalization=normalization, written=written)


def scaled(point: Tensor, total: Tensor, *, stratified: bool) -> Tensor:
    """Scale random numbers [S, B] to the totals [S] of their trees; see `draw`."""
    n = point.shape[-1]
    if stratified:
        point = (torch.arange(n, device=point.device) + point) / n
    return (point.view(len(total), -1) * total.unsqueeze(-1)).view(point.shape)


def mark_replayed(trees: Trees, index: Tensor, *, drawn: bool = True) -> None:
    """Mark the slots `index` [S, B] as replayed, or as not yet `drawn`."""
    if len(trees.replayed):
        trees.replayed.index_fill_(0, index.view(-1), drawn)


def weigh(
    trees: Trees, mass: Tensor, *, beta: Tensor | float, normalization: str, written: Tensor | int
) -> Tensor:
    """Weights float32 [S, B] of slots drawn, from their masses; see `importance_weights`.

    `beta` and `written` (transitions ever written) are [S], or one number for all. Each tree is a
    batch of its own.
    """
    layout = trees.layout
    size = sizes(written, layout.capacity)
    weight = importance_weights(
        mass.view(layout.groups, -1),
        beta.unsqueeze(-1) if isinstance(beta, Tensor) and beta.ndim else beta,
        total=trees.total.unsqueeze(-1),
        size=size.unsqueeze(-1) if isinstance(size, Tensor) else size,
        smallest=trees.smallest.unsqueeze(-1) if normalization == "buffer" else None,
        normalization=normalization,
    )
    return weight.view(mass.shape)


def sizes(written: Tensor | int, capacity: int) -> Tensor | int:
    """Number of filled slots, int64 [S], or one number for all."""
    return written.clamp(max=capacity) if isinstance(written, Tensor) else min(written, capacity)


def _times(mass: Tensor, generator: torch.Generator | None) -> Tensor:
    """Random times ~ Exp(mass), float64 as `mass`; not to be used where it is 0."""
    return torch.empty_like(mass).exponential_(generator=generator) / mass


def _arrivals(
    children: Tensor, node: Tensor, arrival: Tensor, generator: torch.Generator | None
) -> Tensor:
    """Draw times for the children of each `node` [n], the first at `arrival` [n]: [n, 16]."""
    groups = children.view(-1, FANOUT)
    node = node.clamp(max=len(groups) - 1)  # nodes that never arrive may lie in the padding
    mass = groups.index_select(0, node).double()
    prefix = mass.cumsum(-1)
    point = torch.rand(node.shape, dtype=torch.float64, device=node.device, generator=generator)
    first = _child_at(prefix, (point * prefix[:, -1]).unsqueeze(-1))
    arrivals = arrival.unsqueeze(-1) + _times(mass, generator)
    return arrivals.scatter_(1, first, arrival.unsqueeze(-1)).masked_fill_(mass <= 0, torch.inf)


def _by_arrival(
    trees: Trees, n: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Run `draw_distinct` by times of arrival, in O(n log N) whatever the masses are.

    Let every slot arrive at a time ~ Exp(mass): the order of arrival is the order of sequential
    draws without replacement. A node's first arrival is ~ Exp(sum), it is that of one child drawn
    in proportion to mass, and the other children arrive later by independent Exp(mass)
    (exponentials have no memory). So the first n arrivals are found level by level, keeping n nodes
    on each, without touching the tree. (Kool et al. 2019, arXiv 1903.06059, section 4.1, do the
    same with Gumbel variables.)
    """
    layout = trees.layout
    tops = layout.tops(trees.sums)
    arrivals = _times(tops, generator).masked_fill_(tops <= 0, torch.inf)
    arrival, best = arrivals.topk(min(n, layout.width), largest=False, sorted=True)
    node = best + trees.starts // FANOUT**layout.height
    levels = layout.levels(trees.sums)[: layout.height - 1]
    for children in (*reversed(levels), trees.leaves):
        arrivals = _arrivals(children, node.flatten(), arrival.flatten(), generator)
        arrivals = arrivals.view(layout.groups, -1)
        arrival, best = arrivals.topk(min(n, arrivals.shape[1]), largest=False, sorted=True)
        node = node.gather(1, best // FANOUT) * FANOUT + best % FANOUT
    found = arrival.isfinite()
    slot = torch.where(found, node, node[:, :1]) - trees.starts
    slot = slot.clamp_(0, layout.capacity - 1)
    mass = trees.leaves.index_select(0, (slot + trees.starts).flatten()).view(slot.shape)
    return slot, mass, found


def distinct_points(trees: Trees, n: int, generator: torch.Generator | None) -> Tensor:
    """Random numbers in [0, 1) to draw `n` different slots from each tree, float64 [S, 2 n]."""
    shape = trees.layout.groups, 2 * n
    return torch.rand(shape, dtype=torch.float64, device=trees.device, generator=generator)


def first_distinct(
    trees: Trees, slot: Tensor, mass: Tensor, n: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Run `draw_distinct` from slots [S, k] drawn with replacement, in their order, and masses."""
    found = None
    while True:
        k = slot.shape[1]
        ordered, order = slot.sort(dim=-1, stable=True)
        again = torch.nn.functional.pad(ordered.diff() == 0, (1, 0))
        few = (again.sum(-1) > k - n) | (mass <= 0).any(-1)  # a mass of 0: there is nothing to draw
        if found is not None or not few.any():
            place = (order + k * again).sort(-1)[0][:, :n] % k  # repeats come last
            return slot.gather(1, place), mass.gather(1, place), found
        more, masses, found = _by_arrival(trees, n, generator)
        slot, mass = torch.cat([slot, more], 1), torch.cat([mass, masses], 1)


def draw_distinct(
    trees: Trees, n: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Draw `n` different slots from each tree, at most its leaves, distributed as one by one.

    Draws with replacement, of which repeats are rejected, are sequential draws without. If 2 n
    points give fewer than n slots, `_by_arrival` draws n more: the order in which slots not yet
    drawn arrive does not depend on the others, so those of them that are new go on from there, and
    they are enough. Where the host must not wait, `_by_arrival` draws all of them.

    Returns:
        Slots int64 [S, n] in the order drawn, their masses float32, and bool: False if fewer than n
        slots have a positive mass, and a slot drawn before stands in. None: all are True.
    """
    if not validation.can_raise(trees.leaves):
        return _by_arrival(trees, n, generator)
    point = distinct_points(trees, n, generator) * trees.total.unsqueeze(-1)
    return first_distinct(trees, *find(trees, point), n, generator)


# --- rows -----------------------------------------------------------------------------------------


def gather(rows: Rows, index: Tensor, *, written: Tensor | int | None) -> tuple[list[Tensor], Any]:
    """Copy the rows of slots int64 [S, B], in the order of the columns, with their `generations`.

    `written` is [S], or one number for all; None asks for no generations.

    Raises:
        IndexRangeError: an index is not in [0, capacity) (unchecked on CUDA).
    """
    slot = index.view(rows.groups, -1).clone()
    if validation.can_raise(slot):
        validation.require_slots(slot, rows.capacity, what="the slots")
    row = (slot + rows.starts).flatten()
    found = [select(column, row).view(*index.shape, *column.shape[1:]) for column in rows.columns]
    if written is None:
        return found, None
    ever = written.unsqueeze(-1) if isinstance(written, Tensor) else written
    return found, generations(slot, ever, rows.capacity).view(index.shape)


_AS = {
    torch.uint16: torch.int16,
    torch.uint32: torch.int32,
    torch.uint64: torch.int64,
    torch.float8_e4m3fn: torch.uint8,
    torch.float8_e5m2: torch.uint8,
}
"""Dtypes that torch cannot index, each with one of the same size that it can."""


def indexable(column: Tensor) -> Tensor:
    """View a column in a dtype whose rows torch can gather and scatter."""
    dtype = _AS.get(column.dtype)
    return column if dtype is None else column.view(dtype)


def select(column: Tensor, index: Tensor) -> Tensor:
    """Copy the rows `index` [B] of a column."""
    found = indexable(column).index_select(0, index)
    return found if found.dtype is column.dtype else found.view(column.dtype)


def write_rows(
    rows: Rows,
    new: Sequence[Tensor],
    n: int,
    runs: Runs,
    *,
    mask: Tensor | None = None,
    stamps: Tensor | None = None,
    index: Tensor | None = None,
) -> None:
    """Copy `n` rows for each group into its run of slots; a shorter run takes the last of them.

    Args:
        rows: the rings of rows.
        new: rows for each column, [S * n, ...], or [...] for a single row.
        n: rows for each group.
        runs: the runs, which may pass the end of the ring.
        mask: bool [S, n]; False leaves a row out.
        stamps: generations of the slots, int64 [S * capacity], counted up here; needs `index`.
        index: takes the slots written, int64 [S, n]; each run has length n. It may be one of the
            new rows.

    Raises:
        IndexRangeError: a run names slots that do not exist, or more than `n`.
    """
    least, most = 0 if stamps is None else n, min(n, rows.capacity)
    _require_runs(runs, rows.groups, rows.capacity, least, most)
    held = {column.untyped_storage()._cdata for column in rows.columns}
    # rows that lie in the ring itself would be overwritten while they are copied
    new = [validation.plain_rows(leaf, rows.columns[0].device) for leaf in new]
    new = [leaf.clone() if leaf.untyped_storage()._cdata in held else leaf for leaf in new]
    for s in range(rows.groups):
        start, length = runs[2 * s : 2 * s + 2]
        if stamps is not None and index is not None:
            slot = torch.arange(start, start + length, device=stamps.device)
            slot.remainder_(rows.capacity)
            stamps[slot + s * rows.capacity] += 1
            index.view(rows.groups, -1)[s] = slot
        head, base = min(length, rows.capacity - start), s * rows.capacity
        for column, leaf in zip(rows.columns, new, strict=True):
            own = leaf.detach().reshape(rows.groups * n, *column.shape[1:])[s * n : (s + 1) * n]
            own = own if mask is None else own[mask[s].to(own.device)]
            own = own[n - length :] if mask is None else own[len(own) - length :]
            column[base + start : base + start + head] = own[:head]
            if head < length:
                column[base : base + length - head] = own[head:]

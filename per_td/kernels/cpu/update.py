"""Changes to the trees on the CPU, compiled: every node above what changed is recomputed once.

Functions take addresses of contiguous tensors, and their lengths; the callers see to dtypes.
`shape` is the table of `Layout.shape`: offset and width of each level above the leaves. Sums are
taken pairwise, in float64.
"""

from typing import Any

import numpy as np
from numba import njit

from per_td.kernels.cpu.compiling import kernel
from per_td.kernels.cpu.memory import doubles, flags, floats, integers, prefetch, table
from per_td.kernels.cpu.power import power
from per_td.kernels.cpu.vector import max_f32, min_positive_f32, sum_f32, sum_f64

__all__ = ["assign", "put", "rebuild", "renew"]

_TINY = float(np.finfo(np.float32).tiny)
_HUGE = float(np.finfo(np.float32).max)


def _refreshers(first: Any, size: int, above: Any, above_size: int) -> Any:
    """Two functions that recompute the nodes above some leaves: those in a list, those in a row.

    `first` and `above` reduce 16 leaves, or 16 nodes, of so many bytes each, at an address.
    """

    def level_with(reduce: Any, child: int) -> Any:
        @njit
        def row(children: int, nodes: Any, offset: int, begin: int, end: int) -> None:
            for node in range(begin, end):
                nodes[offset + node] = reduce(children + 16 * child * node)

        @njit
        def some(children: int, nodes: Any, offset: int, at: Any) -> None:
            last = -1
            for i in range(at.shape[0]):
                at[i] >>= 4
                if at[i] != last:
                    last = at[i]
                    nodes[offset + last] = reduce(children + 16 * child * last)

        return row, some

    row_of_leaves, some_leaves = level_with(first, size)
    row_of_nodes, some_nodes = level_with(above, above_size)

    @njit
    def refresh_row(leaves: int, sums: int, nodes: Any, levels: Any, begin: int, end: int) -> None:
        begin, end = begin >> 4, (end + 15) >> 4
        row_of_leaves(leaves, nodes, 0, begin, end)
        for k in range(1, levels.shape[1]):
            begin, end = begin >> 4, (end + 15) >> 4
            row_of_nodes(sums + above_size * levels[0, k - 1], nodes, levels[0, k], begin, end)

    @njit
    def refresh(leaves: int, sums: int, nodes: Any, levels: Any, index: Any) -> None:
        if index.shape[0] >= levels[1, 0]:  # as many leaves as nodes: all of them are cheaper
            refresh_row(leaves, sums, nodes, levels, 0, 16 * levels[1, 0])
            return
        at = index.copy()
        some_leaves(leaves, nodes, 0, at)
        for k in range(1, levels.shape[1]):
            children = sums + above_size * levels[0, k - 1]
            if at.shape[0] >= levels[1, k]:
                row_of_nodes(children, nodes, levels[0, k], 0, levels[1, k])
            else:
                some_nodes(children, nodes, levels[0, k], at)

    return refresh, refresh_row


_refresh_sums, _refresh_row_of_sums = _refreshers(sum_f32, 4, sum_f64, 8)
_refresh_max, _refresh_row_of_max = _refreshers(max_f32, 4, max_f32, 4)
_refresh_min, _refresh_row_of_min = _refreshers(min_positive_f32, 4, min_positive_f32, 4)


@njit(inline="always", error_model="numpy")
def _masses_of(priorities: Any, alpha: float, masses: Any) -> None:
    """Write p^alpha to `masses`: positive and finite in float32, 0 for a priority of 0."""
    power(priorities, alpha, masses)
    for i in range(priorities.shape[0]):
        mass = min(max(masses[i], _TINY), _HUGE)
        masses[i] = mass if priorities[i] > 0 else 0.0


@njit(inline="always")
def _rank_all(priorities: Any, snapshot: int, slots: int) -> None:
    """Turn priorities into ranks: 1 + how many in the snapshot are larger; 0 stays 0.

    The snapshot is float32 [slots], ascending. All searches go together, step by step: those of
    others go on while one waits for memory, and there are no branches to guess.
    """
    ordered, low = floats(snapshot, slots), np.zeros(priorities.shape[0], np.int64)
    length = slots
    while length > 0:  # `low` are known not to be larger, of the next `length` it is open
        half = (length + 1) >> 1
        for i in range(low.shape[0]):
            low[i] += half if ordered[low[i] + half - 1] <= priorities[i] else 0
        length -= half
    for i in range(low.shape[0]):
        if priorities[i] > 0:
            priorities[i] = slots + 1 - low[i]


@kernel("void(int64, int64, int64, int64)")
def rebuild(leaves: int, sums: int, shape: int, depth: int) -> None:
    """Recompute all sums."""
    levels = table(shape, 2, depth)
    nodes = doubles(sums, levels[0, -1] + 1)
    _refresh_row_of_sums(leaves, sums, nodes, levels, 0, 16 * levels[1, 0])


@kernel("boolean(int64, int64, int64, int64, int64, int64, int64, int64)")
def put(
    leaves: int, sums: int, shape: int, depth: int, index: int, value: int, n: int, size: int
) -> bool:
    """Set the masses of the leaves `index` [n] one after the other; sums follow.

    False, and nothing is written, if an index is not in [0, size) or a value is negative, infinite
    or NaN.
    """
    at, masses = integers(index, n), floats(value, n)
    for i in range(n):
        if not (0 <= at[i] < size and 0 <= masses[i] <= _HUGE):
            return False
    levels = table(shape, 2, depth)
    column = floats(leaves, 16 * levels[1, 0])
    for i in range(n):
        column[at[i]] = masses[i]
    _refresh_sums(leaves, sums, doubles(sums, levels[0, -1] + 1), levels, at)
    return True


@kernel(
    "void(int64, int64, int64, int64, int64, int64, int64, int64, int64, int64, float64, int64,"
    " int64, int64, int64)"
)
def renew(
    raw: int,
    leaves: int,
    sums: int,
    maxima: int,
    minima: int,
    shape: int,
    depth: int,
    start: int,
    n: int,
    slots: int,
    alpha: float,
    known: int,
    ever_max: int,
    replayed: int,
    snapshot: int,
) -> None:
    """Give `n` slots, from `start` on and around the ring, the priority at `known`, or 1 for 0.

    The other arguments are those of `assign`.
    """
    levels = table(shape, 2, depth)
    width, nodes = 16 * levels[1, 0], levels[0, -1] + 1
    priorities, masses = floats(raw, width), floats(leaves, width)
    priority, largest = floats(known, 1)[0], floats(ever_max, 1)
    priority = priority if priority > 0 else np.float32(1)
    largest[0] = max(largest[0], priority)
    p, mass = np.full(1, np.float64(priority)), np.empty(1)
    if snapshot != 0:
        _rank_all(p, snapshot, slots)
    _masses_of(p, alpha, mass)
    drawn = flags(replayed, slots)
    begin, end = start, min(start + n, slots)
    for _ in range(2):
        drawn[begin:end] = False
        priorities[begin:end] = priority
        masses[begin:end] = mass[0]
        _refresh_row_of_sums(leaves, sums, doubles(sums, nodes), levels, begin, end)
        _refresh_row_of_max(raw, maxima, floats(maxima, nodes), levels, begin, end)
        if minima != 0:
            _refresh_row_of_min(leaves, minima, floats(minima, nodes), levels, begin, end)
        begin, end = 0, start + n - slots
        if end <= 0:
            break


@kernel(
    "int64(int64, int64, int64, int64, int64, int64, int64, int64, int64, int64, int64, int64,"
    " int64, int64, float64, float64, int64, int64, int64, int64)"
)
def assign(
    raw: int,
    leaves: int,
    sums: int,
    maxima: int,
    minima: int,
    shape: int,
    depth: int,
    index: int,
    value: int,
    n: int,
    size: int,
    generation: int,
    written: int,
    slots: int,
    eps: float,
    alpha: float,
    known: int,
    ever_max: int,
    replayed: int,
    snapshot: int,
) -> int:
    """Set the priorities of the slots `index` [n] to |value| + eps, one after the other.

    Args:
        raw, leaves: priorities and masses.
        sums, maxima, minima: the nodes above; minima may be 0: there are none.
        shape, depth: the table of levels.
        index, value: slots and values, [n]. A `value` of 0 stands for the priority at `known`, or
            1 if that is 0, for all.
        n, size: how many; how many slots may be named.
        generation: those of the transitions meant, [n], to drop what is stale; 0 drops nothing.
        written, slots: how many transitions were ever written, to how many slots.
        eps, alpha: as in the paper.
        known, ever_max: addresses of priorities; the second is raised to the largest ever.
        replayed: bool, one per slot; those written become false. May be 0: nothing is to.
        snapshot: float32 [slots], ascending, or 0. Given one, masses are rank^alpha, with the rank
            that a priority would have had there.

    Returns:
        How many were dropped; -1, and nothing has been written, if an index is not in [0, size)
        or a priority is infinite or NaN.
    """
    at, values, then = integers(index, n), floats(value, n), integers(generation, n)
    for i in range(n):
        if not (0 <= at[i] < size and (value == 0 or abs(values[i]) + np.float32(eps) <= _HUGE)):
            return -1
        prefetch(raw + 4 * at[i])
        prefetch(leaves + 4 * at[i])
        prefetch(sums + 8 * (at[i] >> 4))
        prefetch(maxima + 4 * (at[i] >> 4))
    levels = table(shape, 2, depth)
    width, nodes = 16 * levels[1, 0], levels[0, -1] + 1
    priorities, masses = floats(raw, width), floats(leaves, width)
    default = floats(known, 1)[0]
    default = default if default > 0 else np.float32(1)
    kept, count = np.empty(n, np.int64), 0
    for i in range(n):
        if generation != 0 and then[i] != (written - 1 - at[i]) // slots:
            continue
        priorities[at[i]] = default if value == 0 else abs(values[i]) + np.float32(eps)
        kept[count] = at[i]
        count += 1
    kept = kept[:count]
    if replayed != 0:
        drawn = flags(replayed, slots)
        for i in range(count):
            drawn[kept[i]] = False
    p, mass, largest = np.empty(count), np.empty(count), floats(ever_max, 1)
    for i in range(count):  # of equal indices, the last has been left
        p[i] = priorities[kept[i]]
        largest[0] = max(largest[0], priorities[kept[i]])
    if snapshot != 0:
        _rank_all(p, snapshot, slots)
    _masses_of(p, alpha, mass)
    for i in range(count):
        masses[kept[i]] = mass[i]
    _refresh_sums(leaves, sums, doubles(sums, nodes), levels, kept)
    _refresh_max(raw, maxima, floats(maxima, nodes), levels, kept)
    if minima != 0:
        _refresh_min(leaves, minima, floats(minima, nodes), levels, kept)
    return n - count

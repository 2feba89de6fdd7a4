"""Compiled changes of priorities and masses on the CPU, and of the nodes above them.

Every kernel copies its indices and checks the copy, so that a thread that changes them meanwhile
does no harm.
"""

from typing import Any

import numpy as np

from per_td.kernels import parts as option
from per_td.kernels.cpu.compiling import kernel, part
from per_td.kernels.cpu.memory import (
    doubles,
    flags,
    floats,
    group,
    integers,
    levels_of,
    prefetch,
    trees_at,
)
from per_td.kernels.cpu.vector import max_f32, min_positive_f32, power, sum_f32, sum_f64

_TINY = float(np.finfo(np.float32).tiny)
_HUGE = float(np.finfo(np.float32).max)
_ZERO = np.int64(0)  # numba compiles a function anew for a literal 0


def _refreshers(first: Any, above: Any) -> Any:
    """Make two functions that recompute the nodes above leaves: listed ones, and a row of them.

    `first` reduces the 16 leaves at an address, `above` 16 nodes.
    """

    def level_with(reduce: Any) -> Any:
        @part()
        def row(children: Any, nodes: Any, begin: int, end: int) -> None:
            for node in range(begin, end):
                nodes[node] = reduce(group(children, node))

        @part()
        def some(children: Any, nodes: Any, at: Any) -> None:
            last = -1
            for i in range(at.shape[0]):
                at[i] >>= 4
                if at[i] != last:
                    last = at[i]
                    nodes[last] = reduce(group(children, last))

        return row, some

    row_of_leaves, some_leaves = of_leaves = level_with(first)
    row_of_nodes, some_nodes = of_leaves if above is first else level_with(above)

    @part()
    def refresh_row(leaves: Any, nodes: Any, levels: Any, begin: int, end: int) -> None:
        begin, end = begin >> 4, (end + 15) >> 4
        row_of_leaves(leaves, nodes, begin, end)
        for k in range(1, levels.shape[1]):
            begin, end = begin >> 4, (end + 15) >> 4
            row_of_nodes(nodes[levels[0, k - 1] :], nodes[levels[0, k] :], begin, end)

    @part()
    def refresh(leaves: Any, nodes: Any, levels: Any, index: Any) -> None:
        if index.shape[0] >= levels[1, 0]:  # as many leaves as nodes: all of them are cheaper
            refresh_row(leaves, nodes, levels, _ZERO, 16 * levels[1, 0])
            return
        at = index.copy()
        some_leaves(leaves, nodes, at)
        for k in range(1, levels.shape[1]):
            children, level = nodes[levels[0, k - 1] :], nodes[levels[0, k] :]
            if at.shape[0] >= levels[1, k]:
                row_of_nodes(children, level, _ZERO, levels[1, k])
            else:
                some_nodes(children, level, at)

    return refresh, refresh_row


_refresh_sums, _refresh_row_of_sums = _refreshers(sum_f32, sum_f64)
_refresh_max, _refresh_row_of_max = _refreshers(max_f32, max_f32)
_refresh_min, _refresh_row_of_min = _refreshers(min_positive_f32, min_positive_f32)


@part(inline="always")
def _refresh_row(trees: Any, levels: Any, begin: int, end: int) -> None:
    """Recompute all nodes above the leaves from `begin` to `end`."""
    leaves = floats(trees.leaves, trees.leaf_slots)
    _refresh_row_of_sums(leaves, doubles(trees.sums, trees.node_slots), levels, begin, end)
    if trees.raw_length > 0:
        raw = floats(trees.raw, trees.raw_length)
        _refresh_row_of_max(raw, floats(trees.maxima, trees.node_slots), levels, begin, end)
        if doubles(trees.settings, 4)[option.MINIMA] > 0:
            _refresh_row_of_min(leaves, floats(trees.minima, trees.node_slots), levels, begin, end)


@part(inline="always")
def _rank_all(priorities: Any, ordered: Any) -> None:
    """Turn priorities into ranks: 1 + the number of larger ones in `ordered`; 0 stays 0.

    All searches advance together, without branches: while one waits for memory, others go on.
    """
    slots, low = ordered.shape[0], np.zeros(priorities.shape[0], np.int64)
    length = slots
    while length > 0:  # the first `low` are not larger, the next `length` may be
        half = (length + 1) >> 1
        for i in range(low.shape[0]):
            low[i] += half if ordered[low[i] + half - 1] <= priorities[i] else 0
        length -= half
    for i in range(low.shape[0]):
        if priorities[i] > 0:
            priorities[i] = slots + 1 - low[i]


@part(inline="always", error_model="numpy")
def _masses_of(trees: Any, priorities: Any, exponent: float, masses: Any) -> None:
    """Write p^exponent to `masses`, positive and finite in float32; 0 for a priority of 0.

    Where the trees have a snapshot, ranks take the place of the priorities.
    """
    if trees.snapshot_length > 0:
        _rank_all(priorities, floats(trees.snapshot, trees.snapshot_length))
    power(priorities, exponent, masses)
    for i in range(priorities.shape[0]):
        mass = min(max(masses[i], _TINY), _HUGE)
        masses[i] = mass if priorities[i] > 0 else 0.0


@part(inline="always")
def _for_new(trees: Any, levels: Any, s: int, ever: bool) -> Any:
    """Priority of new transitions in a group: the largest in it, or ever; 1 if that is 0."""
    known = np.float32(0)
    if ever:
        known = floats(trees.ever_max, trees.groups)[s]
    else:
        tops = floats(trees.maxima, trees.node_slots)[levels[0, trees.height - 1] :]
        for top in range(s * trees.width, (s + 1) * trees.width):
            known = max(known, tops[top])
    return known if known > 0 else np.float32(1)


@kernel("void(int64)")
def refill(record: int) -> None:
    """Recompute all nodes from the leaves and the priorities."""
    trees = trees_at(record)
    levels = levels_of(trees)
    _refresh_row(trees, levels, _ZERO, 16 * levels[1, 0])


@kernel("boolean(int64, int64, int64, int64)")
def set_masses(record: int, index: int, value: int, n: int) -> bool:
    """Run `reference.set_masses`; False, and nothing is written, if an index or value is wrong."""
    trees = trees_at(record)
    total = trees.groups * n
    at, values, leaf = integers(index, total), floats(value, total), np.empty(total, np.int64)
    new = np.empty(total, np.float32)
    for s in range(trees.groups):
        for i in range(s * n, (s + 1) * n):
            slot, mass = at[i], values[i]
            if not (0 <= slot < trees.capacity and 0 <= mass <= _HUGE):
                return False
            leaf[i], new[i] = s * trees.stride + slot, mass
    leaves = floats(trees.leaves, trees.leaf_slots)
    for i in range(total):
        leaves[leaf[i]] = new[i]
    _refresh_sums(leaves, doubles(trees.sums, trees.node_slots), levels_of(trees), leaf)
    return True


@kernel("boolean(int64, int64, int64)")
def assign_new(record: int, runs: int, options: int) -> bool:
    """Run `reference.assign_new`; False, and nothing is written, if a run does not fit."""
    trees = trees_at(record)
    levels, exponents = levels_of(trees), doubles(trees.exponents, trees.groups)
    run, slots = integers(runs, 2 * trees.groups).copy(), trees.capacity
    for s in range(trees.groups):
        if not (0 <= run[2 * s] < slots and 0 <= run[2 * s + 1] <= slots):
            return False
    raw, leaves = floats(trees.raw, trees.raw_length), floats(trees.leaves, trees.leaf_slots)
    largest = floats(trees.ever_max, trees.groups)
    drawn = flags(trees.replayed, trees.replayed_length)
    p, mass = np.empty(1), np.empty(1)
    for s in range(trees.groups):
        start, n = run[2 * s], run[2 * s + 1]
        if n == 0:
            continue
        priority = _for_new(trees, levels, s, (options & option.EVER_MAX) != 0)
        largest[s] = max(largest[s], priority)
        p[0] = priority
        _masses_of(trees, p, exponents[s], mass)
        first = s * trees.stride
        begin, end = first + start, first + min(start + n, slots)
        for _ in range(2):
            if trees.replayed_length > 0:
                drawn[begin:end] = False
            raw[begin:end] = priority
            leaves[begin:end] = mass[0]
            _refresh_row(trees, levels, begin, end)
            begin, end = first, first + start + n - slots
            if end <= first:
                break
    return True


@kernel("int64(int64, int64, int64, int64, int64, int64, int64, int64, int64, int64)")
def assign(
    record: int,
    index: int,
    value: int,
    generation: int,
    mask: int,
    written: int,
    stamps: int,
    n: int,
    limit: int,
    options: int,
) -> int:
    """Run `reference.assign`; -1, and nothing is written, if a slot or a priority is wrong.

    The options VALUE, GENERATION, MASK and STAMPS say which of these arguments there are.
    """
    trees = trees_at(record)
    total, slots = trees.groups * n, trees.capacity
    levels, settings = levels_of(trees), doubles(trees.settings, 4)
    at, ever = integers(index, total), integers(written, trees.groups)
    given, known = (options & option.VALUE) != 0, (options & option.GENERATION) != 0
    masked, stamped = (options & option.MASK) != 0, (options & option.STAMPS) != 0
    eps = np.float32(settings[option.EPS]) if (options & option.ADD_EPS) != 0 else np.float32(0)
    values, then = floats(value, total if given else 0), integers(generation, total if known else 0)
    wanted, stamp = flags(mask, total if masked else 0), integers(stamps, limit if stamped else 0)
    if stamped:
        for i in range(total):
            prefetch(stamps + 8 * at[i])
    leaf, new = np.empty(total, np.int64), np.empty(total, np.float32)
    ends = np.empty(trees.groups, np.int64)
    count = stale = 0
    for s in range(trees.groups):
        size = min(ever[s], limit)
        default = _for_new(trees, levels, s, (options & option.EVER_MAX) != 0)
        for i in range(s * n, (s + 1) * n):
            if masked and not wanted[i]:
                continue
            slot, priority = at[i], default
            if given:
                priority = abs(values[i])
                if (options & option.SQUARED) != 0:
                    priority = np.sqrt(priority)
                priority += eps
            if not (0 <= slot < size and priority <= _HUGE):
                return -1
            place = s * trees.stride + slot
            prefetch(trees.raw + 4 * place)
            prefetch(trees.leaves + 4 * place)
            prefetch(trees.sums + 8 * (place >> 4))
            prefetch(trees.maxima + 4 * (place >> 4))
            if known:
                now = stamp[slot] if stamped else (ever[s] - 1 - slot) // slots
                if then[i] != now:
                    stale += 1
                    continue
            leaf[count], new[count] = place, priority
            count += 1
        ends[s] = count
    leaf = leaf[:count]
    raw, leaves = floats(trees.raw, trees.raw_length), floats(trees.leaves, trees.leaf_slots)
    for i in range(count):
        raw[leaf[i]] = new[i]
    if (options & option.NEW) != 0 and trees.replayed_length > 0:
        drawn = flags(trees.replayed, trees.replayed_length)
        for i in range(count):
            drawn[leaf[i]] = False
    p, mass, largest = np.empty(count), np.empty(count), floats(trees.ever_max, trees.groups)
    exponents, begin = doubles(trees.exponents, trees.groups), 0
    for s in range(trees.groups):
        for i in range(begin, ends[s]):  # of equal indices, the last has won
            p[i] = raw[leaf[i]]
            largest[s] = max(largest[s], raw[leaf[i]])
        _masses_of(trees, p[begin : ends[s]], exponents[s], mass[begin : ends[s]])
        begin = ends[s]
    for i in range(count):
        leaves[leaf[i]] = mass[i]
    _refresh_sums(leaves, doubles(trees.sums, trees.node_slots), levels, leaf)
    _refresh_max(raw, floats(trees.maxima, trees.node_slots), levels, leaf)
    if settings[option.MINIMA] > 0:
        _refresh_min(leaves, floats(trees.minima, trees.node_slots), levels, leaf)
    return stale

"""Many buffers of one size on the CPU, compiled: S rings of `slots` slots, one after the other.

The operations of `per_td.tree.forest`, `per_td.storage.rings` and `per_td.priorities.many` on
indices [S, B], each into its own ring. Functions take addresses of contiguous tensors, and their
lengths; the callers see to dtypes and shapes. Numba keeps them apart from those of single buffers,
which load without them.
"""

import numpy as np
from numba import njit

from per_td.kernels.cpu.compiling import kernel
from per_td.kernels.cpu.draw import descend
from per_td.kernels.cpu.memory import copy, doubles, floats, integers, pick, prefetch, table
from per_td.kernels.cpu.power import power

__all__ = ["gather", "sample", "scatter", "select"]

_HUGE = float(np.finfo(np.float32).max)
_AHEAD = 256


@njit
def _pick_top(first: int, width: int, points: int, nodes: int, n: int, start: int) -> None:
    """Turn points [n] in [0, total) into nodes `start`, ..., and points in the nodes chosen.

    The first node whose prefix sum lies above the point; where there is none (rounding), the last
    of positive mass.
    """
    tops, target, node = doubles(first, width), doubles(points, n), integers(nodes, n)
    last = 0
    for j in range(width):
        if tops[j] > 0:
            last = j
    for i in range(n):
        chosen, before, total = last, 0.0, 0.0
        for j in range(last):
            total += tops[j]
            if total > target[i]:
                chosen = j
                break
            before = total
        target[i] -= before
        node[i] = start + chosen


@kernel(
    "int64(int64, int64, int64, int64, int64, int64, int64, int64, int64, boolean, int64,"
    " float64, int64, int64, int64)"
)
def sample(
    leaves: int,
    sums: int,
    shape: int,
    depth: int,
    height: int,
    width: int,
    count: int,
    point: int,
    n: int,
    stratified: bool,
    index: int,
    beta: float,
    smallest: int,
    sizes: int,
    weight: int,
) -> int:
    """Draw leaves from each tree, as `find_each` does, for points in [0, 1), and weigh them.

    Args:
        leaves, sums, shape, depth: the one wide tree.
        height, width, count: of `ForestLayout`; how many trees.
        point, n: random numbers in [0, 1), which are used up, float64 [count, n].
        stratified: whether each is to be moved into its n-th of the whole.
        index: for the slots drawn, int64 [count, n].
        beta: exponent of the weights.
        smallest: address of the masses that get the weight 1, [count]; 0: the smallest drawn.
        sizes: if not 0, address of sizes [count]: the weights are (size * P)^-beta instead.
        weight: for the weights, float32 [count, n].

    Returns:
        How many trees have only masses of 0; then nothing may be taken from what was written.
    """
    levels, top = table(shape, 2, depth), height - 1
    stride, first = width << (4 * height), sums + 8 * levels[0, top]
    mass, empty = np.empty(n, np.float32), 0
    for s in range(count):
        total = 0.0
        for node in doubles(first + 8 * s * width, width):
            total += node
        if not total > 0:
            empty += 1
            continue
        points, here = point + 8 * s * n, index + 8 * s * n
        target, drawn = doubles(points, n), integers(here, n)
        for i in range(n):
            target[i] = ((i + target[i]) / n if stratified else target[i]) * total
        _pick_top(first + 8 * s * width, width, points, here, n, s * width)
        descend(leaves, sums, levels, top, target, drawn, mass, 0)
        unit, factor = total, 1.0
        if sizes != 0:
            factor = float(integers(sizes, count)[s])
        elif smallest != 0:
            unit = np.float64(floats(smallest, count)[s])
        else:
            unit = np.float64(mass.min())
        for i in range(n):
            drawn[i] -= s * stride
            target[i] = mass[i] / unit * factor
        power(target, -beta, floats(weight + 4 * s * n, n))
    return empty


@kernel(
    "int64(int64, int64, int64, int64, int64, int64, int64, int64, int64, float64, int64, int64,"
    " int64)"
)
def select(
    index: int,
    value: int,
    generation: int,
    mask: int,
    written: int,
    count: int,
    n: int,
    slots: int,
    stride: int,
    eps: float,
    flat: int,
    kept: int,
    dropped: int,
) -> int:
    """Which updates are to be made, at which leaves.

    Args:
        index, value: slots and TD errors, int64 and float32 [count, n].
        generation: those of the transitions meant, int64 [count, n], to drop what is stale; 0
            drops nothing.
        mask: int64 [count, n], 0 for what is to be left alone; an address of 0: nothing is.
        written: how many transitions were ever written to each ring, int64 [count].
        count, n, slots: rings, updates in each, slots of each.
        stride: leaves from one tree to the next.
        eps: added to |TD error|.
        flat, kept: for leaves and TD errors, int64 and float32 [count * n].
        dropped: for how many were stale, int64 [1].

    Returns:
        How many are to be made; -1 if one that is not masked names no filled slot, or its priority
        is infinite or NaN.
    """
    total, ever, stale, m = count * n, integers(written, count), 0, 0
    at, values, then = integers(index, total), floats(value, total), integers(generation, total)
    leaf, left, wanted = integers(flat, total), floats(kept, total), integers(mask, total)
    for s in range(count):
        size = min(ever[s], slots)
        for i in range(s * n, (s + 1) * n):
            if mask != 0 and wanted[i] == 0:
                continue
            if not (0 <= at[i] < size and abs(values[i]) + np.float32(eps) <= _HUGE):
                return -1
            if generation != 0 and then[i] != (ever[s] - 1 - at[i]) // slots:
                stale += 1
                continue
            leaf[m] = s * stride + at[i]
            left[m] = values[i]
            m += 1
    integers(dropped, 1)[0] = stale
    return m


@kernel("void(int64, int64, int64, int64, int64, int64, int64, int64, int64, int64)")
def gather(
    fields: int,
    sizes: int,
    fields_count: int,
    index: int,
    count: int,
    n: int,
    slots: int,
    to: int,
    written: int,
    generation: int,
) -> None:
    """Copy the rows of the slots `index` to where `to` says, close together.

    Args:
        fields, to: addresses of the first rows, and of where to copy to, int64 [fields_count].
        sizes: distance between rows and length of a row, int64 [fields_count, 2].
        fields_count: number of fields.
        index: slots in their own ring, int64 [count, n].
        count, n, slots: rings, slots read in each, slots of each.
        written: how many transitions were ever written to each ring, int64 [count].
        generation: for how often its ring had wrapped when a row was written, int64 [count, n].
    """
    first, place = integers(fields, fields_count), integers(to, fields_count)
    size, ever = table(sizes, fields_count, 2), integers(written, count)
    at, wrapped = integers(index, count * n), integers(generation, count * n)
    row = np.empty(count * n, np.int64)
    for s in range(count):
        for i in range(s * n, (s + 1) * n):
            row[i] = s * slots + at[i]
            wrapped[i] = (ever[s] - 1 - at[i]) // slots
    # a few hundred rows at a time: so many the cache holds from the prefetch to the copy
    for begin in range(0, count * n, _AHEAD):
        rows = row[begin : begin + _AHEAD]
        for i in range(rows.shape[0]):
            for k in range(fields_count):
                prefetch(first[k] + rows[i] * size[k, 0])
        for k in range(fields_count):
            pick(place[k] + begin * size[k, 1], first[k], size[k, 0], size[k, 1], rows)


@kernel("void(int64, int64, int64, int64, int64, int64)")
def scatter(fields: int, sizes: int, fields_count: int, row: int, n: int, source: int) -> None:
    """Copy `n` rows for each field to the rows `row`, one after the other.

    Args:
        fields, sizes, fields_count: as for `gather`.
        row: int64 [n].
        n: how many.
        source: addresses of the rows, which lie close together, int64 [fields_count].
    """
    first, origin = integers(fields, fields_count), integers(source, fields_count)
    size, at = table(sizes, fields_count, 2), integers(row, n)
    for k in range(fields_count):
        step, length = size[k]
        for i in range(n):
            copy(first[k] + at[i] * step, origin[k] + i * length, length)

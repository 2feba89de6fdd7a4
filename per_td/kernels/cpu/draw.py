"""Compiled draws from the sum trees on the CPU, with their weights.

See `per_td.kernels.reference.find` and `per_td.weights.importance_weights`.
"""

from typing import Any

import numpy as np

from per_td.kernels.cpu.compiling import kernel, part
from per_td.kernels.cpu.memory import (
    doubles,
    flags,
    floats,
    group,
    integers,
    levels_of,
    prefetch,
    rows_at,
    trees_at,
)
from per_td.kernels.cpu.rows import gather
from per_td.kernels.cpu.vector import count_f32, count_f64, power
from per_td.kernels.parts import BY_BUFFER, BY_SIZE, GENERATION, STRATIFIED


@part()
def _search(children: Any, target: float) -> tuple[int, float]:
    """Find the child of 16 that holds the point, and the sum of those before it.

    A point at or past the end (rounding) is moved inside. A child of mass 0 does not change the
    running sum, so it is never found. If all masses are 0, it is child 0.
    """
    total = 0.0
    for child in range(16):
        total += children[child]
    inside = min(target, np.nextafter(total, 0.0))
    before = 0.0
    for child in range(16):
        after = before + children[child]
        if after > inside:
            return child, before
        before = after
    return 0, 0.0


@part(inline="always")
def _tops(trees: Any, levels: Any, s: int) -> Any:
    """Masses of the tops of a tree, float64 [width], and their sum."""
    nodes = doubles(trees.sums, trees.node_slots)[levels[0, trees.height - 1] :]
    tops, total = nodes[s * trees.width : (s + 1) * trees.width], 0.0
    for top in tops:
        total += top
    return tops, total


@part(inline="always")
def _choose_top(tops: Any, target: Any, node: Any, start: int) -> None:
    """Find the tops that hold the points [n], numbered from `start`; make the points relative.

    It is the first whose prefix sum lies above the point, or else (rounding) the last of positive
    mass.
    """
    last = 0
    for j in range(tops.shape[0]):
        if tops[j] > 0:
            last = j
    for i in range(target.shape[0]):
        chosen, before, total = last, 0.0, 0.0
        for j in range(last):
            total += tops[j]
            if total > target[i]:
                chosen = j
                break
            before = total
        target[i] -= before
        node[i] = start + chosen


@part(inline="always", error_model="numpy")
def _descend(trees: Any, levels: Any, target: Any, index: Any, mass: Any, replayed: bool) -> None:
    """Walk from the tops `index` down to the leaves, with all points together on each level.

    While the children of one point are on their way from memory, others are served. If rounding
    leads the quick count past the end, or to a mass of 0, the slow search decides; a negative index
    marks such points. `replayed` prefetches those flags.
    """
    n = target.shape[0]
    leaves, sums = floats(trees.leaves, trees.leaf_slots), doubles(trees.sums, trees.node_slots)
    for level in range(trees.height - 2, -1, -1):
        here = sums[levels[0, level] :]
        below = trees.leaves if level == 0 else trees.sums + 8 * levels[0, level - 1]
        size = 64 if level == 0 else 128  # bytes of 16 children
        lost = 0
        for i in range(n):
            step, before = count_f64(group(here, index[i]), target[i])
            if step == 16 or here[16 * index[i] + step] == 0:
                lost += 1
                index[i] = -1 - index[i]
                continue
            target[i] -= before
            index[i] = 16 * index[i] + step
            prefetch(below + size * index[i])
            prefetch(below + size * index[i] + size - 64)
        if lost > 0:
            for i in range(n):
                if index[i] < 0:
                    node = -1 - index[i]
                    step, before = _search(here[16 * node : 16 * node + 16], target[i])
                    target[i] -= before
                    index[i] = 16 * node + step
    for i in range(n):
        if replayed:
            prefetch(trees.replayed + 16 * index[i])
        step, _ = count_f32(group(leaves, index[i]), target[i])
        if step == 16 or leaves[16 * index[i] + step] == 0:
            step, _ = _search(leaves[16 * index[i] : 16 * index[i] + 16], target[i])
        index[i] = 16 * index[i] + step
        mass[i] = leaves[index[i]]


@kernel("void(int64, int64, int64, int64, int64)")
def find(record: int, target: int, n: int, index: int, mass: int) -> None:
    """Write the slots of points `target` to `index` int64, and their masses to `mass` float32.

    The points lie in [0, total of their tree), float64 [groups, n], and are overwritten.
    """
    trees = trees_at(record)
    levels, total = levels_of(trees), trees.groups * n
    points, found, masses = doubles(target, total), integers(index, total), floats(mass, total)
    for s in range(trees.groups):
        begin, end = s * n, (s + 1) * n
        own, node = points[begin:end], np.empty(n, np.int64)
        for i in range(n):
            own[i] = max(own[i], 0.0) if own[i] == own[i] else 0.0  # NaN too
        _choose_top(_tops(trees, levels, s)[0], own, node, s * trees.width)
        _descend(trees, levels, own, node, masses[begin:end], False)
        for i in range(n):
            found[begin + i] = node[i] - s * trees.stride


@kernel("int64(int64, int64, int64, float64, int64, int64, int64, int64, int64)")
def draw(
    record: int,
    point: int,
    n: int,
    beta: float,
    betas: int,
    written: int,
    index: int,
    weight: int,
    options: int,
) -> int:
    """Run `reference.draw`; return the number of trees with only masses of 0.

    If there is one, the results are not valid. `point` float64 is overwritten, `index` int64 and
    `weight` float32 are filled, [groups, n]. `betas`, unless 0, has a beta for each tree, float64
    [groups]. BY_SIZE makes the weights (size * P)^-beta; BY_BUFFER gives the smallest mass of the
    tree the weight 1; without either, the smallest drawn gets it.
    """
    trees = trees_at(record)
    levels, total, empty = levels_of(trees), trees.groups * n, 0
    points, found, weights = doubles(point, total), integers(index, total), floats(weight, total)
    ever = integers(written, trees.groups)
    mass, node = np.empty(n, np.float32), np.empty(n, np.int64)
    replayed = trees.replayed_length > 0
    drawn = flags(trees.replayed, trees.replayed_length)
    for s in range(trees.groups):
        tops, sum_of_all = _tops(trees, levels, s)
        if not sum_of_all > 0:
            empty += 1
            continue
        target = points[s * n : (s + 1) * n]
        for i in range(n):
            share = (i + target[i]) / n if (options & STRATIFIED) != 0 else target[i]
            target[i] = share * sum_of_all
        _choose_top(tops, target, node, s * trees.width)
        _descend(trees, levels, target, node, mass, replayed)
        if replayed:
            for i in range(n):
                drawn[node[i]] = True
        unit, factor = sum_of_all, 1.0
        if (options & BY_SIZE) != 0:
            factor = float(min(ever[s], trees.capacity))
        elif (options & BY_BUFFER) != 0:
            least = floats(trees.minima, trees.node_slots)[levels[0, trees.height - 1] :]
            unit = np.float64(least[s * trees.width : (s + 1) * trees.width].min())
        else:
            unit = np.float64(mass.min())
        for i in range(n):
            found[s * n + i] = node[i] - s * trees.stride
            target[i] = mass[i] / unit * factor
        exponent = doubles(betas, trees.groups)[s] if betas != 0 else beta
        power(target, -exponent, weights[s * n : (s + 1) * n])
    return empty


@kernel("int64(int64, int64, int64, int64, int64, int64)")
def draw_distinct(record: int, point: int, points: int, n: int, index: int, mass: int) -> int:
    """Keep the first `n` different slots that hold random points, int64 and float32 [groups, n].

    `point` [groups, points], in [0, 1), is overwritten. Return the number of trees where the points
    hold fewer slots; the first of them stands in.
    """
    trees = trees_at(record)
    levels, total, short, size = levels_of(trees), trees.groups * n, 0, 4
    given = doubles(point, trees.groups * points)
    found, masses = integers(index, total), floats(mass, total)
    node, value = np.empty(n, np.int64), np.empty(n, np.float32)
    while size < 4 * n:
        size *= 2
    seen = np.empty(size, np.int64)  # a hash table of nodes
    for s in range(trees.groups):
        tops, sum_of_all = _tops(trees, levels, s)
        seen[:] = -1
        own, count, at, end = found[s * n : (s + 1) * n], 0, s * points, (s + 1) * points
        while count < n and at < end and sum_of_all > 0:
            target = given[at : min(at + n - count, end)]
            for i in range(target.shape[0]):
                target[i] *= sum_of_all
            _choose_top(tops, target, node, s * trees.width)
            _descend(trees, levels, target, node, value, False)
            for i in range(target.shape[0]):
                place = ((node[i] * 2654435761) >> 12) & (size - 1)
                while seen[place] != -1 and seen[place] != node[i]:
                    place = (place + 1) & (size - 1)
                if seen[place] == -1:
                    seen[place] = node[i]
                    own[count], masses[s * n + count] = node[i] - s * trees.stride, value[i]
                    count += 1
            at += target.shape[0]
        if count < n:
            short += 1
            own[count:] = own[0] if count > 0 else 0
            masses[s * n + count : (s + 1) * n] = masses[s * n] if count > 0 else np.float32(0)
    return short


@kernel("int64(int64, int64, int64, int64, float64, int64, int64, int64, int64)")
def draw_rows(
    record: int,
    rows: int,
    point: int,
    n: int,
    beta: float,
    betas: int,
    written: int,
    to: int,
    options: int,
) -> int:
    """Run `draw`, and copy the rows of the slots.

    `to` has addresses for the rows of each field, then for generations, slots and weights, int64
    [fields + 3].
    """
    count = rows_at(rows).count
    place = integers(to, count + 3)
    generation, index, weight = place[count], place[count + 1], place[count + 2]
    empty = draw(record, point, n, beta, betas, written, index, weight, options)
    if empty == 0:
        gather(rows, index, n, to, written, generation, GENERATION)
    return empty

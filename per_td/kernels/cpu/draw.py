"""Draws from the sum tree on the CPU, and the weights of what was drawn.

The operations of `per_td.tree.reference.find` and `per_td.weights.importance_weights`, compiled.
Functions take addresses of contiguous tensors, and their lengths; the callers see to dtypes and
ranges. `shape` is the table of `Layout.shape`: offset and width of each level above the leaves.
"""

from typing import Any

import numpy as np
from numba import njit

from per_td.kernels.cpu.compiling import kernel
from per_td.kernels.cpu.memory import doubles, flags, floats, integers, prefetch, table
from per_td.kernels.cpu.power import power
from per_td.kernels.cpu.vector import count_f32, count_f64

__all__ = ["descend", "find", "sample"]


@njit
def _search(children: Any, target: float) -> tuple[int, float]:
    """Which of 16 children holds the point, and the sum of those before it, one after the other.

    A point at or past the end (rounding) is moved inside. A child of mass 0 does not change the
    running sum, so none is ever found; where all masses are 0, child 0.
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


@njit(inline="always", error_model="numpy")
def descend(
    leaves: int,
    sums: int,
    levels: Any,
    top: int,
    target: Any,
    index: Any,
    mass: Any,
    beside: int,
) -> None:
    """From the nodes `index` of the level `top` to the leaves, all points together on each level.

    While the next group of children of one point is on its way from memory, others are served.
    Where rounding leads the quick count past the end, or to a mass of 0, the slow search decides;
    such points are marked by a negative index. `beside` is the address of one byte per leaf that
    will be wanted too, or 0.
    """
    n = target.shape[0]
    for level in range(top - 1, -1, -1):
        here = sums + 8 * levels[0, level]
        below = leaves if level == 0 else sums + 8 * levels[0, level - 1]
        group = 64 if level == 0 else 128  # bytes of 16 children
        lost = 0
        for i in range(n):
            place = here + 128 * index[i]
            step, before = count_f64(place, target[i])
            if step == 16 or doubles(place, 16)[step] == 0:
                lost += 1
                index[i] = -1 - index[i]
                continue
            target[i] -= before
            index[i] = 16 * index[i] + step
            prefetch(below + group * index[i])
            prefetch(below + group * index[i] + group - 64)
        if lost > 0:
            for i in range(n):
                if index[i] < 0:
                    node = -1 - index[i]
                    step, before = _search(doubles(here + 128 * node, 16), target[i])
                    target[i] -= before
                    index[i] = 16 * node + step
    for i in range(n):
        if beside != 0:
            prefetch(beside + 16 * index[i])
        place = leaves + 64 * index[i]
        step, _ = count_f32(place, target[i])
        if step == 16 or floats(place, 16)[step] == 0:
            step, _ = _search(floats(place, 16), target[i])
        index[i] = 16 * index[i] + step
        mass[i] = floats(place, 16)[step]


@njit(inline="always", error_model="numpy")
def _walk(
    leaves: int, sums: int, levels: Any, target: Any, index: Any, mass: Any, beside: int
) -> None:
    """From the root to the leaves, as `descend`."""
    index[:] = 0
    descend(leaves, sums, levels, levels.shape[1] - 1, target, index, mass, beside)


@kernel("void(int64, int64, int64, int64, int64, int64, int64, int64)")
def find(
    leaves: int, sums: int, shape: int, depth: int, target: int, n: int, index: int, mass: int
) -> None:
    """Write the leaves that hold the points `target` to `index`, and their masses to `mass`.

    `target` is used up.
    """
    levels = table(shape, 2, depth)
    _walk(leaves, sums, levels, doubles(target, n), integers(index, n), floats(mass, n), 0)


@kernel(
    "float64(int64, int64, int64, int64, int64, int64, boolean, int64,"
    " float64, int64, int64, int64, int64)"
)
def sample(
    leaves: int,
    sums: int,
    shape: int,
    depth: int,
    point: int,
    n: int,
    stratified: bool,
    index: int,
    beta: float,
    smallest: int,
    size: int,
    weight: int,
    replayed: int,
) -> float:
    """Draw leaves, as `find` does, for points in [0, 1), which are used up, and weigh them.

    Args:
        leaves, sums, shape, depth: the tree.
        point, n: random numbers in [0, 1), float64 [n].
        stratified: whether each is to be moved into its n-th of the whole.
        index: for the leaves, int64 [n].
        beta: exponent of the weights.
        smallest: address of the mass that gets the weight 1; 0: the smallest that is drawn.
        size: if positive, the weights are (size * P)^-beta instead.
        weight: for the weights, float32 [n].
        replayed: bool, one per leaf; those drawn become true.

    Returns:
        The total mass; where it is 0, nothing is drawn.
    """
    levels = table(shape, 2, depth)
    total = doubles(sums, levels[0, -1] + 1)[-1]
    if not total > 0:
        return total
    target, mass = doubles(point, n), np.empty(n, np.float32)
    for i in range(n):
        target[i] = ((i + target[i]) / n if stratified else target[i]) * total
    found, drawn = integers(index, n), flags(replayed, 16 * levels[1, 0])
    _walk(leaves, sums, levels, target, found, mass, replayed)
    for i in range(n):
        drawn[found[i]] = True
    unit, factor = total, 1.0
    if size > 0:
        factor = float(size)
    elif smallest != 0:
        unit = np.float64(floats(smallest, 1)[0])
    else:
        unit = np.float64(mass.min())
    for i in range(n):
        target[i] = mass[i] / unit * factor
    power(target, -beta, floats(weight, n))
    return total

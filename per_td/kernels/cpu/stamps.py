"""Rings whose writer keeps the generation of every slot, on the CPU; compiled."""

import numpy as np

from per_td.kernels.cpu.compiling import kernel
from per_td.kernels.cpu.memory import floats, integers, prefetch
from per_td.kernels.cpu.rows import scatter
from per_td.kernels.cpu.update import assign

__all__ = ["append", "settle"]


@kernel("void(int64, int64, int64, int64, int64, int64, int64, int64, int64)")
def append(
    fields: int,
    sizes: int,
    count: int,
    slots: int,
    start: int,
    n: int,
    source: int,
    generation: int,
    index: int,
) -> None:
    """`scatter`, and one more writing of these slots counted.

    Args:
        fields, sizes, count, slots, start, n, source: as for `scatter`.
        generation: how often each slot was written, int64 [slots].
        index: for the slots, int64 [n]; it may be among the sources.
    """
    stamps, at = integers(generation, slots), integers(index, n)
    for i in range(n):
        at[i] = start + i if start + i < slots else start + i - slots
        stamps[at[i]] += 1
    scatter(fields, sizes, count, slots, start, n, source)


@kernel(
    "boolean(int64, int64, int64, int64, int64, int64, int64, int64, int64, int64, int64, int64,"
    " int64, boolean, float64, float64, int64)"
)
def settle(
    raw: int,
    leaves: int,
    sums: int,
    maxima: int,
    minima: int,
    shape: int,
    depth: int,
    index: int,
    error: int,
    n: int,
    size: int,
    drawn: int,
    generation: int,
    squared: bool,
    eps: float,
    alpha: float,
    ever_max: int,
) -> bool:
    """`assign`, if every slot of a batch holds what was drawn and every value is finite.

    Args:
        raw, leaves, sums, maxima, minima, shape, depth, eps, alpha, ever_max: as for `assign`.
        index: slots, int64 [n].
        error: what a loss wrote, float32 [n].
        n, size: how many; how many slots may be named.
        drawn, generation: generations of the batch when it was drawn, int64 [n], and of all slots
            now, int64 [size].
        squared: whether a loss wrote delta^2.

    Returns:
        Whether anything was written.
    """
    stamps, at, then = integers(generation, size), integers(index, n), integers(drawn, n)
    for i in range(n):
        if not 0 <= at[i] < size:
            return False
        prefetch(generation + 8 * at[i])
    for i in range(n):
        if stamps[at[i]] != then[i]:
            return False
    errors, magnitudes = floats(error, n), np.empty(n, np.float32)
    for i in range(n):
        magnitude = abs(errors[i])
        magnitudes[i] = np.sqrt(magnitude) if squared else magnitude
    tree = raw, leaves, sums, maxima, minima, shape, depth
    batch = index, magnitudes.ctypes.data, n, size
    ring = 0, 0, size
    dropped = assign(*tree, *batch, *ring, eps, alpha, ever_max, ever_max, 0, 0)
    return dropped >= 0 and magnitudes.shape[0] == n  # named here, or it would be freed before

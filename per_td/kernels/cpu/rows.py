"""Rows of the ring on the CPU: read at random places, written one after the other; compiled.

A field is described by the address of its first row, the distance between rows and the length of
a row, in bytes. So it does not matter how the fields lie in memory.
"""

from per_td.kernels.cpu.compiling import kernel
from per_td.kernels.cpu.memory import integers, pick, prefetch, spread, table

__all__ = ["gather", "scatter"]


@kernel("void(int64, int64, int64, int64, int64, int64, int64, int64, int64)")
def gather(
    fields: int,
    sizes: int,
    count: int,
    index: int,
    n: int,
    to: int,
    written: int,
    slots: int,
    generation: int,
) -> None:
    """Copy the rows `index` [n] of `count` fields to where `to` says, close together.

    Args:
        fields, to: addresses of the first rows, and of where to copy to, int64 [count].
        sizes: distance between rows and length of a row, int64 [count, 2].
        count: number of fields.
        index, n: the rows, int64 [n].
        written, slots: how many transitions were ever written, to how many slots.
        generation: for how often the ring had wrapped when the rows were written, int64 [n]; 0 if
            that is not wanted.
    """
    first, size, place = integers(fields, count), table(sizes, count, 2), integers(to, count)
    at = integers(index, n)
    for i in range(n):
        for k in range(count):
            prefetch(first[k] + at[i] * size[k, 0])
    if generation != 0:
        wrapped = integers(generation, n)
        for i in range(n):
            wrapped[i] = (written - 1 - at[i]) // slots
    for k in range(count):
        pick(place[k], first[k], size[k, 0], size[k, 1], at)


@kernel("void(int64, int64, int64, int64, int64, int64, int64)")
def scatter(
    fields: int, sizes: int, count: int, slots: int, start: int, n: int, source: int
) -> None:
    """Copy `n` rows for each field into the ring of `slots`, from the slot `start` on.

    Args:
        fields, sizes, count: as for `gather`.
        slots, start, n: n is at most `slots`.
        source: addresses of the rows, which lie close together, int64 [count].
    """
    begin, size, place = integers(fields, count), table(sizes, count, 2), integers(source, count)
    head = min(n, slots - start)
    for k in range(count):
        step, length = size[k]
        first, origin = begin[k], place[k]
        spread(first + start * step, step, origin, length, head)
        spread(first, step, origin + head * length, length, n - head)

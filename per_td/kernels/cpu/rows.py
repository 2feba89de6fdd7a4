"""Compiled copies of rows of S rings on the CPU: from random slots, and into runs of slots.

A record gives the address of a field's first row, the distance between rows and the length of a
row, in bytes. So the fields may lie in memory in any way. `reference` describes the arguments.
"""

from typing import Any

import numpy as np

from per_td.kernels.cpu.compiling import kernel, part
from per_td.kernels.cpu.memory import (
    copy,
    fields_of,
    flags,
    integers,
    pick,
    prefetch,
    rows_at,
    spread,
)
from per_td.kernels.parts import GENERATION, MASK, STAMPS

_AHEAD = 256


@kernel("boolean(int64, int64, int64, int64, int64, int64, int64)")
def gather(
    record: int, index: int, n: int, to: int, written: int, generation: int, options: int
) -> bool:
    """Run `reference.gather`; False, and nothing is written, if a slot is out of range.

    `to` has the addresses of the copies, int64 [fields]. `generation` takes the generations, int64
    [groups, n], with the option GENERATION.
    """
    rows = rows_at(record)
    fields, place, total = fields_of(rows), integers(to, rows.count), rows.groups * n
    at, ever = integers(index, total), integers(written, rows.groups)
    row = np.empty(total, np.int64)
    for s in range(rows.groups):
        for i in range(s * n, (s + 1) * n):
            slot = at[i]
            if not 0 <= slot < rows.capacity:
                return False
            row[i] = s * rows.capacity + slot
    known = (options & GENERATION) != 0
    wrapped = integers(generation, total if known else 0)
    # a few hundred rows at a time stay in the cache from the prefetch to the copy
    for begin in range(0, total, _AHEAD):
        some = row[begin : begin + _AHEAD]
        for i in range(some.shape[0]):
            for k in range(rows.count):
                prefetch(fields[k, 0] + some[i] * fields[k, 1])
        if known:  # while the rows are on their way
            for i in range(begin, begin + some.shape[0]):
                s = i // n if rows.groups > 1 else 0
                wrapped[i] = (ever[s] - 1 - (row[i] - s * rows.capacity)) // rows.capacity
        for k in range(rows.count):
            pick(place[k] + begin * fields[k, 2], fields[k, 0], fields[k, 1], fields[k, 2], some)
    return True


@part(inline="always")
def _write_run(fields: Any, source: Any, origin: int, base: int, run: Any, slots: int) -> None:
    """Copy rows of the sources, from `origin` on, to a run of slots of the ring at row `base`."""
    start, n = run
    head = min(n, slots - start)
    for k in range(fields.shape[0]):
        first, step, length = fields[k, 0], fields[k, 1], fields[k, 2]
        taken = source[k] + origin * length
        spread(first + (base + start) * step, step, taken, length, head)
        spread(first + base * step, step, taken + head * length, length, n - head)


@kernel("boolean(int64, int64, int64, int64, int64, int64, int64, int64)")
def write(
    record: int, source: int, n: int, runs: int, mask: int, stamps: int, index: int, options: int
) -> bool:
    """Run `reference.write_rows`; False, and nothing is written, if a run does not fit.

    `source` has the addresses of the new rows of each field, int64 [fields]. MASK says that there
    is a `mask`, STAMPS that there are `stamps` and an `index`.
    """
    rows = rows_at(record)
    fields, origin, slots = fields_of(rows), integers(source, rows.count), rows.capacity
    run = integers(runs, 2 * rows.groups).copy()
    for s in range(rows.groups):
        if not (0 <= run[2 * s] < slots and 0 <= run[2 * s + 1] <= min(n, slots)):
            return False
        if (options & STAMPS) != 0 and run[2 * s + 1] != n:
            return False
    if (options & STAMPS) != 0:
        stamp, at = integers(stamps, rows.groups * slots), integers(index, rows.groups * n)
        for s in range(rows.groups):
            for i in range(n):
                slot = run[2 * s] + i
                slot = slot if slot < slots else slot - slots
                at[s * n + i] = slot
                stamp[s * slots + slot] += 1
    if (options & MASK) == 0:
        for s in range(rows.groups):
            start, length = run[2 * s], run[2 * s + 1]
            _write_run(fields, origin, (s + 1) * n - length, s * slots, (start, length), slots)
        return True
    wanted, chosen = flags(mask, rows.groups * n), np.empty(n, np.int64)
    for s in range(rows.groups):
        count = 0
        for i in range(s * n, (s + 1) * n):
            if wanted[i]:
                chosen[count] = i
                count += 1
        length = min(run[2 * s + 1], count)
        for k in range(rows.count):
            first, step, size = fields[k, 0], fields[k, 1], fields[k, 2]
            for i in range(length):
                slot = run[2 * s] + i
                slot = slot if slot < slots else slot - slots
                row = chosen[count - length + i]
                copy(first + (s * slots + slot) * step, origin[k] + row * size, size)
    return True

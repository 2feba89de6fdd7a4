"""Records of addresses and lengths, of a table's trees and of rows, for the CPU kernels.

The door makes a record once for a block of memory, and passes its address to the kernels.
"""

from typing import Any

import numpy as np
from numba import carray

from per_td.kernels.cpu.compiling import part
from per_td.kernels.cpu.memory import pointer


def _numbers(names: str) -> "np.dtype[Any]":
    return np.dtype([(name, np.int64) for name in names.split()])


TREES = _numbers(
    # addresses: leaves and priorities [leaf_slots], nodes [node_slots], levels [2, depth]
    "leaves raw sums maxima minima levels"
    # settings float64 [4], exponents float64 and ever_max float32 [groups], replayed bool, snapshot
    # float32, and lengths; the length of a missing part is 0
    " settings exponents ever_max replayed replayed_length snapshot snapshot_length"
    # lengths and places, see `Layout`
    " leaf_slots node_slots raw_length depth groups capacity stride width height"
)
ROWS = _numbers(
    # address of int64 [count, 3] (first row, bytes from row to row, bytes of a row), and rows of
    # each group, one group after the other
    "fields count groups capacity"
)
FRAMES = _numbers(
    # addresses: frames int64 [size + 1, words], factors [words], recent [3, envs + 1, length],
    # counters [4, envs + 1] and page [2]; see `per_td.kernels.parts.Frames`
    "lanes factors recent counters page size words depth envs length look_back"
)


@part(inline="always")
def trees_at(record: int) -> Any:
    """Read the `TREES` record at an address."""
    return carray(pointer(record), 1, TREES)[0]


@part(inline="always")
def rows_at(record: int) -> Any:
    """Read the `ROWS` record at an address."""
    return carray(pointer(record), 1, ROWS)[0]


@part(inline="always")
def frames_at(record: int) -> Any:
    """Read the `FRAMES` record at an address."""
    return carray(pointer(record), 1, FRAMES)[0]


@part(inline="always")
def levels_of(trees: Any) -> Any:
    """Offset and width of each level above the leaves, int64 [2, depth]."""
    return carray(pointer(trees.levels), (2, trees.depth), np.int64)


@part(inline="always")
def fields_of(rows: Any) -> Any:
    """First row, step and length of each field, int64 [count, 3]."""
    return carray(pointer(rows.fields), (rows.count, 3), np.int64)

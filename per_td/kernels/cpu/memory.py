"""Views of memory at an address, prefetching, and copies of bytes, for the CPU kernels.

The door makes a record of addresses and lengths once for a block of memory. A kernel gets its
address, and makes array views of these. `PER_TD_KERNELS=checked` compiles all kernels with numba's
bounds checks, and `group` then touches both ends of the children that its caller will read. Rows
are copied between bare addresses: the kernels check the slots.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic

from per_td.kernels.cpu.compiling import CHECKED, part, unary

_BYTE_POINTER = ir.IntType(8).as_pointer()


pointer = unary(types.voidptr(types.int64), lambda b, address: b.inttoptr(address, _BYTE_POINTER))
"""Convert an address to a pointer."""


def _view(dtype: Any) -> Any:
    """Make a function that views the array [n] of this dtype at an address."""

    @part()
    def view(address: int, n: int) -> Any:
        return carray(pointer(address), n, dtype)

    return view


floats, doubles, flags = map(_view, (np.float32, np.float64, np.bool_))
integers, shorts = map(_view, (np.int64, np.int32))


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


def _reader(dtype: "np.dtype[Any]") -> Any:
    """Make a function that reads the record of this dtype at an address."""

    @part(inline="always")
    def read(record: int) -> Any:
        return carray(pointer(record), 1, dtype)[0]

    return read


trees_at, rows_at, frames_at = map(_reader, (TREES, ROWS, FRAMES))


@part(inline="always")
def levels_of(trees: Any) -> Any:
    """Offset and width of each level above the leaves, int64 [2, depth]."""
    return carray(pointer(trees.levels), (2, trees.depth), np.int64)


@part(inline="always")
def fields_of(rows: Any) -> Any:
    """First row, step and length of each field, int64 [count, 3]."""
    return carray(pointer(rows.fields), (rows.count, 3), np.int64)


@part(inline="always")
def group(array: Any, node: int) -> int:
    """Address of the 16 children of a node; the checked build checks that they exist."""
    if CHECKED:
        array[16 * node]
        array[16 * node + 15]
    return array.ctypes.data + 16 * node * array.itemsize


@intrinsic
def prefetch(typing_context: Any, address: Any) -> Any:
    """Ask for the cache line at `address`, without waiting; any address is safe."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        flag = ir.IntType(32)
        prototype = ir.FunctionType(ir.VoidType(), [_BYTE_POINTER, flag, flag, flag])
        function = cgutils.get_or_insert_function(builder.module, prototype, "llvm.prefetch.p0")
        place = builder.inttoptr(arguments[0], _BYTE_POINTER)
        builder.call(function, [place, flag(0), flag(3), flag(1)])  # for reading, to keep, data
        return context.get_dummy_value()

    return types.none(types.int64), generate


def _mover(size: int | None) -> Any:
    """Make a copy of `size` bytes, of any alignment; None: as many as the third argument says."""

    @intrinsic
    def move(typing_context: Any, to: Any, source: Any, count: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            destination, origin = (builder.inttoptr(a, _BYTE_POINTER) for a in arguments[:2])
            length = arguments[2] if size is None else ir.IntType(64)(size)
            cgutils.raw_memcpy(builder, destination, origin, length, 1)
            return context.get_dummy_value()

        return types.none(types.int64, types.int64, types.int64), generate

    return move


_move_32, _move_8, _move_4, _move_1, _move_many = map(_mover, (32, 8, 4, 1, None))


@part()
def copy(to: int, source: int, count: int) -> None:
    """Copy bytes; a few without the call that a copy of unknown length costs."""
    if count > 256:
        _move_many(to, source, count)
        return
    while count >= 32:
        _move_32(to, source, 32)
        to, source, count = to + 32, source + 32, count - 32
    while count >= 8:
        _move_8(to, source, 8)
        to, source, count = to + 8, source + 8, count - 8
    if count >= 4:
        _move_4(to, source, 4)
        to, source, count = to + 4, source + 4, count - 4
    while count > 0:
        _move_1(to, source, 1)
        to, source, count = to + 1, source + 1, count - 1


@part()
def spread(to: int, step: int, source: int, length: int, n: int) -> None:
    """Copy `n` adjacent rows of `length` bytes to places `step` bytes apart."""
    if step == length:
        copy(to, source, n * length)
    elif length == 8:
        for i in range(n):
            _move_8(to + i * step, source + i * 8, 8)
    elif length == 4:
        for i in range(n):
            _move_4(to + i * step, source + i * 4, 4)
    elif length == 1:
        for i in range(n):
            _move_1(to + i * step, source + i, 1)
    elif length == 32:
        for i in range(n):
            _move_32(to + i * step, source + i * 32, 32)
    else:
        for i in range(n):
            copy(to + i * step, source + i * length, length)


@part()
def pick(to: int, source: int, step: int, length: int, index: Any) -> None:
    """Copy the rows `index` [n] of `length` bytes, `step` bytes apart, to adjacent places."""
    n = index.shape[0]
    if length == 8:
        for i in range(n):
            _move_8(to + i * 8, source + index[i] * step, 8)
    elif length == 4:
        for i in range(n):
            _move_4(to + i * 4, source + index[i] * step, 4)
    elif length == 1:
        for i in range(n):
            _move_1(to + i, source + index[i] * step, 1)
    elif length == 32:
        for i in range(n):
            _move_32(to + i * 32, source + index[i] * step, 32)
    else:
        for i in range(n):
            copy(to + i * length, source + index[i] * step, length)

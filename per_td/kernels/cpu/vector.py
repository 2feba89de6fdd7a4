"""Arithmetic with vector instructions: reductions of sixteen children at once, and powers.

numba makes no vector instructions of the reductions, so they are written for LLVM, which cuts
vectors of any length to those of the processor. Sums are taken pairwise, in float64, and the last
prefix sum is the sum, bit for bit.
"""

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from per_td.kernels.cpu.compiling import part, unary

_WIDTH = 16
_INT = ir.IntType(32)
_DOUBLE, _FLOAT = ir.DoubleType(), ir.FloatType()
_DOUBLES, _FLOATS = ir.VectorType(_DOUBLE, _WIDTH), ir.VectorType(_FLOAT, _WIDTH)


def _load(builder: Any, address: Any, vector: Any) -> Any:
    value = builder.load(builder.inttoptr(address, vector.as_pointer()))
    value.align = 8 if vector is _DOUBLES else 4
    return value


def _splat(vector: Any, number: float) -> Any:
    return ir.Constant(vector, [ir.Constant(vector.element, number)] * _WIDTH)


def _broadcast(builder: Any, value: Any, vector: Any) -> Any:
    undefined = ir.Constant(vector, ir.Undefined)
    zeros = ir.Constant(ir.VectorType(_INT, _WIDTH), [_INT(0)] * _WIDTH)
    return builder.shuffle_vector(
        builder.insert_element(undefined, value, _INT(0)), undefined, zeros
    )


def _reduce(builder: Any, name: str, value: Any) -> Any:
    """Reduce by `llvm.vector.reduce.fmax` or `fmin`, for vectors without NaN."""
    kind = "f64" if value.type == _DOUBLES else "f32"
    prototype = ir.FunctionType(value.type.element, [value.type])
    full = f"llvm.vector.reduce.{name}.v{_WIDTH}{kind}"
    function = cgutils.get_or_insert_function(builder.module, prototype, full)
    return builder.call(function, [value], fastmath=("nnan",))


def _prefix_sums(builder: Any, value: Any) -> Any:
    """Prefix sums in four steps: add to each number the one 1, 2, 4 and 8 places before."""
    for shift in (1, 2, 4, 8):
        places = [_INT(_WIDTH + i - shift if i >= shift else 0) for i in range(_WIDTH)]
        mask = ir.Constant(ir.VectorType(_INT, _WIDTH), places)
        value = builder.fadd(value, builder.shuffle_vector(_splat(_DOUBLES, 0.0), value, mask))
    return value


def _doubles_at(builder: Any, address: Any, vector: Any) -> Any:
    value = _load(builder, address, vector)
    return value if vector is _DOUBLES else builder.fpext(value, _DOUBLES)


def _counter(vector: Any) -> Any:
    """(address, target) -> number of prefix sums at most the target, and the largest of them."""

    @intrinsic
    def count(typing_context: Any, address: Any, target: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            prefix = _prefix_sums(builder, _doubles_at(builder, arguments[0], vector))
            limit = _broadcast(builder, arguments[1], _DOUBLES)
            passed = builder.fcmp_ordered("<=", prefix, limit)
            bits = builder.bitcast(passed, ir.IntType(_WIDTH))
            step = builder.zext(builder.ctpop(bits), ir.IntType(64))
            sums = builder.select(passed, prefix, _splat(_DOUBLES, 0.0))
            before = _reduce(builder, "fmax", sums)
            return context.make_tuple(builder, signature.return_type, [step, before])

        pair = types.Tuple((types.int64, types.float64))
        return pair(types.int64, types.float64), generate

    return count


def _sum(builder: Any, address: Any, vector: Any) -> Any:
    prefix = _prefix_sums(builder, _doubles_at(builder, address, vector))
    return builder.extract_element(prefix, _INT(_WIDTH - 1))


def _min_positive(builder: Any, address: Any) -> Any:
    """Smallest of the numbers above 0; infinity if there is none."""
    value = _load(builder, address, _FLOATS)
    positive = builder.fcmp_ordered(">", value, _splat(_FLOATS, 0.0))
    value = builder.select(positive, value, _splat(_FLOATS, float("inf")))
    return _reduce(builder, "fmin", value)


_FLOAT_AT, _DOUBLE_AT = types.float32(types.int64), types.float64(types.int64)

count_f32, count_f64 = _counter(_FLOATS), _counter(_DOUBLES)
sum_f32 = unary(_DOUBLE_AT, lambda b, address: _sum(b, address, _FLOATS))
sum_f64 = unary(_DOUBLE_AT, lambda b, address: _sum(b, address, _DOUBLES))
max_f32 = unary(_FLOAT_AT, lambda b, address: _reduce(b, "fmax", _load(b, address, _FLOATS)))
min_positive_f32 = unary(_FLOAT_AT, _min_positive)


# --- powers ---------------------------------------------------------------------------------------
# One loop without branches or calls, which LLVM turns into vectors. The library's pow takes one
# number at a time, five times as long. Here x = m 2^e with m between sqrt(1/2) and sqrt(2), log2(m)
# and 2^f are sums of their series, and the relative error is some 1e-14: invisible after rounding
# to float32.

_ROOT = int(np.float64(math.sqrt(0.5)).view(np.int64))
_ROUND = 1.5 * 2**52  # added to a float64, it rounds to whole numbers, found in the lowest bits
_ROUND_BITS = int(np.float64(_ROUND).view(np.int64))
_L0, _L1, _L2, _L3, _L4, _L5, _L6, _L7, _L8, _L9 = (
    2 / ((2 * k + 1) * math.log(2)) for k in range(10)
)
_E1, _E2, _E3, _E4, _E5, _E6, _E7, _E8, _E9, _E10, _E11, _E12 = (
    math.log(2) ** k / math.factorial(k) for k in range(1, 13)
)


_bits = unary(types.int64(types.float64), lambda b, number: b.bitcast(number, ir.IntType(64)))
_number = unary(types.float64(types.int64), lambda b, bits: b.bitcast(bits, ir.DoubleType()))


@part(inline="always", error_model="numpy")
def _log2(x: float) -> float:
    bits = _bits(x)
    exponent = (bits - _ROOT) >> 52
    m = _number(bits - (exponent << 52))
    s = (m - 1.0) / (m + 1.0)
    z = s * s
    series = ((_L9 * z + _L8) * z + _L7) * z + _L6
    series = ((((((series * z + _L5) * z + _L4) * z + _L3) * z + _L2) * z) + _L1) * z + _L0
    return exponent + s * series


@part(inline="always", error_model="numpy")
def _exp2(y: float) -> float:
    y = min(max(y, -1000.0), 1000.0)
    rounded = y + _ROUND
    whole = _bits(rounded) - _ROUND_BITS
    f = y - (rounded - _ROUND)
    series = ((((_E12 * f + _E11) * f + _E10) * f + _E9) * f + _E8) * f + _E7
    series = ((((series * f + _E6) * f + _E5) * f + _E4) * f + _E3) * f + _E2
    series = (series * f + _E1) * f + 1.0
    return series * _number((whole + 1023) << 52)


@part(inline="always", error_model="numpy")
def power(x: Any, exponent: float, out: Any) -> None:
    """Write x^exponent to `out` [n], for normal positive float64 numbers x [n]."""
    for i in range(x.shape[0]):
        out[i] = _exp2(exponent * _log2(x[i]))

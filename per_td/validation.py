"""Checks of arguments; their errors say what was expected and what came.

On the CPU a wrong value raises before anything is written. On CUDA, reading a value would make the
host wait. There, and in code compiled by torch.compile, a wrong value is refused on the device: it
is sent to the spare leaf, the old value stays, and a counter goes up.
"""

import math
import operator
import sys
from collections.abc import Callable
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor

from per_td.errors import (
    ConfigurationError,
    IndexRangeError,
    PerTdError,
    PriorityError,
    SchemaError,
)
from per_td.memory import has_memory

_REFUSALS = (TypeError, ValueError, RuntimeError, OverflowError, AssertionError)
"""Errors of conversions by torch, numpy and other objects."""

_ROUNDING = 64 * 2.0**-52
_MOST = 2**48
"""Most transitions; no machine holds more, and 64 bits can count their bytes."""


def can_raise(tensor: Tensor) -> bool:
    """True if a check of values may raise: not on CUDA (the host would wait), nor while tracing."""
    return tensor.is_cpu and not torch.compiler.is_compiling()


def _probe(device: torch.device | str | int | None, dtype: torch.dtype) -> Tensor:
    return torch.empty(0, dtype=dtype, device=device)


def resolve_device(device: torch.device | str | int | None, *, sums: bool = True) -> torch.device:
    """Find a device as tensors report it: `cuda` becomes `cuda:0`; None is torch's default device.

    Args:
        device: device, or its name or number.
        sums: require float64, for sums of masses.

    Raises:
        ConfigurationError: there is no such device, it is "meta", or it lacks float64.
    """
    try:
        found = _probe(device, torch.uint8).device
    except _REFUSALS as error:
        reason = str(error).partition("\n")[0]
        if str(device).startswith("cuda"):
            n = torch.cuda.device_count() if torch.cuda.is_available() else 0
            reason = (
                f"torch finds {n} CUDA devices here; give device='cpu' to do without ({reason})"
            )
        raise ConfigurationError(
            f"device: expected a device that there is, got {device!r}: {reason}"
        ) from error
    if found.type == "meta":
        raise ConfigurationError("device: expected one that holds values, got meta")
    if sums:
        try:
            _probe(found, torch.float64)
        except _REFUSALS as error:
            raise ConfigurationError(
                f"device: expected one with float64, in which masses are summed, got '{found}':"
                f" give device='cpu', and bring batches there with .to('{found.type}')"
            ) from error
    return found


def as_generator(generator: torch.Generator | None, device: torch.device) -> torch.Generator | None:
    """Check a generator for draws on `device`, or raise ConfigurationError; None is torch's own."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise ConfigurationError(
            f"generator: expected a torch.Generator, got {type(generator).__name__}"
        )
    if generator is not None and generator.device.type != device.type:
        raise ConfigurationError(
            f"generator: expected one on {device}, got one on {generator.device}"
        )
    return generator


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Bring `tensor` to `device`, without a host sync if that is safe.

    An asynchronous copy from ordinary host memory has read its source when it returns. From pinned
    memory, or to the host, it has not, and the next write or read would race with it.
    """
    if tensor.device == device:
        return tensor
    return tensor.to(device, non_blocking=device.type != "cpu" and not tensor.is_pinned())


def positive_int(name: str, value: object) -> int:
    """Convert `value` to an int of at least 1, or raise ConfigurationError."""
    if type(value) is int and 0 < value <= _MOST:
        return value
    return integer(name, value, 1)


def integer(name: str, value: object, low: int) -> int:
    """Convert an integer of Python, numpy or a tensor to an int of at least `low` (0 or more).

    Or raise ConfigurationError, which names the argument.
    """
    try:
        number = -1 if isinstance(value, bool) else int(operator.index(value))  # type: ignore[arg-type]
    except _REFUSALS:
        number = -1
    if number < low:
        raise ConfigurationError(f"{name}: expected an integer of at least {low}, got {value!r}")
    if number > _MOST:
        raise ConfigurationError(f"{name}: expected at most 2**48, got more")
    return number


def real(name: str, value: float | Tensor, low: float = 0.0, high: float = math.inf) -> float:
    """Convert `value` to a finite float in [low, high], or raise ConfigurationError."""
    try:
        plain = value.detach() if isinstance(value, Tensor) else value
        number = math.nan if isinstance(value, str | bytes) else float(plain)
    except _REFUSALS:
        number = math.nan
    if not low <= number <= high:  # a sum of steps may end a few roundings beyond a bound
        for bound in (low, high):
            if abs(number - bound) <= _ROUNDING * max(1.0, min(abs(bound), sys.float_info.max)):
                number = bound
    if not (math.isfinite(number) and low <= number <= high):
        raise ConfigurationError(
            f"{name}: expected a finite number in [{low:g}, {high:g}], got {value!r}"
        )
    return number


def real_or_each(
    name: str, value: Any, groups: int | None, *, high: float = math.inf
) -> float | Tensor:
    """Convert `value` to a finite float in [0, high], or to one for each of many buffers.

    A list, an array or a tensor of `groups` numbers becomes float64 [S] on the CPU; to read a
    tensor elsewhere, the host waits. Without `groups`, only one number is accepted. Anything else
    raises ConfigurationError, which names the argument.
    """
    many = isinstance(value, list | tuple) or (
        isinstance(value, Tensor | np.ndarray) and value.ndim > 0
    )
    if groups is None or not many:
        return real(name, value, high=high)
    try:
        numbers = value if isinstance(value, list | tuple) else value.tolist()
    except _REFUSALS as error:  # such as a tensor without values
        raise ConfigurationError(
            f"{name}: expected {groups} numbers, one for each buffer, got {type(value).__name__}"
            f" without: {error}"
        ) from error
    if len(numbers) != groups:
        raise ConfigurationError(
            f"{name}: expected one number, or {groups}, one for each buffer, got {len(numbers)}"
        )
    checked = [real(name, number, high=high) for number in numbers]
    return torch.tensor(checked, dtype=torch.float64, device="cpu")


def flag(name: str, value: object) -> bool:
    """Return `value` if it is True or False, or raise ConfigurationError."""
    if not isinstance(value, bool | np.bool_):
        raise ConfigurationError(f"{name}: expected True or False, got {value!r}")
    return bool(value)


def one_of(name: str, value: str, choices: tuple[str, ...]) -> str:
    """Return the one of `choices` that equals `value`, or raise ConfigurationError."""
    if not isinstance(value, str) or value not in choices:
        raise ConfigurationError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")
    return choices[choices.index(value)]


def fixed(
    name: str, read: Callable[[Any], Any] | None = None, instead: str = "the constructor takes it"
) -> Any:
    """Make a property whose setter raises ConfigurationError, with `instead` as advice."""

    def refuse(self: Any, value: object) -> None:
        raise ConfigurationError(
            f"{name}: expected no change once the {type(self).__name__} is made, got {value!r}:"
            f" {instead}"
        )

    return property(read, refuse)


def _is_plain(value: Any, dtype: torch.dtype, device: torch.device) -> TypeGuard[Tensor]:
    """Return True if `value` needs no conversion: a quick check for the usual case.

    The memory of a lazily negated tensor has the wrong signs for kernels.
    """
    return (
        type(value) is Tensor
        and value.dtype is dtype
        and value.device == device
        and value.layout is torch.strided
        and not value.is_nested
        and (torch.compiler.is_compiling() or (not value.is_neg() and has_memory(value)))
    )


def are_plain(index: Any, values: Any, device: torch.device) -> bool:
    """True if `index` int64 [B] and `values` float32 [B] need no conversion, and can raise."""
    return (
        _is_plain(index, torch.int64, device)
        and _is_plain(values, torch.float32, device)
        and index.ndim == 1
        and values.shape == index.shape
        and can_raise(index)
    )


def require_plain(name: str, tensor: Tensor, error: type[PerTdError]) -> None:
    """Raise an `error` if `tensor` is not dense, or has no values or no memory of its own."""
    if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_quantized:
        kind = "nested" if tensor.is_nested else str(tensor.layout)
        raise error(f"{name}: expected a dense tensor, got a {kind} one of {tensor.dtype}")
    if tensor.is_meta:
        raise error(f"{name}: expected values, got a tensor on the device meta, which has none")
    if not (torch.compiler.is_compiling() or has_memory(tensor)):
        raise error(
            f"{name}: expected a tensor with memory of its own, got a {type(tensor).__name__}"
            " without"
        )


def plain_rows(leaf: Tensor, device: torch.device) -> Tensor:
    """Bring `leaf` to `device`, contiguous; SchemaError if it has no memory of its own."""
    usual = leaf.layout is torch.strided and leaf.is_contiguous() and leaf.device == device
    if usual and not (leaf.is_neg() or leaf.is_conj()):
        return leaf
    require_plain("transitions", leaf, SchemaError)
    leaf = to_device(leaf, device)
    if leaf.is_neg() or leaf.is_conj():
        leaf = leaf.resolve_neg().resolve_conj()
    return leaf if leaf.is_contiguous() else leaf.contiguous()


def refuse_transform(error: BaseException) -> None:
    """Raise PerTdError in place of an `error` of torch inside of its function transforms."""
    peek = getattr(torch._C._functorch, "peek_interpreter_stack", None)
    if isinstance(error, RuntimeError) and peek is not None and peek() is not None:
        raise PerTdError(
            "expected no call of the buffer inside of torch.func.grad, vmap and the like, which"
            f" cannot follow it, got one: {error}"
        ) from error


def as_tensor(name: str, value: Any, error: type[PerTdError]) -> Tensor:
    """Convert a tensor, array, sequence or number to a dense, detached tensor, or raise `error`.

    A tensor stays on its device; all else comes to the CPU, whatever torch's default device is.
    """
    try:
        tensor: Tensor
        if isinstance(value, Tensor):
            tensor = value.detach()
        else:
            if isinstance(value, np.ndarray) and not _is_shareable(value):
                value = np.array(value, dtype=value.dtype.newbyteorder("="), order="C")
            plain = torch.get_default_dtype() is torch.float32 or not _holds_float(value)
            dtype = None if plain else torch.float32
            tensor = torch.as_tensor(value, dtype=dtype, device="cpu")
    except _REFUSALS as refusal:
        raise error(
            f"{name}: expected a tensor, an array or numbers, got {type(value).__name__}: {refusal}"
        ) from refusal
    require_plain(name, tensor, error)
    return tensor.resolve_neg()


def _is_shareable(array: np.ndarray[Any, Any]) -> bool:
    """False for backward or odd strides, swapped bytes and read-only memory, which torch refuses.

    numpy says nothing of the strides of dimensions of size 1.
    """
    odd = any(step < 0 or step % max(1, array.itemsize) for step in array.strides)
    return array.flags.carray and array.dtype.isnative and not odd


def _holds_float(value: Any) -> bool:
    """True if a Python float is among nested numbers: torch would take its default dtype."""
    several = isinstance(value, list | tuple)
    return any(map(_holds_float, value)) if several else type(value) is float


def as_index(
    index: Any, device: torch.device, name: str = "index", *, lead: tuple[int, ...] = ()
) -> Tensor:
    """Convert a tensor, an array, a sequence or an int to int64 [*lead, B] on `device`.

    Or raise IndexRangeError, which names the argument.
    """
    if _is_plain(index, torch.int64, device) and (
        index.ndim == 1 + len(lead) and (not lead or index.shape[:1] == lead)
    ):
        return index
    index = as_tensor(name, index, IndexRangeError)
    if index.dtype.is_floating_point or index.dtype.is_complex or index.dtype == torch.bool:
        if index.numel():
            raise IndexRangeError(f"{name}: expected an integer dtype, got {index.dtype}")
        index = index.long()
    index = index if lead or index.ndim else index.reshape(1)
    if index.ndim != 1 + len(lead) or index.shape[:-1] != lead:
        expected = shaped(*lead, "B")
        raise IndexRangeError(f"{name}: expected shape {expected}, got {[*index.shape]}")
    return to_device(index, device).long()


def as_reals(name: str, values: Any, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Convert real numbers to a detached tensor on `device`, or raise PriorityError."""
    values = as_tensor(name, values, PriorityError)
    if values.dtype.is_complex or values.dtype == torch.bool:
        raise PriorityError(f"{name}: expected a real dtype, got {values.dtype}")
    reals: Tensor = to_device(values, device).to(dtype)
    return reals


def require_valid(holds: Tensor | bool, invariant: str) -> None:
    """Raise PerTdError with the `invariant` unless it holds; for `check_valid`."""
    if not holds:
        raise PerTdError(f"broken invariant: {invariant}")


def shaped(*sizes: object) -> str:
    """Format a shape with names for open sizes, such as [3, B]."""
    return f"[{', '.join(map(str, sizes))}]"


def require_same_shape(name: str, values: Tensor, index: Tensor) -> None:
    """Raise PriorityError unless there is one value per index."""
    if values.shape != index.shape:
        raise PriorityError(
            f"{name}: expected shape {list(index.shape)}, one per index, got {list(values.shape)}"
        )


def as_values(name: str, values: Any, index: Tensor) -> Tensor:
    """Convert `values`, one per index, to float32 in the shape and on the device of `index`.

    A trailing dimension of size 1, common in losses and critics, is dropped. Anything else raises
    PriorityError.
    """
    if _is_plain(values, torch.float32, index.device) and values.shape == index.shape:
        return values.detach() if values.requires_grad else values
    reals = as_reals(name, values, index.device, torch.float32)
    if reals.shape not in (index.shape, (*index.shape, 1)) and not (
        reals.ndim == 0 and index.numel() == 1
    ):
        raise PriorityError(
            f"{name}: expected shape {list(index.shape)}, one value per index,"
            f" got {list(reals.shape)}"
        )
    return reals.reshape(index.shape)


def require_finite(
    name: str, values: Tensor, *, low: float = -math.inf, wanted: Tensor | None = None
) -> Tensor:
    """Mark the `values` that are finite in float32 and at least `low`, bool in their shape.

    Where `can_raise`, a value that is not, though `wanted`, raises PriorityError.
    """
    valid = (values.abs() if low == -math.inf else values) < math.inf  # NaN is not
    valid = valid if low == -math.inf else valid & (values >= low)
    if can_raise(values):
        allowed = valid if wanted is None else valid | ~wanted
        if not allowed.all():
            wrong = ~allowed
            at = wrong.nonzero()[0].tolist()
            expected = "finite values" if low == -math.inf else f"finite values of at least {low:g}"
            place = at if len(at) > 1 and len(values) > 1 else at[-1]
            raise PriorityError(
                f"{name}: expected {expected} in float32, got {values[tuple(at)].item()} at"
                f" position {place} ({int(wrong.sum())} of {values.numel()} are wrong); nothing was"
                " written"
            )
    return valid


def require_slots(
    slot: Tensor, size: Tensor | int, wanted: Tensor | None = None, what: str = "the filled slots"
) -> Tensor:
    """Mark the slots, int64 [S, B], in [0, size), bool [S, B]; `size` is a number or int64 [S, 1].

    Where `can_raise`, one that does not, though `wanted`, raises IndexRangeError; `what` names the
    valid slots in it.
    """
    valid = (slot >= 0) & (slot < size)
    if can_raise(slot):
        allowed = valid if wanted is None else valid | ~wanted
        if not allowed.all():
            wrong = ~allowed
            at = wrong.nonzero()[0].tolist()
            many = slot.ndim > 1 and len(slot) > 1
            most = (
                size.view(-1).expand(len(slot))[at[0]].item() if isinstance(size, Tensor) else size
            )
            group = f" of buffer {at[0]}" if many else ""
            raise IndexRangeError(
                f"index: expected 0 <= index < {most}, {what}{group},"
                f" got {slot[tuple(at)].item()} at position {at if many else at[-1]};"
                " nothing was written"
            )
    return valid

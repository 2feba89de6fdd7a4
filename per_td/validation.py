"""The checks at the boundary: what comes in is right, or an error says what was expected.

On the CPU a wrong value raises before anything is written. On CUDA, looking at a value would stop
the host until the device has caught up; there, and in what torch.compile makes, a wrong value is
refused on the device: it is sent to a slot that nobody reads (`route`), the old one stays, and a
counter tells.
"""

import math
import operator
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
"""What torch, numpy and objects of all kinds raise when asked for what they are not."""

_MOST = 2**48
"""More transitions than any machine holds; their bytes can still be counted in 64 bits."""


def can_raise(tensor: Tensor) -> bool:
    """Whether a value of `tensor` can be looked at.

    Not on CUDA, where that would stop the host, and not while torch.compile traces: there is none.
    """
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def _probe(device: torch.device | str | int | None, dtype: torch.dtype) -> Tensor:
    """An empty tensor there."""
    return torch.empty(0, dtype=dtype, device=device)


def resolve_device(device: torch.device | str | int | None, *, sums: bool = True) -> torch.device:
    """The device as tensors report it: `cuda` becomes `cuda:0`; None is torch's default device.

    Args:
        device: to be looked for.
        sums: whether sums of masses are to live there, which are float64.

    Raises:
        ConfigurationError: there is no such device, it is "meta", which holds no values, or it has
            no float64.
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
    """`generator` if it is one for draws on `device`, or None, which stands for torch's own.

    Raises:
        ConfigurationError: it is something else, or on another kind of device.
    """
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
    """`tensor` on `device`, without a host sync where that is safe.

    From ordinary host memory an asynchronous copy has read its source when it returns. From pinned
    memory, or to the host, it has not, and whoever wrote or read there next would race with it.
    """
    if tensor.device == device:
        return tensor
    return tensor.to(device, non_blocking=device.type != "cpu" and not tensor.is_pinned())


def positive_int(name: str, value: object) -> int:
    """`value` as an int of at least 1, or a ConfigurationError that names the argument."""
    if type(value) is int and 0 < value <= _MOST:
        return value
    return integer(name, value, 1)


def integer(name: str, value: object, low: int) -> int:
    """`value` as Python's int of at least `low`, or a ConfigurationError that names the argument.

    Args:
        name: of the argument.
        value: an integer of any kind: Python's, numpy's, or a tensor that holds one.
        low: the smallest accepted, at least 0.
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
    """`value` as a finite float in [low, high], or a ConfigurationError that names the argument."""
    try:
        number = math.nan if isinstance(value, str | bytes) else float(value)
    except _REFUSALS:
        number = math.nan
    if not (math.isfinite(number) and low <= number <= high):
        raise ConfigurationError(
            f"{name}: expected a finite number in [{low:g}, {high:g}], got {value!r}"
        )
    return number


def one_of(name: str, value: str, choices: tuple[str, ...]) -> str:
    """The one of `choices` that `value` equals, else a ConfigurationError that lists them."""
    if not isinstance(value, str) or value not in choices:
        raise ConfigurationError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")
    return choices[choices.index(value)]


def fixed(
    name: str, read: Callable[[Any], Any] | None = None, instead: str = "the constructor takes it"
) -> Any:
    """A property that cannot be set: a ConfigurationError says what to do `instead`.

    Args:
        name: of the property.
        read: gets its value; None: it has none.
        instead: follows the colon.
    """

    def refuse(self: Any, value: object) -> None:
        raise ConfigurationError(
            f"{name}: expected no change once the {type(self).__name__} is made, got {value!r}:"
            f" {instead}"
        )

    return property(read, refuse)


def _is_plain(value: Any, dtype: torch.dtype, device: torch.device) -> TypeGuard[Tensor]:
    """Whether nothing has to be converted: the usual case, seen at little cost.

    Kernels read memory, in which a lazily negated tensor has the wrong signs.
    """
    return (
        type(value) is Tensor
        and value.dtype is dtype
        and value.device == device
        and value.layout is torch.strided
        and not value.is_nested
        and (torch.compiler.is_compiling() or (not value.is_neg() and has_memory(value)))
    )


def require_plain(name: str, tensor: Tensor, error: type[PerTdError]) -> None:
    """Refuse with an `error` what has no values, or not one after the other in memory."""
    if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_quantized:
        kind = "nested" if tensor.is_nested else str(tensor.layout)
        raise error(f"{name}: expected a dense tensor, got a {kind} one of {tensor.dtype}")
    if tensor.is_meta:
        raise error(f"{name}: expected values, got a tensor on the device meta, which has none")
    require_memory(name, tensor, error)


def require_memory(name: str, tensor: Tensor, error: type[PerTdError]) -> None:
    """Refuse with an `error` what has no memory of its own; see `has_memory`."""
    if not (torch.compiler.is_compiling() or has_memory(tensor)):
        raise error(
            f"{name}: expected a tensor with memory of its own, got a {type(tensor).__name__}"
            " without"
        )


def plain_rows(leaf: Tensor, device: torch.device) -> Tensor:
    """Bring `leaf` to `device`, with its numbers as they are, one after the other in memory.

    Raises:
        SchemaError: it has no values, or not in memory of its own.
    """
    usual = leaf.layout is torch.strided and leaf.is_contiguous() and leaf.device == device
    if usual and not (leaf.is_neg() or leaf.is_conj()):
        return leaf
    require_plain("transitions", leaf, SchemaError)
    leaf = to_device(leaf, device)
    if leaf.is_neg() or leaf.is_conj():
        leaf = leaf.resolve_neg().resolve_conj()
    return leaf if leaf.is_contiguous() else leaf.contiguous()


def as_tensor(name: str, value: Any, error: type[PerTdError]) -> Tensor:
    """`value` (tensor, array, sequence or number) as a dense tensor, detached.

    Raises:
        PerTdError: it is none of these, or has no values; an `error` that names the argument.
    """
    try:
        if isinstance(value, np.ndarray) and not (value.flags.carray and value.dtype.isnative):
            # torch does not share backward strides, swapped bytes or memory that is read-only
            value = np.array(value, dtype=value.dtype.newbyteorder("="), order="C")
        tensor: Tensor = torch.as_tensor(value).detach()
    except _REFUSALS as refusal:
        raise error(
            f"{name}: expected a tensor, an array or numbers, got {type(value).__name__}: {refusal}"
        ) from refusal
    require_plain(name, tensor, error)
    return tensor.resolve_neg()


def as_index(
    index: Any, device: torch.device, name: str = "index", *, lead: tuple[int, ...] = ()
) -> Tensor:
    """`index` (tensor, array, sequence or int) as int64 [*lead, B] on `device`; errors say `name`.

    Raises:
        IndexRangeError: it is not of an integer dtype, or of another shape.
    """
    if (
        _is_plain(index, torch.int64, device)
        and index.ndim == 1 + len(lead)
        and (not lead or index.shape[:1] == lead)
    ):
        return index
    index = as_tensor(name, index, IndexRangeError)
    if index.dtype.is_floating_point or index.dtype.is_complex or index.dtype == torch.bool:
        if index.numel():
            raise IndexRangeError(f"{name}: expected an integer dtype, got {index.dtype}")
        index = index.long()
    if lead:
        if index.ndim != 2 or index.shape[:1] != lead:
            raise IndexRangeError(f"{name}: expected shape [{lead[0]}, B], got {[*index.shape]}")
        return to_device(index, device).long()
    if index.ndim > 1:
        raise IndexRangeError(f"{name}: expected shape [B], got {list(index.shape)}")
    return to_device(index.reshape(-1), device).long()


def as_reals(name: str, values: Any, device: torch.device, dtype: torch.dtype) -> Tensor:
    """`values` (tensor, array, sequence or number), detached, in this dtype on `device`.

    Raises:
        PriorityError: they are no real numbers.
    """
    values = as_tensor(name, values, PriorityError)
    if values.dtype.is_complex or values.dtype == torch.bool:
        raise PriorityError(f"{name}: expected a real dtype, got {values.dtype}")
    reals: Tensor = to_device(values, device).to(dtype)
    return reals


def require_valid(holds: Tensor | bool, invariant: str) -> None:
    """Raise a PerTdError that names the `invariant` where it does not hold; for `check_valid`."""
    if not holds:
        raise PerTdError(f"broken invariant: {invariant}")


def require_same_shape(name: str, values: Tensor, index: Tensor) -> None:
    """Refuse with a PriorityError `values` that are not one per index."""
    if values.shape != index.shape:
        raise PriorityError(
            f"{name}: expected shape {list(index.shape)}, one per index, got {list(values.shape)}"
        )


def as_values(name: str, values: Any, index: Tensor) -> Tensor:
    """`values`, one for each of `index`, detached, as float32 in its shape, on its device.

    A trailing dimension of size 1, as losses and critics produce it, is dropped.

    Raises:
        PriorityError: the shape or the dtype is not that of one real number per index.
    """
    if _is_plain(values, torch.float32, index.device) and values.shape == index.shape:
        return values.detach()
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
    """Find which of `values` are finite in float32 and at least `low`, bool in their shape.

    Where `wanted` is False, anything may stand.

    Raises:
        PriorityError: one is not, and it can be looked at without a host sync.
    """
    valid = values.isfinite() if low == -math.inf else values.isfinite() & (values >= low)
    if can_raise(values):
        wrong = ~valid if wanted is None else wanted & ~valid
        if wrong.any():
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
    """Find which of the slots [S, B] lie in [0, size), bool [S, B].

    Args:
        slot: int64 [S, B].
        size: number of slots that may be named, int64 [S, 1], or one number for all.
        wanted: bool [S, B]; where it is False, anything may stand.
        what: the slots that may be named, for the error.

    Raises:
        IndexRangeError: one does not, and it can be looked at without a host sync.
    """
    valid = (slot >= 0) & (slot < size)
    if can_raise(slot):
        wrong = ~valid if wanted is None else wanted & ~valid
        if wrong.any():
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

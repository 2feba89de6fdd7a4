"""A CUDA device for machines without one: shapes, dtypes and devices are right, values are not.

torch's FakeTensorMode makes tensors without values whose device is `cuda:0`. It raises where two
devices meet in an operation, and where a value or a shape depends on data that only the device
knows: there the host would wait for it. Some calls, indexing by Python for one, first ask for
parts of torch that only its CUDA builds have. Here these calls go straight to the operator.

FakeTensorMode lets copies between host and device pass, also those that wait. Here they raise.
Not seen: how an operator waits inside (`torch.multinomial`, `torch.isin`), generators of CUDA,
Triton, pinned memory, streams and graphs.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["WAITS", "HostWaitError", "MixedDevicesError", "Pretended", "pretended_cuda"]

DEVICE = torch.device("cuda:0")

_aten = torch.ops.aten


class HostWaitError(RuntimeError):
    """The host would wait for the device, or for a copy from or to it."""


class MixedDevicesError(RuntimeError):
    """The host's memory meets the device's in one operation."""


WAITS = (HostWaitError, DataDependentOutputException, DynamicOutputShapeException)
"""What is raised where the host would wait."""


class Pretended:
    """What `pretended_cuda` gives.

    Attributes:
        device: `cuda:0`.
    """

    device = DEVICE

    def __init__(self) -> None:
        self._may_copy = False

    @property
    def may_copy(self) -> bool:
        """Whether a copy between host and device may wait now."""
        return self._may_copy

    @contextmanager
    def copies(self) -> Iterator[None]:
        """Let copies between host and device wait, as they may where buffers are made."""
        before, self._may_copy = self._may_copy, True
        try:
            yield
        finally:
            self._may_copy = before


def _devices(values: Iterable[Any]) -> set[str]:
    """Kinds of devices of the tensors among an operator's arguments, and in lists of these."""
    found = set()
    for value in values:
        if isinstance(value, Tensor):
            found.add(value.device.type)
        elif isinstance(value, list | tuple):
            found |= _devices(value)
    return found


def _copied(name: str, source: Tensor, device: torch.device | None, non_blocking: bool) -> str:
    """Why a copy would wait; "" where it would not."""
    to = source.device if device is None else torch.device(device)
    if source.device.type == to.type or (to.type == "cuda" and non_blocking):
        return ""
    return f"{name} from {source.device} to {to}, non_blocking={non_blocking}"


class _Watch(TorchDispatchMode):
    """Raises where torch would wait or would mix devices, and FakeTensorMode does not say so."""

    def __init__(self, pretended: Pretended) -> None:
        super().__init__()
        self._pretended = pretended

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        devices = _devices((*args, *kwargs.values()))
        if "cuda" in devices or "device" in kwargs:
            self._look(func, args, kwargs)
        try:
            return func(*args, **kwargs)
        except RuntimeError as error:  # whose type depends on torch's version and on the operator
            if len(devices) < 2 or isinstance(error, WAITS):
                raise
            raise MixedDevicesError(f"{func} takes {sorted(devices)}: {error}") from error

    def _look(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        packet = func.overloadpacket
        if packet is _aten._local_scalar_dense:
            raise HostWaitError("a value is read back from the device")
        if packet in (_aten.index, _aten.index_put, _aten.index_put_):
            self._look_at_index(*args[:3])
        if self._pretended.may_copy:
            return
        why = ""
        if packet is _aten._to_copy:
            why = _copied("to", args[0], kwargs.get("device"), kwargs.get("non_blocking", False))
        elif packet is _aten.copy_:
            late = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
            why = _copied("copy_", args[1], args[0].device, late)
        if why:
            raise HostWaitError(why)

    def _look_at_index(self, tensor: Tensor, indices: list[Tensor | None], *value: Any) -> None:
        mixed = len(_devices((tensor, *indices))) > 1
        if mixed and not self._pretended.may_copy:  # torch brings the indices there, and waits
            raise MixedDevicesError(
                f"a tensor on {tensor.device} is indexed by"
                f" {[i.device for i in indices if i is not None]}"
            )
        by_mask = any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices)
        if by_mask and not (value and isinstance(value[0], Tensor) and value[0].numel() == 1):
            raise HostWaitError("a boolean mask is an index: its length is read back")


def _view(tensor: Tensor, key: Any) -> tuple[Tensor, list[Tensor | None]]:
    """What ints, slices, None and ... of `key` select, and the tensors that are left in it."""
    key = key if isinstance(key, tuple) else (key,)
    used = sum(k is not None and k is not Ellipsis for k in key)
    dim, indices = 0, []
    for k in key:
        if k is Ellipsis:
            skipped = tensor.ndim - dim - used
            dim += skipped
            indices += [None] * skipped
            continue
        used -= k is not None
        if isinstance(k, Tensor) and not (k.ndim == 0 and not k.dtype.is_floating_point):
            indices.append(k)
            dim += 1
        elif isinstance(k, list):
            indices.append(torch.tensor(k, device=tensor.device))
            dim += 1
        elif k is None:
            tensor = _aten.unsqueeze(tensor, dim)
            indices.append(None)
            dim += 1
        elif isinstance(k, slice):
            tensor = _aten.slice(tensor, dim, *map(_number, (k.start, k.stop, k.step or 1)))
            indices.append(None)
            dim += 1
        else:
            tensor = _aten.select(tensor, dim, _number(k))
    return tensor, indices


def _number(value: Any) -> int | None:
    if isinstance(value, Tensor):  # torch reads it, and so waits for its device
        return int(_aten._local_scalar_dense(value))
    return None if value is None else value.__index__()


def _getitem(tensor: Tensor, key: Any) -> Tensor:
    view, indices = _view(tensor, key)
    if all(i is None for i in indices):
        return _aten.alias(view)
    return _aten.index(view, indices)


def _setitem(tensor: Tensor, key: Any, value: Any) -> None:
    view, indices = _view(tensor, key)
    if not isinstance(value, Tensor):
        value = torch.full((), value, dtype=tensor.dtype, device=tensor.device)
    if all(i is None for i in indices):
        _aten.copy_(view, value)
    else:
        _aten.index_put_(view, indices, value)


def _to(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **kwargs)
    same = device is None or _indexed(device) == tensor.device
    if same and dtype in (None, tensor.dtype) and not kwargs.get("copy", False):
        return tensor
    return _aten._to_copy(
        tensor,
        device=None if device is None else _indexed(device),
        dtype=dtype,
        non_blocking=non_blocking,
        memory_format=memory_format,
    )


def _indexed(device: torch.device) -> torch.device:
    return DEVICE if device.type == "cuda" else device


def _as_tensor(value: Any, dtype: torch.dtype | None = None, device: Any = None) -> Tensor:
    tensor = value if isinstance(value, Tensor) else torch.as_tensor(value)
    return _to(tensor, device=device and torch.device(device), dtype=dtype)


_BY_HAND: dict[str, Callable[..., Any]] = {
    "__getitem__": _getitem,
    "__setitem__": _setitem,
    "__bool__": lambda t: bool(_aten._local_scalar_dense(t)),
    "__float__": lambda t: float(_aten._local_scalar_dense(t)),
    "__format__": lambda t, spec: format(_aten._local_scalar_dense(t), spec),
    "__index__": lambda t: int(_aten._local_scalar_dense(t)),
    "__int__": lambda t: int(_aten._local_scalar_dense(t)),
    "__invert__": lambda t: _aten.bitwise_not(t),
    "as_tensor": _as_tensor,
    "cpu": lambda t: _to(t, "cpu"),
    "cuda": lambda t: _to(t, DEVICE),
    "to": _to,
}
"""Functions of torch that have no operator of their own name, by that name."""


class _Linked(TorchFunctionMode):
    """Has the operators do what torch's functions refuse on a build without CUDA."""

    def __init__(self) -> None:
        super().__init__()
        self._refused: dict[Any, Callable[..., Any]] = {}  # functions, and what stands in

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.as_subclass:  # a tensor without values is one of a subclass already
            return args[0]
        if func is Tensor.data_ptr:  # asked for only to see that there is memory
            return 64
        if func is Tensor.__format__ and _devices(args[:1]) == {"cuda"}:
            raise HostWaitError("a value is read back from the device, to be formatted")
        if func not in self._refused or _devices(args[:1]) != {"cuda"}:
            try:
                return func(*args, **kwargs)
            except RuntimeError as error:
                if "not linked with support for cuda" not in str(error):
                    raise
                self._refused[func] = self._stand_in(func.__name__, error)
        with self:
            return self._refused[func](*args, **kwargs)

    def _stand_in(self, name: str, refusal: RuntimeError) -> Callable[..., Any]:
        operator = _BY_HAND.get(name) or getattr(_aten, name, None)
        if operator is None:
            raise NotImplementedError(f"no operator stands in for {name}") from refusal
        return operator


@contextmanager
def pretended_cuda() -> Iterator[Pretended]:
    """Let torch pretend, within the block, that there is a CUDA device.

    Tensors made in the block hold no values and must not leave it.

    Raises, within the block:
        WAITS: the host would wait for the device.
        MixedDevicesError: an operation mixes the host's memory with the device's.
    """
    pretended = Pretended()
    with (
        mock.patch.object(torch.cuda, "_lazy_init"),
        mock.patch.object(torch.cuda, "current_device", return_value=0),
        FakeTensorMode(allow_non_fake_inputs=True),
        _Watch(pretended),
        _Linked(),
    ):
        yield pretended

"""TensorDicts as dictionaries of tensors, which a file read with `weights_only=True` may hold."""

from typing import Any

from tensordict import LazyStackedTensorDict, TensorDict, lazy_stack
from torch import Tensor

__all__ = ["as_plain", "from_plain"]

_ENTRIES, _STACKED = "__entries__", "__stacked__"


def as_plain(value: Any) -> Any:
    """Replace every TensorDict in nested dictionaries, lists and tuples; tensors are not copied.

    Values of other kinds stay as they are.
    """
    if isinstance(value, Tensor):
        return value.as_subclass(Tensor)
    if type(value) is TensorDict:
        entries = {name: as_plain(value.get(name)) for name in value.keys()}  # noqa: SIM118  of a TensorDict
        return {_ENTRIES: entries, "batch_size": list(value.batch_size), "device": value.device}
    if type(value) is LazyStackedTensorDict:
        return {_STACKED: list(map(as_plain, value.tensordicts)), "dim": value.stack_dim}
    if type(value) is dict:
        return {key: as_plain(entry) for key, entry in value.items()}
    return type(value)(map(as_plain, value)) if type(value) in (list, tuple) else value


def from_plain(value: Any) -> Any:
    """Undo `as_plain`; a value without anything to be undone is returned as it is."""
    if type(value) is dict and _ENTRIES in value:
        entries = {name: from_plain(entry) for name, entry in value[_ENTRIES].items()}
        return TensorDict(entries, value["batch_size"], device=value["device"])
    if type(value) is dict and _STACKED in value:
        return lazy_stack(list(map(from_plain, value[_STACKED])), value["dim"])
    if type(value) is dict:
        return {key: from_plain(entry) for key, entry in value.items()}
    return type(value)(map(from_plain, value)) if type(value) in (list, tuple) else value

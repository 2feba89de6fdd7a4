"""Transitions as plain tensors by key, which costs less time than a TensorDict."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from tensordict import (
    LazyStackedTensorDict,
    TensorDict,
    TensorDictBase,
    is_non_tensor,
    is_tensor_collection,
    is_tensorclass,
)
from torch import Tensor

from per_td import validation
from per_td.errors import SchemaError

Key = tuple[str, ...]
Leaves = dict[Key, Tensor]


def named(key: Key) -> str:
    """Format a key as users write it; anything else by its repr."""
    return repr(key[0]) if isinstance(key, tuple) and len(key) == 1 else repr(key)


def require_tensors(leaves: Any) -> None:
    """Raise SchemaError if `leaves` is not a dict of at least one tensor."""
    if not isinstance(leaves, dict):
        raise SchemaError(f"expected a dict of tensors by key, got {type(leaves).__name__}")
    if not leaves:
        raise SchemaError("expected at least one tensor, got an empty TensorDict")
    for key, leaf in leaves.items():
        if not isinstance(leaf, Tensor):
            raise SchemaError(f"{named(key)}: expected a tensor, got {type(leaf).__name__}")


def require_keys(leaves: Leaves) -> None:
    """Raise SchemaError if a key is not a tuple of names, or a tensor and a nest share a key."""
    for key in leaves:
        if not (isinstance(key, tuple) and key and all(isinstance(name, str) for name in key)):
            raise SchemaError(f"keys: expected tuples of names, such as ('x',), got {key!r}")
        for end in range(1, len(key)):
            if key[:end] in leaves:
                raise SchemaError(
                    f"{named(key)}: expected no tensor at {named(key[:end])} too, which is a nest,"
                    " got one"
                )


def count(leaves: Leaves) -> int:
    """Number of transitions in leaves [n, ...]."""
    return next(iter(leaves.values())).shape[0]


def nested(leaves: Iterable[tuple[Key, Tensor]]) -> dict[str, Any]:
    """Nest leaves: [(("next", "reward"), x)] becomes {"next": {"reward": x}}."""
    out: dict[str, Any] = {}
    for key, leaf in leaves:
        at = out
        if len(key) > 1:
            for parent in key[:-1]:
                at = at.setdefault(parent, {})
        at[key[-1]] = leaf
    return out


def flattened(tree: Mapping[str, Any], prefix: Key = ()) -> Leaves:
    """Invert `nested`."""
    out: Leaves = {}
    for name, value in tree.items():
        key = (*prefix, name)
        out |= flattened(value, key) if isinstance(value, Mapping) else {key: value}
    return out


def tensordict_of(
    tree: dict[str, Any], batch_size: torch.Size, device: torch.device | None
) -> TensorDict:
    """Make a TensorDict of checked tensors [*batch_size, ...] on `device`, nested in any way.

    The constructor takes three times as long. It is the fallback, since the other is private.
    """
    fast = getattr(TensorDict, "_new_unsafe", None)
    if fast is None:
        return TensorDict(tree, batch_size=batch_size, device=device)
    batch: TensorDict = fast(source=tree, batch_size=batch_size, device=device)
    return batch


def entries_of(batch: Any, *keys: str) -> list[Any]:
    """Get the entries of a TensorDict, tensorclass or dict under `keys`, or raise SchemaError."""
    if is_tensorclass(batch):
        batch = batch._tensordict
    if not isinstance(batch, Mapping):
        raise SchemaError(f"expected a TensorDict, got {type(batch).__name__}")
    values = [batch.get(key, None) for key in keys]
    for key, value in zip(keys, values, strict=True):
        if value is None:
            raise SchemaError(f"expected the key {key!r} in the batch, got {[*batch.keys()]}")
    return values


def leaves_of(transitions: Any) -> Leaves:
    """Collect all tensors of a TensorDict, tensorclass or dict, by key, or raise SchemaError.

    In a plain dict, arrays and numbers become tensors.
    """
    leaves: Leaves = {}
    _collect(transitions, (), leaves)
    return leaves


def _collect(source: Any, prefix: Key, leaves: Leaves) -> None:
    """Add the tensors of `source`, whose key is `prefix`, to `leaves`."""
    usual = type(source) is TensorDict
    for name, value in source.items() if usual else _items(source, prefix):
        if isinstance(value, Tensor):
            if value.is_nested:  # it has no plain shape
                raise SchemaError(f"{named((*prefix, name))}: expected a dense tensor, got nested")
            leaves[*prefix, name] = value
        else:
            _collect(value, (*prefix, name), leaves)


def _items(source: Any, prefix: Key) -> Iterable[tuple[str, Any]]:
    """Entries of a source that is not a plain TensorDict."""
    if not is_non_tensor(source):
        if is_tensorclass(source):
            source = source._tensordict  # its own items() leave out what lazy stacks cannot stack
        if isinstance(source, LazyStackedTensorDict):
            return _stacked(source, prefix)
        if isinstance(source, TensorDictBase):
            return source.items()  # type: ignore[no-any-return]
        if isinstance(source, Mapping):
            return [_entry(name, value, prefix) for name, value in source.items()]
    kind = type(source).__name__
    if prefix:
        raise SchemaError(f"{named(prefix)}: expected a tensor, got {kind}")
    raise SchemaError(f"expected a TensorDict or a dict of tensors, got {kind}")


def _stacked(source: LazyStackedTensorDict, prefix: Key) -> Iterable[tuple[str, Any]]:
    """Entries of a lazy stack, of which its own items() leaves some out, or SchemaError."""
    parts = [set(part.keys()) for part in source.tensordicts]
    for name in sorted(set.union(set(), *parts)):
        key = named((*prefix, name))
        if not all(name in part for part in parts):
            raise SchemaError(f"{key}: expected it in all stacked TensorDicts, got some without")
        try:
            value = source.get(name)
        except (AttributeError, RuntimeError, TypeError, ValueError) as error:
            raise SchemaError(f"{key}: expected tensors of one shape and dtype: {error}") from error
        yield name, value


def _entry(name: Any, value: Any, prefix: Key) -> tuple[str, Any]:
    """Check an entry of a plain dict; numbers and arrays become tensors."""
    if not isinstance(name, str):
        raise SchemaError(f"expected names (str) as keys of a dict, got {name!r}: nest dicts")
    if isinstance(value, Tensor | Mapping) or is_tensor_collection(value):
        return name, value
    return name, validation.as_tensor(named((*prefix, name)), value, SchemaError)

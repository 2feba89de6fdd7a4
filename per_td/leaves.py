"""Transitions as plain tensors by key, where a TensorDict would only cost time."""

from collections.abc import Iterable, Mapping
from typing import Any

from tensordict import TensorDictBase, is_leaf_nontensor
from torch import Tensor

from per_td.errors import SchemaError

__all__ = ["Key", "Leaves", "count", "flattened", "leaves_of", "named", "nested"]

Key = tuple[str, ...]
Leaves = dict[Key, Tensor]


def named(key: Key) -> str:
    """A key as users write it."""
    return repr(key[0]) if len(key) == 1 else repr(key)


def count(leaves: Leaves) -> int:
    """Number of transitions in leaves [n, ...]."""
    return next(iter(leaves.values())).shape[0]


def nested(leaves: Iterable[tuple[Key, Tensor]]) -> dict[str, Any]:
    """[(("next", "reward"), x)] as {"next": {"reward": x}}."""
    out: dict[str, Any] = {}
    for key, leaf in leaves:
        at = out
        if len(key) > 1:
            for parent in key[:-1]:
                at = at.setdefault(parent, {})
        at[key[-1]] = leaf
    return out


def flattened(tree: Mapping[str, Any], prefix: Key = ()) -> Leaves:
    """The inverse of `nested`."""
    out: Leaves = {}
    for name, value in tree.items():
        key = (*prefix, name)
        out |= flattened(value, key) if isinstance(value, Mapping) else {key: value}
    return out


def leaves_of(transitions: TensorDictBase) -> Leaves:
    """The tensors of a TensorDict by key.

    Raises:
        SchemaError: something in it is not a tensor.
    """
    leaves: Leaves = {}
    if _collect(transitions, (), leaves):
        return leaves
    for name, leaf in transitions.items(True, True, is_leaf=is_leaf_nontensor):
        key = (name,) if isinstance(name, str) else name
        if not isinstance(leaf, Tensor):
            raise SchemaError(f"{named(key)}: expected a tensor, got {type(leaf).__name__}")
        leaves[key] = leaf
    return leaves


def _collect(transitions: TensorDictBase, prefix: Key, leaves: Leaves) -> bool:
    """Add its tensors to `leaves`; False where it holds more than those and TensorDicts."""
    for name, value in transitions.items():
        if isinstance(value, Tensor):
            if value.is_nested:  # it has no shape that could be looked at
                raise SchemaError(f"{named((*prefix, name))}: expected a dense tensor, got nested")
            leaves[*prefix, name] = value
        elif not (isinstance(value, TensorDictBase) and _collect(value, (*prefix, name), leaves)):
            return False
    return True

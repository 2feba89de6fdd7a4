"""Transitions as plain tensors by key, where a TensorDict would only cost time."""

from collections.abc import Iterable, Mapping
from typing import Any

from tensordict import TensorDictBase, is_leaf_nontensor
from torch import Tensor

from per_td.errors import SchemaError

__all__ = [
    "Key",
    "Leaves",
    "count",
    "flattened",
    "leaves_of",
    "named",
    "nested",
    "require_keys",
    "require_tensors",
]

Key = tuple[str, ...]
Leaves = dict[Key, Tensor]


def named(key: Key) -> str:
    """A key as users write it, or what they have given for one."""
    return repr(key[0]) if isinstance(key, tuple) and len(key) == 1 else repr(key)


def require_tensors(leaves: Any) -> None:
    """Refuse with a SchemaError what is not a dict of tensors, at least one."""
    if not isinstance(leaves, dict):
        raise SchemaError(f"expected a dict of tensors by key, got {type(leaves).__name__}")
    if not leaves:
        raise SchemaError("expected at least one tensor, got an empty TensorDict")
    for key, leaf in leaves.items():
        if not isinstance(leaf, Tensor):
            raise SchemaError(f"{named(key)}: expected a tensor, got {type(leaf).__name__}")


def require_keys(leaves: Leaves) -> None:
    """Refuse with a SchemaError keys that are not tuples of names, or not all of one nest."""
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

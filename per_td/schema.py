"""Schema: which tensors a transition consists of, and whether what comes in is like that."""

import torch
from tensordict import TensorDictBase

from per_td import validation
from per_td.errors import SchemaError
from per_td.layouts import Field
from per_td.leaves import (
    Key,
    Leaves,
    count,
    leaves_of,
    named,
    require_keys,
    require_tensors,
)

__all__ = ["RESERVED", "Schema"]

RESERVED = ("index", "priority_weight", "generation")
"""Keys that sampling adds; transitions may not bring their own."""


class Schema:
    """The fields of a transition. They are unknown at first, and fixed by the first data."""

    def __init__(self) -> None:
        self.fields: dict[Key, Field] = {}
        self._usual: tuple[tuple[int, ...], list[torch.Size]] = (), []

    def fix(self, leaves: Leaves) -> list[Field]:
        """Accept only what is like `leaves` [n, ...] from now on."""
        fields = [Field(key, leaf.shape[1:], leaf.dtype) for key, leaf in leaves.items()]
        self.fields = {field.key: field for field in fields}
        self._usual = (), [field.shape for field in fields]
        return fields

    def check(self, transitions: TensorDictBase, *, batched: bool = True) -> Leaves:
        """The leaves of `transitions`, if they fit.

        Args:
            transitions: TensorDict of batch size [n, ...], or of one transition.
            batched: whether the first dimension counts transitions.

        Returns:
            Leaves of shape [n, ...] by key; of one transition, it may be [...].

        Raises:
            SchemaError: keys, shapes or dtypes are not those of the fields, a key is reserved, a
                leaf is not a tensor, or the batch size has no first dimension.
        """
        if not isinstance(transitions, TensorDictBase):
            raise SchemaError(f"expected a TensorDict, got {type(transitions).__name__}")
        if batched and not transitions.batch_dims:
            raise SchemaError(
                "expected a TensorDict of batch size [n], got batch size []: use add()"
                " for one transition"
            )
        leaves = leaves_of(transitions)
        if self._fits(leaves, transitions.batch_size[:1] if batched else ()):
            return leaves
        if not batched:
            leaves = {key: leaf.unsqueeze(0) for key, leaf in leaves.items()}
        self.check_leaves(leaves)
        return leaves

    def check_leaves(self, leaves: Leaves) -> None:
        """`check` for leaves [n, ...] that are no TensorDict."""
        require_tensors(leaves)
        for key, leaf in leaves.items():
            validation.require_plain(named(key), leaf, SchemaError)
            if not leaf.ndim:
                raise SchemaError(f"{named(key)}: expected shape [n, ...], got []")
        n = count(leaves)
        if self._fits(leaves, (n,)):
            return
        require_keys(leaves)
        for name in RESERVED:
            if (name,) in leaves:
                raise SchemaError(f"{name!r} is a reserved key: sampling adds it; expected others")
        if self.fields:
            self._compare(leaves)
        for key, leaf in leaves.items():
            if len(leaf) != n:
                raise SchemaError(f"{named(key)}: expected {n} transitions, got {len(leaf)}")

    def _fits(self, leaves: Leaves, rows: tuple[int, ...]) -> bool:
        """Whether these are leaves [*rows, ...] as expected; the usual answer, at little cost."""
        if len(leaves) != len(self.fields) or not leaves:
            return False
        usual, shapes = self._usual
        if rows != usual:
            shapes = [torch.Size((*rows, *field.shape)) for field in self.fields.values()]
            self._usual = rows, shapes
        for (key, field), shape in zip(self.fields.items(), shapes, strict=True):
            leaf = leaves.get(key)
            if leaf is None or leaf.shape != shape or leaf.dtype is not field.dtype:
                return False
        return True

    def _compare(self, leaves: Leaves) -> None:
        if leaves.keys() != self.fields.keys():
            missing = [named(key) for key in self.fields if key not in leaves]
            unknown = [named(key) for key in leaves if key not in self.fields]
            raise SchemaError(
                f"expected the keys {', '.join(map(named, self.fields))};"
                f" missing: {', '.join(missing) or 'none'}; unknown: {', '.join(unknown) or 'none'}"
            )
        for key, field in self.fields.items():
            leaf = leaves[key]
            if leaf.shape[1:] != field.shape or leaf.dtype != field.dtype:
                raise SchemaError(
                    f"{named(key)}: expected {field.dtype} of shape {list(field.shape)}"
                    f" per transition, got {leaf.dtype} of shape {list(leaf.shape[1:])}"
                )

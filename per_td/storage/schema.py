"""Schema: which tensors a transition consists of, and whether what comes in is like that."""

from typing import Any

import torch

from per_td import validation
from per_td.errors import SchemaError
from per_td.storage.layouts import Field
from per_td.storage.leaves import (
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

    def fix(self, fields: list[Field]) -> None:
        """Accept only transitions of these fields from now on."""
        self.fields = {field.key: field for field in fields}
        self._usual = (), [field.shape for field in fields]

    def check(self, transitions: Any, *, batched: bool = True) -> Leaves:
        """The leaves of `transitions`, if they fit.

        Args:
            transitions: TensorDict or tensorclass of batch size [n], or of one transition [];
                or a dict of tensors like that.
            batched: whether the first dimension counts transitions.

        Returns:
            Leaves of shape [n, ...] by key; of one transition, it may be [...].

        Raises:
            SchemaError: keys, shapes or dtypes are not those of the fields, a key is reserved, a
                leaf is not a tensor, or the batch size is another one.
        """
        leaves = leaves_of(transitions)
        size = getattr(transitions, "batch_size", None)  # a plain dict has none
        if size is not None:
            if len(size) != batched:
                raise self.wrong_batch_size(leaves, size, batched=batched)
            if self._fits(leaves, size):
                return leaves
        if not batched:
            leaves = {key: leaf.unsqueeze(0) for key, leaf in leaves.items()}
        self.check_leaves(leaves)
        return leaves

    def wrong_batch_size(
        self, leaves: Leaves, size: torch.Size, lead: tuple[int, ...] = (), *, batched: bool
    ) -> SchemaError:
        """The error for a TensorDict of the batch size `size`, with what to do about it.

        Args:
            leaves: what is in it.
            size: other than [*lead, n], or [*lead] of one transition.
            lead: [S] with many buffers.
            batched: whether [*lead, n] was expected.
        """
        dims, hint = len(lead) + batched, ""
        if len(size) == dims + 1 and not batched:
            hint = ": use extend() for several transitions"
        elif len(size) > dims:
            hint = (
                f": .flatten({len(lead)}, {len(size) - 1}) makes them {size[len(lead) :].numel()}"
            )
            hint += f" transitions, batch_size={[*size[:dims]]} keeps the rest in each transition"
        elif len(size) < dims and not (batched and size == lead and self._fits(leaves, size)):
            common = _common(leaves)[:dims]
            if len(common) == dims and common[: len(lead)] == lead:
                hint = f": give batch_size={[*common]}"
        if not hint and batched and size == lead:
            hint = ": use add() for one transition"
        wanted = ", ".join([*map(str, lead), *["n"] * batched])
        return SchemaError(f"expected a TensorDict of batch size [{wanted}], got {[*size]}{hint}")

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


def _common(leaves: Leaves) -> tuple[int, ...]:
    """The first dimensions, as far as those of all leaves are equal."""
    common = []
    for sizes in zip(*(leaf.shape for leaf in leaves.values()), strict=False):
        if len(set(sizes)) > 1:
            break
        common.append(sizes[0])
    return tuple(common)

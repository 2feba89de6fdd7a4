"""Schema: which tensors a transition consists of, and whether what comes in is like that."""

from typing import Any

import torch

from per_td import validation
from per_td.errors import SchemaError
from per_td.storage.layouts import Field
from per_td.storage.leaves import Key, Leaves, leaves_of, named, require_keys, require_tensors

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

    def check(
        self, transitions: Any, lead: tuple[int, ...] = (), *, batched: bool = True
    ) -> tuple[Leaves, int]:
        """Check transitions; nothing is written.

        Args:
            transitions: TensorDict or tensorclass of batch size [*lead, n], or of one transition
                [*lead]; or a dict of tensors like that.
            lead: [S] with many buffers.
            batched: [*lead, n] is expected.

        Returns:
            Leaves with one dimension for all transitions, by key, and n; of one transition without
            a lead, that dimension may be missing.

        Raises:
            SchemaError: keys, shapes or dtypes are not those of the fields, a key is reserved, a
                leaf is not a tensor, or the batch size is another one.
        """
        leaves = leaves_of(transitions)
        size = getattr(transitions, "batch_size", None)  # a plain dict has none
        if size is not None:
            if len(size) != len(lead) + batched or size[: len(lead)] != lead:
                raise self.wrong_batch_size(leaves, size, lead, batched=batched)
            n = size[-1] if batched else 1
            if not lead and self._fits(leaves, size):
                return leaves, n
        if not batched:
            leaves = {key: _one(key, leaf, lead) for key, leaf in leaves.items()}
        return self.check_leaves(leaves, lead, None if size is None else n)

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

    def check_leaves(
        self, leaves: Leaves, lead: tuple[int, ...] = (), n: int | None = None
    ) -> tuple[Leaves, int]:
        """`check` for leaves [*lead, n, ...] that are no TensorDict; None takes n of the first."""
        require_tensors(leaves)
        for key, leaf in leaves.items():
            validation.require_plain(named(key), leaf, SchemaError)
            if leaf.ndim <= len(lead):
                expected = ", ".join([*map(str, lead), "n", "..."])
                raise SchemaError(f"{named(key)}: expected shape [{expected}], got {[*leaf.shape]}")
        if n is None:
            n = next(iter(leaves.values())).shape[len(lead)]
        if lead:
            leaves = {key: _flat(key, leaf, (*lead, n)) for key, leaf in leaves.items()}
        rows = n * lead[0] if lead else n
        if self._fits(leaves, (rows,)):
            return leaves, n
        require_keys(leaves)
        for name in RESERVED:
            if (name,) in leaves:
                raise SchemaError(f"{name!r} is a reserved key: sampling adds it; expected others")
        if self.fields:
            self._compare(leaves)
        for key, leaf in leaves.items():
            if len(leaf) != rows:
                raise SchemaError(f"{named(key)}: expected {rows} transitions, got {len(leaf)}")
        return leaves, n

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


def _one(key: Key, leaf: Any, lead: tuple[int, ...]) -> Any:
    """A leaf [*lead, ...] of one transition as [*lead, 1, ...]."""
    if leaf.shape[: len(lead)] != lead:
        expected = ", ".join([*map(str, lead), "..."])
        raise SchemaError(f"{named(key)}: expected shape [{expected}], got {[*leaf.shape]}")
    return leaf.unsqueeze(len(lead))


def _flat(key: Key, leaf: Any, size: tuple[int, ...]) -> Any:
    """A leaf [S, n, ...] as [S * n, ...]."""
    if leaf.shape[: len(size)] != size:
        expected = ", ".join([*map(str, size), "..."])
        raise SchemaError(f"{named(key)}: expected shape [{expected}], got {[*leaf.shape]}")
    return leaf.flatten(0, 1)

"""Schema: the tensors that a transition consists of, and checks of new data."""

from typing import Any

import torch

from per_td import validation
from per_td.errors import SchemaError
from per_td.storage.layouts import Field
from per_td.storage.leaves import Key, Leaves, leaves_of, named, require_keys, require_tensors
from per_td.storage.structure import Structure

RESERVED = ("index", "priority_weight", "generation")
"""Keys that sampling adds, which transitions may not have."""


class Schema:
    """The fields of a transition: unknown at first, then fixed by the first data.

    Args:
        reserved: keys that transitions may not have, beside `RESERVED`.
    """

    def __init__(self, reserved: tuple[str, ...] = ()) -> None:
        self._reserved = (*RESERVED, *reserved)
        self.fields: dict[Key, Field] = {}
        self.structure = Structure()
        self._usual: tuple[tuple[int, ...], list[torch.Size]] = (), []

    def fix(self, fields: list[Field]) -> None:
        """Accept only transitions of these fields from now on."""
        self.fields = {field.key: field for field in fields}
        self._usual = (), [field.shape for field in fields]

    def check(
        self, transitions: Any, lead: tuple[int, ...] = (), *, batched: bool = True
    ) -> tuple[Leaves, int]:
        """Check transitions: a TensorDict, tensorclass or dict of tensors.

        Its batch size is [*lead, n], or [*lead] of one transition, if not `batched`; `lead` is [S]
        with many buffers. Returns leaves by key with one dimension for all transitions, and n. That
        dimension may be missing for one transition without a lead.

        Raises:
            SchemaError: keys, shapes or dtypes are not those of the fields, a key is reserved, a
                leaf is not a tensor, or the batch size is wrong.
        """
        leaves = leaves_of(transitions)
        if not self.fields:
            self.structure = Structure.of(transitions, len(lead) + batched)
        size = getattr(transitions, "batch_size", None)  # a plain dict has none
        if size is not None:
            if len(size) != len(lead) + batched or size[: len(lead)] != lead:
                raise self.wrong_batch_size(leaves, size, lead, batched=batched)
            n = size[-1] if batched else 1
            if not lead and self._fits(leaves, size):
                return leaves, n
        if not batched:
            at = len(lead)
            leaves = {key: _led(key, x, lead).unsqueeze(at) for key, x in leaves.items()}
        return self.check_leaves(leaves, lead, None if size is None else n)

    def wrong_batch_size(
        self, leaves: Leaves, size: torch.Size, lead: tuple[int, ...] = (), *, batched: bool
    ) -> SchemaError:
        """Make the error for a TensorDict of `leaves` with a wrong batch `size`, with advice.

        `lead` and `batched` say the size expected; see `check`.
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
        wanted = validation.shaped(*lead, *["n"] * batched)
        return SchemaError(f"expected a TensorDict of batch size {wanted}, got {[*size]}{hint}")

    def check_leaves(
        self, leaves: Leaves, lead: tuple[int, ...] = (), n: int | None = None
    ) -> tuple[Leaves, int]:
        """Run `check` for leaves [*lead, n, ...]; n is that of the first leaf if it is None."""
        require_tensors(leaves)
        for key, leaf in leaves.items():
            validation.require_plain(named(key), leaf, SchemaError)
            if leaf.ndim <= len(lead):
                expected = validation.shaped(*lead, "n", "...")
                raise SchemaError(f"{named(key)}: expected shape {expected}, got {[*leaf.shape]}")
        if n is None:
            n = next(iter(leaves.values())).shape[len(lead)]
        if lead:
            leaves = {key: _led(key, x, (*lead, n)).flatten(0, 1) for key, x in leaves.items()}
        rows = n * lead[0] if lead else n
        if self._fits(leaves, (rows,)):
            return leaves, n
        require_keys(leaves)
        for name in self._reserved:
            if (name,) in leaves:
                raise SchemaError(f"{name!r} is a reserved key: sampling adds it; expected others")
        if self.fields:
            self._compare(leaves)
        for key, leaf in leaves.items():
            if len(leaf) != rows:
                raise SchemaError(f"{named(key)}: expected {rows} transitions, got {len(leaf)}")
        return leaves, n

    def _fits(self, leaves: Leaves, rows: tuple[int, ...]) -> bool:
        """Return True if all leaves are [*rows, ...] of the right dtype: a quick check."""
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
    """Leading dimensions that all leaves share."""
    common = []
    for sizes in zip(*(leaf.shape for leaf in leaves.values()), strict=False):
        if len(set(sizes)) > 1:
            break
        common.append(sizes[0])
    return tuple(common)


def _led(key: Key, leaf: Any, size: tuple[int, ...]) -> Any:
    """Return a leaf if its first dimensions are `size`; raise SchemaError otherwise."""
    if leaf.shape[: len(size)] != size:
        expected = validation.shaped(*size, "...")
        raise SchemaError(f"{named(key)}: expected shape {expected}, got {[*leaf.shape]}")
    return leaf

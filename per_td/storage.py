"""RingStorage: transitions in preallocated memory, the oldest overwritten by the newest."""

from array import array
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase, is_leaf_nontensor
from torch import Tensor

from per_td import batch, kernels, layouts, validation
from per_td.errors import SchemaError
from per_td.layouts import Field
from per_td.ring import generation_of

__all__ = ["RESERVED", "Leaves", "RingStorage", "count", "flattened", "nested"]

RESERVED = ("index", "priority_weight", "generation")
"""Keys that sampling adds; transitions may not bring their own."""

Key = tuple[str, ...]
Leaves = dict[Key, Tensor]


def _named(key: Key) -> str:
    return repr(key[0]) if len(key) == 1 else repr(key)


def count(leaves: Leaves) -> int:
    """Number of transitions in leaves [n, ...]."""
    return len(next(iter(leaves.values())))


def nested(leaves: Iterable[tuple[Key, Tensor]]) -> dict[str, Any]:
    """[(("next", "reward"), x)] as {"next": {"reward": x}}."""
    out: dict[str, Any] = {}
    for (*parents, name), leaf in leaves:
        at = out
        for parent in parents:
            at = at.setdefault(parent, {})
        at[name] = leaf
    return out


def flattened(tree: Mapping[str, Any], prefix: Key = ()) -> Leaves:
    """The inverse of `nested`."""
    out: Leaves = {}
    for name, value in tree.items():
        key = (*prefix, name)
        out |= flattened(value, key) if isinstance(value, Mapping) else {key: value}
    return out


def _addresses(tensors: Iterable[Tensor]) -> "array[int]":
    return array("q", [tensor.data_ptr() for tensor in tensors])


def _address(numbers: "array[int]") -> int:
    return numbers.buffer_info()[0]


class RingStorage:
    """A ring of transitions, one preallocated tensor per key.

    Transition number k (counting from 0, for ever) lives in slot k mod capacity; its generation is
    k // capacity. Memory is allocated when the first data, or an example, tells keys, shapes and
    dtypes; from then on anything else is refused.

    Args:
        capacity: number of slots.
        device: where the transitions live.
        layout: "columns", "records" or "auto"; see `per_td.layouts`.

    Raises:
        ConfigurationError: `layout` is none of these.
    """

    def __init__(self, capacity: int, device: torch.device, layout: str = "auto") -> None:
        self.capacity = capacity
        self.device = device
        self.layout = validation.one_of("layout", layout, layouts.LAYOUTS)
        self._compiled = kernels.wanted(device)
        self._fields: dict[Key, Field] = {}
        self._block: Tensor | None = None
        self._columns: Leaves = {}
        self._sizes = torch.empty(0, 2, dtype=torch.int64, device="cpu")
        self._like: list[Tensor] = []
        self._written = 0
        self._write_count = torch.zeros((), dtype=torch.int64, device=device)

    def __len__(self) -> int:
        return min(self._written, self.capacity)

    def __getstate__(self) -> dict[str, Any]:
        """Views of one block would become copies of it: they are left out."""
        return self.__dict__ | ({} if self._block is None else {"_columns": {}})

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._block is not None:
            self._columns = self._views(self._block)

    @property
    def kernels(self) -> ModuleType | None:
        """The compiled operations, where they are used; see `per_td.kernels`."""
        return kernels.cpu() if self._compiled and not torch.compiler.is_compiling() else None

    @property
    def data(self) -> TensorDict | None:
        """All slots, a TensorDict [capacity] in this memory; None before it is allocated."""
        if not self._columns:
            return None
        return TensorDict(nested(self._columns.items()), batch_size=[self.capacity], device=self.device)

    @property
    def write_count(self) -> int:
        """How many transitions were ever written."""
        return self._written

    @write_count.setter
    def write_count(self, value: int) -> None:
        self._written = value
        self._write_count.fill_(value)

    @property
    def written(self) -> Tensor | int:
        """`write_count` as a 0-dim int64 tensor on the device; an int where kernels are used."""
        return self._write_count if self.kernels is None else self._written

    @property
    def size(self) -> Tensor | int:
        """Number of filled slots, in the same form."""
        if self.kernels is None:
            return self._write_count.clamp(max=self.capacity)
        return len(self)

    def generation(self, index: Tensor) -> Tensor:
        """How often the ring had wrapped when the slots `index` [B] were written; -1 if never."""
        return generation_of(index, self.written, self.capacity)

    def check(self, transitions: TensorDictBase, *, batched: bool = True) -> Leaves:
        """The leaves of `transitions`, if they fit; nothing is written.

        Args:
            transitions: TensorDict of batch size [n, ...], or of one transition.
            batched: whether the first dimension counts transitions.

        Returns:
            Leaves of shape [n, ...] by key.

        Raises:
            SchemaError: keys, shapes or dtypes are not those that the storage was made for, a key
                is reserved, a leaf is not a tensor, or the batch size has no first dimension.
        """
        if not isinstance(transitions, TensorDictBase):
            raise SchemaError(f"expected a TensorDict, got {type(transitions).__name__}")
        if batched and not transitions.batch_dims:
            raise SchemaError(
                "expected a TensorDict of batch size [n], got batch size []: use add()"
                " for one transition"
            )
        leaves: Leaves = {}
        for name, leaf in transitions.items(True, True, is_leaf=is_leaf_nontensor):
            key = (name,) if isinstance(name, str) else name
            if not isinstance(leaf, Tensor):
                raise SchemaError(f"{_named(key)}: expected a tensor, got {type(leaf).__name__}")
            leaves[key] = leaf if batched else leaf.unsqueeze(0)
        self.check_leaves(leaves)
        return leaves

    def check_leaves(self, leaves: Leaves) -> None:
        """`check` for leaves [n, ...] that are no TensorDict."""
        if not leaves:
            raise SchemaError("expected at least one tensor, got an empty TensorDict")
        for name in RESERVED:
            if (name,) in leaves:
                raise SchemaError(f"{name!r} is a reserved key: sampling adds it; expected others")
        if self._columns:
            self._check_fields(leaves)

    def _check_fields(self, leaves: Leaves) -> None:
        if leaves.keys() != self._fields.keys():
            missing = [_named(key) for key in self._fields if key not in leaves]
            unknown = [_named(key) for key in leaves if key not in self._fields]
            raise SchemaError(
                f"expected the keys {', '.join(map(_named, self._fields))};"
                f" missing: {', '.join(missing) or 'none'}; unknown: {', '.join(unknown) or 'none'}"
            )
        n = count(leaves)
        for key, field in self._fields.items():
            leaf = leaves[key]
            if leaf.shape[1:] != field.shape or leaf.dtype != field.dtype:
                raise SchemaError(
                    f"{_named(key)}: expected {field.dtype} of shape {list(field.shape)}"
                    f" per transition, got {leaf.dtype} of shape {list(leaf.shape[1:])}"
                )
            if len(leaf) != n:
                raise SchemaError(f"{_named(key)}: expected {n} transitions, got {len(leaf)}")

    def allocate(self, leaves: Leaves) -> None:
        """Allocate memory for transitions like those in `leaves` [n, ...], unless done before."""
        if self._columns:
            return
        fields = [Field(key, leaf.shape[1:], leaf.dtype) for key, leaf in leaves.items()]
        self._fields = {field.key: field for field in fields}
        self.layout = layouts.resolve_layout(self.layout, fields, compiled=self._compiled)
        if self.layout == "records":
            self._block = layouts.block_of(fields, self.capacity, self.device)
            self._columns = self._views(self._block)
        else:
            columns = layouts.columns_of(fields, self.capacity, self.device)
            self._columns = dict(zip(self._fields, columns, strict=True))
        steps = [[c.stride(0) * c.itemsize, f.bytes] for f, c in zip(fields, self._columns.values())]
        self._sizes = torch.tensor(steps, dtype=torch.int64, device="cpu")

    def _views(self, block: Tensor) -> Leaves:
        views = layouts.views_of(list(self._fields.values()), block)
        return dict(zip(self._fields, views, strict=True))

    def next_slots(self, n: int) -> Tensor:
        """The slots that the next `n` transitions will live in, int64 [n]."""
        start = self._written
        return torch.arange(start, start + n, device=self.device).remainder_(self.capacity)

    def write(self, leaves: Leaves) -> None:
        """Write checked leaves [n, ...] over the oldest; of too many, the last remain."""
        self.allocate(leaves)
        n = count(leaves)
        skipped = max(0, n - self.capacity)
        start = (self._written + skipped) % self.capacity
        new = [validation.to_device(leaves[key].detach(), self.device) for key in self._columns]
        if skipped:
            new = [leaf[skipped:] for leaf in new]
        kernel = self.kernels
        if kernel is None:
            self._copy(new, start, n - skipped)
        else:
            new = [leaf.contiguous() for leaf in new]
            first, source = _addresses(self._columns.values()), _addresses(new)
            kernel.scatter(
                _address(first),
                self._sizes.data_ptr(),
                len(new),
                self.capacity,
                start,
                n - skipped,
                _address(source),
            )
        self.write_count = self._written + n

    def _copy(self, new: list[Tensor], start: int, n: int) -> None:
        """Write `n` rows from the slot `start` on, and from slot 0 on past the end."""
        head = min(n, self.capacity - start)
        for column, leaf in zip(self._columns.values(), new, strict=True):
            column[start : start + head] = leaf[:head]
            if head < n:
                column[: n - head] = leaf[head:]

    def filled(self) -> Leaves:
        """The filled part of every column, views [len, ...]."""
        return {key: column[: len(self)] for key, column in self._columns.items()}

    def gather(self, index: Tensor) -> tuple[list[Tensor], Tensor]:
        """Copies of the transitions in the slots `index` [B], and their `generation`.

        Returns:
            Contiguous tensors [B, ...] in the order of the keys; int64 [B].
        """
        kernel = self.kernels
        if kernel is None or not index.is_contiguous():
            return self._select(index), self.generation(index)
        n = index.numel()
        out = [torch.empty_like(like) for like in self._likes(n)]
        generation = torch.empty_like(index)
        first, to = _addresses(self._columns.values()), _addresses(out)
        kernel.gather(
            _address(first),
            self._sizes.data_ptr(),
            len(out),
            index.data_ptr(),
            n,
            _address(to),
            self._written,
            self.capacity,
            generation.data_ptr(),
        )
        return out, generation

    def _likes(self, n: int) -> list[Tensor]:
        """Tensors like those `gather` returns: `empty_like` takes half as long as `empty`."""
        if not self._like or self._like[0].shape[0] != n:
            self._like = [
                torch.empty((), dtype=field.dtype, device=self.device).expand(n, *field.shape)
                for field in self._fields.values()
            ]
        return self._like

    def _select(self, index: Tensor) -> list[Tensor]:
        if self._block is None:
            return [column.index_select(0, index) for column in self._columns.values()]
        records = self._block.index_select(0, index)
        return [view.contiguous() for view in self._views(records).values()]

    def read(self, index: Tensor, extra: dict[str, Tensor]) -> TensorDict:
        """The transitions in the slots `index` [B], with these, `generation` and `extra`, [B]."""
        leaves, generation = self.gather(index)
        tree = nested(zip(self._columns, leaves, strict=True))
        tree.update(extra, index=index, generation=generation)
        return batch.make(tree, index.shape, self.device)

"""Columns: the tensors of a TensorDict storage, read and written row by row.

Indexing a TensorDict costs several times as much as indexing its tensors. The result is the same.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch
from tensordict import MemoryMappedTensor, TensorDict
from tensordict.utils import NestedKey
from torch import Tensor

from per_td import kernels
from per_td.errors import SchemaError
from per_td.kernels import reference
from per_td.storage.leaves import tensordict_of
from per_td.validation import plain_rows, require_plain

_TENSORS = (Tensor, MemoryMappedTensor)


@dataclass
class _Rows:
    """One ring of rows in tensors of other owners; see `per_td.kernels.parts.Rows`."""

    columns: Sequence[Tensor]  # [capacity, ...], on one device
    capacity: int
    groups: int = 1
    record: Any = None

    @property
    def starts(self) -> Tensor:
        """First row of the ring, int64 [1, 1]."""
        return torch.zeros(1, 1, dtype=torch.int64, device=self.columns[0].device)


class _Leaf(NamedTuple):
    place: int  # in the list of columns
    shape: torch.Size  # of one row
    dtype: torch.dtype


class _Node(NamedTuple):
    """One TensorDict of a nest."""

    leaves: dict[str, _Leaf]
    children: dict[str, "_Node"]
    batch_size: torch.Size  # of one row
    device: torch.device | None


def _explore(data: Any, capacity: int, device: torch.device, columns: list[Tensor]) -> _Node | None:
    """The node of `data`; appends its tensors to `columns`. None if it holds anything else."""
    if type(data) is not TensorDict or data.batch_size[:1] != (capacity,):
        return None
    if any(name is not None for name in data.names):
        return None
    node = _Node({}, {}, data.batch_size[1:], data.device)
    for name, value in data.items():
        if type(value) in _TENSORS and _is_column(value, device):
            node.leaves[name] = _Leaf(len(columns), value.shape[1:], value.dtype)
            # a plain tensor on the same memory: subclasses slow every operation down
            columns.append(value.as_subclass(Tensor))
        elif (child := _explore(value, capacity, device, columns)) is not None:
            node.children[name] = child
        else:
            return None
    return node


def _is_column(value: Tensor, device: torch.device) -> bool:
    """True if `value` is on `device`, its memory holds its numbers as they are, and may change."""
    return (
        value.layout == torch.strided
        and not value.is_nested
        and value.device == device
        and not (value.is_neg() or value.is_conj() or value.is_inference())
    )


def _expected(node: _Node, batch_size: torch.Size) -> _Node:
    """The node of a TensorDict of this batch size, with whole shapes."""
    leaves = {
        name: leaf._replace(shape=batch_size + leaf.shape) for name, leaf in node.leaves.items()
    }
    children = {name: _expected(child, batch_size) for name, child in node.children.items()}
    return node._replace(leaves=leaves, children=children, batch_size=batch_size + node.batch_size)


def _collect(node: _Node, data: TensorDict, rows: list[Tensor], skip: str | None = None) -> bool:
    """Fill `rows`, one place per column, with the tensors of `data`, but for the entry `skip`.

    False if `data` has other keys, shapes or dtypes than the node.
    """
    leaves, seen = node.leaves, 0
    for name, value in data.items():
        if name == skip:
            continue
        seen += 1
        leaf = leaves.get(name)
        if leaf is not None:
            place, shape, dtype = leaf
            if type(value) not in _TENSORS or value.dtype != dtype or value.shape != shape:
                return False
            rows[place] = value.detach() if value.requires_grad else value
            continue
        child = node.children.get(name)
        if child is None or type(value) is not TensorDict or value.batch_size != child.batch_size:
            return False
        if not _collect(child, value, rows):
            return False
    return seen == len(leaves) + len(node.children) - (skip in leaves)


def _assemble(
    node: _Node, rows: list[Tensor], batch_size: torch.Size, extra: dict[str, Tensor]
) -> TensorDict:
    """The TensorDict of a node, of rows in the order of the columns, with `extra` entries."""
    source: dict[str, Any] = {name: rows[leaf.place] for name, leaf in node.leaves.items()}
    for name, child in node.children.items():
        source[name] = _assemble(child, rows, batch_size, {})
    source.update(extra)
    return tensordict_of(source, batch_size + node.batch_size, node.device)


class Columns:
    """The columns of a storage's TensorDict of batch size [capacity], with a leaf "index".

    `generation`, of all slots, int64 [capacity], contiguous, is on the same device: `write` counts
    it up, and `gather` reads it like a column.
    """

    def __init__(
        self, root: _Node, columns: list[Tensor], generation: Tensor, keys: set[NestedKey]
    ) -> None:
        self._root, self._columns, self._generation = root, columns, generation
        self.capacity, self._device = len(generation), generation.device
        self._expected: _Node | None = None  # for the batch size that came last
        self._keys = keys  # also those of nested TensorDicts
        self._index = at = root.leaves["index"].place
        self._no_slots = columns[at][:0]
        packed = all(column[:1].is_contiguous() for column in columns)
        self._operations = kernels.operations(columns[0].device) if packed else reference
        self._written = _Rows(columns, self.capacity)
        self._drawn = _Rows([*columns[:at], *columns[at + 1 :], generation], self.capacity)

    @classmethod
    def of(cls, data: Any, generation: Tensor) -> "Columns | None":
        """The columns of nested TensorDicts of tensors on the generations' device; or None."""
        columns: list[Tensor] = []
        root = _explore(data, len(generation), generation.device, columns)
        if root is None or root.batch_size or "index" not in root.leaves:
            return None
        fits = root.leaves["index"][1:] == (torch.Size([]), torch.int64)
        return cls(root, columns, generation, set(data.keys(True))) if fits else None

    def __contains__(self, key: Any) -> bool:
        """True if there is a column, or a TensorDict of columns, of this name."""
        return key in self._keys

    @property
    def _ops(self) -> ModuleType:
        return reference if torch.compiler.is_compiling() else self._operations

    def rows_of(self, data: Any, *, single: bool = False) -> list[Tensor] | None:
        """The tensors of `data`, a TensorDict [n], or [] if `single`, for each column but "index".

        They are contiguous and on the columns' device: nothing is left to be refused while they are
        written. None if `data` has other entries, shapes or dtypes; a SchemaError if a tensor has
        no values, or not in memory.
        """
        if type(data) is not TensorDict or data.batch_dims != (0 if single else 1):
            return None
        if self._expected is None or self._expected.batch_size != data.batch_size:
            self._expected = _expected(self._root, data.batch_size)
        rows = list(self._columns)
        if not _collect(self._expected, data, rows, skip="index"):
            return None
        rows[self._index] = self._no_slots  # until `write` knows them
        rows = [plain_rows(row, self._device) for row in rows]
        if self._operations is reference and self._device.type == "cpu":
            for row in rows:  # kernels look for memory before they write; torch does not
                require_plain("transitions", row, SchemaError)
        return rows

    def write(self, rows: list[Tensor], start: int, n: int) -> Tensor:
        """Write n rows, from `rows_of`, and their slots, and count up their generations.

        Returns the slots, int64 [n], from `start` on and around the end.
        """
        rows[self._index] = index = torch.empty(n, dtype=torch.int64, device=self._device)
        runs = array("q", (start, n))
        self._ops.write_rows(self._written, rows, n, runs, stamps=self._generation, index=index)
        return index

    def gather(self, index: Tensor) -> tuple[list[Tensor], Tensor]:
        """The rows in slots that exist, int64 [B]: a tensor per column, and the generations."""
        found, _ = self._ops.gather(self._drawn, index, written=None)
        *rows, generation = found
        rows.insert(self._index, index)
        return rows, generation

    def batch(self, rows: list[Tensor], extra: dict[str, Tensor]) -> TensorDict:
        """A TensorDict of rows from `gather`, with `extra` entries [B] beside them."""
        return _assemble(self._root, rows, rows[self._index].shape, extra)

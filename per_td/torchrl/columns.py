"""Columns: the tensors of a TensorDict storage, read and written row by row.

Indexing a TensorDict costs several times what indexing its tensors does. The result is the same.
"""

from array import array
from collections.abc import Iterator
from types import ModuleType
from typing import Any, NamedTuple

import torch
from tensordict import MemoryMappedTensor, TensorDict
from torch import Tensor

from per_td import kernels
from per_td.kernels import reference
from per_td.storage import batches as batch
from per_td.storage import rows as row_copies
from per_td.validation import plain_rows

__all__ = ["Columns"]

_TENSORS = (Tensor, MemoryMappedTensor)


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
    """The node of `data`, its tensors appended to `columns`; None if something else is in it."""
    if type(data) is not TensorDict or data.batch_size[:1] != (capacity,) or _named(data):
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
    """Whether the memory of `value`, which is on `device`, holds its numbers as they are."""
    return (
        value.layout == torch.strided
        and not value.is_nested
        and value.device == device
        and not (value.is_neg() or value.is_conj())
    )


def _named(data: TensorDict) -> bool:
    return any(name is not None for name in data.names)


def _keys(node: _Node, prefix: tuple[str, ...] = ()) -> Iterator[str | tuple[str, ...]]:
    """The names of everything in a node; in a nested one, tuples of names."""
    for name in (*node.leaves, *node.children):
        yield (*prefix, name) if prefix else name
    for name, child in node.children.items():
        yield from _keys(child, (*prefix, name))


def _expected(node: _Node, batch_size: torch.Size) -> _Node:
    """The node of a TensorDict of this batch size, whose shapes are whole."""
    leaves = {
        name: leaf._replace(shape=batch_size + leaf.shape) for name, leaf in node.leaves.items()
    }
    children = {name: _expected(child, batch_size) for name, child in node.children.items()}
    return node._replace(leaves=leaves, children=children, batch_size=batch_size + node.batch_size)


def _collect(node: _Node, data: TensorDict, rows: list[Tensor], skip: str | None = None) -> bool:
    """Put the tensors of `data` into `rows` by their columns' places; whether it has just these.

    Args:
        node: what is expected.
        data: the TensorDict.
        rows: one place per column.
        skip: an entry that does not matter.
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
    source: dict[str, Any] = {name: rows[leaf.place] for name, leaf in node.leaves.items()}
    for name, child in node.children.items():
        source[name] = _assemble(child, rows, batch_size, {})
    source.update(extra)
    return batch.make(source, batch_size + node.batch_size, node.device)


class Columns:
    """The columns of a storage's TensorDict of batch size [capacity].

    Args:
        root: the TensorDict's node, with a leaf "index".
        columns: its tensors, in the order of the leaves' places.
    """

    def __init__(self, root: _Node, columns: list[Tensor]) -> None:
        self._root = root
        self._expected: _Node | None = None  # for the batch size that came last
        self._columns = columns
        self._keys = set(_keys(root))
        self._index = root.leaves["index"].place
        self._no_slots = columns[self._index][:0]
        self.capacity = len(columns[0])
        packed = all(column[:1].is_contiguous() for column in columns)
        self._operations = kernels.operations(columns[0].device) if packed else reference
        self._written = row_copies.Rows(columns, self.capacity)
        self._drawn: row_copies.Rows | None = None  # all but "index", and the generations

    @classmethod
    def of(cls, data: Any, capacity: int, device: torch.device) -> "Columns | None":
        """The columns of `data`; None for all but nested TensorDicts of tensors on `device`."""
        columns: list[Tensor] = []
        root = _explore(data, capacity, device, columns)
        if root is None or root.batch_size or "index" not in root.leaves:
            return None
        fits = root.leaves["index"][1:] == (torch.Size([]), torch.int64)
        return cls(root, columns) if fits else None

    def __contains__(self, key: Any) -> bool:
        """Whether there is a column, or a TensorDict of columns, of this name."""
        return key in self._keys

    @property
    def _ops(self) -> ModuleType:
        return reference if torch.compiler.is_compiling() else self._operations

    def rows_of(self, data: Any, *, single: bool = False) -> list[Tensor] | None:
        """The tensors of `data`, a row or rows for each column but "index".

        Args:
            data: TensorDict [n], or [] if `single`.
            single: whether `data` is one row.

        Returns:
            In the order of the columns, contiguous and on their device, so that nothing is left
            to be refused while they are written; None if `data` has other entries, shapes or
            dtypes.

        Raises:
            SchemaError: a tensor has no values, or not in memory.
        """
        if type(data) is not TensorDict or data.batch_dims != (0 if single else 1):
            return None
        if self._expected is None or self._expected.batch_size != data.batch_size:
            self._expected = _expected(self._root, data.batch_size)
        rows = list(self._columns)
        if not _collect(self._expected, data, rows, skip="index"):
            return None
        device = self._columns[0].device
        rows[self._index] = self._no_slots  # until `write` knows them
        return [plain_rows(row, device) for row in rows]

    def write(self, rows: list[Tensor], start: int, n: int, generation: Tensor) -> Tensor:
        """Write rows, and the slots that they go to.

        Args:
            rows: from `rows_of`.
            start: the first slot.
            n: how many rows, at most `capacity`.
            generation: of all slots, int64 [capacity], contiguous, on the columns' device, to be
                counted up.

        Returns:
            The slots, one after the other and around the end, int64 [n].
        """
        device = generation.device  # which need not be torch's default
        rows[self._index] = index = torch.empty(n, dtype=torch.int64, device=device)
        runs = array("q", (start, n))
        self._ops.write_rows(self._written, rows, n, runs, stamps=generation, index=index)
        return index

    def gather(self, index: Tensor, generation: Tensor, extra: dict[str, Tensor]) -> TensorDict:
        """The rows `index` [B], with `extra` entries [B] beside them.

        Args:
            index: slots that exist, int64 [B].
            generation: of all slots, as for `write`, to be read as a column is.
            extra: takes up "index" and "index_generation", int64 [B], too.
        """
        drawn, at = self._drawn, self._index
        if drawn is None or drawn.columns[-1] is not generation:
            own = self._columns[:at] + self._columns[at + 1 :]
            drawn = self._drawn = row_copies.Rows([*own, generation], self.capacity)
        found, _ = self._ops.gather(drawn, index, written=None)
        *rows, extra["index_generation"] = found
        rows.insert(at, index)
        extra["index"] = index
        return _assemble(self._root, rows, index.shape, extra)

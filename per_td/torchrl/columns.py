"""Columns: the tensors of a TensorDict storage, read and written row by row.

Indexing a TensorDict costs several times what indexing its tensors does. The result is the same.
"""

from types import ModuleType
from typing import Any, NamedTuple

import torch
from tensordict import MemoryMappedTensor, TensorDict
from torch import Tensor

from per_td import batch, kernels, validation
from per_td import rows as row_copies

__all__ = ["Columns", "Part"]

Part = tuple[int, int, int]
"""(slot, row, length): a run of rows that goes to consecutive slots."""

_TENSORS = (Tensor, MemoryMappedTensor)


class _Leaf(NamedTuple):
    place: int  # in the list of columns
    tail: torch.Size
    dtype: torch.dtype


class _Node(NamedTuple):
    """One TensorDict of a nest."""

    leaves: dict[str, _Leaf]
    children: dict[str, "_Node"]
    batch_tail: torch.Size
    device: torch.device | None


def _explore(data: Any, capacity: int, columns: list[Tensor]) -> _Node | None:
    """The node of `data`, its tensors appended to `columns`; None if something else is in it."""
    if type(data) is not TensorDict or data.batch_size[:1] != (capacity,) or _named(data):
        return None
    node = _Node({}, {}, data.batch_size[1:], data.device)
    for name, value in data.items():
        if type(value) in _TENSORS and not value.is_nested and value.layout == torch.strided:
            node.leaves[name] = _Leaf(len(columns), value.shape[1:], value.dtype)
            # a plain tensor on the same memory: subclasses slow every operation down
            columns.append(value.as_subclass(Tensor))
        elif (child := _explore(value, capacity, columns)) is not None:
            node.children[name] = child
        else:
            return None
    return node


def _named(data: TensorDict) -> bool:
    return any(name is not None for name in data.names)


def _collect(
    node: _Node, data: TensorDict, before: int, rows: list[Tensor], skip: str | None = None
) -> bool:
    """Put the tensors of `data` into `rows` by their columns' places; whether it has just these.

    Args:
        node: what is expected.
        data: batch size [n] or [].
        before: its number of batch dimensions, 1 or 0.
        rows: one place per column.
        skip: an entry that does not matter.
    """
    seen = 0
    for name, value in data.items():
        leaf = node.leaves.get(name)
        if name == skip:
            continue
        seen += 1
        if leaf is not None:
            if type(value) not in _TENSORS or value.dtype != leaf.dtype:
                return False
            if value.shape[before:] != leaf.tail:
                return False
            rows[leaf.place] = value.detach() if value.requires_grad else value
            continue
        child = node.children.get(name)
        if child is None or type(value) is not TensorDict:
            return False
        if value.batch_size[before:] != child.batch_tail:
            return False
        if not _collect(child, value, before, rows):
            return False
    return seen == len(node.leaves) + len(node.children) - (skip in node.leaves)


def _assemble(
    node: _Node, rows: list[Tensor], batch_size: torch.Size, extra: dict[str, Tensor]
) -> TensorDict:
    source: dict[str, Any] = {name: rows[leaf.place] for name, leaf in node.leaves.items()}
    for name, child in node.children.items():
        source[name] = _assemble(child, rows, batch_size, {})
    source.update(extra)
    return batch.make(source, batch_size + node.batch_tail, node.device)


class Columns:
    """The columns of a storage's TensorDict of batch size [capacity].

    Args:
        root: the TensorDict's node, with a leaf "index".
        columns: its tensors, in the order of the leaves' places.
    """

    def __init__(self, root: _Node, columns: list[Tensor]) -> None:
        self._root = root
        self._columns = columns
        self._index = root.leaves["index"].place
        self._on_cpu = all(column.device.type == "cpu" for column in columns)
        packed = self._on_cpu and all(column[:1].is_contiguous() for column in columns)
        self._compiled = packed and kernels.wanted(torch.device("cpu"))
        self._sizes = row_copies.steps(columns)
        self._like: list[Tensor] = []

    @classmethod
    def of(cls, data: Any, capacity: int) -> "Columns | None":
        """The columns of `data`, or None if it is anything but nested TensorDicts of tensors."""
        columns: list[Tensor] = []
        root = _explore(data, capacity, columns)
        if root is None or root.batch_tail or "index" not in root.leaves:
            return None
        fits = root.leaves["index"][1:] == (torch.Size([]), torch.int64)
        return cls(root, columns) if fits else None

    @property
    def _kernels(self) -> ModuleType | None:
        return kernels.cpu_unless_tracing() if self._compiled else None

    def rows_of(self, data: Any, *, single: bool = False) -> list[Tensor] | None:
        """The tensors of `data`, a row or rows for each column but "index".

        Args:
            data: TensorDict [n], or [] if `single`.
            single: whether `data` is one row.

        Returns:
            In the order of the columns; None if `data` has other entries, shapes or dtypes.
        """
        before = 0 if single else 1
        if type(data) is not TensorDict or data.batch_dims != before:
            return None
        rows = list(self._columns)
        return rows if _collect(self._root, data, before, rows, skip="index") else None

    def write(self, rows: list[Tensor], index: Tensor, parts: list[Part]) -> None:
        """Write rows, and the slots that they go to.

        Args:
            rows: from `rows_of`.
            index: the slots, int64 [n].
            parts: the runs of consecutive slots.
        """
        rows[self._index] = index
        kernel = self._kernels
        if kernel is not None:
            plain = [row_copies.plain(row, index.device) for row in rows]
            at = {"capacity": len(self._columns[0]), "start": parts[0][0], "n": len(index)}
            row_copies.scatter(kernel, self._columns, self._sizes, plain, **at)
            return
        for column, new in zip(self._columns, rows, strict=True):
            if not self._on_cpu:
                new = validation.to_device(new, column.device)
            if len(parts) == 1:
                slot, _, length = parts[0]
                column.narrow(0, slot, length).copy_(new)  # a single row is broadcast
                continue
            for slot, row, length in parts:
                column.narrow(0, slot, length).copy_(new.narrow(0, row, length))

    def gather(self, index: Tensor, extra: dict[str, Tensor]) -> TensorDict:
        """The rows `index` [B], with `extra` entries [B], "index" among them, in their places."""
        kernel = self._kernels
        if kernel is not None:
            if not self._like or len(self._like[0]) != len(index):
                self._like = row_copies.likes(self._columns, len(index))
            index = index.contiguous()
            rows, _ = row_copies.gather(kernel, self._columns, self._sizes, self._like, index)
            return _assemble(self._root, rows, index.shape, extra)
        rows = [
            index if place == self._index else column.index_select(0, index)
            for place, column in enumerate(self._columns)
        ]
        return _assemble(self._root, rows, index.shape, extra)

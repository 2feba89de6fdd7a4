"""Columns: the tensors of a TensorDict storage, read and written row by row.

Indexing a TensorDict costs several times what indexing its tensors does. The result is the same.
"""

from typing import Any, NamedTuple

import torch
from tensordict import MemoryMappedTensor, TensorDict
from torch import Tensor

from per_td import validation

__all__ = ["Columns", "Pairs", "new_tensordict"]

Pairs = list[tuple[Tensor, Tensor]]
"""Columns [capacity, ...], each with the rows that are to be written into it."""

_TENSORS = (Tensor, MemoryMappedTensor)

_new_unsafe = getattr(TensorDict, "_new_unsafe", None)


def new_tensordict(source: dict[str, Any], batch_size: torch.Size, device: Any) -> TensorDict:
    """A TensorDict of entries that are known to fit; its constructor would check each, slowly."""
    if _new_unsafe is None:
        return TensorDict(source, batch_size=batch_size, device=device)
    return _new_unsafe(source, batch_size=batch_size, device=device, nested=False)


class _Node(NamedTuple):
    """One TensorDict of a nest: its own columns, and the nodes below."""

    columns: dict[str, Tensor]
    tails: dict[str, tuple[torch.Size, torch.dtype]]
    children: dict[str, "_Node"]
    batch_tail: torch.Size
    device: torch.device | None

    @classmethod
    def of(cls, data: Any, capacity: int) -> "_Node | None":
        """The node of `data`; None if something in it is not a plain column."""
        if type(data) is not TensorDict or data.batch_size[:1] != (capacity,) or _named(data):
            return None
        columns: dict[str, Tensor] = {}
        children: dict[str, _Node] = {}
        for name, value in data.items():
            if type(value) in _TENSORS and not value.is_nested and value.layout == torch.strided:
                # a plain tensor on the same memory: subclasses slow every operation down
                columns[name] = value.as_subclass(Tensor)
            elif (child := cls.of(value, capacity)) is not None:
                children[name] = child
            else:
                return None
        tails = {name: (column.shape[1:], column.dtype) for name, column in columns.items()}
        return cls(columns, tails, children, data.batch_size[1:], data.device)

    def pair(self, data: TensorDict, rows: int, pairs: Pairs, skip: str | None = None) -> bool:
        """Append the columns and their new rows to `pairs`; whether `data` has just these."""
        seen = 0
        for name, value in data.items():
            if name == skip:
                continue
            seen += 1
            tail = self.tails.get(name)
            if tail is not None:
                if type(value) not in _TENSORS or (value.shape[rows:], value.dtype) != tail:
                    return False
                pairs.append((self.columns[name], value))
                continue
            child = self.children.get(name)
            if child is None or type(value) is not TensorDict:
                return False
            if value.batch_size[rows:] != child.batch_tail or not child.pair(value, rows, pairs):
                return False
        return seen == len(self.columns) + len(self.children) - (skip in self.columns)

    def gather(self, index: Tensor, extra: dict[str, Tensor]) -> TensorDict:
        """The rows `index`, with `extra` entries in place of stored ones or beside them."""
        source: dict[str, Any] = {
            name: column.index_select(0, index)
            for name, column in self.columns.items()
            if name not in extra
        }
        for name, child in self.children.items():
            source[name] = child.gather(index, {})
        source.update(extra)
        return new_tensordict(source, index.shape + self.batch_tail, self.device)


def _named(data: TensorDict) -> bool:
    return any(name is not None for name in data.names)


class Columns:
    """The columns of a storage's TensorDict of batch size [capacity].

    Args:
        root: the TensorDict's node, with a column "index".
    """

    def __init__(self, root: _Node) -> None:
        self._root = root
        self._index = root.columns["index"]

    @classmethod
    def of(cls, data: Any, capacity: int) -> "Columns | None":
        """The columns of `data`, or None if it is anything but nested TensorDicts of tensors."""
        root = _Node.of(data, capacity)
        if root is None or root.batch_tail:
            return None
        fits = root.tails.get("index") == (torch.Size([]), torch.int64)
        return cls(root) if fits else None

    def pair(self, data: Any, *, single: bool = False) -> Pairs | None:
        """Each column with its new rows; None if `data` has other entries, shapes or dtypes.

        Args:
            data: TensorDict [n], or [] if `single`.
            single: whether `data` is one row.
        """
        if type(data) is not TensorDict or data.batch_dims != (0 if single else 1):
            return None
        pairs: Pairs = []
        return pairs if self._root.pair(data, data.batch_dims, pairs, skip="index") else None

    def write(self, pairs: Pairs, index: Tensor, parts: list[tuple[int, int, int]]) -> None:
        """Write rows, and the slots `index` that they go to.

        Args:
            pairs: from `pair`.
            index: int64 [n].
            parts: (slot, row, length) of the runs of rows that go to consecutive slots.
        """
        for column, rows in (*pairs, (self._index, index)):
            rows = validation.to_device(rows.detach(), column.device)
            if len(parts) == 1:
                slot, _, length = parts[0]
                column[slot : slot + length].copy_(rows)  # a single row is broadcast
                continue
            for slot, row, length in parts:
                column[slot : slot + length].copy_(rows[row : row + length])

    def gather(self, index: Tensor, extra: dict[str, Tensor]) -> TensorDict:
        """The rows `index` [B], with `extra` entries [B] in place of stored ones or beside them."""
        return self._root.gather(index, extra)

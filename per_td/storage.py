"""RingStorage: transitions in preallocated columns, the oldest overwritten by the newest."""

from collections.abc import Mapping
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase, is_leaf_nontensor
from torch import Tensor

from per_td import validation
from per_td.errors import SchemaError

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


def nested(leaves: Mapping[Key, Tensor]) -> dict[str, Any]:
    """{("next", "reward"): x} as {"next": {"reward": x}}."""
    out: dict[str, Any] = {}
    for key, leaf in leaves.items():
        at = out
        for name in key[:-1]:
            at = at.setdefault(name, {})
        at[key[-1]] = leaf
    return out


def flattened(tree: Mapping[str, Any], prefix: Key = ()) -> Leaves:
    """The inverse of `nested`."""
    out: Leaves = {}
    for name, value in tree.items():
        key = (*prefix, name)
        out |= flattened(value, key) if isinstance(value, Mapping) else {key: value}
    return out


class RingStorage:
    """A ring of transitions, one preallocated tensor per key in one TensorDict.

    Transition number k (counting from 0, for ever) lives in slot k mod capacity; its generation is
    k // capacity. Memory is allocated when the first data, or an example, tells keys, shapes and
    dtypes; from then on anything else is refused.

    Args:
        capacity: number of slots.
        device: where the transitions live.
    """

    def __init__(self, capacity: int, device: torch.device) -> None:
        self.capacity = capacity
        self.device = device
        self.data: TensorDict | None = None
        self._columns: Leaves = {}
        self._written = 0
        self._write_count = torch.zeros((), dtype=torch.int64, device=device)

    def __len__(self) -> int:
        return min(self._written, self.capacity)

    @property
    def write_count(self) -> int:
        """How many transitions were ever written."""
        return self._written

    @write_count.setter
    def write_count(self, value: int) -> None:
        self._written = value
        self._write_count.fill_(value)

    @property
    def size(self) -> Tensor:
        """Number of filled slots as a 0-dim int64 tensor on the device."""
        return self._write_count.clamp(max=self.capacity)

    def generation(self, index: Tensor) -> Tensor:
        """How often the ring had wrapped when the slots `index` [B] were written; -1 if never."""
        return (self._write_count - 1 - index).div(self.capacity, rounding_mode="floor")

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
        if not self._columns:
            return
        missing = [_named(key) for key in self._columns if key not in leaves]
        unknown = [_named(key) for key in leaves if key not in self._columns]
        if missing or unknown:
            raise SchemaError(
                f"expected the keys {', '.join(map(_named, self._columns))};"
                f" missing: {', '.join(missing) or 'none'}; unknown: {', '.join(unknown) or 'none'}"
            )
        for key, column in self._columns.items():
            leaf = leaves[key]
            if leaf.shape[1:] != column.shape[1:] or leaf.dtype != column.dtype:
                raise SchemaError(
                    f"{_named(key)}: expected {column.dtype} of shape {list(column.shape[1:])}"
                    f" per transition, got {leaf.dtype} of shape {list(leaf.shape[1:])}"
                )

    def allocate(self, leaves: Leaves) -> None:
        """Allocate columns for transitions like those in `leaves` [n, ...], unless done before."""
        if self._columns:
            return
        columns = {
            key: torch.zeros((self.capacity, *leaf.shape[1:]), dtype=leaf.dtype, device=self.device)
            for key, leaf in leaves.items()
        }
        self.data = TensorDict(nested(columns), batch_size=[self.capacity], device=self.device)
        self._columns = columns

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
        head = min(n - skipped, self.capacity - start)
        for key, column in self._columns.items():
            leaf = validation.to_device(leaves[key], self.device)
            column[start : start + head] = leaf[skipped : skipped + head]
            if skipped + head < n:
                column[: n - skipped - head] = leaf[skipped + head :]
        self.write_count = self._written + n

    def filled(self) -> Leaves:
        """The filled part of every column, views [len, ...]."""
        return {key: column[: len(self)] for key, column in self._columns.items()}

    def read(self, index: Tensor, extra: dict[str, Tensor]) -> TensorDict:
        """The transitions in the slots `index` [B], with `extra` entries [B] beside them."""
        batch = {key: column.index_select(0, index) for key, column in self._columns.items()}
        return TensorDict({**nested(batch), **extra}, batch_size=index.shape, device=self.device)

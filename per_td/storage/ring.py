"""RingStorage: transitions in preallocated memory, the oldest overwritten by the newest."""

from types import ModuleType
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from per_td import kernels, validation
from per_td.memory import Place, allocating
from per_td.storage import batches as batch
from per_td.storage import layouts, rows
from per_td.storage.generations import generation_of
from per_td.storage.layouts import Field
from per_td.storage.leaves import Leaves, count, flattened, named, nested
from per_td.storage.moves import Move
from per_td.storage.schema import RESERVED, Schema

__all__ = ["RESERVED", "Leaves", "RingStorage", "count", "flattened", "nested"]

_PIECE = 2**24
"""Bytes brought to the device at a time from a state that may be larger than memory."""


class RingStorage:
    """A ring of transitions, one preallocated tensor per key.

    Transition number k (counting from 0, for ever) lives in slot k mod capacity; its generation is
    k // capacity. Memory is allocated when the first data, or an example, tells keys, shapes and
    dtypes; from then on anything else is refused.

    Args:
        capacity: number of slots.
        device: where the transitions are brought to by `read`.
        layout: "columns", "records" or "auto"; see `per_td.storage.layouts`.
        place: what kind of memory they live in; None: that of the device.

    Raises:
        ConfigurationError: `layout` is none of these.
    """

    num_buffers: int | None = None
    """How many rings there are; None: one, without a dimension for it."""

    epoch = 0
    """Added to the generations in batches: they were counted otherwise before a state moved."""

    written_before = 0
    """Transitions that no longer count in `ring_count`, since then."""

    def __init__(
        self,
        capacity: int,
        device: torch.device,
        layout: str = "auto",
        place: Place | None = None,
    ) -> None:
        self.capacity = self._rows = capacity
        self.device = device
        self.place = Place() if place is None else place
        self.home = self.place.home(device)
        self._advice = self.place.advice
        self._away = self.home != device
        self.layout = validation.one_of("layout", layout, layouts.LAYOUTS)
        self._compiled = kernels.wanted(self.home)
        self._schema = Schema()
        self._block: Tensor | None = None
        self._columns: Leaves = {}
        self._sizes = torch.empty(0, 2, dtype=torch.int64, device="cpu")
        self._bytes = 0
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
        return kernels.cpu_unless_tracing() if self._compiled else None

    def _kernels_for(self, n: int) -> ModuleType | None:
        """`kernels`, unless copying `n` transitions is worth sharing between torch's threads."""
        large = self._block is None and n * self._bytes > layouts.SHARED_FROM
        return None if large and torch.get_num_threads() > 1 else self.kernels

    @property
    def data(self) -> TensorDict | None:
        """All slots, a TensorDict [capacity] in this memory; None before it is allocated."""
        if not self._columns:
            return None
        return TensorDict(
            nested(self._columns.items()), batch_size=[self.capacity], device=self.home
        )

    @property
    def write_count(self) -> int:
        """How many transitions were ever written."""
        return self._written + self.written_before

    def ring_count(self) -> Any:
        """How many were, since the last change of capacity: slots and generations follow."""
        return self._written

    def _count(self, written: int) -> None:
        self._written = written
        self._write_count.fill_(written)

    @property
    def written(self) -> Tensor | int:
        """`ring_count` as a 0-dim int64 tensor on the device; an int where kernels are used."""
        return self._write_count if self._on_device else self._written

    @property
    def _on_device(self) -> bool:
        """Whether numbers are tensors, for operations that do not wait for the host."""
        return self._away or self.kernels is None

    @property
    def size(self) -> Tensor | int:
        """Number of filled slots, in the same form."""
        if self._on_device:
            return self._write_count.clamp(max=self.capacity)
        return len(self)

    def generation(self, index: Tensor) -> Tensor:
        """How often the ring had wrapped when the slots `index` [B] were written; -1 if never."""
        return generation_of(index, self.written, self.capacity)

    def in_ring(self, generation: Tensor) -> Tensor:
        """Generations that a batch brings back, as `generation` counts them."""
        return generation - self.epoch if self.epoch else generation

    def check(self, transitions: Any, *, batched: bool = True) -> Leaves:
        """The leaves of `transitions`, if they fit; nothing is written. See `Schema.check`."""
        return self._schema.check(transitions, batched=batched)

    def check_leaves(self, leaves: Leaves) -> None:
        """`check` for leaves [n, ...] that are no TensorDict."""
        self._schema.check_leaves(leaves)

    def allocate(self, leaves: Leaves) -> None:
        """Allocate memory for transitions like those in `leaves` [n, ...], unless done before.

        Raises:
            AllocationError: there is not enough memory; nothing is fixed then.
            DiskAllocationError: the same of files.
        """
        if not self._columns:
            self._fix(leaves)

    @torch.inference_mode(False)
    def _fix(self, leaves: Leaves) -> None:
        """Fix what a transition consists of, once there is memory for it."""
        fields = [Field(key, leaf.shape[1:], leaf.dtype) for key, leaf in leaves.items()]
        size = sum(field.bytes for field in fields)
        layout = layouts.resolve_layout(
            self.layout, fields, compiled=self._compiled, mapped=self.place.storage == "memmap"
        )
        what = f"{self._rows} transitions of {', '.join(named(field.key) for field in fields)}"
        memory = self._rows, self.home, self.place.zeros
        with allocating(what, self._rows * size, self._advice):
            if layout == "records":
                block = layouts.block_of(fields, *memory)
            else:
                columns = layouts.columns_of(fields, *memory)
        self._schema.fix(fields)
        self.layout, self._bytes = layout, size
        if layout == "records":
            self._block, self._columns = block, self._views(block)
        else:
            self._columns = dict(zip(leaves, columns, strict=True))
        self._sizes = rows.steps(self._columns.values())

    def _views(self, block: Tensor) -> Leaves:
        fields = self._schema.fields
        return dict(zip(fields, layouts.views_of(list(fields.values()), block), strict=True))

    def next_slots(self, n: int) -> Tensor:
        """The slots that the next `n` transitions will live in, int64 [n]."""
        start = self._written % self.capacity
        index = torch.arange(start, start + n, device=self.device)
        return index if start + n <= self.capacity else index.remainder_(self.capacity)

    def write(self, leaves: Leaves, n: int | None = None) -> tuple[int, int]:
        """Write checked leaves over the oldest; of too many, the last remain.

        Args:
            leaves: [n, ...] by key; for an `n` of 1, [...] will do.
            n: how many; None: see the leaves.

        Returns:
            The first slot written, and how many were, around the end.
        """
        self.allocate(leaves)
        n = count(leaves) if n is None else n
        kept = min(n, self.capacity)
        start = (self._written + n - kept) % self.capacity
        new = [rows.plain(leaves[key], self.home) for key in self._columns]
        if kept < n:
            new = [leaf[-kept:] for leaf in new]
        kernel = self._kernels_for(kept)
        if kernel is None:
            rows.require_memory(new)
            self._copy(new, start, kept)
        else:
            rows.scatter(
                kernel,
                self._columns.values(),
                self._sizes,
                new,
                capacity=self.capacity,
                start=start,
                n=kept,
            )
        self._count(self._written + n)
        return start, kept

    def _copy(self, new: list[Tensor], start: int, n: int) -> None:
        """Write `n` rows from the slot `start` on, and from slot 0 on past the end."""
        head = min(n, self.capacity - start)
        for column, leaf in zip(self._columns.values(), new, strict=True):
            new_rows = leaf.detach().reshape(n, *column.shape[1:])
            column[start : start + head] = new_rows[:head]
            if head < n:
                column[: n - head] = new_rows[head:]

    def check_state(self, leaves: Leaves) -> None:
        """Whether `restore` will take the leaves; raises SchemaError."""
        self.check_leaves(leaves)

    def restore(self, leaves: Leaves, moves: list[Move]) -> None:
        """Take over what `filled` gave, which may be nothing, as the one move of them tells.

        The leaves are such as `check_state` lets through.
        """
        (move,) = moves
        if leaves:
            self.allocate(leaves)  # of no transitions, too: they tell keys, shapes and dtypes
            self._count(0)
            step = max(1, _PIECE // max(1, sum(map(_row_bytes, leaves.values()))))
            for part in move.parts:
                for start in range(part.start, part.stop, step):
                    piece = slice(start, min(start + step, part.stop))
                    self.write({key: leaf[piece] for key, leaf in leaves.items()})
        self._count(move.written)

    def filled(self) -> Leaves:
        """The filled part of every column, views [len, ...]."""
        return {key: column[: len(self)] for key, column in self._columns.items()}

    def check_valid(self) -> None:
        """Look for damage; on CUDA the host waits.

        Raises:
            PerTdError: it names the broken invariant: counts are in range and agree, and there is
                a row of memory for every slot.
        """
        require = validation.require_valid
        self._check_counts()
        require(self.epoch >= 0, "the offset of generations is at least 0")
        require(self.written_before >= 0, "the count before the last move is at least 0")
        require(
            not self._columns or list(self._columns) == list(self._schema.fields),
            "there is one column per key",
        )
        for key, column in self._columns.items():
            require(len(column) == self._rows, f"{named(key)} has memory for {self._rows} rows")

    def _check_counts(self) -> None:
        require = validation.require_valid
        require(self._written >= 0, "the write count is at least 0")
        require(self._write_count == self._written, "the write counts here and there agree")

    def gather(self, index: Tensor) -> tuple[list[Tensor], Tensor]:
        """Copies of the transitions in the slots `index` [B], and their `generation`.

        Returns:
            Contiguous tensors [B, ...] in the order of the keys; int64 [B].
        """
        if self._away:
            return self._fetched(index), self.generation(index)
        n = index.numel()
        kernel = self._kernels_for(n)
        if kernel is None or not index.is_contiguous():
            return self._select(index), self.generation(index)
        columns = self._columns.values()
        like = self._like
        if not like or like[0].shape[0] != n:
            like = self._like = rows.likes(columns, n)
        generation = torch.empty_like(index)
        leaves = rows.gather(
            kernel,
            columns,
            self._sizes,
            like,
            index,
            generation=generation,
            written=self._written,
            capacity=self.capacity,
        )
        return leaves, generation

    def _fetched(self, index: Tensor) -> list[Tensor]:
        """Rows [*B, ...] on the device of a storage in the host's memory; the host waits for it."""
        found = self._select(index.flatten().to(self.home))
        if self.place.storage == "pinned":  # what is pinned is copied while the host goes on
            found = [leaf.pin_memory().to(self.device, non_blocking=True) for leaf in found]
        else:
            found = [validation.to_device(leaf, self.device) for leaf in found]
        return [leaf.view(*index.shape, *leaf.shape[1:]) for leaf in found]

    def _select(self, index: Tensor) -> list[Tensor]:
        if self._block is None:
            return [rows.select(column, index) for column in self._columns.values()]
        records = self._block.index_select(0, index)
        return [view.contiguous() for view in self._views(records).values()]

    def leaves(self, index: Tensor) -> tuple[Leaves, Tensor]:
        """Copies of the transitions in the slots `index` [B], by key; their generations in batches.

        Generations are those that `in_ring` takes back.
        """
        leaves, generation = self.gather(index)
        if self.epoch:
            generation = generation + self.epoch
        return dict(zip(self._columns, leaves, strict=True)), generation

    def read(self, index: Tensor, extra: dict[str, Tensor]) -> TensorDict:
        """The transitions in the slots `index` [B], with these, `generation` and `extra`, [B]."""
        leaves, generation = self.leaves(index)
        tree = nested(leaves.items())
        tree.update(extra, index=index, generation=generation)
        return batch.make(tree, index.shape, self.device)


def _row_bytes(leaf: Tensor) -> int:
    """Length of a row of leaves [n, ...]."""
    return leaf.shape[1:].numel() * leaf.itemsize

"""Rings: the transitions of many buffers of one size, in one set of tensors."""

from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from tensordict import TensorDict
from torch import Tensor

from per_td import validation
from per_td.errors import SchemaError
from per_td.memory import Place
from per_td.storage import rows
from per_td.storage.generations import generation_of
from per_td.storage.leaves import Leaves, leaves_of, named, nested, require_tensors
from per_td.storage.moves import Move
from per_td.storage.ring import RingStorage

__all__ = ["Plan", "Rings", "as_mask", "compiled"]


class Plan(NamedTuple):
    """Where transitions [S, n] will go.

    Attributes:
        slot: slots in their own ring, int64 [S, n]; -1 for those masked.
        kept: which are to be written, bool [S, n]: not those masked, nor those that later ones of
            the same call would overwrite.
        written: how many each ring will ever have been written, int64 [S].
    """

    slot: Tensor
    kept: Tensor
    written: Tensor


@cache
def compiled() -> ModuleType:
    """The CPU kernels for many buffers; only where `kernels.wanted`."""
    from per_td.kernels.cpu import many

    return many


class Rings(RingStorage):
    """S rings of `capacity` slots, one after the other in the memory of one `RingStorage`.

    Each is written to and wraps on its own. One more row, at the end, is where everything goes
    that is not to be kept, so that no branch depends on data.

    Args:
        num_buffers: how many rings, S.
        capacity: number of slots of each.
        device, layout, place: as for `RingStorage`.
    """

    def __init__(
        self,
        num_buffers: int,
        capacity: int,
        device: torch.device,
        layout: str = "auto",
        place: Place | None = None,
    ) -> None:
        super().__init__(capacity, device, layout, place)
        self.num_buffers: int = num_buffers
        self._rows = num_buffers * capacity + 1
        self._written_each = torch.zeros(num_buffers, dtype=torch.int64, device=device)
        self._starts = torch.arange(0, self._rows - 1, capacity, device=device).unsqueeze(-1)

    def __len__(self) -> int:
        return int(self.lengths.min())

    @property
    def lengths(self) -> Tensor:
        """Number of filled slots of each ring, int64 [S]."""
        return self._written_each.clamp(max=self.capacity)

    @property
    def write_count(self) -> int:
        """How many transitions were ever written, to all rings."""
        return int(self._written_each.sum()) + self.written_before

    def ring_count(self) -> Tensor:
        """`written`, a copy."""
        return self._written_each.clone()

    @property
    def written(self) -> Tensor:
        """How many transitions were ever written to each ring, int64 [S]."""
        return self._written_each

    @property
    def size(self) -> Tensor:
        """`lengths`."""
        return self.lengths

    @property
    def data(self) -> TensorDict | None:
        """All slots, a TensorDict [S, capacity] in this memory; None before it is allocated."""
        if not self._columns:
            return None
        shape = [self.num_buffers, self.capacity]
        return TensorDict(
            nested((key, self._each(column)) for key, column in self._columns.items()),
            batch_size=shape,
            device=self.home,
        )

    def _each(self, column: Tensor) -> Tensor:
        """The rows of each ring, a view [S, capacity, ...]."""
        return column[:-1].view(self.num_buffers, self.capacity, *column.shape[1:])

    def generation(self, index: Tensor) -> Tensor:
        """How often a ring had wrapped when its slots `index` [S, B] were written; -1 if never."""
        return generation_of(index, self._written_each.unsqueeze(-1), self.capacity)

    def check_each(self, transitions: Any, *, batched: bool) -> tuple[Leaves, torch.Size]:
        """The leaves of transitions [S, n], or of one for each ring [S]; nothing is written.

        Returns:
            Leaves [S * n, ...] or [S, ...] by key, and the batch size.

        Raises:
            SchemaError: see `Schema.check`; or the batch size is not that.
        """
        leaves, lead = leaves_of(transitions), (self.num_buffers,)
        size = getattr(transitions, "batch_size", None)
        if size is None:  # a plain dict: the first tensor tells
            for key, leaf in leaves.items():
                if leaf.ndim <= batched:
                    expected = f"[{self.num_buffers}{', n' * batched}, ...]"
                    raise SchemaError(
                        f"{named(key)}: expected shape {expected}, got {list(leaf.shape)}"
                    )
            first = next(iter(leaves.values())).shape if leaves else ()
            size = torch.Size((*lead, *first[1 : 1 + batched]))
        elif len(size) != 1 + batched or size[:1] != lead:
            raise self._schema.wrong_batch_size(leaves, size, lead, batched=batched)
        return self.flat(leaves, size), size

    def size_of(self, leaves: Leaves) -> torch.Size:
        """The [S, n] of leaves [S, n, ...], as the first of them has it.

        Raises:
            SchemaError: they are no tensors, or the first has fewer dimensions.
        """
        require_tensors(leaves)
        key, leaf = next(iter(leaves.items()))
        if leaf.is_nested or leaf.ndim < 2:
            raise SchemaError(
                f"{named(key)}: expected shape [{self.num_buffers}, n, ...],"
                f" got {'a nested tensor' if leaf.is_nested else list(leaf.shape)}"
            )
        return torch.Size((self.num_buffers, leaf.shape[1]))

    def flat(self, leaves: Leaves, size: torch.Size) -> Leaves:
        """Leaves [*size, ...] with one dimension for all transitions, if they fit."""
        for key, leaf in leaves.items():
            if leaf.layout is not torch.strided or leaf.is_nested:
                validation.require_plain(named(key), leaf, SchemaError)
            if leaf.shape[: len(size)] != size:
                raise SchemaError(
                    f"{named(key)}: expected shape [{', '.join(map(str, size))}, ...],"
                    f" got {list(leaf.shape)}"
                )
        if len(size) > 1:
            leaves = {key: leaf.flatten(0, 1) for key, leaf in leaves.items()}
        self.check_leaves(leaves)
        return leaves

    def plan(self, n: int, mask: Tensor | None) -> Plan:
        """Where `n` transitions for each ring will go, but those where `mask` [S, n] is False."""
        before = self._written_each.unsqueeze(-1)
        if mask is None:
            place = before + torch.arange(n, device=self.device)
            after = before + n
            kept = place >= after - self.capacity
            return Plan(place.remainder(self.capacity), kept, after.squeeze(-1))
        place = before + mask.cumsum(-1) - 1
        after = before + mask.sum(-1, keepdim=True)
        kept = mask & (place >= after - self.capacity)
        slot = torch.where(mask, place.remainder_(self.capacity), -1)
        return Plan(slot, kept, after.squeeze(-1))

    def write_each(self, leaves: Leaves, plan: Plan) -> None:
        """Write checked leaves [S * n, ...] as planned."""
        self.allocate(leaves)
        row = torch.where(plan.kept, plan.slot + self._starts, self._rows - 1).flatten()
        row = row.to(self.home)
        new = [rows.plain(leaves[key], self.home) for key in self._columns]
        columns = self._columns.values()
        if self._kernels_for(len(row)) is None:
            rows.require_memory(new)
            for column, leaf in zip(columns, new, strict=True):
                rows.indexable(column)[row] = rows.indexable(leaf.detach())
        else:
            rows.scatter_at(compiled(), columns, self._sizes, new, row)
        self._written_each.copy_(plan.written)

    def filled(self) -> Leaves:
        """Every column as far as one of the rings is filled, views [S, longest, ...]."""
        longest = int(self.lengths.max())
        return {key: self._each(column)[:, :longest] for key, column in self._columns.items()}

    def _check_counts(self) -> None:
        validation.require_valid((self._written_each >= 0).all(), "write counts are at least 0")

    def check_state(self, leaves: Leaves) -> None:
        """Whether `restore` will take the leaves; raises SchemaError."""
        self.flat(leaves, next(iter(leaves.values())).shape[:2])

    def restore(self, leaves: Leaves, moves: list[Move]) -> None:
        """Take over what `filled` gave, which may be nothing, as the move of each ring tells."""
        if leaves:
            size = next(iter(leaves.values())).shape[:2]
            self.allocate(self.flat(leaves, size))
            for key, column in self._columns.items():
                for ring, leaf, move in zip(self._each(column), leaves[key], moves, strict=True):
                    at = 0
                    for part in move.parts:
                        end = at + part.stop - part.start
                        ring[at:end] = leaf[part].to(self.home)
                        at = end
        written = [move.written for move in moves]
        self._written_each.copy_(torch.tensor(written, dtype=torch.int64, device="cpu"))

    def gather(self, index: Tensor) -> tuple[list[Tensor], Tensor]:
        """Copies of the transitions in the slots `index` [S, B], and their `generation`.

        Returns:
            Contiguous tensors [S, B, ...] in the order of the keys; int64 [S, B].
        """
        if self._away:
            return self._fetched(index + self._starts), self.generation(index)
        n = index.numel()
        if self._kernels_for(n) is None or not index.is_contiguous():
            found = self._select((index + self._starts).flatten())
            batch = [leaf.view(*index.shape, *leaf.shape[1:]) for leaf in found]
            return batch, self.generation(index)
        columns = self._columns.values()
        like = self._like
        if not like or like[0].shape[:2] != index.shape:
            like = self._like = rows.likes(columns, *index.shape)
        memory = columns, self._sizes, like
        ever = self._written_each
        return rows.gather_each(compiled(), *memory, index, written=ever, capacity=self.capacity)


def as_mask(mask: Any, shape: torch.Size, device: torch.device) -> Tensor | None:
    """`mask` as bool [S, n] on `device`; None stays None.

    Raises:
        SchemaError: it is not of dtype bool, or of another shape.
    """
    if mask is None:
        return None
    mask = validation.as_tensor("mask", mask, SchemaError)
    mask = mask if mask.numel() else mask.bool()  # an empty list has no dtype
    if mask.dtype != torch.bool or mask.shape != shape:
        raise SchemaError(
            f"mask: expected bool of shape {list(shape)}, got {mask.dtype} of shape"
            f" {list(mask.shape)}"
        )
    return validation.to_device(mask, device)

"""RingStorage: S rings of transitions in preallocated memory; the newest overwrite the oldest."""

from array import array
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor

from per_td import kernels, validation
from per_td.errors import CheckpointError, ConfigurationError, SchemaError
from per_td.kernels import reference
from per_td.kernels.reference import Runs
from per_td.memory import Memory, allocating
from per_td.storage import layouts
from per_td.storage.layouts import Field
from per_td.storage.leaves import Leaves, flattened, named
from per_td.storage.schema import Schema
from per_td.storage.structure import Structure

_PIECE = 2**24
"""Bytes brought to the device at a time from a state that may be larger than memory."""


class Move(NamedTuple):
    """The move of a ring's transitions: the newest that fit stay, the oldest of them first.

    Attributes:
        parts: old slots, in order; the new slots are 0, 1, 2, ...
        written: number of transitions ever written, for the new ring.
        moved: True if a slot holds another transition than before.
    """

    parts: list[slice]
    written: int
    moved: bool

    @property
    def size(self) -> int:
        """Number of transitions that stay."""
        return sum(part.stop - part.start for part in self.parts)

    @classmethod
    def between(cls, written: int, old: int, new: int) -> "Move":
        """Plan the move from capacity `old`, after `written` transitions, to capacity `new`."""
        size = min(written, old)
        if old == new or written <= min(old, new):
            return cls([slice(0, size)], written, moved=False)
        kept = min(size, new)
        start = (written - kept) % old
        end = min(start + kept, old)
        parts = [slice(start, end), slice(0, kept - (end - start))]
        return cls([part for part in parts if part.start < part.stop], kept, moved=True)

    def applied(self, values: Tensor) -> Tensor:
        """Values of the slots that stay, [n], in their new order."""
        return torch.cat([values[part] for part in self.parts]) if self.parts else values[:0]


class RingStorage:
    """S rings of `capacity` slots, one ring after the other in one tensor per key.

    Transition number k of a ring (counting from 0, for ever) lives in slot k mod capacity; its
    generation is k // capacity. Memory is allocated when the first data, or an example, tells keys,
    shapes and dtypes; from then on anything else is refused. Each ring is written to and wraps on
    its own.

    Args:
        capacity: number of slots of each ring.
        device: device to which transitions are read.
        layout: "columns", "records" or "auto"; see `per_td.storage.layouts`.
        memory: kind of memory of the transitions; None: that of the device.
        groups: S rings, with results of shape [S, ...]; None: one, without.
        reserved: keys that transitions may not have, beside those of every batch.
    """

    epoch = 0
    """Offset of every generation handed out.

    It grows when slots change hands: when the ring is emptied, or a state of another capacity is
    loaded. No generation from before can match then.
    """

    written_before = 0
    """Transitions written before that load, which `ring_count` leaves out."""

    @torch.inference_mode(False)
    def __init__(
        self,
        capacity: int,
        device: torch.device,
        layout: str = "auto",
        memory: Memory | None = None,
        *,
        groups: int | None = None,
        reserved: tuple[str, ...] = (),
    ) -> None:
        self.capacity, self.device = capacity, device
        self.lead = () if groups is None else (groups,)
        self.groups = groups or 1
        self.kind = Memory() if memory is None else memory
        self.home = self.kind.home(device)
        self.layout = validation.one_of("layout", layout, layouts.LAYOUTS)
        self.starts = torch.arange(0, self.groups * capacity, capacity, device=self.home)
        self.starts = self.starts.unsqueeze(-1)
        self.record: Any = None
        self.begun: tuple[Any, int, Tensor | None] | None = None
        """Write counts after the last write, and what it was told, for `take_back`."""
        self._rows = self.groups * capacity + (groups is not None)  # a spare one for masked writes
        self._schema = Schema(reserved)
        self._block: Tensor | None = None
        self._leaves: Leaves = {}
        self.columns: Sequence[Tensor] = []
        self._bytes = 0
        self.written = self.kind.beside((self.groups,), torch.int64, device)
        """Number of transitions ever written to each ring, int64 [S], on the device."""
        self._ever = 0  # the same for a single ring, where no other process counts
        self._take_up()

    def _take_up(self) -> None:
        """Make the attributes that are neither sent to a process nor copied."""
        self._operations = kernels.operations(self.home)
        self._page = self.written.numpy() if self.written.is_cpu else None
        self.record = None
        if self._block is not None:
            self._leaves = self._views(self._block)
            self.columns = list(self._leaves.values())

    def __getstate__(self) -> dict[str, Any]:
        left: dict[str, Any] = {"_operations": None, "record": None, "columns": [], "_leaves": {}}
        return self.__dict__ | left | {"_page": None}

    @torch.inference_mode(False)
    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._take_up()

    # --- counts -----------------------------------------------------------------------------------

    @property
    def num_buffers(self) -> int | None:
        """Number of rings; None for one, without a dimension for it."""
        return self.lead[0] if self.lead else None

    @property
    def compiled(self) -> bool:
        """True if kernels copy rows, not plain torch."""
        return self._operations is not reference

    @property
    def _known(self) -> bool:
        """True if the host knows how much was written without waiting for the device."""
        return self.written.is_cpu or not self.lead

    @property
    def _one(self) -> int | None:
        """Write count of a single ring, if the host knows it; torch.compile traces it."""
        if self.groups > 1 or not self._known:
            return None
        if self._page is not None and self.kind.storage == "shared":
            return int(self._page[0])
        return self._ever

    def __len__(self) -> int:
        one = self._one
        return int(self.lengths.min()) if one is None else min(one, self.capacity)

    @property
    def lengths(self) -> Tensor:
        """Number of filled slots of each ring, int64 [] or [S], on the device."""
        lengths = self.written.clamp(max=self.capacity)
        return lengths if self.lead else lengths[0]

    @property
    def write_count(self) -> int:
        """Number of transitions ever written, to all rings."""
        one = self._one
        return (int(self.written.sum()) if one is None else one) + self.written_before

    @property
    def next_epoch(self) -> int:
        """Least offset beyond every generation handed out so far."""
        return self.epoch + -(-int(self.written.max()) // self.capacity)  # rounded up

    def ring_count(self) -> Any:
        """Number written since the last change of capacity: an int, or a copy, int64 [S]."""
        return self.written.clone() if self.lead else self._one

    def set_count(self, written: Tensor | int) -> None:
        """Set `written`, int64 [S], or one number for a single ring."""
        if isinstance(written, Tensor):
            self.written.copy_(written)
            if self.groups == 1 and self.written.is_cpu:
                self._ever = int(written)
            return
        self._ever = written
        if self._page is None:
            self.written.fill_(written)
        else:
            self._page[:] = written

    @property
    def nbytes(self) -> int:
        """Bytes of memory for the transitions; 0 before any data."""
        return 0 if self._block is None else self._block.nbytes

    def generation(self, index: Tensor) -> Tensor:
        """Generations of the slots `index`, int64 [B] or [S, B], since the last change of capacity.

        The generation is how often the ring had wrapped when the slot was written; -1 if it never
        was.
        """
        slot = index.view(self.groups, -1)
        ever = self.written.unsqueeze(-1)
        return reference.generations(slot, ever, self.capacity).view(index.shape)

    def in_ring(self, generation: Tensor) -> Tensor:
        """Generations that a batch brings back, as `generation` counts them."""
        return generation - self.epoch if self.epoch else generation

    def in_batch(self, generation: Tensor) -> Tensor:
        """Generations as batches have them: those that `in_ring` takes back."""
        return generation + self.epoch if self.epoch else generation

    def check_valid(self) -> None:
        """Raise PerTdError for damage; on CUDA the host waits.

        Counts are in range and agree, and there is a row of memory for every slot.
        """
        require = validation.require_valid
        require((self.written >= 0).all(), "the write count is at least 0")
        agree = self._one in (None, int(self.written[0]))
        require(agree, "the write counts here and there agree")
        require(self.epoch >= 0, "the offset of generations is at least 0")
        require(self.written_before >= 0, "the count before the last move is at least 0")
        for key, column in self._leaves.items():
            field = self._stored(self._schema.fields[key])
            right = column.shape == (self._rows, *field.shape) and column.dtype == field.dtype
            require(right, f"{named(key)} has memory for {self._rows} rows")

    # --- writing -----------------------------------------------------------------------------

    def check(self, transitions: Any, *, batched: bool = True) -> tuple[Leaves, int]:
        """Check transitions [n] or [S, n], or one of each ring, [] or [S]; nothing is written.

        Returns leaves [S * n, ...] by key (of one transition of one ring, [...] will do), and n.
        """
        return self._schema.check(transitions, self.lead, batched=batched)

    def check_example(self, example: Any) -> Leaves:
        """Check a transition of batch size [], of however many rings: leaves [1, ...] or [...]."""
        return self._schema.check(example, batched=False)[0]

    def check_leaves(self, leaves: Leaves) -> tuple[Leaves, int]:
        """`check` for leaves [n, ...] or [S, n, ...] that are no TensorDict."""
        if not self._leaves:
            self._schema.structure = Structure()
        return self._schema.check_leaves(leaves, self.lead)

    def with_env(self, leaves: Leaves, n: int, env: Any) -> Leaves:
        """Add the environment of each of `n` transitions, integers [n], where frames need them.

        Here nothing needs them, and ConfigurationError refuses any.
        """
        if env is not None:
            raise ConfigurationError(
                f"env: expected None, got {type(env).__name__}: it goes with frames={{...}}"
            )
        return leaves

    def allocate(self, leaves: Leaves) -> None:
        """Allocate memory for transitions like those in `leaves` [n, ...], unless done before.

        If there is not enough memory, nothing is fixed.
        """
        if not self._leaves:
            self._fix(leaves)

    def _allocate_stored(self, leaves: Leaves) -> None:
        """`allocate` for leaves as they are `stored`."""
        self.allocate(leaves)

    @torch.inference_mode(False)
    def _fix(self, leaves: Leaves) -> None:
        """Fix what a transition consists of, once there is memory for it."""
        told = [Field(key, leaf.shape[1:], leaf.dtype) for key, leaf in leaves.items()]
        fields = [self._stored(field) for field in told]
        size = sum(field.bytes for field in fields)
        layout = layouts.resolve_layout(
            self.layout, fields, compiled=self.compiled, mapped=self.kind.storage == "memmap"
        )
        what = f"{self._rows} transitions of {', '.join(named(field.key) for field in fields)}"
        with allocating(what, self._rows * size, self.kind.advice):
            length = layouts.bytes_of(layout, fields, self._rows)
            block = self.kind.zeros((length,), torch.uint8, self.home)
        self._schema.fix(told)
        self.layout, self._bytes, self._block = layout, size, block
        self._take_up()

    def _stored(self, field: Field) -> Field:
        """The field in memory of a field of a transition."""
        return field

    def _views(self, block: Tensor) -> Leaves:
        fields = [self._stored(field) for field in self._schema.fields.values()]
        views = layouts.views_of(self.layout, fields, block, self._rows)
        return dict(zip(self._schema.fields, views, strict=True))

    def next_slots(self, n: int, mask: Tensor | None = None) -> Tensor:
        """The slots of the next `n` transitions, int64 [n] or [S, n]; -1 where masked."""
        one = None if mask is not None else self._one
        if one is not None:
            start = one % self.capacity
            index = torch.arange(start, start + n, device=self.device)
            index = index if start + n <= self.capacity else index.remainder_(self.capacity)
            return index.unsqueeze(0) if self.lead else index
        before = self.written.unsqueeze(-1)
        if mask is None:
            return (before + torch.arange(n, device=self.device)).remainder_(self.capacity)
        place = before + mask.cumsum(-1) - 1
        return torch.where(mask, place.remainder_(self.capacity), -1)

    def runs(self, n: int, mask: Tensor | None = None) -> tuple[Runs, Tensor | int]:
        """Runs of slots for the next `n` transitions of each ring, and the write counts after them.

        A run is a first slot and a length, around the end. The counts are int64 [S], or a number
        for one.
        """
        capacity = self.capacity
        one = None if mask is not None else self._one
        if one is not None:
            after = one + n
            kept = min(n, capacity)
            return array("q", ((after - kept) % capacity, kept)), after
        many = np.full(self.groups, n) if mask is None else mask.sum(-1).numpy()
        ever = self.written.numpy() + many
        length = np.minimum(many, capacity)
        runs = np.stack([(ever - length) % capacity, length], 1)
        return array("q", runs.tobytes()), torch.from_numpy(ever)

    def write(self, leaves: Leaves, n: int, mask: Tensor | None = None) -> "Runs | None":
        """Write checked leaves over the oldest; of too many, the last remain.

        Args:
            leaves: [S * n, ...] by key; for a single transition of one ring, [...] will do.
            n: how many for each ring.
            mask: bool [S, n], on the device; False leaves a transition out.

        Returns:
            First slot and length of the write to each ring, around the end; None where the host
            does not know them.
        """
        self.allocate(leaves)
        new = [leaves[key] for key in self._leaves]
        if not self._known or (mask is not None and not mask.is_cpu):
            self._write_unknown(new, n, mask)
            return None
        runs, after = self.runs(n, mask)
        self.begun = after, n, mask
        self._operations_for(n).write_rows(self, new, n, runs, mask=mask)
        self.set_count(after)
        return runs

    def _write_unknown(self, new: list[Tensor], n: int, mask: Tensor | None) -> None:
        """`write` where the device alone knows the counts: no branch depends on data."""
        before, capacity = self.written.unsqueeze(-1), self.capacity
        if mask is None:
            place, after = before + torch.arange(n, device=self.device), before + n
            kept = place >= after - capacity
        else:
            place, after = before + mask.cumsum(-1) - 1, before + mask.sum(-1, keepdim=True)
            kept = mask & (place >= after - capacity)
        new = [validation.plain_rows(leaf.detach(), self.home) for leaf in new]
        self.begun = after.squeeze(-1), n, mask
        starts = self.starts.to(self.device)
        row = torch.where(kept, place.remainder_(capacity) + starts, self._rows - 1).flatten()
        row = row.to(self.home)
        for column, leaf in zip(self.columns, new, strict=True):
            reference.indexable(column)[row] = reference.indexable(leaf)
        self.set_count(after.squeeze(-1))

    def dead(self) -> Tensor | None:
        """Slots whose data is gone, or about to be, bool [capacity]; None: none.

        They stay so until `bury` is told that nothing can be drawn from them.
        """
        return None

    def slots(self, start: int, end: int) -> Tensor:
        """The slots from `start` up to `end`, int64 [n], but for those retired."""
        return torch.arange(start, end, device=self.device)

    def bury(self, dead: Tensor) -> None:
        """Retire the slots `dead`, and count them."""

    def of_living(self, index: Tensor, generation: Tensor | None) -> Tensor | None:
        """Make the generations of updates stale, int64 [B], where a slot of `index` is retired."""
        return generation

    def take_back(self) -> None:
        """Set the write counts to those before the write that has `begun`, if one has."""
        if self.begun is not None:
            after, n, mask = self.begun
            self.set_count(after - (n if mask is None else mask.sum(-1)))

    def _operations_for(self, n: int) -> ModuleType:
        """The operations, or plain torch where its threads share the copying of `n` rows."""
        if torch.compiler.is_compiling():
            return reference
        large = n * self.groups * self._bytes > layouts.SHARED_FROM and self.layout == "columns"
        return reference if large and torch.get_num_threads() > 1 else self._operations

    def empty(self, write_count: int) -> None:
        """Forget all transitions; every generation handed out so far is stale.

        To do it again, with the `write_count` of before, changes no more.
        """
        self.epoch = self.next_epoch
        self.set_count(0)
        self.written_before = write_count

    # --- reading ---------------------------------------------------------------------------

    def _each(self, column: Tensor) -> Tensor:
        """The rows of each ring, a view [capacity, ...] or [S, capacity, ...]."""
        own = column[: self.groups * self.capacity]
        return own.view(*self.lead, self.capacity, *column.shape[1:])

    @property
    def data(self) -> TensorDict | None:
        """All slots, a TensorDict [capacity] or [S, capacity] in this memory; None before any."""
        if not self._leaves:
            return None
        leaves = ((key, self._each(column)) for key, column in self._leaves.items())
        size = torch.Size([*self.lead, self.capacity])
        return self._schema.structure.assembled(leaves, {}, size, self.home)

    @property
    def shown(self) -> slice:
        """Slots to be shown of a tensor of all: the filled ones of one ring, or all of many."""
        return slice(None) if self.lead else slice(len(self))

    def filled(self) -> Leaves:
        """The filled slots by key, views [len, ...]; of many, [S, longest, ...]."""
        return self.stored()

    def stored(self) -> Leaves:
        """The filled part of every column, views [len, ...]; of many, [S, longest, ...]."""
        longest = len(self) if self.groups == 1 else int(self.lengths.max())
        each = {key: self._each(column) for key, column in self._leaves.items()}
        if self.lead:
            return {key: column[:, :longest] for key, column in each.items()}
        return {key: column[:longest] for key, column in each.items()}

    def operations(self, n: int) -> ModuleType | None:
        """Those that gather `n` rows of each ring; None if the rows are elsewhere than batches."""
        return self._operations_for(n) if self.home == self.device else None

    def gather(self, index: Tensor) -> tuple[list[Tensor], Tensor]:
        """Copies of the transitions in the slots `index` [B] or [S, B], and their `generation`.

        Contiguous tensors, like `index` with the rest of their shape, in the order of the keys;
        int64, like `index`.
        """
        operations = self.operations(index.shape[-1])
        if operations is None:
            return self._fetched(index), self.generation(index)
        found: tuple[list[Tensor], Tensor] = operations.gather(self, index, written=self.written)
        return found

    def _fetched(self, index: Tensor) -> list[Tensor]:
        """Rows on the device of a storage in the host's memory; the host waits for them."""
        found, _ = reference.gather(self, index.to(self.home), written=0)
        if self.kind.storage == "pinned":  # what is pinned is copied while the host goes on
            return [leaf.pin_memory().to(self.device, non_blocking=True) for leaf in found]
        return [validation.to_device(leaf, self.device) for leaf in found]

    def by_key(self, rows: list[Tensor]) -> Leaves:
        """Rows in the order of the keys as leaves."""
        return dict(zip(self._leaves, rows, strict=True))

    def batch(self, rows: list[Tensor], beside: dict[str, Tensor]) -> TensorDict:
        """A batch as users get it: rows in the order of the keys, and "index" and others beside."""
        leaves, size = zip(self._leaves, rows, strict=True), beside["index"].shape
        return self._schema.structure.assembled(leaves, beside, size, self.device)

    # --- states -----------------------------------------------------------------------------------

    @property
    def arguments(self) -> dict[str, Any]:
        """Settings of the buffer that this ring alone has."""
        return {}

    def counts(self) -> dict[str, int]:
        """Counters that this ring alone has."""
        return {}

    def frames_state(self, *, copy: bool) -> dict[str, Any] | None:
        """State of the frames that the `stored` leaves refer to; None: they do not."""
        return None

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Refuse the transitions of a state that `restore` will not take.

        SchemaError if they are not like those in here, CheckpointError if they refer to frames.
        """
        if state.get("frames") is not None:
            raise CheckpointError(
                "expected a state of whole transitions, got one of a buffer with"
                f" frames={state['settings'].get('frames')}"
            )
        if leaves := flattened(state["transitions"]):
            self.check_leaves(leaves)

    @property
    def structure(self) -> Structure:
        """The nested nodes of a transition, as the first data had them."""
        return self._schema.structure

    def restore(self, state: Mapping[str, Any], moves: list[Move], structure: Structure) -> None:
        """Take over the transitions of a state, maybe none, as the move of each ring tells.

        The state is such as `check_state` lets through. A ring that has data keeps its structure.
        """
        self._restore_leaves(flattened(state["transitions"]), moves, structure)

    def _restore_leaves(self, leaves: Leaves, moves: list[Move], structure: Structure) -> None:
        if leaves and not self._leaves:
            self._schema.structure = structure
        if leaves:
            each = {key: leaf if self.lead else leaf.unsqueeze(0) for key, leaf in leaves.items()}
            self._allocate_stored({key: leaf.flatten(0, 1) for key, leaf in each.items()})
            step = max(1, _PIECE // max(1, self._bytes))
            for s, move in enumerate(moves):
                at = s * self.capacity
                for part in move.parts:
                    for start in range(part.start, part.stop, step):
                        end = min(start + step, part.stop)
                        for key, column in self._leaves.items():
                            piece = each[key][s, start:end]
                            column[at : at + end - start] = validation.plain_rows(piece, self.home)
                        at += end - start
        if self.lead:
            written = [move.written for move in moves]
            self.set_count(torch.tensor(written, dtype=torch.int64, device="cpu"))
        else:
            self.set_count(moves[0].written)


def as_mask(mask: Any, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """`mask` as bool of this shape on `device`, or SchemaError."""
    mask = validation.as_tensor("mask", mask, SchemaError)
    mask = mask if mask.numel() else mask.bool()  # an empty list has no dtype
    if mask.dtype != torch.bool or mask.shape != shape:
        raise SchemaError(
            f"mask: expected bool of shape {list(shape)}, got {mask.dtype} of shape"
            f" {list(mask.shape)}"
        )
    return validation.to_device(mask, device).contiguous()

"""FrameRing: a ring of transitions whose stacks of frames are kept once, by reference."""

from collections.abc import Mapping
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from per_td import validation
from per_td.errors import CheckpointError, ConfigurationError, IndexRangeError, SchemaError
from per_td.kernels.reference import Runs
from per_td.memory import Memory
from per_td.storage.frame_store import GONE, FrameStore, depths_of, size_of
from per_td.storage.layouts import Field
from per_td.storage.leaves import Key, Leaves, flattened, named, nested
from per_td.storage.ring import Move, RingStorage
from per_td.storage.structure import Structure

_ENV: Key = ()
"""Key of the environments among checked leaves, which no entry of a user can have."""


class FrameRing(RingStorage):
    """A ring that takes and gives whole stacks, and stores references to frames.

    Where a slot's frames are overwritten before its transition is, `dead` names it. `frames` has
    the number of frames in a stack by key; `num_frames` are kept of each key, or by default 1.06
    for each slot, and a stack for each environment. The other arguments are those of `RingStorage`.
    """

    @torch.inference_mode(False)
    def __init__(
        self,
        capacity: int,
        device: torch.device,
        layout: str = "auto",
        memory: Memory | None = None,
        *,
        frames: Any,
        num_envs: int = 1,
        num_frames: int | None = None,
        reserved: tuple[str, ...] = (),
    ) -> None:
        self.depths, self._num_frames = depths_of(frames), num_frames
        self.num_envs = validation.positive_int("num_envs", num_envs)
        kind = Memory() if memory is None else memory
        self._stores = []
        for key, depth in self.depths.items():
            size = size_of(num_frames, capacity, depth, self.num_envs)
            self._stores.append(FrameStore(key, depth, size, self.num_envs, capacity, device, kind))
        self._by_key = {key: store for store in self._stores for key in store.keys}
        self.retired = kind.beside((), torch.int64, device)
        """Number of transitions retired, int64 []."""
        self._turns = torch.empty(0, dtype=torch.int64, device=kind.home(device))
        super().__init__(capacity, device, layout, memory, reserved=reserved)

    @property
    def nbytes(self) -> int:
        """Bytes of memory for transitions and frames; those of transitions 0 before any data."""
        blocks = [store.block for store in self._stores if store.block is not None]
        kept = (*blocks, *(store.low for store in self._stores))
        return super().nbytes + sum(memory.nbytes for memory in kept)

    # --- checks and memory ------------------------------------------------------------------------

    def check(self, transitions: Any, *, batched: bool = True) -> tuple[Leaves, int]:
        """See `RingStorage.check`."""
        leaves, n = super().check(transitions, batched=batched)
        self._require_stacks(leaves)
        return leaves, n

    def check_example(self, example: Any) -> Leaves:
        """See `RingStorage.check_example`."""
        leaves = super().check_example(example)
        self._require_stacks(leaves)
        return leaves

    def check_leaves(self, leaves: Leaves) -> tuple[Leaves, int]:
        """See `RingStorage.check_leaves`."""
        leaves, n = super().check_leaves(leaves)
        self._require_stacks(leaves)
        return leaves, n

    def _require_stacks(self, leaves: Leaves) -> None:
        if not self._leaves:  # later, the schema is known
            self._frame_fields(leaves)

    def _frame_fields(self, leaves: Leaves) -> list[Field]:
        """Check the stacks among leaves [n, ...]; return the fields of frames."""
        found = []
        for store in self._stores:
            stacks = [
                Field(key, leaf.shape[1:], leaf.dtype)
                for key in store.keys
                if (leaf := leaves.get(key)) is not None
            ]
            if store.key not in leaves:
                raise SchemaError(
                    f"{named(store.key)}: expected stacks of frames, got the keys"
                    f" {', '.join(map(named, leaves))}"
                )
            found.append(store.field_of(stacks[0], stacks[1] if len(stacks) > 1 else None))
        return found

    def with_env(self, leaves: Leaves, n: int, env: Any) -> Leaves:
        """See `RingStorage.with_env`.

        Raises:
            SchemaError: no environments are given, and `n` is not a multiple of their number.
            IndexRangeError: they are not integers [n], or there are no such environments.
        """
        if env is None:
            if n % self.num_envs:
                raise SchemaError(
                    f"expected a multiple of num_envs={self.num_envs} transitions, those of each"
                    f" environment in turn, got {n}: env tells which are there"
                )
            if len(self._turns) != n:
                turns = torch.arange(n, device=self.home)
                self._turns = turns.remainder_(self.num_envs)
            return {**leaves, _ENV: self._turns}
        env = validation.as_index(env, self.home, "env")
        if env.shape != (n,):
            raise IndexRangeError(f"env: expected shape [{n}], got {[*env.shape]}")
        if validation.can_raise(env) and not ((env >= 0) & (env < self.num_envs)).all():
            raise IndexRangeError(
                f"env: expected numbers of at least 0 and below {self.num_envs}, got"
                f" {int(env.min())} to {int(env.max())}; nothing was written"
            )
        return {**leaves, _ENV: env}

    def _fix(self, leaves: Leaves) -> None:
        try:
            for store, field in zip(self._stores, self._frame_fields(leaves), strict=True):
                store.allocate(field)
            super()._fix({key: leaf for key, leaf in leaves.items() if key != _ENV})
        except BaseException:
            for store in self._stores:
                store.release()
            raise

    def _stored(self, field: Field) -> Field:
        store = self._by_key.get(field.key)
        if store is None:
            return field
        return Field(field.key, torch.Size([store.depth]), torch.int32)

    # --- writing and reading ----------------------------------------------------------------------

    def write(self, leaves: Leaves, n: int, mask: Tensor | None = None) -> "Runs | None":
        """See `RingStorage.write`; to do it again finds the frames that it has stored."""
        self.allocate(leaves)
        new: Leaves = {}
        for key, leaf in leaves.items():  # all of them, before any frame is stored
            validation.require_plain(named(key), leaf, SchemaError)
            new[key] = validation.plain_rows(leaf.detach(), self.home)
        env, left = new[_ENV], max(0, n - self.capacity)
        start = ((self._one or 0) + left) % self.capacity
        if left:  # of too many, the last remain
            env = env[left:]
        stored = new.copy()  # what is interrupted is done again
        for store in self._stores:
            stacks = [new[key] for key in store.keys]
            if left:
                stacks = [stack[left:] for stack in stacks]
            found = store.write(stacks, env, start)
            for key, places in zip(store.keys, found, strict=True):
                stored[key] = torch.nn.functional.pad(places, (0, 0, left, 0)) if left else places
        return super().write(stored, n, mask)

    def _unfolded(self, rows: list[Tensor]) -> list[Tensor]:
        """Rows in the order of the keys, with stacks in place of references."""
        read = [self._by_key.get(key) for key in self._leaves]
        return [
            row if store is None else store.read(row) for store, row in zip(read, rows, strict=True)
        ]

    def by_key(self, rows: list[Tensor]) -> Leaves:
        """See `RingStorage.by_key`."""
        return super().by_key(self._unfolded(rows))

    def batch(self, rows: list[Tensor], beside: dict[str, Tensor]) -> TensorDict:
        """See `RingStorage.batch`."""
        return super().batch(self._unfolded(rows), beside)

    def filled(self) -> Leaves:
        """The filled slots by key, [len, ...]; the stacks are copies."""
        stored = self.stored()
        return dict(zip(stored, self._unfolded([*stored.values()]), strict=True))

    @property
    def data(self) -> TensorDict | None:
        """The filled slots, a TensorDict [len]; the stacks are copies. None before any."""
        if not self._leaves:
            return None
        size = torch.Size([len(self)])
        return self._schema.structure.assembled(self.filled().items(), {}, size, self.home)

    def empty(self, write_count: int) -> None:
        """See `RingStorage.empty`."""
        super().empty(write_count)
        for store in self._stores:
            store.forget()

    # --- retirement -------------------------------------------------------------------------------

    def dead(self) -> Tensor | None:
        """See `RingStorage.dead`."""
        dead = None
        for store in self._stores:
            floor = store.next_floor()
            if floor is not None:
                own = store.low < floor
                dead = own if dead is None else dead | own
        if dead is not None and dead.is_cpu and not dead.any():
            self.bury(dead)
            return None
        return dead

    def bury(self, dead: Tensor) -> None:
        """See `RingStorage.bury`."""
        for store in self._stores:
            store.low.masked_fill_(dead, GONE)
        self.retired += dead.sum()
        for store in self._stores:
            store.raise_floor(store.next_floor())

    def of_living(self, index: Tensor, generation: Tensor | None) -> Tensor | None:
        """See `RingStorage.of_living`."""
        if self.retired.is_cpu and not self.retired:
            return generation
        now = self.generation(index) if generation is None else generation
        low = self._stores[0].low.index_select(0, index.clamp(0, self.capacity - 1))
        return torch.where(low == GONE, -1, now) if now.shape == low.shape else now

    def slots(self, start: int, end: int) -> Tensor:
        """See `RingStorage.slots`."""
        slot = super().slots(start, end)
        return slot[self._stores[0].low[start:end] != GONE]

    def check_valid(self) -> None:
        """See `RingStorage.check_valid`."""
        super().check_valid()
        for store in self._stores:
            store.check_valid(len(self))
            for key in store.keys if self._leaves else ():
                places = self.stored()[key]
                right = ((places >= 0) & (places < store.size)).all()
                validation.require_valid(right, f"{named(key)} refers to frames that there are")

    # --- states -----------------------------------------------------------------------------------

    @property
    def arguments(self) -> dict[str, Any]:
        """See `RingStorage.arguments`."""
        return {
            "frames": nested(self.depths.items()),  # type: ignore[arg-type]
            "num_envs": self.num_envs,
            "num_frames": self._num_frames,
        }

    def counts(self) -> dict[str, int]:
        """See `RingStorage.counts`."""
        return {"retired": int(self.retired)}

    def frames_state(self, *, copy: bool) -> dict[str, Any]:
        """See `RingStorage.frames_state`."""
        stores = enumerate(self._stores if self._leaves else [])
        return {
            "retired": self.retired.clone(),
            "stores": {str(k): store.state(len(self), copy=copy) for k, store in stores},
        }

    def check_state(self, state: Mapping[str, Any]) -> None:
        """See `RingStorage.check_state`; whole transitions will do."""
        if state.get("frames") is not None:
            depths = depths_of(state["settings"]["frames"])
            if depths != self.depths:
                raise CheckpointError(
                    f"expected a state with frames={self.arguments['frames']}, got"
                    f" {state['settings']['frames']}"
                )
        if leaves := stand_ins(state):
            self.check_leaves(leaves)

    def restore(self, state: Mapping[str, Any], moves: list[Move], structure: Structure) -> None:
        """See `RingStorage.restore`."""
        (move,), leaves, given = moves, flattened(state["transitions"]), state.get("frames")
        if leaves and not self._leaves:
            self._schema.structure = structure
        if leaves:
            self.allocate(stand_ins(state))
        self.retired.zero_()
        if given is None:
            self._write_again(leaves, move)
            return
        for store in self._stores:
            store.forget()
        depths = depths_of(state["settings"]["frames"])  # maybe in another order than here
        for key, entry in zip(depths, given["stores"].values(), strict=False):
            store = self._by_key[key]
            found = store.restore(entry, [leaves[key] for key in store.keys], move)
            leaves.update(zip(store.keys, found, strict=True))
        self._restore_leaves(leaves, moves, structure)
        self.retired.copy_(given["retired"])

    def _allocate_stored(self, leaves: Leaves) -> None:
        """`restore` has allocated the memory."""

    def _write_again(self, leaves: Leaves, move: Move) -> None:
        """Write whole transitions, the oldest first, as if of each environment in turn."""
        for store in self._stores:
            store.forget()
        number, parts = move.written - move.size, move.parts
        if number:  # a ring that has wrapped, and stays as it is
            oldest = number % self.capacity
            parts = [slice(oldest, move.size), slice(0, oldest)]
        self.set_count(number)
        for part in parts if leaves else ():
            for start in range(part.start, part.stop, 1024):
                end = min(start + 1024, part.stop)
                piece = {key: leaf[start:end].to(self.home) for key, leaf in leaves.items()}
                env = torch.arange(number, number + end - start, device=self.home) % self.num_envs
                self.write({**piece, _ENV: env}, end - start)
                number += end - start
        self.set_count(move.written)


def make_ring(
    capacity: int,
    device: torch.device,
    layout: str,
    memory: Memory,
    *,
    groups: int | None,
    frames: Any,
    num_envs: int | None,
    num_frames: int | None,
    reserved: tuple[str, ...] = (),
) -> RingStorage:
    """Make the ring that these arguments of a buffer ask for, or raise ConfigurationError."""
    if frames is None:
        for name, value in (("num_envs", num_envs), ("num_frames", num_frames)):
            if value is not None:
                raise ConfigurationError(
                    f"{name}: expected None without frames={{...}}, got {value!r}"
                )
        return RingStorage(capacity, device, layout, memory, groups=groups, reserved=reserved)
    if groups is not None:
        raise ConfigurationError(
            f"frames: expected None with num_buffers={groups}, got {frames!r}: frames are kept for"
            " one buffer"
        )
    envs = 1 if num_envs is None else num_envs
    return FrameRing(
        capacity,
        device,
        layout,
        memory,
        frames=frames,
        num_envs=envs,
        num_frames=num_frames,
        reserved=reserved,
    )


def stand_ins(state: Mapping[str, Any]) -> Leaves:
    """Leaves with the shapes and dtypes of a state's transitions; whole stacks take no memory."""
    leaves, given = flattened(state["transitions"]), state.get("frames")
    for key, entry in zip(
        _keys_of(state), [] if given is None else given["stores"].values(), strict=False
    ):
        for each in (key, ("next", *key)):
            frames: Tensor = entry["frames"]
            shape = (*leaves[each].shape, *frames.shape[1:])
            one = torch.zeros(1, dtype=frames.dtype, device="cpu")
            leaves[each] = one.as_strided(shape, (0,) * len(shape))
    return leaves


def _keys_of(state: Mapping[str, Any]) -> list[Key]:
    return [*flattened(state["settings"].get("frames", {}))]

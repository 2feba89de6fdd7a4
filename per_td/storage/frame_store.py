"""FrameStore: the frames of stacked observations, each stored once."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from per_td import kernels, validation
from per_td.errors import ConfigurationError, SchemaError
from per_td.kernels import reference
from per_td.kernels.frame_search import factors
from per_td.memory import Memory, allocating
from per_td.storage.layouts import Field
from per_td.storage.leaves import Key, flattened, named, nested
from per_td.storage.ring import Move

LOOK_BACK = 32
"""Writes of an environment for which its frames are looked for: more than n + k for n-step."""

GONE = torch.iinfo(torch.int64).max
"""Oldest frame of a slot without a transition, or of one that is retired."""

_SPARE = 1.06
"""Frames for each slot, beside a stack for each environment."""

_PIECE = 2**24
"""Bytes of a state brought to the device at a time."""

_PART = 128
"""Transitions retire when the ring needs their frames, for one part of so many at a time."""


def depths_of(frames: Any) -> dict[Key, int]:
    """Check the argument `frames`; return the number of frames of a stack by key.

    The keys are in the order of the nested dict that a state holds. Anything else raises
    ConfigurationError.
    """
    depths: dict[Key, int] = {}
    for name, depth in frames.items() if isinstance(frames, Mapping) else ():
        nest = flattened(depth) if isinstance(depth, Mapping) else {(): depth}
        for rest, number in nest.items():
            key = (*(name if isinstance(name, tuple) else (name,)), *rest)
            if not key or not all(isinstance(part, str) for part in key) or key[0] == "next":
                raise ConfigurationError(f"frames: expected keys beside 'next', got {name!r}")
            if key in depths:
                raise ConfigurationError(f"frames: expected each key once, got {named(key)} again")
            depths[key] = validation.positive_int(f"frames, {named(key)}", number)
    if not depths:
        raise ConfigurationError(
            f"frames: expected the frames of a stack by key, as {{'pixels': 4}}, got {frames!r}"
        )
    for key in depths:
        for end in range(1, len(key)):
            if key[:end] in depths:
                raise ConfigurationError(
                    f"frames: expected no key inside of {named(key[:end])}, got {named(key)}"
                )
    return flattened(nested(depths.items()))  # type: ignore[arg-type,return-value]


def size_of(num_frames: int | None, capacity: int, depth: int, envs: int) -> int:
    """Number of frames to keep; ConfigurationError if too few for a transition, or too many."""
    least, most = 2 * depth, 2**31 - 2  # references are int32
    size = math.ceil(_SPARE * capacity) + depth * envs
    if num_frames is not None:
        size = validation.positive_int("num_frames", num_frames)
        if size < least:
            raise ConfigurationError(
                f"num_frames: expected at least {least}, the frames of one transition, got {size}"
            )
    if size > most:
        raise ConfigurationError(f"num_frames: expected at most {most}, got {size}")
    return max(size, least)


class FrameStore:
    """A ring of frames of one key; transitions hold references to them.

    Frame number f (counting from 0, for ever) lies in place f mod size. A new frame that equals one
    which its environment stored lately is not stored again. A frame that is not found is stored
    anew, so nothing is assumed of how stacks begin, or follow one another.

    Args:
        key: key of the first of two stacks; ("next", *key) is that of the second.
        depth: number of frames in a stack, k.
        size: number of frames.
        envs: number of environments E.
        capacity: number of slots.
        device: device of batches.
        memory: kind of memory of the frames.

    Attributes:
        low: number of the oldest frame of each slot, int64 [capacity], on the device; `GONE` where
            nothing can be drawn.
        waits: True if the host would wait for the cursor.
        since: then, most frames that may have been stored since slots last retired.

    See `per_td.kernels.parts.Frames` for others.
    """

    record: Any
    lanes: Tensor
    frames: Tensor

    @torch.inference_mode(False)
    def __init__(
        self,
        key: Key,
        depth: int,
        size: int,
        envs: int,
        capacity: int,
        device: torch.device,
        memory: Memory,
    ) -> None:
        self.key, self.depth, self.size, self.envs = key, depth, size, envs
        self.keys: tuple[Key, Key] = (key, ("next", *key))
        self.device, self.home, self.kind = device, memory.home(device), memory
        self.waits = self.home.type != "cpu"
        self.look_back, self.step, self.since = LOOK_BACK, size // _PART, 0
        rows, length = envs + 1, LOOK_BACK + 2 * depth
        self.recent = memory.beside((3, rows, length), torch.int64, self.home)
        self.counters = memory.beside((4, rows), torch.int64, self.home)
        self.page = memory.beside((2,), torch.int64, self.home)
        self.low = memory.beside((capacity,), torch.int64, device)
        self.block: Tensor | None = None
        self.field: Field | None = None
        self.forget()
        self._take_up()

    def _take_up(self) -> None:
        """Make the attributes that are neither sent to a process nor copied."""
        self._operations = kernels.operations(self.home)
        self.record = None
        if self.block is not None and self.field is not None:
            whole = self.block.view(self.size + 1, -1)
            words = whole.shape[1] // 8
            self.lanes = whole.view(torch.int64) if words * 8 == whole.shape[1] else whole
            self.factors = factors(self.lanes.shape[1], self.home)
            frames = self.block.view(self.field.dtype)
            self.frames = frames.view(self.size + 1, *self.field.shape)[: self.size]

    def __getstate__(self) -> dict[str, Any]:
        made = ("_operations", "record", "lanes", "factors", "frames")
        return {name: value for name, value in self.__dict__.items() if name not in made}

    @torch.inference_mode(False)
    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._take_up()

    # --- memory -----------------------------------------------------------------------------------

    def field_of(self, stacks: Field, following: Field | None) -> Field:
        """Check that both are fields of stacks of `depth` frames; return that of a frame."""
        first, second = map(named, self.keys)
        if following is None:
            raise SchemaError(f"{second}: expected the next stack of frames, got none")
        if len(stacks.shape) < 1 or stacks.shape[0] != self.depth or not stacks.bytes:
            expected = validation.shaped(self.depth, "...")
            raise SchemaError(
                f"{first}: expected frames of shape {expected}, got {[*stacks.shape]} in each"
                " transition"
            )
        if (following.shape, following.dtype) != (stacks.shape, stacks.dtype):
            raise SchemaError(
                f"{second}: expected {stacks.dtype} of shape {[*stacks.shape]}, as {first}, got"
                f" {following.dtype} of shape {[*following.shape]}"
            )
        return Field(self.key, stacks.shape[1:], stacks.dtype)

    @torch.inference_mode(False)
    def allocate(self, field: Field) -> None:
        """Make the memory for frames like this."""
        length = (self.size + 1) * field.bytes
        what = f"{self.size} frames of {named(self.key)}"
        with allocating(what, length, self.kind.advice):
            self.block = self.kind.zeros((length,), torch.uint8, self.home)
        self.field = field
        self._take_up()

    def release(self) -> None:
        """Give the memory back."""
        self.block = self.field = None
        for name in ("lanes", "factors", "frames"):
            self.__dict__.pop(name, None)

    def forget(self) -> None:
        """Forget all frames."""
        self.recent[1].fill_(-1)
        self.counters.zero_()
        self.page.zero_()
        self.low.fill_(GONE)
        self.since = self.step - self.size  # the ring has room for so many

    # --- frames -----------------------------------------------------------------------------------

    def write(self, stacks: list[Tensor], env: Tensor, start: int) -> list[Tensor]:
        """Store the frames of transitions that will lie in the slots from `start` on.

        Args:
            stacks: the first and the second of each transition, [n, k, ...] each.
            env: environment of each, int64 [n], on any device.
            start: first of their slots, at most as many as there are, around the end.

        Returns:
            References for both stacks, int32 [n, k] each.
        """
        self.since += 2 * self.depth * len(env)
        operations = reference if torch.compiler.is_compiling() else self._operations
        env = validation.to_device(env, self.home)
        found: list[Tensor]
        low: Any
        found, low = operations.store_frames(self, stacks, env)
        n, slots = len(low), len(self.low)
        head = min(n, slots - start)
        own: Any = self.low
        if own.is_cpu and not torch.compiler.is_compiling():  # numpy takes a third of the time
            own, low = own.numpy(), low.numpy()
        else:
            low = validation.to_device(low, self.device)
        own[start : start + head] = low[:head]
        if head < n:
            own[: n - head] = low[head:]
        return found

    def read(self, references: Tensor) -> Tensor:
        """Copies of the stacks of references int32 [..., k], [..., k, ...], on the device."""
        index = references.flatten().to(self.home)
        rows = reference.select(self.frames, index)
        found: Tensor = rows.view(*references.shape, *rows.shape[1:])
        if self.home == self.device:
            return found
        if self.kind.storage == "pinned":
            return found.pin_memory().to(self.device, non_blocking=True)
        return validation.to_device(found, self.device)

    # --- retirement -------------------------------------------------------------------------------

    def next_floor(self) -> Tensor | int | None:
        """Number below which frames are to be gone, or None if the ring needs none of them yet.

        Frames go in parts of the ring, so that slots retire now and then, not at each write. Where
        the host would wait for the cursor, it counts the most that may have been stored.
        """
        if self.waits:
            if self.since <= self.step:
                return None
            return torch.maximum(self.page[1], self.page[0] - self.size + self.step)
        cursor, floor = self.page.tolist()
        if cursor - self.size <= floor:
            return None
        most: int = cursor - self.size + self.step
        return most

    def raise_floor(self, floor: Tensor | int | None) -> None:
        """Let the frames below `floor` be gone."""
        if floor is not None:
            self.page[1] = floor
            self.since = 0

    def check_valid(self, filled: int) -> None:
        """Raise PerTdError for damage in the counts, or in the first `filled` slots."""
        require, (cursor, floor) = validation.require_valid, self.page.tolist()
        name, low = named(self.key), self.low
        require(min(floor, cursor) >= 0, f"the counts of frames of {name} are at least 0")
        require(cursor - self.size <= floor, f"only frames of {name} that are gone are overwritten")
        require((low[filled:] == GONE).all(), f"no frames of {name} belong to empty slots")
        living = low[low != GONE]
        right = (living >= max(floor, cursor - self.size)) & (living < cursor)
        require(right.all(), f"the frames of {name} of all transitions are there")
        require((self.recent[1] < cursor).all(), f"the recent frames of {name} have been stored")

    # --- states -----------------------------------------------------------------------------------

    def state(self, filled: int, *, copy: bool) -> dict[str, Any]:
        """The frames that there are, and what the first `filled` slots need; the host waits."""
        stored = self.page[0].clone()
        frames = self.frames[: min(int(stored), self.size)]
        return {
            "frames": frames.clone() if copy else frames,
            "stored": stored,
            "size": self.size,
            "low": self.low[:filled].clone(),
        }

    def restore(
        self, state: Mapping[str, Any], references: list[Tensor], move: Move
    ) -> list[Tensor]:
        """Take over the frames of a state that slots refer to, in their order.

        Args:
            state: from `state` of a store of any size.
            references: those of the filled slots there, int32 [n, k] for each stack.
            move: the move of the slots.

        Returns:
            References in their place. Where the frames do not fit, the slots of the oldest are
            those that `next_floor` leaves behind.
        """
        self.forget()
        size, stored = state["size"], int(state["stored"])
        low, frames, own = state["low"].cpu(), state["frames"], self.frames
        place = torch.cat([some.cpu() for some in references], 1).long()
        number = stored - 1 - (stored - 1 - place) % size
        living = torch.zeros_like(low, dtype=torch.bool)
        for part in move.parts:
            living[part] = True
        living &= low != GONE
        used = number[living].unique()
        number = torch.searchsorted(used, number)
        step = max(1, _PIECE // max(1, own[:1].nbytes))
        for start in range(max(0, len(used) - self.size), len(used), step):
            taken = torch.arange(start, min(start + step, len(used)), device="cpu")
            piece = reference.select(frames, (used[taken] % size).to(frames.device))
            to = (taken % self.size).to(self.home)
            piece = validation.plain_rows(piece, self.home)
            reference.indexable(own).index_copy_(0, to, reference.indexable(piece))
        low = move.applied(torch.where(living, number.amin(1), GONE))
        self.low[: len(low)] = low.to(self.device)
        self.page[0] = len(used)
        self.since = self.step + 1
        number = torch.where(living.unsqueeze(1), number % self.size, 0)
        return list(torch.split(number.int(), self.depth, 1))

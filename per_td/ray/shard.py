"""Shard: a prioritized buffer that answers messages, as a Ray actor or in the same process."""

import os
from typing import Any, NamedTuple

import torch
from tensordict import TensorDict

from per_td.buffer import PrioritizedReplayBuffer
from per_td.errors import CheckpointError
from per_td.ray import wire
from per_td.ray.log import Record, WriteAheadLog
from per_td.ray.wire import Array, Packed

_EPOCH_BITS = 32


class Report(NamedTuple):
    """The state of a shard, which every answer brings."""

    total: float
    """Sum of all masses."""
    smallest: float
    """Smallest positive mass; inf where there is none, and where nobody needs it."""
    size: int
    """Number of transitions."""
    written: int
    """Transitions ever written."""
    stale: int
    """Updates dropped because their transition had been overwritten, or lost with its shard."""
    refused: int
    """Invalid priorities refused on CUDA."""
    epoch: int
    """A number that changes with each start, after which slots may hold other transitions."""
    serial: int
    """Number of the report in this epoch."""


class Drawn(NamedTuple):
    """Transitions drawn from a shard."""

    report: Report
    packed: Packed
    slot: Array
    """int64 [n]."""
    generation: Array
    """int64 [n]; generations of different epochs differ."""
    mass: Array
    """float32 [n], at the moment of the draw."""


class Shard:
    """A part of a `ShardedReplayBuffer`.

    With a folder, every change of the buffer is in a log before it is acknowledged, and a new start
    goes on where the last one ended, to the bit.

    Args:
        settings: arguments of `PrioritizedReplayBuffer`, without its generator.
        seed: of the draws.
        folder: for checkpoints and the log; None keeps nothing.
        fsync: see `WriteAheadLog`.
        checkpoint_every: transitions written between two checkpoints.
    """

    def __init__(
        self,
        settings: dict[str, Any],
        *,
        seed: int,
        folder: str | None = None,
        fsync: bool = False,
        checkpoint_every: int | None = None,
    ) -> None:
        _warm_up(settings)
        self._buffer = PrioritizedReplayBuffer(**settings)
        self._buffer.generator = torch.Generator(self._buffer.device).manual_seed(seed)
        self._begin_epoch()
        self._every = checkpoint_every or self._buffer.capacity
        self._log: WriteAheadLog | None = None
        self._log_is_behind = False
        if folder is not None:
            log = WriteAheadLog(folder, fsync=fsync)
            if log.checkpoint is not None:
                self._buffer.restore(log.checkpoint)
            self._due = self._buffer.write_count + self._every
            for record in log.replay():
                self._apply(record)
            self._log = log

    def _begin_epoch(self) -> None:
        """Make updates for batches drawn before now stale: slots may hold other transitions."""
        self._epoch = int.from_bytes(os.urandom(4), "little") >> 1
        self._serial = 0

    # --- messages ---------------------------------------------------------------------------------

    def report(self) -> Report:
        """The state of the shard."""
        self._serial += 1
        stats = self._buffer.stats()
        return Report(
            float(self._buffer.total_mass),
            float(self._buffer.smallest_mass),
            len(self._buffer),
            stats["written"],
            stats["stale_updates"],
            stats["refused_priorities"],
            self._epoch,
            self._serial,
        )

    def extend(self, packed: Packed, priority: Array | None = None) -> tuple[Report, Array]:
        """Write transitions; the answer acknowledges them.

        Returns:
            The report, and their slots, int64 [n].

        Raises:
            SchemaError, PriorityError: as for `PrioritizedReplayBuffer.extend`; nothing is written.
        """
        given = None if priority is None else wire.tensor(priority)
        index = self._buffer.extend_leaves(wire.unpack(packed), given)
        extra: Packed = [] if priority is None else [(("priority",), "float32", priority)]
        self._note("extend", {"given": priority is not None}, [*extra, *packed])
        if self._log is not None and self._buffer.write_count >= self._due:
            self.checkpoint()
        return self.report(), wire.array(index)

    def sample(self, n: int) -> Drawn | Report:
        """Draw `n` transitions; returns only a report if there is nothing to draw."""
        if not self._buffer.total_mass > 0:
            return self.report()
        drawn = self._buffer.draw_leaves(n)
        packed = wire.pack(drawn.leaves)
        generation = wire.array(drawn.generation) + (self._epoch << _EPOCH_BITS)
        slot, mass = wire.array(drawn.slot), wire.array(drawn.mass)
        return Drawn(self.report(), packed, slot, generation, mass)

    def update(self, index: Array, td_error: Array, generation: Array | None = None) -> Report:
        """Set priorities to |td_error| + eps; stale updates are dropped and counted.

        Raises:
            IndexRangeError, PriorityError: as for `PrioritizedReplayBuffer.update_priority`.
        """
        lost = 0
        if generation is not None:
            # an index of another epoch may name no filled slot now, so the buffer must not see it
            live = (generation >> _EPOCH_BITS) == self._epoch
            lost = int((~live).sum())
            index, td_error = index[live], td_error[live]
            generation = generation[live] & ((1 << _EPOCH_BITS) - 1)
        named: Packed = [(("index",), "int64", index), (("td_error",), "float32", td_error)]
        if generation is not None:
            named.append((("generation",), "int64", generation))
        if len(index):
            self._update(named)
        self._buffer.count_stale(lost)  # once nothing has been refused
        if len(index):
            self._note("update", {}, named)
        return self.report()

    def configure(self, *, alpha: float, eps: float) -> Report:
        """Set alpha, which costs O(N), and eps."""
        changed = (alpha, eps) != (self._buffer.alpha, self._buffer.eps)
        self._buffer.alpha, self._buffer.eps = alpha, eps
        if changed:
            self._note("configure", {"alpha": alpha, "eps": eps}, [])
        return self.report()

    def priority(self) -> Array:
        """Raw priorities, float32 [size]."""
        return wire.array(self._buffer.priority)

    def transitions(self) -> Packed:
        """All transitions, [size], in the order of their slots."""
        return wire.pack(self._buffer.filled_leaves())

    def checkpoint(self) -> None:
        """Write the whole state to the folder, and begin a new log.

        Raises:
            CheckpointError: the shard has no folder.
        """
        if self._log is None:
            raise CheckpointError("expected a buffer with a checkpoint_dir, got one without")
        self._log.rotate(self._buffer.save)
        self._log_is_behind = False
        self._due = self._buffer.write_count + self._every

    def save(self, path: str) -> None:
        """Write the whole state to a file."""
        self._buffer.save(path)

    def load(self, path: str) -> Report:
        """Take over a state that `save` wrote."""
        self._buffer.restore(path)
        self._begin_epoch()
        if self._log is not None:
            self.checkpoint()  # the log goes on from the new state
        return self.report()

    # --- restoring --------------------------------------------------------------------------------

    def _note(self, kind: str, values: dict[str, Any], arrays: Packed) -> None:
        """Log a change. After a failure only a checkpoint makes the log complete again."""
        if self._log is None:
            return
        if self._log_is_behind:
            self.checkpoint()
            return
        self._log_is_behind = True
        self._log.append(Record(kind, values, arrays))
        self._log_is_behind = False

    def _apply(self, record: Record) -> None:
        """Repeat a logged change."""
        kind, values, arrays = record
        if kind == "extend":
            given = int(values["given"])
            priority = wire.tensor(arrays[0][2]) if given else None
            self._buffer.extend_leaves(wire.unpack(arrays[given:]), priority)
        elif kind == "update":
            self._update(arrays)
        else:
            self._buffer.alpha, self._buffer.eps = values["alpha"], values["eps"]

    def _update(self, arrays: Packed) -> None:
        """Update priorities: index, td_error and maybe generation, [B] each."""
        self._buffer.update_priority(*wire.unpack(arrays).values())


def _warm_up(settings: dict[str, Any]) -> None:
    """Load the kernels now: the first message must not look like a shard that is too slow."""
    small = PrioritizedReplayBuffer(**settings | {"capacity": 2, "example": None})
    data = torch.zeros(2, dtype=torch.float32, device=small.device)
    small.extend(TensorDict({"x": data}, [2]))
    small.update_priority(small.sample(2)["index"], data)

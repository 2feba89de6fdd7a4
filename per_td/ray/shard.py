"""Shard: a prioritized buffer that answers messages, as a Ray actor or in the same process."""

import os
from typing import Any, NamedTuple

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor

from per_td import validation
from per_td.buffer import PrioritizedReplayBuffer
from per_td.checkpoint import file as checkpoint
from per_td.checkpoint import state as states
from per_td.errors import CheckpointError
from per_td.ray import wire
from per_td.ray.log import Record, WriteAheadLog
from per_td.ray.wire import PLAIN, Array, Packed, Told
from per_td.storage.leaves import Leaves, count, leaves_of, named
from per_td.storage.structure import Structure

_EPOCH_BITS = 32

LIVE = ("alpha", "eps", "priority_clip")
"""Settings of the buffer that may change."""

EXACT = {"exact": True}
"""Marks an update that brings raw priorities."""


class Report(NamedTuple):
    """The state of a shard, which every answer brings."""

    total: float  # of all masses
    smallest: float  # positive mass; inf where there is none, and where nobody needs it
    size: int  # number of transitions
    written: int  # transitions ever written
    stale: int  # updates whose transition had been overwritten, or lost with its shard
    refused: int  # invalid priorities on CUDA
    epoch: int  # changes with each start, after which slots may hold other transitions
    serial: int  # number of the report in this epoch


class Drawn(NamedTuple):
    """Transitions drawn from a shard, for one batch after the other."""

    report: Report
    packed: Packed
    slot: Array  # int64 [n]
    generation: Array  # int64 [n]; generations of different epochs differ
    mass: Array  # float32 [n], at the moment of the draw
    told: Told | None = None  # the structure; None if it is the one that the learner knows
    draw_count: Array | None = None  # int32 [n]; None if nobody counts


class Shard:
    """A part of a `ShardedReplayBuffer`.

    With a folder, every change of the buffer is in a log before it is acknowledged, and a new start
    goes on where the last one ended, to the bit. `settings` are arguments of
    `PrioritizedReplayBuffer`; `told` is the structure of the example in them, with tensorclasses.
    """

    def __init__(
        self,
        settings: dict[str, Any],
        *,
        seed: int,
        folder: str | None = None,
        fsync: bool = False,
        checkpoint_every: int | None = None,
        num_shards: int = 1,
        told: Told | None = None,
    ) -> None:
        _warm_up(settings)
        self._buffer = PrioritizedReplayBuffer(**settings)
        self._buffer.generator = torch.Generator(self._buffer.device).manual_seed(seed)
        self._begin_epoch()
        self._every = checkpoint_every or self._buffer.capacity
        self._settings = settings | {
            "folder": folder,
            "fsync": fsync,
            "checkpoint_every": checkpoint_every,
            "num_shards": num_shards,
        }
        self._told = told
        self._log = None if folder is None else WriteAheadLog(folder, fsync=fsync)
        self._log_is_behind = False
        if self._log is not None:
            if self._log.checkpoint is not None:
                self._restore(self._log.checkpoint)
            self._due = self._buffer.write_count + self._every
            for record in self._log.replay():
                self._apply(record)
        self._recall()

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

    def extend(
        self, packed: Packed, priority: Array | None = None, told: Told | None = PLAIN
    ) -> tuple[Report, Array] | None:
        """Write transitions; the answer, with their slots, int64 [n], acknowledges them.

        Their structure, `told`, counts if they are the first. The answer is None, and nothing is
        written, if it is needed and missing: call again.
        """
        values: dict[str, Any] = {"given": priority is not None}
        if self._told is None:
            if told is None:
                return None
            values["nodes"] = told.nodes
        arrays = packed if priority is None else [(("priority",), "float32", priority), *packed]
        index = self._write(values, arrays)
        self._told = self._told or told
        self._note("extend", values, arrays)
        if self._log is not None and self._buffer.write_count >= self._due:
            self.checkpoint()
        return self.report(), wire.array(index)

    def sample(self, counts: list[int], known: str = "") -> Drawn | Report:
        """Draw `counts` for several batches; returns only a report if there is nothing to draw.

        The transitions of the first batch come first, then those of the second, and so on. `known`
        is the name of the structure that the learner knows.
        """
        if not self._buffer.total_mass > 0:
            return self.report()
        # Independent draws may be cut anywhere; stratified ones go through the slots in order, and
        # each batch brings the counts of its own moment
        each = self._buffer.draw == "stratified" or self._buffer.track_draws
        apart = counts if each else [sum(counts)]
        draws = [self._buffer.draw_leaves(n) for n in apart if n]
        parts = [wire.pack(drawn.leaves) for drawn in draws]

        def column(name: str) -> Array:
            return np.concatenate([wire.array(getattr(drawn, name)) for drawn in draws])

        return Drawn(
            self.report(),
            parts[0] if len(parts) == 1 else wire.joined(parts),
            column("slot"),
            column("generation") + (self._epoch << _EPOCH_BITS),
            column("mass"),
            None if self._told is None or self._told.name == known else self._told,
            column("draw_count") if self._buffer.track_draws else None,
        )

    def update(
        self,
        index: Array,
        value: Array,
        generation: Array | None = None,
        how: dict[str, Any] | None = None,
    ) -> Report:
        """Set priorities, float32 [B]; stale updates are dropped and counted.

        `how` has `mode` and `rate` for TD errors, or is `EXACT`, for raw priorities.
        """
        how = how or {}
        lost = 0
        if generation is not None:
            # an index of another epoch may name no filled slot now, so the buffer must not see it
            live = (generation >> _EPOCH_BITS) == self._epoch
            lost = int((~live).sum())
            index, value = index[live], value[live]
            generation = generation[live] & ((1 << _EPOCH_BITS) - 1)
        named: Packed = [(("index",), "int64", index), (("td_error",), "float32", value)]
        if generation is not None:
            named.append((("generation",), "int64", generation))
        if len(index):
            self._update(how, named)
        self._buffer.count_stale(lost)  # once nothing has been refused
        if len(index):
            self._note("update", how, named)
        return self.report()

    def configure(self, **settings: Any) -> Report:
        """Set some of `LIVE`; alpha costs O(N)."""
        changed = any(getattr(self._buffer, name) != value for name, value in settings.items())
        self._configure(settings)
        if changed:
            self._note("configure", settings, [])
        return self.report()

    def differences(self, asked: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
        """This shard's value and the one asked for, by the name of each setting that differs.

        `asked` has the arguments of this class and, in one dict with them, those of the buffer.
        """
        has = self._settings | {name: getattr(self._buffer, name) for name in (*LIVE, "device")}
        wanted = asked | {"device": validation.resolve_device(asked.get("device", "cpu"))}
        for settings in (has, wanted):
            if settings["checkpoint_every"] is None:
                settings["checkpoint_every"] = settings["capacity"]
        example, data = wanted.pop("example", None), self._buffer.transitions
        if example is not None:
            has["example"] = None if data is None else _fields(leaves_of(data), 1)
            wanted["example"] = _fields(leaves_of(example), 0)
        pairs = {name: (has.get(name), value) for name, value in wanted.items()}
        return {name: (here, there) for name, (here, there) in pairs.items() if here != there}

    def priority(self) -> Array:
        """Raw priorities, float32 [size]."""
        return wire.array(self._buffer.priority)

    def draw_count(self) -> Array:
        """Number of draws of each transition, int32 [size]; only with `track_draws`."""
        return wire.array(self._buffer.draw_count)

    def transitions(self) -> Packed:
        """All transitions, [size], in the order of their slots."""
        return wire.pack(self._buffer.filled_leaves())

    def checkpoint(self) -> None:
        """Write the whole state to the folder, and begin a new log."""
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
        self._restore(path)
        self._recall()
        self._begin_epoch()
        if self._log is not None:
            self.checkpoint()  # the log goes on from the new state
        return self.report()

    # --- restoring --------------------------------------------------------------------------------

    def _restore(self, path: str | os.PathLike[str]) -> None:
        """Take over a saved state, with all settings that may have changed since the start."""
        state = states.check(checkpoint.read(path, states.FORMAT))
        self._buffer.load_state_dict(state)
        saved = state["settings"]
        self._configure({name: saved[name] for name in LIVE if name in saved})

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
            self._write(values, arrays)
        elif kind == "update":
            self._update(values, arrays)
        else:
            self._configure(values)

    def _configure(self, settings: dict[str, Any]) -> None:
        for name, value in settings.items():
            setattr(self._buffer, name, value)

    def _recall(self) -> None:
        """Take the structure of the buffer's transitions, which may come from a file, as told."""
        data = self._buffer.transitions
        if self._told is None and data is not None:
            self._told = wire.tell(Structure.of(data, 1))

    def _write(self, values: dict[str, Any], arrays: Packed) -> Tensor:
        """Write transitions of a record; priorities come before them, `nodes` with the first."""
        given, nodes = int(values["given"]), values.get("nodes")
        priority = wire.tensor(arrays[0][2]) if given else None
        leaves = wire.unpack(arrays[given:])
        if nodes is None or nodes == PLAIN.nodes:
            return self._buffer.extend_leaves(leaves, priority)
        size, cpu = torch.Size([count(leaves)]), torch.device("cpu")
        data = Structure.from_state(nodes).assembled(leaves.items(), {}, size, cpu)
        return self._buffer.extend(data, priority)

    def _update(self, how: dict[str, Any], arrays: Packed) -> None:
        """Repeat or make an update with index, value and maybe generation, [B] each."""
        index, value, *rest = wire.unpack(arrays).values()
        generation = rest[0] if rest else None
        if how == EXACT:
            self._buffer.set_priority(index, value, generation)
        else:
            self._buffer.update_priority(index, value, generation, **how)


def _warm_up(settings: dict[str, Any]) -> None:
    """Load the kernels now: the first message must not look like a shard that is too slow."""
    small = PrioritizedReplayBuffer(**settings | {"capacity": 2, "example": None})
    data = torch.zeros(2, dtype=torch.float32, device=small.device)
    small.extend(TensorDict({"x": data}, [2]))
    small.update_priority(small.sample(2)["index"], data)


def _fields(leaves: Leaves, dims: int) -> str:
    """Key, dtype and shape of each leaf, without its first `dims` dimensions."""
    return ", ".join(
        f"{named(key)}: {leaf.dtype} {list(leaf.shape[dims:])}"
        for key, leaf in sorted(leaves.items())
    )

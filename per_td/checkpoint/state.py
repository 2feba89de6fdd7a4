"""The state of a buffer as tensors and plain values, and back, also into another capacity."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from tensordict import TensorDict
from torch import Tensor

from per_td.checkpoint import file as checkpoint
from per_td.checkpoint.state_values import check_values
from per_td.errors import (
    AllocationError,
    CheckpointError,
    ConfigurationError,
    DiskAllocationError,
)
from per_td.priorities.table import PriorityTable, plain_clip
from per_td.storage.frame_ring import stand_ins
from per_td.storage.leaves import nested
from per_td.storage.ring import Move, RingStorage
from per_td.storage.structure import Structure

FORMAT = "per_td.PrioritizedReplayBuffer"
_KEYS = {
    "format",
    "version",
    "settings",
    "beta",
    "write_count",
    "ever_max",
    "stale_updates",
    "refused_priorities",
    "priority",
    "transitions",
    "generator",
}
_LATER_KEYS = {
    "ranks",
    "replayed",
    "mass",
    "epoch",
    "written_before",
    "structure",
    "n_step",
    "updates",
    "draw_count",
    "frames",
}
"""Keys that earlier states may lack."""


def check(state: Any) -> dict[str, Any]:
    """`state` if it is one that this version, or an earlier one, wrote; else CheckpointError."""
    checkpoint.require(FORMAT, state)
    version, last = state.get("version"), checkpoint.VERSION
    if not isinstance(version, int) or not 1 <= version <= last:
        raise CheckpointError(f"expected a state of version 1 to {last}, got version {version!r}")
    if state.keys() - _LATER_KEYS != _KEYS:
        raise CheckpointError(f"expected the keys {sorted(_KEYS)}, got {sorted(map(str, state))}")
    check_values(state)
    checked: dict[str, Any] = state
    return checked


def _moved(values: Tensor, moves: list[Move], capacity: int) -> Tensor:
    """Values of the slots, [n] or [S, n], moved to the slots of rings of another capacity."""
    if values.ndim == 1:
        return moves[0].applied(values)
    out = values.new_zeros(len(values), capacity)
    for row, ring, move in zip(out, values, moves, strict=True):
        kept = move.applied(ring)
        row[: len(kept)] = kept
    return out


class Parts(NamedTuple):
    """The parts of a buffer that are saved.

    Attributes:
        ring: transitions.
        table: priorities.
        beta: float64 [], or [S], equal where the table has no `betas`.
        stale, updates: counts of stale updates and of calls that a schedule counts, int64 [].
        generator: source of the draws.
    """

    ring: RingStorage
    table: PriorityTable
    beta: Tensor
    stale: Tensor
    updates: Tensor
    generator: torch.Generator | None


def state_of(parts: Parts, settings: dict[str, Any], *, copy: bool) -> dict[str, Any]:
    """The whole state; `settings` are the buffer's own, beside those of its parts.

    Transitions are copied, or those in the buffer's memory.
    """
    ring, table, beta, stale, updates, generator = parts
    stored, frames = ring.stored(), ring.frames_state(copy=copy)
    transitions = {key: leaf.clone() for key, leaf in stored.items()} if copy else stored
    own = table.distribution.state(table.trees, len(ring))
    counts = table.draw_count
    return {
        "format": FORMAT,
        "version": checkpoint.VERSION,
        "settings": {
            "capacity": ring.capacity,
            **settings,
            **table.arguments,
            "priority_clip": plain_clip(table.priority_clip),
            "num_buffers": ring.num_buffers,
            **ring.arguments,
        },
        "beta": (beta if table.betas else beta.view(-1)[0]).clone(),
        "write_count": ring.ring_count(),
        "written_before": ring.written_before,
        "epoch": ring.epoch,
        "ever_max": table.ever_max.clone(),
        "stale_updates": stale.clone(),
        "updates": updates.clone(),
        "refused_priorities": table.refused.clone(),
        "priority": table.raw[ring.shown].clone(),
        "mass": table.mass[ring.shown].clone() if own is None else None,
        "replayed": table.replayed[: 0 if ring.lead else len(ring)].clone(),
        "draw_count": None if counts is None else counts[ring.shown].clone(),
        "ranks": own,
        "transitions": nested(transitions.items()),
        "structure": ring.structure.state(),
        "generator": None if generator is None else generator.get_state(),
        **({} if frames is None else {"frames": frames}),
    }


def example_of(state: dict[str, Any]) -> TensorDict | None:
    """A transition like those of a checked state, []; None if it knows no keys."""
    leaves = stand_ins(state)
    lead = 1 if state["settings"].get("num_buffers") is None else 2
    one = ((key, leaf.new_zeros(leaf.shape[lead:])) for key, leaf in leaves.items())
    size, home = torch.Size([]), torch.device("cpu")
    return _structure_of(state).assembled(one, {}, size, home) if leaves else None


def _structure_of(state: dict[str, Any]) -> Structure:
    return Structure.from_state(state.get("structure", "[]"))


def _write_counts(state: dict[str, Any]) -> list[int]:
    """Number of transitions ever written to each ring."""
    counts: list[int] = torch.as_tensor(state["write_count"], device="cpu").reshape(-1).tolist()
    return counts


def _moves(ring: RingStorage, state: dict[str, Any]) -> list[Move]:
    """The move of each ring's transitions into the capacity of `ring`."""
    settings = state["settings"]
    if settings.get("num_buffers") != ring.num_buffers:
        raise CheckpointError(
            f"expected a state with num_buffers={ring.num_buffers},"
            f" got {settings.get('num_buffers')}"
        )
    capacity = settings["capacity"]
    counts = _write_counts(state)
    return [Move.between(count, capacity, ring.capacity) for count in counts]


@torch.no_grad()
def restore(parts: Parts, state: Any) -> None:
    """Take over a state, but for the settings of the buffer itself.

    One that is no state for these parts raises CheckpointError or SchemaError; nothing is changed.
    """
    settings = check(state)["settings"]
    ring, table, beta, stale, updates, generator = parts
    moves, own_epoch = _moves(ring, state), ring.next_epoch
    ring.check_state(state)
    try:
        mix = table.require_mix(settings.get("uniform_mix", table.uniform_mix))
    except ConfigurationError as error:
        raise CheckpointError(f"settings: {error}") from error
    before = None if generator is None else generator.get_state()
    if generator is not None and state["generator"] is not None:
        _continue(generator, state["generator"])
    try:
        ring.restore(state, moves, _structure_of(state))
    except (AllocationError, DiskAllocationError):  # the last that may be refused
        if generator is not None and before is not None:
            generator.set_state(before)
        raise
    moved = any(move.moved for move in moves)
    counts = _write_counts(state)
    ring.epoch = state.get("epoch", 0)
    if moved:  # slots changed hands: every generation handed out so far, there or here, is stale
        its_epoch = ring.epoch + -(-max(counts) // settings["capacity"])  # rounded up
        ring.epoch = max(its_epoch, own_epoch)
    ring.written_before = state.get("written_before", 0)
    ring.written_before += sum(counts) - sum(move.written for move in moves)
    table.alpha, table.eps = settings["alpha"], settings["eps"]
    table.uniform_mix = mix
    table.priority_clip = settings.get("priority_clip", table.priority_clip)
    each = state["beta"].ndim > 0
    table.betas = table.betas or each  # while they may differ
    beta.copy_(state["beta"])
    table.betas = each
    stale.copy_(state["stale_updates"])
    updates.copy_(torch.as_tensor(state.get("updates", 0), device="cpu"))
    _restore_priorities(parts, state, moves)
    table.retire(ring)
    table.refused.copy_(state["refused_priorities"])


def _restore_priorities(parts: Parts, state: dict[str, Any], moves: list[Move]) -> None:
    ring, table = parts.ring, parts.table
    moved = any(move.moved for move in moves)

    def placed(values: Tensor) -> Tensor:
        if moved or (values.ndim > 1 and values.shape[1] != ring.capacity):
            values = _moved(values, moves, ring.capacity)
        return values.to(table.device)

    mass = None  # then what follows from the priorities, in their exact order
    ranked = table.prioritization == "rank"  # masses of another kind mean nothing
    if not ranked and state.get("mass") is not None:
        mass = placed(state["mass"])
    elif ranked and state.get("ranks") is not None and not moved:
        mass = table.distribution.load(table.trees, state["ranks"])
    table.restore(placed(state["priority"]), state["ever_max"], mass)
    if state.get("draw_count") is not None and table.draw_count is not None:
        counts = placed(state["draw_count"])
        table.draw_count[..., : counts.shape[-1]] = counts
    if "replayed" in state and not ring.lead:
        replayed = placed(state["replayed"])
        table.replayed[: len(replayed)] = replayed


def _continue(generator: torch.Generator, state: Tensor) -> None:
    """Set the state of `generator`; that of another kind of device becomes its seed."""
    if len(state) != len(generator.get_state()):
        generator.manual_seed(_seed_of(state.tolist()))
        return
    try:
        generator.set_state(state.cpu())
    except RuntimeError as error:
        raise CheckpointError(
            f"generator: expected the state of one on {generator.device}: {error}"
        ) from error


def _seed_of(numbers: Iterable[int]) -> int:
    """A seed of 63 bits in which every byte takes part."""
    seed = 0
    for number in numbers:
        seed = (seed * 1_000_003 + number + 1) % (2**63 - 1)
    return seed

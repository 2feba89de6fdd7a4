"""The state of a buffer as tensors and plain values, and back, also into another capacity."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from per_td.checkpoint import file as checkpoint
from per_td.checkpoint.checks import check_values
from per_td.errors import AllocationError, CheckpointError, DiskAllocationError
from per_td.storage.leaves import flattened, nested
from per_td.storage.moves import Move

if TYPE_CHECKING:
    from per_td.replay_state import ReplayState

__all__ = ["FORMAT", "check", "restore", "state_of"]

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
_LATER_KEYS = {"ranks", "replayed", "mass", "epoch", "written_before"}
"""What earlier states may lack."""


def check(state: Any) -> dict[str, Any]:
    """`state` if it is one that this version, or an earlier one, wrote.

    Raises:
        CheckpointError: it is something else, or of a later version.
    """
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
    """What was kept for each slot, [n] or [S, n], in the slots of rings of another capacity."""
    if values.ndim == 1:
        return moves[0].applied(values)
    out = values.new_zeros(len(values), capacity)
    for row, ring, move in zip(out, values, moves, strict=True):
        kept = move.applied(ring)
        row[: len(kept)] = kept
    return out


def state_of(buffer: "ReplayState", *, copy: bool) -> dict[str, Any]:
    """The whole state; without `copy`, the transitions are those in the buffer's memory."""
    table, storage = buffer._priorities, buffer._storage
    filled = storage.filled()
    transitions = {key: leaf.clone() for key, leaf in filled.items()} if copy else filled
    many = buffer.num_buffers is not None
    own = table.distribution.state(table.trees, len(buffer))
    return {
        "format": FORMAT,
        "version": checkpoint.VERSION,
        "settings": {
            "capacity": buffer.capacity,
            "batch_size": buffer.batch_size,
            "beta_increment": buffer.beta_increment,
            **table.arguments,
            "num_buffers": buffer.num_buffers,
        },
        "beta": buffer._beta.clone(),
        "write_count": storage.ring_count(),
        "written_before": storage.written_before,
        "epoch": storage.epoch,
        "ever_max": table.ever_max.clone(),
        "stale_updates": buffer._stale.clone(),
        "refused_priorities": table.refused.clone(),
        "priority": buffer.priority,
        "mass": table.mass[buffer._own].clone() if own is None else None,
        "replayed": table.replayed[: 0 if many else len(buffer)].clone(),
        "ranks": own,
        "transitions": nested(transitions.items()),
        "generator": None if buffer.generator is None else buffer.generator.get_state(),
    }


def _moves(buffer: "ReplayState", state: dict[str, Any]) -> list[Move]:
    """How the transitions of each ring move into the buffer's capacity.

    Raises:
        CheckpointError: the state is of another number of buffers.
    """
    settings = state["settings"]
    if settings.get("num_buffers") != buffer.num_buffers:
        raise CheckpointError(
            f"expected a state with num_buffers={buffer.num_buffers},"
            f" got {settings.get('num_buffers')}"
        )
    capacity = settings["capacity"]
    counts = torch.as_tensor(state["write_count"]).reshape(-1).tolist()
    return [Move.between(count, capacity, buffer.capacity) for count in counts]


@torch.no_grad()
def restore(buffer: "ReplayState", state: Any) -> None:
    """Take over a state; see `PrioritizedReplayBuffer.load_state_dict`."""
    settings = check(state)["settings"]
    moves = _moves(buffer, state)
    storage, table = buffer._storage, buffer._priorities
    leaves = flattened(state["transitions"])
    if leaves:
        storage.check_state(leaves)
    generator = buffer.generator
    before = None if generator is None else generator.get_state()
    if generator is not None and state["generator"] is not None:
        _continue(generator, state["generator"])
    try:
        storage.restore(leaves, moves)
    except (AllocationError, DiskAllocationError):  # the last that may be refused
        if generator is not None and before is not None:
            generator.set_state(before)
        raise
    moved = any(move.moved for move in moves)
    counts = torch.as_tensor(state["write_count"]).reshape(-1).tolist()
    storage.epoch = state.get("epoch", 0)
    if moved:  # no generation of before is that of any transition now: its updates are stale
        storage.epoch += max(max(counts) - 1, 0) // settings["capacity"] + 1
    storage.written_before = state.get("written_before", 0)
    storage.written_before += sum(counts) - sum(move.written for move in moves)
    buffer.alpha, buffer.eps = settings["alpha"], settings["eps"]
    buffer.beta_increment = settings["beta_increment"]
    buffer._beta.copy_(state["beta"])
    buffer._stale.copy_(state["stale_updates"])
    _restore_priorities(buffer, state, moves)
    table.refused.copy_(state["refused_priorities"])


def _restore_priorities(buffer: "ReplayState", state: dict[str, Any], moves: list[Move]) -> None:
    table, moved = buffer._priorities, any(move.moved for move in moves)

    def placed(values: Tensor) -> Tensor:
        if moved or (values.ndim > 1 and values.shape[1] != buffer.capacity):
            values = _moved(values, moves, buffer.capacity)
        return values.to(buffer.device)

    mass = None  # then what follows from the priorities, in their exact order
    ranked = table.prioritization == "rank"  # masses of another kind mean nothing
    if not ranked and state.get("mass") is not None:
        mass = placed(state["mass"])
    elif ranked and state.get("ranks") is not None and not moved:
        mass = table.distribution.load(table.trees, state["ranks"])
    table.restore(placed(state["priority"]), state["ever_max"], mass)
    if "replayed" in state and buffer.num_buffers is None:
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

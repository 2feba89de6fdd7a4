"""A whole sharded buffer in a folder: a file per shard, and one of the learner that names them.

Every save has files of its own, which share a token. That of the learner is replaced last: until
then the folder holds the save before, whole.
"""

from pathlib import Path
from typing import Any

import torch

from per_td.checkpoint import file as checkpoint
from per_td.errors import CheckpointError, ConfigurationError
from per_td.priorities.schedules import as_schedule

FORMAT = "per_td.ray.ShardedReplayBuffer"
_KEYS = ("token", "num_shards", "batch_size", "settings", "beta", "beta_increment", "generator")
_SETTINGS = {"alpha", "eps", "weight_normalization", "new_priority", "draw", "layout", "capacity"}
_LATER = {"priority_clip", "track_draws"}
"""Settings that earlier versions did not save."""


def as_path(name: str, path: Any) -> Path:
    """Convert the argument `name` to a path, or raise ConfigurationError."""
    try:
        return Path(path)
    except TypeError as error:
        raise ConfigurationError(f"{name}: expected a path, got {path!r}") from error


def file_of(folder: Path, shard: int, token: str) -> str:
    """The path of a shard's file, absolute: other processes use it."""
    return str(folder.absolute() / f"shard-{shard:05d}-{token}.pt")


def write(folder: Path, state: dict[str, Any], token: str) -> None:
    """Make the shards' files of this token the save in the folder, and remove older ones."""
    checkpoint.write(folder / "learner.pt", {"format": FORMAT, "token": token} | state)
    for path in folder.glob("shard-*-*.pt"):
        if not path.stem.endswith(token):
            path.unlink(missing_ok=True)


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read a state that `write` wrote, and the arguments of a buffer like the one saved."""
    path = folder / "learner.pt"
    state: dict[str, Any] = checkpoint.read(path, FORMAT)
    missing = [key for key in _KEYS if key not in state]
    settings = state.get("settings")
    if missing or not isinstance(settings, dict) or settings.keys() - _LATER != _SETTINGS:
        raise CheckpointError(
            f"{path}: expected {', '.join(_KEYS)} with the settings {', '.join(sorted(_SETTINGS))},"
            f" missing: {', '.join(missing) or 'none'}; settings: {settings!r}"
        )
    arguments = settings | {
        key: state[key] for key in ("num_shards", "batch_size", "beta", "beta_increment")
    }
    arguments["capacity_per_shard"] = arguments.pop("capacity")
    try:
        arguments["beta_schedule"] = as_schedule(state.get("beta_schedule"))
    except ConfigurationError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return state, arguments


def restore(generator: torch.Generator, state: Any) -> None:
    """Set the generator to a saved state, or raise CheckpointError."""
    try:
        generator.set_state(state)
    except (TypeError, RuntimeError) as error:
        raise CheckpointError(
            f"generator: expected the state of one, got another: {error}"
        ) from error

"""A whole sharded buffer in a folder: a file per shard, and one of the learner."""

import os
from pathlib import Path
from typing import Any

from per_td import checkpoint
from per_td.errors import CheckpointError

__all__ = ["FORMAT", "file_of", "read", "write"]

FORMAT = "per_td.ray.ShardedReplayBuffer"


def file_of(folder: str | os.PathLike[str], shard: int) -> str:
    """The file of a shard."""
    return os.fspath(Path(folder).absolute() / f"shard-{shard:05d}.pt")


def write(folder: str | os.PathLike[str], state: dict[str, Any]) -> None:
    """Write the learner's file, last: a folder without it is not a saved buffer."""
    checkpoint.write(Path(folder) / "learner.pt", {"format": FORMAT} | state)


def read(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What `write` wrote.

    Raises:
        CheckpointError: it is something else.
    """
    state = checkpoint.read(Path(folder) / "learner.pt")
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(
            f"{os.fspath(folder)}: expected a saved ShardedReplayBuffer, got {type(state)}"
        )
    return state

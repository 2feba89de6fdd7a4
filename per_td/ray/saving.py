"""A whole sharded buffer in a folder: a file per shard, and one of the learner that names them.

Every save has files of its own. That of the learner is replaced last: until then the folder holds
the save before, whole.
"""

import os
import uuid
from pathlib import Path
from typing import Any

from per_td.checkpoint import file as checkpoint

FORMAT = "per_td.ray.ShardedReplayBuffer"


def new_token() -> str:
    """A name that the files of one save share."""
    return uuid.uuid4().hex[:12]


def file_of(folder: str | os.PathLike[str], shard: int, token: str) -> str:
    """The path of a shard's file, absolute: other processes use it."""
    return os.fspath(Path(folder).absolute() / f"shard-{shard:05d}-{token}.pt")


def write(folder: str | os.PathLike[str], state: dict[str, Any], token: str) -> None:
    """Make the shards' files of this token the save in the folder, and remove older ones."""
    checkpoint.write(Path(folder) / "learner.pt", {"format": FORMAT, "token": token} | state)
    for path in Path(folder).glob("shard-*-*.pt"):
        if not path.stem.endswith(token):
            path.unlink(missing_ok=True)


def read(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a state that `write` wrote.

    Raises:
        CheckpointError: the file holds something else.
    """
    state: dict[str, Any] = checkpoint.read(Path(folder) / "learner.pt", FORMAT)
    return state

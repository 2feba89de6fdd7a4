"""Saved states: tensors and plain values in one file, written whole or not at all."""

import errno
import os
import pickle
from pathlib import Path
from typing import Any

import torch

from per_td import states
from per_td.errors import CheckpointError

__all__ = ["FORMAT", "VERSION", "check", "read", "write"]

VERSION = 1
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
_LATER_KEYS = {"ranks", "replayed"}
"""What states of the same version may lack: they are older."""


def check(state: Any) -> dict[str, Any]:
    """`state` if it is one that this version wrote.

    Raises:
        CheckpointError: it is something else, or of a later version.
    """
    if not isinstance(state, dict) or str(state.get("format")) != FORMAT:
        raise CheckpointError(f"expected the state of a PrioritizedReplayBuffer, got {type(state)}")
    if not isinstance(state.get("version"), int) or state["version"] != VERSION:
        raise CheckpointError(
            f"expected a state of version {VERSION}, got version {state.get('version')!r}"
        )
    if state.keys() - _LATER_KEYS != _KEYS:
        raise CheckpointError(f"expected the keys {sorted(_KEYS)}, got {sorted(map(str, state))}")
    states.check_values(state)
    return state


def write(path: str | os.PathLike[str], state: dict[str, Any]) -> None:
    """Write `state` to `path`; a crash leaves either the old file there or the new one."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What is in the file `path`, on the CPU; no code in the file is run.

    Raises:
        CheckpointError: the file is damaged, or not one of tensors and plain values.
        FileNotFoundError: there is none.
    """
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # that comes of a short file
            raise
        raise CheckpointError(f"{os.fspath(path)}: expected a saved buffer, got {error}") from error
    return state

"""The runs as files, and measures of them at matched episodes and matched steps."""

import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.studies.cartpole.settings import Replay, Settings
from benchmarks.studies.cartpole.training import Outcome


@dataclass(frozen=True)
class Record:
    """S runs of one agent."""

    lengths: NDArray  # uint16 [S, most episodes], 0 after the last
    greedy: NDArray  # float32 [S, evaluations]
    steps: NDArray  # int32 [S]
    about: dict[str, Any]  # settings, replay, runs, seed, machine

    @property
    def sign(self) -> int:
        """The return of an episode is this times its steps: in MountainCar, fewer are better."""
        return -1 if self.about["settings"]["task"] == "MountainCar-v0" else 1


def describe(settings: Settings, replay: Replay, *, runs: int, seed: int) -> dict[str, Any]:
    """Describe runs, so that they can be made again and told from others."""
    about = {
        "settings": asdict(settings), "replay": asdict(replay), "runs": runs, "seed": seed,
    }  # fmt: skip
    return json.loads(json.dumps(about))  # tuples as lists, as they come back from a file


def path(folder: Path, variant: str, agent: str) -> Path:
    """Return the file of an agent's runs."""
    return folder / f"{variant}.{re.sub(r'[^a-z0-9]+', '-', agent.lower()).strip('-')}.npz"


def save(file: Path, outcome: Outcome, about: dict[str, Any]) -> None:
    """Write a file, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    with partial.open("wb") as stream:
        np.savez_compressed(
            stream,
            lengths=outcome.lengths,
            greedy=outcome.greedy,
            steps=outcome.steps,
            about=np.array(json.dumps(about | {"milliseconds": outcome.milliseconds})),
        )
    os.replace(partial, file)


def load(file: Path) -> Record:
    """Read a file that `save` wrote."""
    with np.load(file) as found:
        about = json.loads(str(found["about"]))
        return Record(found["lengths"], found["greedy"], found["steps"], about)


def _mean_where(lengths: NDArray, wanted: NDArray) -> NDArray:
    """Mean over the episodes wanted, [S]; NaN where there is none."""
    count = wanted.sum(axis=1)
    total = np.where(wanted, lengths, 0).sum(axis=1, dtype=np.float64)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def at_episodes(record: Record, first: int, last: int) -> NDArray:
    """Mean return of the episodes `first` to `last`, from 1, float64 [S].

    NaN for a run that has not finished episode `last`. In CartPole these are the best ones: they
    need the most steps for an episode.
    """
    if record.lengths.shape[1] < last:
        return np.full(len(record.lengths), np.nan)
    window = record.lengths[:, first - 1 : last]
    return record.sign * np.where(window[:, -1] > 0, window.mean(axis=1, dtype=np.float64), np.nan)


def at_steps(record: Record, begin: int, end: int) -> NDArray:
    """Mean return of the episodes that end after step `begin` and up to `end`, float64 [S].

    Steps are a run's own transitions; NaN for a run that has not come to `end`.
    """
    ends = record.lengths.cumsum(axis=1, dtype=np.int64)
    wanted = (ends > begin) & (ends <= end) & (record.lengths > 0)
    found = _mean_where(record.lengths, wanted)
    return record.sign * np.where(record.steps >= end, found, np.nan)


def curve_points(
    record: Record, *, by_step: bool, width: int, limit: int
) -> tuple[NDArray, NDArray]:
    """Window ends [T] and mean returns [S, T] in windows of `width`, as far as all runs have come.

    Args:
        record: the runs.
        by_step: windows of steps; else of episodes.
        width: of a window.
        limit: last end at most.
    """
    measure = at_steps if by_step else at_episodes
    ends, columns = [], []
    for end in range(width, limit + 1, width):
        column = measure(record, end - width + (not by_step), end)
        if np.isnan(column).any():
            if by_step and not ends:
                continue
            break
        ends.append(end)
        columns.append(column)
    values = np.stack(columns, axis=1) if columns else np.zeros((len(record.lengths), 0))
    return np.array(ends), values

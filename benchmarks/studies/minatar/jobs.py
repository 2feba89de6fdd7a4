"""One agent on one game, as a process of its own can run it."""

import json
import os
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.machine import machine, versions
from benchmarks.studies.minatar.settings import ARMS, Settings


def file_of(out: Path, game: str, arm: str) -> Path:
    """The file of the runs of an agent on a game."""
    return out / f"{game}.{re.sub(r'[^a-z0-9]+', '-', arm.lower()).strip('-')}.npz"


def save(file: Path, about: dict[str, Any], **arrays: NDArray) -> None:
    """Write the file of some runs, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    with partial.open("wb") as stream:
        np.savez_compressed(stream, about=np.array(json.dumps(about)), **arrays)
    os.replace(partial, file)


def work(game: str, arm: str, settings: Settings, seeds: int, seed: int, out: Path) -> str:
    """Run an agent on a game, unless its file is there; a line about it."""
    file = file_of(out, game, arm)
    if file.exists():
        return f"{file.name}: there already"
    from benchmarks.studies.minatar.training import train  # needs minatar; a report does not

    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    outcome = train(settings, ARMS[arm], game, runs=seeds, seed=seed, name=arm)
    about = {"settings": asdict(settings), "arm": asdict(ARMS[arm]), "runs": seeds, "seed": seed}
    about |= {"seconds": round(outcome.seconds, 1), "machine": machine(), "versions": versions()}
    lines = {f"diagnostics/{key}": value for key, value in outcome.diagnostics.items()}
    save(file, about, ends=outcome.ends, returns=outcome.returns, **lines)
    speed = settings.frames * seeds / outcome.seconds
    return f"{file.name}: {outcome.seconds:.0f} s, {speed:.0f} frames/s"

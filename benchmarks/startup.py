"""The cost of a first call: with kernels to compile, from the cache, without them."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.contestants import NotRun
from benchmarks.contestants.own import kernels_for
from benchmarks.race import spread
from per_td import kernels

RUNS = 4

SCRIPT = """
import json, time
import torch, tensordict
data = tensordict.TensorDict({"x": torch.rand(1000, 3)}, batch_size=[1000])
times = [time.perf_counter()]
import per_td
times.append(time.perf_counter())
buffer = per_td.PrioritizedReplayBuffer(1000, 32)
buffer.extend(data)
batch = buffer.sample()
buffer.update_priority(batch["index"], torch.rand(32), batch["generation"])
times.append(time.perf_counter())
print(json.dumps([1e3 * (times[1] - times[0]), 1e3 * (times[2] - times[1])]))
"""


def _process(**variables: str) -> list[float]:
    """Milliseconds for the import, and for the first calls."""
    done = subprocess.run(
        (sys.executable, "-c", SCRIPT),
        env=os.environ | variables,
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def _rows(name: str, runs: list[list[float]]) -> list[dict]:
    parts = {
        "import per_td": [run[0] for run in runs],
        "first calls": [run[1] for run in runs],
        "together": [sum(run) for run in runs],
    }
    return [
        {"contestant": name, "part": part, "unit": "ms"} | vars(spread(values))
        for part, values in parts.items()
    ]


def measure(*, quick: bool) -> list[dict]:
    """Rows for a cold cache (once), a warm one, and plain torch."""
    if not kernels_for("cpu"):
        raise NotRun("there are no compiled kernels here")
    runs = 1 if quick else RUNS
    with tempfile.TemporaryDirectory() as folder:
        cold = [_process(NUMBA_CACHE_DIR=folder)]
        warm = [_process(NUMBA_CACHE_DIR=folder) for _ in range(runs)]
    plain = [_process(**{kernels.VARIABLE: "off"}) for _ in range(runs)]
    return [
        *_rows("cold cache", cold),
        *_rows("warm cache", warm),
        *_rows("plain torch", plain),
    ]

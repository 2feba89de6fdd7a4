"""One agent of one variant, as a process of its own can run it."""

import time
from pathlib import Path

import torch

from benchmarks.machine import machine, versions
from benchmarks.studies.cartpole import results
from benchmarks.studies.cartpole.settings import Variant
from benchmarks.studies.cartpole.training import train


def work(name: str, agent: str, variant: Variant, runs: int, seed: int, out: Path) -> str:
    """Train one agent of a variant, unless its file is there already; a line about it."""
    torch.set_num_threads(1)
    file = results.path(out, name, agent)
    about = results.describe(variant.settings, variant.agents[agent], runs=runs, seed=seed)
    if file.exists():
        found = results.load(file).about
        if {key: found.get(key) for key in about} == about:
            return f"{file.name}: there already"
    start = time.perf_counter()
    torch.set_flush_denormal(True)  # dying units would slow long runs down
    try:
        outcome = train(
            variant.settings, variant.agents[agent], runs=runs, seed=seed, name=f"{name}/{agent}"
        )
    finally:
        torch.set_flush_denormal(False)
    seconds = time.perf_counter() - start
    about |= {"machine": machine(), "versions": versions(), "seconds": round(seconds, 1)}
    results.save(file, outcome, about)
    return f"{file.name}: {seconds:.0f} s, {outcome.milliseconds:.2f} ms per step"

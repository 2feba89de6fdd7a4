"""Run the study, one file per game and agent, then make tables and curves of those there are.

python -m benchmarks.studies.minatar --jobs 2           # goes on where it was interrupted
python -m benchmarks.studies.minatar --quick            # five minutes: see that it works
python -m benchmarks.studies.minatar --report --page docs/minatar_study.md
"""

import argparse
import json
import multiprocessing
import os
import re
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from benchmarks.machine import machine, versions
from benchmarks.pages import RESULTS
from benchmarks.studies.minatar import report
from benchmarks.studies.minatar.settings import ARMS, GAMES, QUICK, Settings
from benchmarks.studies.minatar.training import train

OUT, QUICK_OUT = RESULTS / "minatar_study", Path("runs/minatar_study")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.studies.minatar")
    parser.add_argument("--games", nargs="+", choices=GAMES, default=list(GAMES[:2]))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS)[:5])
    parser.add_argument("--seeds", type=int, default=10, help="runs of each agent")
    parser.add_argument("--seed", type=int, default=0, help="another one gives fresh runs")
    parser.add_argument("--jobs", type=int, default=1, help="processes, of one thread each")
    parser.add_argument("--quick", action="store_true", help="short runs: see that it works")
    parser.add_argument("--report", action="store_true", help="only tables and curves")
    parser.add_argument("--page", type=Path, help="fill the marked block of this page")
    parser.add_argument("--out", type=Path, help="folder of the files")
    args = parser.parse_args(argv)
    args.out = args.out or (QUICK_OUT if args.quick else OUT)
    return args


def file_of(out: Path, game: str, arm: str) -> Path:
    """The file of the runs of an agent on a game."""
    return out / f"{game}.{re.sub(r'[^a-z0-9]+', '-', arm.lower()).strip('-')}.npz"


def work(game: str, arm: str, settings: Settings, seeds: int, seed: int, out: Path) -> str:
    """Run an agent on a game, unless its file is there; a line about it."""
    file = file_of(out, game, arm)
    if file.exists():
        return f"{file.name}: there already"
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    outcome = train(settings, ARMS[arm], game, runs=seeds, seed=seed, name=arm)
    about = {"settings": asdict(settings), "arm": asdict(ARMS[arm]), "runs": seeds, "seed": seed}
    about |= {"seconds": round(outcome.seconds, 1), "machine": machine(), "versions": versions()}
    out.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    with partial.open("wb") as stream:
        np.savez_compressed(
            stream,
            ends=outcome.ends,
            returns=outcome.returns,
            about=np.array(json.dumps(about)),
            **{f"diagnostics/{key}": value for key, value in outcome.diagnostics.items()},
        )
    os.replace(partial, file)
    speed = settings.frames * seeds / outcome.seconds
    return f"{file.name}: {outcome.seconds:.0f} s, {speed:.0f} frames/s"


def main(argv: list[str] | None = None) -> None:
    """Run what has no file yet, then report."""
    args = parse(argv)
    if not args.report:
        settings = QUICK if args.quick else Settings()
        tasks = [
            (game, arm, settings, args.seeds, args.seed, args.out)
            for arm in args.arms
            for game in args.games
        ]
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(args.jobs, mp_context=context) as pool:
            for line in pool.map(work, *zip(*tasks, strict=True)):
                print(line, flush=True)
    print(report.make(args.out, args.page))


if __name__ == "__main__":
    main()

"""Run the study, then make tables and plots of it: see docs/cartpole_study.md."""

import argparse
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

from benchmarks.pages import RESULTS
from benchmarks.studies.cartpole import report
from benchmarks.studies.cartpole.jobs import work
from benchmarks.studies.cartpole.settings import VARIANTS, Variant, quick

OUT = RESULTS / "cartpole_study"
QUICK_OUT = Path("runs/cartpole_study")
QUICK_SEEDS = 10


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.cartpole", description=__doc__
    )
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", type=int, help="runs of each agent; 100, with --quick 10")
    parser.add_argument("--seed", type=int, default=0, help="another one gives fresh runs")
    parser.add_argument("--max-steps", type=int, help="end every variant there at the latest")
    parser.add_argument("--jobs", type=int, default=1, help="processes, of one thread each")
    parser.add_argument("--out", type=Path, help=f"folder of the files; {QUICK_OUT} with --quick")
    parser.add_argument("--quick", action="store_true", help="short runs: see that it works")
    parser.add_argument(
        "--report", action="store_true", help="only tables and plots, from the files that exist"
    )
    parser.add_argument("--page", type=Path, help="fill the marked block of this page")
    args = parser.parse_args(argv)
    args.out = args.out or (QUICK_OUT if args.quick else OUT)
    return args


def variants(args: argparse.Namespace) -> dict[str, Variant]:
    """Those asked for, as short as asked for."""
    found = {}
    for name in args.variants:
        variant = quick(VARIANTS[name]) if args.quick else VARIANTS[name]
        if args.max_steps:
            steps = min(variant.settings.steps, args.max_steps)
            variant = replace(variant, settings=replace(variant.settings, steps=steps))
        found[name] = variant
    return found


def main(argv: list[str] | None = None) -> None:
    """Run the agents that have no file yet, then report."""
    args = parse(argv)
    chosen = variants(args)
    if not args.report:
        runs = args.seeds or (QUICK_SEEDS if args.quick else 100)
        tasks = [
            (name, agent, variant, runs, args.seed, args.out)
            for name, variant in chosen.items()
            for agent in variant.agents
        ]
        if args.jobs > 1:
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(args.jobs, mp_context=context) as pool:
                for line in pool.map(work, *zip(*tasks, strict=True)):
                    print(line, flush=True)
        else:
            for task in tasks:
                print(work(*task), flush=True)
    print(report.make(chosen, args.out, args.page))


if __name__ == "__main__":
    main()

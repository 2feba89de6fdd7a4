"""Run the study, one file per game and agent, then make tables and curves of those there are.

python -m benchmarks.studies.minatar --jobs 2           # goes on where it was interrupted
python -m benchmarks.studies.minatar --quick            # five minutes: see that it works
python -m benchmarks.studies.minatar --report --page docs/minatar_study.md
"""

import argparse
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from benchmarks.pages import RESULTS
from benchmarks.studies.minatar import report
from benchmarks.studies.minatar.jobs import work
from benchmarks.studies.minatar.settings import ARMS, GAMES, QUICK, Settings

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

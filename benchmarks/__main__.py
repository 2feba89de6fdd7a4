"""Measure everything, save it as JSON, and make tables and plots of it: see README.md."""

import argparse
import datetime
import json
import os
import sys
import time
from pathlib import Path

import torch

from benchmarks import report
from benchmarks.case import quick
from benchmarks.cases import CASES
from benchmarks.machine import commit, machine, versions
from benchmarks.pages import RESULTS
from benchmarks.runner import Options, run

FORMAT, VERSION = "per_td.benchmarks", 1


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda adds a GPU")
    parser.add_argument("--peers", action="store_true", help="other libraries' PER, if installed")
    parser.add_argument("--profile", action="store_true", help="the parts of each call")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: see that it runs")
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="CASE",
        choices=["cpu", "cuda", *(case.name for case in CASES)],
        help="some only: cpu or cuda for all of a device, or names of cases",
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    parser.add_argument("--name", help="of the files there; default: the device")
    parser.add_argument("--pin", action="store_true", help="stay on one core, peers' threads too")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def _one_core() -> int | None:
    """Stay on one core; which one."""
    if not hasattr(os, "sched_setaffinity"):
        return None
    core = max(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})
    return core


def main(argv: list[str] | None = None) -> Path:
    """Run, save, report; returns the JSON file."""
    args = parse(argv)
    torch.set_num_threads(1)
    options = Options(args.device, args.peers, args.profile, args.quick, args.seed)
    only = set(args.only or ("cpu", "cuda"))
    cases = [case for case in CASES if {case.name, case.device} & only]
    part = args.only is not None and args.device not in only
    name = args.name or args.device + "-quick" * args.quick + "-part" * part
    start = time.perf_counter()
    results = {
        "format": FORMAT,
        "version": VERSION,
        "name": name,
        "command": " ".join(["python -m benchmarks", *(sys.argv[1:] if argv is None else argv)]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seed": args.seed,
        "quick": args.quick,
        "machine": machine() | {"core": _one_core() if args.pin else None},
        "versions": versions(),
        "commit": commit(),
    }
    results["cases"] = [run(quick(case) if args.quick else case, options) for case in cases]
    results["seconds"] = round(time.perf_counter() - start, 1)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{name}.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(report.make(path))
    if args.out == RESULTS and name in report.PUBLISHED:
        report.publish(args.out)
    failed = [case["name"] for case in results["cases"] if case.get("failed")]
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")
    return path


if __name__ == "__main__":
    main()

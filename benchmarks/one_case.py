"""One case in a process of its own: `python -m benchmarks.one_case NAME FILE --seconds S`."""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.case import not_run, quick
from benchmarks.cases import CASES
from benchmarks.contestants.base import REHEARSAL
from benchmarks.runner import Options, run


def main(argv: list[str] | None = None) -> int:
    """Measure, and write the record as JSON; returns the status for the process to end with."""
    start = time.perf_counter()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.one_case", description=__doc__)
    parser.add_argument("name", choices=[case.name for case in CASES])
    parser.add_argument("file", type=Path)
    parser.add_argument("--seconds", type=float, required=True, help="to be done by then, roughly")
    parser.add_argument("--rehearse", action="store_true", help="tiny, and on the CPU")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    case = next(case for case in CASES if case.name == args.name)
    if args.rehearse:
        case = replace(quick(case), device="cpu")
    options = Options("cuda", peers=True, quick=args.rehearse, until=start + args.seconds)
    record = run(case, options)
    if args.rehearse:  # goals are set for a GPU
        record["goals"] = not_run(case, REHEARSAL)["goals"]
    args.file.write_text(json.dumps({"case": record}))
    return 1 if "not_run" in record else 0


if __name__ == "__main__":
    raise SystemExit(main())

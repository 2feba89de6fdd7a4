"""Everything that only a GPU can show, part by part, within some minutes: see on_gpu.sh."""

import argparse
import datetime
import json
import math
import os
import platform
import signal
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks import parts, report
from benchmarks.case import Case, not_run
from benchmarks.cases import CASES
from benchmarks.pages import RESULTS
from benchmarks.parts import Part

FORMAT, VERSION = "per_td.benchmarks", 1
MEASURED = (  # and their share of the time
    ("cuda-exactness", 30),
    ("cuda-peers", 30),
    ("cuda-segments", 20),
    ("cuda-capacity", 75),
    ("cuda-fasttd3", 25),
    ("cuda-extend", 15),
    ("cuda-methods", 65),
    ("cuda-batch", 35),
)
KERNELS = "tests/kernels"
PYTEST = ("-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", "-p", "no:randomly")
PYTEST += (
    "-o",
    "addopts=--import-mode=importlib",
    "-p",
    "benchmarks.pytest_log",
    "--log-json",
    "{file}",
)
PYTEST += ("--continue-on-collection-errors", "-W", "default")
ON_CUDA = (*PYTEST, "-m", "cuda")
REPORT_SECONDS = 20.0
UNKNOWN = ("cpu", "cores", "memory_gib", "gpu", "load_before")


def plan(*, rehearse: bool) -> list[Part]:
    """Return all parts, in order; of a rehearsal, small and on the CPU."""
    kernels = (*ON_CUDA, KERNELS)
    others = (*ON_CUDA, "tests", "--ignore=tests/ray", f"--ignore={KERNELS}")
    if rehearse:  # a few that the CPU can do, beside those for CUDA, which are skipped
        kernels = (*PYTEST, "-k", "nothing", KERNELS)
        others = (*PYTEST, "-m", "not slow", "tests/tree/test_sum_tree.py")
    small = ("--rehearse",) if rehearse else ()
    title = {case.name: case.title for case in CASES}
    return [
        Part("versions", "Versions and device", ("-m", "benchmarks.machine", "{file}"), 30),
        Part("tests-kernels", "Tests of the kernels", kernels, 100),
        Part("tests-others", "All other tests on CUDA", others, 110),
        *(
            Part(
                name,
                title[name],
                ("-m", "benchmarks.one_case", name, "{file}", "--seconds", "{seconds}", *small),
                weight,
            )
            for name, weight in MEASURED
        ),
    ]


def _case(case: Case, record: dict) -> dict:
    found = record["found"].get("case")
    return found or not_run(case, record["state"].removeprefix("not run: "))


def collected(records: list[dict], about: dict[str, Any]) -> dict[str, Any]:
    """Put the results together, in the form that benchmarks.report reads.

    Args:
        records: of the parts.
        about: name, command, date, seconds, ...
    """
    by_name = {record["name"]: record for record in records}
    here = by_name["versions"]["found"]
    unknown = {"machine": dict.fromkeys(UNKNOWN), "commit": {"hash": None, "dirty": None}}
    unknown["versions"] = {"python": platform.python_version(), "torch": torch.__version__}
    results = {"format": FORMAT, "version": VERSION, **about, **unknown, **here}
    results["machine"] = results["machine"] | {"threads_used": 1}
    results["cases"] = [
        _case(case, by_name[case.name])
        for name, _ in MEASURED
        for case in CASES
        if case.name == name
    ]
    results["parts"] = [
        record
        | {"found": {key: v for key, v in record["found"].items() if key != "case"}}
        | {"detail": parts.detail(record)}
        for record in records
    ]
    return results


def save(path: Path, results: dict[str, Any]) -> None:
    """Write the JSON file and its page; who looks finds the old ones or the new ones whole."""
    new = path.with_suffix(".new")
    new.write_text(json.dumps(results, indent=1) + "\n")
    os.replace(new, path)
    report.make(path, pictures=False)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="bash benchmarks/on_gpu.sh", description=__doc__)
    parser.add_argument("minutes", type=float, nargs="?", default=9.0, help="for all of it")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU: small, on the CPU")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    args = parser.parse_args(argv)
    if not 0 < args.minutes < math.inf:
        parser.error(f"minutes: expected a positive number, got {args.minutes}")
    return args


def _stop(*_: object) -> None:
    raise SystemExit("on_gpu: stopped")  # the part in progress ends on the way out


def main(argv: list[str] | None = None) -> int:
    """Run all parts and report; 1 where one failed or was not run."""
    start = time.monotonic()
    args = parse(argv)
    if not (args.rehearse or torch.cuda.is_available()):
        print("on_gpu: no CUDA device here; --rehearse runs it without one", file=sys.stderr)
        return 2
    name = "cuda-quick" if args.rehearse else "cuda"
    about: dict[str, Any] = {
        "name": name,
        "command": " ".join(["bash benchmarks/on_gpu.sh", *(argv or sys.argv[1:])]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seed": 0,
        "quick": args.rehearse,
    }
    if find_spec("matplotlib") is None:
        about["note"] = "No plots: matplotlib is not installed."
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{name}.json"
    for old in args.out.glob(f"{name}-cuda-*.png"):
        old.unlink()

    def keep(records: list[dict]) -> None:
        about["seconds"] = round(time.monotonic() - start, 1)
        save(path, collected(records, about))

    # Natively, and with kernels: what a shell may have set for other purposes is not meant.
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PER_TD_KERNELS")}
    signal.signal(signal.SIGTERM, _stop)
    seconds = 60 * args.minutes
    with tempfile.TemporaryDirectory(prefix="on_gpu-") as folder:
        records = parts.run_all(
            plan(rehearse=args.rehearse),
            seconds - min(REPORT_SECONDS, seconds / 10),
            Path(folder),
            keep,
            env,
        )
    try:
        report.make(path)
    except Exception as error:  # a page without plots is written already
        print(f"no plots: {type(error).__name__}: {error}", file=sys.stderr)
    if args.out == RESULTS and name in report.PUBLISHED:
        report.publish()
    print("\n\n".join(report.summary(json.loads(path.read_text()))))
    return 0 if all(record["state"] == "ok" for record in records) else 1


if __name__ == "__main__":
    raise SystemExit(main())

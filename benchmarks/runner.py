"""Run a case and return its record."""

import gc
import itertools
import math
import sys
import time
import traceback
from dataclasses import dataclass

import torch

from benchmarks import cartpole, exactness, profiles, startup
from benchmarks.case import Case, described, not_run
from benchmarks.contestants import CONTESTANTS, Contestant, NotRun
from benchmarks.contestants.base import REHEARSAL
from benchmarks.goals import judge
from benchmarks.race import Entry, race, spread
from benchmarks.workload import Point


@dataclass(frozen=True)
class Options:
    """The options of the command line."""

    device: str = "cpu"
    peers: bool = False
    profile: bool = False
    quick: bool = False
    seed: int = 0
    until: float = math.inf  # time.perf_counter() by which the rounds should end


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _said(error: Exception) -> str:
    """Its class and the first line of its message, which may be empty."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def _peer(contestant: type[Contestant], point: Point, case: Case) -> Contestant:
    """Build another library's buffer; where it fails, the others still run."""
    try:
        made = contestant(point)
        for part in made.parts(case.parts):
            if part.before is not None:
                part.before()
            part.run()
    except (NotRun, torch.OutOfMemoryError):
        raise
    except Exception as error:
        traceback.print_exc()
        raise NotRun(f"it fails ({_said(error)})") from error
    return made


def _enter(case: Case, options: Options) -> tuple[list[Entry], list[dict], dict[str, str]]:
    """Build all contestants: those who run, rows for those who cannot and for facts, footnotes."""
    entries, rows, notes = [], [], {}
    grid = itertools.product(case.schemas, case.draws, case.capacities, case.batches)
    for (schema, draw, capacity, batch), name in itertools.product(grid, case.contestants):
        contestant = CONTESTANTS[name]
        key = {
            "contestant": name,
            "capacity": capacity,
            "batch": batch,
            "schema": schema,
            "draw": draw,
        }
        try:
            if contestant.peer and not options.peers:
                raise NotRun("--peers was not asked for")
            if contestant.cuda_only and case.device != "cuda":
                raise NotRun(REHEARSAL)
            point = Point(capacity, batch, schema, draw, case.device, options.seed)
            made = _peer(contestant, point, case) if contestant.peer else contestant(point)
        except NotRun as reason:
            rows.append(key | {"part": None, "not_run": str(reason)})
            continue
        except torch.OutOfMemoryError:
            gc.collect()
            torch.cuda.empty_cache()
            rows.append(key | {"part": None, "not_run": "the GPU has too little memory"})
            continue
        if contestant.note:
            notes[name] = contestant.note
        clock = contestant.clock if case.device == "cuda" else "cpu"
        entries.append(Entry(key, made.parts(case.parts), clock))
        for fact, (value, unit) in made.facts().items():
            found = {"not_run": REHEARSAL} if value is None else {"median": value, "unit": unit}
            rows.append(key | {"part": fact} | found)
    return entries, rows, notes


def _rows(entries: list[Entry]) -> list[dict]:
    return [
        entry.key
        | {"part": part, "unit": "us", "clock": entry.clock}
        | {name: round(value, 4) for name, value in vars(spread(values)).items()}
        for entry in entries
        for part, values in entry.rounds.items()
    ]


def _measure(case: Case, options: Options) -> dict:
    seed = options.seed
    if case.kind == "exactness":
        rows = exactness.measure(case, peers=options.peers, quick=options.quick, seed=seed)
        return {"rows": rows, "goals": judge(case, [], exactness.worst(rows))}
    rows = []
    notes: dict[str, str] = {}
    share = None
    if case.kind == "cartpole":
        entries, rounds = cartpole.measure(quick=options.quick, seed=seed)
    elif case.kind == "startup":
        rows, entries, rounds = startup.measure(quick=options.quick), [], 0
    elif case.kind == "profile":
        entries, rounds, share = profiles.measure(case, seed=seed)
    else:
        entries, rows, notes = _enter(case, options)
        seconds = max(0.0, min(case.seconds, options.until - time.perf_counter()))
        rounds, share = race(entries, seconds) if entries else (0, None)
    rows = _rows(entries) + rows
    goals = judge(case, entries, rows)
    return {
        "rows": rows,
        "goals": goals,
        "rounds": rounds,
        "core_share": share,
        "notes": notes,
    }


def _obstacle(case: Case, options: Options) -> str | None:
    if case.device == "cuda" and not torch.cuda.is_available():
        return "no CUDA device"
    if case.device == "cuda" and options.device != "cuda":
        return "--device cuda was not asked for"
    if case.by_request is not None and not getattr(options, case.by_request):
        return f"--{case.by_request} was not asked for"
    return None


def run(case: Case, options: Options) -> dict:
    """Return the record of a case: rows and goals, or why it was not run."""
    _say(f"{case.name}: {case.title} ...")
    record = described(case)
    start = time.perf_counter()
    reason = _obstacle(case, options)
    if reason is None:
        try:
            record |= _measure(case, options)
        except NotRun as obstacle:
            reason = str(obstacle)
        except Exception as error:  # the other cases are worth having
            traceback.print_exc()
            reason = f"FAILED: {_said(error)}"
            record["failed"] = True
    if reason is not None:
        record |= not_run(case, reason)
    record["seconds"] = round(time.perf_counter() - start, 1)
    gc.collect()
    _say(f"{case.name}: " + (f"not run: {reason}" if reason else f"{record['seconds']} s"))
    return record

"""Races: contestants timed in turns, in one process, so that ratios hold where times waver.

A round gives every entry one turn of a few calls, right after one another; whatever slows the
machine down for a while slows all of them down. The time of a round is the median of the turn's
calls; results are the median and the quartiles over the rounds, and ratios between entries round
by round.
"""

import gc
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch

TOTAL = "sample + update"
TURN_US = 3000.0  # a turn is as many calls as fit into this
MOST_CALLS = 8
FEWEST_ROUNDS, MOST_ROUNDS = 7, 400


@dataclass(frozen=True)
class Part:
    """One timed call. `before` is called first and not timed; `summed`: it counts in the total."""

    name: str
    run: Callable[[], object]
    before: Callable[[], object] | None = None
    summed: bool = True


@dataclass
class Entry:
    """A contestant in a race.

    Attributes:
        key: how the results are labelled.
        parts: timed one after the other in each call.
        clock: "cpu": wall clock around each call; "cuda": events around the calls of a turn, that
            is, time per call when calls follow one another, host or device being the slower.
        rounds: microseconds by part, one number per round; filled by `race`.
    """

    key: dict
    parts: list[Part]
    clock: str = "cpu"
    rounds: dict[str, list[float]] = field(default_factory=dict)
    calls: int = 1


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    q1: float
    q3: float


def spread(values: Iterable[float]) -> Spread:
    """Median and quartiles of `values`."""
    quartiles = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    q1, median, q3 = torch.tensor(list(values), dtype=torch.float64).quantile(quartiles).tolist()
    return Spread(median, q1, q3)


def ratio(of: list[float], against: list[float]) -> Spread:
    """Ratio of the medians, and the quartiles of the ratios round by round."""
    rounds = spread(a / b for a, b in zip(of, against, strict=True))
    return Spread(spread(of).median / spread(against).median, rounds.q1, rounds.q3)


def _cpu_turn(entry: Entry, calls: int) -> dict[str, float]:
    times: dict[str, list[float]] = {part.name: [] for part in entry.parts}
    clock = time.perf_counter_ns
    for _ in range(calls):
        for part in entry.parts:
            if part.before is not None:
                part.before()
            start = clock()
            part.run()
            times[part.name].append((clock() - start) / 1e3)
    summed = [part.name for part in entry.parts if part.summed]
    if len(summed) > 1:
        calls_of = zip(*(times[name] for name in summed), strict=True)
        times[" + ".join(summed)] = [sum(call) for call in calls_of]
    return {name: sorted(values)[len(values) // 2] for name, values in times.items()}


def _cuda_turn(entry: Entry, calls: int) -> dict[str, float]:
    times = {}
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for part in entry.parts:
        if part.before is not None:
            part.before()
        torch.cuda.synchronize()
        start.record()
        for _ in range(calls):
            part.run()
        end.record()
        end.synchronize()
        times[part.name] = start.elapsed_time(end) * 1e3 / calls
    return times


def _turn(entry: Entry, calls: int) -> dict[str, float]:
    return (_cuda_turn if entry.clock == "cuda" else _cpu_turn)(entry, calls)


def _calibrate(entry: Entry) -> float:
    """Warm up, settle how many calls make a turn, and say how long a turn takes, in seconds."""
    _turn(entry, 2)
    start = time.perf_counter()
    _turn(entry, 2)
    call_us = (time.perf_counter() - start) * 1e6 / 2
    most = 32 if entry.clock == "cuda" else MOST_CALLS
    entry.calls = max(1, min(most, int(TURN_US / call_us)))
    return call_us * (entry.calls + (entry.calls > 1)) / 1e6


def race(entries: list[Entry], seconds: float) -> tuple[int, float]:
    """Fill the `rounds` of all entries.

    The first call of a turn is not timed: it brings the entry's code back into the caches that the
    others have used. Its data are not: slots are drawn anew in every call.

    Args:
        entries: who takes turns.
        seconds: about how long all of it may take.

    Returns:
        The number of rounds, and the share of a core that this process had meanwhile: less than
        all of it says that others were at work too.
    """
    round_s = sum(_calibrate(entry) for entry in entries)
    rounds = max(FEWEST_ROUNDS, min(MOST_ROUNDS, int(seconds / round_s)))
    gc.collect()
    gc.freeze()
    gc.disable()
    start, cpu_start = time.perf_counter(), time.process_time()
    collected = start
    try:
        for _ in range(rounds):
            for entry in entries:
                if entry.calls > 1:
                    _turn(entry, 1)
                for name, value in _turn(entry, entry.calls).items():
                    entry.rounds.setdefault(name, []).append(value)
            if time.perf_counter() - collected > 1:
                gc.collect()
                collected = time.perf_counter()
    finally:
        gc.enable()
        gc.unfreeze()
    share = (time.process_time() - cpu_start) / (time.perf_counter() - start)
    return rounds, share

"""Where the microseconds go: the parts of a call of the buffer, one after the other.

This looks inside: a part that a version of the buffer does not have is left out. The parts of a
call work on the same slots in the order of the call, so that each finds in the caches what it would
find there; the slots are new in every call.
"""

from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDict

from benchmarks.case import Case
from benchmarks.contestants.own import PerTd
from benchmarks.race import Entry, Part, race
from benchmarks.workload import BETA, Point
from per_td import draws, validation
from per_td.weights import mass_of, priority_of

__all__ = ["measure"]

WHOLE, REST = "all of it", "rest"
NESTED = "- "  # marks parts of the part above, not counted in the rest

Parts = dict[str, Callable[[], Any]]


def _sample_parts(own: PerTd, at: dict) -> Parts:
    table, storage, point = own.buffer._priorities, own.buffer._storage, own.point

    def draw() -> None:
        at["index"] = table.sample(point.batch, point.capacity, None)

    def gather() -> None:
        index = at["index"]
        columns = storage.data.items()
        at["leaves"] = {key: column.index_select(0, index) for key, column in columns}

    return {
        "draw": draw,
        f"{NESTED}random numbers": lambda: draws.points(point.batch, "independent", own.cpu),
        "weights": lambda: table.weights(at["index"], own.buffer._beta, storage.size),
        "generations": lambda: storage.generation(at["index"]),
        "gather": gather,
        "result TensorDict": lambda: TensorDict(
            {**at["leaves"], "index": at["index"]}, batch_size=at["index"].shape, device=own.cpu
        ),
        WHOLE: own.sample,
    }


def _update_parts(own: PerTd, at: dict) -> Parts:
    table, storage, size = own.buffer._priorities, own.buffer._storage, own.point.capacity

    def fresh() -> None:
        at["index"], at["td_error"] = own.pool.next()
        at["generation"] = storage.generation(at["index"])

    def checks() -> None:
        index = validation.as_index(at["index"], own.cpu)
        validation.require_in_range(index, size)
        validation.require_finite("td_error", validation.as_values("", at["td_error"], index))

    def stale() -> None:
        generation = validation.as_index(at["generation"], own.cpu)
        at["live"] = generation == storage.generation(at["index"])
        own.buffer._stale.add_((~at["live"]).sum())

    return {
        "(fresh slots, not counted)": fresh,
        "stale updates": stale,
        "priority table": lambda: table.update(at["index"], at["td_error"], size, at["live"]),
        f"{NESTED}checks, in plain torch": checks,
        f"{NESTED}priority and mass, in plain torch": lambda: mass_of(
            priority_of(at["td_error"], own.buffer.eps), own.buffer.alpha
        ),
        f"{NESTED}masses and sums": lambda: table.masses.write(at["index"], at["td_error"].abs()),
        f"{NESTED}largest priority": lambda: table._largest.refresh(at["index"]),
        WHOLE: lambda: own.buffer.update_priority(at["index"], at["td_error"], at["generation"]),
    }


def _extend_parts(own: PerTd, at: dict) -> Parts:
    table, storage = own.buffer._priorities, own.buffer._storage

    def check() -> None:
        at["leaves"] = storage.check(own.incoming)

    def slots() -> None:
        at["index"] = storage.next_slots(own.point.batch)

    return {
        "checks": check,
        "slots": slots,
        "copy": lambda: storage.write(at["leaves"]),
        "priorities": lambda: table.write_new(at["index"], None),
        WHOLE: own.extend,
    }


CALLS = {"sample": _sample_parts, "update": _update_parts, "extend": _extend_parts}


def _possible(parts: Parts) -> list[Part]:
    """Those that run; each is called once, in order."""
    kept = []
    for name, run in parts.items():
        try:
            run()
        except (AttributeError, TypeError, KeyError):
            continue
        kept.append(Part(name, torch.no_grad()(run), summed=False))
    return kept


def _with_rest(entry: Entry) -> None:
    parts = [
        values
        for name, values in entry.rounds.items()
        if name != WHOLE and not name.startswith((NESTED, "("))
    ]
    whole = entry.rounds[WHOLE]
    entry.rounds[REST] = [w - sum(p) for w, *p in zip(whole, *parts, strict=True)]


def measure(case: Case, *, seed: int) -> tuple[list[Entry], int, float]:
    """Entries, one for each call, whose parts are those of the call."""
    point = Point(case.capacities[0], case.batches[0], case.schemas[0], seed=seed)
    own = PerTd(point)
    own.cpu = torch.device("cpu")
    own.buffer.beta = BETA
    entries = [
        Entry({"contestant": call, "capacity": point.capacity, "batch": point.batch}, _possible(p))
        for call, p in ((call, parts(own, {})) for call, parts in CALLS.items())
    ]
    rounds, share = race(entries, case.seconds)
    for entry in entries:
        entry.rounds.pop("(fresh slots, not counted)", None)
        _with_rest(entry)
    return entries, rounds, share

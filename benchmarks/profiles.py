"""A profile of the microseconds: the parts of a call of the buffer, one after the other.

This looks inside the buffer. The parts of a call work on the same slots in the order of the call,
so that each finds in the caches what it would find there; the slots are new in every call.
"""

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.case import Case
from benchmarks.contestants.own import PerTd
from benchmarks.race import Entry, Part, race
from benchmarks.workload import BETA, Point, Pool
from per_td import draws, validation
from per_td.priorities import sampling
from per_td.storage.leaves import nested, tensordict_of

WHOLE, REST = "all of it", "rest"
NESTED = "- "  # marks parts of the part above, not counted in the rest

Parts = dict[str, Callable[[], Any]]


def _sample_parts(own: PerTd, at: dict) -> Parts:
    table, storage, n = own.buffer._priorities, own.buffer._storage, own.point.batch
    trees, numbers = table.trees, torch.empty(n, dtype=torch.float64)

    def draw() -> None:
        at["index"], at["weight"] = sampling.sample_weighted(
            table, n, None, beta=own.buffer._beta, written=storage.written, size=len(storage)
        )

    def gather() -> None:
        at["leaves"], at["generation"] = storage.gather(at["index"])

    def result() -> None:
        leaves = nested(zip(storage._leaves, at["leaves"], strict=True))
        added = {"index": at["index"], "generation": at["generation"]}
        leaves.update(added, priority_weight=at["weight"])
        tensordict_of(leaves, at["index"].shape, own.cpu)

    return {
        "draw and weights": draw,
        f"{NESTED}random numbers": lambda: draws.uniform_like(numbers, None),
        f"{NESTED}walk, other slots": lambda: trees.ops.find(trees, own.points.next()[1]),
        "gather and generations": gather,
        "result TensorDict": result,
        WHOLE: own.sample,
    }


def _update_parts(own: PerTd, at: dict) -> Parts:
    table, storage = own.buffer._priorities, own.buffer._storage
    trees = table.trees

    def checks() -> None:
        validation.as_index(at["index"], own.cpu)
        validation.as_index(at["generation"], own.cpu)

    def update() -> None:
        fate = {"written": storage.written, "generation": at["generation"]}
        table.update(at["index"], at["td_error"], **fate)

    def assign() -> None:
        trees.ops.assign(
            trees,
            table.distribution,
            at["index"],
            at["td_error"],
            written=storage.written,
            limit=own.point.capacity,
            generation=at["generation"],
            add_eps=True,
        )

    return {
        "checks of the indices": checks,
        "priority table": update,
        f"{NESTED}raw priorities, masses, sums, extrema": assign,
        WHOLE: lambda: own.buffer.update_priority(at["index"], at["td_error"], at["generation"]),
    }


def _extend_parts(own: PerTd, at: dict) -> Parts:
    table, storage = own.buffer._priorities, own.buffer._storage

    def check() -> None:
        at["leaves"], at["n"] = storage.check(own.incoming)

    def slots() -> None:
        storage.next_slots(own.point.batch)

    def copy() -> None:
        at["runs"] = storage.write(at["leaves"], at["n"])

    return {
        "checks": check,
        "slots": slots,
        "copy": copy,
        "priorities": lambda: table.write_runs(at["runs"]),
        WHOLE: own.extend,
    }


CALLS = {"sample": _sample_parts, "update": _update_parts, "extend": _extend_parts}


def _parts(own: PerTd, call: str) -> list[Part]:
    """Make the parts of a call, each called once, in order.

    Those of an update get new slots each, the others follow from one another.
    """
    at: dict = {}

    def fresh() -> None:
        at["index"], at["td_error"] = own.pool.next()
        at["generation"] = own.buffer.generation_of(at["index"])

    parts = CALLS[call](own, at)
    for run in parts.values():
        fresh()
        run()
    before = fresh if call == "update" else None
    return [Part(name, run, before, summed=False) for name, run in parts.items()]


def _with_rest(entry: Entry) -> None:
    whole = entry.rounds[WHOLE]
    inner = [name for name in entry.rounds if name != WHOLE and not name.startswith(NESTED)]
    parts = [entry.rounds[name] for name in inner]
    entry.rounds[REST] = [w - sum(p) for w, *p in zip(whole, *parts, strict=True)]


def measure(case: Case, *, seed: int) -> tuple[list[Entry], int, float]:
    """Entries, one for each call, whose parts are those of the call."""
    point = Point(case.capacities[0], case.batches[0], case.schemas[0], seed=seed)
    own = PerTd(point)
    own.cpu = torch.device("cpu")
    own.points = Pool(point)  # points in the tree, in place of TD errors
    total = own.buffer.total_mass
    own.points.td_error = torch.rand(len(own.points.index), dtype=torch.float64) * total
    own.buffer.beta = BETA
    key = {"capacity": point.capacity, "batch": point.batch}
    entries = [Entry({"contestant": call} | key, _parts(own, call)) for call in CALLS]
    rounds, share = race(entries, case.seconds)
    for entry in entries:
        _with_rest(entry)
    return entries, rounds, share

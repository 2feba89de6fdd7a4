"""Goals: which were reached, and how far off the others are."""

from benchmarks.case import Case, Goal, Ref
from benchmarks.race import Entry, Spread, ratio


def _matches(ref: Ref, key: dict) -> bool:
    wanted = {"contestant": ref.contestant, "capacity": ref.capacity, "batch": ref.batch}
    return all(key.get(name) == value for name, value in wanted.items() if value is not None)


def _rounds(ref: Ref, entries: list[Entry]) -> list[float] | None:
    for entry in entries:
        if _matches(ref, entry.key) and ref.part in entry.rounds:
            return entry.rounds[ref.part]
    return None


def _why_not(ref: Ref, rows: list[dict]) -> str:
    for row in rows:
        if _matches(ref, row) and "not_run" in row:
            return f"{ref.contestant}: {row['not_run']}"
    return f"{ref.contestant}: not measured"


def _judge(goal: Goal, entries: list[Entry], rows: list[dict]) -> dict:
    out = {"text": goal.text, "limit": goal.limit, "relative": goal.against is not None}
    of = _rounds(goal.of, entries)
    against = None if goal.against is None else _rounds(goal.against, entries)
    if goal.against is None:
        found = [
            row["median"]
            for row in rows
            if _matches(goal.of, row) and row["part"] == goal.of.part and "median" in row
        ]
        value = Spread(found[0], found[0], found[0]) if found else None
    else:
        value = ratio(of, against) if of and against else None
    if value is None:
        missing = goal.of if goal.against is None or not of else goal.against
        return out | {"not_run": _why_not(missing, rows)}
    return out | {**vars(value), "reached": value.median <= goal.limit}


def judge(case: Case, entries: list[Entry], rows: list[dict]) -> list[dict]:
    """A record for each goal of `case`: its limit, and what was measured or why nothing was."""
    return [_judge(goal, entries, rows) for goal in case.goals]

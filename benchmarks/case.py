"""A case: one table of the results, with the goals that were set for it."""

from dataclasses import dataclass, replace

from benchmarks.race import TOTAL

RATIO, NO_SLOT = "distance / of perfect draws", "draws of slots that do not exist"
"""Parts of an exactness case, for its goals."""


@dataclass(frozen=True)
class Ref:
    """A row of a case: what does not matter to tell it from others is None."""

    contestant: str
    part: str = TOTAL
    capacity: int | None = None
    batch: int | None = None


@dataclass(frozen=True)
class Goal:
    """`of` is to be at most `limit` times `against`, or at most `limit` where that is None."""

    text: str
    of: Ref
    limit: float
    against: Ref | None = None


@dataclass(frozen=True)
class Case:
    """One table of the results.

    Attributes:
        name: for --only.
        title, about: for the tables.
        kind: "race", "exactness", "cartpole" or "profile".
        contestants: names from `CONTESTANTS`; each at every point of the grid of `capacities`,
            `batches`, `schemas` and `draws`, all of them taking turns with one another.
        parts: methods of the contestants, timed in this order.
        seconds: about how long the rounds may take; building the buffers comes on top.
        device: "cpu" or "cuda".
        by_request: the command-line flag without which it is not run.
        plot: the axis along which it is plotted: "capacity", "batch" or "contestant".
    """

    name: str
    title: str
    about: str
    kind: str = "race"
    contestants: tuple[str, ...] = ()
    parts: tuple[str, ...] = ("sample", "update")
    capacities: tuple[int, ...] = (10**6,)
    batches: tuple[int, ...] = (256,)
    schemas: tuple[str, ...] = ("standard",)
    draws: tuple[str, ...] = ("independent",)
    seconds: float = 15.0
    device: str = "cpu"
    by_request: str | None = None
    goals: tuple[Goal, ...] = ()
    plot: str | None = None


SCALE = 1000


def _small(ref: Ref | None) -> Ref | None:
    if ref is None:
        return None
    return replace(
        ref,
        capacity=None if ref.capacity is None else max(64, ref.capacity // SCALE),
        batch=None if ref.batch is None else min(ref.batch, 32),
    )


def quick(case: Case) -> Case:
    """The same case at a thousandth of its size, to see that it runs; it measures nothing."""
    return replace(
        case,
        capacities=tuple(dict.fromkeys(max(64, c // SCALE) for c in case.capacities)),
        batches=tuple(dict.fromkeys(min(b, 32) for b in case.batches)),
        seconds=0.0,
        goals=tuple(replace(g, of=_small(g.of), against=_small(g.against)) for g in case.goals),
    )


def described(case: Case) -> dict:
    """Begin the record of a case: what it is."""
    names = ("name", "title", "about", "kind", "plot", "device")
    return {name: getattr(case, name) for name in names}


def not_run(case: Case, reason: str) -> dict:
    """Return the record of a case without any numbers, and why; its goals say so too."""
    goals = [
        {"text": g.text, "limit": g.limit, "relative": g.against is not None, "not_run": reason}
        for g in case.goals
    ]
    return described(case) | {"not_run": reason, "rows": [], "goals": goals}

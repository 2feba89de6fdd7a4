"""The distance of draws from the distribution they should have."""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.case import NO_SLOT, RATIO, Case
from benchmarks.contestants import CONTESTANTS, NotRun, methods
from benchmarks.workload import ALPHA, Point, priorities
from per_td import SumTree

RANGES, RESIDUES = 125, 8
OUTSIDE = RANGES * RESIDUES  # the bucket of slots that do not exist
CHUNK = 10**7
AT_ONCE = 2**16
PEERS = {"cpprb": 10**6, "flashbax": 10**6}  # up to how many slots

Draw = Callable[[int], Tensor]


def _tree(mass: Tensor) -> Draw:
    tree = SumTree(len(mass), mass.device)
    tree.fill(mass)
    return lambda n: torch.cat([tree.sample(min(AT_ONCE, n - i)) for i in range(0, n, AT_ONCE)])


METHODS: dict[str, Callable[[Tensor], Draw]] = {
    "per_td: tree": _tree,
    "per_td: multinomial (float64)": lambda mass: partial(methods.multinomial64, mass),
    "torch.multinomial (float32)": lambda mass: partial(methods.multinomial, mass),
    "cumsum + searchsorted (float32)": lambda mass: partial(
        methods.cumulative_sum, mass, dtype=torch.float32
    ),
}


def buckets(index: Tensor, capacity: int) -> Tensor:
    """Bucket of each slot: itself up to 1,000 slots, else its range and its residue mod 8.

    Slots that do not exist (peers have drawn such ones) go to a bucket of their own, the last.
    """
    if capacity > RANGES * RESIDUES:
        bucket = (index * RANGES // capacity) * RESIDUES + index % RESIDUES
    else:
        bucket = index
    return torch.where(index < capacity, bucket, OUTSIDE)


def expected(mass: Tensor) -> Tensor:
    """Probability of each bucket, float64 [1,001]."""
    total = torch.zeros(OUTSIDE + 1, dtype=torch.float64, device=mass.device)
    for start in range(0, len(mass), CHUNK):
        part = mass[start : start + CHUNK]
        index = torch.arange(start, start + len(part), device=mass.device)
        total += torch.bincount(buckets(index, len(mass)), part.double(), len(total))
    return total / total.sum()


def distance(index: Tensor, probability: Tensor, capacity: int) -> dict[str, float]:
    """Total variation and chi-square of the slots `index` [n] against bucket probabilities.

    Beside them the total variation that n perfect draws would have: E|X - np| of a binomial
    variable is about sqrt(2 n p (1 - p) / pi).
    """
    n = len(index)
    seen = torch.bincount(buckets(index, capacity), minlength=len(probability)).double()
    tv = float((seen / n - probability).abs().sum() / 2)
    perfect = (2 * probability * (1 - probability) / (math.pi * n)).sqrt().sum() / 2
    possible = probability > 0
    gap = (seen - n * probability)[possible]
    chi2 = (gap.square() / (n * probability[possible])).sum()
    chi2 = chi2 + (torch.inf if bool(seen[~possible].any()) else 0.0)
    freedom = torch.tensor((int(possible.sum()) - 1) / 2, dtype=torch.float64, device=chi2.device)
    p = float(torch.special.gammaincc(freedom, chi2 / 2)) if chi2.isfinite() else 0.0
    outside = int(seen[OUTSIDE])
    return {"tv": tv, "tv_perfect": float(perfect), "chi2_p": p, "outside": outside}


def _of_methods(case: Case, capacity: int, n: int, rows: list[dict]) -> None:
    for masses in ("equal", "random"):
        mass = torch.ones(capacity, device=case.device)
        if masses == "random":
            mass = priorities(capacity, case.device) ** ALPHA
        probability = expected(mass)
        for method, make in METHODS.items():
            row = {"contestant": method, "capacity": capacity, "masses": masses, "draws": n}
            try:
                row |= distance(make(mass)(n), probability, capacity)
            except NotRun as reason:
                row["not_run"] = str(reason)
            rows.append(row)


def _of_peer(name: str, capacity: int, n: int, rows: list[dict]) -> None:
    row = {"contestant": name, "capacity": capacity, "masses": "random", "draws": n}
    try:
        peer = CONTESTANTS[name](Point(capacity, min(capacity, 8192)))
        found: list[Tensor] = []
        while sum(map(len, found)) < n:  # whole batches: stratified ones come in order
            peer.sample()
            found.append(torch.as_tensor(peer.drawn()).long())
        probability = expected(peer.priority.double() ** ALPHA)
        row |= {"draws": sum(map(len, found))}
        row |= distance(torch.cat(found), probability, capacity)
    except NotRun as reason:
        row["not_run"] = str(reason)
    rows.append(row)


def worst(rows: list[dict]) -> list[dict]:
    """Rows that goals can be judged by: for each method and capacity the worst of all masses."""
    found: dict[tuple, float] = {}
    for row in rows:
        if "tv" in row:
            parts = {RATIO: row["tv"] / row["tv_perfect"], NO_SLOT: float(row["outside"])}
            for part, value in parts.items():
                key = row["contestant"], row["capacity"], part
                found[key] = max(found.get(key, 0.0), value)
    names = ("contestant", "capacity", "part")
    return [dict(zip(names, key, strict=True)) | {"median": v} for key, v in found.items()]


def measure(case: Case, *, peers: bool, quick: bool, seed: int) -> list[dict]:
    """Rows by method, capacity and kind of masses."""
    torch.manual_seed(seed)
    n = 20_000 if quick else 2_000_000
    rows: list[dict] = []
    for capacity in case.capacities:
        _of_methods(case, capacity, n, rows)
        for name, most in PEERS.items():
            if peers and case.device == "cpu" and 1000 <= capacity <= most:
                _of_peer(name, capacity, n, rows)
    return rows

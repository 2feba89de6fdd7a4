"""The base of all contestants, and the proof that their priorities take effect."""

from importlib.util import find_spec

import torch
from torch import Tensor

from benchmarks.race import Part
from benchmarks.workload import ALPHA, Point, Pool, priorities, transitions

PARTS = {
    "sample": "sample",
    "update": "update",
    "update_cold": "update, other slots",
    "extend": "extend",
    "add": "add",
    "step": "sample + update",
}
"""Method of a contestant -> name in the tables."""

CHECK_DRAWS = 20_000
REHEARSAL = "skipped: rehearsal"


class NotRun(Exception):  # noqa: N818 (it is no error)
    """Why a contestant cannot be measured here."""


class Contestant:
    """A filled buffer whose methods are the parts that are timed.

    A subclass offers some of `sample`, `update` (of the batch just drawn), `update_cold` (of slots
    drawn beforehand), `extend` (of `point.batch` transitions), `add` (of one), `step` (sample and
    update), and does in `before_<part>` what shall not be timed. `drawn` returns the slots of
    the last batch.

    Args:
        point: sizes, fields, device.

    Raises:
        NotRun: the library is missing, or cannot do this.
    """

    name = ""
    requires: str | None = None  # a module
    peer = False  # another library, measured with --peers only
    clock = "cpu"
    cuda_only = False  # cannot even be rehearsed without a GPU
    note = ""  # a footnote to its rows
    summed: tuple[str, ...] = ("sample", "update")  # parts of which a total is shown

    def __init__(self, point: Point) -> None:
        if self.requires is not None and find_spec(self.requires) is None:
            raise NotRun(f"{self.requires} is not installed")
        torch.manual_seed(point.seed)
        self.point = point
        self.pool = Pool(point)

    def parts(self, names: tuple[str, ...]) -> list[Part]:
        """Those of the parts `names` that this contestant has."""
        return [
            Part(
                PARTS[name],
                getattr(self, name),
                getattr(self, f"before_{name}", None),
                name in self.summed,
            )
            for name in names
            if hasattr(self, name)
        ]

    def facts(self) -> dict[str, tuple[float | None, str]]:
        """Return what can be counted: name -> (number, unit); None where only a GPU could tell."""
        return {}

    def initial(self) -> tuple[Tensor, Tensor]:
        """All transitions, [N], and their priorities float32 [N]."""
        point = self.point
        data = transitions(point.capacity, point.schema, point.device)
        return data, priorities(point.capacity, point.device)

    def new(self) -> Tensor:
        """Transitions for `extend`, [B]."""
        return transitions(self.point.batch, self.point.schema, self.point.device)

    def check(self) -> None:
        """Raise unless draws follow the priorities that were set with `update`.

        With masses m, the mean mass of a drawn slot is sum(m^2) / sum(m); if the priorities had not
        reached the buffer it would be sum(m) / N, which is a third less here.
        """
        if not hasattr(self, "drawn") or not hasattr(self, "priority"):
            return
        mass = self.priority.double() ** ALPHA
        want, uniform = float(mass.square().sum() / mass.sum()), float(mass.mean())
        found, n = 0.0, 0
        while n < CHECK_DRAWS:
            self.sample()
            index = torch.as_tensor(self.drawn()).long().to(mass.device)
            index = index[index < len(mass)]  # peers have drawn slots that do not exist
            found, n = found + float(mass[index].sum()), n + len(index)
        share = (found / n - uniform) / (want - uniform)
        if not 0.8 < share < 1.2:
            raise AssertionError(
                f"{self.name}: priorities did not take effect: expected slots of mean mass"
                f" {want:.4g} (uniform: {uniform:.4g}), got {found / n:.4g}"
            )


def tensor_bytes(thing: object) -> int:
    """Bytes of all tensors reachable from `thing` through attributes, lists and dicts."""
    seen: dict[int, int] = {}
    visited: set[int] = set()

    def visit(value: object) -> None:
        if id(value) in visited:
            return
        visited.add(id(value))
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, dict):
            for item in value.values():
                visit(item)
        elif isinstance(value, list | tuple):
            for item in value:
                visit(item)
        elif type(value).__module__.startswith("per_td"):
            visit(getattr(value, "__dict__", {}))

    visit(thing)
    return sum(seen.values())

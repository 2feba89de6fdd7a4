"""PriorityTable: raw priorities and masses of the slots of S groups, and settings of draws."""

import math
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from per_td import draws, validation
from per_td.errors import ConfigurationError, PerTdError
from per_td.kernels.parts import BETAS, EPS, EXPONENT, MINIMA, Layout
from per_td.kernels.reference import Runs
from per_td.memory import Zeros, zeros
from per_td.priorities import distributions
from per_td.priorities.followers import DrawCounts, Follower, SideTrees
from per_td.tree.trees import Trees
from per_td.weights import NORMALIZATIONS, priority_of

NEW_PRIORITIES = ("buffer_max", "ever_max")
CHOICES = {
    "draw": draws.DRAWS,
    "method": draws.METHODS,
    "new_priority": NEW_PRIORITIES,
    "weight_normalization": NORMALIZATIONS,
}
MODES = ("set", "max", "mean")
_LARGEST = torch.finfo(torch.float32).max


def as_clip(value: Any) -> tuple[float | None, float | None] | None:
    """Check bounds of priorities, a dictionary in a file, or raise ConfigurationError."""
    if value is None:
        return None
    if isinstance(value, dict) and set(value) == {"low", "high"}:
        value = value["low"], value["high"]
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise ConfigurationError(f"priority_clip: expected (low, high) or None, got {value!r}")
    low, high = (
        None if bound is None else validation.real("priority_clip", bound, high=_LARGEST)
        for bound in value
    )
    if low is not None and high is not None and low > high:
        raise ConfigurationError(f"priority_clip: expected low <= high, got {value!r}")
    return None if low is None and high is None else (low, high)


def plain_clip(clip: tuple[float | None, float | None] | None) -> dict[str, float | None] | None:
    """Bounds of priorities as a file holds them."""
    return None if clip is None else {"low": clip[0], "high": clip[1]}


def as_mode(mode: str = "set", rate: float = 1.0) -> dict[str, Any]:
    """Check how updates change priorities; return the arguments for `PriorityTable.update`."""
    if isinstance(mode, str) and mode == "set" and isinstance(rate, float) and rate == 1.0:
        return {}  # as nearly always
    mode, rate = validation.one_of("mode", mode, MODES), validation.real("rate", rate, high=1.0)
    if mode == "set" and rate != 1.0:
        raise ConfigurationError(f"rate: expected 1.0 with mode='set', got {rate:g}")
    return {} if mode == "set" else {"mode": mode, "rate": rate}


def check_choices(capacity: int, settings: dict[str, Any]) -> dict[str, str]:
    """Check the settings of `CHOICES`, beside a `uniform_mix`, or raise ConfigurationError."""
    chosen = {key: validation.one_of(key, settings[key], CHOICES[key]) for key in CHOICES}
    draws.check_method(chosen["method"], chosen["draw"], capacity)
    share = validation.real("uniform_mix", settings["uniform_mix"], high=1.0)
    if share and chosen["draw"] == "without_replacement":
        raise ConfigurationError(
            f"uniform_mix: expected 0 with draw='without_replacement', got {share:g}"
        )
    return chosen


def _make_side(sides: dict[str, SideTrees], name: str, main: Trees, memory: Zeros) -> None:
    def make() -> None:
        sides[name] = SideTrees(name, main, memory)

    if "torch._dynamo" in sys.modules:  # torch.compile may be at work, and would trace inner calls
        make = torch.compiler.disable(make)  # type: ignore[no-untyped-call]
    make()


# torch.compile does not trace it, which breaks that one graph; torch.compiler.disable does as much,
# but imports all of the compiler
_make_side._torchdynamo_disable = True  # type: ignore[attr-defined]


class PriorityTable:
    """Raw priorities p, their masses, and the settings of draws in proportion to mass.

    Masses are computed from the raw priorities, so alpha may change at any time and nothing is
    lost, not even at alpha = 0. Empty slots have priority 0. `per_td.priorities.sampling` draws.

    Args:
        capacity: number of slots of each group.
        alpha, eps, draw, method, weight_normalization, new_priority, prioritization, sort_interval,
            priority_clip, uniform_mix, track_draws: see `PrioritizedReplayBuffer`.
        device: device of the priorities.
        groups: S tables side by side, with results [S, ...]; None: one, without that dimension.
        memory: makes the memory.

    Raises:
        ConfigurationError: an argument is not one of those accepted.
    """

    @torch.inference_mode(False)  # what is made here stays
    def __init__(
        self,
        capacity: int,
        *,
        alpha: Any,
        eps: float,
        draw: str,
        method: str,
        weight_normalization: str,
        new_priority: str,
        device: torch.device,
        prioritization: str = "proportional",
        sort_interval: int | None = None,
        priority_clip: Any = None,
        uniform_mix: float = 0.0,
        track_draws: bool = False,
        groups: int | None = None,
        memory: Zeros = zeros,
    ) -> None:
        self.priority_clip = as_clip(priority_clip)
        self.distribution = distributions.make(prioritization, capacity, sort_interval)
        alpha = self.distribution.alpha if alpha is None else alpha
        alpha = validation.real_or_each("alpha", alpha, groups)
        eps = validation.real("eps", eps, high=torch.finfo(torch.float32).max)
        choices = {
            "draw": draw,
            "method": method,
            "new_priority": new_priority,
            "weight_normalization": weight_normalization,
            "uniform_mix": uniform_mix,
        }
        chosen = check_choices(capacity, choices)
        self.groups, self.lead = groups, () if groups is None else (groups,)
        self.trees = Trees(
            Layout.of(capacity, groups or 1),
            device,
            extremes=True,
            replayed=groups is None,
            snapshot=self.distribution.snapshot,
            launches=self.distribution.launches,
            memory=memory,
        )
        self._set_alpha(alpha)
        self.trees.set(EPS, eps)
        self.points = torch.empty((*self.lead, 0), dtype=torch.float64, device=device)
        """Template of random numbers, for `per_td.priorities.sampling`."""
        self._memory: Zeros | None = memory
        self._sides: dict[str, SideTrees] = {}
        self.draw_counts: DrawCounts | None = None
        """Counts of draws; None: they are not kept."""
        if validation.flag("track_draws", track_draws):
            self.draw_counts = DrawCounts(self.trees.layout, device, memory)
        self._uniform_mix = 0.0
        self._choose(chosen)
        self.uniform_mix = uniform_mix

    # --- settings ---------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Device of the priorities."""
        return self.trees.device

    @property
    def capacity(self) -> int:
        """Number of slots of each group."""
        return self.trees.layout.capacity

    @property
    def prioritization(self) -> str:
        """Name of the distribution."""
        return self.distribution.name

    @property
    def sort_interval(self) -> int | None:
        """Number of changes from one sort to the next; see `distributions.Rank`."""
        return self.distribution.sort_interval

    @property
    def alpha(self) -> float | Tensor:
        """Exponent of the priorities, or one for each group, float64 [S], a copy.

        Setting it recomputes all masses, in O(N).
        """
        number = self.trees.setting(EXPONENT)
        each = math.isnan(number)
        return self.distribution.exponent(self.trees.exponents.clone() if each else number)

    @alpha.setter
    def alpha(self, value: Any) -> None:
        wanted, previous = validation.real_or_each("alpha", value, self.groups), self.alpha
        if isinstance(wanted, Tensor) or isinstance(previous, Tensor) or wanted != previous:
            self._set_alpha(wanted)
            try:
                self._refill()
            except BaseException:  # such as no memory for the masses
                self._set_alpha(previous)
                raise

    def _set_alpha(self, value: float | Tensor) -> None:
        self.trees.set_exponent(self.distribution.exponent(value))

    @property
    def eps(self) -> float:
        """Number that updates add to |TD error|."""
        return self.trees.setting(EPS)

    @eps.setter
    def eps(self, value: float) -> None:
        self.trees.set(EPS, validation.real("eps", value, high=torch.finfo(torch.float32).max))

    @property
    def priority_clip(self) -> tuple[float | None, float | None] | None:
        """Bounds of the priorities that updates set; None: there are none."""
        return self._clip

    @priority_clip.setter
    def priority_clip(self, value: Any) -> None:
        self._clip = as_clip(value)

    @property
    def uniform_mix(self) -> float:
        """Share of draws that are uniform over all that can be drawn."""
        return self._uniform_mix

    @uniform_mix.setter
    def uniform_mix(self, value: float) -> None:
        self._uniform_mix = self.require_mix(value)

    def require_mix(self, value: float) -> float:
        """Check a `uniform_mix`, and make the trees that it needs, or raise ConfigurationError."""
        value = validation.real("uniform_mix", value, high=1.0)
        if value:
            check_choices(self.capacity, self.arguments | {"uniform_mix": value})
            self.side("uniform")
        return value

    def has_side(self, name: str) -> bool:
        """True if `side` has made these trees."""
        return name in self._sides

    def seal(self) -> None:
        """Make no more side trees, of which other processes would not know."""
        self._memory = None

    def side(self, name: str) -> SideTrees:
        """Trees of other masses, "uniform" or "inverse"; made when first asked for."""
        if name not in self._sides:
            if self._memory is None:
                raise ConfigurationError(
                    f"by, uniform_mix: expected draws by priority in a shared buffer that was made"
                    f" without a uniform_mix, got {name!r}: other processes would not know"
                )
            _make_side(self._sides, name, self.trees, self._memory)
        return self._sides[name]

    @property
    def _followers(self) -> list[Follower]:
        counts = [] if self.draw_counts is None else [self.draw_counts]
        return [*self._sides.values(), *counts]

    def _follow(self, slot: Tensor, *, new: bool) -> None:
        if self._sides or self.draw_counts is not None:
            for follower in self._followers:
                follower.follow(slot, new=new)

    @property
    def betas(self) -> bool:
        """True where each group has a beta of its own; the table's owner keeps them."""
        return bool(self.trees.setting(BETAS))

    @betas.setter
    def betas(self, value: bool) -> None:
        self.trees.set(BETAS, float(value))

    @property
    def weight_normalization(self) -> str:
        """Normalization of the weights; "buffer" keeps the smallest mass up to date."""
        return self._weight_normalization

    @weight_normalization.setter
    def weight_normalization(self, value: str) -> None:
        self.choose(weight_normalization=value)

    def choose(self, **changes: str) -> None:
        """Change settings, all or none: draw, method, weight_normalization or new_priority.

        The weight_normalization "buffer" costs O(N). What is refused raises ConfigurationError.
        """
        self._choose(check_choices(self.capacity, self.arguments | changes))

    def _choose(self, chosen: dict[str, str]) -> None:
        draw, method, new_priority, normalization = chosen.values()
        way = draws.resolve_method(
            method,
            draw,
            self.capacity,
            self.device,
            compiled=self.trees.compiled,
            many=bool(self.lead),
        )
        if normalization == "buffer":
            self.trees.keep_minima(True)
        self.way: str = way
        """Method that draws, never "auto"."""
        # no interrupt comes between these
        self.draw, self.method, self.new_priority = draw, method, new_priority
        self._weight_normalization = normalization
        if normalization != "buffer":
            self.trees.keep_minima(False)

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments that make a table with the same settings."""
        return {
            "alpha": self.alpha,
            "eps": self.eps,
            "draw": self.draw,
            "method": self.method,
            "weight_normalization": self.weight_normalization,
            "new_priority": self.new_priority,
            "prioritization": self.prioritization,
            "sort_interval": self.sort_interval,
            "priority_clip": self.priority_clip,
            "uniform_mix": self.uniform_mix,
            "track_draws": self.draw_counts is not None,
        }

    # --- views ------------------------------------------------------------------------------------

    def _shaped(self, each: Tensor) -> Tensor:
        """A tensor [S, ...] as [...] for one table."""
        shaped: Tensor = each if self.lead else each[0]
        return shaped

    @property
    def raw(self) -> Tensor:
        """Raw priorities of all slots, float32 [capacity] or [S, capacity], a view."""
        return self._shaped(self.trees.priorities)

    @property
    def mass(self) -> Tensor:
        """Masses of all slots, float32 [capacity] or [S, capacity], a view."""
        return self._shaped(self.trees.masses)

    @property
    def total(self) -> Tensor:
        """Sum of the masses, float64 [] or [S]."""
        return self._shaped(self.trees.total)

    @property
    def largest(self) -> Tensor:
        """Largest priority, 0 for none, float32 [] or [S]."""
        return self._shaped(self.trees.largest)

    @property
    def smallest(self) -> Tensor:
        """Smallest positive mass, float32 [] or [S]; inf for none, or if it is not kept."""
        return self._shaped(self.trees.smallest)

    @property
    def ever_max(self) -> Tensor:
        """Largest priority ever, float32 [] or [S], a view."""
        return self._shaped(self.trees.ever_max)

    @property
    def replayed(self) -> Tensor:
        """True for slots drawn since they were written, bool [capacity], a view; one table only."""
        return self.trees.replayed[: self.capacity]

    @property
    def draw_count(self) -> Tensor | None:
        """Number of draws of each slot, int32 [capacity] or [S, capacity], a view; or None."""
        return None if self.draw_counts is None else self._shaped(self.draw_counts.counts)

    @property
    def refused(self) -> Tensor:
        """Number of invalid priorities refused on the device, int64 []."""
        return self.trees.refused

    def for_new(self) -> Tensor:
        """Default priority of new transitions, [] or [S] (algorithm 1, line 6).

        It is the largest in the buffer, or ever (`new_priority`); 1 if there is none.
        """
        return self._shaped(self.trees.ops.for_new(self.trees, ever_max=self._ever_max))

    @property
    def _ever_max(self) -> bool:
        return self.new_priority == "ever_max"

    @property
    def nbytes(self) -> int:
        """Bytes of memory for the priorities and what follows them."""
        counts = 0 if self.draw_count is None else self.draw_count.nbytes
        return self.trees.nbytes + counts + sum(s.trees.nbytes for s in self._sides.values())

    # --- writing ----------------------------------------------------------------------------------

    def check_initial(self, priority: Any, index: Tensor, mask: Tensor | None = None) -> Tensor:
        """Check priorities supplied for new transitions, one per index, int64 [n] or [S, n].

        Returns float32 like `index`; -1 marks those refused on the device. Where `mask` is False,
        any value is allowed. PriorityError: shape or dtype are wrong, or a value is NaN, infinite
        or negative.
        """
        given = validation.as_values("priority", priority, index)
        valid = validation.require_finite("priority", given, low=0.0, wanted=mask)
        return given if validation.can_raise(given) else torch.where(valid, given, -1.0)

    def write_new(self, index: Tensor, priority: Tensor | None, mask: Tensor | None = None) -> None:
        """Set the priorities of new transitions; where a slot occurs twice, its last one holds.

        Args:
            index: slots, int64 [n] or [S, n]; on CUDA nobody looks if they exist.
            priority: result of `check_initial`; None: that of `for_new`.
            mask: bool, False for slots that were not written; not for ranks, which count all.
        """
        trees = self.trees
        if priority is not None:
            validation.require_same_shape("priority", priority, index)
            if not validation.can_raise(priority):
                refused = priority < 0 if mask is None else (priority < 0) & mask
                trees.refused += refused.sum()
                new = self.for_new()
                new = new.unsqueeze(-1) if self.lead else new
                priority = torch.where(priority < 0, new, priority)
        if index.shape[-1] > self.capacity:
            if priority is not None:  # also the largest of those that do not remain
                each = priority if mask is None else priority.where(mask, 0.0)
                largest = each.view(trees.layout.groups, -1).amax(-1)
                torch.maximum(trees.ever_max, largest, out=trees.ever_max)
            if mask is None:  # the last remain; of a slot the last holds anyway
                index = index[..., -self.capacity :]
                priority = None if priority is None else priority[..., -self.capacity :]
        trees.ops.assign(
            trees,
            self.distribution,
            index,
            priority,
            written=self.capacity,
            limit=self.capacity,
            mask=mask,
            new=True,
            ever_max=self._ever_max,
        )
        if self.distribution.changed(index.numel(), new=True):
            self._refill()
        self._follow(index if mask is None else torch.where(mask, index, -1), new=True)

    def write_runs(self, runs: Runs) -> None:
        """Run `write_new` for a run of slots of each group; see `reference.assign_new`."""
        trees = self.trees
        trees.ops.assign_new(trees, self.distribution, runs, ever_max=self._ever_max)
        if self.distribution.changed(sum(runs[1::2]), new=True):
            self._refill()
        if self._sides or self.draw_counts is not None:
            self._follow(self._slots_of(runs), new=True)

    def _slots_of(self, runs: Runs) -> Tensor:
        """The slots of a run in each group, int64 [S, n]; -1 beyond the shorter ones."""
        cpu = torch.device("cpu")
        first, length = torch.tensor([runs[::2], runs[1::2]], dtype=torch.int64, device=cpu)
        first, length = first.unsqueeze(-1), length.unsqueeze(-1)
        place = torch.arange(max(runs[1::2]), device=cpu)
        slot = torch.where(place < length, (first + place) % self.capacity, -1)
        return validation.to_device(slot, self.device)

    def update(
        self,
        index: Tensor,
        td_error: Any,
        *,
        written: Tensor | int,
        generation: Tensor | None = None,
        stamps: Tensor | None = None,
        mask: Tensor | None = None,
        squared: bool = False,
        mode: str = "set",
        rate: float = 1.0,
    ) -> Tensor | int:
        """Set priorities from TD errors; where a slot occurs twice, its last one holds.

        Args:
            index: slots, int64 [B] or [S, B].
            td_error: one per index.
            written: number of transitions ever written, int64 [S], or one number for all; an index
                must be below it.
            generation: generations of the transitions meant, int64, in the shape of `index`;
                updates of stale ones are dropped. None drops none.
            stamps: current generations of the slots, int64 [capacity]; None computes them from
                `written`.
            mask: bool, in the shape of `index`; False leaves a slot alone.
            squared: the TD errors are delta^2.
            mode, rate: see `PrioritizedReplayBuffer.update_priority`; or "exact": `td_error` has
                priorities, to be set as they are.

        Returns:
            The number of updates dropped.

        Raises:
            IndexRangeError: an index names no filled slot.
            PriorityError: a TD error is NaN or infinite, or the shape or dtype is wrong.
                On CUDA such updates are refused and counted instead.
        """
        plain = mode == "set" and self._clip is None
        if mode == "exact":
            value = self._valid(index, td_error, mask)
        else:
            value = validation.as_values("td_error", td_error, index)
            if not plain:
                value = self._priorities_of(index, value, mask, squared, mode, rate)
        if generation is not None:
            validation.require_same_shape("generation", generation, index)
        trees = self.trees
        dropped: Tensor | int = trees.ops.assign(
            trees,
            self.distribution,
            index,
            value,
            written=written,
            limit=self.capacity,
            generation=generation,
            stamps=stamps,
            mask=mask,
            add_eps=plain,
            squared=plain and squared,
            ever_max=self._ever_max,
        )
        if self.distribution.changed(index.numel()):
            self._refill()
        if self._sides:
            self._follow(index, new=False)
        return dropped

    def _valid(self, index: Tensor, priority: Any, mask: Tensor | None) -> Tensor:
        """Check priorities, one per index; NaN marks those refused on the device."""
        given = validation.as_values("priority", priority, index)
        valid = validation.require_finite("priority", given, low=0.0, wanted=mask)
        return given if validation.can_raise(given) else torch.where(valid, given, torch.nan)

    def _priorities_of(
        self,
        index: Tensor,
        td_error: Tensor,
        mask: Tensor | None,
        squared: bool,
        mode: str,
        rate: float,
    ) -> Tensor:
        """Priorities of TD errors, within the bounds and by the mode; NaN for those not finite."""
        valid = validation.require_finite("td_error", td_error, wanted=mask)
        size = td_error.abs().sqrt() if squared else td_error
        priority = priority_of(size, self.trees.settings[EPS].float())
        if self._clip is not None:
            priority = priority.clamp(*self._clip)
        if mode != "set":
            old = self.raw.gather(-1, index.clamp(0, self.capacity - 1))
            priority = (rate * old).maximum(priority) if mode == "max" else old.lerp(priority, rate)
        return torch.where(valid, priority, torch.nan)

    # --- the whole --------------------------------------------------------------------------------

    def moved(self, capacity: int, device: torch.device) -> "PriorityTable":
        """Copy the table to another capacity and device."""
        table = PriorityTable(capacity, device=device, **self.arguments)
        kept = min(capacity, self.capacity)
        table.fill(self.raw[:kept].to(device))
        table.replayed[:kept] = self.replayed[:kept].to(device)
        if table.draw_count is not None and self.draw_count is not None:
            table.draw_count[:kept] = self.draw_count[:kept].to(device)
        table.trees.ever_max.copy_(self.trees.ever_max)
        table.refused.copy_(self.refused)
        return table

    def empty(self) -> None:
        """Set all priorities to 0, and the largest that there ever was."""
        self.trees.ever_max.zero_()
        self.fill(self.raw[..., :0])

    def fill(self, priority: Tensor, mass: Tensor | None = None) -> None:
        """Set the priorities of the first slots, and 0 for the others, in O(N); none is replayed.

        Priorities and their masses are float32 [n] or [S, n]; without masses, they are computed.
        """
        n, trees = priority.shape[-1], self.trees
        if n > self.capacity:
            raise PerTdError(f"expected at most {self.capacity} priorities, got {n}")
        trees.raw.zero_()
        self.raw[..., :n] = priority
        trees.replayed.zero_()
        self.distribution.filled(n)
        if self.draw_counts is not None:
            self.draw_counts.follow_all(new=True)
        self._refill(mass)

    def restore(self, priority: Tensor, ever_max: Tensor, mass: Tensor | None = None) -> None:
        """Run `fill`, and set the largest priority ever, [] or [S].

        A state holds masses, since kernels and torch may round the last bit of p^alpha otherwise,
        which could change a draw.
        """
        self.trees.ever_max.copy_(ever_max.reshape(-1))
        self.fill(priority, mass)

    def void(self, runs: Sequence[tuple[int, int]]) -> None:
        """Set the priorities of a run (first slot, length) of each group to 0; then `rebuild`."""
        for s, (start, n) in enumerate(runs):
            index = torch.arange(start, start + n, device=self.device).remainder_(self.capacity)
            self.trees.priorities[s, index] = 0.0
            if len(self.trees.replayed):
                self.trees.replayed[index] = False

    def retire(self, ring: Any) -> None:
        """Set the priorities of the `ring.dead()` slots to 0, in O(N) if there are any."""
        dead = ring.dead()
        if dead is not None:
            self.raw.masked_fill_(dead, 0.0)
            self._refill()
            ring.bury(dead)

    def rebuild(self) -> None:
        """Recompute masses, ranks, sums and extremes from the raw priorities, in O(N)."""
        kept = self.trees.keeps_minima
        self.trees.set(MINIMA, float(kept))  # an interrupt may have come between the two
        self._set_alpha(self.alpha)  # and between these
        if not kept:
            self.trees.minima.fill_(torch.inf)
        self._refill()

    def _refill(self, mass: Tensor | None = None) -> None:
        """Set all masses, given or computed from the priorities, and all nodes."""
        trees = self.trees
        if mass is None:
            trees.leaves.copy_(self.distribution.all_masses(trees))
        else:
            trees.leaves.zero_()
            self.mass[..., : mass.shape[-1]] = mass
        trees.ops.refill(trees)
        torch.maximum(trees.ever_max, trees.largest, out=trees.ever_max)
        for side in self._sides.values():
            side.follow_all(new=False)

    def check_valid(self) -> None:
        """Raise PerTdError unless the priorities give all masses and nodes.

        It takes O(N), for ranks O(N log N); on CUDA the host waits.
        """
        trees, require = self.trees, validation.require_valid
        trees.check_valid()
        number = trees.setting(EXPONENT)
        alike = math.isnan(number) or (trees.exponents == number).all()
        require(alike, "alpha is one number unless each group has its own")
        least, most, source = self.distribution.range_of(trees)
        mass = trees.leaves
        near = (mass >= least * (1 - 1e-5)) & (mass <= most.double() * (1 + 1e-5))
        require(near.all(), f"masses follow from {source}")
        require((trees.largest <= trees.ever_max).all(), "no priority is above the largest ever")
        for follower in self._followers:
            follower.check_valid()

"""PriorityTable: the raw priority of every slot, and the masses and extrema that follow from it."""

from typing import Any, SupportsIndex

import torch
from torch import Tensor

from per_td import draws, validation
from per_td.errors import IndexRangeError
from per_td.memory import zeros
from per_td.priorities import kernel_calls as priority_kernels
from per_td.priorities.ranks import DEFAULT_ALPHA, PRIORITIZATIONS, RankMasses
from per_td.storage.generations import generation_of
from per_td.tree import ExtremumTree, SumTree, reference
from per_td.weights import NORMALIZATIONS, mass_of, priority_of

__all__ = ["NEW_PRIORITIES", "PriorityTable"]

NEW_PRIORITIES = ("buffer_max", "ever_max")


class _Masses(SumTree):
    """A tree that is sent wherever its table is, and as the table is: a copy, or shared."""

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        return object.__reduce_ex__(self, protocol)


class PriorityTable:
    """Priorities p, masses p^alpha, and the settings of draws in proportion to them.

    Writing is here; what draws is in `per_td.priorities.sampling`.

    Raw priorities are the truth, and masses follow from them, so alpha may change at any time and
    nothing is lost, not even at alpha = 0. Slots beyond those filled have priority 0. Rank-based,
    a mass is rank^-alpha instead: see `per_td.priorities.ranks`.

    Args:
        capacity: number of slots.
        alpha, eps, draw, method, weight_normalization, new_priority, prioritization, sort_interval:
            as for `PrioritizedReplayBuffer`.
        device: where priorities live.
        masses: the tree to keep the masses in; None makes one.

    Raises:
        ConfigurationError: an argument is not one of those accepted.
    """

    @torch.inference_mode(False)
    def __init__(
        self,
        capacity: int,
        *,
        alpha: float | None,
        eps: float,
        draw: str,
        method: str,
        weight_normalization: str,
        new_priority: str,
        device: torch.device,
        prioritization: str = "proportional",
        sort_interval: int | None = None,
        masses: SumTree | None = None,
    ) -> None:
        self.ranks = RankMasses.wanted(prioritization, capacity, sort_interval, device)
        self.prioritization = validation.one_of("prioritization", prioritization, PRIORITIZATIONS)
        self.sort_interval = None if self.ranks is None else self.ranks.sort_interval
        alpha = DEFAULT_ALPHA[self.prioritization] if alpha is None else alpha
        self._settings = torch.zeros(2, dtype=torch.float64, device=device)
        self._alpha = validation.real("alpha", alpha)
        self._settings[0].fill_(self._alpha)
        self.eps = eps
        self.draw, self.method = self._way(draw, method, capacity)
        self.new_priority = validation.one_of("new_priority", new_priority, NEW_PRIORITIES)
        self.masses = _Masses(capacity, device) if masses is None else masses
        layout = self.masses.layout
        self._raw = zeros((layout.leaf_slots,), torch.float32, device)
        self._method = self._faster()
        self._largest = ExtremumTree(self._raw, layout, "max")
        self._smallest: ExtremumTree | None = None
        self.weight_normalization = weight_normalization
        self.ever_max = torch.zeros((), dtype=torch.float32, device=device)
        self._replayed = zeros((layout.leaf_slots,), torch.bool, device)
        self.refused = torch.zeros((), dtype=torch.int64, device=device)
        self._points = torch.empty(0, dtype=torch.float64, device=device)

    @property
    def device(self) -> torch.device:
        """Where the priorities live."""
        return self._raw.device

    @property
    def capacity(self) -> int:
        """Number of slots."""
        return self.masses.layout.capacity

    @property
    def raw(self) -> Tensor:
        """Raw priorities of all slots, float32 [capacity], a view."""
        return self.masses.slots(self._raw)

    @property
    def mass(self) -> Tensor:
        """Masses of all slots, float32 [capacity], a view."""
        return self.masses.slots(self.masses.leaves)

    @property
    def total(self) -> Tensor:
        """Sum of all masses, float64 []; not to be written to."""
        return self.masses.total

    @property
    def largest(self) -> Tensor:
        """The largest priority, 0 where there is none, float32 []; not to be written to."""
        return self._largest.value

    @property
    def smallest(self) -> Tensor | None:
        """The smallest positive mass, inf where there is none, float32 []; not to be written to.

        None where it is not kept: unless `weight_normalization` is "buffer".
        """
        return None if self._smallest is None else self._smallest.value

    @property
    def replayed(self) -> Tensor:
        """Whether each slot has been drawn since it was written, bool, a view."""
        return self._replayed[: self.masses.layout.capacity]

    @property
    def alpha(self) -> float:
        """Exponent of the priorities; setting it recomputes all masses, in O(N)."""
        return self._alpha

    @alpha.setter
    def alpha(self, value: float) -> None:
        value = validation.real("alpha", value)
        if value != self._alpha:
            self._alpha = value
            self._settings[0].fill_(value)
            self._refill()

    @property
    def eps(self) -> float:
        """Added to |TD error| by the updates from now on."""
        return self._eps

    @eps.setter
    def eps(self, value: float) -> None:
        self._eps = validation.real("eps", value, high=torch.finfo(torch.float32).max)
        self._settings[1].fill_(self._eps)

    @property
    def weight_normalization(self) -> str:
        """What the weights are divided by; "buffer" keeps the smallest mass up to date."""
        return self._weight_normalization

    @weight_normalization.setter
    def weight_normalization(self, value: str) -> None:
        value = validation.one_of("weight_normalization", value, NORMALIZATIONS)
        smallest = self._smallest if value == "buffer" else None
        if value == "buffer" and smallest is None:
            smallest = ExtremumTree(self.masses.leaves, self.masses.layout, "min")
        self._weight_normalization, self._smallest = value, smallest

    @staticmethod
    def _way(draw: str, method: str, capacity: int) -> tuple[str, str]:
        """Check how to draw; returns `draw` and `method`."""
        draw = validation.one_of("draw", draw, draws.DRAWS)
        method = validation.one_of("method", method, draws.METHODS)
        draws.check_method(method, draw, capacity)
        return draw, method

    def _faster(self) -> str:
        """The method that draws, where "auto" leaves the choice."""
        compiled, capacity = self.masses.kernels is not None, self.masses.capacity
        return draws.resolve_method(
            self.method, self.draw, capacity, self.device, compiled=compiled
        )

    def choose(self, **changes: str) -> None:
        """Change settings; where one is refused, none is changed.

        Args:
            changes: draw, method, weight_normalization (O(N) for "buffer") or new_priority.

        Raises:
            ConfigurationError: a value is not one of those accepted, or two do not go together.
        """
        wanted = self.arguments | changes
        draw, method = self._way(wanted["draw"], wanted["method"], self.masses.capacity)
        new = validation.one_of("new_priority", wanted["new_priority"], NEW_PRIORITIES)
        self.weight_normalization = wanted["weight_normalization"]  # the last that may be refused
        self.draw, self.method, self.new_priority = draw, method, new
        self._method = self._faster()

    @property
    def arguments(self) -> dict[str, Any]:
        """What makes another table like this one, of any capacity, on any device."""
        return {
            "alpha": self.alpha,
            "eps": self.eps,
            "draw": self.draw,
            "method": self.method,
            "weight_normalization": self.weight_normalization,
            "new_priority": self.new_priority,
            "prioritization": self.prioritization,
            "sort_interval": self.sort_interval,
        }

    def for_new(self) -> Tensor:
        """Priority of transitions that nobody gave one: 0-dim (section 3.3, algorithm 1 line 6).

        The largest in the buffer, or 1 where there is none.
        """
        known = self._largest.value if self.new_priority == "buffer_max" else self.ever_max
        return torch.where(known > 0, known, 1.0)

    def check_initial(self, priority: Any, index: Tensor) -> Tensor:
        """Priorities supplied for new transitions as float32 [n]; -1 marks those refused.

        Raises:
            PriorityError: wrong shape or dtype, NaN, infinite or negative (refused on CUDA).
        """
        priority = validation.as_values("priority", priority, index)
        valid = validation.require_finite("priority", priority, low=0.0)
        return torch.where(valid, priority, -1.0)

    def write_new(self, index: Tensor, priority: Tensor | None, kept: Tensor | None = None) -> None:
        """Give newly written slots their priority.

        Args:
            index: slots, int64 [n], without repetitions.
            priority: from `check_initial`, [n]; None, and -1, stand for that of `for_new`.
            kept: bool [n], False for what was not written, whatever its index; None: all was.
                Not for ranks, which count what is new.

        Raises:
            IndexRangeError: an index is not that of a slot (on the CPU, where it can be looked at).
            PriorityError: there is not one priority per index.
        """
        if priority is not None:
            validation.require_same_shape("priority", priority, index)
        kernel, done = self.masses.kernels, None
        if kernel is not None and kept is None:
            done = priority_kernels.assign(
                kernel, self, index, priority, self.capacity, eps=0.0, new=True
            )
        if done is None:
            self._write_new_in_torch(index, priority, kept)
        if self.ranks is not None:
            self._count_changes(self.ranks, len(index), new=True)

    def _write_new_in_torch(
        self, index: Tensor, priority: Tensor | None, kept: Tensor | None
    ) -> None:
        if kept is None and validation.can_raise(index):
            validation.require_in_range(index, self.capacity)
        if priority is None:
            priority = self.for_new().expand(index.shape)
        else:
            refused = priority < 0 if kept is None else (priority < 0) & kept
            self.refused += refused.sum()
            priority = torch.where(refused, self.for_new(), priority)
        if kept is not None:
            index, priority = validation.route(index, priority, kept, self.masses.layout.spare)
        self._replayed.index_fill_(0, index, False)
        self._write(index, priority, kept)

    def write_row(self, start: int, n: int) -> None:
        """`write_new` for the `n` slots, at most `capacity`, from `start` on and around the end.

        Raises:
            IndexRangeError: there are no such slots.
        """
        capacity = self.capacity
        if not (0 <= start < capacity and 0 <= n <= capacity):
            raise IndexRangeError(
                f"slots: expected at most {capacity}, from one of them on, got {n} from {start} on"
            )
        kernel = self.masses.kernels
        if kernel is None:
            index = torch.arange(start, start + n, device=self.device).remainder_(capacity)
            self.write_new(index, None)
        elif n:
            priority_kernels.renew(kernel, self, start, n)
            if self.ranks is not None:
                self._count_changes(self.ranks, n, new=True)

    @property
    def _launches(self) -> Any:
        """The changes of priorities in Triton, which know no ranks."""
        return None if self.ranks is not None else self.masses.launches

    def update(
        self,
        index: Tensor,
        td_error: Any,
        size: Tensor | int,
        live: Tensor | None = None,
        *,
        generation: Tensor | None = None,
        written: Tensor | int = 0,
    ) -> Tensor | int:
        """Set priorities from TD errors; where an index occurs twice, its last one holds.

        Args:
            index: slots, int64 [B].
            td_error: TD errors [B].
            size: number of filled slots, of which no more than the capacity count; on CUDA a 0-dim
                tensor, which a CUDA graph reads anew.
            live: bool [B], False for updates to be dropped; None drops none.
            generation: instead of `live`: those of the transitions meant, int64 [B], in a ring of
                this capacity; what has been overwritten since is dropped.
            written: how many transitions were ever written to the ring.

        Returns:
            How many were dropped.

        Raises:
            IndexRangeError: an index is not that of a filled slot.
            PriorityError: a TD error is NaN or infinite, or the shape or dtype is wrong.
                On CUDA such updates are refused and counted instead.
        """
        td_error = validation.as_values("td_error", td_error, index)
        if generation is not None:
            validation.require_same_shape("generation", generation, index)
        kernel, launches = self.masses.kernels, self._launches
        if launches is not None:
            return priority_kernels.launch(
                launches,
                self,
                index,
                td_error,
                eps=self._settings[1],
                size=size,
                live=live,
                generation=generation,
                written=written,
            )
        dropped: Tensor | int | None = None
        if kernel is not None and live is None:
            dropped = priority_kernels.assign(
                kernel,
                self,
                index,
                td_error,
                min(int(size), self.capacity),
                eps=self._eps,
                generation=generation,
                written=written,
            )
        if dropped is None:
            if generation is not None:
                live = generation == generation_of(index, written, self.capacity)
            dropped = self._update_in_torch(index, td_error, size, live)
        if self.ranks is not None:
            self._count_changes(self.ranks, len(index))
        return dropped

    def _update_in_torch(
        self, index: Tensor, td_error: Tensor, size: Tensor | int, live: Tensor | None
    ) -> Tensor | int:
        priority = priority_of(td_error, self._eps)
        largest = self.capacity
        size = size.clamp(max=largest) if isinstance(size, Tensor) else min(size, largest)
        valid = validation.require_in_range(index, size)
        valid = valid & validation.require_finite("td_error", priority)
        if not validation.can_raise(valid):
            self.refused += (~valid).sum()
        if live is not None:
            valid = valid & live
        index, priority = validation.route(index, priority, valid, self.masses.layout.spare)
        self._write(*reference.keep_last(index, priority))
        return 0 if live is None else (~live).sum()

    def _write(self, index: Tensor, priority: Tensor, kept: Tensor | None = None) -> None:
        """Write valid priorities, and all that follows from them.

        What is not `kept` [n] has been sent to the spare leaf.
        """
        launches = self._launches
        if launches is not None:
            if kept is not None:  # they would count the spare leaf as refused
                index = torch.where(kept, index, 0)
            priority_kernels.launch(launches, self, index, priority, live=kept)
            return
        self._raw[index] = priority
        if self.ranks is None:
            mass = mass_of(priority, self._alpha)
        else:
            mass = self.ranks.of(priority, self._alpha)
        self.masses._write(index, mass)
        self._largest.refresh(index)
        if self._smallest is not None:
            self._smallest.refresh(index)
        if priority.numel():
            torch.maximum(self.ever_max, priority.amax(), out=self.ever_max)

    def moved(self, capacity: int, device: torch.device) -> "PriorityTable":
        """A table with the same settings and priorities, of this capacity, on this device."""
        table = PriorityTable(capacity, device=device, **self.arguments)
        table.fill(self.raw[:capacity].to(device))
        kept = min(capacity, self.capacity)
        table.replayed[:kept] = self.replayed[:kept].to(device)
        table.ever_max.copy_(self.ever_max)
        table.refused.copy_(self.refused)
        return table

    def fill(self, priority: Tensor, mass: Tensor | None = None) -> None:
        """Set the priorities of the first slots, and 0 for the others, in O(N).

        All count as new: none has been replayed.

        Args:
            priority: float32 [n].
            mass: their masses, float32 [n]; None: what follows from the priorities.
        """
        self._raw.zero_()
        self.raw[..., : priority.shape[-1]] = priority
        self._replayed.zero_()
        self._largest.refresh_all()
        if self.ranks is not None:
            self.ranks.filled = len(priority)
        if mass is not None:
            whole = torch.zeros_like(self.raw)
            whole[..., : mass.shape[-1]] = mass
            mass = whole
        self._refill(mass)

    def check_valid(self) -> None:
        """Look for damage, in O(N), rank-based in O(N log N); on CUDA the host waits.

        Raises:
            PerTdError: it names the broken invariant: priorities are finite, not negative and 0
                beyond the slots, masses and extrema follow from them, sums from the masses.
        """
        require, raw, mass = validation.require_valid, self.raw, self.mass
        require((raw.isfinite() & (raw >= 0)).all(), "priorities are finite and at least 0")
        require(
            self._raw.count_nonzero() == raw.count_nonzero(), "priorities beyond the slots are 0"
        )
        self.masses.check_valid()
        require(((mass > 0) == (raw > 0)).all(), "masses are positive just where priorities are")
        if self.ranks is None:
            least = most = mass_of(raw, self._alpha)
            source = "priority^alpha"
        else:
            require((self.ranks.snapshot.diff() >= 0).all(), "the snapshot of ranks is in order")
            least, most = self.ranks.range_of(raw, self._alpha)
            source = "the ranks at the last sort"
        near = (mass >= least * (1 - 1e-5)) & (mass <= most.double() * (1 + 1e-5))
        require(near.all(), f"masses follow from {source}")
        self._largest.check_valid("maxima")
        if self._smallest is not None:
            self._smallest.check_valid("minima")
        known = self.ever_max
        require(known.isfinite() & (known >= 0), "the largest priority ever is finite")
        require(self.refused >= 0, "the count of refused priorities is at least 0")
        told = self._settings.tolist()
        require(told == [self._alpha, self._eps], "alpha and eps are the same for all kernels")

    def sort(self) -> None:
        """Give every priority its exact rank, in O(N log N); nothing to do where there are none."""
        if self.ranks is not None:
            self._refill()

    def _count_changes(self, ranks: RankMasses, changes: int, *, new: bool = False) -> None:
        """So many priorities have changed, or are new: `sort`, if that makes it time to."""
        if new:
            ranks.grow(changes)
        if ranks.due(changes):
            self.sort()

    def restore(self, priority: Tensor, ever_max: Tensor, mass: Tensor | None = None) -> None:
        """`fill`, and take over the largest priority that there ever was, 0-dim.

        Masses are part of a state, since what computes p^alpha, a kernel or torch, on one device
        or another, may round the last bit otherwise, and a draw would tell.
        """
        self.fill(priority, mass)
        self.ever_max.copy_(ever_max)

    def _refill(self, mass: Tensor | None = None) -> None:
        """All masses anew, these [capacity] or those that follow from the priorities."""
        if mass is None and self.ranks is not None:
            mass = self.ranks.sort(self.raw, self._alpha)
        self.masses._fill(mass_of(self.raw, self._alpha) if mass is None else mass)
        if self._smallest is not None:
            self._smallest.refresh_all()

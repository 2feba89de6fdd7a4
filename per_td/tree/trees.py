"""Trees: S wide trees in a block of memory, with sums and, for priorities, extremes."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from per_td import draws, kernels, validation
from per_td.errors import EmptyBufferError
from per_td.kernels import reference
from per_td.kernels.flags import MINIMA
from per_td.kernels.layout import Block, Layout
from per_td.memory import Zeros, zeros

Shapes = Mapping[str, tuple[tuple[int, ...], torch.dtype]]

_NO_EXTREMES: Shapes = {
    "raw": ((0,), torch.float32),
    "maxima": ((0,), torch.float32),
    "minima": ((0,), torch.float32),
    "replayed": ((0,), torch.bool),
}


class Trees:
    """Masses of S x `capacity` slots, their sums, and beside them raw priorities and extremes.

    The leaves are float32, the sums float64. Every node is recomputed from its children, so nothing
    drifts.

    Args:
        layout: where the nodes lie.
        device: where the trees live.
        extremes: keep raw priorities too, and the largest in each tree.
        replayed: keep a flag per slot that draws set.
        snapshot: float32 numbers to keep for a distribution.
        launches: use kernels on CUDA, if there are any.
        memory: makes the memory.

    Attributes:
        leaves, raw: masses and raw priorities, float32 [leaf_slots].
        sums, maxima, minima: nodes, float64, float32 and float32 [node_slots].
        settings: alpha, eps and such, float64 [4]; see `per_td.kernels.flags`.
        ever_max: the largest priority that each tree ever held, float32 [S].
        replayed: bool [leaf_slots].
        refused: how many updates were refused on the device, int64 [].
        starts: first leaf of each tree, int64 [S, 1].
    """

    leaves: Tensor
    raw: Tensor
    sums: Tensor
    maxima: Tensor
    minima: Tensor
    settings: Tensor
    ever_max: Tensor
    replayed: Tensor
    snapshot: Tensor
    refused: Tensor

    def __init__(
        self,
        layout: Layout,
        device: torch.device,
        *,
        extremes: bool = False,
        replayed: bool = False,
        snapshot: int = 0,
        launches: bool = True,
        memory: Zeros = zeros,
    ) -> None:
        self.layout, self.device, self._launches = layout, device, launches
        leaves, nodes = (layout.leaf_slots,), (layout.node_slots,)
        extra: dict[str, tuple[tuple[int, ...], torch.dtype]] = dict(_NO_EXTREMES)
        if extremes:
            extra |= dict.fromkeys(("maxima", "minima"), (nodes, torch.float32))
            extra["raw"] = leaves, torch.float32
        if replayed:
            extra["replayed"] = leaves, torch.bool
        extra["snapshot"] = (snapshot,), torch.float32
        shapes = {
            "leaves": (leaves, torch.float32),
            "sums": (nodes, torch.float64),
            **extra,
            "settings": ((4,), torch.float64),
            "ever_max": ((layout.groups,), torch.float32),
            "refused": ((), torch.int64),
        }
        self.block = Block(shapes, device, memory)
        # `settings` as the host knows them, where to read them would mean to wait
        self._numbers = None if device.type == "cpu" else [0.0] * 4
        self._minima = False  # the same number as the kernels read it, for torch.compile
        self.starts = layout.starts(device)
        self._take_up()
        self.minima.fill_(torch.inf)

    def _take_up(self) -> None:
        """Name the views of the block, and choose the operations."""
        for name in self.block.names:
            setattr(self, name, self.block[name])
        self._operations = kernels.operations(self.device, launches=self._launches)

    def __getstate__(self) -> dict[str, Any]:
        kept = "layout", "device", "block", "starts", "_launches", "_numbers", "_minima"
        return {name: getattr(self, name) for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._take_up()

    @property
    def ops(self) -> Any:
        """The operations for this device; while torch.compile traces, those in plain torch."""
        return reference if torch.compiler.is_compiling() else self._operations

    @property
    def compiled(self) -> bool:
        """True if kernels change and draw, not plain torch."""
        return self._operations is not reference

    @property
    def total(self) -> Tensor:
        """Sum of the masses of each tree, float64 [S]."""
        return self.layout.tops(self.sums).sum(-1)

    @property
    def largest(self) -> Tensor:
        """The largest priority in each tree, 0 for none, float32 [S]."""
        return self.layout.tops(self.maxima).amax(-1)

    @property
    def smallest(self) -> Tensor:
        """The smallest positive mass in each tree, inf for none, float32 [S]; see `keep_minima`."""
        return self.layout.tops(self.minima).amin(-1)

    @property
    def masses(self) -> Tensor:
        """Masses of all slots, float32 [S, capacity], a view."""
        return self.layout.slots(self.leaves)

    @property
    def priorities(self) -> Tensor:
        """Raw priorities of all slots, float32 [S, capacity], a view."""
        return self.layout.slots(self.raw)

    def setting(self, place: int) -> float:
        """A number of `settings`, without a host sync."""
        return self.settings[place].item() if self._numbers is None else self._numbers[place]

    def number(self, place: int) -> Any:
        """A number of `settings`; while torch.compile traces, a tensor that it reads anew."""
        return self.settings[place] if torch.compiler.is_compiling() else self.setting(place)

    def set(self, place: int, value: float) -> None:
        """Change a number of `settings`."""
        self.settings[place].fill_(value)
        if self._numbers is not None:
            self._numbers[place] = value

    @property
    def keeps_minima(self) -> bool:
        """True if the smallest positive masses are kept up to date."""
        return self._minima

    def keep_minima(self, wanted: bool) -> None:
        """Keep the smallest positive mass of each tree up to date from now on, or no longer."""
        if wanted != self.keeps_minima:
            self._minima = wanted
            self.set(MINIMA, float(wanted))
            if wanted:
                self.ops.refill(self)
            else:
                self.minima.fill_(torch.inf)

    def draw_distinct(self, n: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Draw `n` different slots from each tree: int64 and their masses float32, [S, n].

        Raises:
            EmptyBufferError: fewer than `n` slots of a tree have a positive mass. On CUDA that goes
                unseen, and the first slot drawn stands in.
        """
        draws.require_enough(self.layout.capacity, n)
        index, mass, found = self.ops.draw_distinct(self, n, generator)
        if validation.can_raise(found) and not found.all():
            self.require_enough(found.sum(-1), n)
        return index, mass

    def require_enough(self, drawable: Tensor, n: int) -> None:
        """Refuse to draw `n` without replacement where fewer are `drawable`, int64 [S].

        Raises:
            EmptyBufferError: it says in which trees.
        """
        short = drawable < n
        if short.any():
            raise EmptyBufferError(
                f"expected at least {n} transitions of positive priority to draw {n} without"
                f" replacement, got {int(drawable.min())}{self.which(short)}"
            )

    def nothing_to_draw(self) -> str:
        """Say in which trees all masses are 0."""
        which = self.which(~(self.total > 0))
        return f"expected a positive mass to draw from, got only masses of 0{which}"

    @staticmethod
    def which(wrong: Tensor) -> str:
        """Name the trees where `wrong` [S] holds, for an error: " in 1 of 3: 2"; "" for one."""
        if len(wrong) == 1:
            return ""
        places = wrong.nonzero().flatten().tolist()
        more = ", ..." if len(places) > 10 else ""
        return f" in {len(places)} of {len(wrong)}: {', '.join(map(str, places[:10]))}{more}"

    def check_valid(self) -> None:
        """Look for damage, in O(N); on CUDA the host waits.

        Raises:
            PerTdError: it names the broken invariant: values are finite, not negative and 0 beyond
                the slots, every node follows from its children, guard bytes are as they were.
        """
        require = validation.require_valid
        self.block.check_valid()
        for name, column, slots in (
            ("masses", self.leaves, self.masses),
            ("priorities", self.raw, self.priorities if len(self.raw) else self.raw),
        ):
            right = column.isfinite() & (column >= 0)
            require(right.all(), f"{name} are finite and at least 0")
            require(
                column.count_nonzero() == slots.count_nonzero(), f"{name} beyond the slots are 0"
            )
        if len(self.raw):
            alike = (self.raw > 0) == (self.leaves > 0)
            require(alike.all(), "masses are positive just where priorities are")
        reference.check_nodes(self)
        require(
            (self.ever_max.isfinite() & (self.ever_max >= 0)).all(),
            "the largest priority ever is finite",
        )
        require(self.refused >= 0, "the count of refused priorities is at least 0")

"""Trees: S wide trees in a block of memory, with sums and, for priorities, extremes."""

import math
from typing import Any

import torch
from torch import Tensor

from per_td import draws, kernels, validation
from per_td.errors import EmptyBufferError
from per_td.kernels import reference
from per_td.kernels.parts import EXPONENT, MINIMA, Block, Layout
from per_td.memory import Zeros, zeros


class Trees:
    """Masses of S x `capacity` slots and their sums, with raw priorities and extremes if asked for.

    Every node is recomputed from its children, so nothing drifts.

    Args:
        layout: places of the nodes.
        device: device of the trees.
        extremes: keep raw priorities too, and the largest in each tree.
        replayed: keep a flag per slot that draws set.
        snapshot: number of float32 values to keep for a distribution.
        launches: use kernels on CUDA, if there are any.
        memory: makes the memory.

    Attributes:
        leaves, raw: masses and raw priorities, float32 [leaf_slots].
        sums, maxima, minima: nodes, float64, float32 and float32 [node_slots].
        settings: numbers such as eps, float64 [4]; see `per_td.kernels.parts`.
        exponents: exponents that give the masses of each tree, float64 [S].
        ever_max: largest priority that each tree ever held, float32 [S].
        replayed: bool [leaf_slots].
        refused: number of updates refused on the device, int64 [].
        starts: first leaf of each tree, int64 [S, 1].
        keeps_minima: True while the smallest positive masses are kept up to date.
    """

    leaves: Tensor
    raw: Tensor
    sums: Tensor
    maxima: Tensor
    minima: Tensor
    settings: Tensor
    exponents: Tensor
    ever_max: Tensor
    replayed: Tensor
    snapshot: Tensor
    refused: Tensor

    @torch.inference_mode(False)
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
        self.layout, self.device, self.launches = layout, device, launches
        leaves, nodes = (layout.leaf_slots,), (layout.node_slots,)
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "leaves": (leaves, torch.float32),
            "sums": (nodes, torch.float64),
            "raw": (leaves if extremes else (0,), torch.float32),
            "maxima": (nodes if extremes else (0,), torch.float32),
            "minima": (nodes if extremes else (0,), torch.float32),
            "replayed": (leaves if replayed else (0,), torch.bool),
            "snapshot": ((snapshot,), torch.float32),
            "settings": ((4,), torch.float64),
            "exponents": ((layout.groups,), torch.float64),
            "ever_max": ((layout.groups,), torch.float32),
            "refused": ((), torch.int64),
        }
        self.block = Block(shapes, device, memory)
        # a copy of `settings` on the host, which would wait for those on another device
        self._numbers = None if device.type == "cpu" else [0.0] * 4
        self.keeps_minima = False  # also in `settings`, where torch.compile could not branch on it
        self.starts = layout.starts(device)
        self._take_up()
        self.minima.fill_(torch.inf)

    def _take_up(self) -> None:
        """Name the views of the block, and choose the operations."""
        self.__dict__.update(self.block.views)
        self._operations = kernels.operations(self.device, launches=self.launches)

    def __getstate__(self) -> dict[str, Any]:
        kept = "layout", "device", "block", "starts", "launches", "_numbers", "keeps_minima"
        return {name: getattr(self, name) for name in kept}

    @torch.inference_mode(False)
    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._take_up()

    @property
    def ops(self) -> Any:
        """Operations for this device; those in plain torch while torch.compile traces."""
        return reference if torch.compiler.is_compiling() else self._operations

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return sum(memory.nbytes for memory in self.block.memory.values())

    @property
    def compiled(self) -> bool:
        """True if kernels run, not plain torch."""
        return self._operations is not reference

    @property
    def total(self) -> Tensor:
        """Sum of the masses of each tree, float64 [S]."""
        return self.layout.tops(self.sums).sum(-1)

    @property
    def largest(self) -> Tensor:
        """Largest priority in each tree, 0 for none, float32 [S]."""
        return self.layout.tops(self.maxima).amax(-1)

    @property
    def smallest(self) -> Tensor:
        """Smallest positive mass in each tree, inf for none, float32 [S]; see `keep_minima`."""
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
        """Read a number of `settings`, without a host sync."""
        return self.settings[place].item() if self._numbers is None else self._numbers[place]

    def set(self, place: int, value: float) -> None:
        """Change a number of `settings`."""
        self.settings[place].fill_(value)
        if self._numbers is not None:
            self._numbers[place] = value

    def exponent(self, leaf: Tensor | None = None) -> Any:
        """Exponents that give the masses, without a host sync.

        Args:
            leaf: leaves, int64 [B]; None: all of them.

        Returns:
            One number for all, or float64 [B]. torch.compile gets a tensor, which stays current.
        """
        groups, tracing = self.layout.groups, torch.compiler.is_compiling()
        if tracing and groups == 1:
            return self.exponents[0]
        if not (tracing or math.isnan(number := self.setting(EXPONENT))):
            return number
        if leaf is None:
            leaf = torch.arange(self.layout.leaf_slots, device=self.device)
        return self.exponents.index_select(0, (leaf // self.layout.stride).clamp_(max=groups - 1))

    def set_exponent(self, value: float | Tensor) -> None:
        """Change the exponents that give the masses: to one number, or to float64 [S].

        `settings` names one number for all before they all have it, and no longer than until each
        has its own: after an interrupt in between, `PriorityTable.rebuild` sets that number again.
        """
        if isinstance(value, Tensor):
            self.exponents.copy_(validation.to_device(value, self.device))
            self.set(EXPONENT, math.nan)
        else:
            self.set(EXPONENT, value)
            self.exponents.fill_(value)

    def keep_minima(self, wanted: bool) -> None:
        """Keep the smallest positive masses up to date from now on, or no longer."""
        if wanted != self.keeps_minima:
            self.keeps_minima = wanted
            self.set(MINIMA, float(wanted))
            if wanted:
                self.ops.refill(self)
            else:
                self.minima.fill_(torch.inf)

    def draw_distinct(self, n: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Draw `n` different slots from each tree: int64 and their masses float32, [S, n].

        Raises:
            EmptyBufferError: fewer than `n` slots of a tree have a positive mass. On CUDA the first
                slot drawn is repeated instead.
        """
        draws.require_enough(self.layout.capacity, n)
        index, mass, found = self.ops.draw_distinct(self, n, generator)
        if found is not None and validation.can_raise(found) and not found.all():
            self.require_enough(found.sum(-1), n)
        return index, mass

    def require_enough(self, drawable: Tensor, n: int) -> None:
        """Check that each tree has `n` slots to draw without replacement.

        Args:
            drawable: number of slots with a positive mass, int64 [S].
            n: number of draws.

        Raises:
            EmptyBufferError: fewer are drawable; it names the trees.
        """
        short = drawable < n
        if short.any():
            raise EmptyBufferError(
                f"expected at least {n} transitions of positive priority to draw {n} without"
                f" replacement, got {int(drawable.min())}{self.which(short)}"
            )

    def nothing_to_draw(self, total: Tensor | None = None) -> str:
        """Error message that names the trees whose total [S] is 0; None: that of all masses."""
        which = self.which(~((self.total if total is None else total) > 0))
        return f"expected a positive mass to draw from, got only masses of 0{which}"

    @staticmethod
    def which(wrong: Tensor) -> str:
        """Name the trees where `wrong` [S] is True, such as " in 1 of 3: 2"; "" if there is one."""
        if len(wrong) == 1:
            return ""
        places = wrong.nonzero().flatten().tolist()
        more = ", ..." if len(places) > 10 else ""
        return f" in {len(places)} of {len(wrong)}: {', '.join(map(str, places[:10]))}{more}"

    def check_valid(self) -> None:
        """Look for damage, in O(N); on CUDA the host waits.

        Raises:
            PerTdError: an invariant is broken: values are finite, not negative and 0 beyond the
                slots, every node follows from its children, guard bytes are intact.
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

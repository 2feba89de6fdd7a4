"""ManyPriorities: the priorities of many buffers of one size, in one set of tensors."""

from typing import Any

import torch
from torch import Tensor

from per_td import validation
from per_td.errors import EmptyBufferError, IndexRangeError
from per_td.priorities import kernel_calls as priority_kernels
from per_td.priorities.table import PriorityTable
from per_td.storage.generations import generation_of
from per_td.storage.rings import Plan, compiled
from per_td.tree.forest import SumForest, as_values_each, named, require_enough_each
from per_td.weights import importance_weights

__all__ = ["ManyPriorities"]

# method="auto" takes torch.multinomial up to this many slots in each buffer, on the CPU; the tree
# elsewhere. The least of 25 times on one core of an AMD EPYC (torch 2.13), 64 from each of 100
# buffers, milliseconds; kernels draw from the trees in the first line, plain torch in all others:
#   slots of each                        300    1,000    3,000    10,000    30,000
#   independent: tree, compiled         0.17     0.22     0.26      0.25      0.24
#   independent: tree                   0.81     0.86     0.93       2.1       1.4
#   independent: multinomial            0.44     0.60     0.90       2.2        10
#   without replacement: tree            2.4      8.9      9.1        14        23
#   without replacement: multinomial     1.1      3.1       18        55       204
_MULTINOMIAL_UP_TO = {"independent": 3_000, "without_replacement": 1_500}


class ManyPriorities(PriorityTable):
    """S tables of priorities: a `PriorityTable` over the leaves of a `SumForest`.

    What changes priorities works on leaves, as there; what draws, or asks for the largest and the
    smallest, works in each of the buffers on its own.

    Args:
        num_buffers: how many, S.
        capacity: number of slots of each.
        settings: those of `PriorityTable`.

    Raises:
        ConfigurationError: an argument is not one of those accepted.
    """

    masses: SumForest

    def __init__(
        self, num_buffers: int, capacity: int, *, device: torch.device, **settings: Any
    ) -> None:
        forest = SumForest(capacity, device, num_trees=num_buffers)
        super().__init__(capacity, device=device, masses=forest, **settings)
        self._forest = forest.forest
        self.ever_max_each = torch.zeros(num_buffers, dtype=torch.float32, device=device)

    def _faster(self) -> str:
        """The method that draws, where "auto" leaves the choice."""
        if self.method != "auto":
            return self.method
        if self.device.type != "cpu":
            return "tree"
        if self.masses.kernels is not None and self.draw == "independent":
            return "tree"
        few = self.masses.capacity <= _MULTINOMIAL_UP_TO.get(self.draw, 0)
        return "multinomial" if few else "tree"

    @property
    def largest(self) -> Tensor:
        """The largest priority in each buffer, 0 where there is none, float32 [S]."""
        return self._forest.tops(self._largest.nodes).amax(-1)

    @property
    def smallest(self) -> Tensor | None:
        """The smallest positive mass in each buffer, float32 [S]; None where it is not needed."""
        return None if self._smallest is None else self._forest.tops(self._smallest.nodes).amin(-1)

    def for_new_each(self) -> Tensor:
        """Priority of transitions that nobody gave one, in each buffer: [S]; see `for_new`."""
        known = self.largest if self.new_priority == "buffer_max" else self.ever_max_each
        return torch.where(known > 0, known, 1.0)

    def check_initial_each(self, priority: Any, plan: Plan) -> Tensor:
        """Priorities for new transitions as float32 [S, n]; -1 marks those refused.

        Raises:
            PriorityError: wrong shape or dtype, or one that is not masked is NaN, infinite or
                negative (refused on CUDA).
        """
        priority = as_values_each("priority", priority, plan.slot)
        priority = torch.where(plan.slot >= 0, priority, 0.0)
        valid = validation.require_finite("priority", priority.flatten(), low=0.0)
        return torch.where(valid.view(priority.shape), priority, -1.0)

    def write_each(self, plan: Plan, priority: Tensor | None) -> None:
        """Give newly written slots their priority: from `check_initial_each`, or None."""
        new = self.for_new_each().unsqueeze(-1)
        if priority is None:
            priority = new
        else:
            refused = (priority < 0) & plan.kept
            self.refused += refused.sum()
            priority = torch.where(refused, new, priority)
        kept, leaf = plan.kept.flatten(), (plan.slot + self.masses.starts).flatten()
        leaf, priority = validation.route(
            leaf, priority.expand_as(plan.kept).flatten(), kept, self.masses.layout.spare
        )
        self._write_leaves(leaf, priority, kept)
        self._note_largest()

    def _write_leaves(self, leaf: Tensor, priority: Tensor, kept: Tensor) -> None:
        """Write priorities of leaves [n]; what is not `kept` is for the spare one."""
        kernel, done, size = self.masses.kernels, None, self.masses.layout.leaf_slots
        if kernel is not None:
            done = priority_kernels.assign(kernel, self, leaf, priority, size, eps=0.0)
        if done is None:
            self._write(leaf, priority, kept)

    def _note_largest(self) -> None:
        torch.maximum(self.ever_max_each, self.largest, out=self.ever_max_each)

    def update_each(
        self,
        index: Tensor,
        td_error: Any,
        *,
        generation: Tensor | None,
        mask: Tensor | None,
        written: Tensor,
    ) -> Tensor | int:
        """Set priorities from TD errors; where an index occurs twice, its last one holds.

        Args:
            index: slots, int64 [S, B].
            td_error: TD errors, [S, B].
            generation: those of the transitions meant, int64 [S, B]; what has been overwritten
                since is dropped. None drops nothing.
            mask: bool [S, B], False for what is to be left alone; None: nothing is.
            written: how many transitions were ever written to each ring, int64 [S].

        Returns:
            How many were dropped.

        Raises:
            IndexRangeError: an index is not that of a filled slot.
            PriorityError: a TD error is NaN or infinite, or the shape or dtype is wrong.
                On CUDA such updates are refused and counted instead.
        """
        td_error = as_values_each("td_error", td_error, index)
        ring: dict[str, Any] = {"generation": generation, "mask": mask, "written": written}
        dropped: Tensor | int | None = self._update_compiled(index, td_error, **ring)
        if dropped is None:
            dropped = self._update_plain(index, td_error, **ring)
        self._note_largest()
        return dropped

    def _update_compiled(
        self,
        index: Tensor,
        td_error: Tensor,
        *,
        generation: Tensor | None,
        mask: Tensor | None,
        written: Tensor,
    ) -> int | None:
        """`update_each` with kernels; None, and nothing is written, without or if they refuse."""
        kernel = self.masses.kernels
        if kernel is None:
            return None
        index, td_error = index.contiguous(), td_error.contiguous()
        generation = None if generation is None else generation.contiguous()
        mask = None if mask is None else mask.long().contiguous()
        flat, kept = torch.empty_like(index).view(-1), torch.empty_like(td_error).view(-1)
        dropped = torch.zeros(1, dtype=torch.int64, device="cpu")
        n = compiled().select(
            index.data_ptr(),
            td_error.data_ptr(),
            0 if generation is None else generation.data_ptr(),
            0 if mask is None else mask.data_ptr(),
            written.data_ptr(),
            *index.shape,
            self._forest.capacity,
            self._forest.stride,
            self._eps,
            flat.data_ptr(),
            kept.data_ptr(),
            dropped.data_ptr(),
        )
        if n < 0:
            return None
        priority_kernels.assign(kernel, self, flat[:n], kept[:n], self.capacity, eps=self._eps)
        return int(dropped)

    def _update_plain(
        self,
        index: Tensor,
        td_error: Tensor,
        *,
        generation: Tensor | None,
        mask: Tensor | None,
        written: Tensor,
    ) -> Tensor:
        ever, capacity = written.unsqueeze(-1), self._forest.capacity
        live = torch.ones_like(index, dtype=torch.bool) if mask is None else mask
        filled = (index >= 0) & (index < ever.clamp(max=capacity))
        self._require_filled(index, filled | ~live, written)
        td_error = torch.where(live, td_error, 0.0)
        stale = torch.zeros_like(live)
        if generation is not None:
            stale = live & filled & (generation != generation_of(index, ever, capacity))
        # an index of -1 is refused, and counted, by the table of all leaves
        leaf = torch.where(filled, index + self.masses.starts, torch.where(live, -1, 0))
        self.update(
            leaf.flatten(), td_error.flatten(), self.capacity, live=(live & ~stale).flatten()
        )
        return stale.sum()

    def _require_filled(self, index: Tensor, valid: Tensor, written: Tensor) -> None:
        if not validation.can_raise(index) or valid.all():
            return
        buffer, at = (~valid).nonzero()[0].tolist()
        size = min(int(written[buffer]), self._forest.capacity)
        raise IndexRangeError(
            f"index: expected 0 <= index < {size}, the filled slots of buffer {buffer},"
            f" got {index[buffer, at].item()} at position {[buffer, at]}; nothing was written"
        )

    def restore(self, priority: Tensor, ever_max: Tensor, mass: Tensor | None = None) -> None:
        """`fill`, and take over the largest priority that each buffer ever held, [S]."""
        self.fill(priority, mass)
        self.ever_max_each.copy_(ever_max)

    def sample_each(
        self, n: int, lengths: Tensor, generator: torch.Generator | None, *, beta: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Draw slots of each buffer in proportion to p^alpha, and weigh them.

        Args:
            n: how many of each.
            lengths: number of filled slots, int64 [S].
            generator: source of the random numbers, on the table's device.
            beta: exponent of the importance-sampling weights.

        Returns:
            Slots int64 [S, n], weights float32 [S, n].

        Raises:
            EmptyBufferError: there is nothing, or not enough, to draw from one of the buffers.
        """
        if self._method == "multinomial":
            index, mass = self._multinomial(n, lengths, generator)
        elif self.masses.kernels is not None and self.draw != "without_replacement":
            drawn = self._sample_compiled(n, lengths, generator, float(beta))
            if drawn is not None:
                return drawn
            raise self._nothing_in(self.masses.total, lengths)
        else:
            self._require_mass(lengths)
            index, mass = self.masses._sample_with_mass(n, generator, self.draw)
        return index, self._weights_each(mass, beta, lengths)

    def _multinomial(
        self, n: int, lengths: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        self._require_mass(lengths)
        mass, replace = self.masses[:], self.draw == "independent"
        if not replace and validation.can_raise(mass):
            require_enough_each(mass.count_nonzero(-1), n)
        index = torch.multinomial(mass.double(), n, replacement=replace, generator=generator)
        return index, mass.gather(-1, index)

    def _require_mass(self, lengths: Tensor) -> None:
        if validation.can_raise(lengths):
            total = self.masses.total
            if not (total > 0).all():
                raise self._nothing_in(total, lengths)

    def _nothing_in(self, total: Tensor, lengths: Tensor) -> EmptyBufferError:
        empty = lengths == 0
        if empty.any():
            what, which = "transitions to sample from in every buffer, got empty buffers", empty
        else:
            what, which = "a positive mass in every buffer, got only masses of 0 in", ~(total > 0)
        return EmptyBufferError(f"expected {what}: {named(which)}")

    def _sample_compiled(
        self, n: int, lengths: Tensor, generator: torch.Generator | None, beta: float
    ) -> tuple[Tensor, Tensor] | None:
        """`sample_each` from the trees with kernels; None where there is nothing to draw."""
        point = self.masses.points(n, generator)
        index = torch.empty_like(point, dtype=torch.int64)
        weight = torch.empty_like(point, dtype=torch.float32)
        smallest = self.smallest
        by_size = self._weight_normalization == "none"
        empty = compiled().sample(
            *self.masses.memory,
            self._forest.height,
            self._forest.width,
            self._forest.num_trees,
            point.data_ptr(),
            n,
            self.draw == "stratified",
            index.data_ptr(),
            beta,
            0 if smallest is None else smallest.data_ptr(),
            lengths.data_ptr() if by_size else 0,
            weight.data_ptr(),
        )
        return None if empty else (index, weight)

    def _weights_each(self, mass: Tensor, beta: Tensor, lengths: Tensor) -> Tensor:
        smallest, normalization = self.smallest, self._weight_normalization
        if normalization == "batch":  # of each row
            smallest, normalization = mass.amin(-1), "buffer"
        return importance_weights(
            mass,
            beta,
            total=self.masses.total.unsqueeze(-1),
            size=lengths.unsqueeze(-1),
            smallest=None if smallest is None else smallest.unsqueeze(-1),
            normalization=normalization,
        )

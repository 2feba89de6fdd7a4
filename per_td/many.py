"""ManyBuffers: independent prioritized buffers of one size in one set of tensors."""

from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from per_td import validation
from per_td.buffer import PrioritizedReplayBuffer
from per_td.errors import ConfigurationError, PriorityError, SchemaError
from per_td.priorities.many import ManyPriorities
from per_td.storage.leaves import Leaves
from per_td.storage.rings import Rings, as_mask
from per_td.tree.forest import as_index_each

__all__ = ["ManyBuffers"]


class ManyBuffers(PrioritizedReplayBuffer):
    """S buffers of `capacity` slots each: as S times `PrioritizedReplayBuffer`, in far less time.

    `PrioritizedReplayBuffer(capacity, batch_size, num_buffers=S)` makes one, for S runs that are
    trained in lockstep. Everything gets a leading dimension [S]; an index is a slot in its own
    buffer. Settings, beta and counters are shared; all else is each buffer's own: slots and cursor,
    priorities, that of new transitions, draws, and what the weights are divided by. All ways to
    draw and both methods can be had, "multinomial" with up to 2^24 slots in each buffer.

    Args:
        capacity: number of slots of each buffer.
        batch_size: default for `sample`, from each buffer.
        num_buffers: how many buffers, S, at least 1.
        settings: those of `PrioritizedReplayBuffer`.

    Raises:
        ConfigurationError: an argument is not one of those accepted.

    Example:
        >>> buffers = PrioritizedReplayBuffer(1000, batch_size=4, num_buffers=2)
        >>> data = TensorDict({"x": torch.rand(2, 10, 3)}, batch_size=[2, 10])
        >>> index = buffers.extend(data)
        >>> running = torch.tensor([True, False])  # the second run has come to its end
        >>> buffers.add(data[:, 0], mask=running).tolist()
        [10, -1]
        >>> batch = buffers.sample()
        >>> batch["x"].shape
        torch.Size([2, 4, 3])
        >>> buffers.update_priority(batch["index"], torch.rand(2, 4), batch["generation"])
        >>> len(buffers), buffers.lengths.tolist()
        (10, [11, 10])
    """

    _storage: Rings
    _priorities: ManyPriorities

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, num_buffers={self.num_buffers})"

    def _make(self, num_buffers: int | None, ring: dict[str, Any], table: dict[str, Any]) -> None:
        n = validation.positive_int("num_buffers", num_buffers)
        if table["prioritization"] != "proportional":
            raise ConfigurationError(
                f"prioritization: expected 'proportional' with num_buffers={n},"
                f" got {table['prioritization']!r}: ranks are kept for one buffer"
            )
        self._storage = Rings(n, **ring)
        self._priorities = ManyPriorities(n, **table)

    def diagnostics(self) -> dict[str, Tensor]:
        """Not for many buffers: it tells of one.

        Raises:
            ConfigurationError: always.
        """
        raise ConfigurationError(
            f"diagnostics: expected one buffer, got num_buffers={self.num_buffers}"
        )

    @property
    def priority(self) -> Tensor:
        """Raw priorities of all slots, 0 where nothing is, float32 [S, capacity], a copy."""
        return self._priorities.raw.clone()

    @property
    def mass(self) -> Tensor:
        """Masses of all slots, 0 where nothing is, float32 [S, capacity], a copy."""
        return self._priorities.mass.clone()

    @property
    def replayed(self) -> Tensor:
        """Not for many buffers: they do not keep it.

        Raises:
            ConfigurationError: always.
        """
        raise ConfigurationError(
            f"replayed: expected one buffer, got num_buffers={self.num_buffers}"
        )

    def generation_of(self, index: Any) -> Tensor:
        """Generations that a batch would bring if these slots were drawn now, int64 [S, B].

        `index` is [S, B]; see `PrioritizedReplayBuffer.generation_of`.
        """
        index = as_index_each("index", index, self._storage.num_buffers, self.device)
        if validation.can_raise(index):
            validation.require_in_range(index.flatten(), self.capacity, "the slots")
        return self._generation(index)

    @property
    def transitions(self) -> TensorDict | None:
        """All slots, a TensorDict [S, capacity] in the buffers' memory; None before any data.

        Those of buffer s are filled up to `lengths[s]`.
        """
        return self._storage.data

    def extend(self, transitions: Any, priority: Any = None, mask: Any = None) -> Tensor:
        """Write transitions to every buffer.

        Args:
            transitions: TensorDict of batch size [S, n], or a dict of tensors [S, n, ...]; of more
                than fit in a buffer, the last ones remain, as if they had been added one by one.
            priority: raw priorities for them, finite and not negative, [S, n]; 0 is never drawn.
                None gives them that of `new_priority` in their buffer.
            mask: bool [S, n]; where it is False, nothing is written. None writes all.

        Returns:
            Their slots in their own buffer, int64 [S, n]; -1 where nothing was written.

        Raises:
            SchemaError: keys, shapes or dtypes differ from those that came before, the batch size
                is not [S, n], or the mask is not bool [S, n].
            PriorityError: `priority` has a wrong shape or dtype, or a value that is not masked is
                NaN, infinite or negative (on CUDA such a value is replaced by that of
                `new_priority`, and counted).
        """
        leaves, size = self._storage.check_each(transitions, batched=True)
        return self._extend_each(leaves, size, priority, mask)

    def add(self, transition: Any, priority: Any = None, mask: Any = None) -> Tensor:
        """Write one transition to every buffer, a TensorDict of batch size [S]; see `extend`.

        `priority` and `mask` are [S].

        Returns:
            Its slot in each buffer, int64 [S]; -1 where nothing was written.
        """
        leaves, _ = self._storage.check_each(transition, batched=False)
        size = torch.Size([self._storage.num_buffers, 1])
        if priority is not None:
            priority = validation.as_tensor("priority", priority, PriorityError).unsqueeze(-1)
        if mask is not None:
            mask = validation.as_tensor("mask", mask, SchemaError).unsqueeze(-1)
        return self._extend_each(leaves, size, priority, mask).squeeze_(-1)

    def extend_leaves(self, leaves: Leaves, priority: Any = None, mask: Any = None) -> Tensor:
        """`extend` without a TensorDict: tensors [S, n, ...] by key, a tuple of names."""
        size = self._storage.size_of(leaves)
        return self._extend_each(self._storage.flat(leaves, size), size, priority, mask)

    def _extend_each(self, leaves: Leaves, size: torch.Size, priority: Any, mask: Any) -> Tensor:
        mask = as_mask(mask, size, self.device)
        plan = self._storage.plan(size[1], mask)
        if priority is not None:
            priority = self._priorities.check_initial_each(priority, plan)
        self._storage.write_each(leaves, plan)
        self._priorities.write_each(plan, priority)
        return plan.slot

    def _draw(self, batch_size: int | None) -> tuple[Tensor, Tensor]:
        """Slots and their weights, [S, B]."""
        n = self._batch_size(batch_size)
        lengths = self._storage.lengths
        return self._priorities.sample_each(n, lengths, self.generator, beta=self._beta)

    def sample(self, batch_size: int | None = None) -> TensorDict:
        """Draw a batch from every buffer.

        Args:
            batch_size: number of transitions B from each; None takes that of the constructor.

        Returns:
            TensorDict [S, B]: copies of the transitions, and beside them "index" int64 [S, B],
            "priority_weight" float32 [S, B], and "generation" int64 [S, B]; see
            `PrioritizedReplayBuffer.sample`. Weights are divided by the largest of their own row
            ("batch") or buffer ("buffer").

        Raises:
            ConfigurationError: no batch size was given, here or to the constructor.
            EmptyBufferError: a buffer is empty, all its priorities are 0, or without replacement
                fewer than B transitions can be drawn from it; it says which.
        """
        return super().sample(batch_size)

    def update_priority(
        self, index: Any, td_error: Any, generation: Any = None, mask: Any = None
    ) -> None:
        """Set priorities to |td_error| + eps (section 3.3).

        Args:
            index: slots in their own buffer, integers [S, B]; of equal ones the last holds.
            td_error: raw TD errors [S, B] (or [S, B, 1]); sign and gradient do not matter.
            generation: that of the batch, [S, B]: where the slot has been overwritten since, the
                update is stale, dropped and counted. None drops none.
            mask: bool [S, B]; where it is False, the transition is left alone, whatever the index
                and the TD error, and nothing is counted. None leaves none alone.

        Raises:
            IndexRangeError: an index does not name a filled slot of its buffer.
            PriorityError: a TD error is NaN or infinite, or shape or dtype are wrong. Nothing has
                been written then; on CUDA see `PrioritizedReplayBuffer.update_priority`.
            SchemaError: the mask is not bool [S, B].
        """
        count = self._storage.num_buffers
        index = as_index_each("index", index, count, self.device)
        if generation is not None:
            generation = as_index_each("generation", generation, count, self.device)
            validation.require_same_shape("generation", generation, index)
        stale = self._priorities.update_each(
            index,
            td_error,
            generation=None if generation is None else self._storage.in_ring(generation),
            mask=as_mask(mask, index.shape, self.device),
            written=self._storage.written,
        )
        self._drop(stale)

    def _state(self, *, copy: bool) -> dict[str, Any]:
        """As for one buffer; "write_count" and "ever_max" are tensors [S]."""
        return super()._state(copy=copy) | {"ever_max": self._priorities.ever_max_each.clone()}

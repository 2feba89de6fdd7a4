"""PrioritizedReplayBuffer: storage and priorities wired together to write, draw and update."""

import os
from typing import Any, NamedTuple

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from per_td import validation
from per_td.errors import ConfigurationError, EmptyBufferError, PriorityError, SchemaError
from per_td.memory import STORAGES, Memory
from per_td.priorities.sampling import sample_rows
from per_td.priorities.table import PriorityTable
from per_td.replay_state import ReplayState
from per_td.storage.leaves import Leaves, entries_of
from per_td.storage.ring import RingStorage, as_mask

__all__ = ["MANY_ALONE", "Draw", "PrioritizedReplayBuffer"]

MANY_ALONE = (
    "many buffers in one set of tensors cannot be combined with shared, threads or prefetch: call"
    " them from one thread, or make several buffers without num_buffers"
)
"""The end of the errors about that."""


class Draw(NamedTuple):
    """Transitions drawn, with their masses; see `PrioritizedReplayBuffer.draw_leaves`.

    Attributes:
        slot: where they are, int64 [B].
        leaves: copies of them by key, [B, ...].
        generation: to be handed back with an update, int64 [B].
        mass: their masses, float32 [B].
    """

    slot: Tensor
    leaves: Leaves
    generation: Tensor
    mass: Tensor


class PrioritizedReplayBuffer(ReplayState):
    """Replay buffer that draws transitions in proportion to priority^alpha.

    Prioritized experience replay as in Schaul et al. 2015 (arXiv 1511.05952), proportional
    variant: P(i) = p_i^alpha / sum_k p_k^alpha with p = |TD error| + eps, corrected by
    importance-sampling weights w_i = (N P(i))^-beta.

    Args:
        capacity: number of slots; beyond it, the oldest transition makes room for the newest.
        batch_size: default for `sample`.
        alpha: how much prioritization is used, at least 0; 0 is uniform. May be set at any time.
            None takes the paper's, 0.6 or, rank-based, 0.7.
        beta: how much of the bias the weights correct, in [0, 1]. May be set at any time.
        eps: added to |TD error|, so that no transition is lost for ever. May be set at any time
            and holds for the updates from then on. With 0, a TD error of 0 is never drawn again.
        beta_increment: what `increase_beta` adds.
        draw: "independent": with replacement; "stratified": one from each of B equal parts of the
            total mass; "without_replacement": B different transitions.
        method: "tree": an exact sum tree, O(log N) per draw; "multinomial": torch.multinomial,
            O(N) per batch, up to 2^24 slots; "auto": whichever is faster.
        weight_normalization: weights are divided by the largest of the "batch", by the largest
            that any transition in the "buffer" would get, or by nothing ("none").
        new_priority: what new transitions get: the largest priority in the buffer ("buffer_max"),
            or the largest it ever held ("ever_max"); 1 where there is none.
        prioritization: "proportional", or "rank": P(i) in proportion to rank(i)^-alpha, where the
            transition of the largest priority has rank 1 (the paper's second variant).
        sort_interval: for "rank": changes of priorities from one exact order to the next, see
            `RankMasses`; None takes as many as there are transitions.
        device: where transitions and priorities live; None is torch's default device.
        generator: source of all random draws, on the same device; None is torch's own, which
            `torch.manual_seed` seeds. torch.compile cannot trace another: it then breaks `sample`
            into several graphs.
        layout: how transitions lie in memory: "columns", a tensor per key, "records", one after
            the other in a block, which takes fewer trips to memory per transition, or "auto": the
            faster one for their size. Batches are the same, new tensors of their own either way.
        storage: which memory transitions live in; priorities are always in that of the device.
            "memory": that of the device; "memmap": files, for more than fits in memory; "pinned":
            pinned memory of the host, for more than fits in that of a CUDA device. See
            docs/reliability.md.
        folder: where the files of "memmap" are, on which disk; None: where the system has
            temporary files. They have no names, and are gone with the buffer.
        example: a TensorDict like one transition (batch size []), to allocate memory at once;
            without it, the first data does so.
        num_buffers: S makes S buffers of `capacity` slots each in one set of tensors, for S runs in
            lockstep: every argument and result gets a leading dimension [S], and an index is a slot
            in its own buffer. Settings, beta and counters are shared; slots, priorities, draws and
            what the weights are divided by are each buffer's own. None: one buffer.
            Not together with `shared`, `threads` or `prefetch`.
        shared: put everything into shared memory, for processes that write and learn side by side;
            needs an `example`. See `per_td.concurrency.sharing.SharedReplayBuffer`.
        threads: let several threads call it at the same time, for 0.3 us more per call. See
            `per_td.concurrency.threads.LockedReplayBuffer`; what is `shared` can do that anyway.
        prefetch: how many batches of `batch_size` a thread in the background draws ahead; implies
            `threads`. What `sample` returns may be up to so many updates old. 0: none.

    Raises:
        ConfigurationError: an argument is not one of those accepted.

    Example:
        >>> buffer = PrioritizedReplayBuffer(1000, batch_size=4)
        >>> data = TensorDict({"x": torch.rand(10, 3)}, batch_size=[10])
        >>> index = buffer.extend(data)
        >>> batch = buffer.sample()
        >>> buffer.update_priority(batch["index"], torch.rand(4), batch["generation"])
        >>> batch["x"].shape
        torch.Size([4, 3])
        >>> buffers = PrioritizedReplayBuffer(1000, batch_size=4, num_buffers=2)
        >>> data = TensorDict({"x": torch.rand(2, 10, 3)}, batch_size=[2, 10])
        >>> index = buffers.extend(data)
        >>> running = torch.tensor([True, False])  # the second run has come to its end
        >>> buffers.add(data[:, 0], mask=running).tolist()
        [10, -1]
        >>> batch = buffers.sample()
        >>> buffers.update_priority(batch["index"], torch.rand(2, 4), batch["generation"])
        >>> len(buffers), buffers.lengths.tolist()
        (10, [11, 10])
    """

    def __new__(
        cls,
        *args: Any,
        shared: bool = False,
        threads: bool = False,
        prefetch: int = 0,
        **settings: Any,
    ) -> "PrioritizedReplayBuffer":
        """The class made for what is asked: for processes or for threads."""
        if shared and cls is PrioritizedReplayBuffer:
            from per_td.concurrency.sharing import (
                SharedReplayBuffer,  # which is made from this class
            )

            return super().__new__(SharedReplayBuffer)
        if (threads or prefetch) and cls is PrioritizedReplayBuffer:
            from per_td.concurrency.threads import LockedReplayBuffer  # so is this

            return super().__new__(LockedReplayBuffer)
        return super().__new__(cls)

    @torch.inference_mode(False)
    def __init__(
        self,
        capacity: int,
        batch_size: int | None = None,
        *,
        alpha: float | None = None,
        beta: float = 0.4,
        eps: float = 1e-6,
        beta_increment: float = 0.0,
        draw: str = "independent",
        method: str = "auto",
        weight_normalization: str = "batch",
        new_priority: str = "buffer_max",
        prioritization: str = "proportional",
        sort_interval: int | None = None,
        device: torch.device | str | int | None = None,
        generator: torch.Generator | None = None,
        layout: str = "auto",
        storage: str = "memory",
        folder: str | os.PathLike[str] | None = None,
        example: TensorDictBase | None = None,
        num_buffers: int | None = None,
        shared: bool = False,
        threads: bool = False,
        prefetch: int = 0,
    ) -> None:
        capacity = validation.positive_int("capacity", capacity)
        super().__init__(
            batch_size=batch_size,
            beta=beta,
            beta_increment=beta_increment,
            device=device,
            generator=generator,
        )
        if num_buffers is not None:
            num_buffers = validation.positive_int("num_buffers", num_buffers)
            self._require_one(num_buffers, prioritization, shared, threads, prefetch)
        storage = validation.one_of("storage", storage, STORAGES)
        memory = self._memory(Memory(storage, folder))
        self._priorities = PriorityTable(
            capacity,
            alpha=alpha,
            eps=eps,
            draw=draw,
            method=method,
            weight_normalization=weight_normalization,
            new_priority=new_priority,
            device=self.device,
            prioritization=prioritization,
            sort_interval=sort_interval,
            groups=num_buffers,
            memory=memory.beside,
        )
        self._storage = RingStorage(capacity, self.device, layout, memory, groups=num_buffers)
        self._arrange(shared=shared, threads=threads, prefetch=prefetch)
        self._allocate(example)

    __new__.__wrapped__ = __init__  # type: ignore[attr-defined]  # the signature that users see

    def _memory(self, memory: Memory) -> Memory:
        """The memory to use, given that asked for."""
        return memory

    @staticmethod
    def _require_one(
        num_buffers: int, prioritization: str, shared: bool, threads: bool, prefetch: int
    ) -> None:
        """Refuse what many buffers in one set of tensors cannot do."""
        if prioritization != "proportional":
            raise ConfigurationError(
                f"prioritization: expected 'proportional' with num_buffers={num_buffers},"
                f" got {prioritization!r}: ranks are kept for one buffer"
            )
        for name, wanted in (("shared", shared), ("threads", threads), ("prefetch", prefetch)):
            if wanted:
                raise ConfigurationError(
                    f"{name}: expected num_buffers=None, got {num_buffers}: {MANY_ALONE}"
                )

    def _arrange(self, **wanted: Any) -> None:
        """What `shared`, `threads` and `prefetch` need: this class can do none of it."""
        for name, value in wanted.items():
            if value:
                raise ConfigurationError(
                    f"{name}: expected {type(value)()!r} for {type(self).__name__}, got {value!r}:"
                    " see per_td.concurrency.sharing and per_td.concurrency.threads for classes to"
                    " derive from"
                )

    def _allocate(self, example: Any) -> None:
        if example is None:
            return
        try:
            leaves = self._storage.check_example(example)
        except SchemaError as error:
            raise SchemaError(f"example: {error}") from error
        self._storage.allocate(leaves)

    def extend(self, transitions: Any, priority: Any = None, mask: Any = None) -> Tensor:
        """Write transitions.

        Args:
            transitions: TensorDict or tensorclass of batch size [n] or [S, n], or a dict, also
                nested, of tensors or arrays like that; where n exceeds the capacity, the last ones
                remain, as if they had been added one by one.
            priority: raw priorities for them, finite and not negative, in the shape of the batch; 0
                is never drawn. None gives them that of `new_priority`.
            mask: with `num_buffers`, bool [S, n]: where it is False, nothing is written.

        Returns:
            Their slots, int64 [n] or [S, n]; -1 where nothing was written.

        Raises:
            SchemaError: keys, shapes or dtypes differ from those that came before, something is
                not a tensor, or the batch size is not [n].
            AllocationError, DiskAllocationError: the first transitions tell how much memory is
                needed, and there is not enough; the buffer takes others then.
            PriorityError: `priority` has a wrong shape or dtype, or a value is NaN, infinite or
                negative (on CUDA such a value is replaced by that of `new_priority`, and counted).
        """
        leaves, n = self._storage.check(transitions)
        return self._extend(leaves, n, priority, mask)

    def add(self, transition: Any, priority: Any = None, mask: Any = None) -> Tensor:
        """Write one transition: a TensorDict of batch size [] or [S], or a dict; see `extend`.

        `priority` and `mask` have the shape of the batch.

        Returns:
            Its slot, int64 [] or [S].
        """
        leaves, _ = self._storage.check(transition, batched=False)
        if self._storage.lead:
            if priority is not None:
                priority = validation.as_tensor("priority", priority, PriorityError).unsqueeze(-1)
            if mask is not None:
                mask = validation.as_tensor("mask", mask, SchemaError).unsqueeze(-1)
        return self._extend(leaves, 1, priority, mask).squeeze_(-1)

    def _as_mask(self, mask: Any, shape: tuple[int, ...]) -> Tensor | None:
        if mask is None:
            return None
        if not self._storage.lead:
            raise ConfigurationError(
                f"mask: expected None, got {type(mask).__name__}: one buffer writes and updates all"
                " that it is given; a mask goes with num_buffers"
            )
        return as_mask(mask, shape, self.device)

    def extend_leaves(self, leaves: Leaves, priority: Any = None, mask: Any = None) -> Tensor:
        """`extend` without a TensorDict: tensors by key, a tuple of names; see there."""
        leaves, n = self._storage.check_leaves(leaves)
        return self._extend(leaves, n, priority, mask)

    def _extend(self, leaves: Leaves, n: int, priority: Any, mask: Any) -> Tensor:
        ring, table = self._storage, self._priorities
        if mask is not None:
            mask = self._as_mask(mask, (*ring.lead, n))
        index = ring.next_slots(n, mask)
        if priority is not None:
            priority = table.check_initial(priority, index, mask)
        runs = ring.write(leaves, n, mask)
        if priority is None and runs is not None:
            table.write_runs(runs)
            return index
        kept = index
        if mask is None and n > self.capacity:  # the last remain; of a slot the last holds anyway
            kept = index[..., -self.capacity :]
            priority = None if priority is None else priority[..., -self.capacity :]
        table.write_new(kept, priority, mask)
        return index

    def sample(self, batch_size: int | None = None) -> TensorDict:
        """Draw a batch.

        Args:
            batch_size: number of transitions B; None takes that of the constructor.

        Returns:
            TensorDict [B]: copies of the transitions, and beside them "index" int64 [B],
            "priority_weight" float32 [B] (equation in section 3.4), and "generation" int64 [B],
            by which a later update recognises that a slot has been overwritten.

        Raises:
            ConfigurationError: no batch size was given, here or to the constructor.
            EmptyBufferError: the buffer is empty, all priorities are 0, or without replacement
                fewer than B transitions can be drawn.
        """
        rows, index, weight, generation = self._sample(batch_size)
        return self._storage.batch(rows, priority_weight=weight, index=index, generation=generation)

    def sample_leaves(self, batch_size: int | None = None) -> tuple[Leaves, Tensor, Tensor]:
        """`sample` without a TensorDict: tensors [B, ...] by key, index and weight."""
        leaves, index, weight, _ = self._sample_leaves(batch_size)
        return leaves, index, weight

    def _sample_leaves(self, batch_size: int | None) -> tuple[Leaves, Tensor, Tensor, Tensor]:
        """`sample_leaves`, and generations."""
        rows, index, weight, generation = self._sample(batch_size)
        return self._storage.by_key(rows), index, weight, generation

    def draw_leaves(self, batch_size: int | None = None) -> Draw:
        """`sample_leaves` for a part of a larger buffer: with masses in place of weights.

        The weights follow from the masses when the total of all parts is known. The same random
        numbers draw the same slots as in `sample`.
        """
        leaves, slot, _, generation = self._sample_leaves(batch_size)
        return Draw(slot, leaves, generation, self._priorities.mass.gather(-1, slot))

    def _sample(self, batch_size: int | None) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
        """The transitions drawn, their slots, weights and generations."""
        n, ring, size = self._batch_size(batch_size), self._storage, None
        if not ring.lead:
            size = len(ring)
            if not size:
                raise EmptyBufferError("expected transitions to sample from, got an empty buffer")
            if self.draw == "without_replacement" and n > size:
                raise EmptyBufferError(
                    f"expected batch_size <= {size}, the transitions in the buffer, to draw"
                    f" without replacement, got {n}"
                )
        try:
            rows, index, weight, generation = sample_rows(
                self._priorities, ring, n, self.generator, beta=self._beta, size=size
            )
        except EmptyBufferError:
            if ring.lead and not (ring.written > 0).all():
                which = self._priorities.trees.which(ring.written == 0)
                raise EmptyBufferError(
                    f"expected transitions to sample from in every buffer, got empty ones{which}"
                ) from None
            raise
        return rows, index, weight, ring.in_batch(generation)

    def _batch_size(self, batch_size: int | None) -> int:
        """That asked for, or that of the constructor."""
        n = self.batch_size if batch_size is None else batch_size
        if n is None:
            raise ConfigurationError(
                "batch_size: expected one in sample() or in the constructor, got none"
            )
        return validation.positive_int("batch_size", n)

    def generation_of(self, index: Any) -> Tensor:
        """Generations that a batch would bring if these slots were drawn now.

        Args:
            index: slots, integers [B].

        Returns:
            int64 [B]; of a slot that was never written, less than that of any batch.

        Raises:
            IndexRangeError: an index is not that of a slot (on the CPU).
        """
        index = validation.as_index(index, self.device, lead=self._storage.lead)
        if validation.can_raise(index):
            validation.require_slots(index, self.capacity, what="the slots")
        return self._generation(index)

    def _generation(self, index: Tensor) -> Tensor:
        generation, epoch = self._storage.generation(index), self._storage.epoch
        return generation + epoch if epoch else generation

    def update_priority(
        self, index: Any, td_error: Any, generation: Any = None, mask: Any = None
    ) -> None:
        """Set priorities to |td_error| + eps (section 3.3).

        Args:
            index: slots, integers [B] or [S, B], as `sample` gave them; of equal ones the last
                holds.
            td_error: raw TD errors [B] (or [B, 1]); sign and gradient do not matter.
            generation: that of the batch, [B]: where the slot has been overwritten since, the
                update is stale, dropped and counted. None drops none.
            mask: with `num_buffers`, bool [S, B]: where it is False, the transition is left alone,
                whatever the index and the TD error, and nothing is counted.

        Raises:
            IndexRangeError: an index does not name a filled slot.
            PriorityError: a TD error is NaN or infinite, or shape or dtype are wrong. Nothing has
                been written then. On CUDA, where values cannot be looked at without stopping the
                host, and under torch.compile, such updates are refused one by one and counted in
                `stats`.
        """
        ring = self._storage
        index = validation.as_index(index, self.device, lead=ring.lead)
        if generation is not None:
            generation = validation.as_index(generation, self.device, "generation", lead=ring.lead)
        stale = self._priorities.update(
            index,
            td_error,
            written=ring.written,
            generation=None if generation is None else ring.in_ring(generation),
            mask=None if mask is None else self._as_mask(mask, index.shape),
        )
        self._drop(stale)

    def update_tensordict_priority(self, batch: Any) -> None:
        """`update_priority` with "index", "td_error" and "generation" (if any) of a batch [B].

        Raises:
            SchemaError: the batch has no "index" or no "td_error".
        """
        index, td_error = entries_of(batch, "index", "td_error")
        self.update_priority(index, td_error, batch.get("generation", None))

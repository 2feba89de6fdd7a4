"""PrioritizedReplay: how the drop-in buffer writes, draws and updates priorities."""

from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.data import replay_buffers as torchrl_buffers
from torchrl.data.replay_buffers import ReplayBuffer, TensorDictReplayBuffer

from per_td import validation
from per_td.errors import IndexRangeError, PriorityError
from per_td.torchrl import fast
from per_td.torchrl.sampler import PrioritizedSampler
from per_td.torchrl.slices import PrioritizedSliceSampler
from per_td.torchrl.td_errors import first_of_each, magnitudes, required
from per_td.torchrl.writer import GenerationWriter
from per_td.weights import priority_of

__all__ = ["PrioritizedReplay"]


class PrioritizedReplay(torchrl_buffers.TensorDictPrioritizedReplayBuffer):
    """The methods that pass transitions and priorities; a subclass constructs and keeps the parts.

    Each writes or reads column by column where it can, and by TorchRL's means elsewhere.
    """

    _sync: bool
    _cache: fast.ColumnCache
    _seen_writes: int  # with sync=False: how many writes the priorities know of
    _supplied: Tensor | None = None  # priorities of what is being written by TorchRL's means

    @property
    def prioritized_sampler(self) -> PrioritizedSampler:
        """The sampler, which holds the priorities.

        Raises:
            RuntimeError: in a writer's process of a buffer with `sync=False`, which has none.
        """
        if not isinstance(self._sampler, PrioritizedSampler):
            raise RuntimeError(
                "a writer's process of a buffer with sync=False holds no priorities: expected"
                " sampling and priority updates in the process that made the buffer"
            )
        return self._sampler

    # --- writing ----------------------------------------------------------------------------------

    def add(self, data: TensorDictBase) -> Any:
        """Write one element; for a storage of several dimensions, one row of its first.

        Args:
            data: TensorDict; its priority entry, if there is one, becomes its priority.

        Returns:
            Where it lives: an int, or int64 [B, ndim] for a storage of several dimensions.
        """
        written = self._write_plain(data, 1, single=True, supply=True)
        if written is not None:
            return written[0]
        data = self._transform.inv(data)
        if data is None:
            return torch.zeros((0, self._storage.ndim), dtype=torch.long, device="cpu")
        rows = data.batch_size[: self._storage.ndim - 1].numel()
        return self._write_by_torchrl(ReplayBuffer._add, data, self._priorities_of(data, rows))

    def extend(self, tensordicts: TensorDictBase, *, update_priority: bool | None = None) -> Tensor:
        """Write several elements over the oldest.

        Args:
            tensordicts: TensorDict [n], or [B, T] for a storage of two dimensions.
            update_priority: whether the priority entry of `tensordicts`, if there is one, becomes
                the elements' priority; by default yes, unless the buffer has `sync=False`.

        Returns:
            Where they live, int64 [n], or [n, ndim] for a storage of several dimensions.

        Raises:
            PriorityError: a priority is NaN or infinite, or their number does not fit; nothing is
                written then (a ValueError).
        """
        if not isinstance(tensordicts, TensorDictBase):
            raise ValueError(f"expected a TensorDictBase, got a {type(tensordicts).__name__}")
        if update_priority and not self._sync:
            raise RuntimeError(
                "update_priority: expected None or False for a buffer with sync=False, got True"
            )
        supply = update_priority is not False
        n = len(tensordicts) if tensordicts.ndim else 0
        short = self._write_plain(tensordicts, n, single=False, supply=supply)
        if short is not None:
            start, index = short
            device = tensordicts.device or torch.device("cpu")
            if index.device == device:
                return index
            index = torch.arange(start, start + n, device=device)  # to copy it might mean to wait
            return index.remainder_(self._storage.max_size)
        data = self._transform.inv(tensordicts)
        if data is None:
            return torch.zeros((0, self._storage.ndim), dtype=torch.long, device="cpu")
        rows = data.batch_size[: self._storage.ndim].numel()
        turned = self.dim_extend > 0
        priority = self._priorities_of(data, rows, turned=turned) if supply else None
        written: Tensor = self._write_by_torchrl(ReplayBuffer._extend, data, priority)
        return written

    def _priorities_of(
        self, data: TensorDictBase, rows: int, *, turned: bool = False
    ) -> Tensor | None:
        """The priorities that `data` brings along, float32 [rows]; -1 marks those refused.

        `turned` tells that the storage takes the elements with time first.
        """
        td_error = data.get(self.priority_key, None) if self._sync else None
        if td_error is None:
            return None
        if turned and td_error.ndim > 1:
            td_error = self._transpose(td_error)
        priority = priority_of(self._magnitudes(td_error, rows), self._sampler._eps)
        valid = validation.require_finite(str(self.priority_key), priority)
        return torch.where(valid, priority, -1.0)

    def _magnitudes(self, td_error: Tensor, rows: int) -> Tensor:
        sampler = self.prioritized_sampler
        validation.require_plain(str(self.priority_key), td_error, PriorityError)
        td_error = validation.to_device(td_error, sampler.device)
        return magnitudes(
            td_error,
            rows,
            unit=sampler.td_error_unit,
            reduction=sampler.reduction,
            key=self.priority_key,
        )

    def _write_plain(
        self, data: TensorDictBase, n: int, *, single: bool, supply: bool
    ) -> tuple[int, Tensor] | None:
        """Write column by column: the first slot and all slots, or None if that cannot be."""
        with self._replay_lock:
            if not 0 < n <= self._storage.max_size:
                return None
            columns = self._cache.of(self, marks=self._sync)
            rows = None if columns is None else columns.rows_of(data, single=single)
            if columns is None or rows is None:
                return None
            supply = supply and self.priority_key in columns
            priority = self._priorities_of(data, n) if supply else None
            with self._write_lock:
                return fast.write(self, self._cache, columns, rows, n, priority, marks=self._sync)

    def _write_by_torchrl(
        self, write: Callable[..., Any], data: Any, priority: Tensor | None
    ) -> Any:
        """Write by TorchRL's means, which call `mark_update` on the way."""
        with self._replay_lock, torch.no_grad():
            self._supplied = priority
            try:
                return write(self, data)
            finally:
                self._supplied = None

    def mark_update(self, index: Any) -> None:
        """Give what has been written to the slots `index` the priority of new elements."""
        if not self._sync:
            return  # whoever samples finds them by the count of writes
        sampler, storage = self._sampler, self._storage
        if self._supplied is None:
            sampler.mark_update(index, storage=storage)
            return
        sampler._follow(storage)
        index = sampler._flat(index, storage)
        last = min(len(index), storage.max_size)  # of more than fit, the last remain
        index, priority = index[-last:], self._supplied[-last:].to(index.device)
        sampler._write_new(index, priority)

    # --- reading ----------------------------------------------------------------------------------

    def sample(
        self,
        batch_size: int | None = None,
        return_info: bool = False,
        include_info: bool | None = None,
    ) -> Any:
        """Draw elements in proportion to priority^alpha.

        Args:
            batch_size: B; None is that of the constructor.
            return_info: whether to return a tuple of the batch and a dict of what was added to it.
            include_info: deprecated, as in TorchRL.

        Returns:
            TensorDict [B] with "index" and "index_generation", int64, and "priority_weight",
            float32, beside what was stored.

        Raises:
            EmptyBufferError: nothing is stored, or nothing can be drawn (a RuntimeError).
        """
        size = self._batch_size if batch_size is None else batch_size
        settled = self._batch_size in (None, size) or self._warned_batch_size_conflict
        if size is not None and settled and include_info is None and not self._service_shutdown:
            with self._replay_lock:
                columns = self._cache.of(self, marks=True)
                if columns is not None:
                    with self._write_lock:
                        self._catch_up()
                        batch, info = fast.read(self, self._cache, columns, size)
                    return (batch, info) if return_info else batch
        return TensorDictReplayBuffer.sample(self, batch_size, return_info, include_info)

    def _sample(self, batch_size: int) -> Any:
        sampler = self.prioritized_sampler
        with self._replay_lock, self._write_lock:
            sampler._follow(self._storage)
            self._catch_up()
        return TensorDictReplayBuffer._sample(self, batch_size)

    def _catch_up(self) -> None:
        """With sync=False, give what was written since the last time the priority of the new."""
        if self._sync or not isinstance(self._sampler, PrioritizedSampler):
            return
        written, capacity = int(self._writer._write_count), self._storage.max_size
        if written < self._seen_writes:  # emptied by another process
            self._sampler._empty()
            self._seen_writes = 0
        new = min(written - self._seen_writes, capacity)
        if new:
            end = self._writer._cursor
            index = torch.arange(end - new, end, device="cpu").remainder_(capacity)
            self._sampler.mark_update(index, storage=self._storage)
        self._seen_writes = written

    # --- priorities -------------------------------------------------------------------------------

    def update_priority(self, index: Any, priority: Any) -> None:
        """Set priorities; of equal indices the last one holds, and negative ones are skipped.

        An update of a slot that is not filled comes too late, since whatever lived there has been
        emptied: it is dropped, and counted as stale in `stats`. An index that is not that of a slot
        of the storage is an error.

        Args:
            index: int, int64 [B], or [B, ndim] or a tuple of ndim [B].
            priority: as losses write TD errors, [B], or one number for all.

        Raises:
            IndexRangeError: an index is not below the storage's size; nothing is written then.
            PriorityError: NaN, infinite, or neither one value nor one per index; nothing is
                written then.
        """
        with self._replay_lock, self._write_lock:
            self._catch_up()
        ReplayBuffer.update_priority(self, index, priority)

    def update_tensordict_priority(self, data: TensorDictBase) -> None:
        """Set the priorities of a batch from the TD errors that a loss left in it.

        Elements whose slot has been overwritten or emptied since they were drawn are dropped, and
        counted as stale in `stats`. With a `PrioritizedSliceSampler` whose `reduction` is "r2d2",
        the first record of each slice gets the priority of the slice (see its `slice_priorities`).

        Args:
            data: from `sample`, TensorDict [B], with the priority entry.

        Raises:
            IndexRangeError: an index is not that of a slot of the storage; no priority is changed
                then (an IndexError).
            PriorityError: the priority entry or "index" is missing, or holds NaN or infinite values
                or too few; no priority is changed then (a ValueError).
        """
        sampler, storage = self.prioritized_sampler, self._storage
        if sampler.reduction == "r2d2" and isinstance(sampler, PrioritizedSliceSampler):
            data = sampler.first_records(data, self.priority_key)
        td_error, index = required(data, self.priority_key), required(data, "index")
        generation = data.get("index_generation", None)
        if self._settle(td_error, index, generation):
            return
        if storage.ndim > 1 and index.shape[-1:] == (storage.ndim,):
            index = index.reshape(-1, storage.ndim)
            rows = len(index)
        else:
            index = first_of_each(index)
            index = validation.as_index(index, sampler.device)
            rows = data.batch_size[0] if data.ndim else 1
        values = self._magnitudes(td_error, rows)
        with self._replay_lock, self._write_lock:
            self._catch_up()
            sampler._follow(storage)
            live = self._live(index, generation)
            if self._sample_unit is not None:
                index, values, live = self._anchored(data, index, values, live)
            plain = storage.ndim == 1
            device = sampler.device
            flat = validation.as_index(index, device) if plain else sampler._flat(index, storage)
            live = None if live is None else validation.to_device(live, device)
            sampler._update(flat, values, storage, live=live)

    def _settle(self, td_error: Tensor, index: Tensor, generation: Tensor | None) -> bool:
        """Set priorities by compiled kernels; False, and nothing is done, where that cannot be."""
        plain = type(self._writer) is GenerationWriter and self._storage.ndim == 1
        if not plain or self._sample_unit is not None:
            return False
        with self._replay_lock, self._write_lock:
            self._catch_up()
            return fast.settle(self, td_error, index, generation)

    def _live(self, index: Tensor, generation: Tensor | None) -> Tensor | None:
        """Which elements are as they were drawn, bool [B]; None: all, as far as can be told."""
        if generation is None:
            return None
        writer = self._writer
        plain = type(writer) is GenerationWriter and self._storage.ndim == 1
        now: Tensor = writer.stamps(index) if plain else writer.generations_of(index)
        generation = validation.as_index(first_of_each(generation), now.device, "index_generation")
        if generation.shape != now.shape:
            raise IndexRangeError(
                f"index_generation: expected one for each of {len(now)} indices,"
                f" got {len(generation)}"
            )
        if validation.can_raise(now) and torch.equal(now, generation):
            return None
        return now == generation

    def _anchored(
        self, data: TensorDictBase, index: Tensor, values: Tensor, live: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """With a sample unit, which draws windows: the same for their anchors."""
        anchored = self._anchor_reduced_priority(data, values)
        if anchored is None:
            return index, values, live
        anchor = data.get("anchor_index")
        if live is None or anchor.shape != index.shape:
            return *anchored, None
        return *anchored, torch.isin(anchored[0], anchor[(anchor == index) & live])

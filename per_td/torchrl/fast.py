"""The short way through a buffer that asks for nothing special: column by column.

It works on the same storage, writer and sampler as TorchRL's own way, with the same results, so
that every other method of the buffer goes on working.
"""

from array import array
from operator import is_
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from torchrl.data.replay_buffers import ReplayBuffer
from torchrl.data.replay_buffers.storages import (
    LazyMemmapStorage,
    LazyTensorStorage,
    Storage,
    _collate_id,
)

from per_td.errors import EmptyBufferError, IndexRangeError
from per_td.priorities.sampling import sample_weighted
from per_td.torchrl.columns import Columns
from per_td.torchrl.sampler import PrioritizedSampler
from per_td.torchrl.writer import GenerationWriter

__all__ = ["ColumnCache", "read", "settle", "write"]


def _is_plain(buffer: ReplayBuffer, generation: Tensor | None) -> bool:
    """Whether nothing about the buffer but its transforms asks for TorchRL's own way.

    Args:
        buffer: the buffer.
        generation: of all slots, as its writer has them.
    """
    storage, writer = buffer._storage, buffer._writer
    return (
        type(writer) is GenerationWriter
        and writer._storage is storage  # it may have been given to another buffer since
        and not writer._compilable
        and type(storage) in (LazyTensorStorage, LazyMemmapStorage)
        and storage.ndim == 1
        and storage.initialized
        and not storage._compilable
        and not buffer._prefetch
        and not buffer._pin_memory
        and buffer._sample_unit is None
        and buffer._sample_dependency is None
        and buffer._collate_fn is _collate_id
        and generation is not None
        and generation.device == storage.device
        and _is_row(generation, storage.max_size, torch.int64)
    )


class ColumnCache:
    """The columns of a buffer's storage, looked up again whenever anything has been replaced.

    Attributes:
        generation: of all slots, which goes with the columns: int64 [capacity], contiguous, on
            their device.
    """

    generation: Tensor

    def __init__(self) -> None:
        self._parts: tuple[Any, ...] = (self,)  # which is none of them
        self._plain = self._marks = False
        self._columns: Columns | None = None
        self._revision = -1

    def of(self, buffer: ReplayBuffer, *, marks: bool) -> Columns | None:
        """The columns, to be read and written past TorchRL; None if something asks for its way.

        That is: a part of another kind or of another size, a transform, or data other than
        TensorDicts of tensors on the storage's device.

        Args:
            buffer: the buffer.
            marks: whether writing marks priorities, for which the sampler must be a plain one too.
        """
        storage, sampler = buffer._storage, buffer._sampler
        data, table = storage._storage, getattr(sampler, "_table", None)  # a PriorityTable
        generation = getattr(buffer._writer, "_generation", None)
        parts = (
            data,
            storage,
            buffer._writer,
            generation,
            sampler,
            table,
            buffer._prefetch,
            buffer._pin_memory,
            buffer._sample_unit,
            buffer._sample_dependency,
            buffer._collate_fn,
        )
        if not all(map(is_, parts, self._parts)):
            self._parts, self._revision = parts, -1
            self._plain = _is_plain(buffer, generation)
            self._marks = (
                type(sampler) is PrioritizedSampler
                and table is not None
                and table.device == storage.device
                and table.capacity == storage.max_size
            )
            if generation is not None:
                self.generation = generation
        if not self._plain or (marks and not self._marks) or len(buffer._transform):
            return None
        revision = storage._mutation_revision_value.get_obj().value
        if revision != self._revision:
            self._columns = Columns.of(data, storage.max_size, storage.device)
            self._revision = revision
        columns = self._columns
        # `max_size` decides where rows go, and is an attribute that anybody can set
        fits = columns is not None and columns.capacity == storage.max_size
        return columns if fits else None

    def wrote(self, storage: Storage, index: Tensor, end: int) -> None:
        """Have the storage know of rows written; none of its tensors was replaced.

        A change by somebody else in between leaves the revisions unequal, which is safe. The caller
        holds the lock that keeps other writers out: numbers that processes share are written past
        their own locks.

        Args:
            storage: the storage.
            index: the slots, int64 [n].
            end: the first slot, plus how many.
        """
        storage._last_cursor = index
        storage._last_cursor_index_value.get_obj().value = (end - 1) % storage.max_size
        length = storage._len_value.get_obj()
        length.value = min(max(length.value, end), storage.max_size)
        storage._mutation_revision_value.get_obj().value += 1
        self._revision += 1


def write(
    buffer: ReplayBuffer,
    cache: ColumnCache,
    columns: Columns,
    rows: list[Tensor],
    n: int,
    priority: Tensor | None,
    *,
    marks: bool,
) -> tuple[int, Tensor]:
    """Write n rows. The caller holds the buffer's locks and has checked everything.

    Args:
        buffer: a plain buffer.
        cache: where the columns are from.
        columns: its storage's.
        rows: from `Columns.rows_of`.
        n: how many rows, at most the storage's capacity.
        priority: float32 [n], or None for that of new elements.
        marks: whether to set priorities at all.

    Returns:
        The first slot, and all slots, int64 [n].
    """
    storage, table = buffer._storage, buffer._sampler._table if marks else None
    start = buffer._writer.next_slot()
    index = columns.write(rows, start, n, cache.generation)
    buffer._writer.claim(start, n)
    cache.wrote(storage, index, start + n)
    if table is not None and priority is None:
        table.write_runs(array("q", (start, n)))
    elif table is not None:
        table.write_new(index, priority)
    for entity in storage._attached_entities:
        if entity is not buffer:
            entity.mark_update(index)
    return start, index


def read(
    buffer: ReplayBuffer, cache: ColumnCache, columns: Columns, n: int
) -> tuple[TensorDict, dict[str, Any]]:
    """Draw n elements: the batch, and what was added to it. The caller holds the locks."""
    sampler, size = buffer._sampler, _length(buffer._storage)
    if not size:
        raise EmptyBufferError("Cannot sample from an empty storage.")
    index, weight = sample_weighted(
        sampler._table, n, sampler._rng, beta=sampler._beta, written=size, size=size
    )
    info = {"priority_weight": weight}
    return columns.gather(index, cache.generation, info), info


def settle(
    buffer: ReplayBuffer, td_error: Tensor, index: Tensor, generation: Tensor | None
) -> bool:
    """Set the priorities of a plain batch, and count what is stale. The caller holds the locks.

    Args:
        buffer: one whose sampler and writer are per_td's own, without a sample unit.
        td_error: what a loss wrote.
        index, generation: as they were drawn.

    Returns:
        False, and nothing is done, where something is elsewhere or of another form, or an index
        is not that of a filled slot.

    Raises:
        PriorityError: NaN or infinite; nothing is written then.
    """
    sampler, now = buffer._sampler, buffer._writer._generation
    table, n = sampler._table, index.numel()
    if now is None or generation is None:
        return False
    plain = (
        table.device.type == "cpu"
        and _packed(now, table.capacity, torch.int64)
        and now.ndim == index.ndim == 1
        and _packed(index, n, torch.int64)
        and _packed(generation, n, torch.int64)
        and _packed(td_error, n, torch.float32)
    )
    if not plain:
        return False
    try:
        sampler._stale += table.update(
            index,
            td_error.view(n),
            written=_length(buffer._storage),
            generation=generation.view(n),
            stamps=now,
            squared=sampler._td_error_unit == "squared",
        )
    except IndexRangeError:  # the long way tells slots that are empty from those that are not there
        return False
    return True


def _length(storage: Storage) -> int:
    """How many elements are stored; the number, which processes share, is read without its lock."""
    shared = getattr(storage, "_len_value", 0)
    return len(storage) if isinstance(shared, int) else int(shared.get_obj().value)


def _packed(tensor: Tensor, n: int, dtype: torch.dtype) -> bool:
    """Whether a kernel can read n numbers of this type from the tensor."""
    return (
        tensor.is_cpu and tensor.dtype == dtype and tensor.numel() == n and tensor.is_contiguous()
    )


def _is_row(tensor: Tensor, n: int, dtype: torch.dtype) -> bool:
    """Whether the tensor has shape [n], this dtype, and its numbers close together."""
    return tensor.dtype == dtype and tensor.shape == (n,) and tensor.is_contiguous()

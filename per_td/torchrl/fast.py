"""The short way through a buffer that asks for nothing special: column by column.

It works on the same storage, writer and sampler as TorchRL's own way, with the same results, so
that every other method of the buffer goes on working.
"""

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

from per_td.torchrl.columns import Columns
from per_td.torchrl.sampler import PrioritizedSampler
from per_td.torchrl.writer import GenerationWriter

__all__ = ["ColumnCache", "is_plain", "read", "write"]


def is_plain(buffer: ReplayBuffer, *, marks: bool) -> bool:
    """Whether nothing about the buffer asks for TorchRL's own way.

    Args:
        buffer: the buffer.
        marks: whether writing marks priorities, for which the sampler must be a plain one too.
    """
    storage, writer, sampler = buffer._storage, buffer._writer, buffer._sampler
    return (
        type(writer) is GenerationWriter
        and not writer._compilable
        and type(storage) in (LazyTensorStorage, LazyMemmapStorage)
        and storage.ndim == 1
        and storage.initialized
        and not buffer._prefetch
        and not buffer._pin_memory
        and buffer._sample_unit is None
        and buffer._sample_dependency is None
        and buffer._collate_fn is _collate_id
        and (
            not marks or (type(sampler) is PrioritizedSampler and sampler.device == storage.device)
        )
        and not len(buffer._transform)
    )


class ColumnCache:
    """The columns of a storage, looked up again whenever its tensors may have been replaced."""

    def __init__(self) -> None:
        self._data: Any = None
        self._revision = -1
        self._columns: Columns | None = None

    def of(self, storage: Storage) -> Columns | None:
        """The storage's columns; None if it does not hold nested TensorDicts of tensors."""
        data, revision = storage._storage, storage._mutation_revision
        if data is not self._data or revision != self._revision:
            self._columns = Columns.of(data, storage.max_size)
            self._data, self._revision = data, revision
        return self._columns

    def wrote(self, storage: Storage) -> None:
        """Tell those who keep something about the storage that it changed; no tensor was replaced.

        A change by somebody else in between leaves the revisions unequal, which is safe.
        """
        storage._bump_mutation_revision()
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
    storage = buffer._storage
    start, parts = buffer._writer.claim(n)
    index = torch.arange(start, start + n, device=storage.device)
    if len(parts) > 1:
        index.remainder_(storage.max_size)
    columns.write(rows, index, parts)
    storage._set_last_cursor((start + n - 1) % storage.max_size)
    storage._last_cursor = index
    storage._len = min(storage._len + n, storage.max_size)
    cache.wrote(storage)
    if marks:
        buffer._sampler._table.write_new(index, priority)
    for entity in storage._attached_entities:
        if entity is not buffer:
            entity.mark_update(index)
    return start, index


def read(buffer: ReplayBuffer, columns: Columns, n: int) -> tuple[TensorDict, dict[str, Any]]:
    """Draw n elements: the batch, and what was added to it. The caller holds the locks."""
    index, info = buffer._sampler.sample(buffer._storage, n)
    info["index"] = index
    info["index_generation"] = buffer._writer.stamps(index)
    return columns.gather(index, info), info

"""Private attributes of TorchRL's buffers, storages and writers, which subclasses also use.

With them, a buffer that asks for nothing special is written and read column by column: on the same
storage, writer and sampler as by TorchRL's methods, with the same results.
"""

import math
from array import array
from contextlib import suppress
from operator import is_
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase, is_tensor_collection, is_tensorclass
from tensordict.nn.utils import _set_dispatch_td_nn_modules
from tensordict.utils import expand_as_right
from torch import Tensor
from torchrl.data.replay_buffers import ReplayBuffer
from torchrl.data.replay_buffers.storages import (
    LazyMemmapStorage,
    LazyTensorStorage,
    ListStorage,
    Storage,
    TensorStorage,
    _collate_id,
)
from torchrl.data.replay_buffers.utils import _pin_memory
from torchrl.envs.transforms import Compose, Transform
from torchrl.envs.transforms._base import _CallableTransform

from per_td.errors import CheckpointError, ConfigurationError, EmptyBufferError
from per_td.torchrl.columns import Columns
from per_td.torchrl.sampler import PrioritizedSampler
from per_td.torchrl.writer import GenerationWriter

NOTIFIES = hasattr(ReplayBuffer, "_notify_replay_state_change")
"""True if threads can wait for TorchRL's buffers: each change has to wake them."""


def counts_draws(buffer: ReplayBuffer) -> bool:
    """True if a buffer has TorchRL's counters of the calls of `sample`."""
    parts = ("_increment_counter", "_sample_call_count_value", "_sampled_item_count_value")
    return all(hasattr(buffer, part) for part in parts)


def count_draw(buffer: ReplayBuffer, index: Any) -> None:
    """Count a call of `sample` as TorchRL does; `index` is that of the batch's elements."""
    if isinstance(index, tuple):
        n = index[0].numel()
    elif buffer._storage.ndim > 1 and index.ndim > 1 and index.shape[-1] == buffer._storage.ndim:
        n = index[..., 0].numel()
    else:
        n = index.numel()
    buffer._increment_counter("_sample_call_count_value", 1)
    buffer._increment_counter("_sampled_item_count_value", n)


def is_held(lock: Any) -> bool:
    """True if this thread holds an RLock; `threading.Condition` asks in the same way."""
    return bool(lock._is_owned())


def stored(storage: Storage) -> int:
    """Number of elements; the number, which processes share, is read without its lock."""
    shared = getattr(storage, "_len_value", 0)
    return len(storage) if isinstance(shared, int) else int(shared.get_obj().value)


def generations(buffer: ReplayBuffer, slots: int, device: torch.device) -> Tensor | None:
    """Generations of all slots, int64 [slots], contiguous, on `device`.

    None unless a `GenerationWriter` made just these for this storage, of one dimension.
    """
    storage, writer = buffer._storage, buffer._writer
    if type(writer) is not GenerationWriter or writer._storage is not storage or storage.ndim > 1:
        return None  # a writer may have been given to another buffer
    found = writer._generation
    fits = (
        found is not None
        and found.device == device
        and found.dtype == torch.int64
        and found.shape == (slots,)
        and found.is_contiguous()
    )
    return found if fits else None


def newest_generation(storage: Storage) -> int:
    """The largest generation of a slot of a storage, -1 for none; on CUDA the host waits."""
    known: Tensor | None = getattr(storage, "_slot_generations", None)
    return -1 if known is None or not known.numel() else int(known.max())


def require_writable(storage: Storage) -> None:
    """Refuse, by a ConfigurationError, to write outside an inference mode to memory made in one."""
    data: Any = getattr(storage, "_storage", None)
    if torch.is_inference_mode_enabled() or not is_tensor_collection(data):
        return
    leaf = next(iter(data.values(True, True)), None)  # one stands for all: they are made at once
    if isinstance(leaf, Tensor) and leaf.is_inference():
        raise ConfigurationError(
            "storage: expected memory made outside torch.inference_mode(), to which one can write"
            " at any time, got memory made inside; nothing was written"
        )


def check_storage_state(storage: Storage, state: Any) -> None:
    """Refuse, by a CheckpointError, a state of another size or of other elements than a storage's.

    Elements as a list fit no storage of tensors, nor the other way round.
    """
    if not isinstance(state, dict):
        raise CheckpointError(f"storage: expected a dictionary, got {type(state).__name__}")
    data = state.get("_storage")
    size = len(data) if isinstance(data, list) else state.get("_len", 0)
    if type(size) is not int or not 0 <= size <= storage.max_size:
        raise CheckpointError(f"storage: expected 0 to {storage.max_size} elements, got {size!r}")
    leaves = list(data.values()) if isinstance(data, dict) else [data]
    shapes = {tuple(leaf.shape[: storage.ndim]) for leaf in leaves if isinstance(leaf, Tensor)}
    slots = {math.prod(shape) for shape in shapes if len(shape) == storage.ndim}
    expected = storage.max_size if storage.ndim == 1 else max([storage.max_size, *slots])
    if shapes and (len(shapes) > 1 or slots != {expected}):
        raise CheckpointError(
            f"storage: expected tensors of {expected} slots, got shapes {sorted(shapes)}"
        )
    if isinstance(storage, TensorStorage) and isinstance(data, list):
        raise CheckpointError("storage: expected elements as tensors, got a list of elements")
    if type(storage) is ListStorage and leaves and not isinstance(data, list):
        raise CheckpointError("storage: expected a list of elements, got elements as tensors")
    own: Any = getattr(storage, "_storage", None)
    require_alike(storage, data, more=isinstance(own, TensorDictBase) and not own.is_locked)


def check_saved_storage(storage: Storage, folder: Path) -> None:
    """Refuse the files of a storage of tensordicts whose elements `require_alike` refuses."""
    data: Any = {}
    if isinstance(getattr(storage, "_storage", None), TensorDictBase):
        with suppress(OSError, ValueError, RuntimeError, KeyError):  # TorchRL refuses other files
            data = TensorDict.load_memmap(folder).state_dict()
    require_alike(storage, data)


def require_alike(storage: Storage, data: Any, *, more: bool = False) -> None:
    """Refuse, by a CheckpointError, elements of other keys, shapes or dtypes than a storage has.

    TorchRL converts the numbers to the dtype of the storage, and keeps old numbers at keys that
    the elements lack. Keys that the storage lacks are lost with files, an error with memory-mapped
    tensors, and taken up with a state by a tensordict that can grow: `more` accepts them. A storage
    without memory takes any elements.
    """
    if not isinstance(storage, TensorStorage) or not storage.initialized:
        return
    wanted, got = _kinds(storage.state_dict()["_storage"]), _kinds(data)
    names = wanted if more else {**wanted, **got}
    other = [name for name in names if wanted.get(name) != got.get(name)]
    if got and other:
        name = other[0]
        raise CheckpointError(
            f"storage: expected {wanted.get(name, 'no entry')} at {name!r}, as in the elements that"
            f" are stored, got {got.get(name, 'no entry')}"
        )


def _kinds(data: Any) -> dict[str, str]:
    """The dtype and the shape of each tensor in the state of a storage."""
    entries = data if isinstance(data, dict) else {"": data}
    return {
        name: f"{leaf.dtype} {list(leaf.shape)}"
        for name, leaf in entries.items()
        if isinstance(leaf, Tensor)
    }


def generations_at(storage: Storage, rows: Tensor) -> Tensor | None:
    """Generations of filled rows of a storage, int64 [R] as `rows`; None if it has none."""
    known: Tensor | None = getattr(storage, "_slot_generations", None)
    if known is None or len(known) < storage.shape[0]:
        return None
    return known[rows.to(known.device)].to(rows.device)


def forget(storage: Storage, buffer: ReplayBuffer) -> None:
    """Stop a storage from telling a buffer of writes."""
    storage._attached_entities.remove(buffer)


def revision(storage: Storage) -> int | None:
    """A number that changes with the contents of a storage; None if it has none."""
    found: int | None = getattr(storage, "_mutation_revision", None)
    return found


class ColumnCache:
    """The columns of a buffer's storage, looked up again whenever anything has been replaced."""

    def __init__(self) -> None:
        self.columns: Columns | None = None  # None: the data are not in columns
        self.revision = -1  # of the storage, when they were found or written
        self._parts: tuple[Any, ...] = (self,)  # a part of no buffer
        self._generation: Tensor | None = None
        self._marks = False

    def of(self, buffer: ReplayBuffer, *, marks: bool) -> Columns | None:
        """The columns; None if something asks for TorchRL's methods.

        That is: a part of another kind or of another size, or data other than TensorDicts of
        tensors on the storage's device. `marks`: the sampler must be a plain one too.
        """
        storage, sampler = buffer._storage, buffer._sampler
        table = getattr(sampler, "_table", None)  # a PriorityTable
        parts = (
            storage._storage,
            storage,
            buffer._writer,
            getattr(buffer._writer, "_generation", None),
            sampler,
            table,
            buffer._sample_unit,
            buffer._collate_fn,
        )
        if not all(map(is_, parts, self._parts)):
            self._parts, self.revision = parts, -1
            self._generation = _plain_generations(buffer)
            self._marks = (
                type(sampler) is PrioritizedSampler
                and table is not None
                and table.device == storage.device
                and table.capacity == storage.max_size
            )
        if self._generation is None or (marks and not self._marks):
            return None
        now = storage._mutation_revision_value.get_obj().value
        if now != self.revision:
            self.columns = Columns.of(storage._storage, self._generation)
            self.revision = now
        columns = self.columns
        # `max_size` decides where rows go, and is an attribute that anybody can set
        fits = columns is not None and columns.capacity == storage.max_size
        return columns if fits else None


def _plain_generations(buffer: ReplayBuffer) -> Tensor | None:
    """`generations` of a plain buffer; None if a part of it asks for TorchRL's methods."""
    storage, writer = buffer._storage, buffer._writer
    plain = (
        type(storage) in (LazyTensorStorage, LazyMemmapStorage)
        and storage.initialized
        and not storage._compilable
        and not getattr(writer, "_compilable", True)
        and buffer._sample_unit is None
        and buffer._collate_fn is _collate_id
    )
    return generations(buffer, storage.max_size, storage.device) if plain else None


def write(
    buffer: ReplayBuffer, columns: Columns, rows: list[Tensor], n: int, priority: Tensor | None
) -> tuple[int, Tensor]:
    """Write n rows, from `Columns.rows_of`; the first slot, and all slots, int64 [n].

    The caller holds the buffer's locks and has checked everything. `priority` is float32 [n], or
    None for that of new elements.
    """
    storage, writer, capacity = buffer._storage, buffer._writer, columns.capacity
    # the lock keeps other writers out, so the numbers, which processes share, are read and set past
    # their own locks
    cursor, length = writer._cursor_value.get_obj(), storage._len_value.get_obj()
    start = cursor.value % capacity  # a state may hold any
    index = columns.write(rows, start, n)
    end = start + n
    cursor.value = end % capacity
    writer._write_count_value.get_obj().value += n
    storage._last_cursor = index
    storage._last_cursor_index_value.get_obj().value = (end - 1) % capacity
    length.value = min(max(length.value, end), capacity)
    # a change by somebody else in between leaves the revisions unequal, which is safe
    storage._mutation_revision_value.get_obj().value += 1
    buffer._cache.revision += 1
    if buffer._sync:
        table = buffer._sampler._table
        if priority is None:
            table.write_runs(array("q", (start, n)))
        else:
            table.write_new(index, priority)
    for entity in storage._attached_entities:
        if entity is not buffer:
            entity.mark_update(index)
    return start, index


def read(
    buffer: ReplayBuffer, columns: Columns, n: int, *, apart: bool
) -> tuple[TensorDict, dict[str, Any]]:
    """Draw a batch of n elements, and the entries beside them, which `apart` leaves out of it.

    The caller holds the locks.
    """
    size = stored(buffer._storage)
    if not size:
        raise EmptyBufferError("Cannot sample from an empty storage.")
    index, info = buffer._sampler._draw(buffer._storage, n, size)
    rows, info["index_generation"] = columns.gather(index)
    info["index"] = index
    return columns.batch(rows, {} if apart else info), info


def to_store(transform: Compose, data: Any) -> Any:
    """Apply the inverse transforms to data that will be written; None if one holds them back."""
    if not any(map(_is_inverted, transform.transforms)):
        return data
    with _set_dispatch_td_nn_modules(True):
        return transform.inv(data)


def _is_inverted(transform: Transform) -> bool:
    """False if the inverse of a transform surely leaves everything as it is."""
    inverse = type(transform)._inv_call
    if inverse is Transform._inv_call:
        return bool(transform.in_keys_inv)
    return inverse is not _CallableTransform._inv_call


def is_changed(buffer: ReplayBuffer) -> bool:
    """True if `changed` has anything to do."""
    return bool(buffer._pin_memory or len(buffer._transform))


def changed(buffer: ReplayBuffer, batch: Any, info: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Apply the transforms to a batch, and pin its memory and the entries' if the buffer does."""
    if len(buffer._transform):
        with _set_dispatch_td_nn_modules(True):
            batch = buffer._transform(batch)
    if buffer._pin_memory:
        batch, *pinned = map(_pin_memory, (batch, *info.values()))
        info = dict(zip(info, pinned, strict=True))
    return batch, info


def completed(batch: Any, info: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Put the entries beside a batch into it, on its device.

    A RuntimeError if the transforms made something of another size of it.
    """
    if not is_tensor_collection(batch) or is_tensorclass(batch):
        return batch, info
    with batch.unlock_():
        for key, value in info.items():
            entry = torch.stack(value, -1) if isinstance(value, tuple) else value
            if batch.device is not None:
                entry = entry.to(batch.device)
            if entry.ndim < batch.ndim:
                entry = expand_as_right(entry, batch)
            batch.set(key, entry)
    return batch, info


def without(batch: Any, info: dict[str, Any]) -> None:
    """Take the entries that `completed` puts into a batch out of it, but for the slots."""
    if is_tensor_collection(batch) and not is_tensorclass(batch):
        with batch.unlock_():
            for key in info.keys() - {"index"}:
                batch.pop(key, None)

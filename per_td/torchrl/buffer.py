"""TensorDictPrioritizedReplayBuffer: TorchRL's, on per_td's priorities."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from functools import partial
from inspect import signature
from math import isclose
from multiprocessing.context import get_spawning_popen
from pathlib import Path
from typing import Any

import torch
from tensordict import (
    LazyStackedTensorDict,
    TensorDict,
    TensorDictBase,
    is_tensor_collection,
    lazy_stack,
)
from torch import Tensor
from torchrl.data import replay_buffers as torchrl_buffers
from torchrl.data.replay_buffers import ReplayBuffer, TensorDictReplayBuffer
from torchrl.data.replay_buffers.samplers import RandomSampler, Sampler
from torchrl.data.replay_buffers.storages import Storage
from torchrl.data.replay_buffers.writers import Writer

from per_td import validation
from per_td.errors import CheckpointError, ConfigurationError, IndexRangeError, PriorityError
from per_td.priorities.table import as_mode
from per_td.torchrl import privates
from per_td.torchrl.sampler import PrioritizedSampler
from per_td.torchrl.slices import PrioritizedSliceSampler
from per_td.torchrl.td_errors import as_key, first_of_each, magnitudes, required
from per_td.torchrl.writer import GenerationWriter, fit_cursor, slots_of
from per_td.weights import priority_of

_EPS = 1e-8

_ENTRIES, _STACKED = "__entries__", "__stacked__"
"""Keys in `state_dict` that stand for a TensorDict and a lazy stack."""


class TensorDictPrioritizedReplayBuffer(torchrl_buffers.TensorDictPrioritizedReplayBuffer):
    """Drop-in for `torchrl.data.TensorDictPrioritizedReplayBuffer`, without a compiled extension.

    It has the same arguments and interface. Batches also contain "index_generation". With it, the
    buffer recognises and drops stale updates: those whose slot holds another element now.

    A one-dimensional `LazyTensorStorage` or `LazyMemmapStorage` of TensorDicts is written and read
    column by column, which is several times faster and gives the same results. This needs a buffer
    without `collate_fn`, `sample_unit` and `compilable`.

    Args:
        alpha: exponent of the priorities. Set it later with `buffer.sampler.alpha`.
        beta: exponent of the weights. Set it later with `buffer.sampler.beta`.
        priority_key: entry in which losses leave their TD errors.
        eps: added to every priority; None is 1e-8.
        storage: a TorchRL storage, or a callable that makes one; None is `ListStorage(1000)`.
        sampler_device: device of the priorities; None follows the storage.
        sync: False leaves the priorities to the process that samples. Writers in other processes
            do not touch them; the next draw gives the new elements theirs.
        prefetch: number of batches that threads draw ahead.
        reduction: makes one priority of several TD errors of an element: "max", "min", "mean",
            "median", "sum" or "r2d2" (0.9 max + 0.1 mean); None is "max".
        batch_size: default batch size of `sample`.
        generator: source of the random numbers; None is torch's own.
        shared: True if other processes write to the buffer.
        sample_unit, collate_fn, pin_memory, transform, dim_extend, compilable, transport,
            transport_options: as in TorchRL.
        draw: "independent", "stratified" or "without_replacement".
        method: "auto", "tree" or "multinomial".
        weight_normalization: "buffer" as TorchRL, "batch" or "none".
        td_error_unit: unit of the losses' TD errors: "abs" for |delta|, "squared" for delta^2. See
            docs/torchrl_losses.md.
        max_priority_within_buffer: True gives new elements the largest priority in the buffer,
            False the largest that it ever held.
        priority_clip, uniform_mix, latest, track_draws: as in `per_td.PrioritizedReplayBuffer`.
        sampler: a `per_td.torchrl.PrioritizedSampler` to use as it is, in place of the one that the
            other arguments describe. Its alpha and beta must equal `alpha` and `beta`.

    Raises:
        ConfigurationError: an argument is not accepted (a ValueError).

    Example:
        >>> from tensordict import TensorDict
        >>> from torchrl.data import LazyTensorStorage
        >>> buffer = TensorDictPrioritizedReplayBuffer(
        ...     alpha=0.7, beta=0.5, storage=LazyTensorStorage(10), batch_size=4
        ... )
        >>> _ = buffer.extend(TensorDict({"x": torch.rand(10)}, [10]))
        >>> batch = buffer.sample()
        >>> batch["td_error"] = torch.rand(4)
        >>> buffer.update_tensordict_priority(batch)
    """

    _sync: bool
    _cache: privates.ColumnCache
    _seen_writes: int  # with sync=False: the priorities know of so many writes
    _seen_emptied: int  # and of so many times that all was forgotten
    _counts_draws: bool = False  # as TorchRL's `sample` does
    _supplied: Tensor | None = None  # priorities of elements that TorchRL's methods are writing

    def __init__(
        self,
        *,
        alpha: float,
        beta: float,
        priority_key: Any = "td_error",
        eps: float | None = _EPS,
        storage: Storage | Callable[[], Storage] | None = None,
        sample_unit: Any = None,
        sampler_device: torch.device | str | None = None,
        sync: bool = True,
        collate_fn: Callable[[Any], Any] | None = None,
        pin_memory: bool = False,
        prefetch: int | None = None,
        transform: Any = None,
        reduction: str | None = "max",
        batch_size: int | None = None,
        dim_extend: int | None = None,
        generator: torch.Generator | None = None,
        shared: bool = False,
        compilable: bool = False,
        transport: str = "auto",
        transport_options: dict[str, Any] | None = None,
        draw: str = "independent",
        method: str = "auto",
        weight_normalization: str = "buffer",
        td_error_unit: str = "abs",
        max_priority_within_buffer: bool = False,
        priority_clip: tuple[float | None, float | None] | None = None,
        uniform_mix: float = 0.0,
        latest: int = 0,
        track_draws: bool = False,
        sampler: PrioritizedSampler | None = None,
    ) -> None:
        kept: Storage = self._maybe_make_storage(storage, compilable)
        _require_one_dimension(kept, sync=sync)
        if batch_size is not None:
            batch_size = validation.positive_int("batch_size", batch_size)
        capacity = slots_of(kept)
        if sampler is None:
            sampler = PrioritizedSampler(
                capacity,
                alpha,
                beta,
                _EPS if eps is None else eps,
                reduction=reduction or "max",
                max_priority_within_buffer=max_priority_within_buffer,
                device=sampler_device,
                draw=draw,
                method=method,
                weight_normalization=weight_normalization,
                td_error_unit=td_error_unit,
                priority_clip=priority_clip,
                uniform_mix=uniform_mix,
                latest=latest,
                track_draws=track_draws,
            )
        elif not (
            isclose(sampler.alpha, validation.real("alpha", alpha))
            and isclose(sampler.beta, validation.real("beta", beta))
        ):
            raise ConfigurationError(
                f"sampler: expected the buffer's alpha={alpha} and beta={beta},"
                f" got alpha={sampler.alpha} and beta={sampler.beta}"
            )
        _checked(sampler)._follow(kept)
        self._sync = sync
        self._prioritized_sampler = None  # TorchRL's name for the one that it keeps aside
        self._seen_writes = self._seen_emptied = 0
        self._cache = privates.ColumnCache()
        TensorDictReplayBuffer.__init__(
            self,
            priority_key=priority_key,
            storage=kept,
            sampler=sampler,
            sample_unit=sample_unit,
            writer=partial(GenerationWriter, compilable=compilable),
            collate_fn=collate_fn,
            pin_memory=pin_memory,
            prefetch=prefetch,
            transform=transform,
            batch_size=batch_size,
            dim_extend=dim_extend,
            generator=generator,
            shared=shared,
            compilable=compilable,
            transport=transport,
            transport_options=transport_options,
        )
        self._counts_draws = privates.counts_draws(self)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _OF_SAMPLER:
            raise ConfigurationError(
                f"{name}: expected to be set on the buffer's sampler, got {value!r} for the buffer;"
                f" use buffer.sampler.{name}"
            )
        if name == "priority_key":
            value = as_key(name, value)
        super().__setattr__(name, value)

    # --- parts ------------------------------------------------------------------------------------

    @property
    def prioritized_sampler(self) -> PrioritizedSampler:
        """The sampler, which holds the priorities.

        Raises:
            RuntimeError: the buffer has `sync=False`, and this process only writes to it.
        """
        if not isinstance(self._sampler, PrioritizedSampler):
            raise RuntimeError(
                "a writer's process of a buffer with sync=False holds no priorities: expected"
                " sampling and priority updates in the process that made the buffer"
            )
        return self._sampler

    def set_sampler(self, sampler: Sampler) -> Sampler:
        """Use another prioritized sampler; all stored elements then have the priority of new ones.

        Args:
            sampler: a `per_td.torchrl.PrioritizedSampler` or `PrioritizedSliceSampler`.

        Returns:
            The previous sampler.

        Raises:
            ConfigurationError: it is not one of per_td's, or cannot take the size of the storage.
        """
        with self._replay_lock, self._write_lock:
            _checked(sampler)._follow(self._storage)
            previous = ReplayBuffer.set_sampler(self, sampler)
            sampler._rng = self._rng
            self._initialize_prioritized_sampler()
        self._notify_replay_state_change()
        return previous

    def set_storage(
        self, storage: Storage, collate_fn: Callable[[Any], Any] | None = None
    ) -> Storage:
        """Use another storage; all its elements then have the priority of new ones.

        Args:
            storage: a storage of the same size.
            collate_fn: as in TorchRL.

        Returns:
            The previous storage.

        Raises:
            ConfigurationError: it has another size than the previous one, or several dimensions
                with `sync=False`.
        """
        if storage.max_size != self._storage.max_size:
            raise ConfigurationError(
                f"storage: expected max_size={self._storage.max_size}, got {storage.max_size}"
            )
        _require_one_dimension(storage, sync=self._sync)
        with self._replay_lock, self._write_lock:
            self._catch_up()
            fit_cursor(self._writer, storage)
            previous = ReplayBuffer.set_storage(self, storage, collate_fn)
            privates.forget(previous, self)
            storage.attach(self)
            self._writer.register_storage(storage)
            if isinstance(self._writer, GenerationWriter):
                self._writer.exceed(privates.newest_generation(previous))
            self._sampler._empty()
            self._initialize_prioritized_sampler()
        self._notify_replay_state_change()
        return previous

    def set_writer(self, writer: Writer) -> Writer:
        """Use another writer; a cursor beyond the filled slots moves to their end.

        Args:
            writer: the writer.

        Returns:
            The previous writer.

        Raises:
            ConfigurationError: it is no writer, or its cursor is negative or not an integer.
        """
        if not isinstance(writer, Writer):
            raise ConfigurationError(f"writer: expected one of TorchRL's, got {writer!r}")
        with self._replay_lock, self._write_lock:
            self._catch_up()
            fit_cursor(writer, self._storage)
            previous = ReplayBuffer.set_writer(self, writer)
            self._note_writes()
        return previous

    def _initialize_prioritized_sampler(self) -> None:
        if len(self._storage) > 0:
            filled = torch.arange(len(self._storage), device="cpu")
            self._sampler.mark_update(filled, storage=self._storage)

    # --- writing ----------------------------------------------------------------------------------

    def add(self, data: TensorDictBase) -> Any:
        """Write one element, or one row of a storage of several dimensions.

        Args:
            data: TensorDict. Its priority entry, if it has one, becomes its priority.

        Returns:
            Slot of the element: an int, or int64 [B, ndim] for a storage of several dimensions.
        """
        data = privates.to_store(self._transform, data)
        if data is None:
            return torch.zeros((0, self._storage.ndim), dtype=torch.long, device="cpu")
        written = self._write_columns(data, 1, single=True, supply=True)
        if written is not None:
            return written[0]
        rows = data.batch_size[: self._storage.ndim - 1].numel()
        return self._write_by_torchrl(ReplayBuffer._add, data, self._priorities_of(data, rows))

    def extend(self, tensordicts: TensorDictBase, *, update_priority: bool | None = None) -> Tensor:
        """Write several elements; in a full storage they replace the oldest.

        Args:
            tensordicts: TensorDict [n], or [B, T] for a storage of two dimensions.
            update_priority: True: the priority entry of `tensordicts`, if there is one, becomes the
                priority of the elements. None: the same, unless the buffer has `sync=False`.

        Returns:
            Slots of the elements, int64 [n], or [n, ndim] for a storage of several dimensions.

        Raises:
            PriorityError: a priority is NaN or infinite, or the number of priorities is wrong (a
                ValueError). Nothing is written.
            RuntimeError: `update_priority` is True for a buffer with `sync=False`.
            ValueError: `tensordicts` is not a TensorDict.
        """
        if not isinstance(tensordicts, TensorDictBase):
            raise ValueError(f"expected a TensorDictBase, got a {type(tensordicts).__name__}")
        if update_priority and not self._sync:
            raise RuntimeError(
                "update_priority: expected None or False for a buffer with sync=False, got True"
            )
        supply = update_priority is not False
        data = privates.to_store(self._transform, tensordicts)
        if data is None:
            return torch.zeros((0, self._storage.ndim), dtype=torch.long, device="cpu")
        n = len(data) if data.ndim else 0
        short = self._write_columns(data, n, single=False, supply=supply)
        if short is not None:
            start, index = short
            device = data.device or torch.device("cpu")
            if index.device == device:
                return index
            index = torch.arange(start, start + n, device=device)  # a copy might have to wait
            return index.remainder_(self._storage.max_size)
        rows = data.batch_size[: self._storage.ndim].numel()
        turned = self.dim_extend > 0
        priority = self._priorities_of(data, rows, turned=turned) if supply else None
        written: Tensor = self._write_by_torchrl(ReplayBuffer._extend, data, priority)
        return written

    def _priorities_of(
        self, data: TensorDictBase, rows: int, *, turned: bool = False
    ) -> Tensor | None:
        """The priorities that `data` brings along, float32 [rows]; -1 marks refused ones.

        `turned`: the storage takes the elements with time first.
        """
        td_error = data.get(self.priority_key, None) if self._sync else None
        if td_error is None:
            return None
        if turned and td_error.ndim > 1:
            td_error = self._transpose(td_error)
        priority = priority_of(self._magnitudes(td_error, rows), self._sampler.eps)
        valid = validation.require_finite(str(self.priority_key), priority)
        if (clip := self.prioritized_sampler.priority_clip) is not None:
            priority = priority.clamp(*clip)
        return torch.where(valid, priority, -1.0)

    def _magnitudes(self, td_error: Tensor, rows: int) -> Tensor:
        """One |TD error| per element, float32 [rows], on the priorities' device."""
        sampler, key = self.prioritized_sampler, self.priority_key
        td_error = validation.as_reals(str(key), td_error, sampler.device, torch.float32)
        unit, reduction = sampler.td_error_unit, sampler.reduction
        return magnitudes(td_error, rows, unit=unit, reduction=reduction, key=key)

    def _write_columns(
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
                written = privates.write(self, columns, rows, n, priority)
        if privates.NOTIFIES:
            self._notify_replay_state_change()
        return written

    def _write_by_torchrl(
        self, write: Callable[..., Any], data: Any, priority: Tensor | None
    ) -> Any:
        """Write by TorchRL's methods, which call `mark_update` on the way."""
        # a storage allocates its memory at the first write: outside the caller's inference mode
        first = torch.is_inference_mode_enabled() and not getattr(
            self._storage, "initialized", True
        )
        lasting = torch.inference_mode(False) if first else nullcontext()
        with self._replay_lock, lasting, torch.no_grad():
            privates.require_writable(self._storage)
            self._supplied = priority
            if is_tensor_collection(data):
                data = data.clone(recurse=False)  # TorchRL puts the slots into it
            try:
                written = write(self, data)
            finally:
                self._supplied = None
        self._notify_replay_state_change()
        return written

    def _notify_replay_state_change(self) -> None:
        """Wake the threads that wait until they can sample; TorchRL calls this after each change.

        They take the buffer's locks while they hold the lock of their condition. A thread that
        holds the buffer's locks may therefore not ask for that one: it calls this again afterwards.
        """
        if privates.NOTIFIES and not privates.is_held(self._replay_lock):
            super()._notify_replay_state_change()

    def mark_update(self, index: Any) -> None:
        """Give newly written slots the priority of new elements."""
        if not self._sync:
            return  # the process that samples finds them by the count of writes
        sampler, storage, priority = self._sampler, self._storage, self._supplied
        if priority is None:
            sampler.mark_update(index, storage=storage)
            return
        sampler._follow(storage)
        index = sampler._flat(index, storage)
        sampler._write_new(index, priority.to(index.device))

    # --- reading ----------------------------------------------------------------------------------

    def sample(
        self,
        batch_size: int | None = None,
        return_info: bool = False,
        include_info: bool | None = None,
        *,
        by: str = "priority",
        newest: int | None = None,
        **waiting: Any,
    ) -> Any:
        """Draw elements in proportion to priority^alpha.

        Args:
            batch_size: number of elements B; None is that of the constructor.
            return_info: return a tuple of the batch and a dict of the added entries.
            include_info: deprecated, as in TorchRL.
            by, newest: as in `per_td.PrioritizedReplayBuffer.sample`. Such a batch is drawn now,
                not ahead. The defaults leave the draws to the settings of the sampler.
            waiting: further arguments of TorchRL's `sample`, handed on: `wait`, `timeout` and
                `cancel_event` from TorchRL 0.15 on. Not together with `by` or `newest`.

        Returns:
            TensorDict [B]: the elements, and the entries "index" and "index_generation", int64, and
            "priority_weight", float32; with `track_draws` also "draw_count", int32.

        Raises:
            ConfigurationError: `batch_size` is not an integer of at least 1, or `waiting` comes
                together with `by` or `newest` (a ValueError).
            EmptyBufferError: nothing is stored, or nothing can be drawn (a RuntimeError).
            TypeError: this TorchRL's `sample` does not take an argument in `waiting`.
        """
        size = self._batch_size if batch_size is None else batch_size
        if size is not None:
            size = validation.positive_int("batch_size", size)
            batch_size = None if batch_size is None else size
        agreed = self._batch_size in (None, size) or self._warned_batch_size_conflict
        usual = agreed and include_info is None and not self._service_shutdown and not waiting
        if by != "priority" or newest is not None:
            if waiting:
                raise ConfigurationError(
                    f"{', '.join(waiting)}: expected none of these together with by or newest, got"
                    f" by={by!r}, newest={newest}; wait before, with wait_until_sampleable"
                )
            size = validation.positive_int("batch_size", size)
            with self._replay_lock, self.prioritized_sampler._selecting(by, newest):
                drawn = self._sample(size)
        elif size is not None and usual and self._sample_dependency is None:
            drawn = self._next(size) if self._prefetch else self._sample(size)
        else:
            drawn = TensorDictReplayBuffer.sample(self, batch_size, True, include_info, **waiting)
            if include_info is False:
                privates.without(*drawn)
            return drawn if return_info else drawn[0]
        if self._counts_draws:
            privates.count_draw(self, drawn[1]["index"])
        return drawn if return_info else drawn[0]

    def _next(self, batch_size: int) -> tuple[Any, dict[str, Any]]:
        """The oldest batch drawn ahead; replace it by another, as TorchRL does."""
        with self._futures_lock:
            ahead = self._prefetch_queue
            drawn: tuple[Any, dict[str, Any]]
            drawn = ahead.popleft().result() if ahead else self._sample(batch_size)
            while len(ahead) < self._prefetch_cap:
                ahead.append(self._prefetch_executor.submit(self._sample, batch_size))
        return drawn

    def _sample(self, batch_size: int) -> tuple[Any, dict[str, Any]]:
        """Draw a batch, transform it, and put the entries beside it into it.

        TorchRL calls this too, from its threads of `prefetch`.
        """
        sampler, apart = self.prioritized_sampler, privates.is_changed(self)
        with self._replay_lock, self._write_lock:
            columns = self._cache.of(self, marks=True)
            if columns is None:
                sampler._follow(self._storage)
            self._catch_up()
            if columns is not None:
                drawn = privates.read(self, columns, batch_size, apart=apart)
        if columns is None:
            return privates.completed(*TensorDictReplayBuffer._sample(self, batch_size))
        return privates.completed(*privates.changed(self, *drawn)) if apart else drawn

    def _restore_prefetch_queue_locked(self, *args: Any, **kwargs: Any) -> None:
        super()._restore_prefetch_queue_locked(*args, **kwargs)
        for future in self._prefetch_queue:
            privates.completed(*future.result())  # those of TorchRL's buffer are not

    def _catch_up(self) -> None:
        """With sync=False, give elements written since the last call the priority of new ones."""
        if self._sync or not isinstance(self._sampler, PrioritizedSampler):
            return
        writer, capacity = self._writer, self._storage.max_size
        written = int(writer._write_count)
        emptied, before = _emptied(writer)
        if emptied != self._seen_emptied or written < self._seen_writes:  # by another process
            self._sampler._empty()
            self._seen_emptied, self._seen_writes = emptied, min(before, written)
        new = min(written - self._seen_writes, capacity)
        if new:
            end = writer._cursor
            index = torch.arange(end - new, end, device="cpu").remainder_(capacity)
            self._sampler.mark_update(index, storage=self._storage)
        self._seen_writes = written

    def _note_writes(self) -> None:
        """Take all writes for known to the priorities, with sync=False."""
        written = getattr(self._writer, "_write_count", 0)  # one that never writes has none
        self._seen_emptied, self._seen_writes = _emptied(self._writer)[0], int(written)

    # --- priorities -------------------------------------------------------------------------------

    def update_priority(
        self, index: Any, priority: Any, *, mode: str = "set", rate: float = 1.0
    ) -> None:
        """Set priorities. If an index repeats, its last update holds; negative ones are skipped.

        An update of an empty slot is stale, since its element has been emptied. It is dropped and
        counted in `stats`.

        Args:
            index: int, int64 [B]; for a storage of several dimensions [B, ndim], or a tuple of ndim
                tensors [B].
            priority: TD errors as losses write them, [B], or one number for all.
            mode, rate: as in `per_td.PrioritizedReplayBuffer.update_priority`.

        Raises:
            IndexRangeError: an index is not below the storage's size. Nothing is written.
            PriorityError: a value is NaN or infinite, or there is neither one value nor one per
                index. Nothing is written.
        """
        priority = validation.as_tensor("priority", priority, PriorityError)
        if self.dim_extend > 0 and priority.ndim > 1:
            priority = self._transpose(priority).flatten()
        self._change(PrioritizedSampler.update_priority, index, priority, **as_mode(mode, rate))

    def set_priority(self, index: Any, priority: Any, generation: Any = None) -> None:
        """Set raw priorities as they are: without eps, unit or clipping; 0 is never drawn.

        Args:
            index: see `update_priority`.
            priority: finite and not negative, [B], or one number for all.
            generation: "index_generation" of the batch, [B]. Updates of elements that have been
                overwritten are stale: they are dropped and counted. None: no update is dropped.

        Raises:
            IndexRangeError: as `update_priority`; or there is not one generation for each index.
            PriorityError: as `update_priority`; a negative priority is refused like NaN.
        """
        with self._replay_lock, self._write_lock:
            if generation is not None:
                now = self._writer.generations_of(index).reshape(-1)
                generation = _one_each(generation, now)
                generation = _late(generation, now)
            self._change(PrioritizedSampler.set_priority, index, priority, generation=generation)

    def _change(
        self, change: Callable[..., None], index: Any, priority: Any, **settings: Any
    ) -> None:
        sampler = self.prioritized_sampler
        with self._replay_lock, self._write_lock:
            self._catch_up()
            change(sampler, index, priority, storage=self._storage, **settings)

    def update_tensordict_priority(
        self, data: TensorDictBase, *, mode: str = "set", rate: float = 1.0
    ) -> None:
        """Set the priorities of a batch from the TD errors that a loss left in it.

        An update is stale if its slot was overwritten or emptied after the draw. It is dropped and
        counted in `stats`. With a `PrioritizedSliceSampler` whose `reduction` is "r2d2", the first
        record of each slice gets the priority of the slice (see its `slice_priorities`).

        Args:
            data: batch of `sample`, TensorDict [B], with the priority entry. If you have reshaped
                it, flatten it again: as in TorchRL, a row [B, T] counts as one element of a storage
                of one dimension, the first of the row.
            mode, rate: as in `per_td.PrioritizedReplayBuffer.update_priority`.

        Raises:
            IndexRangeError: there is no such slot (an IndexError). Nothing is written.
            PriorityError: the priority entry or "index" is missing, has NaN or infinite values, or
                too few (a ValueError). Nothing is written.
        """
        sampler, storage, key = self.prioritized_sampler, self._storage, self.priority_key
        if sampler.reduction == "r2d2" and isinstance(sampler, PrioritizedSliceSampler):
            data = sampler.first_records(data, key)
        td_error, index = required(data, key), required(data, "index")
        generation = data.get("index_generation", None)
        plain, rows = storage.ndim == 1, data.batch_size[0] if data.ndim else 1
        if not plain and index.shape[-1:] == (storage.ndim,):
            index = index.reshape(-1, storage.ndim)
            rows = len(index)
        elif index.ndim != 1 or not data.ndim:
            index = first_of_each(index, data.ndim)
        with self._replay_lock, self._write_lock:
            self._catch_up()
            stamps, device = None, sampler.device
            if generation is not None:
                stamps = privates.generations(self, sampler.max_size, device)
            if stamps is None:
                sampler._follow(storage)
            squared = sampler.td_error_unit == "squared"
            shape = None if td_error.is_nested else td_error.shape
            if shape == (rows, 1):
                td_error = td_error.squeeze(-1)
            if self._sample_unit is not None or shape not in ((rows,), (rows, 1)):
                td_error, squared = self._magnitudes(td_error, rows), False
            slot = validation.as_index(index, device) if plain else sampler._flat(index, storage)
            if generation is not None:
                if not plain and generation.numel() == rows:  # a record in each place
                    generation = generation.reshape(-1)
                elif generation.ndim != 1:
                    generation = first_of_each(generation, data.ndim)
                generation = _one_each(generation, slot)
                if stamps is None or self._sample_unit is not None:  # then 0 marks live updates
                    now = validation.to_device(self._writer.generations_of(index), device)
                    generation, stamps = _late(generation, now), None
            if self._sample_unit is not None:
                slot, td_error, generation = self._anchored(data, slot, td_error, generation)
            sampler._update(
                slot,
                td_error,
                privates.stored(storage),
                generation=generation,
                stamps=stamps,
                squared=squared,
                **as_mode(mode, rate),
            )

    def _anchored(
        self, data: TensorDictBase, slot: Tensor, td_error: Tensor, late: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Replace the records [B] of windows, which a sample unit draws, by their anchors.

        `late` is 0 for live updates, int64 [B]; None: all are.
        """
        anchored = self._anchor_reduced_priority(data, td_error)
        if anchored is None:
            return slot, td_error, late
        sampler, storage = self.prioritized_sampler, self._storage
        anchors, anchor = (sampler._flat(i, storage) for i in (anchored[0], data["anchor_index"]))
        if late is None or anchor.shape != slot.shape:
            return anchors, anchored[1], None
        live = torch.isin(anchors, anchor[(anchor == slot) & (late == 0)])
        return anchors, anchored[1], (~live).long()

    # --- state ------------------------------------------------------------------------------------

    def empty(self, empty_write_count: bool = True) -> None:
        """Forget all elements, and drop the batches drawn ahead.

        Args:
            empty_write_count: start `write_count` again from 0.
        """
        with self._futures_lock:
            self._clear_prefetch_queue_locked()
            with self._replay_lock, self._write_lock:
                # as `ReplayBuffer.empty`, which takes the locks itself in some versions
                self._writer._empty(empty_write_count=empty_write_count)
                self._sampler._empty()
                self._storage._empty()
                self._note_writes()
        self._notify_replay_state_change()

    def stats(self) -> dict[str, int | float | bool]:
        """Return TorchRL's counters, "stale_updates" and "refused_priorities"."""
        stats: dict[str, int | float | bool] = super().stats()
        stats["stale_updates"] = 0
        if isinstance(self._sampler, PrioritizedSampler):
            stats |= self._sampler.stats()
        return stats

    def diagnostics(self) -> dict[str, Tensor]:
        """Measure prioritization for a logger; see `per_td.PrioritizedReplayBuffer.diagnostics`.

        Returns:
            Result of `PrioritizedSampler.diagnostics` for the stored elements.
        """
        sampler = self.prioritized_sampler
        with self._replay_lock, self._write_lock:
            self._catch_up()
            return sampler.diagnostics(self._storage)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of storage, sampler, writer, transforms and batches drawn ahead.

        It holds tensors and plain values, which `torch.load(weights_only=True)` can read.
        """
        with self._at_rest():
            state = dict(super().state_dict())
        state["_prefetch_state"] = _as_plain(state["_prefetch_state"])
        return state

    @torch.inference_mode(False)
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state.

        Args:
            state_dict: result of `state_dict` of such a buffer.

        Raises:
            CheckpointError: a part is missing, is of another kind or capacity, or has wrong
                values. Nothing is changed.
        """
        for part in ("_storage", "_sampler", "_writer", "_transforms", "_batch_size"):
            if not isinstance(state_dict, dict) or part not in state_dict:
                raise CheckpointError(f"expected the state of a buffer, got one without {part!r}")
        self.prioritized_sampler.check_state(state_dict["_sampler"])
        privates.check_storage_state(self._storage, state_dict["_storage"])
        if isinstance(self._writer, GenerationWriter):
            self._writer.check_state(state_dict["_writer"])
        if (size := state_dict["_batch_size"]) is not None:
            try:
                validation.positive_int("_batch_size", size)
            except ConfigurationError as error:
                raise CheckpointError(str(error)) from error
        ahead = _from_plain(state_dict.get("_prefetch_state"))
        self._take_up_transforms(state_dict["_transforms"], state_dict.get("_rng"), [ahead])
        with self._at_rest():
            super().load_state_dict(state_dict | {"_prefetch_state": ahead})
            fit_cursor(self._writer, self._storage)
            self._note_writes()
        self._notify_replay_state_change()

    def _take_up_transforms(
        self, transforms: Any, rng: Any = None, ahead: Sequence[Any] = ()
    ) -> None:
        """Load the state of the transforms, which TorchRL does after storage and priorities.

        It is refused here, before anything else changes, and so are a generator's state and those
        of batches `ahead`.
        """
        before = deepcopy(self._transform.state_dict())
        try:
            self._transform.load_state_dict(transforms)
            if rng is not None:
                state, device = rng
                torch.Generator(device).set_state(state)
            for batches in ahead:
                self._validate_prefetch_state(batches)
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            self._transform.load_state_dict(before)
            raise CheckpointError(
                f"expected the state of a buffer with these transforms and this prefetch: {error}"
            ) from error

    def dumps(self, path: str | Path) -> None:
        """Write storage, sampler, writer and transforms into the folder `path`."""
        with self._at_rest():
            super().dumps(path)

    @torch.inference_mode(False)
    def loads(self, path: str | Path) -> None:
        """Take over the state that `dumps` wrote into the folder `path`.

        Args:
            path: the folder.

        Raises:
            CheckpointError: as `load_state_dict`.
        """
        sampler = self.prioritized_sampler
        sampler.check_state(sampler.saved(Path(path) / "sampler"))
        if isinstance(self._writer, GenerationWriter):
            self._writer.check_state(self._writer.saved(Path(path) / "writer"))
        privates.check_saved_storage(self._storage, Path(path) / "storage")
        if not (Path(path) / "buffer_metadata.json").is_file():
            raise CheckpointError(f"{path}: expected a folder with buffer_metadata.json, got none")
        if (saved := Path(path) / "transform.t").exists():
            self._take_up_transforms(torch.load(saved))
        with self._at_rest():
            super().loads(path)
            fit_cursor(self._writer, self._storage)
            self._note_writes()
        self._notify_replay_state_change()

    @contextmanager
    def _at_rest(self) -> Iterator[None]:
        """Hold all locks, with priorities that know of every write."""
        with self._futures_lock:
            self.synchronize()  # threads that draw ahead need the locks below
            with self._replay_lock, self._write_lock:
                self._catch_up()
                yield

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = ReplayBuffer.__getstate__(self)
        state["_cache"] = privates.ColumnCache()
        if not self._sync and get_spawning_popen() is not None:
            state["_sampler"] = RandomSampler()  # the priorities stay with the process that samples
        return state


_OF_SAMPLER = frozenset(signature(PrioritizedSampler.__init__).parameters) & frozenset(
    signature(TensorDictPrioritizedReplayBuffer.__init__).parameters
)
"""Settings without effect on the buffer."""


def _one_each(generation: Any, slot: Tensor) -> Tensor:
    """Check and return generations, int64 [B], one for each of `slot` [B], on its device."""
    each: Tensor = validation.as_index(generation, slot.device, "index_generation")
    if each.shape != slot.shape:
        raise IndexRangeError(
            f"index_generation: expected one for each of {len(slot)} indices, got {len(each)}"
        )
    return each


def _late(generation: Tensor, now: Tensor) -> Tensor:
    """0 for live updates, int64 [B]; a writer that knows no generations says -1 for `now`."""
    return ((generation != now) & (now >= 0)).long()


def _require_one_dimension(storage: Storage, *, sync: bool) -> None:
    """Refuse a storage of several dimensions with sync=False."""
    if not sync and storage.ndim != 1:
        raise ConfigurationError(
            f"sync: expected True for a storage of {storage.ndim} dimensions, got False"
        )


def _emptied(writer: Writer) -> tuple[int, int]:
    """Number of emptyings, and the write count at the last; zeros if the writer cannot tell."""
    return writer.emptied if isinstance(writer, GenerationWriter) else (0, 0)


def _checked(sampler: Any) -> PrioritizedSampler:
    """The sampler, if it is one of per_td's; a ConfigurationError otherwise."""
    if not isinstance(sampler, PrioritizedSampler):
        raise ConfigurationError(
            f"sampler: expected a per_td.torchrl.PrioritizedSampler, got {sampler!r}; for others"
            " there is TorchRL's TensorDictReplayBuffer"
        )
    return sampler


def _as_plain(value: Any) -> Any:
    """Replace TensorDicts in nested containers by dictionaries; tensors are not copied.

    `torch.load(weights_only=True)` reads dictionaries of tensors, but no TensorDicts.
    """
    if isinstance(value, Tensor):
        return value.as_subclass(Tensor)
    if type(value) is TensorDict:
        entries = {name: _as_plain(value.get(name)) for name in value.keys()}  # noqa: SIM118  of a TensorDict
        return {_ENTRIES: entries, "batch_size": list(value.batch_size), "device": value.device}
    if type(value) is LazyStackedTensorDict:
        return {_STACKED: list(map(_as_plain, value.tensordicts)), "dim": value.stack_dim}
    return _mapped(_as_plain, value)


def _from_plain(value: Any) -> Any:
    """Undo `_as_plain`."""
    if type(value) is dict and _ENTRIES in value:
        entries = _mapped(_from_plain, value[_ENTRIES])
        return TensorDict(entries, value["batch_size"], device=value["device"])
    if type(value) is dict and _STACKED in value:
        return lazy_stack(_from_plain(value[_STACKED]), value["dim"])
    return _mapped(_from_plain, value)


def _mapped(change: Callable[[Any], Any], value: Any) -> Any:
    """`change` applied to each entry of a dict, list or tuple; another value as it is."""
    if type(value) is dict:
        return {key: change(entry) for key, entry in value.items()}
    return type(value)(map(change, value)) if type(value) in (list, tuple) else value

"""PrioritizedSliceSampler: TorchRL's, on per_td's priorities."""

from collections.abc import Sequence
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor
from torchrl.data import replay_buffers as torchrl_buffers
from torchrl.data.replay_buffers.samplers import SliceSampler
from torchrl.data.replay_buffers.storages import Storage

from per_td import validation
from per_td.errors import ConfigurationError, EmptyBufferError
from per_td.priorities.selection import Selection
from per_td.torchrl import privates, slice_records
from per_td.torchrl.sampler import PrioritizedSampler, unravelled
from per_td.torchrl.td_errors import as_key
from per_td.torchrl.writer import last_rows
from per_td.weights import importance_weights

_KEYS = ("end_key", "traj_key", "truncated_key", "init_key")


class PrioritizedSliceSampler(PrioritizedSampler, torchrl_buffers.PrioritizedSliceSampler):
    """Drop-in for `torchrl.data.replay_buffers.PrioritizedSliceSampler`, without compiled code.

    It draws slices of consecutive records. A slice crosses neither the end of a trajectory nor the
    place where the ring is being overwritten. The first record is drawn in proportion to
    priority^alpha, among the records that can begin a slice. Draws change no priorities.

    You can set these at any time, beside those of `PrioritizedSampler`: `num_slices` or
    `slice_len`, whichever you gave, `cache_values`, `truncated_key`, `init_key`, `strict_length`
    and `span`. `uniform_mix`, `latest`, `by` and `newest` are refused.

    Args:
        max_capacity, alpha, beta, eps, dtype, max_priority_within_buffer, method, td_error_unit:
            see `PrioritizedSampler`.
        reduction: makes one priority of a slice, in `slice_priorities`: "max", "min", "mean",
            "median", "sum", or "r2d2" (0.9 max + 0.1 mean).
        num_slices: number of slices in a batch. Give either this or `slice_len`.
        slice_len: number of records in a slice.
        end_key: entry with flags that end a trajectory. Without `end_key`, `end_keys` and
            `traj_key`, a trajectory ends at ("next", "done"), ("next", "truncated") and ("next",
            "terminated"), and where ("collector", "traj_ids") or "episode" changes.
        end_keys: several entries with flags; any of them ends a trajectory.
        traj_key: entry with trajectory ids. A trajectory ends where the id changes; flags then do
            not count.
        ends: flags [T] in place of those in the storage; needs `cache_values`.
        trajectories: ids [T] in place of those in the storage; needs `cache_values`.
        cache_values: look for the ends again only after a write to the storage.
        truncated_key: entry that marks the last record of each slice, with "done" beside it.
        init_key: entry that marks the first record of each slice, if the data has it.
        strict_length: leave out trajectories shorter than a slice. False draws them whole, from
            their beginning, so that batches may be smaller.
        compile: without effect; for compatibility.
        span: number of records that a slice may lack on the right because its trajectory ends; True
            is all but the first. A slice never lacks records on the left. If you pass a tuple or
            list of two, the second counts.
        draw: "independent", "stratified" or "without_replacement" (different first records).
        weight_normalization: "buffer" as TorchRL, by the smallest priority in the buffer, even if
            no slice can begin there. "batch": by that of the drawn slices. "none": (M P)^-beta over
            the M records that can begin a slice.

    Raises:
        ConfigurationError: an argument is not accepted (a ValueError).
        TypeError: not exactly one of `num_slices` and `slice_len` is given.
        RuntimeError: two arguments exclude each other, or `cache_values` is missing.

    Example:
        >>> from tensordict import TensorDict
        >>> from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
        >>> sampler = PrioritizedSliceSampler(9, alpha=0.7, beta=0.5, slice_len=3, reduction="r2d2")
        >>> buffer = TensorDictReplayBuffer(
        ...     storage=LazyTensorStorage(9), sampler=sampler, batch_size=6
        ... )
        >>> done = torch.tensor([0, 0, 0, 1, 0, 0, 0, 0, 1], dtype=torch.bool).unsqueeze(-1)
        >>> _ = buffer.extend(TensorDict({"x": torch.arange(9), "next": {"done": done}}, [9]))
        >>> batch = buffer.sample()  # two slices of three, one after the other
        >>> batch["td_error"] = torch.rand(6)
        >>> buffer.update_priority(*sampler.slice_priorities(batch))
    """

    def __init__(
        self,
        max_capacity: int,
        alpha: float,
        beta: float,
        eps: float = 1e-8,
        dtype: torch.dtype = torch.float,
        reduction: str = "max",
        *,
        num_slices: int | None = None,
        slice_len: int | None = None,
        end_key: NestedKey | None = None,
        end_keys: Sequence[NestedKey] | None = None,
        traj_key: NestedKey | None = None,
        ends: Tensor | None = None,
        trajectories: Tensor | None = None,
        cache_values: bool = False,
        truncated_key: NestedKey | None = ("next", "truncated"),
        init_key: NestedKey | None = "is_init",
        strict_length: bool = True,
        compile: bool | dict[str, Any] = False,  # noqa: A002  TorchRL's name
        span: bool | int | Sequence[bool | int] = False,
        max_priority_within_buffer: bool = False,
        draw: str = "independent",
        method: str = "auto",
        weight_normalization: str = "buffer",
        td_error_unit: str = "abs",
    ) -> None:
        if end_keys is not None:
            end_keys = tuple(as_key("end_keys", key) for key in end_keys)
        SliceSampler.__init__(
            self,
            num_slices=num_slices,
            slice_len=slice_len,
            end_key=end_key,
            end_keys=end_keys,
            traj_key=traj_key,
            ends=ends,
            trajectories=trajectories,
            cache_values=cache_values,
            truncated_key=truncated_key,
            init_key=init_key,
            strict_length=strict_length,
            span=span,
        )
        self.compile = bool(compile)
        PrioritizedSampler.__init__(
            self,
            max_capacity,
            alpha,
            beta,
            eps,
            dtype,
            reduction,
            max_priority_within_buffer,
            draw=draw,
            method=method,
            weight_normalization=weight_normalization,
            td_error_unit=td_error_unit,
        )
        self._given_end_keys = self.end_keys if end_key is None else (self.end_key,)
        self._given_ends = ends if trajectories is None else slice_records.ends_of(trajectories)
        self._forget()

    _FIXED = (
        *PrioritizedSampler._FIXED,
        "end_key",
        "end_keys",
        "traj_key",
        "ends",
        "trajectories",
        "compile",
    )

    _marks_replayed = False  # which records a slice has depends on where trajectories end

    def _select(self, **changes: Any) -> None:
        for name, value in changes.items():
            if value != Selection._field_defaults[name]:
                raise _by_first_records(name, value)
        super()._select(**changes)

    def _require_mix(self, value: Any) -> None:
        if value:
            raise _by_first_records("uniform_mix", value)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("by", "newest", "latest", "uniform_mix"):
            raise _by_first_records(name, value)
        if name == "span":
            value = slice_records.right_span(value)
        elif name in _KEYS and value is not None:
            value = as_key(name, value)
        elif name in ("num_slices", "slice_len"):
            if name in self.__dict__ and self.__dict__[name] is None:
                other = "slice_len" if name == "num_slices" else "num_slices"
                raise ConfigurationError(
                    f"{name}: expected {other} to be set, which was given to the constructor,"
                    f" got {name}={value!r}"
                )
            if value is not None or name in self.__dict__:
                value = validation.positive_int(name, value)
        super().__setattr__(name, value)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(num_slices={self.num_slices}, slice_len={self.slice_len},"
            f" end_key={self.end_key}, end_keys={self.end_keys}, traj_key={self.traj_key},"
            f" truncated_key={self.truncated_key}, strict_length={self.strict_length},"
            f" span={self.span}, alpha={self.alpha}, beta={self.beta}, eps={self.eps},"
            f" reduction={self.reduction})"
        )

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_starts": (None, None)}

    def _empty(self) -> None:
        super()._empty()
        self._forget()

    def _forget(self) -> None:
        self._cache.clear()  # TorchRL's, which nothing here reads
        self._starts: tuple[Any, slice_records.Starts | None] = (None, None)

    def _starts_in(self, storage: Storage, length: int) -> slice_records.Starts:
        """The records that may begin a slice of this length, kept if `cache_values` is True."""
        revision = privates.revision(storage)
        key = (id(storage), revision, len(storage), length, self.span, self.strict_length)
        known, starts = self._starts
        if self.cache_values and starts is not None and known == key:
            return starts
        shape, keys = storage.shape, self._given_end_keys
        if self._given_ends is None:
            end = slice_records.end_flags(storage[:], shape, traj_key=self.traj_key, end_keys=keys)
        else:
            end = slice_records.given_flags(self._given_ends, shape)
        starts = slice_records.find_starts(
            end,
            full=len(storage) == storage.max_size,
            cursor=last_rows(storage),
            length=length,
            missing=self.span[1],
            strict=self.strict_length,
        )
        if self.cache_values:
            self._starts = (key, starts)
        return starts

    def _sampleable_count(self, storage: Storage, batch_size: int) -> int:
        if len(storage) == 0:
            return 0
        length, _ = self._adjusted_batch_size(batch_size)
        try:
            return len(self._starts_in(storage, length).slot)
        except (KeyError, RuntimeError):
            return 0

    def sample(self, storage: Storage, batch_size: int) -> tuple[Any, dict[Any, Any]]:
        """Draw slices in proportion to priority^alpha of their first records.

        Args:
            storage: the storage that the indices are for; it holds tensordicts.
            batch_size: number of records in all slices together.

        Returns:
            Indices of R records, slice after slice: a tuple of int64 [R], one for each dimension of
            the storage. R is `batch_size`, or less if slices may be shorter. And a dict:
            "priority_weight", float32 [R], equal within a slice; the flags at `truncated_key`,
            "done" and "terminated" beside it, and at `init_key`; "slice_start", int64 [R, ndim],
            the slot of the slice's first record; and "slice_start_generation", int64 [R], its
            generation, if the storage has generations.

        Raises:
            ConfigurationError: `batch_size` is not an integer of at least 1.
            EmptyBufferError: the storage is empty, or no record can begin a slice.
            RuntimeError: `batch_size` cannot be divided into slices, or the ends of trajectories
                cannot be found.
        """
        batch_size = validation.positive_int("batch_size", batch_size)
        self._follow(storage)
        if len(storage) == 0:
            raise EmptyBufferError("Cannot sample from an empty storage.")
        length, n = self._adjusted_batch_size(batch_size)
        starts = self._starts_in(storage, length)
        if len(starts.slot) == 0:
            raise EmptyBufferError(
                f"expected a trajectory of at least {length} records, got at most"
                f" {slice_records.longest(starts.end)}"
            )
        slot = starts.slot.to(self.device)
        table, mass = self._table, self._table.mass[slot]
        chosen = slice_records.choose(mass, n, table.draw, table.method, self._rng)
        weight = self._weights(mass, chosen, len(storage))

        position = torch.arange(length, device=self.device)
        index = slice_records.advance(slot[chosen].unsqueeze(-1), position, storage.shape)
        start = index[:, :1].expand_as(index)
        begins = (position == 0).expand_as(index)
        ends = (position == length - 1).expand_as(index)
        weight = weight.unsqueeze(-1).expand_as(index)
        if self.span[1] or not self.strict_length:
            over = starts.end.to(self.device).flatten()[index]
            there = over.cumsum(-1) - over.long() == 0  # up to the first end
            ends = (ends | over)[there]
            index, begins, weight = index[there], begins[there], weight[there]
            start = start[there]
        where = unravelled(index.reshape(-1), storage.shape)
        keys = self.truncated_key, self.init_key
        marks = slice_records.marks(storage[:], where, begins, ends, *keys)
        start = torch.stack(unravelled(start.reshape(-1), storage.shape), -1)
        info = {"priority_weight": weight.reshape(-1), slice_records.START: start} | marks
        generation = privates.generations_at(storage, start[:, 0])
        if generation is not None:
            info[slice_records.START_GENERATION] = generation
        return where, info

    def _weights(self, mass: Tensor, chosen: Tensor, size: int) -> Tensor:
        """Weights [n] of the `chosen` [n] among the records that can begin a slice, `mass` [S]."""
        table = self._table
        if table.weight_normalization != "none":
            weight: Tensor = table.trees.ops.weigh(
                table.trees,
                mass[chosen],
                beta=self.beta,
                normalization=table.weight_normalization,
                written=size,
            )
            return weight
        return importance_weights(
            mass[chosen],
            self.beta,
            total=mass.sum(dtype=torch.float64),
            size=len(mass),
            smallest=None,
            normalization="none",
        )

    def slice_priorities(
        self, batch: TensorDictBase, priority_key: NestedKey = "td_error"
    ) -> tuple[Tensor, Tensor]:
        """Return one priority for each slice of a batch, and the slot that gets it.

        `buffer.update_priority(*sampler.slice_priorities(batch))` is the update of R2D2, where a
        sequence has one priority (Kapturowski et al. 2019).

        Args:
            batch: see `first_records`.
            priority_key: see `first_records`.

        Returns:
            Slots of the first records, int64 [K, ndim], and priorities [K], of K slices.

        Raises:
            PriorityError: as `first_records`.
        """
        first = self.first_records(batch, priority_key)
        return first["index"], first[priority_key]

    def first_records(
        self, batch: TensorDictBase, priority_key: NestedKey = "td_error"
    ) -> TensorDict:
        """Return the first record of each slice of a batch, with the priority of the slice.

        Args:
            batch: sampled batch [R], or reshaped to [slices, length], with TD errors. You may have
                cut off records, as burn-in does. The priority of a slice then follows from the
                remaining records, and goes to the slot of the first record that was drawn.
            priority_key: entry of the TD errors, in the `td_error_unit`, [R] or [R, k].

        Returns:
            TensorDict [K] of K slices: "index"; at `priority_key` the `reduction` of |TD error|
            over the slice, in the same unit; and "index_generation", if the batch has the
            generations of first records.

        Raises:
            PriorityError: there are no TD errors, or "slice_start" is missing; or the batch has
                several dimensions, and a row holds records of several slices.
        """
        return slice_records.first_records(
            batch, priority_key, reduction=self.reduction, unit=self.td_error_unit
        )


def _by_first_records(name: str, value: Any) -> ConfigurationError:
    return ConfigurationError(
        f"{name}: expected slices to be drawn by the priorities of their first records,"
        f" got {value!r}"
    )

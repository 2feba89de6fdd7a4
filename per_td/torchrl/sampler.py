"""PrioritizedSampler: TorchRL's, on per_td's priorities."""

import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchrl.data import replay_buffers as torchrl_buffers
from torchrl.data.replay_buffers.samplers import Sampler
from torchrl.data.replay_buffers.storages import Storage

from per_td import diagnostics, validation
from per_td.checkpoint import file as checkpoint
from per_td.errors import (
    CheckpointError,
    ConfigurationError,
    EmptyBufferError,
    IndexRangeError,
    PriorityError,
)
from per_td.priorities.sampling import sample_weighted
from per_td.priorities.selection import Selection
from per_td.priorities.table import PriorityTable, as_clip, as_mode, plain_clip
from per_td.torchrl.td_errors import REDUCTIONS, TD_ERROR_UNITS
from per_td.torchrl.writer import last_row, slots_of

_FORMAT = "per_td.torchrl.PrioritizedSampler"
_SLOTS = "the slots of the storage"
_USUAL = Selection()
_NEVER = -2
"""A generation that no slot has: a slot that was never written has -1."""


def _stacked(index: Any, ndim: int) -> Any:
    """Indices in each dimension, a tuple, as one tensor [B, ndim]; others as they are.

    In a storage of one dimension, a tuple of numbers holds so many slots.
    """
    if not isinstance(index, tuple) or not index:
        return index
    parts = [validation.as_tensor("index", part, IndexRangeError) for part in index]
    if ndim < 2 and all(part.ndim == 0 for part in parts):
        return torch.stack(parts)
    if len(parts) != max(ndim, 1) or any(part.shape != parts[0].shape for part in parts):
        raise IndexRangeError(
            f"index: expected a tuple of {max(ndim, 1)} tensors of one shape, one for each"
            f" dimension of the storage, got shapes {[list(part.shape) for part in parts]}"
        )
    return torch.stack([part.reshape(-1) for part in parts], -1)


def flat_index(index: Any, shape: torch.Size | tuple[int, ...], device: torch.device) -> Tensor:
    """Slots of a storage, counted row by row where it has several dimensions, int64 [B].

    `index` is an int, [B], or for several dimensions [B, ndim] or a tuple of ndim ints or [B]. The
    first entry of the storage's `shape` does not matter.
    """
    index = validation.as_tensor("index", _stacked(index, len(shape)), IndexRangeError)
    places: Tensor = validation.as_index(index.reshape(-1), device).view(index.shape)
    if places.ndim > 1 and len(shape) > 1 and places.shape[-1] == len(shape):
        outside, flat = (places < 0).any(-1), torch.zeros_like(places[..., 0])
        for size, place in zip(shape, places.unbind(-1), strict=True):
            flat = flat * size + place
        places = flat.masked_fill_(outside, -1)
    return places.reshape(-1)


def unravelled(index: Tensor, shape: torch.Size | tuple[int, ...]) -> tuple[Tensor, ...]:
    """Indices [B] in each dimension of a storage of this shape: undoes `flat_index`, not for -1.

    `torch.unravel_index` makes the host wait on CUDA.
    """
    places = []
    for size in reversed(shape):
        places.append(index % size)
        index = index // size
    return tuple(reversed(places))


def _of_selection(name: str, doc: str) -> Any:
    """A part of how a sampler draws."""
    return property(
        lambda self: getattr(self._selection, name),
        lambda self, value: self._select(**{name: value}),
        doc=doc,
    )


def _of_table(name: str, doc: str) -> Any:
    """A setting that a sampler keeps in its table, which checks it."""
    return property(
        lambda self: getattr(self._table, name),
        lambda self, value: setattr(self._table, name, value),
        doc=doc,
    )


class PrioritizedSampler(torchrl_buffers.PrioritizedSampler):
    """Drop-in for `torchrl.data.replay_buffers.PrioritizedSampler`, without a compiled extension.

    It has the same arguments and behaviour, and TorchRL recognises it as its own class. The
    differences: sums are float64 with any `dtype`. Raw priorities are kept, so that alpha can
    change from 0. torch's generators seed the draws. NaN and infinite priorities are refused. You
    can send it to other processes; spawned ones share its memory.

    You can set `alpha`, `beta`, `eps`, `reduction`, `td_error_unit`, `weight_normalization`,
    `priority_clip`, `uniform_mix`, `latest`, `by` and `newest` at any time. Setting another
    argument of the constructor raises `ConfigurationError`.

    Args:
        max_capacity: number of slots of the storage, counted over all its dimensions. With a
            storage of another size, the sampler takes that size at the first use.
        alpha: exponent of the priorities, at least 0.
        beta: exponent of the weights.
        eps: added to every priority.
        dtype: torch.float or torch.double, without effect; for compatibility.
        reduction: makes one priority of several values per element, in `TensorDictReplayBuffer`:
            "max", "min", "median" or "mean". per_td's own buffer also takes "sum" and "r2d2".
        max_priority_within_buffer: True gives new elements the largest priority in the buffer,
            False the largest that it ever held.
        device: device of the priorities; None follows the storage.
        draw: "independent", "stratified" or "without_replacement".
        method: "auto", "tree" or "multinomial".
        weight_normalization: "buffer" as TorchRL, "batch" or "none".
        td_error_unit: unit of the priorities that you hand in: "abs" for |delta|, "squared" for
            delta^2, of which the sampler takes the root. See docs/torchrl_losses.md.
        priority_clip, uniform_mix, latest, track_draws: as in `per_td.PrioritizedReplayBuffer`.
        by, newest: as in `per_td.PrioritizedReplayBuffer.sample`, for all draws. per_td's own
            buffer also takes them in `sample`.

    Raises:
        ConfigurationError: an argument is not accepted (a ValueError).
        NotImplementedError: `dtype` is neither torch.float nor torch.double.

    Example:
        >>> from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
        >>> from tensordict import TensorDict
        >>> buffer = TensorDictReplayBuffer(
        ...     storage=LazyTensorStorage(10),
        ...     sampler=PrioritizedSampler(10, alpha=0.7, beta=0.5),
        ...     batch_size=4,
        ... )
        >>> _ = buffer.extend(TensorDict({"x": torch.rand(10)}, [10]))
        >>> batch = buffer.sample()
        >>> batch["td_error"] = torch.rand(4)
        >>> buffer.update_tensordict_priority(batch)
    """

    @torch.inference_mode(False)  # what is made here stays
    def __init__(
        self,
        max_capacity: int,
        alpha: float,
        beta: float,
        eps: float = 1e-8,
        dtype: torch.dtype = torch.float,
        reduction: str = "max",
        max_priority_within_buffer: bool = False,
        device: torch.device | str | None = None,
        *,
        draw: str = "independent",
        method: str = "auto",
        weight_normalization: str = "buffer",
        td_error_unit: str = "abs",
        priority_clip: tuple[float | None, float | None] | None = None,
        uniform_mix: float = 0.0,
        latest: int = 0,
        track_draws: bool = False,
        by: str = "priority",
        newest: int | None = None,
    ) -> None:
        if dtype not in (torch.float, torch.double):
            raise NotImplementedError(f"dtype: expected torch.float or torch.double, got {dtype}")
        self.dtype = dtype
        self.reduction = reduction
        self.td_error_unit = td_error_unit
        self.beta = beta
        self._max_priority_within_buffer = max_priority_within_buffer
        self._device = None if device is None else torch.device(device)
        table = PriorityTable(
            validation.positive_int("max_capacity", max_capacity),
            alpha=alpha,
            eps=eps,
            draw=draw,
            method=method,
            weight_normalization=weight_normalization,
            new_priority="buffer_max" if max_priority_within_buffer else "ever_max",
            priority_clip=priority_clip,
            uniform_mix=uniform_mix,
            track_draws=track_draws,
            device=validation.resolve_device(self._device or "cpu"),
        )
        self._stale = torch.zeros((), dtype=torch.int64, device=table.device)
        self._table = table  # from now on, `_FIXED` are
        self._selection = _USUAL
        self._select(by=by, newest=newest, latest=latest)

    _FIXED: tuple[str, ...] = (
        "max_capacity",
        "dtype",
        "max_priority_within_buffer",
        "device",
        "draw",
        "method",
        "track_draws",
    )
    """Arguments of the constructor that cannot be set later."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._FIXED and "_table" in self.__dict__:
            raise ConfigurationError(
                f"{name}: expected to be chosen in the constructor of {type(self).__name__},"
                f" got {value!r} afterwards"
            )
        super().__setattr__(name, value)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(alpha={self.alpha}, beta={self.beta}, eps={self.eps},"
            f" reduction={self.reduction})"
        )

    def __getstate__(self) -> dict[str, Any]:
        return dict(Sampler.__getstate__(self))  # TorchRL's own refuses to be sent to a process

    @property
    def device(self) -> torch.device:
        """Device of the priorities."""
        return self._table.device

    alpha: float = _of_table(
        "alpha", "Exponent of the priorities. Setting it costs O(N) and is exact, also from 0."
    )
    eps: float = _of_table("eps", "Added to |TD error| by later updates.")

    @property
    def beta(self) -> float:
        """Exponent of the weights."""
        return self._beta

    @beta.setter
    def beta(self, value: float) -> None:
        value = validation.real("beta", value)
        with suppress(ConfigurationError):  # a few roundings beyond 1, the full correction, are 1
            value = validation.real("beta", value, high=1.0)
        self._beta = value

    @property
    def reduction(self) -> str:
        """Reduction of several TD errors of an element to one priority, in later updates."""
        return self._reduction

    @reduction.setter
    def reduction(self, value: str) -> None:
        self._reduction = validation.one_of("reduction", value, REDUCTIONS)

    @property
    def td_error_unit(self) -> str:
        """Unit of the TD errors of later updates: "abs" or "squared"."""
        return self._td_error_unit

    @td_error_unit.setter
    def td_error_unit(self, value: str) -> None:
        self._td_error_unit = validation.one_of("td_error_unit", value, TD_ERROR_UNITS)

    @property
    def weight_normalization(self) -> str:
        """Divisor of the weights: "buffer", "batch" or "none"; setting "buffer" costs O(N)."""
        return self._table.weight_normalization

    @weight_normalization.setter
    def weight_normalization(self, value: str) -> None:
        if value == "buffer" != self.weight_normalization and self._is_shared:
            raise ConfigurationError(
                "weight_normalization: expected 'buffer' to be chosen before the sampler is shared"
                " with other processes, which would not keep the smallest priority up to date, got"
                f" {self.weight_normalization!r} there"
            )
        self._table.weight_normalization = value

    priority_clip: tuple[float | None, float | None] | None = _of_table(
        "priority_clip", "Bounds of the priorities that later updates set."
    )

    @property
    def uniform_mix(self) -> float:
        """Share of uniform draws."""
        return self._table.uniform_mix

    @uniform_mix.setter
    def uniform_mix(self, value: float) -> None:
        self._require_mix(value)
        self._table.uniform_mix = value

    def _require_mix(self, value: Any) -> None:
        """Refuse, by a ConfigurationError, a share of uniform draws; make what others need."""
        if value:
            self._require_side("uniform_mix", "uniform")
        self._table.require_mix(value)

    by: str = _of_selection("by", 'Distribution of the draws: "priority", "uniform" or "inverse".')
    newest: int | None = _of_selection("newest", "Number of newest elements to draw from, or None.")
    latest: int = _of_selection("latest", "Number of newest elements in every batch.")

    def _select(self, **changes: Any) -> None:
        """Change how to draw."""
        selection = Selection.of(**self._selection._asdict() | changes, draw=self._table.draw)
        if selection.by != "priority":
            self._require_side("by", selection.by)
        self._selection = selection

    def _require_side(self, name: str, side: str) -> None:
        if self._is_shared and not self._table.has_side(side):
            raise ConfigurationError(
                f"{name}: expected it to be chosen before the sampler is shared with other"
                f" processes, which would not keep the {side} masses up to date, got {side!r} after"
            )

    @contextmanager
    def _selecting(self, by: str, newest: int | None) -> Iterator[None]:
        """Draw in another way inside; the caller holds the buffer's lock."""
        before = self._selection
        self._select(by=by, newest=newest)
        try:
            yield
        finally:
            self._selection = before

    def _draw(self, storage: Storage, n: int, size: int) -> tuple[Tensor, dict[str, Any]]:
        """Draw `n` of the `size` filled slots of a storage, int64 [n]; and entries beside them."""
        table, written = self._table, size
        selection: Selection | None = self._selection
        if selection == _USUAL and not table.uniform_mix:
            selection = None
        elif self.newest or self.latest:
            ever = self._written(storage, size)
            if ever is None:
                raise ConfigurationError(
                    "newest, latest: expected None and 0 for a storage of several dimensions, or"
                    f" without a ring's order, got {self.newest} and {self.latest}"
                )
            written = ever
        index, weight = sample_weighted(
            table, n, self._rng, selection, beta=self._beta, written=written, size=size
        )
        info = {"priority_weight": weight}
        if table.draw_counts is not None:
            info["draw_count"] = table.draw_counts.draw(index)
        return index, info

    def _written(self, storage: Storage, size: int) -> int | None:
        """A number of writes that puts the newest of `size` elements where it is in the storage.

        None if nobody knows the order of the elements.
        """
        last = last_row(storage) if storage.ndim == 1 else None
        if last is None:
            return None
        capacity = self._table.capacity
        return size if size < capacity else capacity + last + 1

    @property
    def _is_shared(self) -> bool:
        """True if other processes may work on the priorities."""
        raw: Any = self._table.raw
        return bool(raw.is_cpu and raw.is_shared())

    @property
    def stale_updates(self) -> int:
        """Number of stale updates, dropped because their element was overwritten or emptied."""
        return int(self._stale)

    @property
    def _max_capacity(self) -> int:  # TorchRL's name
        return self._table.capacity

    @property
    def track_draws(self) -> bool:
        """True if draws are counted."""
        return self._table.draw_counts is not None

    @property
    def draw_count(self) -> Tensor:
        """Number of draws of each slot's element, int32 [max_capacity], a copy.

        Raises:
            ConfigurationError: the sampler was made without `track_draws`.
        """
        if self._table.draw_count is None:
            raise ConfigurationError(
                "draw_count: expected a sampler with track_draws=True, got one with False"
            )
        return self._table.draw_count.clone()

    @property
    def priority(self) -> Tensor:
        """Raw priorities of all slots, float32 [max_capacity], a copy; 0 in empty slots."""
        return self._table.raw.clone()

    @property
    def mass(self) -> Tensor:
        """Masses of all slots, float32 [max_capacity], a copy; draws are in proportion to them."""
        return self._table.mass.clone()

    @property
    def total_mass(self) -> Tensor:
        """Sum of all masses, float64 [], a copy."""
        return self._table.total.clone()

    def stats(self) -> dict[str, int]:
        """Return counters since the start: "stale_updates" and "refused_priorities" (on CUDA)."""
        return {
            "stale_updates": self.stale_updates,
            "refused_priorities": int(self._table.refused),
        }

    _marks_replayed = True
    """True if the table knows which slots have been drawn."""

    requires_shared_state = True
    """Draws need the priorities: TorchRL does not copy this sampler into loaders' processes."""

    @torch.no_grad()
    def diagnostics(self, storage: Storage | None = None) -> dict[str, Tensor]:
        """Measure prioritization for a logger; see `per_td.PrioritizedReplayBuffer.diagnostics`.

        Args:
            storage: tells which slots are filled, and how old their elements are. Without one,
                slots of priority 0 count as empty, and ages are NaN.

        Returns:
            Tensors [] on the sampler's device; the host does not wait. Ages are NaN unless elements
            are written in the order of a ring.
        """
        self._follow(storage)
        table, device = self._table, self.device
        size = table.capacity if storage is None else len(storage)
        raw, counts = table.raw[:size], table.draw_count
        return {
            **diagnostics.measure(
                priority=raw,
                mass=table.mass[:size],
                filled=raw > 0 if storage is None else None,
                replayed=table.replayed[:size] if self._marks_replayed else None,
                draw_count=None if counts is None else counts[:size],
                written=None if storage is None else self._written(storage, size),
                beta=self._beta,
                normalization=table.weight_normalization,
                uniform_mix=table.uniform_mix,
            ),
            "beta": torch.full((), self._beta, dtype=torch.float32, device=device),
            "stale_updates": self._stale.clone(),
            "refused_priorities": table.refused.clone(),
        }

    def check_valid(self) -> None:
        """Check that priorities, masses and sums agree, in O(N); on CUDA the host waits.

        Raises:
            PerTdError: it names what is broken; see `per_td.PrioritizedReplayBuffer.check_valid`.
        """
        self._table.check_valid()
        validation.require_valid(self._stale >= 0, "the count of stale updates is at least 0")

    @property
    def default_priority(self) -> float | Tensor:
        """Priority of new elements, in the unit of `update_priority` and without eps.

        It is a float, or a tensor [] if a float would make the host wait.
        """
        priority = (self._table.for_new() - self.eps).clamp(min=0)
        if self.td_error_unit == "squared":
            largest = torch.finfo(torch.float32).max
            priority = priority.double().square().clamp(max=largest).float()
        return priority.item() if validation.can_raise(priority) else priority

    def _follow(self, storage: Storage | None) -> None:
        """Take up the storage's size, and its device unless the constructor was given one.

        Storages of several dimensions round their size up with the first data. A ConfigurationError
        if the size has no limit, or other processes share the memory: they would not know of it.
        """
        device, capacity = self.device, self._max_capacity
        size = capacity if storage is None else slots_of(storage)
        held = getattr(storage, "device", None)
        if self._device is None and held not in (None, "auto", device):
            held = validation.resolve_device(held, sums=False)
            device = held if held.type == "cuda" else device
        if device == self.device and size == capacity:
            return
        if size != capacity and self._is_shared:
            raise ConfigurationError(
                f"max_capacity: expected {size}, the size of the storage, for a sampler that is"
                f" shared with other processes, got {capacity}"
            )
        with torch.inference_mode(False):
            self._table = self._table.moved(size, device)
            self._stale = self._stale.to(device)

    def _flat(self, index: Any, storage: Storage | None) -> Tensor:
        shape = () if storage is None else getattr(storage, "shape", None) or ()
        return flat_index(index, shape, self.device)

    def _empty(self) -> None:
        self._table.empty()

    def sample(self, storage: Storage, batch_size: int) -> tuple[Any, dict[str, Any]]:
        """Draw indices of the storage in proportion to priority^alpha.

        Args:
            storage: the storage that the indices are for.
            batch_size: number of indices B.

        Returns:
            Indices, int64 [B], or a tuple of them for a storage of several dimensions; and a dict
            with "priority_weight", float32 [B], and with `track_draws` "draw_count", int32 [B].

        Raises:
            ConfigurationError: `batch_size` is not an integer of at least 1.
            EmptyBufferError: the storage is empty, or no element can be drawn.
        """
        batch_size = validation.positive_int("batch_size", batch_size)
        self._follow(storage)
        size = len(storage)
        if not size:
            raise EmptyBufferError("Cannot sample from an empty storage.")
        index, info = self._draw(storage, batch_size, size)
        return unravelled(index, storage.shape) if storage.ndim > 1 else index, info

    def add(self, index: Any) -> None:
        """Do nothing: `mark_update` sets the priority of new elements."""

    def extend(self, index: Any) -> None:
        """Do nothing: `mark_update` sets the priority of new elements."""

    def mark_update(self, index: Any, *, storage: Storage | None = None) -> None:
        """Give newly written slots the priority of new elements; negative indices are skipped.

        Args:
            index: int, [B], or [B, ndim] for a storage of several dimensions.
            storage: gives the shape, if the index has several dimensions.

        Raises:
            IndexRangeError: there is no such slot in the storage.
        """
        self._follow(storage)
        self._write_new(self._flat(index, storage), None)

    def _write_new(self, index: Tensor, priority: Tensor | None) -> None:
        """Give newly written slots [n] their priority: [n], or None for that of new elements.

        Negative indices are skipped: `MaxValueWriter` marks with -1 elements that it left out.
        """
        written = index >= 0
        try:
            self._table.write_new(index, priority, written)
        except IndexRangeError:
            validation.require_slots(index, self._max_capacity, written, what=_SLOTS)
            raise

    def update_priority(
        self, index: Any, priority: Any, *, storage: Storage | None = None, **how: Any
    ) -> None:
        """Set priorities. If an index repeats, its last update holds; negative ones are skipped.

        An update of an empty slot of `storage` is stale, since its element has been emptied. It is
        dropped and counted in `stale_updates`.

        Args:
            index: int, [B], or [B, ndim] for a storage of several dimensions.
            priority: as the loss wrote it, in the `td_error_unit`, [B], or one number for all.
            storage: tells which slots are filled, and gives the shape if the index has several
                dimensions.
            how: `mode` and `rate`; see `per_td.PrioritizedReplayBuffer.update_priority`.

        Raises:
            IndexRangeError: an index is not below the number of slots. Nothing is written.
            PriorityError: a value is NaN or infinite, or there is neither one value nor one per
                index. Nothing is written.
        """
        squared = self._td_error_unit == "squared"
        self._change(index, priority, storage, squared=squared, **as_mode(**how))

    def set_priority(
        self,
        index: Any,
        priority: Any,
        *,
        storage: Storage | None = None,
        generation: Tensor | None = None,
    ) -> None:
        """Set raw priorities as they are: without eps, unit or clipping; see `update_priority`.

        Args:
            index, storage: see `update_priority`.
            priority: finite and not negative, [B], or one number for all.
            generation: int64 [B]: 0 marks a valid update, another number a stale one. None: all are
                valid.

        Raises:
            IndexRangeError, PriorityError: as `update_priority`.
        """
        self._change(index, priority, storage, generation=generation, mode="exact")

    def _change(self, index: Any, priority: Any, storage: Storage | None, **settings: Any) -> None:
        self._follow(storage)
        size = self._max_capacity if storage is None else len(storage)
        flat = storage is None or storage.ndim == 1
        if flat and validation.are_plain(index, priority, self.device):
            with suppress(IndexRangeError):  # of a negative index, say
                self._update(index, priority, size, **settings)
                return
        with torch.no_grad():
            index = self._flat(index, storage)
            priority = validation.as_reals("priority", priority, self.device, torch.float32)
            if priority.numel() not in (1, index.numel()):
                raise PriorityError(
                    f"priority: expected one value, or one for each of {index.numel()} indices,"
                    f" got shape {list(priority.shape)}"
                )
            priority = priority.reshape(-1).expand(index.shape)
            self._update(index, priority, size, mask=index >= 0, **settings)

    def _update(
        self,
        index: Tensor,
        td_error: Tensor,
        size: int,
        *,
        generation: Tensor | None = None,
        **settings: Any,
    ) -> None:
        """Run `PriorityTable.update` with these settings, and count stale updates.

        Those of the slots from `size` on, which are empty, are stale too; as are those whose
        `generation`, int64 [B], is not that of the slot, in `stamps` or 0.
        """
        table, capacity = self._table, self._max_capacity
        if size == capacity or validation.can_raise(index):
            try:
                dropped = table.update(
                    index, td_error, written=size, generation=generation, **settings
                )
            except IndexRangeError:  # of an empty slot, unless there is no such slot
                mask = settings.get("mask")
                validation.require_slots(index, capacity, mask, what=_SLOTS)
            else:
                if not isinstance(dropped, int) or dropped:  # adding 0 to a tensor takes time
                    self._stale += dropped
                return
        known = torch.zeros_like(index) if generation is None else generation
        empty = (index >= size) & (index < capacity)
        generation = torch.where(empty, _NEVER, known)
        self._stale += table.update(
            index, td_error, written=capacity, generation=generation, **settings
        )

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of the state: tensors and plain values."""
        counts = self._table.draw_count
        return {
            "format": _FORMAT,
            "max_capacity": self._max_capacity,
            "alpha": self.alpha,
            "beta": self.beta,
            "eps": self.eps,
            "priority_clip": plain_clip(self.priority_clip),
            "uniform_mix": self.uniform_mix,
            "priority": self.priority,
            "ever_max": self._table.ever_max.clone(),
        } | ({} if counts is None else {"draw_count": counts.clone()})

    def check_state(self, state_dict: dict[str, Any]) -> None:
        """Check a state as `load_state_dict` does, and change nothing.

        Args:
            state_dict: the state.

        Raises:
            CheckpointError: it is of another kind or capacity, or a value is wrong.
        """
        if not isinstance(state_dict, dict) or state_dict.get("format") != _FORMAT:
            got = type(state_dict).__name__
            if isinstance(state_dict, dict):
                got = f"the keys {sorted(map(str, state_dict))}"
            raise CheckpointError(f"expected the state of a {_FORMAT}, got {got}")
        if (capacity := state_dict.get("max_capacity")) != self._max_capacity:
            raise CheckpointError(
                f"expected a state of max_capacity {self._max_capacity}, got {capacity}"
            )
        slots = [self._max_capacity]
        expected = [("priority", "float32", slots), ("ever_max", "float32", [])]
        if "draw_count" in state_dict:
            expected.append(("draw_count", "int32", slots))
        for name, dtype, shape in expected:
            values = state_dict.get(name)
            found = repr(values)
            if isinstance(values, Tensor):
                found = f"{str(values.dtype).removeprefix('torch.')} {list(values.shape)}"
            if not isinstance(values, Tensor) or found != f"{dtype} {shape}":
                raise CheckpointError(f"{name}: expected {dtype} {shape}, got {found}")
            if not (values.isfinite() & (values >= 0)).all():
                raise CheckpointError(f"{name}: expected finite values of at least 0, got others")
        try:
            for name in ("alpha", "beta", "eps"):
                high = torch.finfo(torch.float32).max if name == "eps" else math.inf
                validation.real(name, state_dict.get(name, "nothing"), high=high)
            as_clip(state_dict.get("priority_clip"))
            self._require_mix(state_dict.get("uniform_mix", 0.0))
        except ConfigurationError as error:
            raise CheckpointError(str(error)) from error

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the state of a sampler of the same capacity.

        Args:
            state_dict: the state.

        Raises:
            CheckpointError: as `check_state`; nothing is changed.
        """
        self.check_state(state_dict)
        self.beta = state_dict["beta"]
        for name in ("alpha", "eps", "priority_clip", "uniform_mix"):
            if name in state_dict:  # the last two are not in those of before
                setattr(self._table, name, state_dict[name])
        self._table.restore(state_dict["priority"].to(self.device), state_dict["ever_max"])
        if self._table.draw_count is not None and "draw_count" in state_dict:
            self._table.draw_count.copy_(state_dict["draw_count"])

    def dumps(self, path: str | Path) -> None:
        """Write `state_dict` into the folder `path`."""
        folder = Path(path).absolute()
        folder.mkdir(exist_ok=True)
        checkpoint.write(folder / "sampler.pt", self.state_dict())

    def loads(self, path: str | Path) -> None:
        """Take over the state that `dumps` wrote into the folder `path`."""
        self.load_state_dict(self.saved(path))

    @staticmethod
    def saved(path: str | Path) -> dict[str, Any]:
        """Return the state that `dumps` wrote into the folder `path`."""
        state: dict[str, Any] = checkpoint.read(Path(path).absolute() / "sampler.pt")
        return state

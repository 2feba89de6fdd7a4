"""PrioritizedSampler: TorchRL's, on per_td's priorities."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchrl.data import replay_buffers as torchrl_buffers
from torchrl.data.replay_buffers.samplers import Sampler
from torchrl.data.replay_buffers.storages import Storage

from per_td import validation
from per_td.checkpoint import file as checkpoint
from per_td.errors import (
    CheckpointError,
    ConfigurationError,
    EmptyBufferError,
    IndexRangeError,
    PriorityError,
)
from per_td.priorities.sampling import sample_weighted
from per_td.priorities.table import PriorityTable
from per_td.torchrl.reductions import REDUCTIONS
from per_td.torchrl.writer import SLOTS, slots_of

__all__ = ["TD_ERROR_UNITS", "PrioritizedSampler", "flat_index", "unravelled"]

TD_ERROR_UNITS = ("abs", "squared")

_FORMAT = "per_td.torchrl.PrioritizedSampler"


def flat_index(index: Any, shape: torch.Size | tuple[int, ...], device: torch.device) -> Tensor:
    """Indices of a storage of this shape as indices of its flattened form, int64 [B].

    Args:
        index: an int, [B], or for storages of several dimensions [B, ndim] or a tuple of ndim [B].
        shape: of the storage; the first entry does not matter.
        device: where the result goes.
    """
    index = torch.stack(index, -1) if isinstance(index, tuple) else torch.as_tensor(index)
    places: Tensor = validation.as_index(index.reshape(-1), device).view(index.shape)
    if places.ndim > 1 and len(shape) > 1 and places.shape[-1] == len(shape):
        outside, flat = (places < 0).any(-1), torch.zeros_like(places[..., 0])
        for size, place in zip(shape, places.unbind(-1), strict=True):
            flat = flat * size + place
        places = flat.masked_fill_(outside, -1)
    return places.reshape(-1)


def unravelled(index: Tensor, shape: torch.Size | tuple[int, ...]) -> tuple[Tensor, ...]:
    """The inverse of `flat_index`: `torch.unravel_index`, which makes the host wait on CUDA.

    Args:
        index: int64 [B], not negative.
        shape: of the storage.

    Returns:
        One int64 [B] for each dimension.
    """
    places = []
    for size in reversed(shape):
        places.append(index % size)
        index = index // size
    return tuple(reversed(places))


class PrioritizedSampler(torchrl_buffers.PrioritizedSampler):
    """Drop-in for `torchrl.data.replay_buffers.PrioritizedSampler`; nothing compiled is needed.

    Same arguments, same behaviour, recognised by TorchRL as its own. Where it differs: sums are
    float64 whatever `dtype` says, raw priorities are kept (alpha may leave 0), torch's generators
    seed the draws, NaN and infinite priorities are refused, and it may be sent to other processes
    (spawned ones share its memory).

    `alpha`, `beta`, `eps`, `reduction`, `td_error_unit` and `weight_normalization` may be set at
    any time; the other arguments are chosen in the constructor, and setting them later is refused.

    Args:
        max_capacity: number of elements that the storage can hold, all its dimensions counted. With
            a storage of another size, the sampler takes up that size when the two first meet.
        alpha: exponent of the priorities; may be set at any time.
        beta: exponent of the importance-sampling weights; may be set at any time.
        eps: added to every priority.
        dtype: torch.float or torch.double; accepted for compatibility, the precision is fixed.
        reduction: how `TensorDictReplayBuffer` reduces a priority of several values per element:
            "max", "min", "median" or "mean"; per_td's own buffer also takes "sum" and "r2d2".
        max_priority_within_buffer: new elements get the largest priority in the buffer (True), or
            the largest that it ever held.
        device: where priorities live; None follows the storage.
        draw: "independent", "stratified" or "without_replacement".
        method: "auto", "tree" or "multinomial".
        weight_normalization: "buffer" as TorchRL does, "batch" or "none".
        td_error_unit: what the priorities handed in are: "abs" for |delta|, taken as they are;
            "squared" for delta^2, whose root is taken. See the table in docs/torchrl_losses.md.

    Raises:
        ConfigurationError: an argument is not one of those accepted (a ValueError).
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
            device=validation.resolve_device(self._device or "cpu"),
        )
        self._stale = torch.zeros((), dtype=torch.int64, device=table.device)
        self._table = table  # from now on, `_FIXED` are

    _FIXED: tuple[str, ...] = (
        "max_capacity",
        "dtype",
        "max_priority_within_buffer",
        "device",
        "draw",
        "method",
    )
    """What is chosen in the constructor only."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._FIXED and "_table" in self.__dict__:
            raise ConfigurationError(
                f"{name}: expected to be chosen in the constructor of {type(self).__name__},"
                f" got {value!r} afterwards"
            )
        super().__setattr__(name, value)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(alpha={self.alpha}, beta={self.beta}, eps={self._eps},"
            f" reduction={self.reduction})"
        )

    def __getstate__(self) -> dict[str, Any]:
        return dict(Sampler.__getstate__(self))  # TorchRL's own refuses to be sent to a process

    @property
    def device(self) -> torch.device:
        """Where the priorities live."""
        return self._table.device

    @property
    def alpha(self) -> float:
        """Exponent of the priorities; setting it costs O(N) and is exact, also from 0."""
        return self._table.alpha

    @alpha.setter
    def alpha(self, value: float) -> None:
        self._table.alpha = value

    @property
    def beta(self) -> float:
        """Exponent of the importance-sampling weights."""
        return self._beta

    @beta.setter
    def beta(self, value: float) -> None:
        self._beta = validation.real("beta", value)

    @property
    def eps(self) -> float:
        """Added to |TD error| by the updates from now on."""
        return self._table.eps

    @eps.setter
    def eps(self, value: float) -> None:
        self._table.eps = value

    @property
    def reduction(self) -> str:
        """How several TD errors of one element become one priority, from now on."""
        return self._reduction

    @reduction.setter
    def reduction(self, value: str) -> None:
        self._reduction = validation.one_of("reduction", value, REDUCTIONS)

    @property
    def td_error_unit(self) -> str:
        """Unit of the TD errors that are handed in from now on: "abs" or "squared"."""
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
                " with other processes, which would not keep the smallest priority up to date"
            )
        self._table.weight_normalization = value

    @property
    def _is_shared(self) -> bool:
        """Whether other processes may work on the priorities."""
        raw: Any = self._table.raw
        return bool(raw.is_cpu and raw.is_shared())

    @property
    def stale_updates(self) -> int:
        """How many updates were dropped because their slot holds something else, or nothing."""
        return int(self._stale)

    @property
    def _alpha(self) -> float:
        return self._table.alpha

    @property
    def _eps(self) -> float:
        return self._table.eps

    @property
    def _max_capacity(self) -> int:
        return self._table.capacity

    @property
    def priority(self) -> Tensor:
        """Raw priorities of all slots, float32 [max_capacity], 0 where nothing was written."""
        return self._table.raw.clone()

    @property
    def mass(self) -> Tensor:
        """Masses of all slots, which draws are in proportion to, float32 [max_capacity], a copy."""
        return self._table.mass.clone()

    @property
    def total_mass(self) -> Tensor:
        """Sum of all masses, float64 [], a copy."""
        return self._table.total.clone()

    def stats(self) -> dict[str, int]:
        """Counters since the start: "stale_updates" and "refused_priorities" (on CUDA)."""
        return {
            "stale_updates": self.stale_updates,
            "refused_priorities": int(self._table.refused),
        }

    def check_valid(self) -> None:
        """Look for damage, in O(N); on CUDA the host waits.

        Raises:
            PerTdError: it names the broken invariant; see `PrioritizedReplayBuffer.check_valid`.
        """
        self._table.check_valid()
        validation.require_valid(self._stale >= 0, "the count of stale updates is at least 0")

    @property
    def default_priority(self) -> float | Tensor:
        """What new elements get, to be handed to `update_priority`: in its unit, and without eps.

        A float, or a 0-dim tensor where a float would need a host sync.
        """
        priority = (self._table.for_new() - self._eps).clamp(min=0)
        if self.td_error_unit == "squared":
            largest = torch.finfo(torch.float32).max
            priority = priority.double().square().clamp(max=largest).float()
        return priority.item() if validation.can_raise(priority) else priority

    def _follow(self, storage: Storage | None) -> None:
        """Take up the storage's size, and its device unless told another.

        Storages of several dimensions round their size up when the first data comes in.

        Raises:
            ConfigurationError: the storage has no limited size, or this sampler shares its memory
                with other processes, which would not know of another size.
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
        self._table = self._table.moved(size, device)
        self._stale = self._stale.to(device)

    def _flat(self, index: Any, storage: Storage | None) -> Tensor:
        shape = () if storage is None else getattr(storage, "shape", None) or ()
        return flat_index(index, shape, self.device)

    def _empty(self) -> None:
        self._table.fill(self._table.raw[:0])
        self._table.ever_max.zero_()

    def sample(self, storage: Storage, batch_size: int) -> tuple[Any, dict[str, Any]]:
        """Draw indices of the storage in proportion to priority^alpha.

        Args:
            storage: what will be indexed.
            batch_size: how many, B.

        Returns:
            Indices int64 [B], or a tuple of them for a storage of several dimensions, and
            {"priority_weight": float32 [B]}.

        Raises:
            EmptyBufferError: the storage is empty, or nothing in it can be drawn.
        """
        self._follow(storage)
        if len(storage) == 0:
            raise EmptyBufferError("Cannot sample from an empty storage.")
        size = len(storage)
        index, weight = sample_weighted(
            self._table, batch_size, self._rng, beta=self._beta, written=size, size=size
        )
        where = unravelled(index, storage.shape) if storage.ndim > 1 else index
        return where, {"priority_weight": weight}

    def add(self, index: Any) -> None:
        """Nothing to do: `mark_update` sets the priority of what was written."""

    def extend(self, index: Any) -> None:
        """Nothing to do: `mark_update` sets the priority of what was written."""

    def mark_update(self, index: Any, *, storage: Storage | None = None) -> None:
        """Give the slots `index`, which have been written, the priority of new elements.

        Negative indices are skipped.

        Raises:
            IndexRangeError: an index is not that of a slot of the storage.
        """
        self._follow(storage)
        self._write_new(self._flat(index, storage), None)

    def _write_new(self, index: Tensor, priority: Tensor | None) -> None:
        """Give written slots, int64 [n], their priority: [n], or None for that of new elements.

        An index of -1 is `MaxValueWriter`'s mark for what it did not write.
        """
        written: Tensor | None = index >= 0
        if validation.can_raise(index):
            index, priority = index[written], None if priority is None else priority[written]
            written = None
            validation.require_slots(index, self._max_capacity, what=SLOTS)
        self._table.write_new(index, priority, written)

    @torch.no_grad()
    def update_priority(self, index: Any, priority: Any, *, storage: Storage | None = None) -> None:
        """Set priorities; of equal indices the last one holds, and negative ones are skipped.

        An update of a slot that `storage` has, but that is not filled, comes too late, since
        whatever lived there has been emptied: it is dropped, and counted in `stale_updates`. An
        index that is not that of a slot of the storage is an error.

        Args:
            index: int, [B], or [B, ndim] for a storage of several dimensions.
            priority: what the loss wrote, in the `td_error_unit`, [B], or one number for all.
            storage: tells which slots are filled, and the shape where the index has several
                dimensions.

        Raises:
            IndexRangeError: an index is not below the number of slots; nothing is written then.
            PriorityError: NaN, infinite, or neither one value nor one per index; nothing is
                written then.
        """
        self._follow(storage)
        index = self._flat(index, storage)
        priority = validation.to_device(torch.as_tensor(priority), self.device).detach()
        if priority.numel() == 1:
            priority = priority.reshape(1).expand(index.shape)
        elif priority.numel() != index.numel():
            raise PriorityError(
                f"priority: expected one value, or one for each of {index.numel()} indices,"
                f" got shape {list(priority.shape)}"
            )
        priority = priority.reshape(-1).float()
        if self.td_error_unit == "squared":
            priority = priority.abs().sqrt()
        written = index >= 0  # MaxValueWriter marks with -1 what it did not write
        if validation.can_raise(index):
            self._update(index[written], priority[written], storage)
        else:
            self._update(index, priority, storage, written=written)

    def _update(
        self,
        index: Tensor,
        priority: Tensor,
        storage: Storage | None,
        *,
        live: Tensor | None = None,
        written: Tensor | None = None,
    ) -> None:
        """Set the priorities of the slots that are filled, and count what is stale.

        Args:
            index: slots, int64 [B], on this device.
            priority: |TD error|, float32 [B].
            storage: tells which slots are filled; None: all are.
            live: bool [B], False for updates that are stale; None: none is known to be.
            written: bool [B], False for updates to be skipped; None skips none.

        Raises:
            IndexRangeError, PriorityError: as `update_priority`.
        """
        capacity = self._max_capacity
        size = capacity if storage is None else len(storage)
        if size < capacity:
            filled = index < size
            live = filled | (index >= capacity) if live is None else live & filled
        # To a table that knows of no later round, all slots are of generation 0
        generation = None if live is None else (~live).long()
        try:
            self._stale += self._table.update(
                index, priority, written=capacity, generation=generation, mask=written
            )
        except IndexRangeError:
            validation.require_slots(index, capacity, what=SLOTS)
            raise

    def state_dict(self) -> dict[str, Any]:
        """A snapshot: tensors and plain values."""
        return {
            "format": _FORMAT,
            "max_capacity": self._max_capacity,
            "alpha": self.alpha,
            "beta": self.beta,
            "eps": self._eps,
            "priority": self.priority,
            "ever_max": self._table.ever_max.clone(),
        }

    def check_state(self, state_dict: dict[str, Any]) -> None:
        """Refuse what `load_state_dict` would, before a buffer takes over anything else.

        Raises:
            CheckpointError: it is another kind of state, or of another capacity, or its values are
                not those of a sampler.
        """
        if state_dict.get("format") != _FORMAT:
            raise CheckpointError(
                f"expected the state of a {_FORMAT}, got the keys {sorted(state_dict)}"
            )
        if state_dict["max_capacity"] != self._max_capacity:
            raise CheckpointError(
                f"expected a state of max_capacity {self._max_capacity},"
                f" got {state_dict['max_capacity']}"
            )
        for name, shape in (("priority", (self._max_capacity,)), ("ever_max", ())):
            values = state_dict.get(name)
            if not isinstance(values, Tensor) or (values.dtype, values.shape) != (
                torch.float32,
                shape,
            ):
                found = (
                    f"{values.dtype} {list(values.shape)}"
                    if isinstance(values, Tensor)
                    else repr(values)
                )
                raise CheckpointError(f"{name}: expected float32 {list(shape)}, got {found}")
            if not (values.isfinite() & (values >= 0)).all():
                raise CheckpointError(f"{name}: expected finite values of at least 0, got others")
        for name in ("alpha", "beta", "eps"):
            try:
                high = torch.finfo(torch.float32).max if name == "eps" else math.inf
                validation.real(name, state_dict.get(name, "nothing"), high=high)
            except ConfigurationError as error:
                raise CheckpointError(str(error)) from error

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state of a sampler of the same capacity.

        Raises:
            CheckpointError: as `check_state`; nothing is changed then.
        """
        self.check_state(state_dict)
        self.alpha, self.beta = state_dict["alpha"], state_dict["beta"]
        self._table.eps = state_dict["eps"]
        self._table.fill(state_dict["priority"].to(self.device))
        self._table.ever_max.copy_(state_dict["ever_max"])

    def dumps(self, path: str | Path) -> None:
        """Write `state_dict` into the folder `path`."""
        folder = Path(path).absolute()
        folder.mkdir(exist_ok=True)
        checkpoint.write(folder / "sampler.pt", self.state_dict())

    def loads(self, path: str | Path) -> None:
        """Take over what `dumps` wrote into the folder `path`."""
        self.load_state_dict(self.saved(path))

    @staticmethod
    def saved(path: str | Path) -> dict[str, Any]:
        """The state that `dumps` wrote into the folder `path`."""
        state: dict[str, Any] = checkpoint.read(Path(path).absolute() / "sampler.pt")
        return state

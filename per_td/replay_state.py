"""ReplayState: what a buffer is made of, what it tells of itself, and how that is saved."""

import os
from collections.abc import Callable
from typing import Any, Self

import torch
from tensordict import TensorDict
from torch import Tensor

from per_td import diagnostics, validation
from per_td.checkpoint import file as checkpoint
from per_td.checkpoint import state as states
from per_td.copies import Copied
from per_td.errors import ConfigurationError
from per_td.priorities.table import PriorityTable
from per_td.storage.leaves import Leaves
from per_td.storage.ring import RingStorage

__all__ = ["ReplayState"]


class ReplayState(Copied):
    """Settings, counters and parts of a `PrioritizedReplayBuffer`, which changes them.

    The parts, transitions and priorities, are made there.

    Args:
        batch_size, beta, beta_increment, device, generator: as for `PrioritizedReplayBuffer`.

    Raises:
        ConfigurationError: an argument is not one of those accepted.
    """

    _storage: RingStorage
    _priorities: PriorityTable

    def __init__(
        self,
        *,
        batch_size: int | None,
        beta: float,
        beta_increment: float,
        device: torch.device | str | int | None,
        generator: torch.Generator | None,
    ) -> None:
        self._device = validation.resolve_device(device)
        self.batch_size = batch_size
        self.generator = generator
        self.beta_increment = beta_increment
        self._beta = torch.tensor(0.0, dtype=torch.float64, device=self.device)
        self.beta = beta
        self._stale = torch.zeros((), dtype=torch.int64, device=self.device)

    def __len__(self) -> int:
        return len(self._storage)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({len(self)} of {self.capacity} slots, device={self.device},"
            f" alpha={self.alpha:g}, beta={self.beta:g}, eps={self.eps:g}, draw={self.draw!r}"
            f"{f', num_buffers={self.num_buffers}' if self.num_buffers else ''})"
        )

    capacity: int = validation.fixed(
        "capacity",
        lambda self: self._storage.capacity,
        "load() and load_state_dict() move a state into a buffer of another capacity",
    )
    """Number of slots."""

    device: torch.device = validation.fixed(
        "device", lambda self: self._device, "load(path, device=...) makes a buffer elsewhere"
    )
    """Where batches are, and priorities live."""

    prioritization: str = validation.fixed(
        "prioritization", lambda self: self._priorities.prioritization
    )
    """What masses follow from: "proportional" or "rank"."""

    sort_interval: int | None = validation.fixed(
        "sort_interval", lambda self: self._priorities.sort_interval
    )
    """For "rank": changes of priorities from one exact order to the next; None: see there."""

    num_buffers: int | None = validation.fixed(
        "num_buffers", lambda self: self._storage.num_buffers
    )
    """How many buffers there are side by side; None: one, without a dimension for it."""

    layout: str = validation.fixed("layout", lambda self: self._storage.layout)
    """How transitions lie in memory; "auto" until the first of them is seen."""

    epsilon = validation.fixed("epsilon", instead="expected eps, which can be set")

    @property
    def batch_size(self) -> int | None:
        """Default for `sample`; may be set at any time."""
        return self._batch

    @batch_size.setter
    def batch_size(self, value: int | None) -> None:
        self._set_batch_size(value)

    def _set_batch_size(self, value: int | None) -> None:
        self._batch = None if value is None else validation.positive_int("batch_size", value)

    @property
    def generator(self) -> torch.Generator | None:
        """Source of all random draws, None for torch's own; may be set at any time."""
        return self._generator

    @generator.setter
    def generator(self, value: torch.Generator | None) -> None:
        self._set_generator(value)

    def _set_generator(self, value: torch.Generator | None) -> None:
        self._generator = validation.as_generator(value, self._device)

    @property
    def beta_increment(self) -> float:
        """Added to beta by `increase_beta`, at least 0; may be set at any time."""
        return self._beta_increment

    @beta_increment.setter
    def beta_increment(self, value: float) -> None:
        self._beta_increment = validation.real("beta_increment", value)

    @property
    def lengths(self) -> Tensor:
        """Number of filled slots, int64 [], or [S] with `num_buffers`."""
        return self._storage.lengths

    @property
    def write_count(self) -> int:
        """How many transitions were ever written."""
        return self._storage.write_count

    @property
    def alpha(self) -> float:
        """Exponent of the priorities; setting it costs O(N)."""
        return self._priorities.alpha

    @alpha.setter
    def alpha(self, value: float) -> None:
        self._priorities.alpha = value

    @property
    def beta(self) -> float:
        """Exponent of the importance-sampling weights, in [0, 1]."""
        return float(self._beta)

    @beta.setter
    def beta(self, value: float) -> None:
        self._beta.fill_(validation.real("beta", value, high=1.0))

    @property
    def eps(self) -> float:
        """Added to |TD error| by the updates from now on."""
        return self._priorities.eps

    @eps.setter
    def eps(self, value: float) -> None:
        self._priorities.eps = value

    @property
    def draw(self) -> str:
        """How indices are drawn; may be set at any time."""
        return self._priorities.draw

    @draw.setter
    def draw(self, value: str) -> None:
        self._choose(draw=value)

    @property
    def method(self) -> str:
        """What draws, as the constructor takes it; may be set at any time."""
        return self._priorities.method

    @method.setter
    def method(self, value: str) -> None:
        self._choose(method=value)

    @property
    def weight_normalization(self) -> str:
        """What weights are divided by; may be set at any time, in O(N) for "buffer"."""
        return self._priorities.weight_normalization

    @weight_normalization.setter
    def weight_normalization(self, value: str) -> None:
        self._choose(weight_normalization=value)

    @property
    def new_priority(self) -> str:
        """What transitions get that nobody gives a priority; may be set at any time."""
        return self._priorities.new_priority

    @new_priority.setter
    def new_priority(self, value: str) -> None:
        self._choose(new_priority=value)

    def _choose(self, **changes: str) -> None:
        """`PriorityTable.choose`."""
        self._priorities.choose(**changes)

    @property
    def priority(self) -> Tensor:
        """Raw priorities, float32, a copy: of the filled slots [len], or of all [S, capacity]."""
        return self._priorities.raw[self._own].clone()

    @property
    def _own(self) -> slice:
        """Of a tensor of all slots, those to be shown: the filled ones of one buffer, or all."""
        return slice(None) if self._storage.lead else slice(len(self))

    @property
    def mass(self) -> Tensor:
        """Masses, which draws are in proportion to; as `priority`, a copy."""
        return self._priorities.mass[self._own].clone()

    @property
    def total_mass(self) -> Tensor:
        """Sum of all masses, float64 [] or [S]; nothing can be drawn where it is 0."""
        return self._priorities.total.clone()

    @property
    def smallest_mass(self) -> Tensor:
        """The smallest positive mass, float32 [] or [S]; inf where there is none.

        It is also inf where no weight needs it: unless `weight_normalization` is "buffer".
        """
        return self._priorities.smallest.clone()

    @property
    def replayed(self) -> Tensor:
        """True for filled slots that have been drawn since they were written, bool [len], a copy.

        Raises:
            ConfigurationError: there are many buffers, which do not keep it.
        """
        if self._storage.lead:
            raise ConfigurationError(
                f"replayed: expected one buffer, got num_buffers={self.num_buffers}"
            )
        return self._priorities.replayed[: len(self)].clone()

    @property
    def kernels(self) -> bool:
        """True where compiled kernels for the CPU are used; see `per_td.kernels`."""
        return self._priorities.trees.compiled

    @property
    def transitions(self) -> TensorDict | None:
        """The filled slots [len], or all slots [S, capacity], in the buffer's memory.

        A TensorDict; None before any data. Those of buffer s are filled up to `lengths[s]`.
        """
        data = self._storage.data
        return None if data is None else data[self._own]

    def filled_leaves(self) -> Leaves:
        """The filled slots by key, [len, ...], in the buffer's memory."""
        return self._storage.filled()

    def count_stale(self, updates: int) -> None:
        """Count updates as stale that were found to be so before they came here.

        Raises:
            ConfigurationError: the number is negative, or none.
        """
        self._drop(validation.integer("updates", updates, 0))

    def _drop(self, stale: Tensor | int) -> None:
        if isinstance(stale, Tensor) or stale:
            self._stale += stale

    @torch.no_grad()
    def check_valid(self) -> None:
        """Look for damage, in O(N), rank-based in O(N log N); on CUDA the host waits.

        Whatever is handed in and whoever is killed, there should be none: this is for tests, and
        for bug reports.

        Raises:
            PerTdError: it names the broken invariant: priorities are finite, not negative and 0
                beyond the filled slots, masses, sums and extrema follow from them, counts agree.
        """
        require, table, lengths = validation.require_valid, self._priorities, self.lengths
        self._storage.check_valid()
        table.check_valid()
        slot = torch.arange(self.capacity, device=self.device)
        empty = slot >= lengths.unsqueeze(-1)
        require(not (table.raw.bool() & empty).any(), "priorities beyond the filled slots are 0")
        require((self._beta >= 0) & (self._beta <= 1), "beta is in [0, 1]")
        require(self._stale >= 0, "the count of stale updates is at least 0")

    def increase_beta(self) -> None:
        """Add `beta_increment` to beta, up to 1 (section 3.4: beta grows to 1 over training)."""
        self._beta.add_(self.beta_increment).clamp_(max=1.0)

    def stats(self) -> dict[str, int]:
        """Counters since the start.

        Returns:
            "written": transitions ever written; "stale_updates": updates dropped because the slot
            had been overwritten; "refused_priorities": invalid ones (on CUDA and under
            torch.compile: elsewhere they raise).
        """
        return {
            "written": self.write_count,
            "stale_updates": int(self._stale),
            "refused_priorities": int(self._priorities.refused),
        }

    @torch.no_grad()
    def diagnostics(self) -> dict[str, Tensor]:
        """How prioritization is doing, for a logger: docs/diagnostics.md tells how to read it.

        It sorts all priorities and masses: call it now and then, not at every step.

        Returns:
            0-dim tensors on the buffer's device, always under the same keys; nothing is read back
            to the host. float32: effective sample size of the draws, their share on the top 1 % of
            slots, the share of transitions never replayed, quantiles of priority, weight and age
            ("priority/min", "/q01", "/q25", "/q50", "/q75", "/q99", "/max"), "beta"; NaN for what
            does not exist, as in an empty buffer. int64: "size", "stale_updates",
            "refused_priorities".
        """
        if self._storage.lead:
            raise ConfigurationError(
                f"diagnostics: expected one buffer, got num_buffers={self.num_buffers}"
            )
        table, size = self._priorities, len(self)
        return {
            **diagnostics.measure(
                priority=table.raw[:size],
                mass=table.mass[:size],
                replayed=table.replayed[:size],
                written=self._storage.ring_count(),
                beta=self._beta,
                normalization=table.weight_normalization,
            ),
            "beta": self._beta.float(),
            "size": torch.full((), size, dtype=torch.int64, device=self.device),
            "stale_updates": self._stale.clone(),
            "refused_priorities": table.refused.clone(),
        }

    def state_dict(self) -> dict[str, Any]:
        """A snapshot: tensors and plain values, as `torch.load(weights_only=True)` reads them."""
        return self._state(copy=True)

    def _state(self, *, copy: bool) -> dict[str, Any]:
        return states.state_of(self, copy=copy)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state: transitions, priorities, counters, alpha, beta, eps, generator.

        Of a state of another capacity, the newest transitions that fit are kept, with their
        priorities and in their order. Where any had to move to another slot, the updates of all
        batches drawn before are stale, if they bring their generation.

        Args:
            state: from `state_dict` of a buffer on any device. The state of a generator on
                another kind of device becomes the seed of this buffer's.

        Raises:
            CheckpointError: it is no such state, or of another number of buffers.
            SchemaError: its transitions are not like those that this buffer was made for.
        """
        states.restore(self, state)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state to a file, whole or not at all; transitions are not copied in memory.

        Raises:
            OSError: it cannot be written, such as on a full disk; the old file is as it was.
        """
        checkpoint.write(path, self._state(copy=False))

    def restore(self, path: str | os.PathLike[str]) -> None:
        """Take over the state in a file that `save` wrote, as `load_state_dict` does.

        What this buffer was made with stays: capacity, draw, device, memory, lock.

        Raises:
            CheckpointError: the file is truncated, damaged, foreign, or of a later version of
                per_td, or its state is not for this buffer; see `load_state_dict`.
            SchemaError: its transitions are not like those that this buffer was made for.
            FileNotFoundError: there is none.
        """
        self.load_state_dict(checkpoint.read(path, states.FORMAT))

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        capacity: int | None = None,
        device: torch.device | str | int | None = None,
        generator: torch.Generator | None = None,
        storage: str = "memory",
        folder: str | os.PathLike[str] | None = None,
    ) -> Self:
        """A buffer with the settings and the state of a file that `save` wrote.

        It is of the class that this is called on: `type(buffer).load` makes a shared buffer of a
        shared one, and one for threads, without `prefetch`, of one for threads. To read a file into
        a buffer that there is already, see `restore`.

        Args:
            path: the file.
            capacity: another one than that saved; see `load_state_dict`.
            device: where the buffer lives; None is torch's default device.
            generator: takes over the state of the one saved, if there was one. None makes one
                then, so that the draws go on as they would have.
            storage, folder: as for the constructor.

        Raises:
            CheckpointError: the file is truncated, damaged, foreign, or of a later version of
                per_td; it says which.
            FileNotFoundError: there is none.
        """
        state = states.check(checkpoint.read(path, states.FORMAT))
        device = validation.resolve_device(device)
        if generator is None and state["generator"] is not None:
            generator = torch.Generator(device)
        settings = state["settings"] | ({} if capacity is None else {"capacity": capacity})
        where: dict[str, Any] = {"device": device, "storage": storage, "folder": folder}
        make: Callable[..., Self] = cls  # a buffer, whose constructor takes more than this one's
        buffer = make(**settings, **where, **cls._to_make(state), generator=generator)
        buffer.load_state_dict(state)
        return buffer

    @classmethod
    def _to_make(cls, state: dict[str, Any]) -> dict[str, Any]:
        """What the constructor needs to be told of a state, besides its settings."""
        return {}

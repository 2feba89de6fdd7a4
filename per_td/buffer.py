"""PrioritizedReplayBuffer: storage, priorities and draws wired together."""

import os
from collections.abc import Mapping
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from per_td import checkpoint, diagnostics, priority_draws, states, validation
from per_td.errors import ConfigurationError, EmptyBufferError, PriorityError, SchemaError
from per_td.leaves import Leaves, count
from per_td.memory import Place
from per_td.priorities import PriorityTable
from per_td.storage import RingStorage

__all__ = ["PrioritizedReplayBuffer"]


class PrioritizedReplayBuffer:
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
        num_buffers: S makes S buffers of `capacity` slots each in one set of tensors, whose
            priorities never mix, for S runs in lockstep: everything gets a leading dimension [S],
            see `per_td.many.ManyBuffers`. None: one buffer.
        shared: put everything into shared memory, for processes that write and learn side by side;
            needs an `example`. See `per_td.sharing.SharedReplayBuffer`.
        threads: let several threads call it at the same time, for 0.3 us more per call. See
            `per_td.threads.LockedReplayBuffer`; what is `shared` can do that anyway.
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
    """

    def __new__(
        cls,
        *args: Any,
        num_buffers: int | None = None,
        shared: bool = False,
        threads: bool = False,
        prefetch: int = 0,
        **settings: Any,
    ) -> "PrioritizedReplayBuffer":
        """The class made for what is asked: for processes, for threads, or for many buffers."""
        if shared and cls is PrioritizedReplayBuffer:
            from per_td.sharing import SharedReplayBuffer  # which is made from this class

            return super().__new__(SharedReplayBuffer)
        if (threads or prefetch) and cls is PrioritizedReplayBuffer:
            from per_td.threads import LockedReplayBuffer  # so is this

            return super().__new__(LockedReplayBuffer)
        if num_buffers is not None and cls is PrioritizedReplayBuffer:
            from per_td.many import ManyBuffers  # and this

            return super().__new__(ManyBuffers)
        return super().__new__(cls)

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
        if batch_size is not None:
            batch_size = validation.positive_int("batch_size", batch_size)
        self.batch_size = batch_size
        self.device = validation.resolve_device(device)
        if generator is not None and not isinstance(generator, torch.Generator):
            raise ConfigurationError(
                f"generator: expected a torch.Generator, got {type(generator).__name__}"
            )
        if generator is not None and generator.device.type != self.device.type:
            raise ConfigurationError(
                f"generator: expected one on {self.device}, got one on {generator.device}"
            )
        self.generator = generator
        self.beta_increment = validation.real("beta_increment", beta_increment)
        self._beta = torch.tensor(0.0, dtype=torch.float64, device=self.device)
        self.beta = beta
        self._stale = torch.zeros((), dtype=torch.int64, device=self.device)
        self._make(
            capacity,
            num_buffers,
            layout,
            Place(storage, folder),
            alpha=alpha,
            eps=eps,
            draw=draw,
            method=method,
            weight_normalization=weight_normalization,
            new_priority=new_priority,
            prioritization=prioritization,
            sort_interval=sort_interval,
        )
        self._arrange(shared=shared, threads=threads, prefetch=prefetch)
        self._allocate(example)

    def _allocate(self, example: TensorDictBase | None) -> None:
        if example is not None:
            self._storage.allocate(self._storage.check(example, batched=False))

    __new__.__wrapped__ = __init__  # type: ignore[attr-defined]  # the signature that users see

    def _make(
        self,
        capacity: int,
        num_buffers: int | None,
        layout: str,
        place: Place,
        **settings: Any,
    ) -> None:
        """The parts that hold transitions and priorities."""
        if num_buffers is not None:
            raise ConfigurationError(
                f"num_buffers: expected None, got {num_buffers!r}: {type(self).__name__} is one"
                " buffer; derive it from per_td.many.ManyBuffers for many"
            )
        self._storage = RingStorage(capacity, self.device, layout, place)
        self._priorities = PriorityTable(capacity, device=self.device, **settings)

    def _arrange(self, **wanted: Any) -> None:
        """What `shared`, `threads` and `prefetch` need: this class can do none of it."""
        for name, value in wanted.items():
            if value:
                raise ConfigurationError(
                    f"{name}: expected {type(value)()!r} for {type(self).__name__}, got {value!r}:"
                    " see per_td.sharing and per_td.threads for classes to derive from"
                )

    def __len__(self) -> int:
        return len(self._storage)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({len(self)} of {self.capacity} slots, device={self.device},"
            f" alpha={self.alpha:g}, beta={self.beta:g}, eps={self.eps:g}, draw={self.draw!r})"
        )

    @property
    def capacity(self) -> int:
        """Number of slots."""
        return self._storage.capacity

    @property
    def num_buffers(self) -> int | None:
        """How many buffers there are side by side; None: one, without a dimension for it."""
        return None

    @property
    def lengths(self) -> Tensor:
        """Number of filled slots, int64 [], or [S] with `num_buffers`."""
        return torch.as_tensor(self._storage.size, device=self.device)

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
        """How indices are drawn."""
        return self._priorities.draw

    @property
    def priority(self) -> Tensor:
        """Raw priorities of the filled slots, float32 [len], a copy."""
        return self._priorities.raw[: len(self)].clone()

    @property
    def transitions(self) -> TensorDict | None:
        """The filled slots, a TensorDict [len] in the buffer's memory; None before any data."""
        data = self._storage.data
        return None if data is None else data[: len(self)]

    def increase_beta(self) -> None:
        """Add `beta_increment` to beta, up to 1 (section 3.4: beta grows to 1 over training)."""
        self._beta.add_(self.beta_increment).clamp_(max=1.0)

    def extend(self, transitions: TensorDictBase, priority: Any = None, mask: Any = None) -> Tensor:
        """Write transitions.

        Args:
            transitions: TensorDict of batch size [n]; where n exceeds the capacity, the last ones
                remain, as if they had been added one by one.
            priority: raw priorities for them, finite and not negative, [n]; 0 is never drawn. None
                gives them that of `new_priority`.
            mask: only with `num_buffers`.

        Returns:
            Their slots, int64 [n].

        Raises:
            SchemaError: keys, shapes or dtypes differ from those that came before.
            PriorityError: `priority` has a wrong shape or dtype, or a value is NaN, infinite or
                negative (on CUDA such a value is replaced by that of `new_priority`, and counted).
        """
        self._refuse(mask)
        leaves = self._storage.check(transitions)
        return self._extend(leaves, transitions.batch_size[0], priority)

    def add(self, transition: TensorDictBase, priority: Any = None, mask: Any = None) -> Tensor:
        """Write one transition, a TensorDict of batch size []; see `extend`.

        Returns:
            Its slot, int64 [].
        """
        self._refuse(mask)
        if isinstance(transition, TensorDictBase) and transition.batch_dims:
            raise SchemaError(
                f"expected a TensorDict of batch size [], got {list(transition.batch_size)}:"
                " use extend() for several transitions"
            )
        leaves = self._storage.check(transition, batched=False)
        return self._extend(leaves, 1, priority).squeeze_(0)

    def _refuse(self, mask: Any) -> None:
        if mask is not None:
            raise ConfigurationError(
                f"mask: expected None, got {type(mask).__name__}: one buffer writes and updates all"
                " that it is given; a mask goes with num_buffers"
            )

    def extend_leaves(self, leaves: Leaves, priority: Any = None) -> Tensor:
        """`extend` without a TensorDict: tensors [n, ...] by key, a tuple of names."""
        self._storage.check_leaves(leaves)
        return self._extend(leaves, count(leaves), priority)

    def _extend(self, leaves: Leaves, n: int, priority: Any) -> Tensor:
        index = self._storage.next_slots(n)
        initial = None
        if priority is not None:
            initial = self._priorities.check_initial(priority, index)[-self.capacity :]
        row = self._storage.write(leaves, n)
        if initial is None:
            self._priorities.write_row(*row)
        else:
            self._priorities.write_new(index[-self.capacity :], initial)
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
        index, weight = self._draw(batch_size)
        return self._storage.read(index, {"priority_weight": weight})

    def sample_leaves(self, batch_size: int | None = None) -> tuple[Leaves, Tensor, Tensor]:
        """`sample` without a TensorDict: tensors [B, ...] by key, index and weight."""
        index, weight = self._draw(batch_size)
        return self._storage.leaves(index), index, weight

    def _draw(self, batch_size: int | None) -> tuple[Tensor, Tensor]:
        """Slots and their weights."""
        n = self.batch_size if batch_size is None else batch_size
        if n is None:
            raise ConfigurationError(
                "batch_size: expected one in sample() or in the constructor, got none"
            )
        n = validation.positive_int("batch_size", n)
        if not len(self):
            raise EmptyBufferError("expected transitions to sample from, got an empty buffer")
        if self.draw == "without_replacement" and n > len(self):
            raise EmptyBufferError(
                f"expected batch_size <= {len(self)}, the transitions in the buffer, to draw"
                f" without replacement, got {n}"
            )
        return priority_draws.sample_weighted(
            self._priorities,
            n,
            len(self),
            self.generator,
            beta=self._beta,
            filled=self._storage.size,
        )

    def update_priority(
        self, index: Any, td_error: Any, generation: Any = None, mask: Any = None
    ) -> None:
        """Set priorities to |td_error| + eps (section 3.3).

        Args:
            index: slots, integers [B], as `sample` gave them; of equal ones the last holds.
            td_error: raw TD errors [B] (or [B, 1]); sign and gradient do not matter.
            generation: that of the batch, [B]: where the slot has been overwritten since, the
                update is stale, dropped and counted. None drops none.
            mask: only with `num_buffers`.

        Raises:
            IndexRangeError: an index does not name a filled slot.
            PriorityError: a TD error is NaN or infinite, or shape or dtype are wrong. Nothing has
                been written then. On CUDA, where values cannot be looked at without stopping the
                host, and under torch.compile, such updates are refused one by one and counted in
                `stats`.
        """
        self._refuse(mask)
        index = validation.as_index(index, self.device)
        if generation is not None:
            generation = validation.as_index(generation, self.device, "generation")
            if generation.shape != index.shape:
                raise PriorityError(
                    f"generation: expected shape {list(index.shape)}, one per index,"
                    f" got {list(generation.shape)}"
                )
        stale = self._priorities.update(
            index,
            td_error,
            self._storage.size,
            generation=None if generation is None else self._storage.in_ring(generation),
            written=self._storage.written,
        )
        self._drop(stale)

    def _drop(self, stale: Tensor | int) -> None:
        if isinstance(stale, Tensor) or stale:
            self._stale += stale

    def update_tensordict_priority(self, batch: TensorDictBase) -> None:
        """`update_priority` with "index", "td_error" and "generation" (if any) of a batch [B].

        Raises:
            SchemaError: the batch has no "index" or no "td_error".
        """
        if not isinstance(batch, TensorDictBase | Mapping):
            raise SchemaError(f"expected a TensorDict, got {type(batch).__name__}")
        for key in ("index", "td_error"):
            if batch.get(key, None) is None:
                raise SchemaError(
                    f"expected the key {key!r} in the batch, got {list(batch.keys())}"
                )
        self.update_priority(batch["index"], batch["td_error"], batch.get("generation", None))

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
        table, size = self._priorities, len(self)
        return {
            **diagnostics.measure(
                priority=table.raw[:size],
                mass=table.masses[:size],
                replayed=table.replayed[:size],
                written=self._storage.ring_count(),
                beta=self._beta,
                normalization=table.weight_normalization,
            ),
            "beta": self._beta.float(),
            "size": torch.full((), size, device=self.device),
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
    ) -> "PrioritizedReplayBuffer":
        """A buffer with the settings and the state of a file that `save` wrote.

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
        state = states.check(checkpoint.read(path))
        device = validation.resolve_device(device)
        if generator is None and state["generator"] is not None:
            generator = torch.Generator(device)
        settings = state["settings"] | ({} if capacity is None else {"capacity": capacity})
        where: dict[str, Any] = {"device": device, "storage": storage, "folder": folder}
        buffer = cls(**settings, **where, generator=generator)
        buffer.load_state_dict(state)
        return buffer

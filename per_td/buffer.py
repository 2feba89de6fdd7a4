"""PrioritizedReplayBuffer: a ring of transitions and a table of priorities, under one lock."""

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from typing import Any, NamedTuple, Self, SupportsIndex

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from per_td import diagnostics, kernels, validation
from per_td.checkpoint import file as checkpoint
from per_td.checkpoint import state as states
from per_td.concurrency.mutex import Guard, Note, hold_in_forks
from per_td.concurrency.prefetch import Prefetcher
from per_td.copies import Copied
from per_td.draws import DRAWS
from per_td.errors import (
    CheckpointError,
    ConfigurationError,
    EmptyBufferError,
    PerTdError,
    PriorityError,
    SchemaError,
)
from per_td.memory import STORAGES, Memory
from per_td.priorities.sampling import sample_rows
from per_td.priorities.schedules import LinearSchedule, as_schedule
from per_td.priorities.selection import Selection
from per_td.priorities.table import PriorityTable, as_mode
from per_td.storage.frame_ring import make_ring
from per_td.storage.leaves import Leaves, entries_of
from per_td.storage.ring import RingStorage, as_mask

__all__ = ["Draw", "PrioritizedReplayBuffer"]


class Draw(NamedTuple):
    """Drawn transitions with their masses; see `PrioritizedReplayBuffer.draw_leaves`.

    Attributes:
        slot: slots of the transitions, int64 [B].
        leaves: copies of the transitions by key, [B, ...].
        generation: generations, for the later update, int64 [B].
        mass: masses, float32 [B].
        draw_count: number of draws of each transition, int32 [B]; None without `track_draws`.
    """

    slot: Tensor
    leaves: Leaves
    generation: Tensor
    mass: Tensor
    draw_count: Tensor | None = None


def _of_table(name: str, doc: str, *, choice: bool = True) -> Any:
    """A setting of the priorities; to change a choice drops the batches drawn ahead."""

    def change(self: "PrioritizedReplayBuffer", value: Any) -> None:
        self._change(name, value, choice=choice)

    return property(lambda self: getattr(self._priorities, name), change, doc=doc)


def _shown(value: float | Tensor) -> str:
    """Format a number, or one for each buffer: the first ones and the last."""
    if not isinstance(value, Tensor):
        return f"{value:g}"
    shown = [f"{number:g}" for number in value.tolist()]
    return f"[{', '.join(shown if len(shown) <= 4 else [*shown[:2], '...', shown[-1]])}]"


def _through(repair: Callable[[], None], tries: int = 100) -> None:
    """Call a repair, which may be done again, until no further interrupt ends it early."""
    try:
        repair()
    except BaseException:
        if tries == 1:
            raise
        _through(repair, tries - 1)


def _void_write(ring: RingStorage, table: PriorityTable, beta: Tensor, note: Note) -> None:
    """Void what a dead process was writing; derive all else from the raw priorities."""
    if note.active:
        # the ring goes past the slots: updates of what was there before are stale
        ring.set_count(note.written)
        table.void(note.runs)
    beta.clamp_(max=1.0)
    if not table.betas:
        beta.fill_(float(beta.view(-1)[0]))
    table.rebuild()
    table.retire(ring)


class PrioritizedReplayBuffer(Copied):
    """Replay buffer that draws transitions in proportion to priority^alpha.

    Prioritized experience replay as in Schaul et al. 2015 (arXiv 1511.05952). Transition i has the
    priority p_i = |TD error| + eps (section 3.3) and the mass p_i^alpha. It is drawn with the
    probability P(i) = p_i^alpha / sum_k p_k^alpha (equation 1). Its importance-sampling weight
    w_i = (N P(i))^-beta corrects the bias, where N is the number of transitions (section 3.4).

    `len(buffer)` is the number of transitions; with `num_buffers`, the smallest number in any
    buffer. The first transitions set the keys, nesting, shapes and dtypes of all later ones.

    You can set these attributes at any time: `alpha`, `beta`, `eps`, `batch_size`,
    `beta_increment`, `draw`, `method`, `weight_normalization`, `new_priority`, `priority_clip`,
    `uniform_mix`, `latest` and `generator`. They are checked as in the constructor. Setting another
    argument of the constructor raises `ConfigurationError`.

    Args:
        capacity: number of slots. When all are filled, the newest transition replaces the oldest.
        batch_size: default batch size of `sample`.
        alpha: exponent of the priorities, at least 0; 0 draws uniformly. None is the paper's value:
            0.6, or 0.7 with `prioritization="rank"`. With `num_buffers`, a tensor or a list may
            give one value for each buffer. Setting it later costs O(N).
        beta: exponent of the weights, in [0, 1]; 1 corrects the whole bias. With `num_buffers`, a
            tensor or a list may give one value for each buffer.
        eps: added to |TD error|. With 0, a transition whose TD error is 0 is never drawn again. A
            new value holds for later updates.
        beta_increment: added to beta by each call of `increase_beta`, at least 0.
        draw: "independent": with replacement. "stratified": splits the total mass into B equal
            segments and draws one transition from each. "without_replacement": B different
            transitions; their weights are still those of independent draws.
        method: "tree": an exact sum tree, O(log N) per draw. "multinomial": torch.multinomial, O(N)
            per batch, up to 2^24 slots. "auto": the faster one.
        weight_normalization: "batch" divides the weights by the largest in the batch, "buffer" by
            the largest that any transition in the buffer would get. "none" does not divide.
        new_priority: priority of new transitions. "buffer_max": the largest in the buffer.
            "ever_max": the largest that the buffer ever held. If there is none, 1.
        prioritization: "proportional", or "rank": P(i) in proportion to rank(i)^-alpha, where the
            transition with the largest priority has rank 1 (the paper's second variant). See
            docs/rank_based.md.
        sort_interval: with "rank", number of priority changes after which the ranks are made exact
            again. None: the number of transitions, and at least 256.
        device: device of transitions and priorities. None is torch's default device.
        generator: source of all random draws, on the device of the priorities. None is torch's own,
            which `torch.manual_seed` seeds. torch.compile cannot trace another generator, and
            breaks `sample` into several graphs.
        layout: how transitions lie in memory. "columns": one tensor per key. "records": one block,
            transition after transition, which needs fewer memory accesses per transition. "auto":
            the faster one for their size. The batches are equal: new tensors in each case.
        storage: memory of the transitions; priorities are always on the device. "memory": that of
            the device. "memmap": files on a disk, for more than fits in memory. "pinned": pinned
            memory of the host, for more than fits on a CUDA device. See docs/memory.md.
        folder: folder of the files of "memmap". None: the system's folder for temporary files. The
            files have no names and disappear with the buffer.
        example: one transition, a TensorDict of batch size []. With it, the buffer allocates memory
            at once; without it, at the first write.
        priority_clip: (low, high), of which one may be None. Updates set the priority
            clamp(|TD error| + eps, low, high). With (1.0, None), eps=0 and alpha=0.4, this is LAP
            (Fujimoto et al. 2020, arXiv 2007.06049). A new value holds for later updates.
        uniform_mix: share u of the draws that are uniform over all transitions of positive
            priority: P(i) = (1 - u) p_i^alpha / sum_k p_k^alpha + u / N.
        latest: the k newest transitions are the last k of every batch (combined experience replay,
            Zhang & Sutton 2017, arXiv 1712.01275). If the priority of one of these is 0, a draw
            takes its place.
        track_draws: count how often each transition was drawn. Batches then contain "draw_count",
            int32 [B], which includes the current draw.
        beta_schedule: a `LinearSchedule` of beta, counted in calls of `update_priority`; `beta` is
            not used then. None: beta changes by `increase_beta`, or when you set it.
        num_buffers: S makes S buffers of `capacity` slots each in one set of tensors, for S runs
            in lockstep. Every argument and result gets a leading dimension [S], and an index is a
            slot in its own buffer. Each buffer has its own slots, priorities, draws and divisor of
            the weights; the other settings and the counters are shared, except alpha and beta if
            set for each buffer. None: one buffer. Not with "rank" or `frames`. See
            docs/many_runs.md.
        shared: keep everything that changes in shared memory, for spawned processes that write and
            learn side by side. It needs an `example`, Linux, the device "cpu" and proportional
            priorities. Pass the buffer as an argument when you start a process. Each process has
            its own `batch_size`, `beta_increment`, `draw`, `method`, `uniform_mix`, `latest`,
            `priority_clip` and `generator`. The generator is not sent along: seed torch's own in
            each process. Draws with by="uniform" or with a `uniform_mix` need a `uniform_mix` in
            the constructor; draws with by="inverse" are refused. If a process is killed during a
            call, the next call repairs the buffer. A transition is written once `extend` returns;
            if its writer dies earlier, it is never drawn. See docs/processes.md.
        threads: allow several threads to call the buffer at the same time: each call holds one
            lock. A `shared` buffer allows it anyway. torch.compile cannot trace a lock.
        prefetch: number of batches of `batch_size` that a background thread draws ahead; implies
            `threads`. `sample` returns the oldest of them. Its transitions, weights and generations
            are those at the time of the draw, which was up to `prefetch` updates ago. Runs do not
            repeat exactly, since the timing decides which priorities a draw sees. `sample` raises
            errors of the thread. 0: none.
        frames: keep each frame of stacked observations once. Maps a key to the number of frames in
            a stack, such as {"pixels": 4}. You write whole stacks [n, 4, ...] at the key and at
            ("next", key), and batches contain the same stacks. The buffer looks for a frame in the
            last 32 writes of the same environment. If frames run out before slots do, as after many
            short episodes, the oldest transitions retire: they are never drawn again, and keep
            their slots until these are overwritten. Not with `num_buffers`. See docs/frames.md.
        num_envs: with `frames`, the number of environments that you write in turn. None is 1.
        num_frames: with `frames`, the number of frames kept for each key. None: 1.06 times the
            capacity, and one stack for each environment.

    Raises:
        ConfigurationError: an argument is not accepted.
        SchemaError: `example` is not one transition.
        AllocationError: there is not enough memory.
        DiskAllocationError: there is not enough space on the disk.

    Example:
        >>> buffer = PrioritizedReplayBuffer(1000, batch_size=4)
        >>> data = TensorDict({"x": torch.rand(10, 3)}, batch_size=[10])
        >>> index = buffer.extend(data)
        >>> batch = buffer.sample()
        >>> buffer.update_priority(batch["index"], torch.rand(4), batch["generation"])
        >>> batch["x"].shape
        torch.Size([4, 3])
        >>> buffers = PrioritizedReplayBuffer(1000, batch_size=4, num_buffers=2)
        >>> data = TensorDict({"x": torch.rand(2, 10, 3)}, batch_size=[2, 10])
        >>> index = buffers.extend(data)
        >>> running = torch.tensor([True, False])  # the second run has finished
        >>> buffers.add(data[:, 0], mask=running).tolist()
        [10, -1]
        >>> batch = buffers.sample()
        >>> buffers.update_priority(batch["index"], torch.rand(2, 4), batch["generation"])
        >>> len(buffers), buffers.lengths.tolist()
        (10, [11, 10])
    """

    _schedule: LinearSchedule | None = None

    @torch.inference_mode(False)
    def __init__(
        self,
        capacity: int,
        batch_size: int | None = None,
        *,
        alpha: float | Tensor | Sequence[float] | None = None,
        beta: float | Tensor | Sequence[float] = 0.4,
        eps: float = 1e-6,
        beta_increment: float = 0.0,
        draw: str = "independent",
        method: str = "auto",
        weight_normalization: str = "batch",
        new_priority: str = "buffer_max",
        prioritization: str = "proportional",
        sort_interval: int | None = None,
        priority_clip: tuple[float | None, float | None] | None = None,
        uniform_mix: float = 0.0,
        latest: int = 0,
        track_draws: bool = False,
        beta_schedule: LinearSchedule | None = None,
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
        frames: Mapping[Any, Any] | None = None,
        num_envs: int | None = None,
        num_frames: int | None = None,
    ) -> None:
        capacity = validation.positive_int("capacity", capacity)
        if num_buffers is not None:
            num_buffers = validation.positive_int("num_buffers", num_buffers)
            if prioritization != "proportional":
                raise ConfigurationError(
                    "prioritization: expected 'proportional' with"
                    f" num_buffers={num_buffers}, got {prioritization!r}: ranks are kept for one"
                    " buffer"
                )
        self._device = validation.resolve_device(device)
        memory = Memory(validation.one_of("storage", storage, STORAGES), folder)
        if validation.flag("shared", shared):
            self._require_shareable(memory, prioritization, example)
            memory = Memory("shared")
        self._guard: Guard | None = None
        self._busy = False
        self._ahead: Prefetcher | None = None
        self._prefetch = validation.integer("prefetch", prefetch, 0)
        self._threads = validation.flag("threads", threads) or self._prefetch > 0
        self.batch_size = batch_size
        self.generator = generator
        self.beta_increment = beta_increment
        self._schedule = as_schedule(beta_schedule)
        if self._schedule is not None and (self.beta_increment or shared):
            given = f"beta_increment={beta_increment:g}" if self.beta_increment else "shared=True"
            raise ConfigurationError(f"beta_schedule: expected None with {given}, got one")
        self._updates = memory.beside((), torch.int64, self.device)
        if self._schedule is not None:
            beta = self._schedule.start
        each = () if num_buffers is None else (num_buffers,)
        self._beta = memory.beside(each, torch.float64, self.device)
        beta = validation.real_or_each("beta", beta, num_buffers, high=1.0)
        self._stale = memory.beside((), torch.int64, self.device)
        self._priorities = PriorityTable(
            capacity,
            alpha=alpha,
            eps=eps,
            draw=draw,
            method=method,
            weight_normalization=weight_normalization,
            new_priority=new_priority,
            device=self.device,
            prioritization=prioritization,
            sort_interval=sort_interval,
            priority_clip=priority_clip,
            uniform_mix=uniform_mix,
            track_draws=track_draws,
            groups=num_buffers,
            memory=memory.beside,
        )
        self._set_beta(beta)
        self.latest = latest
        self._storage = make_ring(
            capacity,
            self.device,
            layout,
            memory,
            groups=num_buffers,
            reserved=() if self._priorities.draw_counts is None else ("draw_count",),
            frames=frames,
            num_envs=num_envs,
            num_frames=num_frames,
        )
        if shared:
            self._priorities.seal()
            repair = partial(_void_write, self._storage, self._priorities, self._beta)
            self._guard = Guard(num_buffers or 1, repair)
        self._take_up()
        if example is not None:
            try:
                self._storage.allocate(self._storage.check_example(example))
            except SchemaError as error:
                raise SchemaError(f"example: {error}") from error

    def _require_shareable(self, memory: Memory, prioritization: str, example: Any) -> None:
        """Refuse what processes cannot share."""
        for name, wanted, given in (
            ("storage", "memory", memory.storage),
            ("prioritization", "proportional", prioritization),
            ("device", "cpu", str(self.device)),
        ):
            if given != wanted:
                raise ConfigurationError(f"shared: expected {name}={wanted!r}, got {given!r}")
        if example is None:
            raise ConfigurationError(
                "example: expected a transition, with which to allocate shared memory, got none"
            )

    # --- lock, copies, processes ------------------------------------------------------------------

    def _take_up(self) -> None:
        """Make the lock and the prefetcher, which are each object's own."""
        if self._threads or self._guard is not None:
            kernels.prepare(self._device)
        own: AbstractContextManager[Any] = threading.RLock() if self._threads else nullcontext()
        self._lock = own if self._guard is None else self._guard
        if self._lock is own and self._threads:
            hold_in_forks(self, own, PrioritizedReplayBuffer._after_fork)
        draw = PrioritizedReplayBuffer._sample_now
        self._ahead = Prefetcher(self, draw, self._prefetch) if self._prefetch else None

    def _after_fork(self) -> None:
        """Make another lock and prefetcher in the child of a fork."""
        if self._ahead is not None:
            self._ahead.forget()
        self._take_up()

    def __getstate__(self) -> dict[str, Any]:
        own = {"_lock": None, "_ahead": None}
        return self.__dict__ | own | ({} if self._guard is None else {"_generator": None})

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._take_up()

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        with self._lock:
            if self._busy:
                raise self._at_work()
            if self._guard is not None:
                return object.__reduce_ex__(self, protocol)  # torch's reducers share the tensors
            return super().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        with self._lock:
            if self._busy:
                raise self._at_work()
            return super().__deepcopy__(memo)

    def close(self) -> None:
        """End the thread of `prefetch` and drop its batches; the next `sample` starts another.

        The thread also ends when the buffer is garbage-collected.
        """
        if self._ahead is not None:
            self._ahead.close()

    def _drop_ahead(self) -> None:
        """Drop the batches drawn with other settings, which were changed before this is called."""
        if self._ahead is not None:
            self._ahead.drop()

    # --- writing ----------------------------------------------------------------------------------

    def extend(
        self, transitions: Any, priority: Any = None, mask: Any = None, env: Any = None
    ) -> Tensor:
        """Write n transitions.

        Args:
            transitions: TensorDict or tensorclass of batch size [n] or [S, n], or a dict, also
                nested, of tensors or arrays of these shapes. If n exceeds the capacity, the last
                ones remain, as if you had added them one by one.
            priority: raw priorities, finite and not negative, in the shape of the batch. A
                transition of priority 0 is never drawn. None: as `new_priority` sets it.
            mask: with `num_buffers`, bool [S, n]. Nothing is written where it is False.
            env: with `frames`, the environment of each transition, integers [n]. None: all
                environments in turn, so that n is a multiple of `num_envs`.

        Returns:
            Slots of the transitions, int64 [n] or [S, n]; -1 where nothing was written.

        Raises:
            SchemaError: keys, shapes or dtypes differ from those of earlier transitions, an entry
                is not a tensor, or the batch size is not [n].
            AllocationError: the first transitions need more memory than there is. The buffer stays
                as it was, and accepts other transitions.
            DiskAllocationError: the same, for the space on a disk.
            PriorityError: `priority` has a wrong shape or dtype, or a value is NaN, infinite or
                negative. On CUDA, the priority of `new_priority` replaces such a value, and `stats`
                counts it.
            IndexRangeError: `env` is wrong.
            ConfigurationError: `mask` came without `num_buffers`.
        """
        with self._lock:
            leaves, n = self._storage.check(transitions)
            leaves = self._storage.with_env(leaves, n, env)
            return self._extend(leaves, n, priority, mask)

    def add(
        self, transition: Any, priority: Any = None, mask: Any = None, env: Any = None
    ) -> Tensor:
        """Write one transition.

        Args:
            transition: TensorDict of batch size [] or [S], or a dict of tensors.
            priority: raw priority, [] or [S]; see `extend`.
            mask: with `num_buffers`, bool [S]; see `extend`.
            env: with `frames`, the number of the environment.

        Returns:
            Slot of the transition, int64 [] or [S]; -1 where nothing was written. Errors are those
            of `extend`.
        """
        with self._lock:
            leaves, _ = self._storage.check(transition, batched=False)
            leaves = self._storage.with_env(leaves, 1, env)
            if self._storage.lead:
                if priority is not None:
                    given = validation.as_tensor("priority", priority, PriorityError)
                    priority = given.unsqueeze(-1)
                if mask is not None:
                    mask = validation.as_tensor("mask", mask, SchemaError).unsqueeze(-1)
            return self._extend(leaves, 1, priority, mask).squeeze_(-1)

    def extend_leaves(
        self, leaves: Leaves, priority: Any = None, mask: Any = None, env: Any = None
    ) -> Tensor:
        """Do the same as `extend` for leaves: tensors by key, where a key is a tuple of names."""
        with self._lock:
            leaves, n = self._storage.check_leaves(leaves)
            leaves = self._storage.with_env(leaves, n, env)
            return self._extend(leaves, n, priority, mask)

    def _extend(self, leaves: Leaves, n: int, priority: Any, mask: Any) -> Tensor:
        ring = self._storage
        if mask is not None:
            mask = self._as_mask(mask, (*ring.lead, n))
        if self._busy:
            raise self._at_work()
        index = ring.next_slots(n, mask)
        if priority is not None:
            priority = self._priorities.check_initial(priority, index, mask)
        if self._guard is not None:
            self._guard.note.begin(*ring.runs(n, mask))
        ring.begun = None
        try:
            self._busy = True
            self._write(leaves, n, index, priority, mask)
        except PerTdError:  # ours come before any writing
            raise
        except BaseException as error:  # an interrupt, say: what is written needs its priority
            validation.refuse_transform(error)
            if self._guard is None:
                _through(partial(self._write_again, leaves, n, index, priority, mask))
            raise
        finally:
            self._busy = False
        return index

    def _at_work(self) -> PerTdError:
        """Return the error of a call in the middle of another, where nothing fits together."""
        return PerTdError(
            "expected no call from within another call of the buffer, got one, such as from a"
            " signal handler, or from another thread: threads=True makes a buffer for several"
        )

    def _write(
        self, leaves: Leaves, n: int, index: Tensor, priority: Tensor | None, mask: Tensor | None
    ) -> None:
        """Write checked transitions and their priorities; to do it again changes nothing."""
        runs = self._storage.write(leaves, n, mask)
        if priority is None and runs is not None:
            self._priorities.write_runs(runs)
        else:
            self._priorities.write_new(index, priority, mask)
        self._priorities.retire(self._storage)

    def _write_again(
        self, leaves: Leaves, n: int, index: Tensor, priority: Tensor | None, mask: Tensor | None
    ) -> None:
        """Write all of what an interrupt left half written."""
        self._storage.take_back()
        self._priorities.rebuild()
        self._write(leaves, n, index, priority, mask)

    def _as_mask(self, mask: Any, shape: tuple[int, ...]) -> Tensor:
        if not self._storage.lead:
            raise ConfigurationError(
                f"mask: expected None, got {type(mask).__name__}: one buffer writes and updates all"
                " that it is given; a mask goes with num_buffers"
            )
        return as_mask(mask, shape, self.device)

    def empty(self) -> None:
        """Forget all transitions; updates of earlier batches are then stale.

        The memory, the keys, shapes and dtypes, the settings and the counters stay. The largest
        priority of "ever_max" is forgotten.

        Raises:
            ConfigurationError: the buffer is shared; other processes would not know which
                generations are stale.
        """
        if self._guard is not None:
            raise ConfigurationError(
                "empty: expected a buffer that is not shared, got one whose other processes would"
                " not know which generations are stale"
            )
        with self._at_rest():
            self._to_its_end(partial(self._forget, self.write_count))

    def _forget(self, write_count: int) -> None:
        self._storage.empty(write_count)
        self._priorities.empty()
        self._drop_ahead()

    def _to_its_end(self, change: Callable[[], None]) -> None:
        """Make a change that may be made again: an interrupt does not end it halfway."""
        try:
            change()
        except PerTdError:  # ours come before any change
            raise
        except BaseException:
            if self._guard is None:
                _through(change, 3)
            raise

    @contextmanager
    def _at_rest(self) -> Iterator[None]:
        """Hold the lock, and refuse calls from within."""
        with self._lock:
            if self._busy:
                raise self._at_work()
            try:
                self._busy = True
                yield
            finally:
                self._busy = False

    # --- drawing ----------------------------------------------------------------------------------

    def sample(
        self, batch_size: int | None = None, by: str = "priority", newest: int | None = None
    ) -> TensorDict:
        """Draw a batch; with `prefetch`, return the oldest batch drawn ahead.

        The weights always follow from the probabilities that were used. A transition of priority 0
        is never drawn. The first draw with by="uniform" or by="inverse" takes O(N): it makes trees
        that later changes keep up to date. At this draw, torch.compile breaks the graph.

        Args:
            batch_size: number of transitions B. None: that of the constructor.
            by: "priority": in proportion to the mass. "uniform": all transitions of positive
                priority are equally probable. "inverse": in proportion to 1 / mass (LA3P, Saglam
                et al. 2022, arXiv 2209.00532).
            newest: draw only from this number of newest transitions; N in the weights is then this
                number (ERE, Wang & Ross 2019, arXiv 1906.04009, section 5). None: draw from all.

        Returns:
            TensorDict [B], or [S, B] with `num_buffers`: copies of the transitions, and the entries
            "index" (slots, int64), "priority_weight" (weights, float32; section 3.4) and
            "generation" (int64), which tells a later update whether the slot was overwritten.
            With `track_draws` also "draw_count" (int32).

        Raises:
            ConfigurationError: there is no batch size, here or in the constructor; it is not larger
                than `latest`; or another argument is not accepted.
            EmptyBufferError: the buffer is empty, all priorities are 0, there are fewer transitions
                than `latest`, or fewer than B can be drawn without replacement.
        """
        usual = newest is None and isinstance(by, str) and by == "priority"
        if self._ahead is not None and usual and batch_size in (None, self._batch):
            batch = self._ahead.next()
            if batch_size is None or batch.shape[-1] == batch_size:  # or it has been set meanwhile
                return batch
        return self._sample_now(batch_size, None if usual else (by, newest))

    def _sample_now(
        self, batch_size: int | None = None, how: tuple[str, int | None] | None = None
    ) -> TensorDict:
        with self._lock:
            rows, index, weight, generation, count = self._drawn(batch_size, how)
            beside = {"priority_weight": weight, "index": index, "generation": generation}
            if count is not None:
                beside["draw_count"] = count
            return self._storage.batch(rows, beside)

    def sample_leaves(self, batch_size: int | None = None) -> tuple[Leaves, Tensor, Tensor]:
        """Draw as `sample` does, and return leaves: tensors by key, without a TensorDict.

        Args:
            batch_size: number of transitions B. None: that of the constructor.

        Returns:
            Copies of the transitions by key [B, ...], where a key is a tuple of names; slots int64
            [B]; weights float32 [B]. Errors are those of `sample`.
        """
        leaves, index, weight, _, _ = self._sample_leaves(batch_size)
        return leaves, index, weight

    def _sample_leaves(
        self, batch_size: int | None
    ) -> tuple[Leaves, Tensor, Tensor, Tensor, Tensor | None]:
        """`sample_leaves`, generations, and with `track_draws` counts of draws."""
        with self._lock:
            rows, index, weight, generation, count = self._drawn(batch_size)
            return self._storage.by_key(rows), index, weight, generation, count

    def draw_leaves(self, batch_size: int | None = None) -> Draw:
        """Draw for a part of a larger buffer: with masses in place of weights.

        The weights follow from the masses once the total mass of all parts is known. The same
        random numbers draw the same slots as in `sample`.

        Args:
            batch_size: number of transitions B. None: that of the constructor.

        Raises:
            ConfigurationError: `uniform_mix` or `latest` is not 0. Draws then do not follow the
                masses alone.
            EmptyBufferError: as `sample`.
        """
        with self._lock:
            if self._selection is not None:
                raise ConfigurationError(
                    f"draw_leaves: expected uniform_mix=0 and latest=0, got {self.uniform_mix:g}"
                    f" and {self.latest}: the masses do not give the weights then"
                )
            leaves, slot, _, generation, count = self._sample_leaves(batch_size)
            mass = self._priorities.mass.gather(-1, slot)
            return Draw(slot, leaves, generation, mass, count)

    def _drawn(
        self, batch_size: int | None, how: tuple[str, int | None] | None = None
    ) -> tuple[list[Tensor], Tensor, Tensor, Tensor, Tensor | None]:
        """Draw and count transitions.

        Returns:
            A tensor per key, slots, weights, generations, and counts of draws if they are kept.
        """
        n, ring, table, size = self._batch_size(batch_size), self._storage, self._priorities, None
        selection = self._selection
        if how is not None:
            selection = Selection.of(*how, self.latest, table.draw)
        if self._busy:
            raise self._at_work()
        if not ring.lead:
            size = len(ring)
            if not size:
                raise EmptyBufferError("expected transitions to sample from, got an empty buffer")
            if table.draw == "without_replacement" and n > size:
                raise EmptyBufferError(
                    f"expected batch_size <= {size}, the transitions in the buffer, to draw"
                    f" without replacement, got {n}"
                )
        elif not ring.columns:
            raise EmptyBufferError(
                "expected transitions to sample from in every buffer, got only empty ones"
            )
        try:
            self._busy = True
            rows, index, weight, generation = sample_rows(
                table, ring, n, self._generator, selection, beta=self._beta, size=size
            )
        except EmptyBufferError:
            if ring.lead and not (ring.written > 0).all():
                which = self._priorities.trees.which(ring.written == 0)
                raise EmptyBufferError(
                    f"expected transitions to sample from in every buffer, got empty ones{which}"
                ) from None
            raise
        except RuntimeError as error:
            validation.refuse_transform(error)
            raise
        finally:
            self._busy = False
        count = None if (counts := table.draw_counts) is None else counts.draw(index)
        generation = ring.in_batch(generation) if ring.epoch else generation
        return rows, index, weight, generation, count

    def sweep(self, batch_size: int) -> Iterator[TensorDict]:
        """Go once through all transitions that are stored now, in the order of their slots.

        Use it to compute all priorities again. If you write during the sweep, a batch may hold a
        new transition in place of the one that it replaced. Its "generation" shows this. With
        `frames`, transitions that have retired are left out.

        Args:
            batch_size: number of transitions in each batch; the last batch may be smaller, and with
                `frames` others too.

        Yields:
            TensorDict [B] or [S, B]: copies of the transitions, "index" and "generation", int64.
            With `num_buffers` also "filled", bool [S, B], False where a buffer has no transition in
            the slot. Hand it to `update_priority` as `mask`.

        Raises:
            ConfigurationError: the batch size is not a positive integer.
            SchemaError: with `num_buffers`, the transitions have a key "filled" of their own.
        """
        batch_size = validation.positive_int("batch_size", batch_size)
        with self._lock:
            if self._busy:
                raise self._at_work()
            if self._storage.lead and ("filled",) in self._storage.filled():
                raise SchemaError("'filled' is a key of the transitions: sweep() adds another")
            return self._swept(batch_size, self.lengths)

    @torch.no_grad()
    def _swept(self, batch_size: int, lengths: Tensor) -> Iterator[TensorDict]:
        """Yield the batches of `sweep`, of rings that were filled so far."""
        end = int(lengths.max())
        for start in range(0, end, batch_size):
            with self._lock:
                if self._busy:
                    raise self._at_work()
                slot = self._storage.slots(start, min(start + batch_size, end))
                if not len(slot):
                    continue
                index = slot.expand(*self._storage.lead, -1).contiguous()
                rows, generation = self._storage.gather(index)
                beside = {"index": index, "generation": self._storage.in_batch(generation)}
                if self._storage.lead:
                    beside["filled"] = index < lengths.unsqueeze(-1)
                batch = self._storage.batch(rows, beside)
            yield batch

    def _batch_size(self, batch_size: int | None) -> int:
        """That asked for, or that of the constructor."""
        n = self.batch_size if batch_size is None else batch_size
        if n is None:
            raise ConfigurationError(
                "batch_size: expected one in sample() or in the constructor, got none"
            )
        return validation.positive_int("batch_size", n)

    def generation_of(self, index: Any) -> Tensor:
        """Return the generations that these slots have now.

        Args:
            index: slots, integers [B] or [S, B].

        Returns:
            int64, in the shape of `index`. For a slot that holds no transition, the generation is
            smaller than any in a batch drawn now.

        Raises:
            IndexRangeError: there is no such slot (on the CPU).
        """
        index = validation.as_index(index, self.device, lead=self._storage.lead)
        if validation.can_raise(index):
            validation.require_slots(index, self.capacity, what="the slots")
        with self._lock:
            return self._storage.in_batch(self._storage.generation(index))

    # --- updating ---------------------------------------------------------------------------------

    def update_priority(
        self,
        index: Any,
        td_error: Any,
        generation: Any = None,
        mask: Any = None,
        mode: str = "set",
        rate: float = 1.0,
    ) -> None:
        """Set priorities to |td_error| + eps (section 3.3), within `priority_clip`.

        Args:
            index: slots, integers [B] or [S, B], as in the batch. If a slot occurs twice, its last
                update holds.
            td_error: raw TD errors, in the shape of `index`, or [B, 1]. Sign and gradient do not
                matter.
            generation: "generation" of the batch, in the shape of `index`. If a slot was
                overwritten after the draw, its update is stale: it is dropped and counted in
                `stats`. None: no update is dropped. A shared buffer needs it.
            mask: with `num_buffers`, bool [S, B]. Where it is False, nothing is changed, checked or
                counted.
            mode: "set": the new priority. "max": max(new, rate * old), so that priorities decay
                (PSER, Brittain et al. 2019, arXiv 1905.12726). "mean": old + rate * (new - old), a
                moving mean.
            rate: factor of "max" and "mean", in [0, 1].

        Raises:
            IndexRangeError: an index does not name a filled slot. Nothing is written.
            PriorityError: a TD error is NaN or infinite, or the shape or dtype is wrong. Nothing
                is written. On CUDA and under torch.compile, single invalid values are refused and
                counted in `stats` instead: a check of values would make the host wait.
            ConfigurationError: there is no such mode, or a rate came with "set".
        """
        self._set(index, td_error, generation, mask, as_mode(mode, rate))
        self._count_update()

    def set_priority(
        self, index: Any, priority: Any, generation: Any = None, mask: Any = None
    ) -> None:
        """Set raw priorities as they are: without eps and not clipped; 0 is never drawn.

        Args:
            index: slots, integers [B] or [S, B].
            priority: finite and not negative, in the shape of `index`.
            generation, mask: see `update_priority`.

        Raises:
            IndexRangeError: as `update_priority`.
            PriorityError: as `update_priority`; a negative priority is refused like NaN.
        """
        self._set(index, priority, generation, mask, {"mode": "exact"})

    def _set(
        self,
        index: Any,
        value: Any,
        generation: Any,
        mask: Any,
        how: dict[str, Any],
    ) -> None:
        """Check slots, and change their priorities; `how` are arguments for the table."""
        ring = self._storage
        with self._lock:
            index = validation.as_index(index, self.device, lead=ring.lead)
            if generation is not None:
                generation = validation.as_index(
                    generation, self.device, "generation", lead=ring.lead
                )
                generation = ring.in_ring(generation) if ring.epoch else generation
            elif self._guard is not None:  # else a slot that others have written since could get it
                raise PriorityError(
                    "generation: expected that of the batch, which a shared buffer needs, got None"
                )
            generation = ring.of_living(index, generation)
            if mask is not None:
                mask = self._as_mask(mask, index.shape)
            before: Tensor | int = 0
            if ring.epoch and generation is not None:
                mask, before = self._since_the_epoch(index, generation, mask)
            if self._busy:
                raise self._at_work()
            try:
                self._busy = True
                stale = before + self._priorities.update(
                    index, value, written=ring.written, generation=generation, mask=mask, **how
                )
            except PerTdError:  # ours come before any writing
                raise
            except BaseException as error:  # an interrupt, say
                validation.refuse_transform(error)
                _through(self._priorities.rebuild)
                raise
            finally:
                self._busy = False
            if isinstance(stale, Tensor) or stale:
                self._stale += stale

    def _since_the_epoch(
        self, index: Tensor, generation: Tensor, mask: Tensor | None
    ) -> tuple[Tensor | None, Tensor | int]:
        """Mask updates from before all slots changed hands, whose slots may not be filled now.

        Returns:
            The mask, like `index`, or None if nothing is masked; and the number of those updates.
        """
        validation.require_same_shape("generation", generation, index)
        old = generation < 0 if mask is None else (generation < 0) & mask
        if validation.can_raise(old) and not old.any():
            return mask, 0
        return ~old if mask is None else mask & ~old, old.sum()

    def update_tensordict_priority(self, batch: Any) -> None:
        """Call `update_priority` with entries of a batch.

        Args:
            batch: TensorDict [B] or [S, B] with "index", "td_error" and, if you have it,
                "generation".

        Raises:
            SchemaError: the batch has no "index" or no "td_error".
            IndexRangeError, PriorityError: as `update_priority`.
        """
        index, td_error = entries_of(batch, "index", "td_error")
        self.update_priority(index, td_error, batch.get("generation", None))

    def count_stale(self, updates: int) -> None:
        """Add to the count of stale updates in `stats`, for updates that you dropped yourself.

        Args:
            updates: number of updates, at least 0.

        Raises:
            ConfigurationError: it is negative or not an integer.
        """
        with self._lock:
            self._stale += validation.integer("updates", updates, 0)

    def _count_update(self) -> None:
        """Set the beta of the schedule, if there is one, after one more update."""
        if self._schedule is not None:
            with self._lock:
                self._updates += 1
                self._beta.copy_(self._schedule.at(self._updates))

    def increase_beta(self) -> None:
        """Add `beta_increment` to beta, up to 1; beta grows to 1 over training (section 3.4).

        Call it once per episode. In the study docs/cartpole_study.md, 0.001 per episode did better
        than uniform replay with a probability of 0.85. Called at every gradient step, beta was 1
        after 600 steps, and the probability was 0.29. Use a `beta_schedule` to count in updates.

        Raises:
            ConfigurationError: there is a `beta_schedule`.
        """
        with self._lock:
            if self._schedule is not None:
                raise ConfigurationError("increase_beta: expected no beta_schedule, got one")
            self._beta.add_(self.beta_increment).clamp_(max=1.0)

    # --- settings ---------------------------------------------------------------------------------

    capacity: int = validation.fixed(
        "capacity",
        lambda self: self._storage.capacity,
        "load() and load_state_dict() move a state into a buffer of another capacity",
    )
    """Number of slots."""

    device: torch.device = validation.fixed(
        "device", lambda self: self._device, "load(path, device=...) makes a buffer elsewhere"
    )
    """Device of batches and priorities."""

    prioritization: str = validation.fixed(
        "prioritization", lambda self: self._priorities.prioritization
    )
    """Distribution of the draws: "proportional" or "rank"."""

    sort_interval: int | None = validation.fixed(
        "sort_interval", lambda self: self._priorities.sort_interval
    )
    """With "rank", how many priorities change before the ranks are exact again."""

    num_buffers: int | None = validation.fixed(
        "num_buffers", lambda self: self._storage.num_buffers
    )
    """Number of buffers side by side; None: one, without a dimension [S]."""

    frames: Any = validation.fixed("frames", lambda self: self._storage.arguments.get("frames"))
    """Number of frames in a stack, by key; None: transitions hold whole stacks."""

    num_envs: int | None = validation.fixed(
        "num_envs", lambda self: self._storage.arguments.get("num_envs")
    )
    """Number of environments whose frames are kept; None without `frames`."""

    layout: str = validation.fixed("layout", lambda self: self._storage.layout)
    """Layout of the transitions in memory; "auto" until the first of them is seen."""

    prefetch: int = validation.fixed("prefetch", lambda self: self._prefetch)
    """Number of batches drawn ahead."""

    epsilon = validation.fixed("epsilon", instead="expected eps, which can be set")

    alpha: Any = _of_table(
        "alpha",
        "Exponent of the priorities: a number, or float64 [S], a copy on the buffer's device, if"
        " you set one for each buffer. Setting it costs O(N).",
        choice=False,
    )
    eps: float = _of_table("eps", "Added to |TD error| by later updates.", choice=False)
    draw: str = _of_table("draw", "Way to draw; see the constructor.")
    method: str = _of_table("method", "Method of the draws; see the constructor.")
    weight_normalization: str = _of_table(
        "weight_normalization", 'Divisor of the weights; setting "buffer" costs O(N).'
    )
    new_priority: str = _of_table("new_priority", "Priority of new transitions that bring none.")
    priority_clip: tuple[float | None, float | None] | None = _of_table(
        "priority_clip", "Bounds of the priorities that later updates set.", choice=False
    )
    uniform_mix: float = _of_table(
        "uniform_mix",
        "Share of uniform draws; setting it drops the batches drawn ahead.",
        choice=False,
    )

    @property
    def latest(self) -> int:
        """Number of newest transitions in every batch; may be set at any time."""
        return self._latest

    @latest.setter
    def latest(self, value: int) -> None:
        value = validation.integer("latest", value, 0)
        if value > self._priorities.capacity:
            raise ConfigurationError(
                f"latest: expected at most the capacity {self._priorities.capacity}, got {value}"
            )
        Selection.of("priority", None, value, self.draw)
        self._latest = value
        self._select()
        self._drop_ahead()

    def _select(self) -> None:
        """Note the way to draw; None for the usual one, which then costs no look at others."""
        usual = not self._latest and not self._priorities.uniform_mix
        self._selection = None if usual else Selection(latest=self._latest)

    track_draws: bool = validation.fixed(
        "track_draws", lambda self: self._priorities.draw_counts is not None
    )
    """True if draws are counted."""

    beta_schedule: LinearSchedule | None = validation.fixed(
        "beta_schedule", lambda self: self._schedule
    )
    """Schedule that beta follows, or None."""

    def _change(self, name: str, value: Any, *, choice: bool) -> None:
        """Set a setting of the priorities."""
        if self._guard is not None and name in ("weight_normalization", "new_priority"):
            raise ConfigurationError(
                f"{name}: expected no change once a shared buffer is made, got {value!r}: other"
                " processes would not know; the constructor takes it"
            )
        with self._at_rest():
            try:
                if choice:
                    if name == "draw":
                        draw = validation.one_of("draw", value, DRAWS)
                        Selection.of("priority", None, self._latest, draw)
                    self._priorities.choose(**{name: value})
                else:
                    setattr(self._priorities, name, value)
                if choice or name == "uniform_mix":
                    self._select()
                    self._drop_ahead()
            except PerTdError:
                raise
            except BaseException:  # an interrupt, say
                _through(self._priorities.rebuild)
                raise

    @property
    def batch_size(self) -> int | None:
        """Default for `sample`; may be set at any time."""
        return self._batch

    @batch_size.setter
    def batch_size(self, value: int | None) -> None:
        if value is None and self._prefetch:
            raise ConfigurationError("batch_size: expected one beside prefetch, got None")
        self._batch = None if value is None else validation.positive_int("batch_size", value)
        self._drop_ahead()

    @property
    def generator(self) -> torch.Generator | None:
        """Source of all random draws, None for torch's own; may be set at any time."""
        return self._generator

    @generator.setter
    def generator(self, value: torch.Generator | None) -> None:
        self._generator = validation.as_generator(value, self._device)
        self._drop_ahead()

    @property
    def beta_increment(self) -> float:
        """Added to beta by `increase_beta`, at least 0; may be set at any time."""
        return self._beta_increment

    @beta_increment.setter
    def beta_increment(self, value: float) -> None:
        value = validation.real("beta_increment", value)
        if value and self._schedule is not None:
            raise ConfigurationError(
                f"beta_increment: expected 0 with a beta_schedule, got {value:g}"
            )
        self._beta_increment = value

    @property
    def beta(self) -> Any:
        """Exponent of the weights, in [0, 1]; may be set at any time.

        It is a number, or float64 [S], a copy on the buffer's device, if you set one for each
        buffer. With a `beta_schedule`, you cannot set it.
        """
        each = self._priorities.betas
        return self._beta.clone() if each else float(self._beta.view(-1)[0])

    @beta.setter
    def beta(self, value: float | Tensor | Sequence[float]) -> None:
        if self._schedule is not None:
            raise ConfigurationError(f"beta: expected that of the beta_schedule, got {value!r}")
        checked = validation.real_or_each("beta", value, self.num_buffers, high=1.0)
        with self._lock:
            self._set_beta(checked)

    def _set_beta(self, value: float | Tensor) -> None:
        # `betas` is True while they may differ
        if isinstance(value, Tensor):
            self._priorities.betas = True
            self._beta.copy_(validation.to_device(value, self._device))
        else:
            self._beta.fill_(value)
            self._priorities.betas = False

    # --- views ------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._storage)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({len(self)} of {self.capacity} slots, device={self.device},"
            f" alpha={_shown(self.alpha)}, beta={_shown(self.beta)}, eps={self.eps:g},"
            f" draw={self.draw!r}"
            f"{f', num_buffers={self.num_buffers}' if self.num_buffers else ''})"
        )

    @property
    def lengths(self) -> Tensor:
        """Number of filled slots, int64 [], or [S] with `num_buffers`."""
        return self._storage.lengths

    @property
    def nbytes(self) -> int:
        """Bytes of memory, or of files, that transitions and priorities take."""
        return self._storage.nbytes + self._priorities.nbytes

    @property
    def write_count(self) -> int:
        """Number of transitions ever written."""
        return self._storage.write_count

    @property
    def priority(self) -> Tensor:
        """Raw priorities, float32, a copy: those of the filled slots [len], or [S, capacity]."""
        with self._lock:
            return self._priorities.raw[self._storage.shown].clone()

    @property
    def mass(self) -> Tensor:
        """Masses, priority^alpha, float32, a copy, in the shape of `priority`.

        The probability of a draw is in proportion to the mass.
        """
        with self._lock:
            return self._priorities.mass[self._storage.shown].clone()

    @property
    def total_mass(self) -> Tensor:
        """Sum of all masses, float64 [] or [S]; if it is 0, nothing can be drawn."""
        with self._lock:
            return self._priorities.total.clone()

    @property
    def smallest_mass(self) -> Tensor:
        """The smallest positive mass, float32 [] or [S]; inf if there is none.

        It is kept only while `weight_normalization` is "buffer", and is inf otherwise.
        """
        with self._lock:
            return self._priorities.smallest.clone()

    @property
    def replayed(self) -> Tensor:
        """True for transitions that have been drawn since they were written, bool [len], a copy.

        Raises:
            ConfigurationError: the buffer has `num_buffers`, and does not record this.
        """
        with self._lock:
            self._require_one("replayed")
            return self._priorities.replayed[: len(self)].clone()

    @property
    def draw_count(self) -> Tensor:
        """Number of draws of each transition, int32, a copy, in the shape of `priority`.

        Raises:
            ConfigurationError: the buffer was made without `track_draws`.
        """
        counts = self._priorities.draw_count
        if counts is None:
            raise ConfigurationError(
                "draw_count: expected a buffer with track_draws=True, got one with False"
            )
        with self._lock:
            return counts[self._storage.shown].clone()

    def _require_one(self, name: str) -> None:
        if self._storage.lead:
            raise ConfigurationError(
                f"{name}: expected one buffer, got num_buffers={self.num_buffers}"
            )

    @property
    def kernels(self) -> bool:
        """True if the buffer uses compiled kernels for the CPU, False if plain torch."""
        return self._priorities.trees.compiled

    @property
    def transitions(self) -> TensorDict | None:
        """The transitions, a TensorDict [len] or [S, capacity] in the buffer's own memory.

        Do not write to it. It is locked: it accepts no other keys. None before any data. Buffer s
        is filled up to `lengths[s]`. With `frames`, all stacks are copied; those of a transition
        that has retired, whose priority is 0, hold frames of others.
        """
        data = self._storage.data
        return None if data is None else data[self._storage.shown].lock_()

    def filled_leaves(self) -> Leaves:
        """Return the transitions by key, [len, ...], in the buffer's memory; frames are copied."""
        return self._storage.filled()

    @torch.no_grad()
    def check_valid(self) -> None:
        """Check that the parts of the buffer agree, for tests and bug reports.

        It takes O(N), or O(N log N) with "rank", and on CUDA the host waits. A shared buffer first
        repairs what a killed process left.

        Raises:
            PerTdError: it names what is broken. Priorities must be finite, not negative, and 0
                beyond the filled slots. Masses, sums and extrema must follow from them, and counts
                must agree.
        """
        with self._lock:
            guard = self._guard
            validation.require_valid(
                guard is None or not guard.note.active, "no note of a write is left"
            )
            require, table, lengths = validation.require_valid, self._priorities, self.lengths
            self._storage.check_valid()
            table.check_valid()
            slot = torch.arange(self.capacity, device=self.device)
            empty = slot >= lengths.unsqueeze(-1)
            beyond = (table.raw.bool() & empty).any()
            require(not beyond, "priorities beyond the filled slots are 0")
            beta = self._beta
            require(((beta >= 0) & (beta <= 1)).all(), "beta is in [0, 1]")
            alike = table.betas or (beta == beta.view(-1)[0]).all()
            require(alike, "beta is one number unless each buffer has its own")
            require(self._stale >= 0, "the count of stale updates is at least 0")

    def stats(self) -> dict[str, int]:
        """Return counters since the start.

        Returns:
            "written": transitions ever written. "stale_updates": updates dropped because the slot
            had been overwritten. "refused_priorities": invalid priorities that were refused, on
            CUDA and under torch.compile; elsewhere they raise. With `frames`, "retired":
            transitions whose frames made room for others; their updates are stale. With `shared`,
            "repairs": repairs after a process died during a call.
        """
        repairs = {} if self._guard is None else {"repairs": self._guard.repairs}
        return {
            "written": self.write_count,
            "stale_updates": int(self._stale),
            "refused_priorities": int(self._priorities.refused),
            **self._storage.counts(),
            **repairs,
        }

    @torch.no_grad()
    def diagnostics(self) -> dict[str, Tensor]:
        """Measure prioritization, for a logger. See docs/diagnostics.md for how to read it.

        It sorts all priorities and masses: call it now and then, not at every step.

        Returns:
            Tensors [] on the buffer's device, or [S] with `num_buffers`, always with the same keys.
            The host does not wait. In float32: the effective sample size of the draws, the share
            of draws that fall on the top 1 % of slots, the share of transitions never replayed
            (with `num_buffers`, it needs `track_draws`), and quantiles of priority, weight and age,
            with `track_draws` also of the number of draws ("priority/min", "/q01", "/q25", "/q50",
            "/q75", "/q99", "/max"), and "beta". A value that does not exist is NaN, as in an empty
            buffer. "size" is int64. Two are always [], int64: "stale_updates" and
            "refused_priorities".
        """
        with self._lock:
            table, ring = self._priorities, self._storage
            shown, counts = ring.shown, table.draw_count
            counts = None if counts is None else counts[shown]
            if ring.lead:
                slot = torch.arange(self.capacity, device=self.device)
                filled = slot < ring.lengths.unsqueeze(-1)
                replayed = None if counts is None else counts > 0
            else:
                filled, replayed = None, table.replayed[shown]
            return {
                **diagnostics.measure(
                    priority=table.raw[shown],
                    mass=table.mass[shown],
                    filled=filled,
                    replayed=replayed,
                    draw_count=counts,
                    written=ring.ring_count(),
                    beta=self._beta,
                    normalization=table.weight_normalization,
                    uniform_mix=table.uniform_mix,
                ),
                "beta": self._beta.float(),
                "stale_updates": self._stale.clone(),
                "refused_priorities": table.refused.clone(),
            }

    # --- states -----------------------------------------------------------------------------------

    def _state(self, *, copy: bool) -> dict[str, Any]:
        schedule = self._schedule
        own = {
            "batch_size": self.batch_size,
            "beta_increment": self.beta_increment,
            "latest": self.latest,
            "beta_schedule": None if schedule is None else asdict(schedule),
        }
        return states.state_of(self._parts, own, copy=copy)

    @property
    def _parts(self) -> states.Parts:
        return states.Parts(
            self._storage,
            self._priorities,
            self._beta,
            self._stale,
            self._updates,
            self._generator,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of the whole state, which `torch.load(weights_only=True)` can read.

        It holds tensors and plain values: transitions, priorities, counters, settings and the
        state of the generator.
        """
        with self._at_rest():
            return self._state(copy=True)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state: transitions, priorities, counters, generator, and some settings.

        Those settings are alpha, beta, eps, `beta_increment`, `priority_clip` and `uniform_mix`. If
        a state of an older version lacks the last two, they stay as they are. All other settings
        stay.

        A `beta_schedule` of this buffer goes on from the number of updates in the state.

        If the state has another capacity, the newest transitions that fit are kept, with their
        priorities and in their order. If one of them moves to another slot, updates with
        generations from earlier batches are stale.

        Args:
            state: result of `state_dict` of a buffer on any device. The state of a generator on
                another kind of device becomes the seed of this buffer's generator.

        Raises:
            CheckpointError: it is not such a state, or has another number of buffers. For a shared
                buffer also: the state has, or once had, another capacity. Other processes would not
                know which transitions moved.
            SchemaError: its transitions do not fit those of this buffer.
        """
        checked = states.check(state)

        def take_over() -> None:
            states.restore(self._parts, checked)
            self._select()
            if self._schedule is None:
                self.beta_increment = checked["settings"]["beta_increment"]
            else:
                self._beta.copy_(self._schedule.at(self._updates))
                self._priorities.betas = False  # the state may hold one for each buffer
            self._drop_ahead()

        with self._at_rest():
            if self._guard is not None:
                self._begin_load(checked, self._guard.note)
            self._to_its_end(take_over)

    def _begin_load(self, state: dict[str, Any], note: Note) -> None:
        """Note a write to all slots: if the process dies meanwhile, nothing can be drawn."""
        ring, capacity = self._storage, state["settings"]["capacity"]
        if capacity != ring.capacity or state.get("epoch", 0):
            raise CheckpointError(
                f"expected a state that always had the capacity {ring.capacity}, which a shared"
                f" buffer needs, got one of {capacity}"
            )
        note.begin(*ring.runs(ring.capacity))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the whole state, also that of the generator, to a file.

        The file is written as a whole or not at all. It has a checksum and contains no pickled
        code. The transitions are not copied in memory. See docs/saving.md.

        Args:
            path: the file; one that exists is replaced.

        Raises:
            OSError: it cannot be written, as on a full disk; the old file stays.
        """
        self._save(path, {})

    def _save(self, path: str | os.PathLike[str], beside: dict[str, Any]) -> None:
        """`save`, with more entries of the state that this buffer itself does not read."""
        with self._at_rest():
            checkpoint.write(path, self._state(copy=False) | beside)

    def restore(self, path: str | os.PathLike[str]) -> None:
        """Read a file that `save` wrote into this buffer, as `load_state_dict` does.

        Capacity, draw, device, memory and lock of this buffer stay.

        Args:
            path: the file.

        Raises:
            CheckpointError: the file is truncated, damaged, of another kind, or of a later version
                of per_td; or its state does not fit this buffer, see `load_state_dict`.
            SchemaError: its transitions do not fit those of this buffer.
            FileNotFoundError: there is no such file.
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
        shared: bool = False,
        threads: bool = False,
        prefetch: int = 0,
    ) -> Self:
        """Make a new buffer with the settings and the state in a file that `save` wrote.

        `restore` reads a file into an existing buffer.

        Args:
            path: the file.
            capacity: another capacity than the saved one; see `load_state_dict`. None: the saved
                one.
            device: device of the buffer. None is torch's default device.
            generator: takes over the state of the saved generator, if there was one. None: a new
                generator takes it over. In both cases the draws go on as they would have.
            storage, folder, shared, threads, prefetch: as in the constructor; a file does not hold
                them.

        Raises:
            CheckpointError: the file is truncated, damaged, of another kind, or of a later version
                of per_td. Or `shared` is True, and the saved buffer had no transitions yet.
            FileNotFoundError: there is no such file.
        """
        return cls._of_state(
            states.check(checkpoint.read(path, states.FORMAT)),
            capacity=capacity,
            device=device,
            generator=generator,
            storage=storage,
            folder=folder,
            shared=shared,
            threads=threads,
            prefetch=prefetch,
        )

    @classmethod
    def _of_state(
        cls,
        state: dict[str, Any],
        *,
        capacity: int | None = None,
        device: torch.device | str | int | None = None,
        generator: torch.Generator | None = None,
        shared: bool = False,
        **others: Any,
    ) -> Self:
        """Make a buffer of a checked state; the arguments are those of `load`."""
        device = validation.resolve_device(device)
        if generator is None and state["generator"] is not None:
            generator = torch.Generator(device)
        example = states.example_of(state) if shared else None
        if shared and example is None:
            raise CheckpointError(
                "expected a state that knows the keys of its transitions, with which to allocate"
                " shared memory, got one without any: make a shared buffer with an example, and"
                " read the file with restore()"
            )
        settings = state["settings"] | ({} if capacity is None else {"capacity": capacity})
        make: Callable[..., Self] = cls  # a buffer, whose constructor takes more than this one's
        buffer = make(
            **settings,
            device=device,
            generator=generator,
            shared=shared,
            example=example,
            **others,
        )
        buffer.load_state_dict(state)
        return buffer

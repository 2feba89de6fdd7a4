"""SharedReplayBuffer: one buffer in shared memory, for several processes that write and learn."""

from multiprocessing.context import get_spawning_popen
from types import TracebackType
from typing import Any, SupportsIndex

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from per_td import validation
from per_td.buffer import MANY_ALONE
from per_td.checkpoint import state as states
from per_td.concurrency.mutex import RobustMutex
from per_td.concurrency.threads import LockedReplayBuffer
from per_td.errors import CheckpointError, ConfigurationError, PerTdError, PriorityError
from per_td.memory import allocating
from per_td.priorities.table import PriorityTable
from per_td.storage.leaves import Leaves, count, flattened, nested
from per_td.storage.ring import RingStorage

__all__ = ["SharedReplayBuffer"]


def _share(*tensors: Tensor) -> None:
    """Move tensors to shared memory, each to the beginning of its own.

    `Tensor.share_memory_` would keep the distance from the storage's beginning, by which
    `per_td.memory.zeros` has put groups of 16 leaves into one cache line.
    """
    size = sum(tensor.numel() * tensor.itemsize for tensor in tensors)
    with allocating("shared memory (/dev/shm)", size, "Take a smaller capacity"):
        for tensor in tensors:
            tensor.set_(tensor.clone(memory_format=torch.contiguous_format).share_memory_())  # type: ignore[no-untyped-call]


class Journal:
    """What is being written, in shared memory: for whoever finds that the writer has died."""

    def __init__(self) -> None:
        # slots being written, the first of them, the write count after that; repairs so far; calls,
        # one within the other, that hold the lock; whether one has begun that has not ended well
        self._tensor = torch.zeros(6, dtype=torch.int64, device="cpu")
        self._tensor.share_memory_()  # type: ignore[no-untyped-call]
        self.page = self._tensor.numpy()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.page = self._tensor.numpy()  # not the copy that was sent

    def note(self, start: int, n: int, written: int) -> None:
        """Before the first of `n` slots from `start` on is written, unless a note covers it.

        Args:
            start, n: the slots, around the end of the ring, also more than once.
            written: the write count after that.
        """
        if not self.page[0]:
            self.page[1:3] = start, written
            self.page[0] = n  # last: a note that is half written does not count

    def wipe(self) -> None:
        """After the last."""
        self.page[0] = 0


class SharedRing(RingStorage):
    """A `RingStorage` in shared memory; how much was written is in there too."""

    def __init__(self, capacity: int, device: torch.device, layout: str, journal: Journal) -> None:
        super().__init__(capacity, device, layout)
        self._journal = journal
        self._advice = "Take a smaller capacity"  # files are not shared
        _share(self._write_count)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_like": []}

    @property
    def _written(self) -> int:
        return int(self._write_count.item())

    @_written.setter
    def _written(self, value: int) -> None:
        """`_count` sets the tensor as well."""

    def allocate(self, leaves: Leaves) -> None:
        """As `RingStorage.allocate`."""
        if self._columns:
            return
        super().allocate(leaves)
        if self._block is None:
            _share(*self._columns.values())
        else:
            _share(self._block)
            self._columns = self._views(self._block)

    def write(self, leaves: Leaves, n: int | None = None) -> tuple[int, int]:
        """As `RingStorage.write`, with a note in the journal."""
        n = count(leaves) if n is None else n
        self._journal.note(self._written % self.capacity, n, self._written + n)
        return super().write(leaves, n)


class SharedTable(PriorityTable):
    """A `PriorityTable` in shared memory; alpha and eps are in there too."""

    def __init__(self, capacity: int, **settings: Any) -> None:
        super().__init__(capacity, **settings)
        _share(self._settings, self._raw, self.masses.leaves, self.masses.nodes)
        _share(self._largest.nodes, self.ever_max, self._replayed, self.refused)
        if self._smallest is not None:
            _share(self._smallest.nodes)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_points": torch.empty(0, dtype=torch.float64, device="cpu")}

    @property
    def _alpha(self) -> float:
        return float(self._settings[0].item())

    @_alpha.setter
    def _alpha(self, value: float) -> None:
        self._settings[0] = value

    @property
    def _eps(self) -> float:
        return float(self._settings[1].item())

    @_eps.setter
    def _eps(self, value: float) -> None:
        self._settings[1] = value

    def void(self, start: int, n: int) -> None:
        """Take away the priority of `n` slots from `start` on and around the ring."""
        index = torch.arange(start, start + n, device="cpu").remainder_(self.capacity)
        self._raw[index] = 0.0
        self.replayed[index] = False

    def rebuild(self) -> None:
        """Masses, sums and extrema anew from the raw priorities, in O(N)."""
        self._largest.refresh_all()
        self._refill()


class Guard:
    """The lock of a shared buffer, and the repair of what a dead holder left behind.

    Who dies while writing transitions has not acknowledged them: they are given up. Where they
    would have been is in the journal. All else follows from the raw priorities.
    """

    def __init__(
        self, journal: Journal, ring: SharedRing, table: SharedTable, beta: Tensor
    ) -> None:
        self._journal, self._ring, self._table, self._beta = journal, ring, table, beta
        self._mutex = RobustMutex()

    def __getstate__(self) -> dict[str, Any]:
        if get_spawning_popen() is None:
            raise ConfigurationError(
                "expected a shared buffer to be handed to a process when that is started, got an"
                " attempt to copy or to pickle it; state_dict() makes a copy"
            )
        return self.__dict__

    @property
    def repairs(self) -> int:
        """How often something was repaired."""
        return int(self._journal.page[3])

    def __enter__(self) -> None:
        died = self._mutex.acquire()
        page = self._journal.page
        page[4] = 1 if died else page[4] + 1
        if page[4] > 1:
            return
        if page[5]:
            try:
                self._repair()
            except BaseException:  # an interrupt: the next call repairs
                self._leave()
                raise
        page[5] = 1

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        try:
            if self._journal.page[4] == 1:
                if kind is None or issubclass(kind, PerTdError):  # ours come before any writing
                    self._end()
                else:  # an interrupt, say
                    self._repair()
        finally:
            self._leave()

    def _leave(self) -> None:
        self._journal.page[4] -= 1
        self._mutex.release()

    def _end(self) -> None:
        """Nothing is half made."""
        self._journal.wipe()
        self._journal.page[5] = 0

    def _repair(self) -> None:
        """Void what was being written, and derive everything else from the raw priorities."""
        n, start, written, *_ = self._journal.page.tolist()
        if n:
            # The ring goes past the slots: those who know what was there before are out of date.
            self._ring._count(written)
            self._table.void(start, n)
        self._beta.clamp_(max=1.0)
        self._table.rebuild()
        self._journal.page[3] += 1
        self._end()


class SharedReplayBuffer(LockedReplayBuffer):
    """A `PrioritizedReplayBuffer` that spawned processes share.

    `PrioritizedReplayBuffer(capacity, shared=True, example=...)` makes one, to be handed to
    processes as an argument when they are started: all of them, and all of their threads, may
    write, sample and update. Everything that changes is in shared memory: transitions, priorities
    and all that follows from them, how much was written, alpha, beta, eps, counters. Of each
    process's own are `batch_size`, `beta_increment`, `draw`, `method` and `generator`, which is not
    sent along: started processes draw from torch's own, and should seed that.

    One lock is held in every call. A process killed in the middle of one does not hold up the
    others: the next one repairs what it left. A transition is written when `extend` returns; one
    whose writer died before is never drawn.

    Args:
        capacity: number of slots.
        batch_size: default for `sample`.
        settings: those of `PrioritizedReplayBuffer`; an example is needed, `device` is the CPU, and
            rank-based prioritization and `num_buffers` cannot be shared.

    Raises:
        ConfigurationError: an argument is not one of those accepted, or this is not Linux.
    """

    _storage: SharedRing
    _priorities: SharedTable

    def _make(self, num_buffers: int | None, ring: dict[str, Any], table: dict[str, Any]) -> None:
        storage = ring["place"].storage
        if storage != "memory":
            raise ConfigurationError(f"shared: expected storage='memory', got {storage!r}")
        if num_buffers is not None:
            raise ConfigurationError(
                f"shared: expected num_buffers=None, got {num_buffers!r}: {MANY_ALONE}"
            )
        if table["prioritization"] != "proportional":
            raise ConfigurationError(
                f"shared: expected prioritization='proportional', got {table['prioritization']!r}"
            )
        if self.device.type != "cpu":
            raise ConfigurationError(f"shared: expected the device 'cpu', got '{self.device}'")
        _share(self._beta, self._stale)
        self._journal = Journal()
        self._storage = SharedRing(ring["capacity"], self.device, ring["layout"], self._journal)
        self._priorities = SharedTable(**table)

    def _arrange(self, **wanted: Any) -> None:
        super()._arrange(**wanted | {"shared": False})
        self._lock = Guard(self._journal, self._storage, self._priorities, self._beta)

    def _allocate(self, example: TensorDictBase | None) -> None:
        if example is None:
            raise ConfigurationError(
                "example: expected a transition, with which to allocate shared memory, got none"
            )
        super()._allocate(example)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_lock": self._lock, "_generator": None}

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        return object.__reduce_ex__(self, protocol)  # torch's reducers share what is in there

    @classmethod
    def _to_make(cls, state: dict[str, Any]) -> dict[str, Any]:
        leaves = flattened(state["transitions"])
        if not leaves:
            raise CheckpointError(
                "expected a state that knows the keys of its transitions, with which to allocate"
                " shared memory, got one without any: make a shared buffer with an example, and"
                " read the file with restore()"
            )
        example = {key: leaf.new_zeros(leaf.shape[1:]) for key, leaf in leaves.items()}
        return {"example": TensorDict(nested(example.items()), [])}

    def _choose(self, **changes: str) -> None:
        """As `PriorityTable.choose`, for this process; not what all processes have in common."""
        for name in ("weight_normalization", "new_priority"):
            if name in changes:
                raise ConfigurationError(
                    f"{name}: expected no change once a shared buffer is made, got"
                    f" {changes[name]!r}: other processes would not know; the constructor takes it"
                )
        super()._choose(**changes)

    def update_priority(
        self, index: Any, td_error: Any, generation: Any = None, mask: Any = None
    ) -> None:
        """As `PrioritizedReplayBuffer.update_priority`, but `generation` must be given.

        Raises:
            PriorityError: there is no `generation`, without which an update could give a priority
                to what others have since written, or to what a dead writer left.
        """
        if generation is None:
            raise PriorityError(
                "generation: expected that of the batch, which a shared buffer needs, got None"
            )
        super().update_priority(index, td_error, generation, mask)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As `PrioritizedReplayBuffer.load_state_dict`; who dies in it leaves nothing to draw.

        Raises:
            CheckpointError: also if the state is of another capacity, or was: other processes would
                not know which generations have moved.
        """
        checked = states.check(state)
        if checked["settings"]["capacity"] != self.capacity or checked.get("epoch", 0):
            raise CheckpointError(
                f"expected a state that always had the capacity {self.capacity}, which a shared"
                f" buffer needs, got one of {checked['settings']['capacity']}"
            )
        with self._lock:
            self._journal.note(0, self.capacity, self.write_count + self.capacity)
            super().load_state_dict(state)

    def check_valid(self) -> None:
        """As `PrioritizedReplayBuffer.check_valid`; what a dead process left is repaired before."""
        with self._lock:
            validation.require_valid(
                not self._journal.page[0], "no note of a write is left when it has ended"
            )
            super().check_valid()

    def stats(self) -> dict[str, int]:
        """As `PrioritizedReplayBuffer.stats`.

        Returns:
            Also "repairs": how often a process was found to have died in the middle of a call.
        """
        return super().stats() | {"repairs": self._lock.repairs}

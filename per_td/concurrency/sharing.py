"""SharedReplayBuffer: one buffer in shared memory, for several processes that write and learn."""

from multiprocessing.context import get_spawning_popen
from types import TracebackType
from typing import Any, SupportsIndex

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from per_td import validation
from per_td.checkpoint import state as states
from per_td.concurrency.mutex import RobustMutex
from per_td.concurrency.threads import LockedReplayBuffer
from per_td.errors import CheckpointError, ConfigurationError, PerTdError, PriorityError
from per_td.kernels.reference import Runs
from per_td.memory import Memory
from per_td.priorities.table import PriorityTable
from per_td.storage.leaves import Leaves, flattened, nested
from per_td.storage.ring import RingStorage

__all__ = ["SharedReplayBuffer"]


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
    """A `RingStorage` that notes in a journal what it is about to write."""

    def __init__(self, ring: RingStorage, journal: Journal) -> None:
        self.__dict__.update(ring.__dict__)
        self._journal = journal

    def write(self, leaves: Leaves, n: int, mask: Tensor | None = None) -> "Runs | None":
        """As `RingStorage.write`, with a note in the journal."""
        written = self.ring_count()
        self._journal.note(written % self.capacity, n, written + n)
        return super().write(leaves, n, mask)


class Guard:
    """The lock of a shared buffer, and the repair of what a dead holder left behind.

    Who dies while writing transitions has not acknowledged them: they are given up. Where they
    would have been is in the journal. All else follows from the raw priorities.
    """

    def __init__(
        self, journal: Journal, ring: RingStorage, table: PriorityTable, beta: Tensor
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

    def _memory(self, memory: Memory) -> Memory:
        if memory.storage != "memory":
            raise ConfigurationError(f"shared: expected storage='memory', got {memory.storage!r}")
        if self.device.type != "cpu":
            raise ConfigurationError(f"shared: expected the device 'cpu', got '{self.device}'")
        shared = Memory("shared")
        beta = float(self._beta)
        self._beta = shared.beside((), torch.float64, self.device).fill_(beta)
        self._stale = shared.beside((), torch.int64, self.device)
        return shared

    def _arrange(self, **wanted: Any) -> None:
        if self._priorities.prioritization != "proportional":
            raise ConfigurationError(
                "shared: expected prioritization='proportional', got"
                f" {self._priorities.prioritization!r}"
            )
        super()._arrange(**wanted | {"shared": False})
        self._journal = Journal()
        self._storage = SharedRing(self._storage, self._journal)
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

"""Guard: the lock of a shared buffer, and the repair of what a dead process left half written."""

from collections.abc import Callable
from multiprocessing.context import get_spawning_popen
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from per_td.concurrency.mutex import RobustMutex
from per_td.errors import ConfigurationError, PerTdError
from per_td.kernels.reference import Runs
from per_td.memory import shared_zeros

_ACTIVE, _REPAIRS, _BEGUN, _RUNS = range(4)


class Note:
    """The slots about to be written, in shared memory: for who finds that the writer has died.

    Args:
        groups: number of rings.
    """

    def __init__(self, groups: int) -> None:
        # 1 while the note counts; number of repairs; 1 from the begin of a call to its good end;
        # runs; write counts
        self._groups = groups
        self._tensor = shared_zeros((_RUNS + 3 * groups,), torch.int64, torch.device("cpu"))
        self.page = self._tensor.numpy()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.page = self._tensor.numpy()  # not the copy that was sent

    @property
    def active(self) -> bool:
        """True from the begin of a write to its end."""
        return bool(self.page[_ACTIVE])

    @property
    def runs(self) -> list[tuple[int, int]]:
        """First slot and length of the write to each ring, around the end."""
        start, length = self.page[_RUNS : _RUNS + 2 * self._groups].reshape(-1, 2).T.tolist()
        return list(zip(start, length, strict=True))

    @property
    def written(self) -> Tensor:
        """The write count of each ring after that, int64 [S]."""
        return self._tensor[_RUNS + 2 * self._groups :]

    def begin(self, runs: Runs, written: Tensor | int) -> None:
        """Note a write before its first row, unless a note covers it."""
        if not self.active:
            self.page[_RUNS : _RUNS + len(runs)] = runs
            self.page[_RUNS + len(runs) :] = written
            self.page[_ACTIVE] = 1  # last: a note that is half written does not count

    def end(self) -> None:
        """Wipe the note after the last row."""
        self.page[_ACTIVE] = 0


class Guard:
    """The lock of a shared buffer: it tells when its last holder died, and repairs before it opens.

    A writer that dies in the middle has not acknowledged its transitions: they are given up. Where
    they would have been is in the note. All else follows from the raw priorities.

    Args:
        groups: number of rings.
        repair: called with the lock held after a death; it reads the note that it is given.

    Raises:
        ConfigurationError: this is not Linux.
    """

    def __init__(self, groups: int, repair: Callable[[Note], None]) -> None:
        self.note, self._repair_with = Note(groups), repair
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
        """Number of repairs."""
        return int(self.note.page[_REPAIRS])

    def __enter__(self) -> None:
        depth = 0
        try:
            depth = self._mutex.acquire()
            if depth == 1:
                page = self.note.page
                if page[_BEGUN]:  # its last holder died, or was interrupted
                    self._repair()
                page[_BEGUN] = 1
        except BaseException:  # an interrupt: the next call repairs
            if depth:
                self._mutex.settle(depth - 1)
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        depth = self._mutex.depth.value  # an interrupt before this keeps the lock
        try:
            if depth == 1:
                if kind is None or issubclass(kind, PerTdError):  # ours come before any writing
                    self._end()
                else:  # an interrupt, say
                    self._repair()
            self._mutex.release()
        except BaseException:
            self._mutex.settle(depth - 1)
            raise

    def _end(self) -> None:
        """Nothing is half made."""
        self.note.end()
        self.note.page[_BEGUN] = 0

    def _repair(self) -> None:
        self._repair_with(self.note)
        self.note.page[_REPAIRS] += 1
        self._end()

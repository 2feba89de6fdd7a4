"""The lock of a shared buffer, which tells when its holder died, and the repair after that.

It is a robust mutex of POSIX threads. The lock of `multiprocessing` is a semaphore: a process
killed while it holds it holds it for ever. A robust mutex is released by the kernel, and whoever
gets it next is told. It lies in shared memory, needs no file, and is taken and given back without a
system call while nobody else wants it. A buffer for threads has Python's lock, which forks hold.
"""

import ctypes
import errno
import os
import sys
import time
import weakref
from collections.abc import Callable
from multiprocessing.context import get_spawning_popen
from typing import Any

import torch
from torch import Tensor

from per_td.errors import ConfigurationError, PerTdError
from per_td.kernels.reference import Runs
from per_td.memory import shared_zeros

_CHECKS_ERRORS, _PROCESS_SHARED, _ROBUST = 2, 1, 1  # as <pthread.h> of Linux has them
_BYTES = 128  # of pthread_mutex_t, 40 or 48 in glibc and musl, with room to spare
_PATIENCE = 0.1  # seconds of waiting, after which Python may look at signals (Ctrl-C)


class _Time(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


def _functions() -> tuple[Any, Any]:
    """The C library without and with the interpreter's lock held during a call; for Linux."""
    if not sys.platform.startswith("linux"):
        raise ConfigurationError(
            f"shared: expected Linux, whose mutexes outlive their holders, got {sys.platform}"
        )
    return ctypes.CDLL(None), ctypes.PyDLL(None)


_kept: list[Tensor] = []
"""Memory of locks that another thread held when nobody could use them any more.

A thread has a list of the robust mutexes that it holds, which goes through their memory.
"""


class RobustMutex:
    """A recursive lock of all processes and threads that have this object.

    Pickled for a process that is being spawned, it stays the same lock. An interrupt (Ctrl-C) that
    comes after a call of the C library, and before its result is known, does not leave it held: the
    mutex itself knows whether this thread has it. `depth` is how often its holder has taken it, 0
    while it is free.

    Raises:
        ConfigurationError: this is not Linux.
        OSError: the system cannot make one.
    """

    def __init__(self) -> None:
        # the depth, and the mutex
        self._memory = torch.zeros(8 + _BYTES, dtype=torch.uint8, device="cpu")
        self._memory.share_memory_()  # type: ignore[no-untyped-call]
        self._bind()
        library, kind = _functions()[0], ctypes.create_string_buffer(_BYTES)
        _require(library.pthread_mutexattr_init(kind))
        _require(library.pthread_mutexattr_settype(kind, _CHECKS_ERRORS))
        _require(library.pthread_mutexattr_setpshared(kind, _PROCESS_SHARED))
        _require(library.pthread_mutexattr_setrobust(kind, _ROBUST))
        _require(library.pthread_mutex_init(self._mutex, kind))
        _require(library.pthread_mutexattr_destroy(kind))

    def _bind(self) -> None:
        patient, quick = _functions()
        address = self._memory.data_ptr()
        self.depth = ctypes.c_int64.from_address(address)
        self._mutex = ctypes.c_void_p(address + 8)
        self._timed = patient.pthread_mutex_timedlock
        self._try, self._unlock = quick.pthread_mutex_trylock, quick.pthread_mutex_unlock
        self._mend = quick.pthread_mutex_consistent

    def __getstate__(self) -> dict[str, Any]:
        return {"_memory": self._memory}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._bind()

    def __del__(self) -> None:
        if "_mend" in self.__dict__ and not self.settle(0):
            _kept.append(self._memory)

    def acquire(self) -> int:
        """Wait for the lock, take it, and return how often this thread has, 1 or more."""
        depth = None
        try:
            code = self._try(self._mutex)
            depth = self._awaited(code) if code else 1
            self.depth.value = depth
            return depth
        except BaseException:
            self.settle(None if depth is None else depth - 1)
            raise

    def _awaited(self, code: int) -> int:
        """Wait for a lock that was not free; return what `acquire` does."""
        while code in (errno.EBUSY, errno.ETIMEDOUT):
            until = time.time() + _PATIENCE
            at = _Time(int(until), int(until % 1 * 1e9))
            code = self._timed(self._mutex, ctypes.byref(at))
        if code == errno.EDEADLK:
            return self.depth.value + 1
        if code == errno.EOWNERDEAD:
            self.depth.value = 0  # that of the dead
            code = self._mend(self._mutex)
        _require(code)
        return 1

    def settle(self, depth: int | None) -> bool:
        """After an interrupt, hold the lock as often as before the call that it interrupted.

        That is `depth`, or for None as often as the lock says. False if another thread has it.
        """
        code = self._timed(self._mutex, ctypes.byref(_Time(0, 0)))  # does not wait
        if code not in (0, errno.EOWNERDEAD, errno.EDEADLK):
            return False
        died = self._mend(self._mutex) == 0
        if died or code == 0:
            depth = 0
        elif depth is None:
            depth = self.depth.value
        self.depth.value = depth
        if not depth:
            _require(self._unlock(self._mutex))
        return True

    def release(self) -> None:
        """Give the lock back, or undo one of many `acquire`."""
        depth = self.depth.value - 1
        self.depth.value = max(depth, 0)
        if depth < 1:
            _require(self._unlock(self._mutex))


def _require(code: int) -> None:
    if code:
        raise OSError(code, f"the lock of a shared buffer: {os.strerror(code)}")


_ACTIVE, _REPAIRS, _BEGUN, _RUNS = range(4)


class Note:
    """The slots of each ring about to be written, in shared memory, in case the writer dies."""

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
    they would have been is in the note. All else follows from the raw priorities. So `repair` reads
    the note; it is called with the lock held.
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

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
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


_watched: "weakref.WeakKeyDictionary[Any, tuple[Any, Callable[[Any], None]]]"
_watched = weakref.WeakKeyDictionary()
_held_for_fork: list[tuple[Any, Any, Callable[[Any], None]]] = []


def hold_in_forks(owner: Any, lock: Any, renew: Callable[[Any], None]) -> None:
    """Hold `lock` while the process forks, and call `renew` with `owner` in the child.

    A fork then waits for the calls of other threads, which do not go on in the child. Without it,
    the child could find a lock taken for ever, and a change half made.
    """
    _watched[owner] = lock, renew


def _before_fork() -> None:
    for owner, (lock, renew) in list(_watched.items()):
        lock.acquire()
        _held_for_fork.append((owner, lock, renew))


def _after_fork_in_parent() -> None:
    while _held_for_fork:
        _held_for_fork.pop()[1].release()


def _after_fork_in_child() -> None:
    while _held_for_fork:
        owner, lock, renew = _held_for_fork.pop()
        lock.release()
        renew(owner)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork,
        after_in_parent=_after_fork_in_parent,
        after_in_child=_after_fork_in_child,
    )

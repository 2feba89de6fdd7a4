"""A lock between processes that the death of its holder releases: a robust mutex of POSIX threads.

The lock of `multiprocessing` is a semaphore: a process killed while it holds it holds it for ever.
A robust mutex is released by the kernel, and whoever gets it next is told. It lies in shared
memory, needs no file, and is taken and given back without a system call while nobody else wants it.
"""

import ctypes
import errno
import os
import sys
import time
from typing import Any

import torch

from per_td.errors import ConfigurationError

__all__ = ["RobustMutex"]

_CHECKS_ERRORS, _PROCESS_SHARED, _ROBUST = 2, 1, 1  # as <pthread.h> of Linux has them
_BYTES = 128  # of pthread_mutex_t, 40 or 48 in glibc and musl, with room to spare
_PATIENCE = 0.1  # seconds of waiting, after which Python may look at signals (Ctrl-C)


class _Time(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


def _functions() -> tuple[Any, Any]:
    """The C library without and with the interpreter's lock held during a call.

    Raises:
        ConfigurationError: this is not Linux.
    """
    if not sys.platform.startswith("linux"):
        raise ConfigurationError(
            f"shared: expected Linux, whose mutexes outlive their holders, got {sys.platform}"
        )
    return ctypes.CDLL(None), ctypes.PyDLL(None)


_kept: list[torch.Tensor] = []
"""Memory of locks that another thread held when nobody could use them any more.

A thread has a list of the robust mutexes that it holds, which goes through their memory.
"""


class RobustMutex:
    """A recursive lock of all processes and threads that have this object.

    Pickled for a process that is being spawned, it stays the same lock. An interrupt (Ctrl-C) that
    comes after a call of the C library, and before its result is known, does not leave it held: the
    mutex itself knows whether this thread has it.

    Attributes:
        depth: how often its holder has taken it, 0 while it is free.

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
        """Wait for the lock and take it.

        Returns:
            How often this thread has taken it: 1, or more within other calls.
        """
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
        """After an interrupt, hold the lock so often as before the call that it interrupted.

        Args:
            depth: how often this thread had taken it; None: as often as it says.

        Returns:
            False if another thread has it.
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

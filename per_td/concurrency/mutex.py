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

_RECURSIVE, _PROCESS_SHARED, _ROBUST = 1, 1, 1  # as <pthread.h> of Linux has them
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


class RobustMutex:
    """A recursive lock of all processes and threads that have this object.

    Pickled for a process that is being spawned, it stays the same lock.

    Raises:
        ConfigurationError: this is not Linux.
        OSError: the system cannot make one.
    """

    def __init__(self) -> None:
        # the mutex, and whether a holder has died of whom nobody has been told yet
        self._memory = torch.zeros(_BYTES + 1, dtype=torch.uint8, device="cpu")
        self._memory.share_memory_()  # type: ignore[no-untyped-call]
        self._bind()
        library, kind = _functions()[0], ctypes.create_string_buffer(_BYTES)
        _require(library.pthread_mutexattr_init(kind))
        _require(library.pthread_mutexattr_settype(kind, _RECURSIVE))
        _require(library.pthread_mutexattr_setpshared(kind, _PROCESS_SHARED))
        _require(library.pthread_mutexattr_setrobust(kind, _ROBUST))
        _require(library.pthread_mutex_init(self._mutex, kind))
        _require(library.pthread_mutexattr_destroy(kind))

    def _bind(self) -> None:
        self._patient, quick = _functions()
        address = self._memory.data_ptr()
        self._mutex = ctypes.c_void_p(address)
        self._untold = ctypes.c_uint8.from_address(address + _BYTES)
        self._try, self._unlock = quick.pthread_mutex_trylock, quick.pthread_mutex_unlock
        self._mend = quick.pthread_mutex_consistent

    def __getstate__(self) -> dict[str, Any]:
        return {"_memory": self._memory}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._bind()

    def acquire(self) -> bool:
        """Wait for the lock and take it.

        Returns:
            Whether its last holder died with it, and may have left a change half made.
        """
        code = self._try(self._mutex)
        while code in (errno.EBUSY, errno.ETIMEDOUT):
            code = self._wait()
        self._take(code)
        died, self._untold.value = bool(self._untold.value), 0
        return died

    def _wait(self) -> int:
        """Wait a while for the lock; what an error code says of it, 0 for "taken".

        An interrupt (Ctrl-C) is raised after the call and before its result could be assigned: the
        lock may have been taken by then, and is given back.
        """
        until = time.time() + _PATIENCE
        at = _Time(int(until), int(until % 1 * 1e9))
        codes: list[int] = []
        wait = self._patient["pthread_mutex_timedlock"]  # anew, since `restype` is this call's own
        wait.restype = codes.append  # done in C: no interrupt comes between
        try:
            wait(self._mutex, ctypes.byref(at))
        except BaseException:
            if codes and codes[0] in (0, errno.EOWNERDEAD):
                self._take(codes[0])
                self.release()
            raise
        return codes[0]

    def _take(self, code: int) -> None:
        """Make the lock whole again if its last holder has died, and keep in mind that it has."""
        if code == errno.EOWNERDEAD:
            self._untold.value = 1
            code = self._mend(self._mutex)
        _require(code)

    def release(self) -> None:
        """Give the lock back."""
        _require(self._unlock(self._mutex))


def _require(code: int) -> None:
    if code:
        raise OSError(code, f"the lock of a shared buffer: {os.strerror(code)}")

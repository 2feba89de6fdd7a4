"""Choice between three implementations of the same operations.

`reference` is plain torch, on any device. `cpu` is compiled by numba, `cuda` by Triton; both must
give the results of the reference. Each part chooses once, when it is made. torch.compile traces the
reference, and makes kernels of its own.

numba is imported when the first buffer or tree on the CPU is made, not with `per_td`. A kernel is
compiled by its first call, in up to two seconds, once per machine, with a line in the log "per_td"
when all of it takes longer. numba keeps the result in a folder (`__pycache__` beside its
source, or in the user's cache folder, or in `NUMBA_CACHE_DIR`), until a kernel is edited. Without
numba, or without such a folder, plain torch takes over after a `KernelWarning`.

Triton comes with torch's CUDA builds for Linux. It is imported with the first buffer or tree on
CUDA, compiles a kernel at its first launch, and keeps it in a folder too. Without Triton, plain
torch takes over after a `KernelWarning`.

The environment variable `PER_TD_KERNELS` chooses: "auto": kernels where they work; "off": plain
torch; "checked": CPU kernels with bounds checks, for tests.
"""

import gc
import os
import warnings
from functools import cache
from types import ModuleType

import torch

from per_td.errors import ConfigurationError, KernelWarning
from per_td.kernels import reference

__all__ = ["CHOICES", "VARIABLE", "operations", "prepare"]

VARIABLE = "PER_TD_KERNELS"
CHOICES = ("auto", "off")
_ALL_CHOICES = (*CHOICES, "checked")


def _allowed() -> bool:
    """True unless the environment variable asks for plain torch; raises ConfigurationError."""
    choice = os.environ.get(VARIABLE, "auto")
    if choice not in _ALL_CHOICES:
        raise ConfigurationError(f"{VARIABLE}: expected one of {_ALL_CHOICES}, got {choice!r}")
    return choice != "off"


def operations(device: torch.device, *, launches: bool = True) -> ModuleType:
    """Choose the operations for tensors on `device`; on CUDA, kernels only with `launches`."""
    if not _allowed():
        return reference
    if device.type == "cpu":
        return _cpu() or reference
    if device.type == "cuda" and launches:
        return _cuda() or reference
    return reference


def prepare(device: torch.device) -> None:
    """Compile the usual kernels for tensors on `device`, if numba does, before a lock is taken.

    Else the first call would compile what it needs, and others who wait for the lock with it.
    """
    door = _cpu() if device.type == "cpu" and _allowed() else None
    if door is not None:
        door.prepare()


@cache
def _cpu() -> ModuleType | None:
    """Import the kernels for the CPU, or warn and return None."""
    enabled = gc.isenabled()
    gc.disable()  # a collection takes 0.2 s while numba is imported, and frees nothing
    try:
        from per_td.kernels.cpu import door
    except ImportError as error:
        _warn("CPU", f"numba cannot be imported ({error})")
    except RuntimeError as error:  # numba's "cannot cache function"
        reason = f"numba has no folder for what it compiles ({error})"
        _warn("CPU", f"{reason}; NUMBA_CACHE_DIR can name one")
    else:
        return door
    finally:
        if enabled:
            gc.enable()
    return None


@cache
def _cuda() -> ModuleType | None:
    """Import the kernels for CUDA, or warn and return None."""
    try:
        from per_td.kernels.cuda import launches
    except ImportError as error:
        _warn("CUDA", f"triton cannot be imported ({error})")
        return None
    return launches


def _warn(device: str, reason: str) -> None:
    warnings.warn(
        f"the {device} kernels are off, plain torch takes over, several times slower: {reason}."
        f" {VARIABLE}=off asks for that without this warning",
        KernelWarning,
        stacklevel=2,
    )

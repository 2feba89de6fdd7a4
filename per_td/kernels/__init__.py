"""Which implementation runs: compiled kernels where there are some, plain torch elsewhere.

The kernels are an optimisation of the functions in torch, never a second truth: the same tests
hold for both. While torch.compile traces, it finds plain torch, to make kernels of its own.

On the CPU they are written in numba, which is imported when the first buffer or tree on the CPU is
made, not with `per_td`. Compiling them takes some seconds, once per machine: numba keeps the result
in a folder (`__pycache__` beside its source, or in the user's cache folder, or in
`NUMBA_CACHE_DIR`) until a kernel is edited. Without numba, or where no such folder can be written
and every process would have to compile again, plain torch takes over, and a `KernelWarning` says
so.

On CUDA they are written in Triton, which comes with torch's CUDA builds for Linux and is imported
with the first buffer or tree on CUDA. It compiles a kernel when it is first launched, and keeps it
in a folder too. Without Triton, plain torch takes over in the same way.

The environment variable `PER_TD_KERNELS` chooses: "auto", as above, or "off": plain torch.
"""

import gc
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType

import torch

from per_td.errors import ConfigurationError, KernelWarning

__all__ = [
    "CHOICES",
    "VARIABLE",
    "cpu_kernels",
    "cpu_unless_tracing",
    "cuda_kernels",
    "launched",
    "wanted",
]

VARIABLE = "PER_TD_KERNELS"
CHOICES = ("auto", "off")


def _allowed() -> bool:
    choice = os.environ.get(VARIABLE, "auto")
    if choice not in CHOICES:
        raise ConfigurationError(f"{VARIABLE}: expected one of {CHOICES}, got {choice!r}")
    return choice == "auto"


def wanted(device: torch.device) -> bool:
    """Whether the CPU's compiled kernels are to be used for tensors on `device`.

    Raises:
        ConfigurationError: the environment variable is not one of `CHOICES`.
    """
    return _allowed() and device.type == "cpu" and cpu_kernels() is not None


def launched(device: torch.device) -> bool:
    """Whether the CUDA kernels are to be used for tensors on `device`; raises like `wanted`."""
    return _allowed() and device.type == "cuda" and cuda_kernels() is not None


def cpu_unless_tracing() -> ModuleType | None:
    """`cpu_kernels`, which torch.compile cannot look into: None while it traces."""
    return None if torch.compiler.is_compiling() else cpu_kernels()


@cache
def cpu_kernels() -> ModuleType | None:
    """The module of kernels for the CPU; None, after a warning, where they cannot be had."""
    try:
        with _no_collection():
            from per_td.kernels import cpu as compiled
    except ImportError as error:
        _warn("CPU", f"numba cannot be imported ({error})")
    except RuntimeError as error:  # numba's "cannot cache function"
        reason = f"numba has no folder for what it compiles ({error})"
        _warn("CPU", f"{reason}; NUMBA_CACHE_DIR can name one")
    else:
        return compiled
    return None


@cache
def cuda_kernels() -> ModuleType | None:
    """The module of kernels for CUDA; None, after a warning, where they cannot be had."""
    try:
        from per_td.kernels import cuda as cuda_launches
    except ImportError as error:
        _warn("CUDA", f"triton cannot be imported ({error})")
        return None
    return cuda_launches


def _warn(device: str, reason: str) -> None:
    warnings.warn(
        f"the {device} kernels are off, plain torch takes over, several times slower: {reason}."
        f" {VARIABLE}=off asks for that without this warning",
        KernelWarning,
        stacklevel=2,
    )


@contextmanager
def _no_collection() -> Iterator[None]:
    """Importing numba makes many objects that stay; to search them for garbage took 0.2 s."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()

"""Which implementation runs: compiled kernels where there are some, plain torch elsewhere.

The kernels are an optimisation of the functions in torch, never a second truth. On the CPU they
are written in numba, which is imported when the first buffer or tree on the CPU is made, not with
`per_td`. Compiling them takes some seconds, once per machine: numba keeps the result in a folder
(`__pycache__` beside its source, or in the user's cache folder, or in `NUMBA_CACHE_DIR`). Without
numba, or where no such folder can be written and every process would have to compile again, plain
torch takes over, and a `KernelWarning` says so.

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

__all__ = ["CHOICES", "VARIABLE", "cpu", "wanted"]

VARIABLE = "PER_TD_KERNELS"
CHOICES = ("auto", "off")


def wanted(device: torch.device) -> bool:
    """Whether compiled kernels are to be used for tensors on `device`.

    Raises:
        ConfigurationError: the environment variable is not one of `CHOICES`.
    """
    choice = os.environ.get(VARIABLE, "auto")
    if choice not in CHOICES:
        raise ConfigurationError(f"{VARIABLE}: expected one of {CHOICES}, got {choice!r}")
    return choice == "auto" and device.type == "cpu" and cpu() is not None


@cache
def cpu() -> ModuleType | None:
    """The module of kernels for the CPU; None, after a warning, where they cannot be had."""
    try:
        with _no_collection():
            from per_td.kernels import compiled
    except ImportError as error:
        _warn(f"numba cannot be imported ({error})")
    except RuntimeError as error:  # numba's "cannot cache function"
        _warn(f"numba has no folder for what it compiles ({error}); NUMBA_CACHE_DIR can name one")
    else:
        return compiled
    return None


def _warn(reason: str) -> None:
    warnings.warn(
        f"the CPU kernels are off, plain torch takes over, some five times slower: {reason}."
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

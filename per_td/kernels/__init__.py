"""Which implementation runs: compiled kernels where there are some, plain torch elsewhere.

The kernels are an optimisation of the functions in torch, never a second truth. On CUDA they are
written in Triton, which comes with torch's CUDA builds for Linux and is imported when the first
buffer or tree on CUDA is made, not with `per_td`. Without it plain torch takes over, with the same
results, and a `KernelWarning` says so.

The environment variable `PER_TD_KERNELS` chooses: "auto", as above, or "off": plain torch.
"""

import os
import warnings
from functools import cache
from types import ModuleType

import torch

from per_td.errors import ConfigurationError, KernelWarning

__all__ = ["CHOICES", "VARIABLE", "cuda", "wanted_triton"]

VARIABLE = "PER_TD_KERNELS"
CHOICES = ("auto", "off")


def wanted_triton(device: torch.device) -> bool:
    """Whether Triton's kernels are to be used for tensors on `device`.

    Raises:
        ConfigurationError: the environment variable is not one of `CHOICES`.
    """
    choice = os.environ.get(VARIABLE, "auto")
    if choice not in CHOICES:
        raise ConfigurationError(f"{VARIABLE}: expected one of {CHOICES}, got {choice!r}")
    return choice == "auto" and device.type == "cuda" and cuda() is not None


@cache
def cuda() -> ModuleType | None:
    """The module of kernels for CUDA; None, after a warning, where they cannot be had."""
    try:
        from per_td.kernels import cuda_launches
    except ImportError as error:
        warnings.warn(
            f"the CUDA kernels are off, plain torch takes over: no triton ({error})",
            KernelWarning,
            stacklevel=2,
        )
        return None
    return cuda_launches

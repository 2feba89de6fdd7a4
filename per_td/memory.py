"""Lasting memory: ordinary, in files, shared, and pinned for a CUDA device.

It is made outside the caller's inference mode, after which nobody could write to it.
"""

import errno
import math
import mmap
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from per_td.errors import AllocationError, ConfigurationError, DiskAllocationError, PerTdError

Zeros = Callable[[tuple[int, ...], torch.dtype, torch.device], Tensor]
"""Function that makes memory filled with 0, from shape, dtype and device."""

STORAGES = ("memory", "memmap", "pinned")

_LARGE = 4 * 2**20
_CACHE_LINE = 64
_LARGEST_FILE = 2**63 - 1


def has_memory(tensor: Tensor) -> bool:
    """True unless CPU kernels would crash on the tensor, which has no memory of its own.

    Distributed and functionalized tensors have none, nor do those whose storage has been freed.
    """
    if not tensor.is_cpu:  # only the CPU's kernels read addresses
        return True
    try:
        return tensor.data_ptr() != 0 or not tensor.numel()
    except RuntimeError:  # tensors of vmap
        return False


@contextmanager
def allocating(what: str, size: int, advice: str) -> Iterator[None]:
    """Turn errors of torch, numpy or the system into one that names the allocation of `size` bytes.

    AllocationError for memory, DiskAllocationError for a disk. `advice` ends the message.
    """
    try:
        yield
    except (MemoryError, OSError, OverflowError, RuntimeError, ValueError) as error:
        known = isinstance(error, AllocationError | DiskAllocationError)
        if isinstance(error, PerTdError) and not known:
            raise
        cause = error.__cause__ if known and error.__cause__ is not None else error
        if isinstance(cause, torch.AcceleratorError) and "out of memory" not in str(cause):
            raise  # another fault of the device, maybe long before
        text = (
            f"{what}: expected {size / 2**30:.3g} GiB ({size} bytes) in all, got"
            f" {str(cause).partition(chr(10))[0]!r}; nothing was written. {advice}"
        )
        if isinstance(error, OSError):
            raise DiskAllocationError(error.errno or errno.ENOSPC, text) from cause
        raise AllocationError(text) from cause


@torch.inference_mode(False)
def zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Make zeros; on the CPU in huge pages if the system has them.

    With 10^8 slots in small pages, a sample and an update took 1.5 times as long, most of it to
    look up pages. numpy asks Linux for pages of 2 MiB, torch only if an environment variable says
    so. Memory that nobody has written to stays unused.
    """
    size = math.prod(shape) * dtype.itemsize
    with allocating(f"{dtype} of shape {[*shape]} on {device}", size, "Take a smaller capacity"):
        if device.type != "cpu" or size < _LARGE:
            return torch.zeros(tuple(shape), dtype=dtype, device=device)
        memory = torch.from_numpy(np.zeros(size + _CACHE_LINE, np.uint8))
    start = -memory.data_ptr() % _CACHE_LINE  # 16 leaves of a tree share one cache line
    return memory[start : start + size].view(dtype).view(tuple(shape))


@torch.inference_mode(False)
def mapped_zeros(
    shape: Sequence[int], dtype: torch.dtype, folder: str | os.PathLike[str] | None = None
) -> Tensor:
    """Make zeros on the CPU in a file without a name, which goes with the tensor or the process.

    Its space is reserved at once: a full disk fails here, with a DiskAllocationError, and not at a
    later write, which would end the process. `folder` names the disk; None is the system's folder
    for temporary files.
    """
    size = max(1, math.prod(shape) * dtype.itemsize)
    disk = tempfile.gettempdir() if folder is None else os.fspath(folder)
    advice = "Take a folder on a disk with more space, or a smaller capacity"
    with allocating(f"{dtype} of shape {[*shape]} in a file in {disk!r}", size, advice):
        if size > _LARGEST_FILE:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
        with tempfile.TemporaryFile(dir=folder) as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
            memory = mmap.mmap(file.fileno(), size)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    return whole[: math.prod(shape) * dtype.itemsize].view(dtype).view(tuple(shape))


@torch.inference_mode(False)
def shared_zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Make zeros on the CPU in memory that processes share when they get the tensor."""
    size = math.prod(shape) * dtype.itemsize
    with allocating("shared memory (/dev/shm)", size, "Take a smaller capacity"):
        return torch.zeros(tuple(shape), dtype=dtype, device=device).share_memory_()  # type: ignore[no-untyped-call, no-any-return]


@dataclass(frozen=True)
class Memory:
    """A kind of memory for transitions.

    Args:
        storage: "memory": that of the device; "memmap": files, for more than fits in memory;
            "pinned": pinned host memory, for more than fits on a CUDA device; "shared": memory
            that processes share.
        folder: folder for the files.

    Raises:
        ConfigurationError: `storage` is none of these, or has no use for a folder, or the folder
            cannot be written to.
    """

    storage: str = "memory"
    folder: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        if self.storage not in (*STORAGES, "shared"):
            raise ConfigurationError(
                f"storage: expected one of {', '.join(STORAGES)}, got {self.storage!r}"
            )
        if self.folder is not None and self.storage != "memmap":
            raise ConfigurationError(
                f"folder: expected None with storage={self.storage!r}, got {self.folder!r}"
            )
        if self.folder is not None and not _writable(self.folder):
            raise ConfigurationError(
                f"folder: expected an existing folder that can be written to, got {self.folder!r}"
            )

    def home(self, device: torch.device) -> torch.device:
        """Device of the memory, for batches on `device`; "pinned" is for CUDA only."""
        if self.storage == "pinned" and device.type != "cuda":
            raise ConfigurationError(
                f"storage: expected 'memory' or 'memmap' on {device}, got 'pinned', which is for"
                " batches on a CUDA device"
            )
        return device if self.storage in ("memory", "shared") else torch.device("cpu")

    def zeros(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Make memory of this kind, filled with 0; `device` is `home`."""
        if self.storage == "memmap":
            return mapped_zeros(shape, dtype, self.folder)
        if self.storage == "shared":
            return shared_zeros(shape, dtype, device)
        if self.storage == "pinned":
            with torch.inference_mode(False):
                return torch.zeros(tuple(shape), dtype=dtype, device=device, pin_memory=True)
        return zeros(shape, dtype, device)

    @property
    def beside(self) -> Zeros:
        """Maker of memory for the numbers beside the transitions."""
        return shared_zeros if self.storage == "shared" else zeros

    @property
    def advice(self) -> str:
        """Advice for the error if there is not enough."""
        if self.storage == "shared":
            return "Take a smaller capacity"  # files are not shared
        if self.storage == "memmap":
            where = "another disk (folder=...)"
        else:
            where = "files in place of memory (storage='memmap')"
        return f"Take {where}, or a smaller capacity"


def _writable(folder: Any) -> bool:
    """Return True if files can be made in `folder`."""
    named = isinstance(folder, str | os.PathLike)
    return named and os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK)

"""Memory that lasts: ordinary, in files, and where a CUDA device can read from the host.

It is never made in the caller's inference mode, beyond which nobody could write to it.
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
"""Makes memory filled with 0: shape, dtype and device."""

STORAGES = ("memory", "memmap", "pinned")

_LARGE = 4 * 2**20
_CACHE_LINE = 64
_LARGEST_FILE = 2**63 - 1


def has_memory(tensor: Tensor) -> bool:
    """True unless reading the tensor's memory on the CPU would end the process: it has none.

    Such are distributed and functionalized tensors, and those whose storage has been freed.
    """
    if not tensor.is_cpu:  # only the CPU's kernels read addresses
        return True
    try:
        return tensor.data_ptr() != 0 or not tensor.numel()
    except RuntimeError:  # torch refuses to tell, for those of vmap
        return False


@contextmanager
def allocating(what: str, size: int, advice: str) -> Iterator[None]:
    """Say what was to be allocated, where torch, numpy or the system refuse.

    Args:
        what: it is for.
        size: in bytes.
        advice: what else to do.

    Raises:
        AllocationError: there is not enough memory.
        DiskAllocationError: there is not enough space on a disk.
    """
    try:
        yield
    except (MemoryError, OSError, OverflowError, RuntimeError, ValueError) as error:
        known = isinstance(error, AllocationError | DiskAllocationError)
        if isinstance(error, PerTdError) and not known:
            raise
        cause = error.__cause__ if known and error.__cause__ is not None else error
        if isinstance(cause, torch.AcceleratorError) and "out of memory" not in str(cause):
            raise  # something else went wrong on the device, maybe long before
        text = (
            f"{what}: expected {size / 2**30:.3g} GiB ({size} bytes) in all, got"
            f" {str(cause).partition(chr(10))[0]!r}; nothing was written. {advice}"
        )
        if isinstance(error, OSError):
            raise DiskAllocationError(error.errno or errno.ENOSPC, text) from cause
        raise AllocationError(text) from cause


@torch.inference_mode(False)
def zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`torch.zeros`, on the CPU in huge pages where the system has them.

    Reading here and there in many small pages, the processor mostly looks up where they are: with
    10^8 slots, a sample and an update took 1.5 times as long. numpy asks Linux for pages of 2 MiB,
    which torch does only if an environment variable tells it to. It also leaves memory that
    nobody has written to unused.

    Raises:
        AllocationError: there is not enough memory.
    """
    size = math.prod(shape) * dtype.itemsize
    with allocating(f"{dtype} of shape {[*shape]} on {device}", size, "Take a smaller capacity"):
        if device.type != "cpu" or size < _LARGE:
            return torch.zeros(tuple(shape), dtype=dtype, device=device)
        memory = torch.from_numpy(np.zeros(size + _CACHE_LINE, np.uint8))
    start = -memory.data_ptr() % _CACHE_LINE  # 16 leaves of a tree are to be in one cache line
    return memory[start : start + size].view(dtype).view(tuple(shape))


@torch.inference_mode(False)
def mapped_zeros(
    shape: Sequence[int], dtype: torch.dtype, folder: str | os.PathLike[str] | None = None
) -> Tensor:
    """`torch.zeros` on the CPU in a file without a name: the system keeps in memory what it can.

    The file is gone when the tensor is, whatever ends the process. Its space is taken at once: on
    a full disk, this fails, instead of a write to the tensor later, which would end the process.

    Args:
        shape: of the tensor.
        dtype: of its elements.
        folder: on which disk; None takes the system's folder for temporary files.

    Raises:
        DiskAllocationError: there is no such folder, or not enough space.
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
    """`torch.zeros` on the CPU in shared memory: a process that is handed the tensor sees the same.

    Raises:
        AllocationError: there is not enough memory.
    """
    size = math.prod(shape) * dtype.itemsize
    with allocating("shared memory (/dev/shm)", size, "Take a smaller capacity"):
        return torch.zeros(tuple(shape), dtype=dtype, device=device).share_memory_()  # type: ignore[no-untyped-call, no-any-return]


@dataclass(frozen=True)
class Memory:
    """Which memory transitions live in.

    Args:
        storage: "memory": that of the device; "memmap": files, for more than fits in memory;
            "pinned": the host's memory, pinned, for more than fits in that of a CUDA device;
            "shared": shared memory, for processes that are handed it.
        folder: for the files.

    Raises:
        ConfigurationError: `storage` is none of these, or has no use for a folder; or that is not a
            folder that can be written to.
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
        """Where the memory is, for batches on `device`.

        Raises:
            ConfigurationError: "pinned", and the device is not CUDA.
        """
        if self.storage == "pinned" and device.type != "cuda":
            raise ConfigurationError(
                f"storage: expected 'memory' or 'memmap' on {device}, got 'pinned', which is for"
                " batches on a CUDA device"
            )
        return device if self.storage in ("memory", "shared") else torch.device("cpu")

    def zeros(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory of this kind, filled with 0; `device` is `home`."""
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
        """What makes the memory for the numbers beside the transitions."""
        return shared_zeros if self.storage == "shared" else zeros

    @property
    def advice(self) -> str:
        """What to do where there is not enough of it."""
        if self.storage == "shared":
            return "Take a smaller capacity"  # files are not shared
        if self.storage == "memmap":
            where = "another disk (folder=...)"
        else:
            where = "files in place of memory (storage='memmap')"
        return f"Take {where}, or a smaller capacity"


def _writable(folder: Any) -> bool:
    """Whether files can be made in it."""
    named = isinstance(folder, str | os.PathLike)
    return named and os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK)

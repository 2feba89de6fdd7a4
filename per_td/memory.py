"""Memory for large tensors: ordinary, in files, and where a CUDA device can read from the host."""

import math
import mmap
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from per_td import validation
from per_td.errors import ConfigurationError

__all__ = ["STORAGES", "Place", "mapped_zeros", "zeros"]

STORAGES = ("memory", "memmap", "pinned")

_LARGE = 4 * 2**20
_CACHE_LINE = 64


def zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`torch.zeros`, on the CPU in huge pages where the system has them.

    Reading here and there in many small pages, the processor mostly looks up where they are: with
    10^8 slots, a sample and an update took 1.5 times as long. numpy asks Linux for pages of 2 MiB,
    which torch does only if an environment variable tells it to. It also leaves memory that
    nobody has written to unused.
    """
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or size < _LARGE:
        return torch.zeros(tuple(shape), dtype=dtype, device=device)
    memory = torch.from_numpy(np.zeros(size + _CACHE_LINE, np.uint8))
    start = -memory.data_ptr() % _CACHE_LINE  # 16 leaves of a tree are to be in one cache line
    return memory[start : start + size].view(dtype).view(tuple(shape))


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
        OSError: there is no such folder, or not enough space.
    """
    size = max(1, math.prod(shape) * dtype.itemsize)
    with tempfile.TemporaryFile(dir=folder) as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            file.truncate(size)
        memory = mmap.mmap(file.fileno(), size)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    return whole[: math.prod(shape) * dtype.itemsize].view(dtype).view(tuple(shape))


@dataclass(frozen=True)
class Place:
    """Which memory transitions live in.

    Args:
        storage: "memory": that of the device; "memmap": files, for more than fits in memory;
            "pinned": the host's memory, pinned, for more than fits in that of a CUDA device.
        folder: for the files.

    Raises:
        ConfigurationError: `storage` is none of these, or has no use for a folder.
    """

    storage: str = "memory"
    folder: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        validation.one_of("storage", self.storage, STORAGES)
        if self.folder is not None and self.storage != "memmap":
            raise ConfigurationError(
                f"folder: expected None with storage={self.storage!r}, got {self.folder!r}"
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
        return device if self.storage == "memory" else torch.device("cpu")

    def zeros(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory of this kind, filled with 0; `device` is `home`."""
        if self.storage == "memmap":
            return mapped_zeros(shape, dtype, self.folder)
        if self.storage == "pinned":
            return torch.zeros(tuple(shape), dtype=dtype, device=device, pin_memory=True)
        return zeros(shape, dtype, device)

"""GenerationWriter: TorchRL's round-robin writer, which stamps the slots for all processes."""

import torch
from torch import Tensor
from torchrl.data.replay_buffers.storages import Storage
from torchrl.data.replay_buffers.writers import TensorDictRoundRobinWriter

from per_td import validation

__all__ = ["GenerationWriter"]

# Storages without a limit report 2**63 - 1 slots; nobody allocates these at once.
_UNLIMITED = 2**40


class GenerationWriter(TensorDictRoundRobinWriter):
    """Writes round-robin and counts, for every slot, how often it has been written.

    The counts ("generations") tell a late priority update that its slot holds something else by
    now. They are allocated at once and written in place, so the processes that a buffer is sent to
    share them, which TorchRL's own, that may be replaced as they grow, do not.

    Args:
        compilable: as in TorchRL; the writer cannot be shared between processes then.
    """

    _cursor: int
    _write_count: int

    def __init__(self, compilable: bool = False) -> None:
        super().__init__(compilable=compilable, track_generations=True)

    def register_storage(self, storage: Storage) -> None:
        """Write to this storage from now on; what it holds already is of generation 0."""
        super().register_storage(storage)
        device = getattr(storage, "device", None)
        if self._generation is None and storage.ndim == 1 and device not in (None, "auto"):
            self._ensure_generation(storage.max_size, 0, device)
            if self._generation is not None:
                self._generation[: len(storage)] = 0

    def _ensure_generation(self, capacity: int, min_size: int, device: torch.device) -> None:
        if capacity <= _UNLIMITED:
            min_size = capacity
        super()._ensure_generation(capacity, min_size, device)

    def claim(self, n: int) -> int:
        """Take the next n slots of a storage of one dimension, for rows to be written there.

        The caller holds the lock that keeps other writers out, so these numbers, which processes
        share, are read and written past their own locks. The caller counts up the generations.

        Args:
            n: how many, at most the storage's capacity.

        Returns:
            The first slot.
        """
        cursor, count = self._cursor_value.get_obj(), self._write_count_value.get_obj()
        start: int = cursor.value
        cursor.value = (start + n) % self._storage.max_size
        count.value += n
        return start

    def stamps(self, index: Tensor) -> Tensor:
        """Generations of slots of a storage of one dimension, int64 [B] as `index`.

        Raises:
            IndexRangeError: one is out of range (on CUDA it is moved to the nearest slot instead).
        """
        generation: Tensor = self._generation
        index = validation.to_device(index, generation.device)
        if not validation.can_raise(index):
            return generation.index_select(0, index.clamp(0, len(generation) - 1))
        try:
            return generation.index_select(0, index)
        except IndexError:
            validation.require_in_range(index, len(generation))
            raise

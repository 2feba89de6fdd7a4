"""GenerationWriter: TorchRL's round-robin writer, which stamps the slots for all processes."""

import torch
from torch import Tensor
from torchrl.data.replay_buffers.storages import Storage
from torchrl.data.replay_buffers.writers import TensorDictRoundRobinWriter

from per_td import validation
from per_td.errors import ConfigurationError

__all__ = ["SLOTS", "GenerationWriter", "slots_of"]

SLOTS = "the slots of the storage"
"""What an index has to name, in messages."""

# Storages without a limit report 2**63 - 1 slots; nobody allocates these at once.
_UNLIMITED = 2**40


def slots_of(storage: Storage) -> int:
    """Number of slots of a storage.

    Raises:
        ConfigurationError: it has no limit, or one that no memory reaches.
    """
    if storage.max_size > _UNLIMITED:
        raise ConfigurationError(
            f"storage: expected a limited size, since every slot has a priority, got a"
            f" {type(storage).__name__} of max_size={storage.max_size}; give it a max_size"
        )
    return int(storage.max_size)


class GenerationWriter(TensorDictRoundRobinWriter):
    """Writes round-robin and counts, for every slot, how often it has been written.

    The counts ("generations") tell a late priority update that its slot holds something else by
    now. They are allocated at once and written in place, so the processes that a buffer is sent to
    share them, which TorchRL's own, that may be replaced as they grow, do not. Those that come with
    a storage or a state are brought to the storage's size when they are taken over.

    Args:
        compilable: as in TorchRL; the writer cannot be shared between processes then.
    """

    _cursor: int
    _write_count: int
    _generation: Tensor | None

    def __init__(self, compilable: bool = False) -> None:
        super().__init__(compilable=compilable, track_generations=True)

    def register_storage(self, storage: Storage) -> None:
        """Write to this storage from now on; what it holds already is of generation 0."""
        super().register_storage(storage)
        device = getattr(storage, "device", None)
        if self._generation is None and storage.ndim == 1 and device not in (None, "auto"):
            self._ensure_generation(storage.max_size, 0, device)
            generation = self._generation
            if generation is not None:
                generation[: len(storage)] = 0

    def _align_generation_device(self) -> None:
        """Called by TorchRL whenever generations are taken over, from a storage or a state."""
        super()._align_generation_device()
        self._fit_generation()

    def _ensure_generation(self, capacity: int, min_size: int, device: torch.device) -> None:
        if capacity <= _UNLIMITED:
            min_size = capacity
        super()._ensure_generation(capacity, min_size, device)
        self._fit_generation()

    def _fit_generation(self) -> None:
        """For a storage of one dimension, make the generations int64 [max_size], contiguous.

        Slots that they lack count as never written. Kernels index them by slot.
        """
        storage, generation = self._storage, self._generation
        if storage is None or generation is None or storage.ndim > 1:
            return
        shape = (storage.max_size,)
        if storage.max_size > _UNLIMITED or (
            generation.shape == shape
            and generation.dtype == torch.int64
            and generation.is_contiguous()
        ):
            return
        fitted = torch.full(shape, -1, dtype=torch.int64, device=generation.device)
        known = generation.reshape(-1)[: len(fitted)]
        fitted[: len(known)] = known
        self._generation = fitted

    def next_slot(self) -> int:
        """The slot of a storage of one dimension that is written next; see `claim` for the lock."""
        slot: int = self._cursor_value.get_obj().value % self._storage.max_size  # of any state
        return slot

    def claim(self, start: int, n: int) -> None:
        """Count n rows that have been written from the `next_slot` on, but not the generations.

        The caller holds the lock that keeps other writers out, so these numbers, which processes
        share, are read and written past their own locks.
        """
        self._cursor_value.get_obj().value = (start + n) % self._storage.max_size
        self._write_count_value.get_obj().value += n

    def stamps(self, index: Tensor) -> Tensor:
        """Generations of slots of a storage of one dimension, int64 [B] as `index`; -1 if none.

        Raises:
            IndexRangeError: one is out of range (on CUDA it is moved to the nearest slot instead).
        """
        generation = self._generation
        if generation is None:  # nothing was ever written
            return torch.full_like(index, -1)
        index = validation.to_device(index, generation.device)
        if not validation.can_raise(index):
            return generation.index_select(0, index.clamp(0, len(generation) - 1))
        try:
            return generation.index_select(0, index)
        except IndexError:
            validation.require_slots(index, len(generation), what=SLOTS)
            raise

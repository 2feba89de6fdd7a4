"""GenerationWriter: TorchRL's round-robin writer; all processes share its generations."""

import torch
from torch import Tensor
from torchrl.data.replay_buffers.storages import Storage
from torchrl.data.replay_buffers.writers import TensorDictRoundRobinWriter

from per_td.errors import ConfigurationError

# Storages without a limit report 2**63 - 1 slots; nobody allocates these at once.
_UNLIMITED = 2**40


def slots_of(storage: Storage) -> int:
    """Number of slots of a storage.

    Raises:
        ConfigurationError: it has no limit, or one beyond any memory.
    """
    if storage.max_size > _UNLIMITED:
        raise ConfigurationError(
            f"storage: expected a limited size, since every slot has a priority, got a"
            f" {type(storage).__name__} of max_size={storage.max_size}; give it a max_size"
        )
    return int(storage.max_size)


class GenerationWriter(TensorDictRoundRobinWriter):
    """Writes round-robin and counts, for every slot, how often it has been written: its generation.

    A priority update of another generation than its slot's is stale. The generations are allocated
    at once and written in place, so the processes that a buffer is sent to share them; TorchRL's
    own may be replaced as they grow. Generations of a storage or a state are brought to the
    storage's size.

    Args:
        compilable: as in TorchRL; the writer cannot be shared between processes then.
    """

    _cursor: int
    _write_count: int
    _generation: Tensor | None

    def __init__(self, compilable: bool = False) -> None:
        super().__init__(compilable=compilable, track_generations=True)

    def register_storage(self, storage: Storage) -> None:
        """Write to this storage from now on; elements that it holds already have generation 0."""
        super().register_storage(storage)
        device = getattr(storage, "device", None)
        if self._generation is None and storage.ndim == 1 and device not in (None, "auto"):
            self._ensure_generation(storage.max_size, 0, device)
            generation = self._generation
            if generation is not None:
                generation[: len(storage)] = 0

    def _align_generation_device(self) -> None:
        """Take over generations of a storage or a state; TorchRL calls this."""
        super()._align_generation_device()
        self._fit_generation()

    def _ensure_generation(self, capacity: int, min_size: int, device: torch.device) -> None:
        if capacity <= _UNLIMITED:
            min_size = capacity
        super()._ensure_generation(capacity, min_size, device)
        self._fit_generation()

    def _fit_generation(self) -> None:
        """Make the generations of a 1-d storage int64 [max_size], contiguous: kernels index them.

        Slots without a generation count as never written.
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

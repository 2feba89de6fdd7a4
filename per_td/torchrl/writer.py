"""GenerationWriter: TorchRL's round-robin writer; all processes share its generations."""

import json
from ctypes import sizeof
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchrl.data.replay_buffers.storages import Storage
from torchrl.data.replay_buffers.writers import (
    TensorDictMaxValueWriter,
    TensorDictRoundRobinWriter,
)

from per_td import validation
from per_td.errors import CheckpointError, ConfigurationError, PerTdError
from per_td.memory import zeros

# Storages without a limit report 2**63 - 1 slots; nobody allocates these at once.
_UNLIMITED = 2**40


def slots_of(storage: Storage) -> int:
    """Number of slots of a storage; a ConfigurationError if it has no limit."""
    if storage.max_size > _UNLIMITED:
        raise ConfigurationError(
            f"storage: expected a limited size, since every slot has a priority, got a"
            f" {type(storage).__name__} of max_size={storage.max_size}; give it a max_size"
        )
    return int(storage.max_size)


def _written_rows(storage: Storage) -> set[int]:
    """Rows that the writers of a storage wrote last."""
    rows = set()
    for buffer in getattr(storage, "_attached_entities", ()):
        writer = getattr(buffer, "_writer", None)
        if getattr(writer, "_write_count", 0):
            rows.add((int(getattr(writer, "_cursor", 0)) - 1) % storage.shape[0])
    return rows


def last_rows(storage: Storage) -> list[int]:
    """Rows before the next write: older elements follow them.

    Usually one. A storage that was just loaded does not know it, only its buffer's writer does;
    where the two differ, both are taken.
    """
    known = getattr(storage, "_last_cursor_index", None)
    of_storage = set() if known is None else {int(known) % storage.shape[0]}
    return sorted(of_storage | _written_rows(storage))


def last_row(storage: Storage) -> int | None:
    """The row written last, by the writer if there is one; None if nobody knows.

    Nor does anybody if a writer overwrites the least element, whose rows are in no order of time.
    """
    buffers = getattr(storage, "_attached_entities", ())
    if any(isinstance(getattr(b, "_writer", None), TensorDictMaxValueWriter) for b in buffers):
        return None
    rows = sorted(_written_rows(storage)) or last_rows(storage)
    return rows[0] if len(rows) == 1 else None


def fit_cursor(writer: Any, storage: Storage, *, gapless: bool = True) -> None:
    """Bring the cursor of a writer, if it has one, back into a storage that it will write to.

    `gapless`: back to the end of what is filled, too. A ConfigurationError if the cursor is
    negative or no integer.
    """
    cursor = getattr(writer, "_cursor", None)
    if cursor is None:
        return
    rows, filled = storage.max_size, len(storage)
    if storage.ndim > 1:
        known = bool(getattr(storage, "initialized", False))
        rows = storage._max_size_along_dim0() if known else rows
        filled = storage.shape[0] if known else 0
    fitted = validation.integer("cursor", cursor, 0) % rows
    if gapless and filled < rows:
        fitted = min(fitted, filled)
    if fitted != cursor:
        writer._cursor = fitted


def _plain(generation: Any, error: type[PerTdError]) -> Tensor:
    """Generations of others, int64 and contiguous, in memory that may be written to at any time.

    An `error` if they are no integers.
    """
    name = "generation"
    if not isinstance(generation, Tensor):
        raise error(f"{name}: expected a tensor, got {type(generation).__name__}")
    if (
        type(generation) is Tensor
        and generation.dtype is torch.int64
        and generation.is_contiguous()
        and not (generation.is_meta or generation.is_inference())
    ):
        return generation
    validation.require_plain(name, generation, error)
    if generation.dtype.is_floating_point or generation.dtype.is_complex:
        raise error(f"{name}: expected an integer dtype, got {generation.dtype}")
    with torch.inference_mode(False):
        return torch.empty(generation.shape, dtype=torch.int64, device=generation.device).copy_(
            generation
        )


class GenerationWriter(TensorDictRoundRobinWriter):
    """Writes round-robin and counts, for every slot, how often it has been written: its generation.

    A priority update of another generation than its slot's is stale. The generations are allocated
    at once and written in place, so the processes that a buffer is sent to share them; TorchRL's
    own may be replaced as they grow. Generations of a storage or a state are brought to the
    storage's size, and a cursor beyond the storage back into it.
    """

    _cursor: int
    _write_count: int
    _generation: Tensor | None

    def __init__(self, compilable: bool = False) -> None:
        super().__init__(compilable=compilable, track_generations=True)
        self._least = -1  # the generation of slots that were never written
        # how often all was forgotten, and `_write_count` after the last time; processes share it
        self._emptied = zeros((2,), torch.int64, torch.device("cpu"))

    @property
    def emptied(self) -> tuple[int, int]:
        """Number of times that all was forgotten, and the count of writes after the last one."""
        times, count = self._emptied.tolist()
        return times, count

    def _empty(self, empty_write_count: bool = True) -> None:
        super()._empty(empty_write_count)
        self._emptied[1] = self._write_count
        self._emptied[0] += 1

    # --- the storage ------------------------------------------------------------------------------

    def register_storage(self, storage: Storage) -> None:
        """Write to this storage from now on; elements that it holds already have generation 0."""
        generation = getattr(storage, "_slot_generations", None)
        if generation is not None:
            _plain(generation, ConfigurationError)
        fit_cursor(self, storage)
        super().register_storage(storage)
        device = getattr(storage, "device", None)
        if self._generation is None and storage.ndim == 1 and device not in (None, "auto"):
            self._ensure_generation(storage.max_size, 0, device)
            if self._generation is not None:
                self._generation[: len(storage)] = self._least + 1

    def exceed(self, generation: int) -> None:
        """Make all generations larger than this one, those of slots to be written from now on too.

        Batches with generations up to this one, of another storage, are stale then.
        """
        self._least = max(self._least, generation)
        self._raise()

    def _raise(self) -> None:
        now = self._generation
        if now is not None and self._least >= 0:
            now.copy_(torch.where(now > self._least, now, (now >= 0) + self._least))

    def _align_generation_device(self) -> None:
        """Take over generations of a storage or a state; TorchRL calls this."""
        super()._align_generation_device()
        self._fit_generation()

    @torch.inference_mode(False)
    def _ensure_generation(self, capacity: int, min_size: int, device: torch.device) -> None:
        new = self._generation is None
        if capacity <= _UNLIMITED:
            min_size = capacity
        super()._ensure_generation(capacity, min_size, device)
        self._fit_generation()
        if new:
            self._raise()

    def _fit_generation(self) -> None:
        """Make the generations as kernels use them: int64, contiguous, [max_size] if 1-d.

        Slots without a generation count as never written.
        """
        storage, generation = self._storage, self._generation
        if storage is None or generation is None:
            return
        plain = _plain(generation, ConfigurationError)
        shape = (storage.max_size,)
        if storage.ndim == 1 and storage.max_size <= _UNLIMITED and plain.shape != shape:
            with torch.inference_mode(False):
                fitted = torch.full(shape, -1, dtype=torch.int64, device=plain.device)
            known = plain.reshape(-1)[: len(fitted)]
            fitted[: len(known)] = known
            plain = fitted
        if plain is not generation:
            self._generation = plain

    # --- state ------------------------------------------------------------------------------------

    def check_state(self, state_dict: dict[str, Any]) -> None:
        """Refuse, by a CheckpointError, a state that `load_state_dict` would refuse."""
        if not isinstance(state_dict, dict):
            raise CheckpointError(f"writer: expected a dictionary, got {type(state_dict).__name__}")
        counts = {"_cursor": state_dict.get("_cursor")}
        if state_dict.get("_write_count") is not None:
            counts["_write_count"] = state_dict["_write_count"]
        for name, value in counts.items():
            try:
                number = validation.integer(name, value, 0)
            except ConfigurationError as error:
                raise CheckpointError(f"writer: {error}") from error
            if self._compilable:
                continue  # a number of Python
            bits = 8 * sizeof(getattr(self, f"{name}_value").get_obj()) - 1  # one is the sign's
            if number >= 2**bits:
                raise CheckpointError(f"writer: {name}: expected less than 2**{bits}, got {number}")
        if state_dict.get("_generation") is not None:
            _plain(state_dict["_generation"], CheckpointError)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state; nothing is changed if `check_state` refuses it."""
        self.check_state(state_dict)
        super().load_state_dict(state_dict)
        if self._storage is not None:
            fit_cursor(self, self._storage, gapless=False)

    def loads(self, path: str | Path) -> None:
        """Take over a state that `dumps` wrote; nothing is changed if `check_state` refuses it."""
        self.check_state(self.saved(path))
        super().loads(path)
        if self._storage is not None:
            fit_cursor(self, self._storage, gapless=False)

    @staticmethod
    def saved(path: str | Path) -> dict[str, Any]:
        """Read the counts that `dumps` wrote into the folder `path`."""
        try:
            found = json.loads((Path(path).absolute() / "metadata.json").read_text())
            return {"_cursor": found["cursor"], "_write_count": found.get("write_count")}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"writer: expected its counts in {path}, got {error!r}"
            ) from error

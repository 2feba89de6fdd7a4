"""A buffer as part of a larger one: what is needed to draw from all parts as if they were one."""

from typing import NamedTuple

from torch import Tensor

from per_td.buffer import PrioritizedReplayBuffer
from per_td.storage.leaves import Leaves

__all__ = ["Draw", "count_stale", "draw", "smallest_mass", "total_mass", "transitions"]


class Draw(NamedTuple):
    """Transitions drawn from a part.

    Attributes:
        slot: where they are, int64 [n].
        leaves: copies of them by key, [n, ...].
        generation: to be handed back with an update, int64 [n].
        mass: their masses, float32 [n], of which the weights follow when the total of all parts is
            known.
    """

    slot: Tensor
    leaves: Leaves
    generation: Tensor
    mass: Tensor


def draw(buffer: PrioritizedReplayBuffer, n: int) -> Draw:
    """Draw `n` transitions, as `sample` does with the same random numbers.

    Raises:
        EmptyBufferError: as `PrioritizedReplayBuffer.sample`.
    """
    slot, _ = buffer._draw(n)
    storage = buffer._storage
    leaves, generation = storage.leaves(slot)
    return Draw(slot, leaves, generation, buffer._priorities.mass[slot])


def total_mass(buffer: PrioritizedReplayBuffer) -> float:
    """The sum of all masses; nothing can be drawn where it is 0."""
    return float(buffer._priorities.total)


def smallest_mass(buffer: PrioritizedReplayBuffer) -> float:
    """The smallest positive mass; inf where there is none.

    It is also inf where no weight needs it: unless `weight_normalization` is "buffer".
    """
    return float(buffer._priorities.smallest)


def transitions(buffer: PrioritizedReplayBuffer) -> Leaves:
    """All transitions by key, [len, ...], in the order of their slots, in the buffer's memory."""
    return buffer._storage.filled()


def count_stale(buffer: PrioritizedReplayBuffer, updates: int) -> None:
    """Count updates as stale that were found to be so before they came to the buffer."""
    buffer._drop(updates)

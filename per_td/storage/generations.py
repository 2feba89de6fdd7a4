"""Which transition a slot holds: number k (from 0, for ever) lives in slot k mod capacity."""

from torch import Tensor

__all__ = ["generation_of"]


def generation_of(index: Tensor, written: Tensor | int, capacity: int) -> Tensor:
    """How often the ring had wrapped when the slots `index` were written; -1 if they never were.

    Args:
        index: slots, int64 [B].
        written: how many transitions were ever written.
        capacity: number of slots.
    """
    return (written - 1 - index).div(capacity, rounding_mode="floor")

"""Moves of transitions from a ring into one of another capacity."""

from typing import NamedTuple

import torch
from torch import Tensor


class Move(NamedTuple):
    """The move of a ring's transitions: the newest that fit stay, the oldest of them first.

    Attributes:
        parts: old slots, in order; the new slots are 0, 1, 2, ...
        written: number of transitions ever written, for the new ring.
        moved: True if a slot holds another transition than before.
    """

    parts: list[slice]
    written: int
    moved: bool

    @property
    def size(self) -> int:
        """Number of transitions that stay."""
        return sum(part.stop - part.start for part in self.parts)

    @classmethod
    def between(cls, written: int, old: int, new: int) -> "Move":
        """Plan the move from capacity `old`, after `written` transitions, to capacity `new`."""
        size = min(written, old)
        if old == new or written <= min(old, new):
            return cls([slice(0, size)], written, moved=False)
        kept = min(size, new)
        start = (written - kept) % old
        end = min(start + kept, old)
        parts = [slice(start, end), slice(0, kept - (end - start))]
        return cls([part for part in parts if part.start < part.stop], kept, moved=True)

    def applied(self, values: Tensor) -> Tensor:
        """Values of the slots that stay, [n], in their new order."""
        return torch.cat([values[part] for part in self.parts]) if self.parts else values[:0]

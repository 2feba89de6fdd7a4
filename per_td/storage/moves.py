"""How the transitions of a ring move into one of another capacity."""

from typing import NamedTuple

import torch
from torch import Tensor


class Move(NamedTuple):
    """Where the transitions of one ring go: the newest that fit stay, the oldest of them first.

    Attributes:
        parts: slots they come from, in order; their new slots are 0, 1, 2, ...
        written: the write count of the new ring, from which slots and generations follow.
        moved: whether any slot holds another transition than before.
    """

    parts: list[slice]
    written: int
    moved: bool

    @classmethod
    def between(cls, written: int, old: int, new: int) -> "Move":
        """From a ring of the capacity `old`, `written` to so often, to one of capacity `new`."""
        size = min(written, old)
        if old == new or written <= min(old, new):
            return cls([slice(0, size)], written, moved=False)
        kept = min(size, new)
        start = (written - kept) % old
        end = min(start + kept, old)
        parts = [slice(start, end), slice(0, kept - (end - start))]
        return cls([part for part in parts if part.start < part.stop], kept, moved=True)

    def applied(self, values: Tensor) -> Tensor:
        """What was kept for each slot, [n], in its new order."""
        return torch.cat([values[part] for part in self.parts]) if self.parts else values[:0]

"""Rows of several tensors of one length, as a ring."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class Rows:
    """One ring of rows in tensors of other owners; see `per_td.kernels.parts.Rows`.

    Args:
        columns: [capacity, ...], on one device.
        capacity: number of rows.
    """

    columns: Sequence[Tensor]
    capacity: int
    groups: int = 1
    record: Any = None

    @property
    def starts(self) -> Tensor:
        """First row of the ring, int64 [1, 1]."""
        return torch.zeros(1, 1, dtype=torch.int64, device=self.columns[0].device)

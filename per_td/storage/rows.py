"""Rows of several tensors of one length, and rows from outside, made ready to be copied."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from per_td import validation
from per_td.errors import SchemaError

__all__ = ["Rows", "plain"]


@dataclass
class Rows:
    """One ring of rows in tensors that others own; see `per_td.kernels.parts.Rows`.

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
        """The first row of the ring, int64 [1, 1]."""
        return torch.zeros(1, 1, dtype=torch.int64, device=self.columns[0].device)


def plain(leaf: Tensor, device: torch.device) -> Tensor:
    """Bring `leaf` to `device`, with its numbers as they are, one after the other in memory.

    Raises:
        SchemaError: it has no values, or not in memory of its own.
    """
    usual = leaf.layout is torch.strided and leaf.is_contiguous() and leaf.device == device
    if usual and not (leaf.is_neg() or leaf.is_conj()):
        return leaf
    validation.require_plain("transitions", leaf, SchemaError)
    leaf = validation.to_device(leaf, device)
    if leaf.is_neg() or leaf.is_conj():
        leaf = leaf.resolve_neg().resolve_conj()
    return leaf if leaf.is_contiguous() else leaf.contiguous()

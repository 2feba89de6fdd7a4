"""Interfaces of the parts that the operations work on."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from per_td.kernels.layout import Block, Layout


class Trees(Protocol):
    """S trees in a block of memory; see `per_td.tree.Trees`."""

    layout: Layout
    block: Block
    device: torch.device
    starts: Tensor
    leaves: Tensor
    sums: Tensor
    raw: Tensor
    maxima: Tensor
    minima: Tensor
    settings: Tensor
    exponents: Tensor
    ever_max: Tensor
    replayed: Tensor
    refused: Tensor
    keeps_minima: bool

    @property
    def total(self) -> Tensor:
        """Sum of the masses of each tree, float64 [S]."""


class Distribution(Protocol):
    """The map from priorities to masses; see `per_td.priorities.distributions`."""

    def masses(self, trees: Any, priority: Tensor, leaf: Tensor) -> Tensor:
        """Masses of the changed or new priorities of leaves, float32 [B]."""


class Rows(Protocol):
    """S rings of rows, one ring after the other in each column."""

    groups: int
    capacity: int
    columns: Sequence[Tensor]
    starts: Tensor
    record: Any

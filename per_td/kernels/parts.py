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


class Frames(Protocol):
    """A ring of frames and what is known of the recent ones; see `per_td.storage.frame_store`.

    Attributes:
        lanes: frames as integers, int64 or uint8 [size + 1, words]; the last row is a spare one.
        factors: factors of the hash, int64 [words].
        size: number of frames.
        depth: frames of a stack, k.
        envs: number of environments E.
        look_back: a frame is known for so many writes of its environment.
        recent: hashes, numbers, and writes that stored them, int64 [3, E + 1, M].
        counters: frames stored, writes, and for the kernels the place among the recent frames of
            the first frame of each last stack, int64 [4, E + 1].
        page: number of frames ever stored, and the first that is not gone, int64 [2].
    """

    lanes: Tensor
    factors: Tensor
    size: int
    depth: int
    envs: int
    look_back: int
    recent: Tensor
    counters: Tensor
    page: Tensor
    record: Any

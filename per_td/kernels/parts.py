"""Interfaces of the parts that operations work on, and numbers that kernels and callers share."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from per_td.kernels.layout import Block, Layout

EXPONENT, EPS, MINIMA, BETAS = range(4)
"""Places in a table's settings, float64 [4]: the exponent that gives the masses of all trees, NaN
where each has its own; eps; 1 if the smallest masses are kept up to date; 1 if each tree has a beta
of its own."""

VALUE, GENERATION, MASK, STAMPS, ADD_EPS, SQUARED, NEW, EVER_MAX = (1 << k for k in range(8))
"""Options of `assign`, a bit each; one is unset where its argument is absent."""

STRATIFIED, BY_SIZE, BY_BUFFER = (1 << k for k in range(3))
"""Options of `draw`."""


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

    @property
    def largest(self) -> Tensor:
        """Largest priority in each tree, 0 for none, float32 [S]."""

    @property
    def smallest(self) -> Tensor:
        """Smallest positive mass in each tree, inf for none, float32 [S]."""


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

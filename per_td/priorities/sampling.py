"""Draws from a `PriorityTable`, with importance-sampling weights."""

from typing import Any

import torch
from torch import Tensor

from per_td import draws, validation
from per_td.errors import EmptyBufferError
from per_td.priorities.selection import Selection, sample_selected
from per_td.priorities.table import PriorityTable
from per_td.storage.ring import RingStorage


def sample_weighted(
    table: PriorityTable,
    n: int,
    generator: torch.Generator | None,
    selection: Selection | None = None,
    *,
    beta: Tensor | float,
    written: Tensor | int,
    size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw slots in proportion to mass, mark them as replayed, and compute their weights.

    Args:
        table: the priorities.
        n: slots to draw from each group.
        generator: source of the random numbers, on the table's device.
        selection: another way to draw; None: in proportion to mass.
        beta: exponent of the weights: 0 for no correction, 1 for the full one.
        written: number of transitions ever written, int64 [S], or one number for all.
        size: number of filled slots of a single table, if the host knows it.

    Returns:
        Slots int64 and weights float32, [n] or [S, n].

    Raises:
        EmptyBufferError: too few slots can be drawn, or none.
    """
    if selection is not None:
        return sample_selected(table, n, generator, selection, beta=beta, written=written)
    trees, shape = table.trees, (*table.lead, n)
    if _by_points(table):
        drawn: tuple[Tensor, Tensor] | None = trees.ops.draw(
            trees,
            _points(table, n, generator),
            stratified=table.draw == "stratified",
            beta=beta,
            normalization=table.weight_normalization,
            written=written,
        )
        if drawn is None:
            raise EmptyBufferError(trees.nothing_to_draw())
        return drawn
    if table.way == "tree":
        if validation.can_raise(trees.leaves) and not (trees.total > 0).all():
            raise EmptyBufferError(trees.nothing_to_draw())
        index, mass = trees.draw_distinct(n, generator)
        index, mass = index.view(shape), mass.view(shape)
    else:
        index, mass = _multinomial(table, n, generator, size)
    trees.ops.mark_replayed(trees, index)
    weight: Tensor = trees.ops.weigh(
        trees, mass, beta=beta, normalization=table.weight_normalization, written=written
    )
    return index, weight


def sample_rows(
    table: PriorityTable,
    ring: RingStorage,
    n: int,
    generator: torch.Generator | None,
    selection: Selection | None = None,
    *,
    beta: Tensor | float,
    size: int | None = None,
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """Draw as `sample_weighted`, and copy the transitions; one call of a kernel if there is one.

    Returns:
        Transitions, a tensor per key; slots, weights, and generations as the ring counts them.
    """
    trees = table.trees
    ops: Any = ring.operations(n)
    usual = ops is trees.ops and hasattr(ops, "draw_rows") and _by_points(table)
    if selection is not None or not usual:
        drawn = sample_weighted(
            table, n, generator, selection, beta=beta, written=ring.written, size=size
        )
        rows, generation = ring.gather(drawn[0])
        return rows, *drawn, generation
    sample: tuple[list[Tensor], Tensor, Tensor, Tensor] | None = ops.draw_rows(
        trees,
        ring,
        _points(table, n, generator),
        stratified=table.draw == "stratified",
        beta=beta,
        normalization=table.weight_normalization,
        written=ring.written,
    )
    if sample is None:
        raise EmptyBufferError(trees.nothing_to_draw())
    return sample


def _by_points(table: PriorityTable) -> bool:
    """True if draws look up random points in the tree."""
    return table.way == "tree" and table.draw != "without_replacement"


def _points(table: PriorityTable, n: int, generator: torch.Generator | None) -> Tensor:
    """Random numbers in [0, 1), float64 [n] or [S, n]."""
    shape, like = (*table.lead, n), table.points
    if like.shape != shape:
        like = table.points = torch.empty(shape, dtype=torch.float64, device=table.device)
    return draws.uniform_like(like, generator)


def _multinomial(
    table: PriorityTable, n: int, generator: torch.Generator | None, size: int | None
) -> tuple[Tensor, Tensor]:
    """Draw slots by `torch.multinomial`; return them and their masses, [n] or [S, n]."""
    mass = table.mass[..., :size]
    if validation.can_raise(mass) and not (table.total > 0).all():
        raise EmptyBufferError(table.trees.nothing_to_draw())
    if table.draw == "without_replacement" and validation.can_raise(mass):
        table.trees.require_enough(mass.count_nonzero(-1).reshape(-1), n)
    index = draws.multinomial(mass, n, table.draw, generator)
    return index, mass.gather(-1, index)

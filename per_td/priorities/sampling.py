"""Draws from a `PriorityTable`, and the importance-sampling weights of what is drawn."""

import torch
from torch import Tensor

from per_td import draws, validation
from per_td.errors import EmptyBufferError
from per_td.priorities.table import PriorityTable

__all__ = ["sample_weighted"]


def sample_weighted(
    table: PriorityTable,
    n: int,
    generator: torch.Generator | None,
    *,
    beta: Tensor | float,
    written: Tensor | int,
    size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw slots in proportion to mass, and weigh them; they count as replayed.

    Args:
        table: the priorities.
        n: how many, of each group.
        generator: source of the random numbers, on the table's device.
        beta: exponent of the weights: 0 for no correction, 1 for the full one.
        written: how many transitions were ever written, int64 [S], or one number for all.
        size: number of filled slots of a single table, if the host knows it.

    Returns:
        Slots int64 and weights float32, [n] or [S, n].

    Raises:
        EmptyBufferError: nothing, or not enough, can be drawn.
    """
    trees, shape = table.trees, (*table.lead, n)
    if table.way == "tree" and table.draw != "without_replacement":
        like = table.points
        if like.shape != shape:
            like = table.points = torch.empty(shape, dtype=torch.float64, device=table.device)
        drawn: tuple[Tensor, Tensor] | None = trees.ops.draw(
            trees,
            draws.uniform_like(like, generator),
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


def _multinomial(
    table: PriorityTable, n: int, generator: torch.Generator | None, size: int | None
) -> tuple[Tensor, Tensor]:
    """Draw by `torch.multinomial`: slots and their masses, [n] or [S, n]."""
    mass = table.mass[..., :size]
    if validation.can_raise(mass) and not (table.total > 0).all():
        raise EmptyBufferError(table.trees.nothing_to_draw())
    if table.draw == "without_replacement" and validation.can_raise(mass):
        table.trees.require_enough(mass.count_nonzero(-1).reshape(-1), n)
    index = draws.multinomial(mass, n, table.draw, generator)
    return index, mass.gather(-1, index)

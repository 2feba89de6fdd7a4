"""Draws from a `PriorityTable`, and the importance-sampling weights of what is drawn."""

import torch
from torch import Tensor

from per_td import draws, validation
from per_td.errors import EmptyBufferError
from per_td.priorities import kernel_calls as priority_kernels
from per_td.priorities.table import PriorityTable
from per_td.weights import importance_weights

__all__ = ["sample", "sample_weighted", "weights"]


def sample(
    table: PriorityTable, n: int, size: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Draw slots in proportion to p^alpha; they count as replayed.

    Args:
        table: the priorities.
        n: how many.
        size: number of filled slots.
        generator: source of the random numbers, on the table's device.

    Returns:
        int64 [n], and their masses, float32 [n].

    Raises:
        EmptyBufferError: nothing, or not enough, can be drawn.
    """
    if table._method == "tree":
        index, mass = table.masses._sample_with_mass(n, generator, table.draw)
    else:
        if validation.can_raise(table.raw) and not table.masses.total > 0:
            raise EmptyBufferError(f"expected a positive priority, got 0 for all {size}")
        index = draws.multinomial(table.masses[:size], n, table.draw, generator)
        mass = table.masses.leaves.index_select(0, index)
    table._replayed.index_fill_(0, index, True)
    return index, mass


def sample_weighted(
    table: PriorityTable,
    n: int,
    size: int,
    generator: torch.Generator | None,
    *,
    beta: Tensor | float,
    filled: Tensor | int,
) -> tuple[Tensor, Tensor]:
    """`sample`, with the `weights` of the slots drawn in place of their masses.

    Args:
        table, n, size, generator: as for `sample`.
        beta: as for `weights`.
        filled: `size`, on the device.

    Returns:
        int64 [n] and float32 [n].
    """
    kernel = table.masses.kernels
    if kernel is None or table._method != "tree" or table.draw == "without_replacement":
        index, mass = sample(table, n, size, generator)
        return index, _weights_of(table, mass, beta, filled)
    if table._points.shape[0] != n:
        with torch.inference_mode(False):  # or nobody could draw into them beyond it
            table._points = torch.empty(n, dtype=torch.float64, device=table.device)
    point = draws.uniform_like(table._points, generator)
    return priority_kernels.draw(kernel, table, point, size, float(beta))


def weights(
    table: PriorityTable, index: Tensor, beta: Tensor | float, size: Tensor | int
) -> Tensor:
    """Importance-sampling weights of the slots `index` [B], drawn from `size` filled ones.

    Args:
        table: the priorities.
        index: int64 [B].
        beta: 0 for no correction, 1 for the full one.
        size: number of filled slots.

    Returns:
        float32 [B].
    """
    return _weights_of(table, table.masses[index], beta, size)


def _weights_of(
    table: PriorityTable, mass: Tensor, beta: Tensor | float, size: Tensor | int
) -> Tensor:
    normalization, total = table.weight_normalization, table.masses.total
    smallest = None if table._smallest is None else table._smallest.value
    kernels = table.masses.launches
    if kernels is None:
        return importance_weights(
            mass, beta, total=total, size=size, smallest=smallest, normalization=normalization
        )
    if normalization == "none":
        weight: Tensor = kernels.weigh(mass, beta, total, size)
    else:
        weight = kernels.weigh(mass, beta, mass.amin() if smallest is None else smallest)
    return weight

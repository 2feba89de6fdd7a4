"""The kernels that change and draw priorities, called with the memory of a `PriorityTable`.

Those compiled for the CPU take addresses, which are read anew in each call, since tensors may be
moved to shared memory in between; those in Triton take tensors. What a call does, and in which
order, is in `per_td.priorities.table`, which has looked at its arguments.
"""

from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from per_td.errors import EmptyBufferError

if TYPE_CHECKING:
    from per_td.priorities.table import PriorityTable

__all__ = ["assign", "draw", "launch", "renew", "settle"]


def _memory(table: "PriorityTable") -> tuple[int, ...]:
    """Addresses of priorities, masses, sums, maxima, minima and levels; number of levels."""
    leaves, sums, levels, depth = table.masses.memory
    smallest = 0 if table._smallest is None else table._smallest.nodes.data_ptr()
    maxima = table._largest.nodes.data_ptr()
    return table._raw.data_ptr(), leaves, sums, maxima, smallest, levels, depth


def _what_follows(table: "PriorityTable", *, new: bool) -> tuple[float, int, int, int, int]:
    """The last arguments of `assign` and `renew`: what a priority means for all else.

    Returns:
        The exponent, negative for ranks; addresses of the priority that new transitions get, of the
        largest there ever was, of what was replayed (0 unless the slots are `new`, and have not
        been), and of the priorities at the last sort (0 without ranks).
    """
    ever_max, ranks = table.ever_max.data_ptr(), table.ranks
    known = table._largest.root if table.new_priority == "buffer_max" else ever_max
    replayed = table._replayed.data_ptr() if new else 0
    if ranks is None:
        return table._alpha, known, ever_max, replayed, 0
    return -table._alpha, known, ever_max, replayed, ranks.snapshot.data_ptr()


def renew(kernel: ModuleType, table: "PriorityTable", start: int, n: int) -> None:
    """Give `n` slots, from 1 to all, from `start` on and around the end, the priority of new ones.

    Args:
        kernel: the compiled kernels, here and in all that follow.
        table: whose priorities.
        start, n: the slots.
    """
    after = _what_follows(table, new=True)
    kernel.renew(*_memory(table), start, n, table.capacity, *after)


def assign(
    kernel: ModuleType,
    table: "PriorityTable",
    index: Tensor,
    value: Tensor | None,
    size: int,
    *,
    eps: float,
    generation: Tensor | None = None,
    written: Tensor | int = 0,
    new: bool = False,
) -> int | None:
    """Write |value| + eps.

    Args:
        kernel, table: as for `renew`.
        index: slots, int64 [B]; of equal ones the last holds.
        value: float32 [B]; None stands for the priority of new transitions.
        size: number of slots that may be named.
        eps: added.
        generation, written: see `PriorityTable.update`.
        new: the slots are, and have not been replayed.

    Returns:
        How many were dropped; None, and nothing is written, where the kernel refuses: plain torch
        then finds the words for what is wrong.
    """
    index = index.contiguous()
    value = None if value is None else value.contiguous()
    generation = None if generation is None else generation.contiguous()
    dropped: int = kernel.assign(
        *_memory(table),
        index.data_ptr(),
        0 if value is None else value.data_ptr(),
        index.numel(),
        size,
        0 if generation is None else generation.data_ptr(),
        int(written),
        table.capacity,
        eps,
        *_what_follows(table, new=new),
    )
    return None if dropped < 0 else dropped


def settle(
    table: "PriorityTable",
    index: Tensor,
    td_error: Tensor,
    size: int,
    *,
    drawn: Tensor,
    generation: Tensor,
    squared: bool,
) -> bool:
    """`PriorityTable.update` for batches all live, where the generations of all slots are kept.

    Args:
        table: whose priorities; not of ranks.
        index: slots, int64 [B], contiguous.
        td_error: float32, as many, contiguous.
        size: number of slots that may be named.
        drawn: generations of the transitions meant, int64, as many, contiguous.
        generation: generations of the slots, int64 [size].
        squared: whether `td_error` is delta^2.

    Returns:
        False, and nothing is written, where there is no kernel, or something is wrong, too short or
        overwritten: `update` will see to it.
    """
    kernel, n = table.masses.kernels, index.numel()
    if kernel is None or table.ranks is not None:
        return False
    if not (td_error.numel() == drawn.numel() == n and size <= generation.numel()):
        return False
    at, errors, then = index.data_ptr(), td_error.data_ptr(), drawn.data_ptr()
    if size > table.capacity or not (at and errors and then):
        return False
    done: bool = kernel.settle(
        *_memory(table),
        at,
        errors,
        n,
        size,
        then,
        generation.data_ptr(),
        squared,
        table._eps,
        table._alpha,
        table.ever_max.data_ptr(),
    )
    return done


def draw(
    kernel: ModuleType, table: "PriorityTable", point: Tensor, size: int, beta: float
) -> tuple[Tensor, Tensor]:
    """Slots drawn from the tree, which count as replayed, and their weights.

    Args:
        kernel, table: as for `renew`.
        point: random numbers in [0, 1), float64 [n].
        size: number of filled slots.
        beta: exponent of the weights.

    Returns:
        int64 [n] and float32 [n].

    Raises:
        EmptyBufferError: all masses are 0.
    """
    index = torch.empty_like(point, dtype=torch.int64)
    weight = torch.empty_like(point, dtype=torch.float32)
    total = kernel.sample(
        *table.masses.memory,
        point.data_ptr(),
        point.numel(),
        table.draw == "stratified",
        index.data_ptr(),
        beta,
        0 if table._smallest is None else table._smallest.root,
        size if table._weight_normalization == "none" else 0,
        weight.data_ptr(),
        table._replayed.data_ptr(),
    )
    if not total > 0:
        raise EmptyBufferError("expected a positive mass to draw from, got only masses of 0")
    return index, weight


def launch(
    kernels: Any,
    table: "PriorityTable",
    index: Tensor,
    value: Tensor,
    *,
    eps: Tensor | None = None,
    size: Tensor | int | None = None,
    live: Tensor | None = None,
    generation: Tensor | None = None,
    written: Tensor | int | None = None,
) -> Tensor | int:
    """Write priorities in Triton; how many were dropped. See `cuda_update.assign`."""
    smallest = table._smallest
    trees = kernels.Trees(
        table.masses.layout,
        (table.masses.leaves, table.masses.nodes),
        (table._raw, table._largest.nodes),
        None if smallest is None else (smallest.leaves, smallest.nodes),
    )
    dropped: Tensor | int = kernels.assign(
        trees,
        table._raw,
        index,
        value,
        alpha=table._settings[0],
        ever_max=table.ever_max,
        eps=eps,
        size=size,
        live=live,
        generation=generation,
        written=written,
        refused=table.refused,
    )
    return dropped

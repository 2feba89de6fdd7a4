"""From what a loss wrote to one |TD error| per element: pure functions."""

from typing import Any

from torch import Tensor

from per_td.errors import PriorityError

__all__ = ["R2D2_ETA", "REDUCTIONS", "magnitude", "magnitudes", "reduce_priority"]

REDUCTIONS = ("max", "min", "mean", "median", "sum", "r2d2")

R2D2_ETA = 0.9
"""Share of the maximum in the "r2d2" mix (Kapturowski et al. 2019, section 2.3)."""


def magnitude(td_error: Tensor, unit: str) -> Tensor:
    """|delta| from what a loss wrote, detached, float32.

    Args:
        td_error: any shape and real dtype.
        unit: "abs" for delta or |delta|, "squared" for delta^2.
    """
    td_error = td_error.detach().float().abs()
    return td_error.sqrt() if unit == "squared" else td_error


def reduce_priority(priority: Tensor, reduction: str) -> Tensor:
    """One value for each row of `priority`.

    Args:
        priority: |delta| of the k values of each element, [n, k].
        reduction: "max", "min", "mean", "median", "sum", or "r2d2": eta * max + (1 - eta) * mean
            with eta = 0.9 (Kapturowski et al. 2019, section 2.3).

    Returns:
        [n].

    Example:
        >>> import torch
        >>> reduce_priority(torch.tensor([[1.0, 3.0]]), "r2d2")
        tensor([2.9000])
    """
    if priority.shape[1] == 1:
        return priority[:, 0]
    if reduction == "r2d2":
        return R2D2_ETA * priority.amax(1) + (1 - R2D2_ETA) * priority.mean(1)
    if reduction == "median":
        return priority.median(1).values
    if reduction == "mean":
        return priority.mean(1)
    if reduction == "sum":
        return priority.sum(1)
    return priority.amax(1) if reduction == "max" else priority.amin(1)


def magnitudes(td_error: Tensor, rows: int, *, unit: str, reduction: str, key: Any) -> Tensor:
    """What a loss wrote, as one |delta| per element, float32 [rows].

    Args:
        td_error: one or several values per element, elements first, [rows, ...].
        rows: number of elements.
        unit: of `magnitude`.
        reduction: of `reduce_priority`.
        key: the entry's name, for the message.

    Raises:
        PriorityError: their number is not a multiple of the number of elements.
    """
    if not td_error.numel() or td_error.numel() % rows:
        raise PriorityError(
            f"{key}: expected one or several values for each of {rows} elements,"
            f" got shape {list(td_error.shape)}"
        )
    return reduce_priority(magnitude(td_error.reshape(rows, -1), unit), reduction)

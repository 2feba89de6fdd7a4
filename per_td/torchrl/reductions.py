"""How several priorities become one, as a pure function on tensors."""

import math

from torch import Tensor

from per_td import validation

__all__ = ["R2D2_ETA", "REDUCTIONS", "reduce_priority"]

REDUCTIONS = ("max", "min", "mean", "median", "sum", "r2d2")

R2D2_ETA = 0.9
"""Share of the maximum in "r2d2" (Kapturowski et al. 2019, R2D2, section 2.3)."""


def reduce_priority(priority: Tensor, reduction: str) -> Tensor:
    """Reduce the priorities of each row to one.

    Args:
        priority: [n, ...], at least one value per row.
        reduction: "max", "min", "mean", "median" (the lower one of two), "sum", or "r2d2":
            0.9 max + 0.1 mean.

    Returns:
        [n].

    Raises:
        ConfigurationError: `reduction` is none of these.
    """
    validation.one_of("reduction", reduction, REDUCTIONS)
    rows = priority.reshape(priority.shape[0], math.prod(priority.shape[1:]))
    if reduction == "max":
        return rows.amax(1)
    if reduction == "min":
        return rows.amin(1)
    if reduction == "median":
        return rows.median(1).values
    if reduction == "sum":
        return rows.sum(1)
    mean = rows.float().mean(1)
    if reduction == "mean":
        return mean
    return R2D2_ETA * rows.amax(1) + (1 - R2D2_ETA) * mean

"""From the TD errors that a loss wrote to one |TD error| per element: pure functions."""

import math
from typing import Any

from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor

from per_td import validation
from per_td.errors import ConfigurationError, PriorityError

REDUCTIONS = ("max", "min", "mean", "median", "sum", "r2d2")
TD_ERROR_UNITS = ("abs", "squared")

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


def magnitude(td_error: Tensor, unit: str) -> Tensor:
    """|TD error|, detached, float32.

    Args:
        td_error: any shape and real dtype.
        unit: "abs" for delta or |delta|, "squared" for delta^2.
    """
    td_error = td_error.detach().float().abs()  # a negative delta^2 is no reason for NaN
    return td_error.sqrt() if unit == "squared" else td_error


def magnitudes(td_error: Tensor, rows: int, *, unit: str, reduction: str, key: Any) -> Tensor:
    """One |TD error| per element, float32 [rows].

    Args:
        td_error: one or several values per element, elements first, [rows, ...].
        rows: number of elements.
        unit: see `magnitude`.
        reduction: see `reduce_priority`.
        key: name of the entry, for the error.

    Raises:
        PriorityError: the number of values is not a multiple of the number of elements.
    """
    if td_error.numel() == rows:
        return magnitude(td_error.reshape(rows), unit)
    if not td_error.numel() or not rows or td_error.numel() % rows:
        raise PriorityError(
            f"{key}: expected one or several values for each of {rows} elements,"
            f" got shape {list(td_error.shape)}"
        )
    return reduce_priority(magnitude(td_error.reshape(rows, -1), unit), reduction)


def _names(key: Any) -> list[str]:
    """The names in a nested key; none if a part of it is no name."""
    if isinstance(key, str):
        return [key]
    parts = [_names(part) for part in key] if isinstance(key, tuple) else [[]]
    return [name for part in parts for name in part] if all(parts) else []


def as_key(name: str, key: Any) -> NestedKey:
    """Check a key of a TensorDict, and return its plain form: ("a",) is "a".

    Args:
        name: name of the argument, for the error.
        key: string, or tuple of keys.

    Raises:
        ConfigurationError: it is neither.
    """
    names = _names(key)
    if not names:
        raise ConfigurationError(f"{name}: expected a string or a tuple of them, got {key!r}")
    return names[0] if len(names) == 1 else tuple(names)


def required(data: TensorDictBase, key: Any) -> Tensor:
    """The entry `key` of `data`.

    Raises:
        PriorityError: there is none.
    """
    value: Tensor | None = data.get(key, None)
    if value is None:
        raise PriorityError(
            f"{key}: expected this entry in the batch, got {sorted(data.keys(), key=str)}"
        )
    return value


def first_of_each(values: Tensor, ndim: int) -> Tensor:
    """The first value of each element, [B].

    Args:
        values: repeated to fit the elements, [B, ...]; of a single element, [...].
        ndim: batch dimensions; 0 for a single element.
    """
    values = values if ndim else values.unsqueeze(0)
    while values.ndim > 1:
        values = values[..., 0]
    return values

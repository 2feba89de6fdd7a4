"""From the TD errors that a loss wrote to one |TD error| per element: pure functions."""

import math
from collections.abc import Callable
from typing import Any

from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor

from per_td import validation
from per_td.errors import ConfigurationError, PriorityError

TD_ERROR_UNITS = ("abs", "squared")

R2D2_ETA = 0.9
"""Share of the maximum in "r2d2" (Kapturowski et al. 2019, R2D2, section 2.3)."""

_REDUCERS: dict[str, Callable[[Tensor], Tensor]] = {
    "max": lambda rows: rows.amax(1),
    "min": lambda rows: rows.amin(1),
    "mean": lambda rows: rows.float().mean(1),
    "median": lambda rows: rows.median(1).values,  # the lower one of two
    "sum": lambda rows: rows.sum(1),
    "r2d2": lambda rows: R2D2_ETA * rows.amax(1) + (1 - R2D2_ETA) * rows.float().mean(1),
}
REDUCTIONS = tuple(_REDUCERS)


def reduce_priority(priority: Tensor, reduction: str) -> Tensor:
    """Reduce the priorities of each row, [n, ...], to one, [n]; `reduction` is in `REDUCTIONS`."""
    validation.one_of("reduction", reduction, REDUCTIONS)
    rows = priority.reshape(priority.shape[0], math.prod(priority.shape[1:]))
    return _REDUCERS[reduction](rows)


def magnitude(td_error: Tensor, unit: str) -> Tensor:
    """|TD error|, detached, float32, of delta or |delta| ("abs"), or of delta^2 ("squared")."""
    td_error = td_error.detach().float().abs()  # a negative delta^2 is no reason for NaN
    return td_error.sqrt() if unit == "squared" else td_error


def magnitudes(td_error: Tensor, rows: int, *, unit: str, reduction: str, key: Any) -> Tensor:
    """One |TD error| per element, float32 [rows], of one or several values for each, [rows, ...].

    Raises:
        PriorityError: the number of values is not a multiple of the number of elements; it names
            the entry `key`.
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
    """Return the plain form of a key of a TensorDict: ("a",) is "a".

    Raises:
        ConfigurationError: it is neither a string nor a tuple of keys.
    """
    names = _names(key)
    if not names:
        raise ConfigurationError(f"{name}: expected a string or a tuple of them, got {key!r}")
    return names[0] if len(names) == 1 else tuple(names)


def required(data: TensorDictBase, key: Any) -> Tensor:
    """The entry `key` of `data`, or a PriorityError."""
    value: Tensor | None = data.get(key, None)
    if value is None:
        raise PriorityError(
            f"{key}: expected this entry in the batch, got {sorted(data.keys(), key=str)}"
        )
    return value


def first_of_each(values: Tensor, ndim: int) -> Tensor:
    """The first value of each element, [B], of values repeated to fit the elements, [B, ...].

    In a batch of `ndim` 0, a single element, they are [...].
    """
    values = values if ndim else values.unsqueeze(0)
    while values.ndim > 1:
        values = values[..., 0]
    return values

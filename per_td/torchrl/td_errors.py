"""From a batch that a loss has seen to one |TD error| per element: pure functions."""

from typing import Any

from tensordict import TensorDictBase
from torch import Tensor

from per_td.errors import PriorityError
from per_td.torchrl.reductions import reduce_priority

__all__ = ["first_of_each", "magnitude", "magnitudes", "required"]


def magnitude(td_error: Tensor, unit: str) -> Tensor:
    """|delta| from what a loss wrote, detached, float32.

    Args:
        td_error: any shape and real dtype.
        unit: "abs" for delta or |delta|, "squared" for delta^2.
    """
    td_error = td_error.detach().float().abs()  # a negative delta^2 is no reason for NaN
    return td_error.sqrt() if unit == "squared" else td_error


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
    if td_error.numel() == rows:
        return magnitude(td_error.reshape(rows), unit)
    if not td_error.numel() or not rows or td_error.numel() % rows:
        raise PriorityError(
            f"{key}: expected one or several values for each of {rows} elements,"
            f" got shape {list(td_error.shape)}"
        )
    return reduce_priority(magnitude(td_error.reshape(rows, -1), unit), reduction)


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


def first_of_each(index: Tensor) -> Tensor:
    """Indices [B, ...], repeated beyond the first dimension to fit a batch, or [], as [B]."""
    while index.ndim > 1:
        index = index[..., 0]
    return index if index.ndim else index.reshape(1)

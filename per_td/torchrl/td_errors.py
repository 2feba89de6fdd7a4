"""From what a loss wrote to one |TD error| per element: pure functions."""

from typing import Any

from torch import Tensor

from per_td.errors import PriorityError
from per_td.torchrl.reductions import reduce_priority

__all__ = ["magnitude", "magnitudes"]


def magnitude(td_error: Tensor, unit: str) -> Tensor:
    """|delta| from what a loss wrote, detached, float32.

    Args:
        td_error: any shape and real dtype.
        unit: "abs" for delta or |delta|, "squared" for delta^2.
    """
    td_error = td_error.detach().float().abs()
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
    if not td_error.numel() or td_error.numel() % rows:
        raise PriorityError(
            f"{key}: expected one or several values for each of {rows} elements,"
            f" got shape {list(td_error.shape)}"
        )
    if td_error.numel() == rows:
        return magnitude(td_error.reshape(rows), unit)
    return reduce_priority(magnitude(td_error.reshape(rows, -1), unit), reduction)

"""The ends of trajectories in a storage, and the records that may begin a slice."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import is_tensor_collection
from tensordict.utils import NestedKey
from torch import Tensor
from torchrl.data import find_start_stop_traj

from per_td.errors import ConfigurationError

TRAJECTORY_KEYS: tuple[NestedKey, ...] = (("collector", "traj_ids"), "episode")
END_KEYS: tuple[NestedKey, ...] = (("next", "done"), ("next", "truncated"), ("next", "terminated"))


@dataclass(frozen=True)
class Starts:
    """The records that may begin a slice.

    Attributes:
        slot: their flat indices in the storage, int64 [S].
        end: the last records of trajectories, bool, in the storage's shape [T, ...].
    """

    slot: Tensor
    end: Tensor


def _per_record(name: str, values: Tensor, shape: torch.Size) -> Tensor:
    """`values` of the rows of a storage, without trailing dimensions of size 1."""
    if values.shape[: len(shape)] != shape or values.numel() != shape.numel():
        raise RuntimeError(
            f"{name}: expected one value for each record of the storage, shape {list(shape)},"
            f" got shape {list(values.shape)}"
        )
    return values.reshape(shape)


def ends_of(trajectory: Tensor) -> Tensor:
    """True where the next record, after the last row the first, is of another trajectory.

    Args:
        trajectory: ids, time along the first dimension, [T, ...].

    Returns:
        bool [T, ...].
    """
    return trajectory != trajectory.roll(-1, 0)


def end_flags(
    data: Any,
    shape: torch.Size,
    *,
    traj_key: NestedKey | None,
    end_keys: Sequence[NestedKey] | None,
) -> Tensor:
    """True for the last record of each trajectory, as far as the data says.

    Args:
        data: the contents of a storage, a tensordict.
        shape: of the storage, [T, ...].
        traj_key: holds trajectory ids, which then decide alone; if it is absent, flags do.
        end_keys: hold flags, of which any ends a trajectory; absent ones are skipped. Without
            either, every known flag and the first known id that is there end one.

    Returns:
        bool, a new tensor of that shape.

    Raises:
        RuntimeError: `data` is not a tensordict, or its entries are not one value per record.
        KeyError: none of the keys is there.
    """
    if not is_tensor_collection(data):
        raise RuntimeError(
            "expected a storage of tensordicts, in which the ends of trajectories can be found,"
            f" got {type(data).__name__} (or pass `ends` or `trajectories`)"
        )
    ids: Sequence[NestedKey] = (traj_key,) if traj_key is not None else ()
    if traj_key is None and end_keys is None:
        ids = TRAJECTORY_KEYS
    flags = END_KEYS if end_keys is None else end_keys
    end = torch.zeros(shape, dtype=torch.bool, device=data.device)
    known = False
    for key in ids:
        entry = data.get(key, None)
        if entry is not None:
            end = ends_of(_per_record(f"entry {key!r}", entry, shape))
            known = True
            if traj_key is not None:
                return end
            break
    for key in flags:
        entry = data.get(key, None)
        if entry is not None:
            end = end | _per_record(f"entry {key!r}", entry, shape).bool()
            known = True
    if not known:
        raise KeyError(
            f"expected one of the entries {[*ids, *flags]}, which tell trajectories apart, got"
            f" {sorted(data.keys(True, True), key=str)}"
        )
    return end


def given_flags(end: Tensor, shape: torch.Size) -> Tensor:
    """Flags that a user gave, cut to the filled rows of a storage.

    Args:
        end: for all rows of the storage, or the filled ones, [T, ...].
        shape: of the filled part of the storage.

    Raises:
        RuntimeError: the shape is another.
    """
    if end.ndim != len(shape) or end.shape[1:] != shape[1:] or len(end) < shape[0]:
        raise RuntimeError(
            "ends (or trajectories): expected one value for each record of the storage, shape"
            f" {list(shape)}, got shape {list(end.shape)}"
        )
    return end[: shape[0]].bool()


def right_span(
    span: bool | int | Sequence[bool | int],
) -> tuple[bool | int, bool | int]:
    """Spans to the left, always off, and to the right.

    Args:
        span: for both sides, or a tuple or list of two.

    Raises:
        ConfigurationError: one is negative or no number, or there are not two.
    """
    both = tuple(span) if isinstance(span, tuple | list) else (span, span)
    if len(both) != 2 or not all(isinstance(one, int) and one >= 0 for one in both):
        raise ConfigurationError(
            f"span: expected booleans or counts of records, one or two, got {span!r}"
        )
    left, right = both
    if left:
        warnings.warn("span: slices never span to the left; that is turned off", stacklevel=3)
    return (0, right)


def shortest_slice(missing: bool | int, length: int) -> int:
    """The fewest records of a slice, if so many may be missing (True: all but one).

    Raises:
        ConfigurationError: nothing would be left.
    """
    if missing is True:
        return 1
    if missing >= length:
        raise ConfigurationError(
            f"span: expected less than the {length} records of a slice, got {missing}"
        )
    return length - int(missing)


def _any_ahead(flags: Tensor, rows: int) -> Tensor:
    """True if one of `rows` rows has its flag set, from each row on and around; [T, ...]."""
    seen, result = 1, flags
    while seen < rows:
        shift = min(seen, rows - seen)
        result = result | result.roll(-shift, 0)
        seen += shift
    return result if rows else torch.zeros_like(flags)


def _in_short_ones(end: Tensor, length: int) -> Tensor:
    """True for records of trajectories of fewer than `length` records, bool [T, ...]."""
    begin, _, lengths = find_start_stop_traj(end=end, at_capacity=True)
    begin, lengths = begin[lengths < length], lengths[lengths < length]
    short = torch.zeros_like(end)
    for offset in range(length - 1):
        row, *rest = begin[lengths > offset].unbind(-1)
        short[((row + offset) % len(end), *rest)] = True
    return short


def find_starts(
    end: Tensor, *, full: bool, cursor: Sequence[int], length: int, shortest: int, strict: bool
) -> Starts:
    """The records that may begin a slice.

    Args:
        end: last records of trajectories, bool, time along the first dimension, [T, ...].
        full: the row after the last is the first, as in a ring that has been filled.
        cursor: the rows after which a full ring will be overwritten.
        length: records in a slice, L.
        shortest: the fewest records of a slice that begins inside a trajectory.
        strict: leave out trajectories shorter than `length`; otherwise their first records may
            begin a slice too.
    """
    end = end.clone()
    end[list(cursor) if full else -1] = True
    end[-1] |= ~end.any(0)  # a full ring of which nobody knows where it begins
    allowed = ~_any_ahead(end, shortest - 1)
    if not strict:
        allowed |= end.roll(1, 0)
    elif shortest < length:
        allowed &= ~_in_short_ones(end, length)
    return Starts(allowed.flatten().nonzero().squeeze(-1), end)


def longest(end: Tensor) -> int:
    """Records in the longest trajectory."""
    return int(find_start_stop_traj(end=end, at_capacity=True)[2].max())

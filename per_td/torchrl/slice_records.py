"""Records of slices: which may begin one, which end one, and one priority for each slice."""

import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from tensordict import TensorDict, TensorDictBase, is_tensor_collection
from tensordict.utils import NestedKey
from torch import Tensor
from torchrl.data import find_start_stop_traj

from per_td import draws, validation
from per_td.errors import ConfigurationError, EmptyBufferError, PriorityError
from per_td.torchrl.td_errors import magnitude, reduce_priority, required
from per_td.tree import SumTree

TRAJECTORY_KEYS: tuple[NestedKey, ...] = (("collector", "traj_ids"), "episode")
END_KEYS: tuple[NestedKey, ...] = (("next", "done"), ("next", "truncated"), ("next", "terminated"))

START, START_GENERATION = "slice_start", "slice_start_generation"
"""Entries of every record of a batch: slot and generation of the first record of its slice."""

_LAP = 2**48
"""More rows than a storage has."""


# --- the ends of trajectories ---------------------------------------------------------------------


def ends_of(trajectory: Tensor) -> Tensor:
    """True where the next record, after the last row the first, has another id; bool [T, ...]."""
    return trajectory != trajectory.roll(-1, 0)


def end_flags(
    data: Any,
    shape: torch.Size,
    *,
    traj_key: NestedKey | None,
    end_keys: Sequence[NestedKey] | None,
) -> Tensor:
    """True for the last record of each trajectory, as far as the data says; bool, a new tensor.

    Absent keys are skipped. If `traj_key` is there, its ids decide alone; otherwise any flag in
    `end_keys` ends a trajectory. Without either, every known flag and the first known id that is
    there end one.

    Args:
        data: the contents of a storage.
        shape: of the storage, [T, ...].

    Raises:
        RuntimeError: `data` is not a tensordict, or its entries are not one value per record.
        KeyError: none of the keys is there.
    """
    if not is_tensor_collection(data):
        raise RuntimeError(
            "expected a storage of tensordicts, in which the ends of trajectories can be found,"
            f" got {type(data).__name__} (or pass `ends` or `trajectories`)"
        )

    def stored(keys: Sequence[NestedKey]) -> Iterator[Tensor]:
        for key in keys:
            values = data.get(key, None)
            if values is None:
                continue
            if values.shape[: len(shape)] != shape or values.numel() != shape.numel():
                raise RuntimeError(
                    f"entry {key!r}: expected one value for each record of the storage, shape"
                    f" {list(shape)}, got shape {list(values.shape)}"
                )
            yield values.reshape(shape)

    ids: Sequence[NestedKey] = (traj_key,) if traj_key is not None else ()
    if traj_key is None and end_keys is None:
        ids = TRAJECTORY_KEYS
    flags = END_KEYS if end_keys is None else end_keys
    trajectory = next(stored(ids), None)
    ends = [] if trajectory is None else [ends_of(trajectory)]
    if trajectory is None or traj_key is None:
        ends += [flag.bool() for flag in stored(flags)]
    if not ends:
        raise KeyError(
            f"expected one of the entries {[*ids, *flags]}, which tell trajectories apart, got"
            f" {sorted(data.keys(True, True), key=str)}"
        )
    return torch.stack(ends).any(0)


def given_flags(end: Tensor, shape: torch.Size) -> Tensor:
    """Flags that a user gave for all rows or the filled ones, cut to the filled `shape`."""
    if end.ndim != len(shape) or end.shape[1:] != shape[1:] or len(end) < shape[0]:
        raise RuntimeError(
            "ends (or trajectories): expected one value for each record of the storage, shape"
            f" {list(shape)}, got shape {list(end.shape)}"
        )
    return end[: shape[0]].bool()


def longest(end: Tensor) -> int:
    """Records in the longest trajectory."""
    return int(find_start_stop_traj(end=end, at_capacity=True)[2].max())


# --- the beginnings of slices ---------------------------------------------------------------------


def right_span(span: bool | int | Sequence[bool | int]) -> tuple[int, bool | int]:
    """Spans to the left, always off, and to the right."""
    both = tuple(span) if isinstance(span, tuple | list) else (span, span)
    if len(both) != 2 or not all(isinstance(one, int) and one >= 0 for one in both):
        raise ConfigurationError(
            f"span: expected booleans or counts of records, one or two, got {span!r}"
        )
    left, right = both
    if left:
        warnings.warn("span: slices never span to the left; that is turned off", stacklevel=3)
    return (0, right)


class Starts(NamedTuple):
    """The records that may begin a slice."""

    slot: Tensor  # their flat indices in the storage, int64 [S]
    end: Tensor  # True for the last records of trajectories, in the storage's shape [T, ...]


def find_starts(
    end: Tensor,
    *,
    full: bool,
    cursor: Sequence[int],
    length: int,
    missing: bool | int,
    strict: bool,
) -> Starts:
    """The records that may begin a slice.

    Args:
        end: last records of trajectories, bool, time along the first dimension, [T, ...].
        full: the row after the last is the first, as in a ring that has been filled.
        cursor: the rows after which a full ring will be overwritten.
        length: records in a slice, L.
        missing: so many records may a slice that begins inside a trajectory lack; True: L - 1.
        strict: leave out trajectories shorter than `length`; otherwise their first records may
            begin a slice too.
    """
    if missing is not True and missing >= length:
        raise ConfigurationError(
            f"span: expected less than the {length} records of a slice, got {missing}"
        )
    shortest = 1 if missing is True else length - missing
    end = end.clone()
    end[list(cursor) if full else -1] = True
    end[-1] |= ~end.any(0)  # a full ring of which nobody knows where it begins
    allowed = ~_any_ahead(end, shortest - 1)
    if not strict:
        allowed |= end.roll(1, 0)
    elif shortest < length:
        allowed &= ~_in_short_ones(end, length)
    return Starts(allowed.flatten().nonzero().squeeze(-1), end)


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


# --- a batch --------------------------------------------------------------------------------------


def choose(
    mass: Tensor, n: int, draw: str, method: str, generator: torch.Generator | None
) -> Tensor:
    """Draw n positions, int64 [n], in proportion to masses [S] that serve one draw, in O(S)."""
    if validation.can_raise(mass) and not mass.any():
        raise EmptyBufferError(f"expected a positive priority, got 0 for all {len(mass)} starts")
    if draws.resolve_method(method, draw, len(mass), mass.device) == "multinomial":
        if draw == "without_replacement" and validation.can_raise(mass):
            draws.require_enough(int(mass.count_nonzero()), n)
        return draws.multinomial(mass, n, draw, generator)
    tree = SumTree(len(mass), mass.device)
    tree.fill(mass)
    return tree.sample(n, generator, draw=draw)


def advance(slot: Tensor, rows: Tensor, shape: torch.Size) -> Tensor:
    """Flat indices of the records `rows` later in the ring, in a storage of this shape."""
    return (slot + rows * (shape.numel() // shape[0])) % shape.numel()


def marks(
    data: Any,
    where: tuple[Tensor, ...],
    begins: Tensor,
    ends: Tensor,
    truncated_key: NestedKey | None,
    init_key: NestedKey | None,
) -> dict[NestedKey, Tensor]:
    """The stored flags of R records, joined with the begins and ends of their slices.

    `truncated_key` gets `ends`; "done" beside it the stored flag or `ends`, "terminated" the stored
    flag. `init_key` gets the stored flag or `begins`, if there is a stored one.

    Args:
        data: the contents of the storage; only a tensordict has stored flags.
        where: indices of the records, a tuple of int64 [R].
        begins, ends: True for the first and last records of slices, bool, R in all.
    """

    def stored(key: NestedKey) -> Tensor | None:
        entry = data.get(key, None) if is_tensor_collection(data) else None
        return None if entry is None else entry[tuple(i.to(entry.device) for i in where)]

    def joined(flags: Tensor, more: Tensor) -> Tensor:
        return (flags.bool() | more).to(flags.dtype)  # some environments store floats

    result: dict[NestedKey, Tensor] = {}
    if truncated_key is not None:
        done_key, terminated_key = (_beside(truncated_key, k) for k in ("done", "terminated"))
        done, terminated = stored(done_key), stored(terminated_key)
        truncated = _as_shaped(ends, done)
        result[truncated_key] = truncated
        result[done_key] = truncated.clone() if done is None else joined(done, truncated)
        result[terminated_key] = torch.zeros_like(truncated) if terminated is None else terminated
    init = None if init_key is None else stored(init_key)
    if init_key is not None and init is not None:
        result[init_key] = joined(init, _as_shaped(begins, init))
    return result


def _beside(key: NestedKey, name: str) -> NestedKey:
    return name if isinstance(key, str) else (*key[:-1], name)


def _as_shaped(flags: Tensor, like: Tensor | None) -> Tensor:
    """Flags of R records in the shape of the stored entry `like`; [R, 1] if there is none."""
    if like is None:
        return flags.reshape(-1, 1)
    flags = flags.to(like.device).reshape(-1, *[1] * (like.ndim - 1))
    return flags.expand_as(like).clone()


def first_records(
    batch: TensorDictBase, key: NestedKey, *, reduction: str, unit: str
) -> TensorDict:
    """The first record of each slice: see `PrioritizedSliceSampler.first_records`.

    The batch is [R], slice after slice, or [..., S, L], a slice along the last dimension. Each
    record has one or several values at `key`, in the `unit`.
    """
    records = batch.batch_size.numel()
    if not records:
        raise PriorityError(f"expected a batch with records, got shape {list(batch.shape)}")
    values = magnitude(required(batch, key), unit).reshape(records, -1)
    start = required(batch, START).reshape(records, -1)
    lengths = _lengths(batch, start, required(batch, "index").reshape(records, -1)[:, 0])
    first = lengths.cumsum(0) - lengths
    priority = values.new_empty(len(lengths))
    for length in sorted(set(lengths.tolist())):
        these = lengths == length
        of_slice = first[these].unsqueeze(-1) + torch.arange(length, device=first.device)
        priority[these] = reduce_priority(values[of_slice], reduction)
    result = TensorDict({"index": start[first]}, [len(lengths)])
    if batch.get(START_GENERATION, None) is not None:
        result["index_generation"] = batch[START_GENERATION].reshape(records, -1)[first, 0]
    return result.set(key, priority**2 if unit == "squared" else priority)


def _lengths(batch: TensorDictBase, start: Tensor, row: Tensor) -> Tensor:
    """Count the records of each slice of a batch, whatever has been cut off, int64 [S].

    Args:
        batch: as in `first_records`.
        start: first slot of each record's slice, int64 [R, ndim].
        row: slot of each record in the first dimension of the storage, int64 [R].
    """
    if batch.ndim > 1:
        length = batch.shape[-1]
        slices = batch.numel() // length
        rows = start.view(slices, length, -1)
        if validation.can_raise(start) and (rows != rows[:, :1]).any():
            raise PriorityError(
                f"expected a batch [slices, length] with one slice in each row, got"
                f" {list(batch.shape)} with several slices in a row"
            )
        return torch.full((slices,), length, dtype=torch.int64, device=start.device)
    place = row - start[:, 0]
    place = torch.where(place < 0, place + _LAP, place)  # around the end of the ring
    same = (start[1:] == start[:-1]).all(-1) & (place[1:] > place[:-1])
    first = torch.nn.functional.pad(~same, (1, 0), value=True).nonzero().squeeze(-1)
    return torch.diff(first, append=first.new_tensor([len(place)]))

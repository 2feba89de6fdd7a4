"""Batches of slices, record after record, slice after slice: pure functions on tensors."""

from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase, is_tensor_collection
from tensordict.utils import NestedKey
from torch import Tensor

from per_td import draws, validation
from per_td.errors import EmptyBufferError, PriorityError
from per_td.torchrl.td_errors import magnitude, reduce_priority, required
from per_td.tree import SumTree

START, START_GENERATION = "slice_start", "slice_start_generation"
"""Entries of every record of a batch: slot and generation of the first record of its slice."""

_LAP = 2**48
"""More rows than a storage has."""


def choose(
    mass: Tensor, n: int, draw: str, method: str, generator: torch.Generator | None
) -> Tensor:
    """Draw positions in proportion to masses that serve one draw, in O(S).

    Args:
        mass: float32 [S].
        n: number of positions.
        draw: "independent", "stratified" or "without_replacement".
        method: "auto", "tree" or "multinomial".
        generator: source of the random numbers.

    Returns:
        int64 [n].

    Raises:
        EmptyBufferError: nothing, or not enough, can be drawn.
    """
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


def _beside(key: NestedKey, name: str) -> NestedKey:
    return name if isinstance(key, str) else (*key[:-1], name)


def _as_shaped(flags: Tensor, like: Tensor | None) -> Tensor:
    """Flags of R records in the shape of the stored entry `like`; [R, 1] if there is none."""
    flags = flags.reshape(-1, 1)
    if like is None:
        return flags
    flags = flags.to(like.device).reshape(-1, *[1] * (like.ndim - 1))
    return flags.expand_as(like).clone()


def marks(
    data: Any,
    where: tuple[Tensor, ...],
    begins: Tensor,
    ends: Tensor,
    truncated_key: NestedKey | None,
    init_key: NestedKey | None,
) -> dict[NestedKey, Tensor]:
    """The stored flags of records, joined with the begins and ends of their slices.

    Args:
        data: the contents of the storage; only a tensordict has stored flags.
        where: indices of the records, a tuple of int64 [R].
        begins: True for the first record of a slice, bool, R in all.
        ends: True for the last record of a slice, bool, R in all.
        truncated_key: gets `ends`; "done" beside it the stored flag or `ends`; "terminated" the
            stored flag. None for none of them.
        init_key: gets the stored flag or `begins`, if there is a stored one.
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


def _lengths(batch: TensorDictBase, start: Tensor, row: Tensor) -> Tensor:
    """Count the records of each slice of a batch, whatever has been cut off, int64 [S].

    Args:
        batch: [R], slice after slice, or [..., S, L], a slice along the last dimension.
        start: first slot of each record's slice, int64 [R, ndim].
        row: slot of each record in the first dimension of the storage, int64 [R].

    Raises:
        PriorityError: the batch has several dimensions, and the last is not that of a slice.
    """
    if batch.ndim > 1:
        length = batch.shape[-1]
        slices = batch.numel() // max(length, 1)
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


def first_records(
    batch: TensorDictBase, key: NestedKey, *, reduction: str, unit: str
) -> TensorDict:
    """The first record of each slice, with |TD error| reduced over what is left of the slice.

    Args:
        batch: [R], slice after slice, or [..., S, L], a slice along the last dimension; with
            "index" and `START`. Records may have been cut off each slice.
        key: of the TD errors, one or several values per record.
        reduction: see `reduce_priority`.
        unit: of the TD errors, also in the result; see `magnitude`.

    Returns:
        TensorDict [S] with "index", `key`, and "index_generation" if the batch has that of the
        first records.

    Raises:
        PriorityError: there are no TD errors or no slots, or a row of the batch is not one slice.
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

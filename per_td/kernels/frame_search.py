"""Storing frames once, in plain torch, on any device: the host waits for nothing.

A frame is compared with those that its environment stored lately. A hash of 64 bits finds the one
that may be equal, and its bytes decide: a collision costs the memory of a frame, no more.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from per_td import validation
from per_td.kernels.parts import Frames

FACTORS_SEED = 20151118
_ROWS = 256
"""Transitions compared with one another at a time; the matrices have (2 k * _ROWS)^2 numbers."""


def factors(words: int, device: torch.device) -> Tensor:
    """Odd factors of the hash, int64 [words], the same on every device."""
    source = torch.Generator("cpu").manual_seed(FACTORS_SEED)
    span = (-(2**62), 2**62)
    drawn = torch.randint(*span, (words,), generator=source, dtype=torch.int64, device="cpu")
    return validation.to_device(2 * drawn + 1, device)


def _hashes(lanes: Tensor, by: Tensor) -> Tensor:
    """Hash rows [C, words] of integers, int64 [C]."""
    words = lanes.long() * by  # spreads the low bits upwards, of which floats have few
    return ((words ^ (words >> 32)) * by).sum(-1)


def store_frames(
    frames: Frames, stacks: Sequence[Tensor], env: Tensor
) -> tuple[list[Tensor], Tensor]:
    """Store the frames of n transitions that are not among the recent ones of their environment.

    Each transition has two stacks [n, k, ...], and an environment int64 [n].

    Returns:
        Places of the frames in the ring, int32 [n, k] for each stack, and the number of the oldest
        frame that each transition refers to, int64 [n].

    Raises:
        PerTdError: an environment does not exist, or stacks do not fit (by compiled kernels).
    """
    device, n = frames.lanes.device, len(env)
    if not n:
        empty = torch.empty((0, frames.depth), dtype=torch.int32, device=device)
        return [empty for _ in stacks], torch.empty(0, dtype=torch.int64, device=device)
    lanes = [_lanes(frames, validation.plain_rows(stack.detach(), device), n) for stack in stacks]
    env = env.clamp(0, frames.envs - 1)  # on CUDA nobody looks; a wrong one costs memory, no more
    parts = []
    for at in range(0, n, _ROWS):
        some = torch.cat([each[at : at + _ROWS] for each in lanes], 1)
        parts.append(_store(frames, some, env[at : at + _ROWS]))
    number = torch.cat(parts)
    place = (number % frames.size).int()
    return list(torch.split(place, frames.depth, 1)), number.amin(1)


def _lanes(frames: Frames, rows: Tensor, n: int) -> Tensor:
    """View stacks as integers, [n, k, words]."""
    if rows.storage_offset() * rows.itemsize % frames.lanes.itemsize:
        rows = rows.clone()
    return rows.view(n, frames.depth, -1).view(frames.lanes.dtype)


def _store(frames: Frames, lanes: Tensor, env: Tensor) -> Tensor:
    """Store the frames of some transitions; return their numbers, int64 [n, 2 k]."""
    (n, width), size = lanes.shape[:2], frames.size
    new, device, total = lanes.flatten(0, 1), lanes.device, n * width
    hashes = _hashes(new, frames.factors)
    counts, writes = frames.counters[:2]
    cursor, floor = frames.page
    # the number of each write among those of its environment
    same = env.unsqueeze(1) == env
    order = torch.arange(n, device=device)
    time = writes[env] + (same & (order < order.unsqueeze(1))).sum(1)
    owner, time = env.repeat_interleave(width), time.repeat_interleave(width)
    # the newest of the recent frames with this hash, or else the first here
    known, number, stored_at = (table[owner] for table in frames.recent)
    there = (number >= torch.maximum(floor, cursor - size)) & (number < cursor)
    there &= stored_at >= time.unsqueeze(1) - frames.look_back
    candidate = torch.where(there & (known == hashes.unsqueeze(1)), number, -1).amax(1)
    at = torch.arange(total, device=device)
    same = owner.unsqueeze(1) == owner
    alike = same & (hashes.unsqueeze(1) == hashes) & (at <= at.unsqueeze(1))
    first = torch.where(alike, at, total).amin(1)
    remembered = candidate >= 0
    held = frames.lanes.index_select(0, candidate.clamp(min=0) % size)
    held = torch.where(remembered.unsqueeze(1), held, new.index_select(0, first))
    equal = (held == new).all(1)
    remembered &= equal
    stored = ~(remembered | (equal & (candidate < 0) & (first < at)))
    number = torch.where(remembered, candidate, cursor - 1 + stored.cumsum(0))
    number = torch.where(stored | remembered, number, number[first])
    after = cursor + stored.sum()
    # of more than the ring holds, the last; the spare row takes the others
    written = stored & (number >= after - size)
    cursor.copy_(after)  # first: what is overwritten is gone
    frames.lanes.index_copy_(0, torch.where(written, number % size, size), new)
    _remember(frames, owner, stored, torch.stack([hashes, number, time]), same)
    counts.index_add_(0, owner, stored.long())
    writes.index_add_(0, env, torch.ones_like(env))
    return number.view(n, width)


def _remember(frames: Frames, owner: Tensor, stored: Tensor, entries: Tensor, same: Tensor) -> None:
    """Put stored frames among the recent ones of their environments; of too many, the last."""
    at, length = torch.arange(len(owner), device=owner.device), frames.recent.shape[-1]
    own = same & stored
    before, total = (own & (at < at.unsqueeze(1))).sum(1), own.sum(1)
    kept = stored & (before >= total - length)
    row = torch.where(kept, owner, frames.envs)
    frames.recent[:, row, (frames.counters[0][owner] + before) % length] = entries

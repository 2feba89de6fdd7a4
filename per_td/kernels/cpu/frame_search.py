"""Compiled storing of frames, each once; `per_td.kernels.frame_search` describes it.

Frames come in an order: after those that the last stack of an environment showed come the next
ones. So most are compared with one frame, and need no hash.
"""

from typing import Any

import numpy as np

from per_td.kernels.cpu.compiling import kernel, part
from per_td.kernels.cpu.memory import copy, frames_at, integers, shorts

_BLOCK = 64


@part()
def _equal(one: int, other: int, words: int) -> bool:
    """True if `words` numbers of 8 bytes at two addresses are equal."""
    x, y = integers(one, words), integers(other, words)
    for begin in range(0, words, _BLOCK):
        some, others = x[begin : begin + _BLOCK], y[begin : begin + _BLOCK]
        differs = np.int64(0)
        for i in range(some.shape[0]):  # LLVM makes vectors of it, without an exit in between
            differs |= some[i] ^ others[i]
        if differs != 0:
            return False
    return True


@part()
def _hash(place: int, factors: Any) -> Any:
    words = integers(place, factors.shape[0])
    found = np.int64(0)
    for i in range(factors.shape[0]):
        mixed = words[i] * factors[i]
        found += (mixed ^ (mixed >> 32)) * factors[i]
    return found


@part()
def _is_there(frames: Any, page: Any, number: int, stored_at: int, time: int) -> bool:
    """True if a frame is neither overwritten, nor gone, nor too old to be looked for."""
    return (
        number >= max(page[1], page[0] - frames.size)
        and number < page[0]
        and stored_at >= time - frames.look_back
    )


@part()
def _place(frames: Any, number: int) -> int:
    """Address of a frame."""
    return frames.lanes + (number % frames.size) * frames.words * 8


@kernel("boolean(int64, int64, int64, int64, int64, int64)")
def store(record: int, source: int, env: int, n: int, to: int, oldest: int) -> bool:
    """Run `store_frames`; False, and nothing is stored, if an environment does not exist.

    `source` and `to` have the addresses, int64 [2], of two stacks [n, depth, words] and of the
    places found, int32 [n, depth]. `oldest` takes each transition's oldest frame, int64 [n].
    """
    frames = frames_at(record)
    at, depth = integers(env, n).copy(), frames.depth
    for i in range(n):
        if not 0 <= at[i] < frames.envs:
            return False
    rows, length, words = frames.envs + 1, frames.length, frames.words
    hashes = integers(frames.recent, rows * length)
    numbers = integers(frames.recent + 8 * rows * length, rows * length)
    times = integers(frames.recent + 16 * rows * length, rows * length)
    counters, page = integers(frames.counters, 4 * rows), integers(frames.page, 2)
    factors = integers(frames.factors, words)
    sources, targets, low = integers(source, 2), integers(to, 2), integers(oldest, n)
    for i in range(n):
        e = at[i]
        base, time, low[i] = e * length, counters[rows + e], np.int64(2**63 - 1)
        for s in range(2):
            found = shorts(targets[s] + 4 * i * depth, depth)
            spot = counters[(2 + s) * rows + e]
            for j in range(depth):
                new = sources[s] + 8 * (i * depth + j) * words
                spot = spot + 1 if spot + 1 < length else 0
                number = numbers[base + spot]
                known = _is_there(frames, page, number, times[base + spot], time)
                known = known and _equal(_place(frames, number), new, words)
                if not known:
                    own = _hash(new, factors)
                    spot = counters[e] % length
                    for _ in range(length):  # the newest first
                        spot = spot - 1 if spot > 0 else length - 1
                        number = numbers[base + spot]
                        if hashes[base + spot] != own:
                            continue
                        if not _is_there(frames, page, number, times[base + spot], time):
                            continue
                        if _equal(_place(frames, number), new, words):
                            known = True
                            break
                    if not known:
                        # in this order: a process may end in between
                        number, spot = page[0], counters[e] % length
                        page[0] = number + 1
                        copy(_place(frames, number), new, 8 * words)
                        hashes[base + spot], times[base + spot] = own, time
                        numbers[base + spot] = number
                        counters[e] += 1
                if j == 0:
                    counters[(2 + s) * rows + e] = spot
                found[j] = number % frames.size
                low[i] = min(low[i], number)
        counters[rows + e] += 1
    return True

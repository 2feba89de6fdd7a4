"""Episodes that can be told apart, and which of their records may begin a slice."""

import torch
from tensordict import TensorDict
from torchrl.data import (
    LazyTensorStorage,
    TensorDictReplayBuffer,
)

from per_td.torchrl import PrioritizedSliceSampler

ALPHA, BETA, EPS = 0.7, 0.9, 1e-8
DONE, TRUNCATED = ("next", "done"), ("next", "truncated")


class Stream:
    """Records 0, 1, 2, ... of one environment, in episodes of random lengths."""

    def __init__(self, steps, seed, longest=7):
        torch.manual_seed(seed)  # for what is drawn from it
        own = torch.Generator().manual_seed(seed)  # a thread that prefetches draws from torch's
        self.episode, self.last = [], []
        while len(self.episode) < steps:
            length = int(torch.randint(1, longest + 1, (), generator=own))
            self.episode += [self.episode[-1] + 1 if self.episode else 0] * length
            self.last += [False] * (length - 1) + [True]

    def data(self, start, stop):
        k = torch.arange(start, stop)
        last = torch.tensor(self.last[start:stop], dtype=torch.bool).unsqueeze(-1)
        cut = last & (k % 2 == 0).unsqueeze(-1)  # some episodes are cut off, and not done
        return TensorDict(
            {"k": k, "next": {"done": last & ~cut, "truncated": cut}, "is_init": last.roll(1)},
            [stop - start],
        )


def left_in(stream, k, newest):
    """Records from k to the end of its episode, or to the newest, one by one."""
    n = 1
    while not stream.last[k] and k < newest:
        k, n = k + 1, n + 1
    return n


def valid_starts(stream, oldest, newest, length, shortest, strict):
    """The records that may begin a slice, and how many records it then has."""
    starts = {}
    for k in range(oldest, newest + 1):
        first = k
        while first > oldest and stream.episode[first - 1] == stream.episode[k]:
            first -= 1
        left, whole = left_in(stream, k, newest), left_in(stream, first, newest)
        if (left >= shortest and not (strict and whole < length)) or (not strict and k == first):
            starts[k] = min(left, length)
    return starts


def filled(capacity, streams, steps, storage=LazyTensorStorage, chunk=5, **settings):
    """A buffer with `steps` records of each stream; one stream is 1-D, several are 2-D."""
    many = len(streams) > 1
    sampler = PrioritizedSliceSampler(capacity * len(streams), ALPHA, BETA, EPS, **settings)
    buffer = TensorDictReplayBuffer(
        storage=storage(capacity * len(streams), ndim=2 if many else 1), sampler=sampler
    )
    for start in range(0, steps, chunk):
        data = [s.data(start, min(start + chunk, steps)) for s in streams]
        buffer.extend(torch.stack(data) if many else data[0])
    return buffer


def slices_of(batch, length):
    return [piece["k"].tolist() for piece in batch.split(length)]

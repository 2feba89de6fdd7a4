"""The same for every contestant: transitions, priorities, fresh slots and TD errors."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from tensordict import TensorDict
from torch import Tensor

ALPHA, BETA, EPS = 0.6, 0.4, 1e-6

Fields = dict[str, tuple[tuple[int, ...], torch.dtype]]

SCHEMAS: dict[str, Fields] = {
    "standard": {  # five leaves, 77 bytes: LunarLander
        "observation": ((8,), torch.float32),
        "action": ((), torch.int64),
        "reward": ((), torch.float32),
        "next_observation": ((8,), torch.float32),
        "done": ((), torch.bool),
    },
    "large": {  # five leaves, 3,113 bytes: a humanoid's observations
        "observation": ((376,), torch.float32),
        "action": ((17,), torch.float32),
        "reward": ((), torch.float32),
        "next_observation": ((376,), torch.float32),
        "done": ((1,), torch.bool),
    },
    "number": {"number": ((), torch.int64)},  # 8 bytes, so that 10^8 of them fit everywhere
}


@dataclass(frozen=True)
class Point:
    """The point in the grid of a case at which a contestant is measured.

    Attributes:
        capacity: slots, all of them filled.
        batch: transitions per call.
        schema: which fields transitions have; a key of `SCHEMAS`.
        draw: how indices are drawn.
        device: "cpu" or "cuda".
        seed: of all random numbers.
    """

    capacity: int
    batch: int
    schema: str = "standard"
    draw: str = "independent"
    device: str = "cpu"
    seed: int = 0


def transitions(n: int, schema: str, device: str = "cpu") -> TensorDict:
    """`n` transitions whose leaves are random numbers, [n].

    The numbers are a block of 2^16 that repeats: their values do not matter here, and
    random numbers for 10^8 of them would take longer than the benchmark.
    """
    leaves = {}
    for key, (shape, dtype) in SCHEMAS[schema].items():
        block = torch.rand(min(n, 2**16), *shape, device=device).mul_(2).to(dtype)
        leaf = torch.empty(n, *shape, dtype=dtype, device=device)
        for start in range(0, n, len(block)):
            leaf[start : start + len(block)] = block[: n - start]
        leaves[key] = leaf
    return TensorDict(leaves, batch_size=[n], device=device)


def priorities(n: int, device: str = "cpu") -> Tensor:
    """|TD errors| as training leaves them, roughly: log-normal, float32 [n]."""
    return torch.empty(n, device=device).log_normal_()


class Pool:
    """Slots and TD errors drawn beforehand, more than a cache holds, handed out in turn.

    Args:
        point: tells the range of the slots and the size of a batch.
        size: how many of each. 2^22 slots and TD errors take 48 MiB.
    """

    def __init__(self, point: Point, size: int = 2**22) -> None:
        size = max(size if point.capacity > 10_000 else 2**16, 2 * point.batch)
        device = point.device
        self.index = torch.randint(point.capacity, (size,), device=device)
        sign = torch.randint(2, (size,), device=device).mul_(2).sub_(1)
        self.td_error = priorities(size, device) * sign
        self._batch = point.batch
        self._at = 0

    def next(self, convert: Callable[[Tensor], object] = lambda tensor: tensor) -> tuple:
        """The next slots int64 [B] and TD errors float32 [B], each passed through `convert`."""
        if self._at + self._batch > len(self.index):
            self._at = 0
        part = slice(self._at, self._at + self._batch)
        self._at += self._batch
        return convert(self.index[part]), convert(self.td_error[part])

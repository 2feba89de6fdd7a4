"""One prioritized replay buffer over many Ray actors: see docs/ray.md."""

from per_td.ray.buffer import ShardedReplayBuffer
from per_td.ray.wire import ShardError
from per_td.ray.writer import Receipt, Writer

__all__ = ["Receipt", "ShardError", "ShardedReplayBuffer", "Writer"]

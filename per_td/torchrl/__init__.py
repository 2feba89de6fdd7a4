"""Drop-ins for TorchRL's prioritized sampler and buffer: switching is one import line."""

from per_td.torchrl.buffer import TensorDictPrioritizedReplayBuffer
from per_td.torchrl.sampler import PrioritizedSampler

__all__ = ["PrioritizedSampler", "TensorDictPrioritizedReplayBuffer"]

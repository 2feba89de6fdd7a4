"""Drop-ins for TorchRL's prioritized samplers and buffer: switching is one import line."""

from per_td.torchrl.buffer import TensorDictPrioritizedReplayBuffer
from per_td.torchrl.sampler import PrioritizedSampler
from per_td.torchrl.slices import PrioritizedSliceSampler

__all__ = ["PrioritizedSampler", "PrioritizedSliceSampler", "TensorDictPrioritizedReplayBuffer"]

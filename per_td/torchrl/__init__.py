"""Drop-ins for TorchRL's prioritized samplers and buffer: switching is one import line."""

try:
    import torchrl.data  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"per_td.torchrl needs TorchRL, which cannot be imported ({error}); to install it:"
        ' pip install "per-td[torchrl]"',
        name="torchrl",
    ) from error

from per_td.torchrl.buffer import TensorDictPrioritizedReplayBuffer
from per_td.torchrl.sampler import PrioritizedSampler
from per_td.torchrl.slices import PrioritizedSliceSampler

__all__ = ["PrioritizedSampler", "PrioritizedSliceSampler", "TensorDictPrioritizedReplayBuffer"]

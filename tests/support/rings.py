"""What is in a ring of transitions."""

from tensordict import TensorDict
from torch import Tensor

from per_td.storage.ring import RingStorage


def read(ring: RingStorage, index: Tensor) -> TensorDict:
    """The transitions in the slots `index` as a batch has them."""
    rows, generation = ring.gather(index)
    return ring.batch(rows, {"index": index, "generation": ring.in_batch(generation)})

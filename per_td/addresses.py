"""Memory of tensors, looked at before anything reads it by its address."""

from torch import Tensor

__all__ = ["has_memory"]


def has_memory(tensor: Tensor) -> bool:
    """True unless reading the tensor's memory on the CPU would end the process: it has none.

    Such are distributed and functionalized tensors, and those whose storage has been freed.
    """
    if not tensor.is_cpu:  # only the CPU's kernels read addresses
        return True
    try:
        return tensor.data_ptr() != 0 or not tensor.numel()
    except RuntimeError:  # torch refuses to tell, for those of vmap
        return False

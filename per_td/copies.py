"""Copied: objects of which another process gets a copy, where torch would share their memory."""

import copy
import pickle
import threading
from typing import Any, Self, SupportsIndex

import torch

_this_thread = threading.local()


@torch.inference_mode(False)
def _loads(data: bytes) -> Any:
    """Make a copy that can be changed outside of the caller's inference mode."""
    return pickle.loads(data)


class Copied:
    """Base of objects that are pickled as copies, whoever pickles them.

    For a process that is being started, and in a queue of torch.multiprocessing, torch puts tensors
    into memory that both processes share from then on, while the numbers beside them, such as how
    much was written, are copied. So the outermost of these objects is pickled on its own, by
    Python's pickle, which copies, and is sent as bytes. `copy.deepcopy` makes no such bytes.
    """

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        if getattr(_this_thread, "copying", False):
            return super().__reduce_ex__(protocol)
        _this_thread.copying = True
        try:
            return _loads, (pickle.dumps(self, pickle.HIGHEST_PROTOCOL),)
        finally:
            _this_thread.copying = False

    @torch.inference_mode(False)
    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        made = memo[id(self)] = type(self).__new__(type(self))
        state: Any = copy.deepcopy(self.__getstate__(), memo)
        take_up = getattr(made, "__setstate__", made.__dict__.update)
        take_up(state)
        return made

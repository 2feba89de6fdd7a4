"""LockedReplayBuffer: a buffer for several threads, which may draw ahead in one of its own."""

import threading
from collections.abc import Callable
from functools import wraps
from typing import Any, SupportsIndex, TypeVar

import torch
from tensordict import TensorDict

from per_td import validation
from per_td.buffer import MANY_ALONE, PrioritizedReplayBuffer
from per_td.concurrency.prefetch import Prefetcher
from per_td.errors import ConfigurationError

__all__ = ["LockedReplayBuffer"]

T = TypeVar("T")


def _alone(method: Callable[..., T]) -> Callable[..., T]:
    """The method with the buffer's lock held, so that nothing else runs beside it."""

    @wraps(method)
    def call(self: "LockedReplayBuffer", *args: Any, **given: Any) -> T:
        with self._lock:
            return method(self, *args, **given)

    return call


def _read_alone(view: Any) -> Any:
    """The property with the buffer's lock held."""
    return property(_alone(view.fget), doc=view.__doc__)


class LockedReplayBuffer(PrioritizedReplayBuffer):
    """A `PrioritizedReplayBuffer` that threads share: one lock is held in every call.

    `PrioritizedReplayBuffer(capacity, threads=True)` makes one, and so does `prefetch=k`: a thread
    in the background then draws batches of `batch_size` ahead, and `sample` returns the oldest. The
    k-th batch from now may have been drawn already: its transitions, weights and generations are
    those of that moment, later updates and writings are not seen, and updates of what has been
    overwritten since are recognised by the generation. The draws take the numbers of the generator
    in their order, but which priorities they meet is a matter of time: runs do not repeat exactly.
    What goes wrong in the thread is raised by `sample`. `extend`, `sample` with another batch size
    and `sample_leaves` do not wait for it.

    A compiled function (torch.compile) cannot have a lock within one graph.

    Args:
        settings: those of `PrioritizedReplayBuffer`, without `num_buffers`.

    Raises:
        ConfigurationError: an argument is not one of those accepted.
    """

    _prefetch = 0
    _ahead: Prefetcher | None = None

    prefetch: int = validation.fixed("prefetch", lambda self: self._prefetch)
    """How many batches are drawn ahead."""

    def _arrange(self, **wanted: Any) -> None:
        if self.num_buffers is not None:
            raise ConfigurationError(
                f"num_buffers: expected None, got {self.num_buffers}: {MANY_ALONE}"
            )
        ahead, n = wanted["prefetch"], self.batch_size
        self._prefetch = validation.integer("prefetch", ahead, 0) if ahead else 0
        if ahead and n is None:
            raise ConfigurationError("batch_size: expected one beside prefetch, got None")
        super()._arrange(shared=wanted["shared"])
        self._lock: Any = threading.RLock()
        self._ahead = self._prefetcher()

    def _prefetcher(self) -> Prefetcher | None:
        if not self._prefetch:
            return None
        return Prefetcher(self, lambda buffer: buffer._sample_now(None), self._prefetch)

    def __getstate__(self) -> dict[str, Any]:
        """Locks and threads are each object's own."""
        return self.__dict__ | {"_lock": None, "_ahead": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._lock is None:
            self._lock = threading.RLock()
        self._ahead = self._prefetcher()

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        with self._lock:
            return super().__reduce_ex__(protocol)

    __deepcopy__ = _alone(PrioritizedReplayBuffer.__deepcopy__)

    def sample(self, batch_size: int | None = None) -> TensorDict:
        """As `PrioritizedReplayBuffer.sample`; with `prefetch`, the oldest batch drawn ahead."""
        if self._ahead is not None and batch_size in (None, self.batch_size):
            batch = self._ahead.next()
            if batch_size is None or len(batch) == batch_size:  # or it has been set meanwhile
                return batch
        return self._sample_now(batch_size)

    def _sample_now(self, batch_size: int | None) -> TensorDict:
        with self._lock:
            return super().sample(batch_size)

    def close(self) -> None:
        """End the thread of `prefetch` and drop what it has drawn; `sample` starts another.

        When the buffer is garbage, the thread ends too.
        """
        if self._ahead is not None:
            self._ahead.close()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As `PrioritizedReplayBuffer.load_state_dict`; what was drawn ahead is dropped."""
        with self._lock:
            super().load_state_dict(state)
            self._drop_ahead()

    def _drop_ahead(self) -> None:
        """Forget what was drawn with other settings, which were changed before this is called."""
        if self._ahead is not None:
            self._ahead.drop()

    def _set_batch_size(self, value: int | None) -> None:
        if value is None and self._prefetch:
            raise ConfigurationError("batch_size: expected one beside prefetch, got None")
        super()._set_batch_size(value)
        self._drop_ahead()

    def _set_generator(self, value: torch.Generator | None) -> None:
        super()._set_generator(value)
        self._drop_ahead()

    def _choose(self, **changes: str) -> None:
        with self._lock:
            super()._choose(**changes)
            self._drop_ahead()

    def _set_alpha(self, value: float) -> None:
        with self._lock:
            self._priorities.alpha = value

    alpha = property(lambda self: self._priorities.alpha, _set_alpha)
    priority = _read_alone(PrioritizedReplayBuffer.priority)
    mass = _read_alone(PrioritizedReplayBuffer.mass)
    total_mass = _read_alone(PrioritizedReplayBuffer.total_mass)
    smallest_mass = _read_alone(PrioritizedReplayBuffer.smallest_mass)
    replayed = _read_alone(PrioritizedReplayBuffer.replayed)
    add = _alone(PrioritizedReplayBuffer.add)
    extend = _alone(PrioritizedReplayBuffer.extend)
    extend_leaves = _alone(PrioritizedReplayBuffer.extend_leaves)
    sample_leaves = _alone(PrioritizedReplayBuffer.sample_leaves)
    draw_leaves = _alone(PrioritizedReplayBuffer.draw_leaves)
    generation_of = _alone(PrioritizedReplayBuffer.generation_of)
    count_stale = _alone(PrioritizedReplayBuffer.count_stale)
    check_valid = _alone(PrioritizedReplayBuffer.check_valid)
    update_priority = _alone(PrioritizedReplayBuffer.update_priority)
    increase_beta = _alone(PrioritizedReplayBuffer.increase_beta)
    diagnostics = _alone(PrioritizedReplayBuffer.diagnostics)
    state_dict = _alone(PrioritizedReplayBuffer.state_dict)
    save = _alone(PrioritizedReplayBuffer.save)

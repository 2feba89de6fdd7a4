"""TransitionReplayBuffer: the course's push / tuple interface."""

import os
from collections.abc import Iterable
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from per_td import validation
from per_td.buffer import PrioritizedReplayBuffer
from per_td.checkpoint import file as checkpoint
from per_td.checkpoint import state as states
from per_td.copies import Copied
from per_td.errors import CheckpointError, SchemaError
from per_td.storage.leaves import Leaves

__all__ = ["TransitionReplayBuffer"]

_KEYS = {"state", "action", "reward", "next_state", "done"}

_NEVER = 2**62
"""More than any generation: of a slot that was never drawn."""

Batch = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _observation(name: str, value: Any) -> Tensor:
    """[1, *obs]; floating point as float32, integers (images, say) in their own dtype."""
    if isinstance(value, np.ndarray) and value.dtype.kind == "f" and value.flags.carray:
        return torch.from_numpy(value[None].astype(np.float32, copy=False))
    tensor = validation.as_tensor(name, value, SchemaError)
    if tensor.is_complex():
        raise SchemaError(f"{name}: expected real numbers, got {tensor.dtype}")
    return (tensor.float() if tensor.is_floating_point() else tensor).unsqueeze(0)


_PLAIN: dict[torch.dtype, tuple[tuple[type, ...], Any]] = {
    torch.int64: ((int, np.integer), np.int64),
    torch.float32: ((int, float, np.integer, np.floating), np.float32),
    torch.bool: ((bool, np.bool_), np.bool_),
}
"""For each dtype, Python's and numpy's numbers that need no questions, and numpy's own dtype."""


def _scalar(name: str, value: Any, dtype: torch.dtype) -> Tensor:
    """[1]; numpy makes tensors of plain numbers in a quarter of the time that torch takes."""
    plain, numpy_dtype = _PLAIN[dtype]
    if isinstance(value, plain):
        try:
            return torch.from_numpy(np.array([value], numpy_dtype))
        except OverflowError as error:
            raise SchemaError(f"{name}: expected a number that fits {dtype}: {error}") from error
    number = validation.as_tensor(name, value, SchemaError)
    if number.numel() != 1:
        raise SchemaError(f"{name}: expected one number, got shape {list(number.shape)}")
    if number.is_complex() or (dtype == torch.int64 and number.is_floating_point()):
        expected = "an integer" if dtype == torch.int64 else "a real number"
        raise SchemaError(f"{name}: expected {expected}, got {number.dtype}")
    return number.reshape(1).to(dtype)


def _passed_on(name: str, doc: str) -> Any:
    """A setting of the buffer underneath, which is read and set there, or refused."""
    return property(
        lambda self: getattr(self.buffer, name),
        lambda self, value: setattr(self.buffer, name, value),
        doc=doc,
    )


class TransitionReplayBuffer(Copied):
    """Prioritized replay of (state, action, reward, next_state, done), as taught in courses.

    Priorities are |TD error| + epsilon, a new transition gets the largest in the buffer, and the
    weights are divided by the largest of the batch. `self.buffer` is the `PrioritizedReplayBuffer`
    underneath, with all that it offers (saving, settings, statistics).

    An update whose transition has been overwritten since its slot was last drawn here is dropped
    and counted in `stats`. A slot that was never drawn takes any update, and so does every slot
    after a state has been loaded, until it is drawn again.

    Args:
        capacity: number of transitions kept; beyond it, the oldest makes room.
        alpha: exponent of the priorities, at least 0; 0 draws uniformly. May be set at any time.
            None takes the paper's: 0.6, or 0.7 with "rank".
        beta: exponent of the weights at first, in [0, 1]. May be set at any time.
        beta_increment: added to beta by each `increase_beta`, up to 1. May be set at any time.
        epsilon: added to |TD error|. May be set at any time.
        draw, method, prioritization, device, generator: those of `PrioritizedReplayBuffer`.

    Raises:
        ConfigurationError: an argument is not one of those accepted.

    Example:
        >>> buffer = TransitionReplayBuffer(100)
        >>> for i in range(10):
        ...     buffer.push([0.0, 1.0], i % 2, 1.0, [1.0, 0.0], False)
        >>> states, actions, rewards, next_states, dones, indices, weights = buffer.sample(4)
        >>> buffer.update_priorities(indices, torch.rand(4))
        >>> buffer.increase_beta()
        >>> states.shape, actions.shape
        (torch.Size([4, 2]), torch.Size([4, 1]))
    """

    def __init__(
        self,
        capacity: int,
        alpha: float | None = None,
        beta: float = 0.4,
        beta_increment: float = 0.001,
        epsilon: float = 0.001,
        *,
        draw: str = "independent",
        method: str = "auto",
        prioritization: str = "proportional",
        device: torch.device | str | int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        self.buffer = PrioritizedReplayBuffer(
            capacity,
            alpha=alpha,
            beta=beta,
            eps=epsilon,
            beta_increment=beta_increment,
            draw=draw,
            method=method,
            prioritization=prioritization,
            device=device,
            generator=generator,
        )
        self._forget_draws()

    @torch.inference_mode(False)
    def _forget_draws(self) -> None:
        # the generation of each slot when it was last drawn
        self._drawn = torch.full(
            (self.capacity,), _NEVER, dtype=torch.int64, device=self.buffer.device
        )

    def __len__(self) -> int:
        return len(self.buffer)

    capacity: int = _passed_on("capacity", "Number of transitions kept; it cannot be set.")
    device: torch.device = _passed_on("device", "Where batches are; it cannot be set.")
    prioritization: str = _passed_on("prioritization", "The constructor's; it cannot be set.")
    alpha: float = _passed_on("alpha", "Exponent of the priorities; setting it costs O(N).")
    beta: float = _passed_on("beta", "Exponent of the weights, in [0, 1].")
    beta_increment: float = _passed_on("beta_increment", "What `increase_beta` adds, at least 0.")
    epsilon: float = _passed_on("eps", "Added to |TD error| by the updates from now on.")
    draw: str = _passed_on("draw", "How indices are drawn.")
    method: str = _passed_on("method", "What draws, as the constructor takes it.")
    weight_normalization: str = _passed_on(
        "weight_normalization", 'What the weights are divided by; the course\'s is "batch".'
    )
    new_priority: str = _passed_on(
        "new_priority", 'What new transitions get; the course\'s is "buffer_max".'
    )
    generator: torch.Generator | None = _passed_on(
        "generator", "Source of all random draws, None for torch's own."
    )
    eps = validation.fixed("eps", instead="expected epsilon, which can be set")

    @property
    def priority(self) -> Tensor:
        """Raw priorities of the transitions, float32 [len]."""
        return self.buffer.priority

    def stats(self) -> dict[str, int]:
        """Counters; see `PrioritizedReplayBuffer.stats`."""
        return self.buffer.stats()

    def push(self, state: Any, action: Any, reward: Any, next_state: Any, done: Any) -> None:
        """Store one transition.

        Args:
            state: observation, array or tensor [*obs].
            action: the discrete action, an integer.
            reward: a number.
            next_state: observation after it, [*obs]; the true one also where an episode ends.
            done: True if the value after it is 0: terminated, not merely truncated.

        Raises:
            SchemaError: shapes or dtypes differ from those pushed before; nothing is stored.
        """
        leaves: Leaves = {
            ("state",): _observation("state", state),
            ("action",): _scalar("action", action, torch.int64),
            ("reward",): _scalar("reward", reward, torch.float32),
            ("next_state",): _observation("next_state", next_state),
            ("done",): _scalar("done", done, torch.bool),
        }
        if leaves[("state",)].shape != leaves[("next_state",)].shape:
            raise SchemaError(
                f"next_state: expected the shape of state, {list(leaves[('state',)].shape[1:])},"
                f" got {list(leaves[('next_state',)].shape[1:])}"
            )
        self.buffer.extend_leaves(leaves)

    def sample(self, batch_size: int) -> Batch:
        """Draw a batch of B transitions in proportion to priority^alpha.

        Returns:
            states float32 [B, *obs], actions int64 [B, 1], rewards float32 [B], next_states
            float32 [B, *obs], dones float32 [B] (1 where terminated), indices int64 [B] and
            weights float32 [B].

        Raises:
            EmptyBufferError: nothing has been pushed.
        """
        leaves, index, weight, generation = self.buffer._sample_leaves(batch_size)
        self._drawn.scatter_(0, index, generation)
        return (
            leaves["state",].float(),
            leaves["action",].unsqueeze(-1),
            leaves["reward",],
            leaves["next_state",].float(),
            leaves["done",].float(),
            index,
            weight,
        )

    def update_priorities(self, indices: Any, td_errors: Any) -> None:
        """Set the priorities of `indices` [B] to |td_errors| + epsilon.

        What has been overwritten since its slot was last drawn keeps its priority.

        Args:
            indices: as `sample` gave them, [B].
            td_errors: raw TD errors, [B] or [B, 1]; sign and gradient do not matter.

        Raises:
            IndexRangeError, PriorityError: see `PrioritizedReplayBuffer.update_priority`.
        """
        indices = validation.as_index(indices, self.buffer.device)
        self.buffer.update_priority(indices, td_errors, self._generations(indices))

    def _generations(self, index: Tensor) -> Tensor | None:
        """Generations at the last draws of the slots `index`; of those never drawn, that of now.

        None stands for that of now for all: nothing has been overwritten, or a slot does not exist,
        which the buffer will refuse.
        """
        buffer, capacity = self.buffer, len(self._drawn)
        if not self._drawn.is_cpu:
            drawn = self._drawn.index_select(0, index.clamp(0, capacity - 1))
            return torch.minimum(drawn, buffer.generation_of(index))
        if buffer.write_count <= capacity:
            return None
        try:
            drawn = self._drawn.index_select(0, index)
        except IndexError:
            return None
        if drawn.numpy().max(initial=0) < _NEVER:  # as usual, and what is below takes a while
            return drawn
        return torch.minimum(drawn, buffer.generation_of(index))

    def empty(self) -> None:
        """Forget all transitions; see `PrioritizedReplayBuffer.empty`."""
        self.buffer.empty()
        self._forget_draws()

    def increase_beta(self) -> None:
        """Add `beta_increment` to beta, up to 1; once per episode, as taught."""
        self.buffer.increase_beta()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state to a file, whole or not at all; see `PrioritizedReplayBuffer.save`."""
        self.buffer.save(path)

    def restore(self, path: str | os.PathLike[str]) -> None:
        """Take over the state in a file that `save` wrote; see `PrioritizedReplayBuffer.restore`.

        Raises:
            CheckpointError: the file is damaged, or it is not that of such a buffer.
            SchemaError: its transitions are not like those in here.
            FileNotFoundError: there is none.
        """
        state = states.check(checkpoint.read(path, states.FORMAT))
        _require_course(path, state["transitions"], state["settings"].get("num_buffers"))
        self.buffer.load_state_dict(state)
        self._forget_draws()

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        capacity: int | None = None,
        device: torch.device | str | int | None = None,
        generator: torch.Generator | None = None,
    ) -> Self:
        """A buffer with the settings and the state of a file that `save` wrote.

        Args:
            path, capacity, device, generator: those of `PrioritizedReplayBuffer.load`.

        Raises:
            CheckpointError: the file is damaged, or it is not that of such a buffer.
            FileNotFoundError: there is none.
        """
        loaded = PrioritizedReplayBuffer.load(
            path, capacity=capacity, device=device, generator=generator
        )
        held = loaded.transitions
        _require_course(path, () if held is None else held.keys(), loaded.num_buffers)
        buffer = cls.__new__(cls)
        buffer.buffer = loaded
        buffer._forget_draws()
        return buffer


def _require_course(
    path: str | os.PathLike[str], names: Iterable[str], num_buffers: int | None
) -> None:
    """Refuse transitions of other keys than the course's; of none at all, they may be any."""
    keys = set(names)
    if num_buffers is not None or keys - _KEYS or (keys and _KEYS - keys):
        raise CheckpointError(
            f"{os.fspath(path)}: expected the state of a TransitionReplayBuffer, got"
            f" transitions of {sorted(keys)}, num_buffers={num_buffers}"
        )

"""TransitionReplayBuffer: the course's push / tuple interface."""

import os
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from per_td import validation
from per_td.buffer import PrioritizedReplayBuffer
from per_td.checkpoint import file as checkpoint
from per_td.checkpoint import state as states
from per_td.copies import Copied
from per_td.errors import CheckpointError, ConfigurationError, SchemaError
from per_td.nstep import NStepWriter
from per_td.storage.leaves import Leaves, nested

__all__ = ["TransitionReplayBuffer"]

_KEYS = {"state", "action", "reward", "next_state", "done"}

_N_STEP = {"next": "next_state", "reward": "reward", "terminated": "done", "truncated": "truncated"}
"""The course's names for `NStepWriter`."""

_N_STEP_KEYS = _KEYS | {"truncated", "discount", "steps"}

_GAMMA = 0.99
"""Discount factor where none is given."""

_NEVER = 2**62
"""More than any generation: of a slot that was never drawn."""

Batch = tuple[Tensor, ...]


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
        n_step: number of steps n that a transition sums up; see `NStepWriter`. With more than 1,
            `push` needs to know where episodes are cut off, and `sample` has an eighth tensor,
            discounts, for `target = rewards + discounts * next_values`.
        gamma: discount factor of the n-step rewards, in [0, 1]; with n_step=1 it has no effect.
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
        n_step: int = 1,
        gamma: float = _GAMMA,
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
        self._writer = NStepWriter(self.buffer, n_step, gamma, keys=_N_STEP)
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
    n_step: int = validation.fixed("n_step", lambda self: self._writer.n)
    """Number of steps that a transition sums up."""

    gamma: float = validation.fixed("gamma", lambda self: self._writer.gamma)
    """Discount factor of n-step rewards."""

    eps = validation.fixed("eps", instead="expected epsilon, which can be set")

    @property
    def priority(self) -> Tensor:
        """Raw priorities of the transitions, float32 [len]."""
        return self.buffer.priority

    def stats(self) -> dict[str, int]:
        """Counters; see `PrioritizedReplayBuffer.stats`."""
        return self.buffer.stats()

    def diagnostics(self) -> dict[str, Tensor]:
        """Measure prioritization for a logger; see `PrioritizedReplayBuffer.diagnostics`."""
        return self.buffer.diagnostics()

    def push(
        self,
        state: Any,
        action: Any,
        reward: Any,
        next_state: Any,
        done: Any,
        truncated: Any = None,
    ) -> None:
        """Store one transition; with n_step > 1, take one step and store what it finishes.

        Args:
            state: observation, array or tensor [*obs].
            action: the discrete action, an integer.
            reward: a number.
            next_state: observation after it, [*obs]; the true one also where an episode ends.
            done: True if the value after it is 0: terminated, not merely truncated.
            truncated: True if the episode was cut off after it. With n_step > 1 it must be told, or
                steps of the next episode would be summed up with those of this one.

        Raises:
            SchemaError: shapes or dtypes differ from those pushed before, or `truncated` is not
                told with n_step > 1; nothing is stored.
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
        if self._writer.n == 1:
            self.buffer.extend_leaves(leaves)
            return
        if truncated is None:
            raise SchemaError(
                f"truncated: expected True or False with n_step={self.n_step}, got None: steps of"
                " two episodes must not be summed up together"
            )
        leaves["truncated",] = _scalar("truncated", truncated, torch.bool)
        self._writer.add(nested(leaves.items()))

    def flush(self) -> None:
        """Store the steps that are still pending with n_step > 1, as if the episode was cut off."""
        self._writer.flush()

    def sample(self, batch_size: int) -> Batch:
        """Draw a batch of B transitions in proportion to priority^alpha.

        Returns:
            states float32 [B, *obs], actions int64 [B, 1], rewards float32 [B], next_states
            float32 [B, *obs], dones float32 [B] (1 where terminated), indices int64 [B] and
            weights float32 [B]. With n_step > 1 rewards are n-step rewards, next_states are n steps
            on or those at the episode's end, and discounts float32 [B] come last: gamma^m for the m
            steps that were summed up, 0 where terminated.

        Raises:
            EmptyBufferError: nothing has been pushed.
        """
        leaves, index, weight, generation, _ = self.buffer._sample_leaves(batch_size)
        self._drawn.scatter_(0, index, generation)
        beside = () if self._writer.n == 1 else (leaves["discount",],)
        return (
            leaves["state",].float(),
            leaves["action",].unsqueeze(-1),
            leaves["reward",],
            leaves["next_state",].float(),
            leaves["done",].float(),
            index,
            weight,
            *beside,
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
        self._writer.empty()
        self._forget_draws()

    def increase_beta(self) -> None:
        """Add `beta_increment` to beta, up to 1; once per episode, as taught."""
        self.buffer.increase_beta()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state to a file, whole or not at all; see `PrioritizedReplayBuffer.save`."""
        steps = {} if self.n_step == 1 else {"n_step": self._writer.state_dict()}
        self.buffer._save(path, steps)

    def restore(self, path: str | os.PathLike[str]) -> None:
        """Take over the state in a file that `save` wrote; see `PrioritizedReplayBuffer.restore`.

        Raises:
            CheckpointError: the file is damaged, or it is not that of such a buffer.
            SchemaError: its transitions are not like those in here.
            FileNotFoundError: there is none.
        """
        state = states.check(checkpoint.read(path, states.FORMAT))
        writer = _writer_of(path, state, self.buffer)
        if writer.n != self.n_step or (writer.n > 1 and writer.gamma != self.gamma):
            raise CheckpointError(
                f"{os.fspath(path)}: expected n_step={self.n_step} and gamma={self.gamma:g}, got"
                f" n_step={writer.n} and gamma={writer.gamma:g}"
            )
        self.buffer.load_state_dict(state)
        if writer.n > 1:
            self._writer = writer
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
        state = states.check(checkpoint.read(path, states.FORMAT))
        buffer = cls.__new__(cls)
        buffer.buffer = PrioritizedReplayBuffer._of_state(
            state, capacity=capacity, device=device, generator=generator
        )
        buffer._writer = _writer_of(path, state, buffer.buffer)
        buffer._forget_draws()
        return buffer


def _writer_of(path: str | os.PathLike[str], state: Any, buffer: Any) -> NStepWriter:
    """The writer of a state from a file, with its pending steps.

    Raises:
        CheckpointError: the state is not that of a `TransitionReplayBuffer`.
    """
    steps, num_buffers = state.get("n_step"), state["settings"].get("num_buffers")
    keys, wanted = set(state["transitions"]), _KEYS if steps is None else _N_STEP_KEYS
    if num_buffers is not None or (keys and keys != wanted):
        raise CheckpointError(
            f"{os.fspath(path)}: expected the state of a TransitionReplayBuffer, got"
            f" transitions of {sorted(keys)}, num_buffers={num_buffers}"
        )
    if steps is None:
        return NStepWriter(buffer, 1, _GAMMA, keys=_N_STEP)
    try:
        settings = steps["settings"]
        writer = NStepWriter(buffer, settings["n"], settings["gamma"], keys=_N_STEP)
    except (ConfigurationError, KeyError, TypeError) as error:
        raise CheckpointError(f"{os.fspath(path)}: n_step: {error}") from error
    writer.load_state_dict(steps)
    return writer

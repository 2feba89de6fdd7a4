"""TransitionReplayBuffer: the course's push / tuple interface."""

import os
from collections.abc import Callable
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

_FLAG = (bool, np.bool_)
"""Types of a `done` that stands for one transition, looked at first because it is usual."""

_FRAMES = "PrioritizedReplayBuffer(frames=...) keeps each frame once"

_NEVER = 2**62
"""More than any generation: of a slot that was never drawn."""

Batch = tuple[Tensor, ...]


def _observation(name: str, value: Any, rows: int | None) -> Tensor:
    """[n, *obs]; floating point as float32, integers (images, say) in their own dtype.

    Args:
        name: name of the argument, for the error.
        value: one observation [*obs], or with `rows`, so many of them [n, *obs].
        rows: number n; None: 1, whose dimension `value` does not have.
    """
    plain = rows is None and isinstance(value, np.ndarray) and value.dtype.kind == "f"
    if plain and value.flags.carray:
        try:
            return torch.from_numpy(value[None].astype(np.float32, copy=False))
        except ValueError:  # backward strides, of a dimension of size 1
            value = np.array(value, order="C")
    tensor = _rows(name, validation.as_tensor(name, value, SchemaError), rows)
    if tensor.is_complex():
        raise SchemaError(f"{name}: expected real numbers, got {tensor.dtype}")
    return tensor.float() if tensor.is_floating_point() else tensor


def _rows(name: str, tensor: Tensor, rows: int | None) -> Tensor:
    """[n, ...]: check that the tensor has n rows, or make it one row where `rows` is None."""
    if rows is None:
        return tensor.unsqueeze(0)
    if tensor.ndim == 0 or len(tensor) != rows:
        raise SchemaError(
            f"{name}: expected {rows} rows, one for each of done, got shape {list(tensor.shape)}"
        )
    return tensor


_INTEGER = (int, np.integer)

_PLAIN: dict[torch.dtype, tuple[tuple[type, ...], Any]] = {
    torch.int64: (_INTEGER, np.int64),
    torch.float32: ((int, float, np.integer, np.floating), np.float32),
    torch.bool: ((bool, np.bool_), np.bool_),
}
"""For each dtype, Python's and numpy's numbers that need no questions, and numpy's own dtype."""


def _numbers(name: str, value: Any, dtype: torch.dtype, rows: int | None) -> Tensor:
    """[n], from one number or with `rows` from so many; see `_observation`.

    numpy makes tensors of plain numbers in a quarter of the time that torch takes.
    """
    plain, numpy_dtype = _PLAIN[dtype]
    if rows is None and isinstance(value, plain):
        try:
            return torch.from_numpy(np.array([value], numpy_dtype))
        except OverflowError as error:
            raise SchemaError(f"{name}: expected a number that fits {dtype}: {error}") from error
    numbers = validation.as_tensor(name, value, SchemaError)
    if rows is not None:
        numbers = _rows(name, numbers, rows)
    if numbers.numel() != (1 if rows is None else rows):
        each = "" if rows is None else " for each of done"
        other = ", or floating-point numbers" if dtype == torch.int64 else ""
        raise SchemaError(
            f"{name}: expected one number{each}{other}, got shape {list(numbers.shape)}"
        )
    if numbers.is_complex() or (dtype == torch.int64 and numbers.is_floating_point()):
        expected = "an integer" if dtype == torch.int64 else "a real number"
        raise SchemaError(f"{name}: expected {expected}, got {numbers.dtype}")
    return numbers.reshape(-1).to(dtype)


def _action(value: Any, rows: int | None) -> Tensor:
    """Discrete actions, int64 [n], or continuous ones, float32 [n, *action]; see `_observation`."""
    if not isinstance(value, _INTEGER):
        value = validation.as_tensor("action", value, SchemaError)
        if value.is_floating_point():
            actions = _rows("action", value, rows).float()
            return actions if actions.ndim > 1 else actions.unsqueeze(-1)
    return _numbers("action", value, torch.int64, rows)


def _as_epsilon(value: float) -> float:
    """Check epsilon under the name that it has here."""
    return validation.real("epsilon", value, high=torch.finfo(torch.float32).max)


def _passed_on(name: str, doc: str, check: Callable[[Any], Any] = lambda value: value) -> Any:
    """A setting of the buffer underneath, which is read and set there, or refused."""
    return property(
        lambda self: getattr(self.buffer, name),
        lambda self, value: setattr(self.buffer, name, check(value)),
        doc=doc,
    )


class TransitionReplayBuffer(Copied):
    """Prioritized replay of (state, action, reward, next_state, done), as taught in courses.

    Priorities are |TD error| + epsilon, a new transition gets the largest in the buffer, and the
    weights are divided by the largest of the batch. `self.buffer` is the `PrioritizedReplayBuffer`
    underneath, with all that it offers (saving, settings, statistics).

    An update is stale if its transition has been overwritten since `sample` last drew its slot. It
    is dropped and counted in `stats`. A slot that was not drawn yet, or not since a state was
    loaded, takes any update.

    Args:
        capacity: number of transitions kept. When it is reached, the newest replaces the oldest.
        alpha: exponent of the priorities, at least 0; 0 draws uniformly. May be set at any time.
            None is the paper's value: 0.6, or 0.7 with prioritization="rank".
        beta: exponent of the weights at first, in [0, 1]. May be set at any time.
        beta_increment: added to beta by each `increase_beta`, up to 1. May be set at any time.
        epsilon: added to |TD error|. May be set at any time.
        n_step: number of steps n that a transition sums up; see `NStepWriter`. With more than 1,
            `push` needs `truncated`, and `sample` returns an eighth tensor, discounts, for `target
            = rewards + discounts * next_values`.
        gamma: discount factor of the n-step rewards, in [0, 1]; with n_step=1 it has no effect.
        num_envs: with n_step > 1, number of environments; each `push` brings one step of each. With
            n_step=1 it has no effect.
        draw, method, prioritization, device, generator: as in `PrioritizedReplayBuffer`.
        frames: must be None. `PrioritizedReplayBuffer(frames=...)` keeps each frame once.

    Raises:
        ConfigurationError: an argument is not accepted.

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
        num_envs: int = 1,
        draw: str = "independent",
        method: str = "auto",
        prioritization: str = "proportional",
        device: torch.device | str | int | None = None,
        generator: torch.Generator | None = None,
        frames: None = None,
    ) -> None:
        if frames is not None:
            raise ConfigurationError(f"frames: expected None, got {frames!r}: {_FRAMES}")
        self.buffer = PrioritizedReplayBuffer(
            capacity,
            alpha=alpha,
            beta=beta,
            eps=_as_epsilon(epsilon),
            beta_increment=beta_increment,
            draw=draw,
            method=method,
            prioritization=prioritization,
            device=device,
            generator=generator,
        )
        self._writer = NStepWriter(self.buffer, n_step, gamma, num_envs, keys=_N_STEP)
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
    epsilon: float = _passed_on(
        "eps", "Added to |TD error| by the updates from now on.", _as_epsilon
    )
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

    num_envs: int = validation.fixed("num_envs", lambda self: self._writer.num_envs)
    """Number of environments whose steps each `push` brings with n_step > 1."""

    eps = validation.fixed("eps", instead="expected epsilon, which can be set")
    frames: None = validation.fixed("frames", lambda self: None, _FRAMES)

    def __repr__(self) -> str:
        rank = "" if self.prioritization == "proportional" else ", prioritization='rank'"
        steps = f", n_step={self.n_step}, gamma={self.gamma:g}" if self.n_step > 1 else ""
        envs = f", num_envs={self.num_envs}" if steps and self.num_envs > 1 else ""
        return (
            f"{type(self).__name__}({len(self)} of {self.capacity} slots, device={self.device},"
            f" alpha={self.alpha:g}, beta={self.beta:g}, beta_increment={self.beta_increment:g},"
            f" epsilon={self.epsilon:g}, draw={self.draw!r}{rank}{steps}{envs})"
        )

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
        """Store one transition, or a batch of n; with n_step > 1, take a step of each environment.

        A single number as `done` makes one transition. An array, a tensor or a list of n flags
        makes a batch of n: each argument then has n rows. With n_step > 1, the rows are the steps
        of the `num_envs` environments, always in the same order.

        Not every row that a vector environment returns is a transition. By default, the row after
        an episode's end in Gymnasium is only the reset, and its action is ignored: leave such rows
        out. With n_step > 1, use `AutoresetMode.SAME_STEP`, and take the true next states from
        `info["final_obs"]`; or use a `PrioritizedReplayBuffer` and an
        `NStepWriter(autoreset="next_step")`.

        Args:
            state: observation, array or tensor [*obs], or [n, *obs].
            action: the discrete action, an integer, or n of them. Or a continuous action of
                floating-point numbers [*action], or [n, *action], stored as float32; a single
                number counts as [1]. The first action fixes the kind and the shape.
            reward: a number, or [n].
            next_state: observation after the action, [*obs] or [n, *obs]; where an episode ends,
                its true last observation.
            done: True if the episode terminated, so that the value of `next_state` is 0; False if
                it was only truncated; or [n].
            truncated: True if the episode was cut off after this step, or [n]. Required with n_step
                > 1: without it, steps of the next episode would be added to those of this one.

        Raises:
            SchemaError: shapes or dtypes differ from those pushed before, numbers of rows differ,
                or `truncated` is missing with n_step > 1; nothing is stored.
            ConfigurationError: with n_step > 1, the rows are not those of `num_envs` environments;
                nothing is stored.
        """
        rows = None
        if not isinstance(done, _FLAG):
            done = validation.as_tensor("done", done, SchemaError)
            rows = len(done) if done.ndim else None
        leaves: Leaves = {
            ("state",): _observation("state", state, rows),
            ("action",): _action(action, rows),
            ("reward",): _numbers("reward", reward, torch.float32, rows),
            ("next_state",): _observation("next_state", next_state, rows),
            ("done",): _numbers("done", done, torch.bool, rows),
        }
        if leaves[("state",)].shape != leaves[("next_state",)].shape:
            raise SchemaError(
                f"next_state: expected the shape of state, {list(leaves[('state',)].shape[1:])},"
                f" got {list(leaves[('next_state',)].shape[1:])}"
            )
        if rows == 0:  # an empty list has no dtype, and would fix one
            return
        if self._writer.n == 1:
            self.buffer.extend_leaves(leaves)
            return
        given = 1 if rows is None else rows
        if given != self.num_envs:
            raise ConfigurationError(
                f"num_envs: expected rows of {self.num_envs} environments with"
                f" n_step={self.n_step}, got {given}: TransitionReplayBuffer(..., num_envs={given})"
                f" sums up the steps of {given}"
            )
        if truncated is None:
            raise SchemaError(
                f"truncated: expected True or False with n_step={self.n_step}, got None: steps of"
                " two episodes must not be summed up together"
            )
        leaves["truncated",] = _numbers("truncated", truncated, torch.bool, rows)
        self._writer.add(nested(leaves.items()))

    def flush(self) -> None:
        """Store the steps that are still pending with n_step > 1, as if the episode was cut off."""
        self._writer.flush()

    def sample(self, batch_size: int) -> Batch:
        """Draw a batch of B transitions in proportion to priority^alpha.

        Returns:
            states float32 [B, *obs], actions int64 [B, 1], or float32 [B, *action] where they are
            continuous, rewards float32 [B], next_states float32 [B, *obs], dones float32 [B] (1
            where terminated), indices int64 [B] and weights float32 [B]. With n_step > 1, rewards
            are n-step rewards, next_states are those n steps later or at the episode's end, and
            discounts float32 [B] come last: gamma^m for the m steps that were summed up, 0 where
            terminated.

        Raises:
            EmptyBufferError: nothing has been pushed.
        """
        leaves, index, weight, generation, _ = self.buffer._sample_leaves(batch_size)
        self._drawn.scatter_(0, index, generation)
        action = leaves["action",]
        beside = () if self._writer.n == 1 else (leaves["discount",],)
        return (
            leaves["state",].float(),
            action if action.is_floating_point() else action.unsqueeze(-1),
            leaves["reward",],
            leaves["next_state",].float(),
            leaves["done",].float(),
            index,
            weight,
            *beside,
        )

    def update_priorities(self, indices: Any, td_errors: Any) -> None:
        """Set the priorities of `indices` [B] to |td_errors| + epsilon.

        Stale updates are dropped and counted in `stats`; see the class.

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
        """Add `beta_increment` to beta, up to 1. Call it once per episode, as courses teach."""
        self.buffer.increase_beta()

    def _pending_state(self) -> dict[str, Any]:
        """Entry of a state for the steps that are still pending; none without n_step."""
        return {} if self.n_step == 1 else {"n_step": self._writer.state_dict()}

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of the state, which `torch.load(weights_only=True)` can read."""
        return self.buffer.state_dict() | self._pending_state()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state from `state_dict`; see `PrioritizedReplayBuffer.load_state_dict`.

        Raises:
            CheckpointError: it is not the state of such a buffer; nothing has changed.
            SchemaError: its transitions do not fit those of this buffer; nothing has changed.
        """
        self._load(state, "")

    def _load(self, state: Any, where: str) -> None:
        """Take over a state; errors begin with `where` it is from."""
        state = states.check(state)
        writer = _writer_of(where, state, self.buffer)
        wanted, got = _steps(self._writer), _steps(writer)
        if wanted != got:
            raise CheckpointError(f"{where}expected {wanted}, got {got}")
        self.buffer.load_state_dict(state)
        if writer.n > 1:
            self._writer = writer
        self._forget_draws()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state to a file, whole or not at all; see `PrioritizedReplayBuffer.save`."""
        self.buffer._save(path, self._pending_state())

    def restore(self, path: str | os.PathLike[str]) -> None:
        """Take over the state in a file that `save` wrote; see `PrioritizedReplayBuffer.restore`.

        Raises:
            CheckpointError: the file is damaged, or not of such a buffer.
            SchemaError: its transitions do not fit those of this buffer.
            FileNotFoundError: there is no such file.
        """
        self._load(checkpoint.read(path, states.FORMAT), f"{os.fspath(path)}: ")

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        capacity: int | None = None,
        device: torch.device | str | int | None = None,
        generator: torch.Generator | None = None,
    ) -> Self:
        """Make a buffer with the settings and the state in a file that `save` wrote.

        Args:
            path, capacity, device, generator: as in `PrioritizedReplayBuffer.load`.

        Raises:
            CheckpointError: the file is damaged, or not of such a buffer.
            FileNotFoundError: there is no such file.
        """
        state = states.check(checkpoint.read(path, states.FORMAT))
        buffer = cls.__new__(cls)
        buffer.buffer = PrioritizedReplayBuffer._of_state(
            state, capacity=capacity, device=device, generator=generator
        )
        buffer._writer = _writer_of(f"{os.fspath(path)}: ", state, buffer.buffer)
        buffer._forget_draws()
        return buffer


def _steps(writer: NStepWriter) -> str:
    """Format the settings that a state and the buffer which takes it over share."""
    if writer.n == 1:  # the others have no effect
        return "n_step=1"
    return f"n_step={writer.n}, gamma={writer.gamma!r} and num_envs={writer.num_envs}"


def _writer_of(where: str, state: Any, buffer: Any) -> NStepWriter:
    """The writer of a checked state, with its pending steps; errors begin with `where` it is from.

    Raises:
        CheckpointError: the state is not that of a `TransitionReplayBuffer`.
    """
    steps, settings = state.get("n_step"), state["settings"]
    num_buffers, frames = settings.get("num_buffers"), settings.get("frames")
    keys, wanted = set(state["transitions"]), _KEYS if steps is None else _N_STEP_KEYS
    if num_buffers is not None or frames is not None or (keys and keys != wanted):
        raise CheckpointError(
            f"{where}expected the state of a TransitionReplayBuffer, got transitions of"
            f" {sorted(keys)}, num_buffers={num_buffers}, frames={frames}"
        )
    if steps is None:
        return NStepWriter(buffer, 1, _GAMMA, keys=_N_STEP)
    try:
        own = steps["settings"]
        writer = NStepWriter(buffer, own["n"], own["gamma"], own["num_envs"], keys=_N_STEP)
    except (LookupError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{where}n_step: expected what a writer saved: {error}") from error
    writer.load_state_dict(steps)
    return writer

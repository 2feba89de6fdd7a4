"""The environments, many of each in numpy: one call steps them all.

All of them follow Gymnasium's vectorised CartPole, autoreset included: an environment that is done
resets in the *next* step, which ignores the action. Such a step is no transition and must not be
stored. The observation that comes with `done` is the true final one.
"""

from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

Step = tuple[NDArray, NDArray, NDArray, NDArray, dict[str, Any]]


class MountainCars:
    """MountainCar-v0, vectorised: Gymnasium has it only one by one.

    Positions in [-1.2, 0.6], the goal at 0.5; velocities up to 0.07 per step; reward -1 each step.
    """

    def __init__(self, num_envs: int, max_episode_steps: int = 200) -> None:
        self.num_envs, self.max_episode_steps = num_envs, max_episode_steps
        self.state = np.zeros((2, num_envs))
        self.steps = np.zeros(num_envs, np.int32)
        self.done = np.zeros(num_envs, bool)
        self.random = np.random.default_rng()

    def reset(self, *, seed: int | None = None) -> tuple[NDArray, dict[str, Any]]:
        """All at rest in the valley, at -0.6 to -0.4."""
        if seed is not None:
            self.random = np.random.default_rng(seed)
        self._start(np.ones(self.num_envs, bool))
        return self.state.T.astype(np.float32), {}

    def _start(self, which: NDArray) -> None:
        self.state[:, which] = 0
        self.state[0, which] = self.random.uniform(-0.6, -0.4, int(which.sum()))
        self.steps[which] = 0
        self.done = np.zeros(self.num_envs, bool)

    def step(self, action: NDArray) -> Step:
        """Push left (0), not at all (1) or right (2)."""
        resetting = self.done
        position, velocity = self.state
        velocity = velocity + (action - 1) * 0.001 - 0.0025 * np.cos(3 * position)
        velocity = np.clip(velocity, -0.07, 0.07)
        position = np.clip(position + velocity, -1.2, 0.6)
        velocity = np.where((position == -1.2) & (velocity < 0), 0, velocity)
        self.state = np.stack((position, velocity))
        self.steps += 1
        if resetting.any():
            self._start(resetting)
        terminated = (position >= 0.5) & (velocity >= 0) & ~resetting
        truncated = (self.steps >= self.max_episode_steps) & ~resetting
        self.done = terminated | truncated
        reward = np.where(resetting, 0, -1).astype(np.float32)
        return self.state.T.astype(np.float32), reward, terminated, truncated, {}


def make(task: str, n: int) -> Any:
    """`n` environments of the task: "CartPole-v1" or "MountainCar-v0"."""
    if task == "MountainCar-v0":
        return MountainCars(n)
    return gymnasium.make_vec(task, n, vectorization_mode="vector_entry_point")

"""The training loop: every run takes a step at the same time, each in its own world."""

import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from tensordict import TensorDict
from torch import Tensor

from benchmarks.studies.cartpole.learner import Learners
from benchmarks.studies.cartpole.settings import Replay, Settings
from benchmarks.studies.cartpole.tasks import make
from per_td import PrioritizedReplayBuffer

SHAPES = {"CartPole-v1": (4, 2), "MountainCar-v0": (2, 3)}  # observation, actions


@dataclass(frozen=True)
class Outcome:
    """The episodes of S runs."""

    lengths: NDArray  # uint16 [S, most episodes]: steps of each finished episode, then 0
    greedy: NDArray  # float32 [S, evaluations]: mean steps of an episode without exploration
    steps: NDArray  # int32 [S]: transitions that each run has seen
    milliseconds: float  # per lockstep step, evaluations left out


def make_buffer(
    settings: Settings, replay: Replay, runs: int, generator: torch.Generator
) -> PrioritizedReplayBuffer:
    """One buffer per run, in one object."""
    return PrioritizedReplayBuffer(
        settings.capacity,
        settings.batch_size,
        alpha=replay.alpha,
        beta=replay.beta,
        beta_increment=replay.beta_increment,
        eps=replay.eps,
        weight_normalization=replay.weight_normalization,
        draw=replay.draw,
        new_priority=replay.new_priority,
        num_buffers=runs,
        generator=generator,
        track_draws=True,  # for the diagnostics' share that was never replayed
    )


class Lockstep:
    """S runs: environments, networks, buffers and the book of finished episodes.

    A run that resets takes part in the gradient steps all the same; its reset is not stored and
    not counted.
    """

    def __init__(self, settings: Settings, replay: Replay, *, runs: int, seed: int) -> None:
        self.settings, self.replay, self.runs = settings, replay, runs
        self.generator = torch.Generator().manual_seed(seed)
        observations, self.actions = SHAPES[settings.task]
        self.learners = Learners(
            runs,
            (observations, *settings.hidden, self.actions),
            lr=settings.lr,
            gamma=settings.gamma,
            generator=self.generator,
        )
        self.buffer = make_buffer(settings, replay, runs, self.generator)
        self.scale = torch.tensor(settings.observation_scale or (1.0,) * observations)
        self.seed = seed % 2**31
        self.environments = make(settings.task, runs)
        self.observation = self._seen(self.environments.reset(seed=self.seed)[0])
        self.done = np.zeros(runs, bool)
        self.length = np.zeros(runs, np.int32)
        self.steps = np.zeros(runs, np.int32)
        self.episodes: list[list[int]] = [[] for _ in range(runs)]
        self.updates = 0

    def _seen(self, observation: NDArray) -> Tensor:
        """Scale observations for the networks, [n, obs]."""
        return torch.from_numpy(observation) * self.scale

    def act(self, step: int) -> Tensor:
        """Epsilon-greedy actions, int64 [S]."""
        s = self.settings
        share = s.explore_end + (1 - s.explore_end) * np.exp(-step / s.explore_decay)
        best = self.learners.greedy(self.observation.unsqueeze(1)).squeeze(1)
        anything = torch.randint(self.actions, (self.runs,), generator=self.generator)
        return torch.where(torch.rand(self.runs, generator=self.generator) < share, anything, best)

    def step(self, step: int) -> None:
        """Step every environment; store the steps that are transitions."""
        action = self.act(step)
        observation, reward, terminated, truncated, _ = self.environments.step(action.numpy())
        if self.settings.failure_reward:
            reward = -terminated.astype(np.float32)
        following = self._seen(observation)
        self._store(following, action, np.asarray(reward, np.float32), terminated)
        self.observation = following
        self._count(terminated | truncated)

    def _store(
        self, following: Tensor, action: Tensor, reward: NDArray, terminated: NDArray
    ) -> None:
        leaves = {
            "observation": self.observation,
            "action": action,
            "reward": torch.from_numpy(reward),
            "next_observation": following,
            "terminated": torch.from_numpy(terminated.copy()),
        }
        rows = TensorDict({k: v.unsqueeze(1) for k, v in leaves.items()}, [self.runs, 1])
        # an environment that was done has only reset now: that is no transition
        self.buffer.extend(rows, mask=torch.from_numpy(~self.done).unsqueeze(1))

    def _count(self, done: NDArray) -> None:
        """Book the step, and the episodes that ended with it."""
        self.steps += ~self.done
        self.length += ~self.done
        for run in np.flatnonzero(done):
            self.episodes[run].append(int(self.length[run]))
        self.length[done] = 0
        self.done = done
        if self.replay.beta_per_episode and done.any():
            finished = sum(map(len, self.episodes)) / self.runs
            self.buffer.beta = min(1.0, self.replay.beta + self.replay.beta_per_episode * finished)

    def learn(self) -> None:
        """A gradient step of every run, new priorities, and the targets' update."""
        batch = self.buffer.sample(self.settings.batch_size)
        error = self.learners.learn(
            batch["observation"],
            batch["action"],
            batch["reward"],
            batch["next_observation"],
            batch["terminated"],
            batch["priority_weight"],
        )
        self.buffer.update_priority(batch["index"], error, batch["generation"])
        self.buffer.increase_beta()
        self.updates += 1
        if not self.settings.copy_every:
            self.learners.mix_target(self.settings.tau)
        elif self.updates % self.settings.copy_every == 0:
            self.learners.copy_target()

    def evaluate(self, step: int) -> Tensor:
        """Mean steps of an episode without exploration, float32 [S]."""
        episodes = self.settings.evaluation_episodes
        environments = make(self.settings.task, self.runs * episodes)
        observation = environments.reset(seed=self.seed + step)[0]
        running = np.ones(self.runs * episodes, bool)
        length = np.zeros(self.runs * episodes, np.int32)
        while running.any():
            seen = self._seen(observation).view(self.runs, episodes, -1)
            action = self.learners.greedy(seen).flatten().numpy()
            observation, _, terminated, truncated, _ = environments.step(action)
            length += running
            running &= ~(terminated | truncated)
        return torch.from_numpy(length).float().view(self.runs, episodes).mean(1)

    def outcome(self, greedy: list[Tensor], milliseconds: float) -> Outcome:
        """The books as arrays."""
        lengths = np.zeros((self.runs, max(1, *map(len, self.episodes))), np.uint16)
        for run, episodes in enumerate(self.episodes):
            lengths[run, : len(episodes)] = episodes
        found = torch.stack(greedy, 1) if greedy else torch.zeros(self.runs, 0)
        return Outcome(lengths, found.numpy(), self.steps.copy(), milliseconds)


@torch.no_grad()
def train(
    settings: Settings,
    replay: Replay,
    *,
    runs: int,
    seed: int,
    name: str = "",
    watch: Callable[[int, PrioritizedReplayBuffer], None] | None = None,
) -> Outcome:
    """Train S independent runs.

    Args:
        settings: the DQN, the task and when to end.
        replay: how transitions are drawn.
        runs: number of runs S.
        seed: with `name`, it seeds everything: agents of different names share no random number.
        name: of the agent.
        watch: called after each step with the number of steps and the buffer.

    Returns:
        The episodes and the evaluations of all runs.
    """
    lockstep = Lockstep(settings, replay, runs=runs, seed=zlib.crc32(f"{name}/{seed}".encode()))
    greedy: list[Tensor] = []
    seconds, start = 0.0, time.perf_counter()
    step = 0
    while step < settings.steps and min(map(len, lockstep.episodes)) < settings.episodes:
        lockstep.step(step)
        step += 1
        if len(lockstep.buffer) >= settings.learning_starts and step % settings.update_every == 0:
            lockstep.learn()
        if watch is not None:
            watch(step, lockstep.buffer)
        if step % settings.evaluate_every == 0:
            seconds += time.perf_counter() - start
            greedy.append(lockstep.evaluate(step))
            start = time.perf_counter()
    seconds += time.perf_counter() - start
    return lockstep.outcome(greedy, seconds / max(step, 1) * 1e3)

"""Stable-Baselines3's DQN with prioritized replay, through `replay_buffer_class=`.

    pip install -c constraints.txt -e . stable-baselines3
    python examples/stable_baselines3_dqn.py              # CartPole-v1, prioritized
    python examples/stable_baselines3_dqn.py --alpha 0    # the same agent, uniform draws

Copy `PrioritizedReplay`, a buffer as SB3 wants it with per_td's inside, and `PrioritizedDQN`, SB3's
DQN with weights in the loss and priorities updated after it.
"""

import argparse
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import torch
from stable_baselines3 import DQN
from stable_baselines3.common.buffers import BaseBuffer, ReplayBuffer
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from torch import Tensor
from torch.nn.functional import smooth_l1_loss

from per_td import PrioritizedReplayBuffer


class Samples(NamedTuple):
    """A batch: the fields of SB3's `ReplayBufferSamples`, and weights float32 [B, 1]."""

    observations: Tensor
    actions: Tensor
    next_observations: Tensor
    dones: Tensor
    rewards: Tensor
    weights: Tensor
    index: Tensor
    generation: Tensor


class PrioritizedReplay(ReplayBuffer):
    """SB3's interface on per_td's buffer, whose settings are `replay_buffer_kwargs`."""

    def __init__(
        self,
        buffer_size: int,
        observation_space: Any,
        action_space: Any,
        device: torch.device | str = "auto",
        n_envs: int = 1,
        optimize_memory_usage: bool = False,
        **settings: Any,
    ) -> None:
        if optimize_memory_usage:
            raise ValueError("optimize_memory_usage: expected False, got True")
        # past ReplayBuffer's own constructor, which would allocate a second storage
        BaseBuffer.__init__(self, buffer_size, observation_space, action_space, device, n_envs)
        self.handle_timeout_termination = True
        self.buffer = PrioritizedReplayBuffer(buffer_size, device=self.device, **settings)

    def size(self) -> int:
        """Return the number of transitions."""
        return len(self.buffer)

    def reset(self) -> None:
        """Forget all transitions."""
        self.buffer.empty()

    def add(self, obs, next_obs, action, reward, done, infos) -> None:
        """Write a transition of each environment; a time limit is no end of the value."""
        cut = [info.get("TimeLimit.truncated", False) for info in infos]
        columns = (
            np.reshape(obs, (self.n_envs, *self.obs_shape)),
            np.reshape(action, (self.n_envs, self.action_dim)),
            np.reshape(next_obs, (self.n_envs, *self.obs_shape)),
            np.logical_and(done, np.logical_not(cut)).astype(np.float32)[:, None],
            np.asarray(reward, np.float32)[:, None],
        )
        self.buffer.extend(dict(zip(Samples._fields, columns, strict=False)))

    def sample(self, batch_size: int, env: Any = None) -> Samples:
        """Draw a batch by priority."""
        if env is not None:
            raise ValueError(f"env: expected None, got {env}: VecNormalize is not supported")
        batch = self.buffer.sample(batch_size)
        weight = batch["priority_weight"].unsqueeze(1)
        stored = (batch[name] for name in Samples._fields[:5])
        return Samples(*stored, weight, batch["index"], batch["generation"])

    def update_priority(self, batch: Samples, td_error: Tensor) -> None:
        """Set priorities by the TD errors [B, 1] of a batch."""
        self.buffer.update_priority(batch.index, td_error.squeeze(1), batch.generation)


class PrioritizedDQN(DQN):
    """DQN whose buffer gives weights and takes TD errors; the rest is SB3's."""

    def train(self, gradient_steps: int, batch_size: int = 100) -> None:
        """Take gradient steps, as SB3's `DQN.train` does."""
        self.policy.set_training_mode(True)
        self._update_learning_rate(self.policy.optimizer)
        for _ in range(gradient_steps):
            batch = self.replay_buffer.sample(batch_size, env=self._vec_normalize_env)
            with torch.no_grad():
                following = self.q_net_target(batch.next_observations).amax(1, keepdim=True)
                wanted = batch.rewards + (1 - batch.dones) * self.gamma * following
            value = self.q_net(batch.observations).gather(1, batch.actions.long())
            loss = (batch.weights * smooth_l1_loss(value, wanted, reduction="none")).mean()
            self.policy.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.max_grad_norm)
            self.policy.optimizer.step()
            self.replay_buffer.update_priority(batch, (wanted - value).detach())
        self._n_updates += gradient_steps
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        self.logger.record("train/loss", loss.item())


def parse_args(argv=None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30_000, help="environment steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--alpha", type=float, default=0.6, help="0 is uniform")
    parser.add_argument("--beta", type=float, default=0.4, help="exponent of the weights")
    parser.add_argument("--learning-starts", type=int, default=1_000, help="random steps before")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> dict[str, float]:
    """Train, evaluate and print; return the figures that were printed."""
    model = PrioritizedDQN(
        "MlpPolicy", "CartPole-v1", 2.3e-3, buffer_size=100_000, batch_size=64,
        learning_starts=args.learning_starts, train_freq=256, gradient_steps=128,
        target_update_interval=10, exploration_fraction=0.16, exploration_final_eps=0.04,
        policy_kwargs={"net_arch": [256, 256]}, seed=args.seed, device="cpu",
        replay_buffer_class=PrioritizedReplay,
        replay_buffer_kwargs={"alpha": args.alpha, "beta": args.beta},
    )  # fmt: skip
    env = Monitor(gymnasium.make("CartPole-v1"))
    env.reset(seed=10_000 + args.seed)
    mean, _ = evaluate_policy(model.learn(args.steps), env, n_eval_episodes=20)
    priorities = len(model.replay_buffer.buffer.priority.unique())
    figures = {"greedy return": mean, "distinct priorities": priorities}
    print(*(f"{name}: {value:g}" for name, value in figures.items()), sep="\n")
    return figures


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(parse_args())

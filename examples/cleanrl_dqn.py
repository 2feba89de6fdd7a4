"""DQN in CleanRL's style on CartPole-v1: one file, with prioritized replay in place of its buffer.

    pip install -c constraints.txt -e ".[examples]"
    python examples/cleanrl_dqn.py              # prioritized
    python examples/cleanrl_dqn.py --alpha 0    # the same agent, uniform draws

To change a script of CleanRL's, copy `ReplayBuffer` into it. Then change the lines marked PER.
"""

import argparse
from dataclasses import dataclass, fields
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor, nn, optim

from per_td import PrioritizedReplayBuffer


@dataclass
class Args:
    """The settings of a run; each is a command-line option too."""

    seed: int = 1
    total_timesteps: int = 30_000  # environment steps
    learning_rate: float = 1e-3
    num_envs: int = 1  # environments that run side by side
    buffer_size: int = 10_000
    alpha: float = 0.6  # PER: how strongly priorities skew the draws; 0 is uniform
    beta: float = 0.4  # PER: share of that bias which the weights undo
    gamma: float = 0.99
    target_network_frequency: int = 500  # steps between copies to the target network
    batch_size: int = 128
    start_e: float = 1.0  # share of random actions at the start
    end_e: float = 0.05  # and at the end
    exploration_fraction: float = 0.3  # of all steps, in which it falls
    learning_starts: int = 1_000
    train_frequency: int = 4


NAMES = "observations", "next_observations", "actions", "rewards", "dones"


class ReplayBuffer:
    """The interface that CleanRL's scripts use, on per_td's buffer."""

    def __init__(self, buffer_size: int, **settings) -> None:
        self.buffer = PrioritizedReplayBuffer(buffer_size, **settings)

    def add(self, obs, next_obs, actions, rewards, dones, infos) -> None:
        """Write a transition of each environment; `dones` are terminations, without truncations.

        Where an episode ended, `next_obs` is the first of the next one: the last one is in `infos`.
        """
        next_obs = np.array(next_obs)
        for env in np.flatnonzero(infos.get("_final_obs", ())):
            next_obs[env] = infos["final_obs"][env]
        columns = [obs, next_obs, np.reshape(actions, (len(obs), -1))]
        columns += [np.asarray(part, np.float32)[:, None] for part in (rewards, dones)]
        self.buffer.extend(dict(zip(NAMES, columns, strict=True)))

    def sample(self, batch_size: int) -> SimpleNamespace:
        """Draw a batch by priority: what CleanRL's scripts read, and `weights` float32 [B, 1]."""
        batch = self.buffer.sample(batch_size)
        beside = {"index": batch["index"], "generation": batch["generation"]}
        beside["weights"] = batch["priority_weight"].unsqueeze(1)
        return SimpleNamespace(**{name: batch[name] for name in NAMES}, **beside)

    def update(self, data: SimpleNamespace, td_error: Tensor) -> None:
        """Set priorities by the TD errors [B] of a batch."""
        self.buffer.update_priority(data.index, td_error, data.generation)


def make_network(envs) -> nn.Sequential:
    """Make the Q-network of CleanRL's dqn.py."""
    inputs = int(np.prod(envs.single_observation_space.shape))
    layers = nn.Linear(inputs, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU()
    return nn.Sequential(*layers, nn.Linear(84, int(envs.single_action_space.n)))


def main(args: Args) -> tuple[list[float], float, ReplayBuffer]:
    """Train; return the episodes' returns, the last loss, and the buffer."""
    rng = np.random.default_rng(args.seed)
    torch.manual_seed(args.seed)
    envs = gym.vector.SyncVectorEnv(
        [lambda: gym.make("CartPole-v1")] * args.num_envs,
        autoreset_mode=gym.vector.AutoresetMode.SAME_STEP,
    )
    envs.action_space.seed(args.seed)
    q_network, target_network = make_network(envs), make_network(envs)
    target_network.load_state_dict(q_network.state_dict())
    optimizer = optim.Adam(q_network.parameters(), lr=args.learning_rate)
    rb = ReplayBuffer(args.buffer_size, alpha=args.alpha, beta=args.beta)  # PER
    returns, running, loss = [], np.zeros(args.num_envs), torch.tensor(float("nan"))

    obs, _ = envs.reset(seed=args.seed)
    for step in range(args.num_envs, args.total_timesteps + 1, args.num_envs):
        fallen = step / (args.exploration_fraction * args.total_timesteps)
        epsilon = max(args.end_e, args.start_e + (args.end_e - args.start_e) * fallen)
        if rng.random() < epsilon:
            actions = envs.action_space.sample()
        else:
            with torch.no_grad():
                actions = q_network(torch.as_tensor(obs)).argmax(1).numpy()
        next_obs, rewards, terminations, truncations, infos = envs.step(actions)
        rb.add(obs, next_obs, actions, rewards, terminations, infos)
        obs = next_obs
        running += rewards
        ended = np.logical_or(terminations, truncations)
        returns += running[ended].tolist()
        running[ended] = 0

        if step > args.learning_starts and step % args.train_frequency == 0:
            data = rb.sample(args.batch_size)
            with torch.no_grad():
                target_max = target_network(data.next_observations).amax(1)
                goes_on = 1 - data.dones.flatten()
                td_target = data.rewards.flatten() + args.gamma * target_max * goes_on
            td_error = td_target - q_network(data.observations).gather(1, data.actions).squeeze(1)
            loss = (data.weights.flatten() * td_error**2).mean()  # PER: mse_loss, weighted
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rb.update(data, td_error.detach())  # PER
        if step % args.target_network_frequency == 0:
            target_network.load_state_dict(q_network.state_dict())
        if step % max(args.total_timesteps // 10, 1) == 0:
            print(f"step {step:>6,}: last 20 episodes {np.mean(returns[-20:]):.1f}", flush=True)
    envs.close()
    return returns, loss.item(), rb


if __name__ == "__main__":
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for f in fields(Args):
        parser.add_argument("--" + f.name.replace("_", "-"), type=f.type, default=f.default)
    main(Args(**vars(parser.parse_args())))

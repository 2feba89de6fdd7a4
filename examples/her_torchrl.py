"""Hindsight experience replay with prioritized draws: TorchRL's HERReplayBuffer, per_td's sampler.

    pip install -c constraints.txt -e ".[torchrl]"
    python examples/her_torchrl.py                  # DQN on 12 bits, with hindsight goals
    python examples/her_torchrl.py --her-ratio 0    # the same agent without them

The environment is that of the paper (Andrychowicz et al. 2017, arXiv 1707.01495): an action flips
one of n bits, and the reward is -1 until the bits equal the goal. Random actions hardly ever get
there, so that without hindsight there is nothing to learn from.
"""

import argparse
import copy
from dataclasses import dataclass, fields

import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torchrl.data import HERReplayBuffer, LazyTensorStorage

from per_td.torchrl import PrioritizedSampler


@dataclass
class Args:
    """The settings of a run; each is a command-line option too."""

    bits: int = 12  # of the environment; an episode has as many steps at most
    rounds: int = 100  # of 16 episodes, and gradient steps after them
    updates: int = 20  # gradient steps after each round
    seed: int = 0
    her_ratio: float = 0.8  # share of each batch with a goal that was reached later
    alpha: float = 0.6  # how strongly priorities skew the draws; 0 is uniform
    beta: float = 0.4  # share of that bias which the weights undo
    capacity: int = 100_000  # transitions in the buffer
    batch_size: int = 128
    lr: float = 1e-3
    gamma: float = 0.98
    explore: float = 0.2  # share of random actions


@torch.no_grad()
def play(network: nn.Module, bits: int, episodes: int, explore: float) -> TensorDict:
    """Play episodes to new goals; their steps, one episode after the other, [steps]."""
    state, goal = torch.randint(2, (2, episodes, bits)).float()
    alive, playing, steps = torch.ones(episodes, dtype=torch.bool), [], []
    for time in range(bits):
        best = network(torch.cat([state, goal], -1)).argmax(-1)
        action = torch.where(torch.rand(episodes) < explore, torch.randint(bits, best.shape), best)
        after = (state - nn.functional.one_hot(action, bits)).abs()
        reached = (after == goal).all(-1, keepdim=True)
        step = {"observation": state, "desired_goal": goal, "action": action}
        step["next"] = {
            "observation": after,
            "achieved_goal": after,
            "reward": reached.float() - 1,
            "terminated": reached,
            "done": reached | (time == bits - 1),
        }
        steps.append(TensorDict(step, [episodes]))
        playing.append(alive)
        alive, state = alive & ~reached.squeeze(-1), after
    return torch.stack(steps, 1)[torch.stack(playing, 1)]


def reward_of(batch: TensorDict) -> Tensor:
    """Return the rewards [B, 1] for the goals in the batch, and end it where they are reached."""
    reached = (batch["next", "achieved_goal"] == batch["desired_goal"]).all(-1, keepdim=True)
    batch["next", "terminated"].copy_(reached)  # HERReplayBuffer itself sets goal and reward only
    return reached.float() - 1


def make_buffer(args: Args) -> HERReplayBuffer:
    """Make the buffer; a goal is the state after this step or a later one of the episode."""
    return HERReplayBuffer(
        reward_of,
        her_ratio=args.her_ratio,
        strategy="future",
        achieved_goal_key=("next", "achieved_goal"),
        sampler=PrioritizedSampler(args.capacity, alpha=args.alpha, beta=args.beta),
        storage=LazyTensorStorage(args.capacity),
        batch_size=args.batch_size,
    )


class Learner:
    """A Q-network of state and goal, its slow copy, and one gradient step."""

    def __init__(self, args: Args) -> None:
        self.gamma = args.gamma
        self.network = nn.Sequential(
            nn.Linear(2 * args.bits, 256), nn.ReLU(), nn.Linear(256, args.bits)
        )
        self.target = copy.deepcopy(self.network)
        self.optimizer = torch.optim.Adam(self.network.parameters(), args.lr)

    def learn(self, batch: TensorDict) -> Tensor:
        """Take a gradient step, and leave |TD error| in the batch; the loss []."""
        after, goal = batch["next"], batch["desired_goal"]
        with torch.no_grad():
            following = self.target(torch.cat([after["observation"], goal], -1)).amax(-1)
            goes_on = ~after["terminated"].squeeze(-1)
            wanted = after["reward"].squeeze(-1) + self.gamma * goes_on * following
        value = self.network(torch.cat([batch["observation"], goal], -1))
        error = wanted - value.gather(-1, batch["action"].unsqueeze(-1)).squeeze(-1)
        loss = (batch["priority_weight"] * error**2).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        for slow, fast in zip(self.target.parameters(), self.network.parameters(), strict=True):
            slow.data.lerp_(fast.data, 0.05)
        batch["td_error"] = error.detach().abs()
        return loss.detach()


def train(args: Args) -> tuple[Learner, HERReplayBuffer]:
    """Train; print the share of goals that greedy episodes reach."""
    torch.manual_seed(args.seed)
    learner, buffer = Learner(args), make_buffer(args)
    for number in range(1, args.rounds + 1):
        buffer.extend(play(learner.network, args.bits, 16, args.explore))
        for _ in range(args.updates):
            batch = buffer.sample()
            loss = learner.learn(batch)
            buffer.update_tensordict_priority(batch)
        if number % max(args.rounds // 6, 1) == 0:
            share = success(learner, args)
            print(f"{16 * number:>6,} episodes: loss {loss:.3f}, reached {share:.0%}", flush=True)
    return learner, buffer


def success(learner: Learner, args: Args, episodes: int = 500) -> float:
    """Return the share of greedy episodes that reach their goal."""
    steps = play(learner.network, args.bits, episodes, explore=0.0)
    return float(steps["next", "terminated"].sum()) / episodes


if __name__ == "__main__":
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for field in fields(Args):
        flag = "--" + field.name.replace("_", "-")
        parser.add_argument(flag, type=field.type, default=field.default)
    train(Args(**vars(parser.parse_args())))

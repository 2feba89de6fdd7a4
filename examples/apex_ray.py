"""Ape-X (Horgan et al. 2018) on CartPole-v1 over Ray, in one file, top to bottom.

    pip install -c constraints.txt -e ".[examples,ray]"
    python examples/apex_ray.py                              # all on this machine
    python examples/apex_ray.py --address auto --actors 64   # on the Ray cluster it belongs to

Many actors act, each with its own share of random actions; they work out the priorities of what
they saw with their own copy of the network, and write to the shards of the replay themselves. One
learner draws batches over all shards, learns, and sends new priorities back. Whatever belongs to
distributed prioritized replay is marked APEX. The network and the sizes are CartPole's; the ways of
the data are those of a cluster.
"""

import argparse
import copy
import time
from collections import deque
from dataclasses import dataclass, fields

import gymnasium as gym
import numpy as np
import ray
import torch
from tensordict import TensorDict
from torch import nn

from per_td.ray import ShardedReplayBuffer

ENV_ID = "CartPole-v1"
EVAL_SEED = 20_000_000  # not that of any actor


@dataclass
class Args:
    """The settings of a run; each is a command-line option too."""

    address: str = ""  # of a Ray cluster ("auto": the one here); empty starts Ray here
    total_steps: int = 40_000  # environment steps of all actors together
    actors: int = 2  # actors
    shards: int = 2  # shards of the replay
    seed: int = 0  # of the actors, the learner and the final evaluation
    capacity: int = 20_000  # transitions per shard
    batch_size: int = 128  # transitions in a gradient step
    prefetch: int = 2  # batches under way while the learner learns
    checkpoint_dir: str = ""  # folder of the shards' checkpoints and logs; empty: none
    chunk: int = 100  # environment steps between two looks at new weights
    n_step: int = 3  # rewards added up in a transition
    explore: float = 0.4  # actor i acts randomly with this to the power 1 + 7 i / (actors - 1)
    lr: float = 1e-3  # Adam's learning rate
    gamma: float = 0.99  # discount factor
    tau: float = 0.02  # share of the online network mixed into the target each time
    learning_starts: int = 1_000  # environment steps before the first gradient step
    train_every: int = 4  # environment steps per gradient step, at least
    eval_episodes: int = 10  # episodes in the final greedy evaluation


def parse_args(argv=None) -> Args:
    """Read `Args` from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for f in fields(Args):
        parser.add_argument("--" + f.name.replace("_", "-"), type=f.type, default=f.default)
    return Args(**vars(parser.parse_args(argv)))


def make_network() -> nn.Module:
    """Make a network that values both actions in a state."""
    layers = nn.Linear(4, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 2)
    return nn.Sequential(*layers)


def td_errors_of(batch, network, target) -> torch.Tensor:
    """Return double DQN's TD errors of transitions over n steps, [B]."""
    values = network(batch["state"]).gather(1, batch["action"].unsqueeze(1)).squeeze(1)
    with torch.no_grad():
        best = network(batch["next", "state"]).argmax(1, keepdim=True)
        future = target(batch["next", "state"]).gather(1, best).squeeze(1)
    return batch["reward"] + batch["discount"] * future - values


class Actor:
    """Acts with a copy of the network, and writes what it saw to the replay."""

    def __init__(self, number: int, args: Args):
        torch.set_num_threads(1)
        self.args, self.writer = args, None
        power = 1 + 7 * number / max(args.actors - 1, 1)
        self.explore = args.explore**power  # APEX: every actor explores in its own way
        self.rng = np.random.default_rng([args.seed, number])
        self.network = make_network()
        self.env = gym.make(ENV_ID)
        self.state, _ = self.env.reset(seed=args.seed * 1000 + number)
        self.recent = deque(maxlen=args.n_step)
        self.episode_return = 0.0

    def act(self, weights, writer) -> tuple[int, list[float]]:
        """Act for a chunk with these weights; return how many steps, and the returns that ended.

        The first `writer` is kept. It comes with each call and not to the constructor, since Ray
        keeps its handles in the object store, where a restarted actor may not find them.
        """
        self.writer = self.writer or writer
        self.network.load_state_dict(weights)
        rows, returns = [], []
        for _ in range(self.args.chunk):
            rows += self.step(returns)
        batch = torch.stack(rows)
        with torch.no_grad():  # APEX: the actor knows the priorities; nobody has to visit to learn
            priority = td_errors_of(batch, self.network, self.network).abs() + 1e-6
        self.writer.extend(batch, priority)  # APEX: to a shard, past the learner
        return self.args.chunk, returns

    @torch.no_grad()
    def step(self, returns: list[float]) -> list[TensorDict]:
        """Take one step; return the transitions that it completes."""
        action = int(self.network(torch.as_tensor(self.state)).argmax())
        if self.rng.random() < self.explore:
            action = int(self.rng.integers(2))
        state, reward, terminated, truncated, _ = self.env.step(action)
        self.recent.append((self.state, action, float(reward)))
        self.state = state
        self.episode_return += float(reward)
        rows, over = [], terminated or truncated
        while len(self.recent) == self.args.n_step or (over and self.recent):
            rows.append(self.transition(terminated))
            self.recent.popleft()
        if over:
            returns.append(self.episode_return)
            self.episode_return = 0.0
            self.state, _ = self.env.reset()
        return rows

    def transition(self, terminated: bool) -> TensorDict:
        """Make the transition from the oldest of the recent states to the present one."""
        gamma, (state, action, _) = self.args.gamma, self.recent[0]
        reward = sum(gamma**k * r for k, (_, _, r) in enumerate(self.recent))
        return TensorDict(
            {
                "state": torch.as_tensor(state),
                "action": torch.tensor(action),
                "reward": torch.tensor(reward),
                "discount": torch.tensor(0.0 if terminated else gamma ** len(self.recent)),
                "next": {"state": torch.as_tensor(self.state)},
            }
        )


def train(args: Args, buffer: ShardedReplayBuffer) -> tuple[nn.Module, int, list[float]]:
    """Return the network, the gradient steps, and the returns of all actors' episodes."""
    network = make_network()
    target, optimizer = copy.deepcopy(network), torch.optim.Adam(network.parameters(), lr=args.lr)
    steps, updates, returns = 0, 0, []
    remote = ray.remote(num_cpus=0.5, max_restarts=-1)(Actor)
    writers = {remote.remote(k, args): buffer.writer(k) for k in range(args.actors)}
    weights = ray.put(network.state_dict())
    under_way = {actor.act.remote(weights, writer): actor for actor, writer in writers.items()}
    while steps < args.total_steps:
        behind = steps > args.learning_starts and updates * args.train_every < steps
        ready, _ = ray.wait(list(under_way), timeout=0 if behind else 10)
        for done in ready:
            actor = under_way.pop(done)
            try:
                n, ended = ray.get(done)
            except ray.exceptions.RayActorError:  # Ray starts it again; what it wrote is kept
                n, ended = 0, []
            steps += n
            returns += ended
            if ended:
                print(f"step {steps:>6,}: return {ended[-1]:.0f}", flush=True)
            weights = ray.put(network.state_dict())
            under_way[actor.act.remote(weights, writers[actor])] = actor
        if not behind:
            continue
        batch = buffer.sample()
        td_error = td_errors_of(batch, network, target)
        zero = torch.zeros_like(td_error)
        huber = nn.functional.huber_loss(td_error, zero, reduction="none")
        optimizer.zero_grad()
        (batch["priority_weight"] * huber).mean().backward()
        optimizer.step()
        with torch.no_grad():
            for slow, fast in zip(target.parameters(), network.parameters(), strict=True):
                slow.lerp_(fast, args.tau)
        batch["td_error"] = td_error.detach()
        buffer.update_tensordict_priority(batch)  # APEX: a message per shard, not waited for
        updates += 1
    for actor in writers:
        ray.kill(actor)
    return network, updates, returns


@torch.no_grad()
def play_greedily(network, episodes: int, first_seed: int) -> float:
    """Return the mean return of episodes seeded with `first_seed`, `first_seed` + 1, ..."""
    env, total = gym.make(ENV_ID), 0.0
    for seed in range(first_seed, first_seed + episodes):
        state, _ = env.reset(seed=seed)
        over = False
        while not over:
            action = int(network(torch.as_tensor(state)).argmax())
            state, reward, terminated, truncated, _ = env.step(action)
            total += float(reward)
            over = terminated or truncated
    env.close()
    return total / episodes


def main(args: Args) -> dict:
    """Train, evaluate and print; return the figures that were printed."""
    torch.manual_seed(args.seed)
    own = not ray.is_initialized()
    if own and args.address:
        ray.init(address=args.address)
    elif own:
        ray.init(num_cpus=args.actors + args.shards + 1, include_dashboard=False)
    buffer = ShardedReplayBuffer(
        args.shards,
        args.capacity,
        args.batch_size,
        alpha=0.6,
        beta=0.4,
        prefetch=args.prefetch,
        checkpoint_dir=args.checkpoint_dir or None,
        generator=torch.Generator().manual_seed(args.seed),
        actor_options={"num_cpus": 0.5},
    )
    start = time.perf_counter()
    try:
        network, updates, returns = train(args, buffer)
        seconds = time.perf_counter() - start
        stats = buffer.stats()
    finally:
        buffer.close()
        if own:
            ray.shutdown()
    seed = EVAL_SEED + 1000 * args.seed
    summary = {
        "episodes": len(returns),
        "gradient steps": updates,
        "stale updates": stats["stale_updates"],
        "seconds": seconds,
        "environment steps per second": args.total_steps / seconds,
        "samples per second": updates * args.batch_size / seconds,
        "greedy return": play_greedily(network, args.eval_episodes, seed),
    }
    print(*(f"{name}: {value:,.1f}" for name, value in summary.items()), sep="\n")
    return summary


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(parse_args())

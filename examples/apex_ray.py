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
from dataclasses import dataclass, field, fields
from pathlib import Path

import gymnasium as gym
import numpy as np
import ray
import torch
from tensordict import TensorDict
from torch import nn
from tqdm import tqdm

from per_td.ray import ShardedReplayBuffer

ENV_ID = "CartPole-v1"
LONGEST_EPISODE = 500
EVAL_SEED = 20_000_000


def option(default, text):
    """A dataclass field with its line of help."""
    return field(default=default, metadata={"help": text})


@dataclass
class Args:
    """The settings of a run; each is a command-line option too."""

    address: str = option("", "of a Ray cluster ('auto': the one here); empty starts Ray here")
    total_steps: int = option(40_000, "environment steps of all actors together")
    actors: int = option(2, "actors")
    shards: int = option(2, "shards of the replay")
    seed: int = option(0, "seeds the actors, the learner and the final evaluation")
    out: str = option("runs/apex_ray", "folder for the picture")

    capacity: int = option(20_000, "transitions per shard")
    batch_size: int = option(128, "transitions in a gradient step")
    prefetch: int = option(2, "batches under way while the learner learns")
    alpha: float = option(0.6, "how strongly priorities skew the draws")
    beta: float = option(0.4, "share of that bias which the weights undo")
    checkpoint_dir: str = option("", "folder of the shards' checkpoints and logs; empty: none")

    chunk: int = option(100, "environment steps between two looks at new weights")
    n_step: int = option(3, "rewards added up in a transition")
    explore: float = option(0.4, "actor i acts randomly with this to the power 1 + 7 i/(actors-1)")
    lr: float = option(1e-3, "Adam's learning rate")
    gamma: float = option(0.99, "discount factor")
    tau: float = option(0.02, "share of the online network mixed into the target each time")
    hidden: int = option(128, "units in each of the two hidden layers")
    learning_starts: int = option(1_000, "environment steps before the first gradient step")
    train_every: int = option(4, "environment steps per gradient step, at least")
    eval_episodes: int = option(10, "episodes in the final greedy evaluation")


def parse_args(argv=None) -> Args:
    """`Args` from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    for f in fields(Args):
        name = "--" + f.name.replace("_", "-")
        parser.add_argument(name, type=f.type, default=f.default, help=f.metadata["help"])
    return Args(**vars(parser.parse_args(argv)))


# ---------------------------------------------------------------------- what all of them share


def make_network(args: Args) -> nn.Module:
    """Action values of CartPole's four numbers."""
    return nn.Sequential(
        nn.Linear(4, args.hidden),
        nn.ReLU(),
        nn.Linear(args.hidden, args.hidden),
        nn.ReLU(),
        nn.Linear(args.hidden, 2),
    )


def td_errors_of(batch, network, target) -> torch.Tensor:
    """Double DQN's TD errors of transitions over n steps, [B]."""
    values = network(batch["state"]).gather(1, batch["action"].unsqueeze(1)).squeeze(1)
    with torch.no_grad():
        best = network(batch["next", "state"]).argmax(1, keepdim=True)
        future = target(batch["next", "state"]).gather(1, best).squeeze(1)
    return batch["reward"] + batch["discount"] * future - values


# ------------------------------------------------------------------------------- the actors


class Actor:
    """Acts with a copy of the network, and writes what it saw to the replay."""

    def __init__(self, number: int, args: Args, writer):
        torch.set_num_threads(1)
        self.args, self.writer = args, writer
        power = 1 + 7 * number / max(args.actors - 1, 1)
        self.explore = args.explore**power  # APEX: every actor explores in its own way
        self.rng = np.random.default_rng([args.seed, number])
        self.network = make_network(args)
        self.env = gym.make(ENV_ID)
        self.state, _ = self.env.reset(seed=args.seed * 1000 + number)
        self.recent = deque(maxlen=args.n_step)
        self.episode_return = 0.0

    def act(self, weights) -> tuple[int, list[float]]:
        """Act for a chunk with these weights; how many steps, and the returns of what ended."""
        self.network.load_state_dict(weights)
        rows, returns = [], []
        for _ in range(self.args.chunk):
            rows += self.step(returns)
        batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
        batch = TensorDict(
            {
                "state": batch["state"],
                "action": batch["action"],
                "reward": batch["reward"],
                "discount": batch["discount"],
                "next": {"state": batch["next_state"]},
            },
            [len(rows)],
        )
        with torch.no_grad():  # APEX: the actor knows the priorities; nobody has to visit to learn
            priority = td_errors_of(batch, self.network, self.network).abs() + 1e-6
        self.writer.extend(batch, priority)  # APEX: to a shard, past the learner
        return self.args.chunk, returns

    @torch.no_grad()
    def step(self, returns: list[float]) -> list[dict]:
        """One step; the transitions that it completes."""
        if self.rng.random() < self.explore:
            action = int(self.rng.integers(2))
        else:
            action = int(self.network(torch.as_tensor(self.state)).argmax())
        state, reward, terminated, truncated, _ = self.env.step(action)
        self.recent.append((self.state, action, float(reward)))
        self.state = state
        self.episode_return += float(reward)
        rows = []
        if len(self.recent) == self.args.n_step or terminated or truncated:
            rows.append(self.transition(terminated))
        if terminated or truncated:
            self.recent.popleft()
            while self.recent:  # the last steps, over fewer rewards
                rows.append(self.transition(terminated))
                self.recent.popleft()
            returns.append(self.episode_return)
            self.episode_return = 0.0
            self.state, _ = self.env.reset()
        return rows

    def transition(self, terminated: bool) -> dict:
        """From the oldest of the recent states to the present one."""
        state, action, _ = self.recent[0]
        gamma = self.args.gamma
        reward = sum(gamma**k * r for k, (_, _, r) in enumerate(self.recent))
        return {
            "state": torch.as_tensor(state),
            "action": torch.tensor(action),
            "reward": torch.tensor(reward),
            "discount": torch.tensor(0.0 if terminated else gamma ** len(self.recent)),
            "next_state": torch.as_tensor(self.state),
        }


# ------------------------------------------------------------------------------- the learner


class Learner:
    """Double DQN on batches from all shards."""

    def __init__(self, args: Args, buffer: ShardedReplayBuffer):
        self.args, self.buffer = args, buffer
        self.network = make_network(args)
        self.target = copy.deepcopy(self.network)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=args.lr)
        self.steps = 0

    def learn(self) -> None:
        """One gradient step."""
        batch = self.buffer.sample()
        td_error = td_errors_of(batch, self.network, self.target)
        loss = (
            batch["priority_weight"]
            * nn.functional.huber_loss(td_error, torch.zeros_like(td_error), reduction="none")
        ).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            pairs = zip(self.target.parameters(), self.network.parameters(), strict=True)
            for slow, fast in pairs:
                slow.lerp_(fast, self.args.tau)
        batch["td_error"] = td_error.detach()
        self.buffer.update_tensordict_priority(batch)  # APEX: a message per shard, not waited for
        self.steps += 1


def train(args: Args, buffer: ShardedReplayBuffer):
    """Returns the learner, pairs of (environment step, return), and the seconds it took."""
    learner, history, steps = Learner(args, buffer), [], 0
    remote = ray.remote(num_cpus=0.5, max_restarts=-1)(Actor)
    actors = [remote.remote(k, args, buffer.writer(k)) for k in range(args.actors)]
    weights = ray.put(learner.network.state_dict())
    under_way = {actor.act.remote(weights): actor for actor in actors}
    start = time.perf_counter()
    progress = tqdm(total=args.total_steps, desc=ENV_ID, unit=" steps", unit_scale=True)
    while steps < args.total_steps:
        behind = steps > args.learning_starts and learner.steps * args.train_every < steps
        ready, _ = ray.wait(list(under_way), timeout=0 if behind else 10)
        for done in ready:
            actor = under_way.pop(done)
            try:
                n, returns = ray.get(done)
            except ray.exceptions.RayActorError:  # Ray starts it again; what it wrote is kept
                n, returns = 0, []
            steps += n
            history += [(steps, value) for value in returns]
            progress.update(n)
            weights = ray.put(learner.network.state_dict())
            under_way[actor.act.remote(weights)] = actor
        if behind:
            learner.learn()
        if history:
            progress.set_postfix({"return": f"{history[-1][1]:.0f}"}, refresh=False)
    seconds = time.perf_counter() - start
    progress.close()
    for actor in actors:
        ray.kill(actor)
    return learner, history, seconds


@torch.no_grad()
def play_greedily(network, episodes: int, first_seed: int) -> list[float]:
    """Returns of greedy episodes."""
    env, returns = gym.make(ENV_ID), []
    for seed in range(first_seed, first_seed + episodes):
        state, _ = env.reset(seed=seed)
        total, over = 0.0, False
        while not over:
            action = int(network(torch.as_tensor(state)).argmax())
            state, reward, terminated, truncated, _ = env.step(action)
            total += float(reward)
            over = terminated or truncated
        returns.append(total)
    env.close()
    return returns


# ------------------------------------------------------------------------- table and picture


def save_picture(path: Path, history, summary: dict) -> None:
    """Returns of all actors' episodes over time."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.axhline(LONGEST_EPISODE, color="#718096", lw=1, ls=":")
    if history:
        steps, returns = np.array(history).T
        axes.scatter(steps, returns, s=10, color="#2b6cb0", alpha=0.3, lw=0, label="an episode")
        window = min(20, len(returns))
        mean = np.convolve(returns, np.ones(window) / window, "valid")
        axes.plot(steps[window - 1 :], mean, color="#2b6cb0", label=f"mean of the last {window}")
        axes.legend(loc="upper left", frameon=False)
    axes.set(xlabel="environment steps of all actors", ylabel="return")
    axes.set_title(
        f"Ape-X on {ENV_ID}: {summary['actors']} actors, {summary['shards']} shards, greedy return"
        f" {summary['greedy']:.0f}",
        loc="left",
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def print_table(summary: dict) -> None:
    """The run in a few lines."""
    width = max(map(len, summary))
    for name, value in summary.items():
        shown = f"{value:,.1f}" if isinstance(value, float) else f"{value}"
        print(f"{name.replace('_', ' '):<{width}}  {shown}")


def main(args: Args) -> dict:
    """Train, evaluate, draw and print; returns the figures that were printed."""
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
        alpha=args.alpha,
        beta=args.beta,
        prefetch=args.prefetch,
        checkpoint_dir=args.checkpoint_dir or None,
        generator=torch.Generator().manual_seed(args.seed),
        actor_options={"num_cpus": 0.5},
    )
    try:
        learner, history, seconds = train(args, buffer)
        stats = buffer.stats()
    finally:
        buffer.close()
        if own:
            ray.shutdown()
    returns = play_greedily(learner.network, args.eval_episodes, EVAL_SEED + 1000 * args.seed)
    summary = {
        "actors": args.actors,
        "shards": args.shards,
        "environment_steps": args.total_steps,
        "episodes": len(history),
        "gradient_steps": learner.steps,
        "stale_updates": stats["stale_updates"],
        "seconds": seconds,
        "environment_steps_per_second": args.total_steps / seconds,
        "samples_per_second": learner.steps * args.batch_size / seconds,
        "greedy": float(np.mean(returns)),
        "picture": str(Path(args.out) / f"seed{args.seed}.png"),
    }
    save_picture(Path(summary["picture"]), history, summary)
    print_table(summary)
    return summary


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(parse_args())

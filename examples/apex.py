"""Ape-X DQN on CartPole-v1: many actor processes, one learner, one shared buffer, in one file.

    pip install -c constraints.txt -e ".[examples]"
    python examples/apex.py

Distributed prioritized experience replay as in Horgan et al. 2018 (arXiv 1803.00933): actors
explore with epsilons of their own, compute the first priorities of their n-step transitions from
their own Q values, and write them to the buffer in shared memory. The learner only samples, learns,
and sets the priorities anew. The networks' parameters go the other way, in shared memory too.

The learner decides when it is over: every `--eval-every` steps it plays `--select-episodes` greedy
episodes, keeps the best network, and stops when their mean reaches `--stop-return`. The final
number is that network's mean return on fresh episodes, with seeds that nothing before has seen.
"""

import argparse
import copy
import multiprocessing
import time
from collections import deque
from dataclasses import dataclass, field, fields
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from tensordict import TensorDict
from torch import nn
from tqdm import tqdm

from per_td import PrioritizedReplayBuffer

ENV_ID = "CartPole-v1"
SOLVED_RETURN = 475.0
SELECTION_SEED = 10_000_000  # training, selection and final evaluation share no seed
FINAL_SEED = 20_000_000


# ------------------------------------------------------------------------------- arguments


def option(default, text):
    """A dataclass field with its line of help."""
    return field(default=default, metadata={"help": text})


@dataclass
class Args:
    """The settings of a run; each is a command-line option too."""

    actors: int = option(3, "actor processes")
    learner_steps: int = option(20_000, "gradient steps at most; fewer when solved early")
    seed: int = option(0, "seeds environments, exploration and torch; timing still varies")
    out: str = option("runs/apex", "folder for the picture")

    capacity: int = option(50_000, "transitions in the buffer")
    batch_size: int = option(128, "transitions in a gradient step")
    alpha: float = option(0.6, "how strongly priorities skew the draws; 0 is uniform")
    beta: float = option(0.4, "share of that bias which the weights undo")
    learning_starts: int = option(1_000, "transitions before the first gradient step")

    lr: float = option(1e-3, "Adam's learning rate at the start; it falls linearly to a tenth")
    gamma: float = option(0.99, "discount factor")
    n_step: int = option(3, "rewards that a transition sums up")
    tau: float = option(0.01, "share of the online network mixed into the target each time")
    hidden: int = option(128, "units in each of the two hidden layers")
    publish_every: int = option(20, "gradient steps between two publications of the network")

    noise: float = option(0.4, "actor i of A explores with noise ** (1 + i / (A - 1) * spread)")
    spread: float = option(7.0, "see --noise")
    send_every: int = option(50, "transitions that an actor collects before it writes them")
    refresh_every: int = option(100, "environment steps between two looks at the network")

    eval_every: int = option(500, "gradient steps between two greedy evaluations for selection")
    select_episodes: int = option(10, "episodes in each of them")
    stop_return: float = option(500.0, "mean return in selection at which training stops")
    eval_episodes: int = option(20, "episodes in the final greedy evaluation")


def parse_args(argv=None) -> Args:
    """`Args` from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    for f in fields(Args):
        name = "--" + f.name.replace("_", "-")
        parser.add_argument(name, default=f.default, help=f.metadata["help"], type=f.type)
    return Args(**vars(parser.parse_args(argv)))


# ------------------------------------------------------------------------------- networks


def make_network(args: Args) -> nn.Module:
    """Q values of the two actions, from the four numbers of a state."""
    return nn.Sequential(
        nn.Linear(4, args.hidden),
        nn.ReLU(),
        nn.Linear(args.hidden, args.hidden),
        nn.ReLU(),
        nn.Linear(args.hidden, 2),
    )


def greedy_action(network, state) -> int:
    """The action of the highest value in one state."""
    return int(network(torch.from_numpy(state)).argmax())


def td_errors_of(online, target, batch) -> torch.Tensor:
    """TD errors [B] of n-step transitions, with double Q-learning (section 3.1)."""
    with torch.no_grad():
        best = online(batch["next", "observation"]).argmax(-1, keepdim=True)
        value = target(batch["next", "observation"]).gather(-1, best).squeeze(-1)
        wanted = batch["next", "reward"] + batch["discount"] * value
    return wanted - online(batch["observation"]).gather(-1, batch["action"]).squeeze(-1)


# --------------------------------------------------------------------------------- actors


class NStep:
    """Turns steps into n-step transitions; `discount` is gamma^n, or 0 where the future ends."""

    def __init__(self, n: int, gamma: float):
        self.gamma, self.steps, self.done = gamma, deque(maxlen=n), []

    def add(self, state, action, reward, next_state, terminated, truncated) -> None:
        """Take up one step; transitions that are complete go to `done`."""
        self.steps.append((state, action, reward))
        if terminated or truncated:
            while self.steps:
                self._emit(next_state, terminated)
                self.steps.popleft()
        elif len(self.steps) == self.steps.maxlen:
            self._emit(next_state, False)

    def _emit(self, next_state, terminated) -> None:
        state, action, _ = self.steps[0]
        reward = sum(self.gamma**k * r for k, (_, _, r) in enumerate(self.steps))
        discount = 0.0 if terminated else self.gamma ** len(self.steps)
        self.done.append((state, action, reward, next_state, discount))

    def take(self) -> TensorDict:
        """All that is in `done`, as a TensorDict [n]."""
        state, action, reward, next_state, discount = zip(*self.done, strict=True)
        self.done = []
        return TensorDict(
            {
                "observation": torch.from_numpy(np.stack(state)),
                "action": torch.tensor(action).unsqueeze(-1),
                "discount": torch.tensor(discount, dtype=torch.float32),
                "next": {
                    "observation": torch.from_numpy(np.stack(next_state)),
                    "reward": torch.tensor(reward, dtype=torch.float32),
                },
            },
            [len(state)],
        )


def example() -> TensorDict:
    """What a transition looks like: the buffer's shared memory is allocated at once."""
    steps, state = NStep(1, 1.0), np.zeros(4, np.float32)
    steps.add(state, 0, 0.0, state, False, False)
    return steps.take()[0]


def epsilon_of(actor: int, args: Args) -> float:
    """Share of random actions of one of the actors (section 4.1)."""
    return args.noise ** (1 + actor / max(args.actors - 1, 1) * args.spread)


@torch.no_grad()
def act(actor: int, args: Args, buffer, published, stop, returns) -> None:
    """The whole life of an actor process; puts (transitions so far, return) into `returns`."""
    torch.set_num_threads(1)
    rng = np.random.default_rng((args.seed, actor))
    env, epsilon = gym.make(ENV_ID), epsilon_of(actor, args)
    network, steps = copy.deepcopy(published), NStep(args.n_step, args.gamma)
    state, _ = env.reset(seed=1000 * args.seed + actor)
    total, step = 0.0, 0
    while not stop.is_set():
        random = rng.random() < epsilon
        action = int(rng.integers(2)) if random else greedy_action(network, state)
        next_state, reward, terminated, truncated, _ = env.step(action)
        # Only a fallen pole ends the future: where the time limit cut the episode off, the next
        # state still has a value.
        steps.add(state, action, float(reward), next_state, terminated, truncated)
        state, total, step = next_state, total + float(reward), step + 1
        if terminated or truncated:
            returns.put((buffer.write_count, total))
            state, _ = env.reset()
            total = 0.0
        if len(steps.done) >= args.send_every:
            batch = steps.take()  # the first priorities are the actor's own TD errors
            buffer.extend(batch, td_errors_of(network, network, batch).abs() + buffer.eps)
        if step % args.refresh_every == 0:
            network.load_state_dict(published.state_dict())


# -------------------------------------------------------------------------------- learner


class Learner:
    """Double DQN on batches from the buffer."""

    def __init__(self, args: Args, buffer, published: nn.Module):
        self.args, self.buffer, self.published = args, buffer, published
        self.online = copy.deepcopy(published)
        self.target = copy.deepcopy(published)
        self.optimizer = torch.optim.Adam(self.online.parameters(), lr=args.lr, fused=True)

    def step(self, number: int) -> None:
        """One gradient step, and new priorities for what was in it."""
        args = self.args
        self.optimizer.param_groups[0]["lr"] = args.lr * (1 - 0.9 * number / args.learner_steps)
        batch = self.buffer.sample()
        td_errors = td_errors_of(self.online, self.target, batch)
        loss = (batch["priority_weight"] * td_errors**2).mean()
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.online.parameters(), 10.0)
        self.optimizer.step()
        self.buffer.update_priority(batch["index"], td_errors.detach(), batch["generation"])
        with torch.no_grad():
            pairs = zip(self.target.parameters(), self.online.parameters(), strict=True)
            for slow, fast in pairs:
                slow.lerp_(fast, args.tau)
        if number % args.publish_every == 0:
            self.published.load_state_dict(self.online.state_dict())


@torch.no_grad()
def play_greedily(network, episodes: int, first_seed: int) -> float:
    """Mean return of greedy episodes, seeded with `first_seed`, `first_seed` + 1, ..."""
    env, total = gym.make(ENV_ID), 0.0
    for seed in range(first_seed, first_seed + episodes):
        state, _ = env.reset(seed=seed)
        over = False
        while not over:
            state, reward, terminated, truncated, _ = env.step(greedy_action(network, state))
            total += float(reward)
            over = terminated or truncated
    env.close()
    return total / episodes


@dataclass
class History:
    """What the picture shows."""

    returns: list = field(default_factory=list)  # (transitions written, return of an actor)
    greedy: list = field(default_factory=list)  # (transitions written, mean greedy return)
    evaluating: float = 0.0  # seconds
    steps: int = 0

    def collect(self, returns) -> None:
        """Take over what the actors have put into the queue."""
        while not returns.empty():
            self.returns.append(returns.get())


def learn(args: Args, learner: Learner, returns) -> tuple[nn.Module, History]:
    """Learn until solved or out of steps; the best network, and the `History`."""
    buffer, history = learner.buffer, History()
    best, best_mean = copy.deepcopy(learner.online), -np.inf
    progress = tqdm(range(1, args.learner_steps + 1), desc="learner", unit=" steps")
    for number in progress:
        learner.step(number)
        history.steps = number
        if number % args.eval_every and number < args.learner_steps:
            continue
        start = time.perf_counter()
        mean = play_greedily(learner.online, args.select_episodes, SELECTION_SEED)
        history.evaluating += time.perf_counter() - start
        history.greedy.append((buffer.write_count, mean))
        history.collect(returns)
        progress.set_postfix({"written": buffer.write_count, "greedy": f"{mean:.0f}"})
        if mean > best_mean:
            best, best_mean = copy.deepcopy(learner.online), mean
        if mean >= args.stop_return:
            break
    progress.close()
    return best, history


def save_picture(path: Path, history: History, title: str) -> None:
    """One PNG: returns of the actors and of the greedy policy."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    FigureCanvasAgg(figure)  # draws into memory, whatever windows this machine may have
    axes = figure.subplots()
    if history.returns:
        written, values = np.array(history.returns).T
        axes.scatter(written, values, s=6, color="#2b6cb0", alpha=0.25, lw=0, label="actors")
    written, means = np.array(history.greedy).T
    axes.plot(written, means, "D-", color="#dd6b20", ms=4, label="greedy, for selection")
    axes.set(xlabel="transitions written", ylabel="return", xlim=(0, None), ylim=(0, 560))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_title(title, loc="left")
    axes.legend(loc="upper left", ncols=2, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main(args: Args) -> dict:
    """Start the actors, learn, evaluate, draw and print; returns the figures printed."""
    torch.set_num_threads(1)  # the networks are so small that more threads only wait
    torch.manual_seed(args.seed)
    buffer = PrioritizedReplayBuffer(
        args.capacity,
        args.batch_size,
        alpha=args.alpha,
        beta=args.beta,
        shared=True,
        example=example(),
    )
    published = make_network(args).share_memory()
    context = multiprocessing.get_context("spawn")
    stop, returns = context.Event(), context.SimpleQueue()
    actors = [
        context.Process(target=act, args=(i, args, buffer, published, stop, returns), daemon=True)
        for i in range(args.actors)
    ]
    for actor in actors:
        actor.start()
    while len(buffer) < args.learning_starts:
        if not any(actor.is_alive() for actor in actors):
            raise RuntimeError("expected actors that write transitions, all of them have ended")
        time.sleep(0.01)

    start, before = time.perf_counter(), buffer.write_count
    best, history = learn(args, Learner(args, buffer, published), returns)
    seconds, written = time.perf_counter() - start, buffer.write_count - before
    stop.set()
    while any(actor.is_alive() for actor in actors):  # who waits at a full queue cannot end
        history.collect(returns)
        time.sleep(0.01)
    for actor in actors:
        actor.join()
    history.collect(returns)

    mean = play_greedily(best, args.eval_episodes, FINAL_SEED + 1000 * args.seed)
    picture = Path(args.out) / f"seed{args.seed}.png"
    save_picture(picture, history, f"Ape-X on {ENV_ID}, {args.actors} actors, seed {args.seed}")
    summary = {
        "greedy mean": mean,
        "seconds": seconds,
        "gradient steps": history.steps,
        "transitions written": buffer.write_count,
        "transitions per second": written / seconds,
        "batches per second": history.steps / (seconds - history.evaluating),
        "stale updates dropped": buffer.stats()["stale_updates"],
    }
    print()
    for name, value in summary.items():
        print(f"{name:<24}{value:>12,.1f}")
    print(f"\n{'SOLVED' if mean > SOLVED_RETURN else 'NOT SOLVED'}: wanted > {SOLVED_RETURN:.0f}")
    print(f"picture: {picture}")
    return summary


if __name__ == "__main__":
    main(parse_args())

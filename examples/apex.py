"""Ape-X DQN on CartPole-v1: many actor processes, one learner, one shared buffer, in one file.

    pip install -c constraints.txt -e ".[examples]"
    python examples/apex.py

Distributed prioritized experience replay as in Horgan et al. 2018 (arXiv 1803.00933): actors
explore with epsilons of their own, compute the first priorities of their n-step transitions from
their own Q values, and write them to the buffer in shared memory. The learner only samples, learns,
and sets the priorities anew. The networks' parameters go the other way, in shared memory too.

Every `--eval-every` steps the learner plays `--select-episodes` greedy episodes, keeps the best
network, and stops when their mean is 500, the most there is. The final number is that network's
mean return on fresh episodes.
"""

import argparse
import copy
import multiprocessing
import time
from collections import deque
from dataclasses import dataclass, fields

import gymnasium as gym
import numpy as np
import torch
from tensordict import TensorDict
from torch import nn

from per_td import PrioritizedReplayBuffer

ENV_ID = "CartPole-v1"
LONGEST_EPISODE = 500
SOLVED_RETURN = 475.0
SELECTION_SEED = 10_000_000  # training, selection and final evaluation share no seed
FINAL_SEED = 20_000_000


@dataclass
class Args:
    """The settings of a run; each is a command-line option too."""

    actors: int = 3  # actor processes
    learner_steps: int = 20_000  # gradient steps at most; fewer when solved early
    seed: int = 0  # of environments, exploration and torch; timing still varies
    capacity: int = 50_000  # transitions in the buffer
    batch_size: int = 128  # transitions in a gradient step
    learning_starts: int = 1_000  # transitions before the first gradient step
    lr: float = 1e-3  # Adam's learning rate at the start; it falls linearly to a tenth
    gamma: float = 0.99  # discount factor
    n_step: int = 3  # rewards that a transition sums up
    tau: float = 0.01  # share of the online network mixed into the target each time
    noise: float = 0.4  # actor i of A explores with noise ** (1 + 7 i / (A - 1)) (section 4.1)
    send_every: int = 50  # transitions that an actor collects before it writes them
    refresh_every: int = 100  # environment steps between two looks at the network
    publish_every: int = 20  # gradient steps between two publications of it
    eval_every: int = 500  # gradient steps between two greedy evaluations for selection
    select_episodes: int = 10  # episodes in each of them
    eval_episodes: int = 20  # episodes in the final greedy evaluation


def parse_args(argv=None) -> Args:
    """Read `Args` from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for f in fields(Args):
        parser.add_argument("--" + f.name.replace("_", "-"), type=f.type, default=f.default)
    return Args(**vars(parser.parse_args(argv)))


def greedy_action(network, state) -> int:
    """Return the action of the highest value in one state."""
    return int(network(torch.from_numpy(state)).argmax())


def td_errors_of(online, target, batch) -> torch.Tensor:
    """Return the TD errors [B] of n-step transitions, with double Q-learning (section 3.1)."""
    with torch.no_grad():
        best = online(batch["next", "observation"]).argmax(-1, keepdim=True)
        value = target(batch["next", "observation"]).gather(-1, best).squeeze(-1)
        wanted = batch["next", "reward"] + batch["discount"] * value
    return wanted - online(batch["observation"]).gather(-1, batch["action"]).squeeze(-1)


class NStep:
    """Turns steps into n-step transitions; `discount` is gamma^n, or 0 where the future ends."""

    def __init__(self, n: int, gamma: float):
        self.gamma, self.steps, self.done = gamma, deque(maxlen=n), []

    def add(self, state, action, reward, next_state, terminated, truncated) -> None:
        """Take up one step; transitions that are complete go to `done`."""
        self.steps.append((state, action, reward))
        over = terminated or truncated
        while len(self.steps) == self.steps.maxlen or (over and self.steps):
            rewards = [self.gamma**k * r for k, (_, _, r) in enumerate(self.steps)]
            discount = 0.0 if terminated else self.gamma ** len(self.steps)
            state, action, _ = self.steps.popleft()
            self.done.append((state, action, sum(rewards), next_state, discount))

    def take(self) -> TensorDict:
        """Return all that is in `done`, as a TensorDict [n]."""
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


@torch.no_grad()
def act(actor: int, args: Args, buffer, published, stop) -> None:
    """Act until `stop` is set: the whole life of an actor process."""
    torch.set_num_threads(1)
    rng = np.random.default_rng((args.seed, actor))
    env, epsilon = gym.make(ENV_ID), args.noise ** (1 + 7 * actor / max(args.actors - 1, 1))
    network, steps = copy.deepcopy(published), NStep(args.n_step, args.gamma)
    state, _ = env.reset(seed=1000 * args.seed + actor)
    step = 0
    while not stop.is_set():
        explore = rng.random() < epsilon
        action = int(rng.integers(2)) if explore else greedy_action(network, state)
        next_state, reward, terminated, truncated, _ = env.step(action)
        # Only a fallen pole ends the future: where the time limit cut the episode off, the next
        # state still has a value.
        steps.add(state, action, float(reward), next_state, terminated, truncated)
        state = env.reset()[0] if terminated or truncated else next_state
        step += 1
        if len(steps.done) >= args.send_every:
            batch = steps.take()  # the first priorities are the actor's own TD errors
            buffer.extend(batch, td_errors_of(network, network, batch).abs() + buffer.eps)
        if step % args.refresh_every == 0:
            network.load_state_dict(published.state_dict())


@torch.no_grad()
def play_greedily(network, episodes: int, first_seed: int) -> float:
    """Return the mean return of episodes seeded with `first_seed`, `first_seed` + 1, ..."""
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


def learn(args: Args, buffer, published) -> tuple[nn.Module, int]:
    """Learn until solved or out of steps; return the best network and the steps taken."""
    online, target, best, best_mean = *(copy.deepcopy(published) for _ in range(3)), -np.inf
    optimizer = torch.optim.Adam(online.parameters(), lr=args.lr, fused=True)
    for step in range(1, args.learner_steps + 1):
        optimizer.param_groups[0]["lr"] = args.lr * (1 - 0.9 * step / args.learner_steps)
        batch = buffer.sample()
        td_errors = td_errors_of(online, target, batch)
        loss = (batch["priority_weight"] * td_errors**2).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(online.parameters(), 10.0)
        optimizer.step()
        # actors may have overwritten some of the batch: the generations tell, those are skipped
        buffer.update_priority(batch["index"], td_errors.detach(), batch["generation"])
        with torch.no_grad():
            for slow, fast in zip(target.parameters(), online.parameters(), strict=True):
                slow.lerp_(fast, args.tau)
        if step % args.publish_every == 0:
            published.load_state_dict(online.state_dict())
        if step % args.eval_every == 0 or step == args.learner_steps:
            mean = play_greedily(online, args.select_episodes, SELECTION_SEED)
            print(f"step {step:>6,}: {buffer.write_count:,} written, greedy return {mean:.1f}")
            if mean > best_mean:
                best, best_mean = copy.deepcopy(online), mean
            if mean >= LONGEST_EPISODE:
                break
    return best, step


def main(args: Args) -> dict:
    """Start the actors, learn, evaluate and print; return the figures printed."""
    torch.set_num_threads(1)  # the networks are so small that more threads only wait
    torch.manual_seed(args.seed)
    steps, state = NStep(1, 1.0), np.zeros(4, np.float32)
    steps.add(state, 0, 0.0, state, False, False)
    example = steps.take()[0]  # shared memory is allocated at once, for transitions like this
    buffer = PrioritizedReplayBuffer(
        args.capacity, args.batch_size, alpha=0.6, beta=0.4, shared=True, example=example
    )
    layers = nn.Linear(4, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 2)
    published = nn.Sequential(*layers).share_memory()
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    actors = [
        context.Process(target=act, args=(i, args, buffer, published, stop), daemon=True)
        for i in range(args.actors)
    ]
    for actor in actors:
        actor.start()
    while len(buffer) < args.learning_starts:
        if not any(actor.is_alive() for actor in actors):
            raise RuntimeError("expected actors that write transitions, all of them have ended")
        time.sleep(0.01)

    start, before = time.perf_counter(), buffer.write_count
    best, gradient_steps = learn(args, buffer, published)
    seconds, written = time.perf_counter() - start, buffer.write_count - before
    stop.set()
    for actor in actors:
        actor.join()

    summary = {
        "greedy return": play_greedily(best, args.eval_episodes, FINAL_SEED + 1000 * args.seed),
        "seconds": seconds,
        "gradient steps": gradient_steps,
        "transitions per second": written / seconds,
        "stale updates dropped": buffer.stats()["stale_updates"],
    }
    print(*(f"{name}: {value:,.1f}" for name, value in summary.items()), sep="\n")
    solved = summary["greedy return"] > SOLVED_RETURN
    print(f"{'SOLVED' if solved else 'NOT SOLVED'}: wanted > {SOLVED_RETURN:.0f}")
    return summary


if __name__ == "__main__":
    main(parse_args())

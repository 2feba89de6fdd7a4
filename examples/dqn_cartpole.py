"""Double DQN with prioritized experience replay on CartPole-v1, in one file, top to bottom.

    pip install -c constraints.txt -e ".[examples]"
    python examples/dqn_cartpole.py                # prioritized replay
    python examples/dqn_cartpole.py --uniform      # the same agent, uniform replay
    python examples/dqn_cartpole.py --compare      # both, with the same seed, in one picture

Every call to the buffer is in `train`, which is the loop as courses teach it. What prioritized
replay adds to a plain DQN is marked PER.

Two returns are printed and drawn, and they differ. Training episodes explore: some of their actions
are random, and the network changes while they last. Greedy episodes take the best action only.

Every `--eval-every` steps the greedy policy plays `--select-episodes` episodes. The network with
the best mean is kept, and training stops when that mean is 500, the most there is. The final
evaluation plays that best network on fresh episodes. It says how good this network is, and not that
training would have stayed there: a DQN on CartPole comes and goes.
"""

import argparse
import copy
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from torch import nn

from per_td import TransitionReplayBuffer

ENV_ID = "CartPole-v1"
LONGEST_EPISODE = 500
SOLVED_RETURN = 450.0
SELECTION_SEED = 10_000_000  # training, selection and final evaluation share no seed
FINAL_SEED = 20_000_000


@dataclass
class Args:
    """The settings of a run; each is a command-line option too."""

    total_steps: int = 50_000  # environment steps at most; fewer when solved early
    seed: int = 0  # of the environment, the exploration and torch
    uniform: bool = False  # draw uniformly (alpha = 0) instead of by priority
    compare: bool = False  # train with prioritized and with uniform replay
    device: str = "cpu"  # where networks and buffer live
    out: str = "runs/dqn_cartpole"  # folder for the picture
    alpha: float = 0.6  # how strongly priorities skew the draws; 0 is uniform
    beta: float = 0.4  # share of that bias which the weights undo at first; 1 is all
    beta_increment: float = 0.001  # added to beta at each episode's start, up to 1
    epsilon: float = 0.001  # added to |TD error|, so that no priority is 0
    capacity: int = 10_000  # transitions in the buffer
    batch_size: int = 128  # transitions in a gradient step
    lr: float = 2e-3  # Adam's learning rate at the start; it falls linearly to a tenth
    gamma: float = 0.99  # discount factor
    tau: float = 0.02  # share of the online network mixed into the target each time
    learning_starts: int = 500  # random steps before the first gradient step
    train_every: int = 4  # environment steps per gradient step
    explore_end: float = 0.02  # share of random actions after its decay
    explore_steps: int = 5_000  # steps in which it falls from 1, linearly
    eval_every: int = 1_000  # steps between two greedy evaluations for selection
    select_episodes: int = 10  # episodes in each of them
    eval_episodes: int = 20  # episodes in the final greedy evaluation


def parse_args(argv=None) -> Args:
    """Read `Args` from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for f in fields(Args):
        kind = {"action": "store_true"} if f.type is bool else {"type": f.type}
        parser.add_argument("--" + f.name.replace("_", "-"), default=f.default, **kind)
    return Args(**vars(parser.parse_args(argv)))


class Agent:
    """Double DQN: an online network, its slow copy, and one gradient step."""

    def __init__(self, args: Args):
        self.args = args
        layers = nn.Linear(4, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 2)
        self.network = nn.Sequential(*layers).to(args.device)
        self.target = copy.deepcopy(self.network)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=args.lr, fused=True)

    def learn(self, states, actions, rewards, next_states, dones, weights) -> torch.Tensor:
        """Take one gradient step on a batch; return its TD errors [B]."""
        with torch.no_grad():  # the online network picks the next action, the target values it
            best = self.network(next_states).argmax(dim=1, keepdim=True)
            next_values = self.target(next_states).gather(1, best).squeeze(1)
            wanted = rewards + self.args.gamma * (1 - dones) * next_values
        td_errors = wanted - self.network(states).gather(1, actions).squeeze(1)
        loss = torch.sum(weights * td_errors**2)  # PER: the weights undo the bias of the draws

        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            pairs = zip(self.target.parameters(), self.network.parameters(), strict=True)
            for slow, fast in pairs:
                slow.lerp_(fast, self.args.tau)
        return td_errors.detach()


@torch.no_grad()
def greedy_action(network, state, device) -> int:
    """Return the action of the highest value in one state."""
    return int(network(torch.as_tensor(state, device=device)).argmax())


def play_greedily(network, device, episodes: int, first_seed: int) -> float:
    """Return the mean return of episodes seeded with `first_seed`, `first_seed` + 1, ..."""
    env, total = gym.make(ENV_ID), 0.0
    for seed in range(first_seed, first_seed + episodes):
        state, _ = env.reset(seed=seed)
        over = False
        while not over:
            action = greedy_action(network, state, device)
            state, reward, terminated, truncated, _ = env.step(action)
            total += float(reward)
            over = terminated or truncated
    env.close()
    return total / episodes


def make_buffer(args: Args) -> TransitionReplayBuffer:
    """Make the replay buffer; with alpha = 0 all draws are equally likely, all weights 1."""
    return TransitionReplayBuffer(
        args.capacity,
        alpha=0.0 if args.uniform else args.alpha,
        beta=args.beta,
        beta_increment=args.beta_increment,
        epsilon=args.epsilon,
        device=args.device,
    )


def train(args: Args):
    """Return the best network, and (step, return) of training episodes and of selections."""
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    env, agent, buffer = gym.make(ENV_ID), Agent(args), make_buffer(args)
    best_network, best_mean = copy.deepcopy(agent.network), -np.inf
    returns, selections = [], []

    buffer.increase_beta()  # PER: at each episode's start
    state, _ = env.reset(seed=args.seed)
    episode_return = 0.0
    for step in range(1, args.total_steps + 1):
        explore = max(args.explore_end, 1 - (1 - args.explore_end) * step / args.explore_steps)
        if rng.random() < explore or step <= args.learning_starts:
            action = int(rng.integers(2))
        else:
            action = greedy_action(agent.network, state, args.device)
        next_state, reward, terminated, truncated, _ = env.step(action)
        # Only a fallen pole ends the future. Where the time limit cut the episode off, the next
        # state still has a value: hence `terminated`, not `terminated or truncated`.
        buffer.push(state, action, reward, next_state, terminated)
        state = next_state
        episode_return += float(reward)

        if terminated or truncated:
            returns.append((step, episode_return))
            state, _ = env.reset()
            episode_return = 0.0
            buffer.increase_beta()

        if step > args.learning_starts and step % args.train_every == 0:
            agent.optimizer.param_groups[0]["lr"] = args.lr * (1 - 0.9 * step / args.total_steps)
            *batch, indices, weights = buffer.sample(args.batch_size)
            td_errors = agent.learn(*batch, weights)
            buffer.update_priorities(indices, td_errors)  # PER: surprises come back sooner

        if step % args.eval_every == 0 or step == args.total_steps:
            seed = SELECTION_SEED + 1000 * args.seed
            mean = play_greedily(agent.network, args.device, args.select_episodes, seed)
            selections.append((step, mean))
            print(f"step {step:>6,}: greedy return {mean:5.1f}", flush=True)
            if mean > best_mean:
                best_network, best_mean = copy.deepcopy(agent.network), mean
            if mean >= LONGEST_EPISODE:
                break
    env.close()
    return best_network, returns, selections


def save_picture(path: Path, curves: dict) -> None:
    """Save the learning curves as a PNG; `curves` has returns and selections by kind of replay."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for color, (replay, (returns, selections)) in zip(("C0", "C1"), curves.items(), strict=False):
        label = f"{replay}: training episodes, which explore"
        axes.plot(*np.reshape(returns, (-1, 2)).T, ".", color=color, alpha=0.35, label=label)
        label = f"{replay}: greedy policy, mean return"
        axes.plot(*np.transpose(selections), "D-", color=color, ms=4, label=label)
    axes.axhline(SOLVED_RETURN, color="gray", lw=1, ls="--", label="solved")
    axes.set(xlabel="environment steps", ylabel="return", title=f"Double DQN on {ENV_ID}")
    figure.legend(loc="outside lower center", ncols=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def run(args: Args):
    """Train and evaluate; return the figures to print, and the curves to draw."""
    start = time.perf_counter()
    network, returns, selections = train(args)
    seconds = time.perf_counter() - start
    seed = FINAL_SEED + 1000 * args.seed
    figures = {
        "environment steps": selections[-1][0],
        "training episodes": len(returns),
        "mean return of the last 20, which explored": float(np.mean([r for _, r in returns[-20:]])),
        "mean return of the best network, greedy": play_greedily(
            network, args.device, args.eval_episodes, seed
        ),
        "seconds": seconds,
    }
    return figures, (returns, selections)


def main(args: Args) -> dict:
    """Train, evaluate, draw and print; return the figures that were printed, by kind of replay."""
    uniform = args.uniform or args.alpha == 0
    kinds = [False, True] if args.compare else [uniform]
    table, curves = {}, {}
    for kind in kinds:
        name = "uniform" if kind else "prioritized"
        print(f"{name} replay, seed {args.seed}")
        table[name], curves[name] = run(replace(args, uniform=kind))
    picture = Path(args.out) / f"{'-'.join(table)}-seed{args.seed}.png"
    save_picture(picture, curves)

    print(" " * 42, *(f"{name:>12}" for name in table))
    for row in next(iter(table.values())):
        print(f"{row:42}", *(f"{round(figures[row], 1):12,}" for figures in table.values()))
    print(f"picture: {picture}")
    for name, figures in table.items():
        mean = figures["mean return of the best network, greedy"]
        verdict = "SOLVED" if mean >= SOLVED_RETURN else "NOT SOLVED"
        print(
            f"{verdict} with {name} replay: the best network's greedy mean return over"
            f" {args.eval_episodes} fresh episodes is {mean:.1f}, wanted {SOLVED_RETURN:.0f}"
        )
    return table


if __name__ == "__main__":
    torch.set_num_threads(1)  # the networks are so small that more threads only wait
    main(parse_args())

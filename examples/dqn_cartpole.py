"""Double DQN with prioritized experience replay on CartPole-v1, in one file, top to bottom.

    pip install -c constraints.txt -e ".[examples]"
    python examples/dqn_cartpole.py                # prioritized replay
    python examples/dqn_cartpole.py --uniform      # the same agent, uniform replay

Every call to the buffer is in `train`, which is the loop as courses teach it. What prioritized
replay adds to a plain DQN is marked PER.

How the final number comes about: every `--eval-every` steps the greedy policy plays
`--select-episodes` episodes; the network with the best mean is kept, and training stops early
when that mean reaches `--stop-return`. The final evaluation plays the kept network on fresh
episodes, with seeds that neither training nor selection has seen. It says how good that network
is, and not that training would have stayed there: a DQN on CartPole comes and goes.
"""

import argparse
import copy
import time
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from per_td import TransitionReplayBuffer

ENV_ID = "CartPole-v1"
LONGEST_EPISODE = 500
SOLVED_RETURN = 450.0
SELECTION_SEED = 10_000_000  # training, selection and final evaluation share no seed
FINAL_SEED = 20_000_000
DIAGNOSTICS_EVERY = 100  # steps between two looks at the buffer
DIAGNOSTICS = ("effective_share", "top_1_percent_share", "never_replayed_share")


# ------------------------------------------------------------------------------- arguments


def option(default, text):
    """A dataclass field with its line of help."""
    return field(default=default, metadata={"help": text})


@dataclass
class Args:
    """The settings of a run; each is a command-line option too."""

    total_steps: int = option(50_000, "environment steps at most; fewer when solved early")
    seed: int = option(0, "seeds the environment, the exploration and torch")
    uniform: bool = option(False, "draw uniformly (alpha = 0) instead of by priority")
    device: str = option("cpu", "where networks and buffer live: cpu, cuda, ...")
    out: str = option("runs/dqn_cartpole", "folder for the picture")

    alpha: float = option(0.6, "how strongly priorities skew the draws; 0 is uniform")
    beta: float = option(0.4, "share of that bias which the weights undo at first; 1 is all")
    beta_increment: float = option(0.001, "added to beta at each episode's start, up to 1")
    epsilon: float = option(0.001, "added to |TD error|, so that no priority is 0")
    capacity: int = option(10_000, "transitions in the buffer")
    batch_size: int = option(128, "transitions in a gradient step")

    lr: float = option(2e-3, "Adam's learning rate at the start; it falls linearly to a tenth")
    gamma: float = option(0.99, "discount factor")
    tau: float = option(0.02, "share of the online network mixed into the target each time")
    hidden: int = option(256, "units in each of the two hidden layers")
    learning_starts: int = option(500, "random steps before the first gradient step")
    train_every: int = option(4, "environment steps per gradient step")
    explore_end: float = option(0.02, "share of random actions after its decay")
    explore_steps: int = option(5_000, "steps in which it falls from 1, linearly")

    eval_every: int = option(1_000, "steps between two greedy evaluations for selection")
    select_episodes: int = option(10, "episodes in each of them")
    stop_return: float = option(500.0, "mean return in selection at which training stops")
    eval_episodes: int = option(20, "episodes in the final greedy evaluation")


def parse_args(argv=None) -> Args:
    """`Args` from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    for f in fields(Args):
        kind = {"action": "store_true"} if f.type is bool else {"type": f.type}
        name = "--" + f.name.replace("_", "-")
        parser.add_argument(name, default=f.default, help=f.metadata["help"], **kind)
    return Args(**vars(parser.parse_args(argv)))


# ------------------------------------------------------------------------------- the agent


class Agent:
    """Double DQN: an online network, its slow copy, and one gradient step."""

    def __init__(self, observation_size: int, actions: int, args: Args):
        self.args = args
        self.network = nn.Sequential(
            nn.Linear(observation_size, args.hidden),
            nn.ReLU(),
            nn.Linear(args.hidden, args.hidden),
            nn.ReLU(),
            nn.Linear(args.hidden, actions),
        ).to(args.device)
        self.target = copy.deepcopy(self.network)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=args.lr, fused=True)

    def learn(self, states, actions, rewards, next_states, dones, weights) -> torch.Tensor:
        """One gradient step on a batch; returns its TD errors [B]."""
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

    def set_progress(self, done: float) -> None:
        """Lower the learning rate for a run of which the share `done` is over."""
        self.optimizer.param_groups[0]["lr"] = self.args.lr * (1 - 0.9 * done)


@torch.no_grad()
def greedy_action(network, state, device) -> int:
    """The action of the highest value in one state."""
    return int(network(torch.as_tensor(state, device=device)).argmax())


def exploration(step: int, args: Args) -> float:
    """Probability of a random action at `step`."""
    if step <= args.learning_starts:
        return 1.0
    return max(args.explore_end, 1 - (1 - args.explore_end) * step / args.explore_steps)


def play_greedily(network, device, episodes: int, first_seed: int) -> list[float]:
    """Returns of greedy episodes, seeded with `first_seed`, `first_seed` + 1, ..."""
    env = gym.make(ENV_ID)
    returns = []
    for seed in range(first_seed, first_seed + episodes):
        state, _ = env.reset(seed=seed)
        total, over = 0.0, False
        while not over:
            action = greedy_action(network, state, device)
            state, reward, terminated, truncated, _ = env.step(action)
            total += float(reward)
            over = terminated or truncated
        returns.append(total)
    env.close()
    return returns


class Selection:
    """Keeps the network with the best greedy mean return so far."""

    def __init__(self, agent: Agent, args: Args):
        self.agent, self.args = agent, args
        self.best_network, self.best_mean = copy.deepcopy(agent.network), -np.inf
        self.first_seed = SELECTION_SEED + 1000 * args.seed

    def evaluate(self) -> float:
        """Mean return of the present network, which is kept if it beats those before."""
        network, args = self.agent.network, self.args
        returns = play_greedily(network, args.device, args.select_episodes, self.first_seed)
        mean = float(np.mean(returns))
        if mean > self.best_mean:
            self.best_mean = mean
            self.best_network.load_state_dict(network.state_dict())
        return mean


# -------------------------------------------------------------------------------- training


class Stopwatch:
    """Adds up wall-clock seconds by name. On CUDA it sees launches, not the kernels' own time."""

    def __init__(self):
        self.seconds = {"replay": 0.0, "selection": 0.0}

    @contextmanager
    def __call__(self, name: str):
        """Count the time inside the `with` block."""
        start = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - start


@dataclass
class History:
    """What the table and the picture show: pairs of (environment step, value)."""

    steps: int = 0
    returns: list = field(default_factory=list)
    greedy_returns: list = field(default_factory=list)
    diagnostics: list = field(default_factory=list)  # (step, `DIAGNOSTICS` in percent)


def sampling_masses(buffer, alpha: float) -> torch.Tensor:
    """Masses, priority ** alpha, of each stored transition; draws are in proportion to it."""
    return buffer.priority.double().cpu() ** alpha


def diagnose(buffer) -> list[float]:
    """The `DIAGNOSTICS` of the buffer in percent."""
    figures = buffer.buffer.diagnostics()
    return [100 * float(figures[key]) for key in DIAGNOSTICS]


def make_buffer(args: Args) -> TransitionReplayBuffer:
    """The replay buffer; with alpha = 0 all draws are equally likely and all weights are 1."""
    return TransitionReplayBuffer(
        args.capacity,
        alpha=args.alpha,
        beta=args.beta,
        beta_increment=args.beta_increment,
        epsilon=args.epsilon,
        device=args.device,
    )


def train(args: Args, watch: Stopwatch):
    """Returns the best network [nn.Module], the buffer and the `History`."""
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    env = gym.make(ENV_ID)
    actions = int(env.action_space.n)
    agent = Agent(env.observation_space.shape[0], actions, args)
    selection, history = Selection(agent, args), History()

    buffer = make_buffer(args)
    buffer.increase_beta()  # PER: at each episode's start
    state, _ = env.reset(seed=args.seed)
    episode_return = 0.0
    progress = tqdm(range(1, args.total_steps + 1), desc=ENV_ID, unit=" steps", unit_scale=True)
    for step in progress:
        if rng.random() < exploration(step, args):
            action = int(rng.integers(actions))
        else:
            action = greedy_action(agent.network, state, args.device)
        next_state, reward, terminated, truncated, _ = env.step(action)
        # Only a fallen pole ends the future. Where the time limit cut the episode off, the next
        # state still has a value: hence `terminated`, not `terminated or truncated`.
        with watch("replay"):
            buffer.push(state, action, reward, next_state, terminated)
        state = next_state
        episode_return += float(reward)

        if terminated or truncated:
            history.returns.append((step, episode_return))
            progress.set_postfix({"return": f"{episode_return:.0f}"}, refresh=False)
            state, _ = env.reset()
            episode_return = 0.0
            buffer.increase_beta()

        if step > args.learning_starts and step % args.train_every == 0:
            agent.set_progress(step / args.total_steps)
            with watch("replay"):
                *batch, indices, weights = buffer.sample(args.batch_size)
            td_errors = agent.learn(*batch, weights)
            with watch("replay"):
                buffer.update_priorities(indices, td_errors)  # PER: surprises come back sooner

        if step % DIAGNOSTICS_EVERY == 0:
            history.diagnostics.append((step, *diagnose(buffer)))
        if step % args.eval_every == 0 or step == args.total_steps:
            with watch("selection"):
                history.greedy_returns.append((step, selection.evaluate()))
            if history.greedy_returns[-1][1] >= args.stop_return:
                break

    progress.close()
    env.close()
    history.steps = step
    return selection.best_network, buffer, history


# ------------------------------------------------------------------------- table and picture

BLUE, ORANGE, GREY = "#2b6cb0", "#dd6b20", "#718096"


def print_table(summary: dict) -> None:
    """The run in a few lines."""
    s = summary
    rows = [
        ("replay", s["replay"]),
        ("seed", f"{s['seed']}"),
        ("environment steps", f"{s['steps']:,}"),
        ("training episodes", f"{s['episodes']:,}"),
        ("mean return, last 100 of them", f"{s['last_100_mean']:.1f}"),
        (f"greedy return, {s['eval_episodes']} new episodes: mean", f"{s['eval_mean']:.1f}"),
        ("    lowest", f"{s['eval_min']:.0f}"),
        ("training time", f"{s['seconds']:.1f} s"),
        ("    in the replay buffer", f"{100 * s['replay_share']:.0f} %"),
        ("    in selection", f"{100 * s['selection_share']:.0f} %"),
        ("steps per second, without selection", f"{s['steps_per_second']:,.0f}"),
    ]
    width = max(len(name) for name, _ in rows)
    print()
    for name, value in rows:
        print(f"{name:<{width}}  {value:>11}")
    verdict = "SOLVED" if s["solved"] else "NOT SOLVED"
    print(f"\n{verdict}: greedy mean {s['eval_mean']:.1f}, wanted {SOLVED_RETURN:.0f} or more")
    print(f"picture: {s['picture']}")


def moving_mean(values, window: int) -> np.ndarray:
    """Mean of the last `window` values at each point (of fewer where there are fewer)."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    end = np.arange(1, len(values) + 1)
    start = np.maximum(end - window, 0)
    return (sums[end] - sums[start]) / (end - start)


def draw_learning(axes, history: History) -> None:
    """Returns of the training episodes and of the greedy evaluations over time."""
    axes.axhline(LONGEST_EPISODE, color=GREY, lw=1, ls=":")
    if history.returns:
        steps, returns = np.array(history.returns).T
        axes.scatter(steps, returns, s=12, color=BLUE, alpha=0.35, lw=0, label="training episode")
        axes.plot(steps, moving_mean(returns, 20), color=BLUE, lw=2, label="mean of the last 20")
    steps, means = np.array(history.greedy_returns).T
    axes.plot(steps, means, "D-", color=ORANGE, ms=4, lw=1, label="greedy, for selection")
    axes.set(xlabel="environment steps", ylabel="return (steps the pole stays up)")
    axes.set(xlim=(0, None), ylim=(0, 1.15 * LONGEST_EPISODE))  # room above for the legend
    axes.set_title("Learning curve", loc="left")
    axes.legend(loc="upper center", ncols=3, frameon=False, columnspacing=1.2, handlelength=1.6)


def draw_priorities(axes, priority: np.ndarray, masses: np.ndarray) -> None:
    """Which priorities are stored, and which the next draws would pick."""
    low, high = priority.min(), priority.max()
    edges = np.geomspace(low * 0.9, high * 1.1, 41)
    stored, drawn = np.full(len(priority), 100 / len(priority)), 100 * masses / masses.sum()
    axes.hist(priority, edges, weights=stored, color=BLUE, alpha=0.35, label="stored")
    axes.hist(
        priority, edges, weights=drawn, color=ORANGE, histtype="step", lw=2, label="expected draws"
    )
    new = priority == high  # a transition holds the largest priority until it is first drawn
    if 1 < new.sum() < len(priority):
        top = max(stored[new].sum(), drawn[new].sum())
        place = {"xytext": (0, 4), "textcoords": "offset points", "ha": "right", "color": GREY}
        axes.annotate("not drawn yet", (edges[-1], top), **place)
    axes.set(xscale="log", xlabel="priority, |TD error| + epsilon", ylabel="share in each bin (%)")
    axes.set_title(f"{len(priority):,} priorities at the end", loc="left")
    axes.legend(loc="upper left", frameon=False)


def draw_diagnostics(axes, history: History) -> None:
    """How far from uniform the draws are over time, and what they leave out."""
    labels = "effective sample size", "draws: top 1%", "never replayed"
    if history.diagnostics:
        steps, *shares = np.array(history.diagnostics).T
        for share, label, color in zip(shares, labels, (ORANGE, BLUE, GREY), strict=True):
            axes.plot(steps, share, color=color, lw=1.5, label=label)
        axes.legend(loc="upper right", ncols=3, frameon=False, columnspacing=1.2, handlelength=1.2)
    axes.set(xlabel="environment steps", ylabel="share (%)")
    axes.set(xlim=(0, None), ylim=(0, 125), yticks=range(0, 101, 25))  # room for the legend
    axes.set_title("Diagnostics of the buffer", loc="left")


def save_picture(summary: dict, history: History, priority, masses) -> None:
    """One PNG: the learning curve beside what the priorities look like."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5.6), layout="constrained")
    FigureCanvasAgg(figure)  # draws into memory, whatever windows this machine may have
    panels = figure.subplot_mosaic([["learning", "priorities"], ["learning", "diagnostics"]])
    draw_learning(panels["learning"], history)
    draw_priorities(panels["priorities"], priority.numpy(), masses.numpy())
    draw_diagnostics(panels["diagnostics"], history)
    for axes in panels.values():
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.set_axisbelow(True)
    for name in ("learning", "diagnostics"):
        panels[name].xaxis.set_major_formatter("{x:,.0f}")
    figure.suptitle(
        f"DQN on {ENV_ID}, {summary['replay']} replay, seed {summary['seed']}: greedy return "
        f"{summary['eval_mean']:.0f} after {summary['steps']:,} steps",
        fontsize=13,
    )
    Path(summary["picture"]).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(summary["picture"], dpi=130)


def main(args: Args) -> dict:
    """Train, evaluate, draw and print; returns the figures that were printed."""
    if args.uniform:
        args = replace(args, alpha=0.0)
    replay = "prioritized" if args.alpha > 0 else "uniform"
    watch, start = Stopwatch(), time.perf_counter()
    network, buffer, history = train(args, watch)
    seconds = time.perf_counter() - start

    evaluation = play_greedily(
        network, args.device, args.eval_episodes, FINAL_SEED + 1000 * args.seed
    )
    last_100 = [value for _, value in history.returns[-100:]]
    summary = {
        "replay": replay,
        "seed": args.seed,
        "steps": history.steps,
        "episodes": len(history.returns),
        "last_100_mean": float(np.mean(last_100)) if last_100 else float("nan"),
        "eval_episodes": len(evaluation),
        "eval_mean": float(np.mean(evaluation)),
        "eval_min": float(np.min(evaluation)),
        "solved": float(np.mean(evaluation)) >= SOLVED_RETURN,
        "seconds": seconds,
        "replay_share": watch.seconds["replay"] / seconds,
        "selection_share": watch.seconds["selection"] / seconds,
        "steps_per_second": history.steps / (seconds - watch.seconds["selection"]),
        "picture": str(Path(args.out) / f"{replay}-seed{args.seed}.png"),
    }
    save_picture(summary, history, buffer.priority.cpu(), sampling_masses(buffer, args.alpha))
    print_table(summary)
    return summary


if __name__ == "__main__":
    torch.set_num_threads(1)  # the networks are so small that more threads only wait
    main(parse_args())

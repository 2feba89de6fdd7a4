"""Double DQN with prioritized experience replay on CartPole-v1, in TorchRL, in one file.

    pip install "per-td[examples]"
    python examples/dqn_torchrl.py                # prioritized replay
    python examples/dqn_torchrl.py --uniform      # the same agent, uniform replay

TorchRL's collector, networks and loss, with per_td's buffer in the place of TorchRL's own. What
belongs to prioritized replay is marked PER. `DQNLoss` leaves the square of the TD error in the
batch, hence `td_error_unit="squared"` (see docs/torchrl_losses.md).

How the final number comes about: every `--eval-every` steps the greedy policy plays
`--select-episodes` episodes; the network with the best mean is kept, and training stops early
when that mean reaches `--stop-return`. The final evaluation plays the kept network on fresh
episodes, with seeds that neither training nor selection has seen. It says how good that network
is, and not that training would have stayed there: a DQN on CartPole comes and goes. Seeds 0, 1 and
2 stopped after 18,000, 11,000 and 34,000 steps, with 500, 482 and 500 in the final evaluation; that
took one to two and a half minutes of one core.
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
from tensordict.nn import TensorDictSequential
from torch import nn
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage
from torchrl.data.replay_buffers.scheduler import LinearScheduler
from torchrl.envs import GymEnv, RewardSum, TransformedEnv
from torchrl.modules import MLP, EGreedyModule, QValueActor
from torchrl.objectives import DQNLoss, SoftUpdate
from tqdm import tqdm

from per_td.torchrl import TensorDictPrioritizedReplayBuffer  # PER: instead of torchrl.data's

ENV_ID = "CartPole-v1"
LONGEST_EPISODE = 500
SOLVED_RETURN = 450.0
SELECTION_SEED = 10_000_000  # training, selection and final evaluation share no seed
FINAL_SEED = 20_000_000
STORED = [
    "observation",
    "action",
    *(("next", key) for key in ("observation", "reward", "done", "terminated")),
]


# ------------------------------------------------------------------------------- arguments


def option(default, text):
    """A dataclass field with its line of help."""
    return field(default=default, metadata={"help": text})


@dataclass
class Args:
    """The settings of a run; each is a command-line option too."""

    total_steps: int = option(50_000, "environment steps at most; fewer when solved early")
    seed: int = option(0, "seeds the environment and torch")
    uniform: bool = option(False, "draw uniformly (alpha = 0) instead of by priority")
    device: str = option("cpu", "where networks and buffer live: cpu, cuda, ...")
    out: str = option("runs/dqn_torchrl", "folder for the picture")

    alpha: float = option(0.6, "how strongly priorities skew the draws; 0 is uniform")
    beta: float = option(0.4, "share of that bias which the weights undo at first; 1 at the end")
    eps: float = option(0.001, "added to |TD error|, so that no priority is 0")
    capacity: int = option(10_000, "transitions in the buffer")
    batch_size: int = option(128, "transitions in a gradient step")

    lr: float = option(5e-4, "Adam's learning rate at the start; it falls linearly to a tenth")
    gamma: float = option(0.99, "discount factor")
    tau: float = option(0.01, "share of the online network that each step mixes into the target")
    hidden: int = option(256, "units in each of the two hidden layers")
    learning_starts: int = option(500, "random steps before the first gradient step")
    frames_per_batch: int = option(20, "environment steps in each iteration")
    train_every: int = option(2, "environment steps per gradient step")
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


# ------------------------------------------------------------------------ the agent's parts


def make_env(device) -> TransformedEnv:
    """CartPole, with the return so far in ("next", "episode_reward")."""
    env = GymEnv(ENV_ID, device=device, categorical_action_encoding=True)
    return TransformedEnv(env, RewardSum())


def make_network(env, args: Args) -> nn.Module:
    """Values of all actions, from observations."""
    size, actions = env.observation_spec["observation"].shape[-1], env.action_spec.space.n
    return MLP(
        size,
        actions,
        num_cells=[args.hidden] * 2,
        activation_class=nn.ReLU,
        device=args.device,
    )


def make_loss(env, network, args: Args) -> DQNLoss:
    """Double DQN: the online network picks the next action, its slow copy values it."""
    loss = DQNLoss(
        QValueActor(network, in_keys=["observation"], spec=env.action_spec),
        loss_function="l2",
        delay_value=True,
        double_dqn=True,
    )
    loss.make_value_estimator(gamma=args.gamma)
    return loss


def make_buffer(args: Args) -> TensorDictPrioritizedReplayBuffer:
    """PER: the replay buffer; with alpha = 0 all draws are equally likely, all weights 1."""
    return TensorDictPrioritizedReplayBuffer(
        alpha=args.alpha,
        beta=args.beta,
        eps=args.eps,
        storage=LazyTensorStorage(args.capacity, device=args.device),
        batch_size=args.batch_size,
        td_error_unit="squared",
    )


@torch.no_grad()
def play_greedily(network, device, episodes: int, first_seed: int) -> list[float]:
    """Returns of greedy episodes, seeded with `first_seed`, `first_seed` + 1, ...

    In plain Gymnasium, which costs a tenth of the time.
    """
    env, returns = gym.make(ENV_ID), []
    for seed in range(first_seed, first_seed + episodes):
        state, _ = env.reset(seed=seed)
        total, over = 0.0, False
        while not over:
            action = int(network(torch.as_tensor(state, device=device)).argmax())
            state, reward, terminated, truncated, _ = env.step(action)
            total += float(reward)
            over = terminated or truncated
        returns.append(total)
    env.close()
    return returns


class Selection:
    """Keeps the network with the best greedy mean return so far."""

    def __init__(self, network, args: Args):
        self.network, self.args = network, args
        self.best_network, self.best_mean = copy.deepcopy(network), -np.inf
        self.first_seed = SELECTION_SEED + 1000 * args.seed

    def evaluate(self) -> float:
        """Mean return of the present network, which is kept if it beats those before."""
        args = self.args
        returns = play_greedily(self.network, args.device, args.select_episodes, self.first_seed)
        mean = float(np.mean(returns))
        if mean > self.best_mean:
            self.best_mean = mean
            self.best_network.load_state_dict(self.network.state_dict())
        return mean


# -------------------------------------------------------------------------------- training


class Stopwatch:
    """Adds up wall-clock seconds by name. On CUDA it sees launches, not the kernels' own time."""

    def __init__(self):
        self.seconds = {"replay": 0.0, "collector": 0.0, "selection": 0.0}

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
    updates: int = 0
    returns: list = field(default_factory=list)
    greedy_returns: list = field(default_factory=list)

    def add(self, data) -> None:
        """Take in what the collector brought."""
        ended = data["next", "done"].squeeze(-1).nonzero().squeeze(-1)
        for at in ended.tolist():
            self.returns.append((self.steps + at + 1, float(data["next", "episode_reward"][at])))
        self.steps += len(data)


def train(args: Args, watch: Stopwatch):
    """Returns the best network, the buffer and the `History`."""
    torch.manual_seed(args.seed)
    env, history = make_env(args.device), History()
    env.set_seed(args.seed)
    network = make_network(env, args)
    loss = make_loss(env, network, args)
    targets = SoftUpdate(loss, tau=args.tau)
    optimizer = torch.optim.Adam(loss.parameters(), lr=args.lr)
    buffer, selection = make_buffer(args), Selection(network, args)
    gradient_steps = max((args.total_steps - args.learning_starts) // args.train_every, 1)
    beta = LinearScheduler(buffer, "beta", final_value=1.0, num_steps=gradient_steps)
    explore = EGreedyModule(
        env.action_spec,
        eps_init=1.0,
        eps_end=args.explore_end,
        annealing_num_steps=args.explore_steps,
        device=args.device,
    )
    collector = Collector(
        env,
        TensorDictSequential(loss.value_network, explore),
        frames_per_batch=args.frames_per_batch,
        total_frames=args.total_steps,
        init_random_frames=args.learning_starts,
        auto_register_policy_transforms=False,
    )
    batches = iter(collector)
    progress = tqdm(total=args.total_steps, desc=ENV_ID, unit=" steps", unit_scale=True)
    while history.steps < args.total_steps:
        with watch("collector"):
            data = next(batches)
        history.add(data)
        explore.step(len(data))
        with watch("replay"):
            buffer.extend(data.select(*STORED))
        learning = history.steps > args.learning_starts
        optimizer.param_groups[0]["lr"] = args.lr * (1 - 0.9 * history.steps / args.total_steps)
        for _ in range(len(data) // args.train_every if learning else 0):
            with watch("replay"):
                batch = buffer.sample()  # PER: with "priority_weight", which the loss reads
            value = loss(batch)["loss"]  # PER: leaves "td_error" in the batch
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            targets.step()
            with watch("replay"):
                buffer.update_tensordict_priority(batch)  # PER: surprises come back sooner
            beta.step()
            history.updates += 1

        progress.update(len(data))
        if history.returns:
            progress.set_postfix({"return": f"{history.returns[-1][1]:.0f}"}, refresh=False)
        if history.steps % args.eval_every < len(data) or history.steps >= args.total_steps:
            with watch("selection"):
                history.greedy_returns.append((history.steps, selection.evaluate()))
            if history.greedy_returns[-1][1] >= args.stop_return:
                break
    progress.close()
    collector.shutdown()
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
        ("gradient steps", f"{s['updates']:,}"),
        ("training episodes", f"{s['episodes']:,}"),
        (f"greedy return, {s['eval_episodes']} new episodes: mean", f"{s['eval_mean']:.1f}"),
        ("    lowest", f"{s['eval_min']:.0f}"),
        ("training time", f"{s['seconds']:.1f} s"),
        ("    in the replay buffer", f"{100 * s['replay_share']:.0f} %"),
        ("    in the collector", f"{100 * s['collector_share']:.0f} %"),
        ("    in selection", f"{100 * s['selection_share']:.0f} %"),
    ]
    width = max(len(name) for name, _ in rows)
    print()
    for name, value in rows:
        print(f"{name:<{width}}  {value:>11}")
    verdict = "SOLVED" if s["solved"] else "NOT SOLVED"
    print(f"\n{verdict}: greedy mean {s['eval_mean']:.1f}, wanted {SOLVED_RETURN:.0f} or more")
    print(f"picture: {s['picture']}")


def draw_learning(axes, history: History) -> None:
    """Returns of the training episodes and of the greedy evaluations over time."""
    axes.axhline(LONGEST_EPISODE, color=GREY, lw=1, ls=":")
    if history.returns:
        steps, returns = np.array(history.returns).T
        axes.scatter(steps, returns, s=9, color=BLUE, alpha=0.4, lw=0, label="training episode")
    if history.greedy_returns:
        steps, means = np.array(history.greedy_returns).T
        axes.plot(steps, means, "D-", color=ORANGE, ms=4, lw=1, label="greedy (selection)")
    axes.set(xlabel="environment steps", ylabel="return (steps the pole stays up)")
    axes.set(xlim=(0, None), ylim=(0, 1.04 * LONGEST_EPISODE))
    axes.set_title("Learning curve", loc="left")
    axes.legend(loc="upper left", frameon=True, framealpha=0.9, edgecolor="none")


def draw_priorities(axes, priority: np.ndarray, alpha: float) -> None:
    """Which priorities are stored, and which are drawn."""
    mass = priority**alpha
    edges = np.geomspace(priority.min() * 0.9, priority.max() * 1.1, 41)
    stored, drawn = np.full(len(priority), 100 / len(priority)), 100 * mass / mass.sum()
    axes.hist(priority, edges, weights=stored, color=BLUE, alpha=0.35, label="stored")
    axes.hist(priority, edges, weights=drawn, color=ORANGE, histtype="step", lw=2, label="drawn")
    axes.set(xscale="log", xlabel="priority, |TD error| + eps", ylabel="share (%)")
    axes.set_title(f"{len(priority):,} priorities at the end", loc="left")
    axes.legend(loc="upper left", frameon=False)


def save_picture(summary: dict, history: History, priority: np.ndarray, alpha: float) -> None:
    """One PNG: the learning curve beside what the priorities look like."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.6), layout="constrained")
    FigureCanvasAgg(figure)  # draws into memory, whatever windows this machine may have
    learning, priorities = figure.subplots(1, 2)
    draw_learning(learning, history)
    draw_priorities(priorities, priority, alpha)
    for axes in (learning, priorities):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.set_axisbelow(True)
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

    seed = FINAL_SEED + 1000 * args.seed
    evaluation = play_greedily(network, args.device, args.eval_episodes, seed)
    summary = {
        "replay": replay,
        "seed": args.seed,
        "steps": history.steps,
        "updates": history.updates,
        "episodes": len(history.returns),
        "eval_episodes": len(evaluation),
        "eval_mean": float(np.mean(evaluation)),
        "eval_min": float(np.min(evaluation)),
        "solved": float(np.mean(evaluation)) >= SOLVED_RETURN,
        "seconds": seconds,
        **{f"{name}_share": spent / seconds for name, spent in watch.seconds.items()},
        "picture": str(Path(args.out) / f"{replay}-seed{args.seed}.png"),
    }
    priority = buffer.sampler.priority[: len(buffer)].cpu().numpy()
    save_picture(summary, history, priority, args.alpha)
    print_table(summary)
    return summary


if __name__ == "__main__":
    torch.set_num_threads(1)  # the networks are so small that more threads only wait
    main(parse_args())

"""Double DQN with prioritized experience replay on CartPole-v1, in TorchRL, in one file.

    pip install "per-td[examples]"
    python examples/dqn_torchrl.py                # prioritized replay
    python examples/dqn_torchrl.py --uniform      # the same agent, uniform replay

TorchRL's collector, networks and loss, with per_td's buffer in the place of TorchRL's own. What
belongs to prioritized replay is marked PER. `DQNLoss` leaves the square of the TD error in the
batch, hence `td_error_unit="squared"` (see docs/torchrl_losses.md).

Every `--eval-every` steps the greedy policy plays `--select-episodes` episodes; the network with
the best mean is kept, and training stops when that mean is 500, the most there is. The final
evaluation plays the kept network on fresh episodes. Seeds 0, 1 and 2 stopped after 18,000, 11,000
and 34,000 steps, with 500, 482 and 500 in the final evaluation; that took one to two and a half
minutes of one core.
"""

import argparse
import copy
import time
from dataclasses import dataclass, fields

import gymnasium as gym
import numpy as np
import torch
from tensordict.nn import TensorDictSequential
from torch import nn
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage
from torchrl.data.replay_buffers.scheduler import LinearScheduler
from torchrl.envs import GymEnv
from torchrl.modules import MLP, EGreedyModule, QValueActor
from torchrl.objectives import DQNLoss, SoftUpdate

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


@dataclass
class Args:
    """The settings of a run; each is a command-line option too."""

    total_steps: int = 50_000  # environment steps at most; fewer when solved early
    seed: int = 0  # of the environment and torch
    uniform: bool = False  # draw uniformly (alpha = 0) instead of by priority
    device: str = "cpu"  # where networks and buffer live

    alpha: float = 0.6  # how strongly priorities skew the draws; 0 is uniform
    beta: float = 0.4  # share of that bias which the weights undo at first; 1 at the end
    eps: float = 0.001  # added to |TD error|, so that no priority is 0
    capacity: int = 10_000  # transitions in the buffer
    batch_size: int = 128  # transitions in a gradient step

    lr: float = 5e-4  # Adam's learning rate at the start; it falls linearly to a tenth
    gamma: float = 0.99  # discount factor
    tau: float = 0.01  # share of the online network that each step mixes into the target
    learning_starts: int = 500  # random steps before the first gradient step
    frames_per_batch: int = 20  # environment steps in each iteration
    train_every: int = 2  # environment steps per gradient step
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


def make_loss(env, args: Args) -> tuple[nn.Module, DQNLoss]:
    """Make the network and double DQN's loss: the slow copy values what the network picks."""
    network = MLP(4, 2, num_cells=[256, 256], activation_class=nn.ReLU, device=args.device)
    loss = DQNLoss(
        QValueActor(network, in_keys=["observation"], spec=env.action_spec),
        loss_function="l2",
        delay_value=True,
        double_dqn=True,
    )
    loss.make_value_estimator(gamma=args.gamma)
    return network, loss


@torch.no_grad()
def play_greedily(network, device, episodes: int, first_seed: int) -> float:
    """Return the mean return of greedy episodes, in Gymnasium: a tenth of TorchRL's time."""
    env, total = gym.make(ENV_ID), 0.0
    for seed in range(first_seed, first_seed + episodes):
        state, _ = env.reset(seed=seed)
        over = False
        while not over:
            action = int(network(torch.as_tensor(state, device=device)).argmax())
            state, reward, terminated, truncated, _ = env.step(action)
            total += float(reward)
            over = terminated or truncated
    env.close()
    return total / episodes


def train(args: Args) -> tuple[nn.Module, int, int]:
    """Return the best network, and how many environment and gradient steps there were."""
    torch.manual_seed(args.seed)
    env = GymEnv(ENV_ID, device=args.device, categorical_action_encoding=True)
    env.set_seed(args.seed)
    network, loss = make_loss(env, args)
    targets = SoftUpdate(loss, tau=args.tau)
    optimizer = torch.optim.Adam(loss.parameters(), lr=args.lr)
    buffer = TensorDictPrioritizedReplayBuffer(  # PER: with alpha = 0 all draws are equally likely
        alpha=0.0 if args.uniform else args.alpha,
        beta=args.beta,
        eps=args.eps,
        storage=LazyTensorStorage(args.capacity, device=args.device),
        batch_size=args.batch_size,
        td_error_unit="squared",
    )
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
    best_network, best_mean = copy.deepcopy(network), -np.inf
    steps = updates = 0
    for data in collector:
        steps += len(data)
        explore.step(len(data))
        buffer.extend(data.select(*STORED))
        optimizer.param_groups[0]["lr"] = args.lr * (1 - 0.9 * steps / args.total_steps)
        for _ in range(len(data) // args.train_every if steps > args.learning_starts else 0):
            batch = buffer.sample()  # PER: with "priority_weight", which the loss reads
            value = loss(batch)["loss"]  # PER: leaves "td_error" in the batch
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            targets.step()
            buffer.update_tensordict_priority(batch)  # PER: surprises come back sooner
            beta.step()
            updates += 1

        if steps % args.eval_every < len(data) or steps >= args.total_steps:
            seed = SELECTION_SEED + 1000 * args.seed
            mean = play_greedily(network, args.device, args.select_episodes, seed)
            print(f"step {steps:>6,}: greedy return {mean:5.1f}", flush=True)
            if mean > best_mean:
                best_network, best_mean = copy.deepcopy(network), mean
            if mean >= LONGEST_EPISODE:
                break
    collector.shutdown()
    return best_network, steps, updates


def main(args: Args) -> dict:
    """Train, evaluate and print; return the figures that were printed."""
    start = time.perf_counter()
    network, steps, updates = train(args)
    seconds = time.perf_counter() - start
    seed = FINAL_SEED + 1000 * args.seed
    mean = play_greedily(network, args.device, args.eval_episodes, seed)
    summary = {
        "replay": "uniform" if args.uniform or args.alpha == 0 else "prioritized",
        "environment steps": steps,
        "gradient steps": updates,
        "greedy return": mean,
        "seconds": round(seconds, 1),
    }
    print(*(f"{name}: {value}" for name, value in summary.items()), sep="\n")
    print(f"{'SOLVED' if mean >= SOLVED_RETURN else 'NOT SOLVED'}: wanted {SOLVED_RETURN:.0f}")
    return summary


if __name__ == "__main__":
    torch.set_num_threads(1)  # the networks are so small that more threads only wait
    main(parse_args())

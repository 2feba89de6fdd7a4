"""Offline Q-learning from an HDF5 file as Minari writes them, with prioritized draws.

    pip install -c constraints.txt -e . h5py
    python examples/offline_hdf5.py                       # writes a small file, and learns from it
    python examples/offline_hdf5.py --file yours.hdf5     # a Minari main_data.hdf5 of this kind

The file has a group per episode with observations [T + 1, ...], actions, rewards, terminations and
truncations [T]. The example's own episodes are random walks in a corridor of 15 cells: the reward
is 1 at its end, and 0 elsewhere; after 200 steps an episode is cut off.
"""

import argparse
import copy
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from per_td import PrioritizedReplayBuffer

CELLS, LIMIT = 15, 200


def step(cell: int, action: int) -> tuple[int, float, bool]:
    """Move right (1) or left (0): the cell, the reward, and whether that was the end."""
    cell = max(cell + 2 * action - 1, 0)
    return cell, float(cell == CELLS - 1), cell == CELLS - 1


def one_hot(cells: list[int]) -> np.ndarray:
    """Observations float32 [n, CELLS]."""
    return np.eye(CELLS, dtype=np.float32)[cells]


def write_file(file: Path, episodes: int, seed: int) -> None:
    """Write episodes of random actions, in Minari's layout."""
    rng = np.random.default_rng(seed)
    file.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(file, "w") as out:
        for number in range(episodes):
            cells, actions, rewards, ended = [0], [], [], False
            while not ended and len(actions) < LIMIT:
                actions.append(int(rng.integers(2)))
                cell, reward, ended = step(cells[-1], actions[-1])
                cells.append(cell)
                rewards.append(reward)
            last = np.arange(1, len(actions) + 1) == len(actions)
            group = out.create_group(f"episode_{number}")
            group.attrs.update(id=number, total_steps=len(actions))
            group["observations"], group["actions"] = one_hot(cells), np.array(actions)
            group["rewards"] = np.array(rewards, np.float32)
            group["terminations"], group["truncations"] = last & ended, last & (not ended)


def episodes_of(file: Path) -> Iterator[TensorDict]:
    """Read a file, an episode [T] at a time."""
    with h5py.File(file) as found:
        for group in found.values():
            names = "observations", "actions", "rewards", "terminations"
            # not "truncations": an episode that was cut off has a next observation with a value
            seen, action, reward, ended = (torch.from_numpy(group[name][:]) for name in names)
            after = {"observation": seen[1:], "reward": reward.float(), "terminated": ended}
            fields = {"observation": seen[:-1], "action": action, "next": after}
            yield TensorDict(fields, [len(action)])


def fill(file: Path, alpha: float, beta: float) -> PrioritizedReplayBuffer:
    """Make a buffer that is as large as the file."""
    data = torch.cat(list(episodes_of(file)))
    buffer = PrioritizedReplayBuffer(len(data), batch_size=64, alpha=alpha, beta=beta)
    buffer.extend(data)
    return buffer


def td_error(network: nn.Module, target: nn.Module, batch: TensorDict, gamma: float) -> Tensor:
    """TD errors [B] of a batch."""
    with torch.no_grad():
        following = ~batch["next", "terminated"] * target(batch["next", "observation"]).amax(-1)
        wanted = batch["next", "reward"] + gamma * following
    value = network(batch["observation"]).gather(-1, batch["action"].unsqueeze(-1))
    return wanted - value.squeeze(-1)


@torch.no_grad()
def steps_to_the_end(network: nn.Module) -> int:
    """Return how many greedy steps the corridor takes: CELLS - 1 at best, LIMIT at most."""
    cell, ended, steps = 0, False, 0
    while not ended and steps < LIMIT:
        cell, _, ended = step(cell, int(network(torch.from_numpy(one_hot([cell]))).argmax()))
        steps += 1
    return steps


def main(args: argparse.Namespace) -> tuple[nn.Module, PrioritizedReplayBuffer]:
    """Train offline, and print the mean error over the whole file."""
    torch.manual_seed(args.seed)
    file = args.file or Path("runs/offline_hdf5/main_data.hdf5")
    if args.file is None:
        write_file(file, args.episodes, args.seed)
    buffer = fill(file, args.alpha, args.beta)
    inputs, actions = buffer.transitions["observation"].shape[-1], buffer.transitions["action"]
    hidden, out = nn.Linear(inputs, 64), nn.Linear(64, int(actions.max()) + 1)
    network = nn.Sequential(hidden, nn.ReLU(), out)
    target = copy.deepcopy(network)
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    for number in range(args.steps):
        if number % args.sweep_every == 0:  # all priorities anew: old ones belong to old values
            for batch in buffer.sweep(1024):
                error = td_error(network, target, batch, args.gamma).detach()
                buffer.update_priority(batch["index"], error, batch["generation"])
            print(f"step {number:>5,}: mean |TD error| {buffer.priority.mean():.4f}", flush=True)
        batch = buffer.sample()
        error = td_error(network, target, batch, args.gamma)
        optimizer.zero_grad()
        (batch["priority_weight"] * error**2).mean().backward()
        optimizer.step()
        buffer.update_priority(batch["index"], error.detach(), batch["generation"])
        for slow, fast in zip(target.parameters(), network.parameters(), strict=True):
            slow.data.lerp_(fast.data, 0.05)
    if args.file is None:
        print(f"greedy steps to the end: {steps_to_the_end(network)}, best {CELLS - 1}")
    return network, buffer


def parse_args(argv=None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--file", type=Path, help="read this one, with discrete actions")
    parser.add_argument("--episodes", type=int, default=50, help="of the file that is written")
    parser.add_argument("--steps", type=int, default=1_000, help="gradient steps")
    parser.add_argument("--sweep-every", type=int, default=250, help="gradient steps")
    parser.add_argument("--alpha", type=float, default=0.6, help="0 is uniform")
    parser.add_argument("--beta", type=float, default=0.4, help="exponent of the weights")
    parser.add_argument("--gamma", type=float, default=0.95)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(parse_args())

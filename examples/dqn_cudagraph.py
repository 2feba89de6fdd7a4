"""A whole DQN training step without Python: as one CUDA graph, or compiled on the CPU.

    pip install "per-td[examples]"
    python examples/dqn_cudagraph.py --device cuda   # a CUDA graph against plain calls
    python examples/dqn_cudagraph.py                 # torch.compile against plain calls

The step is everything that a learner does between two environment steps: draw a prioritized
batch, compute the loss and its gradient, step Adam, mix into the target network and write the new
priorities back. Launching these many small operations from Python takes longer than running them;
a CUDA graph records them once and replays them with a single launch.

What makes that possible: `sample` and `update_priority` never wait for the device. Whatever changes
between two replays is read from tensors on the device: priorities, beta, how many transitions there
are. alpha, eps and the batch size are recorded; after changing one of them, capture again.

The transitions are those of a random policy on CartPole-v1. The example is about time per step, and
leaves out the loop around it: for that, see dqn_cartpole.py.
"""

import argparse
import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields

import gymnasium as gym
import torch
from tensordict import TensorDict
from torch import nn
from tqdm import tqdm

from per_td import PrioritizedReplayBuffer

ENV_ID = "CartPole-v1"
WARM_UP = 5  # steps before the clock starts, and on CUDA before the capture


def option(default, text):
    """A dataclass field with its line of help."""
    return field(default=default, metadata={"help": text})


@dataclass
class Args:
    """The settings of a run; each is a command-line option too."""

    steps: int = option(2_000, "training steps to time, of each kind")
    transitions: int = option(10_000, "transitions to collect with a random policy")
    seed: int = option(0, "seeds the environment and torch")
    device: str = option("cpu", "where networks and buffer live: cpu, cuda, ...")

    alpha: float = option(0.6, "how strongly priorities skew the draws; 0 is uniform")
    beta: float = option(0.4, "share of that bias which the weights undo")
    capacity: int = option(100_000, "transitions that fit in the buffer")
    batch_size: int = option(128, "transitions in a training step")

    lr: float = option(5e-4, "Adam's learning rate")
    gamma: float = option(0.99, "discount factor")
    tau: float = option(0.01, "share of the online network that each step mixes into the target")
    hidden: int = option(128, "units in each of the two hidden layers")


def parse_args(argv=None) -> Args:
    """`Args` from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    for f in fields(Args):
        name = "--" + f.name.replace("_", "-")
        parser.add_argument(name, default=f.default, type=f.type, help=f.metadata["help"])
    return Args(**vars(parser.parse_args(argv)))


# ----------------------------------------------------------------------------- the transitions


def collect(args: Args) -> TensorDict:
    """Transitions of a random policy, a TensorDict [transitions]."""
    env = gym.make(ENV_ID)
    env.action_space.seed(args.seed)
    rows = []
    state, _ = env.reset(seed=args.seed)
    for _ in tqdm(range(args.transitions), desc=f"random play on {ENV_ID}", leave=False):
        action = env.action_space.sample()
        next_state, reward, terminated, truncated, _ = env.step(action)
        rows.append((state, int(action), float(reward), next_state, float(terminated)))
        state = env.reset()[0] if terminated or truncated else next_state
    env.close()
    states, actions, rewards, next_states, dones = zip(*rows, strict=True)
    return TensorDict(
        {
            "state": torch.stack([torch.as_tensor(s) for s in states]),
            "action": torch.tensor(actions),
            "reward": torch.tensor(rewards),
            "next_state": torch.stack([torch.as_tensor(s) for s in next_states]),
            "done": torch.tensor(dones),
        },
        batch_size=[args.transitions],
    )


# --------------------------------------------------------------------------- the training step


class Learner:
    """Networks, optimizer and buffer, and the step that is to be fast."""

    def __init__(self, transitions: TensorDict, args: Args):
        torch.manual_seed(args.seed)
        self.args = args
        self.network = nn.Sequential(
            nn.Linear(transitions["state"].shape[1], args.hidden),
            nn.ReLU(),
            nn.Linear(args.hidden, args.hidden),
            nn.ReLU(),
            nn.Linear(args.hidden, 2),
        ).to(args.device)
        self.target = copy.deepcopy(self.network).requires_grad_(False)
        on_cuda = torch.device(args.device).type == "cuda"
        self.optimizer = torch.optim.Adam(
            self.network.parameters(), lr=args.lr, capturable=on_cuda, foreach=True
        )
        self.buffer = PrioritizedReplayBuffer(
            args.capacity, args.batch_size, alpha=args.alpha, beta=args.beta, device=args.device
        )
        self.buffer.extend(transitions)

    def forward(self) -> tuple[torch.Tensor, TensorDict]:
        """The loss of a prioritized batch, and the batch with "td_error" [B] in it."""
        batch = self.buffer.sample()
        with torch.no_grad():  # double DQN: one network picks the next action, the other values it
            best = self.network(batch["next_state"]).argmax(dim=1, keepdim=True)
            value = self.target(batch["next_state"]).gather(1, best).squeeze(1)
            wanted = batch["reward"] + self.args.gamma * (1 - batch["done"]) * value
        chosen = self.network(batch["state"]).gather(1, batch["action"].unsqueeze(1)).squeeze(1)
        batch["td_error"] = wanted - chosen
        return (batch["priority_weight"] * batch["td_error"] ** 2).mean(), batch

    def step(self) -> torch.Tensor:
        """One training step; the loss stays on the device: to look at it would be to wait."""
        loss, batch = self.forward()
        self.optimizer.zero_grad()
        loss.backward()
        self.improve()
        self.update(batch)
        return loss.detach()

    @torch.no_grad()
    def improve(self) -> None:
        """One step of Adam, of which the target network takes its share."""
        self.optimizer.step()
        pairs = zip(self.target.parameters(), self.network.parameters(), strict=True)
        for slow, fast in pairs:
            slow.lerp_(fast, self.args.tau)

    def update(self, batch: TensorDict) -> None:
        """Give what was drawn its new priorities."""
        self.buffer.update_tensordict_priority(batch)


# ------------------------------------------------------------------------- ways to make it fast

Step = Callable[[], torch.Tensor]


def captured(learner: Learner) -> Step:
    """The step as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what is done only once must not be recorded
        for _ in range(WARM_UP):
            learner.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = learner.step()

    def replay() -> torch.Tensor:
        graph.replay()
        return loss

    return replay


def compiled(learner: Learner) -> Step:
    """The step with its parts compiled, sampling and update in one graph each."""
    learner.forward = torch.compile(learner.forward, fullgraph=True)
    learner.improve = torch.compile(learner.improve)
    learner.update = torch.compile(learner.update, fullgraph=True)
    learner.step()  # compiles, or fails
    return learner.step


def fastest(transitions: TensorDict, args: Args) -> tuple[str, Step] | None:
    """The fastest way that there is here, by name; None, after a word why, if there is none."""
    learner = Learner(transitions, args)
    if torch.device(args.device).type == "cuda":
        return "CUDA graph", captured(learner)
    try:
        return "torch.compile", compiled(learner)
    except RuntimeError as error:  # mostly: there is no C++ compiler
        print(f"torch.compile cannot be used here: {str(error).strip().splitlines()[0]}")
        return None


# ----------------------------------------------------------------------------- time and table


def measure(name: str, step: Step, args: Args) -> dict:
    """Steps per second, and the mean loss of the last tenth of the steps."""
    losses = torch.empty(args.steps, device=args.device)

    def wait() -> float:
        if losses.is_cuda:
            torch.cuda.synchronize(losses.device)
        return time.perf_counter()

    for _ in range(WARM_UP):
        step()
    start = wait()
    for k in tqdm(range(args.steps), desc=name, unit=" steps", leave=False):
        losses[k] = step()
    seconds = wait() - start
    return {
        "name": name,
        "steps_per_second": args.steps / seconds,
        "loss": float(losses[-max(1, args.steps // 10) :].mean()),
    }


def print_table(rows: list[dict], args: Args) -> None:
    """One line per way."""
    device = torch.cuda.get_device_name() if "cuda" in args.device else "CPU"
    print(f"\nDQN on {ENV_ID}, batch {args.batch_size}, {args.steps:,} steps each, {device}")
    print(f"{'':<16}{'steps per second':>18}{'us per step':>13}{'ratio':>8}{'last loss':>12}")
    for row in rows:
        speed = row["steps_per_second"]
        ratio = speed / rows[0]["steps_per_second"]
        print(f"{row['name']:<16}{speed:>18,.0f}{1e6 / speed:>13,.0f}{ratio:>8.2f}", end="")
        print(f"{row['loss']:>12.4f}")


def main(args: Args) -> dict:
    """Time the step both ways and print the table; returns its rows by name."""
    transitions = collect(args)
    ways = [("plain calls", Learner(transitions, args).step), fastest(transitions, args)]
    rows = [measure(*way, args) for way in ways if way is not None]
    print_table(rows, args)
    return {row["name"]: row for row in rows}


if __name__ == "__main__":
    torch.set_num_threads(1)  # the networks are so small that more threads only wait
    main(parse_args())

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

import gymnasium as gym
import numpy as np
import torch
from tensordict import TensorDict
from torch import nn

from per_td import PrioritizedReplayBuffer

ENV_ID = "CartPole-v1"
WARM_UP = 5  # steps before the clock starts, and on CUDA before the capture
GAMMA, TAU = 0.99, 0.01  # discount factor; share of the network mixed into the target
Step = Callable[[], torch.Tensor]


def parse_args(argv=None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2_000, help="to time, of each kind")
    parser.add_argument("--transitions", type=int, default=10_000, help="of a random policy")
    parser.add_argument("--batch-size", type=int, default=128, help="transitions in a step")
    parser.add_argument("--seed", type=int, default=0, help="of the environment and torch")
    parser.add_argument("--device", default="cpu", help="where networks and buffer live")
    return parser.parse_args(argv)


def collect(n: int, seed: int) -> TensorDict:
    """Return transitions of a random policy, a TensorDict [n]."""
    env = gym.make(ENV_ID)
    env.action_space.seed(seed)
    rows = []
    state, _ = env.reset(seed=seed)
    for _ in range(n):
        action = env.action_space.sample()
        next_state, reward, terminated, truncated, _ = env.step(action)
        rows.append((state, int(action), float(reward), next_state, float(terminated)))
        state = env.reset()[0] if terminated or truncated else next_state
    env.close()
    states, actions, rewards, next_states, dones = zip(*rows, strict=True)
    return TensorDict(
        {
            "state": torch.from_numpy(np.stack(states)),
            "action": torch.tensor(actions),
            "reward": torch.tensor(rewards),
            "next_state": torch.from_numpy(np.stack(next_states)),
            "done": torch.tensor(dones),
        },
        batch_size=[n],
    )


class Learner:
    """Networks, optimizer and buffer, and the step that is to be fast."""

    def __init__(self, transitions: TensorDict, args: argparse.Namespace):
        torch.manual_seed(args.seed)
        layers = nn.Linear(4, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 2)
        self.network = nn.Sequential(*layers).to(args.device)
        self.target = copy.deepcopy(self.network).requires_grad_(False)
        on_cuda = torch.device(args.device).type == "cuda"
        self.optimizer = torch.optim.Adam(
            self.network.parameters(), lr=5e-4, capturable=on_cuda, foreach=True
        )
        self.buffer = PrioritizedReplayBuffer(
            100_000, args.batch_size, alpha=0.6, beta=0.4, device=args.device
        )
        self.buffer.extend(transitions)

    def forward(self) -> tuple[torch.Tensor, TensorDict]:
        """Return the loss of a prioritized batch, and the batch with "td_error" [B] in it."""
        batch = self.buffer.sample()
        with torch.no_grad():  # double DQN: one network picks the next action, the other values it
            best = self.network(batch["next_state"]).argmax(dim=1, keepdim=True)
            value = self.target(batch["next_state"]).gather(1, best).squeeze(1)
            wanted = batch["reward"] + GAMMA * (1 - batch["done"]) * value
        chosen = self.network(batch["state"]).gather(1, batch["action"].unsqueeze(1)).squeeze(1)
        batch["td_error"] = wanted - chosen
        return (batch["priority_weight"] * batch["td_error"] ** 2).mean(), batch

    def step(self) -> torch.Tensor:
        """Train once; the loss stays on the device: to look at it would be to wait."""
        loss, batch = self.forward()
        self.optimizer.zero_grad()
        loss.backward()
        self.improve()
        self.update(batch)
        return loss.detach()

    @torch.no_grad()
    def improve(self) -> None:
        """Take one step of Adam, and give the target network its share of it."""
        self.optimizer.step()
        pairs = zip(self.target.parameters(), self.network.parameters(), strict=True)
        for slow, fast in pairs:
            slow.lerp_(fast, TAU)

    def update(self, batch: TensorDict) -> None:
        """Give the transitions of the batch their new priorities."""
        self.buffer.update_tensordict_priority(batch)


def captured(learner: Learner) -> Step:
    """Record the step as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # work that is done only once must not be recorded
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
    """Compile the parts of the step, sampling and update in one graph each."""
    learner.forward = torch.compile(learner.forward, fullgraph=True)
    learner.improve = torch.compile(learner.improve)
    learner.update = torch.compile(learner.update, fullgraph=True)
    learner.step()  # compiles, or fails
    return learner.step


def measure(step: Step, n: int, device: str) -> dict:
    """Return steps per second, and the mean loss of the last tenth of n steps."""
    losses = torch.empty(n, device=device)

    def now() -> float:
        if losses.is_cuda:
            torch.cuda.synchronize(losses.device)
        return time.perf_counter()

    for _ in range(WARM_UP):
        step()
    start = now()
    for k in range(n):
        losses[k] = step()
    seconds = now() - start
    return {"steps_per_second": n / seconds, "loss": float(losses[-max(1, n // 10) :].mean())}


def main(args: argparse.Namespace) -> dict:
    """Time the step both ways and print the figures; return them by the way's name."""
    transitions = collect(args.transitions, args.seed)
    ways = {"plain calls": Learner(transitions, args).step}
    learner = Learner(transitions, args)
    if torch.device(args.device).type == "cuda":
        ways["CUDA graph"] = captured(learner)
    else:
        try:
            ways["torch.compile"] = compiled(learner)
        except RuntimeError as error:  # mostly: there is no C++ compiler
            reason = str(error).strip().splitlines()[0]
            print(f"torch.compile cannot be used here: {reason}")
    rows = {}
    for name, step in ways.items():
        rows[name] = row = measure(step, args.steps, args.device)
        speed = row["steps_per_second"]
        print(f"{name}: {speed:,.0f} steps per second, last loss {row['loss']:.4f}")
    return rows


if __name__ == "__main__":
    torch.set_num_threads(1)  # the networks are so small that more threads only wait
    main(parse_args())

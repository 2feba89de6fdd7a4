"""Replay time of a whole TorchRL DQN run: per_td's drop-in beside TorchRL's uniform buffer.

Two agents learn CartPole in one process, step by step in turn: one from per_td's
`TensorDictPrioritizedReplayBuffer`, one from TorchRL's `TensorDictReplayBuffer` with its uniform
sampler. Only `extend`, `sample` and `update_tensordict_priority` are timed, which of the two goes
first changes from step to step, and the first steps of learning are left out.

    python -m benchmarks.torchrl_replay_time --json benchmarks/results/torchrl_replay_time.json
"""

import json
import platform
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tensordict
import torch
import torchrl
from tensordict.nn import TensorDictSequential
from torch import nn
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs import GymEnv, RewardSum, TransformedEnv
from torchrl.modules import MLP, EGreedyModule, QValueActor
from torchrl.objectives import DQNLoss, SoftUpdate

import per_td
from benchmarks.arguments import option, parse_args
from benchmarks.pages import table
from per_td.torchrl import TensorDictPrioritizedReplayBuffer

OPERATIONS = ("extend", "sample", "update")


@dataclass(frozen=True)
class Args:
    """The settings of a run; each is a command-line option too."""

    frames: int = option(10_000, "environment steps of each agent")
    frames_per_batch: int = option(1, "environment steps between two learning steps")
    batch_size: int = option(256, "transitions per learning step")
    capacity: int = option(100_000, "slots of each buffer")
    warm_up: int = option(500, "learning steps that are not counted")
    threads: int = option(1, "of torch")
    seed: int = option(0, "of torch and the environments")
    json: str = option("", "where the results go; nowhere if empty")


class Agent:
    """A DQN agent, its environment, and a stopwatch around its buffer."""

    def __init__(self, buffer: TensorDictReplayBuffer, args: Args) -> None:
        torch.manual_seed(args.seed)
        self.buffer = buffer
        env = TransformedEnv(GymEnv("CartPole-v1"), RewardSum())
        net = MLP(4, 2, num_cells=[64, 64], activation_class=nn.ReLU)
        actor = QValueActor(net, spec=env.action_spec)
        self.explore = EGreedyModule(
            env.action_spec, annealing_num_steps=args.frames // 4, eps_end=0.05
        )
        self.collector = Collector(
            env,
            TensorDictSequential(actor, self.explore),
            frames_per_batch=args.frames_per_batch,
            total_frames=args.frames,
            auto_register_policy_transforms=True,
        )
        self.collector.set_seed(args.seed)
        self.steps = iter(self.collector)
        self.loss = DQNLoss(actor, action_space="one-hot", delay_value=True)
        self.target = SoftUpdate(self.loss, eps=0.99)
        self.optimizer = torch.optim.Adam(self.loss.parameters(), 1e-3)
        self.times: dict[str, list[float]] = {name: [] for name in OPERATIONS}
        self.returns: list[float] = []

    def _timed(self, name: str, call: Any, *args: Any) -> Any:
        start = time.perf_counter()
        result = call(*args)
        self.times[name].append(time.perf_counter() - start)
        return result

    def step(self) -> None:
        """Act, store, draw, learn, and set priorities where there are some."""
        data = next(self.steps)
        self.explore.step(data.numel())
        ended = data["next", "done"].squeeze(-1)
        self.returns += data["next", "episode_reward"][ended].flatten().tolist()
        self._timed("extend", self.buffer.extend, data)
        batch = self._timed("sample", self.buffer.sample)
        self.loss(batch)["loss"].backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.target.step()
        if isinstance(self.buffer, TensorDictPrioritizedReplayBuffer):
            self._timed("update", self.buffer.update_tensordict_priority, batch)
        else:
            self.times["update"].append(0.0)

    def result(self, warm_up: int) -> dict[str, float]:
        """Median microseconds of each operation, and milliseconds per 1,000 steps of all."""
        counted = {name: times[warm_up:] for name, times in self.times.items()}
        result = {name: statistics.median(times) * 1e6 for name, times in counted.items()}
        result["sum"] = sum(result[name] for name in OPERATIONS)
        result["mean"] = sum(map(statistics.fmean, counted.values())) * 1e6
        result["final_return"] = statistics.fmean(self.returns[-20:])
        return result


def main() -> None:
    """Run both agents and print the table."""
    args = parse_args(Args, __doc__)
    torch.set_num_threads(args.threads)
    ours = TensorDictPrioritizedReplayBuffer(
        alpha=0.6,
        beta=0.4,
        storage=LazyTensorStorage(args.capacity),
        batch_size=args.batch_size,
        td_error_unit="squared",
    )
    theirs = TensorDictReplayBuffer(
        storage=LazyTensorStorage(args.capacity), batch_size=args.batch_size
    )
    agents = {"per_td, prioritized": Agent(ours, args), "TorchRL, uniform": Agent(theirs, args)}
    started = time.perf_counter()
    for step in range(args.frames // args.frames_per_batch):
        order = list(agents.values())
        for agent in order if step % 2 else order[::-1]:
            agent.step()
    results = {name: agent.result(args.warm_up) for name, agent in agents.items()}
    one, other = results.values()
    columns = (*OPERATIONS, "sum", "mean", "final_return")
    body = [[name, *(f"{found[c]:.0f}" for c in columns)] for name, found in results.items()]
    print(table(["median us", *columns], body))
    print(f"ratio of the sums {one['sum'] / other['sum']:.2f}, target at most 0.33")
    if args.json:
        path = Path(args.json)
        path.parent.mkdir(parents=True, exist_ok=True)
        about = {
            "args": asdict(args),
            "machine": f"{platform.processor() or platform.machine()}, {platform.platform()}",
            "versions": {m.__name__: m.__version__ for m in (torch, tensordict, torchrl, per_td)},
            "seconds": time.perf_counter() - started,
            "ratio": one["sum"] / other["sum"],
            "results": results,
        }
        path.write_text(json.dumps(about, indent=2) + "\n")
    for agent in agents.values():
        agent.collector.shutdown()


if __name__ == "__main__":
    main()

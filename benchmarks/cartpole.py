"""The whole training loop of examples/dqn_cartpole.py, with prioritized and with uniform replay."""

import importlib.util
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks.contestants import NotRun
from benchmarks.race import Entry

EXAMPLE = Path(__file__).parents[1] / "examples" / "dqn_cartpole.py"
STEPS, RUNS = 2_500, 6
QUICK_STEPS, QUICK_RUNS = 700, 1


class UniformBuffer:
    """Uniform replay with the interface of TransitionReplayBuffer, as one would write it by hand.

    One tensor per field, `torch.randint`, weights of 1 made once.
    """

    def __init__(self, capacity: int, device: str) -> None:
        self.capacity, self.device = capacity, device
        self.columns: list[Tensor] = []
        self.written = 0
        self.weights = torch.ones(0, device=device)

    def push(self, state: Any, action: Any, reward: Any, next_state: Any, done: Any) -> None:
        """Store one transition."""
        row = (
            torch.as_tensor(state, dtype=torch.float32),
            torch.tensor([action]),
            torch.tensor(reward, dtype=torch.float32),
            torch.as_tensor(next_state, dtype=torch.float32),
            torch.tensor(done, dtype=torch.float32),
        )
        if not self.columns:
            self.columns = [
                torch.zeros(self.capacity, *leaf.shape, dtype=leaf.dtype, device=self.device)
                for leaf in row
            ]
        slot = self.written % self.capacity
        for column, leaf in zip(self.columns, row, strict=True):
            column[slot] = leaf
        self.written += 1

    def sample(self, batch_size: int) -> tuple[Tensor, ...]:
        """Draw a batch; indices and weights come last."""
        size = min(self.written, self.capacity)
        index = torch.randint(size, (batch_size,), device=self.device)
        if len(self.weights) != batch_size:
            self.weights = torch.ones(batch_size, device=self.device)
        batch = [column.index_select(0, index) for column in self.columns]
        return (*batch, index, self.weights)

    def update_priorities(self, indices: Tensor, td_errors: Tensor) -> None:
        """There are none."""

    def increase_beta(self) -> None:
        """There is none."""


class Timed:
    """A buffer whose calls are timed, in seconds."""

    def __init__(self, buffer: Any) -> None:
        self.buffer, self.seconds = buffer, 0.0

    def __getattr__(self, name: str) -> Callable[..., Any]:
        call = getattr(self.buffer, name)

        def timed(*args: Any) -> Any:
            start = time.perf_counter()
            try:
                return call(*args)
            finally:
                self.seconds += time.perf_counter() - start

        setattr(self, name, timed)  # the next look-up finds it here
        return timed


def _example() -> ModuleType:
    if find_spec("gymnasium") is None:
        raise NotRun("gymnasium is not installed")
    if not EXAMPLE.exists():
        raise NotRun("examples/dqn_cartpole.py is not there")
    spec = importlib.util.spec_from_file_location("dqn_cartpole", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    module.play_greedily = lambda *args: 0.0  # training alone
    module.print = lambda *args, **options: None
    return module


def measure(*, quick: bool, seed: int) -> tuple[list[Entry], int]:
    """Return entries with the microseconds per environment step, one number per run.

    Runs take turns.
    """
    example = _example()
    steps, runs = (QUICK_STEPS, QUICK_RUNS) if quick else (STEPS, RUNS)
    prioritized = example.make_buffer
    makers = {
        "per_td": prioritized,
        "per_td with alpha = 0": prioritized,
        "uniform": lambda args: UniformBuffer(args.capacity, args.device),
    }
    entries = [Entry({"contestant": name}, []) for name in makers]
    for run in range(runs):
        for entry, (name, make) in zip(entries, makers.items(), strict=True):
            args = example.Args(steps, seed + run, uniform="alpha" in name, eval_every=10**9)
            buffer = Timed(make(args))
            example.make_buffer = lambda _, made=buffer: made
            start = time.perf_counter()
            example.train(args)
            seconds = time.perf_counter() - start
            entry.rounds.setdefault("step", []).append(seconds / steps * 1e6)
            entry.rounds.setdefault("of it in replay", []).append(buffer.seconds / steps * 1e6)
    return entries, runs

"""What the tests of checkpoints share: a buffer with a past, and how two are compared."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import torch

from per_td import PrioritizedReplayBuffer
from tests.support.oracle import data

ROOT = Path(__file__).parents[2]


def used(device="cpu", generator=None, **settings) -> PrioritizedReplayBuffer:
    """A buffer that has wrapped, with uneven priorities, a stale update and settings of its own."""
    settings = {"alpha": 0.37, "beta": 0.5, "eps": 0.01, "beta_increment": 0.125, **settings}
    buffer = PrioritizedReplayBuffer(20, 8, device=device, generator=generator, **settings)
    buffer.extend(data(0, 15, device))
    batch = buffer.sample()
    buffer.extend(data(15, 15, device))
    td_error = torch.linspace(0.1, 9, 8)
    buffer.update_priority(batch["index"], td_error, batch["generation"])
    buffer.update_priority(range(8), td_error)
    buffer.increase_beta()
    return buffer


def same(a: PrioritizedReplayBuffer, b: PrioritizedReplayBuffer) -> None:
    assert (a.transitions.cpu() == b.transitions.cpu()).all()
    assert torch.equal(a.priority.cpu(), b.priority.cpu())
    for name in ("alpha", "beta", "eps", "beta_increment", "capacity", "batch_size", "draw"):
        assert getattr(a, name) == getattr(b, name), name
    assert a.stats() == b.stats()


def draws(buffer: PrioritizedReplayBuffer) -> list:
    out = []
    for _ in range(3):
        batch = buffer.sample()
        out.append((batch["action"].tolist(), batch["priority_weight"].tolist()))
        buffer.update_priority(batch["index"], batch["action"].float(), batch["generation"])
    return out


def run(code: str, *arguments: object, **how) -> subprocess.Popen:
    """Another process that runs `code`, with this package."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PER_TD_KERNELS": "off"}
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        **how,
    )

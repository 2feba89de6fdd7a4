"""Random operations for as long as wanted: memory stays flat, and what is kept stays sound.

`PER_TD_SOAK=600 pytest -m soak -s tests/test_soak.py` runs for so many seconds in all.
"""

import copy
import gc
import os
import random
import time
from pathlib import Path

import pytest
import torch

from per_td import PrioritizedReplayBuffer, PriorityError, kernels
from tests.support.fuzz import check_sound
from tests.support.oracle import data

SOAK = float(os.environ.get("PER_TD_SOAK", "0"))
GROWTH = 8.0
"""MiB that a process may take more at the end than after a quarter of the time."""


def resident() -> float:
    """MiB of memory in use."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


class Operations:
    """Random ones on one buffer, all by one seed."""

    def __init__(self, seed: int, folder: Path, **given) -> None:
        self.random, self.count = random.Random(seed), 0
        self.path, self.many = folder / "buffer", given.get("num_buffers")
        self.buffer = PrioritizedReplayBuffer(1000, 64, **given)
        self.batches: list = []
        self.extend()

    def numbered(self, n: int):
        td = data(self.count, n)
        return torch.stack([td] * self.many) if self.many else td

    def extend(self) -> None:
        n = self.random.choice([1, 16, 300, 1200])
        td = self.numbered(n)
        self.buffer.extend(td, torch.rand(td.batch_size) if self.random.random() < 0.3 else None)

    def add(self) -> None:
        self.buffer.add(self.numbered(1)[..., 0])

    def sample(self) -> None:
        self.batches = [*self.batches[-7:], self.buffer.sample(self.random.randint(1, 200))]

    def update(self) -> None:
        if self.batches:
            batch = self.random.choice(self.batches)
            batch["td_error"] = torch.randn(batch.batch_size)
            self.buffer.update_tensordict_priority(batch)

    def refuse(self) -> None:
        td = self.numbered(3)
        with pytest.raises(PriorityError):
            self.buffer.extend(td, torch.full(td.batch_size, torch.nan))

    def settings(self) -> None:
        self.buffer.alpha = self.random.choice([0.0, 0.5, 1.0])
        self.buffer.increase_beta()

    def copy(self) -> None:
        self.buffer = copy.deepcopy(self.buffer)

    def state(self) -> None:
        self.buffer.load_state_dict(self.buffer.state_dict())

    def save(self) -> None:
        self.buffer.save(self.path)
        self.buffer = type(self.buffer).load(self.path)

    def run(self) -> None:
        often = [self.extend, self.add, self.sample, self.update] * 12
        rarely = [self.refuse, self.settings, self.copy, self.state, self.save]
        self.random.choice([*often, *rarely])()
        self.count += 1
        if self.count % 500 == 0:
            check_sound(self.buffer)


@pytest.mark.soak
@pytest.mark.skipif(not SOAK, reason="PER_TD_SOAK says for how many seconds")
@pytest.mark.parametrize(
    "given",
    [
        {"weight_normalization": "buffer"},
        {"prioritization": "rank"},
        {"num_buffers": 3},
        {"draw": "without_replacement", "layout": "records"},
    ],
    ids=str,
)
@pytest.mark.parametrize("choice", kernels.CHOICES)
def test_memory_stays_flat_and_priorities_sound(choice, given, tmp_path, monkeypatch):
    monkeypatch.setenv(kernels.VARIABLE, choice)
    operations = Operations(0, tmp_path, **given)
    start, warm = time.monotonic(), 0.0
    while time.monotonic() - start < SOAK / 8:  # eight of these share the time
        operations.run()
        if not warm and time.monotonic() - start > SOAK / 32:
            warm, at = resident(), operations.count
    check_sound(operations.buffer)
    grown = resident() - warm
    print(
        f"\nkernels {choice}, {given}: {operations.count:,} operations, {warm:.1f} MiB resident"
        f" after {at:,}, {grown:+.1f} MiB at the end"
    )
    assert grown < GROWTH

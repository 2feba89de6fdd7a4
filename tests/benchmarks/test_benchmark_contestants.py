"""Each contestant of the benchmarks does what it is timed for."""

import pytest
import torch

from benchmarks.cartpole import UniformBuffer
from benchmarks.contestants import CONTESTANTS, NotRun
from benchmarks.contestants.base import tensor_bytes
from benchmarks.race import TOTAL
from benchmarks.workload import Point

others_warn = pytest.mark.filterwarnings("ignore")  # peers do, on import
PRIORITIZED = (
    "per_td",
    "per_td in TorchRL",
    "TorchRL prioritized",
    "cpprb",
    "flashbax",
    "tianshou",
)


def made(name, point=None):
    try:
        return CONTESTANTS[name](point or Point(500, 20))
    except NotRun as reason:
        pytest.skip(f"{name}: {reason}")


@others_warn
@pytest.mark.parametrize("name", PRIORITIZED)
def test_draws_follow_the_priorities_that_a_contestant_was_given(name):
    contestant = made(name)
    contestant.check()
    contestant.priority = contestant.priority.flip(0)
    with pytest.raises(AssertionError, match="did not take effect"):
        contestant.check()


@others_warn
@pytest.mark.parametrize("name", [n for n in CONTESTANTS if "CPU" not in n and "graph" not in n])
def test_a_contestant_goes_through_its_parts(name):
    if CONTESTANTS[name].clock == "cuda":
        pytest.skip("needs CUDA")
    contestant = made(name)
    for part in contestant.parts(("sample", "update", "update_cold", "extend", "add")):
        if part.before is not None:
            part.before()
        part.run()


@pytest.mark.parametrize("name", [n for n, c in CONTESTANTS.items() if c.clock == "cuda"])
def test_a_cuda_contestant_goes_through_a_step(name, monkeypatch):
    if not torch.cuda.is_available():  # its logic can be seen without a device

        class Replay:
            def __init__(self, step):
                self.replay = step

        monkeypatch.setattr("benchmarks.contestants.cuda.capture", Replay)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    contestant = made(name, Point(500, 20, "number", device=device))
    (step,) = contestant.parts(("step",))
    assert step.name == TOTAL
    before = contestant.drawn().clone()
    step.run()
    assert not torch.equal(before, contestant.drawn())
    syncs = [value for fact, (value, _) in contestant.facts().items() if "host syncs" in fact]
    assert all(value == (0.0 if device == "cuda" else None) for value in syncs)


def test_bytes_are_counted_once_per_memory():
    column = torch.zeros(10)
    held = {"a": column, "view": [column[2:]], "b": torch.zeros(3, dtype=torch.int64)}
    assert tensor_bytes(held) == 64


def test_the_uniform_ring_returns_what_was_pushed():
    buffer = UniformBuffer(4, "cpu")
    for i in range(6):
        buffer.push([float(i)] * 2, i, float(i), [float(i)] * 2, False)
    states, actions, rewards, next_states, dones, index, weights = buffer.sample(50)
    assert set(rewards.tolist()) == {2.0, 3.0, 4.0, 5.0}
    assert torch.equal(states[:, 0], rewards)
    assert torch.equal(actions[:, 0].float(), rewards)
    assert next_states.shape == (50, 2)
    assert dones.shape == index.shape == weights.shape == (50,)

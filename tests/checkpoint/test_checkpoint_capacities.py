"""States that move into buffers of another capacity, and batches drawn before they did."""

import random

import pytest
import torch

from per_td import PrioritizedReplayBuffer, kernels
from tests.support.model import Ring
from tests.support.oracle import S, data, numbered
from tests.support.parameters import slow_but

SIZES = (1, 2, 5, 7, 16, 20, 33)
USUAL = (1, 7, 16)


@pytest.fixture(params=kernels.CHOICES)
def choice(request, monkeypatch) -> str:
    """With kernels and without."""
    monkeypatch.setenv(kernels.VARIABLE, request.param)
    return request.param


def held(buffer, s=None):
    """What a buffer holds, oldest first: numbers with their priorities."""
    length = int(buffer.lengths if s is None else buffer.lengths[s])
    slots = torch.arange(buffer.capacity)
    if s is None:
        generation = buffer.generation_of(slots)
    else:
        generation = buffer.generation_of(slots.expand(buffer.num_buffers, -1))[s]
    order = sorted(range(length), key=lambda i: (int(generation[i]), i))
    rows = buffer.transitions if s is None else buffer.transitions[s]
    priority = buffer.priority if s is None else buffer.priority[s]
    return [(int(rows["action"][i]), float(priority[i])) for i in order]


@pytest.mark.parametrize("old", slow_but(USUAL, SIZES))
def test_the_newest_transitions_move_with_their_priorities_in_their_order(old, choice):
    chance = random.Random(old)
    for new in SIZES:
        for written in (1, old // 2 + 1, old, old + 1, 2 * old + 3):
            buffer, ring = PrioritizedReplayBuffer(old, eps=0.0), Ring(old, eps=0.0)
            for k in range(written):
                priority = float(chance.randrange(1, 100))
                buffer.extend(data(k, 1), priority=[priority])
                ring.extend([k], [priority])
            other = PrioritizedReplayBuffer(new)
            other.extend(data(500, 2))
            other.load_state_dict(buffer.state_dict())
            ring = ring.moved(new)
            assert held(other) == ring.oldest_first()
            other.check_valid()
            assert other.stats()["written"] == other.write_count == written
            assert other.total_mass > 0
            for k in range(written, written + 3):
                other.extend(data(k, 1), priority=[2.0])
                ring.extend([k], [2.0])
                assert held(other) == ring.oldest_first()
            assert other.write_count == written + 3


@pytest.mark.parametrize("old", slow_but(USUAL, SIZES))
def test_updates_of_batches_drawn_before_a_move_are_right_or_stale(old, choice):
    for new in SIZES:
        for written in (old // 2 + 1, old, 2 * old + 3):
            buffer, batches = PrioritizedReplayBuffer(old, eps=0.0), []
            for k in range(written):
                buffer.extend(data(k, 1))
                batches.append(buffer.sample(3))
            other = PrioritizedReplayBuffer(new)
            other.load_state_dict(buffer.state_dict())
            batches.append(other.sample(3))
            again = PrioritizedReplayBuffer(old)  # and back
            again.load_state_dict(other.state_dict())
            for one in (other, again):
                one.extend(data(written, 1))
                for batch in batches:
                    inside = batch["index"] < len(one)
                    batch = batch[inside]
                    if len(batch):
                        error = 1000.0 + batch["action"].float()
                        one.update_priority(batch["index"], error, batch["generation"])
                for number, priority in held(one):
                    assert priority < 1000 or priority == 1000 + number


def test_what_did_not_move_takes_updates_of_batches_drawn_before(choice):
    buffer = PrioritizedReplayBuffer(10, eps=0.0)
    buffer.extend(data(0, 6))
    batch = buffer.sample(50)
    for capacity in (6, 10, 20):
        other = PrioritizedReplayBuffer(capacity)
        other.load_state_dict(buffer.state_dict())
        other.update_priority(batch["index"], batch["action"] + 5.0, batch["generation"])
        assert other.priority.tolist() == [5, 6, 7, 8, 9, 10]
        assert other.stats()["stale_updates"] == 0


def test_batches_drawn_after_a_move_are_updated(choice):
    buffer = PrioritizedReplayBuffer(7, eps=0.0)
    buffer.extend(data(0, 25))
    for capacity in (3, 50):
        other = PrioritizedReplayBuffer(capacity)
        other.load_state_dict(buffer.state_dict())
        batch = other.sample(200)
        other.update_priority(batch["index"], batch["action"] + 5.0, batch["generation"])
        assert held(other) == [(k, k + 5.0) for k in range(25 - min(capacity, 7), 25)]
        assert other.stats()["stale_updates"] == 0
        other.extend(data(25, 60))
        other.update_priority(batch["index"], batch["action"] + 0.0, batch["generation"])
        assert other.stats()["stale_updates"] == 200


@pytest.mark.parametrize("new", [3, 20, 64])
def test_each_of_many_buffers_moves_on_its_own(new, choice, tmp_path):
    buffers = PrioritizedReplayBuffer(10, num_buffers=S, eps=0.0)
    rings = [Ring(10, eps=0.0) for _ in range(S)]
    running = torch.tensor([[True] * 25, [True] * 4 + [False] * 21, [True] * 10 + [False] * 15])
    priority = torch.arange(1.0, 26.0).expand(S, -1)
    buffers.extend(numbered(0, 25), priority=priority, mask=running)
    before = buffers.sample(8)
    for s in range(S):
        n = int(running[s].sum())
        rings[s].extend([10_000 * s + k for k in range(n)], [k + 1.0 for k in range(n)])
    buffers.save(tmp_path / "x")
    moved = PrioritizedReplayBuffer.load(tmp_path / "x", capacity=new)
    rings = [ring.moved(new) for ring in rings]
    assert moved.write_count == 39
    for k in range(25, 28):
        assert [held(moved, s) for s in range(S)] == [ring.oldest_first() for ring in rings]
        moved.extend(numbered(k, 1), priority=torch.full((S, 1), 3.0))
        for s in range(S):
            rings[s].extend([10_000 * s + k], [3.0])
    inside = before["index"] < moved.lengths.unsqueeze(-1)
    error = 1000.0 + before["action"]
    moved.update_priority(before["index"], error, before["generation"], mask=inside)
    after = moved.sample(30)
    moved.update_priority(after["index"], 1000.0 + after["action"], after["generation"])
    seen = [item for s in range(S) for item in held(moved, s)]
    assert all(priority < 1000 or priority == 1000 + number for number, priority in seen)
    assert sum(priority >= 1000 for _, priority in seen) >= after["action"].unique().numel()


def test_ranks_are_exact_after_a_move_and_flags_move_along():
    buffer = PrioritizedReplayBuffer(6, prioritization="rank", sort_interval=100)
    buffer.extend(data(0, 9), priority=torch.tensor([1.0, 1, 1, 5, 2, 9, 3, 4, 7]))
    other = PrioritizedReplayBuffer(4, prioritization="rank", sort_interval=100)
    replayed = torch.tensor([True, False, False, False, False, True])
    other.load_state_dict(buffer.state_dict() | {"replayed": replayed})
    assert other.priority.tolist() == [9, 3, 4, 7]
    ranks = (other.mass.double() ** (-1 / 0.7)).round().tolist()
    assert ranks == [1, 4, 3, 2]
    assert other.replayed.tolist() == [True, True, False, False]
    assert other.diagnostics()["age/max"] == 3


def test_a_generator_on_another_kind_of_device_is_seeded_by_the_state():
    buffer = PrioritizedReplayBuffer(9, 4, generator=torch.Generator().manual_seed(1))
    buffer.extend(data(0, 9))
    state = buffer.state_dict()
    drawn = []
    for change in (0, 0, 1):
        other = PrioritizedReplayBuffer(9, 4, generator=torch.Generator())
        foreign = torch.arange(16, dtype=torch.uint8) + change  # as long as CUDA's
        other.load_state_dict({**state, "generator": foreign})
        drawn.append(other.sample(50)["index"].tolist())
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_state_goes_to_cuda_and_back(tmp_path):
    buffer = PrioritizedReplayBuffer(9, 4, generator=torch.Generator().manual_seed(1))
    buffer.extend(data(0, 14))
    buffer.update_priority(range(9), torch.rand(9))
    buffer.save(tmp_path / "x")
    there = PrioritizedReplayBuffer.load(tmp_path / "x", device="cuda")
    assert there.sample()["action"].device.type == "cuda"
    there.save(tmp_path / "x")
    back = PrioritizedReplayBuffer.load(tmp_path / "x", device="cpu")
    assert held(back) == held(buffer)
    assert torch.equal(back.mass, buffer.mass)

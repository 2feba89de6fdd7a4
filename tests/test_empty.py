"""Emptying a buffer: nothing is left to draw, and batches drawn before are stale."""

import pytest
import torch

from per_td import (
    ConfigurationError,
    EmptyBufferError,
    IndexRangeError,
    PrioritizedReplayBuffer,
    PriorityError,
    TransitionReplayBuffer,
    kernels,
)
from tests.support import processes
from tests.support.choices import CHOICES


@pytest.fixture(params=CHOICES)
def choice(request, monkeypatch) -> str:
    monkeypatch.setenv(kernels.VARIABLE, request.param)
    return request.param


@pytest.mark.parametrize("lead", [(), (2,)], ids=["one", "many"])
@pytest.mark.parametrize("written", [3, 10, 27])
@pytest.mark.parametrize("setting", ["buffer_max", "ever_max", "rank"])
def test_an_emptied_buffer_is_as_new_but_late_updates_are_stale(setting, written, lead, choice):
    if lead and setting == "rank":
        pytest.skip("ranks are kept for one buffer")
    settings = {"prioritization": "rank"} if setting == "rank" else {"new_priority": setting}
    buffer = PrioritizedReplayBuffer(10, 8, num_buffers=lead[0] if lead else None, **settings)
    buffer.extend(make(0, lead, written))
    batches = [buffer.sample()]
    for _ in range(2):
        index, generation = batches[-1]["index"], batches[-1]["generation"]
        buffer.update_priority(index, torch.full(index.shape, 50.0), generation)
        buffer.empty()
        buffer.check_valid()
        assert len(buffer) == 0
        assert not buffer.priority.any()
        with pytest.raises(EmptyBufferError):
            buffer.sample()
        stale = buffer.stats()["stale_updates"]
        for n in (0, 1, 8):  # late updates find no transition in their slots, or another one
            if n:
                buffer.extend(make(100, lead, n))
            for late in batches:
                buffer.update_priority(late["index"], late["priority_weight"], late["generation"])
            # the largest of before is forgotten
            assert (buffer.priority[..., : len(buffer)] == 1.0).all()
        assert buffer.stats()["stale_updates"] == stale + 3 * index.numel() * len(batches)
        batch = buffer.sample()
        assert (batch["id"] >= 100).all()
        batches.append(batch)
        buffer.check_valid()
    assert buffer.write_count == (lead[0] if lead else 1) * (written + 18)


@pytest.mark.parametrize("lead", [(), (2,)], ids=["one", "many"])
def test_late_updates_do_not_keep_others_of_their_batch_from_being_done(lead, choice):
    buffer = PrioritizedReplayBuffer(10, 8, num_buffers=lead[0] if lead else None, eps=0.0)
    buffer.extend(make(0, lead, 10))
    old = buffer.generation_of(torch.full((*lead, 1), 9))
    buffer.empty()
    buffer.extend(make(0, lead, 3))
    index = torch.tensor([9, 1, 2]).expand(*lead, 3)
    now = buffer.generation_of(index)
    td_error = torch.tensor([5.0, 6.0, 7.0]).expand(*lead, 3)
    generation = torch.cat([old, now[..., 1:]], -1)
    if lead:
        mask = torch.tensor([[True, True, True], [False, False, True]])
        buffer.update_priority(index, td_error, generation, mask=mask)
        assert buffer.priority[..., :3].tolist() == [[1, 6, 7], [1, 1, 7]]
    else:
        buffer.update_priority(index, td_error, generation)
        assert buffer.priority.tolist() == [1, 6, 7]
    assert buffer.stats()["stale_updates"] == 1
    with pytest.raises(IndexRangeError):  # nobody has drawn it since
        buffer.update_priority(index, td_error, now.clamp(min=int(now.max())))
    with pytest.raises(PriorityError, match="generation: expected shape"):
        buffer.update_priority(index, td_error, generation[..., :1])


def test_updates_of_slots_that_a_smaller_capacity_does_not_have_are_stale(choice):
    source = PrioritizedReplayBuffer(10, 64)
    source.extend(processes.transitions(range(15)))
    late = source.sample()
    buffer = PrioritizedReplayBuffer(5, 8)
    buffer.load_state_dict(source.state_dict())
    before = buffer.priority
    buffer.update_priority(late["index"], torch.full((64,), 9.0), late["generation"])
    assert buffer.stats()["stale_updates"] == 64
    assert torch.equal(buffer.priority, before)


@pytest.mark.parametrize("own", [3, 33])
def test_updates_of_a_buffer_that_loads_into_fewer_slots_are_stale(own):
    """Those of batches that the buffer itself drew, however often it had wrapped."""
    source = PrioritizedReplayBuffer(10, 8)
    source.extend(processes.transitions(range(15)))
    buffer = PrioritizedReplayBuffer(5, 8)
    buffer.extend(processes.transitions(range(own)))
    late = buffer.sample()
    buffer.load_state_dict(source.state_dict())
    buffer.update_priority(late["index"], torch.full((8,), 9.0), late["generation"])
    assert buffer.stats()["stale_updates"] == 8


def make(first: int, lead: tuple[int, ...], n: int):
    ids = torch.arange(first, first + n).expand(*lead, n)
    return processes.transitions(ids.clone())


def test_batches_drawn_ahead_are_dropped():
    buffer = PrioritizedReplayBuffer(10, 8, prefetch=2)
    buffer.extend(processes.transitions(range(10)))
    buffer.sample()
    buffer.empty()
    with pytest.raises(EmptyBufferError):
        buffer.sample()
    buffer.extend(processes.transitions(range(50, 60)))
    assert (buffer.sample()["id"] >= 50).all()
    buffer.close()


def test_an_emptied_buffer_is_saved_and_loaded(tmp_path):
    buffer = PrioritizedReplayBuffer(10, 8)
    buffer.extend(processes.transitions(range(27)))
    old = buffer.sample()
    buffer.empty()
    buffer.extend(processes.transitions(range(10)))
    buffer.save(tmp_path / "buffer.pt")
    loaded = PrioritizedReplayBuffer.load(tmp_path / "buffer.pt")
    loaded.update_priority(old["index"], torch.ones(8), old["generation"])
    assert loaded.stats()["stale_updates"] == 8
    assert loaded.write_count == 37


def test_the_courses_buffer_is_emptied_too():
    buffer = TransitionReplayBuffer(4)
    for i in range(6):
        buffer.push([float(i)], 0, 1.0, [0.0], False)
    buffer.sample(3)
    buffer.empty()
    assert len(buffer) == 0
    for i in range(4):
        buffer.push([100.0 + i], 0, 1.0, [0.0], False)
    assert (buffer.sample(20)[0] >= 100).all()


def test_a_shared_buffer_says_why_it_cannot_be_emptied():
    with pytest.raises(ConfigurationError, match="empty: expected a buffer that is not shared"):
        processes.shared(10).empty()

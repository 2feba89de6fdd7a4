"""Sweeps: every transition once, with what an update of its priority needs."""

import pytest
import torch
from tensordict import TensorDict

from per_td import ConfigurationError, PrioritizedReplayBuffer, SchemaError
from tests.support.oracle import S, data, numbered
from tests.support.processes import shared, transitions


@pytest.mark.parametrize("layout", ["columns", "records"])
@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
@pytest.mark.parametrize("written", [0, 1, 5, 7, 18])
def test_a_sweep_brings_every_transition_once_in_the_order_of_slots(
    written, batch_size, layout, device, choice
):
    buffer = PrioritizedReplayBuffer(7, device=device, layout=layout)
    if written:
        buffer.extend(data(0, written, device), torch.zeros(written, device=device))
    batches = list(buffer.sweep(batch_size))
    held = min(7, written)
    assert [len(batch) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    if not written:
        assert batches == []
        return
    swept = torch.cat(batches)
    assert set(swept.keys()) == {"observation", "action", "next", "index", "generation"}
    assert swept["index"].tolist() == list(range(held))
    assert torch.equal(swept["action"], buffer.transitions["action"])
    assert torch.equal(swept["generation"], buffer.generation_of(swept["index"]))
    assert not buffer.replayed.any()


def test_priorities_computed_anew_in_a_sweep_are_those_of_the_transitions(device, choice):
    buffer = PrioritizedReplayBuffer(50, eps=0.0, device=device)
    buffer.extend(data(0, 70, device))
    for batch in buffer.sweep(8):
        buffer.update_priority(batch["index"], batch["action"].float(), batch["generation"])
    assert torch.equal(buffer.priority, buffer.transitions["action"].float())
    buffer.check_valid()


def test_a_sweep_takes_the_slots_filled_when_it_starts_and_generations_tell_what_is_new(choice):
    buffer = PrioritizedReplayBuffer(10)
    buffer.extend(data(0, 6))
    sweep = buffer.sweep(4)
    buffer.extend(data(6, 1))  # after the sweep was asked for
    first = next(sweep)
    buffer.extend(data(7, 8))  # 0 to 4 are other ones now
    rest = list(sweep)
    assert torch.cat([first, *rest])["index"].tolist() == list(range(6))
    buffer.update_priority(first["index"], [5.0] * 4, first["generation"])
    assert buffer.stats()["stale_updates"] == 4
    assert rest[0]["action"].tolist() == [14, 5]
    buffer.update_priority(rest[0]["index"], [5.0] * 2, rest[0]["generation"])
    assert buffer.stats()["stale_updates"] == 4


def test_a_sweep_leaves_out_transitions_whose_frames_are_gone(choice):
    buffer = PrioritizedReplayBuffer(40, frames={"pixels": 2}, num_frames=30)
    step = torch.arange(60.0)
    stack = 10 * step.view(-1, 1, 1) + torch.arange(2.0).view(1, 2, 1)  # no two share a frame
    for part in step.long().split(5):
        pixels = stack[part]
        buffer.extend({"step": part, "pixels": pixels, "next": {"pixels": pixels + 5}})
    batches = list(buffer.sweep(7))
    assert all(0 < len(batch) <= 7 for batch in batches)
    swept = torch.cat(batches)
    assert buffer.stats()["retired"] > 0
    assert swept["index"].tolist() == buffer.priority.nonzero().flatten().tolist()
    assert torch.equal(swept["pixels"], stack[swept["step"]])
    assert torch.equal(swept["next", "pixels"], stack[swept["step"]] + 5)


@pytest.mark.parametrize("batch_size", [1, 4, 50])
def test_a_sweep_of_many_buffers_says_what_is_filled(batch_size, device, choice):
    buffers = PrioritizedReplayBuffer(10, num_buffers=S, device=device, eps=0.0)
    mask = torch.arange(13) < torch.tensor([[0], [4], [13]])
    buffers.extend(numbered(0, 13, device), mask=mask.to(device))
    buffers.extend(numbered(20, 1, device), mask=torch.zeros(S, 1, dtype=torch.bool, device=device))
    swept = list(buffers.sweep(batch_size))
    assert [batch.shape[1] for batch in swept[:-1]] == [batch_size] * (len(swept) - 1)
    together = torch.cat(swept, 1)
    filled = together["filled"].cpu()
    assert filled.dtype == torch.bool
    assert filled.sum(1).tolist() == [0, 4, 10]
    assert together["index"].tolist() == [list(range(10))] * S
    for batch in swept:
        error = torch.where(batch["filled"], batch["action"].float(), torch.nan)
        buffers.update_priority(batch["index"], error, batch["generation"], batch["filled"])
    held = buffers.transitions["action"].float()
    assert torch.equal(buffers.priority[together["filled"]], held[together["filled"]])
    assert buffers.stats()["stale_updates"] == 0
    assert buffers.stats()["refused_priorities"] == 0
    buffers.check_valid()


@pytest.mark.parametrize("wrong", [0, -1, 2.5, None, "x", True])
def test_a_wrong_batch_size_is_named_when_the_sweep_is_asked_for(wrong):
    buffer = PrioritizedReplayBuffer(10, 4)
    with pytest.raises(ConfigurationError, match="batch_size: expected"):
        buffer.sweep(wrong)


def test_many_buffers_with_a_key_filled_of_their_own_refuse_a_sweep():
    buffers = PrioritizedReplayBuffer(10, num_buffers=2)
    buffers.extend(TensorDict({"filled": torch.ones(2, 3)}, [2, 3]))
    with pytest.raises(SchemaError, match="'filled'"):
        buffers.sweep(2)
    one = PrioritizedReplayBuffer(10)
    one.extend({"filled": torch.arange(3)})
    assert next(one.sweep(3))["filled"].tolist() == [0, 1, 2]


def test_a_sweep_needs_no_gradient_and_leaves_the_mode_as_it_is():
    buffer = PrioritizedReplayBuffer(10)
    buffer.extend(data(0, 6))
    for batch in buffer.sweep(4):
        assert torch.is_grad_enabled()
        assert not batch["observation"].requires_grad
    with torch.inference_mode():
        assert sum(map(len, buffer.sweep(4))) == 6


@pytest.mark.parametrize("storage", ["memory", "memmap"])
def test_a_sweep_reads_every_storage(storage, tmp_path):
    folder = {"folder": tmp_path} if storage == "memmap" else {}
    buffer = PrioritizedReplayBuffer(10, storage=storage, **folder)
    buffer.extend(data(0, 13))
    assert sorted(torch.cat(list(buffer.sweep(3)))["action"].tolist()) == list(range(3, 13))


def test_a_sweep_after_a_load_into_another_capacity_brings_generations_that_hold():
    buffer, other = PrioritizedReplayBuffer(10), PrioritizedReplayBuffer(6, eps=0.0)
    buffer.extend(data(0, 13))
    other.load_state_dict(buffer.state_dict())
    for batch in other.sweep(4):
        other.update_priority(batch["index"], batch["action"], batch["generation"])
    assert other.stats()["stale_updates"] == 0
    torch.testing.assert_close(other.priority, other.transitions["action"].float())


@pytest.mark.parametrize("settings", [{"threads": True}, {"prefetch": 2, "batch_size": 3}])
def test_threads_sweep_too(settings):
    buffer = PrioritizedReplayBuffer(10, **settings)
    buffer.extend(data(0, 13))
    assert sum(map(len, buffer.sweep(4))) == 10
    buffer.close()


def test_a_shared_buffer_is_swept_with_generations_that_hold():
    buffer = shared(20, batch_size=4)
    buffer.extend(transitions(range(27)))
    for batch in buffer.sweep(8):
        buffer.set_priority(batch["index"], torch.ones(len(batch)), batch["generation"])
    assert (buffer.priority == 1).all()
    assert buffer.stats()["stale_updates"] == 0

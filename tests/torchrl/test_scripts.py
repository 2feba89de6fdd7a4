"""Buffers as TorchRL's scripts make them: the short way and TorchRL's way give the same."""

import itertools

import pytest
import torch
from tensordict import TensorDict, tensorclass
from torchrl.data import LazyMemmapStorage, LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs.transforms import (
    Compose,
    DeviceCastTransform,
    DTypeCastTransform,
    MultiStepTransform,
    RewardScaling,
)

from per_td.torchrl.buffer import _ENTRIES as ENTRIES
from tests.support.parameters import slow_but
from tests.support.replay import data, learn, make, same


def with_reward(n, start=0):
    new = data(n, start)
    new["next", "reward"] = torch.rand(n, 1, generator=torch.Generator().manual_seed(start))
    new["next", "terminated"] = new["next", "done"].clone()
    return new


STORAGES = [LazyMemmapStorage, LazyTensorStorage]
TRANSFORMS = {
    "none": lambda: None,
    "to": lambda: lambda td: td.to("cpu"),
    "adds": lambda: lambda td: td.set("keys", torch.full(td.shape, len(td.keys()))),
    "selects": lambda: lambda td: td.select("x", "obs"),
    "unsqueezes": lambda: lambda td: td.unsqueeze(-1),
    "locks": lambda: lambda td: td.lock_(),
    "copies": lambda: lambda td: TensorDict({"x": td["x"] * 2}, td.batch_size),
    "names": lambda: lambda td: td.refine_names("elements"),
    "device": lambda: DeviceCastTransform("cpu"),
    "rewards": lambda: RewardScaling(1.0, 2.0, in_keys=[("next", "reward")]),
    "dtypes": lambda: DTypeCastTransform(
        torch.float32, torch.float64, in_keys=["obs"], in_keys_inv=["obs"]
    ),
    "steps": lambda: MultiStepTransform(3, 0.9),
    "two": lambda: Compose(DeviceCastTransform("cpu"), MultiStepTransform(2, 0.5)),
}


def pair(**settings):
    """One that may go the short way, and one that may not; threads draw one after the other."""
    transform = settings.pop("transform", TRANSFORMS["none"])
    buffers = []
    for more in ({}, {"collate_fn": lambda batch: batch}):
        generator = torch.Generator().manual_seed(7)
        made = make(transform=transform(), generator=generator, **settings, **more)
        if made._prefetch:
            made._prefetch_executor._max_workers = 1
        buffers.append(made)
    return buffers


@pytest.mark.parametrize("prefetch", [None, 3])
@pytest.mark.parametrize(
    "storage", slow_but([LazyMemmapStorage], [LazyMemmapStorage, LazyTensorStorage])
)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_both_ways_agree(transform, storage, prefetch):
    both = pair(transform=TRANSFORMS[transform], storage=storage, prefetch=prefetch)
    for step in range(12):
        results = []
        for buffer in both:
            new = with_reward(1 if step % 2 else 7, 7 * step)
            keys = set(new.keys(True))
            written = buffer.extend(new)
            assert set(new.keys(True)) == keys
            drawn, info = buffer.sample(return_info=True)
            buffer.synchronize()
            results.append((written, drawn, TensorDict(info)))
            learned = drawn.unlock_()
            learned["td_error"] = learned["index"].reshape(drawn.shape).float() + step
            if prefetch or step % 3:
                buffer.update_tensordict_priority(learned)
        (index, drawn, info), (index_too, drawn_too, info_too) = results
        assert torch.equal(index, index_too)
        same(drawn, drawn_too)
        same(info, info_too)
        short, long = both
        assert torch.equal(short.sampler.priority, long.sampler.priority)
        assert torch.equal(short.writer._generation, long.writer._generation)
        assert short.stats() == long.stats()
        same(short.storage[:], long.storage[:])
    assert short._cache.of(short, marks=True) is not None
    assert long._cache.of(long, marks=True) is None
    for buffer in both:
        buffer.shutdown()


@pytest.mark.parametrize("prefetch", [None, 3])
def test_elements_held_back_by_a_transform_are_not_written_yet(prefetch):
    for buffer in pair(transform=TRANSFORMS["steps"], prefetch=prefetch):
        index = buffer.extend(with_reward(2))
        assert index.shape == (0, 1)
        assert len(buffer) == 0
        assert buffer.extend(with_reward(4, 2)).tolist() == [0, 1, 2]
        assert buffer.sample()["steps_to_next_obs"].max() <= 3


@pytest.mark.parametrize("prefetch", [None, 2])
def test_an_error_of_a_transform_comes_out_of_sample(prefetch):
    calls = itertools.count()

    def fail_once(batch):
        if next(calls) == 1:
            raise KeyError("no such entry")
        return batch

    buffer = make(transform=fail_once, prefetch=prefetch)
    if prefetch:
        buffer._prefetch_executor._max_workers = 1
    buffer.extend(data(20))
    buffer.sample()
    with pytest.raises(KeyError, match="no such entry"):
        buffer.sample()
    assert buffer.sample().shape == (32,)


def test_an_emptied_buffer_forgets_the_batches_drawn_ahead():
    buffer = make(transform=lambda batch: batch, prefetch=3)
    buffer.extend(data(20))
    buffer.sample()
    buffer.empty()
    buffer.extend(data(5, 100))
    assert (buffer.sample()["x"] >= 100).all()


def test_an_update_of_a_batch_drawn_ahead_of_an_overwrite_is_stale():
    buffer = make(transform=lambda batch: batch, prefetch=3)
    buffer.extend(data(20))
    buffer.sample()
    buffer.synchronize()
    buffer.extend(data(20, 100))
    old = buffer.sample()
    assert (old["x"] < 100).all()
    learn(buffer, old)
    assert buffer.stats()["stale_updates"] == 32
    assert (buffer.sampler.priority == 1).all()


def test_batches_drawn_ahead_by_torchrls_buffer_are_taken_over_whole():
    ours = make(prefetch=2)
    ours.extend(data(20))
    ours.sample()
    state = ours.state_dict()
    for drawn, info in state["_prefetch_state"]["queue"]:
        for key in ("priority_weight", "index_generation"):
            assert key in info
            drawn[ENTRIES].pop(key)  # as TorchRL saves them
    other = make(prefetch=2)
    other.extend(data(1))
    other.load_state_dict(state)
    learn(other, other.sample())
    assert other.stats()["stale_updates"] == 0


def test_entries_can_be_left_out_of_batches():
    buffer = make(transform=lambda batch: batch)
    buffer.extend(data(20))
    with pytest.warns(UserWarning, match="include_info"):
        batch = buffer.sample(include_info=False)
    assert "priority_weight" not in batch


def test_a_transform_that_makes_a_tensorclass_of_a_batch_gets_it_as_torchrl_does():
    @tensorclass
    class Some:
        x: torch.Tensor

    def transform(batch):
        return Some(batch["x"], batch_size=batch.batch_size)

    theirs = TensorDictReplayBuffer(
        storage=LazyTensorStorage(20), batch_size=32, transform=transform
    )
    for buffer in (make(transform=transform), make(transform=transform, prefetch=2), theirs):
        buffer.extend(data(20))
        assert type(buffer.sample()) is Some


def test_pinned_batches_are_pinned_with_their_entries(monkeypatch):
    pinned = []

    def pin(tensor, *_, **__):
        pinned.append(tensor.shape)
        return tensor.clone()

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(TensorDict, "pin_memory", lambda td, *_, **__: td.apply(pin))
    for prefetch in (None, 2):
        buffer = make(pin_memory=True, prefetch=prefetch)
        buffer.extend(data(20))
        pinned.clear()
        batch = buffer.sample()
        buffer.synchronize()
        assert len(pinned) >= len(batch.keys(True, True))
        assert torch.equal(batch["x"], batch["index"])

"""Other ways to draw and to set priorities, in TorchRL's buffers; see tests/test_selection.py."""

import pickle

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import LazyMemmapStorage, LazyTensorStorage, TensorDictReplayBuffer

from per_td import CheckpointError, ConfigurationError, IndexRangeError, PriorityError
from per_td.torchrl import PrioritizedSampler, PrioritizedSliceSampler
from tests.support.replay import data, learn, make

N, LAST = 20, 6
WAYS = {
    "short": {},
    "long": {"collate_fn": lambda batch: batch},
    "prefetch": {"prefetch": 2},
    "transform": {"transform": lambda batch: batch},
}


def filled(way="short", **settings):
    """A full buffer, whose newest element is in slot `LAST`; slot 3 is never drawn."""
    buffer = make(**{"alpha": 1.0, "batch_size": 4000, "eps": 0.0, **WAYS[way], **settings})
    buffer.extend(data(N))
    buffer.extend(data(LAST + 1, 100))
    buffer.set_priority(torch.arange(N), priorities())
    torch.manual_seed(0)
    return buffer


def priorities():
    priority = torch.arange(1.0, N + 1)
    priority[3] = 0
    return priority


def age():
    return (LAST - torch.arange(N)) % N


def draws_follow(batch, probability):
    """Chi-square at a probability of 1e-6, and exact weights."""
    index = batch["index"]
    count = torch.bincount(index, minlength=N).double()
    want = len(index) * probability
    assert not count[probability == 0].any()
    chi2 = ((count - want) ** 2 / want)[probability > 0].sum()
    degrees = int((probability > 0).sum()) - 1
    assert chi2 < degrees + 5 * (2 * degrees) ** 0.5 + 15
    least = probability[probability > 0].min()
    weight = (probability[index] / least) ** -0.5  # beta of `make`
    torch.testing.assert_close(batch["priority_weight"].double(), weight, rtol=1e-6, atol=0)


def of(masses):
    return masses.double() / masses.double().sum()


@pytest.mark.parametrize("way", WAYS)
def test_draws_and_weights_of_the_drop_in_are_those_asked_for(way):
    buffer, mass = filled(way), priorities()
    draws_follow(buffer.sample(by="uniform"), of(mass > 0))
    draws_follow(buffer.sample(by="inverse"), of(torch.where(mass > 0, 1 / mass, 0)))
    recent = torch.where(age() < 9, mass, 0)
    draws_follow(buffer.sample(newest=9), of(recent))
    draws_follow(buffer.sample(newest=9, by="uniform"), of(recent > 0))
    buffer.sampler.uniform_mix = 0.25
    buffer.sample(by="uniform")
    for _ in range(buffer._prefetch_cap):
        buffer.sample()  # drawn before
    draws_follow(buffer.sample(), 0.75 * of(mass) + 0.25 * of(mass > 0))
    assert buffer.sampler.by == "priority"


def test_draws_and_weights_in_torchrls_buffer_are_those_of_the_samplers_attributes():
    sampler = PrioritizedSampler(N, 1.0, 0.5, eps=0.0, uniform_mix=0.5)
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(N), sampler=sampler, batch_size=4000)
    buffer.extend(data(N))
    buffer.extend(data(LAST + 1, 100))
    mass = priorities()
    sampler.set_priority(torch.arange(N), mass)
    torch.manual_seed(0)
    draws_follow(buffer.sample(), 0.5 * of(mass) + 0.5 * of(mass > 0))
    sampler.uniform_mix = 0.0
    sampler.by = "inverse"
    draws_follow(buffer.sample(), of(torch.where(mass > 0, 1 / mass, 0)))
    sampler.by, sampler.newest = "priority", 5
    draws_follow(buffer.sample(), of(torch.where(age() < 5, mass, 0)))
    sampler.newest = None
    draws_follow(buffer.sample(), of(mass))


@pytest.mark.parametrize("storage", [LazyTensorStorage, LazyMemmapStorage])
@pytest.mark.parametrize("way", ["short", "long"])
def test_the_latest_elements_are_the_last_of_every_batch(way, storage):
    buffer = filled(way, latest=3, storage=storage, batch_size=50)
    batch = buffer.sample()
    assert batch["index"][-3:].tolist() == [LAST - 2, LAST - 1, LAST]
    p, newest = of(priorities()), (age() < 3).double()
    p = (47 * p + newest) / 50
    weight = (p[batch["index"]] / (47 / 50 * of(priorities())[0])) ** -0.5
    torch.testing.assert_close(batch["priority_weight"].double(), weight, rtol=1e-6, atol=0)
    buffer.add(data(1, 200)[0])
    assert buffer.sample()["x"][-1] == 200
    buffer.sampler.latest = 50
    with pytest.raises(ConfigurationError, match="latest=50"):
        buffer.sample()


@pytest.mark.parametrize("way", WAYS)
def test_draws_are_counted_until_an_element_is_overwritten(way):
    buffer = filled(way, track_draws=True)
    expected = torch.zeros(N, dtype=torch.int64)
    for _ in range(3):
        batch = buffer.sample(by="uniform")
        expected += torch.bincount(batch["index"], minlength=N)
        assert batch["draw_count"].dtype == torch.int32
        assert torch.equal(batch["draw_count"].long(), expected[batch["index"]])
    assert torch.equal(buffer.sampler.draw_count.long(), expected)
    state = buffer.state_dict()
    buffer.extend(data(2, 300))
    expected[LAST + 1 : LAST + 3] = 0
    assert torch.equal(buffer.sampler.draw_count.long(), expected)
    buffer.empty()
    assert not buffer.sampler.draw_count.any()
    buffer.load_state_dict(state)
    assert buffer.sampler.draw_count.any()
    state["_sampler"]["draw_count"] = torch.zeros(3, dtype=torch.int32)
    with pytest.raises(CheckpointError, match="draw_count"):
        buffer.load_state_dict(state)


def test_priorities_are_set_as_they_are():
    buffer = make(td_error_unit="squared", eps=0.5, priority_clip=(1.0, 2.0))
    buffer.extend(data(N))
    batch = buffer.sample()
    buffer.set_priority(batch["index"], torch.full((32,), 9.0), batch["index_generation"])
    drawn = batch["index"].unique()
    assert (buffer.sampler.priority[drawn] == 9).all()
    buffer.extend(data(1, 50))
    stale = int((batch["index"] == 0).sum())
    buffer.set_priority(batch["index"], torch.full((32,), 3.0), batch["index_generation"])
    assert buffer.stats()["stale_updates"] == stale
    before = buffer.sampler.priority
    for priority, index, error in (
        (-1.0, 0, PriorityError),
        (float("nan"), 0, PriorityError),
        (1.0, 99, IndexRangeError),
    ):
        with pytest.raises(error):
            buffer.set_priority(torch.tensor([1, index]), torch.tensor([5.0, priority]))
    assert torch.equal(buffer.sampler.priority, before)
    buffer.update_priority(torch.tensor([1, 2]), torch.tensor([100.0, 0.01]))
    assert buffer.sampler.priority[1:3].tolist() == [2.0, 1.0]


def test_priorities_take_one_generation_for_each_index():
    buffer = filled()
    index, generation = torch.arange(6), torch.zeros(6, dtype=torch.int64)
    before = buffer.sampler.priority
    for wrong in (generation[:1], generation[:3], torch.zeros(7, dtype=torch.int64)):
        with pytest.raises(IndexRangeError, match=rf"for each of 6 indices, got {len(wrong)}"):
            buffer.set_priority(index, torch.full((6,), 9.0), wrong)
    with pytest.raises(IndexRangeError, match=r"for each of 6 indices, got 5"):
        buffer.set_priority(index.unsqueeze(-1), torch.full((6,), 9.0), generation[:5])
    assert torch.equal(buffer.sampler.priority, before)
    assert buffer.stats()["stale_updates"] == 0
    current = torch.ones(6, dtype=torch.int64)  # slots 0 to 6 have been written twice
    buffer.set_priority(index.unsqueeze(-1), torch.full((6,), 9.0), current)
    assert (buffer.sampler.priority[:6] == 9).all()
    buffer.set_priority(7, 5.0, 0)
    assert buffer.sampler.priority[7] == 5
    assert buffer.stats()["stale_updates"] == 0


@pytest.mark.parametrize("way", ["short", "long"])
def test_updates_can_decay_and_average(way):
    buffer = filled(way)
    buffer.update_priority(torch.tensor([9, 10]), torch.tensor([1.0, 50.0]), mode="max", rate=0.5)
    assert buffer.sampler.priority[9:11].tolist() == [5.0, 50.0]
    buffer.update_priority(torch.tensor([9]), torch.tensor([1.0]), mode="mean", rate=0.25)
    assert buffer.sampler.priority[9] == 4
    batch = buffer.sample()
    batch["td_error"] = torch.zeros(4000)
    before = buffer.sampler.priority
    buffer.update_tensordict_priority(batch, mode="max", rate=0.5)
    expected = before.clone()
    expected[batch["index"]] = before[batch["index"]] / 2
    assert torch.equal(buffer.sampler.priority, expected)
    with pytest.raises(ConfigurationError, match="rate"):
        buffer.update_priority(0, 1.0, rate=0.5)
    with pytest.raises(ConfigurationError, match="mode"):
        buffer.update_priority(0, 1.0, mode="median")
    buffer.sampler.check_valid()


@pytest.mark.parametrize("name", ["by", "newest", "latest", "uniform_mix"])
def test_slices_are_drawn_by_priority_alone(name):
    sampler = PrioritizedSliceSampler(N, 1.0, 0.5, slice_len=4)
    with pytest.raises(ConfigurationError, match=name):
        setattr(sampler, name, {"by": "uniform"}.get(name, 1))


@pytest.mark.parametrize("how", [{"by": "uniform"}, {"by": "inverse"}, {"newest": 5}])
def test_a_buffer_of_slices_refuses_other_ways_to_draw(how):
    sampler = PrioritizedSliceSampler(N, 0.7, 0.5, slice_len=2, end_key=("next", "done"))
    buffer = make(sampler=sampler, batch_size=4)
    buffer.extend(data(N))
    with pytest.raises(ConfigurationError, match=f"{next(iter(how))}: expected slices"):
        buffer.sample(**how)
    assert len(buffer.sample()) == 4


def test_the_order_of_a_storage_of_several_dimensions_is_not_known():
    buffer = make(storage=lambda: LazyTensorStorage(N, ndim=2), latest=1)
    buffer.extend(data(N).reshape(4, 5))
    with pytest.raises(ConfigurationError, match="several dimensions"):
        buffer.sample()
    with pytest.raises(ConfigurationError, match="uniform_mix"):
        make(draw="without_replacement", uniform_mix=0.5)


def test_settings_of_the_sampler_are_not_set_on_the_buffer():
    buffer = filled()
    with pytest.raises(ConfigurationError, match=r"sampler\.latest"):
        buffer.latest = 3


def test_a_copy_draws_in_the_same_way():
    buffer = filled(latest=2, uniform_mix=0.5, track_draws=True)
    sampler = pickle.loads(pickle.dumps(buffer.sampler))
    assert (sampler.latest, sampler.uniform_mix, sampler.track_draws) == (2, 0.5, True)
    plain = pickle.loads(pickle.dumps(filled().sampler))
    storage = LazyTensorStorage(N)
    storage.set(torch.arange(N), data(N))
    drawn = []
    for one in (plain, filled().sampler):
        torch.manual_seed(3)
        drawn.append(one.sample(storage, 8)[0])
    assert torch.equal(*drawn)


def test_learning_goes_on_after_the_sampler_takes_up_another_size():
    sampler = PrioritizedSampler(5, 0.7, 0.5, uniform_mix=0.5, track_draws=True)
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(N), sampler=sampler, batch_size=8)
    buffer.extend(data(N))
    batch = buffer.sample()
    learn(buffer, batch)
    assert isinstance(batch, TensorDict)
    assert sampler.draw_count.shape == (N,)
    sampler.check_valid()

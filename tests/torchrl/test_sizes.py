"""Parts of different sizes, wherever they meet: none of them is read or written past its end."""

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import (
    LazyTensorStorage,
    ListStorage,
    TensorDictReplayBuffer,
    TensorDictRoundRobinWriter,
)

from per_td import CheckpointError, ConfigurationError, IndexRangeError, SchemaError
from per_td.torchrl import PrioritizedSampler, TensorDictPrioritizedReplayBuffer
from per_td.torchrl.columns import Columns
from per_td.torchrl.privates import ColumnCache
from tests.support.processes import handed_over
from tests.support.replay import ALPHA, BETA, data, learn, make


def goes_the_short_way(buffer):
    return ColumnCache().of(buffer, marks=True) is not None


@pytest.mark.parametrize("capacity", [5, 199, 201, 5000])
@pytest.mark.parametrize("way", [None, lambda batch: batch])
def test_a_sampler_takes_up_the_size_of_the_drop_ins_storage(capacity, way):
    sampler = PrioritizedSampler(capacity, ALPHA, BETA)
    buffer = make(200, sampler=sampler, collate_fn=way, batch_size=2000)
    assert sampler.priority.shape == (200,)
    buffer.extend(data(3))
    for start in range(3, 423, 30):
        buffer.extend(data(30, start))
        learn(buffer, buffer.sample())
    assert goes_the_short_way(buffer) == (way is None)
    assert set(buffer.sample()["x"].tolist()) == set(range(223, 423))
    assert sampler.total_mass == pytest.approx(sampler.mass.sum().item())


@pytest.mark.parametrize("capacity", [5, 50])
def test_a_sampler_takes_up_the_size_of_the_storage_in_torchrls_buffer(capacity):
    sampler = PrioritizedSampler(capacity, ALPHA, BETA)
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(20), sampler=sampler, batch_size=500)
    buffer.extend(data(8))
    assert sampler.priority.tolist() == [1.0] * 8 + [0.0] * 12
    learn(buffer, buffer.sample())
    buffer.extend(data(20, 8))
    assert set(buffer.sample()["x"].tolist()) == set(range(8, 28))


def test_a_sampler_keeps_what_it_knows_when_it_takes_up_a_size():
    sampler = PrioritizedSampler(5, ALPHA, BETA)
    sampler.update_priority(torch.arange(5), torch.arange(1.0, 6.0))
    storage = LazyTensorStorage(8)
    storage.set(torch.arange(5), data(5))
    sampler.mark_update(torch.tensor([0]), storage=storage)
    assert sampler.priority.tolist() == [5, 2, 3, 4, 5, 0, 0, 0]


def test_a_storage_without_a_limit_is_refused_when_it_meets_a_sampler():
    sampler, message = PrioritizedSampler(5, ALPHA, BETA), "storage: expected a limited size"
    for given in (sampler, None):
        with pytest.raises(ConfigurationError, match=rf"{message}.*ListStorage of max_size=9"):
            TensorDictPrioritizedReplayBuffer(
                alpha=ALPHA, beta=BETA, storage=ListStorage(), sampler=given
            )
    buffer = TensorDictReplayBuffer(storage=ListStorage(), sampler=sampler)
    with pytest.raises(ConfigurationError, match=message):
        buffer.extend(data(3))


def test_a_sampler_that_is_set_later_takes_up_the_size_too():
    buffer = make(batch_size=200)
    buffer.extend(data(20))
    buffer.set_sampler(PrioritizedSampler(5, 1.0, 1.0))
    buffer.extend(data(3, 20))
    assert goes_the_short_way(buffer)
    assert set(buffer.sample()["x"].tolist()) == set(range(3, 23))


def test_a_sampler_that_is_shared_does_not_take_up_a_size():
    sampler = PrioritizedSampler(5, ALPHA, BETA)
    handed_over(sampler)
    buffer = make()
    before = buffer.sampler
    with pytest.raises(ConfigurationError, match=r"max_capacity: expected 20.*got 5"):
        buffer.set_sampler(sampler)
    assert buffer.sampler is before
    assert sampler.priority.shape == (5,)


def test_a_storage_whose_size_is_set_is_not_written_past_its_end():
    buffer = make()
    buffer.extend(data(20))
    assert goes_the_short_way(buffer)
    buffer.sample()
    buffer.storage.max_size = 1000
    assert buffer._cache.of(buffer, marks=True) is None


def test_a_writer_given_to_another_buffer_is_not_used_past_the_first_ones_end():
    first, second = make(10), make(1000)
    first.extend(data(10))
    second.extend(data(500))
    second.set_writer(first.writer)
    assert not goes_the_short_way(first)
    second.extend(data(30))
    assert first.writer is second.writer
    assert first.writer._generation.shape == (1000,)
    batch = first.sample()
    batch["td_error"] = torch.ones(32)
    batch["index_generation"] = second.writer.generations_of(batch["index"])
    first.update_tensordict_priority(batch)


@pytest.mark.parametrize(
    "generation",
    [
        torch.zeros(3, dtype=torch.int64),
        torch.zeros(0, dtype=torch.int64),
        torch.zeros(50, dtype=torch.int64),
        torch.zeros(20, dtype=torch.int32),
    ],
    ids=["short", "none", "long", "int32"],
)
@pytest.mark.parametrize("way", [None, lambda batch: batch])
def test_generations_of_a_state_are_brought_to_the_storages_size(generation, way):
    buffer = make(collate_fn=way)
    buffer.extend(data(20))
    state = {"_cursor": 0, "_write_count": 20, "_generation": generation}
    buffer.writer.load_state_dict(state)
    now = buffer.writer._generation
    assert (now.dtype, now.shape, now.is_contiguous()) == (torch.int64, (20,), True)
    buffer.extend(data(15, 20))
    known = min(len(generation), 20)
    assert buffer.writer._generation.tolist() == [
        (0 if slot < known else -1) + (slot < 15) for slot in range(20)
    ]
    learn(buffer, buffer.sample())


def test_generations_that_a_storage_brings_along_are_brought_to_its_size():
    """TorchRL lets those of large storages grow with what is written."""
    storage = LazyTensorStorage(2**21)
    theirs = TensorDictReplayBuffer(
        storage=storage, writer=TensorDictRoundRobinWriter(track_generations=True)
    )
    theirs.extend(data(2000))
    assert len(theirs.writer._generation) < 2**21
    buffer = make(storage=lambda: storage)
    assert buffer.writer._generation.shape == (2**21,)
    assert buffer.writer._generation[:2000].tolist() == [0] * 2000
    for start in range(0, 4000, 1000):
        index = buffer.extend(data(1000, start))
    assert index.tolist() == list(range(3000, 4000))
    assert buffer.writer.generations_of(torch.tensor([0, 1999, 3999, 4000])).tolist() == [
        1,
        1,
        0,
        -1,
    ]
    assert goes_the_short_way(buffer)
    theirs.extend(data(10))
    assert buffer.writer.generations_of(torch.tensor([2000, 2010])).tolist() == [1, 0]


def test_a_cursor_beyond_the_storage_is_brought_back():
    buffer = make()
    buffer.extend(data(20))
    buffer.writer.load_state_dict({"_cursor": 10**9 + 7, "_write_count": 20})
    assert buffer.extend(data(5)).tolist() == [7, 8, 9, 10, 11]


def test_generations_are_read_one_after_the_other_whatever_the_columns_do():
    block = torch.arange(40).reshape(10, 4)
    stored = TensorDict({"index": block[:, 0], "x": block[:, 1]}, [10])
    columns = Columns.of(stored, torch.arange(100, 110))
    rows, generation = columns.gather(torch.tensor([9, 1]))
    assert generation.tolist() == [109, 101]
    assert columns.batch(rows, {})["x"].tolist() == [37, 5]


def test_columns_on_another_device_than_their_storage_are_none():
    stored = TensorDict({"index": torch.arange(3), "x": torch.zeros(3, device="meta")}, [3])
    assert Columns.of(stored, torch.zeros(3, dtype=torch.int64)) is None
    conjugated = torch.zeros(3, dtype=torch.complex64).conj()
    stored = TensorDict({"index": torch.arange(3), "x": conjugated}, [3])
    assert Columns.of(stored, torch.zeros(3, dtype=torch.int64)) is None


@pytest.mark.parametrize("choice", ["auto", "off"])
def test_a_tensor_without_memory_is_refused_before_anything_is_written(choice, monkeypatch):
    monkeypatch.setenv("PER_TD_KERNELS", choice)
    buffer = make()
    buffer.extend(data(5))
    new = data(2, 5)
    new["obs"] = new["obs"].to_sparse()
    stamps = buffer.writer._generation.clone()
    with pytest.raises(SchemaError, match=r"expected a dense tensor, got a torch\.sparse_coo"):
        buffer.extend(new)
    assert (len(buffer), buffer.write_count, buffer.writer._cursor) == (5, 5, 5)
    assert torch.equal(buffer.writer._generation, stamps)
    assert buffer.extend(data(2, 5)).tolist() == [5, 6]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"priority": torch.ones(19)}, r"priority: expected float32 \[20\], got .* \[19\]"),
        ({"priority": torch.ones(20).double()}, "priority: expected float32"),
        ({"priority": None}, "priority: expected float32"),
        ({"priority": torch.full((20,), torch.nan)}, "priority: expected finite values"),
        ({"priority": torch.full((20,), -1.0)}, "priority: expected finite values"),
        ({"ever_max": torch.tensor(torch.inf)}, "ever_max: expected finite values"),
        ({"max_capacity": None}, "expected a state of max_capacity 20, got None"),
        ({"ever_max": torch.ones(2)}, "ever_max: expected float32"),
        ({"alpha": -1.0}, "alpha: expected"),
        ({"beta": "x"}, "beta: expected"),
        ({"eps": torch.nan}, "eps: expected"),
    ],
)
def test_a_state_with_wrong_values_is_refused_and_changes_nothing(change, message):
    buffer = make()
    buffer.extend(data(20))
    learn(buffer, buffer.sample())
    before = buffer.sampler.priority
    state = buffer.state_dict()
    state["_sampler"] |= change
    for load, value in (
        (buffer.load_state_dict, state),
        (buffer.sampler.load_state_dict, state["_sampler"]),
    ):
        with pytest.raises(CheckpointError, match=message):
            load(value)
    assert torch.equal(buffer.sampler.priority, before)
    assert (buffer.sampler.alpha, buffer.sampler.beta) == (ALPHA, BETA)


def test_writes_to_a_storage_that_was_replaced_are_not_heard_of_any_more():
    first = make(8)
    second = make(storage=lambda: first.storage)
    second.set_storage(LazyTensorStorage(8))
    first.extend(data(8))
    assert second.sampler.priority.sum() == 0


def test_slots_that_are_none_cannot_be_marked():
    buffer = make()
    buffer.extend(data(20))
    with pytest.raises(IndexRangeError, match=r"0 <= index < 20, the slots of the storage, got 20"):
        buffer.mark_update(torch.tensor([3, 20]))


def test_a_batch_of_trajectories_may_be_copied_before_it_is_updated():
    """Copies are contiguous, and hold an index for every step of a trajectory."""
    priorities = []
    for way in (lambda batch: batch, lambda batch: batch.clone()):
        torch.manual_seed(0)
        buffer = make()
        x = torch.arange(60).reshape(20, 3)
        buffer.extend(TensorDict({"x": x}, [20, 3]))
        batch = way(buffer.sample())
        batch["td_error"] = (60 - batch["x"]).float().contiguous()  # the first is the largest
        buffer.update_tensordict_priority(batch)
        priorities.append(buffer.sampler.priority)
    assert torch.equal(*priorities)


def test_a_batch_of_another_buffer_is_stale_where_nothing_was_ever_written():
    first, second = make(storage=ListStorage), make(storage=ListStorage)
    first.extend(data(20))
    batch = first.sample()
    batch["td_error"] = torch.ones(32)
    second.update_tensordict_priority(batch)
    assert second.stats()["stale_updates"] == 32

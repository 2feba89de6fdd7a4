from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from tensordict import TensorDict, lazy_stack
from torchrl.data import LazyMemmapStorage, LazyTensorStorage, ListStorage

from per_td import IndexRangeError, PerTdError, PriorityError, kernels
from per_td.torchrl import PrioritizedSampler, privates
from tests.support.parameters import slow_but
from tests.support.replay import ALPHA, BETA, data, learn, make, same


class Lockstep:
    """A buffer that may go the short way and one that may not; they agree after every step."""

    def __init__(self, capacity, storage, device="cpu", **settings):
        settings |= {"capacity": capacity, "storage": storage}
        if storage is LazyTensorStorage:
            settings["storage"] = lambda: LazyTensorStorage(capacity, device=device)
        self.buffers = make(**settings), make(**settings, collate_fn=lambda batch: batch)

    def __call__(self, step):
        results = []
        for buffer in self.buffers:
            torch.manual_seed(0)
            results.append(step(buffer))
        short, long = self.buffers
        assert torch.equal(short.sampler.priority, long.sampler.priority)
        torch.testing.assert_close(
            short.sampler.state_dict()["ever_max"],
            long.sampler.state_dict()["ever_max"],
            rtol=0,
            atol=0,
        )
        same(short.storage[:], long.storage[:])
        assert short.stats() == long.stats()
        assert short.writer._cursor == long.writer._cursor
        assert short.storage._last_cursor_index == long.storage._last_cursor_index
        assert torch.equal(short.writer._generation, long.writer._generation)
        assert short.storage._mutation_revision == long.storage._mutation_revision
        if isinstance(results[0], TensorDict):
            same(*results)
        elif isinstance(results[0], torch.Tensor):
            assert torch.equal(*results)
        else:
            assert results[0] == results[1]

    @property
    def ways(self):
        return [buffer._cache.of(buffer, marks=True) is not None for buffer in self.buffers]


@pytest.mark.parametrize("sync", [True, False])
@pytest.mark.parametrize("storage", [LazyTensorStorage, LazyMemmapStorage])
@pytest.mark.parametrize("capacity", slow_but([1, 7], [1, 7, 20]))
def test_the_short_way_and_torchrls_way_agree(capacity, storage, sync, device):
    if device.type == "cuda" and storage is LazyMemmapStorage:
        pytest.skip("memory maps are on the CPU")
    both = Lockstep(capacity, storage, device, sync=sync)
    generator = torch.Generator().manual_seed(capacity)
    written = 0
    for step in range(25):
        n = int(torch.randint(1, capacity + 1, (), generator=generator))
        new = data(n, written)
        if step % 3 == 1:
            new["td_error"] = torch.rand(n, generator=generator)
        elif written:
            new["td_error"] = torch.ones(n)
        if step % 4 == 3:
            both(lambda buffer, new=new: buffer.add(new[0]))
        else:
            both(lambda buffer, new=new: buffer.extend(new))
        written += n
        assert both.ways == [step > -1, False]
        both(lambda buffer: buffer.sample())
        both(lambda buffer: learn(buffer, buffer.sample()))
        if step == 12:
            both(lambda buffer: buffer.empty(empty_write_count=False))
        if step == 18:
            both(lambda buffer: buffer.empty())


def test_supplied_priorities_and_update_priority_false_agree_on_both_ways():
    both = Lockstep(7, LazyTensorStorage)
    both(lambda buffer: buffer.extend(data(3, td_error=torch.tensor([9.0, 4, 25]))))
    both(lambda buffer: buffer.extend(data(3, td_error=torch.rand(3)), update_priority=False))
    both(lambda buffer: buffer.extend(data(3, td_error=torch.rand(3)), update_priority=True))
    both(lambda buffer: buffer.add(data(1, td_error=torch.rand(1))[0]))
    both(lambda buffer: buffer.sample())


@pytest.mark.filterwarnings("ignore:A cursor of length superior:UserWarning")
def test_batches_larger_than_the_capacity_keep_their_last_elements():
    both = Lockstep(7, LazyTensorStorage)
    both(lambda buffer: buffer.extend(data(17, td_error=torch.arange(17.0))))
    both(lambda buffer: buffer.extend(data(16, 17, td_error=torch.arange(17.0, 33))))
    buffer = both.buffers[0]
    assert sorted(buffer[:]["x"].tolist()) == list(range(26, 33))
    torch.testing.assert_close(buffer.sampler.priority, buffer[:]["x"].float())


def test_what_the_columns_do_not_have_goes_torchrls_way():
    both = Lockstep(9, LazyTensorStorage)
    both(lambda buffer: buffer.extend(data(9)))
    both(lambda buffer: buffer.extend(data(2).exclude("obs")))
    both(lambda buffer: buffer.extend(lazy_stack([data(1)[0], data(1)[0]])))
    both(lambda buffer: buffer.extend(data(3, new=torch.ones(3))))
    assert "new" in both.buffers[0].sample()
    both(lambda buffer: buffer.extend(data(3, new=torch.ones(3))))
    both(lambda buffer: buffer.extend(buffer.sample()[:2].exclude("priority_weight")))
    both(lambda buffer: buffer.sample())


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_elements_on_cuda_go_into_a_storage_on_the_cpu():
    lockstep = Lockstep(20, LazyTensorStorage)
    lockstep(lambda buffer: buffer.extend(data(12)))
    lockstep(lambda buffer: buffer.extend(data(12, 12).to("cuda")).cpu())


def test_tensors_replaced_in_the_storage_are_found():
    buffer, other = make(), make()
    buffer.extend(data(20))
    other.extend(data(20, 100))
    buffer.sample()
    buffer.load_state_dict(other.state_dict())
    buffer.extend(data(3, 200))
    assert sorted(buffer[:]["x"].tolist()) == [*range(103, 120), *range(200, 203)]
    assert (buffer.sample()["x"] >= 103).all()


@pytest.mark.parametrize(
    "setting",
    [
        {"collate_fn": lambda batch: batch},
        {"storage": ListStorage},
        {"storage": lambda: LazyTensorStorage(20, ndim=2)},
        {"storage": lambda: LazyTensorStorage(20, compilable=True), "compilable": True},
        {"sampler": type("Mine", (PrioritizedSampler,), {})(20, ALPHA, BETA)},
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_what_asks_for_torchrls_way_gets_it(setting):
    buffer = make(**setting)
    buffer.extend(data(20).reshape(4, 5) if buffer.storage.ndim == 2 else data(20))
    assert buffer._cache.of(buffer, marks=True) is None
    assert buffer.sample()["x"].shape == (32,)


def test_a_transform_added_later_is_applied():
    buffer = make()
    buffer.extend(data(20))
    assert "twice" not in buffer.sample()
    buffer.append_transform(lambda td: td.set("twice", td["x"] * 2))
    batch = buffer.sample()
    assert torch.equal(batch["twice"], batch["x"] * 2)


def test_nothing_stops_the_host_on_cuda(device):
    if device.type != "cuda":
        pytest.skip("only CUDA has host syncs")
    buffer = make(storage=lambda: LazyTensorStorage(20, device=device))
    buffer.extend(data(20).to(device))
    new, late = data(7).to(device), buffer.sample()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            batch = buffer.sample()
            learn(buffer, batch)
            buffer.extend(new)
            learn(buffer, late)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert buffer.stats()["stale_updates"] > 0


@pytest.mark.parametrize("unit", ["abs", "squared"])
@pytest.mark.parametrize("late", ["none", "some", "all"])
@pytest.mark.parametrize("shape", [(32,), (32, 1)])
def test_an_update_in_one_call_leaves_what_the_parts_leave(shape, late, unit):
    """The compiled kernel does it if nothing is stale; a TD error in float64 takes the long way."""
    short, long = make(td_error_unit=unit), make(td_error_unit=unit)
    for buffer in (short, long):
        buffer.extend(data(20))
        torch.manual_seed(5)
        batch = buffer.sample()
        if late != "none":
            buffer.extend(data(7 if late == "some" else 20, 20))
        td_error = torch.randn(shape, generator=torch.Generator().manual_seed(6))
        batch["td_error"] = td_error if buffer is short else td_error.double()
        buffer.update_tensordict_priority(batch)
    one, other = short.sampler, long.sampler
    ulp = 1.2e-7  # of the root
    torch.testing.assert_close(one.priority, other.priority, rtol=ulp, atol=0)
    torch.testing.assert_close(one.mass, other.mass, rtol=ulp, atol=0)
    torch.testing.assert_close(one.total_mass, other.total_mass, rtol=ulp, atol=0)
    one.check_valid()
    other.check_valid()
    stale = short.stats()["stale_updates"]
    assert stale == long.stats()["stale_updates"]
    assert {"none": stale == 0, "some": 0 < stale < 32, "all": stale == 32}[late]


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_a_wrong_td_error_changes_nothing_on_the_short_way(wrong):
    buffer = make()
    buffer.extend(data(20))
    batch = buffer.sample()
    batch["td_error"] = torch.ones(32)
    batch["td_error"][17] = wrong
    before = buffer.sampler.priority
    with pytest.raises(PriorityError, match="finite"):
        buffer.update_tensordict_priority(batch)
    assert torch.equal(buffer.sampler.priority, before)


@pytest.fixture(params=kernels.CHOICES[:2])
def choice(request, monkeypatch):
    monkeypatch.setenv(kernels.VARIABLE, request.param)
    return request.param


@pytest.mark.parametrize("late", ["overwritten", "emptied"])
def test_a_wrong_td_error_of_a_late_update_is_refused_on_both_ways(late, choice):
    for dtype in (torch.float32, torch.float64):  # the short way, and the long one
        buffer = make()
        buffer.extend(data(20))
        batch = buffer.sample()
        if late == "emptied":
            buffer.empty()
        buffer.extend(data(7, 20))
        batch["td_error"] = torch.ones(32, dtype=dtype)
        stale = (batch["index"] < 7) if late == "overwritten" else (batch["index"] >= 7)
        batch["td_error"][stale.nonzero()[0]] = torch.nan
        before = buffer.sampler.state_dict()
        with pytest.raises(PriorityError, match="finite"):
            buffer.update_tensordict_priority(batch)
        assert buffer.stats()["stale_updates"] == 0
        after = buffer.sampler.state_dict()
        assert torch.equal(after["priority"], before["priority"])
        assert torch.equal(after["ever_max"], before["ever_max"])


def test_both_ways_agree_on_what_comes_too_late(choice):
    """Overwritten, emptied, and both in one batch, next to what is as it was drawn."""
    both = Lockstep(20, LazyTensorStorage)
    assert both.buffers[0].sampler._table.trees.compiled == (choice == "auto")
    both(lambda buffer: buffer.extend(data(20)))
    batches = {}

    def drawn(buffer):
        batches[buffer] = buffer.sample()

    both(lambda buffer: drawn(buffer))
    both(lambda buffer: buffer.extend(data(7, 20)))
    both(lambda buffer: learn(buffer, batches[buffer]))
    overwritten = both.buffers[0].stats()["stale_updates"]
    assert 0 < overwritten < 32
    both(lambda buffer: buffer.empty())
    both(lambda buffer: learn(buffer, batches[buffer]))
    assert both.buffers[0].stats()["stale_updates"] == overwritten + 32
    both(lambda buffer: buffer.extend(data(9, 40)))
    both(lambda buffer: learn(buffer, batches[buffer]))
    assert both.buffers[0].stats()["stale_updates"] > overwritten + 32
    both(lambda buffer: buffer.sample())
    both(lambda buffer: learn(buffer, buffer.sample()))
    for buffer in both.buffers:
        buffer.sampler.check_valid()


@pytest.mark.parametrize("filled", [12, 20])
@pytest.mark.parametrize("index", [-1, 20])
def test_an_index_that_is_no_slot_is_an_error_on_both_ways(index, filled, choice):
    for dtype in (torch.float32, torch.float64):
        buffer = make()
        buffer.extend(data(filled))
        batch = buffer.sample()
        batch["index"][3] = index
        batch["td_error"] = torch.ones(32, dtype=dtype)
        before = buffer.sampler.priority
        with pytest.raises(IndexRangeError, match=rf"0 <= index < 20, the slots.*, got {index} at"):
            buffer.update_tensordict_priority(batch)
        assert torch.equal(buffer.sampler.priority, before)
        assert buffer.stats()["stale_updates"] == 0


@pytest.mark.parametrize("storage", [LazyTensorStorage, LazyMemmapStorage])
def test_rows_of_the_storage_itself_are_read_before_they_are_overwritten(storage, choice):
    buffer = make(capacity=9, storage=storage)
    buffer.extend(data(9))
    buffer.extend(data(2, 9))  # the next slot is 2
    expected = buffer[:5].clone()
    assert buffer._cache.of(buffer, marks=True) is not None
    index = buffer.extend(buffer[:5])
    assert index.tolist() == [2, 3, 4, 5, 6]
    same(buffer[2:7].clone().exclude("index"), expected.exclude("index"))


def test_rows_of_one_column_may_go_into_another(choice):
    buffer = make(capacity=9)
    buffer.extend(TensorDict({"a": torch.arange(9), "b": torch.arange(9, 18)}, [9]))
    held = buffer[:]
    buffer.extend(TensorDict({"a": held["b"][:5], "b": held["a"][:5]}, [5]))
    assert buffer[:5]["a"].tolist() == [9, 10, 11, 12, 13]
    assert buffer[:5]["b"].tolist() == [0, 1, 2, 3, 4]


def test_rows_without_entries_are_written_and_drawn(choice):
    both = Lockstep(9, LazyTensorStorage)
    both(lambda buffer: buffer.extend(TensorDict({}, [5])))
    both(lambda buffer: buffer.extend(TensorDict({}, [5])))
    assert both.ways == [True, False]
    both(lambda buffer: buffer.sample())
    assert both.buffers[0].sample()["index"].max() < 9


def test_rows_that_cannot_be_read_move_nothing_on(choice):
    buffer = make(capacity=9)
    buffer.extend(data(4))
    new = data(3, 4)
    new["x"].untyped_storage().resize_(0)
    before = buffer.writer._generation.clone()
    with pytest.raises((PerTdError, RuntimeError)):
        buffer.extend(new)
    assert len(buffer) == 4
    assert buffer.writer._cursor == 4
    assert buffer.write_count == 4
    assert torch.equal(buffer.writer._generation, before)
    buffer.extend(data(3, 4))
    assert buffer[:]["x"].tolist() == list(range(7))


def test_kernels_find_memory_that_torch_has_moved_to_be_shared(choice):
    """Sending a tensor to another process moves its memory, which the kernels have addresses of."""
    buffer, alone = make(), make()
    for each in (buffer, alone):
        each.extend(data(20))
        torch.manual_seed(1)
        learn(each, each.sample())
    table, columns = buffer.sampler._table, buffer._cache.of(buffer, marks=True)
    before = table.raw.data_ptr(), columns._columns[0].data_ptr()
    sampler = ForkingPickler.loads(ForkingPickler.dumps(buffer.sampler))
    for column in columns._columns:
        column.share_memory_()
    assert table.raw.data_ptr() != before[0]
    assert columns._columns[0].data_ptr() != before[1]
    for step in range(3):
        for each in (buffer, alone):
            torch.manual_seed(step)
            each.extend(data(7, 20 + 7 * step))
            learn(each, each.sample())
            each.add(data(1, 90 + step)[0])
        assert torch.equal(buffer.sampler.priority, alone.sampler.priority)
        assert torch.equal(sampler.priority, alone.sampler.priority)
        same(buffer[:], alone[:])
    buffer.sampler.check_valid()
    sampler.check_valid()
    sampler.update_priority(torch.arange(20), torch.arange(20.0))  # the other side's kernels
    alone.sampler.update_priority(torch.arange(20), torch.arange(20.0))
    torch.manual_seed(9)
    batch = buffer.sample()
    torch.manual_seed(9)
    same(batch, alone.sample())


def test_generations_elsewhere_than_the_priorities_are_not_handed_to_their_kernels():
    """As with `sampler_device`: addresses on the CPU are nothing to a device."""
    buffer = make()
    buffer.extend(data(20))
    assert privates.generations(buffer, 20, torch.device("meta")) is None
    assert privates.generations(buffer, 20, torch.device("cpu")).tolist() == [0] * 20
    assert privates.generations(buffer, 21, torch.device("cpu")) is None

import copy
import inspect
import pickle
import threading

import pytest
import torch
from torchrl.data import (
    LazyMemmapStorage,
    LazyTensorStorage,
    ListStorage,
    RandomSampler,
    ReplayBuffer,
    TensorDictMaxValueWriter,
)
from torchrl.data import TensorDictPrioritizedReplayBuffer as TorchRLBuffer
from torchrl.data import TensorDictReplayBuffer as TorchRLUniform
from torchrl.data.replay_buffers.scheduler import LinearScheduler
from torchrl.envs import RenameTransform

from per_td import CheckpointError, ConfigurationError, EmptyBufferError
from per_td.torchrl import PrioritizedSampler, TensorDictPrioritizedReplayBuffer
from tests.support.replay import ALPHA, BETA, data, learn, make, same


def test_it_has_torchrls_arguments_in_torchrls_order():
    ours = list(inspect.signature(TensorDictPrioritizedReplayBuffer.__init__).parameters.values())
    theirs = list(inspect.signature(TorchRLBuffer.__init__).parameters.values())
    assert [(p.name, p.default, p.kind) for p in ours[: len(theirs)]] == [
        (p.name, p.default, p.kind) for p in theirs
    ]
    assert all(p.kind is p.KEYWORD_ONLY for p in ours[1:])


def test_torchrl_takes_it_for_its_own():
    buffer = make()
    assert isinstance(buffer, (TorchRLBuffer, TorchRLUniform, ReplayBuffer))
    assert buffer.prioritized_sampler is buffer.sampler


def test_a_sampler_may_be_given():
    sampler = PrioritizedSampler(20, ALPHA, BETA, draw="stratified")
    assert make(sampler=sampler).sampler is sampler
    with pytest.raises(ConfigurationError, match=r"alpha=0.7 and beta=0.5, got alpha=0.1"):
        make(sampler=PrioritizedSampler(20, 0.1, BETA))
    with pytest.raises(ConfigurationError, match=r"expected a per_td\.torchrl\.Prior"):
        make().set_sampler(RandomSampler())


def test_none_stands_for_the_default_of_eps_reduction_and_storage():
    buffer = TensorDictPrioritizedReplayBuffer(alpha=1, beta=1, eps=None, reduction=None)
    assert (buffer.sampler.eps, buffer.sampler.reduction) == (1e-8, "max")
    assert isinstance(buffer.storage, ListStorage)
    assert buffer.storage.max_size == 1000


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"alpha": -1}, ValueError, "alpha: expected"),
        ({"beta": -1}, ValueError, "beta: expected"),
        ({"reduction": "r3"}, ConfigurationError, "reduction: expected one of max"),
        ({"draw": "x"}, ConfigurationError, "draw: expected one of"),
        (
            {"sync": False, "storage": lambda: LazyTensorStorage(8, ndim=2)},
            ValueError,
            "sync: expected True",
        ),
        ({"transport": "ray"}, ValueError, "direct"),
        ({"prefetch": 2, "batch_size": None}, ValueError, "batch-size"),
        ({"shared": True, "prefetch": 2}, ValueError, "share"),
    ],
)
def test_wrong_arguments_are_refused_by_name(settings, error, message):
    with pytest.raises(error, match=message):
        make(**settings)


def test_emptying_forgets_the_batches_drawn_ahead():
    buffer = make(prefetch=3)
    buffer.extend(data(20))
    buffer.sample()
    buffer.empty()
    with pytest.raises(EmptyBufferError):
        buffer.sample()
    buffer.extend(data(5, 100))
    assert (buffer.sample()["x"] >= 100).all()


def test_writes_are_taken_up_before_the_next_draw_with_sync_false():
    buffer = make(10, sync=False)
    assert isinstance(buffer.sampler, PrioritizedSampler)
    buffer.extend(data(6, td_error=torch.full((6,), 9.0)))
    assert buffer.sampler.priority.sum() == 0
    buffer.sample()
    assert buffer.sampler.priority.tolist() == [1.0] * 6 + [0.0] * 4
    buffer.update_priority(torch.arange(6), torch.full((6,), 3.0))
    buffer.empty(empty_write_count=False)
    buffer.extend(data(2))
    assert set(buffer.sample()["index"].tolist()) == {0, 1}
    assert buffer.write_count == 8
    with pytest.raises(RuntimeError, match="update_priority: expected None or False"):
        buffer.extend(data(1), update_priority=True)


@pytest.mark.parametrize("count", [True, False])
def test_with_sync_false_only_what_came_after_emptying_is_taken_up(count):
    buffer = make(10, sync=False, batch_size=200)
    buffer.extend(data(5))
    if count:
        buffer.sample()
    buffer.empty(empty_write_count=count)
    buffer.extend(data(7, 20))
    assert set(buffer.sample()["x"].tolist()) == set(range(20, 27))
    assert buffer.sampler.priority.tolist() == [1.0] * 7 + [0.0] * 3


def test_a_state_moves_to_another_buffer_however_it_is_carried(tmp_path):
    for sync in (True, False):
        buffer = make(sync=sync)
        buffer.extend(data(15))
        learn(buffer, buffer.sample())
        buffer.extend(data(10, 15))
        path = tmp_path / str(sync)
        buffer.dumps(path)
        loaded, stated = make(sync=sync), make(sync=sync)
        loaded.loads(path)
        stated.load_state_dict(buffer.state_dict())
        for other in (loaded, stated, copy.deepcopy(buffer), pickle.loads(pickle.dumps(buffer))):
            assert torch.equal(other.sampler.priority, buffer.sampler.priority)
            torch.manual_seed(0)
            expected = buffer.sample()
            torch.manual_seed(0)
            batch = other.sample()
            for key in expected.keys(include_nested=True, leaves_only=True):
                assert torch.equal(batch[key], expected[key])
            other.extend(data(3, 100))
            learn(other, other.sample())
            assert other.write_count == 28
        assert buffer.write_count == 25


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("saving", ["state_dict", "dumps"])
def test_a_state_is_not_taken_in_the_middle_of_a_write(saving, shared, tmp_path):
    buffer = make(10, sync=False, shared=shared)
    buffer.extend(data(6))
    lock = buffer._write_lock if shared else buffer._replay_lock
    save = {"state_dict": buffer.state_dict, "dumps": lambda: buffer.dumps(tmp_path / "saved")}
    thread = threading.Thread(target=save[saving])
    with lock:  # as a writer does
        thread.start()
        thread.join(0.2)
        assert thread.is_alive()
        assert buffer.sampler.priority.sum() == 0
    thread.join()
    assert buffer.sampler.priority.sum() == 6


@pytest.mark.parametrize("loading", ["load_state_dict", "loads"])
def test_what_is_written_while_a_state_is_loaded_gets_its_priority(loading, tmp_path, monkeypatch):
    buffer, other = make(10, sync=False), make(10, sync=False)
    other.extend(data(6))
    other.dumps(tmp_path / "saved")
    buffer.extend(data(1))
    writer = threading.Thread(target=buffer.extend, args=(data(2, 6),))
    load = getattr(ReplayBuffer, loading)

    def then_write(self, state):
        load(self, state)
        writer.start()
        writer.join(0.2)

    monkeypatch.setattr(ReplayBuffer, loading, then_write)
    getattr(buffer, loading)(tmp_path / "saved" if loading == "loads" else other.state_dict())
    writer.join()
    buffer.sample()
    assert buffer.sampler.priority.tolist() == [1.0] * 8 + [0.0] * 2


@pytest.mark.parametrize("storage", [LazyTensorStorage, ListStorage, LazyMemmapStorage])
@pytest.mark.parametrize("prefetch", [None, 2])
def test_a_state_is_made_of_what_a_file_without_code_may_hold(prefetch, storage, tmp_path):
    def fresh(seed):
        generator = torch.Generator().manual_seed(seed)
        made = make(storage=storage, prefetch=prefetch, generator=generator)
        if prefetch:  # else two threads draw ahead, and which of them comes first is chance
            made._prefetch_executor._max_workers = 1
        return made

    buffer, other = fresh(3), fresh(4)
    buffer.extend(data(20))
    other.extend(data(20, 50))  # TorchRL's storages want to be allocated
    for _ in range(3):
        learn(buffer, buffer.sample())
    torch.save(buffer.state_dict(), tmp_path / "state.pt")
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for _ in range(5):  # the batches drawn ahead are the first of them
        same(buffer.sample(), other.sample())


def test_a_state_with_batches_as_tensordicts_is_loaded_too():
    """As it was before they became dictionaries."""
    buffer, other = make(prefetch=2), make(prefetch=2)
    buffer.extend(data(20))
    other.extend(data(20, 50))
    buffer.sample()
    other.load_state_dict(super(type(buffer), buffer).state_dict())
    for _ in range(2):
        same(buffer.sample(), other.sample())


def test_a_state_of_another_capacity_is_refused_before_any_of_it_is_taken_over(tmp_path):
    buffer, other = make(20), make(21)
    buffer.extend(data(15))
    other.extend(data(21, 100))
    other.dumps(tmp_path / "saved")
    before = buffer.sampler.priority
    with pytest.raises(CheckpointError, match="max_capacity 20, got 21"):
        buffer.load_state_dict(other.state_dict())
    with pytest.raises(CheckpointError, match="max_capacity 20, got 21"):
        buffer.loads(tmp_path / "saved")
    assert buffer["x"].tolist() == list(range(15))
    assert torch.equal(buffer.sampler.priority, before)
    assert (buffer.write_count, buffer.writer._cursor) == (15, 15)


def test_save_dump_and_load_are_the_same_as_dumps_and_loads(tmp_path):
    buffer = make()
    buffer.extend(data(5))
    for number, name in enumerate(("save", "dump")):
        getattr(buffer, name)(tmp_path / str(number))
        other = make()
        other.load(tmp_path / str(number))
        assert len(other) == 5


def test_stored_data_is_read_and_changed_in_place():
    buffer = make()
    buffer.extend(data(20))
    assert buffer[3]["x"] == 3
    assert torch.equal(buffer["x"], torch.arange(20))
    buffer.sample()
    buffer.set_("x", torch.arange(20) + 100)
    buffer.set_at_("obs", torch.zeros(2, 3), torch.tensor([0, 1]))
    buffer[4] = data(1, 300)[0].set("index", torch.tensor(4))
    buffer.update_({"x": torch.arange(20) + 200})
    batch = buffer.sample()
    assert torch.equal(batch["x"], batch["index"] + 200)
    assert (buffer[:2]["obs"] == 0).all()
    content = buffer.read_all_in_order()
    buffer.write_all(content.clone().apply(lambda leaf: leaf * 0))
    assert (buffer.sample()["x"] == 0).all()
    index = torch.arange(2)
    patch = {"x": torch.tensor([7, 8])}
    handle = {"index": index, "generation": buffer.writer.generations_of(index)}
    assert buffer.update_if_present(**handle, patch=patch).updated_count == 2
    future = buffer.submit_update_if_present(**handle, patch=patch)
    assert future.result().updated_count == 2
    assert buffer.sample().shape == (32,)
    assert buffer[:2]["x"].tolist() == [7, 8]


def test_trajectories_are_queried():
    buffer = make()
    buffer.extend(data(20, episode=torch.arange(20) // 5))
    assert [len(found) for found in buffer.query()] == [5] * 4


def test_iteration_and_next_give_batches():
    buffer = make()
    buffer.extend(data(20))
    for _, batch in zip(range(3), buffer, strict=False):
        assert batch.shape == (32,)
    assert buffer.next().shape == (32,)
    assert buffer.can_sample()
    assert not make().can_sample(4)


def test_conflicting_batch_sizes_warn_once_and_the_argument_wins():
    buffer = make(batch_size=4)
    buffer.extend(data(20))
    with pytest.warns(UserWarning, match="conflicting batch_sizes"):
        assert buffer.sample(5).shape == (5,)
    assert buffer.sample(6).shape == (6,)
    with pytest.raises(RuntimeError, match="batch_size not specified"):
        make(batch_size=None).sample()


def test_info_is_returned_on_demand():
    for way in (None, lambda batch: batch):
        buffer = make(collate_fn=way)
        buffer.extend(data(20))
        batch, info = buffer.sample(return_info=True)
        assert set(info) == {"index", "index_generation", "priority_weight"}
        assert all(torch.equal(batch[key], value) for key, value in info.items())


def test_stats_count_what_was_refused():
    buffer = make()
    buffer.extend(data(5))
    assert buffer.stats() == {
        "size": 5,
        "write_count": 5,
        "prefetch_queue_size": 0,
        "initialized": True,
        "capacity": 20,
        "utilization": 0.25,
        "stale_updates": 0,
        "refused_priorities": 0,
    }


@pytest.mark.parametrize("name", ["alpha", "beta", "eps", "reduction", "draw", "td_error_unit"])
def test_a_setting_of_the_sampler_is_refused_on_the_buffer(name):
    with pytest.raises(ConfigurationError, match=rf"{name}: .* use buffer\.sampler\.{name}"):
        setattr(make(), name, 0.5)


def test_schedulers_and_generators_drive_the_sampler():
    drawn = []
    for _ in range(2):
        buffer = make(generator=torch.Generator().manual_seed(3), sync=False)
        LinearScheduler(buffer, "beta", final_value=1.0, num_steps=1).step()
        assert buffer.sampler.beta == 1.0
        buffer.extend(data(20))
        drawn.append(buffer.sample()["x"])
        buffer.set_rng(torch.Generator().manual_seed(5))
        drawn.append(buffer.sample()["x"])
    assert torch.equal(drawn[0], drawn[2])
    assert torch.equal(drawn[1], drawn[3])
    assert not torch.equal(drawn[0], drawn[1])


def test_sampler_storage_and_writer_can_be_replaced():
    buffer = make(batch_size=200)
    buffer.extend(data(20))
    before = buffer.set_sampler(PrioritizedSampler(20, 1.0, 1.0))
    assert before.alpha == ALPHA
    assert set(buffer.sample()["x"].tolist()) == set(range(20))
    storage = LazyTensorStorage(20)
    buffer.set_storage(storage)
    with pytest.raises(EmptyBufferError):
        buffer.sample()
    buffer.extend(data(3, 50))
    assert set(buffer.sample()["x"].tolist()) == {50, 51, 52}
    with pytest.raises(ConfigurationError, match="max_size=20, got 30"):
        buffer.set_storage(LazyTensorStorage(30))
    buffer.set_writer(TensorDictMaxValueWriter(rank_key="x"))
    buffer.extend(data(30, 70))
    assert "index_generation" not in buffer.sample()
    learn(buffer, buffer.sample())


def test_a_storage_that_is_filled_already_counts_as_new():
    first = make(8)
    first.extend(data(8))
    second = make(storage=lambda: first.storage, batch_size=100)
    assert (second.sampler.priority == 1).all()
    learn(second, second.sample())
    first.extend(data(2, 50))
    assert (
        second.sampler.priority[:2].tolist() == [second.sampler.state_dict()["ever_max"].item()] * 2
    )
    assert second.stats()["stale_updates"] == 0


def test_transforms_can_be_inserted_and_saving_can_be_hooked(tmp_path):
    buffer, seen = make(), []
    buffer.extend(data(20))
    buffer.insert_transform(0, RenameTransform(["x"], ["renamed"]))
    assert "renamed" in buffer.sample()
    buffer.register_save_hook(lambda data, path: seen.append("saved") or data)
    buffer.dumps(tmp_path / "saved")
    other = make()
    other.register_load_hook(lambda data, out: seen.append("loaded") or data)
    other.loads(tmp_path / "saved")
    assert seen == ["saved", "loaded"]


def test_attributes_tell_what_was_configured():
    buffer = make()
    assert (buffer.batch_size, buffer.dim_extend, buffer.initialized) == (32, 0, True)
    assert not buffer.shared
    assert buffer.share().shared
    assert buffer.service_backend == "direct"
    assert len(buffer.transform) == 0
    with pytest.raises(RuntimeError, match="dim_extend cannot be reset"):
        buffer.dim_extend = 3
    buffer.extend(data(5))  # by a shared buffer's lock
    assert buffer.sample().shape == (32,)


def test_what_is_shut_down_is_not_sampled():
    buffer = make()
    buffer.extend(data(5))
    buffer.synchronize()
    assert buffer.start() is buffer.client() is buffer
    buffer.shutdown()
    assert not buffer.is_alive
    with pytest.raises(RuntimeError, match="shut down"):
        buffer.sample()


def test_what_is_no_tensordict_is_refused():
    with pytest.raises(ValueError, match="expected a TensorDictBase, got a Tensor"):
        make().extend(torch.ones(3))


def test_representations_name_the_parts():
    buffer = make()
    buffer.extend(data(5))
    assert "PrioritizedSampler(alpha=0.7" in repr(buffer)


@pytest.mark.skipif(
    "wait" in inspect.signature(TorchRLUniform.sample).parameters,
    reason="this TorchRL's buffers can wait",
)
@pytest.mark.parametrize("argument", ["wait", "timeout", "cancel_event"])
def test_a_torchrl_that_cannot_wait_refuses_its_arguments(argument):
    buffer = make()
    buffer.extend(data(4))
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{argument}'"):
        buffer.sample(**{argument: True})


@pytest.mark.parametrize("name", ["frames", "num_envs", "num_frames"])
def test_arguments_of_other_buffers_are_refused_by_name(name):
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
        make(**{name: 4})

"""Batches come out as data went in, over processes, restarts and files."""

import threading
import time

import numpy as np
import pytest
import torch
from tensordict import TensorDict, tensorclass

from per_td.errors import PriorityError, SchemaError
from per_td.ray import wire
from per_td.ray.batches import Batches
from per_td.ray.shard import Shard
from per_td.ray.wire import PLAIN, tell, understood
from per_td.ray.writer import checked

ray = pytest.importorskip("ray")


@tensorclass
class Inner:
    """A user's class, nested in transitions."""

    obs: torch.Tensor


def transitions(*shape, start=0):
    agents = TensorDict(
        {"obs": torch.rand(*shape, 3, 4), "more": TensorDict({}, [*shape, 3, 2])}, [*shape, 3]
    )
    agents.names = [*[None] * len(shape), "agent"]
    inner = Inner(obs=torch.rand(*shape, 2), batch_size=shape)
    number = torch.arange(start, start + shape[0]) if shape else torch.tensor(start)
    made = TensorDict({"agents": agents, "id": number, "info": {}, "inner": inner}, shape)
    made["agents"].names = [*[None] * len(shape), "agent"]
    return made


def assert_structure(batch, n, kind=Inner):
    assert list(batch.batch_size) == [n]
    assert list(batch["agents"].batch_size) == [n, 3]
    assert batch["agents"].names == [None, "agent"]
    assert list(batch["agents", "more"].batch_size) == [n, 3, 2]
    assert batch["info"].is_empty()
    assert type(batch["inner"]) is kind
    assert list(batch["inner"].get("obs").shape) == [n, 2]


@ray.remote(num_cpus=0)
def write(writer, data):
    """What another process does."""
    return writer.extend(data).shard


def test_batches_have_the_structure_of_what_other_processes_wrote(sharded):
    buffer = sharded(2, 64)
    data = [transitions(8, start=10 * k) for k in range(2)]
    writers = [buffer.writer(k) for k in range(2)]
    assert ray.get([write.remote(*each) for each in zip(writers, data, strict=True)]) == [0, 1]
    buffer.add(transitions(start=30))
    for _ in range(2):
        batch = buffer.sample(64)
        assert_structure(batch, 64)
        assert batch["shard"].unique().tolist() == [0, 1]
    for part in data:
        for number, obs in zip(part["id"], part["agents", "obs"], strict=True):
            assert (batch["agents", "obs"][batch["id"] == number] == obs).all()


@pytest.mark.slow
def test_the_structure_stays_when_shards_start_again_from_their_logs(sharded, tmp_path):
    buffer = sharded(2, 64, checkpoint_dir=tmp_path, refresh_s=0.1)
    buffer.writer().extend(transitions(8), key=0)
    buffer.writer().extend(transitions(8), key=1)
    assert_structure(buffer.sample(16), 16)
    started = [report.epoch for report in buffer.reports()]
    for shard in buffer._shards:
        ray.kill(shard, no_restart=False)
    until = time.monotonic() + 120
    while not all(
        now and now.epoch != then for now, then in zip(buffer.reports(), started, strict=True)
    ):
        assert time.monotonic() < until, "shards did not come back"
        time.sleep(0.05)
    assert_structure(buffer.sample(16), 16)  # the learner knows the class
    buffer.close()
    again = sharded(2, 64, checkpoint_dir=tmp_path)
    assert_structure(again.sample(16), 16, kind=TensorDict)  # a log holds no code
    again.extend(transitions(8))
    assert_structure(again.sample(16), 16, kind=TensorDict)


@pytest.mark.slow
def test_a_save_keeps_the_structure_but_no_code(sharded, tmp_path):
    from per_td.ray import ShardedReplayBuffer

    buffer = sharded(1, 64, example=transitions())
    buffer.extend(transitions(8))
    assert_structure(buffer.sample(16), 16)
    buffer.save(tmp_path)
    for options, kind in (({}, TensorDict), ({"example": transitions()}, Inner)):
        with ShardedReplayBuffer.load(tmp_path, actor_options={"num_cpus": 0}, **options) as again:
            assert_structure(again.sample(16), 16, kind)


# --- without Ray ----------------------------------------------------------------------------------


def sampled(*shards, n=8):
    """Batches, and a function that draws from these shards as the learner does."""
    batches = Batches(
        [],
        ledger=type("", (), {"size": 8, "total": torch.ones(9), "smallest": torch.ones(9)}),
        replies=None,
        draw="independent",
        weight_normalization="none",
        generator=None,
        timeout_s=1.0,
        device=torch.device("cpu"),
        on_late=lambda: None,
    )

    def sample(*some):
        known = "" if batches._told is None else batches._told.name
        parts = [(k, shard.sample([n], known)) for k, shard in enumerate(some or shards)]
        return batches._together(parts, torch.ones(9), 1.0), [each.told for _, each in parts]

    return sample


def written(shard, data):
    leaves, structure = checked(data)
    assert shard.extend(wire.pack(leaves), None, tell(structure)) is not None
    return shard


def test_a_shard_asks_for_the_structure_of_its_first_transitions_only():
    shard = Shard({"capacity": 16}, seed=0)
    leaves, structure = checked(transitions(4))
    assert shard.extend(wire.pack(leaves), None, None) is None
    assert shard.report().size == 0
    with pytest.raises(PriorityError):
        shard.extend(wire.pack(leaves), np.full(4, np.nan, np.float32), tell(structure))
    assert shard.extend(wire.pack(leaves), None, None) is None
    written(shard, transitions(4))
    assert shard.extend(wire.pack(leaves), None, None) is not None
    assert shard.extend(wire.pack(leaves), None, PLAIN) is not None
    assert_structure(sampled(shard)()[0], 8)


def test_a_shard_tells_the_structure_once():
    shard = written(Shard({"capacity": 16}, seed=0), transitions(4))
    sample = sampled(shard)
    assert sample()[1] != [None]
    batch, told = sample()
    assert told == [None]
    assert_structure(batch, 8)


@pytest.mark.parametrize("every", [1, 1000])
def test_a_log_and_a_checkpoint_keep_the_structure_but_no_code(every, tmp_path):
    shard = Shard({"capacity": 16}, seed=0, folder=str(tmp_path), checkpoint_every=every)
    written(shard, transitions(4))
    shard._log.close()
    assert all(b"Inner" not in file.read_bytes() for file in tmp_path.iterdir())
    again = Shard({"capacity": 16}, seed=0, folder=str(tmp_path))
    assert_structure(sampled(again)()[0], 8, kind=TensorDict)
    leaves, _ = checked(transitions(4))
    assert again.extend(wire.pack(leaves), None, None) is not None
    again._log.close()
    # the class is that of whoever knows it, whatever shard answers first
    other = written(Shard({"capacity": 16}, seed=0), transitions(4))
    for pair in ((again, other), (other, again)):
        sample = sampled(*pair)
        assert_structure(sample()[0], 16)
        assert_structure(sample(again)[0], 8)


def test_the_structure_changes_with_the_leaves():
    """All shards came back empty, and another program writes to them."""
    old = written(Shard({"capacity": 16}, seed=0), transitions(4))
    sample = sampled(old)
    sample()
    other = TensorDict({"agents": torch.rand(4), "info": {"x": torch.rand(4)}}, [4])
    new = written(Shard({"capacity": 16}, seed=0), other)
    for _ in range(2):
        batch, _ = sample(new)
        assert batch["agents"].shape == (8,)
        assert batch["info", "x"].shape == (8,)
        assert "inner" not in batch.keys()  # noqa: SIM118  of a TensorDict


def test_a_class_that_the_learner_lacks_becomes_a_tensordict():
    told = tell(checked(transitions(4))[1])
    assert understood(told).nodes["inner",].kind is Inner
    gone = told._replace(classes=told.classes.replace(b"Inner", b"Outer"))
    assert understood(gone).nodes["inner",].kind is None
    assert_structure(
        understood(gone).assembled(
            checked(transitions(4))[0].items(), {}, torch.Size([4]), torch.device("cpu")
        ),
        4,
        kind=TensorDict,
    )


def test_a_class_of_a_function_travels_and_one_that_cannot_is_refused():
    @tensorclass
    class Local:
        x: torch.Tensor

    data = TensorDict({"local": Local(x=torch.rand(4), batch_size=[4])}, [4])
    assert understood(tell(checked(data)[1])).nodes["local",].kind.__name__ == "Local"
    Local.lock = threading.Lock()
    with pytest.raises(SchemaError, match=r"'local'.*: expected a tensorclass that can be pickled"):
        tell(checked(data)[1])


def test_an_example_for_an_actor_is_small_and_tells_the_whole_kind():
    from per_td.ray.actors import small

    example = transitions()
    example["pixels"] = torch.zeros(3, 1000, 1000, dtype=torch.uint8)
    like, told = small(example)
    assert len(ray.cloudpickle.dumps((like, told))) < 10_000
    shard = Shard({"capacity": 4, "example": like}, seed=0, told=told)
    with pytest.raises(SchemaError, match="per transition"):
        shard.extend([*wire.pack(checked(transitions(2))[0]), pixels(np.float32)], None, None)
    leaves = [*wire.pack(checked(transitions(2))[0]), pixels(np.uint8)]
    assert shard.extend(leaves, None, None) is not None
    assert_structure(sampled(shard)()[0], 8)


def pixels(dtype):
    return ("pixels",), np.dtype(dtype).name, np.zeros((2, 3, 1000, 1000), dtype)

import math
import time
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import torch
from scipy.stats import chi2_contingency, chisquare
from tensordict import TensorDict

from per_td import PrioritizedReplayBuffer
from per_td.errors import (
    ConfigurationError,
    EmptyBufferError,
    IndexRangeError,
    PerTdError,
    PriorityError,
    SchemaError,
)
from tests.support.parameters import slow_but

ray = pytest.importorskip("ray")
BATCH = 20_000


@pytest.fixture(scope="module")
def pair(cluster, request):
    """Three unequal shards, and one local buffer with the same transitions and priorities."""
    from per_td.ray import ShardedReplayBuffer

    rules = {"alpha": 0.8, "beta": 1.0, "weight_normalization": "buffer", "eps": 0.0}
    sharded = ShardedReplayBuffer(
        3,
        64,
        generator=torch.Generator().manual_seed(1),
        actor_options={"num_cpus": 0},
        refresh_s=1e9,
        **rules,
    )
    local = PrioritizedReplayBuffer(64, generator=torch.Generator().manual_seed(2), **rules)
    priority = torch.rand(30, generator=torch.Generator().manual_seed(3)) ** 3 + 0.05
    priority[4] = 0.0
    number = torch.arange(30)
    data = TensorDict({"id": number, "f": torch.sin(number.float())}, [30])
    for key, part in enumerate((slice(0, 20), slice(20, 28), slice(28, 30))):
        sharded.writer().extend(data[part], priority[part], key=key)
    local.extend(data, priority)
    yield sharded, local
    sharded.close()


def test_transitions_are_drawn_as_from_one_buffer(pair):
    sharded, local = pair
    ours = sharded.sample(BATCH)["id"].bincount(minlength=30)
    theirs = local.sample(BATCH)["id"].bincount(minlength=30)
    mass = local.priority.double() ** 0.8
    there = mass > 0
    assert not ours[~there].any()
    expected = mass[there] / mass.sum() * BATCH
    assert chisquare(ours[there].numpy(), expected.numpy()).pvalue > 1e-3
    assert chi2_contingency(torch.stack([ours, theirs])[:, there].numpy()).pvalue > 1e-3


@pytest.mark.parametrize("normalization", ["none", "batch", "buffer"])
def test_weights_are_those_of_one_buffer(normalization, pair, monkeypatch):
    sharded, local = pair
    monkeypatch.setattr(sharded._batches, "_normalization", normalization)
    sharded.beta = 0.7
    batch = sharded.sample(2000)
    sharded.beta = 1.0
    mass = (local.priority.double() ** 0.8)[batch["id"]]
    total = (local.priority.double() ** 0.8).sum()
    weight = (30 * mass / total) ** -0.7
    least = (local.priority[local.priority > 0].double() ** 0.8).min()
    largest = {"none": 1.0, "batch": weight.max(), "buffer": (30 * least / total) ** -0.7}
    torch.testing.assert_close(
        batch["priority_weight"].double(), weight / largest[normalization], rtol=1e-5, atol=1e-6
    )


def test_weighted_means_stay_unbiased_while_totals_move_unseen(pair, monkeypatch):
    """What another learner's update would do: this one's totals are wrong by a factor of 20."""
    sharded, local = pair
    monkeypatch.setattr(sharded._batches, "_normalization", "none")
    before = ray.get(sharded._shards[0].priority.remote())
    index = torch.arange(20).numpy()
    ray.get(sharded._shards[0].update.remote(index, before * 20 + 0.5))
    told = sharded._ledger.total[0].item()
    now = sharded._shards[0].report.remote()
    estimates = []
    f = local.transitions["f"]
    request = sharded._batches.request
    for _ in range(40):
        sharded._ledger.total[0] = told  # forget what the last answer said
        batch = sharded._batches.collect(request(500), 1.0)
        estimates.append((batch["priority_weight"] * batch["f"]).mean())
    assert ray.get(now).total > 5 * told
    estimates = torch.stack(estimates)
    error = estimates.std() / math.sqrt(len(estimates))
    assert abs(float(estimates.mean() - f.mean())) < 4 * float(error)
    assert float(error) < 0.02
    ray.get(sharded._shards[0].update.remote(index, before))
    sharded._ledger.total[0] = told


def test_stratified_batches_spread_over_the_shards_by_their_totals(pair, monkeypatch):
    sharded, _ = pair
    monkeypatch.setattr(sharded._batches, "_draw", "stratified")
    counts = sharded.sample(1000)["shard"].bincount(minlength=3)
    totals = torch.tensor([report.total for report in sharded.reports()])
    assert (counts - 1000 * totals / totals.sum()).abs().max() <= 2


def test_counters_and_priorities_of_all_shards_are_read_through_one_object(pair):
    sharded, local = pair
    assert len(sharded) == 30
    assert sharded.capacity == 192
    assert sharded.stats()["written"] == 30
    assert sharded.stats()["shards_living"] == 3
    torch.testing.assert_close(sharded.priority, local.priority)
    assert [report.size for report in sharded.reports()] == [20, 8, 2]
    assert "3 shards" in repr(sharded)


def test_a_batch_has_what_an_update_needs_and_updates_arrive(sharded, numbered):
    buffer = sharded(2, 64, 16, alpha=1.0, eps=0.25)
    for start in (0, 20):
        buffer.extend(numbered(start, 20))
    batch = buffer.sample()
    for key in ("index", "generation", "shard"):
        assert batch[key].shape == (16,)
        assert batch[key].dtype == torch.int64
    assert batch["priority_weight"].dtype == torch.float32
    assert batch["x"].shape == (16, 3)
    assert torch.equal(batch["id"] - 20 * batch["shard"], batch["index"])
    batch["x"].add_(1)  # memory of its own
    batch["td_error"] = -(batch["id"] + 1.0)
    buffer.update_tensordict_priority(batch)
    buffer.flush()
    expected = torch.ones(40)
    expected[batch["id"]] = batch["id"] + 1.25
    torch.testing.assert_close(buffer.priority, expected)

    # overwritten meanwhile: dropped by the shard, counted here
    for key in (0, 1):
        buffer.writer().extend(numbered(100, 64), key=key)
    buffer.update_tensordict_priority(batch)
    buffer.flush()
    assert buffer.stats()["stale_updates"] == 16

    with pytest.raises(SchemaError, match="'td_error'"):
        buffer.update_tensordict_priority(batch.exclude("td_error"))
    with pytest.raises(PriorityError, match="nan"):
        buffer.update_priority([0], [math.nan], shard=[0])
    with pytest.raises(IndexRangeError, match="expected 0 <= index < 64, the slots of a shard"):
        buffer.update_priority([64], [1.0], shard=[0])

    buffer.alpha = 0.0
    counts = buffer.sample(4000)["shard"].bincount()
    assert chisquare(counts.numpy()).pvalue > 1e-3
    buffer.beta = 0.9
    buffer.beta, buffer.eps = 0.5, 0.125
    assert (buffer.alpha, buffer.beta, buffer.eps) == (0.0, 0.5, 0.125)
    buffer.update_priority([3], [1.0], shard=[1])
    buffer.flush()
    assert buffer.priority[67] == 1.125


@pytest.mark.slow
def test_prefetched_batches_come_in_the_size_asked_for(sharded, numbered):
    buffer = sharded(2, 64, prefetch=2, draw="stratified", beta_increment=0.25)
    with pytest.raises(EmptyBufferError):
        buffer.sample(4)
    with pytest.raises(ConfigurationError, match="batch_size"):
        buffer.sample()
    buffer.add(numbered(0, 1)[0], 0.5)
    buffer.extend(numbered(1, 9))
    for n in (4, 4, 7, 7, 4):
        assert buffer.sample(n).batch_size == (n,)
    buffer.increase_beta()
    assert buffer.beta == pytest.approx(0.65)


def test_what_shards_would_refuse_is_refused_where_it_comes_from(sharded, numbered):
    buffer = sharded(1, 64, example=numbered(0, 1)[0])
    writer = buffer.writer()
    with pytest.raises(SchemaError, match="int64"):
        writer.extend(numbered(0, 4).apply(lambda leaf: leaf.double()))
    with pytest.raises(SchemaError, match="reserved"):
        writer.extend(numbered(0, 4).set("shard", torch.zeros(4)))
    with pytest.raises(SchemaError, match="add"):
        writer.extend(numbered(0, 4)[0])
    with pytest.raises(SchemaError, match=r"give batch_size=\[4\]"):
        writer.extend(TensorDict(numbered(0, 4).to_dict()))
    with pytest.raises(SchemaError, match=r"\.flatten\(0, 1\) makes them 4 transitions"):
        writer.extend(numbered(0, 4).reshape(2, 2))
    with pytest.raises(SchemaError, match=r"use extend\(\)"):
        writer.add(numbered(0, 4))
    with pytest.raises(SchemaError, match="'s': expected a tensor"):
        writer.extend(numbered(0, 4).set("s", list("abcd")))
    with pytest.raises(PriorityError, match="at least 0"):
        writer.extend(numbered(0, 2), [1.0, -1.0])
    for wrong in (torch.ones(2), "x", math.nan):
        with pytest.raises(PriorityError, match="priority: expected"):
            writer.add(numbered(0, 1)[0], wrong)
    assert len(buffer) == 0


def test_kinds_that_differ_between_shards_are_recognised():
    from per_td.ray.batches import _leaves
    from per_td.ray.shard import Shard

    parts = []
    for number, leaf in enumerate((torch.zeros(4), torch.zeros(4), torch.zeros(4).double())):
        shard = Shard({"capacity": 8}, seed=0)
        shard.extend([(("x",), str(leaf.dtype)[6:], leaf.numpy())])
        parts.append((number, shard.sample([3])))
    assert _leaves(parts[:2])["x",].shape == (6,)
    with pytest.raises(SchemaError, match=r"one kind in all shards, got .*float32.* and .*float64"):
        _leaves(parts)


@pytest.mark.slow
def test_shards_take_dicts(sharded, numbered):
    buffer = sharded(1, 64)
    assert buffer.extend(numbered(0, 4).to_dict()).index.tolist() == [0, 1, 2, 3]
    assert buffer.add({"id": 4, "x": np.zeros(3, np.float32)}, 2.0).index.tolist() == [4]
    batch = buffer.sample(8).to_dict()
    buffer.update_tensordict_priority(batch | {"td_error": torch.ones(8)})
    buffer.flush()
    assert buffer.priority.shape == (5,)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_shards": 0}, "num_shards"),
        ({"capacity_per_shard": 0}, "capacity_per_shard"),
        ({"draw": "without_replacement"}, "draw: expected one of independent, stratified"),
        ({"prefetch": -1}, "prefetch"),
        ({"prefetch": True}, "prefetch"),
        ({"batches_per_request": 0}, "batches_per_request"),
        ({"batches_per_request": 2.5}, "batches_per_request"),
        ({"generator": 5}, "generator: expected a torch.Generator, got int"),
        ({"beta": 2.0}, "beta"),
        ({"new_priority": "?"}, "new_priority"),
        ({"timeout_s": -1.0}, "timeout_s"),
        ({"refresh_s": -1.0}, "refresh_s"),
        ({"checkpoint_every": 0}, "checkpoint_every"),
        ({"example": {"index": torch.zeros(())}}, "example: 'index' is a reserved key"),
        ({"example": 5}, "example: expected a TensorDict"),
        ({"example": {"shard": torch.zeros(())}}, "'shard' is a reserved key"),
        ({"shard_device": "nowhere"}, "shard_device: expected a device, got 'nowhere'"),
        ({"shard_device": "meta"}, "shard_device"),
        ({"shard_device": None}, "shard_device"),
        ({"device": "nowhere"}, "device"),
        ({"checkpoint_dir": 5}, "checkpoint_dir: expected a path, got 5"),
        ({"name": 5}, "name: expected a name"),
        ({"name": ""}, "name: expected a name"),
        ({"actor_options": 5}, "actor_options: expected a dict"),
        ({"start_timeout_s": math.nan}, "start_timeout_s"),
        ({"timeout_s": None}, "timeout_s"),
        ({"batch_size": 2.5}, "batch_size"),
        ({"alpha": "x"}, "alpha"),
    ],
)
def test_wrong_arguments_are_refused_before_an_actor_starts(options, match, monkeypatch):
    from per_td.ray import ShardedReplayBuffer

    def start(_):
        raise AssertionError("expected no actor")

    monkeypatch.setattr(ray, "remote", start)
    with pytest.raises((ConfigurationError, SchemaError), match=match):
        ShardedReplayBuffer(**{"num_shards": 2, "capacity_per_shard": 8} | options)


def test_options_that_ray_refuses_are_named(sharded):
    for wrong in ({"num_cpus": -1}, {"what": 1}, {"name": "two of one name"}):
        with pytest.raises(ConfigurationError, match="actor_options: expected options that Ray"):
            sharded(2, 8, actor_options=wrong)


WRONG = [None, "x", math.nan, 0, -1, 2.5, [], [[1, 2]], torch.zeros(2, 3), object(), {}, True]


def calls(buffer, numbered):
    """Public calls of a buffer and a writer with one wrong argument, by name."""
    one, writer = torch.zeros(1, dtype=torch.int64), buffer.writer()
    yield "sample", lambda x: buffer.sample(x)
    yield "extend", lambda x: buffer.extend(x)
    yield "add", lambda x: buffer.add(x)
    yield "priority of add", lambda x: buffer.add(numbered(0, 1)[0], x)
    yield "priority of extend", lambda x: buffer.extend(numbered(0, 2), x)
    yield "key", lambda x: writer.extend(numbered(0, 2), key=x)
    yield "update_priority", lambda x: buffer.update_priority(x, one, shard=one)
    yield "td_error", lambda x: buffer.update_priority(one, x, shard=one)
    yield "generation", lambda x: buffer.update_priority(one, one, x, shard=one)
    yield "shard", lambda x: buffer.update_priority(one, one, shard=x)
    yield "update_tensordict_priority", lambda x: buffer.update_tensordict_priority(x)
    yield "first", lambda x: buffer.writer(x)
    yield "timeout_s", lambda x: buffer.writer(timeout_s=x)
    yield "shards", lambda x: type(writer)(x)
    yield "save", lambda x: buffer.save(x)
    yield "load", lambda x: type(buffer).load(x)
    for name in ("alpha", "beta", "eps", "beta_increment", "batch_size"):
        yield name, lambda x, name=name: setattr(buffer, name, x)


FINE = {
    "sample": [None],
    "priority of add": [None, 0, 2.5],
    "priority of extend": [None],
    "key": [None, 0, -1, True],
    "update_priority": [0],
    "td_error": [0, -1, 2.5],
    "generation": [None, 0, -1],
    "shard": [0],
    "first": [0],
    "timeout_s": [0, 2.5, True],
    "shards": [[[1, 2]]],
    "save": ["x"],
    "alpha": [0, 2.5, True],
    "beta": [0, True],
    "eps": [0, 2.5, True],
    "beta_increment": [0, 2.5, True],
    "batch_size": [None],
}


def test_wrong_arguments_of_calls_are_refused_by_name_before_anything_is_sent(
    sharded, numbered, monkeypatch, tmp_path
):
    buffer = sharded(2, 64)
    buffer.extend(numbered(0, 20))
    monkeypatch.chdir(tmp_path)
    raw, sent = [], []
    with monkeypatch.context() as patch:
        patch.setattr(ray, "put", sent.append)
        patch.setattr(ray.actor.ActorMethod, "_remote", lambda *_, **__: sent.append(1))
        for name, call in calls(buffer, numbered):
            for wrong in WRONG:
                if any(type(wrong) is type(x) and wrong == x for x in FINE.get(name, [])):
                    continue
                try:
                    call(wrong)
                    raw.append((name, wrong, "accepted"))
                except PerTdError:
                    pass
                except Exception as error:
                    raw.append((name, wrong, repr(error)))
                if sent:
                    raw.append((name, wrong, "sent"))
                    sent.clear()
    assert [each for each in raw if each[:2] != ("load", "x")] == []
    assert len(buffer) == 20
    assert buffer.sample(4).batch_size == (4,)


def test_a_beta_a_few_roundings_above_1_is_1(sharded):
    buffer = sharded(1, 8, beta=1 + 1e-15)
    assert buffer.beta == 1.0
    buffer.beta = 0.5
    buffer.beta = 1 + 4e-16
    assert buffer.beta == 1.0


def run(sharded, numbered, around):
    """Weights, numbers and priorities of a few steps, every other one under `around`."""
    with around():
        buffer = sharded(2, 64, 8, beta_increment=0.1, prefetch=1, refresh_s=1e9)
        for key in (0, 1):
            buffer.writer().extend(numbered(20 * key, 20), key=key)
        buffer.add(numbered(50, 1)[0], torch.tensor(0.3, dtype=torch.float32))
        assert len(buffer) == 41
    batches = []
    for step in range(6):
        with around() if step % 2 else nullcontext():
            batch = buffer.sample()
            batch["td_error"] = batch["id"] * torch.tensor(0.1, dtype=torch.float32)
            buffer.update_tensordict_priority(batch)
            buffer.flush()
            buffer.increase_beta()
        batches.append(batch)
    with around():
        buffer.alpha, buffer.eps = 0.3, 0.125
        buffer.update_priority([3], np.array([0.7]), shard=[1])
        buffer.flush()
    batches.append(buffer.sample())
    with around():
        priority = buffer.priority
    return [*(batch["priority_weight"] for batch in batches), priority], torch.cat(
        [batch["id"] for batch in batches]
    )


@pytest.mark.parametrize("dtype", slow_but([torch.float64], [torch.float64, torch.bfloat16]))
def test_the_default_dtype_and_inference_mode_change_nothing(dtype, sharded, numbered):
    @contextmanager
    def changed():
        torch.set_default_dtype(dtype)
        try:
            with torch.inference_mode():
                yield
        finally:
            torch.set_default_dtype(torch.float32)

    plain, found = (run(sharded, numbered, around) for around in (nullcontext, changed))
    assert torch.equal(plain[1], found[1])
    for one, two in zip(plain[0], found[0], strict=True):
        assert one.dtype == two.dtype == torch.float32
        assert torch.equal(one, two)


@pytest.mark.slow
def test_a_saved_buffer_comes_back(sharded, numbered, tmp_path):
    from per_td.errors import CheckpointError
    from per_td.ray import ShardedReplayBuffer

    buffer = sharded(1, 64, 16, beta=0.6)
    for start in (0, 20):
        buffer.extend(numbered(start, 20), torch.rand(20))
    buffer.beta, buffer.alpha = 0.7, 0.3
    buffer.save(tmp_path)
    again = ShardedReplayBuffer.load(tmp_path, actor_options={"num_cpus": 0})
    with pytest.raises(ConfigurationError, match=r"beta: expected the one saved, got 0\.5 too"):
        ShardedReplayBuffer.load(tmp_path, beta=0.5)
    try:
        assert (again.alpha, again.beta, again.batch_size) == (0.3, 0.7, 16)
        torch.testing.assert_close(again.priority, buffer.priority)
        assert set(again.sample(200)["id"].tolist()) <= set(range(40))
    finally:
        again.close()
    (tmp_path / "learner.pt").unlink()
    from per_td.checkpoint import file as checkpoint

    checkpoint.write(tmp_path / "learner.pt", {"format": "?"})
    with pytest.raises(CheckpointError, match="expected the state of a ShardedReplayBuffer"):
        ShardedReplayBuffer.load(tmp_path)


def test_a_load_that_fails_leaves_no_actor(sharded, tmp_path):
    from per_td.errors import CheckpointError
    from per_td.ray import ShardedReplayBuffer, saving

    state = {
        "num_shards": 1,
        "batch_size": 5,
        "settings": {
            "alpha": 0.5,
            "eps": 0.1,
            "weight_normalization": "batch",
            "new_priority": "buffer_max",
            "draw": "independent",
            "layout": "auto",
            "capacity": 8,
        },
        "beta": 0.5,
        "beta_increment": 0.0,
        "generator": torch.zeros(7, dtype=torch.uint8),
    }
    options = {"actor_options": {"num_cpus": 0}, "name": "loaded"}
    saving.write(tmp_path, state, "none")
    with pytest.raises(CheckpointError, match="generator: expected the state of one"):
        ShardedReplayBuffer.load(tmp_path, generator=torch.Generator(), **options)
    assert has_ended("loaded-0")
    with pytest.raises(FileNotFoundError, match="none"):  # the shard's file
        ShardedReplayBuffer.load(tmp_path, **options)
    assert has_ended("loaded-0")
    saving.write(tmp_path, state | {"settings": {}}, "none")
    with pytest.raises(CheckpointError, match=r"expected token, .* with the settings alpha"):
        ShardedReplayBuffer.load(tmp_path)


@pytest.mark.slow
def test_a_save_that_fails_leaves_the_one_before(sharded, numbered, tmp_path):
    from per_td.ray import ShardedReplayBuffer, saving

    buffer = sharded(2, 64)
    buffer.writer().extend(numbered(0, 10), key=0)
    buffer.save(tmp_path)
    buffer.writer().extend(numbered(10, 10), key=1)
    with pytest.MonkeyPatch.context() as patch:
        file_of = saving.file_of
        elsewhere = {0: tmp_path, 1: tmp_path / "no such folder"}
        patch.setattr(saving, "file_of", lambda _, k, token: file_of(elsewhere[k], k, token))
        with pytest.raises(ray.exceptions.RayTaskError, match="No such file"):
            buffer.save(tmp_path)
    with ShardedReplayBuffer.load(tmp_path, actor_options={"num_cpus": 0}) as again:
        assert len(again) == 10
    buffer.save(tmp_path)
    with ShardedReplayBuffer.load(tmp_path, actor_options={"num_cpus": 0}) as again:
        assert len(again) == 20
    assert len(list(tmp_path.iterdir())) == 3  # nothing of the others is left


@pytest.mark.slow
def test_actors_write_without_passing_through_the_learner(sharded, numbered):
    buffer = sharded(2, 256)

    @ray.remote(num_cpus=0)
    def act(writer, start):
        return [writer.extend(numbered(start + k, 1)).shard for k in range(6)]

    shards = ray.get([act.remote(buffer.writer(k), 10 * k) for k in range(2)])
    assert shards == [[0, 1] * 3, [1, 0] * 3]
    assert len(buffer) == 12
    assert set(buffer.sample(500)["id"].tolist()) == {
        10 * a + k for a in range(2) for k in range(6)
    }


@pytest.mark.slow
def test_shards_with_a_name_outlive_their_learner(sharded, numbered):
    first = sharded(1, 64, name="outlives")
    first.extend(numbered(0, 10))
    again = sharded(1, 64, name="outlives", checkpoint_every=64)  # None means capacity
    assert len(again) == 10
    assert again.sample(8)["id"].max() < 10


def has_ended(name):
    """Wait for the end of an actor that was killed: Ray gets round to it some time later."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        try:
            ray.get_actor(name)
        except ValueError:
            return True
        time.sleep(0.02)
    return False


NAMED = {"alpha": 0.5, "eps": 0.25, "name": "settled"}


@pytest.fixture(scope="module")
def settled(cluster):
    """A buffer with a name."""
    from per_td.ray import ShardedReplayBuffer

    example = TensorDict({"x": torch.zeros(3)})
    buffer = ShardedReplayBuffer(2, 64, **NAMED, example=example, actor_options={"num_cpus": 0})
    buffer.extend(TensorDict({"x": torch.rand(6, 3)}, [6]), torch.arange(6.0))
    yield buffer
    buffer.close()


@pytest.mark.parametrize(
    ("other", "match"),
    [
        ({"weight_normalization": "buffer"}, "weight_normalization is 'batch', asked for 'buffer'"),
        ({"capacity_per_shard": 999}, "capacity_per_shard is 64, asked for 999"),
        ({"alpha": 0.9}, "alpha is 0.5, asked for 0.9"),
        ({"eps": 0.5}, "eps is 0.25, asked for 0.5"),
        ({"new_priority": "ever_max"}, "new_priority is 'buffer_max', asked for 'ever_max'"),
        ({"draw": "stratified"}, "draw is 'independent', asked for 'stratified'"),
        ({"layout": "columns"}, "layout is 'auto', asked for 'columns'"),
        ({"num_shards": 1}, "num_shards is 2, asked for 1"),
        ({"num_shards": 3}, "num_shards is 2, asked for 3"),
        ({"fsync": True}, "fsync is False, asked for True"),
        ({"checkpoint_every": 9}, "checkpoint_every is 64, asked for 9"),
        ({"checkpoint_dir": "/x"}, "checkpoint_dir is None, asked for '/x/shard-00000'"),
        ({"example": {"x": torch.zeros(4)}}, r"example is .*\[3\].*, asked for .*\[4\]"),
    ],
)
def test_shards_of_a_name_with_other_settings_are_refused_and_go_on(settled, other, match):
    from per_td.ray import ShardedReplayBuffer

    given = {"num_shards": 2, "capacity_per_shard": 64} | NAMED | other
    with pytest.raises(ConfigurationError, match=match):
        ShardedReplayBuffer(**given, actor_options={"num_cpus": 0})
    assert settled.stats()["shards_living"] == 2
    assert settled.sample(8).batch_size == (8,)
    total = sum(report.total for report in settled.reports())
    assert total == pytest.approx(sum(k**0.5 for k in range(6)), rel=1e-6)
    assert has_ended("settled-2")  # what was started for it


def test_shards_of_a_name_are_found_with_the_settings_that_they_have(settled):
    from per_td.ray import ShardedReplayBuffer

    settled.alpha = 0.75
    try:
        again = ShardedReplayBuffer(
            np.int64(2),
            np.int64(64),
            5,
            **NAMED | {"alpha": np.float32(0.75)},
            shard_device=torch.device("cpu"),
            example=TensorDict({"x": torch.zeros(3)}),
            beta=0.9,
        )
        assert len(again) == 6
        assert again.sample()["x"].shape == (5, 3)
    finally:
        settled.alpha = 0.5


@pytest.mark.slow
def test_what_a_dead_learner_was_told_is_there_for_the_next(sharded, numbered):
    @ray.remote(num_cpus=0)
    class Learner:
        def write(self):
            from per_td.ray import ShardedReplayBuffer

            options = {"actor_options": {"num_cpus": 0}, "name": "of the dead"}
            self.buffer = ShardedReplayBuffer(2, 64, **options)
            self.buffer.extend(numbered(0, 10), torch.full((10,), 3.0))
            self.buffer.extend(numbered(10, 20), torch.full((20,), 5.0))
            return True

    learner = Learner.remote()
    assert ray.get(learner.write.remote())
    ray.kill(learner)
    again = sharded(2, 64, name="of the dead")
    assert len(again) == 30
    assert again.priority.tolist() == [3.0] * 10 + [5.0] * 20
    assert set(again.sample(2000)["id"].tolist()) == set(range(30))


@pytest.mark.slow
def test_settings_are_plain_numbers_and_take_effect_when_set_or_are_refused(
    sharded, numbered, tmp_path
):
    number, real = np.int64, np.float32
    buffer = sharded(
        number(1),
        number(64),
        number(16),
        alpha=real(0.5),
        beta=real(0.25),
        eps=real(0.5),
        beta_increment=real(0.125),
        prefetch=number(1),
        draw=np.str_("stratified"),
        priority_clip=(real(0.5), number(2)),
        track_draws=np.bool_(True),
    )
    buffer.extend(numbered(0, 20))
    assert len(buffer.sample()) == 16
    buffer.batch_size = number(8)
    assert [len(buffer.sample()) for _ in range(3)] == [8] * 3
    buffer.beta_increment = 0.5
    buffer.increase_beta()
    assert buffer.beta == 0.75
    for name, value in {
        "batch_size": 0,
        "beta_increment": -1,
        "alpha": "x",
        "num_shards": 2,
        "capacity": 128,
        "device": "cpu",
        "generator": torch.Generator(),
        "draw": "independent",
        "weight_normalization": "none",
        "new_priority": "ever_max",
        "priority_clip": (2.0, 1.0),
        "track_draws": False,
        "beta_schedule": None,
        "prefetch": 3,
        "batches_per_request": 3,
        "epsilon": 0.1,
    }.items():
        with pytest.raises(ConfigurationError, match=rf"^{name}: expected"):
            setattr(buffer, name, value)
    assert (buffer.batch_size, buffer.beta_increment, buffer.alpha) == (8, 0.5, 0.5)
    assert (buffer.num_shards, buffer.capacity, buffer.prefetch) == (1, 64, 1)
    assert (buffer.draw, buffer.weight_normalization) == ("stratified", "batch")
    assert buffer.new_priority == "buffer_max"
    assert buffer.generator is not None
    buffer.save(tmp_path)
    from per_td.ray import saving

    state, _ = saving.read(tmp_path)
    settings = state["settings"]
    assert settings.pop("priority_clip") == [0.5, 2.0]
    assert settings.pop("track_draws") is True
    assert {type(value) for value in settings.values()} <= {int, float, str}
    assert (state["batch_size"], state["beta_increment"]) == (8, 0.5)


def test_a_shard_keeps_what_transitions_are_like_when_an_empty_one_is_saved(tmp_path):
    from per_td.ray.shard import Shard

    example = TensorDict({"x": torch.zeros(3)}, [])
    Shard({"capacity": 8, "example": example}, seed=0).save(str(tmp_path / "shard.pt"))
    other = Shard({"capacity": 8}, seed=0)
    other.load(str(tmp_path / "shard.pt"))
    with pytest.raises(SchemaError, match="per transition"):
        other.extend([(("x",), "float32", np.zeros((2, 4), np.float32))])

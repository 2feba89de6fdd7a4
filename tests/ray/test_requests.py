"""Messages that carry several batches, with shards that answer in this process."""

import pytest
import torch

pytest.importorskip("ray")

from per_td.errors import ConfigurationError, IndexRangeError
from per_td.ray import ShardError, saving
from per_td.ray.shard import Shard

SLOTS = 64  # of each shard that `local` makes


def learned(batch):
    """TD errors that tell transitions and batches apart."""
    return batch["priority_weight"] + batch["id"] % 100 + 1.0


def update(buffer, batch):
    batch["td_error"] = learned(batch)
    buffer.update_tensordict_priority(batch)


def held(buffer):
    """Number of priorities that wait in the learner."""
    return sum(len(part[0]) for parts in buffer._updates._held.values() for part in parts)


@pytest.mark.parametrize(("k", "prefetch"), [(1, 0), (4, 0), (16, 0), (4, 2), (16, 2), (2, 5)])
def test_k_batches_cost_one_request_and_one_message_of_updates_per_shard(k, prefetch, local):
    buffer = local(batches_per_request=k, prefetch=prefetch)
    steps = 32
    for _ in range(steps):
        update(buffer, buffer.sample())
    ahead = sum(len(request.batches) for request in buffer._ahead)
    assert prefetch <= ahead < prefetch + k
    for actor in buffer._shards:
        assert actor.count("sample") == (steps + ahead) / k
        assert steps / k <= actor.count("update") <= steps / k + 1
    assert buffer.stats()["stale_updates"] == 0


@pytest.mark.parametrize(
    ("prefetch", "given", "k"), [(0, None, 1), (1, None, 1), (6, None, 6), (6, 2, 2), (0, 3, 3)]
)
def test_prefetch_decides_how_many_batches_a_request_asks_for_unless_told(
    prefetch, given, k, local
):
    buffer = local(prefetch=prefetch, batches_per_request=given)
    assert buffer.batches_per_request == k
    with pytest.raises(ConfigurationError, match=r"^batches_per_request: expected"):
        buffer.batches_per_request = 5


@pytest.mark.parametrize("normalization", ["none", "batch", "buffer"])
@pytest.mark.parametrize("draw", ["independent", "stratified"])
def test_batches_and_priorities_are_those_of_a_request_and_a_message_for_each(
    draw, normalization, local
):
    """The twin sends everything at once, and learns from four batches before it updates."""
    rules = {"draw": draw, "weight_normalization": normalization, "beta": 0.7}
    twin, ours = (local(batches_per_request=k, **rules) for k in (1, 4))
    for _ in range(6):
        last = []
        for buffer in (twin, ours):
            batches = [buffer.sample() for _ in range(4)]
            for batch in batches:
                update(buffer, batch)
            last.append(batches)
        for one, two in zip(*last, strict=True):
            assert one.keys() == two.keys()
            for key in ("id", "index", "shard", "priority_weight"):
                assert torch.equal(one[key], two[key])
        assert torch.equal(twin.priority, ours.priority)
    assert twin.stats() == ours.stats()
    assert sum(actor.count("update") for actor in twin._shards) == 6 * 4 * 3
    assert sum(actor.count("update") for actor in ours._shards) == 6 * 3


def test_weights_and_sizes_are_those_of_the_moment_when_a_batch_is_handed_out(local):
    buffer = local(1, batches_per_request=2, beta=0.5, weight_normalization="none")
    one = buffer.sample()
    buffer.beta = 1.0
    buffer.extend({"id": torch.arange(20)})
    assert len(buffer) == 40
    two = buffer.sample()
    for batch, beta, size in ((one, 0.5, 20), (two, 1.0, 40)):
        drawn = batch["priority_weight"].double() ** (-1 / beta) / size  # the probability
        priority = buffer.priority.double()[batch["index"]]
        torch.testing.assert_close(
            drawn, priority / buffer.priority[:20].double().sum(), rtol=1e-5, atol=0.0
        )


def test_batches_of_another_size_or_alpha_are_asked_for_anew(local):
    buffer = local(batches_per_request=4)
    assert len(buffer.sample(8)) == 8
    assert len(buffer.sample(9)) == 9
    assert [actor.count("sample") for actor in buffer._shards] == [2, 2, 2]
    buffer.alpha = 0.0
    buffer.sample(9)
    assert [actor.count("sample") for actor in buffer._shards] == [3, 3, 3]


def close_and_look(buffer, tmp_path):
    buffer.close()
    for actor in buffer._shards:
        assert actor.messages[-2:] == ["update", "kill"]


def be_late(buffer, tmp_path):
    """A shard is late with its part of a request that was made before the updates."""
    request = buffer._batches.request(30, 3)
    next(iter(request.asked)).state = "late"
    assert set(buffer._batches.collect(request, 1.0)["shard"].tolist()) == {1, 2}
    assert buffer._ledger.living == [False, True, True]


def save(buffer, tmp_path):
    buffer.save(tmp_path)
    state, _ = saving.read(tmp_path)
    again = Shard({"capacity": SLOTS}, seed=0)
    again.load(saving.file_of(tmp_path, 0, state["token"]))
    assert (again.priority() == buffer._shards[0].shard.priority()).all()


CALLS = {
    "k": lambda buffer, _: buffer.update_priority([0], [7.0], [2**50], shard=[0]),
    "the next request": lambda buffer, _: buffer.sample(31),
    "flush": lambda buffer, _: buffer.flush(),
    "save": save,
    "checkpoint": lambda buffer, _: buffer.checkpoint(),
    "close": close_and_look,
    "stats": lambda buffer, _: buffer.stats(),
    "reports": lambda buffer, _: buffer.reports(),
    "priority": lambda buffer, _: buffer.priority,
    "len": lambda buffer, _: len(buffer),
    "alpha": lambda buffer, _: setattr(buffer, "alpha", 0.5),
    "eps": lambda buffer, _: setattr(buffer, "eps", 100.0),
    "a late answer": be_late,
    "an update without generations": lambda buffer, _: buffer.update_priority(
        [19], [1.0], shard=[0]
    ),
}


@pytest.mark.parametrize("call", CALLS)
def test_updates_that_are_held_back_arrive(call, local, tmp_path):
    buffer = local(batches_per_request=3, checkpoint_dir=tmp_path / "log")
    before = [actor.shard.priority().copy() for actor in buffer._shards]
    batches = [buffer.sample(), buffer.sample()]
    for batch in batches:
        update(buffer, batch)
    assert held(buffer) == 64
    for actor in buffer._shards:
        assert not actor.count("update")
        actor.messages.clear()
    CALLS[call](buffer, tmp_path)
    assert held(buffer) == 0
    for shard, actor in enumerate(buffer._shards):
        first = 1 if call == "a late answer" else 0
        assert actor.messages[first] == "update"  # before what the call asks for
        expected = torch.from_numpy(before[shard])
        for batch in batches:
            mine = batch["shard"] == shard
            expected[batch["index"][mine]] = learned(batch)[mine] + 0.25
        found = torch.from_numpy(actor.shard.priority())
        at = slice(0, 19 if call == "an update without generations" and shard == 0 else None)
        assert torch.equal(found[at], expected[at])
    assert buffer._replies.lost_updates == 0


def test_an_update_without_generations_follows_those_held_back_and_is_not_held_back(local):
    buffer = local(1, batches_per_request=3)
    batch = buffer.sample()
    update(buffer, batch)
    index = batch["index"][:1]
    buffer.update_priority(index, [5.0], shard=[0])
    assert buffer._shards[0].messages[-2:] == ["update", "update"]
    assert buffer.priority[index] == 5.25
    buffer.extend({"id": torch.arange(SLOTS)}, torch.ones(SLOTS))  # overwrites all
    assert torch.equal(buffer.priority, torch.ones(SLOTS))


def test_what_is_overwritten_while_its_update_is_held_back_keeps_its_own_priority(local):
    buffer = local(1, batches_per_request=3)
    update(buffer, buffer.sample())
    buffer.extend({"id": torch.arange(SLOTS)}, torch.ones(SLOTS))
    assert held(buffer) == 32
    assert buffer.stats()["stale_updates"] == 32
    assert torch.equal(buffer.priority, torch.ones(SLOTS))


def test_what_is_held_back_is_a_copy(local):
    buffer = local(1, batches_per_request=2)
    batch = buffer.sample()
    columns = [batch[key] for key in ("index", "generation", "shard")]
    td_error = learned(batch)
    expected = buffer.priority
    expected[batch["index"]] = td_error + 0.25
    buffer.update_priority(columns[0], td_error, columns[1], shard=columns[2])
    for each in (*columns, td_error):
        each.zero_()
    assert torch.equal(buffer.priority, expected)


def test_a_lost_shard_loses_what_is_held_back_for_it_and_the_others_get_theirs(local):
    buffer = local(batches_per_request=4)
    batches = [buffer.sample() for _ in range(3)]
    for batch in batches:
        update(buffer, batch)
    buffer._shards[1].state = "lost"
    lost = sum(int((batch["shard"] == 1).sum()) for batch in batches)
    ahead = buffer.sample()  # drawn before
    assert set(ahead["shard"].tolist()) == {0, 1, 2}
    stats = buffer.stats()
    assert stats["lost_updates"] == lost
    assert stats["shards_living"] == 2
    update(buffer, ahead)  # the shard is known to be lost now
    buffer.flush()
    assert buffer._shards[1].count("update") == 1
    assert buffer.stats()["lost_updates"] == lost + int((ahead["shard"] == 1).sum())
    assert set(buffer.sample()["shard"].tolist()) == {0, 2}
    for shard in (0, 2):
        assert (torch.from_numpy(buffer._shards[shard].shard.priority()) > 1.25).any()


def test_a_shard_that_does_not_answer_does_not_keep_a_buffer_from_closing(local):
    buffer = local(batches_per_request=2)
    update(buffer, buffer.sample())
    buffer._shards[0].state = "late"
    buffer.close()
    assert [actor.messages[-1] for actor in buffer._shards] == ["kill"] * 3


def test_a_shard_that_refuses_an_update_does_not_keep_a_buffer_from_closing(local):
    buffer = local(2)
    buffer.update_priority([40], [1.0], shard=[0])  # no such transition
    with pytest.raises(IndexRangeError):
        buffer.close()
    assert [actor.messages[-1] for actor in buffer._shards] == ["kill"] * 2


def test_a_request_that_failed_is_made_anew(local):
    buffer = local(2, batches_per_request=4)
    for actor in buffer._shards:
        actor.state = "lost"
    with pytest.raises(ShardError, match="all are lost or late"):
        buffer.sample()
    assert not buffer._ahead
    for actor in buffer._shards:
        actor.state = "answers"
    assert buffer.sample().batch_size == (32,)

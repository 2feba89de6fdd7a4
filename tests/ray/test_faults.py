"""Shards that die, shards that are slow, writers that die: under load, with real processes."""

import contextlib
import os
import signal
import time

import pytest
import torch
from scipy.stats import chisquare

ray = pytest.importorskip("ray")
OPTIONS = {"num_cpus": 0}
RECOVERY_S = 120.0  # for machines with much else to do
TIMEOUT_S = 2.0  # long enough for the living, also on a busy machine
KILLS = 3


@ray.remote(num_cpus=0)
def act(writer, numbered, start, stop):
    """Write small batches until the file `stop` is there; the numbers that were acknowledged."""
    from per_td.ray import ShardError

    acknowledged = []
    while not stop.exists():
        try:
            writer.extend(numbered(start, 5))
        except ShardError:  # all were lost at once: not acknowledged
            continue
        acknowledged.extend(range(start, start + 5))
        start += 5
        time.sleep(0.002)
    return acknowledged


def pid_of(buffer, shard):
    return ray.get(buffer._shards[shard].__ray_call__.remote(lambda self: os.getpid()))


def kill(buffer, shard):
    """Kill a shard, and wait until it is dead: Ray gets round to it some time after the call."""
    pid = pid_of(buffer, shard)
    ray.kill(buffer._shards[shard], no_restart=False)
    with contextlib.suppress(ProcessLookupError):
        while True:
            os.kill(pid, 0)
            time.sleep(0.005)


def held_by(buffer):
    """The numbers in each shard."""
    answers = ray.get([shard.transitions.remote() for shard in buffer._shards])
    return [next(v for key, _, v in packed if key == ("id",)).tolist() for packed in answers]


def all_back(buffer):
    """Wait until every shard is restarted; the seconds it took."""
    start = time.monotonic()
    while not all(buffer.reports()):
        assert time.monotonic() - start < RECOVERY_S, "shards did not come back"
        time.sleep(0.05)
    return time.monotonic() - start


@pytest.mark.slow
def test_killing_shards_under_load_loses_nothing_acknowledged(sharded, numbered, tmp_path):
    from per_td.ray import ShardError

    buffer = sharded(
        2,
        20_000,
        32,
        checkpoint_dir=tmp_path,
        checkpoint_every=500,
        timeout_s=TIMEOUT_S,
        refresh_s=0.1,
        prefetch=2,
    )
    for key in (0, 1):  # no shard is ever empty
        buffer.writer().extend(numbered(10**9 + 50 * key, 50), key=key)
    stop = tmp_path / "stop"
    writers = [
        act.remote(buffer.writer(k, timeout_s=TIMEOUT_S), numbered, 10**6 * k, stop)
        for k in range(2)
    ]
    killed, waits, away, meanwhile = 0, [], [], 0
    begin = time.monotonic()
    while len(away) < KILLS:
        assert time.monotonic() - begin < KILLS * RECOVERY_S, "shards did not come back"
        if killed == len(away) and len(waits) >= 20 * (killed + 1) + meanwhile:
            kill(buffer, killed % 2)
            lost, noticed = time.monotonic(), False
            killed += 1
        before = time.monotonic()
        try:
            batch = buffer.sample()
        except ShardError:  # the other one was late just then
            continue
        waits.append(time.monotonic() - before)
        if killed > len(away):
            living = all(buffer._ledger.living)
            noticed = noticed or not living
            meanwhile += not living
            if noticed and living:
                away.append(time.monotonic() - lost)
        assert batch.batch_size == (32,)
        assert torch.isfinite(batch["priority_weight"]).all()
        batch["td_error"] = torch.rand(32)
        buffer.update_tensordict_priority(batch)
    stop.touch()
    parts = ray.get(writers)
    held = [number for part in held_by(buffer) for number in part]
    assert all(parts)
    for part in parts:
        assert set(part) <= set(held)
    assert meanwhile > KILLS  # the learner went on with the other shard
    assert buffer.stats()["shards_lost"] >= KILLS
    figures = {
        "acknowledged": sum(map(len, parts)),
        "twice": len(held) - len(set(held)),
        "batches": len(waits),
        "while_one_was_away": meanwhile,
        "longest_batch_s": round(max(waits), 2),
        "away_s": [round(seconds, 1) for seconds in away],
    }
    print(figures)  # for docs/ray.md


def test_a_lost_shard_counts_nothing_until_it_is_back_empty(sharded, numbered):
    buffer = sharded(
        2, 64, timeout_s=TIMEOUT_S, refresh_s=0.1, beta=1.0, weight_normalization="none"
    )
    for key, (start, n) in enumerate(((0, 40), (100, 10))):
        buffer.writer().extend(numbered(start, n), key=key)
    assert len(buffer) == 50
    before = buffer.sample(64)
    assert torch.allclose(before["priority_weight"], torch.ones(64))
    kill(buffer, 0)
    batch = buffer.sample(200)
    assert (batch["id"] >= 100).all()
    assert torch.allclose(batch["priority_weight"], torch.ones(200))  # N = 10, all equal
    all_back(buffer)
    assert len(buffer) == 10
    before["td_error"] = torch.full((64,), 9.0)  # of slots that are gone, or hold others
    buffer.update_tensordict_priority(before)
    buffer.flush()
    stats = buffer.stats()
    lost = int((before["shard"] == 0).sum())
    assert stats["stale_updates"] + stats["lost_updates"] == lost
    buffer.writer().extend(numbered(0, 30), key=0)
    assert len(buffer) == 40
    counts = buffer.sample(4000)["shard"].bincount()  # the 10 updated ones weigh more: 9^0.6 each
    share = 30 / (30 + float((buffer.priority[30:].double() ** 0.6).sum()))
    assert chisquare(counts.numpy(), [4000 * share, 4000 * (1 - share)]).pvalue > 1e-3


def test_updates_held_back_for_a_killed_shard_are_lost_or_stale_and_no_others(sharded, numbered):
    buffer = sharded(
        2, 64, 16, timeout_s=TIMEOUT_S, refresh_s=0.1, batches_per_request=4, eps=0.25, beta=1.0
    )
    for key in (0, 1):
        buffer.writer().extend(numbered(100 * key, 20), key=key)
    batches = [buffer.sample() for _ in range(3)]
    expected = torch.ones(20)
    for number, batch in enumerate(batches):
        batch["td_error"] = torch.full((16,), 2.0 + number)
        buffer.update_tensordict_priority(batch)
        expected[batch["index"][batch["shard"] == 1]] = 2.25 + number
    kill(buffer, 0)
    last = buffer.sample()  # its shares were asked for before
    assert set(last["shard"].tolist()) == {0, 1}
    all_back(buffer)
    buffer.flush()
    stats = buffer.stats()
    lost = sum(int((batch["shard"] == 0).sum()) for batch in batches)
    assert stats["stale_updates"] + stats["lost_updates"] == lost > 0
    assert torch.equal(buffer.priority, expected)  # shard 0 is empty
    batch = buffer.sample()
    assert (batch["shard"] == 1).all()
    mass = expected.double() ** 0.6
    weight = mass.sum() / mass[batch["index"]]
    torch.testing.assert_close(batch["priority_weight"], (weight / weight.max()).float())


@pytest.mark.slow
def test_a_slow_shard_does_not_stop_the_batch_and_a_write_goes_elsewhere(sharded, numbered):
    buffer = sharded(
        2, 64, timeout_s=TIMEOUT_S, refresh_s=0.1, beta=1.0, weight_normalization="none"
    )
    for key, (start, n) in enumerate(((0, 40), (100, 10))):
        buffer.writer().extend(numbered(start, n), key=key)
    assert len(buffer) == 50
    pid = pid_of(buffer, 0)
    os.kill(pid, signal.SIGSTOP)
    try:
        begin = time.monotonic()
        batch = buffer.sample(64)
        # A round of waiting for it, none for its part; and as much again for a busy machine
        assert 0.95 * TIMEOUT_S < time.monotonic() - begin < 3 * TIMEOUT_S
        assert (batch["id"] >= 100).all()
        assert torch.allclose(batch["priority_weight"], torch.ones(64))
        begin = time.monotonic()
        for _ in range(5):
            buffer.sample(64)
        assert time.monotonic() - begin < 3 * TIMEOUT_S  # known to be slow: not waited for again
        writer = buffer.writer(timeout_s=TIMEOUT_S)
        assert writer.extend(numbered(200, 5), key=0).shard == 1
    finally:
        os.kill(pid, signal.SIGCONT)
    all_back(buffer)
    assert len(buffer) == 60  # the slow shard wrote it in the end: at least once
    held = held_by(buffer)
    assert set(range(200, 205)) <= set(held[0])
    assert set(range(200, 205)) <= set(held[1])
    assert set(buffer.sample(500)["shard"].tolist()) == {0, 1}


@pytest.mark.slow
def test_what_a_dead_writer_was_told_is_there(sharded, numbered):
    @ray.remote(num_cpus=0)
    class Actor:
        def act(self, writer):
            writer.extend(numbered(0, 10))
            return True

    buffer = sharded(1, 64)
    actor = Actor.remote()
    assert ray.get(actor.act.remote(buffer.writer()))
    ray.kill(actor)
    assert held_by(buffer) == [list(range(10))]


@pytest.mark.slow
def test_another_run_takes_up_the_folder(sharded, numbered, tmp_path):
    first = sharded(1, 64, checkpoint_dir=tmp_path)
    first.extend(numbered(0, 30), torch.rand(30))
    first.alpha = 0.9
    priority = first.priority
    first.close()
    again = sharded(1, 64, checkpoint_dir=tmp_path)
    assert torch.equal(again.priority, priority)
    again.checkpoint()
    assert held_by(again) == [list(range(30))]
    assert again.alpha == 0.6  # settings are the learner's
    mass = torch.tensor(again.reports()[0].total)
    assert mass == pytest.approx(float((priority.double() ** 0.6).sum()), rel=1e-6)


@pytest.mark.slow
def test_nobody_to_acknowledge_is_an_error(sharded, numbered):
    from per_td.ray import ShardError

    buffer = sharded(1, 64, timeout_s=TIMEOUT_S)
    buffer.extend(numbered(0, 10))
    pid = pid_of(buffer, 0)
    os.kill(pid, signal.SIGSTOP)
    try:
        with pytest.raises(ShardError, match="acknowledge within"):
            buffer.writer(timeout_s=TIMEOUT_S).extend(numbered(0, 5))
        buffer.update_priority([0], [1.0], shard=[0])
        with pytest.raises(ShardError, match="updates within"):
            buffer.flush()
        with pytest.raises(ShardError, match="all are lost or late"):
            buffer.sample(4)
        assert len(buffer) == 0  # of the living shards
    finally:
        os.kill(pid, signal.SIGCONT)
    all_back(buffer)
    buffer.flush()
    assert len(buffer) == 15

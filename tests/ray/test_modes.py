"""Ways to set priorities, counts of draws and the schedule of beta, with shards in this process."""

from collections import Counter

import numpy as np
import pytest
import torch

pytest.importorskip("ray")

from per_td import LinearSchedule
from per_td.checkpoint import file as checkpoint
from per_td.errors import CheckpointError, ConfigurationError, IndexRangeError, PriorityError
from per_td.ray import ShardedReplayBuffer, actors, saving
from per_td.ray.shard import EXACT, Shard

EPS = 0.25  # of what `local` makes


def slots_of(batch):
    """The shard and the slot of each transition."""
    return list(zip(batch["shard"].tolist(), batch["index"].tolist(), strict=True))


def in_order(buffer):
    """Priorities of all shards by shard and slot, in plain Python."""
    return {
        (shard, slot): float(value)
        for shard, actor in enumerate(buffer._shards)
        for slot, value in enumerate(actor.shard.priority())
    }


def arguments(batch):
    return {key: batch[key] for key in ("generation", "shard")}


@pytest.mark.parametrize("k", [1, 3])
def test_updates_of_every_kind_do_what_one_after_the_other_does(k, local):
    """Beside plain Python, with updates held back and not, of slots that occur again and again."""
    buffer = local(2, batches_per_request=k, priority_clip=(0.5, 3.0))
    random = np.random.default_rng(k)
    expected = in_order(buffer)
    kinds = []
    for _ in range(40):
        batch = buffer.sample(16)
        value = torch.from_numpy(random.normal(scale=2.0, size=16).astype(np.float32))
        mode = ["set", "max", "mean", "exact", "set", "exact"][random.integers(6)]
        kinds.append(mode)
        rate = 1.0 if mode in ("set", "exact") else 0.75
        if mode == "exact":
            value = value.abs()
            buffer.set_priority(batch["index"], value, **arguments(batch))
        else:
            how = {"mode": mode, "rate": rate}
            buffer.update_priority(batch["index"], value, **arguments(batch), **how)
        old = dict(expected)
        for slot, given in zip(slots_of(batch), value.tolist(), strict=True):
            new = given if mode == "exact" else min(max(abs(given) + EPS, 0.5), 3.0)
            if mode == "max":
                new = max(rate * old[slot], new)
            elif mode == "mean":
                new = old[slot] + rate * (new - old[slot])
            expected[slot] = new
        if random.random() < 0.3:
            assert buffer.priority.tolist() == pytest.approx(list(expected.values()), rel=1e-5)
    buffer.flush()
    assert in_order(buffer) == pytest.approx(expected, rel=1e-5)
    assert set(kinds) == {"set", "max", "mean", "exact"}
    assert buffer.stats()["stale_updates"] == 0


def test_bounds_may_be_set_and_what_is_held_back_has_those_of_before(local):
    buffer = local(2, batches_per_request=4, priority_clip=(None, 1.0))
    assert buffer.priority_clip == (None, 1.0)
    batch = buffer.sample()
    buffer.update_priority(batch["index"], torch.full((32,), 9.0), **arguments(batch))
    buffer.priority_clip = (2.0, None)
    drawn = set(slots_of(batch))
    assert all(value == 1.0 for slot, value in in_order(buffer).items() if slot in drawn)
    buffer.update_priority(batch["index"], torch.zeros(32), **arguments(batch))
    buffer.flush()
    assert all(value == 2.0 for slot, value in in_order(buffer).items() if slot in drawn)
    for wrong in ((3.0, 2.0), 1.0, (-1.0, None)):
        with pytest.raises(ConfigurationError, match="priority_clip"):
            buffer.priority_clip = wrong
        with pytest.raises(ConfigurationError, match="priority_clip"):
            local(1, priority_clip=wrong)
    assert buffer.priority_clip == buffer._shards[0].shard._buffer.priority_clip == (2.0, None)


def test_raw_priorities_are_set_as_they_are_and_0_is_never_drawn(local):
    buffer = local(2, batches_per_request=3, priority_clip=(0.5, 1.0))
    batch = buffer.sample()
    drawn = set(slots_of(batch))
    buffer.set_priority(batch["index"], torch.zeros(32), **arguments(batch))
    again = buffer.sample(500)
    assert not drawn & set(slots_of(again))
    buffer.set_priority([3], [7.0], shard=[1])
    assert in_order(buffer)[1, 3] == 7.0
    buffer.extend({"id": torch.arange(64)}, torch.ones(64))  # overwrites a whole shard
    stale = buffer.stats()["stale_updates"]
    buffer.set_priority(batch["index"], torch.full((32,), 5.0), **arguments(batch))
    gone = buffer.stats()["stale_updates"] - stale
    assert gone in {int((batch["shard"] == shard).sum()) for shard in range(2)}


def test_wrong_updates_are_refused_before_anything_is_sent(local):
    buffer = local(2, batches_per_request=3)
    before = in_order(buffer)
    for actor in buffer._shards:
        actor.messages.clear()
    for error, match, call in (
        (PriorityError, "priority", lambda: buffer.set_priority([1, 2], [1.0, -1.0], shard=[0, 1])),
        (PriorityError, "priority", lambda: buffer.set_priority([1], [np.nan], shard=[0])),
        (IndexRangeError, "index", lambda: buffer.set_priority([64], [1.0], shard=[0])),
        (
            ConfigurationError,
            "mode",
            lambda: buffer.update_priority([1], [1.0], shard=[0], mode="median"),
        ),
        (
            ConfigurationError,
            "rate",
            lambda: buffer.update_priority([1], [1.0], shard=[0], rate=0.5),
        ),
    ):
        with pytest.raises(error, match=match):
            call()
    assert [actor.messages for actor in buffer._shards] == [[], []]
    assert in_order(buffer) == before


@pytest.mark.parametrize("draw", ["independent", "stratified"])
@pytest.mark.parametrize("k", [1, 4])
def test_batches_bring_the_counts_of_their_own_moment(k, draw, local):
    buffer = local(3, batches_per_request=k, draw=draw, track_draws=True)
    counted: Counter = Counter()
    for step in range(12):
        batch = buffer.sample()
        slots = slots_of(batch)
        counted.update(slots)
        assert batch["draw_count"].dtype == torch.int32
        assert batch["draw_count"].tolist() == [counted[slot] for slot in slots], step
    assert not buffer._ahead or not buffer._ahead[0].batches
    assert buffer.draw_count.tolist() == [counted[slot] for slot in in_order(buffer)]


def test_what_is_written_anew_has_not_been_drawn(local):
    buffer = local(1, track_draws=True)
    buffer.sample()
    buffer.extend({"id": torch.arange(64)})
    assert buffer.draw_count.tolist() == [0] * 64
    plain = local(1)
    assert "draw_count" not in plain.sample().keys()  # noqa: SIM118  a TensorDict
    with pytest.raises(ConfigurationError, match="track_draws=True"):
        plain.draw_count  # noqa: B018
    with pytest.raises(ConfigurationError, match="track_draws"):
        plain.track_draws = True


def test_draws_are_the_same_whether_they_are_counted_or_not(local):
    one, two = (local(2, batches_per_request=3, track_draws=track) for track in (False, True))
    for _ in range(7):
        a, b = one.sample(), two.sample()
        for key in a.keys():  # noqa: SIM118
            if key != "generation":
                assert torch.equal(a[key], b[key])


def test_beta_follows_its_schedule_in_updates_of_the_learner(local, tmp_path):
    schedule = LinearSchedule(0.4, 1.0, 8)
    buffer = local(2, batches_per_request=3, beta_schedule=schedule, weight_normalization="none")
    assert buffer.beta_schedule == schedule
    for step in range(5):
        assert buffer.beta == pytest.approx(0.4 + 0.6 * step / 8)
        batch = buffer.sample()
        probability = batch["priority_weight"].double() ** (-1 / buffer.beta) / 40
        assert (probability > 0).all()
        batch["td_error"] = torch.rand(32)
        buffer.update_tensordict_priority(batch)
        buffer.set_priority(batch["index"], torch.rand(32), **arguments(batch))  # does not count
    with pytest.raises(PriorityError):
        buffer.update_priority([0], [np.inf], shard=[0])  # nor does what is refused
    assert buffer.beta == pytest.approx(0.4 + 0.6 * 5 / 8)
    with pytest.raises(ConfigurationError, match="beta_schedule"):
        buffer.beta = 0.5
    with pytest.raises(ConfigurationError, match="beta_schedule"):
        buffer.increase_beta()
    buffer.save(tmp_path)
    again = ShardedReplayBuffer.load(tmp_path, device="cpu")
    assert (again.beta_schedule, again.beta) == (schedule, buffer.beta)
    for _ in range(9):
        again.update_priority([0], [1.0], shard=[0])
    assert again.beta == 1.0


def test_a_save_has_the_bounds_and_the_counts(local, tmp_path):
    buffer = local(2, priority_clip=(1.0, None), track_draws=True)
    buffer.sample()
    buffer.priority_clip = (1.5, 4.0)
    buffer.save(tmp_path)
    again = ShardedReplayBuffer.load(tmp_path, device="cpu")
    assert (again.priority_clip, again.track_draws) == ((1.5, 4.0), True)
    assert again._shards[0].shard._buffer.priority_clip == (1.5, 4.0)
    assert torch.equal(again.draw_count, buffer.draw_count)
    assert buffer.draw_count.sum() == 32


def test_saves_of_earlier_versions_load_and_damaged_ones_are_refused(local, tmp_path):
    buffer = local(2)
    buffer.save(tmp_path)
    path = tmp_path / "learner.pt"
    state = checkpoint.read(path, saving.FORMAT)
    old = {key: state[key] for key in state if key not in ("beta_schedule", "updates")}
    later = ("priority_clip", "track_draws")
    old["settings"] = {key: old["settings"][key] for key in old["settings"] if key not in later}
    checkpoint.write(path, old)
    again = ShardedReplayBuffer.load(tmp_path, device="cpu")
    assert (again.priority_clip, again.track_draws, again.beta_schedule) == (None, False, None)
    assert torch.equal(again.priority, buffer.priority)
    checkpoint.write(path, state | {"beta_schedule": {"start": 0.4, "end": 7.0, "steps": 3}})
    with pytest.raises(CheckpointError, match="end"):
        ShardedReplayBuffer.load(tmp_path, device="cpu")


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("uniform_mix", lambda make, _: make(uniform_mix=0.1)),
        ("latest", lambda make, _: make(latest=2)),
        ("uniform_mix", lambda _, buffer: setattr(buffer, "uniform_mix", 0.1)),
        ("latest", lambda _, buffer: setattr(buffer, "latest", 2)),
        ("by", lambda _, buffer: buffer.sample(by="uniform")),
        ("newest", lambda _, buffer: buffer.sample(newest=9)),
        ("sweep", lambda _, buffer: buffer.sweep(32)),
    ],
)
def test_what_needs_to_know_all_shards_is_refused_by_name(name, call, local):
    buffer = local(2)
    for actor in buffer._shards:
        actor.messages.clear()
    with pytest.raises(ConfigurationError, match=f"^{name}: "):
        call(lambda **settings: ShardedReplayBuffer(2, 64, **settings), buffer)
    assert [actor.messages for actor in buffer._shards] == [[], []]
    assert len(buffer.sample(8, by="priority", newest=None)) == 8


@pytest.mark.parametrize(
    ("name", "value"), [("frames", {"pixels": 4}), ("num_envs", 2), ("num_frames", 90)]
)
def test_frames_are_refused_and_the_buffer_that_takes_them_is_named(name, value, local):
    buffer = local(2)
    message = rf"^{name}: expected .*PrioritizedReplayBuffer\(frames=...\)"
    with pytest.raises(ConfigurationError, match=message):
        ShardedReplayBuffer(2, 64, **{name: value})
    with pytest.raises(ConfigurationError, match=message):
        setattr(buffer, name, value)
    assert getattr(buffer, name) is None


def test_a_shard_that_starts_again_is_sent_the_bounds(local):
    buffer = local(2, priority_clip=(1.0, None))
    buffer.priority_clip = (2.0, None)
    settings = buffer._settings | {"example": None}
    buffer._shards[0].shard = Shard(settings, seed=3)
    len(buffer)  # asks all shards
    assert buffer._shards[0].shard._buffer.priority_clip == (2.0, None)


@pytest.mark.parametrize(
    ("other", "match"),
    [
        (
            {"priority_clip": (1.0, None)},
            r"priority_clip is \(2\.0, None\), asked for \(1\.0, None",
        ),
        ({"track_draws": False}, "track_draws is True, asked for False"),
    ],
)
def test_found_shards_tell_which_of_these_settings_differ(other, match):
    has = {"capacity": 8, "alpha": 0.6, "eps": 0.1, "priority_clip": (1.0, None)}
    shard = Shard(has | {"track_draws": True, "device": "cpu"}, seed=0)
    shard.configure(priority_clip=(2.0, None))
    asked = has | {"track_draws": True, "device": "cpu", "priority_clip": (2.0, None)}
    beside = {"checkpoint_every": None, "num_shards": 1}
    actors._require_none(shard.differences(asked | beside), "mine")
    with pytest.raises(ConfigurationError, match=match):
        actors._require_none(shard.differences(asked | beside | other), "mine")


@pytest.fixture
def logged(tmp_path):
    """Makes shards with a log, and closes it after the test."""
    made = []

    def make():
        settings = {"capacity": 8, "alpha": 0.6, "eps": 0.1}
        made.append(Shard(settings, seed=0, folder=str(tmp_path)))
        return made[-1]

    yield make
    for shard in made:
        shard._log.close()


def test_raw_priorities_and_modes_come_back_from_the_log(logged):
    one = logged()
    one.extend([(("x",), "float32", np.zeros(4, np.float32))], np.ones(4, np.float32))
    index, value = np.arange(4), np.array([0.0, 1.0, 5.0, 9.0], np.float32)
    one.configure(priority_clip=(0.5, 6.0))
    one.update(index, value, None, {"mode": "mean", "rate": 0.5})
    one.checkpoint()
    one.update(index[:2], value[:2], None, EXACT)
    one.update(index[2:], value[2:])
    assert one.priority().tolist() == pytest.approx([0.0, 1.0, 5.1, 6.0])
    one._log.close()
    two = logged()
    assert (one.priority() == two.priority()).all()
    assert two._buffer.priority_clip == (0.5, 6.0)

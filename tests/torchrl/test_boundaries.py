import pytest
import torch
from tensordict import TensorDict
from torchrl.data import (
    LazyTensorStorage,
    ListStorage,
    TensorDictReplayBuffer,
)

from per_td import EmptyBufferError
from per_td.torchrl import PrioritizedSliceSampler
from tests.support.slice_oracle import ALPHA, BETA, DONE, Stream, filled, slices_of, valid_starts


@pytest.mark.parametrize("seed", range(60))
def test_no_slice_crosses_an_end_or_the_cursor_and_every_allowed_one_can_be_drawn(seed):
    rng = torch.Generator().manual_seed(seed)

    def pick(low, high):
        return int(torch.randint(low, high + 1, (), generator=rng))

    capacity, length = (1, 2, 3, 7, 16, 31, 50)[seed % 7], pick(1, 6)
    strict, missing = seed % 2 == 0, (False, True, pick(0, length - 1))[seed % 3]
    columns = pick(1, 3) if capacity > 1 else 1
    chunk = pick(2, capacity) if columns > 1 else pick(1, capacity)  # 2-D: TorchRL needs 2 rows
    steps = chunk * pick(1, 3 * capacity // chunk)
    streams = [Stream(steps, 100 * seed + j, longest=pick(1, 12)) for j in range(columns)]
    settings = {"slice_len": length, "strict_length": strict, "span": (False, missing)}
    buffer = filled(capacity, streams, steps, chunk=chunk, **settings)
    stored = min(steps, capacity)
    shortest = 1 if missing is True else length - int(missing)
    allowed = {}
    for column, stream in enumerate(streams):
        starts = valid_starts(stream, steps - stored, steps - 1, length, shortest, strict)
        allowed |= {(column, k): n for k, n in starts.items()}
    before = buffer.sampler.priority
    assert buffer.sampler.can_sample(buffer.storage, length) == bool(allowed)
    if not allowed:
        with pytest.raises(EmptyBufferError, match=f"at least {length} records, got at most"):
            buffer.sample(length)
        return
    batch = buffer.sample(800 * length)
    column = batch["index"][:, 1] if columns > 1 else torch.zeros(len(batch), dtype=torch.int64)
    drawn, at = set(), 0
    while at < len(batch):
        key = (int(column[at]), int(batch["k"][at]))
        n = allowed[key]  # a KeyError is a slice that must not begin there
        expected = list(range(key[1], key[1] + n))
        assert batch["k"][at : at + n].tolist() == expected
        assert set(column[at : at + n].tolist()) == {key[0]}
        assert batch["next", "truncated"][at : at + n, 0].tolist() == [False] * (n - 1) + [True]
        drawn.add(key)
        at += n
    assert drawn == set(allowed)
    assert torch.equal(buffer.sampler.priority, before)


def test_an_open_episode_that_fills_the_ring_is_cut_at_the_cursor():
    stream = Stream(26, 0)
    stream.last = [False] * len(stream.last)
    stream.episode = [0] * len(stream.episode)
    buffer = filled(10, [stream], 26, slice_len=4)
    first = {ks[0] for ks in slices_of(buffer.sample(800), 4)}
    assert first == set(range(16, 23))


def ended_by(entries, **settings):
    """First records of the slices of 2 drawn from 6 records with these entries."""
    sampler = PrioritizedSliceSampler(6, ALPHA, BETA, slice_len=2, **settings)
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(6), sampler=sampler, batch_size=200)
    buffer.extend(TensorDict({"k": torch.arange(6), **entries}, [6]))
    return {ks[0] for ks in slices_of(buffer.sample(), 2)}


def flags(*where):
    return torch.isin(torch.arange(6), torch.tensor(where, dtype=torch.int64)).unsqueeze(-1)


IDS = torch.tensor([7, 7, 7, 8, 8, 8])


def test_by_default_every_known_flag_and_id_ends_an_episode():
    assert ended_by({"next": {"done": flags(1)}}) == {0, 2, 3, 4}
    assert ended_by({"next": {"done": flags(1), "truncated": flags(3)}}) == {0, 2, 4}
    assert ended_by({"next": {"terminated": flags(1)}}) == {0, 2, 3, 4}
    assert ended_by({"episode": IDS}) == {0, 1, 3, 4}
    assert ended_by({"episode": IDS.unsqueeze(-1)}) == {0, 1, 3, 4}
    ids = {"collector": {"traj_ids": IDS}, "episode": torch.zeros(6)}
    assert ended_by(ids) == {0, 1, 3, 4}
    assert ended_by({"episode": IDS, "next": {"done": flags(0)}}) == {1, 3, 4}


def test_named_keys_decide_alone():
    entries = {"next": {"done": flags(1), "truncated": flags(3)}, "episode": IDS, "over": flags(0)}
    assert ended_by(entries, end_key="over") == {1, 2, 3, 4}
    assert ended_by(entries, end_key=DONE) == {0, 2, 3, 4}
    assert ended_by(entries, end_keys=[DONE, "over", "absent"]) == {2, 3, 4}
    assert ended_by(entries, traj_key="episode") == {0, 1, 3, 4}
    assert ended_by(entries, traj_key="episode", end_key="over") == {0, 1, 3, 4}


def test_flags_decide_where_the_named_ids_are_absent():
    entries = {"next": {"done": flags(1)}, "episode": IDS}
    assert ended_by(entries, traj_key="run") == {0, 2, 3, 4}


@pytest.mark.parametrize(
    ("settings", "around"),
    [
        ({"ends": flags(1).squeeze(-1)}, {5}),
        ({"trajectories": torch.tensor([1, 1, 2, 2, 2, 2])}, set()),
    ],
)
def test_ends_may_be_handed_over_and_stay(settings, around):
    sampler = PrioritizedSliceSampler(6, ALPHA, BETA, slice_len=2, cache_values=True, **settings)
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(6), sampler=sampler, batch_size=100)
    # four rows; full, cut behind row 5; full, cut behind row 0
    for steps, expected in ((4, {0, 2}), (2, {0, 2, 3, 4}), (1, {2, 3, 4} | around)):
        buffer.extend(TensorDict({"x": torch.zeros(steps)}, [steps]))
        assert set(buffer.sample()["index"][::2, 0].tolist()) == expected


def test_cached_ends_are_looked_up_again_after_a_write():
    buffer = filled(20, [Stream(20, 0, longest=1)], 8, slice_len=2, cache_values=True)
    with pytest.raises(EmptyBufferError):
        buffer.sample(24)
    other = Stream(20, 0)
    other.last = [False] * len(other.last)
    buffer.extend(other.data(8, 12))
    assert {ks[0] for ks in slices_of(buffer.sample(200), 2)} == {8, 9, 10}
    buffer.storage._storage["next", "truncated"][:] = True  # unseen: no write
    assert {ks[0] for ks in slices_of(buffer.sample(200), 2)} == {8, 9, 10}


def test_ends_are_read_at_every_draw_unless_cached():
    buffer = filled(20, [Stream(20, 0)], 8, slice_len=2)
    buffer.sample(24)
    buffer.storage._storage["next", "truncated"][:] = True
    with pytest.raises(EmptyBufferError):
        buffer.sample(24)


def test_a_loaded_ring_is_still_cut_at_its_cursor(tmp_path):
    stream = Stream(26, 0)
    stream.last = [False] * len(stream.last)
    buffer = filled(10, [stream], 26, slice_len=4)
    buffer.dumps(tmp_path / "saved")
    for way in ("state_dict", "dumps"):
        other = filled(10, [stream], 17, slice_len=4)
        if way == "dumps":
            other.loads(tmp_path / "saved")
        else:
            other.load_state_dict(buffer.state_dict())
        drawn = slices_of(other.sample(800), 4)
        assert all(ks == list(range(ks[0], ks[0] + 4)) for ks in drawn)
        other.extend(stream.data(26, 27))
        assert {ks[0] for ks in slices_of(other.sample(800), 4)} == set(range(17, 24))


@pytest.mark.parametrize(
    ("data", "settings", "error", "message"),
    [
        ({"x": torch.zeros(4)}, {}, KeyError, r"which tell trajectories apart, got .*'x'"),
        (
            {"next": {"done": torch.zeros(4, 2, dtype=torch.bool)}},
            {},
            RuntimeError,
            r"entry \('next', 'done'\): expected one value for each record .*\[4\], got .*\[4, 2\]",
        ),
        (
            {"x": torch.zeros(4)},
            {"ends": torch.ones(3), "cache_values": True},
            RuntimeError,
            r"ends .* shape \[4\], got shape \[3\]",
        ),
    ],
)
def test_data_in_which_no_ends_can_be_found_is_refused_by_name(data, settings, error, message):
    sampler = PrioritizedSliceSampler(4, ALPHA, BETA, slice_len=2, **settings)
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(4), sampler=sampler, batch_size=4)
    buffer.extend(TensorDict(data, [4]))
    with pytest.raises(error, match=message):
        buffer.sample()
    assert not sampler.can_sample(buffer.storage, 4) or "ends" in settings


def test_a_list_storage_is_refused_by_name():
    sampler = PrioritizedSliceSampler(4, ALPHA, BETA, slice_len=2)
    buffer = TensorDictReplayBuffer(storage=ListStorage(4), sampler=sampler, batch_size=4)
    buffer.extend(Stream(4, 0).data(0, 4))
    with pytest.raises(RuntimeError, match="expected a storage of tensordicts"):
        buffer.sample()

"""Counts of draws: in batches, of the buffer, in copies and files."""

import copy
import pickle
import threading

import pytest
import torch

from per_td import (
    CheckpointError,
    ConfigurationError,
    PerTdError,
    PrioritizedReplayBuffer,
    SchemaError,
)
from tests.support.oracle import S, data, numbered
from tests.support.processes import deadline, shared, transitions


def rows(start, n, groups, device="cpu"):
    return numbered(start, n, device, count=groups) if groups else data(start, n, device)


def bump(counts, index):
    """Count draws [S, B] in `counts` [S, N], one at a time."""
    for own, drawn in zip(counts, index, strict=True):
        for i in drawn:
            own[i] += 1


@pytest.mark.parametrize("draw", ["independent", "stratified", "without_replacement"])
@pytest.mark.parametrize("groups", [None, 1, S])
def test_every_draw_counts_and_a_new_transition_begins_at_0(groups, draw, device, choice):
    buffer = PrioritizedReplayBuffer(
        9, num_buffers=groups, draw=draw, device=device, track_draws=True
    )
    buffer.extend(rows(0, 5, groups, device))
    counts = [[0] * 9 for _ in range(groups or 1)]
    ways = [{}, {"by": "uniform"}, {"by": "inverse"}]
    ways += [] if draw == "without_replacement" else [{"newest": 3}, {"newest": 2, "by": "uniform"}]
    written = 5
    for step in range(12):
        batch = buffer.sample(3, **ways[step % len(ways)])
        index = batch["index"].reshape(-1, 3).tolist()
        bump(counts, index)
        assert batch["draw_count"].dtype == torch.int32
        assert batch["draw_count"].reshape(-1, 3).tolist() == [
            [own[i] for i in drawn] for own, drawn in zip(counts, index, strict=True)
        ]
        if step % 3 == 2:
            new = 1 + step % 4
            priority = None if step % 2 else torch.ones(*batch.shape[:-1], new, device=device)
            buffer.extend(rows(step, new, groups, device), priority)
            for own in counts:
                for k in range(written, written + new):
                    own[k % 9] = 0
            written += new
        held = buffer.draw_count.reshape(len(counts), -1).tolist()
        assert held == [own[: len(each)] for own, each in zip(counts, held, strict=True)]
        buffer.check_valid()


def test_updates_settings_and_sweeps_count_nothing(choice):
    buffer = PrioritizedReplayBuffer(9, 4, track_draws=True)
    buffer.extend(data(0, 9))
    buffer.sample()
    before = buffer.draw_count
    buffer.update_priority([0], [3.0], mode="max", rate=0.5)
    buffer.set_priority([1], [0.0])
    buffer.alpha, buffer.uniform_mix = 0.9, 0.5
    assert "draw_count" not in next(buffer.sweep(9))
    assert torch.equal(buffer.draw_count, before)
    buffer.sample_leaves()
    assert buffer.draw_count.sum() == 8
    buffer.empty()
    assert len(buffer.draw_count) == 0
    buffer.extend(data(0, 9))
    assert not buffer.draw_count.any()


def test_masked_and_overlong_writes_begin_anew_only_what_they_write(device, choice):
    buffers = PrioritizedReplayBuffer(4, num_buffers=2, device=device, track_draws=True)
    buffers.extend(rows(0, 4, 2, device))
    buffers.sample(40)
    before = buffers.draw_count.clone()
    assert (before > 0).all()
    mask = torch.tensor([[True, False], [False, False]], device=device)
    buffers.extend(rows(0, 2, 2, device), mask=mask)
    assert buffers.draw_count[0].tolist() == [0, *before[0, 1:].tolist()]
    assert torch.equal(buffers.draw_count[1], before[1])
    buffers.extend(rows(0, 11, 2, device))
    assert not buffers.draw_count.any()


def test_a_buffer_that_counts_nothing_says_so_and_leaves_the_key_to_the_user():
    buffer = PrioritizedReplayBuffer(9, 4)
    with pytest.raises(ConfigurationError, match="draw_count: expected a buffer with track_draws"):
        buffer.draw_count  # noqa: B018
    with pytest.raises(ConfigurationError, match="track_draws: expected no change"):
        buffer.track_draws = True
    buffer.extend({"draw_count": torch.arange(5)})
    batch = buffer.sample()
    assert torch.equal(batch["draw_count"], batch["index"])


@pytest.mark.parametrize("groups", [None, 2])
def test_a_buffer_that_counts_takes_no_such_key(groups):
    buffer = PrioritizedReplayBuffer(9, 4, num_buffers=groups, track_draws=True)
    shape = (groups, 5) if groups else (5,)
    with pytest.raises(SchemaError, match="'draw_count' is a reserved key"):
        buffer.extend({"draw_count": torch.zeros(shape)})
    with pytest.raises(SchemaError, match="'draw_count' is a reserved key"):
        PrioritizedReplayBuffer(9, example={"draw_count": torch.zeros(())}, track_draws=True)
    plain = PrioritizedReplayBuffer(9)
    plain.extend({"draw_count": torch.zeros(5)})
    if not groups:
        with pytest.raises((SchemaError, CheckpointError), match="'draw_count' is a reserved key"):
            buffer.load_state_dict(plain.state_dict())
    buffer.extend({"x": torch.zeros(shape)})
    buffer.sample()


COPIES = {
    "deepcopy": lambda buffer, path: copy.deepcopy(buffer),
    "pickle": lambda buffer, path: pickle.loads(pickle.dumps(buffer)),
    "file": lambda buffer, path: PrioritizedReplayBuffer.load(path),
}


@pytest.mark.parametrize("kind", COPIES)
@pytest.mark.parametrize("groups", [None, S])
def test_a_copy_counts_on_by_itself(groups, kind, tmp_path):
    buffer = PrioritizedReplayBuffer(9, 4, num_buffers=groups, track_draws=True, uniform_mix=0.5)
    buffer.extend(rows(0, 7, groups))
    for _ in range(3):
        buffer.sample()
    buffer.save(tmp_path / "buffer.pt")
    other = COPIES[kind](buffer, tmp_path / "buffer.pt")
    assert torch.equal(other.draw_count, buffer.draw_count)
    other.sample()
    assert other.draw_count.sum() == buffer.draw_count.sum() + 4 * (groups or 1)
    other.check_valid()


@pytest.mark.parametrize("groups", [None, S])
@pytest.mark.parametrize("capacity", [4, 9, 20])
def test_counts_move_with_their_transitions_into_another_capacity(capacity, groups, tmp_path):
    buffer = PrioritizedReplayBuffer(9, 30, num_buffers=groups, track_draws=True)
    buffer.extend(rows(0, 13, groups))
    buffer.sample()

    def by_item(buffer):
        item = buffer.transitions["action"].reshape(groups or 1, -1)
        counts = buffer.draw_count.reshape(groups or 1, -1)
        filled = torch.arange(item.shape[1]) < buffer.lengths.reshape(-1, 1)
        return dict(zip(item[filled].tolist(), counts[filled].tolist(), strict=True))

    buffer.save(tmp_path / "buffer.pt")
    other = PrioritizedReplayBuffer.load(tmp_path / "buffer.pt", capacity=capacity)
    old, new = by_item(buffer), by_item(other)
    assert len(new) == min(9, capacity) * (groups or 1)
    assert new == {item: old[item] for item in new}
    other.check_valid()


def test_a_state_without_counts_begins_at_0_and_a_damaged_one_is_refused():
    buffer, plain = (PrioritizedReplayBuffer(9, 4, track_draws=tracks) for tracks in (True, False))
    for each in (buffer, plain):
        each.extend(data(0, 7))
        each.sample()
    state = buffer.state_dict()
    for wrong in (
        torch.full((7,), -1, dtype=torch.int32),
        torch.zeros(6, dtype=torch.int32),
        torch.zeros(7, dtype=torch.int64),
        torch.zeros(7),
        [0] * 7,
        "x",
    ):
        with pytest.raises(CheckpointError, match="draw_count: expected"):
            buffer.load_state_dict(state | {"draw_count": wrong})
    settings = state["settings"] | {"track_draws": torch.ones(2)}
    with pytest.raises(CheckpointError, match="track_draws"):
        buffer.load_state_dict(state | {"settings": settings})
    assert torch.equal(buffer.draw_count, state["draw_count"])
    plain.load_state_dict(state)  # has nowhere to put them
    assert plain.state_dict()["draw_count"] is None
    older = plain.state_dict()
    del older["draw_count"]
    buffer.load_state_dict(older)
    assert buffer.draw_count.tolist() == [0] * 7


def test_a_damaged_count_is_found():
    buffer = PrioritizedReplayBuffer(9, 4, track_draws=True)
    buffer.extend(data(0, 7))
    buffer._priorities.draw_count[3] = -1
    with pytest.raises(PerTdError, match="draw counts are at least 0"):
        buffer.check_valid()


@pytest.mark.parametrize("name", ["uniform", "inverse"])
@pytest.mark.parametrize("place", ["leaves", "sums", "masses"])
def test_damage_on_the_side_is_found(place, name):
    buffer = PrioritizedReplayBuffer(300, 4, uniform_mix=0.5)
    buffer.extend(data(0, 300))
    buffer.sample(by=name)
    buffer.check_valid()
    trees = buffer._priorities.side(name).trees
    getattr(trees, "sums" if place == "sums" else "leaves")[3] += 1.0
    if place == "masses":  # sound trees, of other masses
        trees.ops.refill(trees)
    match = f"the {name} masses follow" if place == "masses" else "every node of the sums"
    with pytest.raises(PerTdError, match=match):
        buffer.check_valid()


def test_batches_drawn_ahead_count_when_they_are_drawn():
    with deadline(60):
        buffer = PrioritizedReplayBuffer(9, 4, prefetch=2, track_draws=True)
        buffer.extend(data(0, 9))
        drawn = [buffer.sample() for _ in range(5)]
        buffer.close()
        assert all((batch["draw_count"] >= 1).all() for batch in drawn)
        assert buffer.draw_count.sum() >= 20
        assert buffer.draw_count.sum() % 4 == 0


def test_threads_lose_no_count():
    with deadline(60):
        buffer = PrioritizedReplayBuffer(9, 4, threads=True, track_draws=True)
        buffer.extend(data(0, 9))

        def draw():
            for _ in range(50):
                buffer.sample()

        threads = [threading.Thread(target=draw) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert buffer.draw_count.sum() == 4 * 50 * 4


def test_a_shared_buffer_counts_too():
    buffer = shared(20, batch_size=4, track_draws=True)
    buffer.extend(transitions(range(10)))
    buffer.sample()
    assert buffer.draw_count.sum() == 4
    buffer.check_valid()

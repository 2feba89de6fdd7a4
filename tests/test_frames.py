"""Frames of stacked observations that are stored once."""

import itertools
import os
import signal
import time

import pytest
import torch
from tensordict import TensorDict

from per_td import (
    AllocationError,
    CheckpointError,
    ConfigurationError,
    IndexRangeError,
    NStepWriter,
    PrioritizedReplayBuffer,
    SchemaError,
    kernels,
)
from per_td.kernels import reference
from per_td.memory import Memory, zeros
from per_td.priorities.table import PriorityTable
from per_td.storage.frame_store import GONE, FrameStore
from per_td.storage.layouts import Field
from tests.support.choices import CHOICES
from tests.support.frames import KINDS, Game, transitions_of
from tests.support.parameters import few_of_all, slow_but
from tests.support.processes import forked, kill
from tests.test_frames_state_machine import same_bits
from tests.test_interrupts import InterruptAfter, every_line

COMPILED_FIRST = pytest.mark.parametrize("choice", slow_but(CHOICES[:1], CHOICES), indirect=True)
"""With kernels; without them in the slow tests."""

DEPTH = 4


def make(capacity=20, **settings):
    settings = {"frames": {"pixels": DEPTH}} | settings
    return PrioritizedReplayBuffer(capacity, 8, **settings)


def numbered(first, n, envs=1):
    """Transitions of steps `first` to `first + n` of each environment, whose frames tell which."""
    step = torch.arange(first, first + n).repeat_interleave(envs)
    env = torch.arange(envs).repeat(n)
    age = torch.arange(DEPTH)
    now = (step.unsqueeze(-1) + age) * 100 + env.unsqueeze(-1)
    pixels = now.reshape(-1, DEPTH, 1, 1).expand(-1, -1, 2, 3).float().contiguous()
    following = TensorDict({"pixels": pixels + 100, "reward": step.float()}, [len(step)])
    return TensorDict({"step": step, "env": env, "pixels": pixels, "next": following}, [len(step)])


def assert_right(batch):
    """The frames are those of the step and the environment."""
    expected = batch["step"].unsqueeze(-1) + torch.arange(DEPTH)
    expected = (expected * 100 + batch["env"].unsqueeze(-1)).float()
    assert (batch["pixels"] == expected.view(-1, DEPTH, 1, 1)).all()
    assert (batch["next", "pixels"] == expected.view(-1, DEPTH, 1, 1) + 100).all()
    assert batch["pixels"].shape[1:] == (DEPTH, 2, 3)


def living(buffer):
    """Slots that have not retired, bool [len]."""
    return buffer._storage._stores[0].low[: len(buffer)] != GONE


def stored(buffer):
    """Number of frames stored."""
    return int(buffer._storage._stores[0].page[0])


# --- what is stored -------------------------------------------------------------------------------


@pytest.mark.parametrize("at_once", [1, 10])
def test_one_frame_is_stored_for_each_step_of_an_environment(at_once, choice):
    buffer = make(200, num_envs=3)
    for first in range(0, 50, at_once):
        buffer.extend(numbered(first, at_once, envs=3))
    assert stored(buffer) == 3 * (50 + DEPTH)
    assert_right(buffer.sample(64))
    assert_right(buffer.transitions)


def test_environments_do_not_share_frames_but_keys_of_one_have_their_own(choice):
    buffer = PrioritizedReplayBuffer(20, frames={"a": 1, "nest": {"b": 2}}, num_envs=2)
    same = torch.zeros(2, 2, 4)
    td = TensorDict({"a": same[:, :1], "nest": {"b": same}, "next": {"a": same[:, :1]}}, [2])
    td["next", "nest", "b"] = same + 1
    buffer.extend(td)
    pages = [store.page[0].item() for store in buffer._storage._stores]
    assert pages == [2, 4]  # zeros of two environments, and zeros and ones of two
    assert buffer.frames == {"a": 1, "nest": {"b": 2}}
    assert (buffer.num_envs, make().num_envs, PrioritizedReplayBuffer(1).num_envs) == (2, 1, None)


def test_frames_with_equal_hashes_are_not_taken_for_equal(choice, monkeypatch):
    monkeypatch.setattr(reference.store_frames.__globals__["factors"], "__code__", _zeros.__code__)
    buffer = make(50, num_frames=500)
    buffer.extend(numbered(0, 30))
    assert not buffer._storage._stores[0].factors.any()
    assert_right(buffer.transitions)


def _zeros(words, device):
    return torch.zeros(words, dtype=torch.int64, device=device)


def test_a_frame_is_looked_for_in_the_last_32_writes_of_its_environment(choice):
    buffer = make(100)
    same = numbered(0, 1)
    for _ in range(33):
        buffer.extend(same)
    assert stored(buffer) == DEPTH + 1
    buffer.extend(same)
    assert stored(buffer) == 2 * (DEPTH + 1)


@pytest.mark.parametrize("n", slow_but([3], [1, 3, 5]))
def test_the_next_stack_may_be_n_steps_on(n, choice):
    envs, steps = 3, 60
    plain = PrioritizedReplayBuffer(500)
    buffer = make(500, num_envs=envs)
    writers = [NStepWriter(each, n, 0.9, envs) for each in (plain, buffer)]
    games = [Game(DEPTH, (2, 4), torch.uint8, e) for e in range(envs)]
    random = torch.Generator().manual_seed(0)
    for t in range(steps):
        ends = torch.rand(envs, generator=random) < 0.05
        pairs = [g.step("resets" if e else "goes on") for g, e in zip(games, ends, strict=True)]
        td = transitions_of(pairs, t * envs)
        td["next", "terminated"] = ends
        td["next", "truncated"] = torch.zeros(envs, dtype=torch.bool)
        mask = torch.rand(envs, generator=random) < 0.8
        for writer in writers:
            writer.add(td, mask=mask)
    for writer in writers:
        writer.flush()
    assert len(buffer) == len(plain) > 100
    for key in plain.transitions.keys(True, True):
        assert same_bits(buffer.transitions[key], plain.transitions[key])
    assert stored(buffer) < 2 * len(buffer)


def test_an_n_step_writer_of_more_environments_is_refused():
    with pytest.raises(ConfigurationError, match="num_envs: expected at most 2"):
        NStepWriter(make(num_envs=2), 3, 0.9, 3)


# --- retirement -----------------------------------------------------------------------------------


@pytest.mark.parametrize("prioritization", ["proportional", "rank"])
def test_the_oldest_transitions_retire_when_frames_run_out(prioritization, choice):
    buffer = make(20, num_frames=13, prioritization=prioritization)
    buffer.extend(numbered(0, 9))
    assert buffer.stats()["retired"] == 0
    late = buffer.sample(64)
    buffer.extend(numbered(9, 3))  # three frames that there is no room for
    assert buffer.stats()["retired"] == 3
    assert len(buffer) == 12
    assert (buffer.mass > 0).tolist() == [False] * 3 + [True] * 9
    assert buffer.sample(200)["step"].unique().tolist() == list(range(3, 12))
    assert_right(buffer.sample(200))
    buffer.check_valid()
    stale = int((late["index"] < 3).sum())
    assert 0 < stale < 64
    buffer.update_priority(late["index"], torch.ones(64), late["generation"])
    assert buffer.stats()["stale_updates"] == stale
    buffer.update_priority([0, 5], [7.0, 7.0])  # nor without a generation
    assert buffer.priority[0] == 0
    assert buffer.priority[5] > 6
    assert buffer.stats()["stale_updates"] == stale + 1
    with pytest.raises(IndexRangeError):
        buffer.update_priority([0, 12], [7.0, 7.0])
    buffer.extend(numbered(12, 8))
    buffer.extend(numbered(20, 4))  # over retired ones
    assert_right(buffer.sample(200))
    buffer.check_valid()


@COMPILED_FIRST
def test_many_short_episodes_retire_transitions_in_parts_of_the_ring(choice):
    buffer = make(1000, num_envs=2)
    games = [Game(DEPTH, (2, 4), torch.uint8, e) for e in range(2)]
    plain = PrioritizedReplayBuffer(1000)
    for t in range(1500):
        kind = KINDS[0] if t % 3 else "skips"
        td = transitions_of([game.step(kind) for game in games], 2 * t)
        for each in (plain, buffer):
            each.extend(td)
    left = living(buffer)
    assert buffer.stats()["retired"] > 1000
    # each 3 steps of an environment store 6 frames
    assert 450 < left.sum() < 550
    assert same_bits(buffer.transitions["pixels"][left], plain.transitions["pixels"][left])
    assert same_bits(buffer.priority > 0, left)
    buffer.check_valid()


@COMPILED_FIRST
def test_long_episodes_retire_nothing(choice):
    buffer = make(500, num_envs=2)
    games = [Game(DEPTH, (5, 8), torch.uint8, e) for e in range(2)]  # no two frames are alike
    for t in range(1000):
        kind = "goes on" if (t + 1) % 100 else "resets"
        buffer.extend(transitions_of([game.step(kind) for game in games], 2 * t))
    assert buffer.stats()["retired"] == 0
    assert (buffer.priority > 0).all()


@pytest.mark.parametrize(
    ("rated", "choice"),
    few_of_all((True, False), CHOICES),
    indirect=["choice"],
)
def test_an_interrupted_extend_has_written_all_or_nothing(rated, choice):
    new = numbered(12, 6)
    priority = torch.full((6,), 2.0) if rated else None

    def prepared():
        buffer = make(20, num_frames=13)
        buffer.extend(numbered(0, 12))
        return buffer

    def check(buffer):
        buffer.check_valid()
        done = buffer.write_count - 12
        assert done in (0, 6)
        left = living(buffer)
        assert_right(buffer.transitions[left])
        assert torch.equal(buffer.priority > 0, left)
        assert_right(buffer.sample(50))
        buffer.extend(numbered(30, 1))
        assert_right(buffer.sample(50))

    every_line(prepared, lambda buffer: buffer.extend(new, priority), check, 5)


class InterruptInside(InterruptAfter):
    """The same, in the parts that hold frames and priorities."""

    def __call__(self, frame, event, arg):
        inside = any(
            part in frame.f_code.co_filename for part in ("storage", "priorities", "kernels")
        )
        return super().__call__(frame, event, arg) if inside else None


@COMPILED_FIRST
def test_an_interrupted_extend_of_a_shared_buffer_leaves_nothing_torn(choice, monkeypatch):
    monkeypatch.setattr("tests.test_interrupts.InterruptAfter", InterruptInside)
    new = numbered(12, 6)

    def prepared():
        buffer = make(20, num_frames=13, shared=True, example=new[0])
        buffer.extend(numbered(0, 12))
        return buffer

    def check(buffer):
        assert_right(buffer.sample(50))
        buffer.check_valid()
        assert_right(buffer.transitions[buffer.priority > 0])
        buffer.extend(numbered(30, 3))
        assert_right(buffer.transitions[buffer.priority > 0])

    every_line(prepared, lambda buffer: buffer.extend(new), check, 7)


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_buffers": 2}, "frames: expected None with num_buffers=2"),
        ({"frames": None, "num_envs": 2}, "num_envs: expected None without frames"),
        ({"frames": None, "num_frames": 2}, "num_frames: expected None without frames"),
        ({"frames": {}}, "frames: expected the frames of a stack by key"),
        ({"frames": 4}, "frames: expected the frames of a stack by key"),
        ({"frames": {"next": 4}}, "frames: expected keys beside 'next'"),
        ({"frames": {3: 4}}, "frames: expected keys beside 'next'"),
        ({"frames": {"pixels": 0}}, "frames, 'pixels': expected an integer of at least 1"),
        ({"frames": {"a": 2, ("a", "b"): 2}}, "frames: expected no key inside of 'a', got"),
        ({"frames": {"a": {"b": 2}, ("a", "b"): 3}}, "frames: expected each key once, got"),
        ({"num_envs": 0}, "num_envs: expected an integer of at least 1"),
        ({"num_frames": 7}, "num_frames: expected at least 8"),
        ({"num_frames": 2**32}, "num_frames: expected at most"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, words):
    with pytest.raises(ConfigurationError, match=words):
        make(**settings)


@pytest.mark.parametrize("example", [False, True])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda td: td.exclude("pixels"), "'pixels': expected stacks of frames"),
        (lambda td: td.exclude(("next", "pixels")), "'next', 'pixels'.: expected the next stack"),
        (lambda td: td.set("pixels", td["pixels"][..., :3, :, :]), r"frames of shape \[4, ...\]"),
        (lambda td: td.set("pixels", td["pixels"].double()), r"expected torch.float64 of shape"),
        (lambda td: td.set("pixels", td["pixels"][..., :0]), r"frames of shape \[4, ...\]"),
    ],
)
def test_data_without_two_like_stacks_is_refused(change, words, example):
    wrong = change(numbered(0, 1))
    if example:
        with pytest.raises(SchemaError, match=f"example.*{words}"):
            make(example=wrong[0])
        return
    buffer = make()
    with pytest.raises(SchemaError, match=words):
        buffer.extend(wrong)
    buffer.extend(numbered(0, 3))  # others are taken
    with pytest.raises(SchemaError):
        buffer.extend(wrong)
    assert stored(buffer) == 3 + DEPTH


@pytest.mark.parametrize("wrong", ["reward", "second stack", "a stack without values"])
def test_what_is_refused_leaves_all_frames_as_they_are(wrong):
    """Also where what is refused would have taken the place of most frames."""

    def two(first, n):
        td = numbered(first, n)
        td["other"], td["next", "other"] = td["pixels"][:, :2], td["next", "pixels"][:, :2]
        return td.clone()

    buffer = make(64, frames={"pixels": DEPTH, "other": 2})
    for first in range(0, 64, 8):
        buffer.extend(two(first, 8))
    before, number = buffer.transitions.clone(), stored(buffer)
    td = two(100, 48)
    if wrong == "reward":
        td["next", "reward"] = td["next", "reward"].to_sparse()
    elif wrong == "second stack":
        td["other"] = td["other"].to_sparse()
    else:
        td["next", "other"] = td["next", "other"].to("meta")
    with pytest.raises(SchemaError):
        buffer.extend(td)
    assert stored(buffer) == number
    assert (buffer.transitions == before).all()
    buffer.extend(two(64, 1))
    buffer.check_valid()
    assert_right(buffer.transitions)


def test_environments_that_do_not_fit_the_rows_are_refused():
    buffer = make(num_envs=3)
    with pytest.raises(SchemaError, match="a multiple of num_envs=3 transitions"):
        buffer.extend(numbered(0, 4))
    with pytest.raises(SchemaError, match="a multiple of num_envs=3 transitions"):
        buffer.add(numbered(0, 1)[0])
    for env, words in [
        ([0], "shape"),
        ([0.5] * 3, "integer"),
        ([0, 3, 1], "below 3"),
        ([-1] * 3, "below 3"),
    ]:
        with pytest.raises(IndexRangeError, match=words):
            buffer.extend(numbered(0, 3), env=env)
    with pytest.raises(ConfigurationError, match="env: expected None"):
        PrioritizedReplayBuffer(5).extend(numbered(0, 3), env=[0, 0, 0])
    assert len(buffer) == 0
    buffer.add(numbered(0, 1)[0], env=2)
    buffer.extend_leaves(
        {
            key if isinstance(key, tuple) else (key,): x
            for key, x in numbered(1, 2).items(True, True)
        },
        env=torch.tensor([2, 2]),
    )
    assert stored(buffer) == 3 + DEPTH


@pytest.mark.parametrize("fails_at", [0, 1, 2])
def test_too_little_memory_leaves_a_buffer_that_takes_others(fails_at, monkeypatch):
    calls = itertools.count()
    zeros = Memory.zeros

    def fail(self, shape, dtype, device):
        if next(calls) == fails_at:
            raise MemoryError("none left")
        return zeros(self, shape, dtype, device)

    buffer = PrioritizedReplayBuffer(20, frames={"pixels": DEPTH, "more": DEPTH})
    td = numbered(0, 3)
    td["more"], td["next", "more"] = td["pixels"].double(), td["next", "pixels"].double()
    with monkeypatch.context() as patch:
        patch.setattr(Memory, "zeros", fail)
        with pytest.raises(AllocationError):
            buffer.extend(td)
    td["more"], td["next", "more"] = td["pixels"].int(), td["next", "pixels"].int()
    buffer.extend(td)
    assert_right(buffer.transitions)
    assert same_bits(buffer.transitions["more"], td["more"])


# --- states ---------------------------------------------------------------------------------------


def filled(capacity=40, steps=100, **settings):
    """A buffer whose ring of transitions has wrapped."""
    buffer = make(capacity, num_envs=2, generator=torch.Generator().manual_seed(3), **settings)
    for t in range(steps // 5):
        buffer.extend(numbered(5 * t, 5, envs=2))
    return buffer


def test_a_file_holds_each_frame_once_and_goes_on_as_the_buffer_did(tmp_path, choice):
    buffer = filled(400, 300, num_frames=450)
    buffer.save(tmp_path / "buffer")
    frames = 450 * 6 * 4
    assert frames < os.path.getsize(tmp_path / "buffer") < frames + 400 * 110
    other = PrioritizedReplayBuffer.load(tmp_path / "buffer")
    assert (other.frames, other.num_envs) == ({"pixels": DEPTH}, 2)
    assert other.stats() == buffer.stats()
    assert same_bits(other.transitions["pixels"], buffer.transitions["pixels"])
    for _ in range(3):
        one, two = buffer.sample(), other.sample()
        assert torch.equal(one["step"], two["step"])
        assert_right(two)
        for each in (buffer, other):
            each.extend(numbered(300, 2, envs=2))
    other.check_valid()


@pytest.mark.parametrize(
    ("capacity", "num_frames", "kept"), [(50, None, 40), (15, None, 12), (40, 20, 12)]
)
def test_a_state_moves_to_other_sizes_with_the_newest_that_fit(capacity, num_frames, kept, choice):
    buffer = filled()
    state = buffer.state_dict()
    other = make(capacity, num_envs=1, num_frames=num_frames)
    other.load_state_dict(state)
    other.check_valid()
    left = living(other)
    assert left.sum() == kept
    assert other.stats()["retired"] == len(other) - kept
    held = other.transitions[left]
    assert_right(held)
    newest = buffer.transitions["step"].sort(descending=True).values[:kept]
    assert sorted(held["step"].tolist()) == sorted(newest.tolist())
    assert torch.equal(other.priority > 0, left)
    other.extend(numbered(200, 9))
    other.check_valid()
    assert_right(other.sample(100))
    again = other.state_dict()  # retired ones stay so
    last = make(capacity, num_envs=3, num_frames=num_frames)
    last.load_state_dict(again)
    assert torch.equal(living(last), living(other))
    assert last.stats() == other.stats()


@pytest.mark.parametrize("capacity", [40, 15, 60])
def test_a_file_of_whole_stacks_is_read_into_a_buffer_that_keeps_frames_once(capacity, tmp_path):
    plain = PrioritizedReplayBuffer(40)
    plain.extend(numbered(0, 33, envs=2))
    plain.save(tmp_path / "plain")
    buffer = make(capacity, num_envs=2)
    buffer.extend(numbered(500, 3, envs=2))
    buffer.restore(tmp_path / "plain")
    plain = PrioritizedReplayBuffer.load(tmp_path / "plain", capacity=capacity)
    assert torch.equal(buffer.priority, plain.priority)
    for key in plain.transitions.keys(True, True):
        assert same_bits(buffer.transitions[key], plain.transitions[key])
    assert stored(buffer) < 2 * len(buffer)
    assert buffer.write_count == plain.write_count
    buffer.check_valid()


def told_apart(first, n, keys):
    """Transitions whose stacks of two frames tell the key and the step."""
    leaves = {}
    for j, key in enumerate(keys):
        stack = (
            1000.0 * j + torch.arange(first, first + n).view(-1, 1, 1) + torch.arange(2.0)[:, None]
        )
        leaves |= {key: stack, ("next", *key): stack + 1}
    return leaves


NESTS = [("a",), ("deep", "a"), ("b",), ("deep", "b")]


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 1, 0], [1, 0, 3, 2]])
@pytest.mark.parametrize("capacity", [12, 7])
def test_stacks_come_back_under_their_own_keys_in_whatever_order_these_were_told(
    order, capacity, tmp_path, choice
):
    buffer = PrioritizedReplayBuffer(12, frames=dict.fromkeys(NESTS, 2))
    buffer.extend_leaves(told_apart(0, 17, NESTS))
    buffer.save(tmp_path / "buffer")
    other = PrioritizedReplayBuffer(capacity, frames={NESTS[k]: 2 for k in order})
    other.restore(tmp_path / "buffer")
    for made in (other, PrioritizedReplayBuffer.load(tmp_path / "buffer", capacity=capacity)):
        made.check_valid()
        kept = told_apart(17 - capacity, capacity, NESTS)
        held = made.filled_leaves()
        assert held.keys() == kept.keys()
        for key, stacks in kept.items():
            assert torch.equal(held[key].sort(0).values, stacks), key


def test_of_whole_stacks_of_a_wrapped_ring_the_oldest_retire():
    plain = PrioritizedReplayBuffer(40)
    for start in (0, 30):  # the newest are in the slots 0 to 19
        plain.extend(numbered(start, 30))
    buffer = make(40, num_frames=20)
    buffer.load_state_dict(plain.state_dict())
    buffer.check_valid()
    left = buffer.transitions[living(buffer)]
    assert 0 < len(left) < 20
    assert sorted(left["step"].tolist()) == [*range(60 - len(left), 60)]
    assert_right(left)


def test_states_that_do_not_fit_change_nothing():
    state = filled().state_dict()
    with pytest.raises(CheckpointError, match=r"got one of a buffer with frames=\{'pixels': 4\}"):
        PrioritizedReplayBuffer(40).load_state_dict(state)
    other = make(40, frames={"other": DEPTH})
    with pytest.raises(CheckpointError, match="expected a state with frames"):
        other.load_state_dict(state)
    buffer = make(40)
    td = numbered(0, 3)
    td["pixels"], td["next", "pixels"] = td["pixels"].double(), td["next", "pixels"].double()
    buffer.extend(td)
    with pytest.raises(SchemaError, match="pixels"):
        buffer.load_state_dict(state)
    assert same_bits(buffer.transitions["pixels"], td["pixels"])


def _damaged(state, where, value):
    *path, last = where
    at = state
    for name in path:
        at[name] = dict(at[name])
        at = at[name]
    at[last] = value
    return state


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("frames",), {"retired": 0}),
        (("frames", "stores"), {}),
        (("frames", "retired"), -1),
        (("frames", "stores", "0", "stored"), 7),
        (("frames", "stores", "0", "size"), 7),
        (("frames", "stores", "0", "low"), torch.zeros(3, dtype=torch.int64)),
        (("frames", "stores", "0", "low"), torch.full((40,), -1)),
        (("frames", "stores", "0", "frames"), torch.zeros(3)),
        (("frames", "stores", "0", "frames"), None),
        (("transitions", "pixels"), torch.full((40, DEPTH), 999, dtype=torch.int32)),
        (("transitions", "pixels"), torch.full((40, DEPTH), -1, dtype=torch.int32)),
        (("transitions", "pixels"), torch.zeros(40, DEPTH)),
        (("settings", "frames"), {"pixels": 3}),
        (("settings", "num_envs"), 0),
    ],
)
def test_a_state_of_frames_that_cannot_be_is_refused(where, value):
    state = _damaged(dict(filled().state_dict()), where, value)
    buffer = make(40, num_envs=2)
    with pytest.raises(CheckpointError):
        buffer.load_state_dict(state)
    assert len(buffer) == 0


def test_a_buffer_whose_transitions_have_all_retired_can_be_saved():
    def stacks(*frames):
        return torch.tensor(frames, dtype=torch.float32).view(1, 2, 1)

    settings = {"frames": {"pixels": 2}, "num_frames": 4}
    buffer = make(4, **settings)
    buffer.extend({"pixels": stacks(1, 2), "next": {"pixels": stacks(2, 3)}})
    # the oldest frame again, and three more: there is room for four
    buffer.extend({"pixels": stacks(1, 5), "next": {"pixels": stacks(6, 7)}})
    assert not living(buffer).any()
    for capacity in (4, 1):
        first, second = make(capacity, **settings), make(capacity, **settings)
        first.load_state_dict(buffer.state_dict())
        second.load_state_dict(first.state_dict())
        assert not living(second).any()
        second.extend({"pixels": stacks(8, 9), "next": {"pixels": stacks(9, 10)}})
        assert second.sample()["pixels"].unique().tolist() == [8, 9]
        second.check_valid()


def test_an_empty_buffer_can_be_saved_with_and_without_keys(tmp_path):
    for buffer in (make(), make(example=numbered(0, 1)[0])):
        buffer.save(tmp_path / "empty")
        other = PrioritizedReplayBuffer.load(tmp_path / "empty")
        other.extend(numbered(0, 3))
        assert_right(other.transitions)


# --- other kinds of buffers -----------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{"threads": True}, {"prefetch": 2}])
def test_threads_and_batches_drawn_ahead_get_whole_stacks(settings):
    buffer = make(20, **settings)
    for t in range(30):
        buffer.extend(numbered(t, 1))
        assert_right(buffer.sample())
    buffer.close()


@pytest.fixture
def shared():
    return make(50, num_envs=2, num_frames=60, shared=True, example=numbered(0, 1)[0])


def test_processes_share_frames(shared):
    shared.extend(numbered(0, 5, envs=2))
    page = stored(shared)

    def write():
        torch.set_num_threads(1)
        assert_right(shared.sample(20))
        shared.extend(numbered(5, 25, envs=2))

    assert os.waitpid(forked(write), 0)[1] == 0
    assert stored(shared) == page + 50
    assert len(shared) == 50
    left = living(shared)
    assert_right(shared.transitions[left])
    shared.check_valid()
    state = shared.state_dict()
    again = make(50, num_envs=2, num_frames=60, shared=True, example=numbered(0, 1)[0])
    again.load_state_dict(state)
    assert_right(again.transitions[living(again)])


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def dies_after(function):
    def call(*args, **given):
        function(*args, **given)
        die()

    return call


@pytest.mark.parametrize(
    "place",
    [
        (FrameStore, "write", die),
        (FrameStore, "write", dies_after(FrameStore.write)),
        (PriorityTable, "write_runs", dies_after(PriorityTable.write_runs)),
        (FrameStore, "raise_floor", die),
        (FrameStore, "raise_floor", dies_after(FrameStore.raise_floor)),
    ],
)
def test_a_writer_killed_in_extend_leaves_no_transition_with_frames_of_others(place, shared):
    shared.extend(numbered(0, 24, envs=2))
    owner, name, instead = place

    def write():
        setattr(owner, name, instead)
        shared.extend(numbered(24, 9, envs=2))

    assert os.waitpid(forked(write), 0)[1] == signal.SIGKILL
    assert_right(shared.sample(500))
    shared.check_valid()
    drawable = shared.priority > 0
    assert_right(shared.transitions[drawable])
    assert 0 < drawable.sum() < 50
    shared.extend(numbered(40, 9, envs=2))
    assert_right(shared.sample(500))


@pytest.mark.parametrize("after", [0.05, 0.1, 0.15])
def test_writers_killed_at_any_time_leave_no_transition_with_frames_of_others(after, shared):
    def write():
        torch.set_num_threads(1)
        for t in itertools.count(0, 3):
            shared.extend(numbered(t, 3, envs=2))

    process = forked(write)
    while shared.write_count < 60:
        time.sleep(0.01)
    kill(process, after)
    assert_right(shared.sample(500))
    shared.check_valid()
    assert_right(shared.transitions[shared.priority > 0])


@pytest.mark.parametrize("frame", [(2, 4), (5,)])
@pytest.mark.parametrize("size", [150, 300])
def test_kernels_store_what_plain_torch_stores(frame, size, monkeypatch):
    stores = []
    for choice in ("off", "auto"):
        monkeypatch.setenv(kernels.VARIABLE, choice)
        store = FrameStore(("x",), DEPTH, size, 2, 500, torch.device("cpu"), Memory())
        store.allocate(Field(("x",), torch.Size(frame), torch.uint8))
        stores.append(store)
    games = [Game(DEPTH, frame, torch.uint8, e) for e in range(2)]
    for t in range(100):
        pairs = [game.step(KINDS[(7 * t + e) % len(KINDS)]) for e, game in enumerate(games)]
        for e, (now, after) in enumerate(pairs):
            stacks = [now.unsqueeze(0), after.unsqueeze(0)]
            one, two = (store.write(stacks, torch.tensor([e]), 2 * t + e) for store in stores)
            assert all(map(torch.equal, one, two))
    assert torch.equal(stores[0].page, stores[1].page)
    assert torch.equal(stores[0].low, stores[1].low)
    assert torch.equal(stores[0].recent[:, :2], stores[1].recent[:, :2])


def test_stacks_at_odd_addresses_are_stored(choice):
    memory = torch.zeros(1 + 2 * DEPTH * 8, dtype=torch.uint8)
    memory[1:] = torch.arange(2 * DEPTH * 8)
    stacks = memory[1:].view(2, 1, DEPTH, 8)
    buffer = make()
    buffer.extend({"pixels": stacks[0], "next": {"pixels": stacks[1]}})
    assert same_bits(buffer.transitions["pixels"], stacks[0])
    assert same_bits(buffer.transitions["next", "pixels"], stacks[1])


def test_environments_may_be_a_column_of_a_matrix(choice):
    """A copy of it must live until the kernel has read it."""
    new = numbered(0, 4, envs=2)
    env = torch.stack([new["env"], new["env"] + 5], 1)[:, 0]
    assert not env.is_contiguous()
    buffer, other = make(num_envs=2), make(num_envs=2)
    buffer.extend(new, env=env)
    other.extend(new, env=env.contiguous())
    assert_right(buffer.transitions)
    one, two = buffer._storage._stores[0], other._storage._stores[0]
    assert torch.equal(one.counters, two.counters)


@pytest.mark.parametrize(
    ("told", "num_frames"),
    slow_but([(False, None), (True, 13)], itertools.product((False, True), (None, 13, 300))),
)
def test_on_cuda_the_host_never_waits(pretended, told, num_frames):
    with pretended.copies():
        buffer = make(20, num_envs=2, num_frames=num_frames, device="cuda")
    td = numbered(0, 4, envs=2).to("cuda:0")
    env = torch.zeros(8, dtype=torch.int64, device="cuda:0") if told else None
    for _ in range(4):
        slot = buffer.extend(td, env=env)
        batch = buffer.sample()
        assert batch["pixels"].device == pretended.device
        assert batch["pixels"].shape == (8, DEPTH, 2, 3)
        td_error = torch.ones(8, device="cuda:0")
        buffer.update_priority(batch["index"], td_error, batch["generation"])
        buffer.update_priority(slot, td_error)


def test_frames_in_pinned_memory_are_for_cuda():
    with pytest.raises(ConfigurationError, match="got 'pinned', which is for batches on a CUDA"):
        make(20, storage="pinned", device="cpu")


def test_frames_in_pinned_memory_are_copied_to_the_device(pretended, monkeypatch):
    pinned = []
    plain = lambda self, shape, dtype, device: zeros(shape, dtype, device)  # noqa: E731
    monkeypatch.setattr(Memory, "zeros", plain)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self) or self)
    with pretended.copies():
        store = FrameStore(("x",), DEPTH, 50, 2, 500, pretended.device, Memory("pinned"))
        store.allocate(Field(("x",), torch.Size((2, 3)), torch.uint8))
    assert store.frames.device.type == "cpu"
    found = store.read(torch.zeros(8, DEPTH, dtype=torch.int32, device="cpu"))  # does not wait
    assert (found.device, found.dtype) == (pretended.device, torch.uint8)
    assert found.shape == pinned[0].shape == (8, DEPTH, 2, 3)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("storage", ["pinned", "memmap"])
def test_frames_on_the_host_are_drawn_on_cuda(storage):
    buffer = make(50, device="cuda", storage=storage)
    for k in range(0, 120, 6):
        buffer.extend(numbered(k, 6).to("cuda"))
        assert_right(buffer.sample().cpu())
    buffer.check_valid()


def test_code_made_by_torch_compile_draws_whole_stacks():
    buffer = make(20)
    buffer.extend(numbered(0, 20))

    @torch.compile(backend="eager")
    def draw():
        return buffer.sample(16)

    assert_right(draw())

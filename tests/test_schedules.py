"""A beta that follows a schedule, counted in updates."""

import copy
import pickle

import pytest
import torch

from per_td import CheckpointError, ConfigurationError, LinearSchedule, PrioritizedReplayBuffer
from tests.support.oracle import S, data, numbered
from tests.support.processes import shared


def make(schedule=None, groups=None, **settings):
    schedule = schedule or LinearSchedule(0.4, 1.0, 4)
    buffer = PrioritizedReplayBuffer(9, 4, beta_schedule=schedule, num_buffers=groups, **settings)
    buffer.extend(numbered(0, 9, count=groups) if groups else data(0, 9))
    return buffer


def update(buffer, times=1):
    for _ in range(times):
        batch = buffer.sample()
        buffer.update_priority(batch["index"], torch.rand(batch.shape), batch["generation"])


@pytest.mark.parametrize("ends", [(0.4, 1.0), (1.0, 0.0), (0.5, 0.5)])
@pytest.mark.parametrize("steps", [1, 2, 7, 1000])
def test_a_line_goes_from_start_to_end_and_stays_there(steps, ends):
    schedule = LinearSchedule(*ends, steps)
    for step in (0, 1, steps // 2, steps - 1, steps, steps + 1, 10**12):
        line = ends[0] + (ends[1] - ends[0]) * min(step / steps, 1.0)
        value = schedule.at(torch.tensor(step))
        assert value.dtype == torch.float64
        assert value.item() == pytest.approx(line, abs=1e-15)
    assert schedule.at(torch.tensor(0)) == ends[0]
    assert schedule.at(torch.tensor(steps)) == ends[1]


@pytest.mark.parametrize(
    ("args", "name"),
    [
        ((-0.1, 1.0, 5), "start"),
        ((0.4, 1.1, 5), "end"),
        ((float("nan"), 1.0, 5), "start"),
        (("x", 1.0, 5), "start"),
        ((0.4, None, 5), "end"),
        ((0.4, 1.0, 0), "steps"),
        ((0.4, 1.0, 2.5), "steps"),
        ((0.4, 1.0, True), "steps"),
    ],
)
def test_a_schedule_that_is_none_is_refused_by_name(args, name):
    with pytest.raises(ConfigurationError, match=f"{name}: expected"):
        LinearSchedule(*args)


@pytest.mark.parametrize("groups", [None, 1, S])
def test_beta_follows_the_updates_and_the_weights_follow_beta(groups, choice):
    buffer = make(groups=groups, weight_normalization="none", alpha=1.0)
    for beta in (0.4, 0.55, 0.7, 0.85, 1.0, 1.0):
        assert buffer.beta == pytest.approx(beta, abs=1e-15)
        batch = buffer.sample(by="inverse")
        inverse = torch.where(buffer.mass > 0, 1 / buffer.mass.double(), 0.0)
        p = (inverse / inverse.sum(-1, keepdim=True)).gather(-1, batch["index"])
        expected = (9 * p).pow(-beta)
        torch.testing.assert_close(batch["priority_weight"].double(), expected, rtol=1e-5, atol=0)
        update(buffer)
    buffer.check_valid()


def test_only_updates_count_and_only_those_that_are_made(choice):
    buffer = make()
    buffer.set_priority([0], [1.0])
    buffer.sample()
    buffer.extend(data(9, 1))
    list(buffer.sweep(4))
    for wrong in ({"td_error": [float("nan")]}, {"td_error": [1.0], "mode": "min"}):
        with pytest.raises(ValueError, match="expected"):
            buffer.update_priority([0], **wrong)
    assert buffer.beta == 0.4
    buffer.update_tensordict_priority({"index": [0], "td_error": [1.0]})
    assert buffer.beta == pytest.approx(0.55)


def test_a_state_with_a_beta_of_each_buffer_leaves_a_schedule_its_one():
    each = PrioritizedReplayBuffer(9, num_buffers=2, beta=[0.1, 0.9])
    buffer = make(groups=2)
    buffer.load_state_dict(each.state_dict())
    assert isinstance(buffer.beta, float)
    assert buffer.beta == 0.4
    assert buffer.state_dict()["beta"].shape == ()
    buffer.check_valid()


def test_a_schedule_excludes_other_ways_to_change_beta():
    schedule = LinearSchedule(0.4, 1.0, 4)
    with pytest.raises(ConfigurationError, match="beta_schedule: expected None with beta_incr"):
        PrioritizedReplayBuffer(9, beta_schedule=schedule, beta_increment=0.1)
    with pytest.raises(ConfigurationError, match="beta_schedule: expected None with shared"):
        shared(9, beta_schedule=schedule)
    buffer = make(schedule)
    with pytest.raises(ConfigurationError, match=r"^beta: expected"):
        buffer.beta = 0.5
    with pytest.raises(ConfigurationError, match=r"^increase_beta: expected no beta_schedule"):
        buffer.increase_beta()
    with pytest.raises(ConfigurationError, match=r"^beta_increment: expected 0 with a beta_sch"):
        buffer.beta_increment = 0.1
    buffer.beta_increment = 0.0
    with pytest.raises(ConfigurationError, match=r"^beta_schedule: expected no change"):
        buffer.beta_schedule = None
    assert (buffer.beta, buffer.beta_schedule) == (0.4, schedule)


@pytest.mark.parametrize("wrong", [0.4, (0.4, 1.0, 4), "linear", {"start": 0.4}, lambda step: 0.4])
def test_what_is_no_schedule_is_refused_by_name(wrong):
    with pytest.raises(ConfigurationError, match=r"beta_schedule: expected a per_td\.LinearSch"):
        PrioritizedReplayBuffer(9, beta_schedule=wrong)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda buffer: pickle.loads(pickle.dumps(buffer)),
    "state": lambda buffer: loaded(make(LinearSchedule(0.4, 1.0, 4)), buffer.state_dict()),
}


def loaded(buffer, state):
    buffer.load_state_dict(state)
    return buffer


@pytest.mark.parametrize("kind", [*COPIES, "file", "restore"])
def test_a_copy_goes_on_where_the_other_was(kind, tmp_path):
    buffer = make()
    update(buffer, 2)
    if kind in ("file", "restore"):
        buffer.save(tmp_path / "buffer.pt")
    if kind == "file":
        other = PrioritizedReplayBuffer.load(tmp_path / "buffer.pt")
        assert other.beta_schedule == buffer.beta_schedule
    elif kind == "restore":
        other = make()
        other.restore(tmp_path / "buffer.pt")
    else:
        other = COPIES[kind](buffer)
    for each in (buffer, other):
        assert each.beta == pytest.approx(0.7)
        update(each)
        assert each.beta == pytest.approx(0.85)


def test_a_buffer_with_a_schedule_keeps_it_whatever_state_it_takes_over():
    plain = PrioritizedReplayBuffer(9, 4, beta=0.9, beta_increment=0.1)
    plain.extend(data(0, 9))
    buffer = make()
    update(buffer, 3)
    state = buffer.state_dict()
    buffer.load_state_dict(plain.state_dict())
    assert (buffer.beta, buffer.beta_increment) == (0.4, 0.0)  # of a state without any updates
    update(buffer)
    assert buffer.beta == pytest.approx(0.55)
    slower = make(LinearSchedule(0.0, 1.0, 10))
    slower.load_state_dict(state)
    assert slower.beta == pytest.approx(0.3)
    plain.load_state_dict(state)
    assert plain.beta == pytest.approx(0.85)
    plain.increase_beta()


@pytest.mark.parametrize(
    "wrong",
    [
        {"beta_schedule": {"start": 2.0, "end": 1.0, "steps": 4}},
        {"beta_schedule": {"start": 0.4, "end": 1.0}},
        {"beta_schedule": [0.4, 1.0, 4]},
        {"beta_schedule": {"start": 0.4, "end": 1.0, "steps": 4}, "beta_increment": 0.1},
    ],
    ids=str,
)
def test_a_state_with_a_damaged_schedule_is_refused(wrong):
    buffer = make()
    state = buffer.state_dict()
    state["settings"] |= wrong
    with pytest.raises(CheckpointError, match="settings: "):
        buffer.load_state_dict(state)
    for updates in (-1, 1.5, "x", torch.tensor([1, 2])):
        with pytest.raises(CheckpointError, match="updates"):
            buffer.load_state_dict(buffer.state_dict() | {"updates": updates})
    assert buffer.beta == 0.4

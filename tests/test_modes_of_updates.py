"""Priorities that updates set: modes, bounds, and priorities as they are, against Python floats."""

import itertools
import math

import numpy as np
import pytest
import torch
from tensordict import TensorDict

from per_td import (
    CheckpointError,
    ConfigurationError,
    IndexRangeError,
    PrioritizedReplayBuffer,
    PriorityError,
    validation,
)
from tests.support.oracle import S, data
from tests.support.parameters import slow_but
from tests.support.processes import shared, transitions

BOUNDS = (None, (0.5, None), (None, 2.0), (0.5, 2.0), (0.0, 0.0), (1.0, 1.0))
MODES = [("set", 1.0), *itertools.product(("max", "mean"), (0.0, 0.3, 0.7, 1.0))]
SOME_MODES = slow_but([("set", 1.0), ("max", 0.3), ("mean", 0.7)], MODES)
INDEX = [3, 1, 4, 1, 5, 9, 1, 6]
ERROR = [0.5, -3.0, 0.0, 2.5, -1e-9, 1e4, -0.1, 1.0]


def k(n: int, groups: int | None, device="cpu") -> TensorDict:
    rows = () if groups is None else (groups,)
    return TensorDict({"k": torch.arange(n).expand(*rows, n).clone()}, [*rows, n]).to(device)


def make(groups=None, device="cpu", **settings) -> PrioritizedReplayBuffer:
    buffer = PrioritizedReplayBuffer(12, num_buffers=groups, device=device, **settings)
    priority = torch.arange(12.0, device=device) / 4
    buffer.extend(k(12, groups, device), priority.expand(*buffer.priority.shape[:-1], 12))
    return buffer


def each(values, groups, device, dtype=None):
    row = torch.tensor(values, dtype=dtype, device=device)
    return row if groups is None else row.expand(groups, -1).clone()


def expected(old, index, error, *, eps, clip, mode, rate):
    """Priorities after an update, in float32 steps; each sees those of before, the last holds."""
    new, before = list(old), list(old)
    low, high = clip or (None, None)
    for i, delta in zip(index, error, strict=True):
        p = np.float32(abs(np.float32(delta))) + np.float32(eps)
        p = p if low is None else max(p, np.float32(low))
        p = p if high is None else min(p, np.float32(high))
        p = float(p)
        p = {
            "set": p,
            "max": max(p, rate * before[i]),
            "mean": before[i] + rate * (p - before[i]),
        }[mode]
        new[i] = p
    return new


@pytest.mark.parametrize(("mode", "rate"), SOME_MODES)
@pytest.mark.parametrize("clip", BOUNDS, ids=str)
@pytest.mark.parametrize("groups", slow_but([S], [None, 1, S]))
@pytest.mark.parametrize("prioritization", ["proportional", "rank"])
def test_every_mode_within_every_bounds_sets_what_its_formula_says(
    prioritization, groups, clip, mode, rate, device, choice
):
    if prioritization == "rank" and groups:
        pytest.skip("ranks are kept for one buffer")
    for eps in (0.0, 0.25):
        buffer = make(groups, device, eps=eps, priority_clip=clip, prioritization=prioritization)
        old = buffer.priority.cpu().reshape(-1, 12)
        index, error = each(INDEX, groups, device), each(ERROR, groups, device)
        buffer.update_priority(index, error, mode=mode, rate=rate)
        for row, before in zip(buffer.priority.cpu().reshape(-1, 12), old.tolist(), strict=True):
            given = {"eps": eps, "clip": clip, "mode": mode, "rate": rate}
            np.testing.assert_allclose(row, expected(before, INDEX, ERROR, **given), rtol=3e-7)
        assert torch.equal(buffer.mass > 0, buffer.priority > 0)
        buffer.check_valid()


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-45, 3.0, 3.4e38])
def test_a_priority_is_set_as_it_is(value, device, choice):
    buffer = make(device=device, eps=0.5, priority_clip=(1.0, 2.0))
    buffer.set_priority(torch.tensor([2, 7], device=device), torch.tensor([value, 5.0]).to(device))
    assert buffer.priority[2].item() == torch.tensor(value).item()
    assert buffer.priority[7] == 5
    assert (buffer.mass[2] > 0) == (value > 0)
    if not value:
        assert not (buffer.sample(500)["index"] == 2).any()
    buffer.check_valid()


def test_of_equal_indices_the_last_priority_holds(device, choice):
    buffer = make(device=device)
    index = torch.tensor([3, 5, 3, 3], device=device)
    buffer.set_priority(index, torch.tensor([9.0, 8.0, 0.0, 7.0], device=device))
    assert buffer.priority[[3, 5]].tolist() == [7.0, 8.0]
    buffer.check_valid()


@pytest.mark.parametrize("call", ["set_priority", "max", "mean"])
@pytest.mark.parametrize("groups", [None, S])
def test_stale_ones_are_dropped_and_counted_and_masked_ones_left_alone(
    groups, call, device, choice
):
    buffer = make(groups, device)
    rows = groups or 1
    index = each([0, 1, 2, 3], groups, device)
    generation = buffer.generation_of(index)
    buffer.extend(k(2, groups, device))  # 0 and 1 are other ones now
    before = buffer.priority.clone()
    given = {"mode": call, "rate": 0.5} if call != "set_priority" else {}
    method = buffer.update_priority if given else buffer.set_priority
    if groups:
        mask = each([True, True, False, True], groups, device)
        index = torch.where(mask, index, -3)
        values = torch.where(mask, each([5.0] * 4, groups, device), math.nan)
        method(index, values, generation, mask, **given)
    else:
        method(index, each([5.0] * 4, groups, device), generation, **given)
    changed = (buffer.priority != before).reshape(-1, 12).sum(0).tolist()
    assert changed == [0, 0, 0 if groups else 1, rows] + [0] * 8
    assert buffer.stats()["stale_updates"] == 2 * rows
    assert buffer.stats()["refused_priorities"] == 0
    buffer.check_valid()


@pytest.mark.parametrize("groups", [None, S])
@pytest.mark.parametrize("call", ["set_priority", "clip", "max", "mean"])
@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf, -1.0])
def test_what_is_no_priority_changes_nothing_on_the_host_and_is_counted_on_a_device(
    wrong, call, groups, device, choice
):
    buffer = make(groups, device, priority_clip=(0.1, 3.0) if call == "clip" else None)
    given = {"mode": call, "rate": 0.5} if call in ("max", "mean") else {}
    method = buffer.set_priority if call == "set_priority" else buffer.update_priority
    if call != "set_priority" and wrong == -1.0:
        return  # a TD error may be negative
    before = buffer.priority.clone()
    index, values = each([4, 5], groups, device), each([2.0, 2.0], groups, device)
    values.view(-1)[-1] = wrong
    if validation.can_raise(values):
        with pytest.raises(PriorityError, match="nothing was written"):
            method(index, values, **given)
        assert torch.equal(buffer.priority, before)
    else:
        method(index, values, **given)
        assert buffer.stats()["refused_priorities"] == 1
        changed = (buffer.priority != before).sum()
        assert changed == 2 * (groups or 1) - 1
    buffer.check_valid()


WRONG = {
    "shape": (([0, 1], [1.0, 2.0, 3.0]), {}, PriorityError, "priority"),
    "dtype": (([0, 1], ["a", "b"]), {}, PriorityError, "priority"),
    "complex": (([0, 1], torch.ones(2, dtype=torch.complex64)), {}, PriorityError, "priority"),
    "generation": (([0, 1], [1.0, 2.0], [0]), {}, PriorityError, "generation"),
    "range": (([0, 12], [1.0, 2.0]), {}, IndexRangeError, "12"),
    "index": (([0.5, 1], [1.0, 2.0]), {}, IndexRangeError, "index"),
    "mask": (([0, 1], [1.0, 2.0], None, [True, True]), {}, ConfigurationError, "mask"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_arguments_of_set_priority_are_named_and_change_nothing(kind, choice):
    args, given, error, match = WRONG[kind]
    buffer = make()
    before = buffer.priority.clone()
    with pytest.raises(error, match=match):
        buffer.set_priority(*args, **given)
    assert torch.equal(buffer.priority, before)
    buffer.check_valid()


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"mode": "min"}, "mode: expected one of"),
        ({"mode": None}, "mode: expected one of"),
        ({"mode": "set", "rate": 0.5}, r"rate: expected 1.0 with mode='set', got 0.5"),
        ({"rate": 0.5}, r"rate: expected 1.0 with mode='set', got 0.5"),
        ({"mode": "max", "rate": 1.5}, "rate: expected"),
        ({"mode": "max", "rate": -0.1}, "rate: expected"),
        ({"mode": "mean", "rate": math.nan}, "rate: expected"),
        ({"mode": "mean", "rate": "x"}, "rate: expected"),
        ({"mode": "mean", "rate": None}, "rate: expected"),
    ],
)
def test_a_mode_or_rate_that_makes_no_sense_is_refused_by_name(given, match):
    buffer = make()
    before = buffer.priority.clone()
    with pytest.raises(ConfigurationError, match=match):
        buffer.update_priority([0], [9.0], **given)
    assert torch.equal(buffer.priority, before)


@pytest.mark.parametrize(
    "clip",
    [
        1.0,
        "ab",
        (1.0,),
        (1.0, 2.0, 3.0),
        (2.0, 1.0),
        (-1.0, 1.0),
        (math.nan, 1.0),
        (0.0, math.inf),
        (None, "x"),
        (0.0, 1e39),
        {"low": 1},
    ],
    ids=str,
)
def test_bounds_that_are_none_are_refused_by_name(clip):
    with pytest.raises(ConfigurationError, match=r"^priority_clip: expected"):
        PrioritizedReplayBuffer(4, priority_clip=clip)
    buffer = PrioritizedReplayBuffer(4, priority_clip=(1.0, 2.0))
    with pytest.raises(ConfigurationError, match=r"^priority_clip: expected"):
        buffer.priority_clip = clip
    assert buffer.priority_clip == (1.0, 2.0)


def test_bounds_leave_new_priorities_and_those_of_before_as_they_are(choice):
    buffer = PrioritizedReplayBuffer(9, priority_clip=(1.0, 2.0))
    buffer.extend(data(0, 3), [0.5, 5.0, 0.0])
    buffer.extend(data(3, 1))
    assert buffer.priority.tolist() == [0.5, 5.0, 0.0, 5.0]
    buffer.update_priority([0], [0.0])
    buffer.priority_clip = [None, 0.25]
    assert buffer.priority_clip == (None, 0.25)
    buffer.update_priority([1], [9.0])
    assert buffer.priority.tolist() == [1.0, 0.25, 0.0, 5.0]
    buffer.priority_clip = (None, None)
    assert buffer.priority_clip is None


def test_bounds_without_eps_and_an_alpha_of_0_4_are_lap(choice):
    """Fujimoto et al. 2020, equation 10: p = max(|delta|^alpha, 1)."""
    buffer = PrioritizedReplayBuffer(64, alpha=0.4, eps=0.0, priority_clip=(1.0, None))
    buffer.extend(data(0, 64))
    delta = torch.randn(64) * 3
    buffer.update_priority(torch.arange(64), delta)
    lap = delta.double().abs().pow(0.4).clamp(min=1.0)
    torch.testing.assert_close(buffer.mass.double(), lap, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("mode", "rate"), SOME_MODES)
@pytest.mark.parametrize("clip", [None, (0.5, None)])
@pytest.mark.parametrize("eps", slow_but([1e38], [0.0, 1e-6, 1e38]))
@pytest.mark.parametrize("error", slow_but([1e-45, -2.4e38], [0.0, 1e-45, -1e-40, 2.4e38, -2.4e38]))
def test_extremes_stay_finite_in_every_mode(error, eps, clip, mode, rate, device, choice):
    buffer = PrioritizedReplayBuffer(4, eps=eps, priority_clip=clip, device=device)
    given = torch.tensor([3.4e38, 1e-45, 1.0], device=device)
    buffer.extend(k(3, None, device), given)
    index = torch.arange(3, device=device)
    buffer.update_priority(index, torch.full((3,), error, device=device), mode=mode, rate=rate)
    assert buffer.priority.isfinite().all()
    assert buffer.stats()["refused_priorities"] == 0
    buffer.check_valid()


def test_a_mode_looks_at_the_squared_errors_that_a_table_may_get(choice):
    from per_td.priorities.table import PriorityTable

    table = PriorityTable(
        4,
        alpha=1.0,
        eps=0.5,
        draw="independent",
        method="auto",
        weight_normalization="batch",
        new_priority="buffer_max",
        device=torch.device("cpu"),
        priority_clip=(None, 3.0),
    )
    index = torch.arange(4)
    table.write_new(index, torch.ones(4))
    table.update(index, torch.tensor([0.0, 4.0, 9.0, 1.0]), written=4, squared=True)
    assert table.raw.tolist() == [0.5, 2.5, 3.0, 1.5]


@pytest.mark.parametrize(("mode", "rate"), SOME_MODES)
def test_an_error_that_float32_cannot_hold_with_eps_is_refused_in_every_mode(mode, rate, choice):
    buffer = make(eps=3e38)
    before = buffer.priority.clone()
    with pytest.raises(PriorityError, match="nothing was written"):
        buffer.update_priority([0, 1], [1.0, 3e38], mode=mode, rate=rate)
    assert torch.equal(buffer.priority, before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int64, torch.uint8])
def test_priorities_of_every_real_dtype_are_taken(dtype, choice):
    buffer = make()
    buffer.set_priority([1, 2], torch.tensor([1, 0]).to(dtype))
    assert buffer.priority[1:3].tolist() == [1.0, 0.0]


def test_a_shared_buffer_needs_the_generation(choice):
    buffer = shared(20, batch_size=4)
    buffer.extend(transitions(range(10)))
    with pytest.raises(PriorityError, match="generation: expected that of the batch"):
        buffer.set_priority([0], [2.0])
    buffer.set_priority([0], [2.0], [0])
    buffer.update_priority([1], [2.0], [0], mode="max", rate=0.5)
    buffer.check_valid()
    assert buffer.priority[:2].tolist() == [2.0, pytest.approx(2.0, abs=1e-5)]


def test_gradients_do_not_matter(choice):
    buffer = make()
    value = torch.tensor([1.0, 2.0], requires_grad=True) * 2
    buffer.set_priority([0, 1], value)
    buffer.update_priority([2, 3], value, mode="mean", rate=0.5)
    buffer.update_priority([2, 3], value.unsqueeze(-1), mode="max", rate=0.5)
    assert not buffer.priority.requires_grad
    buffer.check_valid()


@pytest.mark.parametrize("clip", BOUNDS, ids=str)
@pytest.mark.parametrize("groups", [None, S])
def test_bounds_are_saved_and_loaded(groups, clip, tmp_path):
    buffer = make(groups, priority_clip=clip)
    buffer.save(tmp_path / "buffer.pt")
    loaded = PrioritizedReplayBuffer.load(tmp_path / "buffer.pt")
    assert loaded.priority_clip == clip
    torch.save(buffer.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    made = make(groups)
    made.load_state_dict(state)
    assert made.priority_clip == clip
    for wrong in ({"low": 2.0, "high": 1.0}, {"low": 1.0}, "x", {"low": "x", "high": None}):
        damaged = state | {"settings": state["settings"] | {"priority_clip": wrong}}
        with pytest.raises(CheckpointError, match="priority_clip: expected"):
            made.load_state_dict(damaged)


def test_all_knobs_are_saved_and_loaded(tmp_path):
    buffer = make(uniform_mix=0.25, latest=3, track_draws=True, priority_clip=(0.5, 2.0))
    buffer.sample(8)
    buffer.save(tmp_path / "buffer.pt")
    loaded = PrioritizedReplayBuffer.load(tmp_path / "buffer.pt")
    assert loaded.state_dict()["settings"] == buffer.state_dict()["settings"]
    assert (loaded.uniform_mix, loaded.latest, loaded.track_draws) == (0.25, 3, True)
    settings = buffer.state_dict()["settings"]
    for name in ("uniform_mix", "latest"):
        wrong = settings | {"uniform_mix": 0.0, "latest": 0, "draw": "without_replacement"}
        wrong |= {name: settings[name]}
        with pytest.raises(CheckpointError, match=f"settings: {name}: expected"):
            loaded.load_state_dict(buffer.state_dict() | {"settings": wrong})

import copy
import inspect
import pickle
from multiprocessing import context

import pytest
import torch
from tensordict import TensorDict
from torchrl.collectors import Collector
from torchrl.data import (
    LazyMemmapStorage,
    LazyTensorStorage,
    ReplayBuffer,
    TensorDictReplayBuffer,
)
from torchrl.data import replay_buffers as torchrl_buffers
from torchrl.envs import Compose, GymEnv, InitTracker, StepCounter, TransformedEnv

from per_td import ConfigurationError, EmptyBufferError
from per_td.torchrl import (
    PrioritizedSampler,
    PrioritizedSliceSampler,
    TensorDictPrioritizedReplayBuffer,
)
from tests.support.oracle import assert_drawn_from
from tests.support.slice_oracle import (
    ALPHA,
    BETA,
    EPS,
    TRUNCATED,
    Stream,
    filled,
    slices_of,
    valid_starts,
)


def test_torchrl_takes_it_for_its_own():
    sampler = PrioritizedSliceSampler(4, ALPHA, BETA, slice_len=2)
    assert isinstance(sampler, torchrl_buffers.SliceSampler)
    assert isinstance(sampler, torchrl_buffers.PrioritizedSampler)
    assert isinstance(sampler, torchrl_buffers.PrioritizedSliceSampler)
    assert isinstance(sampler, PrioritizedSampler)


def test_it_has_torchrls_arguments_in_torchrls_order():
    ours = list(inspect.signature(PrioritizedSliceSampler.__init__).parameters.values())
    theirs = inspect.signature(torchrl_buffers.PrioritizedSliceSampler.__init__).parameters.values()
    assert [(p.name, p.default, p.kind) for p in ours[: len(theirs)]] == [
        (p.name, p.default, p.kind) for p in theirs
    ]
    assert all(p.kind is p.KEYWORD_ONLY for p in ours[len(theirs) :])


# ------------------------------------------------------------------ which slices, how often


@pytest.mark.parametrize("method", ["multinomial", "tree"])
@pytest.mark.parametrize("storage", [LazyTensorStorage, LazyMemmapStorage])
@pytest.mark.parametrize(
    ("capacity", "steps", "columns"), [(40, 33, 1), (37, 91, 1), (12, 9, 3), (13, 40, 3)]
)
def test_starts_are_drawn_in_proportion_to_their_masses(storage, capacity, steps, columns, method):
    streams = [Stream(steps, seed) for seed in range(columns)]
    buffer = filled(capacity, streams, steps, storage, slice_len=3, method=method)
    stored = min(steps, capacity)
    priority = torch.rand(stored * columns) * 5 + 0.1
    buffer.update_priority(torch.arange(stored * columns), priority)
    mass = torch.zeros(stored * columns, dtype=torch.float64)
    for column, stream in enumerate(streams):
        for k in valid_starts(stream, steps - stored, steps - 1, 3, 3, True):
            slot = k % capacity * columns + column
            mass[slot] = (priority[slot].double() + EPS) ** ALPHA
    first = buffer.sample(30_000)["index"].view(10_000, 3, -1)[:, 0]
    slot = first[:, 0] * columns + (first[:, 1] if columns > 1 else 0)
    assert_drawn_from(slot, mass / mass.sum())


def test_slices_of_one_record_may_begin_anywhere():
    buffer = filled(20, [Stream(33, 0)], 33, slice_len=1)
    assert set(buffer.sample(2000)["k"].tolist()) == set(range(13, 33))


def test_a_number_of_slices_may_be_given_instead_of_their_length():
    buffer = filled(30, [Stream(30, 0)], 30, num_slices=4)
    for length in (1, 2, 3):
        for ks in slices_of(buffer.sample(4 * length), length):
            assert ks == list(range(ks[0], ks[0] + length))


def test_slices_of_a_collector_follow_its_environments_steps():
    env = TransformedEnv(GymEnv("CartPole-v1"), Compose(InitTracker(), StepCounter()))
    env.set_seed(0)
    sampler = PrioritizedSliceSampler(150, ALPHA, BETA, slice_len=5)
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(150), sampler=sampler, batch_size=200)
    for data in Collector(env, None, frames_per_batch=40, total_frames=400):
        buffer.extend(data)
        batch = buffer.sample()
        steps = batch["step_count"].view(-1, 5)
        assert torch.equal(steps, steps[:, :1] + torch.arange(5))
        states, following = batch["observation"].view(-1, 5, 4), batch["next", "observation"]
        assert torch.equal(states[:, 1:], following.view(-1, 5, 4)[:, :-1])
        batch["td_error"] = torch.rand(200)
        buffer.update_tensordict_priority(batch)


def test_it_works_in_a_plain_replay_buffer_and_with_prefetch():
    stream = Stream(30, 3)
    for kind in (ReplayBuffer, TensorDictReplayBuffer):
        buffer = kind(
            storage=LazyTensorStorage(30),
            sampler=PrioritizedSliceSampler(30, ALPHA, BETA, num_slices=5),
            batch_size=15,
            prefetch=2,
        )
        buffer.extend(stream.data(0, 30))
        for _ in range(5):
            data, info = buffer.sample(return_info=True)
            assert all(ks == list(range(ks[0], ks[0] + 3)) for ks in slices_of(data, 3))
            assert info[TRUNCATED].sum() == 5


@pytest.mark.parametrize("draw", ["stratified", "without_replacement"])
def test_other_ways_to_draw_are_offered(draw):
    stream = Stream(30, 3)
    buffer = filled(30, [stream], 30, slice_len=3, draw=draw)
    starts = list(valid_starts(stream, 0, 29, 3, 3, True))
    first = buffer.sample(3 * len(starts))["k"][::3].tolist()
    assert sorted(first) == starts
    if draw == "without_replacement":
        with pytest.raises(EmptyBufferError, match=f"at least {len(starts) + 1}"):
            buffer.sample(3 * len(starts) + 3)


def test_draws_are_seeded_by_torch_alone():
    seen = []
    for seed in (3, 3, 4):
        buffer = filled(30, [Stream(30, 3)], 30, slice_len=3)
        buffer.set_rng(torch.Generator().manual_seed(seed))
        seen.append(buffer.sample(24)["k"].tolist())
    assert seen[0] == seen[1] != seen[2]


def test_alpha_and_beta_may_change():
    buffer = filled(30, [Stream(30, 3)], 30, slice_len=3)
    buffer.update_priority(torch.arange(30), torch.rand(30))
    buffer.sampler.alpha, buffer.sampler.beta = 0.0, 0.0
    assert (buffer.sample(24)["priority_weight"] == 1).all()
    starts = [float(k in valid_starts(Stream(30, 3), 0, 29, 3, 3, True)) for k in range(30)]
    assert_drawn_from(buffer.sample(30_000)["k"][::3], torch.tensor(starts) / sum(starts))


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_copies_draw_alike_and_go_their_own_way(copier):
    buffer = filled(20, [Stream(33, 1)], 33, slice_len=3, cache_values=True)
    buffer.sample(24)
    other = copier(buffer.sampler)
    for sampler in (buffer.sampler, other):
        torch.manual_seed(1)
        sampler.seen = sampler.sample(buffer.storage, 30)[0][0]
    assert torch.equal(buffer.sampler.seen, other.seen)
    other.update_priority(3, 50.0)
    assert buffer.sampler.priority[3] == 1


def test_it_may_be_sent_to_a_spawned_process():
    sampler = PrioritizedSliceSampler(4, ALPHA, BETA, slice_len=2)
    context.set_spawning_popen(object())
    try:
        assert "_table" in sampler.__getstate__()
    finally:
        context.set_spawning_popen(None)


def test_a_state_moves_to_another_sampler(tmp_path):
    buffer = filled(20, [Stream(33, 1)], 33, slice_len=3)
    buffer.update_priority(torch.arange(20), torch.rand(20))
    buffer.sampler.dumps(tmp_path)
    for way in ("state_dict", "dumps"):
        other = PrioritizedSliceSampler(20, 0.1, 0.1, slice_len=3)
        if way == "dumps":
            other.loads(tmp_path)
        else:
            other.load_state_dict(buffer.sampler.state_dict())
        assert torch.equal(other.priority, buffer.sampler.priority)
        assert other.alpha == ALPHA


def test_emptying_forgets_records_and_priorities():
    buffer = filled(20, [Stream(33, 1)], 33, slice_len=3, cache_values=True)
    buffer.sample(24)
    buffer.empty()
    assert not buffer.sampler.can_sample(buffer.storage, 3)
    with pytest.raises(EmptyBufferError, match="Cannot sample from an empty storage"):
        buffer.sample(24)
    buffer.extend(Stream(33, 5, longest=1).data(0, 4))
    with pytest.raises(EmptyBufferError, match="at least 3 records, got at most 1"):
        buffer.sample(24)


def test_a_draw_that_fails_changes_nothing():
    buffer = filled(20, [Stream(20, 1)], 20, slice_len=3, span=(0, 3))
    before = buffer.sampler.priority
    with pytest.raises(ConfigurationError, match="span: expected less than the 3 records"):
        buffer.sample(24)
    buffer.sampler.span = (0, 0)
    with pytest.raises(RuntimeError, match="divisible"):
        buffer.sample(7)
    assert torch.equal(buffer.sampler.priority, before)
    buffer.sample(24)


def test_a_span_may_be_a_list():
    for span in ([False, True], (False, True)):
        sampler = PrioritizedSliceSampler(6, ALPHA, BETA, slice_len=2, span=span)
        assert sampler.span == (0, True)
    sampler.span = [0, 1]
    assert sampler.span == (0, 1)


@pytest.mark.parametrize("span", ["x", [1, 2, 3], [], (0, "x"), (0, -1), -2, None, 0.5])
def test_what_is_no_span_is_refused_also_later(span):
    message = "span: expected booleans or counts of records"
    with pytest.raises(ConfigurationError, match=message):
        PrioritizedSliceSampler(6, ALPHA, BETA, slice_len=2, span=span)
    sampler = PrioritizedSliceSampler(6, ALPHA, BETA, slice_len=2)
    with pytest.raises(ConfigurationError, match=message):
        sampler.span = span
    assert sampler.span == (0, False)


@pytest.mark.parametrize("name", ["end_key", "end_keys", "traj_key", "ends", "compile", "draw"])
def test_what_is_chosen_in_the_constructor_is_not_changed_later(name):
    sampler = PrioritizedSliceSampler(6, ALPHA, BETA, slice_len=2)
    with pytest.raises(ConfigurationError, match=f"{name}: expected to be chosen in the constru"):
        setattr(sampler, name, "x")


def test_the_length_or_the_number_of_slices_may_be_set_whichever_was_given():
    buffer = filled(30, [Stream(30, 0)], 30, slice_len=2)
    buffer.sampler.slice_len = 3
    for ks in slices_of(buffer.sample(12), 3):
        assert ks == list(range(ks[0], ks[0] + 3))
    with pytest.raises(ConfigurationError, match="num_slices: expected slice_len to be set"):
        buffer.sampler.num_slices = 4
    for wrong in (0, None, "x"):
        with pytest.raises(ConfigurationError, match="slice_len: expected an integer"):
            buffer.sampler.slice_len = wrong
    assert buffer.sampler.slice_len == 3


def test_spanning_to_the_left_is_turned_off_with_a_warning():
    with pytest.warns(UserWarning, match="span: slices never span to the left"):
        sampler = PrioritizedSliceSampler(6, ALPHA, BETA, slice_len=2, span=True)
    assert sampler.span == (0, True)


def test_arguments_without_effect_are_accepted():
    sampler = PrioritizedSliceSampler(
        6, ALPHA, BETA, 1e-8, torch.double, "mean", slice_len=2, compile=True
    )
    assert sampler.compile
    assert pickle.loads(pickle.dumps(sampler)).reduction == "mean"
    assert "slice_len=2" in repr(sampler)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, TypeError, "Either num_slices or slice_len"),
        ({"slice_len": 2, "num_slices": 2}, TypeError, "Either num_slices or slice_len"),
        ({"slice_len": 0}, ConfigurationError, "slice_len: expected an integer of at least 1"),
        ({"num_slices": -1}, ConfigurationError, "num_slices: expected an integer of at least 1"),
        ({"slice_len": 2, "span": (0, -1)}, ConfigurationError, "span: expected booleans or"),
        ({"slice_len": 2, "end_key": "a", "end_keys": ["b"]}, RuntimeError, "exclusive"),
        ({"slice_len": 2, "ends": torch.ones(4)}, RuntimeError, "cache_values"),
        ({"slice_len": 2, "trajectories": torch.ones(4)}, RuntimeError, "cache_values"),
        (
            {"slice_len": 2, "ends": torch.ones(4), "end_key": "a", "cache_values": True},
            RuntimeError,
            "exclusive",
        ),
        ({"slice_len": 2, "draw": "sorted"}, ConfigurationError, "draw: expected one of"),
        ({"slice_len": 2, "alpha": -1.0}, ConfigurationError, "alpha"),
    ],
)
def test_wrong_arguments_are_refused_by_name(arguments, error, message):
    with pytest.raises(error, match=message):
        PrioritizedSliceSampler(**{"max_capacity": 4, "alpha": ALPHA, "beta": BETA, **arguments})


def test_the_drop_in_buffer_gives_each_slice_one_priority_as_in_r2d2():
    sampler = PrioritizedSliceSampler(12, 1.0, 0.5, eps=0.0, slice_len=3, reduction="r2d2")
    buffer = TensorDictPrioritizedReplayBuffer(
        alpha=1.0, beta=0.5, storage=LazyTensorStorage(12), sampler=sampler, batch_size=6
    )
    done = torch.tensor([0, 0, 0, 1] * 3, dtype=torch.bool).unsqueeze(-1)
    data = TensorDict({"x": torch.arange(12), "next": {"done": done}}, [12])
    buffer.extend(data)
    batch = buffer.sample()
    batch["td_error"] = torch.tensor([1.0, -4.0, 1.0, 0.5, 0.5, 0.5])
    first, second = batch["x"][[0, 3]].tolist()
    late = batch.clone()
    buffer.update_tensordict_priority(batch)
    expected = torch.ones(12)
    expected[first], expected[second] = 0.9 * 4 + 0.1 * 2, 0.5
    if first == second:
        expected[first] = 0.5
    torch.testing.assert_close(sampler.priority, expected)
    buffer.extend(data)
    before = sampler.priority
    buffer.update_tensordict_priority(late)
    assert torch.equal(sampler.priority, before)
    assert buffer.stats()["stale_updates"] == 2

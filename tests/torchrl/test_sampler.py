import copy
import inspect
import pickle

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import (
    LazyMemmapStorage,
    LazyTensorStorage,
    ListStorage,
    ReplayBuffer,
    TensorDictMaxValueWriter,
    TensorDictReplayBuffer,
)
from torchrl.data import PrioritizedSampler as TorchRLSampler
from torchrl.data.replay_buffers.scheduler import LinearScheduler

from per_td import (
    CheckpointError,
    ConfigurationError,
    EmptyBufferError,
    IndexRangeError,
    PriorityError,
    kernels,
    validation,
)
from per_td.kernels import reference
from per_td.torchrl import PrioritizedSampler, PrioritizedSliceSampler
from per_td.torchrl.sampler import flat_index, unravelled
from tests.support.oracle import assert_drawn_from
from tests.support.processes import handed_over

ALPHA, BETA, EPS = 0.7, 0.9, 1e-8


def data(n, start=0):
    k = torch.arange(start, start + n)
    return TensorDict({"x": k, "obs": k.float().unsqueeze(-1).expand(n, 3).clone()}, [n])


def trained(storage, n=20, prefetch=None, **settings):
    """A buffer after a few updates, and the priorities that it should have."""
    sampler = PrioritizedSampler(n, ALPHA, BETA, **settings)
    buffer = TensorDictReplayBuffer(
        storage=storage, sampler=sampler, batch_size=64, prefetch=prefetch
    )
    buffer.extend(data(n))
    expected = torch.ones(n)
    for _ in range(3):
        batch = buffer.sample()
        batch["td_error"] = batch["x"].float() / 5 + 0.1
        buffer.update_tensordict_priority(batch)
        expected[batch["index"]] = batch["td_error"]
    return buffer, expected


def drawn(buffer, batches=60):
    return torch.cat([buffer.sample()["x"] for _ in range(batches)])


@pytest.mark.parametrize("prefetch", [None, 3])
@pytest.mark.parametrize("storage", [LazyTensorStorage, LazyMemmapStorage, ListStorage])
def test_draws_follow_priority_to_the_alpha_in_torchrls_buffer(storage, prefetch):
    buffer, expected = trained(storage(20), prefetch=prefetch)
    for _ in range(prefetch or 0):
        buffer.sample()  # batches drawn before the last update
    mass = expected.double() ** ALPHA
    assert_drawn_from(drawn(buffer), mass / mass.sum())


def test_draws_follow_priority_to_the_alpha_in_a_storage_of_two_dimensions():
    sampler = PrioritizedSampler(24, ALPHA, BETA)
    buffer = TensorDictReplayBuffer(
        storage=LazyTensorStorage(24, ndim=2), sampler=sampler, batch_size=64
    )
    x = torch.arange(24).reshape(4, 6)
    buffer.extend(TensorDict({"x": x}, [4, 6]))
    batch = buffer.sample()
    batch["td_error"] = batch["x"].float() / 5 + 0.1
    buffer.update_tensordict_priority(batch)
    expected = torch.ones(24)
    expected[batch["x"]] = batch["td_error"]
    mass = expected.double() ** ALPHA
    assert_drawn_from(drawn(buffer), mass / mass.sum())


def test_a_storage_that_grows_on_its_first_data_is_followed():
    """TorchRL rounds the size of storages of several dimensions up to whole rows."""
    sampler = PrioritizedSampler(10, ALPHA, BETA)
    buffer = TensorDictReplayBuffer(
        storage=LazyTensorStorage(10, ndim=2), sampler=sampler, batch_size=500
    )
    buffer.extend(TensorDict({"x": torch.arange(12).reshape(4, 3)}, [4, 3]))
    assert buffer.storage.max_size == 12
    assert set(buffer.sample()["x"].tolist()) == set(range(12))


@pytest.mark.parametrize("normalization", ["buffer", "batch", "none"])
def test_weights_follow_the_formula(normalization):
    buffer, expected = trained(LazyTensorStorage(20), weight_normalization=normalization)
    batch = buffer.sample()
    mass = (expected.double() + EPS) ** ALPHA
    weight = (20 * mass / mass.sum()) ** -BETA
    index = batch["index"]
    largest = {"buffer": weight.max(), "batch": weight[index].max(), "none": 1.0}[normalization]
    torch.testing.assert_close(
        batch["priority_weight"].double(), weight[index] / largest, rtol=1e-5, atol=0
    )


def test_torchrl_takes_it_for_its_own():
    assert isinstance(PrioritizedSampler(4, ALPHA, BETA), TorchRLSampler)


def test_it_works_in_a_plain_replay_buffer():
    buffer = ReplayBuffer(
        storage=LazyTensorStorage(8), sampler=PrioritizedSampler(8, 1.0, 1.0), batch_size=100
    )
    buffer.extend(torch.arange(8))
    buffer.update_priority(torch.arange(8), torch.tensor([0.0, 0, 0, 0, 0, 0, 0, 5]))
    sample, info = buffer.sample(return_info=True)
    assert (sample == 7).all()
    assert info["priority_weight"].shape == (100,)
    buffer.update_priority(3, 7.0)
    assert buffer.sampler.priority[3] == 7


def test_every_kind_of_index_is_understood():
    sampler = PrioritizedSampler(6, ALPHA, BETA)
    storage = LazyTensorStorage(6, ndim=2)
    storage.set(torch.arange(2), TensorDict({"x": torch.zeros(2, 3)}, [2, 3]))
    sampler.update_priority(1, 2.0)
    sampler.update_priority(torch.tensor([4, 5]), torch.tensor([[3.0], [4.0]]))
    sampler.update_priority(torch.tensor([[0, 0], [1, 0]]), [5.0, 6.0], storage=storage)
    sampler.update_priority((torch.tensor([0]), torch.tensor([2])), 7.0, storage=storage)
    assert sampler.priority.tolist() == [5, 2, 7, 6, 3, 4]


def test_indices_of_minus_one_are_skipped():
    sampler = PrioritizedSampler(4, ALPHA, BETA)
    sampler.mark_update(torch.tensor([-1, 1, -1]))
    assert sampler.priority.tolist() == [0, 1, 0, 0]
    assert sampler.total_mass == 1
    sampler.update_priority(torch.tensor([-1, 2, -1]), torch.tensor([9.0, 2.0, 9.0]))
    sampler.update_priority(-1, 9.0)
    assert sampler.priority.tolist() == [0, 1, 2, 0]


def test_it_works_with_a_max_value_writer():
    sampler = PrioritizedSampler(4, ALPHA, BETA)
    buffer = TensorDictReplayBuffer(
        storage=LazyTensorStorage(4),
        sampler=sampler,
        writer=TensorDictMaxValueWriter(rank_key="rank"),
        batch_size=200,
    )
    rank = torch.tensor([5.0, 1, 4, 0, 3, 6])
    buffer.extend(TensorDict({"rank": rank, "x": torch.arange(6)}, [6]))
    buffer.add(TensorDict({"rank": torch.tensor(-1.0), "x": torch.tensor(9)}, []))
    assert (sampler.priority > 0).all()
    assert set(buffer.sample()["rank"].tolist()) == {3, 4, 5, 6}


@pytest.mark.parametrize("supplied", [False, True])
@pytest.mark.parametrize("way", ["torch", "launched"])
def test_what_was_not_written_is_left_alone_without_looking(way, supplied, monkeypatch):
    """On CUDA, where to look for -1 would stop the host, as on the CPU."""
    index = torch.tensor([0, -1, 5, 3])

    def marked(refused):
        priority = torch.tensor([2.0, 9.0, 3.0, refused]) if supplied else None
        sampler = PrioritizedSampler(6, ALPHA, BETA, weight_normalization="buffer")
        sampler.update_priority(torch.arange(6), torch.tensor([1.0, 5, 2, 4, 3, 6]))
        sampler._table.replayed[:] = True
        sampler._write_new(index, priority)
        sampler._write_new(torch.tensor([-1, -1]), None if priority is None else priority[:2])
        return sampler._table

    expected = marked(refused=6.0)  # the largest
    operations = reference
    if way == "launched":
        pytest.importorskip("triton", reason="triton is not installed")
        if torch.cuda.is_available():
            pytest.skip("Triton's interpreter was not asked for")
        from per_td.kernels.cuda import launches as operations
    monkeypatch.setattr(kernels, "operations", lambda device, launches=True: operations)
    monkeypatch.setattr(validation, "can_raise", lambda tensor: False)
    table = marked(refused=-1.0)
    assert torch.equal(table.raw, expected.raw)
    assert table.raw.tolist()[1:3] == pytest.approx([5, 2])
    torch.testing.assert_close(table.mass, expected.mass, rtol=1e-6, atol=0)
    torch.testing.assert_close(table.total, table.mass.double().sum())
    table.check_valid()
    assert table.replayed.tolist() == expected.replayed.tolist()
    assert table.replayed.tolist() == [False, True, True, False, True, False]
    assert table.refused == int(supplied)
    assert torch.equal(table.ever_max, expected.ever_max)
    assert table.smallest == table.mass.min()


def test_indices_of_several_dimensions_are_those_of_torch():
    shape, flat = (4, 3, 5), torch.randperm(60)
    places = unravelled(flat, shape)
    for place, other in zip(places, torch.unravel_index(flat, shape), strict=True):
        assert torch.equal(place, other)
    index = torch.stack(places, -1)
    device = torch.device("cpu")
    for given in (index, places, index.int(), index.numpy(), index.view(4, 15, 3)):
        assert torch.equal(flat_index(given, shape, device), flat)
    index[7, 1] = -1
    assert flat_index(index, shape, device)[7] == -1
    assert torch.equal(flat_index(torch.tensor([2, 7]), shape, device), torch.tensor([2, 7]))
    with pytest.raises(IndexRangeError, match="integer"):
        flat_index(index.float(), shape, device)


@pytest.mark.parametrize(("within", "expected"), [(True, 0.5), (False, 8.0)])
def test_new_elements_get_the_largest_priority(within, expected):
    sampler = PrioritizedSampler(4, ALPHA, BETA, max_priority_within_buffer=within)
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(4), sampler=sampler)
    buffer.extend(data(3))
    buffer.update_priority(torch.arange(3), torch.tensor([8.0, 0.25, 0.5]))
    buffer.update_priority(0, 0.125)
    buffer.extend(data(1, 3))
    assert sampler.priority[3].item() == pytest.approx(expected)


def test_alpha_is_applied_once_to_what_new_elements_get():
    sampler = PrioritizedSampler(2, 0.5, 1.0, eps=0.0)
    sampler.update_priority(0, 16.0)
    sampler.mark_update(1)
    assert sampler.priority.tolist() == [16, 16]
    assert sampler.mass.tolist() == [4, 4]


def test_the_priority_of_new_elements_does_not_grow_by_being_handed_back():
    sampler = PrioritizedSampler(4, ALPHA, BETA, eps=0.5)
    sampler.update_priority(0, 3.0)
    for index in (1, 2, 3):
        sampler.update_priority(index, sampler.default_priority)
    assert sampler.priority.tolist() == [3.5, 3.5, 3.5, 3.5]


def test_the_priority_of_new_elements_is_handed_back_in_the_unit_of_td_errors():
    """TorchRL's buffer does that when a single element comes without a TD error."""
    sampler = PrioritizedSampler(4, ALPHA, BETA, eps=0.0, td_error_unit="squared")
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(4), sampler=sampler)
    buffer.extend(data(1))
    buffer.update_priority(0, 81.0)
    buffer.add(data(1, 1)[0])
    assert sampler.priority.tolist() == [9, 9, 0, 0]
    assert sampler.default_priority == 81
    buffer.update_priority(0, 3.4e38)
    assert sampler.default_priority == pytest.approx(3.4e38)


def test_td_errors_that_were_squared_can_be_declared_so():
    sampler = PrioritizedSampler(2, ALPHA, BETA, eps=0.0, td_error_unit="squared")
    sampler.update_priority(torch.tensor([0, 1]), torch.tensor([9.0, 4.0]))
    assert sampler.priority.tolist() == [3, 2]


def test_alpha_may_leave_zero_and_schedulers_may_drive_it():
    buffer, expected = trained(LazyTensorStorage(20))
    sampler = buffer.sampler
    alpha = LinearScheduler(sampler, "alpha", final_value=0.0, num_steps=5)
    beta = LinearScheduler(buffer, "beta", final_value=1.0, num_steps=5)
    for _ in range(5):
        alpha.step()
        beta.step()
    assert (sampler.alpha, sampler.beta) == (0.0, 1.0)
    assert sampler.mass.tolist() == [1.0] * 20
    sampler.alpha = 0.3
    mass = expected.double() ** 0.3
    assert_drawn_from(drawn(buffer), mass / mass.sum())


def test_draws_are_seeded_by_torch_alone():
    seen = []
    for use_generator in (False, False, True, True):
        torch.manual_seed(1)
        buffer = ReplayBuffer(
            storage=LazyTensorStorage(50),
            sampler=PrioritizedSampler(50, ALPHA, BETA),
            batch_size=20,
            generator=torch.Generator().manual_seed(3) if use_generator else None,
        )
        buffer.extend(torch.arange(50))
        seen.append(buffer.sample().tolist())
    assert seen[0] == seen[1]
    assert seen[2] == seen[3]
    assert seen[0] != seen[2]


def test_draws_without_replacement_and_stratified_are_offered():
    storage = LazyTensorStorage(30)
    storage.set(torch.arange(30), data(30))
    sampler = PrioritizedSampler(30, ALPHA, BETA, draw="without_replacement")
    sampler.mark_update(torch.arange(30))
    assert len(set(sampler.sample(storage, 30)[0].tolist())) == 30
    sampler = PrioritizedSampler(30, ALPHA, BETA, draw="stratified")
    sampler.mark_update(torch.arange(30))
    assert sampler.sample(storage, 30)[0].tolist() == list(range(30))


def test_a_state_moves_to_another_buffer(tmp_path):
    buffer, _ = trained(LazyTensorStorage(20))
    state = buffer.sampler.state_dict()
    for key, value in state.items():
        assert isinstance(value, (str, int, float, torch.Tensor, type(None))), key
    buffer.dumps(tmp_path / "saved")
    for way in ("state_dict", "dumps"):
        other = TensorDictReplayBuffer(
            storage=LazyTensorStorage(20), sampler=PrioritizedSampler(20, 0.1, 0.1), batch_size=64
        )
        if way == "dumps":
            other.loads(tmp_path / "saved")
        else:
            other.load_state_dict(buffer.state_dict())
        assert torch.equal(other.sampler.priority, buffer.sampler.priority)
        assert (other.sampler.alpha, other.sampler.beta) == (ALPHA, BETA)
        torch.manual_seed(0)
        expected = buffer.sample()["index"]
        torch.manual_seed(0)
        assert torch.equal(other.sample()["index"], expected)


def test_a_state_brings_its_mixture_and_its_bounds_of_priorities(tmp_path):
    settings = {"priority_clip": (0.5, None), "uniform_mix": 0.5}
    buffer, other, kept = (
        TensorDictReplayBuffer(
            storage=LazyTensorStorage(20),
            sampler=PrioritizedSampler(20, ALPHA, BETA, **own),
            batch_size=64,
        )
        for own in (settings, {}, settings)
    )
    buffer.extend(data(20))
    buffer.update_priority(torch.arange(20), torch.arange(20) / 10)
    buffer.dumps(tmp_path / "saved")
    for way in ("state_dict", "dumps"):
        other.sampler.priority_clip, other.sampler.uniform_mix = None, 0.0
        if way == "dumps":
            other.loads(tmp_path / "saved")
        else:
            other.load_state_dict(buffer.state_dict())
        assert (other.sampler.priority_clip, other.sampler.uniform_mix) == ((0.5, None), 0.5)
        drawn = []
        for each in (buffer, other):
            torch.manual_seed(0)
            batch = each.sample()
            drawn.append((batch["index"].tolist(), batch["priority_weight"].tolist()))
        assert drawn[0] == drawn[1]
    state = buffer.sampler.state_dict()
    del state["priority_clip"], state["uniform_mix"]  # as those of before
    kept.sampler.load_state_dict(state)
    assert (kept.sampler.priority_clip, kept.sampler.uniform_mix) == ((0.5, None), 0.5)


def test_states_that_do_not_fit_are_refused_and_change_nothing():
    sampler = PrioritizedSampler(4, ALPHA, BETA)
    with pytest.raises(CheckpointError, match="max_capacity 4, got 5"):
        sampler.load_state_dict(PrioritizedSampler(5, 0.1, 0.1).state_dict())
    with pytest.raises(CheckpointError, match="expected the state of"):
        sampler.load_state_dict({"_sum_tree": None})
    other = PrioritizedSampler(4, 0.1, 0.1)
    for name, value in (("uniform_mix", 2.0), ("priority_clip", {"low": 3.0, "high": 1.0})):
        with pytest.raises(CheckpointError, match=f"{name}: expected"):
            sampler.load_state_dict(other.state_dict() | {name: value})
    distinct = PrioritizedSampler(4, ALPHA, BETA, draw="without_replacement")
    for each in (distinct, PrioritizedSliceSampler(4, ALPHA, BETA, slice_len=2)):
        with pytest.raises(CheckpointError, match="uniform_mix: expected"):
            each.load_state_dict(other.state_dict() | {"uniform_mix": 0.5})
        assert (each.alpha, each.uniform_mix) == (ALPHA, 0.0)
    assert sampler.alpha == ALPHA


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_copies_go_their_own_way(copier):
    sampler = PrioritizedSampler(40, ALPHA, BETA, weight_normalization="buffer")
    sampler.update_priority(torch.arange(40), torch.rand(40))
    other = copier(sampler)
    other.update_priority(3, 50.0)
    assert sampler.priority[3] < 1
    assert other.total_mass > sampler.total_mass
    assert other.default_priority == pytest.approx(50.0)


def test_emptying_forgets_all_priorities():
    buffer, _ = trained(LazyTensorStorage(20))
    buffer.empty()
    assert buffer.sampler.priority.sum() == 0
    assert buffer.sampler.default_priority == pytest.approx(1.0)
    with pytest.raises(EmptyBufferError, match="Cannot sample from an empty storage"):
        buffer.sample()
    buffer.extend(data(3))
    assert set(buffer.sample()["x"].tolist()) == {0, 1, 2}


@pytest.mark.parametrize(
    ("index", "priority", "error", "message"),
    [
        ([0, 1], [1.0, float("nan")], PriorityError, "got nan at position 1"),
        ([0, 1], [1.0, float("inf")], PriorityError, "got inf at position 1"),
        ([0, 1], [1.0, 2.0, 3.0], PriorityError, r"one for each of 2 indices, got shape \[3\]"),
        ([0, 9], [1.0, 2.0], IndexRangeError, "got 9 at position 1"),
    ],
)
def test_wrong_updates_are_refused_by_name(index, priority, error, message):
    sampler = PrioritizedSampler(4, ALPHA, BETA)
    sampler.mark_update(torch.arange(4))
    with pytest.raises(error, match=message):
        sampler.update_priority(torch.tensor(index), torch.tensor(priority))
    assert sampler.priority.tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        *[(name, wrong) for name in ("alpha", "beta", "eps") for wrong in (-1.0, "x", torch.nan)],
        ("reduction", "garbage"),
        ("td_error_unit", "x"),
        ("weight_normalization", "garbage"),
    ],
)
def test_settings_are_looked_at_in_the_constructor_and_later(name, wrong):
    with pytest.raises(ConfigurationError, match=f"{name}: expected"):
        PrioritizedSampler(**{"max_capacity": 4, "alpha": ALPHA, "beta": BETA, name: wrong})
    sampler = PrioritizedSampler(4, ALPHA, BETA)
    before = getattr(sampler, name)
    with pytest.raises(ConfigurationError, match=f"{name}: expected"):
        setattr(sampler, name, wrong)
    assert getattr(sampler, name) == before


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_capacity", 8),
        ("dtype", torch.double),
        ("max_priority_within_buffer", True),
        ("device", "cpu"),
        ("draw", "stratified"),
        ("method", "tree"),
    ],
)
def test_what_is_chosen_in_the_constructor_is_refused_later(name, value):
    sampler = PrioritizedSampler(4, ALPHA, BETA)
    with pytest.raises(ConfigurationError, match=f"{name}: expected to be chosen in the constr"):
        setattr(sampler, name, value)


def test_eps_reduction_and_unit_that_are_set_take_effect():
    sampler = PrioritizedSampler(2, ALPHA, BETA)
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(2), sampler=sampler)
    buffer.extend(data(2))
    sampler.eps, sampler.reduction, sampler.td_error_unit = 0.5, "min", "squared"
    td_error = torch.tensor([[16.0, 9.0], [4.0, 25.0]])
    batch = TensorDict({"index": torch.arange(2), "td_error": td_error}, [2])
    buffer.update_tensordict_priority(batch)
    assert sampler.priority.tolist() == [3.5, 2.5]


def test_a_normalization_that_is_set_takes_effect():
    buffer, expected = trained(LazyTensorStorage(20), weight_normalization="none")
    mass = (expected.double() + EPS) ** ALPHA
    weight = (20 * mass / mass.sum()) ** -BETA
    for normalization in ("buffer", "batch", "none", "buffer"):
        buffer.sampler.weight_normalization = normalization
        batch = buffer.sample()
        index = batch["index"]
        largest = {"buffer": weight.max(), "batch": weight[index].max(), "none": 1.0}
        torch.testing.assert_close(
            batch["priority_weight"].double(),
            weight[index] / largest[normalization],
            rtol=1e-5,
            atol=0,
        )


def test_a_normalization_that_others_would_not_follow_is_refused():
    sampler = PrioritizedSampler(4, ALPHA, BETA, weight_normalization="batch")
    handed_over(sampler)
    with pytest.raises(ConfigurationError, match="weight_normalization: expected 'buffer' to be"):
        sampler.weight_normalization = "buffer"
    sampler.weight_normalization = "none"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"alpha": -0.1}, ValueError, "alpha"),
        ({"beta": -0.1}, ValueError, "beta"),
        ({"dtype": torch.int}, NotImplementedError, "dtype"),
        ({"td_error_unit": "cubed"}, ValueError, "td_error_unit: expected one of abs, squared"),
    ],
)
def test_wrong_arguments_are_refused_by_name(arguments, error, message):
    with pytest.raises(error, match=message):
        PrioritizedSampler(**{"max_capacity": 4, "alpha": ALPHA, "beta": BETA, **arguments})


def test_it_has_torchrls_arguments_in_torchrls_order():
    ours = list(inspect.signature(PrioritizedSampler.__init__).parameters.values())
    theirs = list(inspect.signature(TorchRLSampler.__init__).parameters.values())
    assert [(p.name, p.default) for p in ours[: len(theirs)]] == [
        (p.name, p.default) for p in theirs
    ]
    assert all(p.kind is p.KEYWORD_ONLY for p in ours[len(theirs) :])

"""What is no index, no priority, no batch size and no key is refused, the same on every path."""

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, ReplayBuffer, TensorDictReplayBuffer

from per_td import ConfigurationError, IndexRangeError, PerTdError, PriorityError
from per_td.torchrl import (
    PrioritizedSampler,
    PrioritizedSliceSampler,
    TensorDictPrioritizedReplayBuffer,
)

PATHS = ["short", "long", "sampler", "slices"]
TWO_DIMENSIONS = ["long", "sampler", "slices"]


def data(shape, start=0):
    k = torch.arange(start, start + shape[0])
    done = (k % 4 == 3).view(-1, *[1] * len(shape)).expand(*shape, 1).clone()
    k = k.view(-1, *[1] * (len(shape) - 1)).expand(shape).clone()
    return TensorDict({"x": k, "next": {"done": done}}, shape)


def filled(path, ndim=1, **settings):
    """A buffer of eight rows, of three columns if there are two dimensions, and its sampler."""
    shape = (8,) if ndim == 1 else (8, 3)
    capacity = 8 if ndim == 1 else 24
    storage = LazyTensorStorage(capacity, ndim=ndim)
    kind = PrioritizedSliceSampler if path == "slices" else PrioritizedSampler
    of_slices = {"slice_len": 2} if path == "slices" else {}
    sampler = kind(capacity, alpha=1.0, beta=1.0, eps=0.0, **of_slices)
    settings = {"batch_size": 4, **settings}
    if path in ("short", "long"):
        buffer = TensorDictPrioritizedReplayBuffer(
            alpha=1.0,
            beta=1.0,
            sampler=sampler,
            storage=storage,
            collate_fn=(lambda batch: batch) if path == "long" else None,
            **settings,
        )
    else:
        buffer = TensorDictReplayBuffer(sampler=sampler, storage=storage, **settings)
    buffer.extend(data(shape) if ndim == 1 else data(shape).transpose(0, 1).contiguous())
    return buffer, sampler


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("size", [0, -1, 2.5, "a", True, float("nan"), [4], torch.tensor(0)])
def test_a_batch_size_is_an_integer_of_at_least_1(choice, path, size):
    buffer, sampler = filled(path)
    with pytest.raises(ConfigurationError, match="batch_size: expected an integer of at least 1"):
        sampler.sample(buffer.storage, size)
    if path in ("short", "long"):
        with pytest.raises(ConfigurationError, match="batch_size: expected an integer of at least"):
            buffer.sample(size)
        with pytest.raises(ConfigurationError, match="batch_size: expected an integer of at least"):
            filled(path, batch_size=size)
        ahead, _ = filled(path, prefetch=2)
        with pytest.raises(ConfigurationError, match="batch_size: expected an integer of at least"):
            ahead.sample(size)
    assert len(buffer.sample()) == 4


@pytest.mark.parametrize("path", PATHS)
def test_a_batch_size_of_0_is_refused_by_any_buffer(choice, path):
    buffer, _ = filled(path, batch_size=None)
    with pytest.raises(ConfigurationError, match="batch_size: expected an integer of at least 1"):
        buffer.sample(0)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "index", [0, [0], (0,), torch.tensor(0), torch.tensor([0]), (torch.tensor([0]),)]
)
def test_one_slot_may_be_written_in_many_ways(choice, path, index):
    buffer, sampler = filled(path)
    sampler.update_priority(index, 5.0, storage=buffer.storage)
    assert sampler.priority.tolist() == [5.0, *[1.0] * 7]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "index", [(0, 1, 2), [0, 1, 2], (torch.tensor(0), 1, 2), torch.arange(3).short(), range(3)]
)
def test_several_slots_may_be_written_in_many_ways(choice, path, index):
    buffer, sampler = filled(path)
    if path in ("short", "long"):
        buffer.update_priority(index, torch.tensor([2.0, 3.0, 4.0]))
    else:
        sampler.update_priority(index, torch.tensor([2.0, 3.0, 4.0]), storage=buffer.storage)
    assert sampler.priority[:4].tolist() == [2.0, 3.0, 4.0, 1.0]


@pytest.mark.parametrize("path", TWO_DIMENSIONS)
@pytest.mark.parametrize(
    "index",
    [
        (1, 2),
        (torch.tensor(1), torch.tensor(2)),
        ([1], [2]),
        (torch.tensor([1]), torch.tensor([2])),
        torch.tensor([[1, 2]]),
        [[1, 2]],
        5,
    ],
)
def test_one_slot_of_two_dimensions_may_be_written_in_many_ways(choice, path, index):
    buffer, sampler = filled(path, ndim=2)
    assert buffer.storage.shape == (8, 3)
    sampler.update_priority(index, 5.0, storage=buffer.storage)
    assert (sampler.priority == 5).nonzero().tolist() == [[5]]


WRONG = [
    "a",
    None,
    object(),
    (0, "a"),
    (0, None),
    {"a": 0},
    [0.5],
    [True],
    (torch.arange(2), torch.arange(3)),
    (torch.arange(2), torch.arange(2), torch.arange(2)),
    torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)], layout=torch.jagged),
    torch.zeros(2, dtype=torch.int64, device="meta"),
    torch.sparse_coo_tensor([[0]], [1], (3,), check_invariants=True),
]


@pytest.mark.parametrize("ndim", [1, 2])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("index", WRONG, ids=lambda index: type(index).__name__)
def test_what_is_no_index_is_refused_by_name(choice, path, ndim, index):
    buffer, sampler = filled(path, ndim)
    before = sampler.priority
    ways = [lambda: sampler.update_priority(index, 1.5, storage=buffer.storage)]
    ways.append(lambda: sampler.mark_update(index, storage=buffer.storage))
    if path in ("short", "long"):
        ways.append(lambda: buffer.update_priority(index, 1.5))
    for way in ways:
        with pytest.raises(IndexRangeError, match="index: expected"):
            way()
    assert torch.equal(sampler.priority, before)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "priority",
    [
        None,
        "a",
        object(),
        [None],
        [1.0, 2.0],
        [],
        [True],
        [1j],
        float("nan"),
        torch.zeros(1, device="meta"),
        torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)], layout=torch.jagged),
    ],
    ids=lambda priority: type(priority).__name__,
)
def test_what_is_no_priority_is_refused_by_name(choice, path, priority):
    buffer, sampler = filled(path)
    before = sampler.priority
    ways = [lambda: sampler.update_priority([0], priority, storage=buffer.storage)]
    if path in ("short", "long"):
        ways.append(lambda: buffer.update_priority([0], priority))
    for way in ways:
        with pytest.raises(PriorityError, match=r"(priority|td_error): expected"):
            way()
    assert torch.equal(sampler.priority, before)


@pytest.mark.parametrize("collate", [None, lambda batch: batch])
@pytest.mark.parametrize(
    "key", ["delta", ("delta",), (("delta",),), ("agent", "delta"), ("agent", ("delta",))]
)
@pytest.mark.parametrize("late", [False, True])
def test_a_priority_key_means_the_same_however_it_is_nested(choice, collate, key, late):
    buffer = TensorDictPrioritizedReplayBuffer(
        alpha=1.0,
        beta=1.0,
        eps=0.0,
        storage=LazyTensorStorage(8),
        batch_size=4,
        priority_key="td_error" if late else key,
        collate_fn=collate,
    )
    if late:
        buffer.priority_key = key
    for first in (1.0, 3.0, 5.0):
        new = TensorDict({"x": torch.rand(2), "agent": TensorDict({}, [2])}, [2])
        new[key] = torch.tensor([first, first + 1])
        buffer.extend(new)
    assert buffer.sampler.priority.tolist() == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 0.0, 0.0]
    batch = buffer.sample()
    batch[key] = torch.full((4,), 7.0)
    buffer.update_tensordict_priority(batch)
    assert (buffer.sampler.priority[batch["index"]] == 7).all()


@pytest.mark.parametrize("key", [None, 5, (), ("a", 5), ["a"], ((),)])
def test_what_is_no_key_is_refused_by_name(key):
    buffer, _ = filled("short")
    with pytest.raises(ConfigurationError, match="priority_key: expected a string or a tuple of"):
        buffer.priority_key = key
    if key is None:
        return
    for name in ("end_key", "traj_key", "truncated_key", "init_key", "end_keys"):
        value = [key] if name == "end_keys" else key
        with pytest.raises(ConfigurationError, match=f"{name}: expected a string or a tuple of"):
            PrioritizedSliceSampler(8, 1.0, 1.0, slice_len=2, **{name: value})


def test_keys_of_slices_mean_the_same_however_they_are_nested():
    names = {"end_key": "done", "truncated_key": "truncated", "init_key": "is_init"}
    batches = []
    for nest in (lambda name: name, lambda name: (name,), lambda name: ((name,),)):
        keys = {argument: nest(name) for argument, name in names.items()}
        sampler = PrioritizedSliceSampler(12, 1.0, 1.0, slice_len=3, **keys)
        buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(12), sampler=sampler)
        k = torch.arange(12)
        buffer.extend(TensorDict({"k": k, "done": k % 4 == 3, "is_init": k % 4 == 0}, [12]))
        torch.manual_seed(0)
        batches.append(buffer.sample(12))
    for batch in batches[1:]:
        assert set(batch.keys(True)) == set(batches[0].keys(True))
        assert (batch == batches[0]).all()


def test_ids_and_several_flags_of_slices_may_be_nested_in_tuples():
    for settings in ({"traj_key": ("episode",)}, {"end_keys": [("done",), ("cut",)]}):
        sampler = PrioritizedSliceSampler(12, 1.0, 1.0, slice_len=4, **settings)
        buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(12), sampler=sampler)
        k = torch.arange(12)
        flags = {"done": k == 3, "cut": k % 4 == 3, "episode": k // 4}
        buffer.extend(TensorDict({"k": k, **flags}, [12]))
        assert set(buffer.sample(200)["k"].view(-1, 4)[:, 0].tolist()) == {0, 4, 8}


BEYOND = 0.1 + 100 * ((1.0 - 0.1) / 100)


@pytest.mark.parametrize("kind", [PrioritizedSampler, PrioritizedSliceSampler])
def test_a_few_roundings_beyond_a_bound_are_the_bound(kind):
    of_slices = {} if kind is PrioritizedSampler else {"slice_len": 2}
    assert BEYOND > 1
    sampler = kind(8, -1e-16, BEYOND, -1e-16, **of_slices)
    assert (sampler.alpha, sampler.beta, sampler.eps) == (0.0, 1.0, 0.0)
    sampler.alpha, sampler.beta, sampler.eps = 0.5, 0.5, 0.5
    sampler.alpha, sampler.beta, sampler.eps = 1.0 - 1.0 - 1e-16, 1.0000000000000002, -1e-16
    assert (sampler.alpha, sampler.beta, sampler.eps) == (0.0, 1.0, 0.0)
    sampler.beta = -1e-16
    assert sampler.beta == 0.0
    sampler.beta = 1.5  # TorchRL takes more than a full correction
    assert sampler.beta == 1.5
    for name in ("alpha", "beta", "eps"):
        with pytest.raises(ConfigurationError, match=f"{name}: expected a finite number"):
            setattr(sampler, name, -1e-3)


def test_a_buffer_takes_a_sampler_whose_settings_are_a_few_roundings_off():
    sampler = PrioritizedSampler(8, 0.1 + 0.2, 1.0)
    buffer = TensorDictPrioritizedReplayBuffer(
        alpha=0.3, beta=BEYOND, storage=LazyTensorStorage(8), sampler=sampler
    )
    assert buffer.sampler.beta == 1.0
    for wrong in ("a", None, -1.0):
        with pytest.raises(ConfigurationError, match="alpha: expected a finite number"):
            TensorDictPrioritizedReplayBuffer(
                alpha=wrong, beta=1.0, storage=LazyTensorStorage(8), sampler=sampler
            )


def test_errors_of_torchrls_plain_buffer_are_named_too():
    sampler = PrioritizedSampler(8, 1.0, 1.0)
    buffer = ReplayBuffer(storage=LazyTensorStorage(8), sampler=sampler)
    buffer.extend(torch.arange(8))
    with pytest.raises(PerTdError):
        buffer.update_priority("a", 1.0)
    with pytest.raises(PerTdError):
        buffer.sample(-1)

"""Columns and records, with kernels and without: the same transitions, wherever they lie."""

import copy
import pickle

import pytest
import torch
from tensordict import TensorDict

from per_td import ConfigurationError, PrioritizedReplayBuffer, SchemaError, kernels
from per_td.kernels import reference
from per_td.storage import layouts
from per_td.storage.layouts import Field, resolve_layout, views_of
from per_td.storage.ring import RingStorage
from tests.support.oracle import data
from tests.support.rings import read

CPU = torch.device("cpu")
KINDS = {
    "bool": (torch.bool, ()),
    "byte": (torch.uint8, (3,)),
    "half": (torch.float16, (2, 3)),
    "brain": (torch.bfloat16, (5,)),
    "single": (torch.float32, (8,)),
    "double": (torch.float64, ()),
    "complex": (torch.complex64, (2,)),
    "long": (torch.int64, (1,)),
    "image": (torch.uint8, (2, 17, 11)),
    "nothing": (torch.float32, (0,)),
}


@pytest.fixture(params=["columns", "records"])
def layout(request) -> str:
    return request.param


@pytest.fixture(params=["auto", "off"], ids=["kernels", "torch"])
def choice(request, monkeypatch) -> str:
    if request.param == "auto":
        pytest.importorskip("numba", reason="numba is not installed")
    monkeypatch.setenv(kernels.VARIABLE, request.param)
    return request.param


def zoo(n: int) -> TensorDict:
    """`n` random transitions of all kinds."""
    leaves = {
        name: torch.randn(n, *shape).mul(50).to(torch.float32).to(dtype)
        for name, (dtype, shape) in KINDS.items()
    }
    nested = {"inner": {"again": leaves.pop("long")}} | leaves
    return TensorDict(nested, batch_size=[n])


def same(one: TensorDict, other: TensorDict) -> bool:
    keys = set(one.keys(True, True))
    assert keys == set(other.keys(True, True))
    return all(torch.equal(one[key], other[key]) for key in keys)


@pytest.mark.parametrize("capacity", [1, 7, 16, 50, 257])
def test_writes_of_any_size_wrap_around_and_come_back(capacity, layout, choice):
    storage = RingStorage(capacity, CPU, layout)
    naive = zoo(capacity)
    for _ in range(8):
        new = zoo(int(torch.randint(1, 2 * capacity + 2, ())))
        for i, slot in enumerate(storage.next_slots(len(new)).tolist()):
            naive[slot] = new[i]
        storage.write(*storage.check(new))
        index = torch.randint(len(storage), (30,))
        batch = read(storage, index)
        assert same(batch.exclude("index", "generation"), naive[index])
        assert batch["generation"].tolist() == storage.generation(index).tolist()
    assert same(storage.data[: len(storage)], naive[: len(storage)])


def test_batches_are_contiguous_and_nobody_elses(layout, choice):
    storage = RingStorage(20, CPU, layout)
    storage.write(*storage.check(zoo(20)))
    before = storage.data.clone()
    batch = read(storage, torch.arange(20))
    leaves = batch.values(True, True)
    assert all(leaf.is_contiguous() for leaf in leaves)
    assert all(leaf.untyped_storage().nbytes() == leaf.nbytes for leaf in leaves)
    batch.zero_()
    assert same(storage.data, before)


def test_batches_are_like_any_other_tensordict(layout, choice):
    buffer = PrioritizedReplayBuffer(30, batch_size=6, layout=layout)
    buffer.extend(data(0, 30))
    batch = buffer.sample()
    assert type(batch) is TensorDict
    assert batch.device == batch["next"].device == CPU
    assert batch.batch_size == batch["next"].batch_size == (6,)
    assert not batch.is_locked
    batch["td_error"] = torch.rand(6)
    buffer.update_tensordict_priority(batch)
    assert same(torch.cat([batch[:2], batch[2:]]), batch)
    assert batch.to(torch.float64)["observation"].dtype == torch.float64
    assert same(pickle.loads(pickle.dumps(batch)), batch)


def test_sources_may_be_strided_expanded_conjugated_or_have_gradients(layout, choice):
    storage = RingStorage(10, CPU, layout)
    base = torch.randn(12, 6, dtype=torch.complex64)
    leaves = {
        ("strided",): base.real[::2, ::3],
        ("transposed",): torch.randn(4, 6).T,
        ("expanded",): torch.randn(1, 2).expand(6, 2),
        ("conjugated",): base.conj()[:6],
        ("negative",): base.conj().imag[:6],
        ("gradients",): torch.randn(6, 2, requires_grad=True),
    }
    storage.write(*storage.check_leaves(leaves))
    for key, leaf in leaves.items():
        assert torch.equal(storage.data[key][:6], leaf.detach())
        assert not storage.data[key].requires_grad


def test_one_transition_at_a_time_is_the_same_as_many(layout, choice):
    one, many = (PrioritizedReplayBuffer(7, layout=layout) for _ in range(2))
    new = zoo(17)
    many.extend(new)
    assert [one.add(new[i]).item() for i in range(17)] == [i % 7 for i in range(17)]
    assert one.add(new[0]).shape == ()
    assert same(one.transitions[[0, 1, 2, 4, 5, 6]], many.transitions[[0, 1, 2, 4, 5, 6]])


@pytest.mark.parametrize("other", ["columns", "records"])
def test_states_and_files_do_not_depend_on_the_layout(layout, other, choice, tmp_path):
    buffer = PrioritizedReplayBuffer(9, batch_size=4, layout=layout)
    buffer.extend(zoo(13))
    loaded = PrioritizedReplayBuffer(9, batch_size=4, layout=other)
    loaded.load_state_dict(buffer.state_dict())
    assert same(loaded.transitions, buffer.transitions)
    buffer.save(tmp_path / "buffer.pt")
    assert same(
        PrioritizedReplayBuffer.load(tmp_path / "buffer.pt").transitions, loaded.transitions
    )


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda made: pickle.loads(pickle.dumps(made))], ids=["deep", "pickle"]
)
def test_copies_go_on_working_and_share_nothing(copied, layout, choice):
    buffer = PrioritizedReplayBuffer(9, batch_size=4, layout=layout)
    buffer.extend(data(0, 9))
    other = copied(buffer)
    other.extend(data(100, 9))
    assert buffer.transitions["action"].tolist() == list(range(9))
    assert other.transitions["action"].tolist() == list(range(100, 109))
    assert (other.sample()["action"] >= 100).all()


def test_leaves_of_different_lengths_are_refused(layout, choice):
    storage = RingStorage(9, CPU, layout)
    leaves = {("a",): torch.rand(4, 2), ("b",): torch.rand(3)}
    for _ in range(2):
        with pytest.raises(SchemaError, match=r"'b': expected 4 transitions, got 3"):
            storage.check_leaves(leaves)
        storage.write({("a",): torch.rand(4, 2), ("b",): torch.rand(4)}, 4)
    with pytest.raises(SchemaError, match=r"'b': expected shape \[n, \.\.\.\], got \[\]"):
        storage.check_leaves({("a",): torch.rand(4, 2), ("b",): torch.tensor(1.0)})


def test_fields_of_a_record_are_aligned_and_do_not_overlap():
    fields = [Field((name,), torch.Size(shape), dtype) for name, (dtype, shape) in KINDS.items()]
    length = layouts.bytes_of("records", fields, 3)
    block = torch.zeros(length, dtype=torch.uint8)
    record = length // 3
    assert (length % 3, record % 16) == (0, 0)
    assert record - sum(field.bytes for field in fields) < 16
    views = views_of("records", fields, block, 3)
    for view in views:
        assert view.data_ptr() % view.itemsize == 0
        view.fill_(1)
    written = block[:record].count_nonzero()
    for view in views:
        view.fill_(0)
        left = block[:record].count_nonzero()
        assert left < written or not view.numel()
        written = left
    assert written == 0


def test_large_memory_is_zero_aligned_and_of_its_dtype(layout, choice):
    storage = RingStorage(300_000, CPU, layout)
    storage.write(*storage.check(data(0, 5)))
    for column in storage.data.values(True, True):
        assert column.data_ptr() % column.itemsize == 0
        assert not column[5:].any()
    storage.write(*storage.check(data(5, 299_999)))
    batch = read(storage, torch.tensor([0, 3, 4, 299_999]))
    assert batch["action"].tolist() == [300_000, 300_003, 4, 299_999]
    assert batch["next", "reward"].squeeze(-1).tolist() == [300_000, 300_003, 4, 299_999]


def test_auto_takes_records_for_small_transitions_where_there_are_kernels():
    def field(n):
        return [Field(("x",), torch.Size([n]), torch.uint8)]

    assert resolve_layout("auto", field(layouts.RECORDS_UP_TO), compiled=True) == "records"
    assert resolve_layout("auto", field(layouts.RECORDS_UP_TO + 1), compiled=True) == "columns"
    assert resolve_layout("auto", field(8), compiled=False) == "columns"
    assert resolve_layout("records", field(10**6), compiled=False) == "records"


def test_large_batches_are_left_to_torchs_threads(monkeypatch, choice):
    monkeypatch.setattr(layouts, "SHARED_FROM", 100)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    storage = RingStorage(8, CPU, "columns")
    storage.write(*storage.check(data(0, 8)))
    assert storage._operations_for(8) is reference
    assert storage._operations_for(1) is storage._operations
    assert storage.compiled == (choice == "auto")
    assert read(storage, torch.arange(8))["action"].tolist() == list(range(8))


def test_other_layouts_are_refused():
    with pytest.raises(ConfigurationError, match=r"layout: expected one of .*, got 'rows'"):
        PrioritizedReplayBuffer(4, layout="rows")

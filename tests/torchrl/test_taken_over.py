"""State that others own: writers, cursors, generations, files. It is looked at when taken over."""

import itertools
import json
import os
import subprocess
import sys

import pytest
import torch
from tensordict import TensorDict
from torch import multiprocessing
from torchrl.data import (
    ImmutableDatasetWriter,
    LazyMemmapStorage,
    LazyTensorStorage,
    ListStorage,
    TensorDictMaxValueWriter,
    TensorDictReplayBuffer,
    TensorDictRoundRobinWriter,
)
from torchrl.envs.transforms import ObservationNorm, RenameTransform

from per_td import CheckpointError, ConfigurationError, PerTdError, PriorityError
from per_td.torchrl import TensorDictPrioritizedReplayBuffer
from per_td.torchrl.writer import GenerationWriter
from tests.support.parameters import slow_but
from tests.support.replay import data, learn, make


def everything(buffer):
    """What a refused call must leave alone."""
    writer = buffer.writer
    return (
        len(buffer),
        buffer.storage[:]["x"].tolist(),
        buffer.sampler.priority.tolist(),
        (buffer.sampler.alpha, buffer.sampler.beta),
        (writer._cursor, writer._write_count, writer._generation.tolist()),
        buffer._batch_size,
    )


EDITS = {
    "cursor-negative": ("_writer", "_cursor", -1),
    "cursor-float": ("_writer", "_cursor", 2.5),
    "cursor-text": ("_writer", "_cursor", "2"),
    "cursor-none": ("_writer", "_cursor", None),
    "cursor-huge": ("_writer", "_cursor", 2**40),
    "count-negative": ("_writer", "_write_count", -1),
    "count-float": ("_writer", "_write_count", 1.5),
    "generations-float": ("_writer", "_generation", torch.zeros(20)),
    "generations-list": ("_writer", "_generation", [0] * 20),
    "generations-meta": ("_writer", "_generation", torch.zeros(20, device="meta").long()),
    "writer-list": ("_writer", None, [1]),
    "length-negative": ("_storage", "_len", -1),
    "length-beyond": ("_storage", "_len", 21),
    "length-float": ("_storage", "_len", 2.0),
    "data-short": ("_storage", "_storage", {"x": torch.arange(3)}),
    "data-ragged": ("_storage", "_storage", {"x": torch.arange(20), "y": torch.arange(3)}),
    "storage-list": ("_storage", None, [1]),
    "batch-size-0": (None, "_batch_size", 0),
    "batch-size-text": (None, "_batch_size", "a"),
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("collate", [None, lambda batch: batch])
def test_a_state_with_numbers_that_cannot_be_is_refused_and_changes_nothing(choice, edit, collate):
    buffer = make(collate_fn=collate)
    buffer.extend(data(15))
    learn(buffer, buffer.sample())
    state = buffer.state_dict()
    part, name, value = EDITS[edit]
    if name is None:
        state[part] = value
    elif part is None:
        state[name] = value
    else:
        state[part] = state[part] | {name: value}
    buffer.extend(data(8, 15))
    before = everything(buffer)
    with pytest.raises(CheckpointError):
        buffer.load_state_dict(state)
    assert everything(buffer) == before
    if part == "_writer":
        with pytest.raises(CheckpointError):
            buffer.writer.load_state_dict(state["_writer"])
        assert everything(buffer) == before
    buffer.extend(data(3, 23))
    learn(buffer, buffer.sample())


@pytest.mark.parametrize("part", ["_storage", "_sampler", "_writer", "_transforms", "_batch_size"])
def test_a_state_without_one_of_its_parts_is_refused(part):
    buffer = make()
    buffer.extend(data(15))
    state = {key: value for key, value in buffer.state_dict().items() if key != part}
    before = everything(buffer)
    for wrong in (state, None, []):
        with pytest.raises(
            CheckpointError, match="expected the state of a buffer, got one without"
        ):
            buffer.load_state_dict(wrong)
    assert everything(buffer) == before


@pytest.mark.parametrize("cursor", [-1, 1.5, "a", None, [], 2**40])
def test_a_folder_with_a_cursor_that_cannot_be_is_refused_and_changes_nothing(tmp_path, cursor):
    buffer = make()
    buffer.extend(data(15))
    buffer.dumps(tmp_path)
    path = tmp_path / "writer" / "metadata.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"cursor": cursor}))
    buffer.extend(data(8, 15))
    before = everything(buffer)
    loads = [lambda: buffer.loads(tmp_path), lambda: buffer.writer.loads(tmp_path / "writer")]
    for load in loads:
        with pytest.raises(CheckpointError, match="writer: "):
            load()
        assert everything(buffer) == before
    path.write_text("no json")
    for load in loads:
        with pytest.raises(CheckpointError, match="writer: expected its counts"):
            load()
    assert everything(buffer) == before


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("slots", [0, 3, 20, 50])
@pytest.mark.parametrize("ndim", [1, 2])
@pytest.mark.parametrize("strided", [False, True])
def test_generations_of_any_integers_are_brought_to_int64_of_the_storages_size(
    choice, dtype, slots, ndim, strided
):
    buffer = make(storage=lambda: LazyTensorStorage(20 * ndim, ndim=ndim))
    new = data(20) if ndim == 1 else torch.stack([data(20)] * 2)
    buffer.extend(new)
    known = torch.zeros(2 * slots, dtype=dtype)[::2] if strided else torch.zeros(slots, dtype=dtype)
    buffer.writer.load_state_dict({"_cursor": 0, "_write_count": 20, "_generation": known})
    now = buffer.writer._generation
    assert now.dtype == torch.int64
    assert now.is_contiguous()
    assert ndim == 2 or now.shape == (20,)
    if len(now) >= 20:
        buffer.extend(new)
        batch = buffer.sample()
        batch["td_error"] = torch.ones(batch.shape)
        buffer.update_tensordict_priority(batch)


@pytest.mark.parametrize("compilable", [False, True])
@pytest.mark.parametrize("kind", [GenerationWriter, TensorDictRoundRobinWriter])
@pytest.mark.parametrize("collate", [None, lambda batch: batch])
@pytest.mark.parametrize("full", [False, True])
def test_the_cursor_of_a_writer_of_a_larger_buffer_is_brought_back(
    choice, compilable, kind, collate, full
):
    large = TensorDictReplayBuffer(
        storage=LazyTensorStorage(1000), writer=kind(compilable=compilable)
    )
    large.extend(data(933))
    for single in (True, False):
        buffer = make(collate_fn=collate, compilable=compilable)
        buffer.extend(data(20 if full else 5))
        large.writer._cursor = 933
        buffer.set_writer(large.writer)
        assert buffer.writer._cursor == (13 if full else 5)
        at = buffer.writer._cursor
        if single:
            assert int(buffer.add(data(1, 13)[0])) == at
        else:
            assert buffer.extend(data(3, 13)).tolist() == [at, at + 1, at + 2]
        assert len(buffer) == (20 if full else 6 if single else 8)
        learn(buffer, buffer.sample())


@pytest.mark.parametrize("cursor", [-1, 2.5, "a"])
def test_a_writer_whose_cursor_cannot_be_is_refused_and_changes_nothing(cursor):
    buffer = make(compilable=True)
    buffer.extend(data(5))
    writer, before = buffer.writer, everything(buffer)
    wrong = GenerationWriter(compilable=True)
    wrong._cursor = cursor
    with pytest.raises(ConfigurationError, match="cursor: expected an integer of at least 0"):
        buffer.set_writer(wrong)
    with pytest.raises(ConfigurationError, match="cursor: expected an integer of at least 0"):
        wrong.register_storage(LazyTensorStorage(20))
    assert buffer.writer is writer
    assert everything(buffer) == before


def test_generations_that_are_no_integers_are_refused_with_the_storage():
    storage = LazyTensorStorage(20)
    storage._slot_generations = torch.zeros(20)
    with pytest.raises(ConfigurationError, match=r"generation: expected an integer dtype, got"):
        make(storage=lambda: storage)


HAMMER = """
import itertools, random, sys
import torch
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer, TensorDictRoundRobinWriter
from per_td import PerTdError
from per_td.torchrl import TensorDictPrioritizedReplayBuffer
from per_td.torchrl.writer import GenerationWriter

torch.manual_seed(0)
random.seed(0)
T = lambda n: TensorDict({"x": torch.arange(n), "td_error": torch.rand(n)}, [n])
refused = worked = 0

def make(capacity):
    storage = LazyTensorStorage(capacity)
    return TensorDictPrioritizedReplayBuffer(alpha=1.0, beta=1.0, storage=storage, batch_size=64)

def attempt(call):
    global refused, worked
    try:
        result = call()
        worked += 1
        return result
    except (PerTdError, RuntimeError, IndexError) as error:
        refused += 1

def use(buffer):
    attempt(lambda: buffer.extend(T(30)))
    attempt(lambda: buffer.add(T(1)[0]))
    batch = attempt(buffer.sample)
    if batch is not None:
        batch["td_error"] = torch.rand(len(batch))
        attempt(lambda: buffer.update_tensordict_priority(batch))
    attempt(lambda: buffer.update_priority(torch.arange(5), torch.rand(5)))
    attempt(buffer.sampler.check_valid)

numbers = [0, -1, 19, 20, 10**6, 2**30, 2**31, 2**62, -(2**62), 1.5, float("nan"), None, "a", True]
generations = [torch.zeros(n, dtype=d) for n in (0, 3, 20, 50)
               for d in (torch.int16, torch.int32, torch.int64, torch.float32)]
generations += [None, torch.zeros(40, dtype=torch.int64)[::2], torch.zeros(20).long().expand(20)]
for k in range(int(sys.argv[1])):
    buffer = make(20)
    attempt(lambda: buffer.extend(T(random.choice([5, 20]))))
    state = buffer.state_dict()
    for part, name, values in (
        ("_writer", "_cursor", numbers),
        ("_writer", "_write_count", numbers),
        ("_writer", "_generation", generations),
        ("_storage", "_len", numbers),
    ):
        if random.random() < 0.4:
            state[part] = dict(state[part]) | {name: random.choice(values)}
    other = make(20)
    if random.random() < 0.5:
        other.extend(T(7))
    attempt(lambda: other.load_state_dict(state))
    use(other)
    attempt(lambda: other.writer.load_state_dict(state["_writer"]))
    use(other)
    kind = random.choice([GenerationWriter, TensorDictRoundRobinWriter])
    large = TensorDictReplayBuffer(storage=LazyTensorStorage(10_000), writer=kind())
    large.extend(T(random.choice([10, 9_800])))
    attempt(lambda: other.set_writer(large.writer))
    use(other)
    storage = LazyTensorStorage(20)
    storage._slot_generations = random.choice(generations)
    attempt(lambda: other.set_storage(storage))
    use(other)
    other.writer._generation = random.choice(generations[:-1])
    use(other)
    if isinstance(other.writer._cursor, int):
        other.writer._cursor = random.choice([-1, 10**6, 2**31 - 1])
    use(other)
theirs = TensorDictReplayBuffer(
    storage=LazyTensorStorage(2**21), writer=TensorDictRoundRobinWriter(track_generations=True))
theirs.extend(T(2000))
big = make(2**21)
attempt(lambda: big.writer.load_state_dict(theirs.writer.state_dict()))
for _ in range(3):
    use(big)
print("worked", worked, "refused", refused)
"""


@pytest.mark.parametrize(
    ("kernels", "states"),
    slow_but([("auto", 40)], [("auto", 300), ("auto", 40), ("checked", 300), ("off", 300)]),
)
def test_no_state_of_a_writer_leads_native_code_astray(kernels, states):
    """In a process of its own: a fault here ends it."""
    environment = os.environ | {"PER_TD_KERNELS": kernels, "RL_LOGGING_LEVEL": "ERROR"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", HAMMER, str(states)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    worked, refused = (int(word) for word in done.stdout.split()[1::2])
    assert worked > 10 * states
    assert refused > states


@pytest.mark.parametrize("collate", [None, lambda batch: batch])
def test_a_cursor_never_leaves_a_gap_behind_what_is_filled(choice, collate):
    buffer = make(collate_fn=collate)
    buffer.extend(data(15))
    state = buffer.state_dict()
    buffer.set_storage(LazyTensorStorage(20))
    assert buffer.extend(data(3)).tolist() == [0, 1, 2]
    learn(buffer, buffer.sample())
    state["_writer"] |= {"_cursor": 18}
    buffer.load_state_dict(state)
    assert buffer.extend(data(3, 15)).tolist() == [15, 16, 17]
    assert len(buffer) == 18
    learn(buffer, buffer.sample())


# --- another storage ------------------------------------------------------------------------------


def storages(ndim):
    return LazyTensorStorage(8 * ndim, ndim=ndim)


def filled(shape, start):
    x = torch.arange(start, start + 8)
    x = x if len(shape) == 1 else x.expand(2, 8).clone()
    return TensorDict({"x": x}, x.shape)


@pytest.mark.parametrize("collate", [None, lambda batch: batch])
@pytest.mark.parametrize("ndim", [1, 2])
@pytest.mark.parametrize("full", [False, True])
def test_a_batch_drawn_from_another_storage_is_stale(choice, collate, ndim, full):
    shape = (8,) if ndim == 1 else (2, 8)
    buffer = TensorDictPrioritizedReplayBuffer(
        alpha=1.0,
        beta=1.0,
        eps=0.0,
        storage=storages(ndim),
        batch_size=4,
        collate_fn=collate,
    )
    late, rounds = [], 0
    for start in range(0, 50, 10):
        for _ in range(start // 10 + 1):  # several times round, so generations differ
            buffer.extend(filled(shape, start))
        late.append(buffer.sample())
        new = storages(ndim)
        if full:
            other = TensorDictPrioritizedReplayBuffer(alpha=1.0, beta=1.0, storage=new)
            other.extend(filled(shape, start))
        buffer.set_storage(new)
        for round_ in range(2):
            if round_ or not full:
                buffer.extend(filled(shape, start + 1))
            before, stale = buffer.sampler.priority, buffer.stats()["stale_updates"]
            for batch in late:
                batch["td_error"] = torch.full(batch.shape, 100.0)
                buffer.update_tensordict_priority(batch)
            assert torch.equal(buffer.sampler.priority, before)
            assert buffer.stats()["stale_updates"] == stale + 4 * len(late)
        current = buffer.sample()
        current["td_error"] = torch.full(current.shape, 3.0)
        buffer.update_tensordict_priority(current)
        assert (buffer.sampler.priority == 3).any()
        rounds += 1
    assert rounds == 5


def test_a_storage_that_comes_back_has_new_generations():
    first = LazyTensorStorage(8)
    buffer = make(storage=lambda: first)
    buffer.extend(data(8))
    batch = buffer.sample()
    buffer.set_storage(LazyTensorStorage(8))
    buffer.set_storage(first)
    learn(buffer, batch)
    assert buffer.stats()["stale_updates"] == 32
    learn(buffer, buffer.sample())
    assert buffer.stats()["stale_updates"] == 32


# --- emptied by another process -------------------------------------------------------------------


def empty_and_write(buffer, n, count, told):
    buffer.empty(empty_write_count=count)
    if n:
        buffer.extend(data(n, 100))
    told.set()


@pytest.mark.parametrize(
    ("n", "count"),
    slow_but([(0, True), (9, False)], itertools.product((0, 3, 6, 9, 25), (True, False))),
)
def test_emptying_by_another_process_is_seen_with_sync_false(count, n):
    context = multiprocessing.get_context("spawn")
    buffer = make(10, sync=False, shared=True, batch_size=200)
    buffer.extend(data(6))
    late = buffer.sample()
    buffer.update_priority(torch.arange(6), torch.full((6,), 50.0))
    told = context.Event()
    process = context.Process(target=empty_and_write, args=(buffer, n, count, told))
    process.start()
    assert told.wait(120)
    process.join(60)
    assert process.exitcode == 0
    kept = min(n, 10)
    assert len(buffer) == kept
    if not n:
        with pytest.raises(PerTdError, match="empty"):
            buffer.sample()
    else:
        batch = buffer.sample()
        assert set(batch["x"].tolist()) == set(range(100 + n - kept, 100 + n))
        learn(buffer, late)
    now = buffer.sampler.priority
    assert (now > 0).sum() == kept
    assert len(set(now[now > 0].tolist())) <= 1
    assert buffer.stats()["stale_updates"] == (200 if n else 0)


@pytest.mark.parametrize("count", [True, False])
def test_emptying_several_times_between_two_draws_is_seen(count):
    buffer, writer = make(10, sync=False, batch_size=200), None
    buffer.extend(data(6))
    buffer.sample()
    buffer.update_priority(torch.arange(6), torch.full((6,), 50.0))
    writer = buffer.writer  # as in another process, past the buffer
    for n in (6, 9, 4):
        writer._empty(count)
        buffer.storage._empty()
        buffer.extend(data(n, 100))
    assert set(buffer.sample()["x"].tolist()) == set(range(100, 104))
    assert len(set(buffer.sampler.priority[:4].tolist())) == 1
    assert buffer.sampler.priority[4:].sum() == 0


def test_what_another_writer_has_counted_is_not_taken_for_new():
    buffer = make(10, sync=False, batch_size=200)
    buffer.extend(data(6))
    other = make(10, sync=False)
    other.extend(data(8))
    other.empty()
    other.extend(data(3))
    buffer.set_writer(other.writer)
    buffer.update_priority(torch.arange(6), torch.full((6,), 50.0))
    before = buffer.sampler.priority
    buffer.sample()
    assert torch.equal(buffer.sampler.priority, before)


def test_lists_may_be_emptied_and_taken_over_too():
    buffer = make(10, storage=lambda: ListStorage(10))
    buffer.extend(data(6))
    state = buffer.state_dict()
    state["_storage"] = {"_storage": [1] * 11}
    with pytest.raises(CheckpointError, match="storage: expected 0 to 10 elements, got 11"):
        buffer.load_state_dict(state)


KINDS = {
    "another dtype": {"x": torch.arange(6) + 0.5},
    "another shape": {"x": torch.arange(12).view(6, 2)},
    "another key": {"y": torch.arange(6)},
    "no key": {"nest": {"x": torch.arange(6)}},
}


def of_kind(kind, storage=LazyTensorStorage):
    buffer = make(10, storage=storage)
    buffer.extend(TensorDict(kind, [6]))
    return buffer


@pytest.mark.parametrize("storage", [LazyTensorStorage, LazyMemmapStorage])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["state", "folder"])
def test_elements_of_another_kind_are_refused_and_change_nothing(way, kind, storage, tmp_path):
    source = of_kind(KINDS[kind], storage)
    buffer = of_kind({"x": torch.arange(6) + 50})
    buffer.update_priority(2, 7.0)
    before = everything(buffer)
    source.dumps(tmp_path)
    with pytest.raises(CheckpointError, match=r"storage: expected .* as in the elements that are"):
        buffer.load_state_dict(source.state_dict()) if way == "state" else buffer.loads(tmp_path)
    assert everything(buffer) == before
    new = make(10)  # without data, it takes any
    new.load_state_dict(source.state_dict()) if way == "state" else new.loads(tmp_path)
    assert set(new[:].keys(True, True)) == set(source[:].keys(True, True))


MORE = {"x": torch.arange(6), "y": torch.arange(6) + 20}


@pytest.mark.parametrize("storage", [LazyTensorStorage, LazyMemmapStorage])
def test_a_state_with_one_key_more_is_taken_up_where_memory_can_grow(storage):
    buffer = of_kind({"x": torch.arange(6) + 50})
    buffer.load_state_dict(of_kind(MORE, storage).state_dict())
    assert buffer[:]["x"].tolist() == MORE["x"].tolist()
    assert buffer[:]["y"].tolist() == MORE["y"].tolist()


@pytest.mark.parametrize(
    ("way", "storage"),
    [
        ("folder", LazyTensorStorage),
        ("folder", LazyMemmapStorage),
        ("state", LazyMemmapStorage),  # TorchRL adds no key to it
    ],
)
def test_one_key_more_is_refused_where_it_would_be_lost(way, storage, tmp_path):
    source = of_kind(MORE)
    source.dumps(tmp_path)
    buffer = of_kind({"x": torch.arange(6) + 50}, storage)
    before = everything(buffer)
    with pytest.raises(CheckpointError, match="expected no entry at 'y', as in the elements"):
        buffer.load_state_dict(source.state_dict()) if way == "state" else buffer.loads(tmp_path)
    assert everything(buffer) == before


@pytest.mark.parametrize(
    ("to", "words"), [(ListStorage, "a list of"), (LazyTensorStorage, "as ten")]
)
def test_lists_and_tensors_of_elements_are_not_taken_for_each_other(to, words):
    source = of_kind(
        {"x": torch.arange(6)}, LazyTensorStorage if to is ListStorage else ListStorage
    )
    buffer = of_kind({"x": torch.arange(6) + 50}, to)
    before = len(buffer), buffer[:]["x"].tolist(), buffer.sampler.priority.tolist()
    with pytest.raises(CheckpointError, match=f"storage: expected .*{words}"):
        buffer.load_state_dict(source.state_dict())
    assert (len(buffer), buffer[:]["x"].tolist(), buffer.sampler.priority.tolist()) == before


@pytest.mark.parametrize("wrong", [None, 3, [1], {1: 2}])
def test_the_state_of_a_sampler_that_is_none_is_refused(wrong):
    buffer = of_kind({"x": torch.arange(6)})
    before = everything(buffer)
    with pytest.raises(CheckpointError, match="expected the state of a per_td"):
        buffer.sampler.load_state_dict(wrong)
    with pytest.raises(CheckpointError, match="expected the state of a per_td"):
        buffer.load_state_dict(buffer.state_dict() | {"_sampler": wrong})
    assert everything(buffer) == before


def norm(loc=0.0):
    return ObservationNorm(loc, 1.0, in_keys=["x"])


@pytest.mark.parametrize("way", ["state", "folder"])
@pytest.mark.parametrize(
    ("mine", "its"), [(None, norm()), (norm(), RenameTransform(["x"], ["y"], create_copy=True))]
)
def test_the_state_of_other_transforms_is_refused_before_anything_changes(way, mine, its, tmp_path):
    source = of_kind({"x": torch.arange(6.0)})
    source.append_transform(its)
    buffer = of_kind({"x": torch.arange(6.0) + 50})
    if mine is not None:
        buffer.append_transform(mine)
    if way == "folder" and its is not None and not source._transform.state_dict():
        pytest.skip("TorchRL writes no file of transforms without a state")
    before = everything(buffer)
    source.dumps(tmp_path)
    with pytest.raises(CheckpointError, match="with these transforms"):
        buffer.load_state_dict(source.state_dict()) if way == "state" else buffer.loads(tmp_path)
    assert everything(buffer) == before


@pytest.mark.parametrize(
    ("name", "value"), [("_transforms", None), ("_rng", "x"), ("_prefetch_state", 3)]
)
def test_other_parts_that_cannot_be_are_refused_before_anything_changes(name, value):
    state = of_kind({"x": torch.arange(6)}).state_dict()
    buffer = of_kind({"x": torch.arange(6) + 50})
    before = everything(buffer)
    with pytest.raises(CheckpointError, match="expected the state of a buffer"):
        buffer.load_state_dict(state | {name: value})
    assert everything(buffer) == before


def test_a_folder_without_its_numbers_is_refused_before_anything_changes(tmp_path):
    of_kind({"x": torch.arange(6)}).dumps(tmp_path)
    (tmp_path / "buffer_metadata.json").unlink()
    buffer = of_kind({"x": torch.arange(6) + 50})
    before = everything(buffer)
    with pytest.raises(CheckpointError, match=r"buffer_metadata\.json"):
        buffer.loads(tmp_path)
    assert everything(buffer) == before


def test_a_transform_takes_up_its_state():
    source = of_kind({"x": torch.arange(6.0)})
    source.append_transform(norm(3.0))
    buffer = of_kind({"x": torch.arange(6.0)})
    buffer.append_transform(norm())
    buffer.load_state_dict(source.state_dict())
    assert buffer._transform[0].loc == 3.0


def test_of_more_than_fit_the_best_have_the_priorities_that_they_brought():
    td = TensorDict(
        {
            "x": torch.tensor([1.0, 2.0, 3.0, 0.5, 9.0]),
            "td_error": torch.tensor([10.0, 20.0, 30.0, 5.0, 90.0]),
        },
        [5],
    )
    buffer = make(3, alpha=1.0, eps=0.0)
    buffer.set_writer(TensorDictMaxValueWriter(rank_key="x"))
    buffer.extend(td)
    kept = buffer[:]["x"].tolist()
    expected = dict(zip(td["x"].tolist(), td["td_error"].tolist(), strict=True))
    assert buffer.sampler.priority.tolist() == [expected[x] for x in kept]


def test_with_a_writer_that_knows_no_generations_updates_are_applied():
    buffer = make(6, alpha=1.0, eps=0.0)
    buffer.extend(TensorDict({"x": torch.arange(6)}, [6]))
    batch = buffer.sample()
    buffer.set_writer(TensorDictRoundRobinWriter())
    batch["td_error"] = torch.full((32,), 9.0)
    buffer.update_tensordict_priority(batch)
    buffer.set_priority(torch.tensor([0]), torch.tensor([5.0]), torch.tensor([7]))
    assert buffer.stats()["stale_updates"] == 0
    assert (buffer.sampler.priority[batch["index"][batch["index"] > 0]] == 9.0).all()
    assert buffer.sampler.priority[0] == 5.0


def test_a_writer_that_never_writes_may_be_set_and_what_is_none_is_refused():
    buffer = of_kind({"x": torch.arange(6)})
    for wrong in (None, 3, "writer"):
        with pytest.raises(ConfigurationError, match="writer: expected one of TorchRL's"):
            buffer.set_writer(wrong)
    buffer.set_writer(ImmutableDatasetWriter())
    buffer.update_tensordict_priority(buffer.sample().set("td_error", torch.ones(32)))


def test_a_storage_of_several_dimensions_is_refused_where_another_process_samples():
    buffer = make(24, sync=False)
    with pytest.raises(ConfigurationError, match="sync: expected True for a storage of 2 dim"):
        buffer.set_storage(LazyTensorStorage(24, ndim=2))
    assert buffer.storage.ndim == 1


def test_td_errors_of_new_elements_are_clipped_as_those_of_updates_are():
    td = TensorDict({"x": torch.arange(3), "td_error": torch.tensor([0.1, 3.0, 50.0])}, [3])
    for storage in (LazyTensorStorage, ListStorage):
        buffer = make(6, storage=storage, alpha=1.0, eps=0.0, priority_clip=(1.0, 5.0))
        buffer.extend(td)
        buffer.add(td[0])
        assert buffer.sampler.priority[:4].tolist() == [1, 3, 5, 1]


@pytest.mark.parametrize("filled", [False, True])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.bool])
def test_td_errors_of_new_elements_that_are_no_real_numbers_are_refused(dtype, filled):
    td = TensorDict({"x": torch.arange(2), "td_error": torch.ones(2)}, [2])
    buffer = make(6)
    if filled:
        buffer.extend(td)
    before = len(buffer), buffer.writer._cursor
    with pytest.raises(PriorityError, match="td_error: expected a real dtype"):
        buffer.extend(td.clone().set("td_error", td["td_error"].to(dtype)))
    assert (len(buffer), buffer.writer._cursor) == before


@pytest.mark.parametrize("latest", [-1, 2.5, "a", None, True])
def test_a_number_of_latest_elements_that_cannot_be_is_refused(latest):
    with pytest.raises(ConfigurationError, match="latest: expected an integer"):
        make(6, latest=latest)
    buffer = make(6)
    with pytest.raises(ConfigurationError, match="latest: expected an integer"):
        buffer.sampler.latest = latest
    assert buffer.sampler.latest == 0

"""Batches have the structure of what went in: nested batch sizes, names, classes, empty nodes."""

import copy
import pickle
import sys

import pytest
import torch
from tensordict import TensorDict, lazy_stack, tensorclass

from per_td import CheckpointError, PrioritizedReplayBuffer, SchemaError
from per_td.storage.leaves import leaves_of


@tensorclass
class Inner:
    """A user's class, nested in transitions."""

    obs: torch.Tensor
    rest: TensorDict


def transitions(*shape: int) -> TensorDict:
    agents = TensorDict(
        {"obs": torch.rand(*shape, 3, 4), "more": TensorDict({}, [*shape, 3, 2])},
        [*shape, 3],
        names=[*[None] * len(shape), "agent"],
    )
    inner = Inner(
        obs=torch.rand(*shape, 2),
        rest=TensorDict({"x": torch.rand(*shape, 5)}, [*shape, 5]),
        batch_size=shape,
    )
    nodes = {"agents": agents, "info": {}, "inner": inner, "x": torch.rand(shape)}
    made = TensorDict(nodes, shape)
    made["agents"].names = [*[None] * len(shape), "agent"]
    return made


def assert_structure(batch: TensorDict, shape: list[int], kind: type = Inner) -> None:
    assert list(batch.batch_size) == shape
    assert list(batch["agents"].batch_size) == [*shape, 3]
    assert batch["agents"].names == [*[None] * len(shape), "agent"]
    assert list(batch["agents", "more"].batch_size) == [*shape, 3, 2]
    assert list(batch["agents"][..., 0]["obs"].shape) == [*shape, 4]
    assert isinstance(batch["info"], TensorDict)
    assert batch["info"].is_empty()
    assert type(batch["inner"]) is kind
    assert list(batch["inner"].get("rest").batch_size) == [*shape, 5]


@pytest.mark.parametrize("layout", ["columns", "records"])
@pytest.mark.parametrize("lead", [(), (2,)], ids=["one", "many"])
@pytest.mark.parametrize("first", ["extend", "add", "example"])
def test_batches_and_views_have_the_structure_of_the_first_data(first, lead, layout):
    example = transitions() if first == "example" else None
    many = lead[0] if lead else None
    buffer = PrioritizedReplayBuffer(10, 6, num_buffers=many, layout=layout, example=example)
    if first == "add":
        buffer.add(transitions(*lead))
    data = transitions(*lead, 8)
    buffer.extend(data)
    batch = buffer.sample()
    assert_structure(batch, [*lead, 6])
    filled = 10 if lead else len(buffer)
    assert_structure(buffer.transitions, [*lead, filled])
    own = batch if not lead else batch[0]
    kept = data if not lead else data[0]
    for transition in own:
        assert (kept["x"] == transition["x"]).any() or first == "add"
        found = (kept["agents", "obs"] == transition["agents", "obs"]).flatten(1).all(-1)
        assert torch.equal(found, kept["x"] == transition["x"])


def test_a_lazy_stack_comes_back_as_what_it_stands_for():
    parts = [TensorDict({"obs": torch.rand(6, 4)}, [6]) for _ in range(3)]
    data = TensorDict({"agents": lazy_stack(parts, 1)}, [6])
    buffer = PrioritizedReplayBuffer(10, 5)
    index = buffer.extend(data)
    batch = buffer.sample()
    assert list(batch["agents"].batch_size) == [5, 3]
    assert torch.equal(buffer.transitions["agents", "obs"][index], data["agents", "obs"])


def test_a_dict_keeps_the_nodes_that_are_in_it():
    buffer = PrioritizedReplayBuffer(10, 5)
    agents = TensorDict({"obs": torch.rand(6, 3, 4)}, [6, 3])
    buffer.extend({"agents": agents, "info": {}, "deep": {"empty": {}, "x": torch.rand(6)}})
    batch = buffer.sample()
    assert list(batch["agents"].batch_size) == [5, 3]
    assert batch["info"].is_empty()
    assert batch["deep", "empty"].is_empty()
    assert list(batch["deep", "x"].shape) == [5]


def test_what_comes_later_may_have_another_structure_of_the_same_leaves():
    buffer = PrioritizedReplayBuffer(10, 5)
    buffer.extend(transitions(3))
    leaves = leaves_of(transitions(3))
    buffer.extend_leaves(leaves)
    assert_structure(buffer.sample(), [5])


def test_data_that_are_refused_leave_no_structure():
    buffer = PrioritizedReplayBuffer(10, 5)
    wrong = transitions(3)
    wrong["index"] = torch.zeros(3)
    with pytest.raises(SchemaError, match="reserved"):
        buffer.extend(wrong)
    buffer.extend_leaves({("inner", "obs"): torch.rand(4, 2)})
    assert set(buffer.sample().keys()) == {"inner", "index", "generation", "priority_weight"}


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda made: pickle.loads(pickle.dumps(made))])
def test_copies_keep_the_structure(copied):
    buffer = PrioritizedReplayBuffer(10, 5)
    buffer.extend(transitions(8))
    assert_structure(copied(buffer).sample(), [5])


@pytest.mark.skipif(sys.platform != "linux", reason="shared buffers are for Linux")
def test_a_shared_buffer_made_of_a_file_has_its_structure(tmp_path):
    buffer = PrioritizedReplayBuffer(10, 5)
    buffer.extend(transitions(8))
    buffer.save(tmp_path / "buffer.pt")
    loaded = PrioritizedReplayBuffer.load(tmp_path / "buffer.pt", shared=True)
    assert_structure(loaded.sample(), [5], kind=TensorDict)


@pytest.mark.parametrize("capacity", [10, 4])
def test_a_file_keeps_the_structure_but_no_code(capacity, tmp_path):
    buffer = PrioritizedReplayBuffer(10, 5)
    buffer.extend(transitions(8))
    buffer.save(tmp_path / "buffer.pt")
    loaded = PrioritizedReplayBuffer.load(tmp_path / "buffer.pt", capacity=capacity)
    assert_structure(loaded.sample(), [5], kind=TensorDict)
    loaded.extend(transitions(3))
    buffer.restore(tmp_path / "buffer.pt")  # it keeps the class that it knows
    assert_structure(buffer.sample(), [5])


@pytest.mark.parametrize(
    "wrong",
    [
        7,
        "7",
        "[7]",
        "[",
        '[[["a"], [1]]]',
        "[[[], [1], null]]",
        '[[["x"], [1], null]]',
        '[[["x", "y"], [1], null]]',
        '[[["new"], [-1], null]]',
        '[[["new"], [1], ["a", "b"]]]',
        '[[["new"], [1], [2]]]',
        "[[[3], [1], null]]",
    ],
)
def test_a_state_whose_structure_is_not_that_of_its_transitions_is_refused(wrong):
    buffer = PrioritizedReplayBuffer(10, 5)
    buffer.extend(transitions(8))
    state = buffer.state_dict() | {"structure": wrong}
    other = PrioritizedReplayBuffer(10, 5)
    with pytest.raises(CheckpointError, match="structure: expected"):
        other.load_state_dict(state)
    assert other.transitions is None


def test_the_view_of_the_transitions_takes_no_new_keys():
    buffer = PrioritizedReplayBuffer(10, 5)
    buffer.extend(transitions(8))
    with pytest.raises(RuntimeError, match="locked"):
        buffer.transitions["new"] = torch.zeros(8)
    with pytest.raises(RuntimeError, match="locked"):
        buffer.transitions["agents"]["new"] = torch.zeros(8, 3)

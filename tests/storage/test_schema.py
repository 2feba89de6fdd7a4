"""What buffers take as transitions, and how they refuse everything else by name."""

import numpy as np
import pytest
import torch
from tensordict import NonTensorData, TensorDict, lazy_stack, tensorclass
from torch import Tensor

from per_td import PrioritizedReplayBuffer, SchemaError
from per_td.storage.leaves import leaves_of

KINDS = {
    "one": {},
    "many": {"num_buffers": 3},
    "threads": {"threads": True},
    "shared": {"shared": True},
    "memmap": {"storage": "memmap"},
}


@tensorclass
class Step:
    state: Tensor
    reward: Tensor
    note: str | None = None


def steps(*size: int) -> dict:
    """Entries of transitions of this batch size."""
    n = torch.Size(size).numel()
    k = torch.arange(float(n)).reshape(size)
    return {"state": k.unsqueeze(-1).expand(*size, 4).clone(), "next": {"reward": k}}


def make(kind: str, example: bool = False, **settings) -> PrioritizedReplayBuffer:
    if example or kind == "shared":
        settings["example"] = TensorDict(steps(), [])
    return PrioritizedReplayBuffer(20, **KINDS[kind], **settings)


def lead(kind: str) -> tuple[int, ...]:
    return (3,) if kind == "many" else ()


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


def refused(buffer, write, data, message):
    """A refusal that leaves everything as it was."""
    before = buffer.write_count, buffer.priority.sum(), buffer.transitions is None
    with pytest.raises(SchemaError, match=message):
        getattr(buffer, write)(data)
    assert (buffer.write_count, buffer.priority.sum(), buffer.transitions is None) == before


@pytest.mark.parametrize("example", [False, True])
def test_a_forgotten_batch_size_is_told(kind, example):
    size = [*lead(kind), 8]
    refused(
        make(kind, example),
        "extend",
        TensorDict(steps(*size)),
        rf"got \[\]: give batch_size=\[{', '.join(map(str, size))}\]$",
    )


def test_a_forgotten_batch_size_is_told_to_who_adds_to_many():
    refused(make("many"), "add", TensorDict(steps(3)), r"\[3\], got \[\]: give batch_size=\[3\]$")


def test_who_extends_by_one_transition_is_told_to_add_it(kind):
    one = TensorDict(steps(*lead(kind)), [*lead(kind)])
    for example in (False, True):
        refused(make(kind, example), "extend", one, r"use add\(\) for one transition")
    alike = TensorDict({"x": torch.zeros(*lead(kind), 4)}, [*lead(kind)])
    buffer = PrioritizedReplayBuffer(
        20, **KINDS[kind], example=TensorDict({"x": torch.zeros(4)}, [])
    )
    refused(buffer, "extend", alike, r"use add\(\)")  # its shape is known to be that of one


def test_who_adds_several_transitions_is_told_to_extend(kind):
    several = TensorDict(steps(*lead(kind), 2), [*lead(kind), 2])
    refused(make(kind), "add", several, r"use extend\(\) for several transitions")


@pytest.mark.parametrize("example", [False, True])
def test_more_dimensions_than_count_transitions_are_to_be_flattened_first(kind, example):
    outer = lead(kind)
    data = TensorDict(steps(*outer, 2, 3), [*outer, 2, 3])
    dims = f"{len(outer)}, {len(outer) + 1}"
    refused(
        make(kind, example),
        "extend",
        data,
        rf"\.flatten\({dims}\) makes them 6 transitions, batch_size=\[.*2\] keeps the rest in each",
    )
    buffer = make(kind)
    buffer.extend(data.flatten(len(outer), len(outer) + 1))
    assert len(buffer) == 6
    if kind != "shared":
        buffer = make(kind)
        data.batch_size = [*outer, 2]
        buffer.extend(data)
        assert buffer.sample(5)["state"].shape == (*outer, 5, 3, 4)


def test_an_example_is_one_transition(kind):
    for data, message in (
        (TensorDict(steps(1), [1]), r"example: .* batch size \[\], got \[1\]"),
        ({"x": "text"}, "example: 'x': expected"),
    ):
        with pytest.raises(SchemaError, match=message):
            PrioritizedReplayBuffer(20, **KINDS[kind], example=data)


def test_dicts_and_tensorclasses_are_taken_as_their_tensordicts(kind):
    size = (*lead(kind), 5)
    entries = steps(*size)
    expected = make(kind)
    expected.extend(TensorDict(entries, size))
    array = {"state": entries["state"].numpy(), "next": {"reward": entries["next"]["reward"]}}
    mixed = {"state": entries["state"], "next": TensorDict(entries["next"], size)}
    for given in (entries, array, mixed):
        buffer = make(kind)
        buffer.extend(given)
        assert buffer.write_count == expected.write_count
        assert (buffer.transitions == expected.transitions).all()
        one = steps(*lead(kind))
        assert buffer.add(one).shape == lead(kind)
        assert len(buffer) == 6
    if kind == "shared":
        return
    flat = Step(entries["state"], entries["next"]["reward"], batch_size=size)
    buffer = PrioritizedReplayBuffer(20, **KINDS[kind])
    buffer.extend(flat)
    buffer.add(flat[..., 0])
    assert set(buffer.transitions.keys()) == {"state", "reward"}
    assert (buffer.transitions["state"][..., :5, :] == entries["state"]).all()
    assert len(buffer) == 6
    buffer = PrioritizedReplayBuffer(20, **KINDS[kind])
    buffer.extend(TensorDict({"step": flat}, size))
    assert buffer.sample(2)["step", "state"].shape == (*lead(kind), 2, 4)


def test_numbers_in_a_dict_become_tensors():
    buffer = PrioritizedReplayBuffer(5)
    buffer.add({"state": np.zeros(3, np.float32), "action": 1, "reward": 0.5, "done": False})
    batch = buffer.sample(2)
    assert batch["state"].shape == (2, 3)
    assert (batch["action"].dtype, batch["done"].dtype) == (torch.int64, torch.bool)
    assert batch["reward"].tolist() == [0.5, 0.5]


def test_priorities_are_updated_by_dicts_and_tensorclasses_too():
    @tensorclass
    class Batch:
        index: Tensor
        td_error: Tensor

    buffer = PrioritizedReplayBuffer(5, eps=0.0)
    buffer.extend(steps(3))
    generation = torch.zeros(2, dtype=torch.int64)
    index, td_error = torch.tensor([0, 1]), torch.tensor([5.0, 6.0])
    buffer.update_tensordict_priority(
        {"index": index, "td_error": td_error, "generation": generation}
    )
    assert buffer.priority.tolist() == [5, 6, 1]
    buffer.update_tensordict_priority({"index": [0, 1], "td_error": np.array([2.0, 3.0])})
    assert buffer.priority.tolist() == [2, 3, 1]
    buffer.update_tensordict_priority(Batch(index, td_error + 2, batch_size=[2]))
    assert buffer.priority.tolist() == [7, 8, 1]
    for batch, message in (({"index": index}, "the key 'td_error'"), ([1], "got list")):
        with pytest.raises(SchemaError, match=message):
            buffer.update_tensordict_priority(batch)


SIZE = torch.Size([2])
X = torch.zeros(2, 4)
NO_TENSORS = {
    "strings": (TensorDict({"s": ["a", "b"]}, SIZE), "'s': expected a tensor"),
    "strings beside tensors": (TensorDict({"x": X, "s": ["a", "b"]}, SIZE), "'s': expected"),
    "nested": (TensorDict({"x": X, "n": {"s": ["a", "b"]}}, SIZE), r"\('n', 's'\): expected"),
    "objects": (TensorDict({"x": X, "o": NonTensorData(object(), SIZE)}, SIZE), "'o': expected"),
    "array of strings": (TensorDict({"s": np.array(["a", "b"])}, SIZE), "'s': expected"),
    "dict of strings": ({"x": X, "s": ["a", "b"]}, "'s': expected a tensor"),
    "dict of string arrays": ({"n": {"s": np.array(["a", "b"])}}, r"\('n', 's'\): expected"),
    "dict with None": ({"x": X, "s": None}, "'s': expected"),
    "dict with tuples": ({("n", "x"): X}, r"keys of a dict, got \('n', 'x'\): nest dicts"),
    "dict with numbers": ({1: X}, "keys of a dict, got 1"),
    "text in a class": (Step(X, X, note="text", batch_size=SIZE), "'note': expected"),
    "empty dict": ({}, "at least one tensor"),
    "lengths in a dict": (
        {"x": X, "y": torch.zeros(3)},
        "'y': expected 2 transitions, got 3|unknown: 'y'",
    ),
    "number in a dict": ({"x": X, "y": 1}, r"'y': expected shape \[n, ...\], got \[\]"),
    "keys of some": (
        lazy_stack([TensorDict({"a": X[0], "b": X[0]}), TensorDict({"a": X[0]})]),
        "'b': expected it in all stacked",
    ),
    "nested keys of some": (
        lazy_stack([TensorDict({"n": {"a": X[0]}}), TensorDict({"n": {"b": X[0]}})]),
        r"\('n', 'a'\): expected it in all stacked",
    ),
    "shapes that differ": (
        lazy_stack([TensorDict({"a": torch.zeros(2)}), TensorDict({"a": torch.zeros(3)})]),
        "'a': expected tensors of one shape",
    ),
    "a string and a tensor": (
        lazy_stack([TensorDict({"a": X[0]}), TensorDict({"a": "text"})]),
        "'a': expected tensors of one shape",
    ),
    "fields of some": (
        lazy_stack([Step(X[0], X[0], batch_size=[]), Step(X[0], None, batch_size=[])]),
        "'reward': expected",
    ),
    "list": ([X], "expected a TensorDict or a dict of tensors, got list"),
    "string": ("text", "got str"),
    "only strings": (NonTensorData("text", [2]), "got NonTensorData"),
}


@pytest.mark.parametrize("name", NO_TENSORS)
@pytest.mark.parametrize("filled", [False, True])
def test_what_is_no_tensor_is_refused_by_name_and_never_left_out(name, filled):
    data, message = NO_TENSORS[name]
    buffer = PrioritizedReplayBuffer(5)
    if filled:
        buffer.extend({"x": X})
    refused(buffer, "extend", data, message)


def test_many_buffers_name_the_key_of_a_dict_that_does_not_fit():
    for write, data, message in (
        ("extend", {"x": torch.zeros(3, 2), "y": torch.zeros(3)}, r"'y': .* \[3, n, ...\], got"),
        ("extend", {"x": torch.zeros(3, 2), "y": torch.zeros(3, 1)}, r"'y': .* \[3, 2, ...\], got"),
        ("extend", {"x": torch.zeros(2, 2)}, r"'x': expected shape \[3, 2, ...\], got \[2, 2\]"),
        ("add", {"x": torch.zeros(2)}, r"'x': expected shape \[3, ...\], got \[2\]"),
        ("add", {"x": 1.0}, r"'x': expected shape \[3, ...\], got \[\]"),
        ("extend", {}, "at least one tensor"),
    ):
        refused(make("many"), write, data, message)


def test_stacks_that_fit_are_taken_with_all_that_is_in_them():
    parts = [TensorDict({"a": X[0], "n": {"b": X[0] + k}}) for k in range(3)]
    leaves = leaves_of(lazy_stack(parts))
    assert {key: leaf.shape for key, leaf in leaves.items()} == {
        ("a",): (3, 4),
        ("n", "b"): (3, 4),
    }
    buffer = PrioritizedReplayBuffer(5)
    buffer.extend(lazy_stack(parts))
    assert buffer.transitions["n", "b"][:, 0].tolist() == [0, 1, 2]


def test_leaves_are_named_by_tuples():
    for key in ("x", "state", (), ("x", 1)):
        with pytest.raises(SchemaError, match="expected tuples of names"):
            PrioritizedReplayBuffer(5).extend_leaves({key: X})

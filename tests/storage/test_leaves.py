"""Transitions that are no TensorDict: dicts of tensors by tuples of names."""

import numpy as np
import pytest
import torch

from per_td import PrioritizedReplayBuffer, SchemaError

ONES = torch.ones


def leaves_of_kind(kind: str, lead: tuple[int, ...]):
    x, shape = ("x",), (*lead, 3)
    return {
        "no dict": [ONES(shape)],
        "nothing": None,
        "empty": {},
        "a tensor inside another": {("a",): ONES(shape), ("a", "b"): ONES(shape)},
        "the same, the other way round": {("a", "b", "c"): ONES(shape), ("a",): ONES(shape)},
        "a string for a key": {"obs": ONES(shape)},
        "a letter for a key": {"x": ONES(shape)},
        "a number for a key": {1: ONES(shape)},
        "a number for a name": {(1,): ONES(shape)},
        "no name": {(): ONES(shape)},
        "an array": {x: np.ones(shape)},
        "a list": {x: [1.0, 2.0]},
        "None": {x: None},
        "an array beside a tensor": {x: ONES(shape), ("y",): np.ones(shape)},
        "a number": {x: ONES(())},
        "sparse": {x: ONES(shape).to_sparse()},
        "nested": {x: torch.nested.nested_tensor([ONES(2)] * 3, layout=torch.jagged)},
    }[kind]


EXPECTED = {
    "no dict": "expected a dict of tensors by key, got list",
    "nothing": "expected a dict of tensors by key, got NoneType",
    "empty": "expected at least one tensor",
    "a tensor inside another": r"\('a', 'b'\): expected no tensor at 'a' too",
    "the same, the other way round": r"\('a', 'b', 'c'\): expected no tensor at 'a' too",
    "a string for a key": "keys: expected tuples of names, .* got 'obs'",
    "a letter for a key": "keys: expected tuples of names, .* got 'x'",
    "a number for a key": "keys: expected tuples of names, .* got 1",
    "a number for a name": r"keys: expected tuples of names, .* got \(1,\)",
    "no name": r"keys: expected tuples of names, .* got \(\)",
    "an array": "'x': expected a tensor, got ndarray",
    "a list": "'x': expected a tensor, got list",
    "None": "'x': expected a tensor, got NoneType",
    "an array beside a tensor": "'y': expected a tensor, got ndarray",
    "a number": r"'x': expected shape \[.*n, \.\.\.\], got \[\]",
    "sparse": "'x': expected a dense tensor, got a torch.sparse_coo one",
    "nested": "'x': expected .*, got a nested",
}


@pytest.mark.parametrize("many", [None, 2])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("kind", EXPECTED)
def test_what_are_no_leaves_is_refused_by_name(kind, first, many):
    lead = () if many is None else (many,)
    buffer = PrioritizedReplayBuffer(8, 4, num_buffers=many)
    if not first:
        buffer.extend_leaves({("x",): ONES(*lead, 3)})
    with pytest.raises(SchemaError, match=EXPECTED[kind]):
        buffer.extend_leaves(leaves_of_kind(kind, lead))
    assert buffer.stats()["written"] == (0 if first else 3 * (many or 1))
    assert first == (buffer.transitions is None)


@pytest.mark.parametrize("shape", [(3,), (2,), (5, 3), (3, 2)])
def test_leaves_for_many_buffers_begin_with_a_row_for_each(shape):
    buffers = PrioritizedReplayBuffer(8, 4, num_buffers=2)
    with pytest.raises(SchemaError, match=r"'x': expected shape \[2, .*\], got \["):
        buffers.extend_leaves({("x",): ONES(shape)})
    assert buffers.transitions is None

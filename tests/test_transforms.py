"""Inside of torch.func.grad and vmap, a buffer refuses by name, and nothing is changed."""

import pytest
import torch

from per_td import PerTdError, PrioritizedReplayBuffer, kernels
from tests.support.choices import CHOICES
from tests.support.processes import transitions


def rows(w):
    return transitions(range(3)).update({"w": w})


CALLS = {
    "sample": lambda buffer, v: buffer.sample(),
    "sample_leaves": lambda buffer, v: buffer.sample_leaves(),
    "update": lambda buffer, v: buffer.update_priority(torch.arange(3), v),
    "extend": lambda buffer, v: buffer.extend(rows(v)),
    "priority": lambda buffer, v: buffer.extend(
        transitions(range(3)).update({"w": v.new_zeros(3)}), v
    ),
}
SETTINGS = [
    {},
    {"method": "multinomial"},
    {"prioritization": "rank"},
    {"draw": "without_replacement", "method": "tree"},
    {"layout": "columns", "num_buffers": None},
]


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("transform", ["grad", "vmap"])
@pytest.mark.parametrize("name", CALLS)
def test_calls_inside_of_a_transform_are_refused(name, transform, settings, choice, monkeypatch):
    monkeypatch.setenv(kernels.VARIABLE, choice)
    buffer = PrioritizedReplayBuffer(10, 3, **settings)
    buffer.extend(transitions(range(8)).set("w", torch.ones(8)))
    before = buffer.state_dict()

    def call(v):
        CALLS[name](buffer, v)
        return v.sum()

    if transform == "grad":
        transformed, given = torch.func.grad(call), torch.ones(3)
    else:
        transformed, given = torch.func.vmap(call, randomness="different"), torch.ones(2, 3)
    with pytest.raises(PerTdError, match="expected"):
        transformed(given)
    buffer.check_valid()
    assert torch.equal(buffer.priority, before["priority"])
    assert buffer.write_count == 8
    assert len(buffer.sample()) == 3

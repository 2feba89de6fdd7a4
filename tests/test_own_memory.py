"""Data that are the buffer's own memory, and graphs of autograd that hold it."""

import pytest
import torch
from tensordict import TensorDict

from per_td import PrioritizedReplayBuffer, kernels
from tests.support.choices import CHOICES

LAYOUTS = ("columns", "records")


@pytest.fixture(params=CHOICES)
def choice(request, monkeypatch) -> str:
    monkeypatch.setenv(kernels.VARIABLE, request.param)
    return request.param


@pytest.mark.parametrize("lead", [(), (2,)], ids=["one", "many"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("first", [0, 10, 45])
def test_transitions_written_from_the_buffer_are_those_of_before(first, layout, lead, choice):
    buffer = PrioritizedReplayBuffer(60, 8, layout=layout, num_buffers=lead[0] if lead else None)
    ids = torch.arange(75).expand(*lead, 75)
    buffer.extend(TensorDict({"x": ids.clone(), "y": torch.ones(*lead, 75, 3)}, [*lead, 75]))
    part = buffer.transitions[..., first : first + 15]
    expected = part.clone()
    index = buffer.extend(part)
    found = buffer.transitions.gather(-1, index) if lead else buffer.transitions[index]
    assert torch.equal(found["x"], expected["x"])
    buffer.check_valid()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["extend", "add", "load"])
def test_autograd_notices_a_write_to_rows_that_it_needs(name, layout, choice):
    buffer = PrioritizedReplayBuffer(10, 4, layout=layout)
    data = TensorDict({"x": torch.rand(10), "y": torch.rand(10, 3)}, [10])
    buffer.extend(data)
    state, weight = buffer.state_dict(), torch.ones(10, requires_grad=True)
    graph = (buffer.transitions["x"] * weight).sum()
    calls = {
        "extend": lambda: buffer.extend(data[:2]),
        "add": lambda: buffer.add(data[0]),
        "load": lambda: buffer.load_state_dict(state),
    }
    calls[name]()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        graph.backward()

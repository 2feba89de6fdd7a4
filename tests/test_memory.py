"""Memory that lasts: refusals, and what the caller has set in torch."""

import ast
import pickle
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from tensordict import TensorDict

import per_td
from per_td import (
    AllocationError,
    DiskAllocationError,
    PerTdError,
    PrioritizedReplayBuffer,
    SumTree,
    TransitionReplayBuffer,
    functional,
    memory,
)
from tests.support.oracle import data
from tests.support.parameters import slow_but

HUGE = 2**45
"""Bytes of a row: 1,000 of them are more than 2**47, which is all that can be addressed."""


def huge(*size: int) -> TensorDict:
    """Transitions of so many bytes that take no memory."""
    x = torch.zeros((), dtype=torch.uint8).expand(*size, HUGE)
    return TensorDict({"x": x, "next": {"r": torch.zeros(size)}}, size)


def lead(settings: dict) -> tuple[int, ...]:
    return (2,) if "num_buffers" in settings else ()


def numbered(settings: dict, n: int) -> TensorDict:
    return data(0, n).expand(*lead(settings), n).clone()


def fine(buffer: PrioritizedReplayBuffer, settings: dict) -> None:
    """A buffer that takes whatever comes first."""
    assert buffer.transitions is None
    assert buffer.write_count == 0
    buffer.extend(numbered(settings, 3))
    assert buffer.sample(4).batch_size == (*lead(settings), 4)


KINDS = [
    {},
    {"layout": "records"},
    {"layout": "columns"},
    {"num_buffers": 2},
    {"threads": True},
]


@pytest.mark.parametrize("settings", KINDS)
def test_transitions_that_do_not_fit_in_memory_are_refused_by_name(settings):
    buffer = PrioritizedReplayBuffer(1000, **settings)
    rows = 2001 if "num_buffers" in settings else 1000
    message = (
        rf"^{rows} transitions of 'x', \('next', 'r'\): expected .* GiB"
        rf" \({rows * (HUGE + 4)} bytes\) in all, got '.*'; nothing was written\."
        r" Take files in place of memory \(storage='memmap'\), or a smaller capacity$"
    )
    for write, size in (("extend", (2,)), ("add", ())):
        with pytest.raises(AllocationError, match=message) as caught:
            getattr(buffer, write)(huge(*lead(settings), *size))
        assert isinstance(caught.value, MemoryError)
        assert isinstance(caught.value, PerTdError)
    fine(buffer, settings)


@pytest.mark.parametrize("settings", KINDS)
def test_transitions_that_do_not_fit_on_the_disk_are_refused_by_name(settings, tmp_path):
    where = {"storage": "memmap", "folder": tmp_path}
    for rows in (1000, 10**6):  # the latter are more bytes than a file can have
        buffer = PrioritizedReplayBuffer(rows, **settings, **where)
        message = r"transitions of 'x', .* in all, got .*Take another disk \(folder=\.\.\.\)"
        with pytest.raises(DiskAllocationError, match=message) as caught:
            buffer.extend(huge(*lead(settings), 2))
        assert isinstance(caught.value, OSError)
        assert caught.value.errno is not None
        fine(buffer, settings)


def test_whatever_refuses_memory_the_error_is_ours(monkeypatch):
    for error in (
        MemoryError("no"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory\nmore"),
        torch.OutOfMemoryError("CUDA out of memory"),
        ValueError("Maximum allowed dimension exceeded"),
        torch.AcceleratorError("CUDA error: out of memory"),
    ):
        buffer = PrioritizedReplayBuffer(10)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "zeros", raising(error))
            with pytest.raises(AllocationError, match="storage='memmap'") as caught:
                buffer.extend(data(0, 3))
        assert "more" not in str(caught.value)
        assert caught.value.__cause__ is error
        fine(buffer, {})
    buffer = PrioritizedReplayBuffer(10)
    for error in (torch.AcceleratorError("CUDA error: device-side assert"), PerTdError("other")):
        with monkeypatch.context() as patch:
            patch.setattr(torch, "zeros", raising(error))
            with pytest.raises(type(error), match=str(error)):
                buffer.extend(data(0, 3))
    fine(buffer, {})


def raising(error):
    def refuse(*_, **__):
        raise error

    return refuse


def test_a_course_buffer_that_does_not_fit_takes_another_state():
    buffer = TransitionReplayBuffer(1000)
    large = torch.zeros((), dtype=torch.uint8).expand(HUGE)
    with pytest.raises(AllocationError, match="1000 transitions of 'state', 'action'"):
        buffer.push(large, 1, 1.0, large, False)
    buffer.push([0.0], 1, 1.0, [0.0], False)
    assert len(buffer) == 1


@pytest.mark.parametrize(
    "make",
    [
        lambda n: PrioritizedReplayBuffer(n),
        lambda n: PrioritizedReplayBuffer(n, num_buffers=2),
        lambda n: PrioritizedReplayBuffer(n, prioritization="rank"),
        lambda n: PrioritizedReplayBuffer(n, shared=True, example=data(0, 1)[0]),
        lambda n: TransitionReplayBuffer(n),
        lambda n: SumTree(n),
    ],
)
def test_priorities_that_do_not_fit_are_refused_by_name(make):
    with pytest.raises(
        AllocationError, match=r"(torch.uint8 .* on cpu|shared memory .*): expected .* smaller cap"
    ):
        make(2**47)


def test_who_shares_is_not_sent_to_files():
    example = TensorDict({"x": torch.zeros((), dtype=torch.uint8).expand(HUGE)}, [])
    with pytest.raises(AllocationError, match=r"1000 transitions of .*\. Take a smaller capacity$"):
        PrioritizedReplayBuffer(1000, shared=True, example=example)


def test_shared_memory_that_cannot_be_had_is_named(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "share_memory_", raising(RuntimeError("unable (28)")))
    with pytest.raises(AllocationError, match=r"shared memory .* 'unable \(28\)'"):
        PrioritizedReplayBuffer(10, shared=True, example=data(0, 1)[0])


@pytest.mark.parametrize("settings", [{}, {"num_buffers": 2}])
def test_a_state_that_does_not_fit_changes_nothing(settings, monkeypatch):
    saved = PrioritizedReplayBuffer(10, **settings, generator=torch.Generator().manual_seed(1))
    saved.extend(numbered(settings, 3))
    state = saved.state_dict()
    buffer = PrioritizedReplayBuffer(10, **settings, generator=torch.Generator().manual_seed(2))
    before = buffer.generator.get_state()
    with monkeypatch.context() as patch:
        patch.setattr(memory, "zeros", raising(AllocationError("no")))
        patch.setattr(memory.Memory, "zeros", raising(AllocationError("no")))
        with pytest.raises(AllocationError):
            buffer.load_state_dict(state)
    assert torch.equal(buffer.generator.get_state(), before)
    fine(buffer, settings)
    buffer.load_state_dict(state)
    assert buffer.write_count == saved.write_count


def test_the_errors_can_be_sent_to_other_processes():
    for error in (AllocationError("no"), DiskAllocationError(28, "no")):
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), str(again)) == (type(error), str(error))


SETTINGS = [
    *KINDS,
    {"storage": "memmap"},
    {"prioritization": "rank", "sort_interval": 2},
    {"weight_normalization": "buffer"},
    {"draw": "stratified"},
    {"draw": "without_replacement"},
    {"method": "multinomial"},
    {"num_buffers": 2, "weight_normalization": "buffer", "method": "multinomial"},
    {"shared": True, "example": data(0, 1)[0]},
]


@pytest.mark.parametrize(
    ("settings", "large"),
    slow_but(
        [(SETTINGS[0], True), *((each, False) for each in SETTINGS)],
        product(SETTINGS, [False, True]),
    ),
)
@pytest.mark.parametrize("made_inside", [False, True])
def test_inference_mode_of_the_caller_does_not_outlast_it(settings, made_inside, large):
    capacity = 2**21 if large else 20

    def use():
        buffer.extend(numbered(settings, 5))
        buffer.add(numbered(settings, 1)[..., 0])
        batch = buffer.sample(4)
        buffer.update_priority(batch["index"], torch.ones(batch.shape), batch["generation"])
        buffer.alpha = 0.3 if buffer.alpha == 0.5 else 0.5
        buffer.increase_beta()

    with torch.inference_mode(made_inside):
        buffer = PrioritizedReplayBuffer(capacity, **settings)
    with torch.inference_mode():
        use()
    use()
    assert not buffer.transitions["action"].is_inference()


def test_a_tree_made_in_inference_mode_can_be_written_to_beyond_it():
    with torch.inference_mode():
        tree = SumTree(20)
    tree.update(torch.tensor([1]), torch.tensor([2.0]))
    assert tree.total == 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "settings",
    [
        {"new_priority": "ever_max"},
        {"new_priority": "ever_max", "num_buffers": 2},
        {"prioritization": "rank", "sort_interval": 2},
    ],
)
def test_the_default_dtype_of_the_caller_changes_nothing(dtype, settings):
    drawn = []
    for default in (torch.float32, dtype):
        torch.set_default_dtype(default)
        try:
            generator = torch.Generator().manual_seed(1)
            buffer = PrioritizedReplayBuffer(20, generator=generator, **settings)
            buffer.extend(numbered(settings, 9), priority=np.full((*lead(settings), 9), 0.3))
            batch = buffer.sample(6)
            error = batch["index"].double() + 0.1
            buffer.update_priority(batch["index"], error, batch["generation"])
            buffer.extend(numbered(settings, 2))
            again = buffer.sample(6)
        finally:
            torch.set_default_dtype(torch.float32)
        drawn.append([batch["priority_weight"], again["priority_weight"], buffer.priority])
        drawn[-1] += [batch["index"], again["index"]]
    for a, b in zip(*drawn, strict=True):
        assert a.dtype is b.dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_lists_of_numbers_are_float32_whatever_the_default_dtype(dtype):
    buffer = PrioritizedReplayBuffer(4, eps=0.0)
    torch.set_default_dtype(dtype)
    try:
        buffer.extend({"x": [0, 0.1, 70000.0], "k": [1, 2, 3], "nest": {"y": [[1], [2], [1e-8]]}})
        buffer.set_priority([0, 1], [1, 1e-8])
    finally:
        torch.set_default_dtype(torch.float32)
    transitions = buffer.transitions
    assert transitions["x"].tolist() == np.float32([0, 0.1, 70000.0]).tolist()
    assert transitions["nest", "y"][2].item() == np.float32(1e-8)
    assert transitions["k"].dtype is torch.int64
    assert buffer.priority.tolist() == np.float32([1, 1e-8, 1]).tolist()


def test_tensors_and_numbers_are_taken_from_the_cpu_whatever_the_default_device():
    """A device without values, onto which torch.as_tensor moves all that it is given."""
    buffer = PrioritizedReplayBuffer(8, 4, device="cpu", num_buffers=2)
    cpu = {"device": "cpu"}
    with torch.device("meta"):
        x = torch.arange(4.0, **cpu).view(2, 2)
        buffer.extend({"x": x}, priority=x + 1, mask=torch.ones(2, 2, dtype=torch.bool, **cpu))
        buffer.add({"x": np.float32([5.0, 6.0])}, priority=[7.0, 8.0], mask=[True, False])
        index = torch.zeros(2, 1, dtype=torch.int32, **cpu)
        buffer.update_priority(index, torch.full((2, 1, 1), 3.0, dtype=torch.float64, **cpu))
        drawn, _ = functional.draw(torch.ones(5, dtype=torch.float64, **cpu), 3)
    assert drawn.is_cpu
    priorities = [[3 + 1e-6, 2, 7], [3 + 1e-6, 4, 0]]
    assert buffer.priority[:, :3].tolist() == np.float32(priorities).tolist()


@pytest.mark.parametrize("push", [True, False])
def test_arrays_of_one_row_may_have_any_strides(push):
    """numpy calls them contiguous: the strides of a dimension of size 1 do not matter to it."""
    back = np.ones((1, 3), np.float32)[::-1]
    part = np.ones(1, [("r", "f8"), ("d", "f4")])["r"]
    if push:
        buffer = TransitionReplayBuffer(4)
        buffer.push(back, 0, part, back, False)
        assert buffer.sample(1)[0].tolist() == [[[1.0] * 3]]
        return
    buffer = PrioritizedReplayBuffer(4, 2)
    buffer.extend({"x": back, "r": part})
    buffer.update_priority([0], part[::-1])
    assert buffer.transitions["x"].tolist() == [[1.0] * 3]


_MAKERS = {"arange", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn"}
_MAKERS |= {"as_tensor", "randperm", "scalar_tensor", "tensor", "zeros"}
_OF_THEIR_OWN = {"arange", "as_tensor", "randint", "randperm"}
"""int64 whatever the default dtype, or of the dtype of what is given."""


def careless(source: str) -> list[str]:
    """Calls that make a tensor of torch's default dtype, or on its default device."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Call) and ast.unparse(node.func).startswith("torch.")):
            continue
        name, given = ast.unparse(node.func)[6:], {keyword.arg for keyword in node.keywords}
        needed = {"device"} if name in _OF_THEIR_OWN else {"dtype", "device"}
        if name in _MAKERS and needed - given:
            found.append(ast.unparse(node))
    return found


def test_no_tensor_depends_on_the_default_dtype_or_device():
    assert careless("torch.zeros(3, device=d); torch.arange(2); torch.zeros(2).new_zeros(1)") == [
        "torch.zeros(3, device=d)",
        "torch.arange(2)",
        "torch.zeros(2)",
    ]
    assert not careless("torch.zeros(3, dtype=t, device=d); torch.arange(2, device=d)")
    files = sorted(Path(per_td.__file__).parent.rglob("*.py"))
    assert len(files) > 50
    for file in files:
        assert not careless(file.read_text()), file

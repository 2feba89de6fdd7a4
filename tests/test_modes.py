"""Every public call under other default dtypes and in inference mode does what it always does."""

import contextlib
import copy
import pickle

import pytest
import torch
from tensordict import TensorDict

from per_td import PrioritizedReplayBuffer, SumTree, TransitionReplayBuffer, kernels
from tests.support.choices import CHOICES
from tests.support.parameters import few_of_all


@contextlib.contextmanager
def default(dtype: torch.dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


MODES = {
    "usual": contextlib.nullcontext,
    "float64": lambda: default(torch.float64),
    "bfloat16": lambda: default(torch.bfloat16),
    "inference": torch.inference_mode,
}
SETTINGS = [
    {},
    {"new_priority": "ever_max", "weight_normalization": "buffer"},
    {"prioritization": "rank"},
    {"num_buffers": 2, "new_priority": "ever_max"},
    {"draw": "without_replacement"},
    {"method": "multinomial"},
    {"storage": "memmap"},
]


def transitions(first: int, *shape: int) -> TensorDict:
    x = torch.arange(first, first + shape[-1], dtype=torch.float32).expand(shape)
    return TensorDict({"x": x.clone(), "next": {"done": x % 3 == 0}}, shape)


def steps(settings: dict, path) -> list:
    """What a user may call, each in its turn; what each gives is to be the same in every mode."""
    lead = (2,) if "num_buffers" in settings else ()
    made: dict = {}
    rated, ones = torch.tensor([0.3, 2.0, 7.0], dtype=torch.float32), torch.ones(*lead, 2)
    leaves = {("x",): ones, ("next", "done"): ones > 0}

    def make():
        generator = torch.Generator().manual_seed(3)
        made["b"] = PrioritizedReplayBuffer(10, 4, generator=generator, **settings)

    def update():
        batch = made["b"].sample()
        error = torch.linspace(-2, 2, 4, dtype=torch.float32).expand(*lead, 4)
        made["b"].update_priority(batch["index"], error, batch["generation"])
        batch["td_error"] = error * 2
        made["b"].update_tensordict_priority(batch)
        return batch["index"], batch["priority_weight"], batch["x"]

    def change():
        buffer = made["b"]
        buffer.alpha, buffer.beta, buffer.eps, buffer.beta_increment = 0.3, 0.5, 1e-3, 0.1
        buffer.new_priority, buffer.weight_normalization = "buffer_max", "batch"
        buffer.increase_beta()
        return torch.tensor([buffer.beta, buffer.alpha, buffer.eps], dtype=torch.float64)

    def views():
        buffer = made["b"]
        found = [buffer.priority, buffer.mass, buffer.total_mass, buffer.lengths]
        found += buffer.diagnostics().values()
        if not lead:
            found.append(buffer.replayed)
        return found

    def states():
        buffer = made["b"]
        buffer.save(path)
        buffer.load_state_dict(buffer.state_dict())
        buffer.restore(path)
        made["b"] = copy.deepcopy(PrioritizedReplayBuffer.load(path))
        made["b"] = pickle.loads(pickle.dumps(made["b"]))

    def empty():
        made["b"].empty()
        return made["b"].extend(transitions(50, *lead, 7))

    return [
        make,
        lambda: made["b"].add(transitions(0, *lead, 1)[..., 0]),
        lambda: made["b"].extend(transitions(1, *lead, 8)),
        lambda: made["b"].extend(transitions(9, *lead, 3), rated.expand(*lead, 3).tolist()),
        lambda: made["b"].extend_leaves(leaves),
        update,
        update,
        change,
        lambda: made["b"].sample_leaves()[1:],
        lambda: made["b"].draw_leaves().mass,
        lambda: made["b"].generation_of(torch.arange(4).expand(*lead, 4)),
        views,
        states,
        update,
        empty,
        update,
        views,
        lambda: made["b"].check_valid(),
        lambda: made["b"].transitions["x"].clone(),
    ]


def flat(found) -> list[torch.Tensor]:
    if isinstance(found, torch.Tensor):
        return [found]
    return [leaf for part in found or () for leaf in flat(part)]


def played(settings, path, modes) -> list[torch.Tensor]:
    """The results of all steps, each step in the next mode."""
    out = []
    for k, step in enumerate(steps(settings, path)):
        with modes[k % len(modes)]():
            out += [leaf.clone() for leaf in flat(step())]
    return out


@pytest.mark.parametrize(
    ("mode", "settings", "choice"),
    few_of_all([*list(MODES)[1:], "first", "in turns"], SETTINGS, CHOICES),
    ids=str,
)
def test_every_call_gives_the_same_in_every_mode(mode, settings, choice, tmp_path, monkeypatch):
    monkeypatch.setenv(kernels.VARIABLE, choice)
    expected = played(settings, tmp_path / "usual", [MODES["usual"]])
    order = {
        "first": [MODES["inference"], MODES["inference"], *[MODES["usual"]] * 30],
        "in turns": list(MODES.values()),
    }
    found = played(settings, tmp_path / "mode", order.get(mode) or [MODES[mode]])
    assert len(found) == len(expected) > 20
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.allclose(one, other, rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("mode", list(MODES)[1:])
def test_the_courses_buffer_and_trees_work_in_every_mode(mode, choice, monkeypatch):
    monkeypatch.setenv(kernels.VARIABLE, choice)
    with MODES[mode]():
        course, tree = TransitionReplayBuffer(4), SumTree(10)
        for i in range(6):
            course.push([float(i), 0.3], i % 2, 0.5, [0.0, 1.0], False)
        *_, index, weight = course.sample(3)
        tree.update(torch.arange(5), [1.0, 2.0, 3.0, 4.0, 5.0])
    course.update_priorities(index, torch.ones(3, dtype=torch.float32))
    course.alpha = 0.0
    course.push([0.0, 0.3], 0, 0.5, [0.0, 1.0], True)
    states = course.sample(3)[0]
    assert states.dtype == weight.dtype == torch.float32
    assert (states[:, 1] == torch.tensor(0.3, dtype=torch.float32)).all()
    course.buffer.check_valid()
    tree.update([2], [7.0])
    assert float(tree.total) == 1 + 2 + 7 + 4 + 5
    tree.check_valid()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda made: pickle.loads(pickle.dumps(made))])
def test_a_copy_made_in_inference_mode_can_be_changed_outside_of_it(copied):
    buffer = PrioritizedReplayBuffer(10, 4)
    buffer.extend(transitions(0, 6))
    with torch.inference_mode():
        other = copied(buffer)
    other.extend(transitions(6, 9))
    other.update_priority([1, 2], [3.0, 4.0])
    other.alpha = 0.1
    other.increase_beta()
    other.check_valid()

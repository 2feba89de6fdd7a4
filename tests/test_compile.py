"""`sample` and `update_priority` under torch.compile, as one graph each."""

import math
from itertools import product

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from per_td import LinearSchedule, PrioritizedReplayBuffer
from per_td.weights import importance_weights
from tests.support.oracle import assert_drawn_from, data
from tests.support.parameters import slow_but

DRAWS = ("independent", "stratified", "without_replacement")


@pytest.fixture(autouse=True)
def _forget_what_was_compiled():
    torch._dynamo.reset()


def filled(n=40, capacity=50, device="cpu", **settings) -> PrioritizedReplayBuffer:
    buffer = PrioritizedReplayBuffer(capacity, device=device, **settings)
    buffer.extend(data(0, n, device), torch.linspace(0, 2, n, device=device))
    return buffer


def weights(buffer, index) -> torch.Tensor:
    """Those of the slots, by the formula."""
    return importance_weights(
        buffer.mass[index],
        buffer.beta,
        total=buffer.total_mass,
        size=len(buffer),
        smallest=buffer.smallest_mass,
        normalization=buffer.weight_normalization,
    )


def whole(function, backend="eager"):
    return torch.compile(function, fullgraph=True, backend=backend)


USUAL = [
    ("tree", "independent", "batch"),
    ("tree", "stratified", "buffer"),
    ("tree", "without_replacement", "none"),
    ("auto", "independent", "buffer"),
    ("auto", "without_replacement", "batch"),
]


@pytest.mark.parametrize(
    ("method", "draw", "normalization"),
    slow_but(USUAL, product(["tree", "auto"], DRAWS, ["batch", "buffer", "none"])),
)
def test_sampling_is_one_graph_and_batches_are_what_they_are_without(draw, normalization, method):
    buffer = filled(draw=draw, weight_normalization=normalization, method=method)
    batch = whole(buffer.sample)(16)
    index = batch["index"]
    expected = data(0, 40)[index]
    for key in ("observation", "action", ("next", "reward")):
        assert torch.equal(batch[key], expected[key])
    weight = weights(buffer, index)
    torch.testing.assert_close(batch["priority_weight"], weight)
    assert batch["generation"].tolist() == [0] * 16
    assert (buffer.priority[index] > 0).all()
    if draw == "without_replacement":
        assert len(index.unique()) == 16


@pytest.mark.parametrize("draw", ["independent", "stratified"])
def test_compiled_draws_follow_the_priorities(draw):
    buffer = filled(draw=draw)
    mass = buffer.priority.double() ** buffer.alpha
    index = whole(buffer.sample)(20_000)["index"]
    assert_drawn_from(index, mass / mass.sum())


@pytest.mark.parametrize(
    ("capacity", "normalization"),
    slow_but(
        [(1, "batch"), (17, "buffer"), (300, "batch")],
        product([1, 17, 50, 300], ["batch", "buffer"]),
    ),
)
def test_updating_is_one_graph_and_leaves_what_it_leaves_without(capacity, normalization):
    plain, compiled = (
        filled(2 * capacity, capacity, weight_normalization=normalization) for _ in range(2)
    )
    update = whole(compiled.update_priority, "aot_eager")
    for _ in range(5):
        index, td_error = torch.randint(capacity, (64,)), torch.randn(64)
        generation = torch.randint(3, (64,))
        plain.update_priority(index, td_error, generation)
        update(index, td_error, generation)
        torch.testing.assert_close(compiled.priority, plain.priority, rtol=1e-6, atol=0)
        torch.testing.assert_close(compiled.total_mass, plain.total_mass, rtol=1e-6, atol=0)
        assert compiled.stats() == plain.stats()


def test_compiled_updates_refuse_and_count_what_would_raise_without():
    buffer = filled()
    before = buffer.priority
    index = torch.tensor([1, 2, 45, -1, 3])
    whole(buffer.update_priority)(index, torch.tensor([math.nan, math.inf, 1.0, 1.0, 5.0]))
    after = buffer.priority
    assert after[3].item() == pytest.approx(5)
    before[3] = after[3]
    assert torch.equal(after, before)
    assert buffer.stats()["refused_priorities"] == 4


def test_what_changes_between_two_calls_is_not_compiled_in():
    buffer = filled()
    sample, update = whole(buffer.sample), whole(buffer.update_priority)
    sample(16)
    buffer.extend(data(40, 10))  # fills the last slots and
    buffer.extend(data(50, 5))  # overwrites the first
    buffer.beta = 1.0
    buffer.alpha = 1.0
    update(torch.tensor([4, 49]), torch.tensor([1e6, 1e6]), torch.tensor([0, 0]))
    batch = sample(16)
    assert set(batch["index"].tolist()) == {49}
    assert buffer.stats()["stale_updates"] == 1
    weight = weights(buffer, batch["index"])
    torch.testing.assert_close(batch["priority_weight"], weight)


def test_a_growing_buffer_is_compiled_twice_and_not_for_ever():
    buffer, count = filled(10, capacity=100), CompileCounter()
    sample, update = whole(buffer.sample, count), whole(buffer.update_priority, count)
    for k in range(10):
        batch = sample(8)
        update(batch["index"], torch.rand(8), batch["generation"])
        buffer.extend(data(k, 25))
    assert count.frame_count <= 4


def test_a_generator_costs_the_single_graph_and_is_drawn_from():
    drawn = []
    for compile_it in (True, False, True):
        torch._dynamo.reset()
        buffer = filled(generator=torch.Generator().manual_seed(3))
        sample = torch.compile(buffer.sample, backend="eager") if compile_it else buffer.sample
        drawn.append(sample(16)["index"].tolist())
    assert drawn[0] == drawn[2]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's own
def test_a_compiled_step_learns_the_priorities_of_a_plain_one(device):
    """With the compiler's own kernels, as users run it."""
    buffer = filled(1000, 1000, device=device)

    def step():
        batch = buffer.sample(64)
        buffer.update_priority(batch["index"], batch["action"] / 100, batch["generation"])
        return batch["index"]

    compiled = torch.compile(step, fullgraph=True)
    drawn = torch.cat([compiled() for _ in range(30)]).unique().cpu()
    expected = torch.linspace(0, 2, 1000)
    expected[drawn] = drawn / 100 + buffer.eps
    torch.testing.assert_close(buffer.priority.cpu(), expected, rtol=1e-6, atol=0)


KNOBS = [
    {},
    {"uniform_mix": 0.4},
    {"latest": 3},
    {"latest": 3, "uniform_mix": 0.4, "track_draws": True},
    {"draw": "stratified", "latest": 3},
]
UNIFORM, INVERSE = {"by": "uniform"}, {"by": "inverse", "newest": 9}
USUAL = [(KNOBS[0], INVERSE), (KNOBS[1], {}), (KNOBS[2], UNIFORM), (KNOBS[3], {})]
USUAL += [(KNOBS[4], INVERSE)]


@pytest.mark.parametrize("normalization", slow_but(["buffer"], ["batch", "buffer", "none"]))
@pytest.mark.parametrize(
    ("knobs", "how"), slow_but(USUAL, list(product(KNOBS, ({}, UNIFORM, INVERSE)))[1:]), ids=str
)
def test_other_ways_to_draw_are_one_graph_and_weigh_as_without(
    knobs, how, normalization, monkeypatch
):
    def finer(template, _generator):
        """Take as many random numbers as compiled code does, and make the same of them."""
        return (torch.rand_like(template).mul(2**20).floor() + torch.rand_like(template)) / 2**20

    for place in ("per_td.draws", "per_td.priorities.selection"):
        monkeypatch.setattr(f"{place}.uniform_like", finer)
    plain, compiled = (filled(weight_normalization=normalization, **knobs) for _ in range(2))
    for buffer in (plain, compiled):
        torch.manual_seed(1)
        buffer.sample(4, by=how.get("by", "priority"))  # makes trees on the side
    sample = whole(compiled.sample)
    for _ in range(3):
        torch.manual_seed(3)
        one = plain.sample(16, **how)
        torch.manual_seed(3)
        two = sample(16, **how)
        assert torch.equal(one["index"], two["index"])
        torch.testing.assert_close(one["priority_weight"], two["priority_weight"])
        assert one.get("draw_count", one["index"]).equal(two.get("draw_count", two["index"]))
        for buffer in (plain, compiled):
            buffer.update_priority(one["index"], one["action"], one["generation"])
            buffer.extend(data(7, 3))
    compiled.check_valid()


@pytest.mark.parametrize("by", slow_but(["inverse"], ["uniform", "inverse"]))
def test_the_first_draw_of_its_kind_may_be_compiled(by):
    buffer = filled()
    batch = torch.compile(buffer.sample, backend="eager")(16, by=by)
    assert (buffer.priority[batch["index"]] > 0).all()
    torch._dynamo.reset()
    buffer.update_priority(batch["index"], torch.rand(16))
    buffer.check_valid()
    assert len(whole(buffer.sample)(16, by=by)) == 16


WAYS = [{}, {"mode": "max", "rate": 0.5}, {"mode": "mean", "rate": 0.1}, None]
CLIP = (0.5, 2.0)


@pytest.mark.parametrize(
    ("given", "clip", "mix"),
    slow_but(
        [(WAYS[0], CLIP, 0.5), (WAYS[1], None, 0.5), (WAYS[2], CLIP, 0.0), (None, CLIP, 0.0)],
        product(WAYS, (None, CLIP), (0.0, 0.5)),
    ),
    ids=str,
)
def test_every_way_to_set_priorities_is_one_graph_and_ends_as_without(given, clip, mix):
    settings = {"priority_clip": clip, "uniform_mix": mix}
    schedule = LinearSchedule(0.4, 1.0, 3)
    plain, compiled = (filled(beta_schedule=schedule, **settings) for _ in range(2))
    name = "set_priority" if given is None else "update_priority"
    update = whole(getattr(compiled, name))
    for _ in range(4):
        index, value = torch.randint(40, (16,)), torch.rand(16)
        generation = torch.zeros(16, dtype=torch.int64)
        getattr(plain, name)(index, value, generation, **(given or {}))
        update(index, value, generation, **(given or {}))
        torch.testing.assert_close(compiled.priority, plain.priority, rtol=1e-6, atol=0)
        assert compiled.beta == pytest.approx(plain.beta)
        compiled.check_valid()
    assert plain.beta == (0.4 if given is None else 1.0)


def test_what_float32_cannot_hold_is_refused_and_counted_in_compiled_ways_to_set_priorities():
    buffer = filled()
    before = buffer.priority
    index = torch.tensor([1, 2, 45, -1, 3])
    value = torch.tensor([math.nan, math.inf, 1.0, 1.0, 5.0])
    whole(buffer.set_priority)(index, value)
    whole(buffer.update_priority)(index, value, mode="max", rate=0.0)
    whole(buffer.set_priority)(index[:1], torch.tensor([-1.0]))
    before[3] = 5.0
    torch.testing.assert_close(buffer.priority, before, rtol=1e-6, atol=0)
    assert buffer.stats()["refused_priorities"] == 9


def test_a_setting_changed_between_two_calls_takes_effect_in_compiled_draws():
    buffer = filled(uniform_mix=0.5, latest=2)
    sample = whole(buffer.sample)
    sample(16)
    buffer.set_priority(torch.arange(40), (torch.arange(40) == 7).float() * 1e6 + 1e-6)
    buffer.latest = 3
    assert sample(16)["index"][-3:].tolist() == [37, 38, 39]
    buffer.uniform_mix, buffer.latest, buffer.alpha = 0.0, 0, 1.0
    assert set(sample(16)["index"].tolist()) == {7}
    buffer.uniform_mix = 1.0
    assert len(sample(500)["index"].unique()) == 40

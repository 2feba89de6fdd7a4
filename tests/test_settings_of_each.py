"""Many buffers in lockstep whose alpha and beta differ, beside as many separate ones."""

import copy
import math
import pickle
from itertools import product

import numpy as np
import pytest
import torch

from per_td import (
    CheckpointError,
    ConfigurationError,
    PrioritizedReplayBuffer,
    TransitionReplayBuffer,
)
from per_td.priorities.table import PriorityTable
from tests.support.oracle import assert_drawn_from, data, numbered
from tests.support.parameters import few_of_all, slow_but
from tests.support.processes import handed_over, shared, transitions

ALPHAS, BETAS = (0.9, 0.0, 0.37), (0.4, 1.0, 0.83)
DRAWS = ("independent", "stratified", "without_replacement")
WAYS = [(draw, method) for draw in DRAWS for method in ("tree", "multinomial")]
WAYS.remove(("stratified", "multinomial"))
COUNTS = (1, 3)


def each(numbers, count=3) -> torch.Tensor:
    return torch.tensor(numbers[:count], dtype=torch.float64)


def filled(count=3, capacity=40, *, device="cpu", **settings) -> PrioritizedReplayBuffer:
    """Buffers of 40 transitions with priorities of many sizes, one of which is 0."""
    given = {"alpha": each(ALPHAS, count), "beta": each(BETAS, count), "eps": 0.01} | settings
    buffer = PrioritizedReplayBuffer(capacity, 8, num_buffers=count, device=device, **given)
    random = torch.Generator().manual_seed(1)
    priority = torch.randn(count, 40, generator=random).mul(1.5).exp()
    priority[:, 5] = 0.0
    buffer.extend(numbered(0, 40, device, count), priority)
    return buffer


def probabilities(buffer, s) -> torch.Tensor:
    """By the closed form, in float64."""
    priority = buffer.priority[s].cpu().double()
    mass = torch.where(priority > 0, priority ** ALPHAS[s], 0.0)
    return mass / mass.sum()


def separate(count, capacity=40, device="cpu", **settings) -> list[PrioritizedReplayBuffer]:
    """One buffer for each alpha and beta."""
    return [
        PrioritizedReplayBuffer(
            capacity, 8, alpha=ALPHAS[s], beta=BETAS[s], eps=0.01, device=device, **settings
        )
        for s in range(count)
    ]


def agree(many, singles) -> None:
    many.check_valid()
    for s, single in enumerate(singles):
        n = len(single)
        assert torch.equal(many.priority[s, :n], single.priority)
        torch.testing.assert_close(many.mass[s, :n], single.mass, rtol=2e-7, atol=0)
        torch.testing.assert_close(many.total_mass[s], single.total_mass, rtol=1e-6, atol=0)


# --- draws, weights and updates -------------------------------------------------------------------


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize(("draw", "method"), [way for way in WAYS if way[0] != DRAWS[2]])
def test_draws_follow_the_alpha_of_each_buffer(draw, method, count, choice, device, generator):
    buffer = filled(count, draw=draw, method=method, device=device, generator=generator)
    index = buffer.sample(20_000)["index"]
    for s in range(count):
        assert_drawn_from(index[s], probabilities(buffer, s))


def test_first_draws_without_replacement_follow_the_alpha_of_each_buffer(choice):
    buffer = filled(draw=DRAWS[2], method="tree", generator=torch.Generator().manual_seed(5))
    index = torch.stack([buffer.sample(3)["index"][:, 0] for _ in range(4000)], 1)
    for s in range(3):
        assert_drawn_from(index[s], probabilities(buffer, s))


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("normalization", ["batch", "buffer", "none"])
@pytest.mark.parametrize(("draw", "method"), WAYS)
def test_weights_are_those_of_the_formula_with_each_beta(
    draw, method, normalization, count, choice, device
):
    buffer = filled(
        count, draw=draw, method=method, weight_normalization=normalization, device=device
    )
    batch = buffer.sample(25)
    for s in range(count):
        probability = probabilities(buffer, s)
        drawn = probability[batch["index"][s].cpu()]
        least = {"batch": drawn.min(), "buffer": probability[probability > 0].min(), "none": 1 / 40}
        expected = (drawn / least[normalization]) ** -BETAS[s]
        weight = batch["priority_weight"][s].cpu()
        torch.testing.assert_close(weight.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("normalization", ["batch", "buffer", "none"])
@pytest.mark.parametrize("draw", DRAWS[:2])
def test_weights_are_those_of_separate_buffers_with_these_settings(draw, normalization, choice):
    settings = {"draw": draw, "method": "tree", "weight_normalization": normalization}
    many, singles = filled(**settings), separate(3, **settings)
    many.generator = torch.Generator().manual_seed(2)
    batch = many.sample(16)
    points = torch.rand(3, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for s, single in enumerate(singles):
        single.extend(data(0, 40), many.priority[s])
        table = single._priorities
        index, weight = table.trees.ops.draw(
            table.trees,
            points[s].clone(),
            stratified=draw == "stratified",
            beta=single.beta,
            normalization=normalization,
            written=40,
        )
        assert torch.equal(batch["index"][s], index)
        torch.testing.assert_close(batch["priority_weight"][s], weight, rtol=1e-6, atol=0)


@pytest.mark.parametrize("new_priority", ["buffer_max", "ever_max"])
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("capacity", slow_but([1, 17], [1, 7, 17, 50, 257]))
def test_masses_are_those_of_separate_buffers_whatever_is_written(
    capacity, count, new_priority, choice, device
):
    settings = {"new_priority": new_priority, "weight_normalization": "buffer"}
    singles = separate(count, capacity, device, **settings)
    many = PrioritizedReplayBuffer(
        capacity,
        num_buffers=count,
        alpha=each(ALPHAS, count),
        eps=0.01,
        device=device,
        **settings,
    )
    random = torch.Generator().manual_seed(capacity)
    for step in range(12):
        n = int(torch.randint(1, capacity + 3, (), generator=random))
        priority = torch.rand(count, n, generator=random) if step % 3 == 0 else None
        mask = torch.rand(count, n, generator=random) < 0.7 if step % 3 == 1 else None
        many.extend(numbered(0, n, device, count), priority, mask)
        for s, single in enumerate(singles):
            wanted = slice(None) if mask is None else mask[s].nonzero().flatten()
            rows = numbered(0, n, device, count)[s][wanted]
            if len(rows):
                single.extend(rows, None if priority is None else priority[s])
        agree(many, singles)
        if not len(many):
            continue
        index = torch.stack([torch.randint(len(one), (9,), generator=random) for one in singles])
        td_error = torch.randn(count, 9, generator=random)
        mask = torch.rand(count, 9, generator=random) < 0.7 if step % 2 else None
        many.update_priority(index, td_error, mask=mask)
        for s, single in enumerate(singles):
            wanted = slice(None) if mask is None else mask[s]
            single.update_priority(index[s][wanted], td_error[s][wanted])
        agree(many, singles)


# --- to set and to read ---------------------------------------------------------------------------


@pytest.mark.parametrize("count", COUNTS)
def test_set_later_they_hold_as_if_the_buffers_had_been_made_with_them(count, choice, device):
    made, changed = filled(count, device=device), filled(count, alpha=0.6, beta=0.5, device=device)
    assert (changed.alpha, changed.beta) == (0.6, 0.5)
    changed.alpha, changed.beta = each(ALPHAS, count), list(BETAS[:count])
    for buffer in (made, changed):
        assert buffer.alpha.tolist() == list(ALPHAS[:count])
        assert buffer.beta.tolist() == list(BETAS[:count])
        assert buffer.alpha.dtype == buffer.beta.dtype == torch.float64
        assert buffer.alpha.device == buffer.beta.device == buffer.device
        buffer.generator = torch.Generator(device).manual_seed(3)
        buffer.check_valid()
    assert torch.equal(made.mass, changed.mass)
    assert (made.sample() == changed.sample()).all()


@pytest.mark.parametrize("count", COUNTS)
def test_a_number_set_later_is_one_number_for_all_again(count, choice, device):
    buffer, plain = filled(count, device=device), filled(count, alpha=0.5, beta=0.25, device=device)
    buffer.alpha = buffer.beta = 0.75
    assert (buffer.alpha, buffer.beta) == (0.75, 0.75)
    buffer.alpha, buffer.beta = each(ALPHAS, count), each(BETAS, count)
    buffer.alpha, buffer.beta = 0.5, torch.tensor(0.25)
    assert (type(buffer.alpha), type(buffer.beta)) == (float, float)
    assert (buffer.alpha, buffer.beta) == (0.5, 0.25)
    assert torch.equal(buffer.mass, plain.mass)
    for one in (buffer, plain):
        one.generator = torch.Generator(device).manual_seed(3)
        one.check_valid()
    batch, expected = buffer.sample(), plain.sample()
    assert torch.equal(batch["index"], expected["index"])
    assert torch.equal(batch["priority_weight"], expected["priority_weight"])


def test_what_is_read_is_a_copy_and_what_was_given_is_not_kept(choice):
    alpha, beta = each(ALPHAS), each(BETAS)
    buffer = filled(alpha=alpha, beta=beta)
    before = buffer.mass
    for one in (alpha, beta, buffer.alpha, buffer.beta):
        one.fill_(0.5)
    assert (buffer.alpha.tolist(), buffer.beta.tolist()) == (list(ALPHAS), list(BETAS))
    assert torch.equal(buffer.mass, before)
    buffer.check_valid()


@pytest.mark.parametrize(
    "given",
    [list, tuple, np.array, torch.tensor, lambda numbers: np.array(numbers, np.float32)],
    ids=["list", "tuple", "array", "tensor", "float32"],
)
def test_they_may_be_numbers_of_every_kind(given):
    numbers = [0.25, 1, 0.5]
    buffer = PrioritizedReplayBuffer(5, num_buffers=3, alpha=given(numbers), beta=given(numbers))
    assert buffer.alpha.tolist() == buffer.beta.tolist() == numbers
    buffer.alpha = buffer.beta = given(numbers[::-1])
    assert buffer.alpha.tolist() == buffer.beta.tolist() == numbers[::-1]


def test_a_float_in_a_list_keeps_all_its_digits():
    buffer = PrioritizedReplayBuffer(5, num_buffers=2, alpha=[0.1, 0.7], beta=[0.1, 0.7])
    assert buffer.alpha.tolist() == buffer.beta.tolist() == [0.1, 0.7]


def test_each_beta_grows_by_the_increment_up_to_one():
    buffer = filled(beta=[0.25, 1.0, 0.875], beta_increment=0.25)
    buffer.increase_beta()
    assert buffer.beta.tolist() == [0.5, 1.0, 1.0]
    assert buffer.beta_increment == 0.25
    buffer.beta = 0.5
    buffer.increase_beta()
    assert buffer.beta == 0.75


def test_repr_names_a_few_of_them():
    assert "alpha=[0.9, 0, 0.37], beta=[0.4, 1, 0.83], eps" in repr(filled())
    many = PrioritizedReplayBuffer(5, num_buffers=6, beta=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    assert "alpha=0.6, beta=[0.1, 0.2, ..., 0.6], eps" in repr(many)


def test_other_settings_change_while_each_has_its_own_alpha(choice):
    buffer = filled()
    buffer.weight_normalization, buffer.new_priority, buffer.eps = "buffer", "ever_max", 0.5
    buffer.draw, buffer.batch_size = "stratified", 3
    assert buffer.alpha.tolist() == list(ALPHAS)
    buffer.check_valid()
    assert buffer.sample().shape == (3, 3)


def test_emptied_buffers_keep_them(choice):
    buffer = filled()
    buffer.empty()
    assert (buffer.alpha.tolist(), buffer.beta.tolist()) == (list(ALPHAS), list(BETAS))
    buffer.extend(numbered(0, 3), torch.full((3, 3), 2.0))
    torch.testing.assert_close(buffer.mass[:, 0], (2.0 ** each(ALPHAS)).float())


# --- what is refused ------------------------------------------------------------------------------

WRONG = {
    "too few": [0.5, 0.5],
    "too many": torch.full((4,), 0.5),
    "one": torch.tensor([0.5]),
    "none": [],
    "a table": torch.full((3, 1), 0.5),
    "NaN": torch.tensor([0.5, math.nan, 0.5]),
    "infinite": [0.5, math.inf, 0.5],
    "negative": [0.5, 0.5, -0.1],
    "complex": torch.full((3,), 0.5j),
    "words": ["a", "b", "c"],
    "digits": ["0.5", "0.5", "0.5"],
    "nothing": [None, None, None],
    "without values": torch.empty(3, device="meta"),
    "a set": {0.1, 0.2, 0.3},
}


@pytest.mark.parametrize("old", ["one", "each"])
@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("name", ["alpha", "beta"])
def test_wrong_ones_are_refused_by_name_and_change_nothing(name, wrong, old):
    with pytest.raises(ConfigurationError, match=rf"^{name}: expected"):
        PrioritizedReplayBuffer(5, num_buffers=3, **{name: WRONG[wrong]})
    buffer = filled(**({} if old == "each" else {"alpha": 0.6, "beta": 0.4}))
    before, mass = repr(buffer), buffer.mass
    with pytest.raises(ConfigurationError, match=rf"^{name}: expected"):
        setattr(buffer, name, WRONG[wrong])
    assert repr(buffer) == before
    assert torch.equal(buffer.mass, mass)
    buffer.check_valid()


def test_a_beta_above_one_is_refused_and_a_wrong_length_says_how_many():
    buffer = filled()
    with pytest.raises(ConfigurationError, match=r"beta: expected .* \[0, 1\], got 1.5"):
        buffer.beta = [0.5, 1.5, 0.5]
    assert buffer.beta.tolist() == list(BETAS)
    with pytest.raises(ConfigurationError, match="or 3, one for each buffer, got 2"):
        buffer.alpha = [0.5, 0.5]


@pytest.mark.parametrize("value", [each(ALPHAS), [0.5, 0.5], (0.5,), np.array([0.5, 0.5])])
@pytest.mark.parametrize("name", ["alpha", "beta"])
@pytest.mark.parametrize("made", [PrioritizedReplayBuffer, TransitionReplayBuffer])
def test_one_buffer_takes_one_number(made, name, value):
    with pytest.raises(ConfigurationError, match=rf"^{name}: expected a finite number"):
        made(5, **{name: value})
    buffer = made(5)
    before = getattr(buffer, name)
    with pytest.raises(ConfigurationError, match=rf"^{name}: expected a finite number"):
        setattr(buffer, name, value)
    assert getattr(buffer, name) == before


def test_an_alpha_whose_masses_cannot_be_made_is_taken_back(monkeypatch, choice):
    for new in (each(ALPHAS[::-1]), 0.5):
        for old in (each(ALPHAS), 0.25):
            buffer = filled(alpha=old)
            before, refill, failed = repr(buffer), PriorityTable._refill, []

            def once(table, mass=None, failed=failed, refill=refill):
                if not failed:
                    failed.append(True)
                    raise MemoryError
                refill(table, mass)

            monkeypatch.setattr(PriorityTable, "_refill", once)
            with pytest.raises(MemoryError):
                buffer.alpha = new
            monkeypatch.undo()
            assert repr(buffer) == before
            buffer.check_valid()


# --- copies, files and processes ------------------------------------------------------------------


def same(one, other) -> None:
    for name in ("alpha", "beta"):
        mine, others = getattr(one, name), getattr(other, name)
        assert type(mine) is type(others)
        assert torch.equal(torch.as_tensor(mine), torch.as_tensor(others))
    assert torch.equal(one.priority, other.priority)
    assert torch.equal(one.mass, other.mass)
    for buffer in (one, other):
        buffer.check_valid()
        buffer.generator = torch.Generator().manual_seed(9)
    assert (one.sample(20) == other.sample(20)).all()


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("draw", DRAWS)
def test_saved_buffers_come_back_with_them(draw, count, choice, tmp_path):
    buffer = filled(count, draw=draw, generator=torch.Generator().manual_seed(3))
    buffer.sample()
    buffer.save(tmp_path / "buffer.per_td")
    loaded = PrioritizedReplayBuffer.load(tmp_path / "buffer.per_td")
    assert (buffer.sample() == loaded.sample()).all()
    same(buffer, loaded)
    torch.save(buffer.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    other = PrioritizedReplayBuffer(40, num_buffers=count, draw=draw)
    other.load_state_dict(state)
    same(buffer, other)


@pytest.mark.parametrize(("alpha", "beta"), [*product([0.5, each(ALPHAS)], [0.25, each(BETAS)])])
def test_a_state_brings_one_or_each_whatever_there_was(alpha, beta, choice):
    buffer = filled(alpha=alpha, beta=beta)
    state = buffer.state_dict()
    for other in (filled(), filled(alpha=0.9, beta=0.9)):
        other.load_state_dict(state)
        same(buffer, other)


def test_a_state_is_a_snapshot(choice):
    buffer = filled()
    state = buffer.state_dict()
    buffer.alpha, buffer.beta = [0.5] * 3, [0.5] * 3
    other = filled(alpha=0.5, beta=0.5)
    other.load_state_dict(state)
    assert (other.alpha.tolist(), other.beta.tolist()) == (list(ALPHAS), list(BETAS))


@pytest.mark.parametrize("capacity", [7, 100])
def test_a_state_keeps_them_in_another_capacity(capacity, choice):
    state, other = filled().state_dict(), PrioritizedReplayBuffer(capacity, num_buffers=3)
    other.load_state_dict(state)
    assert (other.alpha.tolist(), other.beta.tolist()) == (list(ALPHAS), list(BETAS))
    expected = other.priority.double() ** each(ALPHAS).unsqueeze(-1)
    expected = torch.where(other.priority > 0, expected, 0.0).float()
    torch.testing.assert_close(other.mass, expected, rtol=2e-7, atol=0)
    other.check_valid()


@pytest.mark.parametrize("part", ["alpha", "beta"])
@pytest.mark.parametrize("wrong", WRONG)
def test_a_state_with_wrong_ones_is_refused_whole(wrong, part):
    buffer = filled()
    state, before = buffer.state_dict(), repr(buffer)
    value = WRONG[wrong]
    if part == "alpha":
        state["settings"] = state["settings"] | {"alpha": value}
    else:
        state["beta"] = value
    with pytest.raises(CheckpointError, match=part):
        buffer.load_state_dict(state)
    assert repr(buffer) == before
    buffer.check_valid()


def test_a_state_of_one_buffer_with_one_for_each_is_refused():
    buffer = PrioritizedReplayBuffer(5)
    state = buffer.state_dict()
    for changed in ({"beta": each(BETAS)}, {"settings": state["settings"] | {"alpha": ALPHAS}}):
        with pytest.raises(CheckpointError, match=r"alpha|beta"):
            buffer.load_state_dict(state | changed)


def test_copies_have_them_on_their_own(choice):
    buffer = filled()
    for other in (copy.deepcopy(buffer), pickle.loads(pickle.dumps(buffer))):
        same(buffer, other)
        other.alpha, other.beta = 0.5, [0.1, 0.2, 0.3]
        assert (buffer.alpha.tolist(), buffer.beta.tolist()) == (list(ALPHAS), list(BETAS))
        buffer.check_valid()


def test_batches_drawn_ahead_are_of_each_alpha():
    buffer = filled(prefetch=2)
    assert buffer.sample().shape == (3, 8)
    buffer.alpha = each(ALPHAS[::-1])
    assert buffer.sample().shape == (3, 8)
    buffer.check_valid()
    buffer.close()


def shared_many(**settings) -> PrioritizedReplayBuffer:
    buffer = shared(20, num_buffers=3, **settings)
    td = transitions(range(20))
    priority = torch.linspace(1, 3, 20).expand(3, 20)
    buffer.extend(td.expand(3, 20).clone(), priority)
    return buffer


@pytest.mark.parametrize("choice", ["auto"], indirect=True)
def test_processes_that_share_buffers_see_what_one_of_them_sets(choice):
    buffer = shared_many(alpha=each(ALPHAS), beta=each(BETAS))
    other = handed_over(buffer)
    same(buffer, other)
    buffer.alpha, buffer.beta = 0.5, 0.25
    assert (other.alpha, other.beta) == (0.5, 0.25)
    other.alpha, other.beta = each(ALPHAS[::-1]), each(BETAS[::-1])
    assert buffer.alpha.tolist() == list(ALPHAS[::-1])
    assert buffer.beta.tolist() == list(BETAS[::-1])
    same(buffer, other)
    index = torch.zeros(3, 1, dtype=torch.int64)
    buffer.update_priority(index, torch.full((3, 1), 4.0), index)
    torch.testing.assert_close(other.mass[:, 0], (4.0 ** each(ALPHAS[::-1])).float())


# --- torch.compile --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("normalization", "count"), few_of_all(["batch", "buffer", "none"], COUNTS)
)
def test_compiled_draws_and_updates_follow_each_setting_and_its_changes(normalization, count):
    torch._dynamo.reset()
    buffer = filled(count, method="tree", weight_normalization=normalization)
    sample, update = (
        torch.compile(call, fullgraph=True, backend="eager")
        for call in (buffer.sample, buffer.update_priority)
    )
    for alpha, beta in ((ALPHAS, BETAS), (ALPHAS[::-1], BETAS[::-1])):
        buffer.alpha, buffer.beta = each(alpha, count), each(beta, count)
        batch = sample(200)
        for s in range(count):
            mass = buffer.mass[s].double()
            drawn, index = mass[batch["index"][s]], batch["index"][s]
            assert (drawn > 0).all()
            least = {
                "batch": drawn.min(),
                "buffer": mass[mass > 0].min(),
                "none": buffer.total_mass[s] / 40,
            }
            expected = (drawn / least[normalization]) ** -beta[s]
            weight = batch["priority_weight"][s].double()
            torch.testing.assert_close(weight, expected, rtol=1e-5, atol=0)
            assert index.unique().numel() > 3
        update(torch.zeros(count, 1).long(), torch.full((count, 1), 7.99))
        torch.testing.assert_close(buffer.mass[:, 0], (8.0 ** each(alpha, count)).float())
        buffer.check_valid()

import copy
import math

import pytest
import torch

from per_td import ConfigurationError, EmptyBufferError, IndexRangeError, PriorityError, kernels
from per_td.priorities import kernel_calls as priority_kernels
from per_td.priorities.sampling import sample, weights
from per_td.priorities.table import PriorityTable
from tests.support.tables import ALPHA, EPS, table


def slots(*index, device="cpu") -> torch.Tensor:
    return torch.tensor(index, device=device)


def check_masses(priorities: PriorityTable) -> None:
    """Masses are p^alpha of the raw priorities, and nothing else."""
    naive = [p**priorities.alpha if p > 0 else 0.0 for p in priorities.raw.tolist()]
    assert priorities.mass.tolist() == pytest.approx(naive, rel=1e-5)
    priorities.check_valid()


def test_the_first_transitions_get_priority_one(device):
    priorities = table(device=device)
    priorities.write_new(slots(0, 1, device=device), None)
    assert priorities.raw.tolist() == [1, 1, 0, 0, 0, 0, 0, 0]
    check_masses(priorities)


@pytest.mark.parametrize(("new_priority", "expected"), [("buffer_max", 0.51), ("ever_max", 7.01)])
def test_new_transitions_get_the_largest_priority(new_priority, expected, device):
    priorities = table(device=device, new_priority=new_priority)
    priorities.write_new(slots(0, 1, 2, device=device), None)
    both = slots(0, 1, 2, device=device)
    priorities.update(both, torch.tensor([-7.0, 0.1, 0.2]), 3, None)
    priorities.update(slots(0, device=device), torch.tensor([0.5]), 3, None)
    priorities.write_new(slots(3, device=device), None)
    assert priorities.raw[3].item() == pytest.approx(expected)


def test_alpha_is_applied_once_to_what_new_transitions_get(device):
    """Applied twice, the mass would be 16^(alpha^2); a test at alpha = 1 could not tell."""
    priorities = table(device=device, alpha=0.5, eps=0.0)
    priorities.write_new(slots(0, device=device), None)
    priorities.update(slots(0, device=device), torch.tensor([16.0]), 1, None)
    priorities.write_new(slots(1, device=device), None)
    assert priorities.masses[:2].tolist() == [4.0, 4.0]


def test_supplied_priorities_are_taken_as_they_are(device):
    priorities = table(device=device)
    index = slots(0, 1, 2, device=device)
    priorities.write_new(index, priorities.check_initial([0.5, 0.0, 2.0], index))
    assert priorities.raw[:3].tolist() == [0.5, 0.0, 2.0]
    assert priorities.masses[1].item() == 0
    check_masses(priorities)


def test_where_an_index_occurs_twice_the_last_one_holds(device):
    priorities = table(device=device)
    priorities.write_new(slots(0, 1, 2, device=device), None)
    priorities.update(slots(2, 0, 2, 0, device=device), torch.tensor([9.0, 1, 3, 2]), 3, None)
    assert priorities.raw[:3].tolist() == pytest.approx([2 + EPS, 1, 3 + EPS])


def test_a_dropped_update_does_not_hide_a_live_one_of_the_same_slot(device):
    priorities = table(device=device)
    priorities.write_new(slots(0, 1, device=device), None)
    live = torch.tensor([True, False, False], device=device)
    priorities.update(slots(0, 0, 1, device=device), torch.tensor([5.0, 6.0, 7.0]), 2, live)
    assert priorities.raw[:2].tolist() == pytest.approx([5 + EPS, 1])


def test_alpha_can_change_at_any_time_and_nothing_is_lost(device):
    priorities = table(device=device, alpha=0.0)
    priorities.write_new(slots(0, 1, 2, device=device), None)
    index = slots(0, 1, 2, device=device)
    priorities.update(index, torch.tensor([1.0, 2.0, 3.0]), 3, None)
    assert priorities.masses[:4].tolist() == [1, 1, 1, 0]
    for alpha in (0.7, 1.0, 0.0, 2.0):
        priorities.alpha = alpha
        check_masses(priorities)
        assert priorities.masses.total.item() == pytest.approx(
            math.fsum(priorities.mass.tolist()), rel=1e-12
        )


def test_eps_holds_for_the_updates_that_follow(device):
    priorities = table(device=device)
    priorities.write_new(slots(0, 1, device=device), None)
    priorities.update(slots(0, device=device), torch.tensor([1.0]), 2, None)
    priorities.eps = 0.25
    priorities.update(slots(1, device=device), torch.tensor([1.0]), 2, None)
    assert priorities.raw[:2].tolist() == pytest.approx([1.01, 1.25])


@pytest.mark.parametrize("alpha", [0.0, 0.37])
def test_a_priority_of_zero_is_never_drawn(alpha, device, generator):
    for method in ("tree", "multinomial"):
        priorities = table(device=device, alpha=alpha, method=method)
        index = slots(0, 1, 2, device=device)
        priorities.write_new(index, priorities.check_initial([0.0, 1.0, 0.0], index))
        assert set(sample(priorities, 500, 3, generator)[0].tolist()) == {1}


@pytest.mark.parametrize(
    ("index", "td_error", "error", "message"),
    [
        ([0, 3], [1.0, 1.0], IndexRangeError, r"0 <= index < 3, .* got 3 at position 1"),
        ([-1, 0], [1.0, 1.0], IndexRangeError, r"got -1 at position 0"),
        ([0, 1], [1.0, math.nan], PriorityError, r"td_error: .* got nan at position 1"),
        ([0, 1], [-math.inf, 1.0], PriorityError, r"td_error: .* got inf at position 0"),
        ([0, 1], [1.0], PriorityError, r"td_error: expected shape \[2\], .* got \[1\]"),
        ([0, 1], [[1.0, 1.0]], PriorityError, r"got \[1, 2\]"),
        ([0, 1], torch.tensor([1e300, 1], dtype=torch.float64), PriorityError, r"in float32"),
        ([0], [1j], PriorityError, r"real dtype, got torch.complex64"),
    ],
)
def test_wrong_updates_are_refused_by_name_and_change_nothing(index, td_error, error, message):
    priorities = table(weight_normalization="buffer")
    priorities.write_new(slots(0, 1, 2), None)
    state = [priorities.raw.clone(), priorities.mass.clone(), priorities.ever_max.clone()]
    with pytest.raises(error, match=message):
        priorities.update(slots(*index), td_error, 3, None)
    assert torch.equal(priorities.raw, state[0])
    assert torch.equal(priorities.mass, state[1])
    assert priorities.ever_max == state[2]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_cuda_wrong_updates_are_refused_one_by_one_and_counted():
    priorities = table(device="cuda")
    priorities.write_new(slots(0, 1, 2, device="cuda"), None)
    index = slots(0, 1, 2, 7, -1, device="cuda")
    td_error = torch.tensor([4.0, math.nan, math.inf, 1.0, 1.0], device="cuda")
    priorities.update(index, td_error, 3, None)
    assert priorities.raw.tolist() == pytest.approx([4 + EPS, 1, 1, 0, 0, 0, 0, 0])
    assert priorities.refused.item() == 4


def test_td_errors_may_have_a_last_dimension_of_one_and_a_gradient(device):
    priorities = table(device=device)
    priorities.write_new(slots(0, 1, device=device), None)
    td_error = torch.tensor([[1.0], [-2.0]], device=device, requires_grad=True)
    priorities.update(slots(0, 1, device=device), td_error, 2, None)
    assert priorities.raw[:2].tolist() == pytest.approx([1 + EPS, 2 + EPS])


@pytest.mark.parametrize("method", ["tree", "multinomial"])
def test_nothing_to_draw_from_is_an_error(method):
    priorities = table(method=method)
    index = slots(0, 1)
    priorities.write_new(index, priorities.check_initial([0.0, 0.0], index))
    with pytest.raises(EmptyBufferError, match="positive"):
        sample(priorities, 1, 2, None)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("alpha", -0.1),
        ("alpha", math.nan),
        ("eps", -1e-9),
        ("eps", math.inf),
        ("draw", "uniform"),
        ("method", "numpy"),
        ("weight_normalization", "max"),
        ("new_priority", "max"),
    ],
)
def test_settings_outside_what_is_accepted_are_refused_by_name(setting, value):
    with pytest.raises(ConfigurationError, match=f"{setting}: expected"):
        table(**{setting: value})


def test_settings_are_checked_when_they_change_too():
    priorities = table()
    with pytest.raises(ConfigurationError, match="alpha"):
        priorities.alpha = -1.0
    with pytest.raises(ConfigurationError, match="eps"):
        priorities.eps = "small"
    assert (priorities.alpha, priorities.eps) == (ALPHA, EPS)


def test_the_smallest_priority_is_known_from_when_it_is_asked_for(device):
    priorities = table(device=device)
    index = slots(0, 1, 2, device=device)
    priorities.write_new(index, priorities.check_initial([4.0, 0.0, 2.0], index))
    priorities.weight_normalization = "buffer"
    beta, size = torch.tensor(0.5, device=device), torch.tensor(3, device=device)
    expected = [(4.0 / 2.0) ** (-0.5 * ALPHA), 1.0]
    found = weights(priorities, slots(0, 2, device=device), beta, size)
    assert found.tolist() == pytest.approx(expected, rel=1e-5)


def same(one: PriorityTable, other: PriorityTable) -> bool:
    one.check_valid()
    other.check_valid()
    names = ("raw", "mass", "total", "largest", "ever_max", "replayed", "refused")
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in names)


@pytest.mark.parametrize(
    ("start", "n"), [(8, 1), (-1, 1), (0, 9), (3, -1), (20_000, 30), (0, 2**40)]
)
@pytest.mark.parametrize("choice", kernels.CHOICES)
def test_a_row_of_slots_that_do_not_exist_is_refused(choice, start, n, monkeypatch):
    monkeypatch.setenv(kernels.VARIABLE, choice)
    priorities = table()
    priorities.write_row(0, 4)
    before = copy.deepcopy(priorities)
    with pytest.raises(IndexRangeError, match=r"slots: expected at most 8, from one of them on"):
        priorities.write_row(start, n)
    assert same(priorities, before)


@pytest.mark.parametrize("index", [8, 9, 15, 16, -1, 2**40])
@pytest.mark.parametrize("choice", kernels.CHOICES)
def test_new_priorities_of_slots_that_do_not_exist_are_refused(choice, index, monkeypatch):
    monkeypatch.setenv(kernels.VARIABLE, choice)
    priorities = table()
    before = copy.deepcopy(priorities)
    for given in (None, torch.ones(2)):
        with pytest.raises(IndexRangeError, match="index: expected 0 <= index < 8"):
            priorities.write_new(slots(0, index), given)
    with pytest.raises(PriorityError, match=r"priority: expected shape \[2\]"):
        priorities.write_new(slots(0, 1), torch.ones(1))
    assert same(priorities, before)


@pytest.mark.parametrize("index", [8, 9, 15, 16, 900])
@pytest.mark.parametrize("choice", kernels.CHOICES)
def test_a_size_beyond_the_capacity_opens_no_slots(choice, index, monkeypatch):
    monkeypatch.setenv(kernels.VARIABLE, choice)
    priorities = table()
    priorities.write_row(0, 8)
    before = copy.deepcopy(priorities)
    for size in (1000, torch.tensor(1000)):
        with pytest.raises(IndexRangeError, match="index: expected 0 <= index < 8"):
            priorities.update(slots(0, index), torch.ones(2), size)
    assert same(priorities, before)


@pytest.mark.parametrize("choice", kernels.CHOICES)
def test_generations_are_one_per_index(choice, monkeypatch):
    monkeypatch.setenv(kernels.VARIABLE, choice)
    priorities = table()
    priorities.write_row(0, 8)
    for n in (0, 1, 3):
        with pytest.raises(PriorityError, match=r"generation: expected shape \[2\]"):
            priorities.update(
                slots(0, 1), torch.ones(2), 8, generation=torch.zeros(n).long(), written=8
            )


def test_settling_beyond_what_there_is_is_left_to_update():
    priorities = table()
    priorities.write_row(0, 8)
    before = copy.deepcopy(priorities)
    index, error, drawn = slots(0, 1), torch.ones(2), torch.zeros(2).long()
    freed = torch.ones(2)
    freed.untyped_storage().resize_(0)
    for at, errors, then, stamps, size in (
        (index, error, drawn, 1000, 1000),
        (index, error, drawn, 7, 8),
        (index, error[:1], drawn, 8, 8),
        (index, error, drawn[:1], 8, 8),
        (index, freed, drawn, 8, 8),
    ):
        stamps = torch.zeros(stamps).long()
        ring = {"drawn": then, "generation": stamps, "squared": False}
        assert not priority_kernels.settle(priorities, at, errors, size, **ring)
    assert same(priorities, before)

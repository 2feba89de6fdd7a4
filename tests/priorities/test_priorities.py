import copy
import math
from array import array

import pytest
import torch

from per_td import (
    ConfigurationError,
    EmptyBufferError,
    IndexRangeError,
    PerTdError,
    PriorityError,
    validation,
)
from per_td.priorities.sampling import sample_weighted
from per_td.priorities.table import PriorityTable
from tests.support.tables import ALPHA, EPS, table


def slots(*index, device="cpu") -> torch.Tensor:
    return torch.tensor(index, device=device)


def draw(priorities: PriorityTable, n: int, generator=None, *, beta=0.5, written: int):
    return sample_weighted(priorities, n, generator, beta=beta, written=written, size=written)


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
    priorities.update(both, torch.tensor([-7.0, 0.1, 0.2]), written=3)
    priorities.update(slots(0, device=device), torch.tensor([0.5]), written=3)
    priorities.write_new(slots(3, device=device), None)
    assert priorities.raw[3].item() == pytest.approx(expected)


def test_alpha_is_applied_once_to_what_new_transitions_get(device):
    """Applied twice, the mass would be 16^(alpha^2); a test at alpha = 1 could not tell."""
    priorities = table(device=device, alpha=0.5, eps=0.0)
    priorities.write_new(slots(0, device=device), None)
    priorities.update(slots(0, device=device), torch.tensor([16.0]), written=1)
    priorities.write_new(slots(1, device=device), None)
    assert priorities.mass[:2].tolist() == [4.0, 4.0]


def test_supplied_priorities_are_taken_as_they_are(device):
    priorities = table(device=device)
    index = slots(0, 1, 2, device=device)
    priorities.write_new(index, priorities.check_initial([0.5, 0.0, 2.0], index))
    assert priorities.raw[:3].tolist() == [0.5, 0.0, 2.0]
    assert priorities.mass[1].item() == 0
    check_masses(priorities)


def test_where_an_index_occurs_twice_the_last_one_holds(device):
    priorities = table(device=device)
    priorities.write_new(slots(0, 1, 2, device=device), None)
    priorities.update(slots(2, 0, 2, 0, device=device), torch.tensor([9.0, 1, 3, 2]), written=3)
    assert priorities.raw[:3].tolist() == pytest.approx([2 + EPS, 1, 3 + EPS])


def test_a_dropped_update_does_not_hide_a_live_one_of_the_same_slot(device):
    priorities = table(device=device)
    priorities.write_new(slots(0, 1, device=device), None)
    live = torch.tensor([True, False, False], device=device)
    given = torch.tensor([5.0, 6.0, 7.0])
    priorities.update(slots(0, 0, 1, device=device), given, written=2, mask=live)
    assert priorities.raw[:2].tolist() == pytest.approx([5 + EPS, 1])
    generation = torch.tensor([0, -1, -1], device=device)
    priorities.update(slots(0, 0, 1, device=device), given + 1, written=2, generation=generation)
    assert priorities.raw[:2].tolist() == pytest.approx([6 + EPS, 1])


def test_alpha_can_change_at_any_time_and_nothing_is_lost(device):
    priorities = table(device=device, alpha=0.0)
    priorities.write_new(slots(0, 1, 2, device=device), None)
    index = slots(0, 1, 2, device=device)
    priorities.update(index, torch.tensor([1.0, 2.0, 3.0]), written=3)
    assert priorities.mass[:4].tolist() == [1, 1, 1, 0]
    for alpha in (0.7, 1.0, 0.0, 2.0):
        priorities.alpha = alpha
        check_masses(priorities)
        assert priorities.total.item() == pytest.approx(
            math.fsum(priorities.mass.tolist()), rel=1e-12
        )


def test_eps_holds_for_the_updates_that_follow(device):
    priorities = table(device=device)
    priorities.write_new(slots(0, 1, device=device), None)
    priorities.update(slots(0, device=device), torch.tensor([1.0]), written=2)
    priorities.eps = 0.25
    priorities.update(slots(1, device=device), torch.tensor([1.0]), written=2)
    assert priorities.raw[:2].tolist() == pytest.approx([1.01, 1.25])


@pytest.mark.parametrize("alpha", [0.0, 0.37])
def test_a_priority_of_zero_is_never_drawn(alpha, device, generator):
    for method in ("tree", "multinomial"):
        priorities = table(device=device, alpha=alpha, method=method)
        index = slots(0, 1, 2, device=device)
        priorities.write_new(index, priorities.check_initial([0.0, 1.0, 0.0], index))
        assert set(draw(priorities, 500, generator, written=3)[0].tolist()) == {1}


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
        priorities.update(slots(*index), td_error, written=3)
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
    priorities.update(index, td_error, written=3)
    assert priorities.raw.tolist() == pytest.approx([4 + EPS, 1, 1, 0, 0, 0, 0, 0])
    assert priorities.refused.item() == 4


def test_td_errors_may_have_a_last_dimension_of_one_and_a_gradient(device):
    priorities = table(device=device)
    priorities.write_new(slots(0, 1, device=device), None)
    td_error = torch.tensor([[1.0], [-2.0]], device=device, requires_grad=True)
    priorities.update(slots(0, 1, device=device), td_error, written=2)
    assert priorities.raw[:2].tolist() == pytest.approx([1 + EPS, 2 + EPS])


@pytest.mark.parametrize("method", ["tree", "multinomial"])
def test_nothing_to_draw_from_is_an_error(method):
    priorities = table(method=method)
    index = slots(0, 1)
    priorities.write_new(index, priorities.check_initial([0.0, 0.0], index))
    with pytest.raises(EmptyBufferError, match="positive"):
        draw(priorities, 1, written=2)


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


def test_the_smallest_priority_is_known_from_when_it_is_asked_for(choice, device, generator):
    priorities = table(device=device)
    index = slots(0, 1, 2, device=device)
    priorities.write_new(index, priorities.check_initial([4.0, 0.0, 2.0], index))
    priorities.weight_normalization = "buffer"
    least = priorities.mass[2].item()
    assert priorities.smallest.item() == least
    expected = [(4.0 / 2.0) ** (-0.5 * ALPHA), 0.0, 1.0]
    for beta in (0.5, torch.tensor(0.5, device=device)):
        drawn, weight = draw(priorities, 200, generator, beta=beta, written=3)
        assert set(drawn.tolist()) == {0, 2}
        wanted = [expected[i] for i in drawn.tolist()]
        assert weight.tolist() == pytest.approx(wanted, rel=1e-5)
    mass = priorities.mass[[0, 2]]
    found = priorities.trees.ops.weigh(
        priorities.trees, mass, beta=0.5, normalization="buffer", written=3
    )
    assert found.tolist() == pytest.approx([expected[0], expected[2]], rel=1e-5)
    priorities.weight_normalization = "batch"
    assert priorities.smallest.item() == math.inf, "nobody needs it"


def same(one: PriorityTable, other: PriorityTable) -> bool:
    one.check_valid()
    other.check_valid()
    names = ("raw", "mass", "total", "largest", "ever_max", "replayed", "refused")
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in names)


def run(start: int, n: int) -> array:
    return array("q", (start, n))


@pytest.mark.parametrize(
    ("start", "n"), [(8, 1), (-1, 1), (0, 9), (3, -1), (20_000, 30), (0, 2**40)]
)
def test_a_row_of_slots_that_do_not_exist_is_refused(choice, start, n):
    priorities = table()
    priorities.write_runs(run(0, 4))
    before = copy.deepcopy(priorities)
    with pytest.raises(IndexRangeError, match=r"slots: expected 0 to 8, from one of 8 on"):
        priorities.write_runs(run(start, n))
    assert same(priorities, before)
    for wrong in (array("q"), array("q", (0, 1, 0, 1)), array("i", (0, 1, 0, 1))):
        with pytest.raises(PerTdError, match="expected"):
            priorities.write_runs(wrong)
    assert same(priorities, before)


@pytest.mark.parametrize("wrong", [(8, 1), (-1, 1), (0, 9), (3, -1)])
@pytest.mark.parametrize("group", range(3))
def test_a_row_of_slots_that_do_not_exist_in_one_of_many_is_refused(choice, group, wrong):
    priorities = table(groups=3)
    priorities.write_runs(run(0, 4) * 3)
    before = copy.deepcopy(priorities)
    runs = run(1, 2) * 3
    runs[2 * group : 2 * group + 2] = run(*wrong)
    with pytest.raises(IndexRangeError, match=r"from one of 8 on, in 3 groups"):
        priorities.write_runs(runs)
    assert same(priorities, before)


@pytest.mark.parametrize("groups", [None, 1, 3])
@pytest.mark.parametrize("index", [8, 9, 15, 16, -1, 2**40])
def test_new_priorities_of_slots_that_do_not_exist_are_refused(choice, index, groups):
    priorities = table(groups=groups)
    before = copy.deepcopy(priorities)
    lead = () if groups is None else (groups,)
    for given in (None, torch.ones(*lead, 2)):
        with pytest.raises(IndexRangeError, match="index: expected 0 <= index < 8"):
            priorities.write_new(slots(0, index).expand(*lead, 2), given)
    with pytest.raises(PriorityError, match=r"priority: expected shape \[.*2\]"):
        priorities.write_new(slots(0, 1).expand(*lead, 2), torch.ones(*lead, 1))
    assert same(priorities, before)


@pytest.mark.parametrize("index", [8, 9, 15, 16, 900])
def test_a_size_beyond_the_capacity_opens_no_slots(choice, index):
    priorities = table()
    priorities.write_runs(run(0, 8))
    before = copy.deepcopy(priorities)
    for written in (1000, torch.tensor([1000])):
        with pytest.raises(IndexRangeError, match="index: expected 0 <= index < 8"):
            priorities.update(slots(0, index), torch.ones(2), written=written)
    assert same(priorities, before)


def test_generations_are_one_per_index(choice):
    priorities = table()
    priorities.write_runs(run(0, 8))
    before = copy.deepcopy(priorities)
    for n in (0, 1, 3):
        with pytest.raises(PriorityError, match=r"generation: expected shape \[2\]"):
            priorities.update(
                slots(0, 1), torch.ones(2), generation=torch.zeros(n).long(), written=8
            )
    assert same(priorities, before)


def test_stamps_beyond_what_there_is_are_refused(choice):
    priorities = table()
    priorities.write_runs(run(0, 8))
    before = copy.deepcopy(priorities)
    index, error, drawn = slots(0, 1), torch.ones(2), torch.zeros(2).long()
    freed = torch.ones(2)
    freed.untyped_storage().resize_(0)
    for errors, then, stamps, written in (
        (error, drawn, 1000, 1000),
        (error, drawn, 7, 8),
        (error[:1], drawn, 8, 8),
        (error, drawn[:1], 8, 8),
        (freed, drawn, 8, 8),
    ):
        given = {"generation": then, "stamps": torch.zeros(stamps).long()}
        with pytest.raises(PerTdError, match="expected"):
            priorities.update(index, errors, written=written, **given)
    assert same(priorities, before)
    stamps = torch.arange(8)
    dropped = priorities.update(
        slots(0, 1, 2), [3.0, 4.0, 5.0], written=8, generation=slots(0, 0, 2), stamps=stamps
    )
    assert dropped == 1
    assert priorities.raw[:3].tolist() == pytest.approx([3 + EPS, 1, 5 + EPS])


def test_where_they_cannot_be_looked_at_wrong_slots_are_refused_with_stamps_too(monkeypatch):
    monkeypatch.setenv("PER_TD_KERNELS", "off")
    priorities = table()
    priorities.write_runs(run(0, 8))
    monkeypatch.setattr(validation, "can_raise", lambda tensor: False)
    dropped = priorities.update(
        slots(0, 8, -1, 900, 2),
        torch.full((5,), 3.0),
        written=8,
        generation=torch.zeros(5).long(),
        stamps=torch.zeros(8).long(),
    )
    assert dropped == 0
    assert priorities.refused == 3
    assert priorities.raw.tolist() == pytest.approx([3 + EPS, 1, 3 + EPS, 1, 1, 1, 1, 1])


@pytest.mark.parametrize("groups", [1, 3])
def test_many_tables_are_as_many_single_ones(choice, groups, device):
    """Random operations in lockstep, masked and not; every result has a row for each."""
    many = table(30, device=device, groups=groups, weight_normalization="buffer")
    singles = [table(30, device=device, weight_normalization="buffer") for _ in range(groups)]
    written = torch.zeros(groups, dtype=torch.int64, device=device)
    for step in range(10):
        n = torch.randint(0, 31, (groups,)).tolist()
        starts = [(int(w) % 30) for w in written]
        many.write_runs(array("q", [x for pair in zip(starts, n, strict=True) for x in pair]))
        for single, start, k in zip(singles, starts, n, strict=True):
            single.write_runs(run(start, k))
        written += torch.tensor(n, device=device)
        filled = written.clamp(max=30)
        if not filled.all():
            continue
        index = (torch.rand(groups, 9, device=device) * filled.unsqueeze(-1)).long()
        td_error = torch.randn(groups, 9, device=device)
        generation = (written.unsqueeze(-1) - 1 - index) // 30
        generation -= (torch.rand(groups, 9, device=device) < 0.2).long()
        mask = torch.rand(groups, 9, device=device) < 0.8 if step % 2 else None
        given = {"index": index, "td_error": td_error, "generation": generation, "mask": mask}
        dropped = int(many.update(**given, written=written))
        for s, single in enumerate(singles):
            own = {name: None if each is None else each[s] for name, each in given.items()}
            dropped -= int(single.update(**own, written=int(written[s])))
        assert dropped == 0
        for name in ("raw", "mass", "total", "largest", "smallest", "ever_max"):
            found = getattr(many, name)
            expected = torch.stack([getattr(single, name) for single in singles])
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
        assert torch.equal(many.for_new(), torch.stack([single.for_new() for single in singles]))
        many.check_valid()

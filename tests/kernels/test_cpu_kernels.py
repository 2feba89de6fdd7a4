"""The kernels behind the door beside the reference, and what happens where there are none."""

import copy
import inspect
import itertools
import math
import pickle
import subprocess
import sys
from array import array
from dataclasses import dataclass

import pytest
import torch

from per_td import (
    ConfigurationError,
    EmptyBufferError,
    IndexRangeError,
    PerTdError,
    PriorityError,
    SumTree,
    kernels,
)
from per_td.draws import DRAWS
from per_td.kernels import reference
from per_td.kernels.parts import Layout
from per_td.priorities.sampling import sample_weighted
from per_td.priorities.table import PriorityTable
from per_td.tree import Trees
from per_td.weights import mass_of
from tests.support.choices import CHOICES, COMPILED
from tests.support.parameters import slow_but

pytest.importorskip("numba", reason="numba is not installed")

CAPACITIES = slow_but((1, 17, 256, 5000), (1, 7, 16, 17, 255, 256, 257, 4096, 5000))
CPU = torch.device("cpu")
ULP = 1.2e-7


@pytest.fixture(params=[None, 1, 3])
def groups(request) -> int | None:
    """How many tables side by side; None: one, without a dimension for it."""
    return request.param


@pytest.fixture
def door():
    from per_td.kernels.cpu import door

    return door


def table(monkeypatch, choice: str, capacity: int, **settings) -> PriorityTable:
    monkeypatch.setenv(kernels.VARIABLE, choice)
    made = PriorityTable(
        capacity,
        **{
            "alpha": 0.7,
            "eps": 1e-3,
            "draw": "independent",
            "method": "tree",
            "weight_normalization": "buffer",
            "new_priority": "buffer_max",
            "device": CPU,
        }
        | settings,
    )
    assert made.trees.compiled == (choice != "off")
    return made


def twins(monkeypatch, capacity: int, **settings) -> tuple[PriorityTable, PriorityTable]:
    """The same table with kernels and without."""
    return tuple(table(monkeypatch, choice, capacity, **settings) for choice in CHOICES)


def alike(values, groups: int | None) -> torch.Tensor:
    """The same values for each group, [B] or [S, B]."""
    values = torch.as_tensor(values)
    return values if groups is None else values.expand(groups, -1)


def runs(start: int, n: int, groups: int | None = None) -> array:
    return array("q", (start, n)) * (groups or 1)


def assert_same(one: PriorityTable, other: PriorityTable) -> None:
    settings = [table.trees.settings.nan_to_num(-1.0) for table in (one, other)]
    assert torch.equal(*settings)
    for name in ("raw", "ever_max", "maxima", "replayed", "refused", "exponents"):
        assert torch.equal(getattr(one.trees, name), getattr(other.trees, name)), name
    torch.testing.assert_close(one.trees.leaves, other.trees.leaves, rtol=ULP, atol=0)
    torch.testing.assert_close(one.trees.minima, other.trees.minima, rtol=ULP, atol=0)
    for each in (one, other):
        assert_sums(each.trees.layout, each.trees.leaves, each.trees.sums)
        each.check_valid()


def assert_sums(layout: Layout, leaves: torch.Tensor, nodes: torch.Tensor) -> None:
    """Every node is the sum of its children, whatever they are."""
    children = leaves.double()
    for level, width in zip(layout.levels(nodes), layout.widths, strict=True):
        torch.testing.assert_close(level[:width], children.view(-1, 16).sum(-1), rtol=1e-15, atol=0)
        children = level


def extreme(*shape: int) -> torch.Tensor:
    """TD errors from 1e-30 to 1e30 of both signs, some of them 0."""
    value = 10.0 ** (60 * torch.rand(shape) - 30) * (1 - 2 * torch.randint(2, shape))
    return value * (torch.rand(shape) > 0.1)


def test_these_kernels_check_their_bounds_if_they_are_asked_to(door):
    from per_td.kernels.cpu import compiling

    assert (COMPILED == "checked") == compiling.CHECKED


def test_the_door_has_the_operations_of_the_reference_with_the_same_arguments(door):
    alike = set(reference.__all__) - {"check_nodes", "generations", "sizes"}
    assert set(door.__all__) == alike | {"draw_rows"}
    for name in alike:
        one, other = (inspect.signature(getattr(each, name)) for each in (door, reference))
        assert one == other, name


@pytest.mark.parametrize(
    ("new_priority", "eps"),
    slow_but(
        [("buffer_max", 0.0), ("ever_max", 1e-3)],
        itertools.product(("buffer_max", "ever_max"), (0.0, 1e-3)),
    ),
)
@pytest.mark.parametrize("capacity", CAPACITIES)
def test_random_operations_leave_what_plain_torch_leaves(
    capacity, new_priority, eps, groups, monkeypatch
):
    pair = twins(monkeypatch, capacity, eps=eps, new_priority=new_priority, groups=groups)
    many = groups or 1
    shape = (lambda n: (n,)) if groups is None else (lambda n: (groups, n))
    written = torch.zeros(many, dtype=torch.int64)
    for step in range(12):
        n = torch.randint(1, capacity + 1, (many,))
        fresh = array("q", torch.stack([written % capacity, n], 1).flatten().tolist())
        for each in pair:
            each.write_runs(fresh)
        written += n
        assert_same(*pair)
        b = int(torch.randint(1, 600, ()))
        index = (torch.rand(many, b) * written.clamp(max=capacity).unsqueeze(-1)).long()
        value = extreme(*shape(b))
        generation = (written.unsqueeze(-1) - 1 - index) // capacity
        generation -= (torch.rand(many, b) < 0.3).long()
        mask = torch.rand(shape(b)) < 0.8 if step % 3 == 0 else None
        dropped = [
            int(
                each.update(
                    index.view(shape(b)),
                    value,
                    written=int(written) if groups is None else written,
                    generation=generation.view(shape(b)),
                    mask=mask,
                )
            )
            for each in pair
        ]
        assert dropped[0] == dropped[1]
        assert_same(*pair)
        b = int(n[0])
        index = torch.rand(*shape(capacity)).argsort(-1)[..., :b]
        priority = torch.rand(shape(b)) * (torch.rand(shape(b)) > 0.5)
        mask = torch.rand(shape(b)) < 0.8 if step % 3 == 0 else None
        for each in pair:
            each.write_new(index, each.check_initial(priority, index), mask)
        assert_same(*pair)
        for each in pair:
            each.write_new(index, None, mask)
        assert_same(*pair)


def test_squared_errors_are_rooted_as_in_plain_torch(groups, monkeypatch):
    """But for the last bit, which torch does not always round as IEEE 754 says."""
    pair = twins(monkeypatch, 5000, groups=groups)
    index, value = alike(torch.arange(5000), groups), alike(extreme(5000), groups)
    for each in pair:
        each.write_runs(runs(0, 5000, groups))
        each.update(index, value, written=5000, squared=True)
        each.check_valid()
        expected = (value.double().abs().sqrt() + each.eps).float()
        torch.testing.assert_close(each.raw, expected, rtol=2 * ULP, atol=0)
        torch.testing.assert_close(each.largest, expected.amax(-1), rtol=2 * ULP, atol=0)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 2.5])
def test_alpha_may_be_anything_and_change(alpha, groups, monkeypatch):
    pair = twins(monkeypatch, 300, groups=groups)
    index, value = alike(torch.arange(300), groups), alike(extreme(300), groups)
    for each in pair:
        each.alpha = alpha
        each.update(index, value, written=300)
    assert_same(*pair)
    mass = pair[0].mass.clone()
    for each in pair:
        each.alpha = 0.3
        each.alpha = alpha
    assert_same(*pair)
    assert torch.equal(pair[0].mass, mass), "kernel and torch round the same mass differently"
    assert torch.equal(mass, mass_of(value.abs() + pair[0].eps, alpha))


@pytest.mark.parametrize("groups", [1, 3, 20])
@pytest.mark.parametrize("capacity", [7, 300])
def test_masses_of_trees_with_an_alpha_each_are_those_of_plain_torch(capacity, groups, monkeypatch):
    pair = twins(monkeypatch, capacity, groups=groups)
    alpha = torch.linspace(0.0, 2.5, groups, dtype=torch.float64)
    written = torch.zeros(groups, dtype=torch.int64)
    for each in pair:
        each.alpha = alpha
    for _ in range(6):
        n = torch.randint(0, capacity + 1, (groups,))
        fresh = array("q", torch.stack([written % capacity, n], 1).flatten().tolist())
        written += n
        index = torch.randint(capacity, (groups, 50)) % written.clamp(1, capacity).unsqueeze(-1)
        value, mask = extreme(groups, 50), torch.rand(groups, 50) < 0.8
        mask &= index < written.unsqueeze(-1)
        for each in pair:
            each.write_runs(fresh)
            each.update(index, value, written=written, mask=mask)
        assert_same(*pair)
    assert torch.equal(pair[0].mass, mass_of(pair[0].raw, alpha.unsqueeze(-1)))


@pytest.mark.parametrize(
    "beta",
    [
        torch.tensor(0.5, dtype=torch.float64),
        torch.full((2,), 0.5, dtype=torch.float64),
        torch.full((4,), 0.5, dtype=torch.float64),
        torch.full((3,), 0.5),
        torch.full((6,), 0.5, dtype=torch.float64)[::2],
        torch.full((3,), 0.5, dtype=torch.float64, device="meta"),
    ],
    ids=["one", "few", "many", "float32", "apart", "meta"],
)
def test_the_door_takes_a_beta_for_each_of_many_trees_and_no_others(beta, door, monkeypatch):
    made = table(monkeypatch, COMPILED, 40, groups=3)
    made.fill(torch.ones(3, 40))
    how = {"stratified": False, "normalization": "batch", "written": 40}
    point = torch.rand(3, 5, dtype=torch.float64)
    with pytest.raises(PerTdError, match=r"expected contiguous memory of 3 torch\.float64"):
        door.draw(made.trees, point, beta=beta, **how)
    with pytest.raises(PerTdError, match=r"expected contiguous memory of 3 torch\.float64"):
        door.draw_rows(made.trees, rings(3, 40), point, beta=beta, **how)


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("normalization", ["batch", "buffer", "none"])
@pytest.mark.parametrize("beta", ["one", "each"])
@pytest.mark.parametrize("capacity", CAPACITIES)
def test_the_same_seed_draws_the_same_slots_and_weights(
    capacity, beta, normalization, draw, groups, monkeypatch
):
    beta = 0.6 if beta == "one" else torch.linspace(1, 0, groups or 1, dtype=torch.float64)
    settings = {"weight_normalization": normalization, "draw": draw, "groups": groups}
    pair = twins(monkeypatch, capacity, **settings)
    priority = torch.rand(capacity) ** 4 * (torch.arange(capacity) % 3 != 1)
    priority = alike(priority, groups).clone()
    priority *= 1 if groups is None else 10.0 ** torch.arange(groups).unsqueeze(-1)
    drawable, drawn = int((priority > 0).sum(-1).min()), []
    n = min(500, drawable) if draw == "without_replacement" else 500
    for each in pair:
        each.restore(priority, priority.amax(-1))
        seeded = torch.Generator().manual_seed(3)
        drawn.append(sample_weighted(each, n, seeded, beta=beta, written=capacity))
    assert torch.equal(drawn[0][0], drawn[1][0])
    assert (priority.gather(-1, drawn[0][0]) > 0).all()
    torch.testing.assert_close(drawn[0][1], drawn[1][1], rtol=1e-6, atol=0)
    assert drawn[0][1].dtype == torch.float32
    assert_same(*pair)  # `replayed` too
    if groups is None:
        assert pair[0].replayed.nonzero().flatten().tolist() == drawn[0][0].unique().tolist()


def test_too_few_slots_for_a_draw_without_replacement_leave_nothing_marked(groups, monkeypatch):
    for each in twins(monkeypatch, 300, eps=0.0, groups=groups, draw=DRAWS[2]):
        each.write_runs(runs(0, 300, groups))
        each.update(alike(torch.arange(5, 300), groups), alike([0.0] * 295, groups), written=300)
        with pytest.raises(EmptyBufferError, match=r"at least 6 .* got 5"):
            sample_weighted(each, 6, None, beta=0.6, written=300)
        assert not each.trees.replayed.any()
        index, _ = sample_weighted(each, 5, None, beta=0.6, written=300)
        assert torch.equal(index.sort(-1)[0], alike(torch.arange(5), groups))


def filled(capacity: int, groups: int | None, mass: torch.Tensor) -> Trees:
    trees = Trees(Layout.of(capacity, groups or 1), CPU)
    trees.masses.copy_(mass)
    trees.ops.refill(trees)
    return trees


@pytest.mark.parametrize("capacity", CAPACITIES)
def test_points_on_and_past_every_edge_are_found_in_the_same_slots(
    capacity, groups, door, monkeypatch
):
    mass = torch.randint(0, 4, (groups or 1, capacity)).float()
    mass[:, -1] = 1.0
    trees = filled(capacity, groups, mass)
    edges = torch.nn.functional.pad(mass.double().cumsum(-1), (1, 0))
    beside = edges.nextafter(edges + 1), edges.nextafter(edges - 1).clamp(min=0)
    inside = torch.rand(groups or 1, 500, dtype=torch.float64) * trees.total.unsqueeze(-1)
    target = torch.cat([edges, *beside, inside, edges[:, -1:] * 2], -1)
    target = target[0] if groups is None else target
    found, masses = door.find(trees, target)
    expected = reference.find(trees, target)
    assert torch.equal(found, expected[0])
    assert torch.equal(masses, expected[1])
    assert (mass.gather(-1, found.view(groups or 1, -1)) > 0).all()


def test_rounding_never_leads_to_a_mass_of_zero(groups, monkeypatch):
    monkeypatch.setenv(kernels.VARIABLE, COMPILED)
    tree = SumTree(5000, num_trees=groups)
    mass = 10.0 ** (30 * torch.rand(5000) - 15) * (torch.arange(5000) % 2)
    tree.fill(alike(mass, groups))
    edges = mass.double().cumsum(0)
    ends = torch.cat([edges + k * torch.finfo(torch.float64).eps * edges for k in range(-4, 5)])
    assert (mass[tree.find(alike(ends, groups))] > 0).all()


@pytest.mark.parametrize("capacity", CAPACITIES)
def test_masses_alone_take_the_last_value_of_an_index(capacity, groups, door):
    many = groups or 1
    naive = [[0.0] * capacity for _ in range(many)]
    one, other = (Trees(Layout.of(capacity, many), CPU) for _ in range(2))
    for _ in range(20):
        n = int(torch.randint(1, 2 * capacity + 2, ()))
        index = torch.randint(capacity, (many, n))
        value = torch.rand(many, n) * (torch.rand(many, n) > 0.2)
        door.set_masses(one, index, value)
        reference.set_masses(other, index, value)
        for s, own in enumerate(naive):
            for i, v in zip(index[s].tolist(), value[s].tolist(), strict=True):
                own[i] = v
        assert one.masses.tolist() == other.masses.tolist() == naive
        assert_sums(one.layout, one.leaves, one.sums)
    assert one.total.tolist() == pytest.approx([math.fsum(own) for own in naive], rel=1e-14)


@pytest.mark.parametrize(
    ("index", "value", "error"),
    [
        ([0, 9], [1.0, 1.0], IndexRangeError),
        ([0, -1], [1.0, 1.0], IndexRangeError),
        ([0, 1], [1.0, math.nan], PriorityError),
        ([0, 1], [1.0, -math.inf], PriorityError),
        ([0, 1], [1.0, 1e39], PriorityError),
    ],
)
def test_what_is_wrong_is_refused_as_in_plain_torch(index, value, error, groups, monkeypatch):
    messages = []
    value = alike(torch.tensor(value, dtype=torch.float64), groups)
    for each in twins(monkeypatch, 9, groups=groups):
        each.write_runs(runs(0, 9, groups))
        before = copy.deepcopy(each)
        with pytest.raises(error) as refused:
            each.update(alike(index, groups), value, written=9)
        messages.append(str(refused.value))
        assert_same(each, before)
    assert messages[0] == messages[1]


def test_slices_of_tensors_are_read_as_torch_reads_them(groups, monkeypatch):
    pair = twins(monkeypatch, 40, groups=groups)
    index, value = torch.arange(80) % 40, torch.rand(80, dtype=torch.float64)
    then, mask = torch.zeros(80).long(), torch.arange(80) % 5 != 0
    for each in pair:
        each.write_runs(runs(0, 40, groups))
        each.update(
            alike(index[::3], groups),
            alike(value[::3], groups).unsqueeze(-1),
            generation=alike(then[::3], groups),
            written=40,
            mask=alike(mask[::3], groups),
        )
    assert_same(*pair)
    assert (pair[0].raw != 1).any()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda made: pickle.loads(pickle.dumps(made))])
def test_copies_have_memory_of_their_own(copied, groups, monkeypatch):
    made = table(monkeypatch, COMPILED, 100, groups=groups)
    made.write_runs(runs(0, 100, groups))
    other = copied(made)
    other.update(alike(torch.arange(50), groups), alike(torch.rand(50), groups), written=100)
    assert (made.total == 100).all()
    assert (other.total != 100).all()
    for each in (made, other):
        each.check_valid()


def test_a_table_in_shared_memory_goes_on_working(groups, monkeypatch):
    pair = twins(monkeypatch, 100, groups=groups)
    for each in pair:
        each.write_runs(runs(0, 100, groups))
        for memory in each.trees.block.memory.values():
            memory.share_memory_()
        index, value = torch.arange(0, 100, 3), torch.linspace(-1, 2, 34)
        each.update(alike(index, groups), alike(value, groups), written=100)
    assert_same(*pair)
    assert (pair[0].raw != 1).any()


# --- rows -----------------------------------------------------------------------------------------

ROWS = {"groups": 3, "capacity": 5}


@dataclass
class Rings:
    """S rings, one after the other in each column."""

    columns: list[torch.Tensor]
    capacity: int
    groups: int
    record = None

    @property
    def starts(self) -> torch.Tensor:
        return torch.arange(0, self.groups * self.capacity, self.capacity).unsqueeze(-1)


def rings(groups: int, capacity: int) -> Rings:
    rows, one_block = groups * capacity, torch.zeros(groups * capacity, 40, dtype=torch.uint8)
    columns = [
        torch.zeros(rows, 3, dtype=torch.float64),
        torch.zeros(rows, dtype=torch.bool),
        torch.zeros(rows, 2, 5, dtype=torch.int16),
        one_block[:, :12].view(torch.float32),  # rows of several columns together
        one_block[:, 16:24].view(torch.int64).squeeze(-1),
        torch.zeros(rows, 300, dtype=torch.uint8),
        torch.zeros(rows, 0),
    ]
    return Rings(columns, capacity, groups)


def batch(rows: Rings, *shape: int) -> list[torch.Tensor]:
    return [
        torch.randint(0, 2 if column.dtype == torch.bool else 100, (*shape, *column.shape[1:])).to(
            column.dtype
        )
        for column in rows.columns
    ]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("capacity", [1, 5, 400])
def test_rows_are_written_and_read_as_in_plain_torch(capacity, masked, groups, door):
    many = groups or 1
    pair = rings(many, capacity), rings(many, capacity)
    written = torch.zeros(many, dtype=torch.int64)
    for _ in range(15):
        n = int(torch.randint(1, 2 * capacity + 2, ()))
        mask = torch.rand(many, n) < 0.6 if masked else None
        count = torch.full((many,), n) if mask is None else mask.sum(-1)
        written += count
        length = count.clamp(max=capacity)
        where = torch.stack([(written - length) % capacity, length], 1).flatten().tolist()
        new = batch(pair[0], many * n)
        for each, operations in zip(pair, (door, reference), strict=True):
            operations.write_rows(each, new, n, array("q", where), mask=mask)
        for one, other in zip(pair[0].columns, pair[1].columns, strict=True):
            assert torch.equal(one, other)
        index = torch.randint(capacity, (n,) if groups is None else (groups, n))
        for ever in (None, int(written[0]), written):
            one, other = (
                operations.gather(each, index, written=ever)
                for each, operations in zip(pair, (door, reference), strict=True)
            )
            assert all(map(torch.equal, one[0], other[0]))
            assert (one[1] is None) == (other[1] is None) == (ever is None)
            assert ever is None or torch.equal(one[1], other[1])


@pytest.mark.parametrize("capacity", [1, 5, 400])
def test_stamps_are_counted_up_as_in_plain_torch(capacity, groups, door):
    many, start = groups or 1, 0
    pair = rings(many, capacity), rings(many, capacity)
    stamps = [torch.full((many * capacity,), -1) for _ in pair]
    for _ in range(15):
        n = int(torch.randint(1, capacity + 1, ()))
        new = batch(pair[0], many * n)
        index = [torch.full((many, n), -7) for _ in pair]
        for k, operations in enumerate((door, reference)):
            where = runs(start, n, many)
            operations.write_rows(pair[k], new, n, where, stamps=stamps[k], index=index[k])
        start = (start + n) % capacity
        assert torch.equal(*stamps)
        assert torch.equal(*index)
        assert all(map(torch.equal, pair[0].columns, pair[1].columns))
    assert stamps[0].max() > 0


@pytest.mark.parametrize("operations", ["door", "reference"])
def test_rows_of_slots_that_do_not_exist_are_refused(operations, groups, door):
    operations = {"door": door, "reference": reference}[operations]
    many = groups or 1
    rows = rings(many, 5)
    new = batch(rows, many * 9)
    operations.write_rows(rows, new, 9, runs(1, 5, many))
    before = copy.deepcopy(rows.columns)
    for wrong in (5, -1, 2**40, many * 5):
        with pytest.raises(IndexRangeError, match=r"0 <= index < 5, the slots"):
            operations.gather(rows, alike([0, wrong], groups), written=9)
    for start, n in ((5, 1), (-1, 1), (0, 6), (3, -1), (20_000, 3), (0, 2**40)):
        with pytest.raises(IndexRangeError, match="slots: expected 0 to 5, from one of 5 on"):
            operations.write_rows(rows, new, 9, runs(start, n, many))
    stamps, index = torch.zeros(many * 5, dtype=torch.int64), torch.zeros(many, 9).long()
    for n in (5, 9):  # a stamp for each, and no more than there are
        with pytest.raises(IndexRangeError, match="slots: expected 9 to 5, from one of 5 on"):
            operations.write_rows(rows, new, 9, runs(4, n, many), stamps=stamps, index=index)
    assert not stamps.any()
    assert not index.any()
    assert all(map(torch.equal, rows.columns, before))


# --- the door -------------------------------------------------------------------------------------


def freed() -> torch.Tensor:
    tensor = torch.ones(2)
    tensor.untyped_storage().resize_(0)
    return tensor


@pytest.mark.parametrize(
    "wrong",
    [
        {"index": torch.tensor([0, 1], dtype=torch.int32)},
        {"index": torch.zeros(2, dtype=torch.int64, device="meta")},
        {"value": torch.ones(3)},
        {"value": torch.ones(2, dtype=torch.float64)},
        {"value": freed()},
        {"generation": torch.zeros(1, dtype=torch.int64)},
        {"generation": torch.zeros(2)},
        {"mask": torch.ones(1, dtype=torch.bool)},
        {"mask": torch.ones(2)},
        {"written": torch.tensor([8, 8])},
        {"written": torch.tensor([8.0])},
        {"generation": torch.zeros(2).long(), "stamps": torch.zeros(7).long()},
        {"generation": torch.zeros(2).long(), "stamps": torch.zeros(1000).long(), "limit": 1000},
        {"stamps": torch.zeros(8).long()},
        {"limit": 9},
    ],
)
def test_nothing_passes_the_door_that_is_not_as_a_kernel_reads_it(wrong, door, monkeypatch):
    made = table(monkeypatch, COMPILED, 8)
    made.write_runs(runs(0, 8))
    before = copy.deepcopy(made)
    right = {"index": torch.tensor([0, 1]), "value": torch.ones(2) * 3, "written": 8, "limit": 8}
    given = right | wrong
    index, value = given.pop("index"), given.pop("value")
    with pytest.raises(PerTdError, match="expected"):
        door.assign(made.trees, made.distribution, index, value, **given)
    assert_same(made, before)


def test_rows_from_outside_pass_the_door_only_if_they_are_as_the_columns(door):
    rows = rings(1, 5)
    new = batch(rows, 2)
    for k, column in enumerate(new[:-1]):
        for wrong in (column[:1], column.to(torch.complex64), column.to("meta")):
            with pytest.raises(PerTdError, match=r"expected (contiguous memory of|values, got)"):
                door.write_rows(rows, [*new[:k], wrong, *new[k + 1 :]], 2, runs(0, 2))
    for few in (new[:-1], [*new, new[0]]):
        with pytest.raises(PerTdError, match="expected 7 columns and 1 runs"):
            door.write_rows(rows, few, 2, runs(0, 2))
    with pytest.raises(PerTdError, match="expected 7 columns and 1 runs"):
        door.write_rows(rows, new, 2, runs(0, 2, 2))
    assert not any(column.any() for column in rows.columns)


@pytest.mark.parametrize("draw", ["independent", "stratified"])
def test_drawing_rows_in_one_go_is_to_draw_and_then_to_gather(draw, groups, door, monkeypatch):
    capacity, shape = 40, (30,) if groups is None else (groups, 30)
    made = table(monkeypatch, COMPILED, capacity, draw=draw, groups=groups)
    made.fill(torch.rand(*shape[:-1], capacity))
    rows = rings(groups or 1, capacity)
    for column in rows.columns:
        column.copy_(torch.randint(0, 2, column.shape))
    written = torch.arange(50, 50 + 7 * (groups or 1), 7)
    beta = torch.linspace(1, 0, groups or 1, dtype=torch.float64)
    how = {"stratified": draw == "stratified", "beta": beta, "normalization": "batch"}
    point = torch.rand(shape, dtype=torch.float64)
    found, *drawn, generation = door.draw_rows(
        made.trees, rows, point.clone(), written=written, **how
    )
    expected = door.draw(made.trees, point, written=written, **how)
    assert all(map(torch.equal, drawn, expected))
    gathered, generations = reference.gather(rows, drawn[0], written=written)
    assert all(map(torch.equal, found, gathered))
    assert torch.equal(generation, generations)


def test_rows_are_drawn_only_for_trees_of_as_many_slots(door, monkeypatch):
    made = table(monkeypatch, COMPILED, 40)
    made.fill(torch.ones(40))
    how = {"stratified": False, "beta": 0.5, "normalization": "batch", "written": 40}
    point = torch.rand(3, dtype=torch.float64)
    for rows in (rings(1, 39), rings(2, 40)):
        with pytest.raises(PerTdError, match="expected rows for the slots of 1 trees"):
            door.draw_rows(made.trees, rows, point, **how)
    made.fill(torch.zeros(40))
    assert door.draw_rows(made.trees, rings(1, 40), point, **how) is None


# --- which kernels --------------------------------------------------------------------------------


def test_only_what_there_is_can_be_asked_for(monkeypatch):
    monkeypatch.setenv(kernels.VARIABLE, "fast")
    with pytest.raises(ConfigurationError, match=r"PER_TD_KERNELS: expected .*, got 'fast'"):
        SumTree(4)


LOOP = """
import torch, warnings
from tensordict import TensorDict
import per_td, sys
assert not sys.modules.get("numba"), "numba was imported too early"
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        buffer = per_td.PrioritizedReplayBuffer(8, batch_size=4)
buffer.extend(TensorDict({"x": torch.rand(9, 2)}, batch_size=[9]))
batch = buffer.sample()
buffer.update_priority(batch["index"], torch.rand(4), batch["generation"])
said = [str(w.message) for w in caught if issubclass(w.category, per_td.KernelWarning)]
"""


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param(
            "",
            "assert said == [] and 'numba' in sys.modules and buffer.kernels",
            marks=pytest.mark.slow,
        ),
        (
            "import sys; sys.modules['numba'] = None",
            "assert len(said) == 1 and 'numba cannot be imported' in said[0], said",
        ),
        pytest.param(
            "import os; os.environ['PER_TD_KERNELS'] = 'off'",
            "assert said == [] and 'numba' not in sys.modules and not buffer.kernels",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["used", "missing", "off"],
)
def test_numba_comes_with_the_first_buffer_and_may_be_missing(before, after):
    subprocess.run([sys.executable, "-c", before + LOOP + after], check=True)


@pytest.mark.slow
def test_without_a_folder_to_cache_in_plain_torch_takes_over():
    before = """
import numba.core.caching as caching
def refuse(self):
    raise OSError("read-only file system")
caching._CacheLocator.ensure_cache_path = refuse
"""
    loop = LOOP.replace('assert not sys.modules.get("numba"), "numba was imported too early"', "")
    after = "assert len(said) == 1 and 'NUMBA_CACHE_DIR' in said[0], said"
    subprocess.run([sys.executable, "-c", before + loop + after], check=True)

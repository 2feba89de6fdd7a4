"""SumTree, one and many: the same tests hold, for S = None, 1 and 3."""

import copy
import math
import pickle
from operator import itemgetter

import pytest
import torch

from per_td import (
    ConfigurationError,
    EmptyBufferError,
    IndexRangeError,
    PriorityError,
    SumTree,
    validation,
)
from tests.support.choices import CHOICES
from tests.support.oracle import CAPACITIES, assert_drawn_from
from tests.support.parameters import few_of_all, slow_but

DRAWS = ("independent", "stratified")
CAPACITIES = slow_but((1, 17, 257, 4097), (*CAPACITIES, 4097))


@pytest.fixture(params=[None, 1, 3])
def trees(request) -> int | None:
    """How many trees; None: one, without a dimension for it."""
    return request.param


def lead(trees: int | None) -> tuple[int, ...]:
    return () if trees is None else (trees,)


def alike(trees: int | None, values, dtype=torch.float32) -> torch.Tensor:
    """The same values for each tree, [B] or [S, B]."""
    values = torch.as_tensor(values, dtype=dtype)
    return values.expand(*lead(trees), len(values))


def each(rows: torch.Tensor, trees: int | None) -> torch.Tensor:
    """A row for each tree, [S, B]."""
    return rows.reshape(trees or 1, -1)


def uneven(trees: int | None, n: int) -> torch.Tensor:
    """Masses of many sizes, with zeros among them, the last of each tree positive."""
    mass = torch.rand(*lead(trees), n, generator=torch.Generator().manual_seed(n)) ** 4
    if trees == 3:
        mass *= torch.tensor([1e6, 1.0, 1e-6]).unsqueeze(-1)
    mass[..., ::3] = 0.0
    mass[..., -1] = mass.amax(-1).clamp(min=1e-3)
    return mass


def filled(mass: torch.Tensor, device="cpu") -> SumTree:
    """Trees with these masses, [N] or [S, N]."""
    tree = SumTree(mass.shape[-1], device, num_trees=len(mass) if mass.ndim == 2 else None)
    tree.update(torch.arange(mass.shape[-1]).expand(mass.shape), mass)
    return tree


@pytest.mark.parametrize("capacity", CAPACITIES)
def test_random_updates_leave_what_a_loop_leaves(capacity, trees, choice, device):
    tree = SumTree(capacity, device, num_trees=trees)
    naive = [[0.0] * capacity for _ in range(trees or 1)]
    for _ in range(30 if capacity <= 1000 else 8):
        n = int(torch.randint(1, 2 * capacity + 2, ()))
        index = torch.randint(capacity, (*lead(trees), n))
        value = torch.rand(*lead(trees), n) ** 8 * (torch.rand(*lead(trees), n) > 0.2)
        tree.update(index, value)
        for s, own in enumerate(naive):
            at, new = each(index, trees)[s].tolist(), each(value, trees)[s].tolist()
            for i, v in zip(at, new, strict=True):
                own[i] = v
        assert each(tree[:], trees).tolist() == naive
        expected = [math.fsum(own) for own in naive]
        assert each(tree.total, trees).flatten().tolist() == pytest.approx(expected, rel=1e-14)
        assert tree.leaves[tree.layout.spare] == 0
    assert len(tree) == tree.capacity == capacity
    assert tree.num_trees == trees
    assert tree.total.shape == lead(trees)
    tree.check_valid()


@pytest.mark.parametrize("capacity", CAPACITIES)
def test_every_node_is_the_sum_of_its_children(capacity, trees, choice):
    tree = SumTree(capacity, num_trees=trees)
    tree.update(torch.arange(capacity).expand(tree[:].shape), torch.rand(tree[:].shape))
    tree.update(alike(trees, [0], torch.int64), alike(trees, [0.25]))
    children = tree.leaves.double()
    levels = tree.layout.levels(tree.nodes)
    for level, width in zip(levels, tree.layout.widths, strict=True):
        torch.testing.assert_close(level[:width], children.view(-1, 16).sum(-1), rtol=1e-15, atol=0)
        children = level


@pytest.mark.parametrize("capacity", CAPACITIES)
def test_points_are_found_where_the_cumulative_masses_say(capacity, trees, choice, device):
    mass = uneven(trees, capacity)
    tree = filled(mass, device)
    cumulative = mass.double().cumsum(-1)
    target = torch.rand(*lead(trees), 500, dtype=torch.float64) * tree.total.cpu().unsqueeze(-1)
    expected = torch.searchsorted(cumulative, target, right=True)
    assert torch.equal(tree.find(target.to(device)).cpu(), expected)


@pytest.mark.parametrize("capacity", CAPACITIES)
def test_the_ends_of_the_range_find_slots_of_positive_mass(capacity, trees, choice, device):
    mass = uneven(trees, capacity)
    tree = filled(mass, device)
    total = tree.total
    ends = torch.stack([torch.zeros_like(total), total, 2 * total], -1)
    found = each(tree.find(ends), trees).tolist()
    for row, own in zip(found, each(mass, trees), strict=True):
        positive = own.nonzero().flatten().tolist()
        assert row == [positive[0], positive[-1], positive[-1]]


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("capacity", slow_but((7, 257), (1, 7, 50, 257, 1000)))
def test_draws_follow_the_masses_of_each_tree(draw, capacity, trees, choice, device, generator):
    mass = uneven(trees, capacity)
    index = filled(mass, device).sample(100 * capacity, generator, draw=draw)
    assert index.shape == (*lead(trees), 100 * capacity)
    for drawn, own in zip(each(index, trees), each(mass, trees), strict=True):
        assert_drawn_from(drawn, own.double() / own.double().sum())


def test_stratified_draws_come_one_from_each_part_of_the_total(trees, choice, device, generator):
    mass, n = uneven(trees, 1000), 64
    tree = filled(mass, device)
    for _ in range(20):
        index = tree.sample(n, generator, draw="stratified").cpu()
        upper = mass.double().cumsum(-1).gather(-1, index)
        lower = upper - mass.double().gather(-1, index)
        edges = torch.arange(n + 1) * mass.double().sum(-1, keepdim=True) / n
        assert (upper >= edges[..., :-1] * (1 - 1e-12)).all()
        assert (lower <= edges[..., 1:] * (1 + 1e-12)).all()


def successive(mass: list[float], k: int) -> dict[tuple[int, ...], float]:
    """Probability of every ordered draw of k without replacement."""
    outcomes = {(): 1.0}
    for _ in range(k):
        nxt = {}
        for drawn, p in outcomes.items():
            rest = math.fsum(m for i, m in enumerate(mass) if i not in drawn)
            for i, m in enumerate(mass):
                if i not in drawn and m > 0:
                    nxt[(*drawn, i)] = p * m / rest
        outcomes = nxt
    return outcomes


MASSES = {
    "even": [1.0, 1.5, 2.0, 1.25, 0.75],  # 2 n points mostly give n slots
    "uneven": [8.0, 0.0, 1.0, 0.5, *[0.0] * 30, 2.0, 0.01],
    "one": [6e-10, 3e-10, 1.0, 1e-10, 0.0],  # they never do: one slot holds 1 - 1e-9 of the mass
}


@pytest.mark.parametrize(("mass", "choice"), few_of_all(MASSES, CHOICES), indirect=["choice"])
def test_draws_without_replacement_are_exactly_sequential(mass, trees, choice, device, generator):
    mass = torch.tensor(MASSES[mass])
    mass = torch.stack([mass.roll(7 * s) * 10.0**-s for s in range(trees or 1)])
    tree = filled(mass if trees else mass[0], device)
    drawn = [
        each(tree.sample(3, generator, draw="without_replacement"), trees).tolist()
        for _ in range(4000)
    ]
    for s, own in enumerate(mass.tolist()):
        expected = successive(own, 3)
        for seen in (tuple, lambda row: tuple(sorted(row)), itemgetter(0), itemgetter(1)):
            shares: dict = {}  # of the ordered draws, of what is drawn at all, first and second
            for outcome, p in expected.items():
                shares[seen(outcome)] = shares.get(seen(outcome), 0.0) + p
            place = {share: i for i, share in enumerate(shares)}
            code = torch.tensor([place[seen(rows[s])] for rows in drawn])
            assert_drawn_from(code, list(shares.values()))


@pytest.mark.parametrize("capacity", CAPACITIES)
def test_draws_without_replacement_can_take_everything_there_is(
    capacity, trees, choice, device, generator
):
    mass = uneven(trees, capacity)
    positive = each(mass, trees)[0].nonzero().flatten().tolist()
    index = filled(mass, device).sample(len(positive), generator, draw="without_replacement")
    assert [sorted(row) for row in each(index, trees).tolist()] == [positive] * (trees or 1)


def test_draws_without_replacement_do_not_stall_where_few_masses_dominate(
    trees, choice, device, generator
):
    tree = SumTree(100_000, device, num_trees=trees)
    tree.fill(torch.full(tree[:].shape, 1e-20))
    tree.update(alike(trees, [5, 77_777], torch.int64), alike(trees, [1e20, 1e10]))
    for row in each(tree.sample(1000, generator, draw="without_replacement"), trees).tolist():
        assert row[:2] == [5, 77_777]
        assert len(set(row)) == 1000


@pytest.mark.parametrize("draw", [*DRAWS, "without_replacement"])
def test_extreme_masses_are_drawn_in_their_order(draw, trees, choice, device, generator):
    tree = filled(alike(trees, [1e-30, 0.0, 1e30, 0.0, 1e30]), device)
    index = tree.sample(2, generator, draw=draw)
    assert set(index.flatten().tolist()) <= {2, 4}


@pytest.mark.slow
@pytest.mark.parametrize("draw", DRAWS)
def test_a_tree_of_1e8_equal_masses_is_unbiased_and_small(draw):
    capacity = 10**8
    tree = SumTree(capacity)
    tree.fill(torch.ones(capacity))
    assert tree.total.item() == capacity
    index = tree.sample(1_000_000, torch.Generator().manual_seed(1), draw=draw)
    share = torch.bincount(index % 8, minlength=8) / len(index)
    assert ((share - 0.125).abs() < 0.002).all(), share
    held = [each.untyped_storage().nbytes() for each in (tree.leaves, tree.nodes)]  # all of it
    assert tree.leaves.nbytes + tree.nodes.nbytes <= sum(held) <= 6 * capacity


def test_capacities_beyond_2_to_24_reach_their_last_slots(generator, device):
    capacity = 2**24 + 3
    tree = SumTree(capacity, device)
    tree.update([0, 2**24, capacity - 1], [1.0, 1.0, 2.0])
    index = tree.sample(4000, generator)
    assert_drawn_from((index // 2**24) + (index % 2**24 > 1), [0.25, 0.25, 0.5])


def test_a_large_and_a_small_mass_sum_without_drift(trees, choice, device):
    tree = SumTree(1000, device, num_trees=trees)
    tree.update(alike(trees, range(1000), torch.int64), alike(trees, [1e-6] * 1000))
    for _ in range(100):
        tree.update(alike(trees, [3], torch.int64), alike(trees, [1e30]))
        tree.update(alike(trees, [3], torch.int64), alike(trees, [1e-6]))
    expected = float(torch.tensor(1e-6)) * 1000
    assert tree.total.tolist() == pytest.approx(
        expected if trees is None else [expected] * trees, rel=1e-12
    )


def test_a_seed_fixes_every_draw(trees, choice, device):
    tree = filled(uneven(trees, 300), device)
    for draw in (*DRAWS, "without_replacement"):
        drawn = []
        for _ in range(2):
            torch.manual_seed(3)
            drawn.append(tree.sample(50, draw=draw).tolist())
            generator = torch.Generator(device).manual_seed(3)
            drawn.append(tree.sample(50, generator, draw=draw).tolist())
        assert drawn[0] == drawn[2]
        assert drawn[1] == drawn[3]


@pytest.mark.parametrize(
    ("index", "value", "error", "message"),
    [
        ([5], [1.0], IndexRangeError, r"0 <= index < 5, .* got 5 at position 0"),
        ([0, -1], [1.0, 1.0], IndexRangeError, r"got -1 at position 1"),
        ([0.5], [1.0], IndexRangeError, r"integer dtype, got torch.float32"),
        ([[0]], [[1.0]], IndexRangeError, r"shape \[B\], got \[1, 1\]"),
        ([0, 1], [1.0], PriorityError, r"value: expected shape \[2\], .* got \[1\]"),
        ([0, 1], [1.0, math.nan], PriorityError, r"value: .* got nan at position 1"),
        ([0, 1], [math.inf, 1.0], PriorityError, r"value: .* got inf at position 0"),
        ([0, 1], [1.0, -0.5], PriorityError, r"at least 0 .* got -0.5 at position 1"),
        ([0], [True], PriorityError, r"real dtype, got torch.bool"),
    ],
)
def test_wrong_updates_are_refused_by_name_and_change_nothing(index, value, error, message, choice):
    tree = filled(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]))
    with pytest.raises(error, match=message):
        tree.update(index, value)
    assert tree[:].tolist() == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert tree.total.item() == 15.0


@pytest.mark.parametrize(
    ("index", "value", "error", "message"),
    [
        ([[0], [5]], [[1.0], [1.0]], IndexRangeError, r"0 <= index < 5, .* got 5"),
        ([[0], [-1]], [[1.0], [1.0]], IndexRangeError, "got -1"),
        ([0, 1], [1.0, 1.0], IndexRangeError, r"expected shape \[2, B\], got \[2\]"),
        ([[0]], [[1.0]], IndexRangeError, r"expected shape \[2, B\], got \[1, 1\]"),
        ([[0.5], [0.5]], [[1.0], [1.0]], IndexRangeError, r"integer dtype, got torch.float32"),
        ([[0], [1]], [1.0, 1.0], PriorityError, r"value: expected shape \[2, 1\]"),
        ([[0], [1]], [[1.0], [math.nan]], PriorityError, "value: .* got nan"),
        ([[0], [1]], [[1.0], [-1.0]], PriorityError, "at least 0 .* got -1"),
    ],
)
def test_wrong_updates_of_many_are_refused_by_name_and_change_nothing(
    index, value, error, message, choice
):
    tree = filled(torch.arange(1.0, 11).view(2, 5))
    with pytest.raises(error, match=message):
        tree.update(index, value)
    assert tree[:].tolist() == [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]]
    assert tree.total.tolist() == [15, 40]


def test_nothing_can_be_drawn_from_masses_of_zero(trees, choice):
    with pytest.raises(EmptyBufferError, match="only masses of 0"):
        SumTree(10, num_trees=trees).sample(1)


def test_a_tree_with_nothing_to_draw_is_named(choice):
    tree = filled(torch.tensor([[1.0, 0], [0, 0], [1, 1]]))
    with pytest.raises(EmptyBufferError, match="only masses of 0 in 1 of 3: 1"):
        tree.sample(1)
    tree.update([[0], [0], [0]], [[1.0], [1], [1]])
    with pytest.raises(EmptyBufferError, match=r"at least 2 .* got 1 in 2 of 3: 0, 1"):
        tree.sample(2, draw="without_replacement")


def test_more_than_there_is_cannot_be_drawn_without_replacement(trees, choice):
    tree = filled(alike(trees, [1.0, 0.0, 2.0]))
    with pytest.raises(EmptyBufferError, match=r"at least 3 .* got 2"):
        tree.sample(3, draw="without_replacement")
    with pytest.raises(EmptyBufferError, match="at least 4"):
        tree.sample(4, draw="without_replacement")


@pytest.mark.parametrize("capacity", [0, -1, 2.0, True, None])
def test_a_capacity_is_a_positive_integer(capacity, trees):
    with pytest.raises(ConfigurationError, match="capacity: expected an integer of at least 1"):
        SumTree(capacity, num_trees=trees)


@pytest.mark.parametrize("num_trees", [0, -1, 2.0, True])
def test_the_number_of_trees_is_a_positive_integer(num_trees):
    with pytest.raises(ConfigurationError, match="num_trees: expected an integer of at least 1"):
        SumTree(4, num_trees=num_trees)


def test_a_derived_class_may_be_many_trees_too():
    class Own(SumTree):
        pass

    for trees in (None, 2):
        own = Own(4, num_trees=trees)
        assert type(own) is Own
        assert own[:].shape == (*lead(trees), 4)


def test_trees_can_be_copied_and_pickled(trees, choice):
    tree = filled(uneven(trees, 20))
    before = tree[:].clone()
    for other in (copy.deepcopy(tree), pickle.loads(pickle.dumps(tree))):
        assert type(other) is SumTree
        assert other.compiled == tree.compiled
        assert torch.equal(other[:], tree[:])
        other.update(alike(trees, [0], torch.int64), alike(trees, [9.0]))
        assert each(other[:], trees)[:, 0].tolist() == [9] * (trees or 1)
        assert torch.equal(tree[:], before)
        other.check_valid()


@pytest.mark.parametrize("wrong", [math.nan, -1.0, math.inf, -math.inf, 1e39])
def test_fill_refuses_what_is_no_mass_before_anything_is_written(wrong, trees, choice):
    tree = SumTree(5, num_trees=trees)
    mass = torch.rand(tree[:].shape, dtype=torch.float64)
    tree.fill(mass)
    before = tree.nodes.clone(), tree.leaves.clone()
    mass.view(-1)[3] = wrong
    with pytest.raises(PriorityError, match=r"value: expected finite values of at least 0"):
        tree.fill(mass)
    assert torch.equal(tree.nodes, before[0])
    assert torch.equal(tree.leaves, before[1])


@pytest.mark.parametrize("wrong", [math.nan, -1.0, math.inf])
def test_where_values_cannot_be_looked_at_those_that_are_no_masses_count_as_0(
    wrong, trees, choice, monkeypatch
):
    monkeypatch.setattr(validation, "can_raise", lambda tensor: False)
    tree = SumTree(3, num_trees=trees)
    tree.fill(alike(trees, [1.0, wrong, 2.0]))
    assert torch.equal(tree[:], alike(trees, [1.0, 0.0, 2.0]))
    assert (tree.total == 3).all()


@pytest.mark.parametrize("shape", [(), (1,), (4,), (6,), (5, 1), (2, 4), (3, 4), (4, 5), (3, 5, 1)])
def test_fill_takes_one_mass_per_slot(shape, trees):
    tree = SumTree(5, num_trees=trees)
    with pytest.raises(PriorityError, match=r"value: expected shape \[.*5\], one per slot, got"):
        tree.fill(torch.ones(shape))
    assert not tree[:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int64, torch.uint8])
def test_points_of_any_real_dtype_are_found(trees, dtype, choice):
    tree = SumTree(100, num_trees=trees)
    tree.fill(torch.full_like(tree[:], 2.0))
    target = torch.arange(200).expand(*tree[:].shape[:-1], 200).to(dtype)
    assert torch.equal(tree.find(target), target.long() // 2)


@pytest.mark.parametrize(
    ("trees", "shape"),
    [(None, ()), (None, (2, 3)), (1, (3,)), (2, ()), (2, (2,)), (2, (3, 2)), (2, (1, 2))],
)
def test_find_takes_points_for_each_tree(trees, shape):
    tree = SumTree(5, num_trees=trees)
    with pytest.raises(PriorityError, match=r"target: expected shape \[.*B\], got"):
        tree.find(torch.zeros(shape, dtype=torch.float64))


@pytest.mark.parametrize("capacity", [1, 5, 300, 5000])
def test_points_outside_are_moved_inside(capacity, trees, choice):
    tree = SumTree(capacity, num_trees=trees)
    outside = [math.nan, -math.inf, -1.0, -0.0, 0.0, 1e300, math.inf]
    target = alike(trees, outside, torch.float64)
    found = tree.find(target)
    assert ((found >= 0) & (found < capacity)).all(), "of an empty tree, some slot"
    mass = torch.ones(tree[:].shape)
    mass[..., : capacity // 3] = 0.0
    mass[..., capacity - capacity // 3 :] = 0.0
    tree.fill(mass)
    first, last = capacity // 3, capacity - capacity // 3 - 1
    expected = torch.tensor([first] * 5 + [last] * 2).expand(target.shape)
    assert torch.equal(tree.find(target), expected)


@pytest.mark.parametrize(
    "index",
    [5, -6, [5], torch.tensor([0, 9]), torch.rand(2), "a", 1.5, 10**30, slice(None, None, -1)],
)
def test_masses_of_slots_that_do_not_exist_are_refused(index):
    with pytest.raises(IndexRangeError, match=r"index: expected one into masses of shape \[5\]"):
        SumTree(5)[index]


@pytest.mark.parametrize(
    "index", [torch.eye(2).long().to_sparse(), torch.zeros(2, dtype=torch.int64, device="meta")]
)
def test_slots_without_values_are_refused(index):
    with pytest.raises(IndexRangeError, match="index: expected"):
        SumTree(5)[index]


def test_masses_that_were_asked_for_may_be_changed():
    tree = SumTree(5)
    tree.fill(torch.ones(5))
    tree[:2].fill_(7.0)
    tree.check_valid()
    assert tree[:].tolist() == [1.0] * 5


@pytest.mark.parametrize("index", [2, -3, (0, 5), (slice(None), [5]), "a"])
def test_masses_of_trees_and_slots_that_do_not_exist_are_refused(index):
    with pytest.raises(IndexRangeError, match=r"expected one into masses of shape \[2, 5\]"):
        SumTree(5, num_trees=2)[index]


def test_only_a_generator_draws(trees):
    tree = SumTree(5, num_trees=trees)
    tree.fill(torch.ones_like(tree[:]))
    with pytest.raises(
        ConfigurationError, match=r"generator: expected a torch\.Generator, got int"
    ):
        tree.sample(3, 7)


@pytest.mark.parametrize("capacity", [1, 20])
@pytest.mark.parametrize("num_trees", [None, 3])
def test_one_draw_without_replacement_from_masses_of_0_raises(num_trees, capacity, choice):
    tree = SumTree(capacity, "cpu", num_trees=num_trees)
    if num_trees:  # the others have something
        tree.update(torch.zeros(3, 1, dtype=torch.int64), torch.tensor([[1.0], [0.0], [2.0]]))
    with pytest.raises(EmptyBufferError):
        tree.sample(1, draw="without_replacement")

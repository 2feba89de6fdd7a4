import math

import pytest
import torch

from per_td import (
    ConfigurationError,
    EmptyBufferError,
    IndexRangeError,
    PriorityError,
    SumTree,
    kernels,
    validation,
)
from per_td.tree import Layout
from tests.support.oracle import CAPACITIES, assert_drawn_from

DRAWS = ("independent", "stratified")


def filled(values, device="cpu") -> SumTree:
    tree = SumTree(len(values), device)
    tree.update(range(len(values)), torch.as_tensor(values, dtype=torch.float32))
    return tree


def uneven(n: int) -> torch.Tensor:
    """Masses of many sizes, with zeros among them, the last one positive."""
    mass = torch.rand(n, generator=torch.Generator().manual_seed(n)) ** 4
    mass[::3] = 0.0
    mass[-1] = 0.7
    return mass


@pytest.mark.parametrize("capacity", CAPACITIES)
def test_random_updates_leave_what_a_loop_leaves(capacity, device, generator):
    tree, naive = SumTree(capacity, device), [0.0] * capacity
    for _ in range(30):
        n = int(torch.randint(1, 2 * capacity + 2, ()))
        index = torch.randint(capacity, (n,))
        value = torch.rand(n) ** 8 * (torch.rand(n) > 0.2)
        tree.update(index, value)
        for i, v in zip(index.tolist(), value.tolist(), strict=True):
            naive[i] = v
        assert tree[:].tolist() == naive
        assert tree.total.item() == pytest.approx(math.fsum(naive), rel=1e-14)


@pytest.mark.parametrize("capacity", CAPACITIES)
def test_every_node_is_the_sum_of_its_children(capacity):
    tree = SumTree(capacity)
    tree.update(torch.arange(capacity), torch.rand(capacity))
    tree.update([0], [0.25])
    children = tree.leaves.double()
    for level, width in zip(tree.levels, tree.layout.widths, strict=True):
        torch.testing.assert_close(level[:width], children.view(-1, 16).sum(-1), rtol=1e-15, atol=0)
        children = level


@pytest.mark.parametrize("capacity", CAPACITIES)
def test_points_are_found_where_the_cumulative_masses_say(capacity, device):
    mass = uneven(capacity)
    tree = filled(mass, device)
    cumulative = mass.double().cumsum(0)
    target = torch.rand(500, dtype=torch.float64) * tree.total.cpu()
    expected = torch.searchsorted(cumulative, target, right=True)
    assert tree.find(target.to(device)).tolist() == expected.tolist()


@pytest.mark.parametrize("capacity", CAPACITIES)
def test_the_ends_of_the_range_find_slots_of_positive_mass(capacity, device):
    mass = uneven(capacity)
    tree = filled(mass, device)
    ends = torch.tensor([0.0, tree.total.item(), 2 * tree.total.item()], dtype=torch.float64)
    first, last, beyond = tree.find(ends.to(device)).tolist()
    positive = mass.nonzero().flatten().tolist()
    assert (first, last, beyond) == (positive[0], positive[-1], positive[-1])


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("capacity", [1, 7, 50, 257, 1000])
def test_draws_follow_the_masses(draw, capacity, device, generator):
    mass = uneven(capacity)
    index = filled(mass, device).sample(100 * capacity, generator, draw=draw)
    assert_drawn_from(index, mass.double() / mass.double().sum())


def test_stratified_draws_come_one_from_each_part_of_the_total(device, generator):
    mass = uneven(1000)
    tree = filled(mass, device)
    n = 64
    for _ in range(20):
        index = tree.sample(n, generator, draw="stratified").cpu()
        upper = mass.double().cumsum(0)[index]
        lower = upper - mass.double()[index]
        edges = torch.arange(n + 1) * mass.double().sum() / n
        assert (upper >= edges[:-1] - 1e-9).all()
        assert (lower <= edges[1:] + 1e-9).all()


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


def test_draws_without_replacement_are_exactly_sequential(device, generator):
    mass = [8.0, 0.0, 1.0, 0.5, *[0.0] * 30, 2.0, 0.01]
    expected = successive(mass, 3)
    order = {outcome: i for i, outcome in enumerate(expected)}
    tree = filled(mass, device)
    drawn = [
        order[tuple(tree.sample(3, generator, draw="without_replacement").tolist())]
        for _ in range(4000)
    ]
    assert_drawn_from(torch.tensor(drawn), list(expected.values()))


@pytest.mark.parametrize("capacity", CAPACITIES)
def test_draws_without_replacement_can_take_everything_there_is(capacity, device, generator):
    mass = uneven(capacity)
    positive = mass.nonzero().flatten().tolist()
    index = filled(mass, device).sample(len(positive), generator, draw="without_replacement")
    assert sorted(index.tolist()) == positive


def test_draws_without_replacement_do_not_stall_where_few_masses_dominate(device, generator):
    tree = SumTree(100_000, device)
    tree.fill(torch.full((100_000,), 1e-20))
    tree.update([5, 77_777], [1e20, 1e10])
    index = tree.sample(1000, generator, draw="without_replacement").tolist()
    assert index[:2] == [5, 77_777]
    assert len(set(index)) == 1000


@pytest.mark.parametrize("draw", [*DRAWS, "without_replacement"])
def test_extreme_masses_are_drawn_in_their_order(draw, device, generator):
    tree = filled([1e-30, 0.0, 1e30, 0.0, 1e30], device)
    index = tree.sample(2, generator, draw=draw)
    assert set(index.tolist()) <= {2, 4}


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
    held = tree.leaves.nbytes + tree.nodes.nbytes
    assert held <= 6 * capacity


def test_capacities_beyond_2_to_24_reach_their_last_slots(generator, device):
    capacity = 2**24 + 3
    tree = SumTree(capacity, device)
    tree.update([0, 2**24, capacity - 1], [1.0, 1.0, 2.0])
    index = tree.sample(4000, generator)
    assert_drawn_from((index // 2**24) + (index % 2**24 > 1), [0.25, 0.25, 0.5])


def test_a_large_and_a_small_mass_sum_without_drift(device):
    tree = SumTree(1000, device)
    tree.update(range(1000), [1e-6] * 1000)
    for _ in range(100):
        tree.update([3], [1e30])
        tree.update([3], [1e-6])
    assert tree.total.item() == pytest.approx(float(torch.tensor(1e-6)) * 1000, rel=1e-12)


def test_a_seed_fixes_every_draw(device):
    tree = filled(uneven(300), device)
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
def test_wrong_updates_are_refused_by_name_and_change_nothing(index, value, error, message):
    tree = filled([1.0, 2.0, 3.0, 4.0, 5.0])
    with pytest.raises(error, match=message):
        tree.update(index, value)
    assert tree[:].tolist() == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert tree.total.item() == 15.0


def test_nothing_can_be_drawn_from_masses_of_zero():
    with pytest.raises(EmptyBufferError, match="only masses of 0"):
        SumTree(10).sample(1)


def test_more_than_there_is_cannot_be_drawn_without_replacement():
    tree = filled([1.0, 0.0, 2.0])
    with pytest.raises(EmptyBufferError, match=r"at least 3 .* got 2"):
        tree.sample(3, draw="without_replacement")
    with pytest.raises(EmptyBufferError, match="at least 4"):
        tree.sample(4, draw="without_replacement")


@pytest.mark.parametrize("capacity", [0, -1, 2.0, True, None])
def test_a_capacity_is_a_positive_integer(capacity):
    with pytest.raises(ConfigurationError, match="capacity: expected an integer of at least 1"):
        SumTree(capacity)


@pytest.mark.parametrize("capacity", [*CAPACITIES, 4095, 4096, 10**8])
def test_the_layout_has_a_root_a_spare_leaf_and_whole_groups(capacity):
    layout = Layout.of(capacity)
    assert layout.spare < layout.leaf_slots
    assert layout.leaf_slots % 16 == 0
    assert layout.widths[-1] == 1
    below = layout.leaf_slots
    for width in layout.widths:
        assert width == -(-below // 16)
        below = width


@pytest.mark.parametrize("trees", [None, 2])
@pytest.mark.parametrize("wrong", [math.nan, -1.0, math.inf, -math.inf, 1e39])
def test_fill_refuses_what_is_no_mass_before_anything_is_written(wrong, trees, monkeypatch):
    for choice in kernels.CHOICES:
        monkeypatch.setenv(kernels.VARIABLE, choice)
        tree = SumTree(5, num_trees=trees)
        mass = torch.rand(tree[:].shape, dtype=torch.float64)
        tree.fill(mass)
        before = tree.nodes.clone()
        mass.view(-1)[3] = wrong
        with pytest.raises(PriorityError, match=r"value: expected finite values of at least 0"):
            tree.fill(mass)
        assert torch.equal(tree.nodes, before)


@pytest.mark.parametrize("wrong", [math.nan, -1.0, math.inf])
def test_where_values_cannot_be_looked_at_those_that_are_no_masses_count_as_0(wrong, monkeypatch):
    monkeypatch.setattr(validation, "can_raise", lambda tensor: False)
    tree = SumTree(3)
    tree.fill([1.0, wrong, 2.0])
    assert tree[:].tolist() == [1.0, 0.0, 2.0]
    assert tree.total == 3


@pytest.mark.parametrize("trees", [None, 2])
@pytest.mark.parametrize("shape", [(), (1,), (4,), (6,), (5, 1), (2, 4), (3, 5), (2, 5, 1)])
def test_fill_takes_one_mass_per_slot(shape, trees):
    tree = SumTree(5, num_trees=trees)
    with pytest.raises(PriorityError, match=r"value: expected shape \[.*5\], one per slot, got"):
        tree.fill(torch.ones(shape))
    assert not tree[:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int64, torch.uint8])
@pytest.mark.parametrize("trees", [None, 2])
def test_points_of_any_real_dtype_are_found(trees, dtype, monkeypatch):
    for choice in kernels.CHOICES:
        monkeypatch.setenv(kernels.VARIABLE, choice)
        tree = SumTree(100, num_trees=trees)
        tree.fill(torch.full_like(tree[:], 2.0))
        target = torch.arange(200).expand(*tree[:].shape[:-1], 200).to(dtype)
        assert torch.equal(tree.find(target), target.long() // 2)


@pytest.mark.parametrize(
    ("trees", "shape"), [(None, ()), (None, (2, 3)), (2, ()), (2, (2,)), (2, (3, 2)), (2, (1, 2))]
)
def test_find_takes_points_for_each_tree(trees, shape):
    tree = SumTree(5, num_trees=trees)
    with pytest.raises(PriorityError, match=r"target: expected shape \[.*B\], got"):
        tree.find(torch.zeros(shape, dtype=torch.float64))


@pytest.mark.parametrize("trees", [None, 2])
@pytest.mark.parametrize("capacity", [1, 5, 300, 5000])
def test_points_outside_are_moved_inside(capacity, trees, monkeypatch):
    for choice in kernels.CHOICES:
        monkeypatch.setenv(kernels.VARIABLE, choice)
        tree = SumTree(capacity, num_trees=trees)
        outside = [math.nan, -math.inf, -1.0, -0.0, 0.0, 1e300, math.inf]
        target = torch.tensor(outside).double().expand(*tree[:].shape[:-1], -1)
        found = tree.find(target)
        assert ((found >= 0) & (found < capacity)).all(), "of an empty tree, some slot"
        mass = torch.ones(tree[:].shape)
        mass[..., : capacity // 3] = 0.0
        mass[..., capacity - capacity // 3 :] = 0.0
        tree.fill(mass)
        first, last = capacity // 3, capacity - capacity // 3 - 1
        expected = torch.tensor([first] * 5 + [last] * 2).expand(target.shape)
        assert torch.equal(tree.find(target), expected)


@pytest.mark.parametrize("index", [5, -6, [5], torch.tensor([0, 9]), torch.rand(2), "a", 1.5])
def test_masses_of_slots_that_do_not_exist_are_refused(index):
    with pytest.raises(IndexRangeError, match=r"index: expected one into masses of shape \[5\]"):
        SumTree(5)[index]


@pytest.mark.parametrize("trees", [None, 2])
def test_only_a_generator_draws(trees):
    tree = SumTree(5, num_trees=trees)
    tree.fill(torch.ones_like(tree[:]))
    with pytest.raises(
        ConfigurationError, match=r"generator: expected a torch\.Generator, got int"
    ):
        tree.sample(3, 7)

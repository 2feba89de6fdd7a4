import copy
import math
import pickle

import pytest
import torch

from per_td import (
    ConfigurationError,
    EmptyBufferError,
    IndexRangeError,
    PriorityError,
    SumTree,
    kernels,
)
from per_td.tree import ForestLayout
from tests.support.oracle import assert_drawn_from
from tests.support.parameters import slow_but

CAPACITIES = (1, 7, 16, 17, 50, 255, 256, 257, 1000, 4097)


@pytest.fixture(params=kernels.CHOICES)
def choice(request, monkeypatch) -> str:
    """With kernels and without."""
    monkeypatch.setenv(kernels.VARIABLE, request.param)
    return request.param


def uneven(count: int, n: int) -> torch.Tensor:
    """Masses of many sizes, with zeros among them, the last of each tree positive."""
    mass = torch.rand(count, n, generator=torch.Generator().manual_seed(n)) ** 4
    mass *= torch.tensor([1e6, 1.0, 1e-6])[:count].unsqueeze(-1)
    mass[:, ::3] = 0.0
    mass[:, -1] = mass.amax(-1).clamp(min=1e-3)
    return mass


def filled(mass: torch.Tensor, device="cpu") -> SumTree:
    trees = SumTree(mass.shape[1], device, num_trees=len(mass))
    trees.update(torch.arange(mass.shape[1]).expand(len(mass), -1), mass)
    return trees


@pytest.mark.parametrize("capacity", [*CAPACITIES, 10_000, 65_536, 65_537, 10**6])
def test_a_tree_owns_whole_nodes_and_wastes_less_than_half(capacity):
    forest = ForestLayout.of(capacity, 5)
    assert 1 <= forest.width <= 16
    assert forest.stride == forest.width * 16**forest.height
    assert capacity <= forest.stride < 2 * max(capacity, 16)
    nodes = torch.zeros(forest.layout.node_slots)
    assert forest.tops(nodes).shape == (5, forest.width)
    assert forest.layout.spare == 5 * forest.stride


@pytest.mark.parametrize("capacity", slow_but([1, 7, 16, 17, 257, 4097], CAPACITIES))
def test_random_updates_leave_what_separate_trees_hold(capacity, choice, device):
    trees = SumTree(capacity, device, num_trees=3)
    singles = [SumTree(capacity, device) for _ in range(3)]
    for _ in range(20):
        n = int(torch.randint(1, 2 * capacity + 2, ()))
        index = torch.randint(capacity, (3, n))
        value = torch.rand(3, n) ** 8 * (torch.rand(3, n) > 0.2)
        trees.update(index, value)
        for s, single in enumerate(singles):
            single.update(index[s], value[s])
            assert torch.equal(trees[s], single[:])
        expected = [single.total.item() for single in singles]
        assert trees.total.tolist() == pytest.approx(expected, rel=1e-14)
        assert trees.leaves[trees.layout.spare] == 0
    assert len(trees) == trees.capacity == capacity


@pytest.mark.parametrize("capacity", CAPACITIES)
def test_points_are_found_where_the_cumulative_masses_say(capacity, choice, device):
    mass = uneven(3, capacity)
    trees = filled(mass, device)
    cumulative = mass.double().cumsum(-1)
    target = torch.rand(3, 200, dtype=torch.float64) * trees.total.cpu().unsqueeze(-1)
    expected = torch.searchsorted(cumulative, target, right=True)
    assert torch.equal(trees.find(target.to(device)).cpu(), expected)


@pytest.mark.parametrize("capacity", CAPACITIES)
def test_the_ends_of_the_range_find_slots_of_positive_mass(capacity, choice, device):
    mass = uneven(3, capacity)
    trees = filled(mass, device)
    total = trees.total
    ends = torch.stack([torch.zeros_like(total), total, 2 * total], -1)
    for s, row in enumerate(trees.find(ends).tolist()):
        positive = mass[s].nonzero().flatten().tolist()
        assert row == [positive[0], positive[-1], positive[-1]]


@pytest.mark.parametrize("draw", ["independent", "stratified"])
@pytest.mark.parametrize("capacity", [1, 7, 50, 257])
def test_draws_follow_the_masses_of_each_tree(draw, capacity, choice, device, generator):
    mass = uneven(3, capacity)
    index = filled(mass, device).sample(100 * capacity, generator, draw=draw)
    for s in range(3):
        assert_drawn_from(index[s], mass[s].double() / mass[s].double().sum())


def test_stratified_draws_come_one_from_each_part_of_the_total(choice, device, generator):
    mass, n = uneven(3, 300), 64
    index = filled(mass, device).sample(n, generator, draw="stratified").cpu()
    upper = mass.double().cumsum(-1).gather(1, index)
    lower = upper - mass.double().gather(1, index)
    edges = torch.arange(n + 1) * mass.double().sum(-1, keepdim=True) / n
    assert (upper >= edges[:, :-1] * (1 - 1e-12)).all()
    assert (lower <= edges[:, 1:] * (1 + 1e-12)).all()


def test_draws_without_replacement_are_exactly_sequential(device, generator):
    mass = torch.tensor([[8.0, 0, 1, *[0.0] * 40, 0.5], [0, 1e-9, 2e-9, *[0.0] * 40, 4e-9]])
    trees = filled(mass, device)
    drawn = torch.stack(
        [trees.sample(2, generator, draw="without_replacement") for _ in range(4000)], 1
    )
    for s in range(2):
        p = mass[s].double() / mass[s].double().sum()
        pairs = p.unsqueeze(-1) * p / (1 - p).unsqueeze(-1)
        pairs = pairs.fill_diagonal_(0.0)
        code = drawn[s, :, 0] * len(p) + drawn[s, :, 1]
        assert_drawn_from(code, pairs.flatten())


@pytest.mark.parametrize("capacity", CAPACITIES)
def test_draws_without_replacement_can_take_everything_there_is(capacity, device, generator):
    mass = uneven(3, capacity)
    positive = mass[0].nonzero().flatten().tolist()
    index = filled(mass, device).sample(len(positive), generator, draw="without_replacement")
    assert [sorted(row) for row in index.tolist()] == [positive] * 3


@pytest.mark.parametrize(
    ("index", "value", "error", "message"),
    [
        ([[0], [5]], [[1.0], [1.0]], IndexRangeError, r"0 <= index < 5, .* got 5"),
        ([[0], [-1]], [[1.0], [1.0]], IndexRangeError, "got -1"),
        ([0, 1], [1.0, 1.0], IndexRangeError, r"expected shape \[2, B\], got \[2\]"),
        ([[0], [1]], [1.0, 1.0], PriorityError, r"value: expected shape \[2, 1\]"),
        ([[0], [1]], [[1.0], [math.nan]], PriorityError, "value: .* got nan"),
        ([[0], [1]], [[1.0], [-1.0]], PriorityError, "at least 0 .* got -1"),
    ],
)
def test_wrong_updates_are_refused_by_name_and_change_nothing(index, value, error, message, choice):
    trees = filled(torch.arange(1.0, 11).view(2, 5))
    with pytest.raises(error, match=message):
        trees.update(index, value)
    assert trees[:].tolist() == [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]]
    assert trees.total.tolist() == [15, 40]


def test_a_tree_with_nothing_to_draw_is_named(choice):
    trees = filled(torch.tensor([[1.0, 0], [0, 0], [1, 1]]))
    with pytest.raises(EmptyBufferError, match="only masses of 0 in 1 of 3: 1"):
        trees.sample(1)
    trees.update([[0], [0], [0]], [[1.0], [1], [1]])
    with pytest.raises(EmptyBufferError, match=r"at least 2 .* got fewer in 2 of 3: 0, 1"):
        trees.sample(2, draw="without_replacement")


def test_forests_can_be_copied_and_pickled():
    trees = filled(uneven(3, 20))
    for other in (copy.deepcopy(trees), pickle.loads(pickle.dumps(trees))):
        assert type(other) is type(trees)
        assert torch.equal(other[:], trees[:])
        other.update([[0]] * 3, [[9.0]] * 3)
        assert not torch.equal(other[:], trees[:])


@pytest.mark.parametrize("num_trees", [0, -1, 2.0, True])
def test_the_number_of_trees_is_a_positive_integer(num_trees):
    with pytest.raises(ConfigurationError, match="num_trees: expected an integer of at least 1"):
        SumTree(4, num_trees=num_trees)


def test_a_class_derived_from_the_single_tree_is_one_tree():
    class Own(SumTree):
        pass

    with pytest.raises(ConfigurationError, match="Own is one tree"):
        Own(4, num_trees=2)

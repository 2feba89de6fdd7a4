"""The Triton kernels beside the functions in torch: natively on CUDA, elsewhere interpreted."""

import math

import pytest
import torch

from per_td.draws import points
from per_td.storage.generations import generation_of
from per_td.tree import ExtremumTree, Layout, SumTree, reference
from per_td.weights import importance_weights, mass_of
from tests.support.oracle import assert_drawn_from
from tests.support.parameters import slow_but

pytest.importorskip("triton", reason="triton is not installed")

from per_td.kernels import cuda as kernels

CAPACITIES = (1, 7, 16, 17, 255, 256, 257, 4096, 5000)
LIMITS = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max


@pytest.fixture(
    params=[
        pytest.param(
            "cpu",
            id="interpreted",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="natively instead"),
        ),
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.cuda,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
            ],
        ),
    ]
)
def device(request) -> torch.device:
    return torch.device(request.param)


class Column:
    """Priorities and their trees, as plain tensors."""

    def __init__(self, capacity, device):
        self.layout = Layout.of(capacity)
        self.raw = torch.zeros(self.layout.leaf_slots, device=device)
        self.mass = torch.zeros(self.layout.leaf_slots, device=device)
        self.sums = self.layout.new_nodes(0.0, torch.float64, device)
        self.offsets = torch.tensor(self.layout.offsets, device=device)
        self.largest = ExtremumTree(self.raw, self.layout, "max")
        self.smallest = ExtremumTree(self.mass, self.layout, "min")
        self.ever_max = torch.zeros((), device=device)
        self.refused = torch.zeros((), dtype=torch.int64, device=device)

    @property
    def trees(self):
        return kernels.Trees(
            self.layout,
            (self.mass, self.sums),
            (self.raw, self.largest.nodes),
            (self.mass, self.smallest.nodes),
        )

    @property
    def tree(self):
        return self.mass, self.sums, self.offsets

    def fill(self, mass):
        self.mass[: len(mass)] = mass
        levels = self.layout.levels(self.sums)
        reference.refresh_all(self.mass, levels, reference.sum_children)
        return self

    def check(self, alpha):
        """Masses are p^alpha but for a rounding, nodes what the functions in torch make of them."""
        raw, mass = self.raw.cpu(), self.mass.cpu()
        exact = raw.double().pow(alpha).clamp(*LIMITS) * (raw > 0)
        torch.testing.assert_close(mass, exact.float(), rtol=1.2e-7, atol=0)
        # torch rounds alpha to float32: 69 roundings at priorities of 1e30
        torch.testing.assert_close(mass, mass_of(raw, alpha), rtol=5e-6, atol=0)
        nodes = torch.zeros_like(self.sums)
        reference.refresh_all(self.mass, self.layout.levels(nodes), reference.sum_children)
        torch.testing.assert_close(self.sums, nodes, rtol=1e-15, atol=0)
        for tree, which in ((self.largest, "max"), (self.smallest, "min")):
            leaves = self.raw if which == "max" else self.mass
            assert torch.equal(tree.nodes, ExtremumTree(leaves, self.layout, which).nodes)


def number(value: float, device) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64, device=device)


def uneven(n: int) -> torch.Tensor:
    """Masses of many sizes, with zeros among them, the last one positive."""
    mass = torch.rand(n, generator=torch.Generator().manual_seed(n)) ** 4
    mass[::3] = 0.0
    mass[-1] = 0.7
    return mass


# -------------------------------------------------------------------------------------- updates


@pytest.mark.parametrize("alpha", slow_but([0.0, 0.37], [0.0, 0.37, 1.0, 2.0]))
@pytest.mark.parametrize("capacity", CAPACITIES)
def test_random_updates_leave_what_a_loop_leaves(capacity, alpha, device):
    column, naive, ever_max, refused = Column(capacity, device), [0.0] * capacity, 0.0, 0
    for _ in range(4):
        n = int(torch.randint(1, min(2 * capacity, 300) + 2, ()))
        size = int(torch.randint(1, capacity + 1, ()))
        index = torch.randint(-2, capacity + 2, (n,))
        delta = torch.randn(n) * 10.0 ** torch.randint(-3, 4, (n,))
        for wrong in (math.nan, math.inf, -math.inf, 0.0):
            delta[torch.rand(n) < 0.05] = wrong
        written = int(torch.randint(1, 3 * capacity + 1, ()))
        live = torch.rand(n) < 0.9
        generation = generation_of(index, written, capacity) + (torch.rand(n) < 0.1).long()
        dropped = kernels.assign(
            column.trees,
            column.raw,
            index.to(device),
            delta.to(device),
            alpha=number(alpha, device),
            ever_max=column.ever_max,
            eps=number(0.01, device),
            live=live.to(device),
            generation=generation.to(device),
            written=torch.tensor(written, device=device),
            size=torch.tensor(size, device=device),
            refused=column.refused,
        )
        live &= generation == generation_of(index, written, capacity)
        assert dropped == (~live).sum()
        priority = (delta.abs() + 0.01).tolist()
        for i, p, alive in zip(index.tolist(), priority, live.tolist(), strict=True):
            if not (0 <= i < size and math.isfinite(p)):
                refused += 1
            elif alive:
                naive[i] = p
        ever_max = max(ever_max, *naive)
        assert column.raw[:capacity].tolist() == naive
        assert column.ever_max.item() == ever_max
        assert column.refused.item() == refused
        column.check(alpha)


@pytest.mark.parametrize("capacity", CAPACITIES)
def test_random_masses_leave_what_a_loop_leaves(capacity, device):
    column, twin = Column(capacity, device), SumTree(capacity)
    trees = kernels.Trees(column.layout, (column.mass, column.sums))
    for _ in range(6):
        n = int(torch.randint(1, min(2 * capacity, 300) + 2, ()))
        index, value = torch.randint(capacity, (n,)), torch.rand(n) ** 8 * (torch.rand(n) > 0.2)
        twin.update(index, value)
        wrong = torch.tensor([-1, capacity, 0, 0, 0]), torch.tensor([1, 1, math.nan, math.inf, -1])
        index, value = torch.cat([index, wrong[0]]), torch.cat([value, wrong[1]])
        kernels.put(trees, index.to(device), value.to(device))
        assert column.mass[:capacity].tolist() == twin[:].tolist()
        torch.testing.assert_close(column.sums.cpu(), twin.nodes, rtol=1e-15, atol=0)


def test_priorities_are_taken_as_they_are_where_there_is_no_eps(device):
    column = Column(20, device)
    index = torch.tensor([3, 19, 5], device=device)
    value = torch.tensor([0.5, 0.0, 2.0], device=device)
    kernels.assign(
        column.trees, column.raw, index, value, alpha=number(0.5, device), ever_max=column.ever_max
    )
    assert column.raw[index].tolist() == [0.5, 0.0, 2.0]
    assert column.mass[19].item() == 0
    column.check(0.5)


@pytest.mark.parametrize("n", [2, 1000])
def test_of_many_updates_of_one_slot_the_last_holds(n, device):
    column = Column(300, device)
    index = torch.full((n,), 77, device=device)
    value = torch.rand(n, device=device)
    for _ in range(3):
        kernels.assign(
            column.trees,
            column.raw,
            index,
            value,
            alpha=number(1.0, device),
            ever_max=column.ever_max,
        )
        assert column.raw[77] == value[-1]
        assert column.ever_max == value[-1]
        value = value.flip(0) + 1


def test_extreme_priorities_keep_a_positive_finite_mass(device):
    values = [1e-45, 1e-38, 1e-30, 1.0, 1e30, 3.4e38, 0.0]
    for alpha in (0.0, 0.6, 1.0, 3.0):
        column = Column(len(values), device)
        index = torch.arange(len(values), device=device)
        value = torch.tensor(values, device=device)
        kernels.assign(
            column.trees,
            column.raw,
            index,
            value,
            alpha=number(alpha, device),
            ever_max=column.ever_max,
        )
        mass = column.mass[: len(values)]
        assert (mass[:-1] > 0).all()
        assert mass.isfinite().all()
        assert mass[-1] == 0
        column.check(alpha)


def test_a_negative_zero_does_not_keep_its_slot_from_being_written(device):
    column = Column(4, device)
    index = torch.tensor([2], device=device)
    column.raw[2] = -0.0
    for value in (-0.0, 3.0):
        value = torch.tensor([value], device=device)
        kernels.assign(
            column.trees,
            column.raw,
            index,
            value,
            alpha=number(1.0, device),
            ever_max=column.ever_max,
        )
        assert column.raw[2] == value
        assert not column.raw[2].signbit()


def test_updates_of_nothing_change_nothing(device):
    column = Column(4, device).fill(torch.ones(4))
    none = torch.empty(0, dtype=torch.int64, device=device)
    kernels.put(column.trees, none, none.float())
    kernels.assign(
        column.trees,
        column.raw,
        none,
        none.float(),
        alpha=number(1.0, device),
        ever_max=column.ever_max,
    )
    assert column.sums[-1].item() == 4
    assert len(kernels.find(*column.tree, none.double())) == 0


# ---------------------------------------------------------------------------------------- draws


@pytest.mark.parametrize("capacity", CAPACITIES)
def test_points_are_found_where_the_functions_in_torch_find_them(capacity, device):
    column = Column(capacity, device).fill(uneven(capacity))
    target = torch.rand(300, dtype=torch.float64, device=device) * column.sums[-1]
    expected = reference.find(column.mass, column.layout.levels(column.sums), target)
    assert torch.equal(kernels.find(*column.tree, target), expected)


@pytest.mark.parametrize("capacity", CAPACITIES)
def test_the_ends_of_the_range_find_slots_of_positive_mass(capacity, device):
    mass = uneven(capacity)
    column = Column(capacity, device).fill(mass)
    total = column.sums[-1].item()
    ends = torch.tensor([0.0, total, 2 * total], dtype=torch.float64, device=device)
    positive = mass.nonzero().flatten().tolist()
    expected = [positive[0], positive[-1], positive[-1]]
    assert kernels.find(*column.tree, ends).tolist() == expected


@pytest.mark.parametrize("stratified", [False, True])
@pytest.mark.parametrize("capacity", CAPACITIES)
def test_draws_are_those_of_the_same_points_in_torch(capacity, stratified, device):
    column = Column(capacity, device).fill(uneven(capacity))
    draw, n = "stratified" if stratified else "independent", 100
    target = points(n, draw, device, torch.Generator(device).manual_seed(3)) * column.sums[-1]
    expected = reference.find(column.mass, column.layout.levels(column.sums), target)
    point = points(n, "independent", device, torch.Generator(device).manual_seed(3))
    index, mass = kernels.draw(*column.tree, point, stratified=stratified)
    assert torch.equal(index, expected)
    assert torch.equal(mass, column.mass[index])


@pytest.mark.parametrize("stratified", [False, True])
def test_draws_follow_the_masses(stratified, device, generator):
    mass = uneven(257)
    column = Column(257, device).fill(mass)
    point = points(4_000, "independent", device, generator)
    index, _ = kernels.draw(*column.tree, point, stratified=stratified)
    assert_drawn_from(index, mass.double() / mass.double().sum())


def test_a_mass_of_zero_is_never_drawn_at_the_borders_of_its_neighbours(device):
    """The sums are exact here, so that points hit the borders exactly."""
    mass = torch.tensor([0.0, 1.0, 0.0, 0.0, 2.0, 0.0, 1.0, 0.0] * 40)
    column = Column(len(mass), device).fill(mass)
    border = torch.arange(161, dtype=torch.float64, device=device)
    drawn = kernels.find(*column.tree, border)
    assert (column.mass[drawn] > 0).all()


def test_nothing_to_draw_gives_slot_zero(device):
    column = Column(300, device)
    index, mass = kernels.draw(*column.tree, torch.rand(5).double().to(device), stratified=False)
    assert index.tolist() == mass.tolist() == [0] * 5


@pytest.mark.parametrize("normalization", ["batch", "buffer", "none"])
@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_weights_are_those_of_the_formula(normalization, beta, device):
    mass = torch.tensor([1e-30, 1e-20, 1e-3, 1.0, 7.5, 1e5], device=device)
    beta = torch.tensor(beta, dtype=torch.float64, device=device)
    total, size = mass.sum(dtype=torch.float64), torch.tensor(1000, device=device)
    expected = importance_weights(
        mass, beta, total=total, size=size, smallest=mass[1], normalization=normalization
    )
    unit = {"batch": mass.amin(), "buffer": mass[1], "none": total}[normalization]
    weight = kernels.weigh(mass, beta, unit, size if normalization == "none" else None)
    torch.testing.assert_close(weight, expected, rtol=2e-7, atol=0)

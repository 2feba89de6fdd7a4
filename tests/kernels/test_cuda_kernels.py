"""The Triton kernels beside the functions in torch: natively on CUDA, elsewhere interpreted."""

import inspect
import itertools
import math
from array import array

import pytest
import torch

from per_td import validation
from per_td.draws import uniform_like
from per_td.kernels import reference
from per_td.kernels.parts import EPS, Layout
from per_td.priorities.distributions import Proportional
from per_td.tree.trees import Trees
from per_td.weights import importance_weights, mass_of
from tests.support.oracle import assert_drawn_from
from tests.support.parameters import slow_but

pytest.importorskip("triton", reason="triton is not installed")

from per_td.kernels.cuda import draw as draws
from per_td.kernels.cuda import launches, update
from per_td.kernels.cuda.update import Kinds

CAPACITIES = slow_but((1, 17, 257, 5000), (1, 7, 16, 17, 255, 256, 257, 4096, 5000))
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


class Column(Trees):
    """Priorities and their trees."""

    def __init__(self, capacity, device, groups=1, **settings):
        layout = Layout.of(capacity, groups)
        super().__init__(layout, device, extremes=True, replayed=groups == 1, **settings)
        self._operations = reference
        self.keep_minima(True)

    @property
    def kinds(self):
        sums, minima = (self.leaves, self.sums), (self.leaves, self.minima)
        return Kinds(self.layout, sums, (self.raw, self.maxima), minima)

    @property
    def tree(self):
        return self.leaves, self.sums, torch.tensor(self.layout.offsets, device=self.device)

    def fill(self, mass):
        self.leaves[: len(mass)] = mass
        reference.refill(self)
        return self

    def check(self, alpha):
        """Masses are p^alpha but for a rounding, nodes what the functions in torch make of them."""
        raw, mass = self.raw.cpu(), self.leaves.cpu()
        exact = raw.double().pow(alpha).clamp(*LIMITS) * (raw > 0)
        torch.testing.assert_close(mass, exact.float(), rtol=1.2e-7, atol=0)
        # torch rounds alpha to float32: 69 roundings at priorities of 1e30
        torch.testing.assert_close(mass, mass_of(raw, alpha), rtol=5e-6, atol=0)
        sums, maxima, minima = self.sums.clone(), self.maxima.clone(), self.minima.clone()
        reference.refill(self)
        torch.testing.assert_close(sums, self.sums, rtol=1e-15, atol=0)
        assert torch.equal(maxima, self.maxima)
        assert torch.equal(minima, self.minima)
        self.check_valid()


def twins(capacity, device, groups=1, alpha=0.6):
    """Two of the same trees, for kernels and for the functions in torch."""
    pair = Column(capacity, device, groups), Column(capacity, device, groups)
    for column in pair:
        column.set_exponent(alpha)
        column.set(EPS, 0.01)
    return pair


def exponents(groups) -> torch.Tensor:
    """An exponent for each tree."""
    return torch.linspace(0.9, 0.0, groups, dtype=torch.float64)


def assert_same(column, twin):
    for name in ("raw", "maxima", "ever_max", "replayed", "refused"):
        assert torch.equal(getattr(column, name), getattr(twin, name)), name
    for name in ("leaves", "sums", "minima"):
        ours, theirs = getattr(column, name), getattr(twin, name)
        torch.testing.assert_close(ours, theirs, rtol=5e-6, atol=0)
    column.check_valid()


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
        generation = reference.generations(index, written, capacity) + (torch.rand(n) < 0.1).long()
        dropped = update.assign(
            column.kinds,
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
        live &= generation == reference.generations(index, written, capacity)
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
    column, twin = Column(capacity, device), Trees(Layout.of(capacity), torch.device("cpu"))
    kinds = Kinds(column.layout, (column.leaves, column.sums))
    for _ in range(6):
        n = int(torch.randint(1, min(2 * capacity, 300) + 2, ()))
        index, value = torch.randint(capacity, (n,)), torch.rand(n) ** 8 * (torch.rand(n) > 0.2)
        reference.set_masses(twin, index, value)
        wrong = torch.tensor([-1, capacity, 0, 0, 0]), torch.tensor([1, 1, math.nan, math.inf, -1])
        index, value = torch.cat([index, wrong[0]]), torch.cat([value, wrong[1]])
        update.put(kinds, index.to(device), value.to(device))
        assert torch.equal(column.leaves.cpu(), twin.leaves)
        torch.testing.assert_close(column.sums.cpu(), twin.sums, rtol=1e-15, atol=0)


def test_priorities_are_taken_as_they_are_where_there_is_no_eps(device):
    column = Column(20, device)
    index = torch.tensor([3, 19, 5], device=device)
    value = torch.tensor([0.5, 0.0, 2.0], device=device)
    update.assign(
        column.kinds, column.raw, index, value, alpha=number(0.5, device), ever_max=column.ever_max
    )
    assert column.raw[index].tolist() == [0.5, 0.0, 2.0]
    assert column.leaves[19].item() == 0
    column.check(0.5)


@pytest.mark.parametrize("n", [2, 1000])
def test_of_many_updates_of_one_slot_the_last_holds(n, device):
    column = Column(300, device)
    index = torch.full((n,), 77, device=device)
    value = torch.rand(n, device=device)
    for _ in range(3):
        update.assign(
            column.kinds,
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
        update.assign(
            column.kinds,
            column.raw,
            index,
            value,
            alpha=number(alpha, device),
            ever_max=column.ever_max,
        )
        mass = column.leaves[: len(values)]
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
        update.assign(
            column.kinds,
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
    update.put(column.kinds, none, none.float())
    update.assign(
        column.kinds,
        column.raw,
        none,
        none.float(),
        alpha=number(1.0, device),
        ever_max=column.ever_max,
    )
    assert column.sums[-1].item() == 4
    assert len(draws.find(*column.tree, none.double())[0]) == 0


# ---------------------------------------------------------------------------------------- draws


@pytest.mark.parametrize("capacity", CAPACITIES)
def test_points_are_found_where_the_functions_in_torch_find_them(capacity, device):
    column = Column(capacity, device).fill(uneven(capacity))
    target = torch.rand(300, dtype=torch.float64, device=device) * column.sums[-1]
    for found, expected in zip(
        draws.find(*column.tree, target), reference.find(column, target), strict=True
    ):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("capacity", CAPACITIES)
def test_the_ends_of_the_range_find_slots_of_positive_mass(capacity, device):
    mass = uneven(capacity)
    column = Column(capacity, device).fill(mass)
    total = column.sums[-1].item()
    ends = torch.tensor([0.0, total, 2 * total], dtype=torch.float64, device=device)
    positive = mass.nonzero().flatten().tolist()
    expected = [positive[0], positive[-1], positive[-1]]
    assert draws.find(*column.tree, ends)[0].tolist() == expected


@pytest.mark.parametrize("stratified", [False, True])
@pytest.mark.parametrize("capacity", CAPACITIES)
def test_draws_are_those_of_the_same_points_in_torch(capacity, stratified, device):
    column = Column(capacity, device).fill(uneven(capacity))
    point = torch.rand(100, dtype=torch.float64).to(device)
    places = (torch.arange(100, device=device) + point) / 100 if stratified else point
    expected = reference.find(column, places * column.sums[-1])[0]
    index, mass = draws.find(*column.tree, point, scaled=True, stratified=stratified)
    assert torch.equal(index, expected)
    assert torch.equal(mass, column.leaves[index])


@pytest.mark.parametrize("stratified", [False, True])
def test_draws_follow_the_masses(stratified, device, generator):
    mass = uneven(257)
    column = Column(257, device).fill(mass)
    point = uniform_like(torch.empty(4_000, dtype=torch.float64, device=device), generator)
    index, _ = draws.find(*column.tree, point, scaled=True, stratified=stratified)
    assert_drawn_from(index, mass.double() / mass.double().sum())


def test_a_mass_of_zero_is_never_drawn_at_the_borders_of_its_neighbours(device):
    """The sums are exact here, so that points hit the borders exactly."""
    mass = torch.tensor([0.0, 1.0, 0.0, 0.0, 2.0, 0.0, 1.0, 0.0] * 40)
    column = Column(len(mass), device).fill(mass)
    border = torch.arange(161, dtype=torch.float64, device=device)
    drawn = draws.find(*column.tree, border)[0]
    assert (column.leaves[drawn] > 0).all()


def test_nothing_to_draw_gives_slot_zero(device):
    column = Column(300, device)
    index, mass = draws.find(*column.tree, torch.rand(5).double().to(device), scaled=True)
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
    weight = draws.weigh(mass, beta, unit, size if normalization == "none" else None)
    torch.testing.assert_close(weight, expected, rtol=2e-7, atol=0)


# ----------------------------------------------------------------- the list of operations


def test_every_operation_takes_the_arguments_of_the_one_in_torch():
    for name in launches.__all__:
        ours, theirs = getattr(launches, name), getattr(reference, name)
        assert inspect.signature(ours) == inspect.signature(theirs), name


@pytest.fixture
def unseen(monkeypatch):
    """No value can be looked at, as on CUDA."""
    monkeypatch.setattr(validation, "can_raise", lambda tensor: False)


SHAPES = [(20, 1), (300, 1), (5, 3), (40, 3)]
UPDATES = list(itertools.product(("one", "each"), *[(False, True)] * 3))
EVEN = [(alpha, *flags) for alpha, *flags in UPDATES if (sum(flags) + (alpha == "each")) % 2 == 0]
"""Half of them: each value of three arguments with each of the others."""


@pytest.mark.parametrize(("alpha", "new", "masked", "stamped"), slow_but(EVEN, UPDATES))
@pytest.mark.parametrize(("capacity", "groups"), slow_but([(300, 1), (5, 3)], SHAPES))
def test_updates_leave_what_the_functions_in_torch_leave(
    capacity, groups, alpha, new, masked, stamped, device, unseen
):
    if stamped and groups > 1:
        pytest.skip("stamps are for one tree")
    pair = twins(capacity, device, groups, 0.6 if alpha == "one" else exponents(groups))
    for round_ in range(4):
        shape = groups, 30
        index = torch.randint(-2, capacity + 2, shape, device=device)
        value = torch.randn(shape, device=device) * 10
        value[:, round_] = torch.tensor([math.nan, math.inf, -math.inf, -0.0])[round_]
        written = torch.randint(0, 3 * capacity, (groups,), device=device)
        stamps = torch.randint(0, 3, (capacity,), device=device)
        now = stamps[index.clamp(0, capacity - 1)]
        if not stamped:
            now = reference.generations(index, written.unsqueeze(-1), capacity)
        given = {
            "written": capacity if new else written,
            "limit": capacity,
            "generation": None if new else now + (torch.rand(shape, device=device) < 0.1),
            "stamps": stamps if stamped else None,
            "mask": torch.rand(shape, device=device) < 0.7 if masked else None,
            "add_eps": not new,
            "squared": round_ == 2,
            "new": new,
        }
        for column in pair:
            column.replayed[:capacity] = True
        dropped = [
            int(operations.assign(column, Proportional(), index, value, **given))
            for operations, column in zip((launches, reference), pair, strict=True)
        ]
        assert dropped[0] == dropped[1]
        assert_same(*pair)


@pytest.mark.parametrize("ever_max", [False, True])
@pytest.mark.parametrize("alpha", ["one", "each"])
@pytest.mark.parametrize(("capacity", "groups"), SHAPES)
def test_new_priorities_are_those_of_the_functions_in_torch(
    capacity, groups, alpha, ever_max, device, unseen
):
    pair = twins(capacity, device, groups, 0.6 if alpha == "one" else exponents(groups))
    index = torch.arange(4, device=device).repeat(groups, 1)
    first = torch.rand(groups, 4, device=device) * 9
    masks = None, torch.rand(groups, 4, device=device) < 0.5
    for operations, column in zip((launches, reference), pair, strict=True):
        given = {"written": capacity, "limit": capacity, "new": True, "ever_max": ever_max}
        operations.assign(column, Proportional(), index, first, **given)
        for shift, mask in enumerate(masks):
            given["mask"] = mask
            operations.assign(column, Proportional(), index + shift, None, **given)
        runs = array("q", [number for s in range(groups) for number in (capacity - 1 - s, 3)])
        operations.assign_new(column, Proportional(), runs, ever_max=ever_max)
    assert_same(*pair)


@pytest.mark.parametrize(("capacity", "groups"), SHAPES)
def test_masses_are_set_as_the_functions_in_torch_set_them(capacity, groups, device, unseen):
    pair = twins(capacity, device, groups)
    index = torch.randint(-2, capacity + 2, (groups, 30), device=device)
    value = torch.randn(groups, 30, device=device)
    for operations, column in zip((launches, reference), pair, strict=True):
        operations.set_masses(column, index, value)
    assert torch.equal(pair[0].leaves, pair[1].leaves)
    torch.testing.assert_close(pair[0].sums, pair[1].sums, rtol=1e-15, atol=0)


@pytest.mark.parametrize("beta", [0.4, "tensor", "each"])
@pytest.mark.parametrize("normalization", ["batch", "buffer", "none"])
@pytest.mark.parametrize("stratified", [False, True])
@pytest.mark.parametrize(("capacity", "groups"), SHAPES)
def test_draws_and_weights_are_those_of_the_functions_in_torch(
    capacity, groups, stratified, normalization, beta, device, unseen
):
    pair = twins(capacity, device, groups)
    if beta != 0.4:
        beta = number(0.4, device) if beta == "tensor" else exponents(groups).to(device)
    index = torch.arange(capacity, device=device).repeat(groups, 1)
    value = torch.rand(groups, capacity, device=device)
    point = torch.rand(groups, 50, dtype=torch.float64, device=device)
    for number_of_points in (50, 2):
        drawn = []
        for operations, column in zip((launches, reference), pair, strict=True):
            reference.assign(
                column, Proportional(), index, value, written=capacity, limit=capacity, new=True
            )
            drawn.append(
                operations.draw(
                    column,
                    point[:, :number_of_points].clone(),
                    stratified=stratified,
                    beta=beta,
                    normalization=normalization,
                    written=torch.full((groups,), 2 * capacity, device=device),
                )
            )
        assert torch.equal(drawn[0][0], drawn[1][0])
        torch.testing.assert_close(drawn[0][1], drawn[1][1], rtol=1e-6, atol=0)
        assert torch.equal(pair[0].replayed, pair[1].replayed)
        targets = point[:, :number_of_points] * pair[0].total.unsqueeze(-1)
        for found, expected in zip(
            launches.find(pair[0], targets), reference.find(pair[0], targets), strict=True
        ):
            assert torch.equal(found, expected)

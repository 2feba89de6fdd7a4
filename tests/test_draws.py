import pytest
import torch

from per_td import ConfigurationError, EmptyBufferError, SumTree, draws
from per_td.priorities.sampling import sample_weighted
from tests.support.oracle import assert_drawn_from
from tests.support.tables import table


def mass_of(n: int) -> torch.Tensor:
    mass = torch.rand(n, generator=torch.Generator().manual_seed(n)) ** 3
    mass[1::4] = 0.0
    return mass


@pytest.mark.parametrize("n", [1, 7, 50, 1000])
def test_multinomial_and_tree_draw_from_the_same_distribution(n, device, generator):
    mass = mass_of(n)
    probability = mass.double() / mass.double().sum()
    tree = SumTree(n, device)
    tree.fill(mass.to(device))
    draws_each = 200 * n
    assert_drawn_from(tree.sample(draws_each, generator), probability)
    flat = draws.multinomial(tree[:], draws_each, "independent", generator)
    assert_drawn_from(flat, probability)


def test_multinomial_and_tree_agree_without_replacement(device, generator):
    """The second of two draws: P(j second) = sum_i P(i) P(j) / (1 - P(i))."""
    mass = torch.tensor([5.0, 0.0, 1.0, 3.0, 0.2])
    p = mass.double() / mass.double().sum()
    second = [float(sum(p[i] * p[j] / (1 - p[i]) for i in range(5) if i != j)) for j in range(5)]
    tree = SumTree(5, device)
    tree.fill(mass.to(device))
    drawn = {"tree": [], "multinomial": []}
    for _ in range(4000):
        drawn["tree"].append(tree.sample(2, generator, draw="without_replacement")[1])
        flat = draws.multinomial(tree[:], 2, "without_replacement", generator)
        drawn["multinomial"].append(flat[1])
    for index in drawn.values():
        assert_drawn_from(torch.stack(index), second)


def test_multinomial_is_exact_where_float32_sums_are_not():
    """In float32, 2^26 + 1 = 2^26: what comes after the large mass would never be drawn."""
    n, large = 1_000_000, 2.0**26
    mass = torch.ones(n)
    mass[0] = large
    index = draws.multinomial(mass, 400_000, "independent", torch.Generator().manual_seed(0))
    part = torch.where(index == 0, 0, 1 + (index - 1) * 4 // (n - 1))
    total = large + n - 1
    assert_drawn_from(part, [large / total, *[(n - 1) / 4 / total] * 4])


def test_multinomial_says_when_too_few_can_be_drawn():
    made = table(draw="without_replacement", method="multinomial")
    index = torch.arange(3)
    made.write_new(index, torch.tensor([1.0, 0.0, 1.0]))
    with pytest.raises(EmptyBufferError, match=r"at least 3 .* got 2"):
        sample_weighted(made, 3, None, beta=0.4, written=3, size=3)


def test_what_multinomial_cannot_do_is_refused_beforehand():
    with pytest.raises(ConfigurationError, match="cannot draw stratified"):
        draws.check_method("multinomial", "stratified", 10)
    with pytest.raises(ConfigurationError, match=r"at most 2\*\*24"):
        draws.check_method("multinomial", "independent", 2**24 + 1)
    draws.check_method("multinomial", "independent", 2**24)
    draws.check_method("tree", "stratified", 2**30)


def test_auto_takes_the_tree_where_multinomial_cannot_or_is_slower():
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    assert draws.resolve_method("auto", "stratified", 10, cpu) == "tree"
    assert draws.resolve_method("auto", "independent", 10**7, cpu) == "tree"
    assert draws.resolve_method("auto", "without_replacement", 100, cuda) == "tree"
    for (kind, draw), limit in draws.MULTINOMIAL_UP_TO.items():
        if limit:
            chosen = draws.resolve_method("auto", draw, limit, torch.device(kind))
            assert chosen == "multinomial"
        assert limit <= draws.MULTINOMIAL_LIMIT
    assert draws.resolve_method("multinomial", "independent", 10**7, cpu) == "multinomial"


def test_stratified_points_lie_one_in_each_range(device, generator):
    tree = SumTree(100, device)
    tree.fill(torch.ones(100))
    assert tree.sample(100, generator, draw="stratified").tolist() == list(range(100))


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's own
def test_compiled_random_numbers_are_finer_than_float32(backend):
    """Else 10^7 equal slots would get one or two of the 2^23 numbers in [0.5, 1) each."""
    torch._dynamo.reset()
    uniform = torch.compile(lambda like: draws.uniform_like(like, None), backend=backend)
    point = uniform(torch.empty(100_000, dtype=torch.float64))
    assert ((point >= 0) & (point < 1)).all()
    assert_drawn_from((point * 64).long(), [1 / 64] * 64)
    assert_drawn_from((point * 2**20 % 1 * 64).long(), [1 / 64] * 64)
    steps = point[point >= 0.5] * 2**24
    assert (steps != steps.floor()).double().mean() > 0.9

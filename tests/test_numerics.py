"""What docs/reliability.md says of sums, of very small and very large priorities, and of 0."""

import math

import pytest
import torch
from tensordict import TensorDict

from per_td import EmptyBufferError, PrioritizedReplayBuffer, SumTree, kernels
from tests.support.oracle import assert_drawn_from
from tests.support.parameters import few_of_all

WAYS = [
    ("independent", "tree"),
    ("stratified", "tree"),
    ("without_replacement", "tree"),
    ("independent", "multinomial"),
    ("without_replacement", "multinomial"),
]
WIDE = torch.logspace(-30, 30, 61, dtype=torch.float64)


@pytest.fixture(params=kernels.CHOICES)
def choice(request, monkeypatch) -> str:
    """With kernels and without."""
    monkeypatch.setenv(kernels.VARIABLE, request.param)
    return request.param


def filled(priority, **settings) -> PrioritizedReplayBuffer:
    n = len(priority)
    buffer = PrioritizedReplayBuffer(n, generator=torch.Generator().manual_seed(0), **settings)
    buffer.extend(TensorDict({"k": torch.arange(n)}, [n]), priority=priority)
    return buffer


@pytest.mark.parametrize("updates", [200_000, pytest.param(10**7, marks=pytest.mark.slow)])
def test_sums_stay_right_to_1e12_whatever_has_been_added_and_taken_away(updates, choice):
    n, batch = 10_007, 5_000
    tree, generator = SumTree(n), torch.Generator().manual_seed(2)
    for _ in range(updates // batch):
        index = torch.randint(n, (batch,), generator=generator)
        exponent = torch.empty(batch).uniform_(-8, 8, generator=generator)
        tree.update(index, 10**exponent)
    tree.update(range(5_000), torch.zeros(5_000))  # the large ones leave nothing behind
    tree.update(range(5_000, n), torch.full((n - 5_000,), 1e-8))
    assert float(tree.total) == pytest.approx(math.fsum(tree[:].tolist()), rel=1e-12)
    tree.update(torch.randint(n, (batch,), generator=generator), torch.rand(batch) * 1e8)
    assert float(tree.total) == pytest.approx(math.fsum(tree[:].tolist()), rel=1e-12)


def test_priorities_from_1e_minus_30_to_1e30_are_drawn_as_the_formula_says(choice):
    for alpha in (0.02, 0.05):
        buffer = filled(WIDE, alpha=alpha)
        mass = WIDE**alpha
        index = buffer.sample(50_000)["index"]
        assert_drawn_from(index, mass / mass.sum())
    buffer = filled(WIDE, alpha=1.0, eps=0.0)
    for top in range(60, -1, -6):  # 61 orders of magnitude below, each has its turn
        probability = WIDE[: top + 1] / WIDE[: top + 1].sum()
        likely = buffer.sample(2_000)["index"].bincount(minlength=61)
        assert likely[top + 1 :].sum() == 0
        assert_drawn_from(
            buffer.sample(20_000)["index"], torch.nn.functional.pad(probability, (0, 60 - top))
        )
        assert float(buffer.total_mass) == pytest.approx(
            math.fsum(buffer.priority.tolist()), rel=1e-12
        )
        buffer.update_priority(range(max(top - 5, 0), top + 1), [0.0] * (top + 1 - max(top - 5, 0)))


@pytest.mark.parametrize("normalization", ["batch", "buffer", "none"])
def test_weights_are_those_of_the_probabilities_drawn_from(normalization, choice):
    beta, n = 0.4, len(WIDE)
    for alpha in (0.05, 0.6, 1.0):
        buffer = filled(WIDE, alpha=alpha, beta=beta, weight_normalization=normalization)
        mass = [float(p) ** alpha for p in buffer.priority]
        total = math.fsum(mass)
        batch = buffer.sample(300)
        weight = [(n * m / total) ** -beta for m in mass]
        drawn = [weight[i] for i in batch["index"].tolist()]
        unit = {"batch": max(drawn), "buffer": max(weight), "none": 1.0}[normalization]
        expected = torch.tensor([w / unit for w in drawn], dtype=torch.float64)
        torch.testing.assert_close(
            batch["priority_weight"].double(), expected, rtol=1e-6, atol=1e-44
        )


def test_shares_of_many_draws_are_the_probabilities_that_the_weights_report(choice):
    buffer = filled(torch.arange(1.0, 41.0), alpha=0.7, beta=1.0, weight_normalization="none")
    batch = buffer.sample(40_000)
    reported = torch.zeros(40, dtype=torch.float64)
    reported[batch["index"]] = 1 / (40 * batch["priority_weight"].double())
    assert float(reported.sum()) == pytest.approx(1, rel=1e-6)
    assert_drawn_from(batch["index"], reported)


@pytest.mark.parametrize(("way", "choice"), few_of_all(WAYS, kernels.CHOICES), indirect=["choice"])
def test_a_slot_of_mass_0_is_never_drawn(way, choice):
    draw, method = way
    for n in (1, 7, 16, 17, 257, 1000):
        generator = torch.Generator().manual_seed(n)
        for live in (1, max(1, n // 3)):
            priority = torch.zeros(n)
            chosen = torch.randperm(n, generator=generator)[:live]
            priority[chosen] = 10 ** torch.empty(live).uniform_(-30, 30, generator=generator)
            for alpha in (0.0, 0.1, 1.0):
                buffer = filled(priority, alpha=alpha, draw=draw, method=method)
                for _ in range(3):
                    size = live if draw == "without_replacement" else 400
                    index = buffer.sample(size)["index"]
                    assert (priority[index] > 0).all()


@pytest.mark.parametrize("point", [0.0, math.nextafter(1.0, 0.0)])
def test_the_ends_of_the_range_do_not_fall_on_a_slot_of_mass_0(point, choice):
    for n in (1, 15, 16, 17, 300):
        for live in range(0, n, max(1, n // 7)):
            tree, value = SumTree(n), torch.zeros(n)
            value[live : live + 3] = torch.tensor([0.1, 0.7, 1e-30])[: n - live]
            tree.update(range(n), value)
            target = torch.tensor([point], dtype=torch.float64) * tree.total
            assert value[tree.find(target)] > 0


@pytest.mark.parametrize(("draw", "method"), WAYS)
def test_where_all_masses_are_0_a_draw_says_so(draw, method, choice):
    buffer = filled(torch.zeros(20), draw=draw, method=method)
    with pytest.raises(EmptyBufferError, match=r"expected a positive (mass|priority).* got .*0"):
        buffer.sample(4)
    buffer.update_priority([3], [1.0])
    assert buffer.sample(1)["index"].tolist() == [3]

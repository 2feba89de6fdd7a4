import pytest
import torch
from scipy.stats import chisquare

from per_td.errors import EmptyBufferError
from per_td.ray.batches import counts_of, probabilities, shares_of
from per_td.weights import importance_weights

TOTALS = torch.tensor([1.0, 0.0, 5.0, 0.5, 3.5], dtype=torch.float64)


def weights_of(q, size):
    """(N q)^-1, as for a batch."""
    one = torch.ones((), dtype=torch.float64)
    return importance_weights(q, 1.0, total=one, size=size, smallest=None, normalization="none")


def naive_counts(totals, points):
    """One draw after the other, each by walking along the totals."""
    counts = [0] * len(totals)
    for point in points.tolist():
        shard = 0
        while shard < len(totals) - 1 and point * sum(totals) >= sum(totals[: shard + 1]):
            shard += 1
        counts[shard] += 1
    return counts


@pytest.mark.parametrize("draw", ["independent", "stratified"])
def test_counts_are_those_of_drawing_one_after_the_other(draw):
    generator = torch.Generator().manual_seed(1)
    points = torch.rand(101, dtype=torch.float64, generator=generator)
    if draw == "stratified":
        points = (torch.arange(101) + points) / 101
    counts = counts_of(TOTALS, 101, draw, torch.Generator().manual_seed(1))
    assert counts.tolist() == naive_counts(TOTALS.tolist(), points)


def test_independent_counts_follow_the_totals():
    generator = torch.Generator().manual_seed(3)
    counts = counts_of(TOTALS, 100_000, generator=generator)
    assert counts[1] == 0
    there = TOTALS > 0
    expected = shares_of(TOTALS)[there] * 100_000
    assert chisquare(counts[there].numpy(), expected.numpy()).pvalue > 1e-3


def test_independent_counts_vary_as_multinomial_ones_do():
    generator = torch.Generator().manual_seed(3)
    rows = torch.stack([counts_of(TOTALS, 50, generator=generator) for _ in range(4000)]).double()
    share = shares_of(TOTALS)
    covariance = 50 * (share.diag() - share.outer(share))
    torch.testing.assert_close(rows.T.cov(), covariance, atol=0.6, rtol=0.05)


def test_stratified_counts_are_within_two_of_their_expectation():
    generator = torch.Generator().manual_seed(3)
    for n in (1, 7, 50, 1000):
        counts = counts_of(TOTALS, n, "stratified", generator)
        assert counts.sum() == n
        assert (counts - shares_of(TOTALS) * n).abs().max() <= 2


def test_a_point_rounded_up_to_the_end_goes_to_the_last_shard_with_mass(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda n, **_: torch.ones(n, dtype=torch.float64))
    totals = torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64)
    assert counts_of(totals, 3).tolist() == [0, 3, 0]


def test_nothing_to_draw_is_refused():
    with pytest.raises(EmptyBufferError, match="positive mass"):
        counts_of(torch.zeros(3, dtype=torch.float64), 4)


def test_probabilities_with_current_totals_are_those_of_one_buffer():
    masses = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 1.0, 2.0])]
    totals = torch.tensor([m.sum() for m in masses], dtype=torch.float64)
    shard = torch.tensor([0, 0, 1, 1, 1])
    q = probabilities(shard, torch.cat(masses), total=totals[shard], counted_with=totals)
    torch.testing.assert_close(q, torch.cat(masses).double() / 9)


@pytest.mark.parametrize("counted_with", [[3.0, 6.0], [1.0, 1.0], [7.0, 0.2]])
def test_weighted_sums_are_unbiased_whatever_totals_the_counts_came_from(counted_with):
    """The expectation, summed up exactly: sum of q w f is the mean of f, for beta = 1."""
    mass = torch.tensor([1.0, 2.0, 3.0, 1.0, 2.0])
    shard = torch.tensor([0, 0, 1, 1, 1])
    total = torch.tensor([3.0, 6.0], dtype=torch.float64)[shard]
    told = torch.tensor(counted_with, dtype=torch.float64)
    q = probabilities(shard, mass, total=total, counted_with=told)
    assert q.sum() == pytest.approx(1.0)
    f = torch.tensor([3.0, -1.0, 4.0, 1.0, -5.0])
    weight = weights_of(q, size=5)
    assert float((q * weight * f).sum()) == pytest.approx(float(f.mean()), abs=1e-6)


def test_even_counts_bias_weights_made_from_local_probabilities():
    """What other systems do: each shard gives as much, and weighs by its own probabilities."""
    mass = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0])  # equal: every weight should be equal, too
    shard = torch.tensor([0, 1, 1, 1, 1])
    f = torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0])
    total = torch.tensor([1.0, 4.0], dtype=torch.float64)
    even = torch.ones(2, dtype=torch.float64)
    q = probabilities(shard, mass, total=total[shard], counted_with=even)
    local_weight = 1 / (torch.tensor([1.0, 4.0])[shard] * mass / total[shard])
    assert float((q * local_weight * f).sum()) == pytest.approx(0.5)  # the mean of f is 0.2
    right = weights_of(q, size=5)
    assert float((q * right * f).sum()) == pytest.approx(0.2)

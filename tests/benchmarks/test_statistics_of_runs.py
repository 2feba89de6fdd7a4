import numpy as np
import pytest
from scipy import stats

from benchmarks.studies.statistics_of_runs import (
    bootstrap,
    improvement,
    improvement_interval,
    iqm,
    mean,
)


@pytest.mark.parametrize("runs", [1, 3, 4, 7, 101])
def test_the_interquartile_mean_is_scipys_mean_trimmed_by_a_quarter(runs):
    scores = np.random.default_rng(0).normal(size=(runs, 3))
    np.testing.assert_allclose(iqm(scores), stats.trim_mean(scores, 0.25, axis=0))


def test_the_probability_of_improvement_is_mann_whitneys_u_with_ties_counting_half():
    random = np.random.default_rng(1)
    x, y = random.normal(0.3, size=30), random.normal(size=20)
    for scores in ((x, y), (x.round(), y.round())):
        expected = stats.mannwhitneyu(*scores).statistic / (30 * 20)
        assert improvement(*scores) == pytest.approx(expected)


def test_vectorised_draws_give_the_interval_of_a_plain_bootstrap():
    random = np.random.default_rng(2)
    x, y = random.normal(0.4, size=25), random.normal(size=40)
    point, low, high = improvement_interval([(x, y)], repetitions=4_000)
    plain = [
        improvement(random.choice(x, size=25), random.choice(y, size=40)) for _ in range(4_000)
    ]
    assert point == improvement(x, y)
    np.testing.assert_allclose([low, high], np.quantile(plain, [0.025, 0.975]), atol=0.012)


def test_over_tasks_the_probability_is_the_mean_of_the_tasks():
    pairs = [(np.ones(5), np.zeros(5)), (np.zeros(4), np.zeros(3))]
    assert improvement_interval(pairs) == (0.75, 0.75, 0.75)


@pytest.mark.parametrize("statistic", [mean, iqm])
def test_the_bootstrap_is_that_of_a_plain_loop(statistic):
    random = np.random.default_rng(3)
    scores = random.normal(size=(30, 2))
    point, low, high = bootstrap(scores, statistic, repetitions=3_000)
    plain = [statistic(scores[random.integers(30, size=30)]) for _ in range(3_000)]
    np.testing.assert_allclose(point, statistic(scores))
    limits = np.quantile(plain, [0.025, 0.975], axis=0)
    np.testing.assert_allclose([low, high], limits, atol=0.04)


def test_runs_are_drawn_again_within_their_task_only():
    tasks = [np.zeros((4, 1)), np.full((4, 1), 8.0)]  # together, draws would mix 0 and 8
    point, low, high = bootstrap(tasks, mean, repetitions=50)
    assert point == low == high == 4


def test_scores_without_runs_are_refused():
    with pytest.raises(ValueError, match=r"expected scores \[runs, points\], got shapes"):
        bootstrap(np.zeros((0, 3)))

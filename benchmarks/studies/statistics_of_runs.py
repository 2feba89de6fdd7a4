"""Statistics of independent runs, as in rliable (Agarwal et al. 2021, arXiv 2108.13264).

Every interval is a percentile bootstrap over runs, with a seed. Scores are arrays whose first
dimension is the runs; the others (points in time, say) are kept.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

REPETITIONS = 2_000
LEVEL = 0.95
CHUNK = 2**22  # numbers in memory at once

Statistic = Callable[[NDArray], NDArray]


def mean(scores: NDArray) -> NDArray:
    """Mean over the runs, the second to last dimension but one: [..., S, T] -> [..., T]."""
    return scores.mean(axis=-2)


def iqm(scores: NDArray) -> NDArray:
    """Interquartile mean over the runs: [..., S, T] -> [..., T].

    The lowest and the highest floor(S / 4) runs are left out, as in `scipy.stats.trim_mean`.
    """
    count = scores.shape[-2]
    cut = count // 4
    ordered = np.sort(scores, axis=-2)
    return ordered[..., cut : count - cut, :].mean(axis=-2)


def _limits(found: NDArray) -> tuple[NDArray, NDArray]:
    """Lower and upper end of the interval, over the repetitions in the first dimension."""
    low, high = np.quantile(found, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return low, high


def bootstrap(
    strata: NDArray | Sequence[NDArray],
    statistic: Statistic = iqm,
    *,
    repetitions: int = REPETITIONS,
    seed: int = 0,
) -> tuple[NDArray, NDArray, NDArray]:
    """A statistic over runs and its 95% interval, by a stratified bootstrap.

    Args:
        strata: scores [S, T], or several such arrays (one per task, [S_k, T] each): runs are
            drawn again within each of them, and the statistic is that of all together.
        statistic: `iqm` or `mean`.
        repetitions: of the bootstrap.
        seed: of the draws.

    Returns:
        The statistic, the interval's lower and its upper end, [T] each.
    """
    parts = [strata] if isinstance(strata, np.ndarray) else list(strata)
    parts = [np.asarray(part, np.float64) for part in parts]
    if any(part.ndim != 2 or not len(part) for part in parts):
        raise ValueError(
            f"expected scores [runs, points], got shapes {[part.shape for part in parts]}"
        )
    random = np.random.default_rng(seed)
    size = sum(part.size for part in parts)
    found = []
    while repetitions > 0:
        count = min(repetitions, max(1, CHUNK // size))
        drawn = [p[random.integers(len(p), size=(count, len(p)))] for p in parts]
        found.append(statistic(np.concatenate(drawn, axis=1)))
        repetitions -= count
    low, high = _limits(np.concatenate(found))
    return statistic(np.concatenate(parts)), low, high


def _wins(x: NDArray, y: NDArray) -> NDArray:
    """1 where a run of x [S] is above one of y [R], 1/2 where they are equal: [S, R]."""
    return (x[:, None] > y) + 0.5 * (x[:, None] == y)


def improvement(x: NDArray, y: NDArray) -> float:
    """Probability that a run of x [S] is better than one of y [R]: Mann-Whitney's U / (S R)."""
    return float(_wins(x, y).mean())


def _drawn_counts(random: np.random.Generator, runs: int, repetitions: int) -> NDArray:
    """Draw the share of the draws that each run gets: [repetitions, runs]."""
    return random.multinomial(runs, np.full(runs, 1 / runs), size=repetitions) / runs


def improvement_interval(
    pairs: Sequence[tuple[NDArray, NDArray]],
    *,
    repetitions: int = REPETITIONS,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Probability of improvement, the mean over tasks, and its 95% interval.

    Args:
        pairs: (x [S], y [R]) for each task; one pair if there is one task.
        repetitions: of the bootstrap; x and y are drawn again independently, in each task.
        seed: of the draws.

    Returns:
        The probability that x is better than y, and its interval's ends.
    """
    random = np.random.default_rng(seed)
    found = np.zeros(repetitions)
    for x, y in pairs:
        of_x = _drawn_counts(random, len(x), repetitions)
        of_y = _drawn_counts(random, len(y), repetitions)
        found += ((of_x @ _wins(x, y)) * of_y).sum(axis=1) / len(pairs)
    low, high = _limits(found)
    point = sum(improvement(x, y) for x, y in pairs) / len(pairs)
    return point, float(low), float(high)

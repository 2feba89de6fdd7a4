"""Rows of the results: two agents over the same window."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.studies.cartpole.results import Record, at_episodes, at_steps
from benchmarks.studies.cartpole.settings import Variant
from benchmarks.studies.statistics_of_runs import bootstrap, improvement_interval, iqm, mean

MOST = 0.5  # of the runs must have come as far, else there is nothing to compare
Measure = Callable[[Record], NDArray]


@dataclass(frozen=True)
class Row:
    """One agent beside the baseline."""

    window: str
    agent: str
    scores: tuple[NDArray, NDArray]  # the baseline's and the agent's, runs that came so far
    runs: tuple[int, int]  # of each, all

    @property
    def censored(self) -> bool:
        """True if some runs did not come so far: those that did are no fair sample then."""
        return any(len(s) < n for s, n in zip(self.scores, self.runs, strict=True))

    @property
    def comparable(self) -> bool:
        """True if enough runs came so far."""
        return all(len(s) >= MOST * n for s, n in zip(self.scores, self.runs, strict=True))

    @property
    def probability(self) -> tuple[float, float, float]:
        """Probability that the agent is better than the baseline, and its 95% interval."""
        return improvement_interval([(self.scores[1], self.scores[0])])

    @property
    def verdict(self) -> str:
        """The interval in words."""
        _, low, high = self.probability
        if low <= 0.5 + 1e-9 and high >= 0.5 - 1e-9:  # all ties are 0.5 up to rounding
            return "not apart"
        return "better" if low > 0.5 else "worse"

    def summaries(self) -> list[tuple[float, float, float, float]]:
        """Mean, interquartile mean and its 95% interval, of baseline and agent."""
        found = []
        for scores in self.scores:
            middle, low, high = bootstrap(scores[:, None], iqm)
            average = mean(scores[:, None])
            found.append((float(average[0]), float(middle[0]), float(low[0]), float(high[0])))
        return found


def greedy_at(record: Record, step: int) -> NDArray:
    """Mean return of the greedy policy after `step` steps, [S]; NaN if there was no evaluation."""
    which = step // record.about["settings"]["evaluate_every"] - 1
    if not 0 <= which < record.greedy.shape[1]:
        return np.full(len(record.greedy), np.nan)
    return record.sign * record.greedy[:, which].astype(np.float64)


def windows(variant: Variant) -> Iterator[tuple[str, Measure]]:
    """Names and measures of all windows of a variant."""
    for first, last in variant.episode_windows:
        yield (
            f"episodes {first} to {last}",
            lambda record, first=first, last=last: at_episodes(record, first, last),
        )
    for begin, end in variant.step_windows:
        yield (
            f"steps {begin:,} to {end:,}",
            lambda record, begin=begin, end=end: at_steps(record, begin, end),
        )
    every, steps = variant.settings.evaluate_every, variant.settings.steps
    for step in sorted({every, 2 * every, 4 * every, steps // every * every}):
        if step <= steps:
            yield f"greedy, step {step:,}", lambda record, step=step: greedy_at(record, step)


def compare(variant: Variant, records: dict[str, Record]) -> list[Row]:
    """All agents that have files, beside the first, in all windows that any run reached."""
    baseline = next(iter(variant.agents))
    if baseline not in records:
        return []
    rows = []
    for window, measure in windows(variant):
        first = measure(records[baseline])
        for agent in variant.agents:
            if agent == baseline or agent not in records:
                continue
            both = (first, measure(records[agent]))
            scores = tuple(s[~np.isnan(s)] for s in both)
            if any(map(len, scores)):
                rows.append(Row(window, agent, scores, tuple(map(len, both))))
    return rows

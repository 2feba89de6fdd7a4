"""Tables and curves of the files that there are."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.pages import COLOURS, fill, picture, table
from benchmarks.studies.minatar.jobs import file_of
from benchmarks.studies.minatar.settings import ARMS, GAMES
from benchmarks.studies.statistics_of_runs import bootstrap, improvement_interval

POINTS = 20  # of a curve, and of the windows in which returns are compared


class Runs:
    """S runs of an agent on a game."""

    def __init__(self, file: Path) -> None:
        with np.load(file) as found:
            self.ends, self.returns = found["ends"], found["returns"]
            self.about: dict[str, Any] = json.loads(str(found["about"]))
            self.diagnostics = {
                key.removeprefix("diagnostics/"): found[key]
                for key in found.files
                if key.startswith("diagnostics/")
            }

    def mean_return(self, begin: int, end: int) -> NDArray:
        """Mean return of the episodes that end after frame `begin` up to `end`, [S].

        A run without any has the next episode's, which was long.
        """
        wanted = (self.ends > begin) & (self.ends <= end)
        later = np.argmax(self.ends > end, axis=1)
        total = np.where(wanted, self.returns, 0).sum(1, dtype=np.float64)
        count = wanted.sum(1)
        return np.where(
            count > 0, total / np.maximum(count, 1), self.returns[range(len(later)), later]
        )

    def windows(self) -> tuple[NDArray, NDArray]:
        """Ends of the windows [T], and mean returns [S, T]."""
        frames = self.about["settings"]["frames"]
        ends = np.linspace(0, frames, POINTS + 1)
        means = [self.mean_return(begin, end) for begin, end in itertools.pairwise(ends)]
        return ends[1:], np.stack(means, 1)


def read(out: Path) -> dict[str, dict[str, Runs]]:
    """Game -> agent -> its runs, of the files that exist."""
    found = {
        game: {arm: Runs(file) for arm in ARMS if (file := file_of(out, game, arm)).exists()}
        for game in GAMES
    }
    return {game: arms for game, arms in found.items() if arms}


def _interval(values: tuple[Any, ...], digits: int) -> str:
    middle, low, high = (f"{float(np.squeeze(value)):.{digits}f}" for value in values)
    return f"{middle} [{low}, {high}]"


def _quarter(runs: Runs, k: int) -> NDArray:
    """Mean return over quarter `k`, from 0, of the frames, [S]."""
    frames = runs.about["settings"]["frames"]
    return runs.mean_return(k * frames // 4, (k + 1) * frames // 4)


def _last(runs: Runs) -> NDArray:
    """Mean return over the last quarter of the frames, [S]."""
    return _quarter(runs, 3)


def _all(runs: Runs) -> NDArray:
    """Mean over all windows: the area under the curve, [S]."""
    return runs.windows()[1].mean(1)


def _by_quarters(runs: Runs, baseline: Runs) -> list[str]:
    """P(better than the baseline) in each quarter of the frames."""
    pairs = [(_quarter(runs, k), _quarter(baseline, k)) for k in range(4)]
    return [_interval(improvement_interval([pair]), 2) for pair in pairs]


def tables(records: dict[str, dict[str, Runs]]) -> str:
    """Make a table per game, and one across games."""
    parts = []
    measures = {"last quarter": _last, "whole run": _all}
    for game, arms in records.items():
        body = []
        for arm, runs in arms.items():
            line = [arm]
            for measure in measures.values():
                score = measure(runs)
                line.append(_interval(bootstrap(score[:, None]), 2))
                if arm == "uniform" or "uniform" not in arms:
                    line.append("")
                else:
                    against = measure(arms["uniform"])
                    line.append(_interval(improvement_interval([(score, against)]), 2))
            body.append(line)
        head = ["agent"]
        for name in measures:
            head += [f"IQM, {name}", "P(better than uniform)"]
        about = next(iter(arms.values())).about
        parts.append(
            f"### {game}\n\n{about['runs']} runs of {about['settings']['frames']:,} frames.\n\n"
            + table(head, body)
        )
        for baseline in ("uniform", "uniform, lr x 4"):
            if baseline in arms and len(arms) > 1:
                others = [arm for arm in arms if arm != baseline]
                body = [[arm, *_by_quarters(arms[arm], arms[baseline])] for arm in others]
                head = [f"P(better than {baseline})", *(f"quarter {k + 1}" for k in range(4))]
                parts.append(table(head, body))
    body = []
    for arm in ARMS:
        games = [g for g, arms in records.items() if arm in arms and "uniform" in arms]
        if arm == "uniform" or len(games) < 2:
            continue
        line: list[Any] = [arm, len(games)]
        for measure in measures.values():
            pairs = [(measure(records[g][arm]), measure(records[g]["uniform"])) for g in games]
            line.append(_interval(improvement_interval(pairs), 2))
        body.append(line)
    if body:
        head = ["agent", "games", *(f"mean P(better than uniform), {name}" for name in measures)]
        parts.append(f"### All games\n\n{table(head, body)}")
    return "\n\n".join(parts)


def curves(records: dict[str, dict[str, Runs]], file: Path) -> None:
    """Draw the learning curves: interquartile means with intervals."""
    size = {"nrows": 1, "ncols": len(records), "figsize": (5.5 * len(records), 4.0)}
    with picture(file, dpi=90, squeeze=False, **size) as grid:
        for axes, (game, arms) in zip(grid[0], records.items(), strict=True):
            for colour, (arm, runs) in zip(COLOURS, arms.items(), strict=False):
                ends, values = runs.windows()
                middle, low, high = bootstrap(values, repetitions=500)
                axes.plot(ends, middle, color=colour, label=arm)
                axes.fill_between(ends, low, high, color=colour, alpha=0.15, lw=0)
            axes.set(title=game, xlabel="frames", ylabel="return, IQM")
        labels = grid[0, 0].get_legend_handles_labels()
        grid[0, 0].figure.legend(*labels, loc="outside lower center", ncols=4)


def make(out: Path, page: Path | None = None) -> str:
    """Make tables and curves of the files in `out`; fill the block of a page if there is one."""
    records = read(out)
    if not records:
        return f"no results in {out}"
    text = tables(records)
    (out / "tables.md").write_text(text + "\n")
    shown = ""
    try:
        curves(records, out / "curves.png")
        shown = "\n\n![Interquartile means and 95% intervals]"
        shown += "(../benchmarks/results/minatar_study/curves.png)"
    except ImportError:  # there is no matplotlib
        pass
    if page is not None:
        fill(page, text + shown)
    return text

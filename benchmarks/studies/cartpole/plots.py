"""Pictures of the study."""

from pathlib import Path
from typing import Any

from benchmarks.pages import COLOURS, picture
from benchmarks.studies.cartpole.comparisons import Row
from benchmarks.studies.cartpole.results import Record, curve_points
from benchmarks.studies.cartpole.settings import Variant
from benchmarks.studies.statistics_of_runs import bootstrap

REPETITIONS = 500
POINTS = 40  # of a learning curve, about
VERDICTS = {"better": COLOURS[2], "worse": COLOURS[4], "not apart": COLOURS[5]}


def _width(limit: int, least: int) -> int:
    """Of a window, a multiple of `least`, unless the limit is below it."""
    return max(1, min(limit, max(1, round(limit / POINTS / least)) * least))


def _curve(axes: Any, records: dict[str, Record], *, by_step: bool) -> None:
    for colour, (agent, record) in zip(COLOURS, records.items(), strict=False):
        episodes = int((record.lengths > 0).sum(axis=1).min())
        limit = int(record.steps.min()) if by_step else episodes
        width = _width(limit, 1_000 if by_step else 5)
        ends, values = curve_points(record, by_step=by_step, width=width, limit=limit)
        if not len(ends):
            continue
        middle, low, high = bootstrap(values, repetitions=REPETITIONS)
        axes.plot(ends, middle, color=colour, label=agent)
        axes.fill_between(ends, low, high, color=colour, alpha=0.2, lw=0)
    axes.set_xlabel("environment steps" if by_step else "episodes (up to the fewest of any run)")


def curves(variants: dict[str, Variant], records: dict[str, dict[str, Record]], file: Path) -> bool:
    """Learning curves of two agents per variant, by episode and by step; False without any."""
    shown = {name: found for name, found in records.items() if len(variants[name].agents) == 2}
    if not shown:
        return False
    layout = {"nrows": len(shown), "ncols": 2, "figsize": (11, 2.9 * len(shown))}
    with picture(file, dpi=90, squeeze=False, sharey="row", **layout) as grid:
        for row, (name, found) in zip(grid, shown.items(), strict=True):
            _curve(row[0], found, by_step=False)
            _curve(row[1], found, by_step=True)
            row[0].set(title=variants[name].title, ylabel="return, IQM")
        if grid[0, 1].lines:
            grid[0, 1].legend()
    return True


def forest(rows: dict[str, list[Row]], file: Path) -> bool:
    """P(agent > uniform) of every row that can be compared, with intervals; False without any."""
    shown = [(name, row) for name, found in rows.items() for row in found if row.comparable]
    shown = [(name, row) for name, row in shown if row.window.startswith(("steps", "episodes"))]
    if not shown:
        return False
    with picture(file, dpi=90, figsize=(9, 0.21 * len(shown) + 1.2)) as axes:
        for place, (_, row) in enumerate(shown):
            middle, low, high = row.probability
            colour = VERDICTS[row.verdict]
            axes.plot([low, high], [place, place], color=colour, lw=1.5)
            axes.plot(middle, place, "o", color=colour, ms=4)
        labels = [
            f"{name}{'' if row.agent == 'prioritized' else ', ' + row.agent}: {row.window}"
            + " *" * row.censored
            for name, row in shown
        ]
        axes.set_yticks(range(len(shown)), labels, fontsize=7)
        axes.set_ylim(len(shown) - 0.5, -0.5)
        axes.axvline(0.5, color="black", lw=0.8)
        axes.set(xlim=(0, 1), xlabel="P(better than uniform), 95% interval (* not all runs)")
    return True

"""Tables and the picture of what the agents needed.

A record is a dict: "representation", "agent", "n", "batch" and "section" (ablation only), "limit",
and "updates", a count per seed, None where it did not converge within the limit.
"""

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.pages import DOCS, look, picture, table

BOOTSTRAP = 10_000  # resamples for an interval
PAGES = {"study": DOCS / "blind_cliffwalk.md", "ablation": DOCS / "settings.md"}
TITLES = {"tabular": "Tabular", "linear": "Linear with bias"}

Count = int | None
Record = dict[str, Any]


def median(updates: list[Count]) -> float:
    """Return the median over seeds, infinite where that seed did not converge."""
    return float(np.median([np.inf if count is None else count for count in updates]))


def finite(value: float) -> str:
    """Write a count for people to read."""
    return f"{value:,.0f}" if np.isfinite(value) else "never"


def interval(updates: list[Count], over: list[Count] | None = None) -> tuple[float, float]:
    """Return a 95% bootstrap interval: of the median, or of the ratio of medians over / updates."""
    rng = np.random.default_rng(0)

    def medians(counts: list[Count]) -> np.ndarray:
        values = np.array([np.inf if count is None else count for count in counts])
        return np.median(rng.choice(values, (BOOTSTRAP, len(values))), axis=1)

    found = medians(updates) if over is None else medians(over) / medians(updates)
    low, high = np.percentile(found, (2.5, 97.5), method="inverted_cdf")
    return float(low), float(high)


def count_cell(record: Record) -> str:
    """Write median and interval, and how many seeds arrived if not all did."""
    updates = record["updates"]
    done = sum(count is not None for count in updates)
    seeds = "" if done == len(updates) else f", {done} of {len(updates)} seeds done"
    if not np.isfinite(median(updates)):
        return f"not by {record['limit']:,}{seeds}"
    low, high = interval(updates)
    return f"{finite(median(updates))} ({finite(low)} to {finite(high)}){seeds}"


def ratio_cell(record: Record, uniform: Record) -> str:
    """Write how many times fewer updates than the uniform agent it took, with interval."""
    ratio = median(uniform["updates"]) / median(record["updates"])
    if not ratio:
        return ""
    ends = interval(record["updates"], uniform["updates"])
    middle, low, high = (f"{x:,.0f}" if x >= 100 else f"{x:.3g}" for x in (ratio, *ends))
    return f"{middle} ({low} to {high})"


def study_tables(records: list[Record]) -> list[str]:
    """Make tables of counts and ratios, a row per n and a column per agent."""
    parts = []
    for kind, title in TITLES.items():
        found = {(r["agent"], r["n"]): r for r in records if r["representation"] == kind}
        names = list(dict.fromkeys(agent for agent, _ in found))
        sizes = sorted({n for _, n in found})
        counts, ratios = [], []
        for n in sizes:
            here = [found.get((name, n)) for name in names]
            counts.append([n, *(count_cell(r) if r else "" for r in here)])
            ratios.append([n, *(ratio_cell(r, found["uniform", n]) if r else "" for r in here[1:])])
        parts += [f"### {title}: updates, median (95% interval)", table(["n", *names], counts)]
        parts += [f"### {title}: uniform / agent", table(["n", *names[1:]], ratios)]
    return parts


def ablation_tables(records: list[Record]) -> list[str]:
    """Make a table with a row per setting, and for each n counts and ratios."""
    found = {(r.get("section", "uniform"), r["agent"], r["batch"], r["n"]): r for r in records}
    sizes = sorted({r["n"] for r in records})
    head = ["varied", "value", "batch"]
    for n in sizes:
        seeds = len(found["uniform", "uniform", 1, n]["updates"])
        head += [f"n = {n}, {seeds} seeds: updates", f"n = {n}: uniform / this"]
    rows: list[list[Any]] = []
    for section, agent, batch in dict.fromkeys(key[:3] for key in found):
        rows.append(["" if section == agent else section, agent, batch])
        for n in sizes:
            record = found.get((section, agent, batch, n))
            uniform = found["uniform", "uniform", batch, n]
            rows[-1] += [count_cell(record), ratio_cell(record, uniform)] if record else ["", ""]
    return [table(head, rows)]


def page_block(name: str, results: Record) -> str:
    """Say where the figures of a study or an ablation come from, and make its tables."""
    runs = results["runs"]
    minutes = sum(run["seconds"] for run in runs) / 60
    origin = {f"{run['machine']['cpu']}, torch {run['versions']['torch']}" for run in runs}
    made = f"Made in {minutes:.0f} minutes on one core ({'; '.join(sorted(origin))})."
    parts = study_tables if name == "study" else ablation_tables
    return "\n\n".join([made, *parts(results["records"])])


def plot(records: list[Record], path: Path) -> None:
    """Draw the paper's figure: medians over the size of the memory, faint lines least and most."""
    names = dict.fromkeys(record["agent"] for record in records)
    with picture(path, ncols=2, figsize=(11, 4.8), sharey=True) as panels:
        for axes, kind in zip(panels, TITLES, strict=True):
            for i, name in enumerate(names):
                found = [r for r in records if (r["representation"], r["agent"]) == (kind, name)]
                found = [r for r in sorted(found, key=lambda r: r["n"]) if all(r["updates"])]
                size = [2 ** (r["n"] + 1) - 2 for r in found]
                middle = [median(r["updates"]) for r in found]
                axes.plot(size, middle, label=name, markersize=5, **look(i))
                for extreme in (min, max):
                    ends = [extreme(r["updates"]) for r in found]
                    axes.plot(size, ends, color=look(i)["color"], lw=0.7, alpha=0.4)
            axes.set(xscale="log", yscale="log", xlabel="transitions in the memory")
            axes.set_title(TITLES[kind])
        panels[0].set_ylabel("updates until converged")
        panels[0].legend(fontsize=8)

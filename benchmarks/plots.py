"""Results as pictures."""

from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from benchmarks.race import TOTAL

__all__ = ["plot"]

COLOURS = ("#2b6cb0", "#dd6b20", "#2f855a", "#805ad5", "#c53030", "#718096", "#b7791f", "#319795")
MARKERS = "osD^vPX*"
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e2e8f0",
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "legend.frameon": False,
}
AXES = {"capacity": "filled slots", "batch": "batch size"}


def _measured(case: dict, part: str | None) -> list[dict]:
    rows = [row for row in case["rows"] if row.get("unit") == "us"]
    return rows if part is None else [row for row in rows if row["part"] == part]


def _lines(axes: Axes, case: dict, axis: str) -> None:
    rows = _measured(case, TOTAL) or _measured(case, None)
    other = "batch" if axis == "capacity" else "capacity"
    several = len({row[other] for row in rows}) > 1
    with_total = {row["contestant"] for row in rows}
    rows += [r for r in _measured(case, "sample") if r["contestant"] not in with_total]
    mixed = len({row["part"] for row in rows}) > 1
    series: dict[str, list[dict]] = {}
    for row in rows:
        label = row["contestant"] + (f", {other} {row[other]:,}" if several else "")
        if mixed:
            label += f" ({row['part']})"
        series.setdefault(label, []).append(row)
    for i, (label, points) in enumerate(series.items()):
        colour = COLOURS[i % len(COLOURS)]
        x = [row[axis] for row in points]
        marker = MARKERS[i % len(MARKERS)]
        axes.plot(x, [row["median"] for row in points], f"{marker}-", color=colour, label=label)
        low, high = [row["q1"] for row in points], [row["q3"] for row in points]
        axes.fill_between(x, low, high, color=colour, alpha=0.18, lw=0)
    axes.set(xscale="log", yscale="log", xlabel=AXES[axis])
    axes.set_ylabel("time per call (us), median and quartiles")
    axes.legend(fontsize=8)


def _bars(axes: Axes, case: dict) -> None:
    names = list(dict.fromkeys(row["contestant"] for row in _measured(case, None)))[::-1]
    for part, colour in (("sample", COLOURS[0]), ("update", COLOURS[1])):
        found = {row["contestant"]: row["median"] for row in _measured(case, part)}
        before = (
            {}
            if part == "sample"
            else {row["contestant"]: row["median"] for row in _measured(case, "sample")}
        )
        left = [before.get(name, 0) for name in names]
        widths = [found.get(name, 0) for name in names]
        axes.barh(names, widths, left=left, color=colour, label=part)
    for name in names:
        total = sum(
            row["median"]
            for part in ("sample", "update")
            for row in _measured(case, part)
            if row["contestant"] == name
        )
        axes.annotate(f" {total:,.0f}", (total, name), va="center", fontsize=9)
    axes.set(xlabel="time per call (us), medians")
    axes.grid(visible=False, axis="y")
    axes.legend(loc="best")


def _exactness(axes: Axes, case: dict) -> None:
    series: dict[str, list[dict]] = {}
    for row in case["rows"]:
        if "tv" in row:
            series.setdefault(f"{row['contestant']}, {row['masses']} masses", []).append(row)
    methods = list(dict.fromkeys(points[0]["contestant"] for points in series.values()))
    for label, points in series.items():
        i = methods.index(points[0]["contestant"])
        axes.plot(
            [row["capacity"] for row in points],
            [row["tv"] / row["tv_perfect"] for row in points],
            f"{MARKERS[i % len(MARKERS)]}{'-' if 'equal' in label else '--'}",
            color=COLOURS[i % len(COLOURS)],
            label=label,
        )
    axes.axhline(1, color="#718096", lw=1, ls=":")
    axes.set(xscale="log", yscale="log", xlabel="slots")
    axes.set_ylabel("distance from the right distribution\n(1 = as far as perfect draws)")
    axes.legend(fontsize=7)


def _profile(axes: Axes, case: dict) -> None:
    rows = [row for row in _measured(case, None) if row["part"] != "rest"][::-1]
    calls = list(dict.fromkeys(row["contestant"] for row in rows))
    for at, row in enumerate(rows):
        inner = row["part"].startswith("- ")
        colour = COLOURS[calls.index(row["contestant"])]
        alpha = 0.4 if inner else 1.0 if row["part"] == "all of it" else 0.7
        axes.barh(at, row["median"], color=colour, alpha=alpha)
        axes.annotate(f" {row['median']:.0f}", (row["median"], at), va="center", fontsize=8)
    labels = [f"{row['contestant']}: {row['part']}" for row in rows]
    axes.set_yticks(range(len(rows)), labels, fontsize=8)
    axes.set(xlabel="time (us), medians; parts marked - belong to the part above")
    axes.grid(visible=False, axis="y")


def _draw(axes: Axes, case: dict) -> bool:
    if case["kind"] == "exactness":
        _exactness(axes, case)
    elif case["kind"] == "profile":
        _profile(axes, case)
    elif case["plot"] in AXES:
        _lines(axes, case, case["plot"])
    elif case["plot"] == "contestant":
        _bars(axes, case)
    else:
        return False
    return True


def plot(case: dict, path: Path, footer: str) -> bool:
    """Draw a case into a PNG file; False where there is nothing to draw.

    Args:
        case: its record.
        path: of the file.
        footer: where the numbers come from.
    """
    if not any("median" in row or "tv" in row for row in case["rows"]):
        return False
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7.5, 4.6), layout="constrained")
        drawn = _draw(axes, case)
        if drawn:
            axes.set_title(case["title"])
            figure.supxlabel(footer, fontsize=7, color="#718096", x=0.01, ha="left")
            figure.savefig(path, dpi=130)
        plt.close(figure)
    return drawn

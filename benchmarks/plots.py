"""Pictures of the cases."""

from pathlib import Path
from typing import Any

from benchmarks.pages import COLOURS, GREY, look, picture
from benchmarks.race import TOTAL

AXES = {"capacity": "filled slots", "batch": "batch size"}


def _measured(case: dict, part: str | None = None) -> list[dict]:
    rows = [row for row in case["rows"] if row.get("unit") == "us"]
    return rows if part is None else [row for row in rows if row["part"] == part]


def _lines(axes: Any, case: dict) -> None:
    axis = case["plot"]
    rows = _measured(case, TOTAL) or _measured(case)
    other = "batch" if axis == "capacity" else "capacity"
    several = len({row[other] for row in rows}) > 1
    with_total = {row["contestant"] for row in rows}
    rows += [r for r in _measured(case, "sample") if r["contestant"] not in with_total]
    mixed = len({row["part"] for row in rows}) > 1
    series: dict[str, list[dict]] = {}
    for row in rows:
        label = row["contestant"] + (f", {other} {row[other]:,}" if several else "")
        series.setdefault(label + f" ({row['part']})" * mixed, []).append(row)
    for i, (label, points) in enumerate(series.items()):
        x, y, low, high = ([row[k] for row in points] for k in (axis, "median", "q1", "q3"))
        axes.plot(x, y, label=label, **look(i))
        axes.fill_between(x, low, high, color=look(i)["color"], alpha=0.18, lw=0)
    axes.set(xscale="log", yscale="log", xlabel=AXES[axis])
    axes.set_ylabel("time per call (us), median and quartiles")
    axes.legend(fontsize=8)


def _bars(axes: Any, case: dict) -> None:
    names = list(dict.fromkeys(row["contestant"] for row in _measured(case)))[::-1]
    left = dict.fromkeys(names, 0.0)
    for part, colour in zip(("sample", "update"), COLOURS, strict=False):
        found = {row["contestant"]: row["median"] for row in _measured(case, part)}
        widths = [found.get(name, 0) for name in names]
        axes.barh(names, widths, left=[*left.values()], color=colour, label=part)
        left = {name: left[name] + width for name, width in zip(names, widths, strict=True)}
    for name, total in left.items():
        axes.annotate(f" {total:,.0f}", (total, name), va="center", fontsize=9)
    axes.set(xlabel="time per call (us), medians")
    axes.grid(visible=False, axis="y")
    axes.legend(loc="best")


def _exactness(axes: Any, case: dict) -> None:
    series: dict[tuple[str, str], list[dict]] = {}
    for row in case["rows"]:
        if "tv" in row:
            series.setdefault((row["contestant"], row["masses"]), []).append(row)
    methods = list(dict.fromkeys(method for method, _ in series))
    for (method, masses), points in series.items():
        x = [row["capacity"] for row in points]
        y = [row["tv"] / row["tv_perfect"] for row in points]
        style = look(methods.index(method)) | {"ls": "-" if masses == "equal" else "--"}
        axes.plot(x, y, label=f"{method}, {masses} masses", **style)
    axes.axhline(1, color=GREY, lw=1, ls=":")
    axes.set(xscale="log", yscale="log", xlabel="slots")
    axes.set_ylabel("distance from the right distribution\n(1 = as far as perfect draws)")
    axes.legend(fontsize=7)


def _profile(axes: Any, case: dict) -> None:
    rows = [row for row in _measured(case) if row["part"] != "rest"][::-1]
    calls = list(dict.fromkeys(row["contestant"] for row in rows))
    for at, row in enumerate(rows):
        alpha = 0.4 if row["part"].startswith("- ") else 1.0 if row["part"] == "all of it" else 0.7
        axes.barh(at, row["median"], color=COLOURS[calls.index(row["contestant"])], alpha=alpha)
        axes.annotate(f" {row['median']:.0f}", (row["median"], at), va="center", fontsize=8)
    labels = [f"{row['contestant']}: {row['part']}" for row in rows]
    axes.set_yticks(range(len(rows)), labels, fontsize=8)
    axes.set(xlabel="time (us), medians; parts marked - belong to the part above")
    axes.grid(visible=False, axis="y")


DRAWN = {
    "exactness": _exactness,
    "profile": _profile,
    "capacity": _lines,
    "batch": _lines,
    "contestant": _bars,
}
"""By the kind of a case, or the axis of its plot."""


def plot(case: dict, file: Path, footer: str) -> bool:
    """Draw the record of a case into a PNG; False where there is nothing to draw."""
    draw = DRAWN.get(case["kind"]) or DRAWN.get(case["plot"])
    if draw is None or not any("median" in row or "tv" in row for row in case["rows"]):
        return False
    with picture(file, footer=footer, figsize=(7.5, 4.6)) as axes:
        draw(axes, case)
        axes.set_title(case["title"])
    return True

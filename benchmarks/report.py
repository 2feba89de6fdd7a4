"""Tables and plots from the JSON of a run; `python -m benchmarks.report` makes all of them anew."""

import argparse
import json
from pathlib import Path

from benchmarks import parts
from benchmarks.pages import DOCS, RESULTS, fill, number, table
from benchmarks.plots import plot

PUBLISHED = ("cpu", "cuda")
ON_SPEED_PAGE = ("standard", "growth", "batch", "methods", "cuda-methods")
NOT_RUN = "not run"


def _size(value: float) -> str:
    """Write 10^5 for powers of ten, else the number."""
    power = len(str(value)) - 1
    return f"10^{power}" if power >= 4 and value == 10**power else f"{value:,}"


def _cell(row: dict) -> str:
    if "median" not in row:
        return f"{NOT_RUN}: {row['not_run']}"
    quartiles = f" ({number(row['q1'])} to {number(row['q3'])})" if "q1" in row else ""
    return number(row["median"]) + quartiles


def _verdict(goal: dict) -> str:
    if "not_run" in goal or goal["reached"]:
        return "" if "not_run" in goal else "reached"
    off = goal["median"] / goal["limit"] if goal["limit"] else goal["median"]
    return f"not reached: {number(off)} times the limit"


def goals_table(cases: list[dict]) -> str:
    """Make a table of all goals: limit, what was measured, and if that is enough."""
    body = []
    for goal in (goal for case in cases for goal in case.get("goals", [])):
        shown = goal if goal["relative"] else {k: v for k, v in goal.items() if k != "q1"}
        limit = f"at most {number(goal['limit'])}"
        body.append([goal["text"], limit, _cell(shown), _verdict(goal)])
    return table(["goal", "limit", "measured", ""], body) if body else ""


def header(results: dict) -> str:
    """Say where the numbers come from."""
    machine, commit = results["machine"], results["commit"]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    on = f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB"
    dirty = " with uncommitted changes" if commit["dirty"] else ""
    lines = [
        f"`{results['command']}`",
        "",
        f"- machine: {on}; GPU: {machine['gpu'] or 'none'}; threads used: "
        f"{machine['threads_used']}; load before the run: {machine['load_before']}",
        f"- versions: {versions}",
        f"- commit: {commit['hash']}{dirty}",
        f"- date: {results['date']}; seed: {results['seed']}; took {number(results['seconds'])} s",
    ]
    if results["quick"]:
        lines += ["", "**A quick run at tiny sizes: it shows that the benchmarks run, no more.**"]
    return "\n".join(lines)


def _values(rows: list[dict], key: str) -> list:
    return list(dict.fromkeys(row[key] for row in rows if row.get(key) is not None))


def _label(row: dict, keys: list[str]) -> str:
    words = {"batch": "batch {}", "schema": "{} transitions"}
    named = [words[k].format(_size(row[k]) if k == "batch" else row[k]) for k in keys]
    return ", ".join([row["contestant"], *named])


def _by_part(rows: list[dict], extra: list[str]) -> str:
    timed = [row for row in rows if row.get("unit", "us") in ("us", "ms")]
    unit = next((row["unit"] for row in timed if "unit" in row), "us")
    columns = _values(timed, "part") or [""]
    lines: dict[str, dict[str, str]] = {}
    for row in timed:  # one that was not run has no part: its reason goes into the first column
        lines.setdefault(_label(row, extra), {})[row["part"] or columns[0]] = _cell(row)
    body = [[label, *(cells.get(c, "") for c in columns)] for label, cells in lines.items()]
    return table([unit, *columns], body)


def _by_axis(rows: list[dict], axis: str, extra: list[str]) -> str:
    values = _values(rows, axis)
    measured = {row["contestant"] for row in rows if row["part"]}
    lines: dict[str, dict[int, str]] = {}
    reasons: dict[str, None] = {}
    for row in rows:
        if row.get("not_run"):
            reasons[f"{row['contestant']}, {_size(row[axis])}: {row['not_run']}"] = None
            if row["contestant"] not in measured:
                lines.setdefault(row["contestant"], {})
            continue
        label = ", ".join([_label(row, extra)] + [row["part"]] * (row["part"] is not None))
        unit = "" if row["unit"] == "us" else f" ({row['unit']})"
        lines.setdefault(label + unit, {})[row[axis]] = _cell(row)
    body = [[label, *(cells.get(v, NOT_RUN) for v in values)] for label, cells in lines.items()]
    text = table([f"us by {axis}", *map(_size, values)], body)
    return "\n".join([text, *(f"\nNot run: {reason}." for reason in reasons)])


def _exactness(rows: list[dict]) -> str:
    head = ["method", "slots", "masses", "distance", "of perfect draws", "ratio", "chi-square p"]
    body = []
    for row in rows:
        cells = [row["contestant"], _size(row["capacity"]), row["masses"]]
        if "not_run" in row:
            cells += [f"{NOT_RUN}: {row['not_run']}", "", "", "", ""]
        else:
            ratio = number(row["tv"] / row["tv_perfect"])
            chance = f"{row['chi2_p']:.2g}" if row["chi2_p"] >= 1e-12 else "0"
            cells += [f"{row['tv']:.5f}", f"{row['tv_perfect']:.5f}", ratio, chance, row["outside"]]
        body.append(cells)
    return table([*head, "outside"], body)


def suggested_limit(case: dict, tree_name: str = "tree", other: str = "multinomial") -> str:
    """Say up to which capacity `other` beats the tree, by what was measured."""
    medians: dict[str, dict[int, float]] = {}
    for row in case["rows"]:
        if row.get("median") is not None:
            medians.setdefault(row["contestant"], {})[row["capacity"]] = row["median"]
    tree, flat = medians.get(tree_name, {}), medians.get(other, {})
    wins = [capacity for capacity in tree if capacity in flat and flat[capacity] < tree[capacity]]
    found = f"up to {_size(max(wins))} slots" if wins else "nowhere"
    return f'Suggested for `method="auto"`: {other} {found}, the {tree_name} elsewhere.'


def _noise(case: dict) -> str:
    share = case.get("core_share")
    if share is None or share > 0.95 or case["device"] == "cuda":
        return ""
    return f" **Noisy: the process had only {100 * share:.0f}% of a core.**"


def _table_of(case: dict) -> str:
    rows = case["rows"]
    if case["kind"] == "exactness":
        return _exactness(rows)
    if case["kind"] == "profile":
        body = [[row["contestant"], row["part"], _cell(row)] for row in rows]
        return table(["call", "part", "us"], body)
    axes = [key for key in ("capacity", "batch") if len(_values(rows, key)) > 1]
    extra = ["schema"] if len(_values(rows, "schema")) > 1 else []
    return _by_axis(rows, axes[0], extra + axes[1:]) if axes else _by_part(rows, extra)


def case_text(case: dict) -> str:
    """Write a section: title, what is measured, the table, footnotes."""
    lines = [f"## {case['title']}", case["about"]]
    if "not_run" in case:
        return "\n\n".join([*lines, f"{NOT_RUN}: {case['not_run']}."])
    lines.append(_table_of(case))
    lines += [f"{name}: {note}." for name, note in case.get("notes", {}).items()]
    if case["name"].startswith("methods"):
        lines += [suggested_limit(case), suggested_limit(case, "tree, plain torch")]
    if case.get("rounds"):
        lines.append(f"Medians (and quartiles) of {case['rounds']} rounds." + _noise(case))
    return "\n\n".join(lines)


def _plots(results: dict, folder: Path) -> dict[str, str]:
    """Draw what can be drawn: case -> file name."""
    machine = results["machine"]
    on = machine["gpu"] if results["name"] == "cuda" and machine["gpu"] else machine["cpu"]
    commit = (results["commit"]["hash"] or "unknown")[:9]
    footer = f"{on}, torch {results['versions']['torch']}, commit {commit}"
    footer += ", QUICK RUN: NOT A MEASUREMENT" * results["quick"]
    files = {case["name"]: f"{results['name']}-{case['name']}.png" for case in results["cases"]}
    try:
        return {
            case["name"]: files[case["name"]]
            for case in results["cases"]
            if plot(case, folder / files[case["name"]], footer)
        }
    except ImportError:  # there is no matplotlib
        return {}


def summary(results: dict) -> list[str]:
    """Begin a page: where its numbers come from, the goals, and how parts went if it has some."""
    head = [f"# Results: {results['name']}", header(results)]
    head += [results["note"]] if "note" in results else []
    goals = goals_table(results["cases"])
    if goals:
        head += ["## Goals", goals]
    if "parts" in results:
        head += ["## Parts", parts.text(results["parts"])]
    return head


def make(path: Path, *, pictures: bool = True) -> str:
    """Write the page that belongs to a JSON file, and unless told otherwise its plots, beside it.

    Returns:
        The page, without pictures.
    """
    results = json.loads(path.read_text())
    plots = _plots(results, path.parent) if pictures else {}
    page = head = summary(results)
    sections = {case["name"]: case_text(case) for case in results["cases"]}
    for name, text in sections.items():
        page = [*page, text, *([f"![{name}]({plots[name]})"] if name in plots else [])]
    path.with_suffix(".md").write_text("\n\n".join(page) + "\n")
    return "\n\n".join([*head, *sections.values()])


def _published(results: dict, folder: str = "../benchmarks/results") -> list[str]:
    name, machine = results["name"], results["machine"]
    pages = f"{results['date'][:10]}; [all tables]({folder}/{name}.md)."
    place = machine["cpu"] if name == "cpu" else machine["gpu"]
    shown = [c for c in results["cases"] if c["name"] in ON_SPEED_PAGE and c["rows"]]
    return [
        f"Made by `{results['command']}` on {place}, {pages}",
        goals_table(results["cases"]),
        *(f"![{case['title']}]({folder}/{name}-{case['name']}.png)" for case in shown),
    ]


def publish(folder: Path = RESULTS, page: Path = DOCS / "speed.md") -> bool:
    """Fill the marked block of docs/speed.md from the full runs; False where there are none."""
    found = [folder / f"{name}.json" for name in PUBLISHED]
    runs = [json.loads(path.read_text()) for path in found if path.exists()]
    if not runs or not page.exists():
        return False
    if len(runs) > 1:  # each tells of its own device
        for run in runs:
            run["cases"] = [case for case in run["cases"] if case["device"] == run["name"]]
    fill(page, "\n\n".join(line for run in runs for line in _published(run)))
    return True


def main(argv: list[str] | None = None) -> None:
    """Make all pages and plots of a folder."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder with the JSON files")
    args = parser.parse_args(argv)
    for path in sorted(args.out.glob("*.json")):
        if "cases" not in json.loads(path.read_text()):
            continue  # of a script with a report of its own
        make(path)
        print(path.with_suffix(".md"))
    if args.out == RESULTS:
        publish()


if __name__ == "__main__":
    main()

"""Tables and plots from the JSON of a run; `python -m benchmarks.report` makes all of them anew."""

import argparse
import json
import re
from pathlib import Path

from benchmarks import parts, tables

__all__ = ["PUBLISHED", "RESULTS", "main", "make", "publish", "summary"]

RESULTS = Path(__file__).parent / "results"
SPEED_PAGE = Path(__file__).parents[1] / "docs" / "speed.md"
PUBLISHED = ("cpu", "cuda")
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"


def _plots(results: dict, folder: Path) -> dict[str, str]:
    """Draw what can be drawn: case -> file name."""
    try:
        from benchmarks.plots import plot
    except ImportError:
        return {}
    machine = results["machine"]
    on = machine["gpu"] if results["name"] == "cuda" and machine["gpu"] else machine["cpu"]
    commit = (results["commit"]["hash"] or "unknown")[:9]
    footer = f"{on}, torch {results['versions']['torch']}, commit {commit}"
    footer += ", QUICK RUN: NOT A MEASUREMENT" * results["quick"]
    made = {}
    for case in results["cases"]:
        file = f"{results['name']}-{case['name']}.png"
        if plot(case, folder / file, footer):
            made[case["name"]] = file
    return made


def summary(results: dict) -> list[str]:
    """Begin a page: where its numbers come from, the goals, and how parts went if it has some."""
    head = [f"# Results: {results['name']}", tables.header(results)]
    head += [results["note"]] if "note" in results else []
    goals = tables.goals_table(results["cases"])
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
    head = summary(results)
    sections = {case["name"]: tables.case_text(case) for case in results["cases"]}
    page = head + [
        text + (f"\n\n![{name}]({plots[name]})" if name in plots else "")
        for name, text in sections.items()
    ]
    path.with_suffix(".md").write_text("\n\n".join(page) + "\n")
    return "\n\n".join([*head, *sections.values()])


def _summary(results: dict, folder: str) -> str:
    machine = results["machine"]
    place = machine["cpu"] if results["name"] == "cpu" else machine["gpu"]
    name = results["name"]
    lines = [
        f"Made by `{results['command']}` on {place}, {results['date'][:10]};"
        f" [all tables]({folder}/{name}.md).",
        tables.goals_table(results["cases"]),
    ]
    lines += [
        f"![{case['title']}]({folder}/{name}-{case['name']}.png)"
        for case in results["cases"]
        if case["name"] in ("standard", "growth", "batch", "methods", "cuda-methods")
        and case["rows"]
    ]
    return "\n\n".join(lines)


def publish(folder: Path = RESULTS, page: Path = SPEED_PAGE) -> bool:
    """Fill the marked block of docs/speed.md from the full runs; False where there are none."""
    found = [folder / f"{name}.json" for name in PUBLISHED]
    runs = [json.loads(path.read_text()) for path in found if path.exists()]
    if not runs or not page.exists():
        return False
    if len(runs) > 1:  # each tells of its own device
        for run in runs:
            run["cases"] = [case for case in run["cases"] if case["device"] == run["name"]]
    block = "\n\n".join([BEGIN, *(_summary(run, "../benchmarks/results") for run in runs), END])
    text = page.read_text()
    filled, count = re.subn(f"{BEGIN}.*?{END}", lambda _: block, text, flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"{page}: expected one block {BEGIN} ... {END}, got {count}")
    page.write_text(filled)
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

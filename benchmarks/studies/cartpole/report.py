"""Tables and plots from the files of the study."""

import re
from pathlib import Path

from benchmarks.report import BEGIN, END
from benchmarks.studies.cartpole.comparisons import Row, compare
from benchmarks.studies.cartpole.results import Record, load, path
from benchmarks.studies.cartpole.settings import Variant
from benchmarks.studies.statistics_of_runs import improvement_interval

__all__ = ["make"]

HEAD = (
    "| window | mean, uniform | mean, PER | IQM, uniform | IQM, PER | P(PER > uniform) | PER is |\n"
    "| --- | ---: | ---: | ---: | ---: | ---: | --- |"
)


def _interval(values: tuple[float, ...], digits: int) -> str:
    middle, low, high = (f"{value:.{digits}f}" for value in values)
    return f"{middle} [{low}, {high}]"


def _line(row: Row) -> str:
    """One row of a table of two agents."""
    window = row.window
    if row.censored:
        window += " (reached by " + " / ".join(str(len(s)) for s in row.scores) + " runs)"
    if not row.comparable:
        return f"| {window} | | | | | | too few runs |"
    one, other = row.summaries()
    cells = [window, f"{one[0]:.1f}", f"{other[0]:.1f}", _interval(one[1:], 1)]
    cells += [_interval(other[1:], 1), _interval(row.probability, 2)]
    return "| " + " | ".join([*cells, row.verdict]) + " |"


def _ablation(rows: list[Row]) -> str:
    """Agents in rows, windows in columns, P(agent > baseline) in the cells."""
    names = list(dict.fromkeys(row.window for row in rows))
    lines = ["| agent | " + " | ".join(f"P, {name}" for name in names) + " |"]
    lines.append("| --- |" + " ---: |" * len(names))
    for agent in dict.fromkeys(row.agent for row in rows):
        found = {row.window: row for row in rows if row.agent == agent and row.comparable}
        cells = [_interval(found[name].probability, 2) if name in found else "" for name in names]
        lines.append(f"| {agent} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _overall(rows: dict[str, list[Row]]) -> str:
    """The mean over the CartPole variants, where several share a window."""
    found: dict[str, list[Row]] = {}
    for name, of_variant in rows.items():
        if name in ("mountain_car", "ablation"):
            continue
        for row in of_variant:
            if row.comparable and row.window.startswith("steps"):
                found.setdefault(row.window, []).append(row)
    lines = []
    for window, shared in found.items():
        if len(shared) > 1:
            pairs = [(row.scores[1], row.scores[0]) for row in shared]
            value = _interval(improvement_interval(pairs), 2)
            lines.append(f"| {window} | {len(shared)} | {value} |")
    if not lines:
        return ""
    head = "### All CartPole settings together\n\n| window | settings | mean P(PER > uniform) |\n"
    return "\n".join([head + "| --- | ---: | ---: |", *lines])


def _about(variant: Variant, records: dict[str, Record]) -> str:
    """Runs, steps and time, of what is in the files."""
    found = list(records.values())
    runs = sorted({record.about["runs"] for record in found})
    time = ", ".join(
        f"{record.about['milliseconds']:.1f} ms ({agent})"
        for agent, record in list(records.items())[:2]
    )
    return (
        f"{' or '.join(map(str, runs))} runs of each agent, lockstep steps of {time};"
        f" transitions seen per run {min(r.steps.min() for r in found):,} to"
        f" {max(r.steps.max() for r in found):,}, episodes finished"
        f" {min((r.lengths > 0).sum(1).min() for r in found)} to"
        f" {max(r.lengths.shape[1] for r in found)}."
    )


def _block(variants: dict[str, Variant], records: dict[str, dict[str, Record]]) -> str:
    """All tables, as Markdown."""
    any_record = next(iter(next(iter(records.values())).values()))
    cpu, torch = (any_record.about["machine"]["cpu"], any_record.about["versions"]["torch"])
    parts = [f"Made on {cpu} with torch {torch}, one thread per process."]
    rows = {name: compare(variants[name], records[name]) for name in records}
    for name, of_variant in rows.items():
        if not of_variant:
            continue
        several = len({row.agent for row in of_variant}) > 1
        table = _ablation(of_variant) if several else "\n".join([HEAD, *map(_line, of_variant)])
        parts.append(
            f"### {variants[name].title}\n\n`{name}`: " + _about(variants[name], records[name])
        )
        parts.append(table)
    parts.append(_overall(rows))
    return "\n\n".join(part for part in parts if part)


def _plots(
    variants: dict[str, Variant], records: dict[str, dict[str, Record]], out: Path
) -> dict[str, str]:
    """Draw the pictures: file name -> caption; none without matplotlib."""
    try:
        from benchmarks.studies.cartpole import plots
    except ImportError:
        return {}
    made = {}
    if plots.curves(variants, records, out / "curves.png"):
        made["curves.png"] = "Interquartile means and their 95% intervals"
    rows = {name: compare(variants[name], records[name]) for name in records}
    if plots.forest(rows, out / "improvement.png"):
        made["improvement.png"] = "Probability that a prioritized run beats a uniform one"
    return made


def publish(page: Path, block: str) -> None:
    """Put a block between the markers of a page.

    Raises:
        ValueError: the page has no such block, or several.
    """
    pattern = f"{BEGIN}.*?{END}"
    text, count = re.subn(
        pattern, lambda _: f"{BEGIN}\n\n{block}\n\n{END}", page.read_text(), flags=re.DOTALL
    )
    if count != 1:
        raise ValueError(f"{page}: expected one block {BEGIN} ... {END}, got {count}")
    page.write_text(text)


def make(variants: dict[str, Variant], out: Path, page: Path | None = None) -> str:
    """Tables and plots of the files that exist; tables also as `tables.md` beside them.

    Args:
        variants: those wanted; agents without a file are left out.
        out: folder of the files, where the plots go too.
        page: the page whose marked block is filled with tables and plots.

    Returns:
        The tables.
    """
    records = {}
    for name, variant in variants.items():
        files = {agent: path(out, name, agent) for agent in variant.agents}
        found = {agent: load(file) for agent, file in files.items() if file.exists()}
        if found:
            records[name] = found
    if not records:
        return f"no results in {out}"
    pictures = _plots(variants, records, out)
    block = _block(variants, records)
    (out / "tables.md").write_text(block + "\n")
    if page is not None:
        folder = Path("../benchmarks/results/cartpole_study")
        shown = [f"![{caption}]({folder / file})" for file, caption in pictures.items()]
        publish(page, "\n\n".join([block, *shown]))
    return block

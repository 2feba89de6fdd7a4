"""Tables and plots from the files of the study."""

from pathlib import Path

from benchmarks.pages import fill, table
from benchmarks.studies.cartpole import plots
from benchmarks.studies.cartpole.comparisons import Row, compare
from benchmarks.studies.cartpole.results import Record, load, path
from benchmarks.studies.cartpole.settings import Variant
from benchmarks.studies.statistics_of_runs import improvement_interval

HEAD = ["window", "mean, uniform", "mean, PER", "IQM, uniform", "IQM, PER"]
HEAD += ["P(PER > uniform)", "PER is"]


def _interval(values: tuple[float, ...], digits: int) -> str:
    middle, low, high = (f"{value:.{digits}f}" for value in values)
    return f"{middle} [{low}, {high}]"


def _line(row: Row) -> list[str]:
    """Make a row of a table of two agents."""
    window = row.window
    if row.censored:
        window += " (reached by " + " / ".join(str(len(s)) for s in row.scores) + " runs)"
    if not row.comparable:
        return [window, "", "", "", "", "", "too few runs"]
    one, other = row.summaries()
    means, iqms = [f"{x[0]:.1f}" for x in (one, other)], [_interval(x[1:], 1) for x in (one, other)]
    return [window, *means, *iqms, _interval(row.probability, 2), row.verdict]


def _ablation(rows: list[Row]) -> str:
    """Make a table: agents in rows, windows in columns, P(agent > baseline) in the cells."""
    names = list(dict.fromkeys(row.window for row in rows))
    found = {
        (row.agent, row.window): _interval(row.probability, 2) for row in rows if row.comparable
    }
    agents = dict.fromkeys(row.agent for row in rows)
    body = [[agent, *(found.get((agent, name), "") for name in names)] for agent in agents]
    return table(["agent", *(f"P, {name}" for name in names)], body)


def _overall(rows: dict[str, list[Row]]) -> str:
    """Make a table of means over the CartPole variants, where several share a window."""
    found: dict[str, list[Row]] = {}
    for name, of_variant in rows.items():
        if name in ("mountain_car", "ablation"):
            continue
        for row in of_variant:
            if row.comparable and row.window.startswith("steps"):
                found.setdefault(row.window, []).append(row)
    body = [
        [window, len(shared), _interval(improvement_interval([r.scores[::-1] for r in shared]), 2)]
        for window, shared in found.items()
        if len(shared) > 1
    ]
    head = ["window", "settings", "mean P(PER > uniform)"]
    return f"### All CartPole settings together\n\n{table(head, body)}" if body else ""


def _about(records: dict[str, Record]) -> str:
    """Tell the runs, steps and times of the files."""
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


def block(variants: dict[str, Variant], records: dict[str, dict[str, Record]]) -> str:
    """Make all tables, as Markdown."""
    any_record = next(iter(next(iter(records.values())).values()))
    cpu, torch = (any_record.about["machine"]["cpu"], any_record.about["versions"]["torch"])
    parts = [f"Made on {cpu} with torch {torch}, one thread per process."]
    rows = {name: compare(variants[name], records[name]) for name in records}
    for name, of_variant in rows.items():
        if not of_variant:
            continue
        several = len({row.agent for row in of_variant}) > 1
        parts.append(f"### {variants[name].title}\n\n`{name}`: {_about(records[name])}")
        both = [*map(_line, of_variant)] if not several else []
        parts.append(table(HEAD, both) if both else _ablation(of_variant))
    parts.append(_overall(rows))
    return "\n\n".join(part for part in parts if part)


def _plots(
    variants: dict[str, Variant], records: dict[str, dict[str, Record]], out: Path
) -> dict[str, str]:
    """Draw the pictures: file name -> caption; none without matplotlib."""
    made = {}
    rows = {name: compare(variants[name], records[name]) for name in records}
    try:
        if plots.curves(variants, records, out / "curves.png"):
            made["curves.png"] = "Interquartile means and their 95% intervals"
        if plots.forest(rows, out / "improvement.png"):
            made["improvement.png"] = "Probability that a prioritized run beats a uniform one"
    except ImportError:  # there is no matplotlib
        pass
    return made


def read(variants: dict[str, Variant], out: Path) -> dict[str, dict[str, Record]]:
    """Read the files that exist: variant -> agent -> its runs."""
    records = {}
    for name, variant in variants.items():
        files = {agent: path(out, name, agent) for agent in variant.agents}
        found = {agent: load(file) for agent, file in files.items() if file.exists()}
        records |= {name: found} if found else {}
    return records


def make(variants: dict[str, Variant], out: Path, page: Path | None = None) -> str:
    """Make tables and plots of the files that exist; tables also as `tables.md` beside them.

    Args:
        variants: those wanted; agents without a file are left out.
        out: folder of the files, where the plots go too.
        page: the page whose marked block is filled with tables and plots.

    Returns:
        The tables.
    """
    records = read(variants, out)
    if not records:
        return f"no results in {out}"
    pictures = _plots(variants, records, out)
    text = block(variants, records)
    (out / "tables.md").write_text(text + "\n")
    if page is not None:
        folder = Path("../benchmarks/results/cartpole_study")
        shown = [f"![{caption}]({folder / file})" for file, caption in pictures.items()]
        fill(page, "\n\n".join([text, *shown]))
    return text

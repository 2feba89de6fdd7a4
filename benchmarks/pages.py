"""The maker of all tables, pictures and marked blocks of pages."""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parents[1] / "docs"
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"

COLOURS = ("#2b6cb0", "#dd6b20", "#2f855a", "#805ad5", "#c53030", "#718096", "#b7791f", "#319795")
GREY = COLOURS[5]
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


def number(value: float) -> str:
    """Write three significant digits, thousands separated."""
    if value == 0:
        return "0"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) < 10 else f"{value:.1f}"


def table(head: Sequence[Any], body: Sequence[Sequence[Any]]) -> str:
    """Make a Markdown table; the first column is text, the others are numbers."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *body]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def fill(page: Path, text: str) -> None:
    """Put a text between the marks of a page.

    Raises:
        ValueError: the page has no such marks, or several; it is left as it is.
    """
    block = f"{BEGIN}\n\n{text}\n\n{END}"
    old = page.read_text()
    filled, count = re.subn(f"{BEGIN}.*?{END}", lambda _: block, old, flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"{page}: expected one block {BEGIN} ... {END}, got {count}")
    page.write_text(filled)


def save(out: str, results: dict, text: str) -> None:
    """Print a page, and write results and page to the files `out`.json and `out`.md."""
    print(text)
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    Path(out + ".json").write_text(json.dumps(results, indent=1) + "\n")
    Path(out + ".md").write_text(text + "\n")


def look(i: int) -> dict[str, str]:
    """Colour and marker of the i-th line of a picture."""
    return {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}


@contextmanager
def picture(file: Path, *, footer: str = "", dpi: int = 130, **layout: Any) -> Iterator[Any]:
    """Save a PNG of the axes after the `with` block has drawn into them.

    Args:
        file: the PNG.
        footer: where the numbers come from.
        dpi: dots per inch.
        layout: for `matplotlib.pyplot.subplots`.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(layout="constrained", **layout)
        try:
            yield axes
            if footer:
                figure.supxlabel(footer, fontsize=7, color=GREY, x=0.01, ha="left")
            file.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(file, dpi=dpi)
        finally:
            plt.close(figure)

"""Draws docs/pictures/house.png: which part of per_td imports which, read from the source.

    python docs/house.py

A part is a folder of per_td, or a module beside the folders. An arrow leads from a part to one that
it imports. Arrows that follow from others are left out, and so are those to the basics.
"""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "per_td"
PICTURE = ROOT / "docs" / "pictures" / "house.png"
BASICS = ("errors", "validation", "memory", "weights", "draws", "copies")
TEXTS = {
    "ray": "shards on Ray",
    "transitions": "TransitionReplayBuffer",
    "torchrl": "drop-ins for TorchRL",
    "functional": "draws without a buffer",
    "buffer": "PrioritizedReplayBuffer:\nholds the parts, orders the calls",
    "nstep": "NStepWriter",
    "concurrency": "locks, processes that die,\nbatches drawn ahead",
    "checkpoint": "states and files",
    "diagnostics": "figures for a logger",
    "priorities": "the table: distributions,\ndraws, weights, updates",
    "storage": "transitions: the ring,\nits columns and files",
    "tree": "sums, maxima and minima\nof the masses",
    "kernels": "one list of operations:\nplain torch, numba, Triton",
    "basics": "errors, validation, memory, weights, draws, copies: for all parts",
}
"""What each part is, in the order in which the picture has the parts of a row."""


def imported(source: str) -> set[str]:
    """Return the modules of per_td that this source imports, in functions too."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == PACKAGE.name:
            found |= {f"{node.module}.{name.name}" for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return {name for name in found if name.startswith(f"{PACKAGE.name}.")}


def parts() -> dict[str, set[str]]:
    """Return the other parts that each part imports."""
    found: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if part != "__init__":
            others = {name.split(".")[1] for name in imported(path.read_text())}
            found.setdefault(part, set()).update(others - {part})
    return {part: others & found.keys() for part, others in sorted(found.items())}


def layers(imports: dict[str, set[str]]) -> list[list[str]]:
    """Return the parts from the top down: each part lies just below those that import it.

    Raises:
        graphlib.CycleError: parts import each other in a circle.
    """
    order = list(TopologicalSorter(imports).static_order())
    level = dict.fromkeys(order, 0)
    for part in reversed(order):
        for other in imports[part]:
            level[other] = max(level[other], level[part] + 1)
    rows = range(max(level.values()) + 1)
    return [[part for part in TEXTS if level.get(part) == row] for row in rows]


def reachable(imports: dict[str, set[str]], part: str) -> set[str]:
    """Return all parts that `part` imports, also through others."""
    return imports[part].union(*(reachable(imports, other) for other in imports[part]))


def needed(imports: dict[str, set[str]]) -> dict[str, set[str]]:
    """Leave out the imports that follow from others."""
    return {
        part: others - set().union(*(reachable(imports, other) for other in others))
        for part, others in imports.items()
    }


def draw() -> None:
    """Draw the picture."""
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    imports = {part: others - set(BASICS) for part, others in parts().items() if part not in BASICS}
    rows = layers(imports)
    width, height = max(len(row) for row in rows), len(rows)
    figure = Figure(figsize=(2.7 * width, 1.25 * (height + 1)), dpi=110, layout="constrained")
    axes = figure.subplots()
    axes.set(xlim=(-0.5, width - 0.5), ylim=(height + 0.4, -0.5))
    axes.axis("off")

    def box(x: float, y: float, name: str, face: str, edge: str) -> Text:
        style = {"boxstyle": "round,pad=0.45", "facecolor": face, "edgecolor": edge}
        text = f"$\\bf{{{name}}}$\n{TEXTS[name]}"
        return axes.text(x, y, text, ha="center", va="center", fontsize=9, bbox=style)

    boxes = {
        part: box((column + 0.5) * width / len(row) - 0.5, y, part, "#eef3fa", "#46688f")
        for y, row in enumerate(rows)
        for column, part in enumerate(row)
    }
    for part, others in needed(imports).items():
        for other in others:
            start, end = boxes[part], boxes[other]
            arrow = {"arrowstyle": "-|>", "color": "#7d8fa6", "shrinkA": 0, "shrinkB": 1}
            arrow |= {"patchA": start.get_bbox_patch(), "patchB": end.get_bbox_patch()}
            axes.annotate("", end.get_position(), start.get_position(), arrowprops=arrow, zorder=2)
    box((width - 1) / 2, height, "basics", "#f6f1e4", "#8f7a46")
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE)


if __name__ == "__main__":
    draw()

"""The picture of a sum tree with one draw, for docs/how_it_works.md.

python -m benchmarks.sum_tree
# writes docs/pictures/sum_tree.png
"""

from itertools import accumulate
from typing import Any

from benchmarks.pages import COLOURS, DOCS, GREY, picture

FANOUT = 4  # per_td's is 16
MASSES = (2, 0, 1, 3, 1, 4, 2, 1, 0, 5, 1, 0, 3, 1, 2, 2)
POINT = 15.4
PLAIN, TAKEN = "#edf2f7", "#fbd38d"
ORANGE = COLOURS[1]


def levels() -> list[list[int]]:
    """Return the masses, the sums above them, and so on up to the total."""
    found = [list(MASSES)]
    while len(found[-1]) > 1:
        below = found[-1]
        found.append([sum(below[i : i + FANOUT]) for i in range(0, len(below), FANOUT)])
    return found


def walk(tree: list[list[int]], point: float) -> list[tuple[int, float, list[int]]]:
    """Walk from the root to a leaf.

    Returns:
        For each level below the root: the node chosen, the point as it comes into that level, and
        the running sums with which it is compared.
    """
    steps, node = [], 0
    for level in reversed(tree[:-1]):
        running = list(accumulate(level[FANOUT * node : FANOUT * (node + 1)]))
        child = next(i for i, end in enumerate(running) if end > point)
        node = FANOUT * node + child
        steps.append((node, point, running))
        point -= running[child - 1] if child else 0
    return steps


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))


def draw(axes: Any) -> None:
    """Draw the tree, and the walk of one draw down to its leaf."""
    tree = levels()
    steps = walk(tree, POINT)
    chosen = [steps[1][0], steps[0][0], 0]
    last = len(MASSES) - 1
    height = (0.0, 1.55, 3.1)
    places = [[(i + 0.5) * FANOUT**k - 0.5 for i in range(len(tree[k]))] for k in range(3)]
    for k in (1, 2):
        for i, x in enumerate(places[k]):
            for child in range(FANOUT * i, FANOUT * (i + 1)):
                taken = chosen[k] == i and chosen[k - 1] == child
                look = {"color": ORANGE, "lw": 3} if taken else {"color": "#a0aec0", "lw": 1}
                axes.plot([x, places[k - 1][child]], [height[k], height[k - 1]], zorder=1, **look)
    for k, level in enumerate(tree):
        for i, (x, value) in enumerate(zip(places[k], level, strict=True)):
            taken = chosen[k] == i
            edge = ORANGE if taken else "#718096"
            box = {"boxstyle": "round,pad=0.35", "fc": TAKEN if taken else PLAIN, "ec": edge}
            axes.text(x, height[k], f"{value}", ha="center", va="center", size=13, bbox=box)
    for i in range(len(MASSES)):
        axes.text(i, -0.5, f"{i}", ha="center", va="center", size=9, color=GREY)
    for k, words in enumerate(("masses\n(leaves)", "sums of\n4 masses", "total")):
        axes.text(-1.1, height[k], words, ha="right", va="center", size=10, color=GREY)
    axes.text(-1.1, -0.5, "slot", ha="right", va="center", size=9, color=GREY)
    (node, _, above), (leaf, point, below) = steps
    at = leaf % FANOUT
    notes = (
        f"1. Draw a random point in [0, {tree[-1][0]}). Here it is {POINT}.",
        f"2. Running sums of the root's children: {_listed(above)}. The first above {POINT} is"
        f" {above[node]}: go to that child, with {POINT} - {above[node - 1]} = {point:.1f} left.",
        f"3. Running sums of its children: {_listed(below)}. The first above {point:.1f} is"
        f" {below[at]}: slot {leaf} is drawn. Its probability is {MASSES[leaf]} / {tree[-1][0]}.",
        "A slot of mass 0 does not raise the running sum, so it is never the first above a point.",
    )
    for i, words in enumerate(notes):
        axes.text(-2.8, -1.15 - 0.36 * i, words, va="center", size=10.5)
    axes.set(xlim=(-2.9, last + 0.8), ylim=(-2.5, 3.5))
    axes.axis("off")


def main() -> None:
    """Write the picture."""
    with picture(DOCS / "pictures" / "sum_tree.png", figsize=(9.5, 5.0)) as axes:
        draw(axes)


if __name__ == "__main__":
    main()

"""Pages of the documentation, their blocks of code, links and anchors."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

_FENCED = re.compile(r"^(```+|~~~+).*?^\1\s*$", re.MULTILINE | re.DOTALL)
_PYTHON = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\((?!\w+:)([^()\s]+)\)")
_HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
_DIRECTIVE = re.compile(r"^::: (\S+)$", re.MULTILINE)


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks() -> list[tuple[str, str]]:
    """Python blocks of all pages: the page and the line where a block begins, and its code."""
    found = []
    for page in PAGES:
        text = page.read_text()
        for block in _PYTHON.finditer(text):
            line = text.count("\n", 0, block.start(1)) + 1
            found.append((f"{name_of(page)}:{line}", block[1]))
    return found


def starts_ray(code: str) -> bool:
    return bool(
        re.search(r"^\s*(import ray|from ray|from per_td\.ray|import per_td\.ray)\b", code, re.M)
    )


def prose(page: Path) -> str:
    """The text of a page, without its blocks of code."""
    return _FENCED.sub("", page.read_text())


def links(page: Path) -> list[str]:
    """Links to other files, or to places in this one."""
    return _LINK.findall(prose(page))


def directives(page: Path) -> list[str]:
    """What a page shows the docstrings of."""
    return _DIRECTIVE.findall(page.read_text())


def anchors(page: Path) -> set[str]:
    """Anchors of the headings, as GitHub and the site make them."""
    text = prose(page)
    found: dict[str, int] = {}
    for heading in _HEADING.findall(text):
        shown = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        anchor = re.sub(r"[^\w\- ]", "", shown).replace(" ", "-")
        found[anchor] = found.get(anchor, -1) + 1
    repeated = {f"{name}-{k}" for name, last in found.items() for k in range(1, last + 1)}
    return set(found) | repeated | set(re.findall(r'<a id="([^"]+)"', text))

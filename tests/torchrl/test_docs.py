import inspect
import re
from pathlib import Path

import pytest
from torchrl.data import replay_buffers as torchrl_buffers

import per_td.torchrl

FOLDER = Path(__file__).parents[2] / "docs"
PAGES = ("from_torchrl.md", "slices.md", "torchrl_losses.md")
PAGE = (FOLDER / "from_torchrl.md").read_text()
CLASSES = [name for name in per_td.torchrl.__all__ if hasattr(torchrl_buffers, name)]


BLOCKS = [
    (page, block)
    for page in PAGES
    for block in re.findall(r"```python\n(.*?)```", (FOLDER / page).read_text(), re.DOTALL)
]


@pytest.mark.parametrize(("page", "block"), BLOCKS, ids=[page for page, _ in BLOCKS])
def test_the_code_runs_alone_as_printed(page, block):
    exec(compile(block, page, "exec"), {})


@pytest.mark.parametrize("name", CLASSES)
def test_the_page_names_every_argument_that_torchrl_does_not_have(name):
    ours = inspect.signature(getattr(per_td.torchrl, name).__init__).parameters
    theirs = inspect.signature(getattr(torchrl_buffers, name).__init__).parameters
    for argument in set(ours) - set(theirs):
        assert re.search(rf"`{argument}\b", PAGE), argument


def test_the_page_names_every_drop_in():
    for name in per_td.torchrl.__all__:
        assert name in PAGE


def anchors(page):
    """The anchors of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    found = re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", (FOLDER / page).read_text())
    assert found
    for target, anchor in found:
        linked = FOLDER / (target or page)
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), anchor

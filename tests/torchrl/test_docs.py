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


@pytest.mark.parametrize("name", CLASSES)
def test_the_page_names_every_argument_that_torchrl_does_not_have(name):
    ours = inspect.signature(getattr(per_td.torchrl, name).__init__).parameters
    theirs = inspect.signature(getattr(torchrl_buffers, name).__init__).parameters
    for argument in set(ours) - set(theirs):
        assert re.search(rf"`{argument}\b", PAGE), argument


def test_the_page_names_every_drop_in():
    for name in per_td.torchrl.__all__:
        assert name in PAGE

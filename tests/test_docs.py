"""The pages of docs/ and the README: their code runs, their links lead somewhere."""

import importlib
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support import pages

BLOCKS = [pytest.param(*block, id=block[0]) for block in pages.blocks()]
OTHERS = ["CHANGELOG.md", "benchmarks/README.md", "tests/README.md"]
LINKED = [*pages.PAGES, *(pages.ROOT / name for name in OTHERS)]
MODULES = ["per_td", "per_td.functional", "per_td.torchrl", "per_td.ray"]


@pytest.mark.parametrize(("where", "code"), BLOCKS)
def test_each_block_of_code_runs_alone_as_printed(where, code, tmp_path, monkeypatch):
    if pages.starts_ray(code):
        pytest.skip("tests/ray/test_examples.py runs it, with a cluster")
    monkeypatch.chdir(tmp_path)  # a checkout, as far as pages use one, but nothing is written there
    (tmp_path / "examples").symlink_to(pages.ROOT / "examples")
    if "__main__" in code:  # it starts processes, which import the file that they are from
        script = tmp_path / "block.py"
        script.write_text(f"import torch\n\ntorch.manual_seed(0)\n{code}")
        quiet = ["-W", "error", "-W", "ignore::DeprecationWarning"]
        environment = os.environ | {"PYTHONPATH": str(pages.ROOT)}
        subprocess.run([sys.executable, *quiet, str(script)], check=True, env=environment)
        return
    torch.manual_seed(0)
    exec(compile(code, where, "exec"), {"__name__": "docs"})


def test_there_are_blocks_to_run():
    found = {where.split(":")[0] for where, _ in pages.blocks()}
    assert {"README.md", "docs/from_torchrl.md", "docs/recipes/lap.md"} <= found


@pytest.mark.parametrize("page", LINKED, ids=pages.name_of)
def test_links_lead_to_files_and_places_that_exist(page):
    wrong = []
    for link in pages.links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        exists = target.exists() and target.is_relative_to(pages.ROOT)
        if not exists or (anchor and not _has(target, anchor)):
            wrong.append(link)
    assert not wrong


def _has(page: Path, anchor: str) -> bool:
    shown = pages.directives(page)
    return anchor in pages.anchors(page) or any(f"{anchor}.".startswith(f"{s}.") for s in shown)


def test_anchors_are_those_of_github(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# `a_b`: c, d\n## x & y\n## x & y\n```\n# none\n```\n### [z](z.md) - 1\n")
    assert pages.anchors(page) == {"a_b-c-d", "x--y", "x--y-1", "z---1"}


@pytest.mark.parametrize("module", MODULES)
def test_everything_exported_is_in_the_reference(module):
    if module == "per_td.ray":
        pytest.importorskip("ray")
    folder = pages.ROOT / "docs" / "api"
    shown = {name for page in folder.glob("*.md") for name in pages.directives(page)}
    exported = importlib.import_module(module)
    for name in exported.__all__:
        value = getattr(exported, name)
        place = value.__name__ if inspect.ismodule(value) else value.__module__
        assert {f"{module}.{name}", place} & shown, name


def _described(doc: str) -> set[str]:
    """The arguments that the section Args of a docstring describes."""
    section = re.search(r"^Args:\n((?:    .*\n|\n)*)", f"{inspect.cleandoc(doc)}\n", re.MULTILINE)
    entries = re.findall(r"^    (\w+(?:,\s+\w+)*):", section[1] if section else "", re.MULTILINE)
    return {name for entry in entries for name in re.split(r",\s+", entry)}


@pytest.mark.parametrize("module", MODULES)
def test_every_argument_of_a_constructor_and_of_a_function_is_described(module):
    if module == "per_td.ray":
        pytest.importorskip("ray")
    exported = importlib.import_module(module)
    values = [getattr(exported, name) for name in exported.__all__]
    looked_at = [
        value
        for value in values
        if inspect.isfunction(value)
        or (inspect.isclass(value) and not issubclass(value, Exception))
    ]
    for value in looked_at:
        if value.__name__ == "Receipt":  # its fields say it themselves, nobody calls it
            continue
        call = value.__init__ if inspect.isclass(value) else value
        arguments = set(inspect.signature(call).parameters) - {"self"}
        assert arguments <= _described(value.__doc__), value
    assert looked_at

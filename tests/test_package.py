import inspect
import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import per_td

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.fixture(scope="module")
def imported() -> tuple[set[str], set[str]]:
    """Modules that a new process has after `import tensordict`, and what per_td adds to them."""
    code = (
        "import tensordict, sys; before = set(sys.modules); import per_td;"
        "print(*(m for m in before if '.' not in m));"
        "print(*{m.split('.')[0] for m in set(sys.modules) - before})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, added = done.stdout.splitlines()
    return set(before.split()), set(added.split())


def test_importing_per_td_does_not_import_what_only_others_need(imported):
    before, added = imported
    assert "tensordict" in before
    assert not {"torchrl", "gymnasium", "matplotlib", "numba", "scipy"} & (before | added)


def test_importing_per_td_adds_only_its_own_modules_to_those_of_tensordict(imported):
    assert imported[1] - set(sys.stdlib_module_names) == {"per_td"}


def test_without_torchrl_the_error_says_what_to_install():
    code = (
        "import sys; sys.modules['torchrl'] = None\n"
        "import per_td\n"
        "try:\n    import per_td.torchrl\n"
        "except ImportError as error:\n"
        "    print(error.name, type(error.__cause__).__name__)\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    name, message = done.stdout.splitlines()
    assert name == "torchrl ModuleNotFoundError"
    assert message.startswith("per_td.torchrl needs TorchRL, which cannot be imported (")
    assert message.endswith('; to install it: pip install "per-td[torchrl]"')


def test_torchrl_is_an_extra_that_examples_and_tests_have():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    names = {re.match(r"[\w-]+", line)[0] for line in project["dependencies"]}
    assert names == {"torch", "tensordict", "numpy", "numba"}
    assert "torchrl>=0.14" in extras["torchrl"]
    assert "per-td[torchrl]" in extras["examples"]
    assert any(line.startswith("per-td[examples") for line in extras["test"])


def test_parts_import_each_other_in_no_circle_and_the_picture_of_the_house_has_all_of_them():
    house = runpy.run_path(str(ROOT / "docs" / "house.py"))
    imports = house["parts"]()
    assert {"tree", "errors"} <= imports["priorities"]
    house["layers"](imports)  # raises where there is a circle
    assert imports.keys() == house["TEXTS"].keys() - {"basics"} | set(house["BASICS"])
    assert all(not imports[part] - set(house["BASICS"]) for part in house["BASICS"])


def test_signatures_name_the_arguments():
    buffer = list(inspect.signature(per_td.PrioritizedReplayBuffer).parameters)
    assert buffer[:5] == ["capacity", "batch_size", "alpha", "beta", "eps"]
    assert {"num_buffers", "prioritization", "shared"} <= set(buffer)
    assert list(inspect.signature(per_td.SumTree).parameters) == ["capacity", "device", "num_trees"]


def test_everything_exported_exists():
    assert sorted(per_td.__all__) == per_td.__all__
    for name in per_td.__all__:
        assert getattr(per_td, name).__doc__


def test_the_quickstart_fits_in_a_glance():
    block = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[0]
    body = block.split("\n\n")[1]
    assert len(body.strip().splitlines()) <= 12


def test_the_readme_has_the_two_commands():
    commands = re.findall(r"```\n(pip install .*)\n```", README)
    assert commands == [
        'pip install -c constraints.txt -e ".[examples]" && python examples/dqn_cartpole.py',
        'pip install -c constraints.txt -e ".[test]" && pytest',
    ]


def test_the_versions_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["name"] == "per-td"
    assert f"\n## {per_td.__version__}\n" in (ROOT / "CHANGELOG.md").read_text()
    assert f"\nversion: {per_td.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_versions_for_comparisons_with_torchrl_differ_in_torch_alone():
    def pinned(name):
        lines = re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / name).read_text(), re.MULTILINE)
        return {name.lower().replace("_", "-"): version for name, version in lines}

    usual, other = pinned("constraints.txt"), pinned("constraints-torchrl.txt")
    differ = {name for name in usual.keys() & other.keys() if usual[name] != other[name]}
    assert differ == {"torch"}

"""numba's cache: it is read where nothing changed, and outdated by an edit of any kernel."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import per_td
from tests.support.parameters import slow_but

pytest.importorskip("numba", reason="numba is not installed")

HASHED = (
    "__init__.py",
    "../parts.py",
    "compiling.py",
    "door.py",
    "draw.py",
    "frame_search.py",
    "memory.py",
    "rows.py",
    "update.py",
    "vector.py",
)

COPY_A_ROW = """
import numpy as np
from per_td.kernels.cpu.memory import ROWS
from per_td.kernels.cpu import rows
row, ring = np.array([2**40 + 7]), np.zeros(1, np.int64)
fields, source = np.array([[ring.ctypes.data, 8, 8]]), np.array([row.ctypes.data])
record, runs = np.array([(fields.ctypes.data, 1, 1, 1)], ROWS), np.array([0, 1])
assert rows.write(record.ctypes.data, source.ctypes.data, 1, runs.ctypes.data, 0, 0, 0, 0)
print(ring.item() - 2**40, sum(rows.write.stats.cache_hits.values()))
"""


@pytest.fixture
def package(tmp_path) -> Path:
    """A copy of the package, never compiled."""
    ignore = shutil.ignore_patterns("__pycache__")
    return shutil.copytree(Path(per_td.__file__).parent, tmp_path / "per_td", ignore=ignore)


def run(package: Path, code: str, **variables: str) -> str:
    variables |= {"PYTHONPATH": str(package.parent), "PYTHONDONTWRITEBYTECODE": "1"}
    left = ("NUMBA_CACHE_DIR", "PER_TD_KERNELS")
    inherited = {name: value for name, value in os.environ.items() if name not in left}
    done = subprocess.run(
        (sys.executable, "-c", code),
        env=inherited | variables,
        cwd=package.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def kept(folder: Path) -> list[Path]:
    return [*folder.rglob("*.nbi"), *folder.rglob("*.nbc")]


@pytest.mark.slow
def test_an_edit_of_a_module_that_a_kernel_imports_is_seen(package):
    assert run(package, COPY_A_ROW) == "7 0"
    assert run(package, COPY_A_ROW) == "7 1", "the second process compiled again"
    before = kept(package)
    imported = package / "kernels" / "cpu" / "memory.py"
    source = imported.read_text()
    assert source.count("map(_mover, (32, 8, 4, 1, None))") == 1
    imported.write_text(source.replace("(32, 8, 4, 1, None)", "(32, 4, 4, 1, None)"))
    assert run(package, COPY_A_ROW) == f"{7 - 2**40} 0", "half of the row was to be copied"
    after = kept(package)
    assert len(after) == len(before)
    assert not set(after) & set(before), "what was compiled from the old sources is still there"


@pytest.mark.slow
def test_checked_kernels_are_kept_beside_the_usual_ones(package):
    for hits in "01":
        assert run(package, COPY_A_ROW) == f"7 {hits}"
        assert run(package, COPY_A_ROW, PER_TD_KERNELS="checked") == f"7 {hits}"


@pytest.mark.slow
def test_numba_cache_dir_names_the_folder_that_is_used(package, tmp_path):
    folder = tmp_path / "cache"
    assert run(package, COPY_A_ROW, NUMBA_CACHE_DIR=str(folder)) == "7 0"
    assert run(package, COPY_A_ROW, NUMBA_CACHE_DIR=str(folder)) == "7 1"
    assert kept(folder)
    assert not kept(package)


@pytest.mark.slow
def test_where_the_package_cannot_be_written_the_users_folder_is_used(package, tmp_path):
    (package / "kernels" / "cpu" / "__pycache__").touch()  # where numba wants a folder
    folder = tmp_path / "cache"
    assert run(package, COPY_A_ROW, XDG_CACHE_HOME=str(folder)) == "7 0"
    assert run(package, COPY_A_ROW, XDG_CACHE_HOME=str(folder)) == "7 1"
    assert kept(folder)


def test_every_kernel_source_for_the_cpu_counts(package):
    names = {file.name for file in (package / "kernels" / "cpu").glob("*.py")}
    assert names | {"../parts.py"} == set(HASHED)
    code = f"""
from pathlib import Path
from per_td.kernels.cpu import compiling
hashes = [compiling._sources()]
for name in {HASHED}:
    with open(Path(compiling.__file__).parent / name, "a") as file:
        file.write("#")
    hashes.append(compiling._sources.__wrapped__())
print(len(set(hashes)))
"""
    assert run(package, code) == str(len(HASHED) + 1)


FIRST_USE = """
import logging, torch
from tensordict import TensorDict
import sys
form = "%(name)s %(levelname)s %(message)s"
logging.basicConfig(format=form, force=True, stream=sys.stdout)
from per_td.kernels.cpu import compiling, door, draw, rows, update
compiling._PATIENCE = PATIENCE
from per_td import PrioritizedReplayBuffer
buffer = PrioritizedReplayBuffer(10, 4)
buffer.extend(TensorDict({"x": torch.rand(6)}, [6]))
buffer.sample()
kinds = [type(kernel).__name__ for kernel in (rows.write, draw.draw_rows, update.assign, draw.find)]
print(kinds)
"""
LOGGED = "per_td WARNING compiling kernels, once per machine"


@pytest.mark.parametrize("patience", slow_but(["0.0"], ["0.0", "1e9"]))
def test_a_kernel_is_compiled_when_it_is_first_called_and_a_long_wait_is_logged(patience, tmp_path):
    package = Path(per_td.__file__).parent
    code = FIRST_USE.replace("PATIENCE = PATIENCE", f"PATIENCE = {patience}")
    for first in (True, False):
        out = run(package, code, NUMBA_CACHE_DIR=str(tmp_path)).splitlines()
        compiled = "CPUDispatcher"
        assert out[-1] == str([compiled, compiled, "Kernel", "Kernel"])
        if patience == "1e9":
            assert LOGGED not in out
        else:  # kernels that are only loaded are not compiled, however long that takes
            assert out.count(LOGGED) == first


def test_a_buffer_with_a_lock_compiles_before_it_is_taken():
    code = FIRST_USE.replace("PATIENCE = PATIENCE", "PATIENCE = 1e9").replace(
        "(10, 4)", "(10, 4, threads=True)"
    )
    code = code[: code.index("buffer.extend")] + code[code.index("kinds =") :]
    out = run(Path(per_td.__file__).parent, code).splitlines()
    assert out == [str(["CPUDispatcher"] * 3 + ["Kernel"])]  # and nothing is logged

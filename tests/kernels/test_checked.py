"""Kernels compiled with bounds checks, in processes of their own; and who reads memory at all."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import per_td
from per_td import kernels

PACKAGE = Path(per_td.__file__).parent
TESTS = Path(__file__).parent

ADDRESSES = {
    "checkpoint/file.py",  # is it the same?
    "concurrency/mutex.py",  # a lock of the system's lies there
    "kernels/cpu/door.py",
    "memory.py",  # is there any, and does it begin at a cache line?
}


def test_addresses_of_tensors_are_taken_in_one_door_alone():
    found = set()
    for file in PACKAGE.rglob("*.py"):
        names = {
            node.attr for node in ast.walk(ast.parse(file.read_text())) if hasattr(node, "attr")
        }
        if "data_ptr" in names:
            found.add(file.relative_to(PACKAGE).as_posix())
    assert found == ADDRESSES


def checked(*command: str) -> str:
    """The output of Python with kernels that check their bounds."""
    pytest.importorskip("numba", reason="numba is not installed")
    done = subprocess.run(
        (sys.executable, *command),
        env=os.environ | {kernels.VARIABLE: "checked", "PYTHONPATH": str(PACKAGE.parent)},
        cwd=TESTS.parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    return done.stdout


@pytest.mark.slow
def test_kernels_with_bounds_checks_pass_their_tests():
    told = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0")
    assert " passed" in checked(*told, str(TESTS / "test_cpu_kernels.py"))


OUT_OF_BOUNDS = """
import torch
from per_td import PrioritizedReplayBuffer, SumTree
from per_td.kernels.cpu import compiling, door
assert compiling.CHECKED
index, ones = torch.arange(300), torch.ones(300)

def refused(field, value, operation):
    tree = SumTree(300)
    tree.fill(ones)
    tree.update([3], [2.0])
    tree.sample(5)
    record = tree._trees.block.record[2]  # as a layout that is wrong would make it
    assert record[field] != value
    record[field] = value
    try:
        operation(tree)
    except IndexError as error:
        print(field, error)

refused("leaf_slots", 200, lambda tree: tree.update(index, ones))
refused("leaf_slots", 200, lambda tree: tree.update([290], [1.0]))
refused("leaf_slots", 200, lambda tree: tree.fill(ones))
refused("leaf_slots", 200, lambda tree: tree.find([299.5]))
refused("leaf_slots", 200, lambda tree: tree.sample(500))
refused("leaf_slots", 200, lambda tree: tree.sample(99, draw="without_replacement"))
refused("node_slots", 9, lambda tree: tree.update([290], [1.0]))
refused("node_slots", 9, lambda tree: tree.fill(ones))
refused("capacity", 2000, lambda tree: tree._trees.ops.set_masses(tree._trees, index + 900, ones))
refused("height", 9, lambda tree: tree.sample(5))
"""


@pytest.mark.slow
def test_kernels_with_bounds_checks_find_a_record_that_is_wrong():
    lines = checked("-c", OUT_OF_BOUNDS).splitlines()
    assert [line.partition(" ")[0] for line in lines] == [
        *["leaf_slots"] * 6,
        *["node_slots"] * 2,
        "capacity",
        "height",
    ]
    assert all("out of bounds" in line for line in lines), lines

"""Triton compiles every kernel, as it is launched, for a GPU that need not be there.

What the interpreter lets pass (types, shapes that are no powers of two, ...) fails here.
"""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="triton is not installed")

CODE = """
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction


class NoDevice:
    get_current_target = lambda self: GPUTarget("cuda", 90, 32)
    get_current_device = lambda self: 0
    get_current_stream = lambda self, device: 0


driver.set_active(NoDevice())
run, compiled = JITFunction.run, []


def compile_only(self, *args, **kwargs):
    kernel = run(self, *args, **{**kwargs, "warmup": True})
    kernel = kernel.result() if hasattr(kernel, "result") else kernel
    assert kernel.asm["cubin"]
    compiled.append(self.__name__)


JITFunction.run = compile_only

from per_td.kernels import cuda as kernels
from per_td.tree import Layout

number = lambda value: torch.tensor(value, dtype=torch.float64)
count = lambda: torch.zeros((), dtype=torch.int64)
index, value, point = torch.arange(3), torch.rand(3), torch.rand(3).double()
for capacity in (1, 20, 300, 100_000):
    layout = Layout.of(capacity)
    raw, mass = torch.zeros(layout.leaf_slots), torch.zeros(layout.leaf_slots)
    sums, largest, smallest = (
        layout.new_nodes(0.0, dtype, raw.device)
        for dtype in (torch.float64, torch.float32, torch.float32)
    )
    offsets = torch.tensor(layout.offsets)
    pairs = (mass, sums), (raw, largest), (mass, smallest)
    kernels.put(kernels.Trees(layout, pairs[0]), index, value)
    given = {"alpha": number(0.6), "ever_max": torch.zeros(())}
    late = {"generation": index, "written": count(), "eps": number(1), "size": count()}
    for trees in (kernels.Trees(layout, *pairs[:2]), kernels.Trees(layout, *pairs)):
        kernels.assign(trees, raw, index, value, **given, refused=count())
        kernels.assign(trees, raw, index, value, **given, refused=count(), **late)
        kernels.assign(trees, raw, index, value, **given, live=value > 0)
    kernels.find(mass, sums, offsets, point)
    for stratified in (False, True):
        kernels.draw(mass, sums, offsets, point, stratified=stratified)
kernels.weigh(value, number(0.4), value.amin())
kernels.weigh(value, number(0.4), sums[-1], count())
print(*sorted(set(compiled)))
"""


@pytest.mark.slow
def test_every_kernel_compiles_for_a_gpu():
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["_claim", "_level", "_settle", "_top", "_walk", "_weigh"]

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

import per_td.kernels
from per_td.kernels.cuda import launches
from per_td.kernels.parts import Layout
from per_td.priorities.distributions import Proportional
from per_td.tree.trees import Trees

per_td.kernels.operations = lambda device, **settings: launches
index, value = torch.arange(6).view(2, 3), torch.rand(2, 3)
beta, flags = torch.tensor(0.4, dtype=torch.float64), value > 0
for capacity in (1, 20, 300, 100_000):
    for groups, minima in ((1, False), (1, True), (2, True)):
        trees = Trees(Layout.of(capacity, groups), torch.device("cpu"), extremes=True)
        trees.keep_minima(minima)
        trees.set_exponent(torch.rand(groups, dtype=torch.float64))
        at, new, some = index[:groups], value[:groups], flags[:groups]
        launches.set_masses(trees, at, new)
        written = torch.full((groups,), 3)
        for ever in (3, written):
            given = {"written": ever, "limit": capacity}
            change = lambda **more: launches.assign(trees, Proportional(), at, new, **given, **more)
            change(new=True)
            change(new=True, mask=some)
            change(add_eps=True)
            change(add_eps=True, generation=at)
            change(add_eps=True, generation=at, mask=some)
        launches.find(trees, new.double())
        for normalization in ("batch", "buffer", "none"):
            for stratified in (False, True):
                launches.draw(
                    trees,
                    new.double(),
                    stratified=stratified,
                    beta=beta if groups == 1 else beta.expand(groups),
                    normalization=normalization,
                    written=written,
                )
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

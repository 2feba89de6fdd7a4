"""Fixtures: every device there is, and a generator on it."""

import os
from importlib.util import find_spec

import pytest
import torch

if not torch.cuda.is_available():  # before per_td brings triton, which reads it when imported
    os.environ.setdefault("TRITON_INTERPRET", "1")
INTERPRETER = find_spec("triton") is not None and not torch.cuda.is_available()
WHY_NOT = "triton is not installed, or runs natively instead"


@pytest.fixture(
    params=[
        "cpu",
        pytest.param("interpreted", marks=pytest.mark.skipif(not INTERPRETER, reason=WHY_NOT)),
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.cuda,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
            ],
        ),
    ]
)
def device(request, monkeypatch) -> torch.device:
    """The CPU, the CPU as if it were CUDA, by Triton's interpreter, and CUDA."""
    if request.param != "interpreted":
        return torch.device(request.param)
    from per_td import draws, kernels, validation
    from per_td.kernels import cuda_draw, cuda_nodes, cuda_update

    monkeypatch.setattr(kernels, "wanted_triton", lambda device: True)
    for module, name in ((cuda_draw, "POINTS"), (cuda_nodes, "NODES"), (cuda_update, "FLAT")):
        monkeypatch.setattr(module, name, 4096)  # the interpreter takes as long for any number
    for module in (validation, draws):
        monkeypatch.setattr(module, "can_raise", lambda tensor: False)
    return torch.device("cpu")


@pytest.fixture
def generator(device) -> torch.Generator:
    return torch.Generator(device).manual_seed(7)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)

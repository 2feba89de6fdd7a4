"""Fixtures: every device there is, and a generator on it."""

import pytest
import torch


@pytest.fixture(
    params=[
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.cuda,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
            ],
        ),
    ]
)
def device(request) -> torch.device:
    return torch.device(request.param)


@pytest.fixture
def generator(device) -> torch.Generator:
    return torch.Generator(device).manual_seed(7)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)

"""Fixtures: every device there is, and a generator on it."""

import os
from importlib.util import find_spec

import pytest
import torch

from tests.support.choices import CHOICES

collect_ignore = [] if find_spec("torchrl") else ["torchrl"]

if not torch.cuda.is_available():  # before per_td brings triton, which reads it when imported
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser) -> None:
    parser.addoption(
        "--interpreted",
        action="store_true",
        help="run all tests of CUDA on the CPU too, by Triton's interpreter; else most are slow",
    )
    parser.addoption(
        "--stress", type=float, default=60.0, help="seconds that the stress test takes in all"
    )


def pytest_configure(config) -> None:
    if find_spec("numba") is None:  # else the warning says that something is broken
        config.addinivalue_line("filterwarnings", "ignore:the CPU kernels are off:Warning")


@pytest.hookimpl(tryfirst=True)  # before pytest looks at the markers
def pytest_collection_modifyitems(config, items) -> None:
    """Mark as slow what Triton's interpreter runs, but for the kernels' own tests.

    It runs the same operations for each value of PER_TD_KERNELS: one of them is enough. With
    pytest-xdist, the tests of a Ray cluster go to one worker, which makes it.
    """
    seen, twice = set(), set()
    for item in items:
        callspec = getattr(item, "callspec", None)
        interpreted = callspec and callspec.params.get("device") == "interpreted"
        if interpreted and not config.getoption("--interpreted"):
            item.add_marker("slow")
        if interpreted:
            others = [f"{k}={v!r}" for k, v in callspec.params.items() if k != "choice"]
            case = (item.parent, item.originalname, *sorted(others))
            if case in seen:
                twice.add(item)
            seen.add(case)
        if item.path.parent.name == "ray" and config.pluginmanager.hasplugin("xdist"):
            item.add_marker(pytest.mark.xdist_group("ray"))
    items[:] = [item for item in items if item not in twice]
    config.hook.pytest_deselected(items=[*twice])


@pytest.fixture(
    params=[
        "cpu",
        "interpreted",
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
    pytest.importorskip("triton", reason="triton is not installed")
    from per_td import kernels, validation
    from per_td.kernels import reference
    from per_td.kernels.cuda import draw, launches, update
    from per_td.storage.ring import RingStorage

    def operations(device, *, launches=True, triton=launches):
        return triton if launches else reference

    monkeypatch.setattr(kernels, "operations", operations)
    monkeypatch.setattr(validation, "can_raise", lambda tensor: False)
    monkeypatch.setattr(RingStorage, "_known", property(lambda ring: ring.groups == 1))
    for module, name in ((draw, "POINTS"), (update, "NODES"), (update, "FLAT")):
        monkeypatch.setattr(module, name, 4096)  # the interpreter takes as long for any number
    return torch.device("cpu")


@pytest.fixture
def generator(device) -> torch.Generator:
    return torch.Generator(device).manual_seed(7)


@pytest.fixture
def pretended(monkeypatch):
    """A pretended CUDA device, in plain torch; see `tests.support.pretended_cuda`."""
    from per_td import kernels
    from tests.support.pretended_cuda import pretended_cuda

    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device: the tests marked cuda look there")
    monkeypatch.setenv(kernels.VARIABLE, "off")
    with pretended_cuda() as pretended:
        yield pretended


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=CHOICES)
def choice(request, monkeypatch) -> str:
    """With kernels and without."""
    monkeypatch.setenv("PER_TD_KERNELS", request.param)
    return request.param

"""Files that the version before has saved load, and what is loaded does what that did next."""

import json

import pytest
import torch

from per_td import PrioritizedReplayBuffer, TransitionReplayBuffer, kernels
from tests.support.saved_before import CASES, FILES, PLAYED, play, play_course


@pytest.fixture(params=kernels.CHOICES)
def choice(request, monkeypatch) -> str:
    """With kernels and without."""
    monkeypatch.setenv(kernels.VARIABLE, request.param)
    return request.param


def alike(found, expected, where="") -> None:
    """Equal; of floats, which a kernel may round otherwise than torch, to the last bits."""
    if isinstance(expected, dict):
        assert set(found) == set(expected), where
        for key, value in expected.items():
            alike(found[key], value, f"{where}, {key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for i, (one, other) in enumerate(zip(found, expected, strict=True)):
            alike(one, other, f"{where}, {i}")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-6, abs=0), where
    else:
        assert found == expected, where


@pytest.mark.parametrize("name", [name for name in CASES if name != "course"])
def test_a_file_of_the_version_before_loads_and_draws_on_as_it_did(name, choice):
    kind = {name: True} if name in ("threads", "shared") else {}
    buffer = PrioritizedReplayBuffer.load(FILES / f"{name}.per_td", **kind)
    buffer.check_valid()
    alike(play(buffer), json.loads(PLAYED.read_text())[name])
    buffer.check_valid()


@pytest.mark.parametrize("layout", ["columns", "records"])
@pytest.mark.parametrize("name", ["columns", "records", "many"])
def test_a_state_of_the_version_before_goes_into_a_buffer_of_any_layout(name, layout, choice):
    buffer = PrioritizedReplayBuffer(
        10,
        6,
        layout=layout,
        num_buffers=CASES[name].get("num_buffers"),
        draw=CASES[name].get("draw", "independent"),
        method="tree",
        generator=torch.Generator(),
    )
    buffer.restore(FILES / f"{name}.per_td")
    alike(play(buffer), json.loads(PLAYED.read_text())[name])


def test_a_course_buffer_of_the_version_before_loads_and_draws_on_as_it_did(choice):
    buffer = TransitionReplayBuffer.load(FILES / "course.per_td")
    alike(play_course(buffer), json.loads(PLAYED.read_text())["course"])


def test_there_is_a_file_for_each_case_and_each_is_small():
    files = {path.name: path.stat().st_size for path in FILES.iterdir()}
    assert set(files) == {PLAYED.name, *(f"{name}.per_td" for name in CASES)}
    assert max(size for name, size in files.items() if name != PLAYED.name) < 16_384

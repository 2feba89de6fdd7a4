"""On a GPU: no operation waits for the device, and all of them can be captured in a CUDA graph."""

import pytest
import torch

from per_td import PrioritizedReplayBuffer
from tests.support.oracle import data

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(params=["auto", "off"])
def _kernels(request, monkeypatch) -> None:
    monkeypatch.setenv("PER_TD_KERNELS", request.param)


@pytest.fixture
def buffer(_kernels, request) -> PrioritizedReplayBuffer:
    buffer = PrioritizedReplayBuffer(1000, 64, device="cuda", **getattr(request, "param", {}))
    buffer.extend(data(0, 600, "cuda"), torch.linspace(0, 2, 600, device="cuda"))
    return buffer


def step(buffer) -> torch.Tensor:
    batch = buffer.sample()
    buffer.update_priority(batch["index"], batch["action"] / 100, batch["generation"])
    return batch["index"]


SETTINGS = [
    {"draw": draw, "weight_normalization": normalization}
    for draw in ("independent", "stratified", "without_replacement")
    for normalization in ("batch", "buffer", "none")
]


@pytest.mark.parametrize("buffer", SETTINGS, indirect=True, ids=str)
def test_no_operation_waits_for_the_device(buffer):
    step(buffer)  # kernels are compiled and loaded
    new = data(600, 100, "cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(buffer)
        buffer.extend(new)
        buffer.beta = 0.7
        buffer.increase_beta()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def captured(buffer):
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(buffer)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        index = step(buffer)
    return graph, index


@pytest.mark.parametrize("buffer", SETTINGS, indirect=True, ids=str)
def test_replays_draw_anew_and_leave_what_plain_calls_leave(buffer):
    graph, index = captured(buffer)
    drawn = []
    for _ in range(20):
        graph.replay()
        drawn.append(index.clone())
    assert not torch.equal(drawn[0], drawn[1])
    drawn = torch.cat(drawn).unique()
    expected = drawn / 100 + buffer.eps
    torch.testing.assert_close(buffer.priority[drawn], expected, rtol=1e-6, atol=0)
    mass = buffer.priority.double() ** buffer.alpha * (buffer.priority > 0)
    torch.testing.assert_close(buffer.total_mass, mass.sum(), rtol=1e-6, atol=0)
    assert buffer.stats()["stale_updates"] == buffer.stats()["refused_priorities"] == 0


@pytest.mark.parametrize("buffer", [{}, {"eps": 0.5}], indirect=True, ids=str)
def test_replays_see_what_has_been_written_since_the_capture(buffer):
    graph, index = captured(buffer)
    buffer.extend(data(600, 400, "cuda"), torch.full((400,), 1e6, device="cuda"))
    graph.replay()
    assert (index >= 600).any()
    assert buffer.stats()["refused_priorities"] == 0
    expected = index / 100 + buffer.eps
    torch.testing.assert_close(buffer.priority[index], expected.float(), rtol=1e-6, atol=0)

import math

import pytest
import torch

from per_td import (
    ConfigurationError,
    PrioritizedReplayBuffer,
    SumTree,
    TransitionReplayBuffer,
    validation,
)


class Raises:
    """Has no value, and says so in a way of its own."""

    def __float__(self) -> float:
        raise AssertionError


@pytest.mark.parametrize("name", ["alpha", "beta", "eps"])
@pytest.mark.parametrize(
    "value",
    [math.inf, -math.inf, math.nan, -0.1, "0.5", b"1", 10**400, 1j, [0.5, 0.5], Raises()],
)
def test_settings_are_finite_numbers_that_are_not_negative(name, value):
    with pytest.raises(ConfigurationError, match=f"{name}: expected a finite number"):
        PrioritizedReplayBuffer(4, **{name: value})
    buffer = PrioritizedReplayBuffer(4)
    before = getattr(buffer, name)
    with pytest.raises(ConfigurationError, match=f"{name}: expected a finite number"):
        setattr(buffer, name, value)
    assert getattr(buffer, name) == before


@pytest.mark.parametrize("value", [1, True, 0.25, torch.tensor(0.25), torch.tensor([1])])
def test_settings_may_be_whatever_is_one_number(value):
    buffer = PrioritizedReplayBuffer(4, alpha=value, beta=value, eps=value)
    assert (buffer.alpha, buffer.beta, buffer.eps) == (float(value),) * 3


@pytest.mark.parametrize("device", ["meta", torch.device("meta"), "no such device", 1.5])
def test_a_device_must_hold_numbers(device):
    with pytest.raises(ConfigurationError, match="device"):
        PrioritizedReplayBuffer(4, device=device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="it has CUDA")
@pytest.mark.parametrize("device", ["cuda", "cuda:3", torch.device("cuda")])
def test_without_cuda_a_buffer_on_it_says_what_to_do(device):
    with pytest.raises(
        ConfigurationError, match=r"device: .* torch finds 0 CUDA devices here; give device='cpu'"
    ):
        PrioritizedReplayBuffer(4, device=device)


def test_a_device_without_float64_is_refused_with_what_to_do(monkeypatch):
    def probe(device, dtype):
        """As on Apple's "mps"."""
        if dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return Elsewhere()

    class Elsewhere:
        device = torch.device("mps")

    monkeypatch.setattr(validation, "_probe", probe)
    expected = r"device: .* with float64, .* got 'mps': give device='cpu', .* \.to\('mps'\)"
    for make in (PrioritizedReplayBuffer, TransitionReplayBuffer, SumTree):
        with pytest.raises(ConfigurationError, match=expected):
            make(4, device="mps")
    with pytest.raises(ConfigurationError, match=expected):
        PrioritizedReplayBuffer(4, num_buffers=2, device="mps")
    with pytest.raises(ConfigurationError, match=expected):
        PrioritizedReplayBuffer(4)  # on the default device
    assert validation.resolve_device("mps", sums=False).type == "mps"  # for batches


def test_what_takes_zero_says_so():
    with pytest.raises(ConfigurationError, match=r"prefetch: .* integer of at least 0, got -1"):
        PrioritizedReplayBuffer(4, 2, prefetch=-1)

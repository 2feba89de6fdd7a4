import math

import pytest
import torch

from per_td import ConfigurationError, PrioritizedReplayBuffer


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

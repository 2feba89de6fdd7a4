"""Schedules: settings that follow from the number of updates."""

from dataclasses import dataclass

import torch
from torch import Tensor

from per_td import validation
from per_td.errors import ConfigurationError

__all__ = ["LinearSchedule"]


@dataclass(frozen=True)
class LinearSchedule:
    """A setting that goes from `start` to `end` in a straight line, and stays there.

    Args:
        start: value at first, in [0, 1].
        end: value after `steps` steps and from then on, in [0, 1].
        steps: number of steps, at least 1; for a `beta_schedule`, calls of `update_priority`.

    Raises:
        ConfigurationError: an argument is not accepted.

    Example:
        >>> LinearSchedule(0.4, 1.0, 100).at(torch.tensor(50)).item()
        0.7
    """

    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        for name in ("start", "end"):
            value = validation.real(name, getattr(self, name), high=1.0)
            object.__setattr__(self, name, value)
        object.__setattr__(self, "steps", validation.positive_int("steps", self.steps))

    def at(self, step: Tensor) -> Tensor:
        """Return the value after `step` steps, float64, in the shape of `step`."""
        share = step.double().div(self.steps).clamp(max=1.0)
        return torch.lerp(
            torch.full_like(share, self.start), torch.full_like(share, self.end), share
        )


def as_schedule(value: object) -> LinearSchedule | None:
    """Check a schedule, which a file holds as a dictionary, or raise ConfigurationError."""
    if isinstance(value, dict) and set(value) == {"start", "end", "steps"}:
        value = LinearSchedule(**value)
    if value is None or isinstance(value, LinearSchedule):
        return value
    raise ConfigurationError(
        f"beta_schedule: expected a per_td.LinearSchedule or None, got {value!r}"
    )

"""The environment variable that chooses between kernels and plain torch."""

import os

from per_td.errors import ConfigurationError

VARIABLE = "PER_TD_KERNELS"
CHOICES = ("auto", "off")
_FOR_TESTS = "checked"


def _choice() -> str:
    choice = os.environ.get(VARIABLE, "auto")
    if choice not in (*CHOICES, _FOR_TESTS):
        raise ConfigurationError(
            f"{VARIABLE}: expected one of {(*CHOICES, _FOR_TESTS)}, got {choice!r}"
        )
    return choice


def allowed() -> bool:
    """True unless the environment variable asks for plain torch.

    Raises:
        ConfigurationError: the environment variable is not one of `CHOICES`.
    """
    return _choice() != "off"


def checked() -> bool:
    """True if kernels shall check bounds; raises like `allowed`."""
    return _choice() == _FOR_TESTS

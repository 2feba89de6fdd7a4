"""How indices are drawn in proportion to masses."""

import torch
from torch import Tensor

from per_td.errors import ConfigurationError, EmptyBufferError
from per_td.validation import can_raise

__all__ = [
    "DRAWS",
    "METHODS",
    "MULTINOMIAL_LIMIT",
    "check_method",
    "multinomial",
    "points",
    "resolve_method",
    "uniform_like",
]

DRAWS = ("independent", "stratified", "without_replacement")
METHODS = ("auto", "multinomial", "tree")

MULTINOMIAL_LIMIT = 2**24
"""torch.multinomial refuses more categories than this."""

# method="auto" takes torch.multinomial up to this capacity, and the tree above it and wherever
# there is no entry; in plain torch, and on the CPU with compiled kernels. Medians on one core of
# an AMD EPYC (torch 2.13), batches of 256, microseconds, with weights in the second table:
#   slots                         1,000   10,000   30,000   100,000   1,000,000
#   independent: tree               109      213      142       183         182
#   independent: multinomial         27       41       60       142       1,221
#   without replacement: tree       369      715      685       739         780
#   without replacement: multin.     63      323      663     2,180      43,382
#
#   slots, compiled               1,000   10,000   20,000    30,000   100,000   1,000,000
#   independent: tree                10       12       12        12        14          64
#   independent: multinomial         36       51       64        76       155       1,449
#   without replacement: tree       334      554      611       607       952       2,176
#   without replacement: multin.     75      312      511       693     2,142      51,184
# On CUDA torch.multinomial stops the host when drawing without replacement; the tree never does.
MULTINOMIAL_UP_TO = {
    ("cpu", "independent"): 100_000,
    ("cpu", "without_replacement"): 20_000,
}
COMPILED_UP_TO = {("cpu", "without_replacement"): 20_000}


def check_method(method: str, draw: str, capacity: int) -> None:
    """Refuse what torch.multinomial cannot do.

    Raises:
        ConfigurationError: `method` is "multinomial" and the draw or the capacity is beyond it.
    """
    if method != "multinomial":
        return
    if draw == "stratified":
        raise ConfigurationError(
            "method: 'multinomial' cannot draw stratified; expected 'tree' or 'auto'"
        )
    if capacity > MULTINOMIAL_LIMIT:
        raise ConfigurationError(
            f"method: 'multinomial' takes a capacity of at most 2**24 = {MULTINOMIAL_LIMIT},"
            f" got {capacity}; expected 'tree' or 'auto'"
        )


def resolve_method(
    method: str, draw: str, capacity: int, device: torch.device, *, compiled: bool = False
) -> str:
    """The method that "auto" stands for; any other `method` is returned as it is.

    Args:
        method, draw, capacity, device: as for the buffer.
        compiled: whether compiled kernels draw from the tree.
    """
    if method != "auto":
        return method
    limits = COMPILED_UP_TO if compiled else MULTINOMIAL_UP_TO
    fits = capacity <= limits.get((device.type, draw), 0)
    return "multinomial" if fits else "tree"


def uniform_like(template: Tensor, generator: torch.Generator | None) -> Tensor:
    """Random numbers in [0, 1), of the shape, dtype and device of `template`."""
    if generator is None:  # half of what torch.rand takes where its code has left the caches
        return torch.rand_like(template)
    return torch.rand(
        template.shape, dtype=template.dtype, device=template.device, generator=generator
    )


def points(
    n: int, draw: str, device: torch.device, generator: torch.Generator | None = None
) -> Tensor:
    """Random points in [0, 1), to be scaled by the total and looked up in the tree.

    Args:
        n: how many.
        draw: "independent", or "stratified": one in each of n equal ranges (Schaul et al. 2015,
            appendix B.2.1), in order.
        device: where.
        generator: source of the random numbers, on that device.

    Returns:
        float64 [n]: float32 numbers have 2^24 values, too few for large buffers.
    """
    point = torch.rand(n, dtype=torch.float64, device=device, generator=generator)
    if draw == "stratified":
        point = (torch.arange(n, device=device) + point) / n
    return point


def multinomial(
    mass: Tensor, n: int, draw: str, generator: torch.Generator | None = None
) -> Tensor:
    """Draw with torch.multinomial, in O(N), in float64 (its float32 sums are off from 10^5 slots).

    Args:
        mass: [N], N at most 2^24, not all 0.
        n: how many.
        draw: "independent" or "without_replacement".
        generator: source of the random numbers, on the device of `mass`.

    Returns:
        int64 [n].

    Raises:
        EmptyBufferError: without replacement, fewer than n masses are positive (CPU only).
    """
    if draw == "independent":
        return torch.multinomial(mass.double(), n, replacement=True, generator=generator)
    if can_raise(mass):
        require_enough(int(mass.count_nonzero()), n)
    return torch.multinomial(mass.double(), n, replacement=False, generator=generator)


def require_enough(drawable: int, n: int) -> None:
    """Refuse to draw more than there is without replacement."""
    if drawable < n:
        raise EmptyBufferError(
            f"expected at least {n} transitions of positive priority to draw {n} without"
            f" replacement, got {drawable}"
        )

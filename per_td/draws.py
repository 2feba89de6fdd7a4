"""Ways to draw indices in proportion to masses."""

import torch
from torch import Tensor

from per_td.errors import ConfigurationError, EmptyBufferError

DRAWS = ("independent", "stratified", "without_replacement")
METHODS = ("auto", "multinomial", "tree")

MULTINOMIAL_LIMIT = 2**24
"""torch.multinomial refuses more categories than this."""

# method="auto" takes torch.multinomial up to this capacity, and the tree above it or if there is no
# entry; in plain torch, and on the CPU with compiled kernels. Medians on one core of
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
# On CUDA torch.multinomial makes the host wait without replacement; the tree never does.
MULTINOMIAL_UP_TO = {("cpu", "independent"): 100_000, ("cpu", "without_replacement"): 20_000}
COMPILED_UP_TO = {("cpu", "without_replacement"): 20_000}


def check_method(method: str, draw: str, capacity: int) -> None:
    """Check that torch.multinomial can draw so, if it is the method.

    Raises:
        ConfigurationError: it cannot.
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


# Of many buffers: the least of 25 times on one core of an AMD EPYC (torch 2.13), 64 from each of
# 100, milliseconds; kernels draw from the trees in the first line, plain torch in all others:
#   slots of each                        300    1,000    3,000    10,000    30,000
#   independent: tree, compiled         0.17     0.22     0.26      0.25      0.24
#   independent: tree                   0.81     0.86     0.93       2.1       1.4
#   independent: multinomial            0.44     0.60     0.90       2.2        10
#   without replacement: tree            2.4      8.9      9.1        14        23
#   without replacement: multinomial     1.1      3.1       18        55       204
MANY_UP_TO = {("cpu", "independent"): 3_000, ("cpu", "without_replacement"): 1_500}
COMPILED_MANY_UP_TO = {("cpu", "without_replacement"): 1_500}


def resolve_method(
    method: str,
    draw: str,
    capacity: int,
    device: torch.device,
    *,
    compiled: bool = False,
    many: bool = False,
) -> str:
    """Choose the method for "auto"; return any other `method` as it is.

    Args:
        method, draw, capacity, device: see `PrioritizedReplayBuffer`.
        compiled: compiled kernels draw from the tree.
        many: there are many buffers of this capacity.
    """
    if method != "auto":
        return method
    if many:
        limits = COMPILED_MANY_UP_TO if compiled else MANY_UP_TO
    else:
        limits = COMPILED_UP_TO if compiled else MULTINOMIAL_UP_TO
    fits = capacity <= limits.get((device.type, draw), 0)
    return "multinomial" if fits else "tree"


def uniform_like(template: Tensor, generator: torch.Generator | None) -> Tensor:
    """Random numbers in [0, 1), of the shape, dtype and device of `template`."""
    if generator is None:  # twice as fast as torch.rand if its code has left the caches
        return torch.rand_like(template)
    return torch.rand(
        template.shape, dtype=template.dtype, device=template.device, generator=generator
    )


def multinomial(
    mass: Tensor, n: int, draw: str, generator: torch.Generator | None = None
) -> Tensor:
    """Draw with torch.multinomial, in O(N), in float64 (its float32 sums are off from 10^5 slots).

    Args:
        mass: [N] or [S, N], N at most 2^24, not all 0 in a row; enough of them positive.
        n: draws from each row.
        draw: "independent" or "without_replacement".
        generator: source of the random numbers, on the device of `mass`.

    Returns:
        int64 [n] or [S, n].
    """
    replace = draw == "independent"
    return torch.multinomial(mass.double(), n, replacement=replace, generator=generator)


def require_enough(drawable: int, n: int) -> None:
    """Raise EmptyBufferError if fewer than `n` transitions are drawable without replacement."""
    if drawable < n:
        raise EmptyBufferError(
            f"expected at least {n} transitions of positive priority to draw {n} without"
            f" replacement, got {drawable}"
        )

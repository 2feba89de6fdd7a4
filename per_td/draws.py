"""Ways to draw indices in proportion to masses."""

import torch
from torch import Tensor

from per_td import validation
from per_td.errors import ConfigurationError, EmptyBufferError

DRAWS = ("independent", "stratified", "without_replacement")
METHODS = ("auto", "multinomial", "tree")

MULTINOMIAL_LIMIT = 2**24
"""torch.multinomial refuses more categories than this."""

# method="auto" takes torch.multinomial up to this capacity, and the tree above it or if there is no
# entry; in plain torch, and on the CPU with compiled kernels. The least of 300 times on one core of
# an Intel Xeon that others used too (torch 2.13), batches of 256 with weights, microseconds:
#   slots                           300   1,000   5,000  10,000  30,000  100,000  1,000,000
#   independent: tree                85      88     122     128     130      165        187
#   independent: tree, compiled      14      14      16      16      16       17         18
#   independent: multinomial         56      61      69      77     105      243
#   without replacement: tree       555     169     211     219     223      262        297
#   without repl.: tree, compiled   492      52      53      53      53       54         59
#   without repl.: multinomial       77      94     179     261     701
# The tree is slow where a batch takes nearly all there is, as of 300: hence the last limit.
# On CUDA torch.multinomial makes the host wait without replacement; the tree never does.
MULTINOMIAL_UP_TO = {("cpu", "independent"): 30_000, ("cpu", "without_replacement"): 5_000}
COMPILED_UP_TO = {("cpu", "without_replacement"): 1_000}


def check_method(method: str, draw: str, capacity: int) -> None:
    """Raise ConfigurationError if torch.multinomial is the method, and cannot draw so."""
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


# Of many buffers: the least of 40 times there, 64 from each of 100, milliseconds:
#   slots of each                     100     300   1,000   3,000  10,000  30,000
#   independent: tree                0.40    0.52    0.68    0.93     1.2     1.5
#   independent: tree, compiled      0.16    0.15    0.18    0.21    0.22    0.25
#   independent: multinomial         0.33    0.41    0.57     1.0     2.2     6.6
#   without replacement: tree         2.7     1.4     1.7     2.2     2.5     3.1
#   without repl.: tree, compiled     1.8    0.27    0.28    0.31    0.34    0.40
#   without repl.: multinomial       0.48    0.97     2.7     8.2      22      74
MANY_UP_TO = {("cpu", "independent"): 2_000, ("cpu", "without_replacement"): 500}
COMPILED_MANY_UP_TO = {("cpu", "without_replacement"): 150}


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

    `compiled`: compiled kernels draw from the tree. `many`: there are many buffers of this
    capacity.
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
    """Random numbers in [0, 1), of the shape, dtype and device of `template`, float64."""
    if torch.compiler.is_compiling() and generator is None:
        # the compiler's own are of float32: 2^23 of them in [0.5, 1), too few for 10^7 slots
        return (torch.rand_like(template).mul(2**20).floor() + torch.rand_like(template)) / 2**20
    if generator is None:  # twice as fast as torch.rand if its code has left the caches
        return torch.rand_like(template)
    return torch.rand(
        template.shape, dtype=template.dtype, device=template.device, generator=generator
    )


def prefix_sums(mass: Tensor) -> Tensor:
    """Sum float64 masses [..., n] up to each; the sums never fall, and do not rise at a mass of 0.

    A parallel sum, as on CUDA, adds in another order for each element, and may do both.
    """
    prefix = mass.cumsum(-1)
    if validation.can_raise(prefix):
        return prefix
    return torch.where(mass > 0, prefix, 0.0).cummax(-1).values


def multinomial(
    mass: Tensor, n: int, draw: str, generator: torch.Generator | None = None
) -> Tensor:
    """Draw with torch.multinomial, in O(N), in float64 (its float32 sums are off from 10^5 slots).

    Args:
        mass: [N] or [S, N], N at most 2^24; enough of them positive.
        n: draws from each row.
        draw: "independent" or "without_replacement".
        generator: on the device of `mass`.

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

"""Prioritized draws and weights without a buffer: tensors in, tensors out.

Use it for data that you hold yourself, such as the segments of a rollout or the rollouts of a
language model. Nothing is stored: each call reads all priorities, in O(N). A
`PrioritizedReplayBuffer` keeps a tree and draws in O(log N).

All sums and probabilities are in float64. No gradients flow. On the CPU, wrong values raise. On
CUDA and under torch.compile, a check of values would make the host wait. There, a priority that is
NaN, infinite or negative counts as 0, and settings that are tensors are not checked (under
torch.compile, no setting is).

References are to Schaul et al. 2015, "Prioritized Experience Replay", arXiv 1511.05952.
"""

import torch
from torch import Tensor

from per_td import draws, validation, weights
from per_td.errors import ConfigurationError, EmptyBufferError, PriorityError

__all__ = ["draw", "importance_weights", "resample"]

_SMALLEST = torch.finfo(torch.float64).tiny


def draw(
    priority: Tensor,
    n: int,
    *,
    alpha: Tensor | float = 1.0,
    uniform_mix: Tensor | float = 0.0,
    replacement: bool = True,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw indices in proportion to priority^alpha, optionally with a share of uniform draws.

    P(i) = (1 - u) p_i^alpha / sum_k p_k^alpha + u / N, where u is `uniform_mix` and N is the number
    of positive priorities in the row. An index of priority 0 is never drawn.

    Args:
        priority: priorities p, at least 0, any real dtype, [N] or [S, N]. The S rows are drawn
            from independently.
        n: number of draws from each row.
        alpha: exponent of the priorities, at least 0 (equation 1); 0 draws uniformly.
        uniform_mix: share u of uniform draws, in [0, 1].
        replacement: False draws `n` different indices, distributed as if drawn one by one, in that
            order.
        generator: source of the random numbers, on the device of `priority`. None is torch's own,
            which keeps this call in one graph under torch.compile.

    Returns:
        Indices, int64, and the probability P of each, float64 (float32 would lose those below
        1e-38), both [n] or [S, n]. Without replacement, P is that of a single draw.

    Raises:
        PriorityError: priorities are not real numbers, or are NaN, infinite or negative.
        EmptyBufferError: a row has no positive priority, or, without replacement, fewer than `n`.
            On CUDA and under torch.compile, the indices of such a row stay in range instead: its
            first draw replaces the missing ones, and P is 0 if all priorities of the row are 0.
        ConfigurationError: another argument is not accepted.

    Example:
        >>> priority = torch.tensor([0.0, 3.0, 3.0])
        >>> index, probability = draw(priority, 2, replacement=False)
        >>> sorted(index.tolist()), probability.tolist()
        ([1, 2], [0.5, 0.5])
    """
    priority = _reals("priority", priority)
    if priority.ndim not in (1, 2):
        raise PriorityError(f"priority: expected shape [N] or [S, N], got {[*priority.shape]}")
    if priority.numel() == 0:
        raise EmptyBufferError(f"priority: expected at least one, got shape {[*priority.shape]}")
    n = validation.positive_int("n", n)
    if not isinstance(replacement, bool):
        raise ConfigurationError(f"replacement: expected True or False, got {replacement!r}")
    generator = validation.as_generator(generator, priority.device)
    alpha = _setting("alpha", alpha, priority.device)
    uniform_mix = _setting("uniform_mix", uniform_mix, priority.device, high=1.0)
    valid = validation.require_finite("priority", priority, low=0.0)
    probability = _probabilities(torch.where(valid, priority, 0.0), alpha, uniform_mix)
    _require_enough(probability, n, replacement)
    find = _with_replacement if replacement else _without_replacement
    index = find(probability, n, generator)
    return index, probability.gather(-1, index)


def importance_weights(
    probability: Tensor,
    size: Tensor | int,
    beta: Tensor | float,
    *,
    normalization: str = "batch",
) -> Tensor:
    """Return the importance-sampling weights w = (size P)^-beta of draws (section 3.4).

    Args:
        probability: P of each drawn index, in (0, 1], [..., n].
        size: number of items that the draws were made from: one, or a tensor [..., 1] of one for
            each row.
        beta: exponent of the weights, at least 0; 1 corrects the whole bias.
        normalization: "batch" divides by the largest weight in the last dimension, "none" does not
            divide. There is no "buffer" as in `PrioritizedReplayBuffer`: it needs the smallest
            probability of all items, which is not known here.

    Returns:
        Weights, float32, in the shape of `probability`.

    Raises:
        PriorityError: a probability is not in (0, 1]. On CUDA and under torch.compile, a
            probability of 0 gives a weight that is not finite instead.
        ConfigurationError: another argument is not accepted.

    Example:
        >>> importance_weights(torch.tensor([0.75, 0.25]), 2, 1.0)
        tensor([0.3333, 1.0000])
    """
    if isinstance(normalization, str) and normalization == "buffer":
        raise ConfigurationError(
            "normalization: expected 'batch' or 'none', got 'buffer', which needs the smallest"
            " probability of all items, also those not drawn"
        )
    normalization = validation.one_of("normalization", normalization, ("batch", "none"))
    probability = _reals("probability", probability)
    beta = _setting("beta", beta, probability.device)
    if probability.ndim == 0 or probability.shape[-1] == 0:
        raise PriorityError(
            f"probability: expected at least one draw, got shape {[*probability.shape]}"
        )
    size = _size(size, (*probability.shape[:-1], 1), probability.device)
    if validation.can_raise(probability):
        wrong = ~((probability > 0) & (probability <= 1 + 1e-6))  # also NaN
        if wrong.any():
            raise PriorityError(
                f"probability: expected values in (0, 1], got {probability[wrong][0].item()}"
                f" ({int(wrong.sum())} of {wrong.numel()} are wrong)"
            )
    return weights.importance_weights(
        probability, beta, total=1.0, size=size, smallest=None, normalization=normalization
    )


def resample(
    score: Tensor, n: int, *, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Draw a small batch from a large uniform one by fresh scores, as LaBER-mean does.

    Lahire et al. 2022, "Large Batch Experience Replay", arXiv 2110.01528. An item is drawn with
    P(i) = s_i / sum_k s_k, with replacement, and weighs w_i = mean(s) / s_i = 1 / (M P(i)). The
    mean of w_i g_i over the small batch is an unbiased estimate of the mean of g over the large
    one. (LaBER-lazy and LaBER-max of the paper differ by one factor per batch: w_i = 1 / P(i), and
    w_i divided by the largest of the batch.)

    Args:
        score: scores s, such as |TD error|, at least 0, any real dtype, [M] or [S, M].
        n: number of draws from each row.
        generator: source of the random numbers, on the device of `score`. None is torch's own.

    Returns:
        Indices into `score`, int64, and weights, float32, both [n] or [S, n].

    Raises:
        PriorityError, EmptyBufferError, ConfigurationError: as `draw`.

    Example:
        >>> index, weight = resample(torch.tensor([0.0, 2.0, 2.0]), 4)
        >>> weight  # mean(s) / s_i
        tensor([0.6667, 0.6667, 0.6667, 0.6667])
    """
    score = _reals("score", score)
    index, probability = draw(score, n, generator=generator)
    weight = weights.importance_weights(
        probability, 1.0, total=1.0, size=score.shape[-1], smallest=None, normalization="none"
    )
    return index, weight


def _reals(name: str, values: Tensor) -> Tensor:
    """Convert `values` to float64 where they are, contiguous and detached."""
    device = values.device if isinstance(values, Tensor) else torch.device("cpu")
    if device.type not in ("cpu", "cuda", "meta"):
        validation.resolve_device(device)
    return validation.as_reals(name, values, device, torch.float64).contiguous()


def _require_on(name: str, value: Tensor, device: torch.device) -> None:
    """Raise ConfigurationError unless a setting is on this device, or on the CPU."""
    if value.device not in (device, torch.device("cpu")) or value.is_complex():
        raise ConfigurationError(
            f"{name}: expected a real number, or a tensor of them on {device}, got {value.dtype} on"
            f" {value.device}"
        )


def _setting(
    name: str, value: Tensor | float, device: torch.device, high: float = float("inf")
) -> Tensor | float:
    """Check a number in [0, high], unless it may not be looked at."""
    if torch.compiler.is_compiling():  # a number that changes from call to call is an input there
        return value
    if isinstance(value, Tensor) and not validation.can_raise(value):
        _require_on(name, value, device)
        return value.detach()
    return validation.real(name, value, high=high)


def _size(size: Tensor | int, each: tuple[int, ...], device: torch.device) -> Tensor | int:
    """Check a number of items, or one for each row, of the shape `each`."""
    if not isinstance(size, Tensor):
        return validation.positive_int("size", size)
    _require_on("size", size, device)
    if size.ndim and size.shape != each:
        raise ConfigurationError(
            f"size: expected one number, or one for each row, shape {[*each]}, got shape"
            f" {[*size.shape]}"
        )
    if validation.can_raise(size) and not (size >= 1).all():
        raise ConfigurationError(f"size: expected numbers of at least 1, got {size.min().item()}")
    return validation.to_device(size, device)


def _probabilities(priority: Tensor, alpha: Tensor | float, uniform_mix: Tensor | float) -> Tensor:
    """Probabilities of a single draw from each row, float64; see `draw`.

    Priorities are divided by the largest first, so that no power is infinite at any alpha.
    """
    positive = priority > 0
    mass = (priority / priority.amax(-1, keepdim=True)).pow(alpha).clamp(min=_SMALLEST)
    mass = torch.where(positive, mass, 0.0)  # also where all are 0, and 0 / 0 is NaN
    share = (1 - uniform_mix) * mass / mass.sum(-1, keepdim=True)
    uniform = uniform_mix / positive.sum(-1, keepdim=True, dtype=torch.float64)
    return torch.where(positive, (share + uniform).clamp(_SMALLEST, 1.0), 0.0)


def _require_enough(probability: Tensor, n: int, replacement: bool) -> None:
    """Raise EmptyBufferError if a row has too few items, or, if `can_raise`, too few positive."""
    drawable = probability.shape[-1]
    if validation.can_raise(probability):
        drawable = int(probability.count_nonzero(-1).min())
    if not replacement:
        draws.require_enough(drawable, n)
    elif drawable == 0:
        raise EmptyBufferError("priority: expected a positive one in each row, got only 0")


def _with_replacement(probability: Tensor, n: int, generator: torch.Generator | None) -> Tensor:
    """Indices of independent draws by inversion, int64 [n] or [S, n]."""
    prefix = draws.prefix_sums(probability)
    total = prefix.amax(-1, keepdim=True)
    point = draws.uniform_like(probability.new_empty((*probability.shape[:-1], n)), generator)
    # a point that rounding moves to the total belongs to the last that adds to it
    last = torch.searchsorted(prefix, total)
    return torch.searchsorted(prefix, point * total, right=True).minimum(last)


def _without_replacement(probability: Tensor, n: int, generator: torch.Generator | None) -> Tensor:
    """Indices of sequential draws without replacement, int64 [n] or [S, n].

    Let every item arrive at a time ~ Exp(P): the order of arrival is that of sequential draws.
    Logarithms of the times keep those of the smallest P apart.
    """
    time = -torch.log1p(-draws.uniform_like(probability, generator))  # ~ Exp(1)
    arrival = torch.where(probability > 0, time.log() - probability.log(), torch.inf)
    first, index = arrival.topk(n, dim=-1, largest=False, sorted=True)
    return torch.where(first < torch.inf, index, index[..., :1])

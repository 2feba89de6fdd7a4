"""Figures of the priorities for a logger; docs/diagnostics.md explains them.

Pure functions on tensors [n] of one buffer, or [S, n] of S buffers, each with figures of its own.
The host never waits for a value: counts that depend on the data, such as that of positive
priorities, stay on the device.
"""

import numpy as np
import torch
from torch import Tensor

from per_td.weights import importance_weights

QUANTILES = {"min": 0.0, "q01": 0.01, "q25": 0.25, "q50": 0.5, "q75": 0.75, "q99": 0.99, "max": 1.0}
"""Quantiles by the last part of their key."""


def _levels(device: torch.device) -> Tensor:
    """The `QUANTILES`, float64 [7]; a tensor made from a list would make the host wait."""
    levels = [torch.full((), q, dtype=torch.float64, device=device) for q in QUANTILES.values()]
    return torch.stack(levels)


def _ascending(values: Tensor) -> Tensor:
    """Sort `values` [..., n]; numpy takes a 20th of the time of torch, which sorts indices."""
    if values.device.type == "cpu":
        return torch.from_numpy(np.sort(values.numpy()))
    return values.sort().values


def _named(name: str, values: Tensor) -> dict[str, Tensor]:
    """Split quantiles [..., 7] into float32 tensors [...] by key."""
    parts = values.float().unbind(-1)
    return {f"{name}/{key}": value for key, value in zip(QUANTILES, parts, strict=True)}


def _known(figure: Tensor, count: Tensor) -> Tensor:
    """The figure where `count` is positive, and NaN elsewhere."""
    return torch.where(count > 0, figure, torch.nan)


def _places(count: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Places of the quantiles in `count` [...] sorted values: neighbours and a share, [..., 7]."""
    place = _levels(count.device) * (count - 1).clamp(min=0).unsqueeze(-1)
    low = place.floor()
    return low.long(), place.ceil().long(), place - low


def quantiles(name: str, values: Tensor, size: Tensor) -> dict[str, Tensor]:
    """Quantiles, interpolated, of the largest `size` [...] of values [..., n]; NaN for none."""
    ordered = _ascending(values)  # torch.quantile refuses more than 2^24 of them
    low, high, share = _places(size)
    first = (values.shape[-1] - size.clamp(min=1)).unsqueeze(-1)
    below, above = (ordered.gather(-1, first + place).double() for place in (low, high))
    return _named(name, _known(below.lerp(above, share), size.unsqueeze(-1)))


def probabilities(mass: Tensor, uniform_mix: float) -> Tensor:
    """Probabilities of draws in proportion to mass, a share of them uniform, float64 [..., n].

    A mass of 0 is never drawn; where all masses are 0, they are NaN.
    """
    share = mass.double()
    share = share / share.sum(-1, keepdim=True)
    if not uniform_mix:
        return share
    held = mass > 0
    mixed = (1 - uniform_mix) * share + uniform_mix / held.sum(-1, keepdim=True).double()
    return torch.where(held, mixed, share)


def concentration(probability: Tensor, size: Tensor) -> dict[str, Tensor]:
    """Measures of how unequal the probabilities, descending, [..., n], of `size` transitions are.

    "effective_sample_size": 1 / sum P^2, `size` if all are equal and 1 if one transition has
    everything; "effective_share": that over `size`; "top_1_percent_share": probability of the
    ceil(size / 100) slots of the largest masses.
    """
    effective = probability.square().sum(-1).reciprocal()
    place = torch.arange(probability.shape[-1], device=probability.device)
    inside = place < ((size + 99) // 100).unsqueeze(-1)
    top = torch.where(inside, probability, 0.0).sum(-1)
    return {
        "effective_sample_size": effective.float(),
        "effective_share": (effective / size).float(),
        "top_1_percent_share": _known(top, size).float(),
    }


def weights(
    probability: Tensor, size: Tensor, beta: Tensor | float, normalization: str
) -> dict[str, Tensor]:
    """Quantiles, interpolated, of the weights of all slots that can be drawn.

    `probability` is descending, float64 [..., n]. A `normalization` other than "none" divides by
    the largest weight in the buffer, since that of a batch depends on the draw.
    """
    count = (probability > 0).sum(-1)  # those of probability 0 come last: they have no weight
    low, high, share = _places(count)
    last = (count - 1).clamp(min=0).unsqueeze(-1)
    smallest = probability.gather(-1, last)

    def weight(place: Tensor) -> Tensor:
        weight = importance_weights(
            probability.gather(-1, place),  # descending: the weights are ascending
            beta.unsqueeze(-1) if isinstance(beta, Tensor) and beta.ndim else beta,
            total=1.0,
            size=size.unsqueeze(-1),
            smallest=smallest,
            normalization="none" if normalization == "none" else "buffer",
        )
        return weight.double()

    return _named("weight", _known(weight(low).lerp(weight(high), share), count.unsqueeze(-1)))


def ages(mass: Tensor, written: Tensor | int | None) -> dict[str, Tensor]:
    """Quantiles of the age of draws: the number of transitions written since.

    A quantile q is the smallest age that a draw exceeds with a probability of at most 1 - q.
    `mass` is that of the slots of a ring, [..., n]; where nobody knows the number of transitions
    ever `written` to it, and so their order, the ages are NaN.
    """
    device, n = mass.device, mass.shape[-1]
    if written is None:
        shape = *mass.shape[:-1], len(QUANTILES)
        return _named("age", torch.full(shape, torch.nan, dtype=torch.float64, device=device))
    if isinstance(written, Tensor):
        slot = (written.unsqueeze(-1) - 1 - torch.arange(n, device=device)) % n
        by_age = mass.gather(-1, slot.expand(mass.shape))
    else:  # several times faster
        by_age = mass.roll(-(written % n), -1).flip(-1)
    reached = by_age.cumsum(-1, dtype=torch.float64)
    total = reached[..., -1:]
    target = (_levels(device) * total).clamp(min=torch.finfo(torch.float64).tiny)
    return _named("age", _known(torch.searchsorted(reached, target).double(), total))


def measure(
    *,
    priority: Tensor,
    mass: Tensor,
    filled: Tensor | None,
    replayed: Tensor | None,
    draw_count: Tensor | None,
    written: Tensor | int | None,
    beta: Tensor | float,
    normalization: str,
    uniform_mix: float,
) -> dict[str, Tensor]:
    """All figures of this module, float32 [...]; NaN for those that an empty buffer lacks.

    Tensors are [..., n], one entry per slot: `priority` and `mass` 0 in empty slots, `filled` True
    in others (None: all are filled), `replayed` True where one has been drawn, `draw_count` int32.
    `written`, the number of transitions ever written, is one number or int64 [...]. None stands for
    what nobody knows. Beside the figures is "size", the number of transitions, int64 [...].
    """
    if filled is None:
        filled = torch.ones_like(priority, dtype=torch.bool)
    if not priority.shape[-1]:  # the same keys as for one empty slot, and no figures
        priority, mass, filled = (_one_empty(each) for each in (priority, mass, filled))
        replayed = None if replayed is None else _one_empty(replayed)
        draw_count = None if draw_count is None else _one_empty(draw_count)
    size = filled.sum(-1)
    likely = probabilities(mass, uniform_mix) if uniform_mix else mass
    descending = probabilities(_ascending(mass).flip(-1), uniform_mix)
    never = torch.full_like(size, torch.nan, dtype=torch.float32)
    if replayed is not None:
        never = ((filled & ~replayed).sum(-1) / size.double()).float()
    counts = {}
    if draw_count is not None:
        counts = quantiles("draw_count", torch.where(filled, draw_count, -1), size)
    return {
        **concentration(descending, size),
        "never_replayed_share": never,
        **quantiles("priority", priority, size),
        **weights(descending, size, beta, normalization),
        **ages(likely, written),
        **counts,
        "size": size,
    }


def _one_empty(column: Tensor) -> Tensor:
    """One slot without anything in place of none: [..., 0] -> [..., 1]."""
    return column.new_zeros((*column.shape[:-1], 1))

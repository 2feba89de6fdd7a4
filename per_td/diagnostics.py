"""Figures of the priorities for a logger; docs/diagnostics.md explains them.

Pure functions on tensors. The host never waits for a value: counts that depend on the data, such as
that of positive priorities, stay on the device.
"""

import math

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
    """Sort `values` [n]; numpy takes a 20th of the time of torch, which sorts indices."""
    if values.device.type == "cpu":
        return torch.from_numpy(np.sort(values.numpy()))
    return values.sort().values


def _named(name: str, values: Tensor) -> dict[str, Tensor]:
    """Split quantiles [7] into 0-dim float32 tensors by key."""
    parts = values.float().unbind()
    return {f"{name}/{key}": value for key, value in zip(QUANTILES, parts, strict=True)}


def _places(count: Tensor | int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Places of the quantiles in `count` sorted values: two neighbours [7] and a share [7]."""
    place = _levels(device) * (count - 1)
    low = place.floor()
    return low.long().clamp(min=0), place.ceil().long().clamp(min=0), place - low


def priorities(priority: Tensor) -> dict[str, Tensor]:
    """Quantiles of raw priorities, interpolated; `priority` float32 [n], n at least 1."""
    ordered = _ascending(priority).double()  # torch.quantile refuses more than 2^24 of them
    low, high, share = _places(len(priority), priority.device)
    return _named("priority", ordered[low].lerp(ordered[high], share))


def masses(ordered: Tensor) -> dict[str, Tensor]:
    """Measures of how unequal the probabilities are.

    Args:
        ordered: masses, descending, float32 [n], n at least 1.

    Returns:
        "effective_sample_size": (sum m)^2 / sum m^2, n if all are equal and 1 if one transition has
        everything; "effective_share": that over n; "top_1_percent_share": probability of the
        ceil(n / 100) slots of the largest masses.
    """
    mass = ordered.double() / ordered[0].double()  # keeps their squares finite
    total = mass.sum()
    size = total.square() / mass.square().sum()
    top = mass[: math.ceil(len(mass) / 100)].sum() / total
    return {
        "effective_sample_size": size.float(),
        "effective_share": (size / len(mass)).float(),
        "top_1_percent_share": top.float(),
    }


def weights(ordered: Tensor, beta: Tensor, normalization: str) -> dict[str, Tensor]:
    """Quantiles, interpolated, of the weights of all slots that can be drawn.

    Args:
        ordered: masses, descending, float32 [n], n at least 1.
        beta: exponent of the weights, 0-dim.
        normalization: "none"; any other divides by the largest weight in the buffer, since that
            of a batch depends on the draw.
    """
    count = ordered.count_nonzero()  # those of mass 0 come last: they have no weight
    low, high, share = _places(count, ordered.device)
    last = (count - 1).clamp(min=0).view(1)  # a 0-dim index would be read by the host
    smallest = ordered.index_select(0, last)

    def weight(place: Tensor) -> Tensor:
        weight = importance_weights(
            ordered.index_select(0, place),  # descending: the weights are ascending
            beta,
            total=ordered.sum(dtype=torch.float64),
            size=len(ordered),
            smallest=smallest,
            normalization="none" if normalization == "none" else "buffer",
        )
        return weight.double()

    quantiles = weight(low).lerp(weight(high), share)
    return _named("weight", torch.where(count > 0, quantiles, torch.nan))


def ages(mass: Tensor, written: int) -> dict[str, Tensor]:
    """Quantiles of the age of draws: the number of transitions written since.

    A quantile q is the smallest age that a draw exceeds with a probability of at most 1 - q.

    Args:
        mass: masses of the filled slots, float32 [n], n at least 1.
        written: number of transitions ever written.
    """
    n = len(mass)
    head = written % n if written > n else 0  # the slot of the oldest
    by_age = torch.cat([mass[head:], mass[:head]]).flip(0)
    reached = by_age.cumsum(0, dtype=torch.float64)
    total = reached[-1]
    target = (_levels(mass.device) * total).clamp(min=torch.finfo(torch.float64).tiny)
    age = torch.searchsorted(reached, target).double()
    return _named("age", torch.where(total > 0, age, torch.nan))


def measure(
    *,
    priority: Tensor,
    mass: Tensor,
    replayed: Tensor,
    written: int,
    beta: Tensor,
    normalization: str,
) -> dict[str, Tensor]:
    """All figures of this module, 0-dim float32; NaN for those that an empty buffer lacks.

    Args:
        priority, mass: priorities and masses of the filled slots, float32 [n].
        replayed: True for slots that have been drawn, bool [n].
        written: number of transitions ever written.
        beta: exponent of the weights, 0-dim.
        normalization: normalization of the weights.
    """
    n = len(priority)
    if not n:  # the same keys as for one transition of mass 0, and no figures
        priority, mass = priority.new_full((1,), torch.nan), mass.new_zeros(1)
        replayed = replayed.new_zeros(1)
    ordered = _ascending(mass).flip(0)
    never = (~replayed).float().mean(dtype=torch.float64).float()
    return {
        **masses(ordered),
        "never_replayed_share": never if n else torch.full_like(never, torch.nan),
        **priorities(priority),
        **weights(ordered, beta, normalization),
        **ages(mass, written),
    }

"""Formulas of priorities, masses and importance-sampling weights, as pure functions on tensors.

References are to Schaul et al. 2015, "Prioritized Experience Replay", arXiv 1511.05952.
"""

import torch
from torch import Tensor

NORMALIZATIONS = ("batch", "buffer", "none")

_SMALLEST = torch.finfo(torch.float32).tiny
_LARGEST = torch.finfo(torch.float32).max


def priority_of(td_error: Tensor, eps: float | Tensor) -> Tensor:
    """Priorities p = |delta| + eps of proportional prioritization (section 3.3).

    Args:
        td_error: TD errors delta, any real dtype, [B].
        eps: keeps transitions with a TD error of 0 drawable.

    Returns:
        [B], in the dtype of `td_error`.
    """
    return td_error.abs() + eps


def mass_of(priority: Tensor, alpha: Tensor | float) -> Tensor:
    """Masses p^alpha (equation 1, unnormalised), float32.

    A priority of 0 has mass 0 at any alpha, also 0, and is never drawn. A positive priority has a
    positive, finite mass: values beyond the limits of float32 are moved to them.

    Args:
        priority: raw priorities p, finite and not negative, [B].
        alpha: degree of prioritization; 0 is uniform. One number, or one for each, [B].
    """
    mass = priority.double().pow(alpha).clamp(_SMALLEST, _LARGEST).float()
    return torch.where(priority > 0, mass, 0.0)


def importance_weights(
    mass: Tensor,
    beta: Tensor | float,
    *,
    total: Tensor | float,
    size: Tensor | int,
    smallest: Tensor | None,
    normalization: str,
) -> Tensor:
    """Weights w = (N P)^-beta, normalised (section 3.4), computed in float64.

    Args:
        mass: masses of the transitions drawn, [..., B]; P = mass / total.
        beta: 0 for no correction, 1 for the full one.
        total: sum of all masses.
        size: N, the number of transitions in the buffer.
        smallest: smallest positive mass in the buffer; needed for "buffer" only.
        normalization: "batch" divides by the largest weight of the batch (the last dimension),
            "buffer" by the largest that any transition in the buffer would get, "none" leaves the
            weights as they are.

    Returns:
        float32, in the shape of `mass`.
    """
    mass = mass.double()
    if normalization == "batch":  # N and the total cancel
        ratio = mass / mass.amin(-1, keepdim=True)
    elif normalization == "buffer" and smallest is not None:
        ratio = mass / smallest.double()
    else:
        ratio = mass / total * size
    return ratio.pow(-beta).float()

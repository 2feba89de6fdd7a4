"""Slow and obvious twins of what the library does, in Python floats and lists."""

import math

import torch
from tensordict import TensorDict

S = 3
"""How many buffers there are side by side."""

CAPACITIES = (1, 7, 15, 16, 17, 32, 50, 255, 256, 257, 1000)


def data(start: int, n: int, device: torch.device | str = "cpu") -> TensorDict:
    """`n` transitions that can be told apart: number `start`, `start` + 1, ..."""
    k = torch.arange(start, start + n, device=device)
    return TensorDict(
        {
            "observation": k.float().unsqueeze(-1).expand(n, 3).clone(),
            "action": k,
            "next": {"reward": k.float().unsqueeze(-1), "done": (k % 3 == 0).unsqueeze(-1)},
        },
        batch_size=[n],
        device=device,
    )


def numbered(start: int, n: int, device="cpu", count: int = S) -> TensorDict:
    """Transitions [count, n] that can be told apart, also from those of other buffers."""
    return torch.stack([data(10_000 * s + start, n, device) for s in range(count)])


def assert_drawn_from(index: torch.Tensor, probability, level: float = 1e-4) -> None:
    """Chi-square test of draws [n] against the probability of each slot, which may be 0.

    With a fixed seed it either always passes or never; `level` is how unlucky the seed may be.
    """
    probability = torch.as_tensor(probability, dtype=torch.float64)
    counts = torch.bincount(index.cpu(), minlength=len(probability)).double()
    assert len(counts) == len(probability), "a slot that does not exist was drawn"
    assert counts[probability == 0].sum() == 0, "a slot of probability 0 was drawn"
    expected = probability * len(index)
    often = expected >= 5  # the others are pooled: the test is not valid for rare outcomes
    observed = torch.cat([counts[often], counts[~often].sum().view(1)])
    expected = torch.cat([expected[often], expected[~often].sum().view(1)])
    if expected[-1] == 0:
        observed, expected = observed[:-1], expected[:-1]
    if len(observed) > 1:
        assert math.isclose(expected.sum(), len(index), rel_tol=1e-8), "no probabilities: their sum"
        chi2 = ((observed - expected).square() / expected).sum()
        freedom = torch.tensor(len(observed) - 1, dtype=torch.float64)
        pvalue = torch.special.gammaincc(freedom / 2, chi2 / 2)
        assert pvalue > level, f"p-value {pvalue}"

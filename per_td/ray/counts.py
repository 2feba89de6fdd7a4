"""The arithmetic of one draw over many shards: pure functions on tensors.

A shard k is drawn with its share s_k of the total mass, as last heard, and in it a transition i
with m_i / T_k, from its mass and the shard's total at that moment. One draw therefore picks i with
probability q_i = s_k m_i / T_k, and weights made from q_i are right also where totals have moved
since. With current totals s_k = T_k / sum_j T_j, and q_i is the probability of equation 1 in Schaul
et al. 2015 (arXiv 1511.05952).
"""

import torch
from torch import Tensor

from per_td.errors import EmptyBufferError


def shares_of(totals: Tensor) -> Tensor:
    """The share of each shard in all draws, float64 [K], from total masses [K]."""
    return totals / totals.sum()


def counts_of(
    totals: Tensor, n: int, draw: str = "independent", generator: torch.Generator | None = None
) -> Tensor:
    """Spread `n` draws over the shards at random, in proportion to the totals.

    Args:
        totals: total masses of the shards, float64 [K], not negative; 0 is never drawn.
        n: number of draws in all shards.
        draw: "independent": multinomial counts; "stratified": one draw in each of n equal parts of
            the sum of the totals, so that a count is within 2 of its expectation.
        generator: source of the random numbers, on the device of `totals`.

    Returns:
        int64 [K], summing to n.

    Raises:
        EmptyBufferError: no total is positive.
    """
    edges = totals.cumsum(0)
    if not edges[-1] > 0:
        raise EmptyBufferError("expected a shard with a positive mass to draw from, got none")
    point = torch.rand(n, dtype=torch.float64, device=totals.device, generator=generator)
    if draw == "stratified":
        point = (torch.arange(n, device=totals.device) + point) / n
    point = point * edges[-1]
    shard = torch.searchsorted(edges, point, right=True)
    last = totals.nonzero()[-1, 0]  # a point may be rounded up to the sum itself
    return torch.bincount(torch.minimum(shard, last), minlength=len(totals))


def probabilities(shard: Tensor, mass: Tensor, *, total: Tensor, counted_with: Tensor) -> Tensor:
    """Probability q of each transition in one draw, float64 [B].

    Args:
        shard: of each transition, int64 [B].
        mass: of each when it was drawn, [B].
        total: mass of its shard at that moment, float64 [B].
        counted_with: total masses from which the counts were drawn, float64 [K]; 0 for shards that
            gave nothing to this batch because they were lost or late.
    """
    # Given that a shard gave nothing, the other counts are multinomial with the remaining shares.
    return shares_of(counted_with)[shard] * mass.double() / total

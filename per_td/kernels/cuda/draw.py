"""Draws from the sum tree on CUDA, and their weights, in Triton.

See `per_td.kernels.reference.find` and `per_td.weights.importance_weights`. Launches depend on
shapes alone and the host never waits, so a CUDA graph can capture them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

POINTS = 32  # points per program: 512 children at a time
FLAT = 256  # independent elements per program


@triton.jit
def _child_at(mass, target):
    """Find the children that hold the points `target` [n], and the sums of the masses before them.

    By the masses [n, 16], it is the first of positive mass whose prefix sum lies above the point;
    at or past the end (rounding) the last of positive mass; child 0 if all masses are 0.
    """
    column = tl.arange(0, 16)[None, :]
    prefix = tl.cumsum(mass, axis=1)
    first = tl.min(tl.where((mass > 0) & (prefix > target[:, None]), column, 16), axis=1)
    last = tl.max(tl.where(mass > 0, column, 0), axis=1)
    child = tl.where(first < 16, first, last)
    before = tl.sum(tl.where(column == child[:, None] - 1, prefix, 0.0), axis=1)
    return child, before


@triton.jit(do_not_specialize=["n"])
def _walk(
    leaves,
    nodes,
    offsets,
    point,
    index,
    mass,
    n,
    DEPTH: tl.constexpr,
    SCALED: tl.constexpr,
    STRATIFIED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Walk from the root, above DEPTH levels, to the leaves, with BLOCK points [n] per program.

    `offsets` are the first nodes of the levels; `index` and `mass` take the leaves. Points lie in
    [0, total), or if SCALED in [0, 1). STRATIFIED moves each into its own of n equal parts of that.
    """
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = lane < n
    column = tl.arange(0, 16)[None, :]
    target = tl.load(point + lane, mask=inside, other=0.0)
    if STRATIFIED:
        target = (lane + target) / n
    if SCALED:
        target = target * tl.load(nodes + tl.load(offsets + DEPTH - 1))
    node = tl.zeros([BLOCK], dtype=tl.int64)
    for k in tl.static_range(DEPTH - 1):  # the children of the root first
        level = nodes + tl.load(offsets + DEPTH - 2 - k)
        child, before = _child_at(tl.load(level + node[:, None] * 16 + column), target)
        target -= before
        node = node * 16 + child
    masses = tl.load(leaves + node[:, None] * 16 + column)
    child, before = _child_at(masses.to(tl.float64), target)
    tl.store(index + lane, node * 16 + child, mask=inside)
    drawn = tl.sum(tl.where(column == child[:, None], masses, 0.0), axis=1)
    tl.store(mass + lane, drawn, mask=inside)


@triton.jit(do_not_specialize=["n"])
def _weigh(mass, unit, size, beta, weight, n, FLAT: tl.constexpr):
    """(mass / unit)^-beta, or with a `size` (mass / unit * size)^-beta, in float64."""
    lane = tl.program_id(0) * FLAT + tl.arange(0, FLAT)
    inside = lane < n
    ratio = tl.load(mass + lane, mask=inside, other=1.0).to(tl.float64)
    ratio = ratio / tl.load(unit).to(tl.float64)
    if size is not None:
        ratio = ratio * tl.load(size).to(tl.float64)
    power = tl.exp(-tl.load(beta).to(tl.float64) * tl.log(ratio))
    tl.store(weight + lane, power.to(tl.float32), mask=inside)


def find(
    leaves: Tensor,
    nodes: Tensor,
    offsets: Tensor,
    point: Tensor,
    *,
    scaled: bool = False,
    stratified: bool = False,
) -> tuple[Tensor, Tensor]:
    """Find the leaves int64 that hold the points float64, and their masses, in one launch.

    See `_walk`; `offsets` is int64 [levels], on the same device.
    """
    point, n = point.contiguous(), point.numel()
    index = torch.empty_like(point, dtype=torch.int64)
    mass = torch.empty_like(point, dtype=torch.float32)
    if n:
        tree, how = (leaves, nodes, offsets), (len(offsets), scaled, stratified, POINTS)
        _walk[(triton.cdiv(n, POINTS),)](*tree, point, index, mass, n, *how)
    return index, mass


def weigh(mass: Tensor, beta: Tensor, unit: Tensor, size: Tensor | None = None) -> Tensor:
    """Importance-sampling weights (mass / unit)^-beta, or (mass / unit * size)^-beta, float32.

    `unit` is the mass that gets the weight 1, or with a `size` (of the buffer) the total; all but
    `mass` are 0-dim.
    """
    mass, n = mass.contiguous(), mass.numel()
    weight = torch.empty_like(mass)
    if n:
        _weigh[(triton.cdiv(n, FLAT),)](mass, unit, size, beta, weight, n, FLAT)
    return weight

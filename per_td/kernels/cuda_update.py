"""Changes to the trees on CUDA, in Triton: few launches, whatever the capacity.

Launches depend on shapes alone and nothing is read back, so all of this can be captured in a CUDA
graph. Results do not depend on the order in which programs run:

- Of equal indices the last one holds. In a first launch every update raises the slot itself, read
  as an unsigned integer, to 2^31 + 1 + its position in the batch: more than any priority that was
  there, which are floats without a sign, and more than any earlier update. In a second launch the
  update whose claim stands writes its priority. That takes no sort, and no memory.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from per_td.kernels.cuda_nodes import Trees, refresh

__all__ = ["assign", "put"]

FLAT = 256  # updates of one program where they are independent

_TINY = tl.constexpr(torch.finfo(torch.float32).tiny)
_HUGE = tl.constexpr(torch.finfo(torch.float32).max)


@triton.jit
def _wanted(index, value, live, size, eps, lane, n, slots):
    """What each update asks for.

    Returns:
        Slots, new values, whether it was refused, and whether it is to be written.
    """
    inside = lane < n
    at = tl.load(index + lane, mask=inside, other=0)
    new = tl.load(value + lane, mask=inside, other=0.0)
    if eps is not None:
        new = tl.abs(new) + tl.load(eps).to(tl.float32)
    limit = slots
    if size is not None:
        limit = tl.load(size)
    right = (at >= 0) & (at < limit) & (new >= 0) & (new <= _HUGE)  # NaN is neither
    written = inside & right
    if live is not None:
        written = written & (tl.load(live + lane, mask=inside, other=0) != 0)
    return at, tl.abs(new), inside & (right == 0), written  # abs: no -0, whose sign bit is set


@triton.jit
def _claim_of(lane):
    return lane.to(tl.uint32) + 0x80000001


@triton.jit(do_not_specialize=["n", "slots"])
def _claim(column, index, value, live, size, eps, n, slots, FLAT: tl.constexpr):
    """Mark the slots [n] in `column` (float32 as uint32) with the last update of each."""
    lane = tl.program_id(0) * FLAT + tl.arange(0, FLAT)
    at, _, _, written = _wanted(index, value, live, size, eps, lane, n, slots)
    tl.atomic_max(column + at, _claim_of(lane), mask=written, sem="relaxed")


@triton.jit(do_not_specialize=["n", "slots"])
def _settle(
    column,
    masses,
    index,
    value,
    live,
    size,
    eps,
    alpha,
    ever_max,
    refused,
    n,
    slots,
    FLAT: tl.constexpr,
):
    """Write the value of every update whose claim stands, and count those refused.

    `masses`, `ever_max` (float32 as int32) and `refused` may be None. FLAT is not less than the
    threads of a program: two threads for one update would each look whether its claim stands.
    """
    lane = tl.program_id(0) * FLAT + tl.arange(0, FLAT)
    at, new, wrong, written = _wanted(index, value, live, size, eps, lane, n, slots)
    # a slot holds the claim of its last update, or what that has written: no other's claim
    written = written & (tl.load(column + at, mask=written, other=0) == _claim_of(lane))
    tl.store(column + at, new.to(tl.uint32, bitcast=True), mask=written)
    if masses is not None:
        base = tl.where(written & (new > 0), new, 1.0).to(tl.float64)
        mass = tl.exp(tl.log(base) * tl.load(alpha))
        mass = tl.minimum(tl.maximum(mass, _TINY), _HUGE).to(tl.float32)
        tl.store(masses + at, tl.where(new > 0, mass, 0.0), mask=written)
    if ever_max is not None:
        largest = tl.max(tl.where(written, new, 0.0), axis=0)  # without a sign, as integers
        tl.atomic_max(ever_max, largest.to(tl.int32, bitcast=True), sem="relaxed")
    if refused is not None:
        tl.atomic_add(refused, tl.sum(wrong.to(tl.int64), axis=0), sem="relaxed")


def put(trees: Trees, index: Tensor, value: Tensor) -> None:
    """Set the masses of the leaves `index` [B], one after the other; nodes above follow.

    Skipped are indices that no leaf has but the spare one, and values that are negative, infinite
    or NaN.

    Args:
        trees: only the sums.
        index: int64 [B].
        value: float32 [B].
    """
    n = len(index)
    if not n:
        return
    index, value = index.contiguous(), value.contiguous()
    column = trees.sums[0].view(torch.uint32)
    grid, slots = (triton.cdiv(n, FLAT),), trees.layout.capacity
    given = (index, value, None, None, None)
    _claim[grid](column, *given, n, slots, FLAT)
    _settle[grid](column, None, *given, None, None, None, n, slots, FLAT)
    refresh(trees, index)


def assign(
    trees: Trees,
    raw: Tensor,
    index: Tensor,
    value: Tensor,
    *,
    alpha: Tensor,
    ever_max: Tensor,
    eps: Tensor | None = None,
    live: Tensor | None = None,
    size: Tensor | int | None = None,
    refused: Tensor | None = None,
) -> None:
    """Set the priorities of the slots `index` [B], one after the other; masses and nodes follow.

    Args:
        trees: the sums of the masses, the largest of the priorities, and any others.
        raw: the priorities, float32 [leaf_slots].
        index: int64 [B].
        value: TD errors, or where `eps` is None priorities, float32 [B].
        alpha: exponent of the priorities, float64, 0-dim.
        ever_max: takes up the largest priority written, float32, 0-dim.
        eps: added to |TD error|, float64, 0-dim.
        live: bool [B], False for updates to be dropped; None drops none.
        size: how many slots may be named, a number or int64, 0-dim; None stands for all.
        refused: to count updates whose slot or priority is out of range or NaN, int64, 0-dim.
    """
    n = len(index)
    if not n:
        return
    index, value = index.contiguous(), value.contiguous()
    live = None if live is None else live.contiguous()
    column, masses = raw.view(torch.uint32), trees.sums[0]
    grid, slots = (triton.cdiv(n, FLAT),), trees.layout.capacity
    if isinstance(size, int):
        slots, size = size, None
    given = (index, value, live, size, eps)
    _claim[grid](column, *given, n, slots, FLAT)
    counters = (ever_max.view(torch.int32), refused)
    _settle[grid](column, masses, *given, alpha, *counters, n, slots, FLAT)
    refresh(trees, index)

"""The operations of `per_td.kernels.reference` on CUDA: Triton where there is a kernel, else torch.

The host never waits for a value.
"""

from typing import Any

import torch
from torch import Tensor

from per_td.kernels import reference
from per_td.kernels.cuda import draw as draws
from per_td.kernels.cuda import update
from per_td.kernels.cuda.update import Kinds
from per_td.kernels.parts import EPS, Distribution, Trees
from per_td.kernels.reference import (
    Runs,
    draw_distinct,
    for_new,
    gather,
    mark_replayed,
    refill,
    store_frames,
    write_rows,
)

__all__ = [
    "assign",
    "assign_new",
    "draw",
    "draw_distinct",
    "find",
    "for_new",
    "gather",
    "mark_replayed",
    "refill",
    "set_masses",
    "store_frames",
    "weigh",
    "write_rows",
]


def _kinds(trees: Trees) -> Kinds:
    maxima = (trees.raw, trees.maxima) if len(trees.raw) else None
    minima = (trees.leaves, trees.minima) if trees.keeps_minima else None
    return Kinds(trees.layout, (trees.leaves, trees.sums), maxima, minima)


def set_masses(trees: Trees, index: Tensor, value: Tensor) -> None:
    """See `reference.set_masses`."""
    layout = trees.layout
    leaf = index.view(layout.groups, -1)
    if layout.groups > 1:  # -1 stands for what is no slot
        right = (leaf >= 0) & (leaf < layout.capacity)
        leaf = torch.where(right, leaf + trees.starts, -1)
    sums = Kinds(layout, (trees.leaves, trees.sums))
    update.put(sums, leaf.flatten(), value.reshape(-1))


def assign_new(trees: Trees, distribution: Distribution, runs: Runs, *, ever_max: bool) -> None:
    """See `reference.assign_new`."""
    _assign(trees, *reference.begin_runs(trees, runs, ever_max=ever_max))


def _assign(
    trees: Trees,
    leaf: Tensor,
    value: Tensor,
    *,
    add_eps: bool = False,
    live: Tensor | None = None,
    **given: Any,
) -> Tensor | int:
    """Run `update.assign`; its kernel tracks the largest ever of a single tree only."""
    many = trees.layout.groups > 1
    dropped = update.assign(
        _kinds(trees),
        trees.raw,
        leaf,
        value,
        alpha=trees.exponents,
        ever_max=None if many else trees.ever_max,
        eps=trees.settings[EPS] if add_eps else None,
        live=live,
        **given,
    )
    if many:
        torch.maximum(trees.ever_max, trees.largest, out=trees.ever_max)
    return dropped


def assign(
    trees: Trees,
    distribution: Distribution,
    index: Tensor,
    value: Tensor | None,
    *,
    written: Tensor | int,
    limit: int,
    generation: Tensor | None = None,
    stamps: Tensor | None = None,
    mask: Tensor | None = None,
    add_eps: bool = False,
    squared: bool = False,
    new: bool = False,
    ever_max: bool = False,
) -> Tensor | int:
    """See `reference.assign`."""
    layout, refused = trees.layout, trees.refused
    slot = index.view(layout.groups, -1)
    if value is None:
        value = for_new(trees, ever_max=ever_max).unsqueeze(-1).expand(slot.shape)
    value = value.reshape(-1)
    if squared or not add_eps:  # else the kernel does
        value = value.abs()
    value = value.sqrt() if squared else value
    ever = written.view(layout.groups, 1) if isinstance(written, Tensor) else written
    size = reference.sizes(ever, limit)
    if layout.groups == 1 and stamps is None and mask is None and not new:
        return _assign(
            trees,
            slot.view(-1),
            value,
            add_eps=add_eps,
            size=size.view(()) if isinstance(size, Tensor) else size,
            generation=None if generation is None else generation.view(-1),
            written=None if generation is None else _number(written, refused),
            refused=refused,
        )
    live, right = None, (slot >= 0) & (slot < size)
    leaf = torch.where(right, slot + trees.starts, -1)  # the kernel refuses and counts -1
    if mask is not None:  # but masked updates are not counted, whatever their index
        live = mask.view(slot.shape)
        leaf, value = torch.where(live, leaf, 0), torch.where(mask.reshape(-1), value, 0.0)
    stale: Tensor | int = 0
    if generation is not None:
        if stamps is None:
            now = reference.generations(slot, ever, layout.capacity)
        else:
            now = stamps[torch.where(right, slot, 0)]
        late = generation.view(slot.shape) != now
        late = late if live is None else live & late
        live, stale = ~late if live is None else live & ~late, late.sum()
    if new and len(trees.replayed):
        written_to = right if live is None else right & live
        kept = torch.where(written_to & value.isfinite(), slot, layout.spare)
        mark_replayed(trees, kept, drawn=False)
    live = None if live is None else live.flatten()
    _assign(trees, leaf.flatten(), value, add_eps=add_eps, live=live, refused=refused)
    return stale


def _number(value: Tensor | int, like: Tensor) -> Tensor:
    """Convert a number to int64 [] on the device."""
    return value.view(()) if isinstance(value, Tensor) else torch.full_like(like, value)


def find(trees: Trees, target: Tensor) -> tuple[Tensor, Tensor]:
    """See `reference.find`."""
    if trees.layout.groups > 1:
        return reference.find(trees, target)
    return draws.find(trees.leaves, trees.sums, _offsets(trees), target)


def _offsets(trees: Trees) -> Tensor:
    """First node of each level, int64 [levels], on the device; made once."""
    if trees.block.record is None:
        offsets = trees.block.record = trees.starts.new_empty(len(trees.layout.offsets))
        for place, offset in zip(offsets, trees.layout.offsets, strict=True):
            place.fill_(offset)  # a copy from the host would wait
    record: Tensor = trees.block.record
    return record


def draw(
    trees: Trees,
    point: Tensor,
    *,
    stratified: bool,
    beta: Tensor | float,
    normalization: str,
    written: Tensor | int,
) -> tuple[Tensor, Tensor] | None:
    """See `reference.draw`."""
    if trees.layout.groups > 1:
        target = reference.scaled(point, trees.total, stratified=stratified)
        index, mass = reference.find(trees, target)
    else:
        tree = trees.leaves, trees.sums, _offsets(trees)
        index, mass = draws.find(*tree, point, scaled=True, stratified=stratified)
    mark_replayed(trees, index)
    return index, weigh(trees, mass, beta=beta, normalization=normalization, written=written)


def weigh(
    trees: Trees, mass: Tensor, *, beta: Tensor | float, normalization: str, written: Tensor | int
) -> Tensor:
    """See `reference.weigh`."""
    if trees.layout.groups > 1 or not isinstance(beta, Tensor):
        return reference.weigh(trees, mass, beta=beta, normalization=normalization, written=written)
    if normalization == "none":
        size = reference.sizes(written, trees.layout.capacity)
        return draws.weigh(mass, beta, trees.sums[-1], _number(size, trees.refused))
    return draws.weigh(mass, beta, mass.amin() if normalization == "batch" else trees.minima[-1])

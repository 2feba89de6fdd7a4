"""The list of operations on CUDA: Triton where a kernel exists, plain torch elsewhere.

The operations of `per_td.kernels.reference`, with the same arguments. Nothing is read back.
"""

import torch
from torch import Tensor

from per_td.kernels import reference
from per_td.kernels.cuda import draw as draws
from per_td.kernels.cuda import update
from per_td.kernels.cuda.nodes import Kinds
from per_td.kernels.flags import ALPHA, EPS
from per_td.kernels.parts import Distribution, Trees
from per_td.kernels.reference import (
    Runs,
    draw_distinct,
    for_new,
    gather,
    mark_replayed,
    refill,
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
    "weigh",
    "write_rows",
]


def _kinds(trees: Trees) -> Kinds:
    maxima = (trees.raw, trees.maxima) if len(trees.raw) else None
    minima = (trees.leaves, trees.minima) if trees.keeps_minima else None
    return Kinds(trees.layout, (trees.leaves, trees.sums), maxima, minima)


def _leaves(trees: Trees, index: Tensor) -> Tensor:
    """Slots [S, B] as leaves, flattened; -1 for what is no slot."""
    slot, layout = index.view(trees.layout.groups, -1), trees.layout
    if layout.groups == 1:
        return slot.view(-1)
    right = (slot >= 0) & (slot < layout.capacity)
    return torch.where(right, slot + trees.starts, -1).flatten()


def set_masses(trees: Trees, index: Tensor, value: Tensor) -> None:
    """As `reference.set_masses`."""
    kinds = Kinds(trees.layout, (trees.leaves, trees.sums))
    update.put(kinds, _leaves(trees, index), value.reshape(-1))


def assign_new(trees: Trees, distribution: Distribution, runs: Runs, *, ever_max: bool) -> None:
    """As `reference.assign_new`."""
    index = []
    for s in range(trees.layout.groups):
        start, n = runs[2 * s : 2 * s + 2]
        slot = torch.arange(start, start + n, device=trees.device)
        index.append(slot.remainder_(trees.layout.capacity) + s * trees.layout.stride)
    new = for_new(trees, ever_max=ever_max)
    value = [each.expand(len(slot)) for each, slot in zip(new, index, strict=True)]
    _write(trees, torch.cat(index), torch.cat(value), new=True)


def _write(
    trees: Trees, leaf: Tensor, value: Tensor, *, new: bool, live: Tensor | None = None
) -> None:
    """Write priorities of leaves [n]; where `live` is False, nothing is."""
    if new and len(trees.replayed):
        kept = leaf if live is None else torch.where(live, leaf, trees.layout.spare)
        trees.replayed.index_fill_(0, kept, False)
    update.assign(
        _kinds(trees),
        trees.raw,
        leaf,
        value,
        alpha=trees.settings[ALPHA],
        ever_max=trees.ever_max,
        live=live,
    )
    _note_largest(trees)


def _note_largest(trees: Trees) -> None:
    """Of many trees, each has its own; the kernel raises that of a single one."""
    if trees.layout.groups > 1:
        largest = trees.layout.tops(trees.maxima).amax(-1)
        torch.maximum(trees.ever_max, largest, out=trees.ever_max)


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
    """As `reference.assign`."""
    layout = trees.layout
    slot = index.view(layout.groups, -1)
    if value is None:
        value = for_new(trees, ever_max=ever_max).unsqueeze(-1).expand(slot.shape)
    value = value.reshape(-1)
    value = value.abs().sqrt() if squared else value
    if new:
        live = None if mask is None else mask.reshape(-1)
        leaf = _leaves(trees, index)
        _write(
            trees, leaf if live is None else torch.where(live, leaf, 0), value, new=True, live=live
        )
        return 0
    wanted = None if mask is None else mask.view(slot.shape)
    size: Tensor | int
    ever: Tensor | int = written
    if isinstance(written, Tensor):
        ever = written.view(layout.groups, 1)
        size = ever.clamp(max=limit)
    else:
        size = min(written, limit)
    simple = layout.groups == 1 and stamps is None and mask is None
    if simple:
        return update.assign(
            _kinds(trees),
            trees.raw,
            slot.view(-1),
            value,
            alpha=trees.settings[ALPHA],
            ever_max=trees.ever_max,
            eps=trees.settings[EPS] if add_eps else None,
            size=size.view(()) if isinstance(size, Tensor) else size,
            generation=None if generation is None else generation.view(-1),
            written=_number(written, trees.refused) if generation is not None else None,
            refused=trees.refused,
        )
    right = (slot >= 0) & (slot < size)
    live = torch.ones_like(right) if wanted is None else wanted
    stale: Tensor | int = 0
    if generation is not None:
        now = reference.generations(slot, ever, layout.capacity) if stamps is None else stamps[slot]
        late = live & (generation.view(slot.shape) != now)
        live, stale = live & ~late, late.sum()
    # a wanted index that is no filled slot is refused, and counted, by the kernel
    leaf = torch.where(right, slot + trees.starts, -1)
    leaf = leaf if wanted is None else torch.where(wanted, leaf, 0)
    clean = value if wanted is None else torch.where(wanted.view(-1), value, 0.0)
    update.assign(
        _kinds(trees),
        trees.raw,
        leaf.flatten(),
        clean,
        alpha=trees.settings[ALPHA],
        ever_max=trees.ever_max,
        eps=trees.settings[EPS] if add_eps else None,
        live=live.flatten(),
        refused=trees.refused,
    )
    _note_largest(trees)
    return stale


def _number(value: Tensor | int, like: Tensor) -> Tensor:
    """A number as int64 [] on the device."""
    return value.view(()) if isinstance(value, Tensor) else torch.full_like(like, value)


def find(trees: Trees, target: Tensor) -> tuple[Tensor, Tensor]:
    """As `reference.find`."""
    if trees.layout.groups > 1:
        return reference.find(trees, target)
    found = draws.find(trees.leaves, trees.sums, _offsets(trees), target.reshape(-1))
    index, mass = (part.view(target.shape) for part in found)
    return index, mass


def _offsets(trees: Trees) -> Tensor:
    """Where each level begins among the nodes, int64 [levels], on the device; made once."""
    if trees.block.record is None:
        offsets = torch.tensor(trees.layout.offsets, dtype=torch.int64, device="cpu")
        trees.block.record = offsets.to(trees.device)
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
    """As `reference.draw`."""
    if trees.layout.groups > 1:
        return reference.draw(
            trees,
            point,
            stratified=stratified,
            beta=beta,
            normalization=normalization,
            written=written,
        )
    tree = trees.leaves, trees.sums, _offsets(trees)
    index, mass = draws.draw(*tree, point.reshape(-1), stratified=stratified)
    index, mass = index.view(point.shape), mass.view(point.shape)
    mark_replayed(trees, index)
    return index, weigh(trees, mass, beta=beta, normalization=normalization, written=written)


def weigh(
    trees: Trees,
    mass: Tensor,
    *,
    beta: Tensor | float,
    normalization: str,
    written: Tensor | int,
) -> Tensor:
    """As `reference.weigh`."""
    if trees.layout.groups > 1 or not isinstance(beta, Tensor):
        return reference.weigh(trees, mass, beta=beta, normalization=normalization, written=written)
    flat = mass.reshape(-1)
    if normalization == "none":
        size = reference.sizes(written, trees.layout.capacity)
        weight = draws.weigh(flat, beta, trees.sums[-1], _number(size, trees.refused))
    else:
        unit = flat.amin() if normalization == "batch" else trees.minima[-1]
        weight = draws.weigh(flat, beta, unit)
    return weight.view(mass.shape)

"""Draws from the newest transitions only, exactly, without touching the trees.

The newest n transitions are a run of slots, around the end of the ring. The run is cut into the
largest whole nodes of the trees, some 30 of each level. A draw chooses one of these by its sum, and
walks down from there: O(B log N).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from per_td.draws import prefix_sums
from per_td.kernels.parts import FANOUT
from per_td.kernels.reference import _child_at as child_at
from per_td.kernels.reference import _left as left_of
from per_td.tree.trees import Trees

_MOST = 2 * (FANOUT - 1)
"""Most nodes of a level in a part of a run that covers no whole node of the next level."""


class Window(NamedTuple):
    """The nodes that cover a run of slots of each tree.

    Attributes:
        trees: the trees.
        node: int64 [S, K], counted from the first of its level.
        height: level of each column, 0 for leaves, int64 [K].
        prefix: prefix sums of the nodes' masses, float64 [S, K]; a node outside the run adds 0.
        inside: False for a node outside the run, bool [S, K].
    """

    trees: Trees
    node: Tensor
    height: Tensor
    prefix: Tensor
    inside: Tensor

    @property
    def total(self) -> Tensor:
        """Sum of the masses in the run, float64 [S, 1]."""
        return self.prefix[:, -1:]


def window_of(trees: Trees, first: Tensor, length: Tensor) -> Window:
    """Cover runs of slots by nodes: first slot and length, around the end, int64 [S, 1] each."""
    layout, capacity = trees.layout, trees.layout.capacity
    end = first + length
    begin = torch.cat([first, torch.zeros_like(first)], 1)
    end = torch.cat([end.clamp(max=capacity), (end - capacity).clamp(min=0)], 1)
    levels = [trees.leaves, *layout.levels(trees.sums)]
    nodes, masses, heights, insides = [], [], [], []
    for height in range(layout.height + 1):
        base = (trees.starts // FANOUT**height).unsqueeze(-1)
        above = height < layout.height
        low, high = -(-begin // FANOUT), end // FANOUT
        whole = (low < high) & above  # the level above takes what lies between
        parts = (
            (begin, torch.where(whole, FANOUT * low, end), _MOST if above else layout.width),
            (torch.where(whole, FANOUT * high, end), end, FANOUT - 1 if above else 0),
        )
        for start, stop, most in parts:
            node = start.unsqueeze(-1) + torch.arange(most, device=trees.device)
            inside = node < stop.unsqueeze(-1)
            node = torch.where(inside, node, 0) + base
            nodes.append(node.flatten(1))
            insides.append(inside.flatten(1))
            masses.append(torch.where(inside, levels[height][node].double(), 0.0).flatten(1))
            heights += [height] * nodes[-1].shape[1]
        begin, end = torch.where(whole, low, 0), torch.where(whole, high, 0)
    prefix = prefix_sums(torch.cat(masses, 1))
    levels_of = _numbers(heights, trees.device)
    return Window(trees, torch.cat(nodes, 1), levels_of, prefix, torch.cat(insides, 1))


def _numbers(values: list[int], device: torch.device) -> Tensor:
    """A tensor of these ascending numbers; one made from a list would make the host wait."""
    parts = [
        torch.full((values.count(value),), value, dtype=torch.int64, device=device)
        for value in sorted(set(values))
    ]
    return torch.cat(parts)


def find_in(window: Window, point: Tensor) -> tuple[Tensor, Tensor]:
    """Find the slots at points in [0, total of the run), float64 [S, B].

    Slots are int64, and their masses float32, [S, B].
    """
    trees, layout = window.trees, window.trees.layout
    chosen = child_at(window.prefix, point)
    point = left_of(window.prefix, point, chosen).view(-1, 1)
    node, level = window.node.gather(1, chosen).view(-1), window.height[chosen].view(-1)
    levels = [trees.leaves, *layout.levels(trees.sums)]
    for height in range(layout.height, 0, -1):
        walks = level >= height
        children = levels[height - 1].view(-1, FANOUT).index_select(0, torch.where(walks, node, 0))
        prefix = children.cumsum(-1, dtype=torch.float64)
        step = child_at(prefix, point)
        point = torch.where(walks.unsqueeze(-1), left_of(prefix, point, step), point)
        node = torch.where(walks, FANOUT * node + step.view(-1), node)
    slot = node.view(layout.groups, -1) - trees.starts
    return slot, trees.leaves[node].view(slot.shape)


def smallest_in(window: Window) -> Tensor:
    """The smallest positive mass in the run, of trees that keep minima, float32 [S, 1]."""
    trees, found = window.trees, []
    for height, level in enumerate([trees.leaves, *trees.layout.levels(trees.minima)]):
        here = window.height == height
        mass = level[torch.where(here, window.node, 0)]
        mass = torch.where(here & window.inside & (mass > 0), mass, torch.inf)
        found.append(mass.amin(1, keepdim=True))
    return torch.cat(found, 1).amin(1, keepdim=True)

"""Operations on the wide trees in plain torch, on any device: the truth that kernels must match.

Pure functions on the leaves [leaf_slots] and on the list of levels above them (see `layout`).
None of them reads a value back to the host.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from per_td import validation
from per_td.tree.layout import FANOUT

__all__ = [
    "check_nodes",
    "draw_distinct",
    "draw_distinct_each",
    "find",
    "find_each",
    "keep_last",
    "refresh",
    "refresh_all",
    "sum_children",
]

Reduce = Callable[[Tensor], Tensor]


def sum_children(children: Tensor) -> Tensor:
    """Sum groups of children [n, 16] to [n], in float64."""
    return children.sum(-1, dtype=torch.float64)


def keep_last(index: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Give every occurrence of an index the value of its last one.

    Writing the result in any order, or in parallel, leaves what a sequential loop would leave.

    Args:
        index: int64 [B].
        value: [B].

    Returns:
        The indices sorted, and the values to write there, [B] each.
    """
    ordered, order = index.sort(stable=True)
    last = torch.searchsorted(ordered, ordered, right=True) - 1
    return ordered, value[order[last]]


def refresh(leaves: Tensor, levels: list[Tensor], index: Tensor, reduce: Reduce) -> None:
    """Recompute all ancestors of the leaves `index` [B] from their children."""
    children = leaves
    for level in levels:
        groups = children.view(-1, FANOUT)
        if index.numel() < groups.shape[0]:
            index = index // FANOUT
            level[index] = reduce(groups.index_select(0, index))
        else:  # as many updates as nodes: the whole level is cheaper, and so are those above
            level[: groups.shape[0]] = reduce(groups)
        children = level


def refresh_all(leaves: Tensor, levels: list[Tensor], reduce: Reduce) -> None:
    """Recompute every node from the leaves, in O(N)."""
    children = leaves
    for level in levels:
        groups = children.view(-1, FANOUT)
        level[: groups.shape[0]] = reduce(groups)
        children = level


def check_nodes(
    name: str,
    leaves: Tensor,
    levels: list[Tensor],
    reduce: Reduce,
    *,
    padding: float = 0.0,
    rtol: float = 0.0,
) -> None:
    """Compare every node with what its children give, in O(N); the host waits for the device.

    Args:
        name: of the nodes, for the error.
        leaves, levels, reduce: as for `refresh_all`.
        padding: value of the nodes without children.
        rtol: how far the last bits may be off, relatively.

    Raises:
        PerTdError: a node does not follow from its children.
    """
    children = leaves
    for height, level in enumerate(levels, 1):
        groups = children.view(-1, FANOUT)
        expected = torch.full_like(level, padding)
        expected[: groups.shape[0]] = reduce(groups)
        validation.require_valid(
            torch.isclose(level, expected, rtol=rtol, atol=0.0).all(),
            f"every node of the {name} follows from its 16 children; level {height} does not",
        )
        children = level


def _child_at(prefix: Tensor, target: Tensor) -> Tensor:
    """Which of 16 children holds the point `target` [n], given their prefix sums [n, 16].

    The first child whose prefix sum lies above the point. Such a child has a positive mass, which
    is why a mass of 0 is never drawn; a point at or past the end (rounding) is moved inside first.
    Where all 16 masses are 0, child 0.
    """
    inside = torch.minimum(target, torch.nextafter(prefix[:, -1], torch.zeros_like(target)))
    return (prefix <= inside.unsqueeze(-1)).sum(-1).remainder_(FANOUT)


def find(
    leaves: Tensor, levels: list[Tensor], target: Tensor, node: Tensor | None = None
) -> Tensor:
    """Walk down the sum tree to the leaves in which the cumulative masses reach `target`.

    Args:
        leaves: masses, float32 [leaf_slots].
        levels: their sums, float64, from the leaves up.
        target: points in [0, mass of the node to start from), float64 [B].
        node: where to start, nodes of the last of the levels, int64 [B]; None: at the root.

    Returns:
        Leaves, int64 [B].
    """
    node = torch.zeros_like(target, dtype=torch.int64) if node is None else node
    for children in (*reversed(levels[:-1]), leaves):
        prefix = children.view(-1, FANOUT).index_select(0, node).cumsum(-1, dtype=torch.float64)
        step = _child_at(prefix, target).unsqueeze(-1)
        before = torch.nn.functional.pad(prefix, (1, 0)).gather(-1, step).squeeze(-1)
        target = target - before
        node = node * FANOUT + step.squeeze(-1)
    return node


def _exponential(like: Tensor, shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    """Times ~ Exp(1), float64, on the device of `like`."""
    out = torch.empty(shape, dtype=torch.float64, device=like.device)
    return out.exponential_(generator=generator)


def _arrivals(
    children: Tensor, node: Tensor, arrival: Tensor, generator: torch.Generator | None
) -> Tensor:
    """When the 16 children of each `node` [n] arrive, the first of them at `arrival` [n]: [n, 16].

    See `draw_distinct`.
    """
    groups = children.view(-1, FANOUT)
    node = node.clamp(max=len(groups) - 1)  # nodes that never arrive may lie in the padding
    mass = groups.index_select(0, node).double()
    prefix = mass.cumsum(-1)
    point = torch.rand(node.shape, dtype=torch.float64, device=node.device, generator=generator)
    first = _child_at(prefix, point * prefix[:, -1]).unsqueeze(-1)
    later = _exponential(node, (len(node), FANOUT), generator) / mass
    arrivals = (arrival.unsqueeze(-1) + later).scatter_(1, first, arrival.unsqueeze(-1))
    return arrivals.masked_fill_(mass <= 0, torch.inf)


def draw_distinct(
    leaves: Tensor, levels: list[Tensor], n: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Draw `n` different leaves, exactly as one-by-one draws without replacement would.

    Let every leaf arrive at a time ~ Exp(mass): the order of arrival is the order of sequential
    draws without replacement. A node's first arrival is ~ Exp(sum), is that of one child drawn in
    proportion to mass, and the other children arrive later by independent Exp(mass) (exponentials
    have no memory). So the first n arrivals are found level by level, keeping n nodes on each:
    O(n log N) without touching the tree. (Kool et al. 2019, arXiv 1903.06059, section 4.1, do the
    same with Gumbel variables.)

    Args:
        leaves: masses, float32 [leaf_slots].
        levels: their sums, float64, from the leaves up.
        n: how many, at most `leaf_slots`.
        generator: source of the random numbers, on the same device.

    Returns:
        Leaves int64 [n] in the order drawn, and their arrival times float64 [n]: infinite where
        fewer than n leaves have a positive mass.
    """
    node = torch.zeros(1, dtype=torch.int64, device=leaves.device)
    arrival = _exponential(node, (1,), generator) / levels[-1]
    for children in (*reversed(levels[:-1]), leaves):
        arrivals = _arrivals(children, node, arrival, generator).flatten()
        arrival, best = arrivals.topk(min(n, arrivals.numel()), largest=False, sorted=True)
        node = node[best // FANOUT] * FANOUT + best % FANOUT
    return node, arrival


def find_each(leaves: Tensor, levels: list[Tensor], tops: Tensor, target: Tensor) -> Tensor:
    """`find` in S trees that lie side by side.

    Args:
        leaves: masses, float32 [leaf_slots].
        levels: their sums, float64, from the leaves up to the level of `tops`.
        tops: the highest nodes of each tree, a view of the last level, [S, c].
        target: points in [0, total of their tree), float64 [S, B].

    Returns:
        Leaves, int64 [S, B].
    """
    width = tops.shape[1]
    prefix = tops.cumsum(-1)
    inside = torch.minimum(target, torch.nextafter(prefix[:, -1:], torch.zeros_like(target)))
    step = torch.searchsorted(prefix, inside, right=True).remainder_(width)  # as in `_child_at`
    before = torch.nn.functional.pad(prefix, (1, 0)).gather(-1, step)
    node = step + _starts(tops)
    return find(leaves, levels, (target - before).flatten(), node.flatten()).view(target.shape)


def draw_distinct_each(
    leaves: Tensor,
    levels: list[Tensor],
    tops: Tensor,
    n: int,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    """`draw_distinct` in S trees that lie side by side, see `find_each`: [S, n] both.

    `n` is at most the number of leaves of a tree.
    """
    arrivals = _exponential(tops, (len(tops), tops.shape[1]), generator) / tops
    arrivals = arrivals.masked_fill_(tops <= 0, torch.inf)
    arrival, best = arrivals.topk(min(n, tops.shape[1]), largest=False, sorted=True)
    node = best + _starts(tops)
    for children in (*reversed(levels[:-1]), leaves):
        arrivals = _arrivals(children, node.flatten(), arrival.flatten(), generator)
        arrivals = arrivals.view(len(tops), -1)
        arrival, best = arrivals.topk(min(n, arrivals.shape[1]), largest=False, sorted=True)
        node = node.gather(1, best // FANOUT) * FANOUT + best % FANOUT
    return node, arrival


def _starts(tops: Tensor) -> Tensor:
    """The first of the highest nodes of each tree, int64 [S, 1]."""
    count, width = tops.shape
    return torch.arange(0, count * width, width, device=tops.device).unsqueeze(-1)

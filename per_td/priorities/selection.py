"""Selections: draws other than in proportion to mass from everything, with their weights.

A weight always comes from the probability that was really used.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from per_td import validation
from per_td.draws import uniform_like
from per_td.errors import ConfigurationError, EmptyBufferError
from per_td.priorities.table import PriorityTable
from per_td.priorities.windows import Window, find_in, smallest_in, window_of
from per_td.tree.trees import Trees
from per_td.weights import importance_weights

BY = ("priority", "uniform", "inverse")


class Selection(NamedTuple):
    """How to draw; see `PrioritizedReplayBuffer` and its `sample`.

    Attributes:
        by: one of `BY`.
        newest: draw among so many newest transitions; None: among all.
        latest: so many newest transitions take the last places of every batch.
    """

    by: str = "priority"
    newest: int | None = None
    latest: int = 0

    @classmethod
    def of(cls, by: str, newest: int | None, latest: int, draw: str) -> "Selection":
        """Check and make one.

        Raises:
            ConfigurationError: a value is none of those accepted, or two exclude each other.
        """
        by = validation.one_of("by", by, BY)
        newest = None if newest is None else validation.positive_int("newest", newest)
        if draw == "without_replacement" and (newest or latest):
            name, value = ("newest", newest) if newest else ("latest", latest)
            raise ConfigurationError(
                f"{name}: expected none with draw='without_replacement', got {value}"
            )
        return cls(by, newest, latest)


def sample_selected(
    table: PriorityTable,
    n: int,
    generator: torch.Generator | None,
    selection: Selection,
    *,
    beta: Tensor | float,
    written: Tensor | int,
) -> tuple[Tensor, Tensor]:
    """Draw slots, mark them as replayed, and compute their weights.

    Args:
        table: the priorities.
        n: slots to draw from each group, more than `selection.latest`.
        generator: source of the random numbers, on the table's device.
        selection: how to draw.
        beta: exponent of the weights, one number, or [S].
        written: number of transitions ever written, int64 [S], or one number for all.

    Returns:
        Slots int64 and weights float32, [n] or [S, n].

    Raises:
        ConfigurationError: `n` is too small.
        EmptyBufferError: too few slots can be drawn, or none.
    """
    by, newest, latest = selection
    if n <= latest:
        raise ConfigurationError(f"batch_size: expected more than latest={latest}, got {n}")
    trees, device, share = table.trees, table.device, table.uniform_mix
    if isinstance(written, Tensor):
        ever = written.view(-1)
    else:
        ever = torch.full((trees.layout.groups,), written, dtype=torch.int64, device=device)
    age = Age(ever.unsqueeze(-1), table.capacity)
    among = None if newest is None else age.size.clamp(max=newest)
    parts = [(1.0, trees if by == "priority" else table.side(by).trees)]
    if by == "priority" and share:
        parts = [(1 - share, trees), (share, table.side("uniform").trees)]
    drawn = [_draw(table, part, n, generator, age, among) for _, part in parts]
    slot = drawn[0].slot
    if len(drawn) > 1:
        like = torch.empty(slot.shape, dtype=torch.float64, device=device)
        slot = torch.where(uniform_like(like, generator) < share, drawn[1].slot, slot)
    k: Tensor | int = 0
    if latest:
        slot, k = _with_latest(table, slot, latest, age)
    probability = torch.zeros(slot.shape, dtype=torch.float64, device=device)
    smallest = torch.zeros_like(probability[:, :1])
    for (of_all, part), (_, total, least) in zip(parts, drawn, strict=True):
        probability += of_all * part.leaves[slot + trees.starts].double() / total
        smallest += of_all * least / total
    if latest:  # the balance heuristic of Veach & Guibas 1995
        if among is not None:
            probability = torch.where(age.of(slot) < among, probability, 0.0)
        probability = ((n - k) * probability + (age.of(slot) < latest)) / n
        smallest = smallest * (n - k) / n
    trees.ops.mark_replayed(trees, slot)
    normalization = table.weight_normalization
    if normalization == "batch":
        smallest, normalization = probability.amin(-1, keepdim=True), "buffer"
    weight = importance_weights(
        probability,
        beta.unsqueeze(-1) if isinstance(beta, Tensor) and beta.ndim else beta,
        total=torch.ones((), dtype=torch.float64, device=device),
        size=age.size if among is None else among,
        smallest=smallest,
        normalization=normalization,
    )
    shape = *table.lead, n
    return slot.view(shape), weight.view(shape)


class Age:
    """Ages of the transitions in slots: 0 is the newest.

    Args:
        ever: number of transitions ever written, int64 [S, 1].
        capacity: number of slots of each ring.
    """

    def __init__(self, ever: Tensor, capacity: int) -> None:
        self.ever, self.capacity = ever, capacity
        self.size = ever.clamp(max=capacity)
        """Number of filled slots, int64 [S, 1]."""

    def of(self, slot: Tensor) -> Tensor:
        """Ages of slots [S, B]; of empty ones, at least the number of filled ones."""
        return (self.ever - 1 - slot) % self.capacity

    def slot(self, age: Tensor) -> Tensor:
        """Slots of the transitions of these ages, [B] -> [S, B]."""
        return (self.ever - 1 - age) % self.capacity


class _Drawn(NamedTuple):
    """Slots drawn in proportion to the masses of some trees.

    Attributes:
        slot: int64 [S, B].
        total: sum of the masses that could be drawn, float64 [S, 1].
        smallest: the smallest positive one, float64 [S, 1]; inf where no weight needs it.
    """

    slot: Tensor
    total: Tensor
    smallest: Tensor


def _draw(
    table: PriorityTable,
    trees: Trees,
    n: int,
    generator: torch.Generator | None,
    age: Age,
    newest: Tensor | None,
) -> _Drawn:
    """Draw in proportion to the masses of `trees`.

    Args:
        table: its settings say how to draw.
        trees: those of the table, or some on its side.
        n, generator: see `sample_selected`.
        age: of the transitions.
        newest: number of the transitions to draw from, int64 [S, 1]; None: all.
    """
    window = None if newest is None else window_of(trees, age.slot(newest - 1), newest)
    total = trees.total.unsqueeze(-1) if window is None else window.total
    if validation.can_raise(total) and not (total > 0).all():
        raise EmptyBufferError(trees.nothing_to_draw(total.view(-1)))
    smallest = _smallest(table, trees, age, newest, window)
    if table.draw == "without_replacement":
        return _Drawn(trees.draw_distinct(n, generator)[0], total, smallest)
    like = torch.empty(len(total), n, dtype=torch.float64, device=table.device)
    point = uniform_like(like, generator)
    if table.draw == "stratified":
        point = (torch.arange(n, device=table.device) + point) / n
    point = point * total
    found = trees.ops.find(trees, point) if window is None else find_in(window, point)
    return _Drawn(found[0], total, smallest)


def _smallest(
    table: PriorityTable, trees: Trees, age: Age, newest: Tensor | None, window: Window | None
) -> Tensor:
    """See `_Drawn`; trees that do not keep it are searched, in O(N)."""
    if table.weight_normalization != "buffer":
        return torch.full_like(age.ever, torch.inf, dtype=torch.float64)
    if trees.keeps_minima:
        found = trees.smallest.unsqueeze(-1) if window is None else smallest_in(window)
        return found.double()
    masses = trees.masses
    inside = masses > 0
    if newest is not None:
        inside = inside & (age.of(torch.arange(table.capacity, device=table.device)) < newest)
    return torch.where(inside, masses, torch.inf).amin(-1, keepdim=True).double()


def _with_latest(
    table: PriorityTable, slot: Tensor, latest: int, age: Age
) -> tuple[Tensor, Tensor]:
    """Give the last places of batches [S, B] to the newest transitions.

    One whose mass is 0 leaves its place to the transition drawn.

    Returns:
        The slots, and how many places were given, int64 [S, 1].

    Raises:
        EmptyBufferError: there are fewer transitions.
    """
    few = age.ever < latest
    if validation.can_raise(few) and few.any():
        which = table.trees.which(few.view(-1))
        raise EmptyBufferError(
            f"expected at least latest={latest} transitions, got {int(age.ever.min())}{which}"
        )
    new = age.slot(torch.arange(latest - 1, -1, -1, device=table.device))
    held = table.trees.leaves[new + table.trees.starts] > 0
    last = torch.where(held, new, slot[:, -latest:])
    return torch.cat([slot[:, :-latest], last], 1), held.sum(-1, keepdim=True)

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
from per_td.priorities.windows import find_in, smallest_in, window_of
from per_td.tree.trees import Trees
from per_td.weights import importance_weights

BY = ("priority", "uniform", "inverse")


class Selection(NamedTuple):
    """A way to draw; see `PrioritizedReplayBuffer` and its `sample`.

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
        latest = validation.integer("latest", latest, 0)
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
    among = age.size if newest is None else age.size.clamp(max=newest)
    parts = {by: 1.0}
    if by == "priority" and share:
        parts = {"priority": 1 - share, "uniform": share} if share < 1 else {"uniform": 1.0}
    drawn = [
        _draw(table, name, n, generator, age, None if newest is None else among, latest)
        for name in parts
    ]
    slot = drawn[0].slot
    if len(drawn) > 1:
        like = torch.empty(slot.shape, dtype=torch.float64, device=device)
        slot = torch.where(uniform_like(like, generator) < share, drawn[1].slot, slot)
    if latest:
        new, held = _newest(table, latest, age)
        slot = torch.cat([slot[:, :-latest], torch.where(held, new, slot[:, -latest:])], 1)
        rest = n - held.sum(-1, keepdim=True)

    def probability_of(slot: Tensor) -> Tensor:
        place = slot + trees.starts
        found = torch.zeros(slot.shape, dtype=torch.float64, device=device)
        for of_all, part in zip(parts.values(), drawn, strict=True):
            found += of_all * part.trees.leaves[place].double() / part.total
        if latest:  # the balance heuristic of Veach & Guibas 1995
            if newest is not None:
                found = torch.where(age.of(slot) < among, found, 0.0)
            found = (rest * found + (age.of(slot) < latest)) / n
        return found

    probability, normalization = probability_of(slot), table.weight_normalization
    smallest = None
    if normalization == "buffer":
        smallest = torch.zeros_like(probability[:, :1])
        for (name, of_all), part in zip(parts.items(), drawn, strict=True):
            least = _smallest(table, name, age, latest, None if newest is None else among)
            smallest += of_all * least / part.total
        if latest:
            least = torch.where(held, probability_of(new), torch.inf).amin(-1, keepdim=True)
            smallest = (smallest * rest / n).minimum(least)
    elif normalization == "batch":
        smallest, normalization = probability.amin(-1, keepdim=True), "buffer"
    trees.ops.mark_replayed(trees, slot)
    weight = importance_weights(
        probability,
        beta.unsqueeze(-1) if isinstance(beta, Tensor) and beta.ndim else beta,
        total=torch.ones((), dtype=torch.float64, device=device),
        size=among,
        smallest=smallest,
        normalization=normalization,
    )
    shape = *table.lead, n
    return slot.view(shape), weight.view(shape)


class Age:
    """Ages of the transitions in slots, 0 for the newest; `ever` were written, int64 [S, 1]."""

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
        trees: the trees.
        slot: int64 [S, B].
        total: sum of the masses that could be drawn, float64 [S, 1].
    """

    trees: Trees
    slot: Tensor
    total: Tensor


def _trees(table: PriorityTable, by: str) -> Trees:
    """The trees whose masses say how probable a transition is; see `BY`."""
    return table.trees if by == "priority" else table.side(by).trees


def _draw(
    table: PriorityTable,
    by: str,
    n: int,
    generator: torch.Generator | None,
    age: Age,
    newest: Tensor | None,
    latest: int,
) -> _Drawn:
    """Draw in proportion to the masses of some trees, in the way that the table's settings say.

    Only the `newest` transitions, int64 [S, 1], can be drawn; None: all. The last `latest` draws
    may give way to others, so the strata are those of the draws before.
    """
    trees = _trees(table, by)
    window = None if newest is None else window_of(trees, age.slot(newest - 1), newest)
    total = trees.total.unsqueeze(-1) if window is None else window.total
    if validation.can_raise(total) and not (total > 0).all():
        raise EmptyBufferError(trees.nothing_to_draw(total.view(-1)))
    if table.draw == "without_replacement":
        return _Drawn(trees, trees.draw_distinct(n, generator)[0], total)
    like = torch.empty(len(total), n, dtype=torch.float64, device=table.device)
    point = uniform_like(like, generator)
    if table.draw == "stratified":
        strata = n - latest
        stratified = (torch.arange(strata, device=table.device) + point[:, :strata]) / strata
        point = torch.cat([stratified, point[:, strata:]], 1)
    point = point * total
    found = trees.ops.find(trees, point) if window is None else find_in(window, point)
    return _Drawn(trees, found[0], total)


def _smallest(
    table: PriorityTable, by: str, age: Age, latest: int, newest: Tensor | None
) -> Tensor:
    """Return the smallest positive mass of all but the `latest`, float64 [S, 1]; inf for none.

    By "inverse" it is searched, in O(N).
    """
    trees, window = _trees(table, by), None
    end = age.size if newest is None else newest
    if latest or newest is not None:
        window = window_of(trees, age.slot(end - 1), (end - latest).clamp(min=0))
    if by == "uniform":
        total = trees.total.unsqueeze(-1) if window is None else window.total
        return torch.where(total > 0, 1.0, torch.inf).double()
    if trees.keeps_minima:
        found = trees.smallest.unsqueeze(-1) if window is None else smallest_in(window)
        return found.double()
    at = age.of(torch.arange(table.capacity, device=table.device))
    inside = (trees.masses > 0) & (at >= latest) & (at < end)
    return torch.where(inside, trees.masses, torch.inf).amin(-1, keepdim=True).double()


def _newest(table: PriorityTable, latest: int, age: Age) -> tuple[Tensor, Tensor]:
    """The slots of the newest transitions, the newest last, int64 [S, latest].

    Also bool [S, latest], False for those of mass 0. EmptyBufferError if there are fewer.
    """
    few = age.ever < latest
    if validation.can_raise(few) and few.any():
        which = table.trees.which(few.view(-1))
        raise EmptyBufferError(
            f"expected at least latest={latest} transitions, got {int(age.ever.min())}{which}"
        )
    new = age.slot(torch.arange(latest - 1, -1, -1, device=table.device))
    return new, table.trees.leaves[new + table.trees.starts] > 0

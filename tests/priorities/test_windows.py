"""Draws from a run of slots, against naive sums over the run."""

import pytest
import torch

from per_td.kernels.parts import Layout
from per_td.priorities.windows import find_in, smallest_in, window_of
from per_td.tree.trees import Trees
from tests.support.oracle import S
from tests.support.parameters import slow_but


def some_trees(capacity: int, groups: int, device, zeros: float) -> Trees:
    random = torch.Generator().manual_seed(capacity)
    trees = Trees(Layout.of(capacity, groups), device, extremes=True)
    trees.keep_minima(True)
    mass = torch.rand(groups, capacity, generator=random) ** 4 + 1e-3
    mass[torch.rand(groups, capacity, generator=random) < zeros] = 0.0
    trees.masses.copy_(mass)
    trees.priorities.copy_(mass)
    trees.ops.refill(trees)
    return trees


def runs_of(capacity: int, groups: int):
    """First slots and lengths [S, 1]: all of small rings, and edges of nodes."""
    edges = {1, 2, 15, 16, 17, 31, 255, 256, 257, capacity // 2, capacity - 1, capacity}
    starts = edges | {0, capacity - 16, capacity - 17}
    if capacity <= 17:
        edges, starts = range(1, capacity + 1), range(capacity)
    pairs = [(a, n) for a in starts for n in edges if 0 <= a < capacity and 1 <= n <= capacity]
    for k in range(0, len(pairs), 1 if capacity <= 257 else 7):  # another run in each group
        chosen = torch.tensor([pairs[(k + 7 * s) % len(pairs)] for s in range(groups)])
        yield chosen[:, :1], chosen[:, 1:]


@pytest.mark.parametrize("zeros", slow_but([0.5], [0.0, 0.5]))
@pytest.mark.parametrize("groups", [1, S])
@pytest.mark.parametrize(
    "capacity", slow_but([1, 7, 257], [1, 7, 15, 16, 17, 256, 257, 5000, 70_000])
)
def test_a_run_gives_each_slot_its_share_and_nothing_to_others(
    capacity, groups, zeros, device, choice
):
    trees = some_trees(capacity, groups, device, zeros)
    every = 997
    for first, length in runs_of(capacity, groups):
        at = (torch.arange(capacity) - first) % capacity
        mass = torch.where(at < length, trees.masses.cpu().double(), 0.0)
        window = window_of(trees, first.to(device), length.to(device))
        total = mass.sum(1, keepdim=True)
        torch.testing.assert_close(window.total.cpu(), total, rtol=1e-12, atol=0)
        least = torch.where(mass > 0, mass, torch.inf).amin(1, keepdim=True)
        assert torch.equal(smallest_in(window).cpu().double(), least)
        if not (total > 0).all():
            continue
        share = torch.linspace(0, 1, every, dtype=torch.float64, device=device)  # also past the end
        slot, drawn = find_in(window, share * window.total)
        assert torch.equal(drawn.cpu().double(), mass.gather(1, slot.cpu()))
        assert (drawn > 0).all()
        counts = torch.zeros_like(mass).scatter_add_(
            1, slot.cpu(), torch.ones(groups, every, dtype=torch.float64)
        )
        assert ((counts - mass / total * (every - 1)).abs() < 2).all()


def test_a_run_of_no_slots_holds_nothing(device, choice):
    trees = some_trees(300, S, device, 0.0)
    first = torch.tensor([[0], [16], [299]], device=device)
    window = window_of(trees, first, torch.zeros_like(first))
    assert window.total.tolist() == [[0.0]] * S
    assert smallest_in(window).tolist() == [[torch.inf]] * S


def test_sums_that_rise_at_a_zero_do_not_find_a_slot_of_mass_0_or_outside_the_run(
    device, monkeypatch
):
    """As those of a parallel sum do, where values are not looked at."""
    random, plain = torch.Generator(device).manual_seed(1), torch.Tensor.cumsum

    def parallel(tensor, dim, dtype=None):
        if dtype is not None:  # of one node's children
            return plain(tensor, dim, dtype=dtype)
        total = plain(tensor, dim)
        noise = torch.rand(total.shape, dtype=total.dtype, device=device, generator=random)
        return total + 1e-3 * noise

    trees = some_trees(5000, 2, device, zeros=0.5)
    monkeypatch.setattr("per_td.validation.can_raise", lambda tensor: False)
    monkeypatch.setattr(torch.Tensor, "cumsum", parallel)
    first, length = torch.tensor([[4990], [300]]), torch.tensor([[700], [37]])
    window = window_of(trees, first.to(device), length.to(device))
    share = torch.linspace(0, 1, 20_000, dtype=torch.float64, device=device)
    slot, drawn = find_in(window, share * window.total)
    assert (drawn > 0).all()
    assert ((slot.cpu() - first) % 5000 < length).all()

"""Trees: where the nodes lie, the guard bytes between them, the largest and the smallest."""

import math

import pytest
import torch

from per_td import PerTdError
from per_td.kernels.parts import Block, Layout
from per_td.memory import zeros
from per_td.priorities.distributions import Proportional
from per_td.tree import Trees
from tests.support.oracle import CAPACITIES
from tests.support.parameters import slow_but

CPU = torch.device("cpu")


def made(capacity: int, groups: int, device=CPU, *, minima: bool = True) -> Trees:
    """Empty trees with priorities, whose masses are the priorities."""
    trees = Trees(Layout.of(capacity, groups), device, extremes=True, replayed=True)
    trees.set_exponent(1.0)
    trees.keep_minima(minima)
    return trees


def assign(trees: Trees, index: torch.Tensor, priority: torch.Tensor) -> None:
    capacity = trees.layout.capacity
    given = {"written": capacity, "limit": capacity}
    trees.ops.assign(trees, Proportional(), index, priority, **given)


# --- the layout -----------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("capacity", [*CAPACITIES, 4095, 4096, 10**8])
def test_the_layout_has_a_root_a_spare_leaf_and_whole_groups(capacity, groups):
    layout = Layout.of(capacity, groups)
    assert layout.spare < layout.leaf_slots
    assert layout.leaf_slots % 16 == 0
    assert layout.widths[-1] == 1
    below = layout.leaf_slots
    for width in layout.widths:
        assert width == -(-below // 16)
        below = width


@pytest.mark.parametrize(
    "capacity", [1, 7, 16, 17, 50, 255, 256, 257, 1000, 4097, 10_000, 65_536, 65_537, 10**6]
)
def test_each_of_many_trees_owns_whole_nodes_and_wastes_less_than_half(capacity):
    layout = Layout.of(capacity, 5)
    assert 1 <= layout.width <= 16
    assert layout.stride == layout.width * 16**layout.height
    assert capacity <= layout.stride < 2 * max(capacity, 16)
    nodes = torch.zeros(layout.node_slots)
    assert layout.tops(nodes).shape == (5, layout.width)
    assert layout.spare == 5 * layout.stride


@pytest.mark.parametrize("capacity", CAPACITIES)
def test_a_single_tree_has_the_root_for_its_only_top_and_wastes_no_leaves(capacity):
    layout = Layout.of(capacity)
    assert (layout.groups, layout.width, layout.height) == (1, 1, len(layout.widths))
    assert layout.stride == layout.spare == capacity
    nodes = torch.arange(layout.node_slots)
    assert layout.tops(nodes).tolist() == [[layout.node_slots - 1]]


# --- the block ------------------------------------------------------------------------------------

SHAPES = {
    "some": ((3,), torch.float32),
    "aligned": ((16,), torch.float32),
    "one": ((), torch.int64),
    "none": ((0,), torch.float64),
    "flags": ((2, 3), torch.bool),
}


def test_views_of_a_block_start_as_zeros_in_cache_lines_of_their_own(device):
    block = Block(SHAPES, device, zeros)
    block.check_valid()
    starts = set()
    for name, (shape, dtype) in SHAPES.items():
        view = block[name]
        assert (view.shape, view.dtype) == (shape, dtype)
        assert not view.any()
        starts.add(view.data_ptr())
        view.fill_(1)  # all that it has is its own
        block.check_valid()
    assert len(starts) == len(SHAPES)
    assert all(start % 64 == 0 for start in starts)


@pytest.mark.parametrize("name", SHAPES)
def test_a_write_past_the_end_of_a_view_is_named(name, device):
    block = Block(SHAPES, device, zeros)
    view = block[name]
    after = view.storage_offset() * view.itemsize + view.nbytes
    block.memory[name][after] += 1
    with pytest.raises(PerTdError, match=f"the guard bytes after {name} have been overwritten"):
        block.check_valid()


def test_a_write_before_the_first_view_is_named(device):
    block = Block(SHAPES, device, zeros)
    block.memory["some"][block["some"].storage_offset() * 4 - 1] = 0
    with pytest.raises(PerTdError, match="the guard bytes before some"):
        block.check_valid()


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("capacity", [1, 16, 257])
def test_trees_find_an_overrun_of_any_of_their_parts(capacity, groups, device):
    trees = made(capacity, groups, device)
    trees.check_valid()
    for name in trees.block.views:
        view = trees.block[name]
        after = view.storage_offset() * view.itemsize + view.nbytes
        kept = trees.block.memory[name][after].clone()
        trees.block.memory[name][after] = 0
        with pytest.raises(PerTdError, match=f"the guard bytes after {name} "):
            trees.check_valid()
        trees.block.memory[name][after] = kept
    trees.check_valid()


# --- the largest and the smallest -----------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("capacity", slow_but((1, 17, 257), CAPACITIES))
def test_the_extrema_are_those_of_the_positive_values(capacity, groups, choice, device):
    trees = made(capacity, groups, device)
    assert trees.largest.tolist() == [0] * groups
    assert trees.smallest.tolist() == [math.inf] * groups
    random = torch.Generator().manual_seed(capacity)
    for _ in range(30):
        n = int(torch.randint(1, capacity + 1, (), generator=random))
        index = torch.rand(groups, capacity, generator=random).argsort(-1)[:, :n].to(device)
        value = torch.rand(groups, n, generator=random)
        value *= torch.rand(groups, n, generator=random) > 0.5
        assign(trees, index, value.to(device))
        for s, own in enumerate(trees.priorities.tolist()):
            positive = [v for v in own if v > 0]
            assert trees.largest[s].item() == max(positive, default=0.0)
            # masses are powers of priorities: they round
            smallest = min(positive, default=math.inf)
            assert trees.smallest[s].item() == pytest.approx(smallest, rel=1e-6)
            least = min((m for m in trees.masses[s].tolist() if m > 0), default=math.inf)
            assert trees.smallest[s].item() == least
    trees.check_valid()


@pytest.mark.parametrize("groups", [1, 3])
def test_refreshing_everything_equals_refreshing_what_changed(groups, choice, device):
    one, other = made(300, groups, device), made(300, groups, device)
    priority = torch.rand(groups, 300, device=device)
    index = torch.arange(300, device=device).expand(groups, 300)
    for trees in (one, other):
        assign(trees, index, priority)
    changed = torch.full((groups, 1), 17, device=device)
    assign(one, changed, torch.full((groups, 1), 5.0, device=device))
    other.priorities[:, 17] = 5.0
    other.masses[:, 17] = 5.0
    other.ops.refill(other)
    assert one.largest.tolist() == other.largest.tolist() == [5.0] * groups
    for name in ("sums", "maxima", "minima"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    one.check_valid()


@pytest.mark.parametrize("groups", [1, 3])
def test_the_smallest_are_kept_only_while_they_are_wanted(groups, choice, device):
    trees = made(40, groups, device, minima=False)
    index = torch.arange(40, device=device).expand(groups, 40)
    assign(trees, index, torch.rand(groups, 40, device=device) + 1)
    assert trees.smallest.tolist() == [math.inf] * groups
    trees.keep_minima(True)
    assert torch.equal(trees.smallest, trees.masses.amin(-1))
    assign(trees, index[:, :1], torch.full((groups, 1), 0.5, device=device))
    assert trees.smallest.tolist() == [0.5] * groups
    trees.check_valid()
    trees.keep_minima(False)
    assert trees.smallest.tolist() == [math.inf] * groups


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("name", ["sums", "maxima", "minima"])
def test_a_node_that_does_not_follow_from_its_children_is_named(name, groups, device):
    trees = made(300, groups, device)
    index = torch.arange(300, device=device).expand(groups, 300)
    assign(trees, index, torch.rand(groups, 300, device=device) + 1)
    trees.check_valid()
    nodes = getattr(trees, name)
    for place in (0, trees.layout.offsets[trees.layout.height - 1]):
        before = nodes[place].clone()
        nodes[place] = 0.5
        for _ in range(2):  # to look mends nothing
            with pytest.raises(PerTdError, match=f"{name} follows from its 16 children"):
                trees.check_valid()
        nodes[place] = before
    trees.check_valid()

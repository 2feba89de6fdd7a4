import math

import pytest
import torch

from per_td.tree import ExtremumTree, Layout
from tests.support.oracle import CAPACITIES


@pytest.mark.parametrize("which", ["max", "min"])
@pytest.mark.parametrize("capacity", CAPACITIES)
def test_the_extremum_is_that_of_the_positive_values(capacity, which, device):
    layout = Layout.of(capacity)
    leaves = torch.zeros(layout.leaf_slots, device=device)
    tree = ExtremumTree(leaves, layout, which)
    assert tree.value.item() == (0.0 if which == "max" else math.inf)
    random = torch.Generator().manual_seed(capacity)
    for _ in range(30):
        n = int(torch.randint(1, capacity + 1, (), generator=random))
        index = torch.randperm(capacity, generator=random)[:n]
        value = torch.rand(n, generator=random) * (torch.rand(n, generator=random) > 0.5)
        leaves[index.to(device)] = value.to(device)
        tree.refresh(index.to(device))
        positive = [v for v in leaves.tolist() if v > 0]
        naive = max(positive, default=0.0) if which == "max" else min(positive, default=math.inf)
        assert tree.value.item() == naive


def test_refreshing_everything_equals_refreshing_what_changed(device):
    layout = Layout.of(300)
    leaves = torch.rand(layout.leaf_slots, device=device)
    leaves[300:] = 0
    tree = ExtremumTree(leaves, layout, "max")
    leaves[17] = 5.0
    tree.refresh_all()
    assert tree.value.item() == 5.0

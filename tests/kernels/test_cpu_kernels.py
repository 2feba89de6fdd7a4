"""The numba kernels beside the functions in torch, and what happens where there are none."""

import copy
import math
import pickle
import subprocess
import sys

import pytest
import torch

from per_td import ConfigurationError, IndexRangeError, PriorityError, SumTree, kernels
from per_td.priorities.sampling import sample_weighted
from per_td.priorities.table import PriorityTable
from per_td.tree import reference
from per_td.weights import mass_of

pytest.importorskip("numba", reason="numba is not installed")

CAPACITIES = (1, 7, 16, 17, 255, 256, 257, 4096, 5000)
CPU = torch.device("cpu")
ULP = 1.2e-7


def table(monkeypatch, choice: str, capacity: int, **settings) -> PriorityTable:
    monkeypatch.setenv(kernels.VARIABLE, choice)
    made = PriorityTable(
        capacity,
        **{
            "alpha": 0.7,
            "eps": 1e-3,
            "draw": "independent",
            "method": "tree",
            "weight_normalization": "buffer",
            "new_priority": "buffer_max",
            "device": CPU,
        }
        | settings,
    )
    assert (made.masses.kernels is not None) == (choice == "auto")
    return made


def twins(monkeypatch, capacity: int, **settings) -> tuple[PriorityTable, PriorityTable]:
    """The same table with kernels and without."""
    return tuple(table(monkeypatch, choice, capacity, **settings) for choice in ("auto", "off"))


def assert_same(one: PriorityTable, other: PriorityTable) -> None:
    assert torch.equal(one._raw, other._raw)
    assert torch.equal(one.ever_max, other.ever_max)
    assert torch.equal(one._largest.nodes, other._largest.nodes)
    torch.testing.assert_close(one.masses.leaves, other.masses.leaves, rtol=ULP, atol=0)
    torch.testing.assert_close(one._smallest.nodes, other._smallest.nodes, rtol=ULP, atol=0)
    assert_sums(one.masses)


def assert_sums(tree: SumTree) -> None:
    """Every node is the sum of its children, whatever they are."""
    children = tree.leaves.double()
    for level, width in zip(tree.levels, tree.layout.widths, strict=True):
        torch.testing.assert_close(level[:width], children.view(-1, 16).sum(-1), rtol=1e-15, atol=0)
        children = level


def extreme(n: int) -> torch.Tensor:
    """TD errors from 1e-30 to 1e30 of both signs, some of them 0."""
    value = 10.0 ** (60 * torch.rand(n) - 30) * (1 - 2 * torch.randint(2, (n,)))
    return value * (torch.rand(n) > 0.1)


@pytest.mark.parametrize("eps", [0.0, 1e-3])
@pytest.mark.parametrize("new_priority", ["buffer_max", "ever_max"])
@pytest.mark.parametrize("capacity", CAPACITIES)
def test_random_operations_leave_what_plain_torch_leaves(capacity, new_priority, eps, monkeypatch):
    pair = twins(monkeypatch, capacity, eps=eps, new_priority=new_priority)
    written = 0
    for _ in range(12):
        start, n = written % capacity, int(torch.randint(1, capacity + 1, ()))
        for each in pair:
            each.write_row(start, n)
        written += n
        assert_same(*pair)
        index = torch.randint(min(written, capacity), (int(torch.randint(1, 600, ())),))
        value = extreme(len(index))
        generation = (written - 1 - index) // capacity - (torch.rand(len(index)) < 0.3).long()
        dropped = [
            int(each.update(index, value, capacity, generation=generation, written=written))
            for each in pair
        ]
        assert dropped[0] == dropped[1]
        assert_same(*pair)
        index = torch.randperm(capacity)[:n]
        priority = torch.rand(n) * (torch.rand(n) > 0.5)
        for each in pair:
            each.write_new(index, each.check_initial(priority, index))
        assert_same(*pair)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 2.5])
def test_alpha_may_be_anything_and_change(alpha, monkeypatch):
    pair = twins(monkeypatch, 300)
    index, value = torch.arange(300), extreme(300)
    for each in pair:
        each.alpha = alpha
        each.update(index, value, 300)
    assert_same(*pair)
    mass = pair[0].masses[:].clone()
    for each in pair:
        each.alpha = 0.3
        each.alpha = alpha
    assert_same(*pair)
    assert torch.equal(pair[0].masses[:], mass), "kernel and torch round the same mass differently"
    assert torch.equal(mass, mass_of(value.abs() + pair[0].eps, alpha))


@pytest.mark.parametrize("draw", ["independent", "stratified"])
@pytest.mark.parametrize("normalization", ["batch", "buffer", "none"])
@pytest.mark.parametrize("capacity", CAPACITIES)
def test_the_same_seed_draws_the_same_slots_and_weights(capacity, normalization, draw, monkeypatch):
    pair = twins(monkeypatch, capacity, weight_normalization=normalization, draw=draw)
    priority = torch.rand(capacity) ** 4 * (torch.arange(capacity) % 3 != 1)
    drawn = []
    for each in pair:
        each.fill(priority)
        seeded = torch.Generator().manual_seed(3)
        drawn.append(sample_weighted(each, 500, capacity, seeded, beta=0.6, filled=capacity))
    assert torch.equal(drawn[0][0], drawn[1][0])
    assert (priority[drawn[0][0]] > 0).all()
    torch.testing.assert_close(drawn[0][1], drawn[1][1], rtol=1e-6, atol=0)
    assert drawn[0][1].dtype == torch.float32


@pytest.mark.parametrize("capacity", CAPACITIES)
def test_points_on_and_past_every_edge_are_found_in_the_same_slots(capacity, monkeypatch):
    monkeypatch.setenv(kernels.VARIABLE, "auto")
    tree = SumTree(capacity)
    mass = torch.randint(0, 4, (capacity,)).float()
    mass[-1] = 1.0
    tree.fill(mass)
    edges = torch.cat([torch.zeros(1, dtype=torch.float64), mass.double().cumsum(0)])
    target = torch.cat([edges, edges.nextafter(edges + 1), edges.nextafter(edges - 1).clamp(min=0)])
    target = torch.cat([target, torch.rand(500, dtype=torch.float64) * tree.total, edges[-1:] * 2])
    found = tree.find(target)
    assert torch.equal(found, reference.find(tree.leaves, tree.levels, target))
    assert (mass[found] > 0).all()


def test_rounding_never_leads_to_a_mass_of_zero(monkeypatch):
    monkeypatch.setenv(kernels.VARIABLE, "auto")
    tree = SumTree(5000)
    mass = 10.0 ** (30 * torch.rand(5000) - 15) * (torch.arange(5000) % 2)
    tree.fill(mass)
    edges = mass.double().cumsum(0)
    ends = torch.cat([edges + k * torch.finfo(torch.float64).eps * edges for k in range(-4, 5)])
    assert (mass[tree.find(ends)] > 0).all()


@pytest.mark.parametrize("capacity", CAPACITIES)
def test_the_tree_alone_takes_the_last_value_of_an_index(capacity, monkeypatch):
    monkeypatch.setenv(kernels.VARIABLE, "auto")
    tree, naive = SumTree(capacity), [0.0] * capacity
    for _ in range(20):
        index = torch.randint(capacity, (int(torch.randint(1, 2 * capacity + 2, ())),))
        value = torch.rand(len(index)) * (torch.rand(len(index)) > 0.2)
        tree.update(index, value)
        for i, v in zip(index.tolist(), value.tolist(), strict=True):
            naive[i] = v
        assert tree[:].tolist() == naive
        assert_sums(tree)
    assert tree.total.item() == pytest.approx(math.fsum(naive), rel=1e-14)


@pytest.mark.parametrize(
    ("index", "value", "error"),
    [
        ([0, 9], [1.0, 1.0], IndexRangeError),
        ([0, -1], [1.0, 1.0], IndexRangeError),
        ([0, 1], [1.0, math.nan], PriorityError),
        ([0, 1], [1.0, -math.inf], PriorityError),
        ([0, 1], [1.0, 1e39], PriorityError),
    ],
)
def test_what_is_wrong_is_refused_as_in_plain_torch(index, value, error, monkeypatch):
    messages = []
    for each in twins(monkeypatch, 9):
        each.write_row(0, 9)
        before = each._raw.clone()
        with pytest.raises(error) as refused:
            each.update(torch.tensor(index), torch.tensor(value, dtype=torch.float64), 9)
        messages.append(str(refused.value))
        assert torch.equal(each._raw, before)
    assert messages[0] == messages[1]


def test_slices_of_tensors_are_read_as_torch_reads_them(monkeypatch):
    pair = twins(monkeypatch, 40)
    index, value = torch.arange(80) % 40, torch.rand(80, 1, dtype=torch.float64)
    for each in pair:
        each.write_row(0, 40)
        each.update(index[::3], value[::3], 40, generation=torch.zeros(80).long()[::3], written=40)
    assert_same(*pair)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda made: pickle.loads(pickle.dumps(made))])
def test_copies_have_memory_of_their_own(copied, monkeypatch):
    made = table(monkeypatch, "auto", 100)
    made.write_row(0, 100)
    other = copied(made)
    other.update(torch.arange(50), torch.rand(50), 100)
    assert made.masses.total == 100
    assert other.masses.total != 100
    assert_sums(other.masses)


def test_a_table_in_shared_memory_goes_on_working(monkeypatch):
    pair = twins(monkeypatch, 100)
    for each in pair:
        each.write_row(0, 100)
        for tensor in (each._raw, each.masses.leaves, each.masses.nodes, each._largest.nodes):
            tensor.share_memory_()
        each.update(torch.arange(0, 100, 3), torch.linspace(-1, 2, 34), 100)
    assert_same(*pair)


def test_only_auto_and_off_can_be_asked_for(monkeypatch):
    monkeypatch.setenv(kernels.VARIABLE, "fast")
    with pytest.raises(ConfigurationError, match=r"PER_TD_KERNELS: expected .*, got 'fast'"):
        SumTree(4)


LOOP = """
import torch, warnings
from tensordict import TensorDict
import per_td, sys
assert not sys.modules.get("numba"), "numba was imported too early"
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        buffer = per_td.PrioritizedReplayBuffer(8, batch_size=4)
buffer.extend(TensorDict({"x": torch.rand(9, 2)}, batch_size=[9]))
batch = buffer.sample()
buffer.update_priority(batch["index"], torch.rand(4), batch["generation"])
said = [str(w.message) for w in caught if issubclass(w.category, per_td.KernelWarning)]
"""


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param(
            "",
            "assert said == [] and 'numba' in sys.modules and buffer.kernels",
            marks=pytest.mark.slow,
        ),
        (
            "import sys; sys.modules['numba'] = None",
            "assert len(said) == 1 and 'numba cannot be imported' in said[0], said",
        ),
        pytest.param(
            "import os; os.environ['PER_TD_KERNELS'] = 'off'",
            "assert said == [] and 'numba' not in sys.modules and not buffer.kernels",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["used", "missing", "off"],
)
def test_numba_comes_with_the_first_buffer_and_may_be_missing(before, after):
    subprocess.run([sys.executable, "-c", before + LOOP + after], check=True)


@pytest.mark.slow
def test_without_a_folder_to_cache_in_plain_torch_takes_over():
    before = """
import numba.core.caching as caching
def refuse(self):
    raise OSError("read-only file system")
caching._CacheLocator.ensure_cache_path = refuse
"""
    loop = LOOP.replace('assert not sys.modules.get("numba"), "numba was imported too early"', "")
    after = "assert len(said) == 1 and 'NUMBA_CACHE_DIR' in said[0], said"
    subprocess.run([sys.executable, "-c", before + loop + after], check=True)

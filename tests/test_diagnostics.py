"""The figures of `diagnostics` beside numpy and plain Python."""

import math
from itertools import product

import numpy as np
import pytest
import torch

from per_td import PrioritizedReplayBuffer, TransitionReplayBuffer, diagnostics
from per_td.diagnostics import QUANTILES
from tests.support.oracle import data
from tests.support.parameters import slow_but
from tests.support.tables import table

CPU = torch.device("cpu")
KEYS = {
    *(f"{name}/{part}" for name in ("priority", "weight", "age") for part in QUANTILES),
    "effective_sample_size",
    "effective_share",
    "top_1_percent_share",
    "never_replayed_share",
    "beta",
    "size",
    "stale_updates",
    "refused_priorities",
}


def filled(n, capacity=None, *, device="cpu", zeros=0.0, **settings) -> PrioritizedReplayBuffer:
    """`n` transitions of random priorities, of which a share is 0."""
    buffer = PrioritizedReplayBuffer(capacity or n, device=device, **settings)
    priority = torch.rand(n).square()
    priority[torch.rand(n) < zeros] = 0.0
    buffer.extend(data(0, n, device), priority)
    return buffer


def naive(buffer) -> dict[str, float]:
    """From priorities and the formulas, in numpy."""
    n = len(buffer)
    priority, mass = buffer.priority.cpu().numpy(), buffer.mass.double().cpu().numpy()
    probability = mass / mass.sum()
    drawable = probability[probability > 0]
    weight = (n * drawable) ** -buffer.beta
    if buffer.weight_normalization != "none":
        weight = weight / weight.max()
    number = list(range(buffer.write_count))[-n:]  # of each transition that is left
    age_of_slot = {k % buffer.capacity: buffer.write_count - 1 - k for k in number}
    age = np.array([age_of_slot[slot] for slot in range(n)])
    order = np.argsort(age)
    reached = np.cumsum(probability[order])

    def drawn_age(q: float) -> int:
        enough = (reached >= q - 1e-9) & (probability[order] > 0)
        return age[order][np.flatnonzero(enough)[0]]

    levels = QUANTILES.items()
    return {
        "effective_sample_size": 1 / (probability**2).sum(),
        "effective_share": 1 / (probability**2).sum() / n,
        "top_1_percent_share": np.sort(probability)[-math.ceil(n / 100) :].sum(),
        "never_replayed_share": 1 - buffer.replayed.float().mean().item(),
        **{f"priority/{key}": np.quantile(priority, q) for key, q in levels},
        **{f"weight/{key}": np.quantile(weight, q) for key, q in levels},
        **{f"age/{key}": drawn_age(q) for key, q in levels},
        "beta": buffer.beta,
        "size": n,
        "stale_updates": buffer.stats()["stale_updates"],
        "refused_priorities": buffer.stats()["refused_priorities"],
    }


def values(buffer) -> dict[str, float]:
    return {key: value.item() for key, value in buffer.diagnostics().items()}


@pytest.mark.parametrize("normalization", ["batch", "buffer", "none"])
@pytest.mark.parametrize("prioritization", ["proportional", "rank"])
@pytest.mark.parametrize("n", [1, 2, 7, 99, 100, 101, 1000])
def test_every_figure_is_that_of_its_naive_twin(n, prioritization, normalization, device):
    settings = {"prioritization": prioritization, "weight_normalization": normalization}
    buffer = filled(n, device=device, zeros=0.2 if n > 2 else 0, **settings)
    buffer.beta = 0.7
    batch = buffer.sample(10)
    buffer.update_priority(batch["index"], torch.rand(10))
    buffer.extend(data(n, n // 3, device))  # wraps around
    assert values(buffer) == pytest.approx(naive(buffer), rel=1e-5)


def test_a_buffer_that_is_partly_filled_counts_what_is_there(device):
    buffer = filled(30, 100, device=device)
    assert values(buffer) == pytest.approx(naive(buffer), rel=1e-5)
    assert values(buffer)["age/max"] == 29


def test_equal_priorities_are_a_full_effective_sample_and_one_priority_is_a_sample_of_one():
    buffer = PrioritizedReplayBuffer(200, eps=0.0)
    buffer.extend(data(0, 200))
    got = values(buffer)
    assert got["effective_sample_size"] == pytest.approx(200)
    assert got["effective_share"] == pytest.approx(1)
    assert got["top_1_percent_share"] == pytest.approx(0.01)
    assert got["weight/min"] == got["weight/max"] == 1
    buffer.update_priority(range(199), torch.zeros(199))
    got = values(buffer)
    assert got["effective_sample_size"] == got["top_1_percent_share"] == 1
    assert got["age/min"] == got["age/max"] == 0


@pytest.mark.parametrize("capacity", [1, 8])
def test_an_empty_buffer_has_the_same_keys_and_no_figures(capacity, device):
    got = PrioritizedReplayBuffer(capacity, beta=0.5, device=device).diagnostics()
    assert got.keys() == KEYS
    for key, value in got.items():
        known = {"beta": 0.5, "size": 0, "stale_updates": 0, "refused_priorities": 0}
        assert value.item() == pytest.approx(known.get(key, math.nan), nan_ok=True), key


def test_where_nothing_can_be_drawn_only_the_priorities_are_known():
    buffer = PrioritizedReplayBuffer(8)
    buffer.extend(data(0, 5), torch.zeros(5))
    for key, value in values(buffer).items():
        known = key.startswith("priority") or key in {
            "beta",
            "size",
            "stale_updates",
            "refused_priorities",
            "never_replayed_share",
        }
        assert math.isnan(value) != known, key


def test_the_keys_never_change_and_the_values_are_tensors_without_dimensions(device):
    for n in (0, 1, 500):
        buffer = filled(n, 1000, device=device)
        got = buffer.diagnostics()
        assert got.keys() == KEYS
        for key, value in got.items():
            whole = key in {"size", "stale_updates", "refused_priorities"}
            assert value.dtype == (torch.int64 if whole else torch.float32), key
            assert value.shape == ()
            assert value.device == buffer.device


def test_figures_do_not_change_afterwards_and_change_nothing(device):
    buffer = filled(50, device=device)
    state = buffer.state_dict()
    got = buffer.diagnostics()
    before = {key: value.item() for key, value in got.items()}
    assert torch.equal(buffer.priority, state["priority"])
    batch = buffer.sample(20)
    buffer.update_priority(batch["index"], torch.rand(20), batch["generation"] - 1)  # all stale
    buffer.increase_beta()
    assert {key: value.item() for key, value in got.items()} == before
    assert values(buffer)["stale_updates"] == 20


def test_extreme_priorities_have_figures_too():
    buffer = PrioritizedReplayBuffer(4, alpha=1.0, eps=0.0)
    buffer.extend(data(0, 4), torch.tensor([1e38, 1e-38, 1e38, 2e38]))
    got = values(buffer)
    assert got["effective_sample_size"] == pytest.approx(16 / 6)
    assert got["weight/max"] == 1
    assert all(math.isfinite(value) for value in got.values())


def test_more_values_than_torch_quantile_takes_are_no_trouble():
    priority = torch.arange(2**24 + 2, dtype=torch.float32)
    got = diagnostics.priorities(priority)
    assert got["priority/q50"].item() == pytest.approx((2**24 + 1) / 2)
    assert got["priority/max"].item() == 2**24


@pytest.mark.parametrize(
    ("method", "draw", "kernels"),
    slow_but(
        [
            ("tree", "independent", "auto"),
            ("tree", "independent", "off"),
            ("tree", "stratified", "auto"),
            ("auto", "without_replacement", "auto"),
            ("auto", "without_replacement", "off"),
        ],
        product(
            ["tree", "auto"],
            ["independent", "stratified", "without_replacement"],
            ["auto", "off"],
        ),
    ),
)
@pytest.mark.parametrize("prioritization", ["proportional", "rank"])
def test_what_was_never_replayed_is_what_a_set_says(
    prioritization, method, draw, kernels, device, monkeypatch
):
    """In lockstep, around the end of the ring and with more transitions than there are slots."""
    monkeypatch.setenv("PER_TD_KERNELS", kernels)
    settings = {"draw": draw, "method": method, "prioritization": prioritization}
    buffer = PrioritizedReplayBuffer(37, device=device, **settings)
    never: set[int] = set()
    for step in range(40):
        n = int(torch.randint(1, 90 if step % 7 == 6 else 9, ()))
        given = torch.rand(n) if step % 2 else None
        index = buffer.extend(data(0, n, device), given)
        never |= set(index.tolist())
        batch = buffer.sample(min(7, len(buffer)))
        never -= set(batch["index"].tolist())
        buffer.update_priority(batch["index"], torch.rand(len(batch)), batch["generation"])
        expected = len(never) / len(buffer)
        assert buffer.diagnostics()["never_replayed_share"].item() == pytest.approx(expected)
        slots = (~buffer.replayed).nonzero().flatten()
        assert set(slots.tolist()) == never


def test_one_transition_at_a_time_is_told_apart_too():
    buffer = TransitionReplayBuffer(5)
    for k in range(12):
        buffer.push([float(k)], 0, 0.0, [0.0], False)
        assert not buffer.buffer.replayed[k % 5]
        buffer.sample(100)
        assert buffer.buffer.replayed.all()


def test_what_was_replayed_is_saved_and_older_states_load_without(tmp_path, device):
    buffer = filled(40, device=device)
    buffer.sample(10)
    share = values(buffer)["never_replayed_share"]
    assert 0.5 < share < 1
    buffer.save(tmp_path / "buffer.pt")
    loaded = PrioritizedReplayBuffer.load(tmp_path / "buffer.pt", device=device)
    assert torch.equal(loaded.replayed, buffer.replayed)
    state = buffer.state_dict()
    for key in ("replayed", "ranks"):
        del state[key]
    for key in ("prioritization", "sort_interval"):
        del state["settings"][key]
    torch.save(state, tmp_path / "older.pt")
    older = PrioritizedReplayBuffer.load(tmp_path / "older.pt", device=device)
    assert torch.equal(older.priority.cpu(), buffer.priority.cpu())
    assert values(older)["never_replayed_share"] == 1


def test_compiled_draws_are_seen():
    torch._dynamo.reset()
    buffer = filled(40)
    index = torch.compile(buffer.sample, fullgraph=True, backend="aot_eager")(10)["index"]
    assert buffer.replayed.nonzero().flatten().tolist() == index.unique().tolist()
    torch._dynamo.reset()


def test_a_table_of_another_capacity_remembers_what_was_replayed():
    whole = table(10)
    whole.write_row(0, 10)
    whole.replayed[:4] = True
    for capacity in (3, 10, 20):
        moved = whole.moved(capacity, CPU)
        assert moved.replayed.sum() == min(capacity, 4)
        assert len(moved.replayed) == capacity


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_cuda_nothing_waits_for_the_device():
    buffer = filled(500, 1000, device="cuda")
    empty = PrioritizedReplayBuffer(5, device="cuda")
    buffer.diagnostics()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        buffer.diagnostics()
        empty.diagnostics()
    finally:
        torch.cuda.set_sync_debug_mode("default")

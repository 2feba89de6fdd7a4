"""The figures of `diagnostics` beside numpy and plain Python."""

import math
from array import array
from itertools import product

import numpy as np
import pytest
import torch
from tensordict import TensorDict

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

COUNTS = {f"draw_count/{part}" for part in QUANTILES}


def filled(n, capacity=None, *, device="cpu", zeros=0.0, **settings) -> PrioritizedReplayBuffer:
    """`n` transitions of random priorities, of which a share is 0."""
    buffer = PrioritizedReplayBuffer(capacity or n, device=device, **settings)
    priority = torch.rand(n).square()
    priority[torch.rand(n) < zeros] = 0.0
    buffer.extend(data(0, n, device), priority)
    return buffer


def naive(buffer, s=None) -> dict[str, float]:
    """From priorities and the formulas, in numpy; of one buffer, or of that number `s` of many."""
    n = len(buffer) if s is None else buffer.lengths[s].item()
    row = slice(None) if s is None else s
    priority, mass = (
        each[row][:n].cpu().numpy() for each in (buffer.priority, buffer.mass.double())
    )
    written = buffer.write_count if s is None else buffer.state_dict()["write_count"][s].item()
    share, held = buffer.uniform_mix, mass > 0
    probability = (1 - share) * mass / mass.sum() + share * held / held.sum()
    drawable = probability[held]
    weight = (n * drawable) ** -buffer.beta
    if buffer.weight_normalization != "none":
        weight = weight / weight.max()
    number = list(range(written))[-n:]  # of each transition that is left
    age_of_slot = {k % buffer.capacity: written - 1 - k for k in number}
    age = np.array([age_of_slot[slot] for slot in range(n)])
    order = np.argsort(age)
    reached = np.cumsum(probability[order])

    def drawn_age(q: float) -> int:
        enough = (reached >= q - 1e-9) & held[order]
        return age[order][np.flatnonzero(enough)[0]]

    levels = QUANTILES.items()
    never, counts = math.nan, {}
    if buffer.track_draws:
        count = buffer.draw_count[row][:n].cpu().numpy()
        never = (count == 0).mean()
        counts = {f"draw_count/{key}": np.quantile(count, q) for key, q in levels}
    elif s is None:
        never = 1 - buffer.replayed.float().mean().item()
    return {
        "effective_sample_size": 1 / (probability**2).sum(),
        "effective_share": 1 / (probability**2).sum() / n,
        "top_1_percent_share": np.sort(probability)[-math.ceil(n / 100) :].sum(),
        "never_replayed_share": never,
        **{f"priority/{key}": np.quantile(priority, q) for key, q in levels},
        **{f"weight/{key}": np.quantile(weight, q) for key, q in levels},
        **{f"age/{key}": drawn_age(q) for key, q in levels},
        **counts,
        "beta": buffer.beta,
        "size": n,
        "stale_updates": buffer.stats()["stale_updates"],
        "refused_priorities": buffer.stats()["refused_priorities"],
    }


SHARED = {"stale_updates", "refused_priorities"}


def values_of(buffer, s) -> dict[str, float]:
    """Of that number `s` of many buffers."""
    got = buffer.diagnostics()
    return {key: (value if key in SHARED else value[s]).item() for key, value in got.items()}


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


@pytest.mark.parametrize("uniform_mix", [0.1, 1.0])
@pytest.mark.parametrize("normalization", ["batch", "none"])
@pytest.mark.parametrize("prioritization", ["proportional", "rank"])
def test_a_mixture_and_counts_of_draws_are_those_of_the_naive_twin(
    prioritization, normalization, uniform_mix, device
):
    buffer = filled(
        150,
        device=device,
        zeros=0.3,
        prioritization=prioritization,
        weight_normalization=normalization,
        uniform_mix=uniform_mix,
        track_draws=True,
    )
    for _ in range(3):
        buffer.sample(40)
    buffer.extend(data(150, 20, device))
    got = values(buffer)
    assert got.keys() == KEYS | COUNTS
    assert got == pytest.approx(naive(buffer), rel=1e-5)
    if uniform_mix == 1:
        assert got["effective_sample_size"] == pytest.approx((buffer.mass > 0).sum().item())
        assert got["weight/min"] == pytest.approx(got["weight/max"])


@pytest.mark.parametrize("track_draws", [False, True])
@pytest.mark.parametrize("uniform_mix", [0.0, 0.3])
@pytest.mark.parametrize("normalization", ["batch", "none"])
@pytest.mark.parametrize("capacity", [1, 7, 250])
@pytest.mark.parametrize("many", [1, 3])
def test_many_buffers_have_the_figures_of_each(
    many, capacity, normalization, uniform_mix, track_draws, device
):
    buffers = PrioritizedReplayBuffer(
        capacity,
        num_buffers=many,
        weight_normalization=normalization,
        uniform_mix=uniform_mix,
        track_draws=track_draws,
        device=device,
    )
    keys = KEYS | COUNTS if track_draws else KEYS
    got = buffers.diagnostics()
    assert got.keys() == keys
    assert all(math.isnan(value) for value in got["effective_share"].tolist())
    random = torch.Generator().manual_seed(capacity)
    for step in range(6):
        n = max(capacity // 4, 1)
        priority = torch.rand(many, n, generator=random)
        priority = torch.where(torch.rand(many, n, generator=random) < 0.2, 0.0, priority)
        priority[:, 0] = 0.5  # there is always something to draw
        mask = torch.rand(many, n, generator=random) < 0.5 if step else None
        x = torch.rand(many, n, device=device)
        buffers.extend(TensorDict({"x": x}, [many, n]), priority.to(device), mask)
        if (buffers.total_mass > 0).all():
            buffers.sample(5)
        for s in range(many):
            if buffers.mass[s].any():
                got = values_of(buffers, s)
                assert got == pytest.approx(naive(buffers, s), rel=1e-5, nan_ok=True)
    for key, value in buffers.diagnostics().items():
        assert value.shape == (() if key in SHARED else (many,)), key


def test_many_buffers_have_figures_beside_empty_ones_and_ones_without_anything_to_draw(device):
    buffers = PrioritizedReplayBuffer(20, num_buffers=3, track_draws=True, device=device)
    mask = torch.zeros(3, 15, dtype=torch.bool)
    mask[1:] = True
    priority = torch.rand(3, 15)
    priority[1] = 0.0
    x = torch.rand(3, 15, device=device)
    buffers.extend(TensorDict({"x": x}, [3, 15]), priority.to(device), mask.to(device))
    assert values_of(buffers, 2) == pytest.approx(naive(buffers, 2), rel=1e-5)
    got = [values_of(buffers, s) for s in range(2)]
    for key in KEYS | COUNTS:
        of_all = key in SHARED | {"beta", "size"}
        stored = key.startswith(("priority", "draw_count")) or key == "never_replayed_share"
        assert math.isnan(got[0][key]) != of_all, key
        assert math.isnan(got[1][key]) != (of_all or stored), key
    assert [each["size"] for each in got] == [0, 15]


def test_only_counts_tell_what_many_buffers_have_never_replayed(device):
    for track_draws in (False, True):
        buffers = PrioritizedReplayBuffer(4, num_buffers=2, track_draws=track_draws, device=device)
        buffers.extend(TensorDict({"x": torch.rand(2, 4, device=device)}, [2, 4]))
        buffers.set_priority(torch.tensor([[1, 2, 3]] * 2).to(device), torch.zeros(2, 3).to(device))
        buffers.sample(6)  # slot 0, six times
        share = buffers.diagnostics()["never_replayed_share"]
        if track_draws:
            assert share.tolist() == [0.75, 0.75]
            assert buffers.diagnostics()["draw_count/max"].tolist() == [6, 6]
        else:
            assert share.isnan().all()


def test_the_course_buffer_passes_the_figures_on():
    buffer = TransitionReplayBuffer(50)
    assert buffer.diagnostics().keys() == KEYS
    for k in range(70):
        buffer.push([float(k)], 0, 0.0, [0.0], False)
    indices = buffer.sample(20)[5]
    buffer.update_priorities(indices, torch.rand(20))
    got = {key: value.item() for key, value in buffer.diagnostics().items()}
    assert got == pytest.approx(naive(buffer.buffer), rel=1e-5)


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
    got = diagnostics.quantiles("priority", priority, torch.tensor(len(priority)))
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
    whole.write_runs(array("q", (0, 10)))
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

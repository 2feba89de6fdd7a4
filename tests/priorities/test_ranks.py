"""Rank-based prioritization beside a naive twin that sorts at every change."""

import math

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from per_td import (
    ConfigurationError,
    EmptyBufferError,
    PrioritizedReplayBuffer,
    TransitionReplayBuffer,
)
from per_td.priorities.distributions import Rank, order_of
from tests.support.model import Ring
from tests.support.oracle import assert_drawn_from, data
from tests.support.parameters import few_of_all
from tests.support.tables import table

DRAWS = ("independent", "stratified", "without_replacement")
ALPHA = 0.7


def ranked(capacity=50, *, device="cpu", **settings) -> PrioritizedReplayBuffer:
    return PrioritizedReplayBuffer(capacity, device=device, prioritization="rank", **settings)


def sort(buffer) -> None:
    """Have the masses follow from the exact order: a new alpha does."""
    alpha = buffer.alpha
    buffer.alpha = alpha + 1
    buffer.alpha = alpha


def changes(buffer) -> int:
    """How many priorities have changed since the last sort."""
    return buffer.state_dict()["ranks"]["changes"]


def filled(priority, capacity=None, *, device="cpu", **settings) -> PrioritizedReplayBuffer:
    """With these priorities, and exact ranks."""
    priority = torch.as_tensor(priority, dtype=torch.float32)
    buffer = ranked(capacity or len(priority), device=device, eps=0.0, **settings)
    buffer.extend(data(0, len(priority), device), priority)
    sort(buffer)
    return buffer


def masses(buffer) -> torch.Tensor:
    return buffer.mass.cpu()


def ranks(buffer) -> list[int]:
    """What the masses say the ranks are; 0 where there is none."""
    rank = masses(buffer).double() ** (-1 / buffer.alpha)
    return torch.where(masses(buffer) > 0, rank, 0).round().long().tolist()


@pytest.mark.parametrize("n", [0, 1, 2, 7, 50, 1000, 4097])
def test_the_order_is_that_of_a_stable_sort(n):
    priority = torch.rand(n)
    priority[torch.rand(n) < 0.3] = 0.0
    priority[torch.rand(n) < 0.3] = 0.5
    priority[::5] *= 1e-42  # denormal
    priority[1::5] *= 3e38
    expected = priority.sort(descending=True, stable=True).indices
    assert torch.equal(order_of(priority), expected)


@pytest.mark.usefixtures("choice")
@pytest.mark.parametrize(
    ("capacity", "normalization"),
    few_of_all((1, 7, 32, 50), ("batch", "buffer", "none")),
)
def test_sorted_at_every_change_it_is_a_buffer_that_sorts(capacity, normalization, device):
    """Random operations in lockstep: wrap-around, ties, zeros, repeated indices, stale updates."""
    settings = {"sort_interval": 1, "weight_normalization": normalization, "alpha": 0.9}
    buffer = ranked(capacity, device=device, eps=0.0, **settings)
    naive = Ring(capacity, alpha=0.9, eps=0.0, rank=True, sort_interval=1)
    for step in range(25):
        n = int(torch.randint(1, capacity + 3, ()))
        given = (torch.rand(n) * 4).floor() / 2 if step % 3 == 0 else None
        buffer.extend(data(naive.written, n, device), given)
        items = range(naive.written, naive.written + n)
        naive.extend(items, None if given is None else given.tolist())
        index = torch.randint(len(naive), (9,))
        td_error = (torch.randn(9) * 3).round() / 2
        generation = torch.tensor([naive.generation[i] - (k % 4 == 0) for k, i in enumerate(index)])
        buffer.update_priority(index, td_error, generation)
        naive.update(index.tolist(), td_error.tolist(), generation.tolist())
        assert buffer.priority.tolist() == pytest.approx(naive.priority[: len(naive)].tolist())
        assert masses(buffer).tolist() == pytest.approx(naive.mass[: len(naive)].tolist(), rel=1e-6)
        buffer.check_valid()
        if max(naive.priority) > 0:
            batch = buffer.sample(6)
            expected = naive.weights(batch["index"].tolist(), buffer.beta, normalization)
            assert batch["priority_weight"].tolist() == pytest.approx(expected, rel=1e-5)
    assert buffer.stats()["stale_updates"] == naive.stale > 0


@pytest.mark.usefixtures("choice")
@pytest.mark.parametrize("method", ["tree", "multinomial"])
@pytest.mark.parametrize("draw", ["independent", "stratified"])
def test_draws_follow_the_ranks(draw, method, device, generator):
    if (draw, method) == ("stratified", "multinomial"):
        pytest.skip("not offered")
    priority = torch.rand(60).square()
    priority[::7] = 0.0
    buffer = filled(priority, 80, device=device, draw=draw, method=method, generator=generator)
    naive = Ring(60, alpha=ALPHA, rank=True, sort_interval=1)
    naive.extend(range(60), priority.tolist())
    assert_drawn_from(buffer.sample(100_000)["index"], naive.probabilities())


@pytest.mark.usefixtures("choice")
@pytest.mark.parametrize("method", ["tree", "multinomial"])
def test_the_first_draw_without_replacement_follows_the_ranks(method):
    generator = torch.Generator().manual_seed(7)
    settings = {"draw": "without_replacement", "method": method, "generator": generator}
    buffer = filled(torch.rand(12), **settings)
    first = torch.stack([buffer.sample(3)["index"][0] for _ in range(1500)])
    naive = Ring(12, alpha=ALPHA, rank=True, sort_interval=1)
    naive.extend(range(12), buffer.priority.tolist())
    assert_drawn_from(first, naive.probabilities())


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_only_the_order_of_the_priorities_matters(scale):
    """What rank-based prioritization is for: outliers and the scale of rewards do nothing."""
    priority = torch.tensor([3.0, 1.0, 2.0, 0.5])
    assert ranks(filled(priority * scale)) == [1, 3, 2, 4]
    assert ranks(filled(torch.tensor([1e30, 1.0, 2.0, 0.5]) * scale)) == [1, 3, 2, 4]


def test_between_two_sorts_ranks_are_off_by_no_more_than_the_changes_since(device):
    """Where no priorities are equal; exact is where a transition would be in a full sort."""
    n, interval = 200, 64
    buffer = filled(torch.randperm(n) + 1.0, device=device, alpha=1.0, sort_interval=interval)
    worst = 0
    for _ in range(30):
        index, td_error = torch.randint(n, (8,)), torch.rand(8) * n
        buffer.update_priority(index, td_error)
        order = sorted(range(n), key=lambda i: -buffer.priority[i].item())
        off = [abs(rank - 1 - order.index(i)) for i, rank in enumerate(ranks(buffer))]
        assert changes(buffer) < interval
        assert max(off) <= changes(buffer)
        worst = max(worst, *off)
    assert worst > 0


@pytest.mark.usefixtures("choice")
@pytest.mark.parametrize(
    ("capacity", "interval"),
    few_of_all((1, 7, 16, 50), (1000, 1, 10, 37)),
)
def test_between_two_sorts_it_is_a_buffer_that_counts(capacity, interval, device):
    """Random operations in lockstep, new transitions one by one and many at once."""
    settings = {"sort_interval": interval, "weight_normalization": "buffer"}
    buffer = ranked(capacity, device=device, eps=0.0, **settings)
    naive = Ring(capacity, alpha=ALPHA, eps=0.0, rank=True, sort_interval=interval)
    for step in range(40):
        n = int(torch.randint(1, capacity + 1, ())) if step % 4 == 0 else 1
        given = (torch.rand(n) * 4).floor() / 2 if step % 3 == 0 else None
        buffer.extend(data(naive.written, n, device), given)
        items = range(naive.written, naive.written + n)
        naive.extend(items, None if given is None else given.tolist())
        index, td_error = torch.randint(len(naive), (5,)), (torch.randn(5) * 4).round() / 2
        buffer.update_priority(index, td_error)
        naive.update(index.tolist(), td_error.tolist())
        assert masses(buffer).tolist() == pytest.approx(naive.mass[: len(naive)].tolist(), rel=1e-6)
        smallest = min((m for m in naive.mass if m > 0), default=math.inf)
        assert buffer.smallest_mass.item() == pytest.approx(smallest)
        assert buffer.total_mass.item() == pytest.approx(math.fsum(naive.mass))
        buffer.check_valid()


def test_changed_priorities_get_the_rank_they_would_have_had_at_the_last_sort():
    buffer = filled([4.0, 3.0, 3.0, 2.0, 0.0, 1.0], 8)
    assert ranks(buffer) == [1, 2, 3, 4, 0, 5]
    for value, rank in ((9.0, 1), (4.0, 1), (3.5, 2), (3.0, 2), (2.5, 4), (2.0, 4), (0.1, 6)):
        buffer.update_priority([5], [value])
        assert ranks(buffer)[5] == rank, value
    buffer.update_priority([0], [0.0])
    assert ranks(buffer) == [0, 2, 3, 4, 0, 6]
    buffer.extend(data(6, 2))
    assert ranks(buffer)[6:] == [2, 2]  # the largest is 3 now, which the first of two had rank 2


def test_of_equal_priorities_the_first_slot_has_the_lower_rank_at_a_sort(device):
    buffer = filled([1.0, 2.0, 1.0, 2.0, 1.0], device=device)
    assert ranks(buffer) == [3, 1, 4, 2, 5]


def test_priorities_of_zero_have_no_rank_and_are_never_drawn(device):
    buffer = filled([0.0, 2.0, 0.0, 1.0], device=device, alpha=0.0)
    for alpha in (0.0, 0.7, 3.0):
        buffer.alpha = alpha
        assert masses(buffer).tolist() == pytest.approx([0, 1, 0, 2**-alpha])
        assert set(buffer.sample(200)["index"].tolist()) == {1, 3}


def test_where_all_priorities_are_zero_nothing_can_be_drawn():
    for method in ("tree", "multinomial"):
        buffer = filled([0.0, 0.0], method=method)
        with pytest.raises(EmptyBufferError, match="positive"):
            buffer.sample(1)


def test_extreme_exponents_keep_masses_positive_and_finite():
    buffer = filled(torch.rand(1000), alpha=50.0)
    assert (masses(buffer) > 0).all()
    assert masses(buffer).max() == 1


def test_setting_alpha_takes_the_exact_order():
    buffer = filled([4.0, 3.0, 2.0, 1.0], alpha=0.5)
    buffer.update_priority([3], [9.0])
    assert ranks(buffer) == [1, 2, 3, 1]
    buffer.alpha = 2.0
    assert masses(buffer).tolist() == pytest.approx([2**-2, 3**-2, 4**-2, 1])


def test_alpha_is_by_default_that_of_the_paper():
    assert PrioritizedReplayBuffer(4).alpha == 0.6
    assert ranked(4).alpha == 0.7
    assert ranked(4, alpha=0.0).alpha == 0


@pytest.mark.parametrize(("slots", "interval"), [(10, 256), (256, 256), (300, 300)])
def test_by_default_as_many_changes_as_there_are_transitions_lead_to_a_sort(slots, interval):
    buffer = filled(torch.arange(1.0, slots + 1), 1000)
    index = torch.zeros(1, dtype=torch.int64)
    for k in range(1, interval):
        buffer.update_priority(index, [slots + 1.0])
        assert changes(buffer) == k
    assert ranks(buffer)[-1] == 1
    buffer.update_priority(index, [slots + 1.0])
    assert changes(buffer) == 0
    assert ranks(buffer)[0] == 1
    assert ranks(buffer)[-1] == 2


def test_new_transitions_count_as_changes_and_grow_the_interval():
    counter = Rank(1000, None)
    counter.filled(300)
    assert not counter.changed(99)
    assert not counter.changed(900, new=True)
    assert counter.changed(1), "1000 changes, and no more than 1000 slots"
    counter = Rank(1000, None)
    assert not counter.changed(255, new=True)
    assert counter.changed(1, new=True)


def test_the_courses_interface_has_ranks_too():
    buffer = TransitionReplayBuffer(8, prioritization="rank", epsilon=0.0)
    for k in range(3):
        buffer.push([float(k)], 0, 0.0, [0.0], False)
    buffer.update_priorities([0, 1, 2], [1.0, -5.0, 2.0])
    sort(buffer.buffer)
    assert ranks(buffer.buffer) == [3, 1, 2]


def test_empty_writes_and_updates_change_nothing():
    buffer = filled([1.0, 2.0], 4)
    before = masses(buffer)
    buffer.extend(data(0, 0))
    buffer.update_priority([], [])
    assert torch.equal(masses(buffer), before)


@pytest.mark.usefixtures("choice")
@pytest.mark.parametrize("normalization", ["batch", "buffer"])
def test_a_loaded_buffer_draws_what_the_saved_one_would_have(normalization, tmp_path, device):
    generator = torch.Generator(device).manual_seed(3)
    settings = {"generator": generator, "weight_normalization": normalization, "sort_interval": 70}
    buffer = filled(torch.rand(40).round(decimals=1), 60, device=device, **settings)
    buffer.extend(data(40, 10, device))

    def go_on(buffer):
        out = []
        for k in range(12):  # past the next sort
            batch = buffer.sample(8)
            out.append((batch["index"].tolist(), batch["priority_weight"].tolist()))
            td_error = (batch["action"] * 7 + k) % 11 / 11  # among those at the last sort
            buffer.update_priority(batch["index"], td_error, batch["generation"])
            buffer.extend(data(50 + k, 2, device))
        return out

    for _ in range(2):
        buffer.save(tmp_path / "buffer.pt")
        loaded = PrioritizedReplayBuffer.load(tmp_path / "buffer.pt", device=device)
        assert loaded.prioritization == "rank"
        assert loaded.sort_interval == 70
        assert go_on(loaded) == go_on(buffer)


def test_a_used_buffer_takes_over_a_smaller_state_whole():
    buffer, other = filled([3.0, 1.0, 2.0], 8), filled(torch.rand(8), 8)
    other.load_state_dict(buffer.state_dict())
    assert ranks(other) == [1, 3, 2]
    other.check_valid()
    assert other.total_mass == other.mass.double().sum()
    other.extend(data(3, 1))
    assert ranks(other) == [1, 3, 2, 1]
    sort(other)
    assert ranks(other) == [1, 4, 3, 2]


def test_states_of_the_other_kind_load_and_the_ranks_are_exact_then():
    rank, proportional = filled([3.0, 1.0, 2.0]), PrioritizedReplayBuffer(3, eps=0.0)
    proportional.load_state_dict(rank.state_dict())
    assert masses(proportional).tolist() == pytest.approx([3**0.7, 1, 2**0.7])
    proportional.update_priority([0, 1], [1.5, 5.0])
    rank.load_state_dict(proportional.state_dict())
    assert ranks(rank) == [3, 1, 2]


def test_what_was_ranked_before_a_smaller_state_of_the_other_kind_is_forgotten():
    proportional = PrioritizedReplayBuffer(8, eps=0.0)
    proportional.extend(data(0, 3), torch.tensor([3.0, 1.0, 2.0]))
    used, new = filled(torch.arange(4.0, 12.0)), ranked(8, eps=0.0)
    for buffer in (used, new):
        buffer.load_state_dict(proportional.state_dict())
        buffer.update_priority([0, 1], [2.5, 1.5])
    assert ranks(used) == ranks(new) == [2, 3, 2]


def test_a_table_of_another_capacity_keeps_the_ranking():
    ranked = table(4, alpha=0.7, prioritization="rank", sort_interval=9)
    ranked.write_new(torch.arange(4), torch.tensor([3.0, 1.0, 2.0, 5.0]))
    moved = ranked.moved(3, torch.device("cpu"))
    moved.check_valid()
    assert moved.sort_interval == 9
    assert moved.mass.tolist() == pytest.approx([1, 3**-0.7, 2**-0.7])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prioritization": "ranks"}, "prioritization: expected one of proportional, rank, got"),
        ({"prioritization": "rank", "sort_interval": 0}, "sort_interval: .* at least 1, got 0"),
        ({"prioritization": "rank", "sort_interval": 1.5}, "sort_interval: .*integer.* got 1.5"),
        ({"sort_interval": 10}, "sort_interval: expected none with .*'proportional', got 10"),
        ({"prioritization": "rank", "alpha": -1.0}, "alpha: expected a finite number"),
        ({"prioritization": "rank", "alpha": math.nan}, "alpha: expected a finite number"),
    ],
)
def test_wrong_settings_are_refused_by_name(settings, message):
    with pytest.raises(ConfigurationError, match=message):
        PrioritizedReplayBuffer(10, **settings)


def test_wrong_updates_change_nothing():
    buffer = filled([3.0, 1.0, 2.0], sort_interval=1)
    before = masses(buffer)
    with pytest.raises(ValueError, match="td_error"):
        buffer.update_priority([0, 1], [1.0, math.nan])
    with pytest.raises(IndexError, match="index"):
        buffer.update_priority([0, 3], [1.0, 1.0])
    assert torch.equal(masses(buffer), before)
    assert changes(buffer) == 0


def test_compiled_steps_are_one_graph_each_sort_too_and_are_not_compiled_for_ever():
    torch._dynamo.reset()
    plain, compiled = (filled(torch.linspace(1, 2, 50), sort_interval=40) for _ in range(2))
    count = CompileCounter()
    update = torch.compile(compiled.update_priority, fullgraph=True, backend=count)
    sample = torch.compile(compiled.sample, fullgraph=True, backend=count)
    for _ in range(20):
        index, td_error = torch.randint(50, (16,)), torch.randn(16)
        sample(8)
        update(index, td_error)
        plain.update_priority(index, td_error)
        assert masses(compiled).tolist() == pytest.approx(masses(plain).tolist())
        assert changes(compiled) == changes(plain)
    assert count.frame_count <= 5
    torch._dynamo.reset()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_cuda_neither_updates_nor_sorts_wait_for_the_device():
    buffer = filled(torch.rand(1000), device="cuda", sort_interval=100)
    new = data(0, 30, "cuda")

    def step():
        batch = buffer.sample(64)
        buffer.update_priority(batch["index"], batch["action"] / 100, batch["generation"])
        buffer.extend(new)

    for _ in range(3):
        step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")

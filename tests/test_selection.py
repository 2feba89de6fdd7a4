"""Draws by other rules than priority alone, and their weights, against the closed form."""

import threading

import pytest
import torch

from per_td import ConfigurationError, EmptyBufferError, PrioritizedReplayBuffer
from tests.support.choices import CHOICES
from tests.support.oracle import S, assert_drawn_from, data, numbered
from tests.support.parameters import few_of_all, slow_but
from tests.support.processes import deadline
from tests.support.selections import (
    KNOBS,
    ages,
    filled,
    probabilities,
    rows_of,
    weights,
)

NORMALIZATIONS = ("batch", "buffer", "none")


def setup(buffer, knobs):
    """Set the settings among the knobs; return the arguments of `sample`."""
    buffer.uniform_mix, buffer.latest = knobs["uniform_mix"], knobs["latest"]
    return {"by": knobs["by"], "newest": knobs["newest"]}


def facts(buffer):
    """Masses, ages and numbers of transitions, [S, ...], on the CPU."""
    mass = rows_of(buffer.mass)
    written = torch.tensor([buffer.write_count // len(mass)])  # all alike
    age = ages(written, buffer.capacity).expand_as(mass)
    return mass, age, written.clamp(max=buffer.capacity).view(1, 1)


def check(buffer, knobs, n, batches=1):
    """Draw, compare draws with probabilities and weights with the closed form."""
    sample, drawn = setup(buffer, knobs), []
    mass, age, size = facts(buffer)
    p = probabilities(mass, age, n, **knobs)
    size = size.clamp(max=knobs["newest"] or 10**9)
    for _ in range(batches):
        batch = buffer.sample(n, **sample)
        index, weight = rows_of(batch["index"]), rows_of(batch["priority_weight"])
        expected = weights(p, index, buffer.beta, buffer.weight_normalization, size)
        torch.testing.assert_close(weight.double(), expected, rtol=2e-5, atol=0)
        drawn.append(index)
    index = torch.cat(drawn, 1)
    for own, row in zip(index, p, strict=True):
        assert_drawn_from(own, row)
    return index


@pytest.mark.parametrize("knobs", KNOBS, ids=lambda knobs: "-".join(map(str, knobs.values())))
@pytest.mark.parametrize(
    ("draw", "normalization", "prioritization", "groups"),
    slow_but(
        [
            ("independent", "batch", "proportional", None),
            ("stratified", "buffer", "proportional", S),
            ("independent", "none", "rank", None),
        ],
        [
            (draw, normalization, prioritization, groups)
            for draw in ("independent", "stratified")
            for normalization in NORMALIZATIONS
            for prioritization in ("proportional", "rank")
            for groups in (None, 1, S)
            if prioritization == "proportional" or groups is None
        ],
    ),
)
def test_draws_and_weights_follow_from_the_probabilities_of_every_combination(
    draw, normalization, prioritization, groups, knobs, device, choice
):
    buffer = filled(
        50,
        groups,
        device,
        draw=draw,
        weight_normalization=normalization,
        prioritization=prioritization,
    )
    check(buffer, knobs, 2_000)
    buffer.check_valid()


@pytest.mark.parametrize("draw", ["independent", "stratified"])
@pytest.mark.parametrize("newest", [None, 30])
def test_the_latest_end_every_batch_and_the_others_are_drawn_as_ever(newest, draw, device):
    buffers = filled(50, 1_000, device, draw=draw, latest=9)
    mass, age, _ = facts(buffers)
    index = buffers.sample(16, newest=newest)["index"].cpu()
    slot = torch.arange(71 - 9, 71) % 50
    held = mass[:, slot] > 0
    assert not held.all()
    assert (index[:, -9:] == slot)[held].all()
    p = probabilities(mass, age, 16, by="priority", newest=newest, latest=0, uniform_mix=0.0)
    by_age = torch.zeros(50, dtype=torch.float64).scatter_add_(0, age.flatten(), p.flatten())
    assert_drawn_from(age.gather(1, index[:, :7]).flatten(), by_age / 1_000)
    # those of priority 0 have left their place to others
    rows = held.logical_not().nonzero()[:, 0]
    by_age = torch.zeros(50, dtype=torch.float64).scatter_add_(
        0, age[rows].flatten(), p[rows].flatten()
    )
    spare = age.gather(1, index[:, -9:])[~held]
    assert_drawn_from(spare, by_age / len(rows))


@pytest.mark.parametrize("knobs", [KNOBS[0], *(k for k in KNOBS if k["newest"] == 300)], ids=str)
@pytest.mark.parametrize("capacity", [5_000])
def test_large_buffers_draw_by_the_same_probabilities(capacity, knobs, device, choice):
    buffer = filled(capacity, None, device, wrap=1_234, weight_normalization="buffer")
    check(buffer, knobs, 40_000)


@pytest.mark.parametrize(
    ("by", "method", "choice"),
    few_of_all(["priority", "uniform", "inverse"], ["tree", "multinomial"], CHOICES),
    indirect=["choice"],
)
@pytest.mark.parametrize("normalization", slow_but(["buffer"], NORMALIZATIONS))
def test_draws_without_replacement_are_distinct_and_begin_by_the_probabilities(
    normalization, method, by, device, choice
):
    buffers = filled(
        50,
        2_000,
        device,
        draw="without_replacement",
        method=method,
        weight_normalization=normalization,
    )
    mass, age, size = facts(buffers)
    p = probabilities(mass, age, 1, by=by, newest=None, latest=0, uniform_mix=0.0)
    first = buffers.sample(1, by=by)["index"].cpu()
    by_age = torch.zeros(50, dtype=torch.float64).scatter_add_(0, age.flatten(), p.flatten())
    assert_drawn_from(age.gather(1, first).flatten(), by_age / len(age))
    batch = buffers.sample(9, by=by)
    index = batch["index"].cpu()
    assert all(len(set(row)) == 9 for row in index.tolist())
    assert (p.gather(1, index) > 0).all()
    expected = weights(p, index, buffers.beta, normalization, size)
    torch.testing.assert_close(batch["priority_weight"].cpu().double(), expected, rtol=2e-5, atol=0)


@pytest.mark.parametrize("by", ["uniform", "inverse"])
def test_without_replacement_no_more_are_drawn_than_have_a_positive_priority(by, choice):
    buffer = PrioritizedReplayBuffer(10, draw="without_replacement")
    buffer.extend(data(0, 6), [0.0, 1.0, 2.0, 0.0, 3.0, 0.0])
    assert sorted(buffer.sample(3, by=by)["index"].tolist()) == [1, 2, 4]
    with pytest.raises(EmptyBufferError, match="expected at least 4"):
        buffer.sample(4, by=by)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"uniform_mix": 0.1}, "uniform_mix: expected 0 with draw='without_replacement', got 0.1"),
        ({"latest": 2}, "latest: expected none with draw='without_replacement', got 2"),
    ],
)
def test_draws_without_replacement_refuse_a_mixture_and_the_latest_in_any_order(settings, match):
    ((name, value),) = settings.items()
    with pytest.raises(ConfigurationError, match=match):
        PrioritizedReplayBuffer(10, draw="without_replacement", **settings)
    buffer = PrioritizedReplayBuffer(10, draw="without_replacement")
    with pytest.raises(ConfigurationError, match=match):
        setattr(buffer, name, value)
    assert getattr(buffer, name) == 0
    buffer = PrioritizedReplayBuffer(10, **settings)
    with pytest.raises(ConfigurationError, match=match):
        buffer.draw = "without_replacement"
    assert (buffer.draw, getattr(buffer, name)) == ("independent", value)
    buffer.extend(data(0, 9))
    buffer.sample(5)


@pytest.mark.parametrize("groups", [None, S])
@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"by": "random"}, "by: expected one of"),
        ({"by": None}, "by: expected one of"),
        ({"newest": 0}, "newest: expected"),
        ({"newest": -1}, "newest: expected"),
        ({"newest": 2.5}, "newest: expected"),
        ({"newest": True}, "newest: expected"),
        ({"newest": "all"}, "newest: expected"),
        ({"newest": 3, "draw": "without_replacement"}, "newest: expected none with draw="),
        ({"batch_size": 2, "latest": 2}, "batch_size: expected more than latest=2, got 2"),
        ({"batch_size": 1, "latest": 2}, "batch_size: expected more than latest=2, got 1"),
        ({"batch_size": 2, "latest": 2, "by": "inverse"}, "batch_size: expected more than"),
    ],
    ids=str,
)
def test_a_draw_that_makes_no_sense_is_refused_by_name_and_changes_nothing(given, match, groups):
    settings = {name: given[name] for name in ("draw", "latest") if name in given}
    buffer = filled(50, groups, torch.device("cpu"), track_draws=True, **settings)
    before = buffer.generator.get_state()
    with pytest.raises(ConfigurationError, match=match):
        buffer.sample(
            given.get("batch_size", 4), **{k: given[k] for k in ("by", "newest") if k in given}
        )
    assert not buffer.draw_count.any()
    assert torch.equal(buffer.generator.get_state(), before)
    buffer.sample(4)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("uniform_mix", value) for value in (-0.1, 1.1, float("nan"), "x", None, [0.1])),
        *(("latest", value) for value in (-1, 1.5, "x", None, True)),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(name, value):
    with pytest.raises(ConfigurationError, match=f"^{name}: expected"):
        PrioritizedReplayBuffer(10, **{name: value})
    buffer = PrioritizedReplayBuffer(10)
    with pytest.raises(ConfigurationError, match=f"^{name}: expected"):
        setattr(buffer, name, value)
    assert getattr(buffer, name) == 0


@pytest.mark.parametrize(
    "knobs",
    slow_but([k for k in KNOBS if k["newest"] in (None, 9)], KNOBS),
    ids=lambda knobs: "-".join(map(str, knobs.values())),
)
@pytest.mark.parametrize("groups", [None, S])
def test_where_nothing_can_be_drawn_every_way_raises_and_draws_nothing(groups, knobs, choice):
    buffer = PrioritizedReplayBuffer(50, num_buffers=groups, track_draws=True)
    buffer.uniform_mix, buffer.latest = knobs["uniform_mix"], knobs["latest"]
    given = {"by": knobs["by"], "newest": knobs["newest"]}
    with pytest.raises(EmptyBufferError):
        buffer.sample(20, **given)
    transitions = numbered(0, 30) if groups else data(0, 30)
    priority = torch.zeros(transitions.shape)
    buffer.extend(transitions, priority)
    with pytest.raises(EmptyBufferError, match="got only masses of 0"):
        buffer.sample(20, **given)
    if groups:  # one of them can
        priority[1] = 1.0
        buffer.extend(transitions, priority)
        with pytest.raises(EmptyBufferError, match=r"got only masses of 0 in 2 of 3: 0, 2"):
            buffer.sample(20, **given)
    assert not buffer.draw_count.any()
    priority[..., -1] = 1.0
    buffer.extend(transitions, priority)
    index = buffer.sample(20, **given)["index"]
    held = buffer.priority if groups else buffer.priority[None]
    assert (held.gather(1, rows_of(index)) > 0).all()


@pytest.mark.parametrize("groups", [None, S])
def test_a_window_of_zeros_cannot_be_drawn_from_though_older_ones_can(groups, choice):
    buffer = PrioritizedReplayBuffer(50, num_buffers=groups)
    transitions = numbered(0, 20) if groups else data(0, 20)
    priority = torch.ones(transitions.shape)
    priority[..., 15:] = 0.0
    buffer.extend(transitions, priority)
    for by in ("priority", "uniform", "inverse"):
        with pytest.raises(EmptyBufferError, match="got only masses of 0"):
            buffer.sample(4, by, 5)
        assert (buffer.sample(4, by, 6)["index"] == 14).all()


@pytest.mark.parametrize("groups", [None, S])
def test_more_latest_than_there_are_transitions_is_refused_until_there_are(groups, choice):
    buffer = PrioritizedReplayBuffer(50, 8, num_buffers=groups, latest=5)
    transitions = numbered(0, 5) if groups else data(0, 5)
    buffer.extend(transitions[..., :4])
    with pytest.raises(EmptyBufferError, match="expected at least latest=5 transitions, got 4"):
        buffer.sample()
    buffer.extend(transitions[..., 4:])
    assert (buffer.sample()["index"][..., -5:] == torch.arange(5)).all()
    buffer.sample(5 + 1)


def test_buffers_filled_unlike_each_draw_from_their_own_newest(choice):
    buffers = PrioritizedReplayBuffer(20, num_buffers=S)
    mask = torch.zeros(S, 30, dtype=torch.bool)
    for s, n in enumerate((3, 20, 30)):
        mask[s, :n] = True
    buffers.extend(numbered(0, 30), mask=mask)
    age = ages(torch.tensor([3, 20, 30]), 20)
    for newest in (1, 2, 8, 20):
        p = probabilities(
            buffers.mass, age, 1_000, by="priority", newest=newest, latest=0, uniform_mix=0.0
        )
        batch = buffers.sample(1_000, newest=newest)
        for own, row in zip(batch["index"], p, strict=True):
            assert_drawn_from(own, row)
        w = weights(
            p, batch["index"], 0.4, "batch", torch.tensor([[3], [20], [20]]).clamp(max=newest)
        )
        torch.testing.assert_close(batch["priority_weight"].double(), w, rtol=2e-5, atol=0)


@pytest.mark.parametrize(
    "knobs", [k for k in KNOBS if k["newest"] in (None, 33) and k["uniform_mix"] < 1], ids=str
)
@pytest.mark.parametrize("prioritization", ["proportional", "rank"])
def test_draws_follow_priorities_that_change(prioritization, knobs, device, choice):
    """Writes, updates, settings of alpha and of single priorities reach the side trees."""
    buffer = filled(50, None, device, prioritization=prioritization, sort_interval=None)
    setup(buffer, knobs)
    buffer.sample(30, by="inverse")  # makes the trees that have to follow
    random = torch.Generator().manual_seed(1)

    def k(n):
        return {"k": torch.arange(n, device=device)}

    for step in range(6):
        index = torch.randint(50, (20,), generator=random).to(device)
        change = [
            lambda i: buffer.update_priority(i, torch.randn(20, generator=random).to(device)),
            lambda i: buffer.set_priority(i, torch.zeros(20, device=device)),
            lambda i: buffer.extend(k(7), torch.arange(7.0, device=device)),
            lambda i: buffer.extend(k(3)),
            lambda i: setattr(buffer, "alpha", 0.9),
            lambda i: buffer.set_priority(i, torch.rand(20, generator=random).to(device)),
        ][step]
        change(index)
        buffer.check_valid()
        check(buffer, knobs, 1_000)


def test_extreme_masses_keep_inverse_probabilities_positive(device, choice):
    buffer = PrioritizedReplayBuffer(
        4, alpha=1.0, device=device, beta=0.5, weight_normalization="none"
    )
    buffer.extend(data(0, 4, device), torch.tensor([1e-45, 3.4e38, 1.0, 0.0], device=device))
    for by in ("inverse", "uniform", "priority"):
        batch = buffer.sample(200, by=by)
        assert (batch["priority_weight"].isfinite() & (batch["priority_weight"] > 0)).all()
        assert not (batch["index"] == 3).any()
    buffer.check_valid()


def test_draws_by_other_rules_go_past_what_was_drawn_ahead():
    with deadline(60):
        buffer = PrioritizedReplayBuffer(50, 4, prefetch=3, latest=1)
        buffer.extend(data(0, 20))
        before = buffer.sample()  # the queue fills with batches in which 19 is the newest
        assert before["index"][-1] == 19
        buffer.extend(data(20, 1))
        assert buffer.sample(newest=1)["index"].tolist() == [20] * 4
        assert buffer.sample(by="uniform")["index"][-1] == 20
        buffer.latest = 2  # drops the queue
        assert buffer.sample()["index"].tolist()[-2:] == [19, 20]
        buffer.set_priority(torch.arange(21), (torch.arange(21) == 5).float())
        buffer.uniform_mix = 1.0
        buffer.latest = 0
        assert (buffer.sample()["index"] == 5).all()
        buffer.close()


def test_many_threads_draw_in_every_way_at_once():
    with deadline(60):
        buffer = PrioritizedReplayBuffer(500, 16, threads=True, uniform_mix=0.5, track_draws=True)
        buffer.extend(data(0, 300))
        failed = []

        def work(seed):
            random = torch.Generator().manual_seed(seed)
            try:
                for k in range(60):
                    batch = buffer.sample(
                        by=("priority", "uniform", "inverse")[k % 3], newest=(None, 50)[k % 2]
                    )
                    error = torch.rand(16, generator=random)
                    buffer.update_priority(
                        batch["index"],
                        error,
                        batch["generation"],
                        mode=("max", "mean")[k % 2],
                        rate=0.5,
                    )
                    buffer.extend(data(k, 9))
            except BaseException as error:
                failed.append(error)

        threads = [threading.Thread(target=work, args=(s,)) for s in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failed
        buffer.check_valid()

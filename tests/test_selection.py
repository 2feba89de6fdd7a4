"""Draws by other rules than priority alone, and their weights, against the closed form."""

import pytest
import torch

from per_td import ConfigurationError, EmptyBufferError, PrioritizedReplayBuffer
from tests.support.choices import CHOICES
from tests.support.oracle import S, assert_drawn_from, data, numbered
from tests.support.parameters import slow_but
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
    written = torch.full((len(mass),), buffer.write_count // len(mass))
    return mass, ages(written, buffer.capacity), written.clamp(max=buffer.capacity).view(-1, 1)


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

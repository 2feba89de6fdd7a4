import math

import pytest
import torch

from per_td.weights import importance_weights, mass_of, priority_of

P = [0.1, 2.0, 0.0, 30.0, 0.7, 5.0]
ALPHA, BETA = 0.37, 0.83


@pytest.mark.parametrize("normalization", ["batch", "buffer", "none"])
def test_weights_follow_the_papers_formula(normalization, device):
    priority = torch.tensor(P, device=device)
    mass = mass_of(priority, ALPHA)
    index = [1, 3, 1, 5]
    masses = [p**ALPHA if p else 0.0 for p in P]
    everything = [(len(P) * m / sum(masses)) ** -BETA if m else 0.0 for m in masses]
    batch = [everything[i] for i in index]
    largest = {"batch": max(batch), "buffer": max(everything), "none": 1.0}[normalization]
    weights = importance_weights(
        mass[index],
        BETA,
        total=mass.double().sum(),
        size=len(P),
        smallest=mass[mass > 0].min(),
        normalization=normalization,
    )
    assert weights.dtype == torch.float32
    assert weights.tolist() == pytest.approx([w / largest for w in batch], rel=1e-5)


def test_a_beta_of_zero_corrects_nothing():
    mass = torch.tensor([1.0, 5.0])
    for normalization in ("batch", "none"):
        weights = importance_weights(
            mass, 0.0, total=mass.sum(), size=2, smallest=None, normalization=normalization
        )
        assert weights.tolist() == [1.0, 1.0]


def test_priorities_are_the_absolute_td_error_plus_eps():
    td_error = torch.tensor([-2.0, 0.0, 3.0])
    assert priority_of(td_error, 0.5).tolist() == [2.5, 0.5, 3.5]


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0, 2.5])
def test_masses_are_powers_of_the_priority_and_zero_stays_zero(alpha):
    mass = mass_of(torch.tensor([0.0, 0.5, 1.0, 7.0]), alpha)
    assert mass.tolist() == pytest.approx([0.0, 0.5**alpha, 1.0, 7.0**alpha], rel=1e-6)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 3.0])
def test_masses_of_extreme_priorities_stay_positive_and_finite(alpha):
    mass = mass_of(torch.tensor([1e-38, 1e-30, 1e30, 3e38]), alpha)
    assert (mass > 0).all()
    assert mass.isfinite().all()
    assert math.isfinite(mass.double().sum())

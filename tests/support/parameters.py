"""Parameters of which a few are for every run, and the others of the same kind are slow."""

from itertools import product

import pytest


def slow_but(usual, cases) -> list:
    """All `cases` for `pytest.mark.parametrize`; those that are not in `usual` are marked slow."""
    usual, cases = list(usual), list(cases)
    assert all(case in cases for case in usual), "a usual case that is none"
    return [
        pytest.param(
            *(case if isinstance(case, tuple) else (case,)),
            marks=[pytest.mark.slow] * (case not in usual),
        )
        for case in cases
    ]


def few_of_all(*axes) -> list:
    """All combinations of the values of some axes, slow but for a few that have each value."""
    axes = [list(axis) for axis in axes]
    usual = [tuple(axis[k % len(axis)] for axis in axes) for k in range(max(map(len, axes)))]
    return slow_but(usual, product(*axes))

"""Parameters of which a few are for every run, and the others of the same kind are slow."""

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

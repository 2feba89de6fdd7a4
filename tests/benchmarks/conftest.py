"""No test of this folder measures how fast anything is."""

import gc

import pytest


@pytest.fixture(scope="module", autouse=True)
def _garbage_may_lie():
    """Spare the collections before each measurement: with all tests loaded each takes a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gc, "collect", lambda: 0)
        yield

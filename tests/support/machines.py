"""What the state machines share: values to draw from, kernels on and off, short and long runs."""

import os
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

from per_td import kernels

SOAK = float(os.environ.get("PER_TD_SOAK", "0"))
CAN_BE = st.sampled_from
EXTREME = CAN_BE([0.0, 1e-45, 1e-38, 3.4e38])
PRIORITY = st.floats(0, 1e4, width=32) | CAN_BE([0.5, 1.0, 2.0]) | EXTREME
TD_ERROR = st.floats(-1e4, 1e4, width=32) | CAN_BE([-1.0, 1.0, 2.0]) | EXTREME
ALPHA = CAN_BE([0.0, 0.37, 0.6, 1.0, 2.0])
EPS = CAN_BE([0.0, 1e-6, 0.01])
UNIT = st.floats(0, 1)

DRAWS = [("independent", "tree"), ("stratified", "tree"), ("independent", "multinomial")]
DRAWS += [("without_replacement", method) for method in ("auto", "tree", "multinomial")]


def as_it_is(batch):
    """A collate function that can be pickled, and sends the drop-in buffer TorchRL's way."""
    return batch


def check_drawn(index, mass, point, *, stratified=False) -> None:
    """These are the slots at the points in [0, 1) of the cumulative mass; numpy [B], [N], [B]."""
    n, reached = len(index), np.concatenate([[0.0], np.cumsum(mass)])
    if stratified:
        point = (np.arange(n) + point) / n
    target, slack = point * reached[-1], 1e-9 * reached[-1]
    assert (reached[index] - slack <= target).all()
    assert (target <= reached[index + 1] + slack).all()
    assert (mass[index] > 0).all()


class Kernels(RuleBasedStateMachine):
    """With the CPU's kernels, or without."""

    cases = steps = 0

    def choose(self, choice: str) -> None:
        type(self).cases += 1
        self.patch = pytest.MonkeyPatch()
        self.patch.setenv(kernels.VARIABLE, choice)

    def teardown(self) -> None:
        if hasattr(self, "patch"):
            self.patch.undo()


def run(machine, examples, **given) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=25,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
            print_blob=True,
            **given,
        ),
    )


def soak(machine) -> None:
    """Other examples each time, for as many seconds as PER_TD_SOAK says; tells how many."""
    start, cases, steps = time.monotonic(), machine.cases, machine.steps
    while time.monotonic() - start < SOAK:
        run(machine, 50, derandomize=False)
    done = f"{machine.cases - cases} cases, {machine.steps - steps} states compared"
    print(f"\n{machine.__name__}: {done}, {time.monotonic() - start:.0f} s")

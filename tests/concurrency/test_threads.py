"""One buffer in several threads of a process."""

import contextlib
import copy
import os
import pickle
import threading
import time
from itertools import product

import pytest
import torch

from per_td import PrioritizedReplayBuffer
from per_td.errors import SchemaError
from tests.support.parameters import slow_but
from tests.support.processes import deadline, initial, learn, shared, torn, transitions


@pytest.fixture(autouse=True)
def _no_deadlock():
    with deadline(120):
        yield


def make(capacity, **settings):
    return PrioritizedReplayBuffer(capacity, eps=0.0, **{"threads": True, **settings})


@pytest.mark.parametrize(
    ("kind", "layout"),
    slow_but(
        [("threads", "records"), ("prefetch", "columns"), ("shared", "records")],
        product(["threads", "prefetch", "shared"], ["records", "columns"]),
    ),
)
def test_a_thread_that_extends_beside_a_learner_tears_nothing(kind, layout):
    made = {
        "threads": lambda: make(300, layout=layout),
        "prefetch": lambda: make(300, layout=layout, prefetch=3, batch_size=64),
        "shared": lambda: shared(300, layout=layout),
    }
    buffer, stop, failed = made[kind](), threading.Event(), []

    def extend():
        done = 0
        try:
            while not stop.is_set():
                ids = torch.arange(done, done + 150)
                buffer.extend(transitions(ids), initial(ids))
                done += 150
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=extend)
    thread.start()
    while not len(buffer):
        time.sleep(0.001)
    end, found, batches = time.monotonic() + 1.0, 0, 0
    while time.monotonic() < end or batches < 30 or buffer.write_count < 3000:
        found += learn(buffer)
        batches += 1
    stop.set()
    thread.join()
    assert not failed
    assert found == 0
    assert torn(buffer.transitions) == 0
    newest = buffer.write_count - torch.arange(300, 0, -1)
    assert torch.equal(buffer.transitions["id"].sort().values, newest)
    buffer.check_valid()
    if kind == "prefetch":
        buffer.close()


class Watch:
    """Stands for a lock, and counts who has it."""

    def __init__(self):
        self.held = 0

    def __enter__(self):
        self.held += 1

    def __exit__(self, *_):
        self.held -= 1


class Guarded:
    """Stands for a part of a buffer, and notes whether the lock is held where it is used."""

    def __init__(self, part, watch, used):
        self.__dict__.update(part=part, watch=watch, used=used)

    def __getattr__(self, name):
        self.used.append(self.watch.held > 0)
        return getattr(self.part, name)

    def __setattr__(self, name, value):
        self.used.append(self.watch.held > 0)
        setattr(self.part, name, value)

    def __len__(self):
        return self.__getattr__("__len__")()


BATCH = transitions(range(4)).set("index", torch.arange(4)).set("td_error", torch.ones(4))
STATE = PrioritizedReplayBuffer(10).state_dict()
CALLS = {
    "add": lambda b: b.add(transitions(3)),
    "extend": lambda b: b.extend(transitions(range(3))),
    "extend_leaves": lambda b: b.extend_leaves({("id",): torch.arange(3)}),
    "sample": lambda b: b.sample(4),
    "sample_leaves": lambda b: b.sample_leaves(4),
    "update_priority": lambda b: b.update_priority([0], [1.0], [0]),
    "update_tensordict_priority": lambda b: b.update_tensordict_priority(BATCH),
    "increase_beta": lambda b: b.increase_beta(),
    "alpha": lambda b: setattr(b, "alpha", 0.3),
    "priority": lambda b: b.priority,
    "diagnostics": lambda b: b.diagnostics(),
    "state_dict": lambda b: b.state_dict(),
    "load_state_dict": lambda b: b.load_state_dict(STATE),
    "save": lambda b: b.save(os.devnull + "/buffer"),
}


@pytest.mark.parametrize("name", CALLS)
def test_every_call_holds_the_lock_wherever_it_uses_the_buffer_and_gives_it_back(name):
    buffer, watch, used = make(10), Watch(), []
    buffer.extend(transitions(range(5)))
    buffer._lock = watch
    for part in ("_beta",) if name == "increase_beta" else ("_storage", "_priorities"):
        setattr(buffer, part, Guarded(getattr(buffer, part), watch, used))
    with contextlib.suppress(SchemaError, NotADirectoryError):
        CALLS[name](buffer)
    assert used
    assert all(used)
    assert watch.held == 0


def test_an_error_gives_the_lock_back():
    buffer = make(10)
    buffer.extend(transitions(range(5)))
    with pytest.raises(SchemaError):
        buffer.extend(transitions(range(5)).exclude("id"))
    other = threading.Thread(target=lambda: buffer.sample(4))
    other.start()
    other.join(30)
    assert not other.is_alive()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda made: pickle.loads(pickle.dumps(made))])
def test_a_copy_has_a_lock_and_transitions_of_its_own(copied):
    buffer = make(10, alpha=0.7)
    buffer.extend(transitions(range(5)))
    other = copied(buffer)
    other.add(transitions(5))
    assert (len(buffer), len(other), other.alpha) == (5, 6, 0.7)
    assert other._lock is not buffer._lock


def test_without_prefetch_no_thread_is_started_and_priorities_are_a_copy():
    buffer, running = make(10, batch_size=4), threading.active_count()
    buffer.extend(transitions(torch.arange(5)), torch.ones(5))
    before = buffer.priority
    buffer.sample()
    buffer.update_priority([0], [7.0])
    assert before.tolist() == [1.0] * 5
    assert threading.active_count() == running

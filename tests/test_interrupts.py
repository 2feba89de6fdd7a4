"""Ctrl-C in the middle of a call of a plain buffer: what is written has its priority."""

import copy
import errno
import linecache
import pickle
import subprocess
import sys
import threading

import pytest
import torch
from tensordict import TensorDict

from per_td import PerTdError, PrioritizedReplayBuffer, kernels
from tests.support import processes
from tests.support.choices import CHOICES
from tests.support.parameters import few_of_all
from tests.support.processes import torn, transitions

needs_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux")


@pytest.fixture(params=CHOICES)
def choice(request, monkeypatch) -> str:
    monkeypatch.setenv(kernels.VARIABLE, request.param)
    return request.param


# the interpreter looks for signals at calls: not at these, nor where a with or try begins or ends
NEVER_INTERRUPTED = ("self._busy = False", "depth = self._", "try:", "with self._")


class InterruptAfter:
    """Raises KeyboardInterrupt at the n-th line of per_td that runs, once."""

    def __init__(self, lines: int):
        self.left, self.raised = lines, False

    def __call__(self, frame, event, arg):
        name = frame.f_code.co_filename
        if "/per_td/" not in name or "/tests/" in name:
            return None
        line = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
        if event == "line" and not self.raised and not line.startswith(NEVER_INTERRUPTED):
            self.left -= 1
            if self.left <= 0:
                self.raised = True
                raise KeyboardInterrupt
        return self

    def run(self, call) -> bool:
        """True if `call` was interrupted."""
        before = sys.gettrace()
        sys.settrace(self)
        try:
            call()
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(before)
        return False


def every_line(make, call, check, step=1):
    """Interrupt `call(made)` at one line after the other, and `check` what is left."""
    lines, found = 1, 0
    while True:
        made = make()
        if not InterruptAfter(lines).run(lambda: call(made)):  # noqa: B023
            assert found
            return
        check(made)
        found += 1
        lines += step


@pytest.mark.parametrize(
    ("draw", "layout", "rated", "choice"),
    few_of_all(["proportional", "rank"], ["columns", "records"], [False, True], CHOICES),
    indirect=["choice"],
)
def test_an_interrupted_extend_has_written_all_or_nothing(draw, layout, rated, choice):
    new = transitions(range(100, 106))
    priority = torch.full((6,), 2.0) if rated else None

    def make():
        buffer = PrioritizedReplayBuffer(20, 8, layout=layout, prioritization=draw)
        buffer.extend(transitions(range(17)))
        return buffer

    def check(buffer):
        buffer.check_valid()
        assert torn(buffer.transitions) == 0
        done = buffer.write_count - 17
        assert done in (0, 6)
        assert len(buffer) == 17 + done // 2
        assert (buffer.priority > 0).all()
        ids = buffer.transitions["id"]
        assert ((ids >= 100).sum() == 6) == (done == 6)

    every_line(
        make, lambda buffer: buffer.extend(new, priority), check, 1 if layout == "columns" else 5
    )


def test_an_interrupted_update_leaves_sums_that_follow_from_the_priorities(choice):
    batch = torch.arange(8)

    def make():
        buffer = PrioritizedReplayBuffer(200, 8, weight_normalization="buffer")
        buffer.extend(transitions(range(170)))
        return buffer

    def check(buffer):
        buffer.check_valid()
        assert (buffer.priority > 0).all()

    every_line(make, lambda buffer: buffer.update_priority(batch, batch + 3.0), check)


@pytest.mark.parametrize("settings", [{}, {"num_buffers": 2}, {"frames": {"x": 2}}])
def test_an_interrupted_empty_has_forgotten_all_or_nothing(settings, choice):
    td = numbered(settings, 0, 17)

    def make():
        buffer = PrioritizedReplayBuffer(10, 8, **settings)
        buffer.extend(td)
        return buffer, buffer.sample()

    def check(made):
        buffer, batch = made
        buffer.check_valid()
        assert len(buffer) in (0, 10)
        assert buffer.write_count == td.numel()
        buffer.update_priority(batch["index"], batch["priority_weight"], batch["generation"])
        if not len(buffer):
            assert buffer.stats()["stale_updates"] == batch.numel()
            buffer.extend(numbered(settings, 100, 1))
            assert (buffer.sample()["id"] >= 100).all()

    every_line(make, lambda made: made[0].empty(), check)


@pytest.mark.parametrize(
    ("settings", "choice"),
    few_of_all([{}, {"num_buffers": 2}, {"frames": {"x": 2}}, {"prioritization": "rank"}], CHOICES),
    indirect=["choice"],
)
@pytest.mark.parametrize("capacity", [10, 7])
def test_an_interrupted_load_has_taken_over_all_or_nothing(settings, capacity, choice):
    source = PrioritizedReplayBuffer(10, 8, eps=0.5, **settings)
    source.extend(numbered(settings, 100, 17))
    state = source.state_dict()

    def make():
        buffer = PrioritizedReplayBuffer(capacity, 8, **settings)
        buffer.extend(numbered(settings, 0, 3))
        return buffer

    def check(buffer):
        buffer.check_valid()
        new = buffer.eps == 0.5
        assert len(buffer) == (capacity if new else 3)
        assert ((buffer.sample()["id"] >= 100) == new).all()

    every_line(make, lambda buffer: buffer.load_state_dict(state), check, 3)


def numbered(settings, first, n):
    """Transitions [n] or [S, n] with stacks of two frames."""
    number = torch.arange(first, first + n)
    stacks = torch.stack([number, number + 1], -1).float()
    td = TensorDict({"id": number, "x": stacks, "next": {"x": stacks + 1}}, [n])
    many = settings.get("num_buffers")
    return td if many is None else torch.stack([td] * many)


def test_an_interrupted_change_of_alpha_leaves_masses_that_follow_from_one(choice):
    def make():
        buffer = PrioritizedReplayBuffer(200, 8)
        buffer.extend(transitions(range(170)), torch.linspace(0.5, 3.0, 170))
        return buffer

    def check(buffer):
        buffer.check_valid()
        assert buffer.alpha in (0.6, 0.25)

    every_line(make, lambda buffer: setattr(buffer, "alpha", 0.25), check)


@pytest.mark.parametrize(
    ("changes", "choice"),
    few_of_all(
        [
            {"draw": "stratified"},
            {"weight_normalization": "buffer"},
            {"weight_normalization": "none"},
        ],
        CHOICES,
    ),
    indirect=["choice"],
    ids=str,
)
def test_an_interrupted_choice_leaves_settings_that_go_together(changes, choice):
    (name, value), start = next(iter(changes.items())), {"weight_normalization": "buffer"}
    start = {} if value == "buffer" or name == "draw" else start

    def make():
        buffer = PrioritizedReplayBuffer(200, 8, **start)  # so small that torch.multinomial draws
        buffer.extend(transitions(range(170)), torch.linspace(0.5, 3.0, 170))
        return buffer

    def check(buffer):
        buffer.check_valid()
        assert buffer.sample()["priority_weight"].isfinite().all()
        setattr(buffer, name, value)
        assert (buffer.sample()["priority_weight"] > 0).all()
        buffer.check_valid()

    every_line(make, lambda buffer: setattr(buffer, name, value), check)


def test_a_call_from_within_a_change_is_refused_and_the_change_goes_on(choice, monkeypatch):
    buffer, refused = PrioritizedReplayBuffer(20, 8), []
    buffer.extend(transitions(range(10)))
    inner = {
        "extend": lambda: buffer.extend(transitions(range(3))),
        "sample": buffer.sample,
        "sample newest": lambda: buffer.sample(by="uniform", newest=3),
        "sweep": lambda: buffer.sweep(3),
        "set_priority": lambda: buffer.set_priority([0], [1.0]),
        "max": lambda: buffer.update_priority([0], [1.0], mode="max", rate=0.5),
        "uniform_mix": lambda: setattr(buffer, "uniform_mix", 0.5),
        "update": lambda: buffer.update_priority([0], [1.0]),
        "alpha": lambda: setattr(buffer, "alpha", 0.1),
        "empty": buffer.empty,
        "load": lambda: buffer.load_state_dict(state),
        "state": buffer.state_dict,
        "copy": lambda: copy.deepcopy(buffer),
        "pickle": lambda: pickle.dumps(buffer),
    }
    state, write = buffer.state_dict(), PrioritizedReplayBuffer._write

    def interrupted(self, *args):
        for name, call in inner.items():
            with pytest.raises(PerTdError, match="from within another call of the buffer"):
                call()
            refused.append(name)
        write(self, *args)

    monkeypatch.setattr(PrioritizedReplayBuffer, "_write", interrupted)
    buffer.extend(transitions(range(100, 104)))
    assert refused == list(inner)
    monkeypatch.undo()
    assert buffer.transitions["id"].tolist() == [*range(10), *range(100, 104)]
    for call in inner.values():
        call()
    buffer.check_valid()


SETTERS = {
    "set_priority": lambda buffer, index: buffer.set_priority(index, index + 3.0),
    "clip": lambda buffer, index: buffer.update_priority(index, index + 3.0),
    "max": lambda buffer, index: buffer.update_priority(index, index + 3.0, mode="max", rate=0.5),
    "mean": lambda buffer, index: buffer.update_priority(index, index * 3.0, mode="mean", rate=0.5),
}


@pytest.mark.parametrize(
    ("setter", "draw", "choice"),
    few_of_all(SETTERS, ["proportional", "rank"], CHOICES),
    indirect=["choice"],
)
def test_an_interrupted_way_to_set_priorities_leaves_sides_that_follow(setter, draw, choice):
    def make():
        clip = (0.5, 4.0) if setter == "clip" else None
        buffer = PrioritizedReplayBuffer(
            200, 8, uniform_mix=0.5, priority_clip=clip, prioritization=draw
        )
        buffer.extend(transitions(range(170)))
        buffer.sample(by="inverse")
        return buffer

    def check(buffer):
        buffer.check_valid()
        assert (buffer.priority > 0).all()
        assert (buffer.sample(by="inverse")["priority_weight"] > 0).all()

    step = 2 if draw == "proportional" else 7
    every_line(make, lambda buffer: SETTERS[setter](buffer, torch.arange(8)), check, step)


@pytest.mark.parametrize(
    ("rated", "choice"), few_of_all([False, True], CHOICES), indirect=["choice"]
)
def test_an_interrupted_extend_leaves_sides_and_counts_that_follow(rated, choice):
    new = transitions(range(100, 106))
    priority = torch.tensor([2.0, 0.0] * 3) if rated else None

    def make():
        buffer = PrioritizedReplayBuffer(20, 8, uniform_mix=0.5, track_draws=True)
        buffer.extend(transitions(range(17)))
        buffer.sample(200, by="inverse")
        assert (buffer.draw_count > 0).all()
        return buffer

    def check(buffer):
        buffer.check_valid()
        done = buffer.write_count - 17
        assert done in (0, 6)
        written = [17, 18, 19, 0, 1, 2] if done else []
        counts = buffer.draw_count.tolist()
        assert all((count == 0) == (i in written) for i, count in enumerate(counts))

    every_line(make, lambda buffer: buffer.extend(new, priority), check, 3)


DRAWN = {
    "mixture": lambda buffer: buffer.sample(),
    "uniform": lambda buffer: buffer.sample(by="uniform"),
    "the first inverse": lambda buffer: buffer.sample(by="inverse"),
    "newest": lambda buffer: buffer.sample(by="inverse", newest=50),
}


@pytest.mark.parametrize(("draw", "choice"), few_of_all(DRAWN, CHOICES), indirect=["choice"])
def test_an_interrupted_draw_leaves_a_buffer_that_draws(draw, choice):
    def make():
        buffer = PrioritizedReplayBuffer(200, 8, uniform_mix=0.5, latest=2, track_draws=True)
        buffer.extend(transitions(range(170)))
        return buffer

    def check(buffer):
        buffer.update_priority([3], [2.0])
        buffer.check_valid()
        assert DRAWN[draw](buffer)["priority_weight"].isfinite().all()
        assert buffer.draw_count.sum() in (8, 16)

    every_line(make, DRAWN[draw], check, 2)


CHANGES = {
    "uniform_mix": (0.5, 0.0),
    "latest": (2, 0),
    "priority_clip": ((1.0, 2.0), None),
}


@pytest.mark.parametrize(("name", "choice"), few_of_all(CHANGES, CHOICES), indirect=["choice"])
def test_an_interrupted_change_of_a_knob_leaves_the_old_one_or_the_new_one(name, choice):
    for value in CHANGES[name]:

        def make():
            buffer = PrioritizedReplayBuffer(200, 8)
            buffer.extend(transitions(range(170)))
            return buffer

        before = getattr(make(), name)

        def check(buffer, allowed=(before, value)):
            assert getattr(buffer, name) in allowed
            buffer.check_valid()
            buffer.sample()
            buffer.update_priority([3], [2.0])
            buffer.check_valid()

        every_line(make, lambda buffer: setattr(buffer, name, value), check)  # noqa: B023


def test_an_interrupted_sweep_leaves_the_buffer_as_it_was(choice):
    def make():
        buffer = PrioritizedReplayBuffer(20, 8)
        buffer.extend(transitions(range(17)))
        return buffer

    def check(buffer):
        buffer.check_valid()
        assert sum(map(len, buffer.sweep(5))) == 17

    every_line(make, lambda buffer: list(buffer.sweep(5)), check, 2)


def held(mutex) -> bool:
    """Whether a thread of its own would have to wait."""
    codes = []

    def look():
        codes.append(mutex._try(mutex._mutex))
        if codes == [0]:
            mutex._unlock(mutex._mutex)

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    return codes == [errno.EBUSY]


SHARED = {
    "extend": lambda buffer: buffer.extend(transitions(range(100, 106))),
    "sample": lambda buffer: buffer.sample(),
    "update": lambda buffer: buffer.update_priority([3, 4], [2.0, 3.0], [0, 0]),
    "beta": lambda buffer: setattr(buffer, "beta", 0.5),
    "alpha": lambda buffer: setattr(buffer, "alpha", 0.5),
    "calls within calls": lambda buffer: buffer.draw_leaves(),
}


@needs_linux
@pytest.mark.parametrize("call", SHARED)
def test_an_interrupted_call_of_a_shared_buffer_gives_the_lock_back(call, choice):
    def make():
        buffer = processes.shared(50, batch_size=8)
        buffer.extend(transitions(range(40)))
        return buffer

    def check(buffer):
        assert not held(buffer._lock._mutex)
        assert buffer._lock._mutex.depth.value == 0
        buffer.check_valid()
        assert torn(buffer.sample()) == 0
        assert not held(buffer._lock._mutex)

    every_line(make, SHARED[call], check, 1 if call == "beta" else 3)


@needs_linux
@pytest.mark.parametrize("outer", [0, 1, 2])
@pytest.mark.parametrize("name", ["_try", "_unlock"])
def test_an_interrupt_after_a_call_of_the_c_library_gives_the_lock_back(name, outer):
    buffer = processes.shared(50, batch_size=8)
    buffer.extend(transitions(range(40)))
    mutex = buffer._lock._mutex
    call = getattr(mutex, name)

    def interrupted(*args):
        setattr(mutex, name, call)
        call(*args)
        raise KeyboardInterrupt

    depths = [mutex.acquire() for _ in range(outer)]
    assert depths == [*range(1, outer + 1)]
    setattr(mutex, name, interrupted)
    try:
        buffer.sample()
    except KeyboardInterrupt:
        assert outer == 0 or name == "_try"
    setattr(mutex, name, call)
    assert mutex.depth.value == outer
    assert held(mutex) == (outer > 0)
    for _ in depths:
        assert held(mutex)
        mutex.release()
    assert not held(mutex)
    buffer.check_valid()


@needs_linux
@pytest.mark.parametrize("holder", ["this thread", "another thread"])
def test_a_lock_left_held_by_a_buffer_that_is_gone_ends_no_process(holder):
    """A thread has a list of its robust mutexes, which goes through their memory."""
    code = f"""
import gc, threading
from per_td.concurrency.mutex import RobustMutex
locks, others, left, go_on = [RobustMutex()], [RobustMutex()], threading.Event(), threading.Event()

def hold():
    locks[0].acquire()
    left.set()
    go_on.wait()
    others[0].acquire()
    others[0].release()

thread = threading.Thread(target=hold)
if {holder == "this thread"}:
    locks[0].acquire()
    left.set()
else:
    thread.start()
left.wait()
locks.clear()
gc.collect()
if {holder == "another thread"}:
    go_on.set()
    thread.join()
others[0].acquire()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("call", ["extend", "update_priority"])
def test_a_call_is_repaired_though_its_repair_is_interrupted_too(call, monkeypatch):
    buffer = PrioritizedReplayBuffer(8, 4, eps=0.0)
    buffer.extend({"x": torch.arange(5.0)})
    interrupted = []

    def interrupts(method):
        def interrupt(*arguments, **more):
            method(*arguments, **more)
            if len(interrupted) < 3:
                interrupted.append(None)
                raise KeyboardInterrupt

        return interrupt

    table = buffer._priorities
    for name in ("rebuild", "update", "write_runs"):
        monkeypatch.setattr(table, name, interrupts(getattr(table, name)))
    calls = {
        "extend": lambda: buffer.extend({"x": torch.arange(5.0, 9.0)}),
        "update_priority": lambda: buffer.update_priority([0, 1], [2.0, 3.0]),
    }
    with pytest.raises(KeyboardInterrupt):
        calls[call]()
    assert len(interrupted) == 3
    buffer.check_valid()
    if call == "extend":
        assert buffer.transitions["x"].tolist() == [8.0, *range(1, 8)]
    else:
        assert buffer.priority.tolist() == [2.0, 3.0, 1.0, 1.0, 1.0]

"""Threads, signals, forks and spawned processes that call one buffer at random, for a while.

Run as a program, for a fault would take the process along: `python -m tests.support.stress signals
10 0` calls for ten seconds with the seed 0.
"""

import copy
import multiprocessing
import os
import pickle
import random
import signal
import sys
import threading
import time
from contextlib import suppress

import torch

from per_td import PerTdError, PrioritizedReplayBuffer
from tests.support import processes

KINDS = ("signals", "plain", "threads", "prefetch", "forks", "copies", "shared", "killed")


class RaisedError(BaseException):
    """What a signal handler raises, as Ctrl-C does."""


def call(buffer, dice: random.Random, start: list[int]) -> None:
    """One call at random; some are wrong, and refused."""
    many = dice.choice((1, 2, 7, 60, 300))
    batch = buffer.sample(dice.choice((1, 3, 64, 1000))) if len(buffer) else None
    if batch is not None and "generation" in batch.keys():  # noqa: SIM118
        assert processes.torn(batch) == 0
    what = dice.randrange(10)
    if what < 3 or batch is None:
        ids = torch.arange(start[0], start[0] + many)
        start[0] += many
        buffer.extend(processes.transitions(ids), dice.choice((None, processes.initial(ids))))
    elif what < 6:
        error = processes.learned(batch["id"])
        buffer.update_priority(batch["index"], error, batch["generation"])
    elif what == 6:
        wrong = dice.choice(((10**9, 1.0), (0, float("nan")), (-1, 1.0), ("a", 2.0)))
        buffer.update_priority([wrong[0]], [wrong[1]], [0])
    elif what == 7:
        buffer.alpha = dice.choice((0.0, 0.6, 1.0))
        buffer.draw = dice.choice(("independent", "stratified"))
    elif what == 8:
        assert buffer.diagnostics()["size"] >= 0
        assert (buffer.priority >= 0).all()
    else:
        buffer.increase_beta()


def calls(buffer, seed: int, until: float) -> None:
    """Call until then; what is refused is refused, and what a signal raises ends that call."""
    dice, start = random.Random(seed), [seed * processes.STRIDE % 10**15]
    torch.set_num_threads(1)
    while time.monotonic() < until:
        with suppress(PerTdError, RaisedError):
            call(buffer, dice, start)


def signals(until: float, seed: int) -> None:
    """A signal handler calls the buffer in the middle of a call, or raises."""
    buffer, dice, inside = PrioritizedReplayBuffer(500, 64, eps=0.0), random.Random(seed), []
    start = [10**12]

    def handle(*_):
        if inside or time.monotonic() > until:
            return
        inside.append(None)
        with suppress(PerTdError):
            call(buffer, dice, start)
        inside.clear()
        if dice.random() < 0.2 and time.monotonic() < until - 0.1:  # not while the run ends
            raise RaisedError

    buffer.extend(processes.transitions(range(500)))
    signal.signal(signal.SIGALRM, handle)
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.0007)
    try:
        while time.monotonic() < until:
            with suppress(RaisedError):
                calls(buffer, dice.randrange(1000), until)
    finally:
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
    buffer.check_valid()
    assert processes.torn(buffer.transitions) == 0


def threads(until: float, seed: int, **settings) -> None:
    buffer = PrioritizedReplayBuffer(500, 64, eps=0.0, **{"threads": True, **settings})
    at_once(buffer, until, seed)
    buffer.close()


def at_once(buffer, until: float, seed: int) -> None:
    failed: list[BaseException] = []

    def run(k: int) -> None:
        try:
            calls(buffer, seed + k, until)
        except BaseException as error:
            failed.append(error)

    running = [threading.Thread(target=run, args=(k,)) for k in range(4)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    if failed:
        raise failed[0]
    buffer.check_valid()
    assert processes.torn(buffer.transitions) == 0


def plain(until: float, seed: int) -> None:
    """Threads call a buffer that is not for threads, and write into what it is reading."""
    buffer = PrioritizedReplayBuffer(500, 64, eps=0.0)
    buffer.extend(processes.transitions(range(500)))
    index, values = torch.zeros(1000, dtype=torch.int64), torch.ones(1000)

    def spoil() -> None:
        while time.monotonic() < until:
            index.random_(-(10**9), 10**9)
            index.random_(0, 500)
            values.fill_(float("nan"))
            values.fill_(1.0)

    def run(k: int) -> None:
        dice = random.Random(seed + k)
        while time.monotonic() < until:
            with suppress(PerTdError, AssertionError):  # torn batches are not promised away
                buffer.update_priority(index, values)
                call(buffer, dice, [10**12 * k])

    running = [threading.Thread(target=spoil)]
    running += [threading.Thread(target=run, args=(k,)) for k in range(3)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    buffer.sample()


def prefetch(until: float, seed: int) -> None:
    threads(until, seed, prefetch=3)


def forks(until: float, seed: int) -> None:
    """Children of forks go on, while threads of the parent call."""
    buffer, dice = PrioritizedReplayBuffer(500, 64, eps=0.0, prefetch=2), random.Random(seed)

    def child() -> None:
        buffer.check_valid()
        calls(buffer, dice.randrange(1000), time.monotonic() + 0.05)
        buffer.check_valid()

    # The first call of an operation of torch takes glibc's lock of exit functions. A child that is
    # forked meanwhile waits for it for ever.
    calls(buffer, seed, time.monotonic() + 1)
    child()
    beside = threading.Thread(target=calls, args=(buffer, seed, until))
    beside.start()
    while time.monotonic() < until:
        assert os.waitpid(processes.forked(child), 0)[1] == 0
    beside.join()
    buffer.close()


def copies(until: float, seed: int) -> None:
    """Copies made while threads write are whole."""
    buffer = PrioritizedReplayBuffer(500, 64, eps=0.0, prefetch=2)
    buffer.extend(processes.transitions(range(500)))
    beside = threading.Thread(target=calls, args=(buffer, seed, until))
    beside.start()
    while time.monotonic() < until:
        for copied in (copy.deepcopy(buffer), pickle.loads(pickle.dumps(buffer))):
            copied.check_valid()
            assert processes.torn(copied.transitions) == 0
            copied.sample()
            copied.close()
    beside.join()
    buffer.close()


def shared(until: float, seed: int) -> None:
    """Spawned processes, each with threads, call one shared buffer."""
    buffer, left = processes.shared(500, batch_size=64), until - time.monotonic()
    spawn = multiprocessing.get_context("spawn")
    running = [
        spawn.Process(target=_in_process, args=(buffer, left, seed + 100 * k)) for k in range(2)
    ]
    for process in running:
        process.start()
    at_once(buffer, until, seed)
    for process in running:
        process.join()
        assert process.exitcode == 0
    buffer.check_valid()


def _in_process(buffer, seconds: float, seed: int) -> None:
    at_once(buffer, time.monotonic() + seconds, seed)


def killed(until: float, seed: int) -> None:
    """Processes that call a shared buffer are killed at random."""
    buffer, dice = processes.shared(500, batch_size=64), random.Random(seed)
    while time.monotonic() < until:
        process = processes.forked(calls, buffer, dice.randrange(1000), until + 60)
        processes.kill(process, dice.random() * 0.05)
        calls(buffer, dice.randrange(1000), time.monotonic() + 0.02)
        buffer.check_valid()
        drawable = buffer.priority > 0
        assert processes.torn(buffer.transitions[drawable]) == 0


if __name__ == "__main__":
    name, seconds, first = sys.argv[1:]
    globals()[name](time.monotonic() + float(seconds), int(first))

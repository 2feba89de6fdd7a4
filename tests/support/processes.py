"""What the tests run in other processes: transitions that tell whether they are torn, writers."""

import os
import signal
import time
import traceback
from contextlib import contextmanager
from multiprocessing import context
from multiprocessing.reduction import ForkingPickler

import torch
from tensordict import TensorDict

from per_td import PrioritizedReplayBuffer

STRIDE = 10**9
"""Transition k of writer w has the id w * STRIDE + k."""


def transitions(ids) -> TensorDict:
    """Transitions whose fields all follow from the id, [n]."""
    ids = torch.as_tensor(ids, dtype=torch.int64)
    observation = ids.unsqueeze(-1) * torch.tensor([3, 5, 7, 11]) % 8191
    return TensorDict(
        {
            "id": ids,
            "observation": observation.float(),
            "next": {"reward": (ids % 997).double(), "observation": (observation + 1).int()},
        },
        ids.shape,
    )


def torn(batch: TensorDict) -> int:
    """How many of the transitions mix several ids."""
    expected = transitions(batch["id"])
    wrong = batch["observation"].ne(expected["observation"]).any(-1)
    wrong |= batch["next", "observation"].ne(expected["next", "observation"]).any(-1)
    wrong |= batch["next", "reward"].ne(expected["next", "reward"])
    return int(wrong.sum())


def initial(ids):
    """The priority that writers give."""
    return 1 + (ids % 7).float()


def learned(ids):
    """The priority that learners give, with an eps of 0."""
    return 100 + (ids % 50).float()


def shared(capacity, **settings) -> PrioritizedReplayBuffer:
    """A shared buffer for `transitions`."""
    example = transitions(0)
    return PrioritizedReplayBuffer(capacity, shared=True, example=example, eps=0.0, **settings)


def write(buffer, writer, acknowledged, stop, largest=20):
    """Write until told to stop, 1 to `largest` transitions at once; note how many are written.

    Args:
        acknowledged: int64 [writers], shared.
        stop: bool [1], shared; the writer stops when it is true.
    """
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(writer)
    done = int(acknowledged[writer])
    parent = os.getppid()
    while not stop[0] and os.getppid() == parent:
        n = int(torch.randint(1, largest + 1, (), generator=generator))
        ids = writer * STRIDE + done + torch.arange(n)
        buffer.extend(transitions(ids), initial(ids))
        done += n
        acknowledged[writer] = done


def learn(buffer, n=64):
    """One step of a learner; how many transitions of its batch were torn."""
    batch = buffer.sample(n)
    buffer.update_priority(batch["index"], learned(batch["id"]), batch["generation"])
    return torn(batch)


def learn_on(buffer, found, stop):
    """Learn until told to stop; add up torn transitions in `found`, int64 [1], shared."""
    torch.set_num_threads(1)
    parent = os.getppid()
    while not stop[0] and os.getppid() == parent:
        found += learn(buffer)


class Received(int):
    """A file descriptor as a started process gets it."""

    detach = int.__int__


class Starting:
    """Stands for a process that is being started in this one."""

    DupFd = Received
    duplicate_for_child = staticmethod(os.dup)


def handed_over(thing):
    """What a process would get that is started with `thing` as an argument; none is."""
    context.set_spawning_popen(Starting)
    try:
        sent = ForkingPickler.dumps(thing)
    finally:
        context.set_spawning_popen(None)
    return ForkingPickler.loads(sent)


def forked(function, *args) -> int:
    """Run it in a fork of this process, which ends with 1 after an error; its process id."""
    process = os.fork()
    if process:
        return process
    try:
        function(*args)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def kill(process, after=0.0) -> None:
    """Kill a process in the middle of whatever it does, and wait for its end."""
    time.sleep(after)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)


@contextmanager
def deadline(seconds):
    """Raise where the block takes longer: locks may be waited for only so long."""

    def late(*_):
        raise TimeoutError(f"still running after {seconds} s: a deadlock?")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def take_part(buffer):
    """What a process may do with a buffer that it was given."""
    assert len(buffer) == buffer.write_count == 5
    assert buffer.transitions["id"].tolist() == list(range(5))
    buffer.extend(transitions(range(5, 45)))
    batch = buffer.sample(16)
    assert torn(batch) == 0
    buffer.alpha, buffer.beta, buffer.eps = 0.5, 0.75, 0.25
    buffer.update_priority([3, 4], [7.0, 99.0], [0, 1])

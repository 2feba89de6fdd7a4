"""A process that forks while other threads call the buffer."""

import os
import threading

import pytest

from per_td import PrioritizedReplayBuffer
from tests.support.processes import deadline, forked, torn, transitions

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@pytest.mark.parametrize("settings", [{"threads": True}, {"prefetch": 3}], ids=str)
def test_a_forked_child_goes_on_with_a_copy_of_its_own(settings):
    buffer = PrioritizedReplayBuffer(300, 16, **settings)
    buffer.extend(transitions(range(300)))
    buffer.sample()
    stop = threading.Event()

    def write():
        while not stop.is_set():
            buffer.extend(transitions(range(150)))
            buffer.update_priority([0, 1], [1.0, 2.0])

    def child():
        buffer.check_valid()
        for _ in range(20):  # more than were drawn ahead
            assert torn(buffer.sample()) == 0
            buffer.extend(transitions(range(5)))
        assert torn(buffer.transitions) == 0

    thread = threading.Thread(target=write)
    thread.start()
    try:
        with deadline(60):
            for _ in range(10):
                assert os.waitpid(forked(child), 0)[1] == 0
    finally:
        stop.set()
        thread.join()
    assert torn(buffer.sample()) == 0
    buffer.close()

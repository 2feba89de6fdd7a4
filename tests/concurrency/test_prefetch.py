"""Batches that a thread draws ahead."""

import copy
import gc
import threading
import time
import weakref

import pytest
import torch
from tensordict import TensorDict

from per_td import PrioritizedReplayBuffer
from per_td.concurrency import prefetch
from per_td.concurrency.prefetch import Prefetcher
from per_td.errors import ConfigurationError, EmptyBufferError
from tests.support.processes import deadline, learn, torn, transitions


@pytest.fixture(autouse=True)
def _no_deadlock():
    with deadline(60):
        yield


def make(capacity=100, **settings):
    settings = {"batch_size": 8, "prefetch": 3, "alpha": 1.0, "eps": 0.0, **settings}
    return PrioritizedReplayBuffer(capacity, **settings)


def wait_for(condition):
    end = time.monotonic() + 30
    while not condition() and time.monotonic() < end:
        time.sleep(0.002)
    assert condition()


def threads():
    return [t for t in threading.enumerate() if t.name == "per_td prefetch"]


def test_batches_are_those_of_a_buffer_that_draws_on_the_spot():
    plain = make(prefetch=0, generator=torch.Generator().manual_seed(5))
    ahead = make(generator=torch.Generator().manual_seed(5))
    for buffer in (plain, ahead):
        buffer.extend(transitions(range(100)), torch.arange(100.0))
    for _ in range(20):
        one, two = plain.sample(), ahead.sample()
        assert torn(two) == 0
        assert (one == two).all()
    ahead.close()


def test_a_batch_is_at_most_so_many_batches_old():
    buffer = make(prefetch=3)
    buffer.extend(transitions(range(100)), torch.ones(100))
    buffer.sample()
    wait_for(lambda: buffer._ahead._work.ready.qsize() == 3)
    time.sleep(0.05)
    assert buffer._ahead._work.ready.qsize() == 3  # and not one more
    everything = torch.arange(100)
    buffer.update_priority(everything, (everything == 42).float())
    old = [buffer.sample()["id"] for _ in range(3)]
    assert any((ids != 42).any() for ids in old)
    assert (buffer.sample()["id"] == 42).all()
    buffer.close()


def test_updates_of_what_was_overwritten_since_the_draw_are_dropped():
    buffer = make()
    buffer.extend(transitions(range(100)))
    buffer.sample()
    wait_for(lambda: buffer._ahead._work.ready.qsize() == 3)
    buffer.extend(transitions(range(100, 200)))
    learn(buffer, None)
    assert buffer.stats()["stale_updates"] == 8
    buffer.close()


def test_an_error_in_the_thread_is_raised_by_sample_and_the_next_goes_on():
    buffer = make()
    for _ in range(3):
        with pytest.raises(EmptyBufferError, match="empty buffer"):
            buffer.sample()
    buffer.extend(transitions(range(10)))
    assert torn(buffer.sample()) == 0
    buffer.close()


def test_an_error_leaves_no_thread_waiting(monkeypatch):
    buffer, errors, gate = make(prefetch=1), [], threading.Event()

    def fail(self, batch_size):
        gate.wait(30)
        raise EmptyBufferError("nothing")

    def ask():
        try:
            buffer.sample()
        except EmptyBufferError as error:
            errors.append(error)

    monkeypatch.setattr(PrioritizedReplayBuffer, "_sample_now", fail)
    waiting = [threading.Thread(target=ask, daemon=True) for _ in range(4)]
    for thread in waiting:
        thread.start()
    time.sleep(0.3)  # all of them wait for the same batch
    gate.set()
    for thread in waiting:
        thread.join(30)
    assert len(errors) == 4


def test_a_thread_that_cannot_be_started_is_an_error_and_the_next_call_tries_again(monkeypatch):
    def fail(self):
        raise RuntimeError("can't start new thread")

    buffer = make()
    buffer.extend(transitions(range(10)))
    monkeypatch.setattr(threading.Thread, "start", fail)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        buffer.sample()
    buffer.close()
    monkeypatch.undo()
    assert torn(buffer.sample()) == 0
    buffer.close()


def test_who_waits_for_a_batch_when_the_buffer_is_closed_gets_one_of_the_next_thread():
    buffer, waiting, go_on, got = make(prefetch=1), threading.Event(), threading.Event(), []
    drawn = iter([False, True])
    batch = TensorDict({}, [3])

    def draw(owner):
        if next(drawn):
            return batch
        waiting.set()
        go_on.wait(30)
        return TensorDict({}, [1])

    ahead = Prefetcher(buffer, draw, 1)
    thread = threading.Thread(target=lambda: got.append(ahead.next()))
    thread.start()
    waiting.wait(30)
    first = ahead._work
    ahead.drop()
    thread.join(30)
    go_on.set()
    assert got == [batch]
    assert ahead._work is not first
    ahead.close()


def test_threads_that_ask_first_at_the_same_time_start_one_thread(monkeypatch):
    ahead, asked = Prefetcher(make(), lambda owner: TensorDict({}, [1]), 4), []
    started, go_on = threading.Event(), threading.Event()

    def slow_start(*_):
        asked.append(None)
        started.set()
        go_on.wait(30)

    monkeypatch.setattr(prefetch, "start", slow_start)
    both = [threading.Thread(target=ahead._working) for _ in range(2)]
    both[0].start()
    started.wait(30)
    both[1].start()
    both[1].join(0.2)  # it waits for the first, and would not if there were no lock
    go_on.set()
    for thread in both:
        thread.join(30)
    assert len(asked) == 1


def test_the_thread_itself_may_be_the_one_that_ends_it():
    """As when the last reference to a buffer goes in there."""
    ended = []

    def draw(owner):
        ahead.close()
        ended.append(True)
        return TensorDict({}, [1])

    owner = make()
    ahead = Prefetcher(owner, draw, 1)
    work = ahead._working()
    work.thread.join(30)
    assert ended == [True]


def test_close_ends_the_thread_and_sampling_starts_another():
    buffer = make()
    buffer.extend(transitions(range(10)))
    buffer.close()
    assert not threads()
    buffer.sample()
    assert len(threads()) == 1
    buffer.close()
    assert not threads()
    buffer.update_priority(torch.arange(10), (torch.arange(10) == 4).float())
    assert (buffer.sample()["id"] == 4).all()  # nothing drawn before is left
    buffer.close()


def test_the_thread_ends_with_the_buffer():
    buffer = make()
    buffer.extend(transitions(range(10)))
    buffer.sample()
    ready = buffer._ahead._work.ready
    wait_for(lambda: ready.qsize() == 3)  # it waits for a batch to be taken
    del buffer
    gc.collect()
    wait_for(lambda: not threads())


def test_loading_a_state_drops_what_was_drawn_ahead():
    buffer, other = make(), make()
    buffer.extend(transitions(range(10)))
    other.extend(transitions(range(50, 60)))
    buffer.sample()
    buffer.load_state_dict(other.state_dict())
    for _ in range(5):
        assert (buffer.sample()["id"] >= 50).all()
    buffer.close()


def test_the_batch_size_of_the_constructor_may_be_given_again():
    buffer = make()
    buffer.extend(transitions(range(10)))
    buffer.sample(8)
    assert len(threads()) == 1
    buffer.close()


def test_a_buffer_without_prefetch_can_be_closed_and_loads_states():
    buffer = make(prefetch=0, threads=True)
    buffer.close()
    buffer.load_state_dict(buffer.state_dict())


def test_other_sizes_and_plain_tensors_are_drawn_on_the_spot():
    buffer = make()
    buffer.extend(transitions(range(10)))
    assert buffer.sample(5).shape == (5,)
    leaves, index, _ = buffer.sample_leaves()
    assert torch.equal(leaves["id",], index)
    assert not threads()


def test_a_copy_draws_ahead_by_itself():
    buffer = make()
    buffer.extend(transitions(range(10)))
    buffer.sample()
    other = copy.deepcopy(buffer)
    buffer.close()
    assert torn(other.sample()) == 0
    assert len(threads()) == 1
    other.close()


def test_it_needs_a_batch_size_and_a_positive_number():
    with pytest.raises(ConfigurationError, match="batch_size: expected one beside prefetch"):
        PrioritizedReplayBuffer(10, prefetch=2)
    with pytest.raises(ConfigurationError, match="prefetch: expected"):
        PrioritizedReplayBuffer(10, 4, prefetch=-1)


def test_a_state_may_be_loaded_before_anything_was_drawn_ahead():
    saved, buffer = make(), make()
    saved.extend(transitions(torch.arange(20)))
    buffer.load_state_dict(saved.state_dict())
    assert buffer.sample().batch_size == (8,)
    assert all(thread.daemon for thread in threads())  # or the process could not end before it
    buffer.close()


def test_finalizers_do_not_pile_up():
    def alive():
        return len(weakref.finalize._registry)

    gc.collect()  # finalizers of what other tests left must not go meanwhile
    buffer, before = make(prefetch=1), alive()
    buffer.extend(transitions(range(10)))
    for _ in range(5):
        buffer.sample()
        buffer.close()
    for _ in range(5):
        buffer.sample()
        buffer.load_state_dict(buffer.state_dict())
        with pytest.raises(EmptyBufferError):
            make(prefetch=1).sample()
    gc.collect()
    assert alive() == before
    buffer.close()
    del buffer
    gc.collect()
    assert alive() == before - 1


def test_close_waits_for_threads_that_were_told_to_end_before():
    go_on, begun = threading.Event(), threading.Event()

    def draw(owner):
        begun.set()
        go_on.wait(30)
        return TensorDict({}, [1])

    owner = make()
    ahead = Prefetcher(owner, draw, 1)
    work = ahead._working()
    begun.wait(30)
    ahead.drop()
    threading.Timer(0.1, go_on.set).start()
    ahead.close()
    assert not work.is_running()

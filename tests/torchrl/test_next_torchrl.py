"""What TorchRL 0.15 adds to its buffers, by stand-ins: the installed one may not have it.

The stand-ins put the new parts into TorchRL's classes, and per_td.torchrl is imported once more on
top of them: waiting until a buffer can be sampled, waking those who wait after every change, and
counting the calls of `sample`.
"""

import importlib
import multiprocessing
import sys
import threading
import time

import pytest
from torchrl.data import LazyTensorStorage, ListStorage, ReplayBuffer, TensorDictReplayBuffer

import per_td
from per_td import CheckpointError, ConfigurationError
from tests.support.replay import ALPHA, BETA, data, learn

NEW = hasattr(ReplayBuffer, "_notify_replay_state_change")
OLD = dict(vars(ReplayBuffer))
OLD_SAMPLE = TensorDictReplayBuffer.sample
TOLD: list[bool] = []
"""For each time that waiting threads were woken: True if the buffer's lock was held."""


class Next:
    """The new parts of `ReplayBuffer`, as far as per_td meets them."""

    def share(self, shared=True):
        OLD["share"](self, shared)
        kind = multiprocessing if shared else threading
        self._readiness_condition = kind.Condition()
        self._sample_call_count_value = multiprocessing.Value("q", 0) if shared else 0
        self._sampled_item_count_value = multiprocessing.Value("q", 0) if shared else 0
        return self

    def _notify_replay_state_change(self):
        TOLD.append(self._replay_lock._is_owned())
        with self._readiness_condition:
            self._readiness_condition.notify_all()

    def _increment_counter(self, name, increment):
        counter = getattr(self, name)
        if hasattr(counter, "get_lock"):
            with counter.get_lock():
                counter.value += increment
        else:
            with self._readiness_condition:
                setattr(self, name, getattr(self, name) + increment)

    def wait_until_sampleable(self, min_items=None, timeout=None, cancel_event=None):
        end = None if timeout is None else time.monotonic() + timeout
        with self._readiness_condition:
            while not (cancel_event is not None and cancel_event.is_set()):
                with self._replay_lock, self._write_lock:
                    if self._sampler.can_sample(self._storage, min_items or self._batch_size):
                        return True
                left = 0.1 if end is None else min(0.1, end - time.monotonic())
                if left <= 0:
                    return False
                # without a limit of its own, so that a thread that nobody wakes is found
                self._readiness_condition.wait(left if cancel_event or end else None)
        return False

    def _add(self, data):
        index = OLD["_add"](self, data)
        self._notify_replay_state_change()
        return index

    def _extend(self, data, *, update_priority=True):
        index = OLD["_extend"](self, data, update_priority=update_priority)
        self._notify_replay_state_change()
        return index

    def empty(self, empty_write_count=True):
        with self._replay_lock, self._write_lock:
            OLD["empty"](self, empty_write_count)
        self._notify_replay_state_change()

    def set_storage(self, storage, collate_fn=None):
        previous = OLD["set_storage"](self, storage, collate_fn)
        self._notify_replay_state_change()
        return previous

    def set_sampler(self, sampler):
        previous = OLD["set_sampler"](self, sampler)
        self._notify_replay_state_change()
        return previous

    def load_state_dict(self, state_dict):
        OLD["load_state_dict"](self, state_dict)
        self._notify_replay_state_change()

    def sample(
        self, batch_size=None, return_info=False, *, wait=False, timeout=None, cancel_event=None
    ):
        wait_first(self, batch_size, wait=wait, timeout=timeout, cancel_event=cancel_event)
        drawn, info = OLD["sample"](self, batch_size, True)
        index = info["index"]
        n = index[0].numel() if isinstance(index, tuple) else index.numel() // self._storage.ndim
        self._increment_counter("_sample_call_count_value", 1)
        self._increment_counter("_sampled_item_count_value", n)
        return (drawn, info) if return_info else drawn

    def stats(self):
        counts = self._sample_call_count_value, self._sampled_item_count_value
        calls, items = (getattr(count, "value", count) for count in counts)
        more = {"storage_size": len(self._storage), "sample_calls": calls}
        return OLD["stats"](self) | more | {"samples_returned": items}


def wait_first(buffer, batch_size, *, wait=False, timeout=None, cancel_event=None):
    if wait and not buffer.wait_until_sampleable(batch_size, timeout, cancel_event):
        if cancel_event is not None and cancel_event.is_set():
            raise RuntimeError("Replay-buffer sampling was cancelled.")
        raise TimeoutError("Replay buffer did not become sampleable.")


def sample_of_tensordicts(self, batch_size=None, return_info=False, include_info=None, **waiting):
    wait_first(self, batch_size, **waiting)
    return OLD_SAMPLE(self, batch_size, return_info, include_info)


@pytest.fixture(scope="module")
def ours():
    """per_td.torchrl on a TorchRL with the new parts."""
    with pytest.MonkeyPatch.context() as patch:
        notify = "_notify_replay_state_change"
        for name in [notify] if NEW else [name for name in vars(Next) if name[:2] != "__"]:
            patch.setattr(ReplayBuffer, name, vars(Next)[name], raising=False)
        if not NEW:
            patch.setattr(TensorDictReplayBuffer, "sample", sample_of_tensordicts)
        for name in [name for name in sys.modules if name.startswith("per_td.torchrl")]:
            patch.delitem(sys.modules, name)
        patch.setattr(per_td, "torchrl", None, raising=False)
        yield importlib.import_module("per_td.torchrl")
        for name in [name for name in sys.modules if name.startswith("per_td.torchrl")]:
            del sys.modules[name]


@pytest.fixture
def make(ours):
    def make(capacity=20, storage=LazyTensorStorage, **settings):
        settings = {"alpha": ALPHA, "beta": BETA, "batch_size": 8, **settings}
        return ours.TensorDictPrioritizedReplayBuffer(storage=storage(capacity), **settings)

    TOLD.clear()
    return make


WAYS = {
    "short": {},
    "long": {"collate_fn": lambda batch: batch},
    "list": {"storage": ListStorage},
    "transform": {"transform": lambda batch: batch},
    "prefetch": {"prefetch": 2},
    "shared": {"shared": True},
    "unsynchronized": {"sync": False},
}
each_way = pytest.mark.parametrize("way", WAYS)


def in_time(work):
    """Run `work` in a thread of its own; its result, or a failure if it does not come to an end."""
    results = []
    thread = threading.Thread(target=lambda: results.append(work()), daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive(), "it hangs"
    assert results, "it raised"
    return results[0]


@each_way
@pytest.mark.parametrize("single", [False, True])
def test_sample_waits_until_another_thread_has_written(make, way, single):
    buffer = make(**WAYS[way])
    results = []
    learner = threading.Thread(target=lambda: results.append(buffer.sample(wait=True)), daemon=True)
    learner.start()
    time.sleep(0.1)
    assert learner.is_alive()
    if single:
        buffer.add(data(1)[0])
    else:
        buffer.extend(data(4))
    learner.join(60)
    (batch,) = results
    assert batch.shape == (8,)
    assert "index_generation" in batch
    learn(buffer, batch)
    assert buffer.stats()["stale_updates"] == 0


def test_waiting_ends_after_the_timeout(make):
    with pytest.raises(TimeoutError):
        make().sample(wait=True, timeout=0.05)


def test_waiting_ends_when_it_is_cancelled(make):
    cancelled = threading.Event()
    cancelled.set()
    with pytest.raises(RuntimeError, match="cancelled"):
        make().sample(wait=True, cancel_event=cancelled)


def test_arguments_that_no_torchrl_takes_are_refused(make):
    buffer = make()
    buffer.extend(data(4))
    with pytest.raises(TypeError, match="patience"):
        buffer.sample(patience=3)


@pytest.mark.parametrize("how", [{"by": "uniform"}, {"newest": 2}])
def test_waiting_together_with_another_draw_is_refused(make, how):
    buffer = make()
    buffer.extend(data(4))
    with pytest.raises(ConfigurationError, match="wait: expected none of these together"):
        buffer.sample(wait=True, **how)
    assert buffer.sample(**how).shape == (8,)


@each_way
def test_calls_are_counted_once_each(make, way):
    buffer = make(**WAYS[way])
    buffer.extend(data(20))
    buffer.sample()
    buffer.sample(8, return_info=True)
    buffer.sample(wait=True, timeout=1.0)
    buffer.sample(by="uniform")
    stats = buffer.stats()
    assert stats["sample_calls"] == 4
    assert stats["samples_returned"] == 32
    assert stats["storage_size"] == 20  # TorchRL's
    assert stats["stale_updates"] == 0  # and ours


def test_records_of_several_dimensions_are_counted_as_torchrl_counts_them(make):
    buffer = make(24, storage=lambda n: LazyTensorStorage(n, ndim=2), batch_size=6)
    new = data(24).view(3, 8)
    buffer.extend(new)
    buffer.sample()
    buffer.sample(by="uniform")
    assert buffer.stats()["samples_returned"] == 12


def test_records_of_slices_are_counted(ours, make):
    sampler = ours.PrioritizedSliceSampler(20, ALPHA, BETA, slice_len=2)
    buffer = make(sampler=sampler)
    buffer.extend(data(20))
    buffer.sample()
    assert buffer.stats()["samples_returned"] == 8


def changes(ours):
    def reload(buffer):
        buffer.load_state_dict(buffer.state_dict())

    return {
        "extend": lambda buffer: buffer.extend(data(3)),
        "add": lambda buffer: buffer.add(data(1)[0]),
        "empty": lambda buffer: buffer.empty(),
        "set_storage": lambda buffer: buffer.set_storage(type(buffer.storage)(20)),
        "set_sampler": lambda buffer: buffer.set_sampler(ours.PrioritizedSampler(20, ALPHA, BETA)),
        "load_state_dict": reload,
    }


CHANGES = ["extend", "add", "empty", "set_storage", "set_sampler", "load_state_dict"]


@each_way
@pytest.mark.parametrize("change", CHANGES)
def test_every_change_wakes_those_who_wait_once_and_outside_the_locks(ours, make, way, change):
    buffer = make(**WAYS[way])
    buffer.extend(data(20))
    TOLD.clear()
    in_time(lambda: changes(ours)[change](buffer))
    assert TOLD == [False]


def test_a_loaded_folder_wakes_those_who_wait(make, tmp_path):
    buffer = make()
    buffer.extend(data(20))
    buffer.dumps(tmp_path)
    TOLD.clear()
    buffer.loads(tmp_path)
    assert TOLD == [False]


@pytest.mark.parametrize("change", ["extend", "empty", "set_sampler", "load_state_dict"])
@pytest.mark.parametrize("way", ["short", "long", "shared"])
def test_a_change_and_a_waiting_thread_do_not_block_each_other(ours, make, way, change):
    buffer, end = make(**WAYS[way]), threading.Event()

    def wait():
        while not end.is_set():
            buffer.wait_until_sampleable(timeout=0.001, cancel_event=end)
        return True

    buffer.extend(data(4))
    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    in_time(lambda: [changes(ours)[change](buffer) for _ in range(100)])
    end.set()
    waiting.join(60)
    assert not waiting.is_alive()


def test_calls_are_not_counted_where_torchrl_cannot(make, monkeypatch):
    monkeypatch.delattr(ReplayBuffer, "_increment_counter")
    buffer = make()
    buffer.extend(data(4))
    buffer.sample()
    assert buffer.stats()["sample_calls"] == 0


@pytest.mark.parametrize("kind", ["PrioritizedSampler", "PrioritizedSliceSampler"])
def test_loaders_do_not_copy_the_samplers(ours, kind):
    assert getattr(ours, kind).requires_shared_state is True


def with_count(make, code):
    """A buffer whose count of writes has this type, and a state of 2**31 writes."""
    buffer = make()
    buffer.extend(data(4))
    buffer.writer._write_count_value = multiprocessing.Value(code, 4)
    state = buffer.state_dict()
    state["_writer"]["_write_count"] = 2**31
    return buffer, state


def test_a_state_of_more_writes_than_the_writer_can_count_is_refused(make):
    buffer, state = with_count(make, "i")
    with pytest.raises(CheckpointError, match=r"_write_count: expected less than 2\*\*31"):
        buffer.load_state_dict(state)
    assert buffer.write_count == 4


def test_a_writer_that_counts_in_64_bits_takes_a_state_of_2_to_the_31_writes(make):
    buffer, state = with_count(make, "q")
    buffer.load_state_dict(state)
    buffer.extend(data(4))
    assert buffer.write_count == 2**31 + 4

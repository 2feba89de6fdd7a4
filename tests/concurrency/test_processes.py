"""A buffer that several processes share, and what is left when one of them is killed."""

import copy
import errno
import multiprocessing
import os
import pickle
import random
import signal
import sys
import threading
import time
from array import array
from itertools import product

import pytest
import torch

from per_td import CheckpointError, PrioritizedReplayBuffer
from per_td.concurrency import mutex
from per_td.concurrency.mutex import Note
from per_td.errors import ConfigurationError, EmptyBufferError, PriorityError
from per_td.memory import Memory
from per_td.priorities.followers import SideTrees
from per_td.priorities.table import PriorityTable
from per_td.storage.ring import RingStorage
from per_td.tree import Trees
from tests.support import processes
from tests.support.processes import (
    STRIDE,
    deadline,
    forked,
    handed_over,
    initial,
    kill,
    learn,
    learned,
    torn,
)

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux")


@pytest.fixture(autouse=True)
def _no_deadlock(request):
    with deadline(1200 if request.node.get_closest_marker("slow") else 300):
        yield


def shared_zeros(n, dtype=torch.int64):
    return torch.zeros(n, dtype=dtype).share_memory_()


def assert_nothing_lost(buffer, acknowledged, unsure=0):
    """The newest transitions of every writer are there, once each, without a gap.

    Where a writer was killed, up to `unsure` may be there that it did not come to acknowledge.
    """
    held = buffer.transitions[buffer.priority > 0]
    assert torn(held) == 0
    ids = held["id"]
    for writer, done in enumerate(acknowledged.tolist()):
        own = (ids[ids // STRIDE == writer] - writer * STRIDE).sort().values
        if len(own):
            assert torch.equal(own, torch.arange(int(own[0]), int(own[-1]) + 1))
            assert done <= own[-1] + 1 <= done + unsure
    expected = torch.stack([initial(ids), learned(ids)])
    assert (buffer.priority[buffer.priority > 0] == expected).any(0).all()


def tensors_of(thing, seen):
    """Every tensor in an object of the package, with its name."""
    for name, value in vars(thing).items():
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            yield name, value
        elif isinstance(value, dict):
            yield from ((name, leaf) for leaf in value.values() if isinstance(leaf, torch.Tensor))
        elif type(value).__module__.startswith("per_td"):
            yield from tensors_of(value, seen)


@pytest.mark.parametrize("layout", ["records", "columns"])
def test_all_tensors_that_change_are_shared(layout):
    buffer = processes.shared(50, layout=layout, weight_normalization="buffer")
    tensors = list(tensors_of(buffer, set()))
    own = {name for name, tensor in tensors if not tensor.is_shared()}
    assert own <= {"starts", "points"}  # constants, and a scratch pad
    changing = {"raw", "leaves", "sums", "maxima", "minima", "settings", "exponents", "ever_max"}
    changing |= {"replayed"}
    changing |= {"refused", "memory", "_block", "_leaves", "written", "_beta", "_stale", "_tensor"}
    assert changing <= {name for name, _ in tensors} - own


@pytest.mark.parametrize("layout", ["records", "columns"])
def test_what_a_process_is_handed_is_the_same_buffer_but_for_its_generator(layout):
    generator = torch.Generator().manual_seed(3)
    buffer = processes.shared(50, layout=layout, generator=generator, weight_normalization="buffer")
    buffer.extend(processes.transitions(range(5)))
    buffer.sample(7)
    other = handed_over(buffer)
    assert other._storage.record is None  # addresses, and a scratch pad
    assert other._priorities.trees.block.record is None
    assert other.generator is None
    assert buffer.generator is generator
    processes.take_part(other)
    assert buffer.write_count == len(buffer) == 45
    assert torn(buffer.transitions) == 0
    assert torch.equal(buffer.transitions["id"], other.transitions["id"])
    assert (buffer.alpha, buffer.beta, buffer.eps) == (0.5, 0.75, 0.25)
    assert torch.equal(buffer.priority, other.priority)
    assert buffer.stats() == other.stats()
    assert buffer.stats()["stale_updates"] == 1
    buffer.check_valid()
    other._guard.note.begin(array("q", [3, 4]), 5)
    assert (buffer._guard.note.runs, buffer._guard.note.written.item()) == ([(3, 4)], 5)


def test_in_shared_memory_sixteen_leaves_of_a_tree_are_in_one_cache_line():
    table = processes.shared(2**20)._priorities
    assert [leaves.data_ptr() % 64 for leaves in (table.trees.raw, table.trees.leaves)] == [0, 0]


def locked_for(buffer) -> bool:
    """Whether a thread of its own would have to wait for the lock."""
    codes, lock = [], buffer._lock._mutex
    thread = threading.Thread(target=lambda: codes.append(lock._try(lock._mutex)))
    thread.start()
    thread.join()
    return codes == [errno.EBUSY]


def test_what_a_process_is_handed_has_the_same_lock():
    buffer = processes.shared(5)
    other = handed_over(buffer)
    with other._lock:
        assert locked_for(buffer)
    with buffer._lock:
        assert locked_for(other)


def test_a_spawned_process_writes_samples_and_updates_what_its_parent_sees():
    buffer = processes.shared(50, alpha=1.0)
    buffer.extend(processes.transitions(range(5)))
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=processes.take_part, args=(buffer,))
    process.start()
    process.join(250)
    assert process.exitcode == 0
    assert buffer.write_count == len(buffer) == 45
    assert buffer.transitions["id"].tolist() == list(range(45))
    assert torn(buffer.transitions) == 0
    assert (buffer.alpha, buffer.beta, buffer.eps) == (0.5, 0.75, 0.25)
    assert buffer.priority[3] == 7.25
    assert buffer.stats()["stale_updates"] == 1
    buffer.check_valid()


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["records", "columns"])
def test_spawned_writers_at_full_speed_lose_nothing_and_tear_nothing(layout):
    capacity, writers, seconds = 3000, 3, 8.0
    buffer = processes.shared(capacity, layout=layout, weight_normalization="buffer")
    acknowledged, stop = shared_zeros(writers), shared_zeros(1, torch.bool)
    context = multiprocessing.get_context("spawn")
    args = [(buffer, w, acknowledged, stop) for w in range(writers)]
    running = [context.Process(target=processes.write, args=a) for a in args]
    for process in running:
        process.start()
    while not acknowledged.all():
        time.sleep(0.01)
    found = batches = 0
    late = buffer.sample(64)
    end = time.monotonic() + seconds
    while time.monotonic() < end or batches < 100 or buffer.write_count < 10 * capacity:
        found += learn(buffer)
        batches += 1
    stop.fill_(True)
    for process in running:
        process.join(60)
        assert process.exitcode == 0
    assert found == 0
    assert buffer.write_count == acknowledged.sum()
    assert_nothing_lost(buffer, acknowledged)
    assert (buffer.priority > 0).all()
    buffer.check_valid()
    before, stale = buffer.priority, buffer.stats()["stale_updates"]
    buffer.update_priority(late["index"], torch.full((64,), 9999.0), late["generation"])
    assert torch.equal(buffer.priority, before)
    assert buffer.stats()["stale_updates"] == stale + 64
    assert buffer.stats()["repairs"] == 0


def test_writers_and_a_learner_side_by_side_lose_nothing_and_tear_nothing():
    buffer = processes.shared(500)
    acknowledged, stop = shared_zeros(2), shared_zeros(1, torch.bool)
    writers = [forked(processes.write, buffer, w, acknowledged, stop) for w in range(2)]
    while not acknowledged.all():
        time.sleep(0.01)
    end = time.monotonic() + 1.0
    found = 0
    while time.monotonic() < end or acknowledged.sum() < 1500:
        found += learn(buffer)
    stop.fill_(True)
    for writer in writers:
        assert os.waitpid(writer, 0)[1] == 0
    assert found == 0
    assert buffer.write_count == acknowledged.sum()
    assert_nothing_lost(buffer, acknowledged)
    buffer.check_valid()


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def dies_after(function):
    def call(*args, **given):
        function(*args, **given)
        die()

    return call


def half_a_write(self, leaves, n, mask=None):
    """Rows of which one field is new and one is old, and then death."""
    slots = (self.written[:1] + torch.arange(n)) % self.capacity  # of the first ring
    for key, leaf in list(leaves.items())[::2]:
        self._leaves[key][slots] = leaf[:n]
    die()


KILLED_IN_EXTEND = {
    "before the first row": (RingStorage, "write", die),
    "with rows half written": (RingStorage, "write", half_a_write),
    "after the rows": (RingStorage, "set_count", die),
    "after the count": (RingStorage, "write", dies_after(RingStorage.write)),
    "before the priorities": (PriorityTable, "write_new", die),
    "after the priorities": (PriorityTable, "write_new", dies_after(PriorityTable.write_new)),
}


def die_in(patch, call):
    """Run `call` in a fork where `patch` kills; the fork must have been killed."""
    owner, name, instead = patch

    def run():
        setattr(owner, name, instead)
        call()

    assert os.waitpid(forked(run), 0)[1] == signal.SIGKILL


@pytest.mark.parametrize("filled", [3, 17, 20, 27])
@pytest.mark.parametrize("point", KILLED_IN_EXTEND)
def test_what_a_writer_killed_in_extend_did_not_acknowledge_is_never_drawn(point, filled):
    buffer = processes.shared(20)
    for k in range(filled):
        buffer.add(processes.transitions(k), initial(torch.tensor(k)))
    before = buffer.sample(200)
    new = processes.transitions(range(1000, 1006))
    die_in(KILLED_IN_EXTEND[point], lambda: buffer.extend(new, initial(new["id"])))
    batch = buffer.sample(2000)
    kept = range(filled + 6 - 20 if filled > 14 else 0, filled)
    assert batch["id"].unique().tolist() == [k for k in kept if k >= filled - 20]
    assert torn(batch) == 0
    assert buffer.write_count == filled + 6
    assert buffer.stats()["repairs"] == 1
    buffer.check_valid()
    # an update of what the dead writer has half overwritten must not bring it back
    buffer.update_priority(before["index"], torch.ones(200), before["generation"])
    assert torn(buffer.sample(2000)) == 0
    ids = buffer.extend(new, initial(new["id"]))  # and life goes on
    assert buffer.transitions["id"][ids].tolist() == list(range(1000, 1006))
    buffer.check_valid()


class LethalPage:
    """The page of the note; whoever writes to it the `last` time, from 0 on, is killed."""

    def __init__(self, page, last):
        self.page, self.left = page, last

    def __getitem__(self, at):
        return self.page[at]

    def __setitem__(self, at, value):
        self.page[at] = value
        if not self.left:
            die()
        self.left -= 1


@pytest.mark.parametrize("last", range(6))
@pytest.mark.parametrize("filled", [17, 27])
def test_a_writer_killed_at_any_write_to_the_note_has_written_all_or_nothing(filled, last):
    buffer = processes.shared(20)
    for k in range(filled):
        buffer.add(processes.transitions(k))
    new = processes.transitions(range(1000, 1006))

    def write():
        note = buffer._guard.note
        note.page = LethalPage(note.page, last)
        buffer.extend(new)

    assert os.waitpid(forked(write), 0)[1] == signal.SIGKILL
    ids = buffer.sample(2000)["id"].unique().tolist()
    begun = buffer.write_count - filled
    assert begun in (0, 6)
    assert [k for k in ids if k < 1000] == list(range(max(0, filled + begun - 20), filled))
    assert [k for k in ids if k >= 1000] in ([], list(range(1000, 1006)))
    assert begun or max(ids) < 1000
    assert torn(buffer.transitions[buffer.priority > 0]) == 0
    buffer.check_valid()


def test_a_writer_that_repairs_what_another_left_may_be_killed_too():
    buffer = processes.shared(20)
    buffer.extend(processes.transitions(range(20)))
    for start in (1000, 2000):
        new = processes.transitions(range(start, start + 6))
        die_in(KILLED_IN_EXTEND["with rows half written"], lambda: buffer.extend(new))  # noqa: B023
    assert buffer.sample(500)["id"].unique().tolist() == list(range(12, 20))
    assert (buffer.write_count, buffer.stats()["repairs"]) == (32, 2)
    buffer.check_valid()


@pytest.mark.parametrize("point", ["before the first row", "after the count"])
def test_a_writer_killed_while_writing_more_than_fits_leaves_nothing_to_draw(point):
    buffer = processes.shared(4)
    buffer.extend(processes.transitions(range(6)))
    new = processes.transitions(range(1000, 1011))
    die_in(KILLED_IN_EXTEND[point], lambda: buffer.extend(new))
    with pytest.raises(EmptyBufferError):
        buffer.sample(1)
    assert buffer.write_count == 17
    buffer.check_valid()


def test_what_a_dead_writer_left_does_not_count_as_replayed():
    buffer = processes.shared(4)
    buffer.extend(processes.transitions(range(4)))
    buffer.sample(100)
    die_in(
        (RingStorage, "set_count", die), lambda: buffer.extend(processes.transitions(range(4, 6)))
    )
    buffer.increase_beta()
    assert buffer.replayed.tolist() == [False, False, True, True]


def die_after_leaves(self, index, *_, **__):
    """Priorities are new, masses half, sums not at all; then death."""
    self.trees.raw[index] = 5.0
    self.trees.leaves[index[::2]] = 77.0
    self.trees.sums[-1] = 1e9
    die()


@pytest.mark.parametrize("normalization", ["batch", "buffer"])
def test_after_a_learner_killed_in_an_update_the_sums_are_right(normalization):
    buffer = processes.shared(300, weight_normalization=normalization)
    buffer.extend(processes.transitions(range(300)))
    batch = buffer.sample(64)
    patch = PriorityTable, "update", die_after_leaves
    die_in(patch, lambda: buffer.update_priority(batch["index"], batch["id"], batch["generation"]))
    assert torn(buffer.sample(64)) == 0
    buffer.check_valid()
    assert buffer.stats()["repairs"] == 1
    if normalization == "buffer":
        assert buffer.smallest_mass == buffer.mass.min()


KILLED_BESIDE = {
    "before the sides follow": (SideTrees, "follow", die),
    "after the sides have followed": (SideTrees, "follow", dies_after(SideTrees.follow)),
    "before the priorities": (PriorityTable, "update", die),
    "with half of them": (PriorityTable, "update", die_after_leaves),
}
CHANGE_BESIDE = {
    "set_priority": lambda buffer, *batch: buffer.set_priority(*batch),
    "update": lambda buffer, *batch: buffer.update_priority(*batch),
    "max": lambda buffer, *batch: buffer.update_priority(*batch, mode="max", rate=0.5),
}


@pytest.mark.parametrize("call", CHANGE_BESIDE)
@pytest.mark.parametrize("point", KILLED_BESIDE)
def test_after_a_learner_killed_beside_a_mixture_all_ways_to_draw_are_right(point, call):
    buffer = processes.shared(300, uniform_mix=0.5, track_draws=True, priority_clip=(0.5, None))
    buffer.extend(processes.transitions(range(300)))
    batch = buffer.sample(64)
    given = batch["index"], batch["id"].float(), batch["generation"]
    die_in(KILLED_BESIDE[point], lambda: CHANGE_BESIDE[call](buffer, *given))
    assert torn(buffer.sample(64, by="uniform", newest=100)) == 0
    buffer.check_valid()
    assert buffer.stats()["repairs"] == 1
    assert buffer.draw_count.sum() == 128


@pytest.mark.parametrize("point", KILLED_IN_EXTEND)
def test_what_a_killed_writer_did_not_acknowledge_is_drawn_by_no_rule(point):
    buffer = processes.shared(20, uniform_mix=1.0, latest=3)
    buffer.extend(processes.transitions(range(27)))
    new = processes.transitions(range(1000, 1006))
    die_in(KILLED_IN_EXTEND[point], lambda: buffer.extend(new, initial(new["id"])))
    for how in ({}, {"by": "uniform"}, {"newest": 19}):
        batch = buffer.sample(500, **how)
        assert set(batch["id"].tolist()) <= set(range(13, 27))
        assert torn(batch) == 0
    buffer.check_valid()


def test_a_mixture_is_shared_and_what_the_others_would_not_know_of_is_refused():
    buffer = processes.shared(20, uniform_mix=0.5)
    buffer.extend(processes.transitions(range(10)))
    other = handed_over(buffer)
    assert other.uniform_mix == 0.5
    other.extend(processes.transitions(range(10, 20)))
    other.set_priority([3], [0.0], [0])
    for each in (buffer, other):
        each.check_valid()
        index = each.sample(2000, by="uniform")["index"]
        assert sorted(set(index.tolist())) == [i for i in range(20) if i != 3]
        with pytest.raises(ConfigurationError, match="got 'inverse': other processes would not"):
            each.sample(4, by="inverse")
        each.check_valid()
    plain = processes.shared(20)
    plain.extend(processes.transitions(range(10)))
    with pytest.raises(ConfigurationError, match="got 'uniform': other processes would not"):
        plain.sample(4, by="uniform")
    with pytest.raises(ConfigurationError, match="got 'uniform': other processes would not"):
        plain.uniform_mix = 0.5
    assert plain.uniform_mix == 0
    plain.latest = 2
    assert plain.sample(4, newest=5)["index"][-2:].tolist() == [8, 9]
    buffer.uniform_mix = 0.0  # each process's own
    assert other.uniform_mix == 0.5


def test_after_a_death_in_increase_beta_or_setting_alpha_the_settings_hold():
    buffer = processes.shared(50, beta=0.9, beta_increment=0.4)
    buffer.extend(processes.transitions(range(50)), torch.linspace(1, 3, 50))
    patch = torch.Tensor, "clamp_", die
    die_in(patch, buffer.increase_beta)
    buffer.sample(4)
    assert buffer.beta == 1.0
    die_in((PriorityTable, "_refill", die), lambda: setattr(buffer, "alpha", 0.1))
    buffer.sample(4)
    assert buffer.alpha == 0.1
    buffer.check_valid()


def half(function):
    """Write the first of many numbers, and die."""

    def call(tensor, value):
        function(tensor.view(-1)[:1], value.view(-1)[:1] if torch.is_tensor(value) else value)
        die()

    return call


@pytest.mark.parametrize("new", [0.25, [0.9, 0.0, 0.37]])
@pytest.mark.parametrize("old", [0.5, [0.1, 0.2, 0.3]])
def test_after_a_death_in_setting_alpha_or_beta_of_many_each_has_the_old_or_the_new(old, new):
    places = [(Trees, "set", dies_after(Trees.set)), (torch.Tensor, "fill_", die)]
    places += [(torch.Tensor, "fill_", half(torch.Tensor.fill_))]
    if isinstance(new, list):
        places += [(torch.Tensor, "copy_", half(torch.Tensor.copy_))]
    for place, setting in product(places, ("alpha", "beta")):
        buffer = processes.shared(20, num_buffers=3, **{setting: old})
        buffer.extend(processes.transitions(range(20)).expand(3, 20).clone())
        buffer.update_priority([[0]] * 3, [[2.0]] * 3, [[0]] * 3)
        die_in(place, lambda: setattr(buffer, setting, new))  # noqa: B023
        buffer.sample(4)
        after = getattr(buffer, setting)
        if isinstance(old, float) and isinstance(new, float):
            assert after in (old, new)
        known = [torch.tensor(value, dtype=torch.float64).expand(3) for value in (old, new)]
        after = torch.as_tensor(after, dtype=torch.float64).expand(3)
        assert ((after == known[0]) | (after == known[1])).all()
        buffer.check_valid()


def test_a_death_while_loading_a_state_leaves_nothing_to_draw():
    few, buffer = processes.shared(20), processes.shared(20)
    few.extend(processes.transitions(range(5)))
    buffer.extend(processes.transitions(range(100, 125)))
    state, before = few.state_dict(), buffer.sample(50)
    die_in((PriorityTable, "restore", die), lambda: buffer.load_state_dict(state))
    buffer.update_priority(before["index"], torch.ones(50), before["generation"])
    with pytest.raises(EmptyBufferError):
        buffer.sample(4)
    buffer.load_state_dict(state)
    assert buffer.sample(200)["id"].unique().tolist() == list(range(5))
    buffer.check_valid()


def test_an_interrupt_in_a_write_gives_up_that_write_alone(monkeypatch):
    buffer = processes.shared(20)
    buffer.extend(processes.transitions(range(10)))
    monkeypatch.setattr(PriorityTable, "write_runs", interrupt)
    with pytest.raises(KeyboardInterrupt):
        buffer.extend(processes.transitions(range(10, 14)))
    monkeypatch.undo()
    assert buffer.sample(500)["id"].unique().tolist() == list(range(10))
    buffer.check_valid()
    assert buffer.stats()["repairs"] == 1


def test_a_death_while_loading_more_than_there_was_leaves_nothing_to_draw():
    whole, buffer = processes.shared(20), processes.shared(20)
    whole.extend(processes.transitions(range(20)))
    buffer.extend(processes.transitions(range(3)))
    state = whole.state_dict()
    die_in((PriorityTable, "_refill", die), lambda: buffer.load_state_dict(state))
    with pytest.raises(EmptyBufferError):
        buffer.sample(4)


def interrupt(*_, **__):
    raise KeyboardInterrupt


def others_can_go_on(buffer):
    """Whether another process gets the lock."""
    process = forked(buffer.sample, 4)
    try:
        with deadline(20):
            return os.waitpid(process, 0)[1] == 0
    except TimeoutError:
        kill(process)
        return False


@pytest.mark.parametrize("before", ["a death", "an interrupt"])
def test_an_interrupted_repair_is_left_to_the_next_call(before, monkeypatch):
    buffer = processes.shared(300)
    buffer.extend(processes.transitions(range(300)))
    batch = buffer.sample(64)
    update = lambda: buffer.update_priority(batch["index"], batch["id"], batch["generation"])  # noqa: E731
    if before == "a death":
        die_in((PriorityTable, "update", die_after_leaves), update)
    else:
        monkeypatch.setattr(f"{__name__}.die", interrupt)
        monkeypatch.setattr(PriorityTable, "update", die_after_leaves)
    monkeypatch.setattr(PriorityTable, "rebuild", interrupt)
    with pytest.raises(KeyboardInterrupt):
        update()
    monkeypatch.undo()
    assert others_can_go_on(buffer)
    buffer.check_valid()
    assert buffer.stats()["repairs"] == 1


def test_an_interrupt_at_the_end_of_a_write_gives_the_lock_back_and_is_repaired(monkeypatch):
    buffer = processes.shared(20)
    buffer.extend(processes.transitions(range(10)))
    monkeypatch.setattr(Note, "end", interrupt)
    with pytest.raises(KeyboardInterrupt):
        buffer.extend(processes.transitions(range(10, 14)))
    monkeypatch.undo()
    assert others_can_go_on(buffer)
    buffer.extend(processes.transitions(range(14, 16)))
    assert buffer.sample(500)["id"].unique().tolist() == [*range(10), 14, 15]
    buffer.check_valid()


@pytest.mark.parametrize("end", ["released", "dead"])
def test_an_interrupt_while_waiting_leaves_the_lock_to_others(end, monkeypatch):
    """It is seen when the wait is over, which may have brought the lock."""
    buffer = processes.shared(20)
    buffer.extend(processes.transitions(range(20)))
    holding, waiter = shared_zeros(1), os.getpid()

    def hold():
        with buffer._lock:
            holding.fill_(1)
            time.sleep(0.2)
            os.kill(waiter, signal.SIGALRM)
            time.sleep(0.2)
            if end == "dead":
                die()

    monkeypatch.setattr(mutex, "_PATIENCE", 60.0)
    process = forked(hold)
    while not holding[0]:
        time.sleep(0.005)
    with pytest.raises(TimeoutError, match="a deadlock"), deadline(50):
        buffer.sample(4)
    os.waitpid(process, 0)
    assert not locked_for(buffer)
    assert others_can_go_on(buffer)
    assert buffer.stats()["repairs"] == (end == "dead")


def test_who_waits_lets_the_other_threads_of_its_process_run(monkeypatch):
    """Else the one that has the lock could not give it back."""
    buffer = processes.shared(20)
    buffer.extend(processes.transitions(range(20)))
    monkeypatch.setattr(mutex, "_PATIENCE", 1e6)

    def wait_beside_the_holder():
        holding = threading.Event()

        def hold():
            with buffer._lock:
                holding.set()
                time.sleep(0.2)

        threading.Thread(target=hold).start()
        holding.wait()
        buffer.sample(4)

    process = forked(wait_beside_the_holder)
    try:
        with deadline(20):
            os.waitpid(process, 0)
    except TimeoutError:
        kill(process)
        raise


def test_what_is_refused_costs_no_transition():
    buffer = processes.shared(4)
    buffer.extend(processes.transitions(range(4)))
    with pytest.raises(PriorityError):
        buffer.extend(processes.transitions(range(4, 6)), torch.tensor([1.0, float("nan")]))
    assert buffer.transitions["id"].tolist() == list(range(4))
    assert (buffer.priority > 0).all()
    assert buffer.stats()["repairs"] == 0


def kill_many(buffer, start, kills, longest):
    """Start and kill processes one after the other, with a learner that goes on beside them.

    As many as `kills`, and more until one has been killed in the middle of a call.
    """
    rng = random.Random(0)
    found = done = 0
    while done < kills or not buffer.stats()["repairs"]:
        done += 1
        process = start()
        end = time.monotonic() + rng.uniform(0.005, longest)
        while time.monotonic() < end:
            found += learn(buffer)
        kill(process)
        found += learn(buffer)
        buffer.check_valid()
    return found


@pytest.mark.parametrize("kills", [15, pytest.param(100, marks=pytest.mark.slow)])
def test_writers_killed_at_random_moments_lose_only_what_they_did_not_acknowledge(kills):
    buffer = processes.shared(5000)
    acknowledged, stop = shared_zeros(3), shared_zeros(1, torch.bool)
    survivor = forked(processes.write, buffer, 0, acknowledged, stop)
    while not acknowledged[0]:
        time.sleep(0.01)
    victims = iter(range(10**6))
    done = acknowledged.clone()

    def start():
        writer = 1 + next(victims) % 2
        acknowledged[writer] += 10_000  # it never says the same id twice, whoever died before
        return forked(processes.write, buffer, writer, acknowledged, stop, 1000)

    found = kill_many(buffer, start, kills, 0.06)
    assert found == 0
    before = int(acknowledged[0])
    wait = time.monotonic() + 60
    while acknowledged[0] < before + 6000 and time.monotonic() < wait:
        learn(buffer)
    stop.fill_(True)
    assert os.waitpid(survivor, 0)[1] == 0
    assert acknowledged[0] >= before + 6000 > done[0]
    assert_nothing_lost(buffer, acknowledged[:1])
    buffer.check_valid()


def test_whatever_a_killed_writer_acknowledged_is_there():
    for attempt in range(6):
        buffer = processes.shared(30_000)
        acknowledged, stop = shared_zeros(1), shared_zeros(1, torch.bool)
        process = forked(processes.write, buffer, 0, acknowledged, stop, 300)
        while acknowledged[0] <= 500 * attempt:
            time.sleep(0.0005)
        kill(process)
        buffer.sample(4)
        assert_nothing_lost(buffer, acknowledged, unsure=300)
        buffer.check_valid()


@pytest.mark.parametrize("kills", [15, pytest.param(100, marks=pytest.mark.slow)])
def test_learners_killed_at_random_moments_leave_consistent_trees(kills):
    buffer = processes.shared(2000, weight_normalization="buffer")
    acknowledged, stop = shared_zeros(1), shared_zeros(1, torch.bool)
    torn_elsewhere = shared_zeros(1)
    writer = forked(processes.write, buffer, 0, acknowledged, stop)
    while not acknowledged[0]:
        time.sleep(0.01)
    start = lambda: forked(processes.learn_on, buffer, torn_elsewhere, stop)  # noqa: E731
    assert kill_many(buffer, start, kills, 0.03) == 0
    assert torn_elsewhere[0] == 0
    stop.fill_(True)
    assert os.waitpid(writer, 0)[1] == 0
    assert buffer.write_count == acknowledged[0]
    assert_nothing_lost(buffer, acknowledged)
    buffer.check_valid()


def test_a_stopped_holder_can_be_waited_for_and_the_wait_can_be_interrupted():
    buffer = processes.shared(20)
    buffer.extend(processes.transitions(range(20)))

    def hold():
        with buffer._lock:
            holding.fill_(1)
            time.sleep(60)

    holding = shared_zeros(1)
    process = forked(hold)
    while not holding[0]:
        time.sleep(0.005)
    started = time.monotonic()
    with pytest.raises(TimeoutError, match="a deadlock"), deadline(1):
        buffer.sample(4)
    assert time.monotonic() - started < 10
    kill(process)
    buffer.sample(4)
    assert buffer.stats()["repairs"] == 1


def test_a_shared_buffer_draws_what_a_plain_one_draws():
    plain = PrioritizedReplayBuffer(300, 64, eps=0.0, generator=torch.Generator().manual_seed(3))
    other = processes.shared(300, batch_size=64, generator=torch.Generator().manual_seed(3))
    for k in range(50):
        for buffer in (plain, other):
            ids = torch.arange(17 * k, 17 * k + 17)
            buffer.extend(processes.transitions(ids), initial(ids) if k % 2 else None)
        one, two = plain.sample(), other.sample()
        assert set(one.keys(True, True)) == set(two.keys(True, True))
        assert (one == two).all()
        for buffer, batch in ((plain, one), (other, two)):
            buffer.update_priority(batch["index"], learned(batch["id"]), batch["generation"])
    assert torch.equal(plain.priority, other.priority)


def test_what_cannot_be_shared_is_refused():
    example = processes.transitions(0)
    with pytest.raises(ConfigurationError, match="example: expected a transition"):
        PrioritizedReplayBuffer(10, shared=True)
    with pytest.raises(ConfigurationError, match="prioritization='proportional', got 'rank'"):
        PrioritizedReplayBuffer(10, shared=True, prioritization="rank", example=example)
    elsewhere = PrioritizedReplayBuffer(10)
    elsewhere._device = torch.device("cuda:0")
    with pytest.raises(ConfigurationError, match="expected device='cpu', got 'cuda:0'"):
        elsewhere._require_shareable(Memory(), "proportional", example)
    with pytest.raises(ConfigurationError, match="storage='memory', got 'memmap'"):
        PrioritizedReplayBuffer(10, shared=True, storage="memmap", example=example)
    moved = PrioritizedReplayBuffer(4)
    moved.extend(processes.transitions(torch.arange(9)))
    with pytest.raises(CheckpointError, match="always had the capacity 10"):
        PrioritizedReplayBuffer(10, shared=True, example=example).load_state_dict(
            moved.state_dict()
        )

    back = PrioritizedReplayBuffer(10)
    back.load_state_dict(moved.state_dict())
    with pytest.raises(CheckpointError, match="always had the capacity 10"):
        processes.shared(10).load_state_dict(back.state_dict())

    buffer = processes.shared(10)
    buffer.extend(example.unsqueeze(0))
    with pytest.raises(PriorityError, match="generation: expected that of the batch"):
        buffer.update_priority([0], [1.0])
    for copied in (copy.deepcopy, pickle.dumps):
        with pytest.raises(ConfigurationError, match="handed to a process when that is started"):
            copied(buffer)


def test_a_buffer_is_shared_on_linux_only(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(ConfigurationError, match=r"expected Linux, .* got darwin"):
        mutex.RobustMutex()


def test_the_lock_of_a_dead_holder_is_taken_as_if_it_were_free():
    lock = mutex.RobustMutex()
    process = forked(lambda: (lock.acquire(), lock.acquire(), die()))
    assert os.waitpid(process, 0)[1] == signal.SIGKILL
    assert [lock.acquire(), lock.acquire()] == [1, 2]
    for _ in range(2):
        lock.release()
    assert lock.acquire() == 1
    lock.release()


def test_what_the_lock_refuses_is_an_error():
    lock = mutex.RobustMutex()
    with pytest.raises(OSError, match="the lock of a shared buffer"):
        lock.release()


def test_loading_a_state_notes_it_with_the_lock_held(monkeypatch):
    buffer, noted = processes.shared(20), []

    def note(self, *_):
        noted.append(locked_for(buffer))

    monkeypatch.setattr(Note, "begin", note)
    buffer.load_state_dict(processes.shared(20).state_dict())
    assert noted == [True]


def many_transitions(ids):
    """Transitions of two buffers, [2, n]: of the second, 500 higher."""
    ids = torch.as_tensor(ids)
    return processes.transitions(torch.stack([ids, ids + 500]))


def test_many_shared_buffers_are_written_and_drawn_by_a_process_that_is_handed_them():
    buffers = processes.shared(20, num_buffers=2)
    other = handed_over(buffers)
    buffers.extend(many_transitions(range(30)))
    batch = other.sample(16)
    assert torn(batch) == 0
    assert (batch["id"][0] < 500).all()
    assert (batch["id"][1] >= 500).all()
    other.update_priority(batch["index"], torch.ones(2, 16), batch["generation"])
    assert torch.equal(buffers.priority, other.priority)
    assert buffers.write_count == other.write_count == 60
    buffers.check_valid()


@pytest.mark.parametrize("point", KILLED_IN_EXTEND)
def test_of_many_shared_buffers_none_draws_what_a_killed_writer_did_not_acknowledge(point):
    buffers = processes.shared(20, num_buffers=2)
    buffers.extend(many_transitions(range(17)), torch.ones(2, 17))
    buffers.extend(many_transitions(range(17, 19)), mask=torch.tensor([[True, True], [False] * 2]))
    new = many_transitions(range(100, 106))
    priority = torch.ones(2, 6)
    mask = torch.tensor([[True] * 6, [True, False] * 3])
    die_in(KILLED_IN_EXTEND[point], lambda: buffers.extend(new, priority, mask))
    batch = buffers.sample(2000)
    assert torn(batch) == 0
    assert batch["id"][0].unique().tolist() == list(range(5, 19))
    assert batch["id"][1].unique().tolist() == list(range(500, 517))
    assert buffers.write_count == 17 + 2 + 17 + 6 + 3
    assert buffers.stats()["repairs"] == 1
    buffers.check_valid()
    buffers.extend(new, priority, mask)
    buffers.check_valid()


class Own(PrioritizedReplayBuffer):
    """A user's subclass."""

    def extend(self, transitions, priority=None, mask=None):
        self.seen = getattr(self, "seen", 0) + 1
        return super().extend(transitions, priority, mask)


@pytest.mark.parametrize(
    "settings",
    [{"shared": True}, {"threads": True}, {"prefetch": 2}, {"num_buffers": 2, "prefetch": 1}],
    ids=str,
)
def test_a_subclass_can_do_what_its_base_can(settings, tmp_path):
    example = processes.transitions(0)
    buffer = Own(20, 4, example=example, **settings)
    make = many_transitions if "num_buffers" in settings else processes.transitions
    buffer.extend(make(range(6)))
    assert buffer.seen == 1
    assert torn(buffer.sample()) == 0
    buffer.close()
    if "shared" in settings:
        other = handed_over(buffer)
        assert type(other) is Own
        other.extend(processes.transitions(range(6, 9)))
        assert len(buffer) == 9
    buffer.save(tmp_path / "buffer.pt")
    held = {name: value for name, value in settings.items() if name != "num_buffers"}
    loaded = Own.load(tmp_path / "buffer.pt", **held)
    assert type(loaded) is Own
    assert len(loaded) == len(buffer)
    assert torn(loaded.sample()) == 0
    loaded.close()

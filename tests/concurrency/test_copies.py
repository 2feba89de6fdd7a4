"""What another process gets of a buffer that is not shared: a copy, whoever sends it."""

import copy
import pickle
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from torch import multiprocessing

from per_td import PrioritizedReplayBuffer, SumTree, TransitionReplayBuffer
from tests.support.fuzz import check_sound
from tests.support.processes import handed_over, transitions


def through_a_queue(thing):
    """What a queue of torch.multiprocessing hands on."""
    return ForkingPickler.loads(ForkingPickler.dumps(thing))


WAYS = {
    "to a process": handed_over,
    "through a queue": through_a_queue,
    "pickle": lambda thing: pickle.loads(pickle.dumps(thing)),
    "deepcopy": copy.deepcopy,
}
KINDS = {
    "columns": {"layout": "columns"},
    "records": {"layout": "records", "weight_normalization": "buffer"},
    "rank": {"prioritization": "rank"},
    "many": {"num_buffers": 2},
    "memmap": {"storage": "memmap"},
    "threads": {"threads": True},
    "prefetch": {"prefetch": 2},
}


def made(kind):
    settings = KINDS[kind]
    buffer = PrioritizedReplayBuffer(100, 8, beta=0.5, **settings)
    buffer.generator = torch.Generator().manual_seed(5)
    extend(buffer, 0, 60)
    return buffer


def extend(buffer, start, n):
    td = transitions(range(start, start + n))
    if buffer.num_buffers:
        td = td.expand(2, n).clone()
    buffer.extend(td, torch.arange(n).expand(td.shape) + 1.0)


def parts(buffer):
    state = buffer.state_dict()
    held = [state[key] for key in ("priority", "mass", "replayed", "write_count", "generator")]
    return [*held, buffer.transitions.clone()]


def same(some, others) -> bool:
    pairs = zip(some, others, strict=True)
    return all(bool((a == b).all()) if hasattr(a, "all") else a == b for a, b in pairs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sent", WAYS.values(), ids=WAYS)
def test_what_is_sent_is_a_copy_that_goes_on_by_itself(sent, kind):
    buffer = made(kind)
    before = parts(buffer)
    other = sent(buffer)
    assert same(parts(other), before)
    assert not any(leaf.is_shared() for leaf in other.transitions.values(True, True))
    extend(other, 1000, 50)
    other.sample()
    other.alpha, other.beta, other.eps = 0.25, 1.0, 0.5
    assert other.write_count == buffer.write_count + 50 * (buffer.num_buffers or 1)
    assert same(parts(buffer), before)
    assert (buffer.alpha, buffer.beta, buffer.eps) != (0.25, 1.0, 0.5)
    assert not any(leaf.is_shared() for leaf in buffer.transitions.values(True, True))
    check_sound(buffer)
    check_sound(other)
    for each in (buffer, other):
        getattr(each, "close", lambda: None)()


@pytest.mark.parametrize("sent", WAYS.values(), ids=WAYS)
def test_the_draws_of_a_copy_are_those_that_the_original_would_have_made(sent):
    buffer = made("records")
    other = sent(buffer)
    assert [(buffer.sample() == other.sample()).all() for _ in range(3)] == [True] * 3


@pytest.mark.parametrize("sent", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("num_trees", [None, 2])
def test_trees_are_copied_too(sent, num_trees):
    tree = SumTree(20, num_trees=num_trees)
    index = torch.arange(20).expand(*([] if num_trees is None else [2]), 20)
    tree.update(index, index.float())
    leaves, total = tree[:].clone(), tree.total.clone()
    other = sent(tree)
    assert torch.equal(other[:], leaves)
    other.update(index, torch.ones(index.shape))
    assert torch.equal(tree[:], leaves)
    assert torch.equal(tree.total, total)
    assert (other.total == 20).all()


@pytest.mark.parametrize("sent", WAYS.values(), ids=WAYS)
def test_the_courses_buffer_is_copied_with_what_it_knows_of_its_draws(sent):
    buffer = TransitionReplayBuffer(4)
    for k in range(4):
        buffer.push([float(k)], 0, 0.0, [k + 1.0], False)
    drawn = buffer.sample(50)[5]
    other = sent(buffer)
    for k in range(4):
        other.push([float(k)], 0, 0.0, [k + 1.0], False)
    other.update_priorities(drawn, torch.full((50,), 99.0))
    assert other.stats()["stale_updates"] == 50
    assert other.priority.max() == 1
    buffer.update_priorities(drawn, torch.full((50,), 99.0))
    assert buffer.stats() == {"written": 4, "stale_updates": 0, "refused_priorities": 0}
    assert buffer.priority.max() > 99


def test_two_places_that_name_one_buffer_name_one_copy():
    buffer = made("columns")
    for sent in WAYS.values():
        pair = sent([buffer, {"it": buffer}])
        assert pair[0] is pair[1]["it"]


def take_part(buffer, queue, answers):
    """Run by a process: write to what it was given, and to what comes through the queue."""
    for each in (buffer, queue.get(timeout=200)):
        extend(each, 1000, 50)
        answers.put((each.write_count, int((each.sample(200)["id"] >= 1000).sum())))
    answers.put(buffer)
    queue.get(timeout=200)  # torch's queues share tensors only while their sender lives


@pytest.mark.slow
def test_what_a_spawned_process_writes_is_not_seen_by_its_parent():
    context = multiprocessing.get_context("spawn")
    queue, answers, buffer = context.Queue(), context.Queue(), made("columns")
    before = parts(buffer)
    process = context.Process(target=take_part, args=(buffer, queue, answers))
    process.start()
    queue.put(buffer)
    for _ in range(2):
        written, new = answers.get(timeout=200)
        assert written == 110
        assert new > 0
    returned = answers.get(timeout=200)
    queue.put(None)
    process.join(200)
    assert process.exitcode == 0
    assert same(parts(buffer), before)
    assert (buffer.sample(500)["id"] < 60).all()
    assert returned.write_count == 110
    check_sound(returned)
    check_sound(buffer)

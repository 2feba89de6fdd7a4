"""`check_valid` names what is broken, and views are copies of what is there."""

import pytest
import torch

from per_td import ConfigurationError, IndexRangeError, PerTdError, PrioritizedReplayBuffer, SumTree
from per_td.storage.ring import RingStorage
from tests.support.oracle import data, numbered
from tests.support.tables import table

NAN = float("nan")


def broken(thing, invariant):
    with pytest.raises(PerTdError, match=f"broken invariant: .*{invariant}"):
        thing.check_valid()


def used_table(capacity, **settings):
    made = table(capacity, weight_normalization="buffer", **settings)
    made.write_new(torch.arange(capacity), torch.arange(1.0, capacity + 1))
    made.rebuild()
    made.check_valid()
    return made


@pytest.mark.parametrize("prioritization", ["proportional", "rank"])
@pytest.mark.parametrize("capacity", [3, 16, 300])
@pytest.mark.parametrize(
    ("part", "value", "invariant"),
    [
        ("raw", NAN, "priorities are finite and at least 0"),
        ("raw", -1.0, "priorities are finite and at least 0"),
        ("raw", 0.0, "masses are positive just where priorities are"),
        ("mass", NAN, "masses are finite and at least 0"),
        ("mass", -1.0, "masses are finite and at least 0"),
        ("mass", 7.5, "every node of the sums follows from its 16 children; level 1"),
        ("total", 7.5, "every node of the sums follows from its 16 children"),
        ("largest", 7.5, "every node of the maxima follows from its 16 children"),
        ("smallest", 7.5, "every node of the minima follows from its 16 children"),
        ("ever_max", NAN, "the largest priority ever is finite"),
        ("refused", -1, "the count of refused priorities"),
    ],
)
def test_damage_to_a_table_is_named(part, value, invariant, capacity, prioritization):
    made = used_table(capacity, prioritization=prioritization)
    roots = {"total": "sums", "largest": "maxima", "smallest": "minima"}
    if part in roots:
        getattr(made.trees, roots[part])[-1] = value
    else:
        view = getattr(made, part)
        (view[1] if view.ndim else view).fill_(value)
    broken(made, invariant)


@pytest.mark.parametrize(
    ("prioritization", "source"),
    [("proportional", "priority.alpha"), ("rank", "the ranks at the last sort")],
)
def test_masses_that_do_not_follow_from_priorities_are_named(prioritization, source):
    made = used_table(20, prioritization=prioritization)
    made.fill(made.raw.clone(), made.mass * 1.001)
    broken(made, f"masses follow from {source}")


def test_of_equal_priorities_each_may_have_the_rank_of_any():
    made = table(6, prioritization="rank", sort_interval=100)
    made.write_new(torch.arange(6), torch.tensor([1.0, 2.0, 2.0, 2.0, 0.0, 5.0]))
    made.rebuild()
    made.check_valid()
    made.update(torch.tensor([0, 3]), torch.tensor([1.99, 1.0]), written=6)
    made.check_valid()
    made.fill(made.raw.clone(), made.mass[[0, 5, 2, 3, 4, 1]])
    broken(made, "masses follow from the ranks")


@pytest.mark.parametrize("num_trees", [None, 3])
def test_damage_to_a_tree_is_named(num_trees):
    tree = SumTree(300, num_trees=num_trees)
    tree.fill(torch.rand(tree[:].shape))
    tree.check_valid()
    tree._trees.masses[..., 5] = 2.0 if num_trees is None else NAN
    broken(tree, "the sums follow" if num_trees is None else "masses are finite")


def test_damage_to_a_ring_is_named():
    ring = RingStorage(7, torch.device("cpu"))
    ring.write(*ring.check(data(0, 9)))
    ring.check_valid()
    ring.epoch = -1
    broken(ring, "the offset of generations")


def full(**settings):
    buffer = PrioritizedReplayBuffer(8, eps=0.0, **settings)
    buffer.extend(numbered(0, 5) if buffer.num_buffers else data(0, 5))
    buffer.check_valid()
    return buffer


KINDS = {
    "one": {},
    "many": {"num_buffers": 3},
    "for threads": {"threads": True},
    "shared": {"shared": True, "example": data(0, 1)[0]},
}


@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS)
def test_damage_to_a_buffer_is_named(settings):
    """States are taken over as they are: one that was tampered with is damage."""
    buffer = full(**settings)
    state = buffer.state_dict()
    state["mass"] = state["mass"] * 2
    buffer.load_state_dict(state)
    broken(buffer, "masses follow from priority")


@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS)
def test_a_priority_beyond_the_filled_slots_is_named(settings):
    buffer = full(**settings)
    index = torch.full((buffer.num_buffers, 1) if buffer.num_buffers else (1,), 6)
    buffer._priorities.write_new(index, None)  # from outside, nothing can
    broken(buffer, "priorities beyond the filled slots are 0")


def test_damage_to_the_samplers_of_torchrl_is_named():
    pytest.importorskip("torchrl")
    from per_td.torchrl import PrioritizedSampler

    sampler = PrioritizedSampler(5, 0.5, 0.5)
    sampler.update_priority(torch.arange(5), torch.rand(5))
    sampler.check_valid()
    assert torch.equal(sampler.total_mass, sampler.mass.double().sum())
    sampler.load_state_dict(sampler.state_dict() | {"ever_max": torch.tensor(3.0)})
    sampler.check_valid()
    sampler._table.raw[2] = 0.0
    broken(sampler, "masses are positive just where priorities are")


@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS)
def test_views_are_copies(settings):
    buffer = full(weight_normalization="buffer", **settings)
    for name in ("priority", "mass", "total_mass", "smallest_mass", "replayed"):
        if name == "replayed" and buffer.num_buffers:
            continue
        view = getattr(buffer, name)
        view.zero_()
        assert name == "replayed" or getattr(buffer, name).any(), name
    buffer.check_valid()


@pytest.mark.parametrize("normalization", ["buffer", "batch", "none"])
@pytest.mark.parametrize("count", [None, 3])
def test_views_of_masses_say_what_is_drawn_from(count, normalization):
    buffer = full(num_buffers=count, alpha=1.0, weight_normalization=normalization)
    lead = [] if count is None else [count]
    index = torch.arange(5).expand(*lead, 5)
    buffer.update_priority(index, torch.tensor([4.0, 0.0, 0.5, 1.0, 2.0]).expand(*lead, 5))
    assert buffer.mass.shape == (*lead, 5 if count is None else 8)
    assert buffer.mass[..., :5].view(-1, 5).tolist() == [[4.0, 0.0, 0.5, 1.0, 2.0]] * (count or 1)
    assert buffer.total_mass.dtype == torch.float64
    assert buffer.total_mass.tolist() == ([7.5] * count if count else 7.5)
    smallest = 0.5 if normalization == "buffer" else torch.inf
    assert buffer.smallest_mass.dtype == torch.float32
    assert buffer.smallest_mass.tolist() == ([smallest] * count if count else smallest)


@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS)
def test_leaves_are_drawn_with_their_masses_and_generations(settings):
    torch.manual_seed(3)
    buffer = full(**settings)
    many = buffer.num_buffers
    for start in (5, 10):
        buffer.extend(numbered(start, 5) if many else data(start, 5))
    torch.manual_seed(4)
    slot, leaves, generation, mass, _ = buffer.draw_leaves(6)
    torch.manual_seed(4)
    batch = buffer.sample(6)
    assert torch.equal(slot, batch["index"])
    assert torch.equal(generation, batch["generation"])
    assert torch.equal(buffer.generation_of(slot), generation)
    assert torch.equal(leaves["next", "reward"], batch["next", "reward"])
    assert torch.equal(mass, buffer.mass.gather(-1, slot))


@pytest.mark.parametrize("index", [8, -1])
def test_generations_of_slots_that_do_not_exist_are_refused(index):
    with pytest.raises(IndexRangeError, match="index: expected 0 <= index < 8, the slots"):
        full().generation_of([0, index])
    with pytest.raises(IndexRangeError, match="index: expected 0 <= index < 8, the slots"):
        full(num_buffers=3).generation_of([[0], [index], [0]])


def test_generations_go_on_when_a_state_has_moved():
    old = full()
    old.extend(data(5, 20))
    buffer = PrioritizedReplayBuffer(3)
    buffer.load_state_dict(old.state_dict())
    assert torch.equal(buffer.generation_of(range(3)), buffer.sample(99)["generation"][:3] * 0 + 4)
    batch = buffer.sample(50)
    assert torch.equal(buffer.generation_of(batch["index"]), batch["generation"])


def test_stale_updates_that_others_found_are_counted():
    buffer = full()
    buffer.count_stale(3)
    buffer.count_stale(0)
    assert buffer.stats()["stale_updates"] == 3
    for wrong in (-1, 1.5, None):
        with pytest.raises(ConfigurationError, match="updates: expected an integer"):
            buffer.count_stale(wrong)


def test_whether_kernels_are_used_can_be_asked(monkeypatch):
    monkeypatch.setenv("PER_TD_KERNELS", "off")
    assert full().kernels is False


def test_many_buffers_do_not_know_what_was_replayed():
    with pytest.raises(
        ConfigurationError, match="replayed: expected one buffer, got num_buffers=3"
    ):
        full(num_buffers=3).replayed  # noqa: B018

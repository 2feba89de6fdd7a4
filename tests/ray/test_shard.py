"""Shards without Ray: what they restore, and what they refuse."""

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from per_td.errors import CheckpointError, IndexRangeError, PriorityError, SchemaError
from per_td.ray import wire
from per_td.ray.shard import EXACT, Drawn, Shard

SETTINGS = {"capacity": 37, "alpha": 0.7, "eps": 0.01}


def packed(numbers):
    numbers = torch.as_tensor(numbers)
    return wire.pack({("id",): numbers, ("next", "x"): numbers.double().reshape(-1, 1)})


@pytest.fixture
def shard():
    """Makes shards, and closes their logs after the test."""
    made = []

    def make(folder=None, settings=SETTINGS, **options):
        path = None if folder is None else str(folder)
        made.append(Shard(settings, seed=3, folder=path, **options))
        return made[-1]

    yield make
    for each in made:
        end(each)


def end(shard):
    """What the end of a process does."""
    if shard._log is not None:
        shard._log.close()


def same(a, b):
    """Whether two buffers hold the same, to the bit, but for what draws change: that is not logged.

    It is the state of the generator, and which transitions were replayed.
    """
    one, two = a._buffer.state_dict(), b._buffer.state_dict()
    assert a._buffer.priority_clip == b._buffer.priority_clip
    for state in (one, two):
        del state["generator"], state["replayed"]
    return repr(one) == repr(two) and torch.equal(a._buffer.mass, b._buffer.mass)


def act(shard, rng, step):
    """One random message."""
    choice = rng.integers(10)
    if choice < 5 or not shard.report().size:
        n = int(rng.integers(1, 50))
        priority = rng.random(n, dtype=np.float32) if choice % 2 else None
        shard.extend(packed(np.arange(n) + 1000 * step), priority)
    elif choice < 9:
        drawn = shard.sample([8])
        how = [{}, {"mode": "max", "rate": 0.5}, {"mode": "mean", "rate": 0.1}, EXACT][choice - 5]
        value = rng.random(size=8).astype(np.float32)
        shard.update(drawn.slot, value if how == EXACT else value - 0.5, drawn.generation, how)
    else:
        low = float(rng.random())
        clip = None if step % 2 else (low, 2 * low)
        shard.configure(alpha=float(rng.random()), eps=float(rng.random()), priority_clip=clip)


@pytest.mark.parametrize("every", [1, 40, 10_000])
def test_a_shard_that_starts_again_is_the_same_to_the_bit(every, shard, tmp_path):
    rng = np.random.default_rng(every)
    one = shard(tmp_path, checkpoint_every=every)
    for step in range(60):
        act(one, rng, step)
        if step % 10 == 9:
            end(one)
            two = shard(tmp_path, checkpoint_every=every)
            assert same(one, two)
            assert one.report()._replace(epoch=0, serial=0) == two.report()._replace(
                epoch=0, serial=0
            )
            one = two


@pytest.mark.parametrize(
    "unlogged",
    [
        lambda shard: shard.extend(packed(range(100, 103))),
        lambda shard: shard.update(np.array([3]), np.array([9.0], np.float32)),
        lambda shard: shard.configure(alpha=0.1, eps=1.0),
    ],
)
def test_what_comes_after_a_log_that_failed_is_restored_too(unlogged, shard, tmp_path, monkeypatch):
    one = shard(tmp_path)
    one.extend(packed(range(20)), np.ones(20, np.float32))

    def full(record):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(one._log, "append", full)
        with pytest.raises(OSError, match="No space"):
            unlogged(one)
    one.extend(packed(range(200, 205)), np.full(5, 2.0, np.float32))
    checkpoints = list(tmp_path.glob("*.pt"))
    one.update(np.array([4, 24]), np.array([5.0, 6.0], np.float32))
    assert list(tmp_path.glob("*.pt")) == checkpoints  # one is enough: this was logged
    end(one)
    assert same(one, shard(tmp_path))
    assert torch.equal(one._buffer.transitions["id"], wire.unpack(one.transitions())["id",])


def test_a_write_that_is_refused_is_not_in_the_log(shard, tmp_path):
    one = shard(tmp_path)
    one.extend(packed([1, 2]))
    (log,) = tmp_path.glob("*.log")
    before = log.read_bytes()
    with pytest.raises(SchemaError):
        one.extend(wire.pack({("other",): torch.zeros(2)}))
    with pytest.raises(PriorityError):
        one.extend(packed([3]), np.array([-1.0], np.float32))
    with pytest.raises(IndexRangeError):
        one.update(np.array([30]), np.array([1.0], np.float32))
    assert log.read_bytes() == before
    end(one)
    assert shard(tmp_path).report().written == 2


def test_updates_for_what_another_start_drew_are_stale(shard):
    drawn_from, now = shard(), shard()
    drawn_from.extend(packed(range(30)))
    now.extend(packed(range(2)))
    drawn = drawn_from.sample([16])
    before = now.priority()
    report = now.update(drawn.slot, np.ones(16, np.float32), drawn.generation)
    assert report.stale == 16
    assert (now.priority() == before).all()


def test_updates_for_what_has_been_overwritten_are_stale(shard):
    one = shard()
    one.extend(packed(range(37)))
    drawn = one.sample([16])
    one.extend(packed(range(37)))
    assert one.update(drawn.slot, np.ones(16, np.float32), drawn.generation).stale == 16


def test_updates_are_taken_after_a_state_of_another_capacity_was_loaded(shard, tmp_path):
    large, small = shard(), shard(settings=SETTINGS | {"capacity": 5})
    large.extend(packed(range(80)))
    large.save(tmp_path / "state")
    small.load(tmp_path / "state")
    drawn = small.sample([16])
    assert small.update(drawn.slot, np.ones(16, np.float32), drawn.generation).stale == 0
    assert small.priority()[drawn.slot] == pytest.approx(1.01)


def test_a_shard_with_nothing_to_draw_says_so(shard):
    one = shard()
    assert not isinstance(one.sample([3]), Drawn)
    one.extend(packed([1, 2]), np.zeros(2, np.float32))
    assert one.sample([3]).size == 2


def test_what_is_drawn_comes_with_its_masses_and_the_total_of_that_moment(shard):
    one = shard()
    one.extend(packed(range(10)), np.arange(10, dtype=np.float32))
    drawn = one.sample([64])
    assert drawn.mass == pytest.approx(drawn.slot.astype(float) ** 0.7, rel=1e-6)
    assert drawn.report.total == pytest.approx(sum(k**0.7 for k in range(10)), rel=1e-6)
    leaves = wire.unpack(drawn.packed)
    assert leaves["id",].tolist() == drawn.slot.tolist()
    assert leaves["next", "x"][:, 0].tolist() == drawn.slot.tolist()


@pytest.mark.parametrize("draw", ["independent", "stratified"])
def test_draws_for_several_batches_are_those_for_one_after_the_other(draw, shard):
    one, two = (shard(settings=SETTINGS | {"draw": draw}) for _ in range(2))
    for each in (one, two):
        each.extend(packed(range(30)), np.arange(30, dtype=np.float32))
    together = one.sample([16, 0, 1, 40])
    apart = [two.sample([n]) for n in (16, 1, 40)]
    assert len(together.slot) == 57
    for name in ("slot", "mass"):
        expected = np.concatenate([getattr(drawn, name) for drawn in apart])
        np.testing.assert_array_equal(getattr(together, name), expected)
    assert len(np.unique(together.generation)) == 1
    leaves = wire.unpack(together.packed)
    assert leaves["id",].tolist() == together.slot.tolist()
    assert leaves["next", "x"][:, 0].tolist() == together.slot.tolist()


@pytest.mark.parametrize("draw", ["independent", "stratified"])
def test_each_of_several_batches_is_drawn_from_all_slots(draw, shard):
    one = shard(settings=SETTINGS | {"draw": draw})
    one.extend(packed(range(37)), np.ones(37, np.float32))
    drawn = one.sample([3700] * 3)
    for begin in range(0, 3 * 3700, 3700):
        counts = np.bincount(drawn.slot[begin : begin + 3700], minlength=37)
        if draw == "stratified":
            assert abs(counts - 100).max() <= 1
        else:
            assert chisquare(counts).pvalue > 1e-3


def test_the_smallest_mass_is_told_where_weights_need_it(shard):
    one = shard(settings=SETTINGS | {"weight_normalization": "buffer"})
    one.extend(packed([1, 2]), np.array([0.5, 2.0], np.float32))
    assert one.report().smallest == pytest.approx(0.5**0.7)
    assert shard().report().smallest == np.inf


def test_a_checkpoint_needs_a_folder(shard):
    with pytest.raises(CheckpointError, match="checkpoint_dir"):
        shard().checkpoint()


def test_a_loaded_state_is_what_a_later_start_finds(shard, tmp_path):
    source = shard()
    source.extend(packed(range(50)))
    source.save(str(tmp_path / "saved.pt"))
    one = shard(tmp_path / "journal", checkpoint_every=1000)
    one.extend(packed([7]))
    drawn = one.sample([4])
    one.load(str(tmp_path / "saved.pt"))
    assert same(one, source)
    one.extend(packed([8]))
    end(one)
    again = shard(tmp_path / "journal")
    assert same(one, again)
    assert again.report().written == 51
    ones = np.ones(4, np.float32)
    assert one.update(drawn.slot, ones, drawn.generation).stale == 4  # slots hold others now


def test_an_update_that_is_refused_counts_nothing_of_what_came_with_it(shard, tmp_path):
    """Neither what is of an earlier start, nor what has been overwritten."""
    one = shard(tmp_path)
    one.extend(packed(range(37)))
    early = one.sample([2])
    end(one)
    one = shard(tmp_path)
    late = one.sample([2])
    one.extend(packed(range(37)))
    now = one.sample([2])
    before = one.priority()
    slot, generation = (
        np.concatenate([getattr(drawn, name) for drawn in (early, late, now)])
        for name in ("slot", "generation")
    )
    for wrong, at in ((np.nan, 5), (np.inf, 3)):
        td_error = np.full(6, 2.0, np.float32)
        td_error[at] = wrong
        with pytest.raises(PriorityError):
            one.update(slot, td_error, generation)
    beyond = np.where(np.arange(6) == 4, 37, slot)
    with pytest.raises(IndexRangeError):
        one.update(beyond, np.full(6, 2.0, np.float32), generation)
    assert one.report().stale == 0
    np.testing.assert_array_equal(one.priority(), before)
    assert one.update(slot, np.full(6, 2.0, np.float32), generation).stale == 4


def test_the_next_checkpoint_after_a_load_is_counted_from_it(shard, tmp_path):
    source = shard()
    source.extend(packed(range(50)))
    source.save(str(tmp_path / "saved.pt"))
    one = shard(tmp_path / "journal", checkpoint_every=10)
    one.load(str(tmp_path / "saved.pt"))
    (first,) = (tmp_path / "journal").glob("*.pt")
    one.extend(packed(range(9)))
    assert list((tmp_path / "journal").glob("*.pt")) == [first]


def test_checkpoints_are_taken_every_so_many_transitions(shard, tmp_path):
    one = shard(tmp_path, checkpoint_every=10)
    found = []
    for n in (9, 1, 9, 2, 8, 25, 9):
        one.extend(packed(range(n)))
        found.append(sorted(int(path.stem) for path in tmp_path.glob("*.pt")))
    assert found == [[], [1], [1], [2], [2], [3], [3]]


def test_shards_with_another_seed_draw_otherwise_and_with_the_same_alike(shard):
    def slots(seed):
        one = Shard(SETTINGS, seed=seed)
        one.extend(packed(range(37)))
        return one.sample([64]).slot.tolist()

    assert slots(1) == slots(1)
    assert slots(1) != slots(2)


def test_reports_are_numbered_within_a_start(shard):
    one, two = shard(), shard()
    assert [one.report().serial for _ in range(3)] == [1, 2, 3]
    assert one.report().epoch != two.report().epoch

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import (
    LazyMemmapStorage,
    LazyTensorStorage,
    ListStorage,
    TensorDictReplayBuffer,
)
from torchrl.data.replay_buffers import Sequence

from per_td import IndexRangeError, PriorityError, kernels
from per_td.torchrl import PrioritizedSampler
from tests.support.oracle import assert_drawn_from
from tests.support.replay import ALPHA, BETA, data, learn, make


@pytest.mark.parametrize("prefetch", [None, 3])
@pytest.mark.parametrize("storage", [LazyTensorStorage, LazyMemmapStorage, ListStorage])
def test_draws_and_weights_follow_the_formulas(storage, prefetch):
    buffer = make(storage=storage, prefetch=prefetch, batch_size=64)
    buffer.extend(data(20))
    expected = torch.ones(20)
    for _ in range(3):
        batch = buffer.sample()
        learn(buffer, batch)
        expected[batch["index"]] = batch["td_error"]
    for _ in range(prefetch or 0):
        buffer.sample()  # batches drawn before the last update
    mass = expected.double() ** ALPHA
    batch = torch.cat([buffer.sample() for _ in range(40)])
    assert_drawn_from(batch["x"], mass / mass.sum())
    torch.testing.assert_close(
        batch["priority_weight"].double(),
        (mass[batch["index"]] / mass.min()) ** -BETA,
        rtol=1e-5,
        atol=0,
    )


@pytest.mark.parametrize(
    ("unit", "reduction", "expected"),
    [
        ("abs", "max", 9.0),
        ("abs", "r2d2", 0.9 * 9 + 0.1 * 5),
        ("squared", "mean", (1 + 3) / 2),
        ("squared", "sum", 4.0),
    ],
)
def test_several_td_errors_become_one_after_their_unit_is_settled(unit, reduction, expected):
    buffer = make(td_error_unit=unit, reduction=reduction)
    values = torch.tensor([[-1.0, 9.0]])
    index = buffer.extend(data(1, td_error=values))
    assert buffer.sampler.priority[index].item() == pytest.approx(expected)
    buffer.update_priority(0, 1.0)
    batch = buffer.sample(32)
    batch["td_error"] = values.expand(32, 2)
    buffer.update_tensordict_priority(batch)
    assert buffer.sampler.priority[0].item() == pytest.approx(expected)
    buffer.update_priority(0, 1.0)
    batch = batch[0]
    buffer.update_tensordict_priority(batch)
    assert buffer.sampler.priority[0].item() == pytest.approx(expected)


def test_priorities_of_the_stored_come_with_the_right_elements_in_two_dimensions():
    buffer = make(storage=lambda: LazyTensorStorage(24, ndim=2))
    x = torch.arange(12).reshape(4, 3)
    index = buffer.extend(TensorDict({"x": x, "td_error": x.float().unsqueeze(-1)}, [4, 3]))
    stored = buffer.storage[:]
    assert index.shape == (12, 2)
    torch.testing.assert_close(buffer.sampler.priority[:12], stored["x"].reshape(-1).float())
    learn(buffer, buffer.sample())
    assert buffer.stats()["stale_updates"] == 0


def test_single_steps_of_a_two_dimensional_storage_are_written():
    buffer = make(storage=lambda: LazyTensorStorage(24, ndim=2), batch_size=200)
    buffer.extend(data(4).reshape(4, 1))
    buffer.add(TensorDict({**data(4, 4)}, [4]))
    buffer.add(TensorDict({**data(4, 8), "td_error": torch.full((4, 2), 7.0)}, [4]))
    assert len(buffer) == 12
    assert buffer.sampler.priority[:12].tolist() == [1.0] * 8 + [7.0] * 4
    assert set(buffer.sample()["x"].tolist()) == set(range(12))


def test_elements_that_are_trajectories_get_one_priority_each():
    buffer = make(reduction="r2d2")
    x = torch.arange(12).reshape(4, 3)
    buffer.extend(TensorDict({"x": x, "td_error": x.float()}, [4, 3]))
    expected = 0.9 * x.float().amax(1) + 0.1 * x.float().mean(1)
    torch.testing.assert_close(buffer.sampler.priority[:4], expected)
    batch = buffer.sample()
    assert batch["index"].shape == (32, 3)
    batch["td_error"] = batch["x"] + 1.0
    buffer.update_tensordict_priority(batch)
    torch.testing.assert_close(buffer.sampler.priority[:4], expected + 1)


def test_new_elements_get_the_largest_priority_and_one_write_only():
    buffer = make()
    buffer.extend(data(2, td_error=torch.tensor([0.25, 0.5])))
    buffer.extend(data(1, td_error=torch.ones(1)), update_priority=False)
    assert buffer.sampler.priority[:3].tolist() == [0.25, 0.5, 0.5]


@pytest.mark.parametrize("way", [None, lambda batch: batch])
@pytest.mark.parametrize("wrong", [torch.tensor([1.0, float("nan")]), torch.ones(3)])
def test_priorities_that_cannot_be_are_refused_before_anything_is_written(wrong, way):
    buffer = make(collate_fn=way)
    new = data(2, td_error=torch.ones(2))
    buffer.extend(new)
    bad = TensorDict({**data(2, 2), "td_error": torch.ones(2)}, [2])
    bad._tensordict["td_error"] = wrong
    with pytest.raises(PriorityError, match="td_error: expected"):
        buffer.extend(bad)
    assert (len(buffer), buffer.write_count) == (2, 2)
    assert buffer.sampler.priority.sum() == 2


def test_a_batch_without_td_error_or_index_is_refused_by_name():
    buffer = make(priority_key=("loss", "delta"))
    buffer.extend(data(4))
    batch = buffer.sample()
    with pytest.raises(PriorityError, match=r"\('loss', 'delta'\): expected this entry"):
        buffer.update_tensordict_priority(batch)
    batch["loss", "delta"] = torch.ones(32)
    with pytest.raises(PriorityError, match="index: expected this entry"):
        buffer.update_tensordict_priority(batch.exclude("index"))
    with pytest.raises(PriorityError, match="got inf"):
        buffer.update_tensordict_priority(
            batch.set(("loss", "delta"), batch["x"] * 0.0 + torch.inf)
        )
    assert buffer.sampler.priority[:4].tolist() == [1] * 4


def test_td_errors_with_a_graph_are_detached():
    buffer = make()
    buffer.extend(data(4, td_error=torch.ones(4, requires_grad=True)))
    buffer.extend(data(4, td_error=torch.ones(4, requires_grad=True) * 2))
    batch = buffer.sample()
    batch["td_error"] = torch.ones(32, requires_grad=True) * 3
    buffer.update_tensordict_priority(batch)
    assert not buffer.sample()["td_error"].requires_grad


@pytest.mark.parametrize("way", [{}, {"prefetch": 3}, {"collate_fn": lambda batch: batch}])
def test_updates_that_come_too_late_are_dropped_and_counted(way):
    buffer = make(10, **way)
    buffer.extend(data(10))
    batches = [buffer.sample() for _ in range(4)]
    buffer.extend(data(4, 10))
    late = sum(int((batch["index"] < 4).sum()) for batch in batches)
    for batch in batches:
        batch["td_error"] = torch.full((32,), 50.0)
        buffer.update_tensordict_priority(batch)
    priority = buffer.sampler.priority
    assert priority[:4].tolist() == [1] * 4
    assert (priority[4:] == 50).any()
    assert buffer.stats()["stale_updates"] == late > 0


@pytest.mark.parametrize("keep", [True, False])
def test_updates_from_before_emptying_are_dropped(keep):
    buffer = make(10)
    buffer.extend(data(10))
    batch = buffer.sample()
    batch["td_error"] = torch.full((32,), 50.0)
    buffer.empty()
    buffer.update_tensordict_priority(batch if keep else batch.exclude("index_generation"))
    assert buffer.sampler.priority.sum() == 0
    assert buffer.stats()["stale_updates"] == 32
    buffer.extend(data(10))
    if keep:
        buffer.update_tensordict_priority(batch)
        assert (buffer.sampler.priority == 1).all()


@pytest.mark.parametrize("unit", ["abs", "squared"])
def test_updates_that_are_refused_are_not_counted_as_late(unit):
    buffer = make(10, td_error_unit=unit)
    buffer.extend(data(10))
    batch = buffer.sample()
    buffer.extend(data(9, 10))
    batch["td_error"] = torch.full((32,), float("nan"))
    with pytest.raises(PriorityError, match="finite"):
        buffer.update_tensordict_priority(batch)
    assert buffer.stats()["stale_updates"] == 0
    batch["td_error"] = torch.ones(32)
    buffer.update_tensordict_priority(batch)
    assert buffer.stats()["stale_updates"] == int((batch["index"] < 9).sum()) > 0


def test_an_update_by_index_after_emptying_does_not_bring_back_what_was_emptied():
    buffer = make(10)
    buffer.extend(data(10))
    index = buffer.sample()["index"]
    buffer.empty()
    buffer.update_priority(index, 50.0)
    assert buffer.sampler.priority.sum() == 0
    buffer.extend(data(1, 100))
    assert set(buffer.sample()["x"].tolist()) == {100}
    with pytest.raises(IndexRangeError, match="got 10"):
        buffer.update_priority(10, 1.0)


def with_torchrls_buffer(capacity):
    return TensorDictReplayBuffer(
        storage=LazyTensorStorage(capacity),
        sampler=PrioritizedSampler(capacity, ALPHA, BETA),
        batch_size=32,
    )


@pytest.mark.parametrize("choice", kernels.CHOICES)
@pytest.mark.parametrize(
    "fresh",
    [make, lambda n: make(n, collate_fn=lambda batch: batch), with_torchrls_buffer],
    ids=["short way", "long way", "torchrl"],
)
@pytest.mark.parametrize("how", ["by index", "batch", "stamped batch", "unwritten batch"])
def test_updates_of_slots_that_are_not_filled_are_late_and_of_others_refused(
    how, fresh, choice, monkeypatch
):
    monkeypatch.setenv(kernels.VARIABLE, choice)
    buffer = fresh(1000)
    buffer.extend(data(100))
    sampler, before = buffer.sampler, buffer.sampler.priority

    def update(*index):
        index = torch.tensor(index)
        if how == "by index":
            buffer.update_priority(index, torch.full(index.shape, 9.0))
            return
        batch = TensorDict({"index": index, "td_error": torch.full(index.shape, 9.0)}, [len(index)])
        if how != "batch":
            batch["index_generation"] = torch.where(index < 100, 0, -1 if how[0] == "u" else 0)
        buffer.update_tensordict_priority(batch)

    update(500, 100, 999)
    assert torch.equal(sampler.priority, before)
    assert sampler.stale_updates == 3
    update(500, 7)
    assert sampler.priority[7] == 9
    assert sampler.stale_updates == 4
    after = sampler.priority
    message = r"expected 0 <= index < 1000, the slots of the storage, got 1000 at position 1"
    with pytest.raises(IndexRangeError, match=message):
        update(500, 1000)
    with pytest.raises(IndexRangeError, match=message):
        update(8, 1000)
    assert torch.equal(sampler.priority, after)
    assert sampler.stale_updates == 4
    buffer.empty()
    update(7, 500)
    assert sampler.priority.sum() == 0
    assert sampler.stale_updates == 6
    with pytest.raises(IndexRangeError, match=message):
        update(7, 1000)
    if fresh is not with_torchrls_buffer:
        assert buffer.stats()["stale_updates"] == 6


@pytest.mark.parametrize(
    ("key", "change", "error", "message"),
    [
        ("td_error", torch.Tensor.to_sparse, PriorityError, "td_error: expected a dense tensor"),
        ("td_error", lambda values: values.to("meta"), PriorityError, "td_error: expected values"),
        ("index", torch.Tensor.to_sparse, IndexRangeError, "index: expected a dense tensor"),
        ("index", torch.Tensor.float, IndexRangeError, "index: expected an integer dtype"),
        ("index", lambda values: values.to("meta"), IndexRangeError, "index: expected values"),
        (
            "index_generation",
            torch.Tensor.to_sparse,
            IndexRangeError,
            "index_generation: expected a dense tensor",
        ),
        (
            "index_generation",
            lambda values: values[:5],
            IndexRangeError,
            "index_generation: expected one for each of 32 indices, got 5",
        ),
    ],
)
def test_tensors_that_cannot_be_read_are_refused_by_name(key, change, error, message):
    buffer = make(10)
    buffer.extend(data(10))
    batch = buffer.sample()
    batch["td_error"] = torch.full((32,), 9.0)
    batch._tensordict[key] = change(batch[key])
    with pytest.raises(error, match=message):
        buffer.update_tensordict_priority(batch)
    assert (buffer.sampler.priority == 1).all()


@pytest.mark.parametrize("index", [-1, [-1, -3], torch.tensor([-1])])
def test_updates_of_negative_indices_are_skipped_and_not_counted(index):
    for buffer in (make(10), with_torchrls_buffer(10)):
        buffer.extend(data(4))
        buffer.update_priority(index, 9.0)
        assert buffer.sampler.priority.tolist() == [1.0] * 4 + [0.0] * 6
        assert buffer.sampler.stale_updates == 0


@pytest.mark.parametrize("way", [None, lambda batch: batch])
def test_nothing_may_be_written_with_td_errors_too(way):
    buffer = make(10, collate_fn=way)
    buffer.extend(data(3, td_error=torch.full((3,), 4.0)))
    assert buffer.extend(data(0, td_error=torch.ones(0))).tolist() == []
    assert (len(buffer), buffer.write_count) == (3, 3)


def test_a_write_to_a_given_slot_makes_updates_late():
    buffer = make(10)
    buffer.extend(data(10))
    batch = buffer.sample()
    buffer.writer.write_at(torch.arange(10), data(10, 10))
    learn(buffer, batch)
    assert buffer.stats()["stale_updates"] == 32


def test_late_updates_are_recognised_in_two_dimensions_and_through_the_disk(tmp_path):
    def fresh():
        return make(storage=lambda: LazyTensorStorage(8, ndim=2))

    buffer = fresh()
    buffer.extend(data(8).reshape(2, 4))
    batch = buffer.sample()
    buffer.dumps(tmp_path / "saved")
    other = fresh()
    other.loads(tmp_path / "saved")
    for each in (buffer, other):
        each.extend(data(2, 8).reshape(2, 1))
        learn(each, batch.clone())
        assert each.stats()["stale_updates"] == int((batch["index"][:, 0] == 0).sum()) > 0


def test_windows_of_a_sample_unit_set_the_priority_of_their_first_element():
    buffer = make(10, sample_unit=Sequence(length=3), batch_size=64)
    buffer.extend(data(10))
    batch = buffer.sample()
    buffer.extend(data(4, 10))  # over the anchors 0 to 3
    batch["td_error"] = batch["index"] + 5.0
    buffer.update_tensordict_priority(batch)
    # windows end with their episode, after 4 and 9; the largest of a window counts
    expected = torch.tensor([1.0, 1, 1, 1, 9, 12, 13, 14, 14, 14])
    torch.testing.assert_close(buffer.sampler.priority, expected)
    assert buffer.stats()["stale_updates"] == len(
        set(batch["anchor_index"].tolist()) & set(range(4))
    )


def test_windows_in_a_storage_of_two_dimensions_may_come_too_late():
    buffer = make(
        storage=lambda: LazyTensorStorage(24, ndim=2), sample_unit=Sequence(length=3), batch_size=64
    )
    buffer.extend(data(24).reshape(2, 12))
    batch = buffer.sample()
    buffer.extend(data(8, 24).reshape(2, 4))  # over the anchors 0 to 3 of both rows
    batch["td_error"] = torch.full(batch.shape, 9.0)
    buffer.update_tensordict_priority(batch)
    anchors = {tuple(anchor) for anchor in batch["anchor_index"].tolist()}
    late = {anchor for anchor in anchors if anchor[0] < 4}
    assert buffer.stats()["stale_updates"] == len(late) > 0
    priority = buffer.sampler.priority.view(12, 2)
    for anchor in anchors:
        assert priority[anchor] == (1.0 if anchor in late else 9.0)

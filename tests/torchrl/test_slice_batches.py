import pytest
import torch
from tensordict import TensorDict
from torchrl.data import (
    LazyTensorStorage,
    TensorDictReplayBuffer,
)

from per_td import PriorityError
from per_td.torchrl import PrioritizedSliceSampler
from tests.support.slice_oracle import ALPHA, BETA, DONE, TRUNCATED, Stream, filled, valid_starts


def test_a_batch_has_the_layout_of_torchrls():
    buffer = filled(20, [Stream(33, 1)], 33, slice_len=3)
    batch, info = buffer.sample(30, return_info=True)
    assert batch.shape == (30,)
    assert batch["index"].shape == (30, 1)
    assert batch["priority_weight"].shape == (30,)
    assert (batch["priority_weight"].view(10, 3) == batch["priority_weight"][::3, None]).all()
    last = torch.tensor([False, False, True]).repeat(10).unsqueeze(-1)
    assert torch.equal(info[TRUNCATED], last)
    stored = buffer.storage[:][batch["index"][:, 0]]
    assert torch.equal(batch[DONE], stored[DONE] | last)
    assert not batch["next", "terminated"].any()
    assert torch.equal(batch["is_init"], stored["is_init"] | last.roll(1))


def test_stored_terminations_are_kept_beside_the_marks():
    sampler = PrioritizedSliceSampler(6, ALPHA, BETA, slice_len=2, truncated_key="truncated")
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(6), sampler=sampler, batch_size=60)
    k = torch.arange(6)
    flat = {"done": k == 3, "terminated": k == 3, "episode": k // 3}
    buffer.extend(TensorDict({"k": torch.arange(6), **flat}, [6]))
    batch = buffer.sample()
    assert torch.equal(batch["terminated"], batch["k"] == 3)
    assert batch["truncated"].shape == batch["done"].shape == (60,)
    assert batch["truncated"].view(30, 2).tolist() == [[False, True]] * 30


def test_marks_may_be_left_out():
    buffer = filled(20, [Stream(20, 1)], 20, slice_len=3, truncated_key=None, init_key=None)
    batch, info = buffer.sample(6, return_info=True)
    assert set(info) == {"priority_weight", "index", "slice_start"}
    stored = buffer.storage[:][batch["index"][:, 0]]
    assert torch.equal(batch["is_init"], stored["is_init"])
    assert torch.equal(batch[TRUNCATED], stored[TRUNCATED])


def test_no_entry_for_first_records_is_made_up():
    buffer = filled(20, [Stream(20, 1)], 20, slice_len=3, init_key="absent")
    assert "absent" not in buffer.sample(24).keys()  # noqa: SIM118  a tensordict


@pytest.mark.parametrize("normalization", ["buffer", "batch", "none"])
def test_weights_follow_the_formula(normalization):
    stream = Stream(33, 1)
    buffer = filled(20, [stream], 33, slice_len=3, weight_normalization=normalization)
    buffer.update_priority(torch.arange(20), torch.rand(20) + 0.1)
    mass = (buffer.sampler.priority.double()) ** ALPHA
    starts = torch.tensor([k % 20 for k in valid_starts(stream, 13, 32, 3, 3, True)])
    batch = buffer.sample(24)
    first = batch["index"][::3, 0]
    weight = (len(starts) * mass[first] / mass[starts].sum()) ** -BETA
    if normalization == "batch":
        weight /= weight.max()
    if normalization == "buffer":  # as TorchRL does: over all records
        weight = (mass[first] / mass.min()) ** -BETA
    torch.testing.assert_close(batch["priority_weight"][::3].double(), weight, rtol=1e-5, atol=0)


def test_by_default_every_record_gets_its_own_priority():
    buffer = filled(20, [Stream(33, 1)], 33, slice_len=3)
    batch = buffer.sample(24)
    batch["td_error"] = batch["k"].float().unsqueeze(-1) + 1
    buffer.update_tensordict_priority(batch)
    slots = batch["index"][:, 0]
    torch.testing.assert_close(buffer.sampler.priority[slots], batch["k"].float() + 1)


def mixed(values):
    return 0.9 * max(values) + 0.1 * sum(values) / len(values)


@pytest.mark.parametrize("columns", [1, 3])
@pytest.mark.parametrize("reshaped", [False, True])
def test_the_r2d2_mix_of_a_slice_goes_to_its_first_record(columns, reshaped):
    streams = [Stream(33, j) for j in range(columns)]
    buffer = filled(20, streams, 33, slice_len=3, reduction="r2d2")
    before = buffer.sampler.priority
    batch = buffer.sample(24)
    batch["td_error"] = (batch["k"].float() * 7 % 5 - 2).unsqueeze(-1)
    expected = before.clone()
    for piece in batch.split(3):
        slot = piece["index"][0, 0] * columns + (piece["index"][0, 1] if columns > 1 else 0)
        expected[slot] = mixed(piece["td_error"].abs().flatten().tolist())
    if reshaped:
        batch = batch.reshape(-1, 3)
    buffer.update_priority(*buffer.sampler.slice_priorities(batch))
    torch.testing.assert_close(buffer.sampler.priority, expected)


def test_slices_of_different_lengths_are_reduced_each_by_itself():
    buffer = filled(20, [Stream(33, 1)], 33, slice_len=4, strict_length=False, reduction="r2d2")
    batch = buffer.sample(24)
    assert len(batch) < 24
    batch.set("delta", torch.rand(len(batch), 2))
    index, priority = buffer.sampler.slice_priorities(batch, "delta")
    ends = batch[TRUNCATED].squeeze(-1).nonzero().squeeze(-1) + 1
    pieces = batch.split(torch.diff(ends, prepend=torch.zeros(1, dtype=torch.int64)).tolist())
    assert index.tolist() == [piece["index"][0].tolist() for piece in pieces]
    expected = [mixed(piece["delta"].flatten().tolist()) for piece in pieces]
    torch.testing.assert_close(priority, torch.tensor(expected))


def test_squared_td_errors_are_mixed_by_their_size():
    buffer = filled(20, [Stream(20, 1)], 20, slice_len=3, reduction="r2d2", td_error_unit="squared")
    batch = buffer.sample(3)
    batch["td_error"] = torch.tensor([1.0, 4.0, 9.0])
    buffer.update_priority(*buffer.sampler.slice_priorities(batch))
    assert buffer.sampler.priority[batch["index"][0, 0]].item() == pytest.approx(2.9)


def test_what_is_missing_for_priorities_of_slices_is_named():
    buffer = filled(20, [Stream(20, 1)], 20, slice_len=3, strict_length=False)
    batch = buffer.sample(6)
    with pytest.raises(PriorityError, match="td_error: expected this entry in the batch, got"):
        buffer.sampler.slice_priorities(batch)
    batch["td_error"] = torch.zeros(len(batch))
    for key in ("slice_start", "index"):
        with pytest.raises(PriorityError, match=f"{key}: expected this entry in the batch, got"):
            buffer.sampler.slice_priorities(batch.exclude(key))
    with pytest.raises(PriorityError, match="expected a batch with records"):
        buffer.sampler.slice_priorities(batch[:0])


def cuts(batch, length):
    """Ways to hand a batch of slices on: burn-in, a shorter end, every other record."""
    rows = batch.reshape(-1, length)
    yield from (batch, rows, rows[:, 2:], rows[:, :2], rows[:, ::2], rows[:, -1:], rows[:, 1:-1])
    yield from (rows[:, 2:].reshape(-1), rows[:, -1], rows[:, 1:].reshape(2, -1, length - 1))


@pytest.mark.parametrize("number", ["slice_len", "num_slices"])
@pytest.mark.parametrize("columns", [1, 3])
@pytest.mark.parametrize("reduction", ["max", "sum", "r2d2"])
def test_what_is_left_of_a_slice_is_reduced_for_the_slot_where_it_began(number, columns, reduction):
    streams = [Stream(60, j, longest=12) for j in range(columns)]
    settings = {number: 4 if number == "slice_len" else 6, "reduction": reduction}
    buffer = filled(33, streams, 60, **settings)
    rows = buffer.sample(24).reshape(6, 4)
    rows["td_error"] = torch.rand(6, 4, 2)
    for cut in cuts(rows.reshape(-1), 4):
        slot, priority = buffer.sampler.slice_priorities(cut)
        assert torch.equal(slot, rows["index"][:, 0])
        left = cut["td_error"].reshape(6, -1)
        expected = {"max": left.amax(1), "sum": left.sum(1)}
        expected["r2d2"] = 0.9 * left.amax(1) + 0.1 * left.mean(1)
        torch.testing.assert_close(priority, expected[reduction])


@pytest.mark.parametrize("columns", [1, 3])
def test_the_start_of_a_slice_goes_around_the_end_of_the_ring(columns):
    steps = 26
    done = torch.zeros(steps, 1, dtype=torch.bool)
    sampler = PrioritizedSliceSampler(20 * columns, ALPHA, BETA, slice_len=5, reduction="sum")
    storage = LazyTensorStorage(20 * columns, ndim=1 if columns == 1 else 2)
    buffer = TensorDictReplayBuffer(storage=storage, sampler=sampler, batch_size=500)
    k = torch.arange(steps)
    one = TensorDict({"k": k, "next": {"done": done}}, [steps])
    for data in one.split(13):
        buffer.extend(data if columns == 1 else torch.stack([data] * columns))
    batch = buffer.sample()
    around = batch["index"].reshape(100, 5, -1)[..., 0]
    assert (around[:, 0] > around[:, -1]).any()
    batch["td_error"] = torch.rand(500)
    slot, priority = sampler.slice_priorities(batch)
    assert torch.equal(slot, batch["index"].reshape(100, 5, -1)[:, 0])
    torch.testing.assert_close(priority, batch["td_error"].reshape(100, 5).sum(1))


def test_slices_of_different_lengths_may_lose_their_ends_marks_and_first_records():
    buffer = filled(20, [Stream(33, 1)], 33, slice_len=4, strict_length=False, reduction="sum")
    batch = buffer.sample(40)
    batch["td_error"] = torch.rand(len(batch))
    ends = batch[TRUNCATED].squeeze(-1).nonzero().squeeze(-1) + 1
    pieces = batch.split(torch.diff(ends, prepend=torch.zeros(1, dtype=torch.int64)).tolist())
    left = [piece[1:] for piece in pieces if len(piece) > 1]
    assert 1 < len(left) < len(pieces)
    cut = torch.cat(left).exclude(TRUNCATED)
    slot, priority = buffer.sampler.slice_priorities(cut)
    assert slot.tolist() == [piece["index"][0].tolist() for piece in pieces if len(piece) > 1]
    torch.testing.assert_close(priority, torch.stack([piece["td_error"].sum() for piece in left]))


def test_a_row_with_records_of_two_slices_is_refused():
    buffer = filled(33, [Stream(33, 1)], 33, slice_len=3)
    buffer.update_priority(torch.arange(33), torch.rand(33))
    batch = buffer.sample(24)
    batch["td_error"] = torch.rand(24)
    for wrong in (batch.reshape(4, 6), batch.reshape(8, 3).transpose(0, 1)):
        with pytest.raises(PriorityError, match=r"one slice in each row, got \["):
            buffer.sampler.slice_priorities(wrong)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_flags_of_any_dtype_end_trajectories_and_keep_their_dtype(dtype):
    sampler = PrioritizedSliceSampler(60, 1.0, 1.0, slice_len=4)
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(60), sampler=sampler, batch_size=16)
    flag = (torch.arange(60) % 12 == 11).unsqueeze(-1).to(dtype)
    following = {"done": flag, "terminated": flag}
    data = {"k": torch.arange(60), "next": following, "is_init": flag.roll(1)}
    buffer.extend(TensorDict(data, [60]))
    batch = buffer.sample()
    assert batch[DONE].dtype == batch["is_init"].dtype == batch["next", "terminated"].dtype == dtype
    assert batch[DONE].reshape(4, 4).tolist() == [[0, 0, 0, 1]] * 4
    assert batch["is_init"].reshape(4, 4).tolist() == [[1, 0, 0, 0]] * 4
    assert (batch["k"].reshape(4, 4)[:, 0] % 12 <= 8).all()

import pytest
import torch
from torchrl.data import LazyTensorStorage

from per_td.torchrl import PrioritizedSliceSampler, TensorDictPrioritizedReplayBuffer
from tests.support.slice_oracle import Stream


@pytest.mark.parametrize("unit", ["abs", "squared"])
@pytest.mark.parametrize("columns", [1, 3])
@pytest.mark.parametrize("reshaped", [False, True])
@pytest.mark.parametrize("burn_in", [0, 2])
def test_the_r2d2_mix_goes_to_first_records_that_are_still_there(columns, reshaped, unit, burn_in):
    streams = [Stream(33, j) for j in range(columns)]
    sampler = PrioritizedSliceSampler(
        20 * columns, 0.7, 0.9, slice_len=3, reduction="r2d2", td_error_unit=unit
    )
    storage = LazyTensorStorage(20 * columns, ndim=1 if columns == 1 else 2)
    buffer = TensorDictPrioritizedReplayBuffer(
        alpha=0.7, beta=0.9, storage=storage, sampler=sampler, batch_size=24
    )

    def write(start, stop):
        data = [s.data(start, stop) for s in streams]
        buffer.extend(data[0] if columns == 1 else torch.stack(data))

    write(0, 20)
    batch = buffer.sample()
    batch["td_error"] = (batch["k"].float() * 7 % 5 - 2).unsqueeze(-1)
    write(20, 24)  # over what was written first
    expected, late = sampler.priority, 0
    for piece in batch.split(3):
        row, column = int(piece["index"][0, 0]), int(piece["index"][0, -1]) if columns > 1 else 0
        size = piece["td_error"][burn_in:].abs()
        if row < 4:
            late += 1
        else:
            expected[row * columns + column] = 0.9 * size.max() + 0.1 * size.mean()
    assert late
    if unit == "squared":
        batch["td_error"] = batch["td_error"] ** 2
    batch = batch.reshape(8, 3)[:, burn_in:]
    buffer.update_tensordict_priority(batch if reshaped else batch.reshape(-1))
    torch.testing.assert_close(sampler.priority, expected)
    assert buffer.stats()["stale_updates"] == late


@pytest.mark.parametrize("single", [False, True])
def test_records_of_two_dimensions_are_late_one_by_one_in_a_folded_batch(single):
    buffer = TensorDictPrioritizedReplayBuffer(
        alpha=1.0, beta=1.0, eps=0.0, storage=LazyTensorStorage(60, ndim=2), batch_size=24
    )
    buffer.extend(torch.stack([Stream(20, j).data(0, 20) for j in range(3)]))
    batch = buffer.sample()
    batch["td_error"] = torch.arange(24.0) + 2
    buffer.extend(torch.stack([Stream(20, j).data(0, 9) for j in range(3)]))
    expected, late = buffer.sampler.priority, 0
    for (row, column), value in zip(batch["index"].tolist(), batch["td_error"], strict=True):
        late += row < 9
        expected[row * 3 + column] = value if row >= 9 else expected[row * 3 + column]
    assert 0 < late < 24
    if single:
        for record in batch:
            buffer.update_tensordict_priority(record)
    else:
        buffer.update_tensordict_priority(batch.reshape(4, 6))
    assert torch.equal(buffer.sampler.priority, expected)
    assert buffer.stats()["stale_updates"] == late

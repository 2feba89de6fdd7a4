import math

import pytest
import torch
from tensordict import TensorDict

from per_td import (
    ConfigurationError,
    EmptyBufferError,
    IndexRangeError,
    PrioritizedReplayBuffer,
    PriorityError,
    SchemaError,
)
from tests.support.model import Ring
from tests.support.oracle import CAPACITIES, assert_drawn_from, data
from tests.support.parameters import slow_but

DRAWS = ("independent", "stratified", "without_replacement")


def agree(buffer: PrioritizedReplayBuffer, naive: Ring) -> None:
    assert len(buffer) == len(naive)
    assert buffer.priority.tolist() == pytest.approx(
        naive.priority[: len(naive)].tolist(), rel=1e-6
    )
    assert buffer.transitions["action"].tolist() == naive.item[: len(naive)]
    assert buffer.stats()["stale_updates"] == naive.stale
    buffer.check_valid()


@pytest.mark.parametrize("many", [False, True])
def test_the_largest_priority_ever_may_be_one_that_did_not_remain(many, device):
    settings = {"new_priority": "ever_max", "device": device}
    buffer = PrioritizedReplayBuffer(4, num_buffers=2 if many else None, **settings)
    lead = (2,) if many else ()
    priority = torch.tensor([100.0, 50.0, 1.0, 1.0, 1.0, 1.0], device=device)
    priority = priority.expand(*lead, 6).contiguous()
    td = data(0, 6, device).expand(*lead, 6).clone()
    mask = torch.ones(2, 6, dtype=torch.bool, device=device) if many else None
    if mask is not None:
        mask[1, 0] = False
    buffer.extend(td, priority, mask)
    index = buffer.add(td[..., 0])
    new = buffer.priority.gather(-1, index.unsqueeze(-1))
    assert new.flatten().tolist() == ([100, 50] if many else [100])


@pytest.mark.parametrize("new_priority", ["buffer_max", "ever_max"])
@pytest.mark.parametrize("capacity", slow_but([1, 7, 16, 17, 257], CAPACITIES))
def test_random_operations_agree_with_a_naive_buffer(capacity, new_priority, device):
    random = torch.Generator().manual_seed(capacity)

    def below(high: int) -> int:
        return int(torch.randint(high, (), generator=random))

    buffer = PrioritizedReplayBuffer(
        capacity, alpha=0.37, eps=0.01, new_priority=new_priority, device=device
    )
    naive = Ring(capacity, alpha=0.37, eps=0.01, new_priority=new_priority)
    batches = []
    for _ in range(60):
        n, k = 1 + below(capacity + 3), naive.written
        action = below(5)
        if action == 0 or not len(naive):
            index = buffer.extend(data(k, n, device))
            naive.extend(range(k, k + n))
            assert index.tolist() == [i % capacity for i in range(k, k + n)]
        elif action == 1:
            priority = torch.rand(n, generator=random) ** 6
            buffer.extend(data(k, n, device), priority.to(device))
            naive.extend(range(k, k + n), priority.tolist())
        elif action == 2:
            assert buffer.add(data(k, 1, device)[0]).item() == k % capacity
            naive.extend([k])
        elif action == 3:
            batches.append(buffer.sample(n))
        elif batches:
            batch = batches.pop(below(len(batches)))
            td_error = torch.randn(len(batch), generator=random)
            buffer.update_priority(batch["index"], td_error, batch["generation"])
            naive.update(batch["index"].tolist(), td_error.tolist(), batch["generation"].tolist())
        agree(buffer, naive)


@pytest.mark.parametrize("method", ["tree", "multinomial", "auto"])
@pytest.mark.parametrize("normalization", ["batch", "buffer", "none"])
def test_batches_carry_what_was_stored_and_the_right_weights(normalization, method, device):
    buffer = PrioritizedReplayBuffer(
        50,
        batch_size=40,
        alpha=0.37,
        beta=0.83,
        eps=0.01,
        weight_normalization=normalization,
        method=method,
        device=device,
    )
    naive = Ring(50, alpha=0.37, eps=0.01)
    buffer.extend(data(0, 70, device))
    naive.extend(range(70))
    td_error = torch.randn(50, generator=torch.Generator().manual_seed(0)) * 3
    buffer.update_priority(torch.arange(50), td_error)
    naive.update(range(50), td_error.tolist())
    batch = buffer.sample()
    index = batch["index"].tolist()
    assert batch.batch_size == (40,)
    assert batch["action"].tolist() == [naive.item[i] for i in index]
    assert batch["next", "reward"].squeeze(-1).tolist() == [naive.item[i] for i in index]
    assert batch["generation"].tolist() == [naive.generation[i] for i in index]
    assert batch["priority_weight"].dtype == torch.float32
    expected = naive.weights(index, 0.83, normalization)
    assert batch["priority_weight"].tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("draw", ["independent", "stratified"])
@pytest.mark.parametrize("method", ["tree", "multinomial"])
def test_transitions_are_drawn_in_proportion_to_priority_to_the_alpha(
    draw, method, device, generator
):
    if (draw, method) == ("stratified", "multinomial"):
        pytest.skip("torch.multinomial does not draw stratified")
    buffer = PrioritizedReplayBuffer(
        40, alpha=0.6, draw=draw, method=method, device=device, generator=generator
    )
    naive = Ring(40)
    buffer.extend(data(0, 30, device))
    naive.extend(range(30))
    td_error = torch.randn(30, generator=torch.Generator().manual_seed(0)).exp()
    buffer.update_priority(torch.arange(30), td_error)
    naive.update(range(30), td_error.tolist())
    assert_drawn_from(buffer.sample(20_000)["index"], naive.probabilities())


def test_without_replacement_a_batch_has_no_transition_twice(device):
    buffer = PrioritizedReplayBuffer(300, draw="without_replacement", device=device)
    buffer.extend(data(0, 257, device))
    buffer.update_priority(torch.arange(257), torch.rand(257) ** 9)
    for n in (1, 100, 257):
        assert len(set(buffer.sample(n)["index"].tolist())) == n
    with pytest.raises(EmptyBufferError, match="batch_size <= 257"):
        buffer.sample(258)


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("method", ["tree", "multinomial"])
def test_a_seed_fixes_every_draw(draw, method, device):
    if (draw, method) == ("stratified", "multinomial"):
        pytest.skip("torch.multinomial does not draw stratified")
    drawn = []
    for use_generator in (False, False, True, True):
        torch.manual_seed(11)
        generator = torch.Generator(device).manual_seed(5) if use_generator else None
        buffer = PrioritizedReplayBuffer(
            100, draw=draw, method=method, device=device, generator=generator
        )
        buffer.extend(data(0, 100, device))
        drawn.append([buffer.sample(20)["index"].tolist() for _ in range(3)])
    assert drawn[0] == drawn[1]
    assert drawn[2] == drawn[3]
    assert drawn[0] != drawn[2]


def test_a_late_update_does_not_touch_the_transition_that_took_the_slot(device):
    buffer = PrioritizedReplayBuffer(4, device=device)
    buffer.extend(data(0, 4, device))
    batch = buffer.sample(8)
    buffer.extend(data(4, 4, device))
    batch["td_error"] = torch.full((8,), 50.0, device=device)
    buffer.update_tensordict_priority(batch)
    assert buffer.priority.tolist() == [1, 1, 1, 1]
    assert buffer.stats() == {"written": 8, "stale_updates": 8, "refused_priorities": 0}
    buffer.update_priority(batch["index"][:1], [50.0])
    assert buffer.priority.max().item() == pytest.approx(50)


def test_priorities_of_a_batch_larger_than_the_buffer_are_those_of_the_last(device):
    buffer = PrioritizedReplayBuffer(3, device=device)
    index = buffer.extend(data(0, 5, device), priority=[1.0, 2, 3, 4, 5])
    assert index.tolist() == [0, 1, 2, 0, 1]
    assert buffer.priority.tolist() == [4, 5, 3]
    assert buffer.transitions["action"].tolist() == [3, 4, 2]


def test_beta_grows_by_its_increment_up_to_one(device):
    buffer = PrioritizedReplayBuffer(4, beta=0.4, beta_increment=0.25, device=device)
    seen = []
    for _ in range(4):
        buffer.increase_beta()
        seen.append(buffer.beta)
    assert seen == pytest.approx([0.65, 0.9, 1.0, 1.0])
    buffer.beta = 0.5
    assert buffer.beta == 0.5


def test_an_example_allocates_before_there_is_data(device):
    buffer = PrioritizedReplayBuffer(4, example=data(0, 1, device)[0], device=device)
    assert len(buffer) == 0
    assert buffer.transitions.batch_size == (0,)
    with pytest.raises(SchemaError, match="missing"):
        buffer.extend(TensorDict({"action": torch.zeros(2)}, batch_size=[2]))
    buffer.extend(data(0, 2, device))
    assert len(buffer) == 2


def test_a_batch_is_a_copy(device):
    buffer = PrioritizedReplayBuffer(4, device=device)
    buffer.extend(data(0, 4, device))
    batch = buffer.sample(4)
    batch["observation"].fill_(-1)
    batch["index"].zero_()
    assert (buffer.transitions["observation"] >= 0).all()


@pytest.mark.parametrize(
    ("priority", "message"),
    [
        ([1.0, math.nan], r"priority: .* got nan at position 1"),
        ([1.0, -1.0], r"at least 0 .* got -1.0 at position 1"),
        ([1.0, math.inf], r"got inf"),
        ([1.0], r"expected shape \[2\]"),
    ],
)
def test_wrong_priorities_are_refused_before_anything_is_written(priority, message):
    for before in (0, 3):
        buffer = PrioritizedReplayBuffer(4)
        if before:
            buffer.extend(data(0, before))
        with pytest.raises(PriorityError, match=message):
            buffer.extend(data(3, 2), priority)
        assert len(buffer) == buffer.write_count == before
        assert buffer.priority.tolist() == [1.0] * before


def test_wrong_transitions_are_refused_before_anything_is_written():
    buffer = PrioritizedReplayBuffer(4)
    buffer.extend(data(0, 3))
    with pytest.raises(SchemaError, match="missing"):
        buffer.extend(data(3, 2).exclude("action"))
    with pytest.raises(SchemaError, match=r"batch size \[\], got \[2\]: use extend"):
        buffer.add(data(3, 2))
    with pytest.raises(SchemaError, match=r"batch size \[n\], got \[\]: use add"):
        buffer.extend(data(3, 1)[0])
    assert buffer.write_count == 3


def test_wrong_updates_are_refused_by_name():
    buffer = PrioritizedReplayBuffer(4)
    buffer.extend(data(0, 3))
    with pytest.raises(IndexRangeError, match="0 <= index < 3"):
        buffer.update_priority([3], [1.0])
    with pytest.raises(PriorityError, match=r"generation: expected shape \[2\]"):
        buffer.update_priority([0, 1], [1.0, 1.0], [0])
    with pytest.raises(SchemaError, match="'td_error'"):
        buffer.update_tensordict_priority(buffer.sample(2))
    assert buffer.priority.tolist() == [1, 1, 1]


def test_sampling_says_what_is_missing():
    buffer = PrioritizedReplayBuffer(4)
    with pytest.raises(EmptyBufferError, match="empty buffer"):
        buffer.sample(1)
    buffer.extend(data(0, 3))
    with pytest.raises(ConfigurationError, match="batch_size: expected one"):
        buffer.sample()
    with pytest.raises(ConfigurationError, match="batch_size: expected an integer"):
        buffer.sample(0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"capacity": 0}, "capacity"),
        ({"capacity": 4, "batch_size": 0}, "batch_size"),
        ({"capacity": 4, "beta": 1.5}, r"beta: expected a finite number in \[0, 1\], got 1.5"),
        ({"capacity": 4, "beta_increment": -1}, "beta_increment"),
        ({"capacity": 4, "method": "multinomial", "draw": "stratified"}, "stratified"),
        ({"capacity": 2**24 + 1, "method": "multinomial"}, r"2\*\*24"),
    ],
)
def test_arguments_outside_what_is_accepted_are_refused_by_name(arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        PrioritizedReplayBuffer(**arguments)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("normalization", ["batch", "buffer", "none"])
@pytest.mark.parametrize("draw", DRAWS)
def test_on_cuda_the_host_is_never_stopped(draw, normalization):
    buffer = PrioritizedReplayBuffer(
        1000, draw=draw, weight_normalization=normalization, device="cuda", beta_increment=0.01
    )
    on_device, on_host = data(0, 700, "cuda"), data(0, 700)
    priority = torch.rand(700, device="cuda")
    buffer.extend(on_device)
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        buffer.extend(on_device, priority)
        buffer.extend(on_host)
        buffer.add(on_device[0])
        batch = buffer.sample(64)
        td_error = batch["next", "reward"].squeeze(-1)
        buffer.update_priority(batch["index"], td_error, batch["generation"])
        buffer.increase_beta()
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_without_an_index_is_the_current_device():
    buffer = PrioritizedReplayBuffer(4, device="cuda")
    assert buffer.device == torch.zeros((), device="cuda").device
    buffer.extend(data(0, 3))
    assert buffer.sample(2).device == buffer.device

import pytest
import torch
from tensordict import TensorDict
from tensordict.tensorclass import NonTensorData

from per_td import SchemaError
from per_td.storage.leaves import flattened, nested
from per_td.storage.ring import RingStorage
from tests.support.oracle import CAPACITIES, data
from tests.support.rings import read


def written(capacity: int, device, sizes) -> tuple[RingStorage, list[int]]:
    """A storage after writes of these sizes, and a plain list that took the same writes."""
    storage, naive, k = RingStorage(capacity, device), [-1] * capacity, 0
    for n in sizes:
        storage.write(*storage.check(data(k, n, device)))
        for i in range(k, k + n):
            naive[i % capacity] = i
        k += n
    return storage, naive


@pytest.mark.parametrize("capacity", CAPACITIES)
def test_writes_of_any_size_wrap_around_and_the_last_win(capacity, device):
    sizes = torch.randint(1, 2 * capacity + 3, (12,)).tolist()
    storage, naive = written(capacity, device, sizes)
    assert len(storage) == min(sum(sizes), capacity)
    assert storage.write_count == sum(sizes)
    filled = torch.arange(len(storage), device=device)
    batch = read(storage, filled)
    assert batch["action"].tolist() == naive[: len(storage)]
    assert batch["next", "reward"].squeeze(-1).tolist() == naive[: len(storage)]
    assert batch["observation"].shape == (len(storage), 3)
    assert batch["next", "done"].dtype == torch.bool


@pytest.mark.parametrize("capacity", CAPACITIES)
def test_generations_count_how_often_the_ring_had_wrapped(capacity, device):
    storage, naive = written(capacity, device, [capacity // 2 + 1, 1, 2 * capacity, 3])
    index = torch.arange(capacity, device=device)
    assert storage.generation(index).tolist() == [k // capacity for k in naive]


def test_slots_never_written_have_no_generation(device):
    storage, _ = written(5, device, [2])
    assert storage.generation(torch.arange(5, device=device)).tolist() == [0, 0, -1, -1, -1]


def test_the_next_slots_are_those_that_a_write_fills(device):
    storage, _ = written(5, device, [3])
    assert storage.next_slots(4).tolist() == [3, 4, 0, 1]


def test_data_of_other_devices_and_with_gradients_is_copied_in(device):
    storage = RingStorage(4, device)
    source = torch.ones(2, 3, requires_grad=True)
    with torch.no_grad():
        storage.write(*storage.check(TensorDict({"x": source}, batch_size=[2])))
    assert not storage.data["x"].requires_grad
    assert storage.data["x"][:2].tolist() == source.tolist()


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int32, torch.float16, torch.bfloat16, torch.float64, torch.bool]
)
def test_any_dtype_and_nesting_comes_back_as_it_went_in(dtype, device):
    leaf = torch.arange(6, device=device).reshape(2, 3, 1).to(dtype)
    nested_data = TensorDict({"a": {"b": {"c": leaf}}, "d": leaf[:, 0, 0]}, batch_size=[2])
    storage = RingStorage(7, device)
    storage.write(*storage.check(nested_data))
    batch = read(storage, torch.tensor([1, 0], device=device))
    assert batch["a", "b", "c"].dtype == dtype
    assert batch["a", "b", "c"].tolist() == leaf.flip(0).tolist()
    assert batch["d"].shape == (2,)


def test_further_dimensions_belong_to_the_transition(device):
    source = TensorDict({"x": torch.rand(4, 6, 2, device=device)}, batch_size=[4])
    storage = RingStorage(4, device)
    storage.write(*storage.check(source))
    batch = read(storage, torch.tensor([2], device=device))
    assert batch.batch_size == (1,)
    torch.testing.assert_close(batch["x"][0], source["x"][2])


GOOD = {"x": torch.zeros(2, 3), "next": {"r": torch.zeros(2)}}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"x": torch.zeros(2, 3)}, r"missing: \('next', 'r'\); unknown: none"),
        ({**GOOD, "y": torch.zeros(2)}, r"missing: none; unknown: 'y'"),
        (
            {**GOOD, "x": torch.zeros(2, 4)},
            r"'x': expected torch.float32 of shape \[3\] per transition, got .* \[4\]",
        ),
        (
            {**GOOD, "next": {"r": torch.zeros(2, dtype=torch.float64)}},
            r"\('next', 'r'\): expected torch.float32 of shape \[\] .* got torch.float64",
        ),
        ({**GOOD, "index": torch.zeros(2)}, r"'index' is a reserved key"),
        ({**GOOD, "x": NonTensorData("text", batch_size=[2])}, r"'x': expected a tensor"),
        ({}, r"at least one tensor"),
    ],
)
def test_data_that_differs_is_refused_by_name_before_anything_is_written(entries, message):
    storage = RingStorage(5, torch.device("cpu"))
    storage.write(*storage.check(TensorDict(GOOD, batch_size=[2])))
    before = storage.data.clone()
    with pytest.raises(SchemaError, match=message):
        storage.check(TensorDict(entries, batch_size=[2]))
    assert storage.write_count == 2
    assert (storage.data == before).all()


def test_data_without_a_first_dimension_is_refused():
    storage = RingStorage(5, torch.device("cpu"))
    with pytest.raises(SchemaError, match=r"batch size \[n\], got \[\]"):
        storage.check(TensorDict({"x": torch.zeros(3)}, batch_size=[]))
    with pytest.raises(SchemaError, match=r"'x': expected shape \[n, ...\], got \[\]"):
        storage.check({"x": torch.zeros(())})


def test_nesting_and_flattening_are_inverse():
    leaves = {("a",): torch.zeros(1), ("b", "c"): torch.ones(1), ("b", "d", "e"): torch.ones(2)}
    assert flattened(nested(leaves.items())) == leaves

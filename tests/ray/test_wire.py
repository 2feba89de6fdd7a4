import warnings

import numpy as np
import pytest
import torch

from per_td.ray import wire


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.int64, torch.uint8, torch.bool, torch.bfloat16]
)
def test_leaves_come_back_as_they_were(dtype):
    leaf = torch.arange(12).reshape(3, 4).to(dtype)
    packed = wire.pack({("next", "x"): leaf[:, ::2]})
    ((key, back),) = wire.unpack(packed).items()
    assert key == ("next", "x")
    assert back.dtype == dtype
    assert torch.equal(back, leaf[:, ::2])
    assert wire.nbytes(packed) == leaf[:, ::2].numel() * leaf.itemsize


RARE = [torch.complex32, torch.complex64, torch.float8_e5m2, torch.uint16]


@pytest.mark.parametrize("dtype", RARE)
def test_leaves_of_rare_dtypes_travel_too(dtype):
    leaf = torch.arange(16, dtype=torch.uint8).repeat(3).view(dtype)
    (back,) = wire.unpack(wire.pack({("x",): leaf})).values()
    assert back.dtype == dtype
    assert torch.equal(back.view(torch.uint8), leaf.view(torch.uint8))


def test_read_only_memory_becomes_a_tensor_without_a_copy_and_without_a_warning():
    values = np.arange(5.0)
    values.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tensor = wire.tensor(values)
    assert tensor.data_ptr() == values.__array_interface__["data"][0]


def test_the_memory_lives_as_long_as_the_tensor():
    def make():
        values = np.full(1000, 7.0)
        values.flags.writeable = False
        return wire.tensor(values)

    tensor = make()
    junk = [np.zeros(1000) for _ in range(50)]
    assert torch.equal(tensor, torch.full((1000,), 7.0, dtype=torch.float64))
    del junk


def test_an_array_without_rows_travels_too():
    (leaf,) = wire.unpack(wire.pack({("x",): torch.zeros(0, 3)})).values()
    assert leaf.shape == (0, 3)

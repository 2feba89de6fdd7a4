import pytest
import torch
from torchrl.data.replay_buffers.utils import _reduce

from per_td import ConfigurationError
from per_td.torchrl.td_errors import REDUCTIONS, reduce_priority


@pytest.mark.parametrize("reduction", REDUCTIONS[:-1])
@pytest.mark.parametrize("shape", [(1, 1), (3, 4), (5, 7)])
def test_reductions_are_those_of_torchrl(reduction, shape):
    values = torch.rand(shape)
    torch.testing.assert_close(reduce_priority(values, reduction), _reduce(values, reduction, 1))


def test_r2d2_mixes_the_largest_with_the_mean():
    values = torch.tensor([[1.0, 3.0], [5.0, 5.0]])
    torch.testing.assert_close(reduce_priority(values, "r2d2"), torch.tensor([2.9, 5.0]))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_all_dimensions_after_the_first_are_reduced(reduction):
    values = torch.rand(3, 2, 4)
    expected = reduce_priority(values.flatten(1), reduction)
    torch.testing.assert_close(reduce_priority(values, reduction), expected)
    torch.testing.assert_close(reduce_priority(values[:, 0, 0], reduction), values[:, 0, 0])
    assert reduce_priority(torch.zeros(0, 3), reduction).shape == (0,)


def test_an_unknown_reduction_is_refused_by_name():
    with pytest.raises(ConfigurationError, match=r"reduction: expected one of max, .*, r2d2, got"):
        reduce_priority(torch.zeros(2, 2), "product")

import pytest
import torch

from per_td import SchemaError
from per_td.validation import plain_rows

CPU = torch.device("cpu")


def test_rows_are_brought_to_the_device_before_anybody_takes_their_address():
    assert plain_rows(torch.ones(3), torch.device("meta")).device.type == "meta"


def test_rows_without_values_are_refused():
    with pytest.raises(SchemaError, match="meta"):
        plain_rows(torch.empty(3, device="meta"), CPU)


@pytest.mark.parametrize(
    "leaf",
    [
        torch.arange(12).reshape(3, 4).t(),
        torch.arange(3).expand(4, 3),
        torch.view_as_complex(torch.arange(8.0).reshape(4, 2)).conj(),
        torch.view_as_complex(torch.arange(8.0).reshape(4, 2)).conj().imag,
    ],
    ids=["transposed", "expanded", "conjugate", "negative"],
)
def test_rows_lie_one_after_the_other_as_the_numbers_they_stand_for(leaf):
    plain = plain_rows(leaf, CPU)
    assert torch.equal(plain, leaf)
    assert plain.is_contiguous()
    assert not plain.is_conj()
    assert not plain.is_neg()

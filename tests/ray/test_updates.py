import math

import pytest
import torch

from per_td.errors import IndexRangeError, PriorityError
from per_td.ray.exchange import checked_update, per_shard


def test_columns_are_taken_apart_by_shard_and_keep_their_order():
    generator = torch.Generator().manual_seed(0)
    shard = torch.randint(5, (200,), generator=generator)
    index = torch.randint(9, (200,), generator=generator)
    error = torch.rand(200, generator=generator)
    parts = dict(per_shard(*checked_update(index, error, None, shard, 5, 9)))
    for number in range(5):
        naive = [(i, e) for s, i, e in zip(shard, index, error, strict=True) if s == number]
        assert parts[number][0].tolist() == [int(i) for i, _ in naive]
        assert parts[number][1].tolist() == [float(e) for _, e in naive]


def test_shards_without_a_part_get_none():
    parts = per_shard(*checked_update([1, 2], [0.5, 0.5], [7, 7], [3, 3], 9, 8))
    assert [number for number, _ in parts] == [3]
    assert len(parts[0][1]) == 3
    assert per_shard(*checked_update([], [], None, [], 9, 8)) == []


@pytest.mark.parametrize(
    ("shard", "td_error", "error", "match"),
    [
        ([0, 2], [0.0, 0.0], IndexRangeError, "expected 0 <= shard < 2, got 2"),
        ([0, -1], [0.0, 0.0], IndexRangeError, "got -1"),
        ([0], [0.0, 0.0], IndexRangeError, r"shard: expected shape \[2\]"),
        ([0, 1], [0.0, math.nan], PriorityError, "nan at position 1"),
        ([0, 1], [0.0], PriorityError, r"expected shape \[2\]"),
    ],
)
def test_wrong_updates_are_refused_before_anything_is_sent(shard, td_error, error, match):
    with pytest.raises(error, match=match):
        checked_update([0, 1], td_error, None, shard, 2, 8)


@pytest.mark.parametrize("index", [[0, 8], [-1, 3]])
def test_slots_that_no_shard_has_are_refused_too(index):
    with pytest.raises(IndexRangeError, match=r"expected 0 <= index < 8, the slots of a shard"):
        checked_update(index, [0.5, 0.5], None, [0, 1], 2, 8)

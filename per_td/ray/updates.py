"""Priority updates: checked in the learner, sorted by shard, held back and sent."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from per_td import validation
from per_td.errors import IndexRangeError
from per_td.ray.ledger import Ledger
from per_td.ray.replies import Replies
from per_td.ray.wire import Array, array


class Updates:
    """Sends updates to the shards, those of several batches in one message per shard.

    Args:
        shards: the actors.
        ledger: knows which of them live.
        replies: expects the answers.
        per_message: number of updates to wait for.
    """

    def __init__(
        self, shards: list[Any], ledger: Ledger, replies: Replies, *, per_message: int
    ) -> None:
        self._shards = shards
        self._ledger = ledger
        self._replies = replies
        self._per_message = per_message
        self._count = 0
        self._held: dict[int, list[list[Array]]] = {}
        self._how: dict[str, Any] = {}

    def add(self, shard: Tensor, columns: list[Tensor], how: dict[str, Any] | None = None) -> None:
        """Hold back an update that `checked` has made, until there are enough of them.

        One without generations is sent at once: it would hit what is written meanwhile. So is one
        that depends on the priorities of before, which the updates held back would change.

        Args:
            shard, columns: from `checked`.
            how: see `Shard.update`; those held back together have the same.
        """
        how = how or {}
        at_once = len(columns) < 3 or "mode" in how
        if at_once or how != self._how:
            self.send()
        self._how = how
        for number, part in per_shard(shard, columns):
            self._held.setdefault(number, []).append(part)
        self._count += 1
        if at_once or self._count >= self._per_message:
            self.send()

    def send(self) -> None:
        """Send what is held back; for a lost shard, count it as lost."""
        self._count = 0
        for number in sorted(self._held):
            parts = self._held.pop(number)
            columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
            n = len(columns[0])
            if self._ledger.living[number]:
                generation = columns[2] if len(columns) > 2 else None
                answer = self._shards[number].update.remote(*columns[:2], generation, self._how)
                self._replies.expect(answer, number, n)
            else:
                self._replies.lost_updates += n


def checked(
    index: Any,
    value: Any,
    generation: Any,
    shard: Any,
    num_shards: int,
    capacity: int,
    *,
    exact: bool = False,
) -> tuple[Tensor, list[Tensor]]:
    """Check an update: its shards, and index, value and maybe generation, [B], on the CPU.

    Args:
        exact: the values are raw priorities, not TD errors.

    Raises:
        IndexRangeError: shapes differ, or there is no such slot in `capacity`, or no such shard.
        PriorityError: a value is NaN or infinite, or a priority negative, or the shape or the dtype
            is wrong.
    """
    name = "priority" if exact else "td_error"
    cpu = torch.device("cpu")
    index, shard = validation.as_index(index, cpu), validation.as_index(shard, cpu, "shard")
    columns = [index, validation.as_values(name, value, index)]
    validation.require_finite(name, columns[1], low=0.0 if exact else -math.inf)
    if generation is not None:
        columns.append(validation.as_index(generation, cpu, "generation"))
    for column, values in (("shard", shard), ("generation", columns[-1])):
        if values.shape != index.shape:
            raise IndexRangeError(
                f"{column}: expected shape {list(index.shape)}, one per index,"
                f" got {list(values.shape)}"
            )
    validation.require_slots(index, capacity, what="the slots of a shard")
    wrong = (shard < 0) | (shard >= num_shards)
    if wrong.any():
        raise IndexRangeError(
            f"shard: expected 0 <= shard < {num_shards}, got {shard[wrong][0].item()}"
        )
    return shard, columns


def per_shard(shard: Tensor, columns: list[Tensor]) -> list[tuple[int, list[Array]]]:
    """Split the columns [B] by shard.

    The order within a shard is kept: of equal indices in an update, the last one holds.
    """
    order = shard.argsort(stable=True)
    ordered = [array(column[order]) for column in columns]
    numbers, begins = np.unique(array(shard[order]), return_index=True)
    ends = np.append(begins, len(order))[1:]
    return [
        (int(number), [column[begin:end] for column in ordered])
        for number, begin, end in zip(numbers, begins, ends, strict=True)
    ]

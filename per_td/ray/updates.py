"""Priority updates: checked in the learner, sorted by shard, held back and sent."""

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

    def add(self, shard: Tensor, columns: list[Tensor]) -> None:
        """Hold back an update that `checked` has made, until there are enough of them.

        One without generations is sent at once: it would hit what is written meanwhile.
        """
        at_once = len(columns) < 3
        if at_once:
            self.send()
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
                self._replies.expect(self._shards[number].update.remote(*columns), number, n)
            else:
                self._replies.lost_updates += n


def checked(
    index: Any, td_error: Any, generation: Any, shard: Any, num_shards: int, capacity: int
) -> tuple[Tensor, list[Tensor]]:
    """Check an update: its shards, and index, td_error and maybe generation, [B], on the CPU.

    Raises:
        IndexRangeError: shapes differ, or there is no such slot in `capacity`, or no such shard.
        PriorityError: a TD error is NaN or infinite, or of a wrong shape or dtype.
    """
    cpu = torch.device("cpu")
    index, shard = validation.as_index(index, cpu), validation.as_index(shard, cpu, "shard")
    columns = [index, validation.as_values("td_error", td_error, index)]
    validation.require_finite("td_error", columns[1])
    if generation is not None:
        columns.append(validation.as_index(generation, cpu, "generation"))
    for name, values in (("shard", shard), ("generation", columns[-1])):
        if values.shape != index.shape:
            raise IndexRangeError(
                f"{name}: expected shape {list(index.shape)}, one per index,"
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

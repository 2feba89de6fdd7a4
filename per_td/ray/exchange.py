"""Reports that the learner hears from the shards, and updates that it sends them."""

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import ray
import torch
from ray.exceptions import RayActorError
from torch import Tensor

from per_td import validation
from per_td.errors import IndexRangeError
from per_td.ray import wire
from per_td.ray.shard import Report
from per_td.ray.wire import Array, ShardError, array

_MOST_UNANSWERED = 16
"""Updates per shard that may be unanswered."""


class Ledger:
    """The last report of every shard; a lost shard has no mass and no transitions."""

    @torch.inference_mode(False)  # whoever made it, reports change these tensors later
    def __init__(self, num_shards: int) -> None:
        self.reports: list[Report | None] = [None] * num_shards
        self.total = torch.zeros(num_shards, dtype=torch.float64, device="cpu")
        self.smallest = torch.full((num_shards,), torch.inf, dtype=torch.float64, device="cpu")
        self.heard = [-torch.inf] * num_shards
        self.living = [False] * num_shards
        self.losses = 0

    @property
    def size(self) -> int:
        """N: the number of transitions in the living shards."""
        return sum(
            report.size
            for report, lives in zip(self.reports, self.living, strict=True)
            if lives and report is not None
        )

    def note(self, shard: int, report: Report) -> bool:
        """Take up a report. True if the shard has started anew since the last one."""
        last = self.reports[shard]
        anew = last is None or last.epoch != report.epoch
        if not anew and last is not None and last.serial > report.serial and self.living[shard]:
            return False  # a later one has overtaken it
        self.reports[shard] = report
        self.total[shard] = report.total
        self.smallest[shard] = report.smallest
        self.heard[shard] = time.monotonic()
        self.living[shard] = True
        return anew

    def lose(self, shard: int) -> None:
        """Count nothing for a shard until it reports again."""
        self.losses += self.living[shard]
        self.living[shard] = False
        self.total[shard] = 0.0
        self.smallest[shard] = torch.inf

    def sum(self, name: str) -> int:
        """Sum of a counter over the last reports of all shards."""
        return sum(getattr(report, name) for report in self.reports if report is not None)


class Replies:
    """Answers under way: to updates, and to polls of shards that were silent for long.

    A lost shard is polled too: Ray restarts it, and its answer says that it is back. `on_restart`
    is called with a shard that started anew. Shards silent for `refresh_s` seconds are polled.
    """

    def __init__(
        self,
        shards: list[Any],
        ledger: Ledger,
        on_restart: Callable[[int], None],
        *,
        refresh_s: float,
    ) -> None:
        self._shards = shards
        self._ledger = ledger
        self._on_restart = on_restart
        self._refresh_s = refresh_s
        self._polls: dict[Any, int] = {}
        self._updates: dict[Any, tuple[int, int]] = {}
        self.lost_updates = 0

    def note(self, shard: int, report: Report) -> None:
        """Take up a report."""
        if self._ledger.note(shard, report):
            self._on_restart(shard)

    def lose(self, shard: int) -> None:
        """Count nothing for a shard that failed or was late, until it answers a poll."""
        self._ledger.lose(shard)
        if shard not in self._polls.values():
            self._polls[self._shards[shard].report.remote()] = shard

    def expect(self, update: Any, shard: int, n: int) -> None:
        """Expect the answer to an update of `n` priorities."""
        self._updates[update] = (shard, n)

    def listen(self) -> None:
        """Take up the answers that have come, and poll the shards that were silent for long."""
        now, polled = time.monotonic(), set(self._polls.values())
        for shard, actor in enumerate(self._shards):
            if shard not in polled and now - self._ledger.heard[shard] > self._refresh_s:
                self._polls[actor.report.remote()] = shard
        self._take(0.0)

    def settle(self, timeout_s: float) -> None:
        """Wait until all updates are answered; after `timeout_s`, raise ShardError."""
        self._drain(0, timeout_s)
        if self._updates:
            raise ShardError(
                f"expected answers to {len(self._updates)} updates within {timeout_s:g} s, got none"
            )

    def make_room(self, timeout_s: float) -> None:
        """Wait while too many updates are under way; after `timeout_s`, count the rest as lost."""
        most = _MOST_UNANSWERED * len(self._shards)
        self._drain(most, timeout_s)
        while len(self._updates) > most:
            shard, n = self._updates.pop(next(iter(self._updates)))
            self.lost_updates += n
            self.lose(shard)

    def _drain(self, most: int, timeout_s: float) -> None:
        """Wait up to `timeout_s` seconds until at most `most` updates are unanswered."""
        until = time.monotonic() + timeout_s
        while len(self._updates) > most and (left := until - time.monotonic()) > 0:
            self._take(left, updates_only=True)

    def wait(self, timeout_s: float) -> None:
        """Ask all shards for reports, and wait up to `timeout_s` seconds for them."""
        asked = {actor.report.remote(): shard for shard, actor in enumerate(self._shards)}
        self._polls.update(asked)
        until = time.monotonic() + timeout_s
        while not asked.keys().isdisjoint(self._polls) and (left := until - time.monotonic()) > 0:
            self._take(left)
        for poll in asked.keys() & self._polls.keys():
            self._ledger.lose(asked[poll])

    def _take(self, timeout_s: float, *, updates_only: bool = False) -> None:
        """Take up answers: one within `timeout_s` seconds, or, for 0, all that have come."""
        pending = [*self._updates] if updates_only else [*self._updates, *self._polls]
        if not pending:
            return
        some = 1 if timeout_s else len(pending)
        ready, _ = ray.wait(pending, num_returns=some, timeout=timeout_s, fetch_local=False)
        for answer in ready:
            update = self._updates.pop(answer, None)
            shard, n = (self._polls.pop(answer), 0) if update is None else update
            try:
                self.note(shard, wire.get(answer))
            except RayActorError:
                self.lost_updates += n
                self._ledger.lose(shard)
                self._ledger.heard[shard] = time.monotonic()  # polled again in refresh_s


class Updates:
    """Sends updates to the shards, `per_message` of them in one message to each shard."""

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

    def add(self, shard: Tensor, columns: list[Tensor], how: dict[str, Any]) -> None:
        """Hold back an update from `checked_update`, until there are enough of them.

        One without generations is sent at once: it would hit what is written meanwhile. So is one
        that depends on the priorities of before, which the updates held back would change. Those
        held back together have the same `how`, see `Shard.update`.
        """
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
                answer = self._shards[number].update.remote(*columns, how=self._how)
                self._replies.expect(answer, number, n)
            else:
                self._replies.lost_updates += n


def checked_update(
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

    The values are TD errors, or with `exact` raw priorities; `capacity` is that of one shard.
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

"""Replies: the answers of shards to updates and polls, which nobody waits for."""

import time
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from per_td.ray.errors import ShardError, raised_by
from per_td.ray.ledger import Ledger
from per_td.ray.shard import Report


class Replies:
    """Answers under way: to updates, and to polls of shards that were silent for long.

    A lost shard is polled too: Ray restarts it, and its answer says that it is back.

    Args:
        shards: the actors.
        ledger: takes up the reports.
        on_restart: called with a shard that started anew.
        refresh_s: age in seconds of a report at which its shard is asked for another.
        most: number of updates per shard that may be unanswered.
    """

    def __init__(
        self,
        shards: list[Any],
        ledger: Ledger,
        on_restart: Callable[[int], None],
        *,
        refresh_s: float,
        most: int = 16,
    ) -> None:
        self._shards = shards
        self._ledger = ledger
        self._on_restart = on_restart
        self._refresh_s = refresh_s
        self._most = most * len(shards)
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
        """Wait until all updates are answered.

        Raises:
            ShardError: that took longer than `timeout_s` seconds.
        """
        until = time.monotonic() + timeout_s
        while self._updates:
            left = until - time.monotonic()
            if left <= 0:
                raise ShardError(
                    f"expected answers to {len(self._updates)} updates within {timeout_s:g} s,"
                    " got none"
                )
            self._take(left, updates_only=True)

    def make_room(self, timeout_s: float) -> None:
        """Wait while too many updates are under way; after `timeout_s`, count the rest as lost."""
        until = time.monotonic() + timeout_s
        while len(self._updates) > self._most:
            left = until - time.monotonic()
            if left <= 0:
                shard, n = self._updates.pop(next(iter(self._updates)))
                self.lost_updates += n
                self.lose(shard)
            else:
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
            shard, n = self._updates.pop(answer, (-1, 0))
            is_poll = shard < 0
            shard = self._polls.pop(answer) if is_poll else shard
            try:
                self.note(shard, ray.get(answer))
            except RayActorError:
                self.lost_updates += n
                self._ledger.lose(shard)
                self._ledger.heard[shard] = time.monotonic()  # polled again in refresh_s
            except RayTaskError as error:
                raise raised_by(error) from None

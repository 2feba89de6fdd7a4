"""Writer: a small handle with which any Ray actor or task writes to the shards directly."""

import operator
import time
from dataclasses import dataclass
from typing import Any

import ray
import torch
from ray.exceptions import GetTimeoutError, RayActorError
from torch import Tensor

from per_td import validation
from per_td.errors import ConfigurationError, SchemaError
from per_td.ray import wire
from per_td.ray.wire import ShardError, tell
from per_td.storage.leaves import Leaves, count
from per_td.storage.schema import Schema
from per_td.storage.structure import Structure

_AVOID_S = 1.0
"""Seconds during which a shard that failed is tried last."""


@dataclass(frozen=True)
class Receipt:
    """The shard and the slots that hold the written transitions."""

    shard: int
    index: Tensor
    """Slots in that shard, int64 [n]."""


class Writer:
    """Writes transitions to the shards and waits until they are acknowledged. It can be pickled.

    `ShardedReplayBuffer.writer` makes one. It holds handles of actors, which Ray keeps in its
    object store. Hand it to calls of actors that Ray may restart, not to their constructors: a
    restarted actor may not find it there.

    Args:
        shards: the actors.
        first: number of the shard to begin with, modulo their number. Give each writer a different
            one, so that they do not write to the same shard at the same time.
        timeout_s: seconds to wait for a shard before the next is tried.

    Raises:
        ConfigurationError: an argument is not accepted.
    """

    def __init__(self, shards: list[Any], *, first: int = 0, timeout_s: float = 30.0) -> None:
        if not isinstance(shards, list | tuple) or not shards:
            raise ConfigurationError(f"shards: expected at least one actor, got {shards!r}")
        self._shards = shards
        self._next = validation.integer("first", first, 0) % len(shards)
        self._timeout_s = validation.real("timeout_s", timeout_s)
        self._avoid: dict[int, float] = {}

    def extend(self, transitions: Any, priority: Any = None, *, key: int | None = None) -> Receipt:
        """Write transitions to one shard; once this returns, the shard has acknowledged them.

        If a shard is lost or late, the next one gets the transitions. The first one may have
        written them before it failed: they are in the buffer at least once.

        Args:
            transitions: TensorDict [n], or a dict of tensors or arrays [n, ...].
            priority: raw priorities [n], finite and not negative; None: the largest of the shard.
            key: number of the shard, modulo their number; None takes the shards in turn.

        Returns:
            The shard and the slots, a `Receipt`.

        Raises:
            ConfigurationError: `key` is not an integer.
            SchemaError, PriorityError: as in the local buffer; nothing has been written.
            ShardError: no shard acknowledged.
        """
        return self._write(*checked(transitions), priority, key)

    def _write(
        self, leaves: Leaves, structure: Structure, priority: Any, key: int | None
    ) -> Receipt:
        packed, given = wire.pack(leaves), _priority(priority, count(leaves))
        shards = self._order(key)
        # Shipped once, also where several shards are tried
        message = ray.put(packed) if wire.nbytes(packed) > 2**16 else packed
        for shard in shards:
            try:
                answer = self._asked(shard, message, given, None)
                if answer is None:  # it gets its first transitions
                    answer = self._asked(shard, message, given, tell(structure))
            except (RayActorError, GetTimeoutError):
                self._avoid[shard] = time.monotonic() + _AVOID_S
            else:
                self._avoid.pop(shard, None)
                return Receipt(shard, torch.from_numpy(answer[1].copy()))
        raise ShardError(
            f"expected one of {len(shards)} shards to acknowledge within {self._timeout_s:g} s"
            " each, got no answer"
        )

    def add(self, transition: Any, priority: Any = None) -> Receipt:
        """Write one transition; see `extend`, which costs less per transition.

        Args:
            transition: TensorDict [], or a dict of tensors or arrays.
            priority: raw priority, finite and not negative; None: the largest of the shard.

        Returns:
            The shard and the slot, a `Receipt`.
        """
        return self._write(*checked(transition, batched=False), priority, None)

    def _asked(self, shard: int, *message: Any) -> Any:
        return wire.get(self._shards[shard].extend.remote(*message), timeout=self._timeout_s)

    def _order(self, key: int | None) -> list[int]:
        """The shards to be tried: the next in turn, those after it; failed ones last."""
        if key is None:
            first = self._next
            self._next = (first + 1) % len(self._shards)
        else:
            try:
                first = operator.index(key) % len(self._shards)
            except TypeError as error:
                raise ConfigurationError(f"key: expected an integer, got {key!r}") from error
        order = [(first + k) % len(self._shards) for k in range(len(self._shards))]
        now = time.monotonic()
        return sorted(order, key=lambda shard: self._avoid.get(shard, 0.0) > now)


def checked(transitions: Any, *, batched: bool = True) -> tuple[Leaves, Structure]:
    """The leaves [n, ...] of transitions [n], or of one [], and their structure."""
    schema = Schema()
    leaves, _ = schema.check(transitions, batched=batched)
    if ("shard",) in leaves:
        raise SchemaError("'shard' is a reserved key: sampling adds it; expected others")
    return leaves, schema.structure


def _priority(priority: Any, n: int) -> Any:
    """Priorities [n] as a shard takes them; None stays None."""
    if priority is None:
        return None
    index = torch.empty(n, dtype=torch.int64, device="cpu")
    values = validation.as_values("priority", priority, index)
    validation.require_finite("priority", values, low=0.0)
    return wire.array(values)

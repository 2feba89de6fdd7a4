"""Batches: draws are spread over the shards, and their parts are joined and weighed.

A shard k is drawn with its share s_k of the total mass, as last heard, and in it a transition i
with m_i / T_k, from its mass and the shard's total at that moment. One draw therefore picks i with
probability q_i = s_k m_i / T_k, and weights made from q_i are right also where totals have moved
since. With current totals s_k = T_k / sum_j T_j, and q_i is the probability of equation 1 in Schaul
et al. 2015 (arXiv 1511.05952).
"""

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch
from ray.exceptions import RayActorError
from tensordict import TensorDict
from torch import Tensor

from per_td.errors import EmptyBufferError, SchemaError
from per_td.ray import wire
from per_td.ray.exchange import Ledger, Replies
from per_td.ray.shard import Drawn
from per_td.ray.wire import ShardError, Told, understood
from per_td.storage.leaves import Key, Leaves
from per_td.storage.structure import Structure
from per_td.weights import importance_weights

_Part = tuple[int, Drawn]
_Kind = dict[Key, tuple[str, tuple[int, ...]]]
_Asked = dict[Any, tuple[int, list[int]]]
"""For each answer to come: its shard, and the number of transitions in it for each batch."""


@dataclass
class Request:
    """Batches under way that were asked for together."""

    n: int  # transitions in each
    totals: Tensor  # masses of the shards, from which the counts were drawn, float64 [K]
    asked: _Asked  # answers to come; empty once all are there
    batches: deque[list[_Part]]  # the parts of each batch that has not been collected yet


class Batches:
    """Draws batches from many shards.

    The part of a shard that does not answer within `timeout_s` seconds is drawn from the others;
    `on_late` is called before it counts as lost.
    """

    def __init__(
        self,
        shards: list[Any],
        ledger: Ledger,
        replies: Replies,
        *,
        draw: str,
        weight_normalization: str,
        generator: torch.Generator | None,
        timeout_s: float,
        device: torch.device,
        on_late: Callable[[], None],
    ) -> None:
        self._shards = shards
        self._ledger = ledger
        self._replies = replies
        self._draw = draw
        self._normalization = weight_normalization
        self._generator = generator
        self._timeout_s = timeout_s
        self._device = device
        self._on_late = on_late
        self._told: Told | None = None
        self._structure = Structure()
        self._kind: _Kind | None = None

    @torch.inference_mode(False)
    def request(self, n: int, batches: int = 1) -> Request:
        """Ask each shard, in one message, for its parts of so many batches of `n`."""
        totals = self._totals()
        asked = self._ask(totals, [n] * batches)
        return Request(n, totals, asked, deque([] for _ in range(batches)))

    def _totals(self) -> Tensor:
        """The totals as last heard, float64 [K]; if all are 0, ask all shards first."""
        if not self._ledger.total.sum() > 0:
            self._replies.wait(self._timeout_s)
        if not any(self._ledger.living):
            raise ShardError(
                f"expected an answer of one of {len(self._shards)} shards within"
                f" {self._timeout_s:g} s, got none: all are lost or late"
            )
        return self._ledger.total.clone()

    def _ask(self, totals: Tensor, sizes: list[int]) -> _Asked:
        """Ask for so many transitions for each batch, spread over the shards batch by batch."""
        counts = [counts_of(totals, n, self._draw, self._generator) for n in sizes]
        known = "" if self._told is None else self._told.name
        return {
            self._shards[shard].sample.remote(each, known): (shard, each)
            for shard, each in enumerate(torch.stack(counts, 1).tolist())
            if any(each)
        }

    def collect(self, request: Request, beta: float) -> TensorDict:
        """The next batch of a request; the first waits for the answers."""
        if request.asked:
            self._complete(request)
        return self._together(request.batches.popleft(), request.totals, beta)

    def _complete(self, request: Request) -> None:
        """Wait for all answers; draw from the others the parts of a shard that fails or is late.

        A round of waiting takes at most `timeout_s`; another one follows only if a shard failed.
        """
        n, batches = request.n, request.batches
        for _ in range(len(self._shards) + 2):
            failed = self._receive(request)
            if not failed:
                return
            # Also what a failed shard gave before is drawn anew, so that the others have the shares
            # that they have without it.
            for parts in batches:
                parts[:] = [part for part in parts if part[0] not in failed]
            request.totals[sorted(failed)] = 0.0
            if not request.totals.sum() > 0:
                request.totals = self._totals()
            missing = [n - sum(len(drawn.slot) for _, drawn in parts) for parts in batches]
            request.asked = self._ask(request.totals, missing)
        raise ShardError(f"expected a batch of {n}, got shards that fail one after the other")

    def _receive(self, request: Request) -> set[int]:
        """Add the answers to the batches of a request, and return the shards that gave none."""
        answers = list(request.asked)
        ready, late = ray.wait(answers, num_returns=len(answers), timeout=self._timeout_s)
        asked, request.asked = request.asked, {}
        if late:
            self._on_late()
        failed = {asked[answer][0] for answer in late}
        for shard in failed:
            self._replies.lose(shard)
        for answer in ready:
            shard, counts = asked[answer]
            try:
                drawn = wire.get(answer)
            except RayActorError:
                self._replies.lose(shard)
                failed.add(shard)
                continue
            if isinstance(drawn, Drawn):
                self._replies.note(shard, drawn.report)
                deal(shard, drawn, counts, request.batches)
            else:  # a report: it has nothing to draw
                self._replies.note(shard, drawn)
                failed.add(shard)
        return failed

    def _together(self, parts: list[_Part], totals: Tensor, beta: float) -> TensorDict:
        """Join the parts to a batch, shard after shard, and weigh it."""
        parts.sort(key=lambda part: part[0])
        sizes = torch.as_tensor([len(drawn.slot) for _, drawn in parts], device="cpu")

        def each(values: list[Any], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype, device="cpu").repeat_interleave(sizes)

        def column(name: str) -> Tensor:  # in memory of its own: parts may be read-only
            return torch.from_numpy(np.concatenate([getattr(drawn, name) for _, drawn in parts]))

        shard = each([shard for shard, _ in parts], torch.int64)
        probability = probabilities(
            shard,
            column("mass"),
            total=each([drawn.report.total for _, drawn in parts], torch.float64),
            counted_with=totals,
        )
        weight = importance_weights(
            probability,
            beta,
            total=1.0,
            size=self._ledger.size,
            smallest=self._smallest(totals),
            normalization=self._normalization,
        )
        leaves = _leaves(parts)
        self._learn(parts)
        beside = {
            "index": column("slot"),
            "generation": column("generation"),
            "shard": shard,
            "priority_weight": weight,
        }
        if parts[0][1].draw_count is not None:  # all shards have them, or none
            beside["draw_count"] = column("draw_count")
        cpu = torch.device("cpu")
        batch = self._structure.assembled(leaves.items(), beside, shard.shape, cpu)
        return batch if self._device.type == "cpu" else batch.to(self._device)

    def _learn(self, parts: list[_Part]) -> None:
        """Take up the structure that shards tell.

        The first one stays while transitions have its leaves. One with tensorclasses replaces one
        that comes from a file, which has none.
        """
        kind = _kind(parts[0][1])
        for _, drawn in parts:
            told, known = drawn.told, self._told
            if told is None:
                continue
            if known is None or kind != self._kind or (told.classes and not known.classes):
                self._told, self._structure, self._kind = told, understood(told), kind
        self._kind = kind

    def _smallest(self, totals: Tensor) -> Tensor:
        """The smallest probability of any transition, as last heard."""
        known = (totals > 0) & (self._ledger.total > 0)
        ratio = self._ledger.smallest / self._ledger.total
        return torch.where(known, shares_of(totals) * ratio, torch.inf).amin()


def deal(shard: int, drawn: Drawn, counts: list[int], batches: Iterable[list[_Part]]) -> None:
    """Cut what a shard drew, and give each batch its part."""
    end = 0
    for n, parts in zip(counts, batches, strict=True):
        at = slice(end, end + n)
        end = at.stop
        if n:
            part = Drawn(
                drawn.report,
                [(key, dtype, values[at]) for key, dtype, values in drawn.packed],
                drawn.slot[at],
                drawn.generation[at],
                drawn.mass[at],
                drawn.told,
                None if drawn.draw_count is None else drawn.draw_count[at],
            )
            parts.append((shard, part))


def _leaves(parts: list[_Part]) -> Leaves:
    """The transitions of all parts, which must be of one kind."""
    first, kind = parts[0][0], _kind(parts[0][1])
    for shard, drawn in parts[1:]:
        if _kind(drawn) != kind:
            raise SchemaError(
                f"expected transitions of one kind in all shards, got {kind} in shard {first} and"
                f" {_kind(drawn)} in shard {shard}; with an `example`, shards refuse what is not"
                " like it"
            )
    return wire.unpack(wire.joined([drawn.packed for _, drawn in parts]))


def _kind(drawn: Drawn) -> _Kind:
    """Dtype and shape of each leaf of a transition."""
    return {key: (dtype, values.shape[1:]) for key, dtype, values in drawn.packed}


def shares_of(totals: Tensor) -> Tensor:
    """The share of each shard in all draws, float64 [K], from total masses [K]."""
    return totals / totals.sum()


def counts_of(
    totals: Tensor, n: int, draw: str = "independent", generator: torch.Generator | None = None
) -> Tensor:
    """Spread `n` draws over the shards at random, in proportion to the totals, float64 [K].

    A total of 0 is never drawn. Returns int64 [K]. "independent": multinomial counts. "stratified":
    one draw in each of n equal parts of the sum of the totals: a count is within 2 of its mean.
    """
    edges = totals.cumsum(0)
    if not edges[-1] > 0:
        raise EmptyBufferError("expected a shard with a positive mass to draw from, got none")
    point = torch.rand(n, dtype=torch.float64, device=totals.device, generator=generator)
    if draw == "stratified":
        point = (torch.arange(n, device=totals.device) + point) / n
    point = point * edges[-1]
    shard = torch.searchsorted(edges, point, right=True)
    last = totals.nonzero()[-1, 0]  # a point may be rounded up to the sum itself
    return torch.bincount(torch.minimum(shard, last), minlength=len(totals))


def probabilities(shard: Tensor, mass: Tensor, *, total: Tensor, counted_with: Tensor) -> Tensor:
    """Probability q of each transition in one draw, float64 [B].

    `mass` and `total` (of its shard) are those when it was drawn, [B]; `counted_with` has the
    totals from which the counts were drawn, float64 [K], 0 for shards that were lost or late: given
    that a shard gave nothing, the other counts are multinomial with the remaining shares.
    """
    return shares_of(counted_with)[shard] * mass.double() / total

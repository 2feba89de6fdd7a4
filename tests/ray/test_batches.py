"""Batches where shards fail in one round and another, with actors that answer in this process."""

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch

ray = pytest.importorskip("ray")

from ray.exceptions import RayActorError  # noqa: E402

from per_td.errors import EmptyBufferError  # noqa: E402
from per_td.ray import ShardError, wire  # noqa: E402
from per_td.ray.batches import Batches  # noqa: E402
from per_td.ray.exchange import Ledger, Replies  # noqa: E402
from per_td.ray.shard import Shard  # noqa: E402


@dataclass(eq=False)
class Answer:
    actor: "Local"
    name: str
    given: tuple
    outcome: str


class Local:
    """A shard of 10 transitions, whose draws are answered, late ("late") or lost ("lost")."""

    def __init__(self, number, outcomes):
        self.shard = Shard({"capacity": 16, "alpha": 1.0, "eps": 0.0}, seed=number)
        ids = torch.arange(10) + 100 * number
        self.shard.extend(wire.pack({("id",): ids}), np.arange(1, 11, dtype=np.float32))
        self.outcomes = list(outcomes)
        self.polled = "late" if outcomes else "answered"  # whoever failed does not come back

    def __getattr__(self, name):
        return SimpleNamespace(remote=lambda *given: Answer(self, name, given, self.outcome(name)))

    def outcome(self, name):
        if name == "report":
            return self.polled
        return self.outcomes.pop(0) if self.outcomes else "answered"


@pytest.fixture
def drawn(monkeypatch):
    """Makes shards with these outcomes, draws batches of 64, and tells what became of them."""

    def wait(answers, *, num_returns, timeout, fetch_local=True):
        late = [answer for answer in answers if answer.outcome == "late"]
        return [answer for answer in answers if answer not in late], late

    def get(answer):
        if answer.outcome == "lost":
            raise RayActorError
        return getattr(answer.actor.shard, answer.name)(*answer.given)

    monkeypatch.setattr(ray, "wait", wait)
    monkeypatch.setattr(ray, "get", get)

    def make(*outcomes, heard=True, change=lambda shard: None, number=1):
        shards = [Local(number, each) for number, each in enumerate(outcomes)]
        ledger = Ledger(len(shards))
        for k, each in enumerate(shards):
            if heard:
                ledger.note(k, each.shard.report())
        change(shards[0].shard)
        replies = Replies(shards, ledger, lambda _: None, refresh_s=60.0)
        batches = Batches(
            shards,
            ledger,
            replies,
            draw="independent",
            weight_normalization="none",
            generator=torch.Generator().manual_seed(0),
            timeout_s=0.1,
            device=torch.device("cpu"),
            on_late=lambda: None,
        )
        request = batches.request(64, number)
        made = [batches.collect(request, 1.0) for _ in range(number)]
        assert not request.batches
        return ledger, *made

    return make


def check(batch, living):
    """All from the living, with the weights of a buffer that consists of them."""
    assert batch.batch_size == (64,)
    assert set(batch["shard"].tolist()) == set(living)
    assert (batch["id"] // 100 == batch["shard"]).all()
    assert (batch["shard"].diff() >= 0).all()
    priority = batch["id"] % 100 + 1
    probability = priority / (55.0 * len(living))
    torch.testing.assert_close(batch["priority_weight"], 1 / (10 * len(living) * probability))


@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("failure", ["late", "lost"])
@pytest.mark.parametrize(
    ("outcomes", "living"),
    [
        (((), (), ()), [0, 1, 2]),
        (((), ("fails",), ()), [0, 2]),
        ((("fails",), ()), [1]),
        ((("answered", "fails"), ("fails",), ()), [2]),  # what it gave before it failed is not used
    ],
)
def test_what_failed_shards_do_not_give_comes_from_the_others(
    failure, outcomes, living, number, drawn
):
    outcomes = [[failure if each == "fails" else each for each in some] for some in outcomes]
    ledger, *batches = drawn(*outcomes, number=number)
    assert len(batches) == number
    for batch in batches:
        check(batch, living)
    assert ledger.size == 10 * len(living)
    assert [number for number, lives in enumerate(ledger.living) if lives] == living


def test_where_all_fail_there_is_an_error(drawn):
    with pytest.raises(ShardError, match="all are lost or late"):
        drawn(["lost"], ["late"])


def test_shards_that_were_not_heard_of_are_asked_first(drawn):
    _, batch = drawn((), (), heard=False)
    check(batch, [0, 1])


@pytest.mark.parametrize("last", [(), ["lost"]])
def test_weights_follow_what_shards_say_when_they_draw_and_totals_are_known_then(last, drawn):
    ledger, batch = drawn((), (), last, change=lambda shard: give(shard, 2.0))
    shares = 2 if last else 3
    assert ledger.total.tolist() == [20.0, 55.0, 0.0 if last else 55.0]
    moved = batch["shard"] == 0
    within = torch.where(moved, 2.0 / 20, (batch["id"] % 100 + 1) / 55)
    torch.testing.assert_close(batch["priority_weight"], 1 / (10 * shares * within / shares))
    assert 64 / shares / 2 < moved.sum() < 64 / shares * 1.5  # still the share that it had


def test_the_part_of_a_shard_that_was_emptied_unseen_comes_from_the_others(drawn):
    ledger, batch = drawn((), (), change=lambda shard: give(shard, 0.0))
    assert set(batch["shard"].tolist()) == {1}
    priority = batch["id"] % 100 + 1
    torch.testing.assert_close(batch["priority_weight"], 55 / (20 * priority))  # N is still 20
    assert ledger.total.tolist() == [0.0, 55.0]
    assert ledger.living == [True, True]


def test_where_nothing_has_any_mass_there_is_an_error(drawn):
    with pytest.raises(EmptyBufferError, match="expected a shard with a positive mass"):
        drawn((), change=lambda shard: give(shard, 0.0))


def give(shard, priority):
    """All transitions the same priority."""
    shard.update(np.arange(10), np.full(10, priority, np.float32))

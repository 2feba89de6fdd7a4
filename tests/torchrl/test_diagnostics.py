"""`diagnostics` of the drop-in and of the samplers beside the figures of per_td's own buffer."""

import math

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import (
    LazyTensorStorage,
    ListStorage,
    TensorDictMaxValueWriter,
    TensorDictReplayBuffer,
)

from per_td import ConfigurationError, PrioritizedReplayBuffer
from per_td.torchrl import PrioritizedSampler, PrioritizedSliceSampler
from tests.support.replay import ALPHA, BETA, data, learn, make

N = 20
WAYS = {
    "short": {},
    "long": {"collate_fn": lambda batch: batch},
    "list": {"storage": lambda: ListStorage(N), "collate_fn": torch.stack},
}


def values(figures) -> dict[str, float]:
    assert all(value.shape == () for value in figures.values())
    return {key: value.item() for key, value in figures.items()}


def twin(sampler, written, drawn=(), **settings) -> dict[str, float]:
    """The figures of per_td's own buffer that holds the same."""
    size = min(written, N)
    twin = PrioritizedReplayBuffer(
        N,
        alpha=ALPHA,
        beta=BETA,
        weight_normalization=sampler.weight_normalization,
        uniform_mix=sampler.uniform_mix,
        track_draws=sampler.track_draws,
        **settings,
    )
    twin.extend(TensorDict({"x": torch.zeros(written)}, [written]))
    twin.set_priority(torch.arange(size), sampler.priority[:size])
    twin._priorities.replayed[list(drawn)] = True
    if sampler.track_draws:
        twin._priorities.draw_count.copy_(sampler.draw_count)
    return values(twin.diagnostics())


@pytest.mark.parametrize("settings", [{}, {"uniform_mix": 0.25, "track_draws": True}])
@pytest.mark.parametrize("written", [12, N, 33])
@pytest.mark.parametrize("way", WAYS)
def test_the_drop_in_has_the_figures_of_our_own_buffer(way, written, settings):
    buffer = make(**WAYS[way], **settings)
    for start in range(0, written, 11):
        buffer.extend(data(min(11, written - start), start))
    if written <= N:  # else nobody knows which of these were overwritten since
        learn(buffer, buffer.sample())
    batch = buffer.sample()
    drawn = set(batch["index"].tolist()) | (set() if written > N else replayed(buffer))
    got = values(buffer.diagnostics())
    assert got == pytest.approx(twin(buffer.sampler, written, drawn), rel=1e-5)
    assert got["size"] == min(written, N)


def replayed(buffer) -> set[int]:
    return set(buffer.sampler._table.replayed.nonzero().flatten().tolist())


@pytest.mark.parametrize("track_draws", [False, True])
def test_an_empty_buffer_has_the_same_keys_and_no_figures(track_draws):
    buffer = make(track_draws=track_draws)
    got = values(buffer.diagnostics())
    known = {"beta": BETA, "size": 0, "stale_updates": 0, "refused_priorities": 0}
    for key, value in got.items():
        assert value == pytest.approx(known.get(key, math.nan), nan_ok=True), key
    buffer.extend(data(5))
    assert got.keys() == buffer.diagnostics().keys()


def test_with_sync_false_what_was_written_since_the_last_draw_counts():
    buffer = make(sync=False)
    buffer.extend(data(5))
    buffer.sample()
    buffer.extend(data(4, 5))
    got = values(buffer.diagnostics())
    assert (got["size"], got["age/max"], got["priority/min"] > 0) == (9, 8, True)


def test_stale_updates_and_the_present_beta_are_told():
    buffer = make()
    buffer.extend(data(N))
    batch = buffer.sample()
    buffer.extend(data(N, 50))
    learn(buffer, batch)
    buffer.sampler.beta = 1.0
    got = values(buffer.diagnostics())
    assert (got["stale_updates"], got["beta"]) == (32, 1.0)
    assert got["stale_updates"] == buffer.stats()["stale_updates"]


def test_a_sampler_in_a_buffer_of_torchrl_takes_ages_from_the_storage():
    storage = LazyTensorStorage(N)
    sampler = PrioritizedSampler(N, ALPHA, BETA, track_draws=True)
    buffer = TensorDictReplayBuffer(storage=storage, sampler=sampler, batch_size=8)
    buffer.extend(data(15))
    buffer.extend(data(15, 15))
    sampler.update_priority(torch.arange(N), torch.rand(N))
    drawn = buffer.sample()["index"].tolist()
    got = values(sampler.diagnostics(storage))
    assert got == pytest.approx(twin(sampler, 30, drawn), rel=1e-5)


def test_a_sampler_alone_knows_no_ages_and_takes_priorities_of_0_for_empty_slots():
    sampler = PrioritizedSampler(N, ALPHA, BETA, track_draws=True, eps=0.0)
    sampler.mark_update(torch.arange(12))
    sampler.update_priority(torch.arange(12), torch.rand(12))
    sampler.set_priority(5, 0.0)
    sampler._table.draw_counts.draw(torch.tensor([0, 0, 1, 5, 5, 5]))
    sampler._table.replayed[[0, 1, 5]] = True
    got = values(sampler.diagnostics())
    assert got["size"] == 11
    assert got["never_replayed_share"] == pytest.approx(9 / 11)
    assert (got["draw_count/min"], got["draw_count/max"]) == (0, 2)
    share = sampler.mass.double() / sampler.mass.double().sum()
    assert got["effective_sample_size"] == pytest.approx(1 / share.square().sum().item())
    assert got["priority/min"] == sampler.priority[sampler.priority > 0].min().item()
    assert all(math.isnan(value) == key.startswith("age/") for key, value in got.items())


def test_a_storage_of_several_dimensions_has_all_figures_but_ages():
    buffer = make(storage=lambda: LazyTensorStorage(N, ndim=2))
    buffer.extend(data(N).reshape(4, 5))
    got = values(buffer.diagnostics())
    assert (got["size"], got["effective_share"]) == (N, pytest.approx(1))
    assert all(math.isnan(value) == key.startswith("age/") for key, value in got.items())


def test_a_writer_that_overwrites_the_least_leaves_no_order_for_ages_and_newest():
    buffer = make()
    buffer.set_writer(TensorDictMaxValueWriter(rank_key="x"))
    buffer.extend(data(N))
    buffer.extend(data(3, 100))
    got = values(buffer.diagnostics())
    assert got["size"] == N
    assert math.isnan(got["age/q50"])
    with pytest.raises(ConfigurationError, match="newest"):
        buffer.sample(newest=3)


def test_slices_do_not_tell_which_records_were_replayed():
    sampler = PrioritizedSliceSampler(N, ALPHA, BETA, slice_len=5)
    buffer = make(sampler=sampler, batch_size=30)
    buffer.extend(data(N))
    buffer.sample()
    got = values(buffer.diagnostics())
    assert math.isnan(got["never_replayed_share"])
    assert (got["size"], got["effective_share"]) == (N, pytest.approx(1))


def test_figures_change_nothing_and_do_not_change_afterwards():
    buffer = make(track_draws=True)
    buffer.extend(data(N))
    figures = buffer.diagnostics()
    before = values(figures)
    state = buffer.sampler.state_dict()
    learn(buffer, buffer.sample())
    buffer.diagnostics()
    assert values(figures) == before
    assert state["alpha"] == buffer.sampler.alpha

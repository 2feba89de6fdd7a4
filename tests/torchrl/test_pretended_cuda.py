"""The drop-ins on a pretended CUDA device, which raises where the host would wait."""

import pytest
import torch
from tensordict import TensorDict
from torch._subclasses.fake_tensor import FakeTensor
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.data.replay_buffers.storages import Storage

from per_td.draws import DRAWS
from per_td.torchrl import (
    PrioritizedSampler,
    PrioritizedSliceSampler,
    TensorDictPrioritizedReplayBuffer,
    columns,
    privates,
)
from per_td.tree.trees import Trees
from per_td.weights import NORMALIZATIONS
from tests.support.pretended_cuda import WAITS

ALPHA, BETA, B = 0.7, 0.5, 8


@pytest.fixture
def cuda(pretended, monkeypatch):
    """The pretended device, on which TorchRL's own storage can be written to."""

    def remember(storage, cursor):
        storage._last_cursor = cursor

    # TorchRL's own reads the last slot written back from the device, at every write of its own:
    # PrioritizedSliceSampler and TorchRL's slice samplers ask for it, no one else does.
    monkeypatch.setattr(Storage, "_set_last_cursor", remember)
    # a sampler's first table is in the host's memory, whose settings the host may read at any time:
    # here that memory has no values either, so the numbers are kept beside it, as for a device
    make = Trees.__init__

    def with_numbers(trees, *args, **settings):
        make(trees, *args, **settings)
        trees._numbers = [0.0] * 4

    monkeypatch.setattr(Trees, "__init__", with_numbers)
    # columns are read and written one by one if all are plain tensors, as these stand for
    monkeypatch.setattr(columns, "_TENSORS", (*columns._TENSORS, FakeTensor))
    return pretended


def data(shape, device="cuda:0", **extra):
    k = torch.zeros(shape, device=device)
    following = TensorDict({"done": (k > 0).unsqueeze(-1)}, shape)
    return TensorDict({"x": k, "next": following, **extra}, shape, device=device)


def drop_in(cuda, ndim=1, first=4, **settings):
    """A buffer whose storage and priorities are allocated, which copies and may wait."""
    with cuda.copies():
        buffer = TensorDictPrioritizedReplayBuffer(
            alpha=ALPHA,
            beta=BETA,
            storage=LazyTensorStorage(20, device="cuda", ndim=ndim),
            batch_size=B,
            **settings,
        )
        if first:
            buffer.extend(data(first if ndim == 1 else (2, 5)))
    assert buffer.sampler.device == cuda.device
    return buffer


def plugged(cuda, ndim=1, **settings):
    """TorchRL's own buffer with our sampler."""
    sampler = PrioritizedSampler(20, ALPHA, BETA, **settings.pop("sampler", {}))
    with cuda.copies():
        buffer = TensorDictReplayBuffer(
            storage=LazyTensorStorage(20, device="cuda", ndim=ndim),
            sampler=sampler,
            batch_size=B,
            **settings,
        )
        buffer.extend(data(4 if ndim == 1 else (2, 5)))
    assert sampler.device == cuda.device
    return buffer


def learn(buffer, batch, device="cuda:0"):
    batch["td_error"] = torch.ones(len(batch), device=device)
    buffer.update_tensordict_priority(batch)


def _refuse(*args, **settings):
    raise AssertionError("expected to write column by column")


@pytest.mark.parametrize("device", ["cuda:0", "cpu"])
@pytest.mark.parametrize("unit", ["abs", "squared"])
def test_the_drop_in_never_waits(unit, device, cuda, monkeypatch):
    buffer = drop_in(cuda, td_error_unit=unit)
    monkeypatch.setattr(buffer, "_write_by_torchrl", _refuse)
    index = buffer.extend(data(18, device))
    assert (index.device, index.shape) == (torch.device(device), (18,))
    assert buffer.add(data((), device)) == 2
    batch = buffer.sample()
    assert {batch[key].device for key in ("x", "index", "priority_weight")} == {cuda.device}
    learn(buffer, batch)
    buffer.update_priority(batch["index"], torch.ones(B, device=device))
    buffer.update_priority(torch.zeros(B, device=device).long(), torch.ones(B, device=device))
    buffer.update_priority(3, 1.0)
    host = TensorDict({"index": torch.arange(B), "index_generation": torch.zeros(B).long()}, [B])
    learn(buffer, host, "cpu")
    assert buffer.sampler.default_priority.device == cuda.device
    buffer.sampler.alpha, buffer.sampler.beta = 0.5, 0.6


@pytest.mark.parametrize("device", ["cuda:0", "cpu"])
def test_priorities_that_come_with_the_data_are_taken_without_waiting(device, cuda, monkeypatch):
    buffer = drop_in(cuda, first=0, sampler_device="cuda")
    td_error = torch.ones(18, device=device)
    with cuda.copies():
        buffer.extend(data(18, td_error=td_error.to("cuda")))
    monkeypatch.setattr(buffer, "_write_by_torchrl", _refuse)
    buffer.extend(data(18, device, td_error=td_error))
    buffer.add(data((), device, td_error=td_error[0]))
    learn(buffer, buffer.sample())


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("draw", DRAWS)
def test_the_drop_in_draws_in_every_way(draw, normalization, cuda):
    for within in (True, False):
        buffer = drop_in(
            cuda,
            first=B,
            draw=draw,
            weight_normalization=normalization,
            max_priority_within_buffer=within,
        )
        learn(buffer, buffer.sample())


def test_several_td_errors_of_an_element_are_reduced_without_waiting(cuda):
    buffer = drop_in(cuda, reduction="mean")
    batch = buffer.sample()
    batch["td_error"] = torch.ones(B, 3, device="cuda")
    buffer.update_tensordict_priority(batch)


def test_the_drop_in_never_waits_with_two_dimensions(cuda):
    buffer = drop_in(cuda, ndim=2)
    buffer.extend(data((2, 5)))  # by TorchRL's means
    buffer.extend(data((2, 5), td_error=torch.ones(2, 5, device="cuda")))
    batch = buffer.sample()
    assert batch["index"].shape == (B, 2)
    learn(buffer, batch)
    buffer.update_priority(batch["index"], torch.ones(B, device="cuda"))
    buffer.update_priority(torch.zeros(B, 2).long(), torch.ones(B))
    buffer.update_priority((torch.zeros(B).long(), torch.zeros(B).long()), torch.ones(B))


def test_writing_by_torchrls_means_marks_without_waiting(cuda, monkeypatch):
    buffer = drop_in(cuda)
    monkeypatch.setattr(privates.ColumnCache, "of", lambda *args, **settings: None)
    buffer.extend(data(3))
    buffer.extend(data(3, td_error=torch.ones(3, device="cuda")))
    learn(buffer, buffer.sample())


@pytest.mark.parametrize("ndim", [1, 2])
@pytest.mark.parametrize("draw", DRAWS)
def test_the_sampler_in_torchrls_buffer_never_waits(draw, ndim, cuda):
    buffer = plugged(cuda, ndim, sampler={"draw": draw})
    buffer.extend(data(18 if ndim == 1 else (2, 5)))
    batch = buffer.sample()
    assert batch.device == batch["priority_weight"].device == cuda.device
    learn(buffer, batch)
    buffer.update_priority(batch["index"], torch.ones(B, device="cuda"))
    buffer.update_priority(batch["index"], torch.ones(B))
    buffer.update_priority(batch["index"], 1.0)
    if ndim == 1:
        with cuda.copies():  # TorchRL's writer makes a tensor of the slot
            buffer.add(data(()))
        buffer.update_priority([1, 2], [0.5, 0.5])


def test_what_a_writer_left_out_is_marked_without_waiting(cuda):
    with cuda.copies():
        sampler = PrioritizedSampler(20, ALPHA, BETA, device="cuda")
    index = torch.full((5,), -1, device="cuda")  # as a TensorDictMaxValueWriter tells
    sampler.mark_update(index)
    sampler.update_priority(index, torch.ones(5, device="cuda"))
    sampler.mark_update(torch.arange(5))
    sampler.mark_update(3)


@pytest.mark.parametrize("settings", [{}, {"uniform_mix": 0.2, "track_draws": True}])
@pytest.mark.parametrize("ndim", [1, 2])
def test_figures_do_not_wait(ndim, settings, cuda):
    for first in (0, 4):
        buffer = drop_in(cuda, ndim, first, **settings)
        sampler = buffer.sampler
        for figures in (buffer.diagnostics(), sampler.diagnostics()):
            assert {value.device for value in figures.values()} == {cuda.device}
            assert {value.shape for value in figures.values()} == {torch.Size([])}


def test_a_snapshot_of_the_priorities_does_not_wait(cuda):
    sampler = drop_in(cuda).sampler
    state = sampler.state_dict()
    assert state["priority"].device == cuda.device


def test_counters_are_read_back(cuda):
    buffer = drop_in(cuda)
    with pytest.raises(WAITS):
        buffer.stats()


def test_a_mask_as_an_index_in_marking_raises(cuda, monkeypatch):
    buffer = drop_in(cuda)

    def by_mask(sampler, index, priority):
        sampler._table.write_new(index[index >= 0], priority)

    monkeypatch.setattr(PrioritizedSampler, "_write_new", by_mask)
    with pytest.raises(WAITS):
        buffer.mark_update(torch.arange(3, device="cuda"))


def test_slices_wait_for_the_ends_of_trajectories(cuda):
    sampler = PrioritizedSliceSampler(20, ALPHA, BETA, slice_len=2)
    with cuda.copies():
        buffer = TensorDictReplayBuffer(
            storage=LazyTensorStorage(20, device="cuda"), sampler=sampler, batch_size=B
        )
        buffer.extend(data(10))
    buffer.extend(data(4))
    with pytest.raises(WAITS):
        buffer.sample()

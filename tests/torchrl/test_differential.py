"""Priorities after `update_tensordict_priority` against a plain loop, for random batches.

TorchRL's rules: an element is a row of the batch, or in a storage of several dimensions a record;
its TD errors are reduced to one; of equal slots the last one holds.
"""

import math
import random
import statistics

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer

from per_td.torchrl import (
    PrioritizedSampler,
    PrioritizedSliceSampler,
    TensorDictPrioritizedReplayBuffer,
)
from tests.support.parameters import slow_but

ROWS = 24
KINDS = (
    "short",
    "long",
    "trajectories",
    "2-d",
    "slices",
    "2-d slices",
    "torchrl",
    "torchrl slices",
)
OF_TORCHRL = ("max", "min", "median", "mean")
REDUCTIONS = {
    "max": max,
    "min": min,
    "median": statistics.median_low,
    "mean": statistics.fmean,
    "sum": math.fsum,
    "r2d2": lambda values: 0.9 * max(values) + 0.1 * statistics.fmean(values),
}


def data(n, kind):
    k = torch.arange(n)
    if kind == "trajectories":
        return TensorDict({"x": torch.rand(n, 3)}, [n, 3])
    one = TensorDict({"x": torch.rand(n, 2), "next": {"done": (k % 6 == 5).unsqueeze(-1)}}, [n])
    return torch.stack([one] * 3) if kind.startswith("2-d") else one


def make(kind):
    ndim = 2 if kind.startswith("2-d") else 1
    capacity = ROWS * (3 if ndim == 2 else 1)
    storage = LazyTensorStorage(capacity, ndim=ndim)
    settings = {"alpha": 1.0, "beta": 1.0}
    if "slices" in kind:
        sampler = PrioritizedSliceSampler(capacity, **settings, slice_len=4)
    else:
        sampler = PrioritizedSampler(capacity, **settings)
    if kind.startswith("torchrl"):
        buffer = TensorDictReplayBuffer(storage=storage, sampler=sampler, batch_size=16)
    else:
        buffer = TensorDictPrioritizedReplayBuffer(
            **settings,
            storage=storage,
            sampler=sampler,
            batch_size=16,
            collate_fn=(lambda batch: batch) if kind == "long" else None,
        )
    buffer.extend(data(ROWS, kind))
    return buffer


def reshaped(batch, draw):
    """A batch in another shape and layout."""
    way = draw.choice(("flat", "folded", "turned", "deep", "strided", "cut", "cloned", "one"))
    if way in ("folded", "turned", "cut"):
        batch = batch.reshape(4, 4, *batch.shape[1:])
    elif way == "deep":
        batch = batch.reshape(2, 2, 4, *batch.shape[1:])
    if way == "turned":
        batch = batch.transpose(0, 1)
    elif way == "cut":
        batch = batch[:, draw.randrange(4) :]
    elif way == "strided":
        batch = batch[:: draw.choice((2, 3))]
    elif way == "one":
        batch = batch[draw.randrange(16)]
    return batch.clone() if way == "cloned" or draw.random() < 0.3 else batch


def laid_out(values, draw):
    """The same numbers, with other strides."""
    way = draw.choice(("contiguous", "turned", "sliced", "offset", "negated", "cloned"))
    if way == "turned" and values.ndim > 1:
        return values.transpose(0, -1).contiguous().transpose(0, -1)
    if way == "sliced":
        return torch.stack([values, -values], -1)[..., 0]
    if way == "offset":
        return torch.cat([values.reshape(-1)[:1], values.reshape(-1)])[1:].view(values.shape)
    if way == "negated":
        return torch._neg_view(-values)
    return values.clone() if way == "cloned" else values


def td_errors(shape, draw):
    """TD errors of a batch of this shape: one or several for each element."""
    trailing = draw.choice(((), (), (1,), (3,), (2, 1)))
    if draw.random() < 0.15 and trailing:
        values = torch.randn(shape).view(*shape, *[1] * len(trailing)).expand(*shape, *trailing)
    else:
        values = torch.randn((*shape, *trailing))
        values = laid_out(values, draw)
    dtype = draw.choice((torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.half))
    values = values.to(dtype)  # keeps the strides
    return values.requires_grad_() if draw.random() < 0.1 else values


def elements(batch, td_error, buffer):
    """For each element, one by one: its slot, its generation or None, its TD errors as floats."""
    ndim, index = buffer.storage.ndim, batch["index"]
    generation = batch.get("index_generation", None)
    columns = buffer.storage.shape[1] if ndim == 2 else 1
    lead = batch.batch_dims if ndim == 2 else min(batch.batch_dims, 1)
    for place in (
        torch.cartesian_prod(*map(torch.arange, batch.shape[:lead])).view(-1, lead)
        if lead
        else [()]
    ):
        at = tuple(map(int, place))
        own = index[at].reshape(-1)[: 2 if ndim == 2 else 1].tolist()
        slot = own[0] * columns + own[1] if ndim == 2 else own[0]
        stamp = None if generation is None else int(generation[at].reshape(-1)[0])
        yield slot, own[0], stamp, td_error[at].detach().float().abs().reshape(-1).tolist()


def check(buffer, kind, draw):
    """One batch, drawn, changed and handed back; the priorities against those of the loop."""
    torchrls, sampler = kind.startswith("torchrl"), buffer.sampler
    sampler.reduction = draw.choice(OF_TORCHRL if torchrls else tuple(REDUCTIONS))
    if "slices" in kind and sampler.reduction == "r2d2":
        sampler.reduction = "sum"  # one priority per slice: see test_slice_batches
    sampler.td_error_unit = "abs" if torchrls else draw.choice(("abs", "abs", "squared"))
    sampler.eps = draw.choice((0.0, 0.01))
    batch = buffer.sample()
    if draw.random() < 0.3:
        buffer.extend(data(draw.randrange(1, 6), kind))  # some of the batch is stale now
    batch = reshaped(batch, draw)
    if draw.random() < 0.2 and "index_generation" in batch.keys():  # noqa: SIM118
        batch = batch.exclude("index_generation")
    td_error = td_errors(batch.shape, draw)
    if torchrls:
        td_error = td_error.detach().abs()  # TorchRL takes no negative ones
        if not batch.ndim:  # nor several for an element alone
            td_error = td_error.reshape(-1)[0]
    batch["td_error"] = td_error
    expected, now = sampler.priority.tolist(), buffer.writer._generation
    stale = sampler.stale_updates
    for slot, row, stamp, values in elements(batch, td_error, buffer):
        if stamp is not None and stamp != int(now[row]):
            stale += 1
            continue
        if sampler.td_error_unit == "squared":
            values = [math.sqrt(value) for value in values]
        expected[slot] = REDUCTIONS[sampler.reduction](values) + sampler.eps
    buffer.update_tensordict_priority(batch)
    close = {"rtol": 1e-5, "atol": 1e-6}
    if torchrls and td_error.dtype in (torch.bfloat16, torch.half):
        close = {"rtol": 1e-2, "atol": 1e-2}  # TorchRL reduces in the dtype of the TD errors
    torch.testing.assert_close(sampler.priority, torch.tensor(expected), **close)
    assert torchrls or sampler.stale_updates == stale
    sampler.check_valid()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cases", slow_but([40], [40, 625]))
def test_priorities_of_random_batches_are_those_of_a_plain_loop(choice, kind, cases):
    """625 times 8 kinds, with kernels and without: 10,000 cases."""
    for case in range(cases):
        draw = random.Random(f"{kind} {case}")
        torch.manual_seed(case)
        if case % 25 == 0:
            buffer = make(kind)
        try:
            check(buffer, kind, draw)
        except Exception as error:
            raise AssertionError(f"case {case} of {kind}: {error}") from error

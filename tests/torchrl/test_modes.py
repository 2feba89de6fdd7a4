"""Every public method under other default dtypes and inside torch.inference_mode()."""

import contextlib
import copy

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import LazyMemmapStorage, LazyTensorStorage, TensorDictReplayBuffer

from per_td import ConfigurationError
from per_td.torchrl import (
    PrioritizedSampler,
    PrioritizedSliceSampler,
    TensorDictPrioritizedReplayBuffer,
)
from tests.support.choices import CHOICES
from tests.support.parameters import few_of_all

KINDS = ["short", "long", "memmap", "2-d", "no sync", "sampler", "slices", "slices of ours"]


def data(n, start=0, ndim=1):
    k = torch.arange(start, start + n)
    one = TensorDict({"x": k, "next": {"done": (k % 4 == 3).unsqueeze(-1)}}, [n])
    return one if ndim == 1 else torch.stack([one, one])


def make(kind, **settings):
    ndim = 2 if kind == "2-d" else 1
    storage = LazyMemmapStorage if kind == "memmap" else LazyTensorStorage
    storage = storage(16 * ndim, ndim=ndim)
    sampler = None
    if kind.startswith("slices"):
        sampler = PrioritizedSliceSampler(
            16, alpha=0.5, beta=0.5, slice_len=2, reduction="r2d2", **settings
        )
    elif kind == "sampler":
        sampler = PrioritizedSampler(16, alpha=0.5, beta=0.5, **settings)
    if kind in ("sampler", "slices"):
        return TensorDictReplayBuffer(storage=storage, sampler=sampler, batch_size=8)
    return TensorDictPrioritizedReplayBuffer(
        alpha=0.5,
        beta=0.5,
        storage=storage,
        sampler=sampler,
        batch_size=8,
        sync=kind != "no sync",
        collate_fn=(lambda batch: batch) if kind == "long" else None,
        **({} if sampler is not None else settings),
    )


def update(buffer, kind):
    batch = buffer.sample()
    batch["td_error"] = torch.linspace(0.5, 4.0, 8, dtype=torch.float32)
    if kind == "slices":
        buffer.update_priority(*buffer.sampler.slice_priorities(batch))
    else:
        buffer.update_tensordict_priority(batch)
    return batch


def steps(kind, folder):
    """Every public method of a buffer and its sampler, by name."""
    ndim = 2 if kind == "2-d" else 1
    held = {}

    def state(buffer):
        held["state"] = buffer.state_dict()
        held["sampler"] = buffer.sampler.state_dict()

    def settings(buffer):
        sampler = buffer.sampler
        for name, values in (
            ("alpha", (0.0, 0.7)),
            ("beta", (1.0, 0.4)),
            ("eps", (0.0, 1e-3)),
            ("reduction", ("min", "r2d2" if "slices" in kind else "max")),
            ("td_error_unit", ("squared", "abs")),
            ("weight_normalization", ("batch", "none", "buffer")),
        ):
            for value in values:
                setattr(sampler, name, value)
                assert getattr(sampler, name) == value

    def views(buffer):
        sampler = buffer.sampler
        sampler.check_valid()
        sampler.default_priority  # noqa: B018
        assert sampler.priority.dtype == sampler.mass.dtype == torch.float32
        assert sampler.total_mass.dtype == torch.float64
        assert sampler.stats()["stale_updates"] == sampler.stale_updates
        assert repr(sampler)
        assert repr(buffer)
        buffer.stats()
        buffer.can_sample(8)

    yield "extend", lambda buffer: buffer.extend(data(12, ndim=ndim))
    yield "settings", settings
    if kind not in ("sampler", "slices"):  # TorchRL rounds the priority to the default dtype
        yield "add", lambda buffer: buffer.add(data(1)[0] if ndim == 1 else data(1, ndim=2)[:, 0])
    yield "update", lambda buffer: update(buffer, kind)
    yield "views", views
    yield (
        "set",
        lambda buffer: buffer.update_priority(torch.arange(3), torch.tensor([3.0, 0.5, 2.0])),
    )
    yield "one", lambda buffer: buffer.update_priority(0, 2.5)
    yield "numbers", lambda buffer: buffer.update_priority([0, 1], [1, 2])
    yield "mark", lambda buffer: buffer.sampler.mark_update(torch.arange(3))
    yield "state", state
    yield "dump", lambda buffer: buffer.dumps(folder)
    yield "over", lambda buffer: buffer.extend(data(14, 12, ndim=ndim))
    yield "load", lambda buffer: buffer.load_state_dict(held["state"])
    yield "again", lambda buffer: update(buffer, kind)
    yield "loads", lambda buffer: buffer.loads(folder)
    yield "sampler", lambda buffer: buffer.sampler.load_state_dict(held["sampler"])
    yield "full", lambda buffer: buffer.extend(data(16, 30, ndim=ndim))
    yield "around", lambda buffer: update(buffer, kind)
    if kind not in ("sampler", "slices"):
        yield (
            "storage",
            lambda buffer: buffer.set_storage(
                type(buffer.storage)(buffer.storage.max_size, ndim=ndim)
            ),
        )
        yield "refill", lambda buffer: buffer.extend(data(16, 50, ndim=ndim))
        if "slices" not in kind:
            yield (
                "other",
                lambda buffer: buffer.set_sampler(
                    PrioritizedSampler(buffer.storage.max_size, 0.5, 0.5)
                ),
            )
            yield "drawn", lambda buffer: update(buffer, kind)
    yield "empty", lambda buffer: buffer.empty()
    yield "after", lambda buffer: buffer.extend(data(9, 70, ndim=ndim))
    yield "last", lambda buffer: update(buffer, kind)
    yield "valid", lambda buffer: buffer.sampler.check_valid()


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class Modes:
    """Which steps run in which mode; None is the usual one."""

    def __init__(self, name):
        self.name = name

    def __call__(self, step):
        """The mode of step number `step`; 0 makes the buffer."""
        name = self.name
        if name in ("float64", "bfloat16", "float16"):
            return default_dtype(getattr(torch, name))
        inside = {
            "usual": False,
            "inference": True,
            "made": step == 0,
            "made and filled": step <= 1,
            "first write": step == 1,
            "in turn": step % 2 == 0,
            "in turn, too": step % 2 == 1,
        }[name]
        return torch.inference_mode(inside) if inside else contextlib.nullcontext()


def run(kind, mode, folder):
    """The priorities and the storage after every step."""
    torch.manual_seed(3)
    modes, seen = Modes(mode), {}
    with modes(0):
        buffer = make(kind)
    for k, (name, step) in enumerate(steps(kind, folder), 1):
        with modes(k):
            step(buffer)
        sampler = buffer.sampler
        seen[name] = sampler.priority.tolist(), sampler.stale_updates, len(buffer)
    for tensor in vars(sampler._table.trees.block)["views"].values():
        assert not tensor.is_inference()
    return seen


NAMES = ["float64", "bfloat16", "float16", "inference", "made", "made and filled", "first write"]
NAMES += ["in turn", "in turn, too"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("mode", "choice"), few_of_all(NAMES, CHOICES), indirect=["choice"])
@pytest.mark.filterwarnings("ignore:Loading the storage on an uninitialized")
def test_every_method_works_the_same_in_every_mode(choice, kind, mode, tmp_path):
    """The same draws and priorities: nothing is made without a dtype."""
    if kind in ("sampler", "slices") and mode not in ("usual", "float64", "bfloat16", "float16"):
        mode = {"made and filled": "made", "first write": "made", "in turn": "made"}.get(mode, mode)
        if mode == "in turn, too":
            mode = "inference"  # the storage, and its memory, are TorchRL's
    expected = run(kind, "usual", tmp_path / "usual")
    found = run(kind, mode, tmp_path / "mode")
    assert found == expected


@pytest.mark.parametrize("collate", [None, lambda batch: batch])
def test_memory_that_torchrl_made_in_an_inference_mode_is_refused_by_name(choice, collate):
    storage = LazyTensorStorage(8)
    with torch.inference_mode():
        TensorDictReplayBuffer(storage=storage).extend(data(8))
    buffer = TensorDictPrioritizedReplayBuffer(
        alpha=0.5, beta=0.5, storage=storage, batch_size=4, collate_fn=collate
    )
    before = buffer.sampler.priority
    for write in (lambda: buffer.extend(data(3)), lambda: buffer.add(data(1)[0])):
        cursor, count = buffer.writer._cursor, buffer.write_count
        with pytest.raises(ConfigurationError, match="storage: expected memory made outside"):
            write()
        assert (buffer.writer._cursor, buffer.write_count) == (cursor, count)
        assert torch.equal(buffer.sampler.priority, before)
    batch = buffer.sample()
    batch["td_error"] = torch.ones(4)
    buffer.update_tensordict_priority(batch)
    with torch.inference_mode():
        buffer.extend(data(3))


def test_a_setter_that_fails_changes_nothing(choice, monkeypatch):
    buffer = make("short")
    buffer.extend(data(16))
    update(buffer, "short")
    sampler, copied = buffer.sampler, copy.deepcopy(buffer.sampler)

    def fail(trees):
        raise MemoryError

    monkeypatch.setattr(sampler._table.distribution, "all_masses", fail)
    with pytest.raises(MemoryError):
        sampler.alpha = 0.0
    assert sampler.alpha == copied.alpha
    assert torch.equal(sampler.mass, copied.mass)
    sampler.check_valid()

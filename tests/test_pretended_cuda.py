"""Every public operation on a pretended CUDA device, which raises where the host would wait.

What may wait does so by nature, and has tests of its own: making a buffer, which copies small
tables to the device, and what gives numbers to the host.
"""

import itertools
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from tensordict import TensorDict

from per_td import (
    ConfigurationError,
    LinearSchedule,
    NStepWriter,
    PrioritizedReplayBuffer,
    SumTree,
    TransitionReplayBuffer,
    kernels,
    validation,
)
from per_td.draws import DRAWS, METHODS
from per_td.kernels import reference
from per_td.priorities.table import NEW_PRIORITIES
from per_td.weights import NORMALIZATIONS
from tests.support.parameters import few_of_all, slow_but
from tests.support.pretended_cuda import WAITS, HostWaitError, MixedDevicesError

CAPACITY, B, S = 20, 8, 3

WAYS = [way for way in itertools.product(DRAWS, METHODS) if way != ("stratified", "multinomial")]
TOLD = [way for way in WAYS if way[1] != "auto"]


def make(pretended, capacity=CAPACITY, **settings):
    with pretended.copies():
        return PrioritizedReplayBuffer(capacity, B, device="cuda", **settings)


def rows(n, device="cuda:0"):
    """`n` transitions that need not be copied."""
    k = torch.arange(n, device=device)
    return TensorDict(
        {"x": torch.zeros(n, 3, device=device), "next": {"done": k % 3 == 0}},
        batch_size=[n],
        device=device,
    )


def rows_each(n, device="cuda:0"):
    return TensorDict(
        {"x": torch.zeros(S, n, 3, device=device), "k": torch.zeros(S, n, device=device).long()},
        batch_size=[S, n],
        device=device,
    )


def leaves(transitions):
    return {
        key if isinstance(key, tuple) else (key,): leaf
        for key, leaf in transitions.items(True, True)
    }


def on_device(pretended, tree):
    """Whether all tensors in a nest are on the pretended device."""
    tensors = [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if torch.is_tensor(leaf)]
    return tensors and {tensor.device for tensor in tensors} == {pretended.device}


def learn(buffer, batch, shape=(B,), device="cuda:0"):
    buffer.update_priority(batch["index"], torch.ones(shape, device=device), batch["generation"])


@pytest.mark.parametrize(
    ("way", "normalization", "new_priority"), few_of_all(WAYS, NORMALIZATIONS, NEW_PRIORITIES)
)
def test_no_way_to_draw_weigh_and_update_waits(way, normalization, new_priority, pretended):
    draw, method = way
    buffer = make(
        pretended,
        draw=draw,
        method=method,
        weight_normalization=normalization,
        new_priority=new_priority,
    )
    buffer.extend(rows(CAPACITY - 1))
    buffer.extend(rows(4), torch.ones(4, device="cuda"))
    batch = buffer.sample()
    assert on_device(pretended, batch.to_dict())
    assert batch["index"].shape == batch["priority_weight"].shape == (B,)
    learn(buffer, batch)


@pytest.mark.parametrize(("draw", "method"), WAYS)
def test_ranks_are_sorted_without_waiting(draw, method, pretended):
    buffer = make(pretended, draw=draw, method=method, prioritization="rank", sort_interval=3)
    buffer.extend(rows(4))
    buffer.extend(rows(CAPACITY))
    learn(buffer, buffer.sample())
    buffer.alpha = 0.3


@pytest.mark.parametrize("prioritization", ["proportional", "rank"])
@pytest.mark.parametrize("capacity", [CAPACITY, 5000])
def test_no_public_operation_waits(capacity, prioritization, pretended):
    buffer = make(pretended, capacity, prioritization=prioritization, beta_increment=0.1)
    assert on_device(pretended, buffer.diagnostics())  # of an empty one
    assert len(buffer.extend(rows(15))) == 15
    assert buffer.extend(rows(CAPACITY), torch.ones(CAPACITY, device="cuda")).is_cuda
    assert buffer.extend(rows(2 * CAPACITY)).is_cuda  # more than fit in the small one
    assert buffer.add(rows(1)[0]).is_cuda
    assert buffer.add(rows(1)[0], priority=torch.ones(1, device="cuda")).is_cuda
    assert buffer.extend_leaves(leaves(rows(5))).is_cuda
    assert len(buffer) == min(capacity, 82)
    batch = buffer.sample()
    assert buffer.sample(3).shape == (3,)
    assert on_device(pretended, buffer.sample_leaves())
    buffer.update_priority(batch["index"], torch.ones(B, 1, device="cuda", requires_grad=True))
    learn(buffer, batch)
    batch["td_error"] = torch.ones(B, dtype=torch.float64, device="cuda")
    buffer.update_tensordict_priority(batch)
    buffer.increase_beta()
    buffer.beta, buffer.alpha, buffer.eps = 0.5, 0.9, 0.01
    assert (buffer.alpha, buffer.eps) == (0.9, 0.01)
    assert on_device(pretended, buffer.diagnostics())
    assert on_device(pretended, buffer.state_dict())
    assert on_device(pretended, [buffer.priority, buffer.lengths, buffer.transitions.to_dict()])
    assert buffer.write_count == 82


@pytest.mark.parametrize("layout", ["columns", "records"])
def test_no_layout_waits(layout, pretended):
    buffer = make(pretended, layout=layout)
    buffer.extend(rows(15))
    buffer.extend(rows(15))
    assert on_device(pretended, buffer.sample().to_dict())


def test_memory_allocated_at_once_is_on_the_device(pretended):
    buffer = make(pretended, example=rows(1, "cpu")[0])
    assert buffer.transitions.device == pretended.device
    buffer.extend(rows(3))


def test_what_comes_from_the_host_is_copied_without_waiting(pretended):
    buffer = make(pretended)
    host = {"device": "cpu"}
    assert buffer.extend(rows(5, **host), torch.ones(5, **host)).is_cuda
    assert buffer.extend(rows(5, **host), [1.0, 2, 3, 4, 5]).is_cuda
    assert buffer.extend(rows(5), np.ones(5)).is_cuda
    assert buffer.add(rows(1, **host)[0], 2.0).is_cuda
    assert buffer.extend_leaves(leaves(rows(5, **host))).is_cuda
    batch = buffer.sample()
    buffer.update_priority(torch.arange(B), torch.ones(B), torch.zeros(B).long())
    buffer.update_priority(batch["index"], torch.ones(B), batch["generation"])
    buffer.update_priority(torch.arange(B), torch.ones(B, device="cuda"))
    buffer.update_priority(np.arange(B), np.ones(B), np.zeros(B, np.int64))
    buffer.update_priority([1, 2], [0.5, 0.5], [0, 0])
    buffer.update_priority(3, 0.5)
    buffer.update_tensordict_priority({"index": [1, 2], "td_error": [1.0, 2.0]})
    assert on_device(pretended, buffer.diagnostics())


def test_a_default_device_of_cuda_makes_a_buffer_there(pretended):
    with torch.device("cuda"):
        with pretended.copies():
            buffer = PrioritizedReplayBuffer(CAPACITY, B)
        buffer.extend(rows(5))
        learn(buffer, buffer.sample())
    assert buffer.device == pretended.device


@pytest.mark.parametrize(("way", "normalization"), few_of_all(TOLD, NORMALIZATIONS))
def test_many_buffers_never_wait(way, normalization, pretended):
    draw, method = way
    buffers = make(
        pretended, num_buffers=S, draw=draw, method=method, weight_normalization=normalization
    )
    running = torch.ones(S, 8, dtype=torch.bool, device="cuda")
    assert buffers.extend(rows_each(15)).shape == (S, 15)
    buffers.extend(rows_each(8), mask=running)
    batch = buffers.sample()
    assert on_device(pretended, batch.to_dict())
    assert batch.shape == (S, B)
    learn(buffers, batch, (S, B))
    buffers.update_priority(
        batch["index"], torch.ones(S, B, device="cuda"), batch["generation"], mask=running
    )


def set_each(buffers):
    """Give each buffer an alpha and a beta of its own, and read them, which does not wait."""
    buffers.alpha, buffers.beta = [0.9, 0.0, 0.4], [0.4, 1.0, 0.8]
    assert buffers.alpha.is_cuda
    assert buffers.beta.is_cuda
    assert buffers.alpha.shape == buffers.beta.shape == (S,)


@pytest.mark.parametrize(("way", "normalization"), few_of_all(TOLD, NORMALIZATIONS))
def test_many_buffers_whose_settings_differ_never_wait(way, normalization, pretended):
    draw, method = way
    buffers = make(
        pretended,
        num_buffers=S,
        draw=draw,
        method=method,
        weight_normalization=normalization,
        alpha=[0.5] * S,
        beta=[0.5] * S,
        beta_increment=0.1,
    )
    running = torch.ones(S, 8, dtype=torch.bool, device="cuda")
    for _ in range(2):
        buffers.extend(rows_each(15))
        buffers.extend(rows_each(8), mask=running)
        batch = buffers.sample()
        assert on_device(pretended, batch.to_dict())
        learn(buffers, batch, (S, B))
        set_each(buffers)
        buffers.increase_beta()
    buffers.alpha = buffers.beta = 0.5
    learn(buffers, buffers.sample(), (S, B))


@pytest.mark.parametrize("new_priority", NEW_PRIORITIES)
@pytest.mark.parametrize("device", ["cuda:0", "cpu"])
def test_no_public_operation_of_many_buffers_waits(device, new_priority, pretended):
    buffers = make(pretended, num_buffers=S, new_priority=new_priority, beta_increment=0.1)
    running = torch.ones(S, B, dtype=torch.bool, device=device)
    priority = torch.ones(S, B, device=device)
    for mask in (None, running):
        buffers.extend(rows_each(B, device), mask=mask)
        buffers.extend(rows_each(B, device), priority, mask)
        one = None if mask is None else mask[:, 0]
        assert buffers.add(rows_each(1, device)[:, 0], mask=one).is_cuda
        assert buffers.add(rows_each(1, device)[:, 0], priority[:, 0], one).is_cuda
    assert buffers.extend_leaves(leaves(rows_each(5, device))).is_cuda
    assert on_device(pretended, buffers.sample_leaves())
    index = torch.zeros(S, B, dtype=torch.int64, device=device)
    buffers.update_priority(index, priority)
    buffers.update_priority(index, priority, index)
    buffers.update_priority(index, priority, index, running)
    buffers.update_tensordict_priority({"index": index, "td_error": priority})
    buffers.increase_beta()
    buffers.beta, buffers.alpha, buffers.eps = 0.5, 0.9, 0.01
    assert on_device(pretended, [buffers.priority, buffers.lengths, buffers.transitions.to_dict()])


@pytest.mark.parametrize("prioritization", ["proportional", "rank"])
@pytest.mark.parametrize("draw", DRAWS)
def test_the_buffer_of_courses_never_waits(draw, prioritization, pretended):
    with pretended.copies():
        buffer = TransitionReplayBuffer(
            CAPACITY, draw=draw, prioritization=prioritization, device="cuda"
        )
    state = torch.zeros(4, device="cuda")
    flag = torch.zeros((), dtype=torch.bool, device="cuda")
    buffer.push([0.0] * 4, 1, 1.0, [0.0] * 4, False)
    buffer.push(np.zeros(4), np.int64(1), np.float32(1), np.zeros(4, np.float32), np.True_)
    for _ in range(B):
        buffer.push(state, flag.long(), flag.float(), state, flag)
    states, flags = state.expand(3, 4), flag.expand(3)
    buffer.push(states, flags.long(), flags.float(), states, flags)
    buffer.push(np.zeros((3, 4)), np.zeros(3, int), np.zeros(3), np.zeros((3, 4)), [False] * 3)
    *batch, index, weight = buffer.sample(B)
    assert on_device(pretended, [batch, index, weight])
    buffer.update_priorities(index, weight)
    buffer.update_priorities(torch.arange(B), torch.ones(B))
    buffer.increase_beta()
    assert len(buffer) == len(buffer.priority) == 8 + B


def test_the_buffer_of_courses_never_waits_with_continuous_actions(pretended):
    with pretended.copies():
        buffer = TransitionReplayBuffer(CAPACITY, device="cuda")
    action = torch.zeros(3, 2, device="cuda")
    buffer.push([0.0] * 4, [0.0, 1.0], 1.0, [0.0] * 4, False)
    buffer.push(np.zeros((3, 4)), action, np.zeros(3), np.zeros((3, 4)), [False] * 3)
    assert on_device(pretended, [*buffer.sample(B)])
    assert len(buffer) == 4


@pytest.mark.parametrize("num_trees", [None, S])
@pytest.mark.parametrize("capacity", [5, 1000])
def test_trees_never_wait(capacity, num_trees, pretended):
    with pretended.copies():
        tree = SumTree(capacity, "cuda", num_trees=num_trees)
    each = () if num_trees is None else (S,)
    index = torch.zeros(*each, 4, dtype=torch.int64, device="cuda")
    tree.update(index, index.float())
    tree.update(torch.zeros(*each, 4).long(), torch.ones(*each, 4))
    tree.update(np.zeros((*each, 4), np.int64), np.ones((*each, 4)))
    drawn = [tree.sample(4, draw=draw) for draw in DRAWS]
    found = tree.find(torch.zeros(*each, 4, dtype=torch.float64, device="cuda"))
    assert on_device(pretended, [drawn, found, tree.total, tree[1], tree[:3]])
    assert {tuple(index.shape) for index in (*drawn, found)} == {(*each, 4)}
    if num_trees is None:
        tree.fill(torch.ones(capacity, device="cuda"))
        assert on_device(pretended, tree[index])


# --- with kernels -----------------------------------------------------------------------------


class _Launch:
    """Stands for a kernel, and takes what it could read: contiguous tensors on the device."""

    count = 0

    def __getitem__(self, grid):
        return self

    def __call__(self, *args, **constants):
        flat = [part for each in args for part in (each if isinstance(each, tuple) else (each,))]
        for tensor in filter(torch.is_tensor, flat):
            assert (tensor.device.type, tensor.is_contiguous()) == ("cuda", True)
        _Launch.count += 1


@pytest.fixture
def launched(pretended, monkeypatch):
    """The pretended device, with the operations of CUDA, whose kernels are counted."""
    pytest.importorskip("triton", reason="triton is not installed")
    from per_td.kernels.cuda import draw, launches, update

    for module in (draw, update):
        for name in ("_walk", "_weigh", "_level", "_top", "_claim", "_settle"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, _Launch())
    monkeypatch.setattr(kernels, "operations", lambda device, **settings: launches)
    monkeypatch.setattr(_Launch, "count", 0)
    return pretended


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("draw", DRAWS)
def test_launches_do_not_wait(draw, normalization, launched):
    buffer = make(launched, draw=draw, weight_normalization=normalization)
    buffer.extend(rows(CAPACITY - 1))
    buffer.extend(rows(4), torch.ones(4, device="cuda"))
    buffer.add(rows(1)[0])
    before = _Launch.count
    batch = buffer.sample()
    assert on_device(launched, batch.to_dict())
    learn(buffer, batch)
    buffer.update_priority(batch["index"], torch.ones(B, device="cuda"))
    buffer.beta, buffer.alpha = 0.5, 0.9
    learn(buffer, buffer.sample(), device="cpu")
    assert _Launch.count > before


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("draw", DRAWS)
def test_launches_for_many_buffers_do_not_wait(draw, normalization, launched):
    buffers = make(launched, num_buffers=S, draw=draw, weight_normalization=normalization)
    running = torch.ones(S, 8, dtype=torch.bool, device="cuda")
    buffers.extend(rows_each(15))
    buffers.extend(rows_each(8), torch.ones(S, 8, device="cuda"), running)
    buffers.add(rows_each(1)[:, 0], mask=running[:, 0])
    batch = buffers.sample()
    assert on_device(launched, batch.to_dict())
    learn(buffers, batch, (S, B))
    buffers.update_priority(
        batch["index"], torch.ones(S, B, device="cuda"), batch["generation"], mask=running
    )
    assert _Launch.count > 0


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("draw", DRAWS)
def test_launches_for_many_buffers_whose_settings_differ_do_not_wait(draw, normalization, launched):
    buffers = make(launched, num_buffers=S, draw=draw, weight_normalization=normalization)
    set_each(buffers)
    buffers.extend(rows_each(15))
    learn(buffers, buffers.sample(), (S, B))
    set_each(buffers)
    learn(buffers, buffers.sample(), (S, B))
    assert _Launch.count > 0


@pytest.mark.parametrize("num_trees", [None, S])
def test_launches_for_trees_do_not_wait(num_trees, launched):
    with launched.copies():
        tree = SumTree(1000, "cuda", num_trees=num_trees)
    each = () if num_trees is None else (S,)
    tree.update(torch.zeros(*each, 4).long(), torch.ones(*each, 4))
    found = tree.find(torch.zeros(*each, 4, dtype=torch.float64, device="cuda"))
    drawn = [tree.sample(4, draw=draw) for draw in DRAWS]
    assert {tuple(index.shape) for index in (*drawn, found)} == {(*each, 4)}
    assert _Launch.count > 0


# --- what waits by nature -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "read",
    [
        lambda buffer: buffer.stats(),
        lambda buffer: buffer.beta,
        lambda buffer: repr(buffer),
    ],
    ids=["stats", "beta", "repr"],
)
@pytest.mark.parametrize("num_buffers", [None, S])
def test_numbers_for_the_host_are_read_back(read, num_buffers, pretended):
    buffer = make(pretended, num_buffers=num_buffers)
    with pytest.raises(WAITS):
        read(buffer)


@pytest.mark.parametrize(
    "read",
    [len, lambda buffers: buffers.write_count, lambda buffers: buffers.state_dict()],
    ids=["len", "write_count", "state_dict"],
)
def test_how_far_many_buffers_are_filled_is_read_back(read, pretended):
    buffers = make(pretended, num_buffers=S)
    buffers.extend(rows_each(5))
    with pytest.raises(WAITS):
        read(buffers)


def test_what_the_device_cannot_do_is_refused_as_anywhere(pretended):
    with pytest.raises(ConfigurationError, match="multinomial"):
        make(pretended, draw="stratified", method="multinomial")
    with pytest.raises(ConfigurationError, match="replayed"):
        make(pretended, num_buffers=S).replayed  # noqa: B018


@pytest.mark.parametrize("num_buffers", [None, 1, S])
def test_figures_of_mixtures_counts_and_many_buffers_do_not_wait(num_buffers, pretended):
    settings = {"num_buffers": num_buffers, "uniform_mix": 0.2, "track_draws": True}
    buffer = make(pretended, **settings)
    assert on_device(pretended, buffer.diagnostics())  # of an empty one
    lead = () if num_buffers is None else (num_buffers,)
    x = torch.zeros(*lead, 5, device="cuda")
    buffer.extend(TensorDict({"x": x}, [*lead, 5]))
    buffer.sample()
    got = buffer.diagnostics()
    assert on_device(pretended, got)
    assert got["draw_count/max"].shape == got["size"].shape == lead


# --- the pretended device itself ------------------------------------------------------------------


@pytest.fixture
def filled(pretended):
    buffer = make(pretended)
    buffer.extend(rows(CAPACITY))
    return buffer


def test_a_value_read_back_in_a_draw_raises(filled, monkeypatch):
    mark = reference.mark_replayed

    def reading(trees, index):
        trees.total.item()
        mark(trees, index)

    filled.sample()
    monkeypatch.setattr(reference, "mark_replayed", reading)
    with pytest.raises(WAITS):
        filled.sample()


def test_a_tensor_of_the_host_in_a_draw_raises(filled, monkeypatch):
    weigh = reference.importance_weights

    def mixing(mass, *args, **settings):
        return weigh(mass, *args, **settings) * torch.ones(mass.shape)

    monkeypatch.setattr(reference, "importance_weights", mixing)
    with pytest.raises(MixedDevicesError):
        filled.sample()


def test_a_copy_that_waits_raises(filled, monkeypatch):
    monkeypatch.setattr(validation, "to_device", lambda tensor, device: tensor.to(device))
    with pytest.raises(HostWaitError):
        filled.update_priority(torch.arange(B), torch.ones(B))


def _column():
    return torch.zeros(5, device="cuda")


@pytest.mark.parametrize(
    "wait",
    [
        lambda a, i: a[0].item(),
        lambda a, i: bool(a[0] > 0),
        lambda a, i: int(i[0]),
        lambda a, i: float(a[0]),
        lambda a, i: f"{a[0]}",
        lambda a, i: a.tolist(),
        lambda a, i: 1.0 in a,
        lambda a, i: a.cpu(),
        lambda a, i: a.to("cpu"),
        lambda a, i: torch.zeros(5).copy_(a),
        lambda a, i: a.copy_(torch.zeros(5)),
        lambda a, i: a.__setitem__(slice(2), torch.zeros(2)),
        lambda a, i: torch.zeros(5).to("cuda"),
        lambda a, i: torch.zeros(5).cuda(),
        lambda a, i: torch.tensor([1.0, 2.0], device="cuda"),
        lambda a, i: torch.as_tensor([1.0, 2.0], device="cuda"),
        lambda a, i: torch.as_tensor(torch.zeros(5), device="cuda"),
        lambda a, i: torch.unravel_index(i, (5, 5)),
        lambda a, i: a.nonzero(),
        lambda a, i: a[a > 0],
        lambda a, i: a.masked_select(a > 0),
        lambda a, i: a.__setitem__(a > 0, torch.zeros(3, device="cuda")),
        lambda a, i: a[[0, 1]],
        lambda a, i: a[i[0]],
        lambda a, i: a[: i[0]],
        lambda a, i: i.unique(),
        lambda a, i: i.bincount(),
        lambda a, i: i.repeat_interleave(i),
        lambda a, i: torch.equal(a, a),
        lambda a, i: torch.allclose(a, a),
    ],
)
def test_whatever_waits_raises(wait, pretended):
    with pytest.raises(WAITS):
        wait(_column(), torch.zeros(3, dtype=torch.int64, device="cuda"))


@pytest.mark.parametrize(
    "mix",
    [
        lambda a: a + torch.zeros(5),
        lambda a: a.add_(torch.zeros(5)),
        lambda a: torch.where(a > 0, a, torch.zeros(5)),
        lambda a: torch.cat([a, torch.zeros(5)]),
        lambda a: a[torch.zeros(2).long()],
        lambda a: a.index_select(0, torch.zeros(2).long()),
        lambda a: a.index_fill_(0, torch.zeros(2).long(), 1.0),
        lambda a: a.__setitem__(torch.zeros(2).long(), 1.0),
        lambda a: a.__setitem__(torch.zeros(2, device="cuda").long(), torch.zeros(2)),
        lambda a: torch.searchsorted(a, torch.zeros(2)),
    ],
)
def test_whatever_mixes_devices_raises(mix, pretended):
    with pytest.raises(MixedDevicesError):
        mix(_column())


@pytest.mark.parametrize(
    "work",
    [
        lambda a: a[1:3],
        lambda a: a[-1],
        lambda a: a[..., None, ::2],
        lambda a: a.__setitem__(slice(2), 1.0),
        lambda a: a.__setitem__(a > 0, 1.0),
        lambda a: a.__setitem__(torch.zeros(2, device="cuda").long(), 1.0),
        lambda a: ~(a > 0),
        lambda a: a[::2].contiguous(),
        lambda a: a.copy_(torch.zeros(5), non_blocking=True),
        lambda a: torch.zeros(5).to("cuda", non_blocking=True),
        lambda a: a + torch.ones(()),  # a number of the host's is an argument of the kernel
        lambda a: a.to(torch.float64),
        lambda a: len(a),
        lambda a: repr(a),
    ],
)
def test_what_does_not_wait_passes(work, pretended):
    work(_column())


def test_indexing_gives_the_shapes_that_torch_gives(pretended):
    keys = (
        1,
        -1,
        slice(1, 3),
        (slice(None), 2),
        (..., 0),
        (..., None, slice(1)),
        (None, 1, ..., slice(None, None, 2)),
        (slice(None), torch.zeros(2).long()),
        (torch.zeros(2).long(), slice(1), torch.zeros(2).long()),
        (0, torch.zeros(2, 2).long()),
    )
    host, device = torch.zeros(3, 4, 5), torch.zeros(3, 4, 5, device="cuda")

    def there(key):
        return key.to("cuda") if isinstance(key, torch.Tensor) else key

    for key in keys:
        with pretended.copies():
            moved = tuple(map(there, key)) if isinstance(key, tuple) else key
        assert device[moved].shape == host[key].shape, key
        assert device[moved].is_cuda


def test_nothing_is_pretended_any_more_after_a_block(monkeypatch):
    from tests.support.pretended_cuda import pretended_cuda

    before = torch.cuda._lazy_init, torch.cuda.current_device
    with pytest.raises(ZeroDivisionError), pretended_cuda() as pretended, pretended.copies():
        raise ZeroDivisionError
    assert (torch.cuda._lazy_init, torch.cuda.current_device) == before
    assert torch.zeros(2)[0].item() == 0
    assert not pretended.may_copy


@pytest.mark.parametrize("prioritized", [False, True])
@pytest.mark.parametrize("autoreset", ["same_step", "next_step"])
def test_n_steps_for_a_buffer_of_each_environment_never_wait(autoreset, prioritized, pretended):
    buffers = make(pretended, num_buffers=S)
    with pretended.copies():
        writer = NStepWriter(buffers, 3, 0.9, S, autoreset=autoreset)
    given = {"priority": torch.ones(S, device="cuda")} if prioritized else {}
    for k in range(4):
        flags = torch.rand(2, S, device="cuda") < 0.5
        ahead = {"observation": torch.rand(S, 4, device="cuda")}
        ahead |= {"reward": torch.rand(S, device="cuda")}
        ahead |= {"terminated": flags[0], "truncated": flags[1]}
        step = {"observation": torch.rand(S, 4, device="cuda"), "next": ahead}
        mask = None if k % 2 else torch.ones(S, dtype=torch.bool, device="cuda")
        with pretended.copies() if k == 0 else nullcontext():  # memory, and powers of gamma
            writer.add(step, mask=mask, **given)
    writer.flush()
    assert on_device(pretended, [writer.pending, buffers.transitions.to_dict()])


def test_n_steps_for_one_buffer_wait_to_find_those_that_are_finished(pretended):
    writer = NStepWriter(make(pretended), 1, 0.9, 2)
    flag = torch.zeros(2, dtype=torch.bool, device="cuda")
    ahead = {"x": torch.rand(2, device="cuda"), "reward": torch.rand(2, device="cuda")}
    step = {"x": torch.rand(2, device="cuda"), "next": ahead | {"terminated": flag, "done": flag}}
    with pytest.raises(WAITS), pretended.copies():
        writer.add(step)


# --- other ways to draw and to set priorities -----------------------------------------------------

KNOBS = [
    {"by": by, "newest": newest, "latest": latest, "uniform_mix": mix}
    for by, newest, latest, mix in itertools.product(
        ("priority", "uniform", "inverse"), (None, 5), (0, 3), (0.0, 0.4, 1.0)
    )
]


@pytest.mark.parametrize("every", slow_but([5], [5, 1]))
@pytest.mark.parametrize(("draw", "num_buffers"), few_of_all(DRAWS, [None, S]))
@pytest.mark.parametrize("normalization", slow_but(["buffer"], NORMALIZATIONS))
def test_no_other_way_to_draw_waits_and_nor_do_the_changes_that_it_follows(
    normalization, draw, num_buffers, every, pretended
):
    apart = draw == "without_replacement"
    settings = {"draw": draw, "weight_normalization": normalization, "num_buffers": num_buffers}
    buffer = make(pretended, track_draws=True, **settings)
    new = rows_each if num_buffers else rows
    shape = (S, B) if num_buffers else (B,)
    buffer.extend(new(CAPACITY - 1))
    with pretended.copies():  # memory of the trees on the side
        buffer.sample(by="uniform")
        buffer.sample(by="inverse")
    alone = [k for k in KNOBS if not (k["newest"] or k["latest"] or k["uniform_mix"])]
    for knobs in alone if apart else KNOBS[::every]:
        buffer.latest, buffer.uniform_mix = knobs["latest"], knobs["uniform_mix"]
        batch = buffer.sample(by=knobs["by"], newest=knobs["newest"])
        assert on_device(pretended, batch.to_dict())
        assert batch["draw_count"].shape == batch["priority_weight"].shape == shape
        learn(buffer, batch, shape)
        buffer.extend(new(3))
        buffer.extend(new(4), torch.ones(*shape[:-1], 4, device="cuda"))
    buffer.alpha = 0.9
    assert on_device(pretended, [buffer.draw_count])


@pytest.mark.parametrize(
    ("clip", "num_buffers", "device"),
    few_of_all([None, (0.5, None), (None, 2.0)], [None, S], ["cuda:0", "cpu"]),
)
def test_no_way_to_set_priorities_waits(clip, num_buffers, device, pretended):
    with pretended.copies():
        schedule = LinearSchedule(0.4, 1.0, 10)
    buffer = make(pretended, priority_clip=clip, num_buffers=num_buffers, beta_schedule=schedule)
    buffer.extend(rows_each(B) if num_buffers else rows(B))
    shape = (S, 4) if num_buffers else (4,)
    index = torch.zeros(shape, dtype=torch.int64, device=device)
    value = torch.ones(shape, device=device)
    masks = [None, value.bool()] if num_buffers else [None]
    for mask, generation in itertools.product(masks, (None, index)):
        buffer.set_priority(index, value, generation, mask)
        for mode, rate in (("set", 1.0), ("max", 0.5), ("mean", 0.1)):
            buffer.update_priority(index, value, generation, mask, mode, rate)


@pytest.mark.parametrize("by", ["priority", "uniform", "inverse"])
@pytest.mark.parametrize("num_buffers", [None, S])
def test_launches_of_other_ways_to_draw_do_not_wait(num_buffers, by, launched):
    buffer = make(launched, num_buffers=num_buffers, uniform_mix=0.5, latest=2)
    new = rows_each if num_buffers else rows
    buffer.extend(new(15))
    with launched.copies():
        buffer.sample(by=by)
    before = _Launch.count
    batch = buffer.sample(by=by, newest=9)
    index = batch["index"]
    buffer.set_priority(index, torch.ones(index.shape, device="cuda"), batch["generation"])
    buffer.update_priority(index, torch.ones(index.shape, device="cuda"), mode="max", rate=0.5)
    assert _Launch.count > before

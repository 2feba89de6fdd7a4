import sys

import pytest
import torch
from tensordict import TensorDict

from per_td import CheckpointError, PrioritizedReplayBuffer, SchemaError
from per_td.checkpoint import file as checkpoint
from tests.support.checkpoints import draws, same, used
from tests.support.oracle import data
from tests.support.processes import handed_over, shared, torn, transitions


@pytest.mark.parametrize(
    ("normalization", "new_priority"), [("batch", "buffer_max"), ("buffer", "ever_max")]
)
@pytest.mark.parametrize("draw", ["independent", "stratified", "without_replacement"])
def test_a_loaded_buffer_goes_on_as_the_saved_one_does(
    draw, normalization, new_priority, tmp_path, device
):
    generator = torch.Generator(device).manual_seed(3)
    buffer = used(
        device,
        generator,
        draw=draw,
        weight_normalization=normalization,
        new_priority=new_priority,
    )
    buffer.update_priority([0], [100.0])
    buffer.update_priority([0], [0.5])  # for the largest ever to differ from the largest
    buffer.save(tmp_path / "buffer.pt")
    loaded = PrioritizedReplayBuffer.load(tmp_path / "buffer.pt", device=device)
    same(buffer, loaded)
    assert buffer.extend(data(30, 3, device)).tolist() == loaded.extend(data(30, 3)).tolist()
    same(buffer, loaded)
    assert draws(buffer) == draws(loaded)
    same(buffer, loaded)


@pytest.mark.parametrize("own", [{}, {"priority_clip": (0.2, 0.3), "uniform_mix": 0.9}], ids=str)
def test_a_state_brings_its_mixture_and_its_bounds_of_priorities(own):
    settings = {"priority_clip": (0.5, 4.0), "uniform_mix": 0.5}
    buffer = used(generator=torch.Generator().manual_seed(3), **settings)
    other = PrioritizedReplayBuffer(20, 8, generator=torch.Generator(), **own)
    other.load_state_dict(buffer.state_dict())
    assert (other.uniform_mix, other.priority_clip) == (0.5, (0.5, 4.0))
    for each in (buffer, other):
        each.update_priority(torch.arange(3), torch.tensor([0.0, 1.0, 9.0]))
        assert each.priority[[0, 2]].tolist() == [0.5, 4.0]
    one, two = buffer.sample(64), other.sample(64)
    assert one["index"].tolist() == two["index"].tolist()
    assert torch.equal(one["priority_weight"], two["priority_weight"])
    assert draws(buffer) == draws(other)
    other.check_valid()

    plain = used()
    other.load_state_dict(plain.state_dict())
    assert (other.uniform_mix, other.priority_clip) == (0.0, None)
    for each in (plain, other):
        each.generator = torch.Generator().manual_seed(1)
    assert draws(plain) == draws(other)


def test_a_state_of_before_leaves_the_mixture_and_the_bounds_as_they_are():
    settings = {"priority_clip": (0.5, None), "uniform_mix": 0.5}
    other = PrioritizedReplayBuffer(20, **settings)
    state = used().state_dict()
    for name in settings:
        del state["settings"][name]
    other.load_state_dict(state)
    assert (other.uniform_mix, other.priority_clip) == (0.5, (0.5, None))
    other.sample(64)
    other.check_valid()


def test_a_mixture_that_a_buffer_cannot_draw_is_refused_and_changes_nothing():
    state = used(uniform_mix=0.5).state_dict()
    others = [PrioritizedReplayBuffer(20, draw="without_replacement")]
    if sys.platform.startswith("linux"):
        example = data(0, 1)[0]
        others.append(PrioritizedReplayBuffer(20, shared=True, example=example))
    for other in others:
        other.extend(data(0, 7))
        with pytest.raises(CheckpointError, match=r"settings: .*uniform_mix: expected"):
            other.load_state_dict(state)
        assert (len(other), other.uniform_mix, other.write_count) == (7, 0.0, 7)
        assert other.sample(5)["index"].max() < 7
        other.check_valid()


def test_the_torch_seed_fixes_the_draws_of_a_loaded_buffer_without_generator(tmp_path):
    buffer = used()
    buffer.save(tmp_path / "buffer.pt")
    loaded = PrioritizedReplayBuffer.load(tmp_path / "buffer.pt")
    torch.manual_seed(1)
    expected = draws(buffer)
    torch.manual_seed(1)
    assert draws(loaded) == expected


def test_a_state_is_a_snapshot_and_loads_into_a_used_buffer():
    buffer, other = used(), PrioritizedReplayBuffer(20)
    state = buffer.state_dict()
    expected = used()
    torch.manual_seed(0)
    draws(buffer)
    other.extend(data(100, 25))
    other.load_state_dict(state)
    assert (other.transitions == expected.transitions).all()
    assert other.priority.shape == expected.priority.shape
    assert other.stats()["written"] == 30
    assert other.stats()["stale_updates"] == state["stale_updates"].item()


def test_an_empty_buffer_can_be_saved(tmp_path):
    PrioritizedReplayBuffer(5, alpha=0.1).save(tmp_path / "empty.pt")
    loaded = PrioritizedReplayBuffer.load(tmp_path / "empty.pt")
    assert (len(loaded), loaded.alpha) == (0, 0.1)
    loaded.extend(data(0, 2))
    assert len(loaded) == 2


def test_a_state_holds_tensors_and_plain_values_only(tmp_path):
    torch.save(used(generator=torch.Generator()).state_dict(), tmp_path / "buffer.pt")
    state = torch.load(tmp_path / "buffer.pt", weights_only=True)
    assert state["version"] == 3


def test_states_with_something_else_are_not_written(tmp_path):
    with pytest.raises(CheckpointError, match="expected tensors and plain values to save, got set"):
        checkpoint.write(tmp_path / "x", {"a": {"b": {1, 2}}})
    assert list(tmp_path.iterdir()) == []


def test_states_that_do_not_fit_change_nothing():
    buffer = used()
    state = buffer.state_dict()
    small = PrioritizedReplayBuffer(5)
    small.extend(data(0, 3))
    for version in (4, 0, "1", None):
        with pytest.raises(CheckpointError, match=f"version 1 to 3, got version {version!r}"):
            small.load_state_dict({**state, "version": version})
    for other, found in (
        ({**state, "format": "another"}, "'another'"),
        ([state], "list"),
        ({}, ""),
    ):
        with pytest.raises(CheckpointError, match=f"expected the state of a .* got .*{found}"):
            small.load_state_dict(other)
    with pytest.raises(CheckpointError, match=r"priority: expected .* shape \[20\].*got .*\[19\]"):
        small.load_state_dict({**state, "priority": state["priority"][:19]})
    short = {**state["transitions"], "action": state["transitions"]["action"][:19]}
    with pytest.raises(
        CheckpointError, match=r"action.*expected shape \[20\] in the state, got \[19\]"
    ):
        small.load_state_dict({**state, "transitions": short})
    with pytest.raises(CheckpointError, match="expected the keys"):
        small.load_state_dict({k: v for k, v in state.items() if k != "priority"})
    other = PrioritizedReplayBuffer(20)
    other.extend(data(0, 3).exclude("action"))
    with pytest.raises(SchemaError, match="unknown: 'action'"):
        other.load_state_dict(state)
    assert len(small) == len(other) == 3
    assert small.priority.tolist() == [1, 1, 1]


@pytest.mark.parametrize("alpha", [0.6, 2.0])
@pytest.mark.parametrize("own", [True, False], ids=["generator", "torch's"])
def test_training_goes_on_from_a_file_exactly_as_without_the_break(own, alpha, tmp_path):
    n = 20_000

    def go_on(buffer, first):
        drawn = []
        for k in range(first, first + 30):
            batch = buffer.sample(64)
            drawn.append((batch["index"].tolist(), batch["priority_weight"].tolist()))
            td_error = (batch["action"] * 7919 % 1009 + k).sqrt()
            buffer.update_priority(batch["index"], td_error, batch["generation"])
            buffer.extend(data(n + 5 * k, 5))
            buffer.increase_beta()
        return drawn

    buffer = PrioritizedReplayBuffer(
        n, alpha=alpha, beta_increment=0.01, generator=torch.Generator() if own else None
    )
    buffer.extend(data(0, n + 77))
    buffer.update_priority(range(n), torch.rand(n) * 3)
    go_on(buffer, 0)
    buffer.save(tmp_path / "x")
    seed = torch.get_rng_state()  # torch's own generator is the user's to keep
    expected = go_on(buffer, 30)
    torch.manual_seed(99)
    if not own:
        torch.set_rng_state(seed)
    loaded = PrioritizedReplayBuffer.load(tmp_path / "x")
    assert go_on(loaded, 30) == expected
    same(buffer, loaded)


def test_masses_are_those_saved_to_the_last_bit(tmp_path):
    # of a square, the kernel's rounding and torch's differ for one priority in 20,000
    buffer = PrioritizedReplayBuffer(200_000, alpha=2.0)
    buffer.extend(data(0, 200_000).select("action"))
    buffer.update_priority(range(200_000), torch.randn(200_000).mul(8).exp())
    buffer.save(tmp_path / "x")
    loaded = PrioritizedReplayBuffer.load(tmp_path / "x")
    assert torch.equal(loaded.mass, buffer.mass)
    assert torch.equal(loaded.total_mass, buffer.total_mass)
    loaded.check_valid()


@pytest.mark.parametrize(
    ("path", "wrong"),
    [
        (("settings", "eps"), -1.0),
        (("settings", "eps"), torch.inf),
        (("settings", "beta_increment"), -0.5),
        (("settings", "beta_increment"), torch.nan),
        (("priority",), torch.full((20,), torch.inf)),
        (("priority",), torch.full((20,), -1.0)),
        (("mass",), torch.full((20,), -1.0)),
        (("ever_max",), torch.tensor(torch.inf)),
        (("stale_updates",), torch.tensor(-1)),
        (("write_count",), -1),
        (("generator",), torch.full((5056,), 255, dtype=torch.uint8)),
    ],
)
def test_a_state_with_values_that_no_buffer_has_changes_nothing(path, wrong):
    state = used(generator=torch.Generator()).state_dict()
    inner = state
    for key in path[:-1]:
        inner = inner[key]
    assert path[-1] in inner
    inner[path[-1]] = wrong
    buffer = PrioritizedReplayBuffer(20, generator=torch.Generator())
    buffer.extend(data(0, 3), torch.tensor([1.0, 2.0, 3.0]))
    with pytest.raises(CheckpointError, match=path[-1].split("_")[0]):
        buffer.load_state_dict(state)
    assert buffer.priority.tolist() == [1.0, 2.0, 3.0]
    assert buffer.transitions["action"].tolist() == data(0, 3)["action"].tolist()
    assert buffer.write_count == 3


KINDS = [
    {"layout": "columns"},
    {"layout": "records"},
    {"storage": "memmap"},
    {"prioritization": "rank"},
    {"num_buffers": 2},
    {"threads": True},
    {"prefetch": 2, "batch_size": 4},
    {"shared": True},
]


def allocated(**settings):
    """An empty buffer for `transitions`."""
    return PrioritizedReplayBuffer(20, example=transitions(0), **settings)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_file_is_read_into_a_buffer_that_there_is_already(kind, tmp_path):
    buffer, other = allocated(beta=0.5, **kind), allocated(alpha=0.9, **kind)
    rows = (2,) if buffer.num_buffers else ()
    for each, start in ((buffer, 0), (other, 100)):
        each.extend(transitions(torch.arange(start, start + 30).expand(*rows, 30)))
    buffer.save(tmp_path / "buffer.pt")
    memory = other.transitions["id"].data_ptr()
    other.restore(tmp_path / "buffer.pt")
    same(buffer, other)
    assert other.beta == 0.5
    assert other.transitions["id"].data_ptr() == memory  # others who see it see what was read
    with pytest.raises(FileNotFoundError):
        other.restore(tmp_path / "nothing.pt")
    (tmp_path / "damaged.pt").write_bytes((tmp_path / "buffer.pt").read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="truncated"):
        other.restore(tmp_path / "damaged.pt")
    same(buffer, other)


def test_a_process_sees_what_its_parent_reads_into_a_shared_buffer(tmp_path):
    saved, buffer = shared(20), shared(20)
    saved.extend(transitions(range(30)))
    saved.save(tmp_path / "buffer.pt")
    other = handed_over(buffer)
    buffer.restore(tmp_path / "buffer.pt")
    assert other.write_count == 30
    assert other.transitions["id"].sort().values.tolist() == list(range(10, 30))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_buffer_is_loaded_as_what_it_was(kind, tmp_path):
    buffer, rows = allocated(**kind), (2,) if "num_buffers" in kind else ()
    for n in (0, 30):
        buffer.extend(transitions(torch.arange(n).expand(*rows, n)))
        buffer.save(tmp_path / "buffer.pt")
        held = {name: kind[name] for name in kind if name in ("shared", "threads", "prefetch")}
        loaded = PrioritizedReplayBuffer.load(tmp_path / "buffer.pt", **held)
        same(buffer, loaded)


def test_a_loaded_shared_buffer_is_shared(tmp_path):
    buffer = shared(20)
    buffer.extend(transitions(range(30)))
    buffer.save(tmp_path / "buffer.pt")
    loaded = PrioritizedReplayBuffer.load(tmp_path / "buffer.pt", shared=True)
    other = handed_over(loaded)
    loaded.extend(transitions(range(30, 35)))
    assert other.write_count == 35
    assert (other.transitions == loaded.transitions).all()


def test_a_shared_buffer_cannot_be_made_of_a_file_that_knows_no_keys(tmp_path):
    PrioritizedReplayBuffer(20).save(tmp_path / "buffer.pt")
    buffer = shared(20)
    with pytest.raises(CheckpointError, match=r"with an example, and read the file with restore"):
        PrioritizedReplayBuffer.load(tmp_path / "buffer.pt", shared=True)
    buffer.restore(tmp_path / "buffer.pt")


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_an_allocated_and_empty_buffer_keeps_keys_and_shapes_when_it_is_saved(kind, tmp_path):
    buffer, rows = allocated(**kind), [2] if "num_buffers" in kind else []
    buffer.save(tmp_path / "buffer.pt")
    state = checkpoint.read(tmp_path / "buffer.pt")
    assert list(state["transitions"]["observation"].shape) == [*rows, 0, 4]
    taken = PrioritizedReplayBuffer(20, num_buffers=buffer.num_buffers)
    taken.load_state_dict(buffer.state_dict())
    loaded = [PrioritizedReplayBuffer.load(tmp_path / "buffer.pt", capacity=n) for n in (20, 7, 90)]
    for other in (*loaded, taken):
        assert len(other) == 0
        assert other.transitions["next", "reward"].dtype == torch.float64
        wrong = TensorDict({"x": torch.zeros(*rows, 3)}, [*rows, 3])
        with pytest.raises(SchemaError, match="expected the keys 'id', 'observation'"):
            other.extend(wrong)
        other.extend(transitions(torch.arange(5).expand(*rows, 5)))
        assert len(other) == 5
        assert torn(other.sample(20)) == 0


def test_states_that_know_no_keys_still_load():
    buffer = PrioritizedReplayBuffer(20, example=transitions(0))
    state = buffer.state_dict() | {"transitions": {}}  # as they were written before
    buffer.load_state_dict(state)
    assert buffer.transitions is not None
    other = PrioritizedReplayBuffer(20)
    other.load_state_dict(state)
    assert other.transitions is None

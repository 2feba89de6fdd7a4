"""Every public entry, given everything that it is not made for: it works, or nothing changes."""

import warnings
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from tensordict import TensorDict

from per_td import (
    CheckpointError,
    LinearSchedule,
    PrioritizedReplayBuffer,
    PriorityError,
    SchemaError,
    SumTree,
    TransitionReplayBuffer,
    kernels,
)
from tests.support.fuzz import attempt, check_sound, fingerprint, hostile
from tests.support.oracle import data
from tests.support.parameters import slow_but

KERNELS = kernels.CHOICES
HUGE_YET_POSSIBLE = ("2**31",)
"""As a size: a machine may have the memory."""


def one(**given) -> PrioritizedReplayBuffer:
    buffer = PrioritizedReplayBuffer(5, 2, **given)
    buffer.extend(data(0, 7))
    return buffer


def ranked() -> PrioritizedReplayBuffer:
    return one(prioritization="rank", sort_interval=3)


def seeded() -> PrioritizedReplayBuffer:
    return one(generator=torch.Generator(), weight_normalization="buffer")


def mixed() -> PrioritizedReplayBuffer:
    """With all knobs."""
    buffer = one(
        uniform_mix=0.5,
        latest=1,
        priority_clip=(0.1, None),
        track_draws=True,
        beta_schedule=LinearSchedule(0.4, 1.0, 9),
    )
    buffer.sample(2, by="inverse")
    return buffer


def pair(start: int, n: int) -> TensorDict:
    return torch.stack([data(start, n), data(start + 50, n)])


def many() -> PrioritizedReplayBuffer:
    buffers = PrioritizedReplayBuffer(5, 2, num_buffers=2, weight_normalization="buffer")
    buffers.extend(pair(0, 3))
    return buffers


def tree() -> SumTree:
    tree = SumTree(5)
    tree.update([0, 1], [1.0, 2.0])
    return tree


def forest() -> SumTree:
    trees = SumTree(5, num_trees=2)
    trees.update([[0, 1]] * 2, [[1.0, 2.0]] * 2)
    return trees


def course() -> TransitionReplayBuffer:
    buffer = TransitionReplayBuffer(5)
    for _ in range(3):
        buffer.push([0.0, 1.0], 1, 1.0, [1.0, 0.0], False)
    return buffer


def with_leaf(value) -> TensorDict | None:
    """Two transitions, one of whose leaves is `value`; None where tensordict refuses to hold it."""
    rest = data(9, 2).exclude("observation").to_dict()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return TensorDict({**rest, "observation": value}, [2])
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return None


def push(buffer: TransitionReplayBuffer, **changed) -> None:
    usual = {"state": [0.0, 1.0], "action": 1, "reward": 1.0, "next_state": [1.0, 0.0]}
    buffer.push(**{**usual, "done": False, **changed})


def push_batch(buffer: TransitionReplayBuffer, **changed) -> None:
    usual = {"state": TWO, "action": [0, 1], "reward": [1.0, 2.0], "next_state": TWO}
    buffer.push(**{**usual, "done": [False, True], **changed})


def continuous() -> TransitionReplayBuffer:
    buffer = TransitionReplayBuffer(5)
    buffer.push(TWO, TWO, [0.0, 1.0], TWO, [False, True])
    return buffer


TABLES = (one, ranked, seeded)
TWO, INDEX = torch.ones(2, 2), [[0, 1], [0, 1]]


def stacks(n):
    """Transitions with stacks of two frames."""
    pixels = torch.arange(n * 16, dtype=torch.uint8).view(n, 2, 8)
    return {"pixels": pixels, "next": {"pixels": pixels + 8}, "k": torch.arange(n)}


def framed():
    buffer = PrioritizedReplayBuffer(5, 2, frames={"pixels": 2}, num_envs=2)
    buffer.extend(stacks(4))
    return buffer


ENTRIES = {
    "alpha": (TABLES, lambda b, v: setattr(b, "alpha", v)),
    "beta": (TABLES, lambda b, v: setattr(b, "beta", v)),
    "eps": (TABLES, lambda b, v: setattr(b, "eps", v)),
    "extend": ((one, many), lambda b, v: b.extend(v)),
    "extend, a leaf": ((one,), lambda b, v: b.extend(with_leaf(v))),
    "extend, the first leaf": (
        (lambda: PrioritizedReplayBuffer(5),),
        lambda b, v: b.extend(with_leaf(v)),
    ),
    "extend, priority": (TABLES, lambda b, v: b.extend(data(9, 2), v)),
    "extend, mask": ((one,), lambda b, v: b.extend(data(9, 2), None, v)),
    "add": ((one, many), lambda b, v: b.add(v)),
    "add, priority": (TABLES, lambda b, v: b.add(data(9, 1)[0], v)),
    "sample": ((*TABLES, many), lambda b, v: b.sample(v)),
    "sample, by": ((one, mixed, many), lambda b, v: b.sample(2, v)),
    "sample, newest": ((one, mixed, many), lambda b, v: b.sample(2, newest=v)),
    "sweep": ((one, many), lambda b, v: list(b.sweep(v))),
    "uniform_mix": ((one, mixed, many), lambda b, v: setattr(b, "uniform_mix", v)),
    "priority_clip": ((one, mixed), lambda b, v: setattr(b, "priority_clip", v)),
    "priority_clip, a bound": ((one,), lambda b, v: setattr(b, "priority_clip", (None, v))),
    "update_priority, mode": ((one,), lambda b, v: b.update_priority([0, 1], [1.0, 2.0], mode=v)),
    "update_priority, rate": (
        (one, mixed),
        lambda b, v: b.update_priority([0, 1], [1.0, 2.0], mode="mean", rate=v),
    ),
    "update_priority, clipped": ((mixed,), lambda b, v: b.update_priority([0, 1], v)),
    "update_priority, max": ((one,), lambda b, v: b.update_priority([0, 1], v, mode="max")),
    "set_priority, index": ((one, mixed), lambda b, v: b.set_priority(v, [1.0, 2.0])),
    "set_priority, priority": ((*TABLES, mixed), lambda b, v: b.set_priority([0, 1], v)),
    "set_priority, generation": ((one,), lambda b, v: b.set_priority([0, 1], [1.0, 2.0], v)),
    "set_priority, mask": ((one,), lambda b, v: b.set_priority([0], [1.0], None, v)),
    "many: set_priority, priority": ((many,), lambda b, v: b.set_priority(INDEX, v)),
    "many: set_priority, mask": ((many,), lambda b, v: b.set_priority(INDEX, TWO, None, v)),
    "many: update_priority, mean": (
        (many,),
        lambda b, v: b.update_priority(INDEX, v, mode="mean", rate=0.5),
    ),
    "update_priority, index": (TABLES, lambda b, v: b.update_priority(v, [1.0, 2.0])),
    "update_priority, td_error": (TABLES, lambda b, v: b.update_priority([0, 1], v)),
    "update_priority, generation": (TABLES, lambda b, v: b.update_priority([0, 1], [1.0, 2.0], v)),
    "update_priority, mask": ((one,), lambda b, v: b.update_priority([0], [1.0], None, v)),
    "update_tensordict_priority": ((one, many), lambda b, v: b.update_tensordict_priority(v)),
    "update_tensordict_priority, an entry": (
        (one,),
        lambda b, v: b.update_tensordict_priority({"index": [0, 1], "td_error": v}),
    ),
    "load_state_dict": ((one, many), lambda b, v: b.load_state_dict(v)),
    "many: alpha": ((many,), lambda b, v: setattr(b, "alpha", v)),
    "many: beta": ((many,), lambda b, v: setattr(b, "beta", v)),
    "many: extend, priority": ((many,), lambda b, v: b.extend(pair(9, 2), v)),
    "many: extend, mask": ((many,), lambda b, v: b.extend(pair(9, 2), None, v)),
    "many: add, priority": ((many,), lambda b, v: b.add(pair(9, 1)[:, 0], v)),
    "many: add, mask": ((many,), lambda b, v: b.add(pair(9, 1)[:, 0], None, v)),
    "many: update_priority, index": ((many,), lambda b, v: b.update_priority(v, TWO)),
    "many: update_priority, td_error": ((many,), lambda b, v: b.update_priority(INDEX, v)),
    "many: update_priority, generation": ((many,), lambda b, v: b.update_priority(INDEX, TWO, v)),
    "many: update_priority, mask": (
        (many,),
        lambda b, v: b.update_priority(INDEX, TWO, None, v),
    ),
    "frames: extend": ((framed,), lambda b, v: b.extend(v)),
    "frames: extend, a stack": ((framed,), lambda b, v: b.extend(stacks(2) | {"pixels": v})),
    "frames: extend, a next stack": (
        (framed, lambda: PrioritizedReplayBuffer(5, frames={"pixels": 2})),
        lambda b, v: b.extend(stacks(2) | {"next": {"pixels": v}}),
    ),
    "frames: extend, env": ((framed,), lambda b, v: b.extend(stacks(2), env=v)),
    "frames: add, env": (
        (framed,),
        lambda b, v: b.add(
            {"pixels": PIXELS, "next": {"pixels": PIXELS}, "k": torch.tensor(1)}, env=v
        ),
    ),
    "SumTree.update, index": ((tree,), lambda t, v: t.update(v, [1.0, 2.0])),
    "SumTree.update, value": ((tree,), lambda t, v: t.update([0, 1], v)),
    "SumTree.sample": ((tree, forest), lambda t, v: t.sample(v)),
    "SumTree.sample, draw": ((tree, forest), lambda t, v: t.sample(2, draw=v)),
    "SumTrees.update, index": ((forest,), lambda t, v: t.update(v, TWO)),
    "SumTrees.update, value": ((forest,), lambda t, v: t.update(INDEX, v)),
    "push, state": ((course,), lambda b, v: push(b, state=v)),
    "push, action": ((course,), lambda b, v: push(b, action=v)),
    "push, reward": ((course,), lambda b, v: push(b, reward=v)),
    "push, next_state": ((course,), lambda b, v: push(b, next_state=v)),
    "push, done": ((course,), lambda b, v: push(b, done=v)),
    "push, actions": ((course, continuous), lambda b, v: push_batch(b, action=v)),
    "push, rewards": ((course,), lambda b, v: push_batch(b, reward=v)),
    "push, states": ((course,), lambda b, v: push_batch(b, state=v)),
    "push, dones": ((course,), lambda b, v: push_batch(b, done=v)),
    "course: epsilon": ((course,), lambda b, v: setattr(b, "epsilon", v)),
    "course: alpha": ((course,), lambda b, v: setattr(b, "alpha", v)),
    "course: load_state_dict": ((course,), lambda b, v: b.load_state_dict(v)),
    "course: sample": ((course,), lambda b, v: b.sample(v)),
    "update_priorities, indices": ((course,), lambda b, v: b.update_priorities(v, [1.0, 2.0])),
    "update_priorities, td_errors": ((course,), lambda b, v: b.update_priorities([0, 1], v)),
}
PIXELS = stacks(1)["pixels"][0]
SIZES = ("sample", "sweep", "SumTree.sample", "course: sample")


def all_of_it(name, makers, call, allowed=(), skipped=()) -> None:
    for make in makers:
        for kind, value in hostile().items():
            if kind in skipped:
                continue
            made = make()
            target = getattr(made, "buffer", made)
            try:
                attempt(target, lambda: call(made, value), allowed)  # noqa: B023
            except BaseException as error:
                error.add_note(f"{name} given {kind!r}")
                raise
            if not isinstance(target, SumTree):
                check_sound(target)


@pytest.mark.parametrize("choice", [KERNELS[0], pytest.param(KERNELS[1], marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("name", "make"),
    slow_but(
        [
            (name, make)
            for name in ENTRIES
            for make in ENTRIES[name][0]
            if make in (ENTRIES[name][0][0], many)
        ],
        [(name, make) for name in ENTRIES for make in ENTRIES[name][0]],
    ),
)
def test_an_entry_takes_a_value_or_names_what_is_wrong_and_changes_nothing(
    name, make, choice, monkeypatch
):
    monkeypatch.setenv(kernels.VARIABLE, choice)
    call = ENTRIES[name][1]
    skipped = HUGE_YET_POSSIBLE if name in SIZES else ()
    # a reward of 1e39 is infinite in float32, of which numpy warns
    allowed = (RuntimeWarning,) if name in ("push, reward", "push, rewards") else ()
    all_of_it(name, (make,), call, allowed, skipped)


CONSTRUCTORS = {
    PrioritizedReplayBuffer: "capacity batch_size alpha beta eps beta_increment draw method"
    " weight_normalization new_priority prioritization sort_interval device generator layout"
    " example num_buffers priority_clip uniform_mix latest track_draws beta_schedule"
    " frames num_envs num_frames",
    SumTree: "capacity device num_trees",
    TransitionReplayBuffer: "capacity alpha beta beta_increment epsilon draw method prioritization"
    " device generator n_step gamma num_envs frames",
}


@pytest.mark.parametrize(
    ("made", "argument"),
    [(made, argument) for made, names in CONSTRUCTORS.items() for argument in names.split()],
)
def test_a_constructor_takes_an_argument_or_names_what_is_wrong(made, argument):
    others = {"prioritization": "rank"} if argument == "sort_interval" else {}
    if argument in ("num_envs", "num_frames"):
        others = {"frames": {"pixels": 2}}
    sizes = ("capacity", "num_buffers", "num_trees", "num_envs")
    skipped = HUGE_YET_POSSIBLE if argument in sizes else ()
    all_of_it(
        argument,
        (tree,),
        lambda _, value: made(**{"capacity": 4, **others, argument: value}),
        skipped=skipped,
    )


PARTS = [*one().state_dict(), *(("settings", key) for key in one().state_dict()["settings"])]


FRAMES = ("frames", "num_envs", "num_frames")
OWN = {
    one: PARTS,
    ranked: ["ranks", ("settings", "prioritization"), ("settings", "sort_interval")],
    mixed: [
        "draw_count",
        "updates",
        ("settings", "uniform_mix"),
        ("settings", "latest"),
        ("settings", "beta_schedule"),
        ("settings", "priority_clip"),
        ("settings", "track_draws"),
    ],
    seeded: ["generator", ("settings", "weight_normalization")],
    many: [
        *("priority", "write_count", "transitions", "beta"),
        *(("settings", "num_buffers"), ("settings", "alpha")),
    ],
    framed: ["frames", "transitions", *(("settings", name) for name in FRAMES)],
}
"""All parts of the state of `one`, and of the others what differs from it."""


@pytest.mark.parametrize(
    ("make", "part"),
    slow_but(
        [(make, part) for make in OWN for part in OWN[make]],
        [*product(OWN, PARTS), *((framed, part) for part in OWN[framed])],
    ),
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_state_with_a_wrong_part_is_refused_whole(part, make):
    state = make().state_dict()

    def load(buffer, value) -> None:
        if isinstance(part, tuple):
            changed = {"settings": {**state["settings"], part[1]: value}}
            if part[1] == "alpha":  # the masses saved belong to the other one
                changed |= {"mass": None, "ranks": None}
        else:
            changed = {part: value}
        buffer.load_state_dict({**state, **changed})

    all_of_it(part, (make,), load)


@pytest.mark.parametrize("make", [*TABLES, mixed, many])
def test_a_state_without_one_of_its_parts_is_refused_or_older(make):
    for part in PARTS:
        state = make().state_dict()
        if isinstance(part, tuple):
            del state["settings"][part[1]]
        else:
            del state[part]
        buffer = make()
        attempt(buffer, lambda: buffer.load_state_dict(state))  # noqa: B023
        check_sound(buffer)


def test_what_is_no_generators_state_does_not_leave_half_a_state():
    buffer, state = seeded(), seeded().state_dict()
    state["generator"] = torch.full_like(state["generator"], 255)
    before = fingerprint(buffer)
    with pytest.raises(CheckpointError, match="generator: expected the state of one on cpu"):
        buffer.load_state_dict(state | {"beta": torch.tensor(1.0)})
    assert fingerprint(buffer) == before


@pytest.mark.parametrize("length", range(0, 6000, 500))
def test_a_file_cut_short_is_refused(length, tmp_path):
    path = tmp_path / "buffer.pt"
    one().save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: min(length, len(whole) - 1)])
    with pytest.raises(CheckpointError):
        PrioritizedReplayBuffer.load(path)


NUMBERS = st.one_of(
    arrays.arrays(
        st.sampled_from(
            [np.float16, np.float32, np.float64, np.int8, np.int64, np.uint8, np.bool_]
        ),
        arrays.array_shapes(min_dims=0, max_dims=2, min_side=0, max_side=4),
    ),
    st.lists(st.floats(width=32), max_size=4),
    st.floats(),
)
INDICES = st.one_of(
    st.lists(st.integers(-1, 5), max_size=4),
    arrays.arrays(
        st.sampled_from([np.int8, np.uint8, np.int32, np.int64]),
        st.integers(0, 4),
        elements=st.integers(0, 6),
    ),
    st.integers(-(2**65), 2**65),
)


def on_and_off(monkeypatch, make, call) -> None:
    """With kernels and without, the same happens."""
    outcomes, states = [], []
    for choice in KERNELS:
        monkeypatch.setenv(kernels.VARIABLE, choice)
        buffer = make()
        outcomes.append(attempt(buffer, lambda: call(buffer)))  # noqa: B023
        check_sound(buffer)
        states.append(buffer.priority)
    assert len(set(outcomes)) == 1
    assert all(torch.equal(state, states[0]) for state in states[1:])


# one context for all examples: the environment variable is set anew in each
EXAMPLES = settings(max_examples=100, deadline=None, derandomize=True, database=None)


@EXAMPLES
@given(index=INDICES, td_error=NUMBERS, generation=st.none() | INDICES)
def test_random_updates_end_alike_with_kernels_and_without(index, td_error, generation):
    with pytest.MonkeyPatch.context() as patch:
        on_and_off(patch, one, lambda b: b.update_priority(index, td_error, generation))


@EXAMPLES
@given(n=st.integers(0, 7), priority=NUMBERS)
def test_random_priorities_end_alike_with_kernels_and_without(n, priority):
    with pytest.MonkeyPatch.context() as patch:
        on_and_off(patch, one, lambda b: b.extend(data(9, n), priority))


# --- faults that were found so, by name ----------------------------------------------------------


@pytest.mark.parametrize(
    "negated",
    [
        lambda values: torch._neg_view(torch.tensor(values)),
        lambda values: torch.complex(torch.zeros(2), torch.tensor(values)).conj().imag,
    ],
)
def test_a_lazily_negated_value_is_read_with_its_sign(negated):
    assert negated([1.0, 2.0]).is_neg()
    with pytest.raises(PriorityError, match="at least 0"):
        tree().update([0, 1], negated([1.0, 2.0]))
    sums = tree()
    sums.update([0, 1], negated([-1.0, -2.0]))
    assert sums[:2].tolist() == [1.0, 2.0]


def test_arrays_that_torch_cannot_share_are_copied():
    for errors in (
        np.array([3.0, 2.0, 1.0], np.float32)[::-1],
        np.array([1.0, 2.0, 3.0], ">f4"),
        np.broadcast_to(np.array([[1.0], [2.0], [3.0]]), (3, 1)),
    ):
        buffer = one(eps=0.0)
        buffer.update_priority(np.arange(3)[::-1][::-1], errors)
        assert buffer.priority[:3].tolist() == [1.0, 2.0, 3.0]
    read_only = np.ones(2)
    read_only.flags.writeable = False
    images = np.arange(6, dtype=np.uint8).reshape(2, 3)[::-1]
    buffer = TransitionReplayBuffer(3)
    buffer.push(images, 0, 1.0, images, done=False)
    assert buffer.sample(1)[0][0].tolist() == images.tolist()
    course().push(read_only, 0, 1.0, np.flip(read_only), done=False)


def test_data_without_values_does_not_fix_what_transitions_are_like():
    buffer = PrioritizedReplayBuffer(4)
    with pytest.raises(SchemaError, match="'x': expected values, got a tensor on the device meta"):
        buffer.extend(TensorDict({"x": torch.ones(2, device="meta")}, [2]))
    buffer.extend(data(0, 2))
    assert len(buffer) == 2


def test_an_eps_that_float32_cannot_hold_is_refused():
    with pytest.raises(ValueError, match="eps: expected a finite number"):
        one(eps=1e39)


def test_a_damaged_state_leaves_the_buffer_as_it_was():
    buffer, state = one(), one().state_dict()
    before = fingerprint(buffer)
    for wrong in (
        {"priority": torch.tensor([1.0, 2, 3, 4, float("nan")])},
        {"priority": torch.ones(4)},
        {"write_count": 3},
        {"write_count": -1},
        {"beta": torch.tensor(2.0)},
        {"transitions": {}},
        {"replayed": torch.zeros(9, dtype=torch.bool)},
        {"settings": {**state["settings"], "alpha": float("nan")}},
    ):
        with pytest.raises(CheckpointError, match=f"^({'|'.join([*wrong, 'priority'])})"):
            buffer.load_state_dict({**state, **wrong})
        assert fingerprint(buffer) == before


@pytest.mark.parametrize("choice", [KERNELS[0], pytest.param(KERNELS[1], marks=pytest.mark.slow)])
@pytest.mark.parametrize("count", [None, 2])
@pytest.mark.parametrize("layout", ["columns", "records"])
@pytest.mark.parametrize(
    "dtype", [torch.uint16, torch.uint32, torch.uint64, torch.float8_e5m2, torch.float8_e4m3fn]
)
def test_dtypes_that_torch_does_not_index_are_stored_and_drawn(
    dtype, layout, count, choice, monkeypatch
):
    monkeypatch.setenv(kernels.VARIABLE, choice)
    buffer = PrioritizedReplayBuffer(4, num_buffers=count, layout=layout)
    shape = (count, 6) if count else (6,)
    k = torch.arange(1, 7).expand(shape)
    buffer.extend(TensorDict({"k": k, "x": k.float().to(dtype)}, shape))
    batch = buffer.sample(20)
    assert batch["x"].dtype == dtype
    assert torch.equal(batch["x"].float(), batch["k"].float())


def test_a_nested_tensor_is_no_column():
    ragged = hostile()["nested tensor"]
    with pytest.raises(SchemaError, match="'x': expected a dense tensor, got nested"):
        one().extend(TensorDict({"x": ragged}, [2]))

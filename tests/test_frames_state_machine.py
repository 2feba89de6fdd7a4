"""Frames kept once, in lockstep with a plain buffer that keeps whole stacks, and a naive model."""

import copy
import pickle
import tempfile

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, initialize, invariant, rule

from per_td import (
    EmptyBufferError,
    IndexRangeError,
    PrioritizedReplayBuffer,
    PriorityError,
    SchemaError,
    kernels,
)
from per_td.storage.frame_store import GONE
from tests.support.frames import KINDS, FrameOracle, Game, frames_of, transitions_of
from tests.support.machines import CAN_BE, SOAK, TD_ERROR, Kernels, run, soak
from tests.support.parameters import slow_but

FRAMES = [((2, 4), torch.uint8), ((2,), torch.float32), ((3,), torch.uint8), ((), torch.int16)]
"""Kernels take frames of 8 bytes, or of 16; plain torch takes all."""


class FramesMachine(Kernels):
    """PrioritizedReplayBuffer(frames=...)."""

    batches = Bundle("batches")

    @initialize(
        capacity=CAN_BE((1, 2, 7, 50, 200)),
        envs=CAN_BE((1, 3)),
        depth=CAN_BE((1, 2, 4)),
        frame=CAN_BE(FRAMES),
        some=CAN_BE((None, 1, 2, 9)),
        key=CAN_BE([("pixels",), ("observation", "pixels")]),
        storage=CAN_BE(["memory", "memory", "memmap"]),
        layout=CAN_BE(["auto", "columns", "records"]),
        seed=st.integers(0, 999),
        waits=st.booleans(),
        choice=CAN_BE(kernels.CHOICES),
    )
    def begin(self, capacity, envs, depth, frame, some, key, storage, layout, seed, waits, choice):
        self.choose(choice)
        self.key, self.envs = key, envs
        # plain torch looks at many transitions at once, and may retire others
        self.exact = choice != "off" and frame in FRAMES[:2] and not waits
        size = None if some is None else max(2 * depth, some * capacity)
        self.frames = PrioritizedReplayBuffer(
            capacity,
            frames={key if len(key) > 1 else key[0]: depth},
            num_envs=envs,
            num_frames=size,
            storage=storage,
            layout=layout,
        )
        self.plain = PrioritizedReplayBuffer(capacity)
        self.waits = waits  # as on CUDA
        self.frames._storage._stores[0].waits = waits
        size = size or max(2 * depth, -(-106 * capacity // 100) + depth * envs)
        self.oracle = FrameOracle(size, envs, capacity)
        self.games = [Game(depth, *frame, seed + e) for e in range(envs)]
        self.written = 0

    # --- writing ---

    def write(self, env, kinds, priority=None, *, tell=True):
        """Write a transition of each environment in `env`, and compare the slots."""
        pairs = [self.games[e].step(kind) for e, kind in zip(env, kinds, strict=True)]
        td = transitions_of(pairs, self.written, self.key)
        index = self.plain.extend(td, priority)
        told = torch.tensor(env, dtype=torch.int64) if tell else None
        assert self.frames.extend(td, priority, env=told).tolist() == index.tolist()
        last = max(0, len(env) - self.plain.capacity)
        for slot, e, pair in list(zip(index.tolist(), env, pairs, strict=True))[last:]:
            self.oracle.write(slot, e, frames_of(*pair))
        self.written += len(env)
        self.retire()

    def retire(self):
        """Retire in the plain buffer what has retired here."""
        expected = self.oracle.retire()
        if not self.exact:
            store = self.frames._storage._stores[0]
            expected = store.low[: len(self.frames)] == GONE
            if store.page[0] <= store.size:  # there is room
                assert not self.plain.mass[expected].any()
        self.plain._priorities.raw[: len(self.plain)][expected] = 0.0
        self.plain._priorities.rebuild()

    @rule(data=st.data(), steps=st.integers(1, 6))
    def extend(self, data, steps):
        env = [*range(self.envs)] * steps
        n = len(env)
        self.write(env, data.draw(st.lists(CAN_BE(KINDS), min_size=n, max_size=n)), tell=False)

    @rule(data=st.data(), rated=st.booleans())
    def extend_some_environments(self, data, rated):
        env = data.draw(st.lists(st.integers(0, self.envs - 1), min_size=1, max_size=12))
        n = len(env)
        priority = CAN_BE([0.0, 0.5, 1.0, 3.0])
        priority = data.draw(st.lists(priority, min_size=n, max_size=n)) if rated else None
        self.write(env, data.draw(st.lists(CAN_BE(KINDS), min_size=n, max_size=n)), priority)

    @rule()
    def extend_by_nothing(self):
        td = transitions_of([self.games[0].step("goes on")], 0, self.key)[:0]
        for buffer in (self.frames, self.plain):
            assert not len(buffer.extend(td))

    @rule(env=st.integers(0, 2), n=st.integers(1, 60), still=st.booleans())
    def extend_one_environment_for_long(self, env, n, still):
        kind = "still" if still else "goes on"
        self.write([env % self.envs] * n, [kind] * n)

    @rule(n=st.integers(1, 4), kind=CAN_BE(KINDS))
    def extend_by_more_than_there_are_slots(self, n, kind):
        if self.plain.capacity <= 50:
            count = self.plain.capacity + n
            self.write([k % self.envs for k in range(count)], [kind] * count)

    @rule(env=st.integers(0, 2), kind=CAN_BE(KINDS))
    def add(self, env, kind):
        env %= self.envs
        pair = self.games[env].step(kind)
        td = transitions_of([pair], self.written, self.key)[0]
        slot = self.plain.add(td)
        assert self.frames.add(td, env=env) == slot
        self.oracle.write(int(slot), env, frames_of(*pair))
        self.written += 1
        self.retire()

    @rule()
    def refuse_what_cannot_be(self):
        before = self.frames._storage._stores[0].page.tolist()
        pair = self.games[0].step("goes on")
        td = transitions_of([pair, pair], 0, self.key)
        with pytest.raises(PriorityError, match="-1"):
            self.frames.extend(td, [1.0, -1.0], env=[0, 0])
        with pytest.raises(IndexRangeError, match="env"):
            self.frames.extend(td, env=[0, self.envs])
        del td["next", *self.key]
        with pytest.raises(SchemaError, match="pixels"):
            self.frames.extend(td, env=[0, 0])
        assert self.frames._storage._stores[0].page.tolist() == before

    # --- drawing and updating ---

    @rule(target=batches, n=st.integers(1, 9), draw=CAN_BE(["independent", "stratified"]))
    def sample(self, n, draw):
        self.frames.draw = draw
        if not self.frames.total_mass > 0:
            with pytest.raises(EmptyBufferError):
                self.frames.sample(n)
            return None
        batch = self.frames.sample(n)
        assert (self.frames.mass[batch["index"]] > 0).all()
        expected = self.plain.transitions[batch["index"]]
        for key in expected.keys(True, True):
            assert batch[key].is_contiguous()
            assert same_bits(batch[key], expected[key])
        return batch

    @rule(data=st.data(), batch=batches, told=st.booleans())
    def update(self, data, batch, told):
        if batch is None:
            return
        n = len(batch)
        index, generation = batch["index"], batch["generation"] if told else None
        if (index >= len(self.frames)).any():
            return
        td_error = torch.tensor(data.draw(st.lists(TD_ERROR, min_size=n, max_size=n)))
        stale = self.plain.stats()["stale_updates"], self.frames.stats()["stale_updates"]
        low = self.frames._storage._stores[0].low
        living = low[index] != GONE
        self.frames.update_priority(index, td_error, generation)
        kept = None if generation is None else generation[living]
        self.plain.update_priority(index[living], td_error[living], kept)
        more = self.plain.stats()["stale_updates"] - stale[0] + int((~living).sum())
        assert self.frames.stats()["stale_updates"] - stale[1] == more

    # --- the whole ---

    @rule(kind=CAN_BE([copy.deepcopy, lambda buffer: pickle.loads(pickle.dumps(buffer))]))
    def go_on_with_a_copy(self, kind):
        self.frames = kind(self.frames)

    @rule(how=CAN_BE(["load", "restore", "state_dict"]))
    def go_on_with_what_was_saved(self, how):
        with tempfile.TemporaryDirectory() as folder:
            path = f"{folder}/buffer.pt"
            if how == "state_dict":
                self.frames.load_state_dict(self.frames.state_dict())
            else:
                self.frames.save(path)
                if how == "load":
                    self.frames = PrioritizedReplayBuffer.load(path)
                else:
                    self.frames.restore(path)
        self.frames._storage._stores[0].waits = self.waits
        self.oracle.load()

    @rule()
    def empty(self):
        self.frames.empty()
        self.plain.empty()
        self.oracle.forget()

    @invariant()
    def agree(self):
        if not hasattr(self, "frames"):
            return
        type(self).steps += 1
        self.frames.check_valid()
        n = len(self.plain)
        assert len(self.frames) == n
        assert self.frames.priority.tolist() == self.plain.priority.tolist()
        store = self.frames._storage._stores[0]
        living = store.low[:n] != GONE
        if self.exact:
            assert self.frames.stats()["retired"] == self.oracle.retired
            assert set(living.nonzero().flatten().tolist()) == self.oracle.numbers.keys()
            assert store.page[0] == self.oracle.cursor
        assert not self.frames.mass[~living].any()
        if n:
            held, expected = self.frames.transitions, self.plain.transitions
            leaves = self.frames.filled_leaves()
            assert set(held.keys(True, True)) == set(expected.keys(True, True))
            for key in expected.keys(True, True):
                assert same_bits(held[key][living], expected[key][living])
                name = key if isinstance(key, tuple) else (key,)
                assert same_bits(leaves[name][living], expected[key][living])


def same_bits(one, other):
    """True if two tensors are equal to the bit."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    as_bytes = [x.contiguous().flatten().view(torch.uint8) for x in (one, other)]
    return torch.equal(*as_bytes)


@pytest.mark.parametrize("share", slow_but([3], [3, 1]))
def test_no_order_of_operations_leads_away_from_whole_stacks(share):
    run(FramesMachine, 60 // share, derandomize=True)
    assert FramesMachine.steps > 60 // share


@pytest.mark.soak
@pytest.mark.skipif(not SOAK, reason="PER_TD_SOAK says for how many seconds")
def test_for_a_long_time_no_order_of_operations_leads_away_from_whole_stacks():
    soak(FramesMachine)

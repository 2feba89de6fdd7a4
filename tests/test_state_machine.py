"""Random operations in random order, beside a model in numpy: hypothesis looks for a difference.

The examples are always the same. `PER_TD_SOAK=600 pytest -m soak -s tests/test_state_machine.py`
runs others, for so many seconds each, and tells how many.
"""

import copy
import math
import pickle
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, initialize, invariant, precondition, rule

from per_td import (
    EmptyBufferError,
    IndexRangeError,
    PrioritizedReplayBuffer,
    PriorityError,
    SchemaError,
    SumTree,
    TransitionReplayBuffer,
    kernels,
)
from tests.support.machines import (
    ALPHA,
    CAN_BE,
    DRAWS,
    EPS,
    PRIORITY,
    SOAK,
    TD_ERROR,
    UNIT,
    Kernels,
    check_drawn,
    run,
    soak,
)
from tests.support.model import Ring
from tests.support.oracle import data
from tests.support.parameters import slow_but

CAPACITIES = (1, 7, 50, 255, 256, 257)
CONFIGURATION = st.fixed_dictionaries(
    {
        "capacity": CAN_BE(CAPACITIES),
        "alpha": ALPHA,
        "beta": UNIT,
        "eps": EPS,
        "beta_increment": CAN_BE([0.0, 0.25]),
        "weight_normalization": CAN_BE(["batch", "buffer", "none"]),
        "new_priority": CAN_BE(["buffer_max", "ever_max"]),
        "layout": CAN_BE(["columns", "records", "auto"]),
        "priority_clip": CAN_BE([None, (0.5, None), (None, 2.0), (0.1, 3.0)]),
        "track_draws": st.booleans(),
    }
)


def saved_and_loaded(machine) -> PrioritizedReplayBuffer:
    with tempfile.TemporaryDirectory() as folder:
        machine.buffer.save(Path(folder) / "buffer")
        return PrioritizedReplayBuffer.load(Path(folder) / "buffer")


def state_into_another(machine) -> PrioritizedReplayBuffer:
    other = machine.make(machine.given | {"alpha": 0.9, "beta": 0.1, "eps": 1.0})
    if machine.odd:  # that has been in use
        machine.write_numbered(other, 3)
    other.load_state_dict(machine.buffer.state_dict())
    return other


COPIES = {
    "deepcopy": lambda machine: copy.deepcopy(machine.buffer),
    "pickle": lambda machine: pickle.loads(pickle.dumps(machine.buffer)),
    "save and load": saved_and_loaded,
    "state_dict": state_into_another,
}
"""How a buffer can be had from a buffer. One more is one more entry."""


class BufferMachine(Kernels):
    """PrioritizedReplayBuffer: one, or many side by side."""

    counts: tuple[int | None, ...] = (None,)
    batches = Bundle("batches")

    @initialize(
        data=st.data(), given=CONFIGURATION, draw=CAN_BE(DRAWS), choice=CAN_BE(kernels.CHOICES)
    )
    def begin(self, data, given, draw, choice):
        self.choose(choice)
        self.count = data.draw(CAN_BE(self.counts), "num_buffers")
        given |= {"num_buffers": self.count, "draw": draw[0], "method": draw[1]}
        if self.count is None and data.draw(st.booleans(), "ranks"):
            interval = data.draw(CAN_BE([None, 1, 10, 300]), "sort_interval")
            given |= {"prioritization": "rank", "sort_interval": interval}
        self.given, self.next, self.odd = given, 0, False
        self.beta, self.each = [given["beta"]] * (self.count or 1), set()
        self.buffer = self.make(given)
        self.rings = [
            Ring(
                given["capacity"],
                alpha=given["alpha"],
                eps=given["eps"],
                new_priority=given["new_priority"],
                rank="prioritization" in given,
                sort_interval=given.get("sort_interval"),
                clip=given["priority_clip"],
            )
            for _ in range(self.count or 1)
        ]

    @staticmethod
    def make(given):
        return PrioritizedReplayBuffer(**given, generator=torch.Generator().manual_seed(5))

    # --- shapes: rows are lists, one for each ring ------------------------------------------------

    def shaped(self, rows, dtype=None) -> torch.Tensor:
        """[n] for one buffer, [S, n] for many."""
        return torch.tensor(rows if self.count else rows[0], dtype=dtype)

    def rows(self, tensor) -> list:
        return tensor.tolist() if self.count else [tensor.tolist()]

    def numbered(self, n):
        """Transitions [n] or [S, n], which all differ."""
        start, self.next = self.next, self.next + n * len(self.rings)
        td = data(start, n * len(self.rings))
        return td.view(self.count, n) if self.count else td

    def write_numbered(self, buffer, n):
        buffer.extend(self.numbered(n))

    # --- operations -------------------------------------------------------------------------------

    @rule(data=st.data(), more=st.booleans(), rated=st.booleans(), masked=st.booleans())
    def extend(self, data, more, rated, masked):
        capacity = self.given["capacity"]
        n = data.draw(st.integers(0, capacity + 3 if more else min(capacity, 9)), "n")
        td, random = self.numbered(n), np.random.default_rng(data.draw(st.integers(0, 99)))
        some = data.draw(st.lists(PRIORITY, min_size=1, max_size=5), "priorities")
        priority = random.choice(np.float32(some), (len(self.rings), n)) if rated else None
        mask = random.random((len(self.rings), n)) < (0.6 if masked and self.count else 2)
        given = {"priority": None if priority is None else self.shaped(priority.tolist())}
        if masked and self.count:
            given["mask"] = torch.from_numpy(mask)
        index = self.rows(self.buffer.extend(td, **given))
        items = td["action"].view(len(self.rings), n).tolist()
        for s, ring in enumerate(self.rings):
            own = np.flatnonzero(mask[s])
            rated_own = None if priority is None else priority[s][own]
            slots = ring.extend([items[s][j] for j in own], rated_own)
            expected = np.full(n, -1)
            expected[own] = slots
            assert index[s] == expected.tolist()

    @rule(data=st.data(), rated=st.booleans(), masked=st.booleans())
    def add(self, data, rated, masked):
        td = self.numbered(1)
        td = td[:, 0] if self.count else td[0]
        mask = [masked and data.draw(st.booleans()) for _ in self.rings]  # True: left out
        priority = [data.draw(PRIORITY) if rated else None for _ in self.rings]
        given = {}
        if rated:
            given["priority"] = torch.tensor(priority) if self.count else priority[0]
        if self.count:
            given["mask"] = ~torch.tensor(mask)
        else:
            mask = [False]
        index = self.buffer.add(td, **given)
        items = td["action"].view(-1).tolist()
        for s, ring in enumerate(self.rings):
            got = index.view(-1)[s].item()
            if mask[s]:
                assert got == -1
            else:
                assert [got] == ring.extend([items[s]], [priority[s]] if rated else None)

    @rule(target=batches, n=st.integers(1, 12), all_of_them=st.booleans())
    def sample(self, n, all_of_them):
        if all_of_them and self.given["draw"] == "without_replacement":
            n = max(1, min(ring.drawable() for ring in self.rings))
        enough = n if self.given["draw"] == "without_replacement" else 1
        if any(ring.drawable() < enough for ring in self.rings):
            with pytest.raises(EmptyBufferError):
                self.buffer.sample(n)
            return []
        twin = torch.Generator()
        twin.set_state(self.buffer.generator.get_state())
        batch = self.buffer.sample(n)
        shape = (self.count, n) if self.count else (n,)
        assert batch.batch_size == shape
        point = torch.rand(shape, dtype=torch.float64, generator=twin).view(-1, n).numpy()
        for s, ring in enumerate(self.rings):
            self.check_batch(ring, batch[s] if self.count else batch, point[s], s)
        return [self.rows(batch["index"]), self.rows(batch["generation"])]

    def check_batch(self, ring, batch, point, s):
        index = batch["index"].tolist()
        assert batch["action"].tolist() == [ring.item[i] for i in index]
        assert batch["observation"][:, 2].tolist() == [ring.item[i] for i in index]
        assert batch["next", "reward"].view(-1).tolist() == [ring.item[i] for i in index]
        assert batch["generation"].tolist() == [ring.generation[i] for i in index]
        expected = ring.weights(index, self.beta[s], self.given["weight_normalization"])
        expected = [w if w < 3.4e38 else math.inf for w in expected]
        weight = batch["priority_weight"]
        assert weight.dtype == torch.float32
        np.testing.assert_allclose(weight.numpy(), expected, rtol=2e-5, atol=1e-37)
        self.count_draws(ring, batch)
        if self.given["draw"] == "without_replacement":
            assert len(set(index)) == len(index)
            assert all(ring.mass[i] > 0 for i in index)
        elif self.given["method"] == "tree":
            mass = self.buffer.mass.view(len(self.rings), -1)[s].double().numpy()
            stratified = self.given["draw"] == "stratified"
            check_drawn(np.array(index), mass, point, stratified=stratified)

    def count_draws(self, ring, batch):
        index = batch["index"].tolist()
        for i in index:
            ring.replayed[i] = True
            ring.draws[i] += 1
        if self.given["track_draws"]:
            assert batch["draw_count"].tolist() == [ring.draws[i] for i in index]

    @rule(
        n=st.integers(1, 12),
        by=CAN_BE(["priority", "uniform", "inverse"]),
        newest=CAN_BE([None, 1, 3, 60, 1000]),
        mix=CAN_BE([0.0, 0.3, 1.0]),
    )
    def sample_otherwise(self, n, by, newest, mix):
        if self.given["draw"] == "without_replacement":
            newest, mix = None, 0.0
        p = [ring.probabilities_by(by, newest, mix) for ring in self.rings]
        enough = n if self.given["draw"] == "without_replacement" else 1
        self.buffer.uniform_mix = mix
        if any((own > 0).sum() < enough for own in p):
            with pytest.raises(EmptyBufferError):
                self.buffer.sample(n, by, newest)
            self.buffer.uniform_mix = 0.0
            return
        batch = self.buffer.sample(n, by, newest)
        self.buffer.uniform_mix = 0.0
        for s, (ring, own) in enumerate(zip(self.rings, p, strict=True)):
            drawn = batch[s] if self.count else batch
            index = drawn["index"].tolist()
            assert (own[index] > 0).all()
            assert drawn["action"].tolist() == [ring.item[i] for i in index]
            log = -self.beta[s] * np.log(own[own > 0] * min(newest or len(ring), len(ring)))
            every = np.full(len(own), -np.inf)
            every[own > 0] = log
            normalization = self.given["weight_normalization"]
            least = {"batch": every[index].max(), "buffer": every.max(), "none": 0.0}
            expected = np.exp(every[index] - least[normalization])
            expected[expected > 3.4e38] = np.inf
            got = drawn["priority_weight"].numpy()
            np.testing.assert_allclose(got, expected, rtol=2e-5, atol=1e-37)
            self.count_draws(ring, drawn)

    @rule(n=st.integers(1, 300))
    def sweep(self, n):
        batches = list(self.buffer.sweep(n))
        assert bool(batches) == any(map(len, self.rings))
        for s, ring in enumerate(self.rings if batches else []):
            swept = torch.cat([batch[s] if self.count else batch for batch in batches])
            swept = swept[swept["filled"]] if self.count else swept
            assert swept["index"].tolist() == list(range(len(ring)))
            assert swept["action"].tolist() == ring.item[: len(ring)]
            assert swept["generation"].tolist() == ring.generation[: len(ring)]

    def check_update(self, index, td_error, generation, mask=None, how=("set", 1.0)):
        """Update; `how` is a mode and a rate, or None to set priorities as they are."""
        dtype = torch.int64
        given = {} if mask is None else {"mask": torch.tensor(mask)}
        call = self.buffer.set_priority
        if how is not None:
            call = self.buffer.update_priority
            given |= {"mode": how[0], "rate": how[1]}
        call(
            self.shaped(index, dtype),
            self.shaped(td_error, torch.float32),
            None if generation is None else self.shaped(generation, dtype),
            **given,
        )
        for s, ring in enumerate(self.rings):
            kept = [j for j in range(len(index[s])) if mask is None or mask[s][j]]
            then = None if generation is None else [generation[s][j] for j in kept]
            own = [index[s][j] for j in kept], [td_error[s][j] for j in kept], then
            if how is None:
                ring.assign(*own)
            else:
                ring.update(*own, *how)

    @rule(data=st.data(), batch=batches, named=st.booleans())
    def update_a_batch(self, data, batch, named):
        """It may be old: then what has been overwritten is stale."""
        if not batch:
            return
        index, generation = batch
        n = len(index[0])
        td_error = [data.draw(st.lists(TD_ERROR, min_size=n, max_size=n)) for _ in index]
        self.check_update(index, td_error, generation if named else None)

    @precondition(lambda self: all(map(len, self.rings)))
    @rule(
        data=st.data(),
        n=st.integers(0, 12),
        stale=st.booleans(),
        masked=st.booleans(),
        how=CAN_BE([("set", 1.0), None, ("max", 0.0), ("max", 0.7), ("mean", 0.25), ("mean", 1.0)]),
    )
    def update_any(self, data, n, stale, masked, how):
        """With repetitions, stale ones among others, and rubbish where it is masked."""
        random = np.random.default_rng(data.draw(st.integers(0, 999)))
        some = data.draw(st.lists(TD_ERROR, min_size=3, max_size=5, unique_by=abs), "TD errors")
        index = [random.integers(len(ring), size=n).tolist() for ring in self.rings]
        td_error = [random.choice(np.float32(some), n).tolist() for _ in self.rings]
        if how is None:
            td_error = [[abs(error) for error in own] for own in td_error]
        generation = [
            [ring.generation[i] + int(random.integers(-1, 2)) for i in own]
            for ring, own in zip(self.rings, index, strict=True)
        ]
        mask = None
        if masked and self.count:
            mask = (random.random((self.count, n)) < 0.7).tolist()
            for s in range(self.count):
                for j in range(n):
                    if not mask[s][j]:
                        index[s][j], td_error[s][j] = (-3, 10**6)[j % 2], math.nan
        self.check_update(index, td_error, generation if stale else None, mask, how)

    @rule(n=st.integers(1, 4), wrong=CAN_BE(["index", "nan", "inf", "keys", "priority"]))
    def refuse(self, n, wrong):
        """What is wrong in one place changes nothing: `agree` looks."""
        zeros = [[0] * n for _ in self.rings]
        td, error, values = self.numbered(n), PriorityError, [[1.0] * n for _ in self.rings]
        values[-1][-1] = math.inf if wrong == "inf" else math.nan
        if wrong == "keys":
            other = td.exclude("action").set(
                "index", td["action"]
            )  # the first data may have others
            with pytest.raises(SchemaError):
                self.buffer.extend(other)
        elif wrong == "priority":
            with pytest.raises(PriorityError, match="nothing was written"):
                self.buffer.extend(td, self.shaped(values))
        else:
            empty = not all(map(len, self.rings))
            if wrong == "index" or empty:
                error = IndexRangeError
                values = [[1.0] * n for _ in self.rings]
                zeros[-1][-1] = len(self.rings[-1])
            with pytest.raises(error):
                self.buffer.update_priority(self.shaped(zeros), self.shaped(values))

    @rule(alpha=ALPHA)
    def set_alpha(self, alpha):
        self.buffer.alpha = alpha
        self.each.discard("alpha")
        for ring in self.rings:
            ring.set_alpha(alpha)

    @rule(eps=EPS)
    def set_eps(self, eps):
        self.buffer.eps = eps
        for ring in self.rings:
            ring.eps = eps

    @rule(beta=UNIT)
    def set_beta(self, beta):
        self.buffer.beta, self.beta = beta, [beta] * len(self.rings)
        self.each.discard("beta")

    @precondition(lambda self: self.count)
    @rule(data=st.data(), name=CAN_BE(["alpha", "beta"]), tensor=st.booleans())
    def set_each(self, data, name, tensor):
        size, numbers = len(self.rings), ALPHA if name == "alpha" else UNIT
        given = data.draw(st.lists(numbers, min_size=size, max_size=size), name)
        value = torch.tensor(given, dtype=torch.float64) if tensor else given
        setattr(self.buffer, name, value)
        self.each.add(name)
        if name == "beta":
            self.beta = given
        else:
            for ring, alpha in zip(self.rings, given, strict=True):
                ring.set_alpha(alpha)

    @rule()
    def increase_beta(self):
        self.buffer.increase_beta()
        self.beta = [min(1.0, beta + self.given["beta_increment"]) for beta in self.beta]

    @rule(kind=CAN_BE(sorted(COPIES)), odd=st.booleans())
    def go_on_with_a_copy(self, kind, odd):
        self.odd = odd
        old, self.buffer = self.buffer, COPIES[kind](self)
        self.agree()
        before = old.state_dict()["priority"].clone()
        self.write_numbered(self.buffer, 1)  # memory is not shared
        assert torch.equal(old.state_dict()["priority"], before)
        for s, ring in enumerate(self.rings):
            ring.extend([self.next - len(self.rings) + s])

    def numbers(self, name) -> list[float]:
        """The alpha or beta of each ring, as the buffer tells them."""
        value = getattr(self.buffer, name)
        assert type(value) is (torch.Tensor if name in self.each else float)
        return value.tolist() if name in self.each else [value] * len(self.rings)

    # --- what always holds ------------------------------------------------------------------------

    @invariant()
    def agree(self):
        if not hasattr(self, "buffer"):
            return
        type(self).steps += 1
        buffer = self.buffer
        buffer.check_valid()
        assert len(buffer) == min(map(len, self.rings))
        alpha, beta = self.numbers("alpha"), self.numbers("beta")
        assert beta == pytest.approx(self.beta, abs=1e-15)
        assert buffer.stats() == {
            "written": sum(ring.written for ring in self.rings),
            "stale_updates": sum(ring.stale for ring in self.rings),
            "refused_priorities": 0,
        }
        slots = torch.arange(buffer.capacity)
        generation = buffer.generation_of(slots.expand(self.count, -1) if self.count else slots)
        state = buffer.state_dict()
        for s, ring in enumerate(self.rings):
            assert alpha[s] == ring.alpha
            assert buffer.eps == ring.eps
            self.agree_on(s, ring)
            assert state["ever_max"].view(-1)[s] == ring.ever_max
            rows = generation[s] if self.count else generation
            assert rows.tolist() == ring.generation
        if state["ranks"] is not None:
            assert state["ranks"]["changes"] == self.rings[0].changes

    def agree_on(self, s, ring):
        n = len(ring)
        mass = self.buffer.mass[s, :n] if self.count else self.buffer.mass
        priority = self.buffer.priority[s, :n] if self.count else self.buffer.priority
        assert priority.tolist() == ring.priority[:n].tolist()
        np.testing.assert_allclose(mass.numpy(), ring.mass[:n], rtol=1e-6)
        assert self.buffer.total_mass.view(-1)[s].item() == pytest.approx(
            math.fsum(ring.mass), rel=1e-6
        )
        if self.buffer.weight_normalization == "buffer" and ring.drawable():
            least = self.buffer.smallest_mass.view(-1)[s].item()
            assert least == pytest.approx(ring.mass[ring.mass > 0].min(), rel=1e-6)
        if self.given["track_draws"]:
            counts = self.buffer.draw_count.view(len(self.rings), -1)[s, :n]
            assert counts.tolist() == ring.draws[:n]
        if not self.count:
            assert self.buffer.replayed.tolist() == ring.replayed[:n]
        if n:
            held = self.buffer.transitions
            held = held[s, :n] if self.count else held
            assert held["action"].tolist() == ring.item[:n]
            assert held["next", "reward"].view(-1).tolist() == ring.item[:n]


class ManyMachine(BufferMachine):
    """`num_buffers`."""

    counts = (1, 3)


class CourseMachine(Kernels):
    """TransitionReplayBuffer."""

    batches = Bundle("batches")

    @initialize(
        capacity=CAN_BE(CAPACITIES),
        alpha=ALPHA,
        epsilon=EPS,
        rank=st.booleans(),
        continuous=st.booleans(),
        choice=CAN_BE(kernels.CHOICES),
    )
    def begin(self, capacity, alpha, epsilon, rank, continuous, choice):
        self.choose(choice)
        self.continuous = continuous
        self.buffer = TransitionReplayBuffer(
            capacity,
            alpha,
            beta_increment=0.25,
            epsilon=epsilon,
            prioritization="rank" if rank else "proportional",
        )
        self.ring = Ring(capacity, alpha=alpha, eps=epsilon, new_priority="buffer_max", rank=rank)
        self.beta = 0.4
        self.drawn = {}  # the generation of each slot when it was last drawn

    @rule(n=st.integers(1, 9), kind=CAN_BE([list, np.array, torch.tensor, np.float32]))
    def push(self, n, kind):
        self.push_some(n, kind)

    def push_some(self, n, kind=list):
        for k in range(self.ring.written, self.ring.written + n):
            action = kind(self.action(k)) if self.continuous else k
            self.buffer.push(kind([k, k + 1.0]), action, k / 4, kind([k + 1.0, k]), k % 3 == 0)
            self.ring.extend([k])

    def action(self, k):
        return [k / 2, -k / 4] if self.continuous else k

    @rule(n=st.integers(1, 300), kind=CAN_BE([list, np.array, torch.tensor]))
    def push_batch(self, n, kind):
        ks = range(self.ring.written, self.ring.written + n)
        self.buffer.push(
            kind([[k, k + 1.0] for k in ks]),
            kind([self.action(k) for k in ks]),
            kind([k / 4 for k in ks]),
            kind([[k + 1.0, k] for k in ks]),
            kind([k % 3 == 0 for k in ks]),
        )
        self.ring.extend(ks)

    @rule(wrong=st.integers(0, 4), n=st.integers(1, 3))
    def refuse_a_batch(self, wrong, n):
        batch = [np.zeros((n, 2)), np.array([self.action(0)] * n), *np.zeros((2, n)), [True] * n]
        batch[3] = batch[0]
        batch[wrong] = np.zeros((n + 1, 3))
        with pytest.raises(SchemaError):
            self.buffer.push(*batch)

    @rule(alpha=ALPHA)
    def set_alpha(self, alpha):
        self.buffer.alpha = alpha
        self.ring.set_alpha(alpha)

    @rule(epsilon=EPS)
    def set_epsilon(self, epsilon):
        self.buffer.epsilon = self.ring.eps = epsilon

    @rule(target=batches, n=st.integers(1, 9))
    def sample(self, n):
        return self.sample_some(n)

    def sample_some(self, n):
        if not self.ring.drawable():
            with pytest.raises(EmptyBufferError):
                self.buffer.sample(n)
            return []
        states, actions, rewards, following, dones, index, weights = self.buffer.sample(n)
        item = np.array([self.ring.item[i] for i in index])
        assert states.tolist() == np.stack([item, item + 1.0], -1).tolist()
        assert following.tolist() == np.stack([item + 1.0, item], -1).tolist()
        expected = [np.atleast_1d(self.action(k)).tolist() for k in item]
        assert actions.tolist() == expected
        assert rewards.tolist() == (item / 4).tolist()
        assert dones.tolist() == (item % 3 == 0).astype(float).tolist()
        expected = self.ring.weights(index.tolist(), self.beta, "batch")
        np.testing.assert_allclose(weights.numpy(), expected, rtol=2e-5)
        self.drawn |= {i: self.ring.generation[i] for i in index.tolist()}
        return index.tolist()

    def set_priorities(self, data, index):
        size = len(index)
        td_error = data.draw(st.lists(TD_ERROR, min_size=size, max_size=size))
        self.buffer.update_priorities(torch.tensor(index, dtype=torch.int64), td_error)
        generation = [self.drawn.get(i, self.ring.generation[i]) for i in index]
        self.ring.update(index, td_error, generation)

    @rule(data=st.data(), index=batches)
    def update(self, data, index):
        self.set_priorities(data, index)

    @precondition(lambda self: len(self.ring))
    @rule(data=st.data())
    def update_any_slots(self, data):
        slot = st.integers(0, len(self.ring) - 1)
        self.set_priorities(data, data.draw(st.lists(slot, max_size=4)))

    @precondition(lambda self: self.ring.capacity <= 50)
    @rule(data=st.data(), n=st.integers(0, 3))
    def update_what_has_been_overwritten(self, data, n):
        index = self.sample_some(5)
        self.push_some(max(1, self.ring.capacity - n))
        self.set_priorities(data, index)

    @rule()
    def increase_beta(self):
        self.buffer.increase_beta()
        self.beta = min(1.0, self.beta + 0.25)

    @rule(kind=CAN_BE([copy.deepcopy, lambda buffer: pickle.loads(pickle.dumps(buffer))]))
    def go_on_with_a_copy(self, kind):
        self.buffer = kind(self.buffer)

    @rule(used=st.booleans())
    def go_on_with_a_state(self, used):
        state, ring = self.buffer.state_dict(), copy.deepcopy(self.ring)
        if used:
            self.push_some(3)
        self.buffer.load_state_dict(state)
        self.ring, self.drawn = ring, {}

    @rule(other=st.booleans())
    def go_on_with_what_was_saved(self, other):
        with tempfile.TemporaryDirectory() as folder:
            self.buffer.save(f"{folder}/buffer.pt")
            if other:
                self.buffer = TransitionReplayBuffer.load(f"{folder}/buffer.pt")
            else:
                self.buffer.restore(f"{folder}/buffer.pt")
        self.drawn = {}

    @invariant()
    def agree(self):
        if not hasattr(self, "buffer"):
            return
        type(self).steps += 1
        n = len(self.ring)
        assert len(self.buffer) == n
        assert self.buffer.stats()["stale_updates"] == self.ring.stale
        assert self.buffer.beta == pytest.approx(self.beta)
        assert (self.buffer.alpha, self.buffer.epsilon) == (self.ring.alpha, self.ring.eps)
        assert self.buffer.priority.tolist() == self.ring.priority[:n].tolist()
        np.testing.assert_allclose(self.buffer.buffer.mass.numpy(), self.ring.mass[:n], rtol=1e-6)
        self.buffer.buffer.check_valid()


class TreeMachine(Kernels):
    """SumTree: one, or many side by side."""

    @initialize(
        capacity=CAN_BE((*CAPACITIES, 16, 4097)),
        count=CAN_BE([None, 1, 3]),
        choice=CAN_BE(kernels.CHOICES),
    )
    def begin(self, capacity, count, choice):
        self.choose(choice)
        self.tree, self.count = SumTree(capacity, num_trees=count), count
        self.mass = np.zeros((count or 1, capacity))
        self.random = torch.Generator().manual_seed(1)

    def shaped(self, rows):
        return rows if self.count else rows[0]

    @rule(data=st.data(), n=st.integers(0, 40))
    def update(self, data, n):
        random = np.random.default_rng(data.draw(st.integers(0, 999)))
        some = np.float32(data.draw(st.lists(PRIORITY, min_size=1, max_size=5)))
        shape = self.mass.shape[0], n
        index, value = random.integers(self.mass.shape[1], size=shape), random.choice(some, shape)
        self.tree.update(self.shaped(index), self.shaped(value))
        for s in range(shape[0]):
            for i, v in zip(index[s], value[s], strict=True):
                self.mass[s, i] = v

    @rule(data=st.data())
    def fill(self, data):
        random = np.random.default_rng(data.draw(st.integers(0, 999)))
        self.mass = np.float32(random.random(self.mass.shape)).astype(float)
        self.tree.fill(torch.from_numpy(self.shaped(self.mass)).float())

    @rule(at=st.integers(0), value=CAN_BE([math.nan, -1.0, math.inf, 1.0]))
    def refuse(self, at, value):
        index, values = np.zeros((len(self.mass), 2), int), np.ones((len(self.mass), 2))
        index[-1, -1], values[-1, -1] = self.mass.shape[1] if value == 1 else 0, value
        with pytest.raises(IndexRangeError if value == 1 else PriorityError):
            self.tree.update(self.shaped(index), self.shaped(values))

    @rule(n=st.integers(1, 40), draw=CAN_BE(["independent", "stratified", "without_replacement"]))
    def sample(self, n, draw):
        enough = n if draw == "without_replacement" else 1
        if ((self.mass > 0).sum(-1) < enough).any():
            with pytest.raises(EmptyBufferError):
                self.tree.sample(n, self.random, draw=draw)
            return
        twin = torch.Generator()
        twin.set_state(self.random.get_state())
        index = self.tree.sample(n, self.random, draw=draw).view(-1, n).numpy()
        shape = (self.count, n) if self.count else (n,)
        point = torch.rand(shape, dtype=torch.float64, generator=twin).view(-1, n).numpy()
        for s, own in enumerate(index):
            if draw == "without_replacement":
                assert len(set(own.tolist())) == n
                assert (self.mass[s, own] > 0).all()
            else:
                check_drawn(own, self.mass[s], point[s], stratified=draw == "stratified")

    @rule()
    def go_on_with_a_copy(self):
        self.tree = copy.deepcopy(self.tree)

    @invariant()
    def agree(self):
        if not hasattr(self, "tree"):
            return
        type(self).steps += 1
        self.tree.check_valid()
        assert self.tree[:].tolist() == self.shaped(self.mass).tolist()
        total = self.tree.total.view(-1).numpy()
        np.testing.assert_allclose(total, self.mass.sum(-1), rtol=1e-12)


MACHINES = {
    BufferMachine: 60,
    ManyMachine: 40,
    CourseMachine: 25,
    TreeMachine: 40,
}
"""With how many examples each."""


@pytest.mark.parametrize("share", slow_but([3], [3, 1]))
@pytest.mark.parametrize("machine", MACHINES)
def test_no_order_of_operations_leads_away_from_the_model(machine, share):
    run(machine, MACHINES[machine] // share, derandomize=True)
    assert machine.steps > MACHINES[machine] // share


@pytest.mark.soak
@pytest.mark.skipif(not SOAK, reason="PER_TD_SOAK says for how many seconds")
@pytest.mark.parametrize("machine", MACHINES)
def test_for_a_long_time_no_order_of_operations_leads_away_from_the_model(machine):
    soak(machine)

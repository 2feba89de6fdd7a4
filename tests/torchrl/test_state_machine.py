"""Random operations on TorchRL's buffers with per_td's priorities, beside a model in numpy.

The examples are always the same. `PER_TD_SOAK=600 pytest -m soak -s tests/torchrl` runs others, for
so many seconds each, and tells how many.
"""

import copy
import math
import pickle
import tempfile

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, initialize, invariant, precondition, rule
from tensordict import TensorDict
from torchrl.data import LazyMemmapStorage, LazyTensorStorage, TensorDictReplayBuffer
from torchrl.data.replay_buffers.scheduler import LinearScheduler

from per_td import CheckpointError, EmptyBufferError, IndexRangeError, PriorityError, kernels
from per_td.torchrl import PrioritizedSampler, TensorDictPrioritizedReplayBuffer
from tests.machines import (
    ALPHA,
    CAN_BE,
    DRAWS,
    EPS,
    SOAK,
    TD_ERROR,
    UNIT,
    Kernels,
    as_it_is,
    check_drawn,
    run,
    soak,
)
from tests.model import EmptiableRing
from tests.oracle import data

# a cursor longer than the storage is no surprise here, nor is a state for a storage without data
pytestmark = [
    pytest.mark.filterwarnings("ignore:A cursor of length superior:UserWarning"),
    pytest.mark.filterwarnings("ignore:Loading the storage on an uninitialized:UserWarning"),
]

REDUCE = {
    "max": lambda rows: rows.max(1),
    "min": lambda rows: rows.min(1),
    "mean": lambda rows: rows.mean(1),
    "median": lambda rows: rows.min(1),  # the lower one of two
    "sum": lambda rows: rows.sum(1),
    "r2d2": lambda rows: np.float32(0.9) * rows.max(1) + np.float32(0.1) * rows.mean(1),
}
CONFIGURATION = st.fixed_dictionaries(
    {
        "capacity": CAN_BE([1, 7, 50, 257]),
        "alpha": ALPHA,
        "beta": UNIT,
        "eps": EPS,
        "weight_normalization": CAN_BE(["batch", "buffer", "none"]),
        "max_priority_within_buffer": st.booleans(),
        "td_error_unit": CAN_BE(["abs", "squared"]),
    }
)


def state_into_another(machine):
    other = machine.another()
    other.load_state_dict(machine.buffer.state_dict())
    return other


def dumped_and_loaded(machine):
    with tempfile.TemporaryDirectory() as folder:
        if not machine.buffer.storage.initialized:
            with pytest.raises(RuntimeError, match="non-initialized"):  # TorchRL's
                machine.buffer.dumps(folder)
            return machine.buffer
        machine.buffer.dumps(folder)
        other = machine.another()
        other.loads(folder)
        return other


def pickled(machine):
    if isinstance(machine.buffer.storage, LazyMemmapStorage):
        return machine.buffer  # TorchRL's storage cannot be pickled once it has a file
    return pickle.loads(pickle.dumps(machine.buffer))


COPIES = {
    "deepcopy": lambda machine: copy.deepcopy(machine.buffer),
    "pickle": pickled,
    "dumps and loads": dumped_and_loaded,
    "state_dict": state_into_another,
}
"""How a buffer can be had from a buffer. One more is one more entry."""


class DropInMachine(Kernels):
    """TensorDictPrioritizedReplayBuffer."""

    batches = Bundle("batches")

    @initialize(
        data=st.data(),
        given=CONFIGURATION,
        draw=CAN_BE(DRAWS),
        storage=CAN_BE([LazyTensorStorage, LazyTensorStorage, LazyMemmapStorage]),
        choice=CAN_BE(kernels.CHOICES),
    )
    def begin(self, data, given, draw, storage, choice):
        self.choose(choice)
        self.given = given | {"draw": draw[0], "method": draw[1]} | self.settings(data)
        self.storage, self.beta, self.next = storage, given["beta"], 0
        self.buffer = self.make(self.given)
        self.ring = EmptiableRing(
            given["capacity"],
            alpha=given["alpha"],
            eps=given["eps"],
            new_priority="buffer_max" if given["max_priority_within_buffer"] else "ever_max",
        )
        self.unseen, self.odd = 0, False  # writes that the priorities do not know of: sync=False

    def settings(self, data):
        """Those that TorchRL's own buffer with our sampler does not have, or not all of."""
        return {
            "reduction": data.draw(CAN_BE(sorted(REDUCE)), "reduction"),
            "sync": data.draw(CAN_BE([True, True, False]), "sync"),
            "collate_fn": data.draw(CAN_BE([None, None, as_it_is]), "collate_fn"),
        }

    def make(self, given):
        given = dict(given)
        storage = self.storage(given.pop("capacity"))
        generator = torch.Generator().manual_seed(5)
        return TensorDictPrioritizedReplayBuffer(storage=storage, generator=generator, **given)

    def another(self):
        """A buffer of other settings, that may have been in use."""
        other = self.make(self.given | {"alpha": 0.9, "beta": 0.1, "eps": 1.0})
        if self.odd:
            other.extend(self.numbered(3, None))
            other.update_priority(0, 77.0)
        return other

    # --- TD errors and priorities -----------------------------------------------------------------

    def numbered(self, n, td_error=None):
        """Transitions [n], which all differ, with TD errors, [n, k], if there are any."""
        self.next += n
        td = data(self.next - n, n)
        return td if td_error is None else td.set("td_error", torch.from_numpy(td_error))

    def td_errors(self, data, n, *, several):
        """[n, 1], or [n, 2] if `several`, float32."""
        some = np.float32(data.draw(st.lists(TD_ERROR, min_size=1, max_size=5), "TD errors"))
        random = np.random.default_rng(data.draw(st.integers(0, 99), "seed"))
        values = random.choice(some, (n, 1))
        if several and abs(some).max() < 1e30:  # else a sum is infinite
            values = np.concatenate([values, np.float32(0.5) * values], 1)
        return values

    def storable(self, td_error):
        """TorchRL's files take up no new entries, and no storage other shapes."""
        storage = self.buffer.storage
        if not storage.initialized:
            return True
        column = storage._storage.get("td_error", None)
        if column is None:
            return self.storage is not LazyMemmapStorage
        return column.shape[1:] == td_error.shape[1:]

    def root(self, values):
        return np.sqrt(values) if self.given["td_error_unit"] == "squared" else values

    def reduced(self, values):
        """[n, k] as [n]."""
        return values[:, 0] if values.shape[1] == 1 else REDUCE[self.given["reduction"]](values)

    def magnitude(self, values):
        """What a loss wrote, [n, k], as |delta| [n]."""
        return self.reduced(self.root(np.abs(values)))

    def catch_up(self):
        ring, new = self.ring, self.ring.for_new()
        for k in range(min(self.unseen, ring.capacity)):
            ring.set((ring.cursor - 1 - k) % ring.capacity, new)
        self.unseen = 0

    # --- writing ----------------------------------------------------------------------------------

    def wrote(self, items, td_error, *, supply=True):
        """The slots, once the model has written the same."""
        if not self.given["sync"]:
            self.unseen += len(items)
            return self.ring.write(items)
        priority = None
        if td_error is not None and supply:
            priority = self.magnitude(td_error) + np.float32(self.ring.eps)
        return self.ring.extend(items, priority)

    several_are_stored = True

    @rule(
        data=st.data(),
        more=st.booleans(),
        rated=st.booleans(),
        several=st.booleans(),
        supply=CAN_BE([None, None, True, False]),
    )
    def extend(self, data, more, rated, several, supply):
        capacity = self.given["capacity"]
        n = data.draw(st.integers(0, 2 * capacity + 3 if more else min(capacity, 9)), "n")
        td_error = self.td_errors(data, n, several=several and self.several_are_stored)
        td_error = td_error if rated and self.storable(td_error) else None
        td = self.numbered(n, td_error)
        if supply and not self.given.get("sync", True):
            with pytest.raises(RuntimeError, match="expected None or False"):
                self.buffer.extend(td, update_priority=True)
        elif n == 0 and not self.buffer.storage.initialized:
            with pytest.raises(IndexError):  # TorchRL's
                self.buffer.extend(td, update_priority=supply)
        else:
            items = td["action"].tolist()
            index = self.buffer.extend(td, update_priority=supply)
            assert index.tolist() == self.wrote(items, td_error, supply=supply is not False)

    @rule(data=st.data(), rated=st.booleans(), several=st.booleans())
    def add(self, data, rated, several):
        td_error = self.td_errors(data, 1, several=several and self.several_are_stored)
        td_error = td_error if rated and self.storable(td_error) else None
        td = self.numbered(1, td_error)[0]
        assert [int(self.buffer.add(td))] == self.wrote([td["action"].item()], td_error)

    @precondition(lambda self: len(self.ring))
    @rule(data=st.data(), form=CAN_BE(["int", "slice", "tensor"]))
    def set_items(self, data, form):
        """Contents only: neither priorities nor generations are touched."""
        slot = data.draw(st.integers(0, len(self.ring) - 1), "slot")
        td = self.numbered(1)
        index = {"int": slot, "slice": slice(slot, slot + 1), "tensor": torch.tensor([slot])}
        self.buffer[index[form]] = td[0] if form == "int" else td
        self.ring.item[slot] = td["action"].item()

    @rule(count=st.booleans())
    def empty(self, count):
        self.buffer.empty(empty_write_count=count)
        self.ring.empty(count=count)
        self.unseen = 0

    # --- drawing ----------------------------------------------------------------------------------

    @rule(target=batches, n=st.integers(1, 12), all_of_them=st.booleans(), info=st.booleans())
    def sample(self, n, all_of_them, info):
        self.catch_up()
        ring, once = self.ring, self.given["draw"] == "without_replacement"
        if all_of_them and once:
            n = max(1, ring.drawable())
        if ring.drawable() < (n if once else 1):
            with pytest.raises(EmptyBufferError):
                self.buffer.sample(n)
            return None
        twin = torch.Generator()
        twin.set_state(self.buffer._rng.get_state())
        batch = self.buffer.sample(n, return_info=info)
        if info:
            batch, added = batch
            assert all(torch.equal(batch[key], value) for key, value in added.items())
        self.check_batch(batch, torch.rand(n, dtype=torch.float64, generator=twin).numpy())
        return batch

    def check_batch(self, batch, point):
        ring, index = self.ring, batch["index"].tolist()
        items = [ring.item[i] for i in index]
        assert batch["action"].tolist() == items
        assert batch["observation"].tolist() == [[k] * 3 for k in items]
        assert batch["next", "reward"].view(-1).tolist() == items
        if "index_generation" in batch or type(self) is DropInMachine:
            assert batch["index_generation"].tolist() == [ring.generation[i] for i in index]
        expected = ring.weights(index, self.beta, self.given["weight_normalization"])
        expected = [w if w < 3.4e38 else math.inf for w in expected]
        weight = batch["priority_weight"]
        assert weight.dtype == torch.float32
        np.testing.assert_allclose(weight.numpy(), expected, rtol=2e-5, atol=1e-37)
        if self.given["draw"] == "without_replacement":
            assert len(set(index)) == len(index)
            assert all(ring.mass[i] > 0 for i in index)
        elif self.given["method"] == "tree":
            mass = self.table.masses[:].double().numpy()
            stratified = self.given["draw"] == "stratified"
            check_drawn(np.array(index), mass, point, stratified=stratified)

    # --- priorities -------------------------------------------------------------------------------

    def check_update(self, index, td_error, generation, dtype=torch.float32):
        """By `update_tensordict_priority`; what is meant may be gone."""
        batch = TensorDict({"index": index, "td_error": td_error}, [len(index)])
        batch["td_error"] = batch["td_error"].to(dtype)
        if generation is not None:
            batch["index_generation"] = generation
        self.catch_up()
        self.buffer.update_tensordict_priority(batch)
        self.updated(index.tolist(), self.magnitude(td_error.numpy()), generation)

    def updated(self, index, magnitude, generation):
        now = self.ring.generation
        if generation is None:
            then = [now[i] if i < len(self.ring) else math.nan for i in index]
        else:
            then = generation.tolist()
        self.ring.update(index, magnitude, then)

    @rule(data=st.data(), batch=batches, several=st.booleans(), named=CAN_BE([True, True, False]))
    def update_a_batch(self, data, batch, several, named):
        """It may be old: then what has been overwritten is stale."""
        if batch is None:
            return
        td_error = torch.from_numpy(self.td_errors(data, len(batch), several=several))
        generation = batch.get("index_generation", None) if named else None
        self.check_update(batch["index"], td_error, generation)

    @precondition(lambda self: len(self.ring))
    @rule(data=st.data(), n=st.integers(1, 12), dtype=CAN_BE([torch.float32, torch.float64]))
    def update_any(self, data, n, dtype):
        """With repetitions, and stale ones among others."""
        random = np.random.default_rng(data.draw(st.integers(0, 999)))
        index = random.integers(len(self.ring), size=n)
        generation = np.array(self.ring.generation)[index] + random.integers(-1, 2, size=n)
        td_error = torch.from_numpy(self.td_errors(data, n, several=False))
        self.check_update(
            torch.from_numpy(index), td_error, torch.from_numpy(generation), dtype=dtype
        )

    @rule(
        data=st.data(), n=st.integers(0, 12), form=CAN_BE(["tensor", "list", "int", "one for all"])
    )
    def update_priority(self, data, n, form):
        """By index, whatever lives there; nothing does beyond the filled slots."""
        n = 1 if form == "int" else n
        random = np.random.default_rng(data.draw(st.integers(0, 999)))
        index = random.integers(-1, self.ring.capacity, size=n)  # -1: what was not written
        td_error = self.td_errors(data, n, several=False)[:, 0]
        if form == "one for all" and n:
            td_error[:] = td_error[0]
        given = {
            "tensor": lambda: (torch.from_numpy(index), torch.from_numpy(td_error)),
            "list": lambda: (index.tolist(), td_error.tolist()),
            "int": lambda: (int(index[0]), float(td_error[0])),
            "one for all": lambda: (torch.from_numpy(index), float(td_error[0]) if n else 1.0),
        }
        self.catch_up()
        self.buffer.update_priority(*given[form]())
        live = (index >= 0) & (index < len(self.ring))
        self.ring.update(index[live].tolist(), self.root(np.abs(td_error[live])))

    @precondition(lambda self: len(self.ring))
    @rule(wrong=CAN_BE(["index", "nan", "inf", "count", "td_error", "no index", "extend", "state"]))
    def refuse(self, wrong):
        """What is wrong in one place changes nothing: `agree` looks."""
        self.buffer.state_dict()  # with sync=False, what was written is taken up now
        self.catch_up()
        REFUSED[wrong](self)

    # --- settings and copies ----------------------------------------------------------------------

    @rule(alpha=ALPHA)
    def set_alpha(self, alpha):
        self.buffer.sampler.alpha = alpha
        self.ring.set_alpha(alpha)

    @rule(beta=UNIT)
    def set_beta(self, beta):
        self.buffer.sampler.beta = self.beta = beta

    @rule()
    def anneal_beta(self):
        LinearScheduler(self.buffer, "beta", final_value=1.0, num_steps=4).step()
        self.beta += (1 - self.beta) / 4

    @rule(kind=CAN_BE(sorted(COPIES)), odd=st.booleans())
    def go_on_with_a_copy(self, kind, odd):
        self.odd = odd and self.storage is LazyTensorStorage  # TorchRL's files take up no entries
        old, self.buffer = self.buffer, COPIES[kind](self)
        if self.buffer is old:
            return
        if kind in ("dumps and loads", "state_dict"):
            self.catch_up()
            self.ring.stale = 0  # not part of a state
        self.agree()
        before = old.sampler.priority
        td = self.numbered(1)
        items = td["action"].tolist()
        self.buffer.extend(td)  # memory is not shared
        assert torch.equal(old.sampler.priority, before)
        self.wrote(items, None)

    # --- what always holds ------------------------------------------------------------------------

    @property
    def table(self):
        return self.buffer.sampler._table

    @invariant()
    def agree(self):
        if not hasattr(self, "ring"):
            return
        type(self).steps += 1
        buffer, ring, table, n = self.buffer, self.ring, self.table, len(self.ring)
        assert (len(buffer), buffer.write_count) == (n, ring.written)
        assert buffer.writer._cursor == ring.cursor
        assert (buffer.sampler.alpha, buffer.sampler._eps) == (ring.alpha, ring.eps)
        assert buffer.sampler.beta == pytest.approx(self.beta, abs=1e-12)
        if self.given["td_error_unit"] == "squared":
            self.agree_on_roots()
        assert buffer.sampler.priority.tolist() == ring.priority.tolist()
        np.testing.assert_allclose(table.masses[:].numpy(), ring.mass, rtol=1e-6)
        assert table.masses.total.item() == pytest.approx(math.fsum(ring.mass), rel=1e-6)
        assert table.for_new().item() == ring.for_new()
        assert table.ever_max.item() == ring.ever_max
        if table._smallest is not None and ring.drawable():
            least = ring.mass[ring.mass > 0].min()
            assert table._smallest.value.item() == pytest.approx(least, rel=1e-6)
        if n:
            held = buffer[:]
            assert held["action"].tolist() == buffer["action"].tolist() == ring.item[:n]
            assert held["next", "reward"].view(-1).tolist() == ring.item[:n]
            assert held["index"].tolist() == list(range(n))
            assert buffer[n - 1]["action"] == ring.item[n - 1]
        self.agree_on_late_updates()

    def agree_on_roots(self):
        """torch and numpy may round a root's last bit otherwise: the model takes up torch's."""
        ring, priority, most = self.ring, self.buffer.sampler.priority, self.table.ever_max
        np.testing.assert_allclose(priority.numpy(), ring.priority, rtol=3e-7, atol=0)
        assert most.item() == pytest.approx(ring.ever_max, rel=3e-7, abs=0)
        for slot in np.flatnonzero(priority.numpy() != ring.priority):
            ring.set(slot, priority.numpy()[slot])
        ring.ever_max = np.float32(most.item())

    def agree_on_late_updates(self):
        stats = self.buffer.stats()
        assert (stats["stale_updates"], stats["refused_priorities"]) == (self.ring.stale, 0)
        slots = torch.arange(self.ring.capacity)
        assert self.buffer.writer.generations_of(slots).tolist() == self.ring.generation


def refuse_update(machine, error, change):
    """An update of two, the first of which may be stale."""
    batch = TensorDict(
        {
            "index": torch.zeros(2, dtype=torch.int64),
            "index_generation": torch.tensor([-5, machine.ring.generation[0]]),
            "td_error": torch.ones(2),
        },
        [2],
    )
    change(batch)
    with pytest.raises(error):
        machine.buffer.update_tensordict_priority(batch)


def refuse_write(machine):
    td_error = np.float32([[1.0], [math.nan]])
    if machine.given["sync"] and machine.storable(td_error):
        with pytest.raises(PriorityError, match="nothing was written"):
            machine.buffer.extend(machine.numbered(2, td_error))


def refuse_state(machine):
    """Of another capacity."""
    other = machine.make(machine.given | {"capacity": machine.given["capacity"] + 1})
    other.extend(machine.numbered(3))
    with pytest.raises(CheckpointError):
        machine.buffer.load_state_dict(other.state_dict())
    with tempfile.TemporaryDirectory() as folder:
        other.dumps(folder)
        with pytest.raises(CheckpointError):
            machine.buffer.loads(folder)


def refuse_by_index(machine):
    for index, priority, error in (
        (machine.ring.capacity, 1.0, IndexRangeError),
        ([0, machine.ring.capacity], [1.0, 1.0], IndexRangeError),
        ([0, 0], [1.0, math.nan], PriorityError),
    ):
        with pytest.raises(error):
            machine.buffer.update_priority(index, priority)


def changed(key, value):
    return lambda batch: batch[key].__setitem__(-1, value)


REFUSED = {
    "index": lambda m: (
        refuse_update(m, IndexRangeError, changed("index", m.ring.capacity)),
        refuse_update(m, IndexRangeError, changed("index", -1)),
        refuse_by_index(m),
    ),
    "nan": lambda m: refuse_update(m, PriorityError, changed("td_error", math.nan)),
    "inf": lambda m: refuse_update(m, PriorityError, changed("td_error", math.inf)),
    "count": lambda m: refuse_update(
        m, PriorityError, lambda batch: batch._tensordict.update(td_error=torch.ones(3))
    ),
    "td_error": lambda m: refuse_update(m, PriorityError, lambda batch: batch.pop("td_error")),
    "no index": lambda m: refuse_update(m, PriorityError, lambda batch: batch.pop("index")),
    "extend": refuse_write,
    "state": refuse_state,
}
"""What is wrong, and has to change nothing. One more is one more entry."""


class SamplerMachine(DropInMachine):
    """PrioritizedSampler in TorchRL's own TensorDictReplayBuffer, which knows no late updates."""

    several_are_stored = False  # TorchRL raises, after it has written the data

    def settings(self, data):
        return {"reduction": data.draw(CAN_BE(sorted(set(REDUCE) - {"r2d2"})), "reduction")}

    def make(self, given):
        given = dict(given)
        capacity = given.pop("capacity")
        return TensorDictReplayBuffer(
            storage=self.storage(capacity),
            sampler=PrioritizedSampler(capacity, **given),
            generator=torch.Generator().manual_seed(5),
        )

    def magnitude(self, values):
        return self.root(np.abs(self.reduced(values)))  # TorchRL reduces what has a sign

    def wrote(self, items, td_error, *, supply=True):
        """As new, and then once more with the TD errors."""
        slots = self.ring.extend(items)
        if td_error is not None and supply:
            self.ring.update(slots, self.magnitude(td_error))
        return slots

    @rule(data=st.data(), rated=st.booleans())
    def add(self, data, rated):
        """Without a TD error, TorchRL hands the priority of the new back as if it were one."""
        td_error = self.td_errors(data, 1, several=False)
        td_error = td_error if rated and self.storable(td_error) else None
        td = self.numbered(1, td_error)[0]
        slot = int(self.buffer.add(td))
        assert [slot] == self.wrote([td["action"].item()], td_error)
        if td_error is None:
            eps = np.float32(self.ring.eps)
            new = max(self.ring.for_new() - eps, np.float32(0))
            squared = self.given["td_error_unit"] == "squared"
            new = np.sqrt(np.float32(np.float64(new) ** 2)) if squared else new
            self.ring.update([slot], [new])

    def updated(self, index, magnitude, generation):
        live = [j for j, i in enumerate(index) if i < len(self.ring)]
        self.ring.update([index[j] for j in live], magnitude[live])

    @precondition(lambda self: len(self.ring))
    @rule()
    def refuse(self):
        for wrong in ("nan", "inf"):
            REFUSED[wrong](self)
        refuse_by_index(self)

    def agree_on_late_updates(self):
        assert self.table.refused == 0


MACHINES = {DropInMachine: 100, SamplerMachine: 60}
"""With how many examples each."""


@pytest.mark.parametrize("machine", MACHINES)
def test_no_order_of_operations_leads_torchrls_buffers_away_from_the_model(machine):
    run(machine, MACHINES[machine], derandomize=True)
    assert machine.steps > MACHINES[machine]


@pytest.mark.soak
@pytest.mark.skipif(not SOAK, reason="PER_TD_SOAK says for how many seconds")
@pytest.mark.parametrize("machine", MACHINES)
def test_for_a_long_time_no_order_of_operations_leads_torchrls_buffers_away(machine):
    soak(machine)

"""Random operations on TorchRL's buffers with per_td's priorities, beside a model in numpy.

The examples are always the same. `PER_TD_SOAK=600 pytest -m soak -s tests/torchrl` runs others, for
so many seconds each, and tells how many.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, initialize, invariant, precondition, rule
from tensordict import TensorDict
from torchrl.data import LazyMemmapStorage, LazyTensorStorage, TensorDictReplayBuffer
from torchrl.data.replay_buffers.scheduler import LinearScheduler

from per_td import EmptyBufferError, kernels
from per_td.torchrl import PrioritizedSampler, TensorDictPrioritizedReplayBuffer
from tests.support.drop_in_model import CONFIGURATION, REDUCE, BesideTheModel
from tests.support.drop_in_steps import COPIES, REFUSED, refuse_by_index
from tests.support.machines import (
    ALPHA,
    CAN_BE,
    DRAWS,
    SOAK,
    UNIT,
    check_drawn,
    run,
    soak,
)
from tests.support.parameters import slow_but

# a cursor longer than the storage is no surprise here, nor is a state for a storage without data
pytestmark = [
    pytest.mark.filterwarnings("ignore:A cursor of length superior:UserWarning"),
    pytest.mark.filterwarnings("ignore:Loading the storage on an uninitialized:UserWarning"),
]


class DropInMachine(BesideTheModel):
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
        self.start(data, given, draw, storage, choice)

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

    several_are_stored = stamped = True

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
        if self.stamped:
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
            mass = self.buffer.sampler.mass.double().numpy()
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
        """By index, whatever lives there; beyond the filled slots, updates are late."""
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
        self.ring.stale += int((index >= len(self.ring)).sum())

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
        stored = kind in ("dumps and loads", "state_dict")
        if stored:
            self.catch_up()  # also where TorchRL refuses after that
        if self.buffer is old:
            return
        if stored:
            self.ring.stale = 0  # not part of a state
        self.agree()
        before = old.sampler.priority
        td = self.numbered(1)
        items = td["action"].tolist()
        self.buffer.extend(td)  # memory is not shared
        assert torch.equal(old.sampler.priority, before)
        self.wrote(items, None)

    @invariant()
    def agreed(self):
        if hasattr(self, "ring"):
            type(self).steps += 1
            self.agree()


class SamplerMachine(DropInMachine):
    """PrioritizedSampler in TorchRL's own TensorDictReplayBuffer, which knows no late updates."""

    several_are_stored = False  # TorchRL raises, after it has written the data
    stamped = False

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
        self.ring.stale += len(index) - len(live)

    @precondition(lambda self: len(self.ring))
    @rule()
    def refuse(self):
        for wrong in ("nan", "inf"):
            REFUSED[wrong](self)
        refuse_by_index(self)

    def agree_on_late_updates(self):
        counted = {"stale_updates": self.ring.stale, "refused_priorities": 0}
        assert self.buffer.sampler.stats() == counted


MACHINES = {DropInMachine: 100, SamplerMachine: 60}
"""With how many examples each."""


@pytest.mark.parametrize("share", slow_but([3], [3, 1]))
@pytest.mark.parametrize("machine", MACHINES)
def test_no_order_of_operations_leads_torchrls_buffers_away_from_the_model(machine, share):
    run(machine, MACHINES[machine] // share, derandomize=True)
    assert machine.steps > MACHINES[machine] // share


@pytest.mark.soak
@pytest.mark.skipif(not SOAK, reason="PER_TD_SOAK says for how many seconds")
@pytest.mark.parametrize("machine", MACHINES)
def test_for_a_long_time_no_order_of_operations_leads_torchrls_buffers_away(machine):
    soak(machine)

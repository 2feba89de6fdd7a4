"""TorchRL's buffers beside the model: what is handed in, and what always holds."""

import math

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torchrl.data import LazyMemmapStorage

from tests.support.machines import ALPHA, CAN_BE, EPS, TD_ERROR, UNIT, Kernels, as_it_is
from tests.support.model import EmptiableRing
from tests.support.oracle import data

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


class BesideTheModel(Kernels):
    """A `buffer`, and the `ring` that it has to agree with."""

    def start(self, data, given, draw, storage, choice):
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
            "sync": data.draw(CAN_BE([True, False]), "sync"),
            "collate_fn": data.draw(CAN_BE([None, None, as_it_is]), "collate_fn"),
        }

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

    # --- what always holds ------------------------------------------------------------------------

    def agree(self):
        buffer, ring, sampler, n = self.buffer, self.ring, self.buffer.sampler, len(self.ring)
        assert (len(buffer), buffer.write_count) == (n, ring.written)
        assert buffer.writer._cursor == ring.cursor
        assert (sampler.alpha, sampler.eps) == (ring.alpha, ring.eps)
        assert sampler.beta == pytest.approx(self.beta, abs=1e-12)
        if self.given["td_error_unit"] == "squared":
            self.agree_on_roots()
        assert sampler.priority.tolist() == ring.priority.tolist()
        np.testing.assert_allclose(sampler.mass.numpy(), ring.mass, rtol=1e-6)
        assert sampler.total_mass.item() == pytest.approx(math.fsum(ring.mass), rel=1e-6)
        assert sampler.state_dict()["ever_max"].item() == ring.ever_max
        sampler.check_valid()
        if n:
            held = buffer[:]
            assert held["action"].tolist() == buffer["action"].tolist() == ring.item[:n]
            assert held["next", "reward"].view(-1).tolist() == ring.item[:n]
            assert held["index"].tolist() == list(range(n))
            assert buffer[n - 1]["action"] == ring.item[n - 1]
        self.agree_on_late_updates()

    def agree_on_roots(self):
        """torch and numpy may round a root's last bit otherwise: the model takes up torch's."""
        ring, priority = self.ring, self.buffer.sampler.priority
        most = self.buffer.sampler.state_dict()["ever_max"]
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

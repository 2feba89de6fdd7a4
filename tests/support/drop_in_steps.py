"""How TorchRL's buffers are copied, and what they have to refuse: steps of their state machine."""

import copy
import math
import pickle
import tempfile

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torchrl.data import LazyMemmapStorage

from per_td import CheckpointError, IndexRangeError, PriorityError


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
        last = getattr(machine.buffer.storage, "_last_cursor", None)
        if isinstance(last, torch.Tensor) and not last.numel():
            with pytest.raises(IndexError):  # TorchRL's, after `extend` of nothing
                machine.buffer.dumps(folder)
            return machine.buffer
        machine.buffer.dumps(folder)
        other = machine.another()
        rated = machine.buffer[:].get("td_error", None) is not None
        if machine.odd and machine.stamped and rated:  # the other one's memory has no TD errors
            with pytest.raises(CheckpointError, match="expected no entry at 'td_error'"):
                other.loads(folder)
            return machine.buffer
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

"""What the tests of the TorchRL drop-in buffer share."""

import torch
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage

from per_td.torchrl import TensorDictPrioritizedReplayBuffer

ALPHA, BETA = 0.7, 0.5


def data(n, start=0, **extra):
    k = torch.arange(start, start + n)
    obs = k.float().unsqueeze(-1).expand(n, 3).clone()
    agents = TensorDict({"action": k.unsqueeze(-1).expand(n, 2).clone()}, [n, 2])
    following = TensorDict({"obs": obs + 1, "done": (k % 5 == 4).unsqueeze(-1)}, [n])
    return TensorDict({"x": k, "obs": obs, "agents": agents, "next": following, **extra}, [n])


def make(capacity=20, storage=LazyTensorStorage, **settings):
    """A buffer; `storage` is a class or makes one."""
    settings = {"alpha": ALPHA, "beta": BETA, "batch_size": 32, **settings}
    kept = storage if callable(storage) and not isinstance(storage, type) else storage(capacity)
    return TensorDictPrioritizedReplayBuffer(storage=kept, **settings)


def learn(buffer, batch):
    batch["td_error"] = batch["x"].float().reshape(-1) / 5 + 0.1
    buffer.update_tensordict_priority(batch)


def same(a, b):
    """Equal entries, batch sizes and devices, all the way down."""
    assert a.batch_size == b.batch_size
    assert a.device == b.device
    assert a.is_locked == b.is_locked
    assert set(a.keys()) == set(b.keys())
    for key, value in a.items():
        other = b.get(key)
        if isinstance(value, TensorDict):
            same(value, other)
        else:
            assert value.dtype == other.dtype, key
            assert type(value) is type(other), key
            torch.testing.assert_close(value, other, rtol=0, atol=0, msg=str(key))

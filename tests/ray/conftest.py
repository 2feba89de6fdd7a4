"""One small Ray instance for all tests of this folder."""

from importlib.util import find_spec

import pytest
import torch
from tensordict import TensorDict

# Without Ray the other modules of this folder say that they are skipped, and why
collect_ignore_glob = [] if find_spec("ray") else ["test_[cluws]*.py"]


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """Ray on this machine, without its dashboard, with a small object store."""
    ray = pytest.importorskip("ray")
    ray.init(
        num_cpus=3,  # Ray starts as many processes at once
        include_dashboard=False,
        object_store_memory=150 * 2**20,
        log_to_driver=False,
        configure_logging=False,
    )
    yield
    ray.shutdown()


@pytest.fixture
def sharded(cluster):
    """Makes buffers, and ends their actors after the test."""
    from per_td.ray import ShardedReplayBuffer

    made = []

    def make(num_shards=2, capacity_per_shard=64, batch_size=None, **options):
        options.setdefault("actor_options", {"num_cpus": 0})
        options.setdefault("generator", torch.Generator().manual_seed(7))
        made.append(ShardedReplayBuffer(num_shards, capacity_per_shard, batch_size, **options))
        return made[-1]

    yield make
    for buffer in made:
        buffer.close()


@pytest.fixture
def given_to_actors(monkeypatch):
    """Collects the arguments of constructors of actors: their bytes, and the handles in them."""
    from ray._private.worker import global_worker
    from ray.actor import ActorClass

    collected, start = [], ActorClass._remote

    def collect(self, args=None, kwargs=None, **options):
        for value in [*(args or ()), *(kwargs or {}).values()]:
            content = global_worker.get_serialization_context().serialize(value)
            collected.append((content.total_bytes, content.contained_object_refs))
        return start(self, args, kwargs, **options)

    monkeypatch.setattr(ActorClass, "_remote", collect)
    return collected


@pytest.fixture
def numbered():
    """Transitions that know their number: numbered(start, n)."""

    def make(start, n):
        number = torch.arange(start, start + n)
        return TensorDict({"id": number, "x": number.float().unsqueeze(1).expand(n, 3)}, [n])

    return make

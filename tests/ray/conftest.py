"""One small Ray instance for all tests of this folder, and shards that answer in this process."""

from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from tensordict import TensorDict

from per_td.errors import IndexRangeError

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


class Answer:
    """What `ray.get` returns or raises for a message; "late" ones are never ready."""

    def __init__(self, state):
        self.state, self.value, self.error = state, None, None


class Actor:
    """A shard that does what a message says when it is sent, and notes the message's name."""

    def __init__(self, settings, seed, folder):
        from per_td.ray.shard import Shard

        self.shard = Shard(settings, seed=seed, folder=folder)
        self.messages = []
        self.state = "answers"  # | "late" | "lost"

    def __getattr__(self, name):
        return SimpleNamespace(remote=lambda *given, **named: self._do(name, given, named))

    def _do(self, name, given, named):
        self.messages.append(name)
        answer = Answer(self.state)
        if self.state == "lost":
            answer.error = _lost()
            return answer
        try:
            answer.value = getattr(self.shard, name)(*given, **named)
        except IndexRangeError as error:
            answer.error = error
        return answer

    def count(self, name):
        return self.messages.count(name)


def _lost():
    from ray.exceptions import RayActorError

    return RayActorError()


@pytest.fixture
def local(monkeypatch):
    """Makes buffers on such shards, with 20 transitions of unequal priorities in each."""
    import ray

    from per_td.ray import ShardedReplayBuffer, actors

    made = []

    def start(seeds, settings, *, folder, **_):
        own = [None if folder is None else f"{folder}/{seed}" for seed in seeds]
        pairs = zip(seeds, own, strict=True)
        made.extend(Actor(settings, seed, folder=path) for seed, path in pairs)
        return made[-len(seeds) :], []

    def wait(answers, *, num_returns, timeout, fetch_local=True):
        ready = [answer for answer in answers if answer.state != "late"]
        return ready, [answer for answer in answers if answer.state == "late"]

    def get(answers, timeout=None):
        if isinstance(answers, list):
            return [get(answer) for answer in answers]
        if answers.error is not None:
            raise answers.error
        return answers.value

    monkeypatch.setattr(actors, "start", start)
    monkeypatch.setattr(ray, "wait", wait)
    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(ray, "kill", lambda actor, no_restart: actor.messages.append("kill"))

    def make(num_shards=3, batch_size=32, **options):
        generator = torch.Generator().manual_seed(5)
        options = {"alpha": 1.0, "eps": 0.25, "refresh_s": 1e9, "timeout_s": 0.05} | options
        buffer = ShardedReplayBuffer(
            num_shards, 64, batch_size, generator=generator, device="cpu", **options
        )
        for shard, actor in enumerate(buffer._shards):
            priority = torch.rand(20, generator=generator) + 0.1
            data = {"id": torch.arange(20) + 100 * shard}
            buffer.writer().extend(data, priority, key=shard)
            actor.messages.clear()
        assert len(buffer) == 20 * num_shards
        return buffer

    yield make
    for actor in made:
        if actor.shard._log is not None:
            actor.shard._log.close()

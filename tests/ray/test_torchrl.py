"""per_td's drop-in buffer inside TorchRL's own Ray classes."""

from functools import partial

import pytest
import torch
from tensordict import TensorDict

ray = pytest.importorskip("ray")


def drop_in():
    """TorchRL 0.14.1 hands `delayed_init` to every class, which its own prioritized one refuses."""
    from per_td.torchrl import TensorDictPrioritizedReplayBuffer

    class Remote(TensorDictPrioritizedReplayBuffer):
        def __init__(self, *, delayed_init: bool = False, **settings) -> None:
            super().__init__(**settings)

    return Remote


@pytest.fixture
def remote_buffer(cluster):
    from torchrl.data.replay_buffers import LazyTensorStorage, RayReplayBuffer

    buffer = RayReplayBuffer(
        replay_buffer_cls=drop_in(),
        alpha=0.7,
        beta=0.5,
        storage=partial(LazyTensorStorage, 100),
        batch_size=8,
        prefetch=2,
        transform=lambda batch: batch.set("twice", 2 * batch["x"]) if "x" in batch else batch,
        remote_config={"num_cpus": 0},
    )
    yield buffer
    buffer.close()


@pytest.mark.slow
def test_the_drop_in_works_inside_torchrls_ray_replay_buffer(remote_buffer):
    remote_buffer.extend(TensorDict({"x": torch.arange(20.0)}, [20]))
    assert len(remote_buffer) == 20
    batch = remote_buffer.sample()
    assert batch["x"].shape == (8,)
    assert torch.equal(batch["twice"], 2 * batch["x"])
    hot = batch[:1]
    hot["td_error"] = torch.tensor([1e6])
    remote_buffer.update_tensordict_priority(hot)
    for _ in range(2):  # drawn ahead of the update
        remote_buffer.sample()
    again = remote_buffer.sample()
    assert (again["index"] == hot["index"]).float().mean() > 0.9
    assert torch.isfinite(again["priority_weight"]).all()


def random_actions(environment):
    from torchrl.modules import RandomPolicy

    return RandomPolicy(environment.action_spec)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The policy is not an nn.Module:UserWarning")
@pytest.mark.filterwarnings("ignore:RayCollector iteration started before weight:UserWarning")
def test_a_ray_collector_fills_the_drop_in(remote_buffer):
    from torchrl.collectors.distributed import RayCollector
    from torchrl.envs import GymEnv

    make = partial(GymEnv, "CartPole-v1")
    collector = RayCollector(
        [make],
        random_actions(make()),
        frames_per_batch=20,
        total_frames=40,
        remote_configs={"num_cpus": 0, "num_gpus": 0, "memory": 2**28},
        replay_buffer=remote_buffer,
        sync=True,
        collector_kwargs={"extend_buffer": True},
    )
    try:
        for _ in collector:
            pass
    finally:
        collector.shutdown(shutdown_ray=False)
    assert len(remote_buffer) == 40
    batch = remote_buffer.sample()
    assert batch["next", "reward"].shape == (8, 1)
    batch["td_error"] = torch.rand(8)
    remote_buffer.update_tensordict_priority(batch)

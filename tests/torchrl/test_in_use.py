"""The drop-in buffer inside what TorchRL builds around its own: collectors, losses, trainers."""

from functools import partial

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import NormalParamExtractor, TensorDictModule
from torch import nn
from torchrl.collectors import Collector, MultiAsyncCollector, MultiSyncCollector
from torchrl.data import LazyTensorStorage
from torchrl.data import PrioritizedSampler as TorchRLSampler
from torchrl.data import TensorDictReplayBuffer as TorchRLUniform
from torchrl.data.replay_buffers.scheduler import LinearScheduler
from torchrl.envs import GymEnv, MultiStepTransform, SerialEnv
from torchrl.modules import ProbabilisticActor, QValueActor, TanhNormal, ValueOperator
from torchrl.objectives import DDPGLoss, DQNLoss, SACLoss, SoftUpdate, TD3Loss
from torchrl.trainers import ReplayBufferTrainer, Trainer

from per_td.torchrl import TensorDictPrioritizedReplayBuffer

cart_pole = partial(GymEnv, "CartPole-v1")
pendulum = partial(GymEnv, "Pendulum-v1")


class Join(nn.Linear):
    """A linear layer over its concatenated arguments."""

    def forward(self, *args):
        return super().forward(torch.cat(args, -1))


def make(capacity=200, ndim=1, **settings):
    settings = {"alpha": 0.6, "beta": 0.4, "batch_size": 16, **settings}
    storage = LazyTensorStorage(capacity, ndim=ndim)
    return TensorDictPrioritizedReplayBuffer(storage=storage, **settings)


def dqn_loss(env):
    return DQNLoss(QValueActor(nn.Linear(4, 2), spec=env.action_spec), action_space="one-hot")


def gaussian(env):
    net = nn.Sequential(nn.Linear(3, 2), NormalParamExtractor())
    return ProbabilisticActor(
        TensorDictModule(net, in_keys=["observation"], out_keys=["loc", "scale"]),
        in_keys=["loc", "scale"],
        distribution_class=TanhNormal,
        spec=env.action_spec,
        return_log_prob=True,
    )


def linear_policy():
    return TensorDictModule(nn.Linear(3, 1), in_keys=["observation"], out_keys=["action"])


def critic():
    return ValueOperator(Join(4, 1), in_keys=["observation", "action"])


LOSSES = {
    "DQNLoss": (
        cart_pole,
        lambda env, **kw: DQNLoss(dqn_loss(env).value_network, action_space="one-hot", **kw),
    ),
    "SACLoss": (
        pendulum,
        lambda env, **kw: SACLoss(gaussian(env), critic(), action_spec=env.action_spec, **kw),
    ),
    "TD3Loss": (
        pendulum,
        lambda env, **kw: TD3Loss(linear_policy(), critic(), action_spec=env.action_spec, **kw),
    ),
    "DDPGLoss": (pendulum, lambda env, **kw: DDPGLoss(linear_policy(), critic(), **kw)),
}


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", LOSSES)
def test_losses_train_from_a_collector_and_set_the_priorities(name, reduction):
    env_of, loss_of = LOSSES[name]
    env = env_of()
    quiet = {"scalar_output_mode": "exclude"} if name == "SACLoss" else {}
    loss = loss_of(env, reduction=reduction, **quiet)
    updater = SoftUpdate(loss, eps=0.9)
    optimizer = torch.optim.Adam(loss.parameters(), 1e-3)
    unit = "abs" if name == "SACLoss" else "squared"
    buffer = make(td_error_unit=unit)
    collector = Collector(env, None, frames_per_batch=8, total_frames=40)
    expected = torch.zeros(200)
    for data in collector:
        slots = buffer.extend(data)
        expected[slots] = buffer.sampler.priority[slots]
        batch = buffer.sample()
        losses = loss(batch)
        total = sum(v for k, v in losses.items() if k.startswith("loss_") or k == "loss")
        total.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        updater.step()
        buffer.update_tensordict_priority(batch)
        td_error = batch["td_error"].reshape(-1).detach()
        expected[batch["index"]] = td_error.sqrt() if unit == "squared" else td_error
        torch.testing.assert_close(buffer.sampler.priority, expected, rtol=1e-5, atol=1e-6)
    collector.shutdown()
    assert buffer._cache.of(buffer, marks=True) is not None
    assert len(expected[:40].unique()) > 10


@pytest.mark.parametrize("extend_buffer", [True, False])
@pytest.mark.parametrize("sync", [True, False])
def test_a_collector_writes_to_the_buffer_it_is_given(sync, extend_buffer):
    buffer = make(sync=sync)
    collector = Collector(
        cart_pole(),
        None,
        frames_per_batch=20,
        total_frames=100,
        replay_buffer=buffer,
        extend_buffer=extend_buffer,
    )
    for written, _ in enumerate(collector, 1):
        assert len(buffer) == buffer.write_count == 20 * written
        batch = buffer.sample()
        assert (batch["index"] < len(buffer)).all()
        batch["td_error"] = torch.full((16,), 2.0)
        buffer.update_tensordict_priority(batch)
    collector.shutdown()
    buffer.sample()
    assert (buffer.sampler.priority[:100] > 0).all()
    assert buffer.stats()["stale_updates"] == 0


@pytest.mark.parametrize(
    ("kind", "workers", "sync"),
    [
        pytest.param(MultiSyncCollector, 2, True, marks=pytest.mark.slow),
        (MultiAsyncCollector, 1, False),
    ],
)
def test_processes_write_to_the_buffer_they_are_given(kind, workers, sync):
    capacity = 50
    buffer = make(capacity, shared=True, sync=sync)
    collector = kind(
        [cart_pole] * workers,
        None,
        frames_per_batch=20,
        total_frames=200,
        replay_buffer=buffer,
    )
    first = None
    for _ in collector:
        if not len(buffer):
            continue
        batch = buffer.sample()
        first = batch if first is None else first
        batch["td_error"] = torch.full((16,), 3.0)
        buffer.update_tensordict_priority(batch)
    collector.shutdown()
    assert len(buffer) == capacity
    assert buffer.write_count >= 200
    buffer.sample()
    assert (buffer.sampler.priority > 0).all()
    late = buffer.stats()["stale_updates"]
    before = buffer.sampler.priority
    first["td_error"] = torch.full((16,), 99.0)
    buffer.update_tensordict_priority(first)  # all of it has been overwritten, by other processes
    assert torch.equal(buffer.sampler.priority, before)
    assert buffer.stats()["stale_updates"] == late + 16


@pytest.mark.parametrize("frames", [2, 8])
def test_a_vectorised_environment_fills_a_storage_of_two_dimensions(frames):
    env = SerialEnv(2, cart_pole)
    buffer = make(40, ndim=2)
    loss = dqn_loss(env)
    SoftUpdate(loss, eps=0.9)
    collector = Collector(env, None, frames_per_batch=frames, total_frames=48, replay_buffer=buffer)
    for _ in collector:
        batch = buffer.sample()
        assert batch["index"].shape == (16, 2)
        loss(batch)
        buffer.update_tensordict_priority(batch)
        flat = batch["index"] @ torch.tensor([2, 1])
        torch.testing.assert_close(buffer.sampler.priority[flat], batch["td_error"].reshape(-1))
    collector.shutdown()
    assert len(buffer) == 40
    assert buffer.stats()["stale_updates"] == 0


def test_multi_step_transitions_are_stored():
    buffer = make(transform=MultiStepTransform(n_steps=3, gamma=0.9))
    rollout = cart_pole().rollout(10, break_when_any_done=False)
    assert buffer.extend(rollout[:2]).numel() == 0
    buffer.extend(rollout[2:])
    assert len(buffer) == 8 - 1
    batch = buffer.sample()
    assert "steps_to_next_obs" in batch
    batch["td_error"] = torch.rand(16)
    buffer.update_tensordict_priority(batch)


@pytest.mark.filterwarnings("ignore:The .* hook stage will be replaced:FutureWarning")
def test_a_trainer_extends_samples_and_updates():
    torch.manual_seed(0)
    env = cart_pole()
    loss = dqn_loss(env)
    buffer = make(td_error_unit="squared")
    beta = LinearScheduler(buffer, "beta", final_value=1.0, num_steps=4)
    trainer = Trainer(
        collector=Collector(env, None, frames_per_batch=20, total_frames=80),
        total_frames=80,
        frame_skip=1,
        optim_steps_per_batch=2,
        loss_module=loss,
        optimizer=torch.optim.Adam(loss.parameters()),
        target_net_updater=SoftUpdate(loss, eps=0.9),
        progress_bar=False,
    )
    ReplayBufferTrainer(buffer, flatten_tensordicts=True).register(trainer)
    trainer.register_op("post_steps", beta.step)
    trainer.train()
    assert len(buffer) == 80
    assert buffer.sampler.beta == 1.0
    assert len(buffer.sampler.priority[:80].unique()) > 10
    other = make(td_error_unit="squared")
    ReplayBufferTrainer(other).load_state_dict(ReplayBufferTrainer(buffer).state_dict())
    assert torch.equal(other.sampler.priority, buffer.sampler.priority)


def test_draws_and_weights_are_those_of_torchrls_own_sampler():
    try:
        theirs = TorchRLSampler(20, 0.7, 0.5, eps=1e-6)
    except RuntimeError as error:
        pytest.skip(f"TorchRL cannot construct its own: {error}")
    ours = make(20, alpha=0.7, beta=0.5, eps=1e-6, batch_size=20_000)
    reference = TorchRLUniform(storage=LazyTensorStorage(20), sampler=theirs, batch_size=20_000)
    counts, weights = [], []
    for buffer in (ours, reference):
        buffer.extend(TensorDict({"x": torch.arange(20)}, [20]))
        buffer.update_priority(torch.arange(20), torch.linspace(0.1, 3, 20))
        batch = buffer.sample()
        counts.append(torch.bincount(batch["index"], minlength=20) / 20_000)
        weight = torch.zeros(20)
        weight[batch["index"]] = batch["priority_weight"]
        weights.append(weight)
    torch.testing.assert_close(*counts, rtol=0, atol=0.012)
    torch.testing.assert_close(*weights, rtol=1e-4, atol=0)

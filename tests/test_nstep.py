import copy
import io
import math
import pickle
import re
import warnings
from contextlib import suppress
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.buffers import NStepReplayBuffer
from tensordict import TensorDict

from per_td import (
    AllocationError,
    CheckpointError,
    ConfigurationError,
    IndexRangeError,
    NStepWriter,
    PerTdError,
    PrioritizedReplayBuffer,
    PriorityError,
    SchemaError,
)
from tests.support.fuzz import frozen, hostile
from tests.support.n_steps import Plain, Written, collected, seeded, steps
from tests.support.parameters import few_of_all, slow_but

FOLDER = Path(__file__).parent.parent / "docs"
PAGE = (FOLDER / "vector_loop.md").read_text()


def integer(low: int, high: int, generator: torch.Generator) -> int:
    return int(torch.randint(low, high, (), generator=generator))


def assert_same(rows: TensorDict, expected: list[dict], rel: float = 1e-6) -> None:
    assert len(rows) == len(expected)
    for name in ("observation", "action", "discount", "steps"):
        ours = rows[name].squeeze(-1) if name in ("discount", "steps") else rows[name]
        theirs = torch.tensor([row[name] for row in expected], dtype=ours.dtype)
        assert torch.equal(ours, theirs), name
    after = rows["next"]
    for name, key in (("observation", "next"), ("terminated",) * 2, ("truncated",) * 2):
        theirs = torch.tensor([row[key] for row in expected])
        assert torch.equal(after[name].view(theirs.shape), theirs), name
    rewards = torch.tensor([row["reward"] for row in expected]).view(-1, 1)
    torch.testing.assert_close(after["reward"], rewards, rtol=rel, atol=1e-6)
    assert torch.equal(after["done"], after["terminated"] | after["truncated"])


# --- against others' implementations ----------------------------------------------------------


@pytest.mark.parametrize("exact", slow_but([True], [True, False]))
def test_a_thousand_trajectories_are_as_torchrls_multi_step_has_them(exact):
    postprocs = pytest.importorskip("torchrl.data.postprocs")
    generator = seeded(exact)
    for _ in range(125):  # of 8 trajectories each
        n, length = integer(1, 7, generator), integer(1, 30, generator)
        gamma = float(torch.rand((), generator=generator)) * 0.99 + 0.01
        gamma = 2.0 ** -integer(0, 3, generator) if exact else gamma
        dtype = torch.float32 if exact else torch.float64
        trajectories = steps(8, length, generator=generator, exact=exact, dtype=dtype)
        ours = collected(trajectories, n, gamma)
        theirs = postprocs.MultiStep(gamma=gamma, n_steps=n)(trajectories.clone()).flatten()
        close = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-12, "atol": 1e-12}
        torch.testing.assert_close(ours["next", "reward"], theirs["next", "reward"], **close)
        assert torch.equal(ours["next", "observation"], theirs["next", "observation"])
        assert torch.equal(ours["observation"], theirs["observation"])
        assert torch.equal(ours["action"], theirs["action"])
        assert torch.equal(ours["steps"].squeeze(-1), theirs["steps_to_next_obs"])
        kept = ~ours["next", "terminated"]  # theirs leaves it to the flag of the last step
        discount = theirs["gamma"].to(dtype).unsqueeze(-1) * kept
        torch.testing.assert_close(ours["discount"], discount, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("exact", slow_but([True], [True, False]))
def test_a_thousand_trajectories_are_as_torchrls_multi_step_transform_writes_them(exact):
    transforms = pytest.importorskip("torchrl.envs.transforms")
    generator = seeded(10 + exact)
    for _ in range(125):
        n, length = integer(1, 6, generator), 5 * integer(2, 7, generator)
        gamma = 2.0 ** -integer(0, 3, generator) if exact else 0.97
        dtype = torch.float32 if exact else torch.float64
        trajectories = steps(8, length, generator=generator, exact=exact, dtype=dtype)
        transform = transforms.MultiStepTransform(n_steps=n, gamma=gamma)
        written = [transform.inv(piece) for piece in trajectories.split(5, 1)]
        theirs = torch.cat([piece for piece in written if piece is not None], 1).flatten()
        ours = collected(trajectories, n, gamma)
        ours = ours.view(8, length)[:, : length - n].flatten()  # it keeps n steps back
        close = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-12, "atol": 1e-12}
        torch.testing.assert_close(ours["next", "reward"], theirs["next", "reward"], **close)
        assert torch.equal(ours["next", "observation"], theirs["next", "observation"])
        assert torch.equal(ours["observation"], theirs["observation"])
        assert torch.equal(ours["steps"].squeeze(-1), theirs["steps_to_next_obs"])


def by_stable_baselines(trajectory: TensorDict, n: int, gamma: float):
    """All n-step transitions of a trajectory [T] from `NStepReplayBuffer`."""
    box = spaces.Box(-np.inf, np.inf, (2,))
    length = len(trajectory)
    buffer = NStepReplayBuffer(
        length, box, spaces.Discrete(4), device="cpu", n_steps=n, gamma=gamma
    )
    for td in trajectory:
        after = td["next"]
        cut = bool(after["truncated"] & ~after["terminated"])
        buffer.add(
            td["observation"].numpy()[None],
            after["observation"].numpy()[None],
            td["action"].numpy()[None],
            after["reward"].numpy(),
            after["done"].numpy(),
            [{"TimeLimit.truncated": cut}],
        )
    return buffer._get_samples(np.arange(length))


@pytest.mark.parametrize("exact", slow_but([True], [True, False]))
def test_a_thousand_trajectories_are_as_stable_baselines3_has_them(exact):
    generator = seeded(20 + exact)
    for _ in range(125):
        n, length = integer(1, 7, generator), integer(1, 30, generator)
        gamma = 2.0 ** -integer(0, 3, generator) if exact else 0.97
        trajectories = steps(8, length, generator=generator, exact=exact)
        ours = collected(trajectories, n, gamma).view(8, length)
        for trajectory, rows in zip(trajectories, ours, strict=True):
            theirs = by_stable_baselines(trajectory, n, gamma)
            if exact:
                assert torch.equal(rows["next", "reward"], theirs.rewards)
            else:
                torch.testing.assert_close(rows["next", "reward"], theirs.rewards)
            assert torch.equal(rows["next", "observation"], theirs.next_observations)
            assert torch.equal(rows["observation"], theirs.observations)
            assert torch.equal(rows["action"], theirs.actions.squeeze(-1))
            assert torch.equal(rows["next", "terminated"].float(), theirs.dones)
            target = theirs.discounts * (1 - theirs.dones)
            torch.testing.assert_close(rows["discount"], target, rtol=1e-6, atol=0)


# --- against plain lists ----------------------------------------------------------------------


def fed(seed: int, writer, plain: Plain, *, length: int, mask: bool, prioritized: bool) -> None:
    """Give both the same steps of random environments, and flush some now and then."""
    generator, envs = seeded(seed), writer.num_envs
    for td in steps(envs, length, generator=generator).unbind(1):
        chosen = torch.randperm(envs, generator=generator)[: integer(0, envs + 1, generator)]
        priority = torch.rand(envs, generator=generator) if prioritized else None
        if mask:
            part = torch.zeros(envs, dtype=torch.bool).index_fill_(0, chosen, True)
            writer.add(td, priority=priority, mask=part)
            chosen = chosen.sort().values
        elif prioritized:
            writer.add(td[chosen], chosen, priority=priority[chosen])
        else:
            writer.add(td[chosen], chosen)
        given = None if priority is None else priority[chosen]
        plain.add(td[chosen], chosen.tolist(), given)
        if integer(0, 10, generator) == 0:
            chosen = chosen.sort().values
            writer.flush(chosen)
            plain.flush(chosen.tolist())


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("autoreset", ["same_step", "next_step"])
@pytest.mark.parametrize(("n", "envs"), [(1, 1), (1, 5), (2, 3), (3, 8), (7, 2), (50, 3)])
def test_any_ends_and_environments_are_as_plain_lists_have_them(n, envs, autoreset, mask):
    target = Written()
    writer = NStepWriter(target, n, 0.9, envs, autoreset=autoreset)
    plain = Plain(n, 0.9, envs, autoreset)
    fed(n * 100 + envs, writer, plain, length=60, mask=mask, prioritized=True)
    assert writer.pending.tolist() == [len(queue) for queue in plain.pending]
    assert_same(target.rows, plain.written)
    expected = [row["priority"] for row in plain.written]
    assert target.priorities == pytest.approx(expected, rel=1e-6)
    writer.flush()
    plain.flush(range(envs))
    assert_same(target.rows, plain.written)
    assert writer.flush() is None


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("prioritized", [False, True])
@pytest.mark.parametrize("n", [1, 3])
def test_each_environment_may_have_a_buffer_of_its_own(device, n, prioritized, mask):
    buffers = PrioritizedReplayBuffer(500, num_buffers=4, device=device)
    plain = Plain(n, 0.9, 4)
    writer = NStepWriter(buffers, n, 0.9, 4)
    fed(3, writer, plain, length=40, mask=mask, prioritized=prioritized)
    by_env = [[] for _ in range(4)]
    for row in plain.written:
        by_env[int(row["observation"][0]) // 40].append(row)
    assert buffers.lengths.tolist() == [len(rows) for rows in by_env]
    for e, rows in enumerate(by_env):
        assert_same(buffers.transitions[e][: len(rows)].cpu(), rows)
        if prioritized:
            expected = [row["priority"] for row in rows]
            assert buffers.priority[e][: len(rows)].tolist() == pytest.approx(expected)
    writer.flush()
    assert int(buffers.lengths.sum()) == len(plain.written) + sum(map(len, plain.pending))


@pytest.mark.parametrize("many", [None, 4])
def test_env_and_mask_go_together(many):
    buffer = PrioritizedReplayBuffer(20, num_buffers=many)
    writer = NStepWriter(buffer, 1, 0.9, 4)
    td = steps(4, 1, generator=seeded(18), ends=0.0)[:, 0]
    writer.add(td[[3, 1, 0]], [3, 1, 0], mask=[True, False, True])
    if many:
        assert buffer.lengths.tolist() == [1, 0, 0, 1]
        rows = buffer.transitions["observation"][[3, 0], 0]
    else:
        rows = buffer.transitions["observation"]
    assert torch.equal(rows, td["observation"][[3, 0]])


def test_a_state_does_not_change_with_the_next_steps():
    writer = NStepWriter(Written(), 3, 0.9, 3)
    for number in range(2):
        writer.add(step(number), priority=[1.0, 2.0, 3.0])
    state = writer.state_dict()
    before = frozen(state)
    for number in range(5):
        writer.add(step(number), priority=[4.0, 5.0, 6.0])
    assert frozen(state) == before


def test_long_returns_are_summed_in_float64():
    rewards = torch.cat([torch.tensor([1e8]), torch.ones(999), torch.tensor([-1e8])])
    trajectory = steps(1, 1001, generator=seeded(0), ends=0.0)
    trajectory["next", "reward"] = rewards.view(1, -1, 1)
    assert float(collected(trajectory, 1001, 1.0)["next", "reward"][0]) == 999


@pytest.mark.parametrize("gamma", [0.0, 1.0])
def test_gamma_may_be_0_or_1(gamma):
    trajectories = steps(3, 20, generator=seeded(1))
    rows, plain = collected(trajectories, 3, gamma), Plain(3, gamma, 3)
    for td in trajectories.unbind(1):
        plain.add(td, range(3))
    plain.flush(range(3))
    assert_same(rows, sorted(plain.written, key=lambda row: row["observation"]))


# --- what steps may be ------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(), (1,)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_rewards_keep_their_shape_and_dtype_and_discount_and_steps_take_it(size, dtype):
    trajectories = steps(2, 10, generator=seeded(2), dtype=dtype)
    trajectories["next", "reward"] = trajectories["next", "reward"].view(2, 10, *size)
    rows = collected(trajectories, 3, 0.5)
    for leaf in (rows["next", "reward"], rows["discount"]):
        assert (leaf.dtype, leaf.shape) == (dtype, (20, *size))
    assert (rows["steps"].dtype, rows["steps"].shape) == (torch.int64, (20, *size))


@pytest.mark.parametrize("flags", [("truncated",), ("done",), ("truncated", "done")])
def test_truncated_or_done_is_enough(flags):
    trajectories = steps(3, 30, generator=seeded(3))
    expected = collected(trajectories, 3, 0.9)
    left_out = [("next", name) for name in ("truncated", "done") if name not in flags]
    rows = collected(trajectories.exclude(*left_out), 3, 0.9)
    assert (rows == expected.exclude(*left_out)).all()


def test_entries_at_the_root_are_of_the_first_step_and_others_of_the_last():
    trajectories = steps(2, 10, generator=seeded(4), ends=0.0)
    time = torch.arange(10).expand(2, 10)
    trajectories["agents", "time"] = time
    trajectories["next", "agents", "time"] = time
    trajectories["empty"] = torch.zeros(2, 10, 0)
    trajectories["small"] = time.to(torch.uint16)
    rows = collected(trajectories, 4, 0.9)
    first, last = rows["agents", "time"], rows["next", "agents", "time"]
    assert torch.equal(first, time.flatten())
    assert torch.equal(last, (first + 3).clamp(max=9))
    assert torch.equal(rows["small"].int(), first.int())


def test_keys_may_have_other_names():
    trajectories = steps(3, 20, generator=seeded(5))
    after = trajectories["next"]
    flat = TensorDict(
        {"obs": trajectories["observation"], "obs_after": after["observation"]},
        batch_size=(3, 20),
    )
    flat.update({"r": after["reward"], "end": after["terminated"], "cut": after["truncated"]})
    names = {"next": "obs_after", "reward": "r", "terminated": "end", "truncated": ("cut",)}
    target = Written()
    names |= {"discount": ("n", "discount"), "steps": ("n", "steps")}
    writer = NStepWriter(target, 3, 0.9, 3, keys=names)
    for td in flat.unbind(1):
        writer.add(td)
    writer.flush()
    rows, expected = target.rows, collected(trajectories, 3, 0.9)
    rows = rows[rows["obs"][:, 0].argsort()]
    for ours, theirs in (
        ("obs", "observation"),
        ("obs_after", ("next", "observation")),
        ("r", ("next", "reward")),
        ("end", ("next", "terminated")),
        ("cut", ("next", "truncated")),
        (("n", "discount"), "discount"),
        (("n", "steps"), "steps"),
    ):
        assert torch.equal(rows[ours], expected[theirs]), ours


def test_dicts_of_arrays_will_do():
    target = Written()
    writer = NStepWriter(target, 1, 0.9, 2)
    flag = np.zeros(2, np.bool_)
    after = {"observation": np.ones((2, 3)), "reward": np.ones(2, np.float32)}
    after |= {"terminated": flag, "truncated": flag}
    writer.add({"observation": np.zeros((2, 3)), "next": after})
    assert target.rows["next", "observation"].shape == (2, 3)


def test_steps_may_need_gradients_and_be_made_in_inference_mode():
    target = Written()
    writer = NStepWriter(target, 2, 0.9, 2)
    trajectories = steps(2, 6, generator=seeded(6), ends=0.0)
    with torch.inference_mode():
        for td in trajectories[:, :2].clone().unbind(1):
            writer.add(td)
    for td in trajectories[:, 2:].unbind(1):
        td["observation"].requires_grad_()
        writer.add(td)
    writer.flush()
    rows = target.rows
    assert not rows["observation"].requires_grad
    assert not rows.is_inference() if hasattr(rows, "is_inference") else True
    assert len(rows) == 12


def test_what_is_given_may_be_overwritten_afterwards():
    trajectories = steps(3, 20, generator=seeded(7))
    expected, target = collected(trajectories, 3, 0.9), Written()
    writer, reused = NStepWriter(target, 3, 0.9, 3), trajectories[:, 0].clone()
    for td in trajectories.unbind(1):
        reused.copy_(td)
        writer.add(reused)
    reused.zero_()
    writer.flush()
    rows = target.rows
    assert (rows[rows["observation"][:, 0].argsort()] == expected).all()


def test_masked_rows_and_rows_of_resets_may_hold_anything():
    target = Written()
    writer = NStepWriter(target, 2, 0.9, 2, autoreset="next_step")
    trajectories = steps(2, 3, generator=seeded(8), ends=0.0)
    wild = trajectories[:, 0].clone()
    wild["next", "reward"].fill_(math.nan)
    wild["next"].update({"terminated": torch.ones(2, 1, dtype=torch.bool)})
    end = trajectories[:, 1].clone()
    end["next", "terminated"].fill_(True)
    writer.add(wild, mask=[False, False])
    writer.add(trajectories[:, 0])
    writer.add(end)
    writer.add(wild, mask=[True, False])  # the reset of the first environment
    writer.add(trajectories[:, 2])  # a step of the first, and the reset of the second
    assert writer.pending.tolist() == [1, 0]
    assert len(target.rows) == 4
    assert target.rows["next", "reward"].isfinite().all()


def test_memory_does_not_grow_with_episodes():
    writer = NStepWriter(Written(), 3, 0.9, 2)
    sizes = set()
    for td in steps(2, 50, generator=seeded(9), ends=0.0).unbind(1):
        writer.add(td)
        sizes.add(len(pickle.dumps(writer.state_dict())))
    assert len(sizes) == 1


# --- Gymnasium's ways to reset ----------------------------------------------------------------


class Counting(gymnasium.Env):
    """Observations count steps; episodes end after 3, 4, 5, ... steps, by turns in two ways."""

    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self):
        self.episode, self.time = 0, 0

    def reset(self, *, seed=None, options=None):
        self.episode, self.time = self.episode + 1, 0
        return self._observation(), {}

    def _observation(self):
        return np.array([self.episode, self.time], np.float32)

    def step(self, action):
        self.time += 1
        ended = self.time == self.episode + 2
        by_turns = self.episode % 2 == 0
        return self._observation(), float(self.time), ended and by_turns, ended and not by_turns, {}


@pytest.mark.parametrize("mode", ["same_step", "next_step"])
def test_both_of_gymnasiums_ways_to_reset_give_the_same_transitions(mode):
    way = gymnasium.vector.AutoresetMode[mode.upper()]
    envs = gymnasium.vector.SyncVectorEnv([Counting] * 2, autoreset_mode=way)
    target = Written()
    writer = NStepWriter(target, 3, 0.5, 2, autoreset=mode)
    observation, _ = envs.reset()
    for _ in range(40):
        after, reward, terminated, truncated, info = envs.step(np.zeros(2, np.int64))
        true = after.copy()
        for e in np.flatnonzero(terminated | truncated) if mode == "same_step" else ():
            true[e] = info["final_obs"][e]
        ended = {"terminated": terminated, "truncated": truncated}
        step = {"observation": true, "reward": reward} | ended
        writer.add({"observation": observation, "next": step})
        observation = after
    rows = target.rows
    first, last = rows["observation"], rows["next", "observation"]
    assert torch.equal(first[:, 0], last[:, 0])  # none across episodes
    length = first[:, 0] + 2
    assert torch.equal(last[:, 1], torch.minimum(first[:, 1] + 3, length))
    m = last[:, 1] - first[:, 1]
    assert torch.equal(rows["steps"].float(), m)
    expected = sum((k < m) * 0.5**k * (first[:, 1] + 1 + k) for k in range(3))
    assert torch.equal(rows["next", "reward"], expected.double())
    over = (last[:, 1] == length) & (first[:, 0] % 2 == 0)
    assert torch.equal(rows["discount"], torch.where(over, 0.0, 0.5 ** m.double()))
    whole = [1, 2, 3, 4, 5]
    for episode in whole:  # each step of each environment begins one transition
        begun = first[first[:, 0] == episode][:, 1].long().bincount()
        assert begun.tolist() == [2] * (episode + 2)


# --- targets ----------------------------------------------------------------------------------


def test_initial_priorities_are_those_of_the_first_steps():
    buffer = PrioritizedReplayBuffer(100)
    writer = NStepWriter(buffer, 2, 0.9, 2)
    for k, td in enumerate(steps(2, 4, generator=seeded(10), ends=0.0).unbind(1)):
        writer.add(td, priority=[k + 1.0, k + 10.0])
    writer.flush()
    assert buffer.priority.tolist() == [1, 10, 2, 11, 3, 12, 4, 13]


@pytest.mark.parametrize("many", [None, 2])
def test_a_row_that_is_skipped_may_have_any_priority(many):
    buffer = PrioritizedReplayBuffer(100, num_buffers=many)
    writer = NStepWriter(buffer, 1, 0.9, 2)
    td = steps(2, 1, generator=seeded(10), ends=0.0)[:, 0]
    writer.add(td, priority=[math.nan, 3.0], mask=[False, True])
    assert buffer.priority[buffer.priority > 0].tolist() == [3.0]
    with pytest.raises(PriorityError, match="priority: expected finite values"):
        writer.add(td, priority=[math.nan, 3.0], mask=[True, False])
    assert buffer.write_count == 1


def test_add_returns_the_slots_or_none():
    buffer = PrioritizedReplayBuffer(100)
    writer = NStepWriter(buffer, 2, 0.9, 2)
    first, second, _ = steps(2, 3, generator=seeded(10), ends=0.0).unbind(1)
    assert writer.flush() is None
    assert writer.add(first) is None
    assert writer.add(second).tolist() == [0, 1]
    assert writer.flush([1]).tolist() == [2]
    assert writer.flush([]) is None


@pytest.mark.parametrize("given", [False, True])
def test_torchrls_buffer_takes_them(given):
    torchrl = pytest.importorskip("torchrl.data")
    from per_td.torchrl import TensorDictPrioritizedReplayBuffer

    buffer = TensorDictPrioritizedReplayBuffer(
        alpha=0.6, beta=0.4, storage=torchrl.LazyTensorStorage(100), batch_size=8, eps=0.0
    )
    trajectories = steps(2, 20, generator=seeded(11))
    if given:  # as an entry of the data
        trajectories["td_error"] = torch.rand(2, 20, generator=seeded(12))
    writer = NStepWriter(buffer, 3, 0.9, 2)
    for td in trajectories.unbind(1):
        writer.add(td)
    writer.flush()
    assert len(buffer) == 40
    rows = buffer[:]
    rows = rows[rows["observation"][:, 0].argsort()]
    for key in ("discount", "steps", ("next", "reward"), ("next", "observation")):
        assert torch.equal(rows[key], collected(trajectories, 3, 0.9)[key])
    if given:
        assert torch.equal(rows["td_error"], trajectories["td_error"].flatten())
    assert {"index", "priority_weight"} <= set(buffer.sample().keys())
    with pytest.raises(ConfigurationError, match="priority: expected none, as in the calls"):
        writer.add(trajectories[:, 0], priority=[1.0, 1.0])
    fresh = NStepWriter(buffer, 3, 0.9, 2)
    with pytest.raises(ConfigurationError, match="extend takes none; TorchRL's buffers take them"):
        fresh.add(trajectories[:, 0], priority=[1.0, 1.0])


def test_torchrls_losses_discount_by_the_number_of_steps():
    pytest.importorskip("torchrl")
    from torchrl.modules import QValueActor
    from torchrl.objectives import DQNLoss

    net = torch.nn.Linear(2, 4)
    actor = QValueActor(net, in_keys=["observation"], action_space="categorical")
    loss = DQNLoss(actor, action_space="categorical", delay_value=False, reduction="none")
    loss.make_value_estimator(gamma=0.9)
    trajectories = steps(2, 20, generator=seeded(13))
    target = Written()
    writer = NStepWriter(target, 3, 0.9, 2, keys={"steps": "steps_to_next_obs"})
    for td in trajectories.unbind(1):
        writer.add(td)
    rows = target.rows
    loss(rows)
    value = net(rows["next", "observation"]).amax(-1, keepdim=True)
    goal = rows["next", "reward"] + rows["discount"] * value
    chosen = net(rows["observation"]).gather(1, rows["action"].unsqueeze(-1))
    expected = (goal - chosen).pow(2).squeeze(-1)
    torch.testing.assert_close(rows["td_error"].view(-1), expected)


def test_what_is_pending_is_copied_for_another_process_not_shared():
    writer = NStepWriter(Written(), 3, 0.9, 3)
    writer.add(step())
    ForkingPickler.dumps(writer)
    kept = writer._pending
    tensors = [kept.returns, kept.count, *kept.first.values(), *kept.last.values()]
    assert not any(tensor.is_shared() for tensor in tensors)


def _collect(writer, seed, done):
    for td in steps(2, 30, generator=seeded(seed)).unbind(1):
        writer.add(td)
    done.put(int(writer.pending.sum()))


@pytest.mark.slow
def test_processes_write_to_one_shared_buffer():
    td = steps(1, 1, generator=seeded(0))[0, 0]
    td["discount"], td["steps"] = torch.zeros(1), torch.zeros(1, dtype=torch.int64)
    buffer = PrioritizedReplayBuffer(500, shared=True, example=td)
    writer = NStepWriter(buffer, 3, 0.9, 2)
    writer.add(steps(2, 1, generator=seeded(0))[:, 0])
    context = torch.multiprocessing.get_context("spawn")
    done = context.Queue()
    started = [context.Process(target=_collect, args=(writer, seed, done)) for seed in (1, 2)]
    for process in started:
        process.start()
    left = sum(done.get(timeout=120) for _ in started)
    for process in started:
        process.join()
    assert len(buffer) == 2 * (2 + 60) - left  # each has a copy of what is pending here
    assert writer.pending.tolist() == [1, 1]


# --- refusals ---------------------------------------------------------------------------------


def assert_unchanged(writer, before) -> None:
    after = writer.state_dict()
    assert after.keys() == before.keys()
    one, two = (
        {k: v for k, v in state["pending"].items() if k not in ("first", "last", "priority")}
        for state in (before, after)
    )
    assert all(torch.equal(one[k], two[k]) for k in one if isinstance(one[k], torch.Tensor))


def step(number: int = 0) -> TensorDict:
    return steps(3, 5, generator=seeded(14), ends=0.0)[:, number]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 0}, "n: expected an integer of at least 1, got 0"),
        ({"n": 1.5}, "n: expected an integer"),
        ({"gamma": 1.1}, r"gamma: expected a finite number in \[0, 1\], got 1.1"),
        ({"gamma": math.nan}, "gamma: expected a finite number"),
        ({"num_envs": 0}, "num_envs: expected an integer of at least 1"),
        ({"autoreset": "never"}, "autoreset: expected one of same_step, next_step, got 'never'"),
        ({"keys": {"nxt": "next"}}, r"keys: expected a dict with any of \['next', .*\['nxt'\]"),
        ({"keys": {"next": 1}}, "keys, 'next': expected a name or a tuple of names, got 1"),
        ({"keys": {"next": ()}}, "keys, 'next': expected a name"),
        ({"keys": ["next"]}, "keys: expected a dict .* got list"),
        ({"keys": {"discount": "steps"}}, "keys: expected different ones for discount and steps"),
        ({"buffer": {}}, r"buffer: expected something with extend\(td\), got dict"),
        ({"buffer": PrioritizedReplayBuffer(5, num_buffers=2)}, "num_envs: expected 2, one for"),
    ],
)
def test_wrong_arguments_are_refused_by_name(arguments, message):
    arguments = {"buffer": Written(), "n": 3, "gamma": 0.9, "num_envs": 3} | arguments
    with pytest.raises(ConfigurationError, match=message):
        NStepWriter(**arguments)


def without(*key) -> TensorDict:
    return step().exclude(*key)


def changed(key, value) -> TensorDict:
    return step().set(key, value)


@pytest.mark.parametrize(
    ("td", "message"),
    [
        (without(("next", "reward")), r"expected \('next', 'reward'\) in a step, got the keys"),
        (without(("next", "terminated")), r"expected \('next', 'terminated'\) in a step"),
        (
            without(("next", "truncated"), ("next", "done")),
            r"expected \('next', 'truncated'\) or \('next', 'done'\) in a step",
        ),
        (without(("next", "observation")), "expected an entry at 'next' in a step"),
        (
            changed(("next", "reward"), torch.zeros(3, 1, dtype=torch.int64)),
            r"'reward'\): expected floating-point numbers of 16 to 64 bits of shape",
        ),
        (changed(("next", "reward"), torch.zeros(3, 2)), r"'reward'\): .* got .* \[3, 2\]"),
        (changed(("next", "done"), torch.zeros(3, 1)), r"'done'\): expected torch.bool"),
        (changed("discount", torch.zeros(3)), "'discount': expected no such entry, which the wri"),
        (changed("steps", torch.zeros(3)), "'steps': expected no such entry"),
        (changed(("steps", "x"), torch.zeros(3)), "expected no tensor at 'steps' too"),
        (changed("index", torch.zeros(3)), "'index' is a reserved key"),
        (changed(("next", "reward"), torch.zeros(3).to(torch.float8_e5m2)), "of 16 to 64 bits"),
        (step()[:2], "expected 3 rows, one for each environment, got 2: env="),
        (step()[0], r"expected a TensorDict of batch size \[n\], got \[\]"),
        ([1.0], "expected a TensorDict or a dict of tensors, got list"),
    ],
)
def test_wrong_first_steps_are_refused_by_name_and_nothing_is_remembered(td, message):
    buffer = PrioritizedReplayBuffer(50)
    writer = NStepWriter(buffer, 1, 0.9, 3)
    with pytest.raises(SchemaError, match=message):
        writer.add(td)
    assert writer.state_dict()["pending"] is None
    writer.add({"x": torch.zeros(3), "next": dict(step()["next"].items())})  # other keys will do
    assert len(buffer) == 3


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"td": without("action")}, SchemaError, "missing: 'action'"),
        ({"td": changed("action", torch.zeros(3))}, SchemaError, "'action': expected torch.int64"),
        ({"td": step()[:2]}, SchemaError, "expected 3 rows"),
        ({"env": [0, 1]}, IndexRangeError, "env: expected 3 numbers, one for each row, got 2"),
        ({"env": [0, 1, 3]}, IndexRangeError, "env: expected 0 <= env < 3, got 3"),
        ({"env": [0, -1, 2]}, IndexRangeError, "env: expected 0 <= env < 3, got -1"),
        ({"env": [0, 2, 2]}, IndexRangeError, "env: expected each environment once, got 2 again"),
        ({"env": [0.0, 1.0, 2.0]}, IndexRangeError, "env: expected an integer dtype"),
        ({"mask": [True]}, SchemaError, r"mask: expected bool of shape \[3\]"),
        ({"mask": [1, 0, 1]}, SchemaError, "mask: expected bool"),
        ({"priority": None}, ConfigurationError, "priority: expected some, as in the calls before"),
        ({"priority": [1.0, 2.0]}, PriorityError, "priority: expected shape"),
        ({"priority": [1.0, -1.0, 0.0]}, PriorityError, "priority: expected finite values"),
        ({"priority": [1.0, math.nan, 0.0]}, PriorityError, "priority: expected finite values"),
    ],
)
def test_wrong_steps_are_refused_by_name_and_nothing_changes(arguments, error, message):
    target = Written()
    writer = NStepWriter(target, 2, 0.9, 3)
    writer.add(step(0), priority=[1.0, 2.0, 3.0])
    before = writer.state_dict()
    with pytest.raises(error, match=message):
        writer.add(**{"td": step(1), "priority": [1.0, 2.0, 3.0]} | arguments)
    assert_unchanged(writer, before)
    assert not target.got
    writer.add(step(1), priority=[4.0, 5.0, 6.0])
    assert torch.equal(target.rows["observation"], step(0)["observation"])
    with pytest.raises(IndexRangeError, match="env: expected 0 <= env < 3, got 5"):
        writer.flush([5])


def attempt(writer: NStepWriter, call) -> None:
    """`call` works, or raises the package's own error and changes nothing."""
    buffer, before = writer._buffer, frozen(writer.state_dict())
    held = frozen(buffer.state_dict())
    refusal = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            call()
    except PerTdError as error:
        refusal = error
    if refusal is not None:
        assert str(refusal)
        assert frozen(writer.state_dict()) == before, refusal
        assert frozen(buffer.state_dict()) == held, refusal
    buffer.check_valid()


def pair(**changed) -> dict:
    """A step of two environments as a dict, with some entries changed."""
    td = steps(2, 1, generator=seeded(17), ends=0.5)[:, 0].to_dict()
    for name, value in changed.items():
        at = td["next"] if name in td["next"] and name != "observation" else td
        at[name] = value
    return td


ARGUMENTS = ["td", "env", "mask", "priority", "observation", "action", "reward", "terminated"]
ARGUMENTS += ["truncated", "done", "next", "flush"]


@pytest.mark.parametrize(("name", "first", "many"), few_of_all(ARGUMENTS, [True, False], [None, 2]))
def test_anything_is_taken_or_named_and_changes_nothing(name, first, many):
    for kind, value in hostile().items():
        prioritized = {"priority": [1.0, 2.0]} if name == "priority" else {}
        writer = NStepWriter(PrioritizedReplayBuffer(9, num_buffers=many), 2, 0.9, 2)
        if not first:
            writer.add(pair(), **prioritized)
        if name == "td":
            call = lambda: writer.add(value)  # noqa: B023, E731
        elif name == "flush":
            call = lambda: writer.flush(value)  # noqa: B023, E731
        elif name in ("env", "mask", "priority"):
            call = lambda: writer.add(pair(), **{name: value})  # noqa: B023, E731
        else:
            call = lambda: writer.add(pair(**{name: value}))  # noqa: B023, E731
        try:
            attempt(writer, call)
        except BaseException as error:
            error.add_note(f"{name} given {kind!r}")
            raise


@pytest.mark.parametrize("name", ["buffer", "n", "gamma", "num_envs", "autoreset", "keys"])
def test_a_constructors_argument_is_taken_or_named(name):
    for kind, value in hostile().items():
        usual = {"buffer": Written(), "n": 2, "gamma": 0.9, "num_envs": 2}
        try:
            with suppress(ConfigurationError):
                NStepWriter(**usual | {name: value})
        except BaseException as error:
            error.add_note(f"{name} given {kind!r}")
            raise


class Failing(Written):
    fails = True

    def extend(self, td, priority=None):
        if self.fails:
            raise OSError("no shard answers")
        return super().extend(td, priority)


@pytest.mark.parametrize("n", [1, 2])
def test_a_step_that_the_buffer_refuses_can_be_added_again(n):
    trajectories = steps(3, 12, generator=seeded(15))
    expected, target = collected(trajectories, n, 0.9), Failing()
    writer = NStepWriter(target, n, 0.9, 3)
    for td in trajectories.unbind(1):
        target.fails = True
        try:
            writer.add(td)
        except OSError:
            target.fails = False
            wrong = td.clone()
            wrong["observation"] += 100  # another than the one that failed
            writer.add(td)
    target.fails = True
    if int(writer.pending.sum()):
        with pytest.raises(OSError, match="no shard"):
            writer.flush()
    target.fails = False
    writer.flush()
    rows = target.rows
    assert (rows[rows["observation"][:, 0].argsort()] == expected).all()


def test_too_much_memory_is_refused_by_name():
    writer = NStepWriter(Written(), 2**40, 0.9, 3)
    with pytest.raises(AllocationError, match="pending steps of 3 environments"):
        writer.add(step())


# --- states -----------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["state", "file", "deepcopy", "pickle"])
@pytest.mark.parametrize("autoreset", ["same_step", "next_step"])
def test_a_saved_and_loaded_writer_goes_on_value_for_value(autoreset, way, tmp_path):
    target, generator = Written(), seeded(16)
    writer = NStepWriter(target, 3, 0.9, 4, autoreset=autoreset)
    trajectories = steps(4, 80, generator=generator)
    for at, td in enumerate(trajectories.unbind(1)):
        if at % 20 == 15:
            state = writer.state_dict()
            if way == "file":
                torch.save(state, tmp_path / "writer.pt")
                state = torch.load(tmp_path / "writer.pt", weights_only=True)
            if way in ("state", "file"):
                other = NStepWriter(target, 3, 0.9, 4, autoreset=autoreset)
                other.load_state_dict(state)
            else:
                copied = (
                    copy.deepcopy if way == "deepcopy" else lambda x: pickle.loads(pickle.dumps(x))
                )
                other = copied(writer)
                other._buffer = target
            writer._buffer = Written()
            writer.add(trajectories[:, 0])  # the one before goes on by itself
            writer = other
        writer.add(td)
    writer.flush()
    plain = Plain(3, 0.9, 4, autoreset)
    for td in trajectories.unbind(1):
        plain.add(td, range(4))
    plain.flush(range(4))
    assert_same(target.rows, plain.written)


def test_a_state_before_any_step_is_loaded_too():
    writer = NStepWriter(Written(), 3, 0.9, 3)
    state = writer.state_dict()
    writer.add(step())
    writer.load_state_dict(state)
    assert writer.pending.tolist() == [0, 0, 0]
    writer.add({"x": torch.zeros(3), "next": dict(step()["next"].items())})


def test_empty_forgets_what_is_pending():
    target = Written()
    writer = NStepWriter(target, 3, 0.9, 3)
    writer.add(step())
    writer.empty()
    assert writer.flush() is None
    assert writer.pending.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    "other", [{"n": 2}, {"gamma": 0.8}, {"num_envs": 4}, {"autoreset": "next_step"}]
)
def test_states_of_other_settings_are_refused(other):
    settings = {"n": 3, "gamma": 0.9, "num_envs": 3}
    writer = NStepWriter(Written(), **settings)
    writer.add(step())
    with pytest.raises(CheckpointError, match="expected the state of a writer with"):
        NStepWriter(Written(), **settings | other).load_state_dict(writer.state_dict())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("count", torch.tensor([3, 0, 0])),
        ("count", torch.tensor([-1, 0, 0])),
        ("count", torch.tensor([2, 0, 0])),
        ("count", torch.zeros(4, dtype=torch.int64)),
        ("count", None),
        ("returns", torch.zeros(3, 3)),
        ("first", {}),
        ("first", 3),
        ("last", {"next": {"observation": torch.zeros(6, 3)}}),
        ("like", {}),
        ("like", {"x": torch.zeros(0)}),
        ("structure", "no json"),
        ("like", torch.zeros(3)),
        ("first", torch.zeros(3)),
        ("taken", torch.zeros(3, dtype=torch.int64, device="meta")),
        ("returns", torch.zeros(3, 3, dtype=torch.float64).to_sparse()),
    ],
)
def test_damaged_states_are_refused_and_nothing_changes(name, value):
    writer = NStepWriter(Written(), 3, 0.9, 3)
    writer.add(step())
    before, state = writer.state_dict(), writer.state_dict()
    state["pending"][name] = value
    with pytest.raises(CheckpointError, match="pending: expected what a writer saved"):
        writer.load_state_dict(state)
    assert_unchanged(writer, before)
    for wrong in ({}, None, before | {"version": 2}, {**before, "more": 1}):
        with pytest.raises(CheckpointError, match="expected"):
            writer.load_state_dict(wrong)


def test_a_state_can_be_written_by_torch_and_read_without_code():
    writer = NStepWriter(Written(), 3, 0.9, 3)
    writer.add(step())
    file = io.BytesIO()
    torch.save(writer.state_dict(), file)
    file.seek(0)
    assert torch.load(file, weights_only=True)["settings"] == {
        "n": 3,
        "gamma": 0.9,
        "num_envs": 3,
        "autoreset": "same_step",
        "keys": writer.state_dict()["settings"]["keys"],
    }


def test_settings_are_fixed_and_shown():
    writer = NStepWriter(PrioritizedReplayBuffer(5), 3, 0.9, 3)
    for name in ("n", "gamma", "num_envs", "autoreset"):
        with pytest.raises(ConfigurationError, match=f"{name}: expected no change"):
            setattr(writer, name, getattr(writer, name))
    assert repr(writer).startswith("NStepWriter(n=3, gamma=0.9, num_envs=3, autoreset='same_step'")


# --- the page about it ------------------------------------------------------------------------


def test_the_loop_on_the_page_runs_as_printed_in_25_lines():
    block, *_ = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert sum(bool(line.strip()) for line in block.splitlines()) == 25
    names = {}
    exec(compile(block, "vector_loop.md", "exec"), names)
    buffer, writer = names["buffer"], names["writer"]
    assert len(buffer) + int(writer.pending.sum()) > 2000  # of 2,400 rows, those of resets less
    assert set(buffer.transitions["steps"].tolist()) == {1, 2, 3}
    assert (buffer.priority != 1).any()


def test_links_on_the_page_lead_somewhere():
    for target in re.findall(r"\]\((?!http)([^)#]+)", PAGE):
        assert (FOLDER / target).exists()

import copy
import pickle

import gymnasium
import numpy as np
import pytest
import torch

from per_td import (
    CheckpointError,
    ConfigurationError,
    EmptyBufferError,
    IndexRangeError,
    PrioritizedReplayBuffer,
    SchemaError,
    TransitionReplayBuffer,
)
from tests.support.model import Ring


def pushed(n: int, capacity: int = 50, device="cpu") -> TransitionReplayBuffer:
    buffer = TransitionReplayBuffer(capacity, device=device)
    for k in range(n):
        buffer.push(np.full(4, float(k)), k % 2, k / 2, np.full(4, k + 1.0), k % 5 == 0)
    return buffer


def test_sample_gives_the_seven_tensors_as_taught(device):
    buffer = pushed(60, device=device)
    states, actions, rewards, next_states, dones, indices, weights = buffer.sample(16)
    described = [(t.dtype, tuple(t.shape)) for t in (states, actions, rewards, next_states, dones)]
    assert described == [
        (torch.float32, (16, 4)),
        (torch.int64, (16, 1)),
        (torch.float32, (16,)),
        (torch.float32, (16, 4)),
        (torch.float32, (16,)),
    ]
    assert (indices.dtype, indices.shape) == (torch.int64, (16,))
    assert (weights.dtype, weights.shape) == (torch.float32, (16,))
    k = states[:, 0]
    assert torch.equal(next_states[:, 0], k + 1)
    assert torch.equal(rewards, k / 2)
    assert torch.equal(actions.squeeze(-1), k.long() % 2)
    assert torch.equal(dones, (k.long() % 5 == 0).float())
    assert weights.max() == 1


def test_the_courses_loop_runs_as_taught():
    environment = gymnasium.make("CartPole-v1")
    network = torch.nn.Linear(4, 2)
    optimizer = torch.optim.Adam(network.parameters())
    gamma = 0.99
    buffer = TransitionReplayBuffer(500)
    naive = Ring(500, alpha=0.6, eps=0.001)
    torch.manual_seed(0)
    environment.action_space.seed(0)
    for episode in range(12):
        buffer.increase_beta()
        state, _ = environment.reset(seed=episode)
        done = truncated = False
        while not (done or truncated):
            action = environment.action_space.sample()
            next_state, reward, done, truncated, _ = environment.step(action)
            buffer.push(state, action, reward, next_state, done)
            naive.extend([None])
            state = next_state
            if len(buffer) < 32:
                continue
            states, actions, rewards, next_states, dones, indices, weights = buffer.sample(32)
            q = network(states).gather(1, actions).squeeze(1)
            with torch.no_grad():
                target = rewards + gamma * network(next_states).max(1).values * (1 - dones)
            td_errors = target - q
            loss = torch.sum(weights * td_errors**2)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            expected = naive.weights(indices.tolist(), buffer.beta, "batch")
            assert weights.tolist() == pytest.approx(expected, rel=1e-4)
            buffer.update_priorities(indices, td_errors)
            naive.update(indices.tolist(), td_errors.tolist())
    assert buffer.beta == pytest.approx(0.4 + 12 * 0.001)
    assert buffer.priority.tolist() == pytest.approx(
        naive.priority[: len(naive)].tolist(), rel=1e-5
    )


def test_the_defaults_are_those_of_the_course():
    buffer = TransitionReplayBuffer(10)
    inner = buffer.buffer
    assert (inner.alpha, inner.beta, inner.eps) == (0.6, 0.4, 0.001)
    assert inner.beta_increment == 0.001
    assert (len(buffer), buffer.capacity) == (0, 10)


def test_images_are_kept_small_and_sampled_as_float():
    buffer = TransitionReplayBuffer(4)
    image = np.full((2, 3, 3), 255, dtype=np.uint8)
    buffer.push(image, 0, 0.0, image, False)
    states = buffer.sample(2)[0]
    assert buffer.buffer.transitions["state"].dtype == torch.uint8
    assert states.dtype == torch.float32
    assert states.shape == (2, 2, 3, 3)
    assert (states == 255).all()


def test_numbers_and_tensors_of_any_kind_are_accepted():
    buffer = TransitionReplayBuffer(4)
    buffer.push([0.0, 1.0], 1, 1, [1.0, 0.0], 0)
    buffer.push(torch.zeros(2), torch.tensor([1]), np.float64(0.5), np.zeros(2), np.bool_(True))
    assert len(buffer) == 2
    assert buffer.stats()["written"] == 2


@pytest.mark.parametrize(
    ("transition", "message"),
    [
        (([0.0], 0, 0.0, [0.0, 0.0], False), r"next_state: expected the shape of state, \[1\]"),
        (([0.0] * 3, 0, 0.0, [0.0] * 3, False), r"'state': expected .* \[2\] per transition"),
        (([0.0] * 2, [0, 1], 0.0, [0.0] * 2, False), r"action: expected one number"),
        (([0.0] * 2, 0.5, 0.0, [0.0] * 2, False), r"'action': expected torch.int64 of shape \[\]"),
        (([0.0] * 2, 1j, 0.0, [0.0] * 2, False), r"action: expected an integer"),
        (([0.0] * 2, 0, [0.0, 1.0], [0.0] * 2, False), r"reward: expected one number"),
    ],
)
def test_wrong_transitions_are_refused_by_name(transition, message):
    buffer = TransitionReplayBuffer(4)
    buffer.push([0.0, 0.0], 0, 0.0, [0.0, 0.0], False)
    with pytest.raises(SchemaError, match=message):
        buffer.push(*transition)
    assert len(buffer) == 1


def test_sampling_before_any_push_is_an_error():
    with pytest.raises(EmptyBufferError):
        TransitionReplayBuffer(4).sample(1)


def push(buffer, n):
    for k in range(n):
        buffer.push(np.full(4, float(k)), 0, 0.0, np.full(4, k + 1.0), False)


def test_updates_of_what_was_overwritten_since_its_draw_are_dropped_and_counted(device):
    buffer = pushed(4, capacity=4, device=device)
    indices = buffer.sample(50)[5]
    push(buffer, 4)
    buffer.update_priorities(indices, torch.full((50,), 99.0))
    assert buffer.stats()["stale_updates"] == 50
    assert (buffer.priority == 1).all()
    indices = buffer.sample(50)[5]  # what is drawn anew is current
    buffer.update_priorities(indices, torch.full((50,), 7.0))
    assert buffer.stats()["stale_updates"] == 50
    assert buffer.priority[indices].tolist() == pytest.approx([7.001] * 50)


def test_only_the_overwritten_part_of_a_batch_is_stale(device):
    buffer = pushed(6, capacity=4, device=device)  # slots 0 and 1 have been written twice
    buffer.buffer.update_priority(range(4), [1.0] * 4)
    indices = buffer.sample(100)[5]
    assert set(indices.tolist()) == {0, 1, 2, 3}
    push(buffer, 1)  # over slot 2
    buffer.update_priorities([3, 2, 0, 2, 1], [5.0, 99.0, 6.0, 98.0, 7.0])
    assert buffer.stats()["stale_updates"] == 2
    assert buffer.priority.tolist() == pytest.approx([6.001, 7.001, 1.001, 5.001])


def test_a_slot_that_was_never_drawn_takes_any_update(device):
    buffer = pushed(11, capacity=4, device=device)
    buffer.update_priorities([0, 1, 2, 3], [1.0, 2.0, 3.0, 4.0])
    assert buffer.stats()["stale_updates"] == 0
    assert buffer.priority.tolist() == pytest.approx([1.001, 2.001, 3.001, 4.001])
    push(buffer, 1)
    buffer.update_priorities([3], [9.0])
    assert buffer.priority[3] == pytest.approx(9.001)


def test_the_last_draw_of_a_slot_is_what_counts():
    """The updates of both draws look alike: indices are slots."""
    buffer = pushed(1, capacity=1)
    first = buffer.sample(1)[5]
    push(buffer, 1)
    buffer.sample(1)
    buffer.update_priorities(first, [5.0])
    assert buffer.priority.tolist() == pytest.approx([5.001])


@pytest.mark.parametrize("wraps", [0, 2])
def test_indices_that_name_no_transition_are_refused_whatever_was_drawn(wraps):
    buffer = pushed(3, capacity=4)
    push(buffer, 4 * wraps)
    if len(buffer) == 4:
        buffer.sample(8)
    before = buffer.priority
    for wrong in ([4], [-1], [2**62], [-(2**63)], [0, 7]):
        with pytest.raises(IndexRangeError, match=f"0 <= index < {len(buffer)}"):
            buffer.update_priorities(wrong, [1.0] * len(wrong))
    with pytest.raises(IndexRangeError, match="expected an integer dtype"):
        buffer.update_priorities([0.5], [1.0])
    assert torch.equal(buffer.priority, before)


@pytest.mark.parametrize("way", ["load", "restore"])
def test_after_a_load_every_slot_takes_updates_until_it_is_drawn(way, tmp_path):
    buffer = pushed(9, capacity=4)
    buffer.sample(50)
    buffer.save(tmp_path / "buffer.pt")
    other = pushed(2, capacity=4)
    other.sample(50)
    if way == "load":
        other = TransitionReplayBuffer.load(tmp_path / "buffer.pt")
    else:
        other.restore(tmp_path / "buffer.pt")
    assert (other.buffer.transitions == buffer.buffer.transitions).all()
    push(other, 4)
    other.update_priorities([0, 1, 2, 3], [1.0, 2.0, 3.0, 4.0])
    assert other.stats()["stale_updates"] == 0
    assert other.priority.tolist() == pytest.approx([1.001, 2.001, 3.001, 4.001])
    indices = other.sample(50)[5]
    push(other, 4)
    other.update_priorities(indices, torch.ones(50))
    assert other.stats()["stale_updates"] == 50


def test_after_a_load_into_another_capacity_updates_are_told_apart_as_before(tmp_path):
    pushed(20, capacity=7).save(tmp_path / "buffer.pt")
    for capacity in (3, 50):
        buffer = TransitionReplayBuffer.load(tmp_path / "buffer.pt", capacity=capacity)
        indices = buffer.sample(60)[5]
        buffer.update_priorities(indices, torch.ones(60))
        assert buffer.stats()["stale_updates"] == 0
        push(buffer, capacity)
        buffer.update_priorities(indices, torch.ones(60))
        assert buffer.stats()["stale_updates"] == 60


def test_a_file_of_something_else_is_not_read_into_the_courses_buffer(tmp_path):
    buffer = pushed(3, capacity=4)
    other = PrioritizedReplayBuffer(4, num_buffers=2)
    other.save(tmp_path / "many.pt")
    before = buffer.buffer.transitions.clone()
    with pytest.raises(CheckpointError, match=r"many.pt: expected .* TransitionReplayBuffer"):
        buffer.restore(tmp_path / "many.pt")
    assert (buffer.buffer.transitions == before).all()


def n_step(n: int = 3, gamma: float = 0.5, capacity: int = 50) -> TransitionReplayBuffer:
    return TransitionReplayBuffer(capacity, n_step=n, gamma=gamma)


def push_episodes(buffer, numbers) -> None:
    """Steps of rewards 1, 2, 3, ..., one in five terminated, another one cut off."""
    for k in numbers:
        done, truncated = k % 5 == 4 and k % 10 != 9, k % 10 == 9
        buffer.push([float(k)], k % 2, k + 1.0, [k + 1.0], done, truncated)


def test_n_steps_are_summed_up_and_discounts_come_last():
    buffer = n_step()
    push_episodes(buffer, range(10))
    assert len(buffer) == 10
    *batch, weights, discounts = buffer.sample(300)
    states, actions, rewards, next_states, dones, _ = batch
    assert (discounts.dtype, discounts.shape) == (torch.float32, (300,))
    assert weights.shape == (300,)
    k = states[:, 0].long()
    assert torch.equal(actions[:, 0], k % 2)
    m = torch.minimum(5 - k % 5, torch.tensor(3))
    assert torch.equal(next_states[:, 0].long(), k + m)
    expected = sum((j < m) * 0.5**j * (k + 1 + j) for j in range(3))
    assert torch.equal(rewards, expected.float())
    terminated = k + m == 5
    assert torch.equal(dones, terminated.float())
    assert torch.equal(discounts, torch.where(terminated, 0.0, 0.5**m))


def test_flush_stores_what_is_pending_and_empty_forgets_it():
    buffer = n_step()
    for wanted in (2, 0):
        push_episodes(buffer, range(2))
        assert len(buffer) == 0
        buffer.flush() if wanted else buffer.empty()
        buffer.flush()
        assert len(buffer) == wanted
        buffer.empty()
    buffer = n_step(n=1)
    buffer.push([0.0], 0, 1.0, [1.0], False)
    buffer.flush()
    assert len(buffer) == 1
    assert len(buffer.sample(1)) == 7


def test_with_n_steps_where_episodes_are_cut_off_must_be_told():
    buffer = n_step()
    with pytest.raises(SchemaError, match="truncated: expected True or False with n_step=3, got N"):
        buffer.push([0.0], 0, 0.0, [1.0], False)
    with pytest.raises(ConfigurationError, match="n: expected an integer of at least 1"):
        n_step(n=0)
    with pytest.raises(ConfigurationError, match="gamma: expected a finite number"):
        n_step(gamma=2.0)
    for name in ("n_step", "gamma"):
        with pytest.raises(ConfigurationError, match=f"{name}: expected no change"):
            setattr(buffer, name, 2)
    assert (buffer.n_step, buffer.gamma) == (3, 0.5)


@pytest.mark.parametrize("way", ["load", "restore", "deepcopy", "pickle"])
def test_with_n_steps_a_saved_and_loaded_buffer_goes_on_value_for_value(way, tmp_path):
    path = tmp_path / "buffer.pt"
    buffer, expected = n_step(), n_step()
    push_episodes(buffer, range(12))
    push_episodes(expected, range(23))
    if way in ("load", "restore"):
        buffer.save(path)
        other = n_step() if way == "restore" else TransitionReplayBuffer.load(path)
        if way == "restore":
            push_episodes(other, range(3))
            other.restore(path)
    else:
        other = copy.deepcopy(buffer) if way == "deepcopy" else pickle.loads(pickle.dumps(buffer))
    push_episodes(buffer, range(17))  # it goes on by itself
    push_episodes(other, range(12, 23))
    assert (other.n_step, other.gamma) == (3, 0.5)
    assert (other.buffer.transitions == expected.buffer.transitions).all()
    assert len(other.sample(4)) == 8


def test_files_of_other_steps_are_refused_and_nothing_changes(tmp_path):
    path = tmp_path / "buffer.pt"
    for one, two in ((n_step(), n_step(2)), (n_step(), n_step(3, 0.9)), (n_step(1), n_step(3))):
        for saved, other in ((one, two), (two, one)):
            push_episodes(saved, range(5))
            push_episodes(other, range(5))
            saved.save(path)
            before = other.buffer.state_dict()["transitions"]
            with pytest.raises(CheckpointError, match=r"buffer\.pt: expected"):
                other.restore(path)
            after = other.buffer.state_dict()["transitions"]
            assert all(torch.equal(before[key], after[key]) for key in before)
    assert len(PrioritizedReplayBuffer.load(path)) > 0


# --- continuous actions ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("action", "shape"),
    [
        ([0.5, -1.0, 2.0], (3,)),
        (np.array([0.5, -1.0, 2.0]), (3,)),
        (torch.tensor([[0.5, -1.0]], dtype=torch.bfloat16), (1, 2)),
        (np.array([0.5], np.float16), (1,)),
        (0.5, (1,)),
        (np.float64(0.5), (1,)),
    ],
)
def test_continuous_actions_come_back_as_float32_in_the_shape_of_the_first(action, shape, device):
    buffer = TransitionReplayBuffer(4, device=device)
    buffer.push([0.0], action, 0.0, [1.0], False)
    buffer.push([0.0], torch.as_tensor(action) + 1, 0.0, [1.0], False)
    _, actions, *_ = buffer.sample(8)
    assert (actions.dtype, actions.shape) == (torch.float32, (8, *shape))
    first = torch.as_tensor(action).float().reshape(shape)
    assert {tuple(a.flatten().tolist()) for a in actions.cpu()} <= {
        tuple((first + k).flatten().tolist()) for k in (0, 1)
    }


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize(
    ("first", "other", "message"),
    [
        ([0.5, 1.0], 1, r"'action': expected torch.float32 of shape \[2\] .* got torch.int64"),
        ([0.5, 1.0], [0.5], r"'action': expected torch.float32 of shape \[2\] .* shape \[1\]"),
        ([0.5, 1.0], [[0.5, 1.0]], r"'action': expected .* \[2\] .* of shape \[1, 2\]"),
        ([0.5, 1.0], [1, 2], r"action: expected one number, or floating-point numbers"),
        ([0.5, 1.0], "left", r"action: expected a tensor, an array or numbers, got str"),
        (1, [0.5, 1.0], r"'action': expected torch.int64 of shape \[\] .* got torch.float32"),
    ],
)
def test_an_action_unlike_the_first_is_refused_by_name_and_nothing_is_written(
    n, first, other, message
):
    buffer = n_step(n)
    buffer.push([0.0], first, 1.0, [1.0], False, False)
    with pytest.raises(SchemaError, match=message):
        buffer.push([0.0], other, 1.0, [1.0], False, False)
    buffer.flush()
    assert len(buffer) == 1
    assert buffer.stats()["written"] == 1


def test_continuous_actions_are_saved_and_summed_up_over_n_steps(tmp_path):
    buffer = n_step(2)
    for k in range(4):
        buffer.push([float(k)], [k / 2, -k / 4], 1.0, [k + 1.0], k == 3, False)
    buffer.save(tmp_path / "buffer.pt")
    states, actions, *_ = TransitionReplayBuffer.load(tmp_path / "buffer.pt").sample(50)
    assert torch.equal(actions, states * torch.tensor([0.5, -0.25]))


# --- several transitions at a time ----------------------------------------------------------------


def rows(first: int, n: int, action: str) -> tuple:
    """Transitions `first` to `first + n`, whose fields all follow from their number."""
    k = np.arange(first, first + n)
    actions = k % 3 if action == "discrete" else np.stack([k / 2, -k / 4], -1)
    return np.stack([k, -k], -1) / 2, actions, k / 4, np.stack([k + 1, k], -1) / 2, k % 4 == 0


@pytest.mark.parametrize("action", ["discrete", "continuous"])
@pytest.mark.parametrize("kind", [np.asarray, torch.tensor, lambda x: np.asarray(x).tolist()])
def test_to_push_a_batch_is_to_push_its_rows_one_by_one(kind, action):
    together, single = pushed(0, capacity=7), pushed(0, capacity=7)
    first = 0
    for n in (1, 3, 5, 2, 9, 1):
        batch = rows(first, n, action)
        together.push(*map(kind, batch))
        for row in zip(*batch, strict=True):
            single.push(*row)
        first += n
        assert (together.buffer.transitions == single.buffer.transitions).all()
        assert torch.equal(together.priority, single.priority)
        index = [0, len(single) - 1]
        for buffer in (together, single):
            buffer.update_priorities(index, [n + 1.0, 0.5])
    assert together.stats() == single.stats()


def test_the_rank_of_done_tells_one_transition_from_a_batch():
    states = np.arange(12.0).reshape(3, 4)
    buffer = TransitionReplayBuffer(9)
    buffer.push(states[0], 1, 1.0, states[1], False)
    buffer.push(states[0], [1], [1.0], states[1], torch.tensor(False))  # as it always was
    assert len(buffer) == 2
    buffer.push(states[:1], [1], [1.0], states[1:2], [False])
    buffer.push(states, [[0], [1], [0]], np.ones((3, 1)), states, np.zeros((3, 1), bool))
    assert len(buffer) == 6
    assert buffer.buffer.transitions["state"].shape == (6, 4)
    assert buffer.buffer.transitions["action"].tolist() == [1, 1, 1, 0, 1, 0]


FLAGS = [False, True, False]
STATES = np.zeros((3, 2))


@pytest.mark.parametrize(
    ("transitions", "message"),
    [
        ((STATES, 0, 0.0, STATES, False), r"'state': expected .* \[2\] per transition"),
        ((STATES, [0] * 3, 0.0, STATES, FLAGS), r"reward: expected 3 rows, one for each of done"),
        ((STATES, [0] * 3, [0.0] * 2, STATES, FLAGS), r"reward: expected 3 rows, .* shape \[2\]"),
        ((STATES, [0] * 3, np.ones((3, 2)), STATES, FLAGS), r"reward: expected one number .* each"),
        ((STATES, 0, [0.0] * 3, STATES, FLAGS), r"action: expected 3 rows, .* shape \[\]"),
        ((STATES, [0] * 4, [0.0] * 3, STATES, FLAGS), r"action: expected 3 rows, .* shape \[4\]"),
        ((STATES, np.ones((3, 2), int), [0.0] * 3, STATES, FLAGS), r"action: expected one number"),
        ((STATES, [0.5] * 3, [0.0] * 3, STATES, FLAGS), r"'action': expected torch.int64"),
        ((STATES[:2], [0] * 3, [0.0] * 3, STATES, FLAGS), r"^state: expected 3 rows, .* \[2, 2\]"),
        ((STATES, [0] * 3, [0.0] * 3, STATES[:2], FLAGS), r"next_state: expected 3 rows"),
        ((STATES, [0] * 3, [0.0] * 3, STATES[:, :1], FLAGS), r"next_state: expected the shape of"),
        ((STATES[0], [0] * 3, [0.0] * 3, STATES[0], FLAGS), r"^state: expected 3 rows, .* \[2\]"),
        (
            (STATES, [0] * 3, [0.0] * 3, STATES, np.ones((3, 2))),
            r"done: expected one number .* each",
        ),
        ((STATES[0], 0, [0.0] * 3, STATES[0], False), r"reward: expected one number, got shape"),
    ],
)
@pytest.mark.parametrize("n", [1, 2])
def test_a_batch_that_does_not_fit_is_refused_by_name_and_nothing_is_written(
    n, transitions, message
):
    buffer = TransitionReplayBuffer(9, n_step=n, num_envs=3)
    buffer.push(STATES, [1, 0, 1], np.zeros(3), STATES, FLAGS, FLAGS)
    written = buffer.stats()["written"]
    with pytest.raises((SchemaError, ConfigurationError) if n > 1 else SchemaError) as refused:
        buffer.push(*transitions, FLAGS if np.ndim(transitions[-1]) else False)
    if n == 1:
        refused.match(message)
    assert buffer.stats()["written"] == written
    buffer.push(STATES, [1, 0, 1], np.zeros(3), STATES, [True] * 3, FLAGS)
    assert buffer.stats()["written"] == 6


@pytest.mark.parametrize("action", ["discrete", "continuous"])
@pytest.mark.parametrize("num_envs", [1, 3])
def test_n_steps_of_several_environments_are_those_of_each(num_envs, action):
    together = TransitionReplayBuffer(200, n_step=3, gamma=0.5, num_envs=num_envs)
    alone = [n_step() for _ in range(num_envs)]
    random = np.random.default_rng(5)
    for step in range(40):
        states, actions, rewards, following, _ = rows(step * num_envs, num_envs, action)
        done, cut = random.random(num_envs) < 0.1, random.random(num_envs) < 0.1
        together.push(states, actions, rewards, following, done, cut)
        for row, buffer in zip(
            zip(states, actions, rewards, following, done, cut, strict=True), alone, strict=True
        ):
            buffer.push(*row)
    for buffer in (together, *alone):
        buffer.flush()
    assert len(together) == 40 * num_envs

    def stored(buffers) -> list:
        held = [buffer.buffer.transitions for buffer in buffers]
        keys = sorted(held[0].keys())
        parts = ([t[key].reshape(len(t), -1).double() for key in keys] for t in held)
        return sorted(torch.cat([torch.cat(part, -1) for part in parts]).tolist())

    assert stored([together]) == stored(alone)


def test_n_steps_of_another_number_of_environments_say_what_to_use():
    for num_envs, n in ((1, 3), (2, 3)):
        buffer = TransitionReplayBuffer(9, n_step=2, num_envs=num_envs)
        with pytest.raises(
            ConfigurationError,
            match=rf"num_envs: expected rows of {num_envs} .* got 3: .*num_envs=3",
        ):
            buffer.push(STATES, [0] * n, [0.0] * n, STATES, FLAGS, FLAGS)
    with pytest.raises(ConfigurationError, match=r"num_envs: expected rows of 2 .* got 1"):
        buffer.push(STATES[0], 0, 0.0, STATES[0], False, False)
    buffer.flush()
    assert (len(buffer), buffer.num_envs) == (0, 2)
    with pytest.raises(SchemaError, match="truncated: expected True or False"):
        buffer.push(STATES[:2], [0] * 2, [0.0] * 2, STATES[:2], FLAGS[:2])
    with pytest.raises(SchemaError, match="truncated: expected 2 rows"):
        buffer.push(STATES[:2], [0] * 2, [0.0] * 2, STATES[:2], FLAGS[:2], False)
    for wrong in (0, 1.5, "two"):
        with pytest.raises(ConfigurationError, match=r"^num_envs: expected an integer"):
            TransitionReplayBuffer(9, n_step=2, num_envs=wrong)
    with pytest.raises(ConfigurationError, match="num_envs: expected no change"):
        buffer.num_envs = 3


# --- settings, states -----------------------------------------------------------------------------


def test_epsilon_is_refused_by_its_own_name():
    buffer = TransitionReplayBuffer(4)
    for wrong in (-1.0, "x", float("nan"), 1e39):
        with pytest.raises(ConfigurationError, match=r"^epsilon: expected a finite number"):
            buffer.epsilon = wrong
        with pytest.raises(ConfigurationError, match=r"^epsilon: expected a finite number"):
            TransitionReplayBuffer(4, epsilon=wrong)
    assert buffer.epsilon == 0.001


def test_another_alpha_and_epsilon_hold_from_now_on():
    buffer = pushed(4, capacity=4)
    buffer.update_priorities([0, 1, 2, 3], [1.0, 2.0, 3.0, 4.0])
    buffer.alpha, buffer.epsilon = 0.0, 1.0
    assert torch.equal(buffer.buffer.mass, torch.ones(4))
    assert (buffer.sample(9)[-1] == 1).all()
    buffer.update_priorities([0], [1.0])
    buffer.alpha = 1.0
    assert buffer.buffer.mass.tolist() == pytest.approx([2.0, 2.001, 3.001, 4.001])


def test_frames_are_refused_and_the_buffer_that_takes_them_is_named():
    message = r"frames: expected None, .*PrioritizedReplayBuffer\(frames=...\)"
    with pytest.raises(ConfigurationError, match=message):
        TransitionReplayBuffer(9, frames={"state": 4})
    buffer = TransitionReplayBuffer(9)
    with pytest.raises(
        ConfigurationError, match=r"frames: .*PrioritizedReplayBuffer\(frames=...\)"
    ):
        buffer.frames = {"state": 4}
    assert buffer.frames is None


def test_repr_shows_the_settings():
    buffer = pushed(3, capacity=7)
    assert repr(buffer) == (
        "TransitionReplayBuffer(3 of 7 slots, device=cpu, alpha=0.6, beta=0.4,"
        " beta_increment=0.001, epsilon=0.001, draw='independent')"
    )
    buffer = TransitionReplayBuffer(7, n_step=3, gamma=0.5, num_envs=2, prioritization="rank")
    assert repr(buffer) == (
        "TransitionReplayBuffer(0 of 7 slots, device=cpu, alpha=0.7, beta=0.4,"
        " beta_increment=0.001, epsilon=0.001, draw='independent', prioritization='rank',"
        " n_step=3, gamma=0.5, num_envs=2)"
    )


@pytest.mark.parametrize("n", [1, 3])
def test_a_state_goes_on_value_for_value_and_is_a_snapshot(n, tmp_path):
    buffer, expected, other = n_step(n), n_step(n), n_step(n)
    push_episodes(buffer, range(12))
    push_episodes(expected, range(23))
    push_episodes(other, range(3))
    torch.save(buffer.state_dict(), tmp_path / "state.pt")
    state = buffer.state_dict()
    push_episodes(buffer, range(17))  # it goes on by itself
    for taken in (state, torch.load(tmp_path / "state.pt", weights_only=True)):
        other.load_state_dict(taken)
        push_episodes(other, range(12, 23))
        assert (other.buffer.transitions == expected.buffer.transitions).all()
        assert torch.equal(other.priority, expected.priority)
    push_episodes(other, range(50))
    index = other.sample(50)[5]
    other.load_state_dict(state)
    other.update_priorities(index[index < len(other)], torch.ones(50)[index < len(other)])
    assert other.stats()["stale_updates"] == 0


def test_a_state_of_something_else_is_refused_and_nothing_changes():
    other = n_step(3)
    push_episodes(other, range(12))
    before = other.state_dict()
    broken = n_step(3).state_dict()
    broken["n_step"] = broken["n_step"] | {"version": 99}
    no_dict = n_step(3).state_dict() | {"n_step": torch.zeros(3)}
    many = TransitionReplayBuffer(50, n_step=3, gamma=0.5, num_envs=2)
    for state in (
        n_step(1).state_dict(),
        n_step(2).state_dict(),
        n_step(3, 0.9).state_dict(),
        many.state_dict(),
        PrioritizedReplayBuffer(50, num_buffers=2).state_dict(),
        broken,
        no_dict,
        {},
        None,
        5,
    ):
        with pytest.raises(CheckpointError, match="expected"):
            other.load_state_dict(state)
        after = other.state_dict()
        for key in before["transitions"]:
            assert torch.equal(before["transitions"][key], after["transitions"][key])
        assert torch.equal(
            before["n_step"]["pending"]["count"], after["n_step"]["pending"]["count"]
        )


def test_a_file_of_several_environments_goes_on_with_them(tmp_path):
    buffer = TransitionReplayBuffer(50, n_step=3, gamma=0.5, num_envs=3)
    buffer.push(STATES, [1, 0, 1], np.ones(3), STATES, [False] * 3, [False] * 3)
    buffer.save(tmp_path / "buffer.pt")
    loaded = TransitionReplayBuffer.load(tmp_path / "buffer.pt")
    assert (loaded.num_envs, loaded.n_step) == (3, 3)
    loaded.push(STATES, [1, 0, 1], np.ones(3), STATES, [True] * 3, [False] * 3)
    assert sorted(loaded.sample(90)[2].tolist())[::89] == [1.0, 1.5]


def test_an_empty_file_of_a_buffer_with_frames_is_refused(tmp_path):
    PrioritizedReplayBuffer(9, frames={"state": 3}).save(tmp_path / "frames")
    with pytest.raises(CheckpointError, match=r"frames=\{'state': 3\}"):
        TransitionReplayBuffer.load(tmp_path / "frames")

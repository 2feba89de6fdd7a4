import gymnasium
import numpy as np
import pytest
import torch

from per_td import EmptyBufferError, SchemaError, TransitionReplayBuffer
from tests.oracle import NaiveBuffer


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
    naive = NaiveBuffer(500, 0.6, 0.001)
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
    assert buffer.priority.tolist() == pytest.approx(naive.priority[: len(naive)], rel=1e-5)


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
        (([0.0] * 2, 0.5, 0.0, [0.0] * 2, False), r"action: expected an integer"),
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

"""The cliff walk, its learner, and the agents that replay it."""

import heapq
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numba import njit
from numpy.random import Generator

from benchmarks.studies.blind_cliffwalk.report import Count
from per_td import PrioritizedReplayBuffer

STEP_SIZE = 0.25
TOLERANCE = 1e-3  # mean squared error over all state-action values at which an agent is done
CHUNK = 1 << 14  # how many draws the compiled agents are handed at once
PLAIN = {"alpha": 0.6, "beta": 0.0, "eps": 1e-6}  # as in the paper's study: no weights


@dataclass(frozen=True)
class Problem:
    """A cliff walk to be learned from its memory.

    A transition is known by its `pair`, 2 * state + action, since nothing here is random.

    Attributes:
        memory: pairs of all transitions, int64 [2^(n+1) - 2].
        true: values of all states and actions, float64 [n, 2].
        theta: initial parameters, float64 [n + 1, 2]: one per state and action, and biases.
        feature: what the biases are multiplied by: 0.0 (tabular) or 1.0 (linear).
    """

    memory: np.ndarray
    true: np.ndarray
    theta: np.ndarray
    feature: float

    @classmethod
    def of(cls, n: int, representation: str, rng: Generator) -> "Problem":
        """With random initial parameters, N(0, 0.1), and the memory in random order."""
        theta = rng.normal(0.0, 0.1, (n + 1, 2))
        memory = rng.permutation(all_transitions(n))
        return cls(memory, true_values(n), theta, float(representation == "linear"))


def all_transitions(n: int) -> np.ndarray:
    """Pairs of the transitions of all 2^n sequences of n actions, each until its episode ends.

    State s is reached by 2^(n-s) sequences, of which half go right there: 2^(n-s-1) copies of
    either action, together 2^(n+1) - 2.
    """
    return np.repeat(np.arange(2 * n), 2 ** (n - 1 - np.arange(2 * n) // 2))


def true_values(n: int) -> np.ndarray:
    """Optimal values, float64 [n, 2]: gamma^(actions still to go after it) if right, 0 if wrong."""
    values = np.zeros((n, 2))
    state = np.arange(n)
    values[state, state % 2] = (1 - 1 / n) ** (n - 1 - state)
    return values


@njit(cache=True)
def value(theta: np.ndarray, feature: float, state: int, action: int) -> float:
    """Q(s, a)."""
    return theta[state, action] + feature * theta[-1, action]


@njit(cache=True)
def td_error(theta: np.ndarray, feature: float, pair: int) -> float:
    """Before a step: reward + gamma max_a Q(s', a) - Q(s, a), gamma = 1 - 1/n.

    Action s % 2 is right in state s: it alternates, so that a bias per action cannot tell.
    """
    n = len(theta) - 1
    state, action = pair >> 1, pair & 1
    target = 0.0
    if action == state & 1:
        target = 1.0
        if state < n - 1:
            left, right = value(theta, feature, state + 1, 0), value(theta, feature, state + 1, 1)
            target = (1 - 1 / n) * max(left, right)
    return target - value(theta, feature, state, action)


@njit(cache=True)
def mean_squared_error(theta: np.ndarray, feature: float, true: np.ndarray) -> float:
    """Over all states and actions."""
    total = 0.0
    for state in range(len(true)):
        for action in range(2):
            total += (value(theta, feature, state, action) - true[state, action]) ** 2
    return total / true.size


@njit(cache=True)
def update(
    theta: np.ndarray,
    feature: float,
    true: np.ndarray,
    pairs: np.ndarray,
    weights: np.ndarray,
    delta: np.ndarray,
) -> float:
    """One step of Q-learning on the mean of a batch, in place.

    Args:
        theta, feature, true: as in `Problem`.
        pairs, weights: what to learn from and how much each counts, [B].
        delta: takes the TD errors before the step, [B].

    Returns:
        Mean squared error of all values after it.
    """
    n, size = len(true), len(pairs)
    for i in range(size):
        delta[i] = td_error(theta, feature, pairs[i])
    for i in range(size):
        state, action = pairs[i] >> 1, pairs[i] & 1
        step = STEP_SIZE * weights[i] * delta[i] / size
        theta[state, action] += step
        theta[n, action] += step * feature
    return mean_squared_error(theta, feature, true)


@njit(cache=True)
def best_pair(theta: np.ndarray, feature: float, true: np.ndarray) -> int:
    """The transition after which the error is least: copies of one pair are all the same."""
    pair, weight, delta = np.zeros(1, np.int64), np.ones(1), np.empty(1)
    best, least = 0, np.inf
    for pair[0] in range(true.size):
        error = update(theta.copy(), feature, true, pair, weight, delta)
        if error < least:
            best, least = pair[0], error
    return best


@njit(cache=True)
def follow(theta: np.ndarray, feature: float, true: np.ndarray, pairs: np.ndarray) -> int:
    """Learn from `pairs`, [steps, B], -1 asking the oracle; updates until done, or -1 if not."""
    weights, delta = np.ones(pairs.shape[1]), np.empty(pairs.shape[1])
    for step in range(len(pairs)):
        if pairs[step, 0] < 0:
            pairs[step, 0] = best_pair(theta, feature, true)
        if update(theta, feature, true, pairs[step], weights, delta) < TOLERANCE:
            return step + 1
    return -1


@njit(cache=True)
def follow_largest(
    theta: np.ndarray, feature: float, true: np.ndarray, memory: np.ndarray, limit: int
) -> int:
    """Learn from the transition with the largest |TD error| when last seen, 1 if not yet seen."""
    heap = [(-1.0, slot) for slot in range(len(memory))]  # sorted is a heap: ties by slot
    weights, delta = np.ones(1), np.empty(1)
    for step in range(limit):
        slot = heap[0][1]
        error = update(theta, feature, true, memory[slot : slot + 1], weights, delta)
        if error < TOLERANCE:
            return step + 1
        heapq.heapreplace(heap, (-abs(delta[0]), slot))
    return -1


Agent = Callable[[Problem, Generator, int], Count]
"""Counts the updates until the values were right; None: not within the limit."""


def scripted(
    problem: Problem, rng: Generator, limit: int, *, batch: int = 1, oracle: float = 0.0
) -> Count:
    """Uniform draws, a share `oracle` of which the oracle replaces by the best there is."""
    theta = problem.theta.copy()
    for start in range(0, limit, CHUNK):
        shape = min(CHUNK, limit - start), batch
        pairs = problem.memory[rng.integers(len(problem.memory), size=shape)]
        if oracle:
            pairs[rng.random(len(pairs)) < oracle] = -1
        taken = follow(theta, problem.feature, problem.true, pairs)
        if taken > 0:
            return start + taken
    return None


def greedy(problem: Problem, rng: Generator, limit: int) -> Count:
    """Always the largest TD error: nothing is drawn."""
    theta = problem.theta.copy()
    taken = follow_largest(theta, problem.feature, problem.true, problem.memory, limit)
    return taken if taken > 0 else None


def prioritized(
    problem: Problem,
    rng: Generator,
    limit: int,
    *,
    batch: int = 1,
    initial: float | None = None,
    watch: Callable[[int, PrioritizedReplayBuffer], None] | None = None,
    **settings: Any,
) -> Count:
    """Draws, weights and priorities of per_td's buffer; `initial` None leaves those to it too.

    `watch` is called after each update, with the number of updates and the buffer.
    """
    pairs = torch.from_numpy(problem.memory)
    generator = torch.Generator().manual_seed(int(rng.integers(2**63)))
    buffer = PrioritizedReplayBuffer(
        len(pairs), method="tree", generator=generator, **(PLAIN | settings)
    )
    given = None if initial is None else torch.full((len(pairs),), initial)
    buffer.extend_leaves({("pair",): pairs}, given)
    theta, delta = problem.theta.copy(), torch.empty(batch, dtype=torch.float64)
    for step in range(limit):
        leaves, index, weight = buffer.sample_leaves(batch)
        drawn = leaves["pair",].numpy(), weight.numpy()
        error = update(theta, problem.feature, problem.true, *drawn, delta.numpy())
        if error < TOLERANCE:
            return step + 1
        if not error < 1e6:  # it has diverged
            return None
        buffer.update_priority(index, delta)
        if watch is not None:
            watch(step + 1, buffer)
    return None


def rank_based(problem: Problem, rng: Generator, limit: int) -> Count:
    """Rank-based draws, the ranks of all renewed 16 times per sweep of the memory."""
    interval = max(1, len(problem.memory) // 16)
    settings = {"alpha": 0.7, "prioritization": "rank", "sort_interval": interval}
    return prioritized(problem, rng, limit, **settings)


AGENTS: dict[str, Agent] = {
    "uniform": scripted,
    "oracle": partial(scripted, oracle=1.0),
    "oracle + 10% random": partial(scripted, oracle=0.9),
    "greedy TD error": greedy,
    "proportional": prioritized,
    "rank-based": rank_based,
}

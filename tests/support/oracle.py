"""Slow and obvious twins of what the library does, in Python floats and lists."""

import math

import torch
from tensordict import TensorDict

CAPACITIES = (1, 7, 15, 16, 17, 32, 50, 255, 256, 257, 1000)


def data(start: int, n: int, device: torch.device | str = "cpu") -> TensorDict:
    """`n` transitions that can be told apart: number `start`, `start` + 1, ..."""
    k = torch.arange(start, start + n, device=device)
    return TensorDict(
        {
            "observation": k.float().unsqueeze(-1).expand(n, 3).clone(),
            "action": k,
            "next": {"reward": k.float().unsqueeze(-1), "done": (k % 3 == 0).unsqueeze(-1)},
        },
        batch_size=[n],
        device=device,
    )


class NaiveBuffer:
    """Prioritized replay one transition at a time."""

    def __init__(self, capacity, alpha=0.6, eps=1e-6, new_priority="buffer_max"):
        self.capacity, self.alpha, self.eps = capacity, alpha, eps
        self.new_priority = new_priority
        self.slots = [None] * capacity
        self.priority = [0.0] * capacity
        self.generation = [-1] * capacity
        self.written = self.stale = 0
        self.ever_max = 0.0

    def __len__(self):
        return min(self.written, self.capacity)

    def for_new(self):
        known = max(self.priority) if self.new_priority == "buffer_max" else self.ever_max
        return known if known > 0 else 1.0

    def extend(self, items, priority=None):
        new = self.for_new()
        for j, item in enumerate(items):
            slot = self.written % self.capacity
            self.slots[slot] = item
            self.generation[slot] = self.written // self.capacity
            self.priority[slot] = new if priority is None else priority[j]
            self.written += 1
        self.ever_max = max(self.ever_max, *self.priority, 0.0)

    def update(self, index, td_error, generation=None):
        for j, slot in enumerate(index):
            if generation is not None and generation[j] != self.generation[slot]:
                self.stale += 1
            else:
                self.priority[slot] = abs(td_error[j]) + self.eps
        self.ever_max = max(self.ever_max, *self.priority, 0.0)

    def masses(self):
        return [p**self.alpha if p > 0 else 0.0 for p in self.priority]

    def probabilities(self):
        masses = self.masses()
        return [m / math.fsum(masses) for m in masses]

    def weights(self, index, beta, normalization):
        p = self.probabilities()
        weight = [(len(self) * q) ** -beta if q > 0 else 0.0 for q in p]
        batch = [weight[i] for i in index]
        largest = {"batch": max(batch), "buffer": max(weight), "none": 1.0}[normalization]
        return [w / largest for w in batch]


def assert_drawn_from(index: torch.Tensor, probability, level: float = 1e-4) -> None:
    """Chi-square test of draws [n] against the probability of each slot, which may be 0.

    With a fixed seed it either always passes or never; `level` is how unlucky the seed may be.
    """
    probability = torch.as_tensor(probability, dtype=torch.float64)
    counts = torch.bincount(index.cpu(), minlength=len(probability)).double()
    assert len(counts) == len(probability), "a slot that does not exist was drawn"
    assert counts[probability == 0].sum() == 0, "a slot of probability 0 was drawn"
    expected = probability * len(index)
    often = expected >= 5  # the others are pooled: the test is not valid for rare outcomes
    observed = torch.cat([counts[often], counts[~often].sum().view(1)])
    expected = torch.cat([expected[often], expected[~often].sum().view(1)])
    if expected[-1] == 0:
        observed, expected = observed[:-1], expected[:-1]
    if len(observed) > 1:
        assert math.isclose(expected.sum(), len(index), rel_tol=1e-8), "no probabilities: their sum"
        chi2 = ((observed - expected).square() / expected).sum()
        freedom = torch.tensor(len(observed) - 1, dtype=torch.float64)
        pvalue = torch.special.gammaincc(freedom / 2, chi2 / 2)
        assert pvalue > level, f"p-value {pvalue}"

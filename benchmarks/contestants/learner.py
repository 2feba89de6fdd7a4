"""Work of a learner between the calls of a buffer, as users have it.

It pushes code and data of the buffer out of the processor's caches.
"""

import itertools

import torch
from torch import Tensor, nn


class Learner:
    """Work between `sample` and `update`: a step of a network of two hidden layers on the batch."""

    def __init__(self) -> None:
        sizes = (8, 256, 256, 4)
        layers = [nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
        self.network = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
        self.optimizer = torch.optim.Adam(self.network.parameters())

    def step(self, observation: Tensor) -> None:
        self.optimizer.zero_grad()
        self.network(observation).square().mean().backward()
        self.optimizer.step()


class LearnerBetween:
    """Contestants whose learner takes a step, untimed, before each timed call."""

    summed = ("extend", "sample", "update")

    def _learn(self) -> None:
        if not hasattr(self, "learner"):
            self.learner = Learner()
            self.some = torch.rand(self.point.batch, 8)
        self.learner.step(self.some)

    def before_extend(self) -> None:
        self._learn()

    def before_sample(self) -> None:
        self._learn()

    def before_update(self) -> None:
        super().before_update()
        self._learn()

"""Many DQN learners in one set of tensors: run r has the r-th network of every tensor."""

import math
from itertools import pairwise

import torch
from torch import Tensor


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """[S, B, in] by weights [S, out, in] and biases [S, 1, out] -> [S, B, out]."""
    return torch.baddbmm(bias, x, weight.transpose(1, 2))


class Learners:
    """S Q-networks, their targets and their Adam states; the backward pass is written out.

    All parameters are one tensor [S, P], so that Adam and the target's update are one call each;
    the layers are views of it, laid out and initialised as `torch.nn.Linear` does. The loss of a
    run is mean(weight * huber(TD error)) over its batch. Autograd and one optimizer per network
    would give the same numbers (the tests check it) in many times the time.

    Args:
        runs: number of networks S.
        sizes: units of each layer, from the observation to the actions.
        lr: Adam's learning rate.
        gamma: discount factor.
        generator: draws the initial parameters.
    """

    def __init__(
        self,
        runs: int,
        sizes: tuple[int, ...],
        *,
        lr: float,
        gamma: float,
        generator: torch.Generator,
    ) -> None:
        self.runs, self.sizes, self.gamma = runs, sizes, gamma
        count = sum(m * (n + 1) for n, m in pairwise(sizes))
        self.parameters = torch.zeros(runs, count)
        self.target_parameters = torch.zeros(runs, count)
        self.gradient = torch.zeros(runs, count)
        self.layers = self.views(self.parameters)
        self.target_layers = self.views(self.target_parameters)
        self._gradients = self.views(self.gradient)
        for weight, bias in self.layers:
            bound = 1 / math.sqrt(weight.shape[2])
            for leaf in (weight, bias):
                leaf.copy_(torch.rand(leaf.shape, generator=generator) * 2 * bound - bound)
        self.copy_target()
        self.parameters.grad = self.gradient
        self.optimizer = torch.optim.Adam([self.parameters], lr, fused=True)

    def views(self, flat: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Weights [S, out, in] and biases [S, 1, out] of each layer, in the memory of [S, P]."""
        layers, start = [], 0
        for n, m in pairwise(self.sizes):
            weight = flat[:, start : start + m * n].view(-1, m, n)
            bias = flat[:, start + m * n : start + m * (n + 1)].view(-1, 1, m)
            layers.append((weight, bias))
            start += m * (n + 1)
        return layers

    def values(self, observation: Tensor, *, target: bool = False) -> Tensor:
        """Q values [S, B, actions] of observations [S, B, obs]."""
        return self._forward(observation, self.target_layers if target else self.layers)[-1]

    def greedy(self, observation: Tensor) -> Tensor:
        """Best actions, int64 [S, B], in observations [S, B, obs]."""
        return self.values(observation).argmax(2)

    def _forward(self, x: Tensor, layers: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """The input and what every layer gives, [S, B, ...] each."""
        found = [x]
        for weight, bias in layers[:-1]:
            found.append(_linear(found[-1], weight, bias).relu_())
        found.append(_linear(found[-1], *layers[-1]))
        return found

    def learn(
        self,
        observation: Tensor,
        action: Tensor,
        reward: Tensor,
        next_observation: Tensor,
        terminated: Tensor,
        weight: Tensor,
    ) -> Tensor:
        """One gradient step of every run on its own batch.

        Args:
            observation, next_observation: float32 [S, B, obs].
            action: int64 [S, B].
            reward, weight: float32 [S, B]; the weights are those of importance sampling.
            terminated: bool [S, B]; no value follows there.

        Returns:
            TD errors [S, B], target less value.
        """
        following = self.values(next_observation, target=True).amax(2)
        wanted = torch.where(terminated, reward, reward + self.gamma * following)
        outputs = self._forward(observation, self.layers)
        action = action.unsqueeze(2)
        error = wanted - outputs[-1].gather(2, action).squeeze(2)
        slope = error.clamp(-1, 1).mul_(weight).mul_(-1 / error.shape[1])  # huber's, with delta 1
        self._backward(outputs, action, slope)
        self.optimizer.step()
        return error

    def _backward(self, outputs: list[Tensor], action: Tensor, slope: Tensor) -> None:
        """Fill `gradient`, from the loss's derivative [S, B] by the values of the actions taken."""
        upstream = torch.zeros_like(outputs[-1]).scatter_(2, action, slope.unsqueeze(2))
        for i in reversed(range(len(self.layers))):
            weight, bias = self._gradients[i]
            if weight.shape[2] < weight.shape[1]:  # the order in which few inputs cost little
                weight.copy_(torch.bmm(outputs[i].transpose(1, 2), upstream).transpose(1, 2))
            else:
                weight.copy_(torch.bmm(upstream.transpose(1, 2), outputs[i]))
            bias.copy_(upstream.sum(1, keepdim=True))
            if i:
                through = torch.bmm(upstream, self.layers[i][0])
                upstream = torch.ops.aten.threshold_backward(through, outputs[i], 0)

    def copy_target(self) -> None:
        """A hard update: the targets become the networks."""
        self.target_parameters.copy_(self.parameters)

    def mix_target(self, tau: float) -> None:
        """A soft update: the share `tau` of the networks goes into the targets."""
        self.target_parameters.lerp_(self.parameters, tau)

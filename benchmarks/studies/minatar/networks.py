"""S convolutional Q-networks in one set of tensors."""

import math

import torch
from torch import Tensor, nn


class Networks(nn.Module):
    """Networks as in "Revisiting Rainbow": 16 filters of 3 x 3, and a layer of 128.

    Args:
        runs: number of networks S.
        channels: of the images, which are 10 x 10.
        actions: number of actions A.
        generator: draws the parameters, as torch's own layers do.
    """

    def __init__(self, runs: int, channels: int, actions: int, generator: torch.Generator) -> None:
        super().__init__()
        self.runs = runs

        def drawn(fan_in: int, *shape: int) -> nn.Parameter:
            bound = 1 / math.sqrt(fan_in)
            numbers = torch.rand(runs, *shape, generator=generator)
            return nn.Parameter(numbers * 2 * bound - bound)

        inputs = 9 * channels
        self.filters, self.filter_bias = drawn(inputs, 16, channels, 3, 3), drawn(inputs, 16)
        self.hidden, self.hidden_bias = drawn(1024, 1024, 128), drawn(1024, 1, 128)
        self.out, self.out_bias = drawn(128, 128, actions), drawn(128, 1, actions)

    def forward(self, images: Tensor) -> Tensor:
        """Action values [S, B, A] of images bool [S, B, channels, 10, 10]."""
        s, b, channels = images.shape[:3]
        x = images.float().transpose(0, 1).reshape(b, s * channels, 10, 10)
        x = nn.functional.conv2d(
            x, self.filters.flatten(0, 1), self.filter_bias.flatten(), groups=s
        )
        x = x.relu().view(b, s, 1024).transpose(0, 1)
        x = torch.baddbmm(self.hidden_bias, x, self.hidden).relu()
        return torch.baddbmm(self.out_bias, x, self.out)

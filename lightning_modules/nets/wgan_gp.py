"""Residual generator and critic of WGAN-GP at 64×64 (Gulrajani et al. 2017, appendix; the authors' `GoodGenerator`).

Dimensions: B batch, C channels, Z latent, H = W side.
"""

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_modules.nets.dcgan import doublings
from lightning_modules.nets.norms import SyncBatchNorm2d

_HIGHEST = 8  # of `width`, the most channels


class ResidualBlock(nn.Module):
    """norm, ReLU, conv3x3, norm, ReLU, conv3x3, beside a conv1x1: (B, C, H, W) to half or twice the side.

    Up, each pixel is repeated before the first convolution; down, four are averaged after the second, and before the
    shortcut's. A critic's norm is over one picture, since the penalty is of each picture by itself.
    """

    def __init__(self, channels: int, out: int, up: bool):
        super().__init__()
        between = out if up else channels
        self.up = up
        self.norm1, self.norm2 = _norm(channels, up), _norm(between, up)
        self.conv1 = _convolution(nn.Conv2d(channels, between, 3, padding=1, bias=False), relu=True)
        self.conv2 = _convolution(nn.Conv2d(between, out, 3, padding=1), relu=True)
        self.shortcut = _convolution(nn.Conv2d(channels, out, 1))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        h = F.relu(self.norm1(x_BCHW))
        if self.up:
            x_BCHW, h = (F.interpolate(each, scale_factor=2.0, mode="nearest") for each in (x_BCHW, h))
        h = self.conv2(F.relu(self.norm2(self.conv1(h))))
        if not self.up:
            x_BCHW, h = F.avg_pool2d(x_BCHW, 2), F.avg_pool2d(h, 2)
        return self.shortcut(x_BCHW) + h


class ResidualGenerator(nn.Module):
    """Latents (B, Z) to pictures (B, 3, side, side) in [-1, 1]; channels at side 64: 8, 8, 4, 2 and 1 times `width`."""

    def __init__(self, latent: int, width: int, side: int):
        super().__init__()
        widths = _widths(width, side)[::-1]
        self.start = widths[0]
        self.input = _convolution(nn.Linear(latent, 16 * widths[0]))
        self.blocks = nn.Sequential(*(ResidualBlock(a, b, up=True) for a, b in pairwise(widths)))
        self.norm = SyncBatchNorm2d(widths[-1])
        self.output = _convolution(nn.Conv2d(widths[-1], 3, 3, padding=1), relu=True)

    def forward(self, z_BZ: Tensor) -> Tensor:
        h = self.blocks(self.input(z_BZ).view(-1, self.start, 4, 4))
        return self.output(F.relu(self.norm(h))).tanh()


class ResidualCritic(nn.Module):
    """Pictures (B, 3, side, side) in [-1, 1] to scores (B,); channels at side 64: 1, 2, 4, 8 and 8 times `width`."""

    def __init__(self, width: int, side: int):
        super().__init__()
        widths = _widths(width, side)
        self.input = _convolution(nn.Conv2d(3, widths[0], 3, padding=1))
        self.blocks = nn.Sequential(*(ResidualBlock(a, b, up=False) for a, b in pairwise(widths)))
        self.output = _convolution(nn.Linear(16 * widths[-1], 1))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.output(self.blocks(self.input(x_BCHW)).flatten(1))[:, 0]


def _widths(width: int, side: int) -> list[int]:
    return [width * min(1 << i, _HIGHEST) for i in range(doublings(side, 4) + 1)]


def _norm(channels: int, generator: bool) -> nn.Module:
    """Of one group, GroupNorm is the layer norm over a picture with a scale and shift a channel."""
    return SyncBatchNorm2d(channels) if generator else nn.GroupNorm(1, channels)


def _convolution(layer: nn.Conv2d | nn.Linear, relu: bool = False) -> nn.Module:
    """The authors' start: uniform by Glorot & Bengio 2010, √2 times as wide behind a ReLU; biases 0."""
    nn.init.xavier_uniform_(layer.weight, gain=2**0.5 if relu else 1.0)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer

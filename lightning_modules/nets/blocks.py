"""Convolutional blocks that the MSDM U-Net and autoencoders share.

Dimensions: B batch, C channels, H height, W width, E width of the time embedding.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from medsynth.errors import UserError


def zero_init(layer: nn.Conv2d | nn.Linear) -> nn.Conv2d | nn.Linear:
    """The same layer with weight and bias set to zero, so that it contributes nothing before training."""
    nn.init.zeros_(layer.weight)
    assert layer.bias is not None, "what is added must start at zero"
    nn.init.zeros_(layer.bias)
    return layer


def check_divides(name: str, divisor: int, widths: Sequence[int]) -> None:
    """Raises UserError unless `divisor`, the option called `name`, divides every width."""
    for width in widths:
        if divisor < 1 or width % divisor:
            raise UserError(f"{name}={divisor} does not divide width {width} of widths={tuple(widths)}; change either")


def check_size(x_BCHW: Tensor, factor: int) -> None:
    """Raises UserError unless height and width are multiples of `factor`, the total downsampling."""
    height, width = x_BCHW.shape[-2:]
    if height % factor or width % factor:
        raise UserError(f"input of {height}x{width} (height x width): both must be multiples of {factor}")


class ConvBlock(nn.Module):
    """conv3x3, GroupNorm, dropout and SiLU, beside a skip that is a conv1x1 where the channel numbers differ."""

    def __init__(self, in_channels: int, out_channels: int, norm_groups: int, dropout: float, zero: bool = False):
        super().__init__()
        conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.block = nn.Sequential(
            zero_init(conv) if zero else conv,
            nn.GroupNorm(norm_groups, out_channels),
            nn.Dropout(dropout),
            nn.SiLU(),
        )
        self.skip = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.skip(x_BCHW) + self.block(x_BCHW)


class ResBlock(nn.Module):
    """Two residual sub-blocks; the second is the identity before training.

    An embedding, where `embedding_dim` is given, is projected to one offset a channel and added between the two.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        norm_groups: int,
        dropout: float = 0.0,
        embedding_dim: int | None = None,
    ):
        super().__init__()
        self.first = ConvBlock(in_channels, out_channels, norm_groups, dropout)
        self.second = ConvBlock(out_channels, out_channels, norm_groups, dropout, zero=True)
        if embedding_dim is not None:
            self.embed = nn.Sequential(nn.SiLU(), nn.Linear(embedding_dim, out_channels))

    def forward(self, x_BCHW: Tensor, emb_BE: Tensor | None = None) -> Tensor:
        """(B, in_channels, H, W) and, with `embedding_dim`, (B, E) to (B, out_channels, H, W)."""
        h_BCHW = self.first(x_BCHW)
        if emb_BE is not None:
            h_BCHW = h_BCHW + self.embed(emb_BE)[:, :, None, None]
        return self.second(h_BCHW)


def downsample(in_channels: int, out_channels: int) -> nn.Conv2d:
    """Learned halving of height and width."""
    return nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1)


class Upsample(nn.Module):
    """Doubles height and width: each pixel repeated, then conv3x3."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.conv(F.interpolate(x_BCHW, scale_factor=2, mode="nearest"))

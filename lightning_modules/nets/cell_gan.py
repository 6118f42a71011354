"""Generator and discriminator of the cell GAN (Berezsky et al. 2024, Tables 1 to 4).

Every convolution, transposed convolution and linear layer is under spectral norm. What the tables leave open: L16 and
L17 of Table 1 name no activation, and have none between them; pictures end in tanh; attention (Zhang et al. 2019) is
fed the cell's output and gives γ·o, the sum around it being its skip; L8 of Table 3 has the channels of its input, 128;
class embeddings are not under spectral norm.

Dimensions: B batch, C channels, H height, W width, Z latent, N = H·W positions, M = N/4 of them after pooling.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_modules.nets.cells import CELL_D, CELL_G, Cell, convolution, full_precision, spectral_norm
from lightning_modules.nets.norms import ConditionalBatchNorm2d
from medsynth.errors import UserError

SMALLEST = 4
"""Side of the smallest maps of both networks."""


def side(widths: Sequence[int]) -> int:
    """Side of the pictures of networks with these widths, pixels: each width but the first doubles 4."""
    return SMALLEST * 2 ** (len(widths) - 1)


class SelfAttention(nn.Module):
    """γ times what each position reads of all others (Zhang et al. 2019, eqs. 1 to 3, without the skip); γ starts at 0.

    Queries and keys have C/8 channels, values C/2; keys and values are max-pooled by 2.
    """

    def __init__(self, channels: int):
        super().__init__()
        inner, half = max(1, channels // 8), max(1, channels // 2)
        self.query = convolution(channels, inner, 1, bias=False)
        self.key = convolution(channels, inner, 1, bias=False)
        self.value = convolution(channels, half, 1, bias=False)
        self.out = convolution(half, channels, 1, bias=False)
        self.gamma = nn.Parameter(torch.zeros(()))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Shape and dtype as x, whose height and width are even."""
        query_BCN = self.query(x_BCHW).flatten(2)
        key_BCM = F.max_pool2d(self.key(x_BCHW), 2).flatten(2)
        value_BCM = F.max_pool2d(self.value(x_BCHW), 2).flatten(2)
        # The logits are not divided by the root of the width, and may pass float16's range. Written out, for a gradient
        # of a gradient, which torch's fused attention has not.
        with full_precision(x_BCHW):
            weights_BNM = torch.bmm(query_BCN.transpose(1, 2).float(), key_BCM.float()).softmax(dim=2)
        read_BCN = torch.bmm(value_BCM, weights_BNM.to(value_BCM.dtype).transpose(1, 2))
        return self.gamma.to(x_BCHW.dtype) * self.out(read_BCN.unflatten(2, x_BCHW.shape[2:])).to(x_BCHW.dtype)


class Level(nn.Module):
    """The maps of one size: input + cell, and + attention to the cell's output where there is one."""

    def __init__(self, channels: int, cell: Sequence[str], attention: bool):
        super().__init__()
        self.cell = Cell(channels, cell)
        self.attention = SelfAttention(channels) if attention else None

    def forward(self, x_BCHW: Tensor) -> Tensor:
        cell_BCHW = self.cell(x_BCHW)
        x_BCHW = x_BCHW + cell_BCHW
        return x_BCHW if self.attention is None else x_BCHW + self.attention(cell_BCHW)


class Upsample(nn.Module):
    """Table 2: each pixel repeated, conv3x3, conditional batch norm and GLU, which halves what is twice as wide."""

    def __init__(self, in_channels: int, out_channels: int, classes: int):
        super().__init__()
        self.conv = convolution(in_channels, 2 * out_channels, 3)
        self.norm = ConditionalBatchNorm2d(2 * out_channels, classes)

    def forward(self, x_BCHW: Tensor, labels_B: Tensor) -> Tensor:
        """(B, in_channels, H, W) to (B, out_channels, 2H, 2W)."""
        x_BCHW = self.conv(F.interpolate(x_BCHW, scale_factor=2, mode="nearest"))
        return F.glu(self.norm(x_BCHW, labels_B), dim=1)


class Downsample(nn.Sequential):
    """Table 4: conv3x3, each square of four pixels put into channels, conv1x1 and ELU.

    (B, in_channels, H, W) to (B, out_channels, H/2, W/2).
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(
            convolution(in_channels, out_channels, 3),
            nn.PixelUnshuffle(2),
            convolution(4 * out_channels, out_channels, 1),
            nn.ELU(),
        )


class Generator(nn.Module):
    """Noise and a class to a picture.

    classes: number of classes, at least 1.
    widths: channels of the maps of 4×4, 8×8, …; the last are the picture's size, and have no cell.
    attention: sides of the maps that have self-attention; of maps with a cell.
    cell: lines of `cells.py`.
    latent: numbers of noise.

    Raises UserError where these do not fit together.
    """

    def __init__(
        self,
        classes: int = 4,
        widths: Sequence[int] = (1024, 1024, 512, 256, 128),
        attention: Sequence[int] = (16, 32),
        cell: Sequence[str] = CELL_G,
        latent: int = 128,
    ):
        super().__init__()
        sides = [SMALLEST * 2**i for i in range(len(widths) - 1)]
        check_attention(attention, sides)
        self.latent = latent
        stem = nn.ConvTranspose2d(latent, widths[0], SMALLEST)
        self.stem = nn.Sequential(spectral_norm(stem), nn.ELU())
        self.levels = nn.ModuleList(
            Level(width, cell, at in attention) for width, at in zip(widths[:-1], sides, strict=True)
        )
        self.ups = nn.ModuleList(Upsample(before, width, classes) for before, width in pairwise(widths))
        self.head = nn.Sequential(convolution(widths[-1], widths[-1], 3), convolution(widths[-1], 3, 3))

    def forward(self, z_BZ: Tensor, labels_B: Tensor) -> Tensor:
        """Noise of N(0, 1), (B, latent), and int64 labels (B,) from 0 to classes − 1, to float32 (B, 3, S, S) in
        [-1, 1], S = `side(widths)`."""
        x_BCHW = self.stem(z_BZ[:, :, None, None])
        for level, up in zip(self.levels, self.ups, strict=True):
            x_BCHW = up(level(x_BCHW), labels_B)
        return self.head(x_BCHW).float().tanh()


class Discriminator(nn.Module):
    """A logit of how real a picture of a class is: by projection (Miyato & Koyama 2018).

    classes: number of classes, at least 1.
    widths: channels of the maps of the picture's size, half of it, …; the last, of 4×4, have no cell.
    attention: sides of the maps that have self-attention; of maps with a cell.
    cell: lines of `cells.py`.

    Raises UserError where these do not fit together.
    """

    def __init__(
        self,
        classes: int = 4,
        widths: Sequence[int] = (64, 128, 256, 512, 1024),
        attention: Sequence[int] = (64, 32),
        cell: Sequence[str] = CELL_D,
    ):
        super().__init__()
        sides = [side(widths) // 2**i for i in range(len(widths) - 1)]
        check_attention(attention, sides)
        self.stem = nn.Sequential(convolution(3, widths[0], 3), nn.ELU())
        self.levels = nn.ModuleList(
            Level(width, cell, at in attention) for width, at in zip(widths[:-1], sides, strict=True)
        )
        self.downs = nn.ModuleList(Downsample(before, width) for before, width in pairwise(widths))
        self.linear = spectral_norm(nn.Linear(widths[-1], 1))
        self.embedding = nn.Embedding(classes, widths[-1])
        nn.init.normal_(self.embedding.weight, std=widths[-1] ** -0.5)  # of length 1, as the linear layer's weight

    def forward(self, x_BCHW: Tensor, labels_B: Tensor) -> Tensor:
        """Pictures (B, 3, S, S) in [-1, 1], S = `side(widths)`, and int64 labels (B,) to float32 logits (B,)."""
        x_BCHW = self.stem(x_BCHW)
        for level, down in zip(self.levels, self.downs, strict=True):
            x_BCHW = down(level(x_BCHW))
        with full_precision(x_BCHW):
            features_BC = x_BCHW.float().sum(dim=(2, 3))
            return self.linear(features_BC).squeeze(1) + (features_BC * self.embedding(labels_B)).sum(dim=1)


def check_attention(attention: Sequence[int], sides: Sequence[int]) -> None:
    """Raises UserError unless there is a cell at each of these sides of maps."""
    for strange in set(attention) - set(sides):
        known = ", ".join(map(str, sorted(sides)))
        raise UserError(f"attention={list(attention)}: there is no cell at side {strange}; there are cells at {known}")


def check_resolution(resolution: int, widths: Sequence[int]) -> None:
    """Raises UserError unless networks of these widths give and take pictures of this side."""
    if side(widths) != resolution:
        raise UserError(
            f"resolution={resolution}: networks of {len(widths)} widths have pictures of {side(widths)} pixels, 4 · 2 "
            f"for each width but the first; set {side(widths)}, or as many widths as give it"
        )

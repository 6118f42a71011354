"""Generator and discriminator of BEGAN (Berthelot et al. 2017, section 3.5): convolutions of one width with ELU.

Dimensions: B batch, Z latent, H = W side.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_modules.nets.dcgan import doublings

_FIRST = 8  # side of the smallest map


class Decoder(nn.Module):
    """Latents (B, Z) to pictures (B, 3, side, side): two conv3x3 with ELU at each size from 8×8 on, then conv3x3.

    Each pixel is repeated between two sizes. Nothing limits the output, which learns to lie in [-1, 1].
    """

    def __init__(self, latent: int, width: int, side: int):
        super().__init__()
        sizes = doublings(side, _FIRST) + 1
        self.width = width
        self.input = nn.Linear(latent, width * _FIRST**2)
        self.blocks = nn.ModuleList(nn.Sequential(*_two(width, width)) for _ in range(sizes))
        self.output = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, z_BZ: Tensor) -> Tensor:
        h = self.input(z_BZ).view(-1, self.width, _FIRST, _FIRST)
        for i, block in enumerate(self.blocks):
            h = block(h if i == 0 else F.interpolate(h, scale_factor=2.0, mode="nearest"))
        return self.output(h)


class Encoder(nn.Module):
    """Pictures (B, 3, side, side) to (B, Z): two conv3x3 with ELU at each size down to 8×8, the i-th i times as wide.

    A convolution of stride 2 lies between two sizes.
    """

    def __init__(self, latent: int, width: int, side: int):
        super().__init__()
        sizes = doublings(side, _FIRST) + 1
        layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1), nn.ELU()]
        for i in range(1, sizes + 1):
            layers += _two(width * max(1, i - 1), width * i)
            if i < sizes:
                layers += [nn.Conv2d(width * i, width * i, 3, stride=2, padding=1), nn.ELU()]
        self.layers = nn.Sequential(*layers)
        self.output = nn.Linear(width * sizes * _FIRST**2, latent)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.output(self.layers(x_BCHW).flatten(1))


class AutoencodingDiscriminator(nn.Module):
    """Pictures (B, 3, side, side) in [-1, 1] to what it makes of them, the same shape: encoder and decoder."""

    def __init__(self, latent: int, width: int, side: int):
        super().__init__()
        self.encoder, self.decoder = Encoder(latent, width, side), Decoder(latent, width, side)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.decoder(self.encoder(x_BCHW))


def _two(channels: int, out: int) -> list[nn.Module]:
    return [nn.Conv2d(channels, out, 3, padding=1), nn.ELU(), nn.Conv2d(out, out, 3, padding=1), nn.ELU()]

"""Generator and discriminator of DCGAN (Radford et al. 2016): strided convolutions, batch norm, no dense layer between.

Dimensions: B batch, Z latent, H = W side.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn

from lightning_modules.nets.norms import SyncBatchNorm2d
from medsynth.errors import UserError


def doublings(side: int, first: int) -> int:
    """How often `first` pixels are doubled until they are `side`; raises UserError unless whole, at least 1."""
    count = (side // first).bit_length() - 1
    if count < 1 or first << count != side:
        sizes = ", ".join(str(first << i) for i in range(1, 7))
        raise UserError(f"model.resolution={side}: these networks draw pictures of a side of {sizes}, …")
    return count


class DCGANGenerator(nn.Module):
    """Latents (B, Z) to pictures (B, 3, side, side) in [-1, 1].

    The latent becomes 4×4 by a transposed convolution, and each further one doubles the side and halves the channels
    down to `width` before the last: at side 64 8, 4, 2 and 1 times `width`. Batch norm and ReLU after each but the
    last, which ends in tanh.
    """

    def __init__(self, latent: int, width: int, side: int, kernel: int = 4):
        """kernel: 4, or 5 as in the authors' own code; the first convolution always has 4, the map that it makes."""
        super().__init__()
        count = doublings(side, 4)
        widths = [width << i for i in reversed(range(count))]
        layers: list[nn.Module] = [nn.ConvTranspose2d(latent, widths[0], 4, bias=False)]
        for before, after in pairwise([*widths, 3]):
            layers += [SyncBatchNorm2d(before), nn.ReLU(inplace=True)]
            layers.append(
                nn.ConvTranspose2d(before, after, kernel, 2, (kernel - 1) // 2, output_padding=kernel % 2, bias=False)
            )
        self.layers = nn.Sequential(*layers, nn.Tanh())
        self.apply(initialise)

    def forward(self, z_BZ: Tensor) -> Tensor:
        return self.layers(z_BZ[:, :, None, None])


class DCGANDiscriminator(nn.Module):
    """Pictures (B, 3, side, side) in [-1, 1] to scores (B,): the generator's mirror image with leaky ReLU, 0.2.

    No norm on the first and the last convolution.
    """

    def __init__(self, width: int, side: int, kernel: int = 4):
        """kernel: as the generator's."""
        super().__init__()
        widths = [width << i for i in range(doublings(side, 4))]
        layers: list[nn.Module] = []
        for before, after in pairwise([3, *widths]):
            layers.append(nn.Conv2d(before, after, kernel, 2, (kernel - 1) // 2, bias=False))
            if before != 3:
                layers.append(SyncBatchNorm2d(after))
            layers.append(nn.LeakyReLU(0.2, inplace=True))
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, bias=False))
        self.apply(initialise)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.layers(x_BCHW)[:, 0, 0, 0]


@torch.no_grad()
def initialise(layer: nn.Module) -> None:
    """The paper's start (section 4): weights N(0, 0.02²), scales of norms N(1, 0.02²), shifts 0."""
    if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
        layer.weight.normal_(0, 0.02)
    elif isinstance(layer, SyncBatchNorm2d):
        layer.weight.normal_(1, 0.02)
        layer.bias.zero_()

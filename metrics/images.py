"""Pictures as a file would hold them."""

import torch
from torch import Tensor


def quantise(images: Tensor) -> Tensor:
    """uint8 pictures, round(255 x), of the same shape as `images`: floating point, finite, clamped to [0, 1].

    What an 8-bit lossless file of the picture gives back; every score and every saved picture goes through here.
    """
    return images.float().clamp(0, 1).mul(255).round().to(torch.uint8)

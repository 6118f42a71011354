"""Pictures as a file would hold them."""

import torch
from torch import Tensor

from medsynth.errors import UserError

QUANTISATION = "uint8 by round(255 x)"
"""What `quantise` does, in the words of a protocol."""


def are_finite(images: Tensor) -> bool:
    """Whether no value is NaN or infinite."""
    return bool(images.isfinite().all())


def quantise(images: Tensor) -> Tensor:
    """uint8 pictures, round(255 x), of the same shape as `images`: floating point, finite, clamped to [0, 1].

    What an 8-bit lossless file of the picture gives back; every score and every saved picture goes through here.

    Raises:
        UserError: a value is NaN or infinite, which no pixel can show.
    """
    if not are_finite(images):
        raise UserError(
            "pictures that were drawn hold values that are not finite and cannot be saved or scored: the model has "
            "diverged, or computes in float16 where it needs bfloat16; use an earlier checkpoint, or another precision"
        )
    return images.float().clamp(0, 1).mul(255).round().to(torch.uint8)

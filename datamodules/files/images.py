"""Pictures on disk: reading any of them as RGB, making them square, and the augmentations they share.

Between the functions a picture is a tensor (3, H, W): uint8 as read, float32 in [0, 1] where said.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from datamodules.files import raster
from datamodules.files.raster import Show, show_full

SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".tif", ".tiff", ".bmp", ".webp", ".gif", ".jp2", ".j2k", ".avif"}
)


def read_rgb(path: Path, max_pixels: int, least_side: int = 0, show: Show = show_full) -> Tensor:
    """The picture as it is meant to be seen: uint8 (3, H, W), RGB, upright.

    Grey is repeated, transparency laid on black. More than 8 bits are shown by `show`: by default white is the greatest
    value that the bits can hold, not the brightest pixel, and 16 bits that hold 12 or less are refused.
    With `least_side` a JPEG is decoded at 1/2, 1/4 or 1/8 of its size, as long as no side falls below it. Twice the
    side that is wanted in the end saves most of the decoding and still leaves the filtering to the resize.

    Raises:
        UserError: the message starts with `path` and says what is wrong, see `raster.opened`; that a picture has more
            than `max_pixels` pixels the header tells before anything is decoded.
    """
    return decode_rgb(path, str(path), max_pixels, least_side, show)


def decode_rgb(
    file: Path | BinaryIO, name: str, max_pixels: int, least_side: int = 0, show: Show = show_full
) -> Tensor:
    """`read_rgb` of a path or an open file, which messages call `name`."""
    return torch.from_numpy(raster.decode_rgb(file, name, max_pixels, least_side, show)).permute(2, 0, 1)


def check_header(file: Path | BinaryIO, name: str, max_pixels: int) -> None:
    """Read no more than the header; raises UserError where that shows what `read_rgb` would refuse."""
    with raster.opened(file, name, max_pixels):
        pass


@dataclass(frozen=True)
class Geometry:
    """Which square of a picture is shown, and how it lies: one for a picture, its mask and its control.

    side: of the result, pixels. square: `crop` or `pad`. place: of the crop, see `crop_square`. flips: axes, -1
    left to right, -2 upside down.
    """

    side: int
    square: str = "crop"
    place: float = 0.5
    flips: tuple[int, ...] = ()

    @property
    def resampled(self) -> int:
        """Side that the picture's square is brought to; more than `side` where some of it is cut away then."""
        return self.side

    def apply(self, image: Tensor, interpolation: InterpolationMode = InterpolationMode.BICUBIC) -> Tensor:
        """(C, H, W) -> (C, side, side), same dtype; masks of classes need NEAREST_EXACT."""
        if self.square == "pad":
            image = pad_square(image, self.side, interpolation)
        else:
            image = crop_square(image, self.side, self.place, interpolation)
        return torch.flip(image, self.flips) if self.flips else image


def crop_square(
    image: Tensor, side: int, place: float = 0.5, interpolation: InterpolationMode = InterpolationMode.BICUBIC
) -> Tensor:
    """The largest square of a picture, resized: (C, H, W) -> (C, side, side), same dtype.

    `place` in [0, 1] is where the square lies along the longer side: 0 left or top, 0.5 the centre.
    The resize is torchvision's antialiased bicubic: on uint8 faster than Pillow's, and within one level of it.
    """
    height, width = image.shape[-2:]
    short = min(height, width)
    top, left = round(place * (height - short)), round(place * (width - short))
    return F.resized_crop(image, top, left, short, short, [side, side], interpolation, antialias=True)


def pad_square(image: Tensor, side: int, interpolation: InterpolationMode = InterpolationMode.BICUBIC) -> Tensor:
    """The whole picture in a black square: (C, H, W) -> (C, side, side), same dtype, centred."""
    scale = side / max(image.shape[-2:])
    size = [max(1, round(extent * scale)) for extent in image.shape[-2:]]
    image = F.resize(image, size, interpolation, antialias=True)
    return F.center_crop(image, [side, side])


def jitter(image: Tensor, rng: np.random.Generator, brightness: float, contrast: float, saturation: float) -> Tensor:
    """Brightness, contrast and saturation times factors from U[max(0, 1 - s), 1 + s], s each strength, in random order.

    `image`: float32 (3, H, W) in [0, 1], and so is the result. A strength of 0 leaves its property alone.
    """
    strengths = (brightness, contrast, saturation)
    adjust = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation)
    factors = [rng.uniform(max(0.0, 1 - s), 1 + s) for s in strengths]
    for i in rng.permutation(3):
        if strengths[i]:
            image = adjust[i](image, factors[i])
    return image


def random_flips(rng: np.random.Generator) -> tuple[int, ...]:
    """Axes of a horizontal and a vertical flip, each with probability 0.5."""
    return tuple(axis for axis in (-1, -2) if rng.random() < 0.5)

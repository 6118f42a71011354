"""Rotation, flip and zoom of pictures that name no places: in training, and written beside the originals."""

import math
from dataclasses import dataclass

import numpy as np
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from datamodules.files.images import Geometry


@dataclass(frozen=True)
class AffineGeometry(Geometry):
    """A `Geometry` turned by `angle` degrees, anticlockwise, and enlarged by `zoom` about its middle."""

    angle: float = 0.0
    zoom: float = 1.0

    @property
    def resampled(self) -> int:
        # The square that lies within a square turned by a is smaller by |cos a| + |sin a|.
        scale = self.zoom * grown(self.angle, 1, 1)
        return self.side + 2 * math.ceil(self.side * (scale - 1) / 2)

    def apply(self, image: Tensor, interpolation: InterpolationMode = InterpolationMode.BICUBIC) -> Tensor:
        image = Geometry(self.resampled, self.square, self.place, self.flips).apply(image, interpolation)
        if self.angle:
            classes = interpolation == InterpolationMode.NEAREST_EXACT
            image = F.rotate(image, self.angle, InterpolationMode.NEAREST if classes else InterpolationMode.BILINEAR)
        return F.center_crop(image, [self.side, self.side])


@dataclass(frozen=True)
class Affine:
    """What is done to one picture. flips: axes, -1 left to right, -2 upside down. angle: degrees, anticlockwise. zoom:
    factor, about the middle."""

    flips: tuple[int, ...] = ()
    angle: float = 0.0
    zoom: float = 1.0

    def apply(self, image: Tensor) -> Tensor:
        """(C, H, W) -> the same shape and dtype; the picture grows just so far that no corner is empty."""
        height, width = image.shape[-2:]
        scale = self.zoom * grown(self.angle, height, width)
        if scale > 1:
            size = [extent + 2 * math.ceil(extent * (scale - 1) / 2) for extent in (height, width)]
            image = F.resize(image, size, InterpolationMode.BICUBIC, antialias=True)
        if self.angle:
            image = F.rotate(image, self.angle, InterpolationMode.BILINEAR)
        return F.center_crop(image, [height, width]).flip(self.flips)


def grown(angle: float, height: int, width: int) -> float:
    """How many times as large a picture of these sides must be that, turned by `angle` degrees, it covers them."""
    cosine, sine = abs(math.cos(math.radians(angle))), abs(math.sin(math.radians(angle)))
    return cosine + sine * max(height / width, width / height)


def draw_affine(
    rng: np.random.Generator, probability: float, rotation: float, zoom: float, flips: bool = True
) -> Affine:
    """A rotation of up to `rotation` degrees to either side, a zoom of 1 to `zoom` and a flip in one direction, each
    with that probability; the same numbers are drawn whatever comes of it."""
    turned, zoomed, flipped = rng.random(3) < probability
    angle = rng.uniform(-rotation, rotation)
    factor, axis = rng.uniform(1, zoom), int(rng.choice((-1, -2)))
    return Affine((axis,) if flips and flipped else (), angle if turned else 0.0, factor if zoomed else 1.0)

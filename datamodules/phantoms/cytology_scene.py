"""What a cytology phantom shows: stained cells of one class, drawn by chance, with nuclei and cytoplasm known.

Lengths are fractions of the picture's side, x to the right, y downwards.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datamodules.phantoms.drawing import Array, pixels, polar, round_outline

NUCLEUS, CYTOPLASM = 255, 128
"""Grey values of a mask; what lies beside the cells is 0."""


@dataclass(frozen=True)
class CellClass:
    """What sets a class apart, each drawn evenly between two bounds.

    ratio: radius of the nucleus, of the cell's; no two classes share a value, so that it tells the class. radius: of a
    cell. cells: how many. uneven: of the nucleus's outline. chromatin: contrast within a nucleus.
    """

    ratio: tuple[float, float]
    radius: tuple[float, float]
    cells: tuple[int, int]
    uneven: tuple[float, float]
    chromatin: tuple[float, float]


CLASSES = {
    "atypia": CellClass((0.52, 0.60), (0.17, 0.23), (2, 4), (0.8, 1.2), (0.25, 0.40)),
    "carcinoma": CellClass((0.66, 0.76), (0.14, 0.22), (4, 7), (1.2, 2.0), (0.40, 0.60)),
    "hyperplasia": CellClass((0.40, 0.48), (0.16, 0.21), (3, 6), (0.4, 0.7), (0.12, 0.25)),
    "normal": CellClass((0.24, 0.34), (0.22, 0.30), (1, 2), (0.1, 0.4), (0.05, 0.15)),
}
"""The classes, in the order of their names, as labels number them."""


@dataclass(frozen=True)
class StainedCell:
    """One cell.

    x, y, radius: centre and mean radius of the cytoplasm. ratio: of the nucleus's mean radius to it. off: where the
    nucleus lies from the centre, of that radius. stretch, turn: the nucleus's longer by its shorter axis, and the
    longer's angle, radians. uneven, chromatin: see `CellClass`. texture: seed of outlines and grain.
    """

    x: float
    y: float
    radius: float
    ratio: float
    off: tuple[float, float]
    stretch: float
    turn: float
    uneven: float
    chromatin: float
    texture: int

    def reach(self, x: Array, y: Array) -> Array:
        """Distance from the centre in radii of the cytoplasm's outline: 1 on it. x (1, W), y (H, 1) -> (H, W)."""
        distance, cosine, sine = polar(x - np.float32(self.x), y - np.float32(self.y))
        return distance / (self.radius * round_outline(cosine, sine, np.random.default_rng(self.texture)))

    def nucleus_reach(self, x: Array, y: Array) -> Array:
        """The same of the nucleus's outline, which never leaves the cytoplasm."""
        dx, dy = x - np.float32(self.x + self.off[0] * self.radius), y - np.float32(self.y + self.off[1] * self.radius)
        along = math.cos(self.turn) * dx + math.sin(self.turn) * dy
        across = math.cos(self.turn) * dy - math.sin(self.turn) * dx
        root = math.sqrt(self.stretch)  # the area is that of the circle
        distance, cosine, sine = polar(along / root, across * root)
        outline = round_outline(cosine, sine, np.random.default_rng((self.texture, 1)))
        own = distance / (self.ratio * self.radius * (1 + self.uneven * (outline - 1)))
        return np.maximum(own, self.reach(x, y))


@dataclass(frozen=True)
class CytologyScene:
    """What one picture shows.

    label: the class. cells: the first in the middle. stain: strength, about 1. warmth: of the stain's hue, -1 to 1.
    lamp: brightness of the field, about 1. texture: seed of all else.
    """

    label: str
    cells: tuple[StainedCell, ...]
    stain: float
    warmth: float
    lamp: float
    texture: int

    def mask(self, size: int) -> NDArray[np.uint8]:
        """(size, size): `NUCLEUS` or `CYTOPLASM` where a pixel's centre lies in one, else 0."""
        x, y = pixels(size)
        mask = np.zeros((size, size), dtype=np.uint8)
        for cell in self.cells:
            mask[cell.reach(x, y) <= 1] = CYTOPLASM
        for cell in self.cells:
            mask[cell.nucleus_reach(x, y) <= 1] = NUCLEUS
        return mask

    def truth(self, size: int) -> dict[str, Any]:
        """Shares of the picture's pixels that are nucleus and cytoplasm, and the cells' mean ratio of radii."""
        mask = self.mask(size)
        shares = {name: float((mask == v).mean()) for name, v in (("nucleus", NUCLEUS), ("cytoplasm", CYTOPLASM))}
        return shares | {"ratio": float(np.mean([cell.ratio for cell in self.cells]))}


def draw_scene(label: str, rng: np.random.Generator) -> CytologyScene:
    """A scene of that class, one of `CLASSES`, drawn by chance."""
    kind = CLASSES[label]
    cells: tuple[StainedCell, ...] = ()
    for _ in range(rng.integers(kind.cells[0], kind.cells[1] + 1)):
        cells += _place_cell(rng, kind, cells)
    return CytologyScene(
        label=label,
        cells=cells,
        stain=rng.uniform(0.8, 1.2),
        warmth=rng.uniform(-1, 1),
        lamp=rng.uniform(0.92, 1.0),
        texture=int(rng.integers(2**31)),
    )


def _place_cell(rng: np.random.Generator, kind: CellClass, others: tuple[StainedCell, ...]) -> tuple[StainedCell, ...]:
    """One cell beside `others`, at most touching them, or none where a hundred tries find no place."""
    radius, ratio = rng.uniform(*kind.radius), rng.uniform(*kind.ratio)
    turn, most = rng.uniform(0, 2 * np.pi), 0.7 * (1 - ratio)  # so far from the middle the nucleus stays inside
    off = rng.uniform(0, 0.6 * most)
    cell = {
        "radius": radius,
        "ratio": ratio,
        "off": (off * math.cos(turn), off * math.sin(turn)),
        "stretch": rng.uniform(1.0, 1.25),
        "turn": rng.uniform(0, np.pi),
        "uneven": rng.uniform(*kind.uneven),
        "chromatin": rng.uniform(*kind.chromatin),
        "texture": int(rng.integers(2**31)),
    }
    if not others:
        x, y = rng.uniform(0.42, 0.58, size=2).tolist()
        return (StainedCell(x, y, **cell),)
    for x, y in rng.uniform(0, 1, size=(100, 2)).tolist():
        if all(np.hypot(x - other.x, y - other.y) > 0.92 * (radius + other.radius) for other in others):
            return (StainedCell(x, y, **cell),)
    return ()

"""What a chest phantom shows: nodules in lungs beside a heart, drawn by chance, with their masks and their caption.

Lengths are fractions of the picture's side, x to the right, y downwards. As radiologists look at it,
the patient's right is on the picture's left.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from datamodules.phantoms.drawing import Array, pixels, polar, ramp, round_outline

RADII = (0.02, 0.0375)
"""Least and greatest mean radius of a nodule: 16 to 30 mm across where the picture spans 400 mm."""


@dataclass(frozen=True)
class Nodule:
    """A round opacity in a lung.

    x, y, radius: centre and mean radius. density: attenuation at the centre, that of the chest without air being 1.
    texture: seed of the outline.
    """

    x: float
    y: float
    radius: float
    density: float
    texture: int

    @property
    def side(self) -> str:
        """The patient's: "right" or "left"."""
        return "right" if self.x < 0.5 else "left"

    def reach(self, x: Array, y: Array) -> Array:
        """Distance from the centre in radii of the outline: 1 on it. x (1, W), y (H, 1) -> (H, W)."""
        distance, cosine, sine = polar(x - np.float32(self.x), y - np.float32(self.y))
        outline = round_outline(cosine, sine, np.random.default_rng(self.texture))
        return distance / (self.radius * (1 + 0.6 * (outline - 1)))


@dataclass(frozen=True)
class ChestScene:
    """What one picture shows.

    breadth: greatest half-width of the rib cage's inside. dome: y of the top of the right diaphragm. heart: size, about
    1. breast: attenuation of the breasts, 0 for none. contrast, exposure: of the film; higher exposure is darker.
    texture: seed of all that no caption speaks of.
    """

    nodules: tuple[Nodule, ...]
    breadth: float
    dome: float
    heart: float
    breast: float
    contrast: float
    exposure: float
    texture: int

    def caption(self) -> str:
        """Number and sides of the nodules: `chest X-ray with 2 lung nodules in the left lung`."""
        sides = {side: sum(nodule.side == side for nodule in self.nodules) for side in ("right", "left")}
        sides = {side: count for side, count in sides.items() if count}
        count = len(self.nodules)
        if not count:
            return "chest X-ray without lung nodules"
        start = f"chest X-ray with {count} lung nodule{'s' * (count > 1)}"
        if len(sides) == 1:
            return f"{start} in the {next(iter(sides))} lung"
        return f"{start}, {sides['right']} in the right lung and {sides['left']} in the left lung"

    def mask(self, size: int) -> NDArray[np.uint8]:
        """(size, size): 255 where a pixel's centre lies inside a nodule's outline, else 0."""
        x, y = pixels(size)
        inside = np.zeros((size, size), dtype=bool)
        for nodule in self.nodules:
            inside |= nodule.reach(x, y) <= 1
        return np.where(inside, 255, 0).astype(np.uint8)


# Scenes


def draw_scene(rng: np.random.Generator) -> ChestScene:
    """A scene drawn by chance: 20 % have no nodule, 45 % one, 23 % two, 12 % three; 40 % show breasts."""
    scene = ChestScene(
        nodules=(),
        breadth=rng.uniform(0.40, 0.445),
        dome=rng.uniform(0.72, 0.80),
        heart=rng.uniform(0.85, 1.15),
        breast=rng.uniform(0.05, 0.12) if rng.random() < 0.4 else 0.0,
        contrast=rng.uniform(0.85, 1.2),
        exposure=rng.uniform(-0.1, 0.1),
        texture=int(rng.integers(2**31)),
    )
    nodules: tuple[Nodule, ...] = ()
    for _ in range(rng.choice(4, p=[0.20, 0.45, 0.23, 0.12])):
        nodules += _place_nodule(rng, scene, nodules)
    return ChestScene(**(vars(scene) | {"nodules": nodules}))


def _place_nodule(rng: np.random.Generator, scene: ChestScene, others: tuple[Nodule, ...]) -> tuple[Nodule, ...]:
    """One nodule within a lung and beside `others`, or none where a hundred tries find no place."""
    radius, density = rng.uniform(*RADII), rng.uniform(0.22, 0.38)
    angle = np.linspace(0, 2 * np.pi, 8, endpoint=False)
    for x, y in rng.uniform((0.08, 0.12), (0.92, 0.8), size=(100, 2)).tolist():
        around = np.stack([[x, y], *np.stack([x + 1.2 * radius * np.cos(angle), y + 1.2 * radius * np.sin(angle)], 1)])
        points = around.astype(np.float32)
        aerated = air_depth(scene, points[:, :1], points[:, 1:], heart_opacity(scene, points[:, :1], points[:, 1:]))
        free = all(np.hypot(x - other.x, y - other.y) > 1.3 * (radius + other.radius) for other in others)
        if free and aerated.min() > 0.5:
            return (Nodule(x, y, radius, density, int(rng.integers(2**31))),)
    return ()


# Where the lungs hold air


def ellipse(x: Array, y: Array, centre: Sequence[float], axes: Sequence[float], turn: float, soft: float) -> Array:
    """1 inside, 0 outside, over a border of `soft` half-axes to either side."""
    dx, dy, cosine, sine = x - centre[0], y - centre[1], math.cos(turn), math.sin(turn)
    along, across = (cosine * dx + sine * dy) / axes[0], (cosine * dy - sine * dx) / axes[1]
    return ramp(1 + soft, 1 - soft, np.sqrt(along**2 + across**2))


def half_width(scene: ChestScene, y: Array) -> Array:
    """Half-width of the rib cage's inside at the heights y."""
    return scene.breadth * (1 - np.abs((y - 0.74) / 0.65).clip(0, 1) ** 2.4) ** (1 / 2.4)


def air_depth(scene: ChestScene, x: Array, y: Array, heart: Array) -> Array:
    """Depth of air (H, W) in both lungs, at most 1; little before and behind the heart."""
    return (_lung(scene, x, y, -1) + _lung(scene, x, y, 1)) * (1 - 0.9 * heart)


def _lung(scene: ChestScene, x: Array, y: Array, side: int) -> Array:
    """Depth of air of the right (side -1) or left (1) lung."""
    u = side * (x - 0.5)
    lateral = ((half_width(scene, y) - u) / 0.14).clip(0, 1)
    medial = ramp(0.048, 0.088, u + 0.012 * ramp(0.12, 0.3, y))
    off = (u - 0.17) / 0.22
    dome = scene.dome + 0.03 * (side > 0) + 0.03 * off**2 + 0.08 * off.clip(0) ** 2
    above = ramp(-0.012, 0.03, dome - y)
    behind = 0.12 * ramp(0.14, 0.0, y - dome)  # the lung reaches down behind the dome
    return np.sqrt(lateral * (2 - lateral)) * medial * (above + (1 - above) * behind)


def heart_opacity(scene: ChestScene, x: Array, y: Array) -> Array:
    """Opacity (H, W) of heart and great vessels: ventricles, right atrium, aortic knob, pulmonary trunk, column."""
    size, low = scene.heart, scene.dome - 0.105
    parts = [
        ellipse(x, y, (0.5 + 0.065 * size, low), (0.165 * size, 0.115 * size), 0.5, 0.08),
        ellipse(x, y, (0.485, low - 0.01), (0.085 * size, 0.11 * size), 0, 0.10),
        ellipse(x, y, (0.535, 0.31), (0.043, 0.043), 0, 0.12),
        ellipse(x, y, (0.54, 0.435), (0.045 * size, 0.06), -0.3, 0.18),
        ellipse(x, y, (0.5, 0.40), (0.062, 0.22), 0, 0.10),
    ]
    return np.maximum.reduce(parts)

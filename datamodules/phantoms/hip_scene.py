"""What a phantom of a canine pelvis shows: its scene, drawn by chance, its Norberg angles, its grade and its caption.

Lengths are fractions of the picture's side, x to the right, y downwards. The dog lies on its back with its hind legs
stretched: cranial is above, and the dog's right is on the picture's left.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Points = NDArray[np.float64]

GRADES = {"normal": (105, 116), "mild": (100, 104), "moderate": (90, 99), "severe": (74, 89)}
"""Least and greatest smaller Norberg angle of each class, in whole degrees."""

SIDES = {"left": 1, "right": -1}
"""Where in the picture a side of the dog lies: to the right of the midline or to its left."""


@dataclass(frozen=True)
class Hip:
    """One hip joint, in the picture.

    head, radius: centre and radius of the femoral head. rim: the craniolateral point of the acetabulum's rim. socket,
    socket_radius: the circle that the acetabulum is hollowed along; the rim lies on it.
    """

    head: tuple[float, float]
    radius: float
    rim: tuple[float, float]
    socket: tuple[float, float]
    socket_radius: float


@dataclass(frozen=True)
class HipScene:
    """What one picture shows.

    left, right: the dog's hips. centre: of the pelvis, midway between the sockets. scale: of all lengths, about 1.
    tilt: of the pelvis, radians, clockwise. exposure: factor on the attenuation. contrast: of the film. marker: whether
    an R of lead lies beside the dog's right. texture: seed of all that no caption speaks of.
    """

    left: Hip
    right: Hip
    centre: tuple[float, float]
    scale: float
    tilt: float
    exposure: float
    contrast: float
    marker: bool
    texture: int

    def angles(self) -> dict[str, float]:
        """Norberg angles of the dog's left and right hip, degrees."""
        return {
            "left": norberg_angle(self.left.head, self.right.head, self.left.rim),
            "right": norberg_angle(self.right.head, self.left.head, self.right.rim),
        }

    def grade(self) -> str:
        """normal, mild, moderate or severe, by the smaller Norberg angle in whole degrees.

        105 or more is normal, as the angle is read; 100 to 104, 90 to 99 and less are the bounds that the grades C, D
        and E of the Fédération Cynologique Internationale use.
        """
        worst = min(round(angle) for angle in self.angles().values())
        return next((grade for grade, (least, _) in GRADES.items() if worst >= least), "severe")

    def caption(self) -> str:
        """The prompt: both angles in whole degrees, and the grade."""
        left, right = (round(angle) for angle in self.angles().values())
        grade = self.grade()
        finding = "normal hips" if grade == "normal" else f"{grade} hip dysplasia"
        return (
            f"ventrodorsal canine pelvic radiograph, left Norberg angle {left}, right Norberg angle {right}, {finding}"
        )

    def facts(self) -> dict[str, Any]:
        """norberg_<side>, degrees; head_<side> and rim_<side>, [x, y], and radius_<side>, fractions of the side."""
        facts: dict[str, Any] = {f"norberg_{side}": round(angle, 2) for side, angle in self.angles().items()}
        for side in SIDES:
            hip: Hip = getattr(self, side)
            facts |= {
                f"head_{side}": [round(v, 6) for v in hip.head],
                f"radius_{side}": round(hip.radius, 6),
                f"rim_{side}": [round(v, 6) for v in hip.rim],
            }
        return facts


def norberg_angle(head: ArrayLike, other_head: ArrayLike, rim: ArrayLike) -> float:
    """Degrees at `head` between the lines to the other head and to the craniolateral rim of its own acetabulum."""
    to_other, to_rim = np.subtract(other_head, head), np.subtract(rim, head)
    cosine = to_other @ to_rim / np.linalg.norm(to_other) / np.linalg.norm(to_rim)
    return float(np.degrees(np.arccos(cosine)))


# Scenes


def draw_scene(rng: np.random.Generator) -> HipScene:
    """A scene drawn by chance: about 40 % normal, 20 % mild, 25 % moderate, 15 % severe."""
    grade = list(GRADES)[rng.choice(4, p=[0.4, 0.2, 0.25, 0.15])]
    worst = rng.uniform(*GRADES[grade])
    angles = [worst, min(worst + abs(rng.normal(0, 6)), 118)]
    if rng.random() < 0.5:
        angles.reverse()
    scale, tilt = rng.uniform(0.94, 1.06), rng.normal(0, 0.018)
    centre = (0.5 + rng.normal(0, 0.012), rng.uniform(0.40, 0.46))
    frame = Frame(centre, scale, tilt)
    apart, radius = rng.uniform(0.142, 0.156), rng.uniform(0.047, 0.052)
    left, right = (
        _hip(frame, side, angle, apart, radius * rng.uniform(0.98, 1.02), rng)
        for side, angle in zip(SIDES.values(), angles, strict=True)
    )
    return HipScene(
        left=left,
        right=right,
        centre=centre,
        scale=scale,
        tilt=tilt,
        exposure=rng.uniform(0.86, 1.14),
        contrast=rng.uniform(0.9, 1.1),
        marker=bool(rng.random() < 0.7),
        texture=int(rng.integers(2**31)),
    )


@dataclass(frozen=True)
class Frame:
    """From the pelvis (lateral, caudal; origin midway between the sockets) to the picture."""

    centre: tuple[float, float]
    scale: float
    tilt: float

    def place(self, points: ArrayLike, side: int = 1) -> Points:
        """(..., 2) in the pelvis, lateral counted towards `side`, to (..., 2) in the picture."""
        lateral, caudal = np.moveaxis(np.asarray(points, dtype=float), -1, 0)
        x, y = lateral * side, caudal
        cosine, sine = self.scale * np.cos(self.tilt), self.scale * np.sin(self.tilt)
        return np.stack([self.centre[0] + cosine * x - sine * y, self.centre[1] + sine * x + cosine * y], axis=-1)


def _hip(frame: Frame, side: int, angle: float, apart: float, radius: float, rng: np.random.Generator) -> Hip:
    """A hip whose Norberg angle is about `angle` degrees: below 107 the head slides sideways out of the socket.

    Angles are counted from the line to the other head. In a socket of radius R with the rim at φ, a head moved sideways
    by R·(sin φ · cot θ - cos φ) sees the rim at θ.
    """
    loose = max(0.0, 107 - angle) / 20
    socket, socket_radius = np.array([apart, 0.0]), radius * (1.11 + 0.08 * loose)
    phi, theta = np.radians([max(angle, 107), angle])
    rim = socket + socket_radius * np.array([-np.cos(phi), -np.sin(phi)])
    moved = socket_radius * (np.sin(phi) / np.tan(theta) - np.cos(phi))
    head = socket + np.array([moved, 0.02 * radius + 0.12 * radius * loose * rng.uniform(0.3, 1)])
    points = frame.place([head, rim, socket], side)
    return Hip(
        head=tuple(points[0].tolist()),
        radius=radius * frame.scale,
        rim=tuple(points[1].tolist()),
        socket=tuple(points[2].tolist()),
        socket_radius=socket_radius * frame.scale,
    )

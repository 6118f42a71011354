"""What all drawn data sets share: smooth fields to draw with, and how a set comes onto the disk.

A field is float32 (H, W) over the picture; x (1, W) and y (H, 1) are its pixels' positions, the picture's side being 1.
A set comes onto the disk whole or not at all, and never twice.
"""

import csv
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medsynth.errors import UserError
from medsynth.files import new_folder

Array = NDArray[np.floating]
"""A field: float32. NumPy's own annotations make float64 of a float32 array times a Python number, and it is not so."""

RECIPE_FILE = "phantom.json"

# Fields


def pixels(side: int) -> tuple[Array, Array]:
    """Places of the centres of a picture's pixels: x (1, side) and y (side, 1)."""
    x = ((np.arange(side, dtype=np.float32) + 0.5) / side)[None]
    return x, x.T


def averaged(field: Array, finer: int) -> Array:
    """A field (..., H, W) as (..., H / finer, W / finer): the means of squares of `finer` x `finer` pixels."""
    *outer, height, width = field.shape
    return field.reshape(*outer, height // finer, finer, width // finer, finer).mean(axis=(-3, -1))


def ramp(low: float, high: float, value: Array) -> Array:
    """0 below `low`, 1 above `high`, smooth between; falls where low > high."""
    t = ((value - low) / (high - low)).clip(0, 1)
    return t * t * (3 - 2 * t)


def waves(x: Array, y: Array, rng: np.random.Generator, frequency: float, count: int = 8) -> Array:
    """Smooth noise (H, W) of unit variance: `count` plane waves of about `frequency` periods a unit of x and y."""
    angle, phase = rng.uniform(0, 2 * np.pi, size=(2, count, 1)).astype(np.float32)
    k = (2 * np.pi * frequency * rng.uniform(0.6, 1.4, size=(count, 1))).astype(np.float32)
    across, down = k * np.cos(angle) * x + phase, k * np.sin(angle) * y.T
    # cos(a + b) = cos a cos b - sin a sin b: a product of two thin matrices instead of a cosine a pixel.
    left = np.concatenate([np.cos(down), -np.sin(down)])
    return left.T @ np.concatenate([np.cos(across), np.sin(across)]) * np.float32(np.sqrt(2 / count))


def polar(dx: Array, dy: Array) -> tuple[Array, Array, Array]:
    """Distance from the origin, above zero everywhere, and cosine and sine of the angle there."""
    distance = np.sqrt(dx * dx + dy * dy) + np.float32(1e-4)
    return distance, dx / distance, dy / distance


def triple_angle(cosine: Array, sine: Array) -> tuple[Array, Array]:
    """cos 3θ and sin 3θ from cos θ and sin θ."""
    return cosine * (4 * cosine * cosine - 3), sine * (3 - 4 * sine * sine)


def round_outline(cosine: Array, sine: Array, rng: np.random.Generator) -> Array:
    """Radius of a not quite round outline of mean 1 in each direction: second and third harmonics."""
    a, b, c, d = rng.uniform(-0.11, 0.11, size=4).astype(np.float32)
    cosine3, sine3 = triple_angle(cosine, sine)
    return 1 + a * (2 * cosine * cosine - 1) + b * 2 * sine * cosine + 0.6 * (c * cosine3 + d * sine3)


# Files


def check_numbers(images: int, size: int, seed: int, least_size: int) -> None:
    """Raise UserError unless a set of that many phantoms of that side and seed can be drawn."""
    if images < 1 or size < least_size or seed < 0:
        given = f"images={images}, size={size}, seed={seed}"
        raise UserError(f"{given}: give images >= 1, size >= {least_size} and seed >= 0")


def phantom_name(index: int) -> str:
    """Name of the picture `index`, counted from 0, without suffix."""
    return f"phantom-{index:06}"


def write_csv(path: Path, rows: Iterable[Sequence[str]], separator: str = ",") -> None:
    """Write the rows, the header first, as UTF-8 with plain line feeds."""
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=separator, lineterminator="\n").writerows(rows)


def write_truth(folder: Path, entries: Iterable[dict[str, Any]]) -> None:
    """Write `truth.json`: a list of what is true of each picture, one picture a line."""
    lines = ",\n".join(json.dumps(entry) for entry in entries)
    (folder / "truth.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def write_once(out: Path, recipe: dict[str, Any], files: Sequence[str], fill: Callable[[Path], None]) -> bool:
    """Let `fill(folder)` write a data set, and name that folder `out` when it is complete.

    Args:
        recipe: all that the set follows from, ready for JSON; it is kept beside the set as `phantom.json`.
        files: paths below `out` that a complete set holds.

    Returns:
        False if `out` held the set of this recipe already and nothing was done.

    Raises:
        UserError: `out` holds anything else, or only a part of the set, or cannot be written.
    """
    out, text = out.resolve(), json.dumps(recipe) + "\n"
    if _holds(out, text, files):
        return False
    with new_folder(out) as folder:
        fill(folder)
        (folder / RECIPE_FILE).write_text(text, encoding="utf-8")
    return True


def _holds(out: Path, text: str, files: Sequence[str]) -> bool:
    """Whether `out` holds the set: False where there is nothing, UserError where there is anything else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    marker = out / RECIPE_FILE
    if not marker.is_file() or marker.read_text(encoding="utf-8", errors="replace") != text:
        raise UserError(f"{out}: holds something other than these phantoms; choose another --out, or remove it")
    if missing := [name for name in files if not (out / name).is_file()]:
        raise UserError(
            f"{out}: {missing[0]} is missing; choose another --out, or remove it to draw the phantoms again"
        )
    return True

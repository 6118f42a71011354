"""Draws stained smears of cells in four classes, in the layout that `cytology` reads.

A picture is light through stain: each stain takes from each colour what its depth says (Beer and Lambert), so that
cells over each other are darker. Each follows from a `CytologyScene` of a few numbers, and looks the same at any size.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from datamodules.phantoms.cytology_scene import CLASSES, CytologyScene, StainedCell, draw_scene
from datamodules.phantoms.drawing import Array, averaged, check_numbers, pixels, ramp, waves, write_once, write_truth

DRAWING = 1
"""Raised by every change that alters a set's bytes, so that a set drawn before is not taken for one drawn after."""

TEMPLATE = "a stained smear of [filewords], [name]\na microscope picture of [filewords], in the style of [name]\n"


# Pixels


def render(scene: CytologyScene, size: int) -> NDArray[np.uint8]:
    """The scene as (size, size, 3) RGB; below 512 pixels drawn at twice the size and averaged."""
    rng = np.random.default_rng(scene.texture)
    finer = 2 if size < 512 else 1
    x, y = pixels(finer * size)
    eosin = np.array((0.10, 0.46, 0.20), np.float32) + 0.05 * scene.warmth * np.array((-1, 0, 1), np.float32)
    blue = np.array((0.85, 1.00, 0.36), np.float32) + 0.08 * scene.warmth * np.array((-1, 0, 1), np.float32)
    depth = _over(0.06 + 0.02 * waves(x, y, rng, 1.5) + 0.01 * waves(x, y, rng, 20, 40), eosin)
    for cell in scene.cells:
        body, nucleus = _cell(cell, x, y)
        depth += scene.stain * (_over(body, eosin) + _over(nucleus, blue))
    light = scene.lamp * (1 - 0.12 * ((x - 0.5) ** 2 + (y - 0.5) ** 2))
    image = averaged(light * np.exp(-depth), finer)
    image += 0.012 * rng.standard_normal(image.shape, dtype=np.float32)
    return np.rint(255 * image.transpose(1, 2, 0).clip(0, 1)).astype(np.uint8)


def _over(depth: Array, stain: Array) -> Array:
    """(H, W) of a stain as what each colour loses, (3, H, W)."""
    return stain[:, None, None] * depth


def _cell(cell: StainedCell, x: Array, y: Array) -> tuple[Array, Array]:
    """Depth of stain (H, W) of a cell's cytoplasm, and of its nucleus."""
    rng = np.random.default_rng((cell.texture, 2))
    q, n = cell.reach(x, y), cell.nucleus_reach(x, y)
    inside, nucleus = ramp(1.03, 0.95, q), ramp(1.04, 0.95, n)
    dx, dy = (x - cell.x) / cell.radius, (y - cell.y) / cell.radius
    body = 0.45 + 0.25 * ramp(1.0, 0.3, q) + 0.12 * ramp(0.12, 0.0, np.abs(q - 0.95))  # thicker inwards, and a rim
    body += 0.06 * waves(dx, dy, rng, 2.5, 16) + 0.04 * waves(dx, dy, rng, 7, 24)
    chromatin = waves(dx, dy, rng, 2.2 / cell.ratio, 16) + 0.6 * waves(dx, dy, rng, 5 / cell.ratio, 24)
    core = 0.95 + 0.7 * cell.chromatin * chromatin + 0.35 * ramp(0.16, 0.0, np.abs(n - 0.93))
    if cell.chromatin > 0.25:  # nucleoli
        for across, down in rng.uniform(-0.45, 0.45, size=(2, 2)).astype(np.float32) * cell.ratio:
            spot = np.hypot(dx - cell.off[0] - across, dy - cell.off[1] - down) / (0.16 * cell.ratio)
            core = core + 0.8 * ramp(1.2, 0.6, spot)
    return body * inside * (1 - 0.5 * nucleus), core.clip(0.3, None) * nucleus


# Files


def write_cytology(
    out: Path, images: int, seed: int, size: int = 256, progress: Callable[[int], None] | None = None
) -> bool:
    """Write `images` phantoms of `size` x `size` pixels to the folder `out`, in the layout of `cytology`.

    Files: `atypia/atypia-000000.png` and so on, the classes in turn; `style_filewords.txt`, two lines; `truth.json` (a
    list of name, scene, and shares of nucleus and cytoplasm, one picture a line); `phantom.json` (what the set was
    drawn from).

    The same seed gives the same bytes on the same machine, and picture i is the same however many there are. The folder
    appears only when it is complete.

    Args:
        progress: called with the number of pictures drawn so far, after each.

    Returns:
        True if the set was drawn, False if `out` held this very set already and nothing was done.

    Raises:
        UserError: for numbers out of range, and where `out` holds anything else or cannot be written.
    """
    check_numbers(images, size, seed, least_size=16)
    recipe = {"phantoms": "cytology", "drawing": DRAWING, "images": images, "seed": seed, "size": size}
    labels = [list(CLASSES)[index % len(CLASSES)] for index in range(images)]
    names = [f"{label}/{label}-{index:06}.png" for index, label in enumerate(labels)]
    files = ["style_filewords.txt", "truth.json", *names]
    return write_once(out, recipe, files, lambda folder: _write_set(folder, labels, names, recipe, progress))


def _write_set(
    folder: Path,
    labels: Sequence[str],
    names: Sequence[str],
    recipe: dict[str, Any],
    progress: Callable[[int], None] | None,
) -> None:
    entries = []
    for index, (label, name) in enumerate(zip(labels, names, strict=True)):
        scene = draw_scene(label, np.random.default_rng((recipe["seed"], index)))
        (folder / label).mkdir(exist_ok=True)
        Image.fromarray(render(scene, recipe["size"])).save(folder / name)
        entries.append({"name": name, "scene": asdict(scene), "truth": scene.truth(recipe["size"])})
        if progress:
            progress(index + 1)
    (folder / "style_filewords.txt").write_text(TEMPLATE, encoding="utf-8")
    write_truth(folder, entries)

"""Draws chest X-rays with lung nodules, whose masks are exact, in the layout that `chest_xray` reads.

A picture is a map of attenuation (posteroanterior view): soft tissue, less the lungs' air, more heart, bone, vessels
and nodules, through the curve of a film. Each follows from a `ChestScene` of a few numbers, and looks the same at any
size. Lengths are fractions of the picture's side, x to the right, y downwards. As radiologists look at it, the
patient's right is on the picture's left.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from datamodules.phantoms.chest_scene import ChestScene, air_depth, draw_scene, ellipse, half_width, heart_opacity
from datamodules.phantoms.drawing import (
    Array,
    averaged,
    check_numbers,
    phantom_name,
    pixels,
    ramp,
    waves,
    write_csv,
    write_once,
    write_truth,
)

Points = NDArray[np.float64]

DRAWING = 1
"""Raised by every change that alters a set's bytes, so that a set drawn before is not taken for one drawn after."""

BLACK, WHITE, DEEPEST = 300, 3700, 4095
"""Values of black and white, and the greatest there is, in the phantoms of 12 bits."""


# Pixels


def render(scene: ChestScene, size: int) -> Array:
    """The scene as grey (size, size) in [0, 1], bone bright; below 512 pixels drawn at twice the size and averaged."""
    rng = np.random.default_rng(scene.texture)
    finer = 2 if size < 512 else 1
    side = finer * size
    x, y = pixels(side)
    attenuation = _chest(scene, x, y, rng)
    for nodule in scene.nodules:
        q = nodule.reach(x, y)
        attenuation += nodule.density * np.sqrt((1 - q * q).clip(0, 1))  # the chord through a ball
    attenuation = averaged(attenuation, finer)
    # The fewer photons come through, the coarser they count.
    attenuation += 0.016 * rng.standard_normal((size, size), dtype=np.float32) * np.exp(0.5 * (attenuation - 0.5))
    return 1 / (1 + np.exp(-3.6 * scene.contrast * (attenuation - 0.66 + scene.exposure)))


def _chest(scene: ChestScene, x: Array, y: Array, rng: np.random.Generator) -> Array:
    """Attenuation (H, W) of all but the nodules: 0 is air beside the body, 1 the chest without any air."""
    side = x.size
    # No border of a body is a formula's smooth curve; the nodules' places are known to within this warp.
    xw, yw = x + 0.004 * waves(x, y, rng, 1.5), y + 0.004 * waves(x, y, rng, 1.5)
    heart, body = heart_opacity(scene, xw, yw), _body(scene, x, y)
    aerated = air_depth(scene, xw, yw, heart)
    total = body * (1 + 0.10 * ramp(0.05, 0.11, y - scene.dome))
    total -= 0.78 * (0.55 + 0.45 * ramp(0.1, 0.55, y)) * aerated
    total += 0.05 * heart + 0.55 * _spine(x, y) + _bones(scene, side, rng) * body
    total += 0.21 * _vessels(side, rng) * aerated
    for across in (-0.085, 0.085):  # the hila
        spot = ((x - 0.5 - across) / 0.035) ** 2 + ((y - 0.425) / 0.06) ** 2
        total += 0.12 * np.exp(-spot) * aerated
    total -= _airway(x, y)
    for across in (-0.21, 0.21) if scene.breast else ():
        total += scene.breast * ellipse(x, y, (0.5 + across, 0.60), (0.165, 0.165), 0, 0.12) * ramp(0.45, 0.72, y)
    total -= 0.28 * ellipse(x, y, (0.66, scene.dome + 0.105), (0.06, 0.03), 0.1, 0.25)  # gas in the stomach
    grain = 0.018 * waves(x, y, rng, 14, 40) + 0.012 * waves(x, y, rng, 30, 60)
    return total + grain * aerated + 0.012 * waves(x, y, rng, 3) * body


def _body(scene: ChestScene, x: Array, y: Array) -> Array:
    """Depth of tissue (H, W): 1 in the middle, falling to 0 at the skin of neck, shoulders and flanks."""
    u = np.abs(x - 0.5)
    out = (u - 0.125).clip(0, None)  # beside the neck
    shoulder = 0.075 * (1 - np.exp(-out / 0.03)) + 0.22 * out - 0.02
    flank = half_width(scene, y.clip(0.30, 0.74)) + 0.055 + 0.35 * ramp(0.52, 0.20, y)
    return np.sqrt(((y - shoulder) / 0.10).clip(0, 1)) * np.sqrt(((flank - u) / 0.10).clip(0, 1))


def _spine(x: Array, y: Array) -> Array:
    """Vertebral bodies parted by discs, with pedicles and spinous processes."""
    u, level = np.abs(x - 0.5), (y - 0.06) / (0.048 + 0.018 * y)
    step = level - np.floor(level)
    body = ramp(0.036, 0.031, u * (1 - 0.06 * np.cos(2 * np.pi * step)))
    gap = ramp(0.13, 0.04, np.minimum(step, 1 - step))
    pedicles = ramp(1.2, 0.5, np.hypot((u - 0.022) / 0.007, (step - 0.35) / 0.2))
    processes = ramp(1.2, 0.6, np.hypot(u / 0.007, (step - 0.75) / 0.22))
    return body * (0.16 - 0.08 * gap) + 0.07 * (pedicles + processes)


def _airway(x: Array, y: Array) -> Array:
    """Air of the trachea and the main bronchi."""
    trachea = ramp(0.019, 0.011, np.abs(x - 0.497 + 0.004 * np.sin(9 * y))) * ramp(0.36, 0.33, y)
    bronchi = [
        ([(0.497, 0.335), (0.47, 0.375), (0.435, 0.405)], 0.020),
        ([(0.497, 0.335), (0.53, 0.385), (0.58, 0.415)], 0.018),
    ]
    return 0.20 * trachea + 0.10 * _strokes([(np.array(line), width, 1.0) for line, width in bronchi], x.size, 0.004)


def _strokes(lines: Sequence[tuple[Points, float, float]], side: int, blur: float) -> Array:
    """Opacity (side, side) of lines (points (n, 2), width, opacity), the later over the earlier, blurred."""
    page = Image.new("L", (side, side))
    pen = ImageDraw.Draw(page)
    for points, width, opacity in lines:
        corners = [tuple(point) for point in (points * side).tolist()]
        pen.line(corners, fill=round(255 * opacity), width=max(1, round(width * side)), joint="curve")
    return np.asarray(page.filter(ImageFilter.GaussianBlur(blur * side)), dtype=np.float32) / 255


def _bones(scene: ChestScene, side: int, rng: np.random.Generator) -> Array:
    """Ribs, clavicles and shoulders."""
    shift = rng.normal(0, 0.002, size=(2, 12))
    total = 0.14 * _shoulders(side)
    for start, end, width, density in ((0.0, 0.5, 0.021, 0.16), (0.5, 0.80, 0.024, 0.10)):  # behind, then in front
        ribs = [
            np.add(_rib(scene, number, right_left, start, min(end, 1.22 - 0.06 * number)), (0, shift[row, number]))
            for number in range(1, 12)
            for row, right_left in enumerate((-1, 1))
            if 1.22 - 0.06 * number > start
        ]
        total += density * _tubes(ribs, width, side)
    t = np.linspace(0, 1, 40)
    height = 0.185 - 0.105 * t - 0.018 * np.sin(2 * np.pi * t)
    clavicles = [np.stack([0.5 + s * (0.045 + 0.36 * t), height + s * 2 * shift[0, 0]], axis=1) for s in (-1, 1)]
    return total + 0.22 * _tubes(clavicles, 0.027, side)


def _rib(scene: ChestScene, number: int, right_left: int, start: float, end: float) -> Points:
    """Points (40, 2) of rib 1 to 11 from `start` to `end`: 0 at the spine, 0.5 at the flank, 1 at the sternum."""
    top, drop = 0.075 + 0.06 * number, 0.07 + 0.021 * number
    theta = np.pi * (start + (end - start) * np.linspace(0, 1, 40) ** 1.5)
    reach = half_width(scene, np.asarray(min(top + drop / 2, 0.74), dtype=np.float32)).item() + 0.012
    x = 0.5 + right_left * (0.03 + (reach - 0.03) * np.sin(theta) ** 0.8)
    y = top + drop * (0.25 * (1 - np.cos(theta)) + 0.5 * theta / np.pi) - 0.016 * np.sin(2 * theta).clip(0)
    return np.stack([x, y], axis=1)


def _tubes(curves: Sequence[Points], width: float, side: int) -> Array:
    """Hollow bones: cortex bright on both borders, marrow less so."""
    cortex = [(curve, width, 1.0) for curve in curves]
    return _strokes([*cortex, *((curve, 0.62 * width, 0.6) for curve in curves)], side, 0.0026)


def _shoulders(side: int) -> Array:
    """Shoulder blades and heads of the upper arms."""
    blade = np.array([(0.315, 0.17), (0.43, 0.12), (0.47, 0.18), (0.415, 0.34), (0.365, 0.415), (0.345, 0.31)])
    page = Image.new("L", (side, side))
    pen = ImageDraw.Draw(page)
    for s in (-1, 1):
        pen.polygon([tuple(point) for point in (side * ((0.5, 0) + blade * (s, 1))).tolist()], fill=150)
        across = 0.5 + 0.485 * s
        pen.ellipse([side * e for e in (across - 0.055, 0.10, across + 0.055, 0.21)], fill=255)
    return np.asarray(page.filter(ImageFilter.GaussianBlur(0.004 * side)), dtype=np.float32) / 255


def _vessels(side: int, rng: np.random.Generator) -> Array:
    """Opacity (side, side) of the vessels that fan out from both hila, forking six times."""
    lines: list[tuple[Points, float, float]] = []
    for s, hilum in ((-1, (0.415, 0.435)), (1, (0.585, 0.415))):
        for turn in np.linspace(-1.15, 1.25, 7) + rng.normal(0, 0.1, size=7):
            width = 0.0085 if turn < 0 else 0.014  # wider downwards, where the blood is
            _grow(lines, hilum, turn if s > 0 else np.pi - turn, width, 6, rng)
    return _strokes(sorted(lines, key=lambda line: line[1]), side, 0.0022)


def _grow(lines: list, start: Sequence[float], turn: float, width: float, forks: int, rng: np.random.Generator) -> None:
    """Add a winding vessel and all its branches."""
    if not forks or width < 0.0012:
        return
    length = rng.uniform(0.05, 0.085) * (width / 0.012) ** 0.35
    turns = turn + rng.normal(0, 0.10, size=5).cumsum()
    steps = length / 5 * np.stack([np.cos(turns), np.sin(turns)], axis=1)
    points = np.cumsum([start, *steps], axis=0)
    lines.append((points, width, min(1, width / 0.014) ** 0.7))
    spread = rng.uniform(0.25, 0.6)
    for side in (-spread, spread):
        _grow(lines, points[-1], turns[-1] + side, width * rng.uniform(0.62, 0.8), forks - 1, rng)


# Files


def write_chest(
    out: Path,
    images: int,
    seed: int,
    size: int = 256,
    progress: Callable[[int], None] | None = None,
    dicom: bool = False,
) -> bool:
    """Write `images` phantoms of `size` x `size` pixels to the folder `out`, in the layout of `chest_xray`.

    Files: `images/phantom-000000.png` and so on; `masks/` with the same names; `captions.csv` (`Filename,Prompt`);
    `truth.json` (a list of name, caption and scene, one picture a line); `phantom.json` (what the set was drawn from).
    With `dicom`, of every six pictures two are 16-bit PNG and two are DICOM, one of these MONOCHROME1, all of 12 bits.

    The same seed gives the same bytes on the same machine, and picture i shows the same however many there are. The
    folder appears only when it is complete.

    Args:
        progress: called with the number of pictures drawn so far, after each.

    Returns:
        True if the set was drawn, False if `out` held this very set already and nothing was done.

    Raises:
        UserError: for numbers out of range, and where `out` holds anything else or cannot be written.
    """
    check_numbers(images, size, seed, least_size=48)
    recipe = {"phantoms": "chest", "drawing": DRAWING, "images": images, "seed": seed, "size": size, "dicom": dicom}
    names = [phantom_name(index) for index in range(images)]
    pictures = [f"images/{name}{_suffix(index, dicom)}" for index, name in enumerate(names)]
    files = ["captions.csv", "truth.json", *pictures, *(f"masks/{name}.png" for name in names)]
    return write_once(out, recipe, files, lambda folder: _write_set(folder, names, pictures, recipe, progress))


def _suffix(index: int, dicom: bool) -> str:
    return ".dcm" if dicom and index % 3 == 2 else ".png"


def _write_set(
    folder: Path,
    names: Sequence[str],
    pictures: Sequence[str],
    recipe: dict[str, Any],
    progress: Callable[[int], None] | None,
) -> None:
    for kind in ("images", "masks"):
        (folder / kind).mkdir()
    rows, entries = [("Filename", "Prompt")], []
    for index, (name, picture) in enumerate(zip(names, pictures, strict=True)):
        scene = draw_scene(np.random.default_rng((recipe["seed"], index)))
        _write_picture(folder / picture, render(scene, recipe["size"]), index, recipe)
        Image.fromarray(scene.mask(recipe["size"])).save(folder / "masks" / f"{name}.png")
        rows.append((name, scene.caption()))
        entries.append({"name": name, "caption": scene.caption(), "scene": asdict(scene)})
        if progress:
            progress(index + 1)
    write_csv(folder / "captions.csv", rows)
    write_truth(folder, entries)


def _write_picture(path: Path, grey: Array, index: int, recipe: dict[str, Any]) -> None:
    if not recipe["dicom"] or index % 3 == 0:
        Image.fromarray(np.rint(255 * grey).astype(np.uint8)).save(path)
        return
    deep = np.rint(BLACK + (WHITE - BLACK) * grey).astype(np.uint16)
    if index % 3 == 1:
        Image.fromarray(deep).save(path)
    else:
        write_dicom(path, deep, f"{recipe['seed']}-{index}", inverted=index % 6 == 5)


def write_dicom(path: Path, values: NDArray[np.uint16], identity: str, inverted: bool = False) -> None:
    """A grey picture of 12 bits, bright where `values` (H, W) are high, as a DICOM secondary capture.

    Its window shows `BLACK` to `WHITE`. `inverted` stores it as MONOCHROME1. The unique identifiers follow from
    `identity`, so that the same picture gives the same bytes.
    """
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID = SecondaryCaptureImageStorage
    for level in ("SOPInstance", "SeriesInstance", "StudyInstance"):
        setattr(dataset, f"{level}UID", generate_uid(entropy_srcs=["medsynth phantom", level, identity]))
    dataset.PatientName, dataset.PatientID, dataset.Modality = "PHANTOM", f"phantom-{identity}", "DX"
    dataset.ConversionType = "SYN"  # a synthetic image
    stored = DEEPEST - values if inverted else values
    dataset.set_pixel_data(stored, "MONOCHROME1" if inverted else "MONOCHROME2", 12, generate_instance_uid=False)
    black, white = (DEEPEST - WHITE, DEEPEST - BLACK) if inverted else (BLACK, WHITE)
    dataset.WindowCenter, dataset.WindowWidth = (black + white + 1) / 2, white - black + 1
    dataset.RescaleSlope, dataset.RescaleIntercept = 1, 0
    dataset.save_as(path, enforce_file_format=True)

"""Draws chest X-rays with lung nodules, whose masks are exact, in the layout that `chest_xray` reads.

A picture is a map of attenuation (posteroanterior view): soft tissue, less the lungs' air, more heart, bone, vessels
and nodules, through the curve of a film. Each follows from a `ChestScene` of a few numbers, and looks the same at any
size. Lengths are fractions of the picture's side, x to the right, y downwards. As radiologists look at it, the
patient's right is on the picture's left.
"""

import csv
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from datamodules.phantoms.drawing import Array, check_numbers, polar, ramp, round_outline, waves, write_once

Points = NDArray[np.float64]

DRAWING = 1
"""Raised by every change that alters a set's bytes, so that a set drawn before is not taken for one drawn after."""

RADII = (0.02, 0.0375)
"""Least and greatest mean radius of a nodule: 16 to 30 mm across where the picture spans 400 mm."""

BLACK, WHITE, DEEPEST = 300, 3700, 4095
"""Values of black and white, and the greatest there is, in the phantoms of 12 bits."""


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
        x, y = _centres(size)
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
        aerated = _aerated(scene, points[:, :1], points[:, 1:], _heart(scene, points[:, :1], points[:, 1:]))
        free = all(np.hypot(x - other.x, y - other.y) > 1.3 * (radius + other.radius) for other in others)
        if free and aerated.min() > 0.5:
            return (Nodule(x, y, radius, density, int(rng.integers(2**31))),)
    return ()


# Pixels


def render(scene: ChestScene, size: int) -> Array:
    """The scene as grey (size, size) in [0, 1], bone bright; below 512 pixels drawn at twice the size and averaged."""
    rng = np.random.default_rng(scene.texture)
    finer = 2 if size < 512 else 1
    side = finer * size
    x, y = _centres(side)
    attenuation = _chest(scene, x, y, rng)
    for nodule in scene.nodules:
        q = nodule.reach(x, y)
        attenuation += nodule.density * np.sqrt((1 - q * q).clip(0, 1))  # the chord through a ball
    attenuation = attenuation.reshape(size, finer, size, finer).mean(axis=(1, 3))
    # The fewer photons come through, the coarser they count.
    attenuation += 0.016 * rng.standard_normal((size, size), dtype=np.float32) * np.exp(0.5 * (attenuation - 0.5))
    return 1 / (1 + np.exp(-3.6 * scene.contrast * (attenuation - 0.66 + scene.exposure)))


def _centres(side: int) -> tuple[Array, Array]:
    """Places of the pixels' centres: x (1, side) and y (side, 1)."""
    x = ((np.arange(side, dtype=np.float32) + 0.5) / side)[None]
    return x, x.T


def _chest(scene: ChestScene, x: Array, y: Array, rng: np.random.Generator) -> Array:
    """Attenuation (H, W) of all but the nodules: 0 is air beside the body, 1 the chest without any air."""
    side = x.size
    # No border of a body is a formula's smooth curve; the nodules' places are known to within this warp.
    xw, yw = x + 0.004 * waves(x, y, rng, 1.5), y + 0.004 * waves(x, y, rng, 1.5)
    heart, body = _heart(scene, xw, yw), _body(scene, x, y)
    aerated = _aerated(scene, xw, yw, heart)
    total = body * (1 + 0.10 * ramp(0.05, 0.11, y - scene.dome))
    total -= 0.78 * (0.55 + 0.45 * ramp(0.1, 0.55, y)) * aerated
    total += 0.05 * heart + 0.55 * _spine(x, y) + _bones(scene, side, rng) * body
    total += 0.21 * _vessels(side, rng) * aerated
    for across in (-0.085, 0.085):  # the hila
        spot = ((x - 0.5 - across) / 0.035) ** 2 + ((y - 0.425) / 0.06) ** 2
        total += 0.12 * np.exp(-spot) * aerated
    total -= _airway(x, y)
    for across in (-0.21, 0.21) if scene.breast else ():
        total += scene.breast * _ellipse(x, y, (0.5 + across, 0.60), (0.165, 0.165), 0, 0.12) * ramp(0.45, 0.72, y)
    total -= 0.28 * _ellipse(x, y, (0.66, scene.dome + 0.105), (0.06, 0.03), 0.1, 0.25)  # gas in the stomach
    grain = 0.018 * waves(x, y, rng, 14, 40) + 0.012 * waves(x, y, rng, 30, 60)
    return total + grain * aerated + 0.012 * waves(x, y, rng, 3) * body


def _ellipse(x: Array, y: Array, centre: Sequence[float], axes: Sequence[float], turn: float, soft: float) -> Array:
    """1 inside, 0 outside, over a border of `soft` half-axes to either side."""
    dx, dy, cosine, sine = x - centre[0], y - centre[1], math.cos(turn), math.sin(turn)
    along, across = (cosine * dx + sine * dy) / axes[0], (cosine * dy - sine * dx) / axes[1]
    return ramp(1 + soft, 1 - soft, np.sqrt(along**2 + across**2))


def _wall(scene: ChestScene, y: Array) -> Array:
    """Half-width of the rib cage's inside at the heights y."""
    return scene.breadth * (1 - np.abs((y - 0.74) / 0.65).clip(0, 1) ** 2.4) ** (1 / 2.4)


def _body(scene: ChestScene, x: Array, y: Array) -> Array:
    """Depth of tissue (H, W): 1 in the middle, falling to 0 at the skin of neck, shoulders and flanks."""
    u = np.abs(x - 0.5)
    out = (u - 0.125).clip(0, None)  # beside the neck
    shoulder = 0.075 * (1 - np.exp(-out / 0.03)) + 0.22 * out - 0.02
    flank = _wall(scene, y.clip(0.30, 0.74)) + 0.055 + 0.35 * ramp(0.52, 0.20, y)
    return np.sqrt(((y - shoulder) / 0.10).clip(0, 1)) * np.sqrt(((flank - u) / 0.10).clip(0, 1))


def _aerated(scene: ChestScene, x: Array, y: Array, heart: Array) -> Array:
    """Depth of air (H, W) in both lungs, at most 1; little before and behind the heart."""
    return (_lung(scene, x, y, -1) + _lung(scene, x, y, 1)) * (1 - 0.9 * heart)


def _lung(scene: ChestScene, x: Array, y: Array, side: int) -> Array:
    """Depth of air of the right (side -1) or left (1) lung."""
    u = side * (x - 0.5)
    lateral = ((_wall(scene, y) - u) / 0.14).clip(0, 1)
    medial = ramp(0.048, 0.088, u + 0.012 * ramp(0.12, 0.3, y))
    off = (u - 0.17) / 0.22
    dome = scene.dome + 0.03 * (side > 0) + 0.03 * off**2 + 0.08 * off.clip(0) ** 2
    above = ramp(-0.012, 0.03, dome - y)
    behind = 0.12 * ramp(0.14, 0.0, y - dome)  # the lung reaches down behind the dome
    return np.sqrt(lateral * (2 - lateral)) * medial * (above + (1 - above) * behind)


def _heart(scene: ChestScene, x: Array, y: Array) -> Array:
    """Opacity (H, W) of heart and great vessels: ventricles, right atrium, aortic knob, pulmonary trunk, column."""
    size, low = scene.heart, scene.dome - 0.105
    parts = [
        _ellipse(x, y, (0.5 + 0.065 * size, low), (0.165 * size, 0.115 * size), 0.5, 0.08),
        _ellipse(x, y, (0.485, low - 0.01), (0.085 * size, 0.11 * size), 0, 0.10),
        _ellipse(x, y, (0.535, 0.31), (0.043, 0.043), 0, 0.12),
        _ellipse(x, y, (0.54, 0.435), (0.045 * size, 0.06), -0.3, 0.18),
        _ellipse(x, y, (0.5, 0.40), (0.062, 0.22), 0, 0.10),
    ]
    return np.maximum.reduce(parts)


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
    reach = float(_wall(scene, np.float32(min(top + drop / 2, 0.74)))) + 0.012
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
    names = [f"phantom-{index:06}" for index in range(images)]
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
        entries.append(json.dumps({"name": name, "caption": scene.caption(), "scene": asdict(scene)}))
        if progress:
            progress(index + 1)
    with (folder / "captions.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)
    (folder / "truth.json").write_text("[\n" + ",\n".join(entries) + "\n]\n", encoding="utf-8")


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

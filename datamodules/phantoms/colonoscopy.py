"""Draws small synthetic data sets with exactly known truth, in the layouts that the data modules read.

The colonoscopy phantoms have the layout of MEDVQA-GI 2024: `images/*.jpg` and a `;`-separated `prompt-gt.csv`. Each
picture is a `ColonoscopyScene`, a few numbers from which both its pixels and its prompts follow. The same scene looks
the same at any size.
"""

import csv
import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from datamodules.phantoms.drawing import (
    Array,
    check_numbers,
    polar,
    ramp,
    round_outline,
    triple_angle,
    waves,
    write_once,
)

Window = tuple[slice, slice]

DRAWING = 1
"""Raised by every change that alters a set's bytes, so that a set drawn before is not taken for one drawn after."""

COLOURS = {"pink": (1.0, 0.63, 0.60), "red": (0.80, 0.25, 0.19), "white": (1.0, 0.91, 0.82)}
"""The colours of polyps, RGB in [0, 1], in the order in which prompts name them."""

SIZES = {"<5mm": (0.055, 0.075), "5-10mm": (0.09, 0.12), "11-20mm": (0.135, 0.17), ">20mm": (0.19, 0.235)}
"""Lowest and highest radius of a polyp of each size, in picture sides; a gap parts each range from the next."""

BOX = (0.34, 0.66)
"""Upper right corner (x, y) of the green or black box, which fills the picture's lower left corner."""

CELLS = {
    "upper-right": (2, 0),
    "upper-center": (1, 0),
    "upper-left": (0, 0),
    "lower-right": (2, 2),
    "lower-center": (1, 2),
    "lower-left": (0, 2),
    "center-right": (2, 1),
    "center": (1, 1),
    "center-left": (0, 1),
}
"""Column and row of the cells of the 3x3 grid, in the order in which prompts name them."""


@dataclass(frozen=True)
class Polyp:
    """A dome on the mucosa.

    x, y, radius: fractions of the picture's side, y downwards.
    colours: one to three names of `COLOURS`, from the foot to the top.
    """

    x: float
    y: float
    radius: float
    colours: tuple[str, ...]

    @property
    def size(self) -> str:
        """The first class of `SIZES` whose range does not end below the radius."""
        return next((name for name, (_, highest) in SIZES.items() if self.radius <= highest), ">20mm")

    def cells(self) -> set[str]:
        """Names of the grid cells that the open disc of half the radius about the centre reaches into."""
        gaps = {name: np.hypot(_gap(self.x, column), _gap(self.y, row)) for name, (column, row) in CELLS.items()}
        return {name for name, gap in gaps.items() if gap < 0.5 * self.radius}


@dataclass(frozen=True)
class Instrument:
    """A straight tube.

    entry, tip: (x, y) on the picture's border and inside, fractions of its side, y downwards.
    half_width: the tube's radius, the same unit.
    """

    entry: tuple[float, float]
    tip: tuple[float, float]
    half_width: float

    def points(self) -> NDArray[np.float64]:
        """16 evenly spaced points (16, 2) of the axis, from entry to tip."""
        return np.linspace(self.entry, self.tip, 16)

    def cells(self) -> set[str]:
        """Names of the grid cells that hold at least one of `points`."""
        held = {(min(int(3 * x), 2), min(int(3 * y), 2)) for x, y in self.points()}
        return {name for name, cell in CELLS.items() if cell in held}


@dataclass(frozen=True)
class ColonoscopyScene:
    """What one picture shows. Lengths are fractions of the picture's side.

    lumen, lumen_radius: centre (x, y) and mean radius of the dark far end of the tube.
    hue: of the mucosa, from -1 (yellowish) to 1 (rosy).
    brightness: factor on the light, about 1.
    corner: value of |x - 1/2| + |y - 1/2| at which the frame's black corners begin.
    text: burnt-in lines; empty: no text.
    box: "green" or "black", or None.
    texture: seed of what no prompt speaks of: folds, vessels, reflections, outlines.
    """

    polyps: tuple[Polyp, ...]
    lumen: tuple[float, float]
    lumen_radius: float
    hue: float
    brightness: float
    corner: float
    instrument: Instrument | None
    text: tuple[str, ...]
    box: str | None
    texture: int

    def truth(self) -> dict[str, Any]:
        """All that the prompts speak of, ready for JSON; lists are in the order of `SIZES`, `CELLS` and `COLOURS`.

        polyps: their number. sizes, polyp_cells, colours: of all polyps together. instrument_cells: empty without an
        instrument. text: bool. box: "green", "black" or None.
        """
        sizes = {polyp.size for polyp in self.polyps}
        polyp_cells = set().union(*(polyp.cells() for polyp in self.polyps))
        colours = set().union(*(polyp.colours for polyp in self.polyps))
        instrument_cells = self.instrument.cells() if self.instrument else set()
        return {
            "polyps": len(self.polyps),
            "sizes": [size for size in SIZES if size in sizes],
            "polyp_cells": [cell for cell in CELLS if cell in polyp_cells],
            "colours": [colour for colour in COLOURS if colour in colours],
            "instrument_cells": [cell for cell in CELLS if cell in instrument_cells],
            "text": bool(self.text),
            "box": self.box,
        }


def _gap(position: float, index: int) -> float:
    """Distance along one axis from `position` to the grid's interval `index`, 0 inside."""
    return max(index / 3 - position, position - (index + 1) / 3, 0.0)


# Scenes


def draw_scene(rng: np.random.Generator) -> ColonoscopyScene:
    """A scene drawn by chance: about 15 % without polyps, 12 % with an instrument, 25 % with text, 40 % with a box."""
    lumen = (rng.uniform(0.3, 0.7), rng.uniform(0.3, 0.7))
    lumen_radius, corner = rng.uniform(0.08, 0.15), rng.uniform(0.68, 0.82)
    box = [None, "green", "black"][rng.choice(3, p=[0.6, 0.2, 0.2])]
    polyps: tuple[Polyp, ...] = ()
    for _ in range(rng.choice(4, p=[0.15, 0.63, 0.15, 0.07])):
        polyps += _place_polyp(rng, polyps, lumen, lumen_radius, corner, box)
    return ColonoscopyScene(
        polyps=polyps,
        lumen=lumen,
        lumen_radius=lumen_radius,
        hue=rng.uniform(-1, 1),
        brightness=rng.uniform(0.88, 1.1),
        corner=corner,
        instrument=_place_instrument(rng, polyps, box) if rng.random() < 0.125 else None,
        text=_text(rng) if rng.random() < 0.25 else (),
        box=box,
        texture=int(rng.integers(2**31)),
    )


def _place_polyp(
    rng: np.random.Generator,
    others: tuple[Polyp, ...],
    lumen: tuple[float, float],
    lumen_radius: float,
    corner: float,
    box: str | None,
) -> tuple[Polyp, ...]:
    """One polyp in full view beside `others`, or none where a hundred tries find no place."""
    radius = rng.uniform(*list(SIZES.values())[rng.choice(4, p=[0.25, 0.35, 0.27, 0.13])])
    colours = _colours(rng)
    for x, y in rng.uniform(0.1, 0.9, size=(100, 2)).tolist():
        framed = abs(x - 0.5) + abs(y - 0.5) < corner - 1.1 * radius and max(abs(x - 0.5), abs(y - 0.5)) < 0.47 - radius
        free = all(np.hypot(x - o.x, y - o.y) > 1.15 * (radius + o.radius) for o in others)
        on_wall = np.hypot(x - lumen[0], y - lumen[1]) > lumen_radius + 0.4 * radius
        if framed and free and on_wall and (box is None or _box_distance(x, y) > radius):
            return (Polyp(x, y, radius, colours),)
    return ()


def _colours(rng: np.random.Generator) -> tuple[str, ...]:
    count = rng.choice([1, 2, 3], p=[0.55, 0.3, 0.15])
    return tuple(str(colour) for colour in rng.choice(list(COLOURS), size=count, replace=False, p=[0.5, 0.27, 0.23]))


def _place_instrument(rng: np.random.Generator, polyps: tuple[Polyp, ...], box: str | None) -> Instrument | None:
    """An instrument clear of the polyps and the box, or none where a hundred tries find no place."""
    for _ in range(100):
        along = rng.uniform(0.35, 0.7)
        entry = [(along, 1.0), (1.0, along), (along, 0.0), (0.0, along)][rng.choice(4, p=[0.35, 0.35, 0.2, 0.1])]
        tip = (rng.uniform(0.25, 0.75), rng.uniform(0.25, 0.75))
        instrument = Instrument(entry, tip, rng.uniform(0.035, 0.045))
        axis = instrument.points()
        clear = all(np.hypot(*(axis - (polyp.x, polyp.y)).T).min() > polyp.radius + 0.06 for polyp in polyps)
        boxed = box is not None and min(_box_distance(*point) for point in axis) < 0.06
        if clear and not boxed and np.hypot(*(axis[-1] - axis[0])) > 0.3:
            return instrument
    return None


def _box_distance(x: float, y: float) -> float:
    """Distance of a point to the lower left box, 0 inside."""
    return float(np.hypot(max(x - BOX[0], 0), max(BOX[1] - y, 0)))


def _text(rng: np.random.Generator) -> tuple[str, ...]:
    """What an endoscope's processor burns in, marked as a phantom's: no patient, a date and a time by chance."""
    day, month, year = rng.integers(1, 29), rng.integers(1, 13), rng.integers(2010, 2025)
    hour, minute, second = rng.integers(7, 19), rng.integers(60), rng.integers(60)
    lines = (
        "PHANTOM",
        f"{day:02}/{month:02}/{year}",
        f"{hour:02}:{minute:02}:{second:02}",
        f"CVP:{rng.integers(1, 9)}",
    )
    return lines[: rng.integers(3, 5)]


# Pixels


def render(scene: ColonoscopyScene, size: int) -> NDArray[np.uint8]:
    """The scene as an RGB picture (size, size, 3); below 256 pixels drawn at twice the size and averaged."""
    rng = np.random.default_rng(scene.texture)
    finer = 2 if size < 256 else 1  # at 256 the soft edges already span pixels
    side = finer * size
    x = ((np.arange(side, dtype=np.float32) + 0.5) / side)[None, :]
    y = x.T
    image = _mucosa(scene, x, y, rng)
    for polyp in scene.polyps:
        _draw_polyp(image, polyp, x, y, rng)
    if scene.instrument:
        _draw_instrument(image, scene.instrument, x, y)
    _draw_frame(image, scene, x, y)
    if scene.box:
        _draw_box(image, scene.box, x, y)
    if scene.text:
        _draw_text(image, scene.text)
    image = image.reshape(3, size, finer, size, finer).mean(axis=(2, 4)).transpose(1, 2, 0)
    return np.rint(255 * image.clip(0, 1)).astype(np.uint8)


def _over(image: Array, colour: Array | Iterable[float], alpha: Array, window: Window = np.s_[:, :]) -> None:
    """Paint `colour` (3,) or (3, h, w) over the window of `image` (3, H, W) with opacity `alpha` (h, w)."""
    colour = np.asarray(colour, dtype=np.float32)
    part = image[:, window[0], window[1]]
    part += alpha * (colour.reshape(3, *colour.shape[1:] or (1, 1)) - part)


def _mucosa(scene: ColonoscopyScene, x: Array, y: Array, rng: np.random.Generator) -> Array:
    """The colon's wall (3, H, W): light that fades into the lumen, folds around it, vessels and wet reflections."""
    warp, turn, lamp = 0.25 * scene.lumen_radius, *rng.uniform(0, 2 * np.pi, size=2)
    dx = x - scene.lumen[0] + warp * waves(x, y, rng, 1.3)
    dy = y - scene.lumen[1] + warp * waves(x, y, rng, 1.3)
    distance, cosine, sine = polar(dx, dy)
    cosine3, sine3 = triple_angle(cosine, sine)
    # The colon's three muscle bands give the lumen and its folds the shape of a rounded triangle.
    threefold = np.cos(turn) * cosine3 + np.sin(turn) * sine3
    reach = distance * (1 + 0.13 * threefold) / scene.lumen_radius
    light = scene.brightness * (0.02 + 0.62 * ramp(0.1, 4.0, reach))
    light *= 1 + 0.45 * (np.cos(lamp) * (x - 0.5) + np.sin(lamp) * (y - 0.5)) + 0.05 * waves(x, y, rng, 2.5)
    light *= 1 + (0.75 - 0.25 * threefold) * _folds(reach, x, y, rng)
    image = _tissue(light, scene.hue)
    vessels = ramp(0.22, 0.0, np.abs(waves(x, y, rng, 5.0, 14))) * ramp(0.0, 1.5, waves(x, y, rng, 2.0))
    _over(image, (0.62, 0.13, 0.10), 0.2 * vessels * ramp(1.2, 3.0, reach))
    _over(image, (1.0, 0.97, 0.92), 0.9 * _reflections(x, y, rng) * ramp(1.2, 2.2, reach))
    return image


def _folds(reach: Array, x: Array, y: Array, rng: np.random.Generator) -> Array:
    """Relative light (H, W) of the folds around the lumen.

    They lie at even steps of the logarithm of the distance, about as rings of a tube do in perspective. Outwards from
    the lumen each begins with its lit crest, and the light falls until the next crest's edge.
    """
    depth = rng.uniform(1.9, 2.8) * np.log(reach + 0.4) + 0.16 * waves(x, y, rng, 1.5) + rng.uniform(0, 1)
    step = depth - np.floor(depth)
    crest = ramp(0.0, 0.2, step) * (1 - step) - 0.4
    return 0.85 * crest * ramp(0.5, 1.2, reach) * ramp(7.0, 2.0, reach)


def _tissue(light: Array, hue: float) -> Array:
    """Colour (3, H, W) of tissue under `light` (H, W): a curve from brown shadow through red-orange to pale pink."""
    dark, middle, bright = np.array([[0.10, 0.03, 0.02], [0.93, 0.44, 0.30], [1.0, 0.82, 0.70]], dtype=np.float32)
    middle = middle + hue * np.array([0.0, -0.035, 0.05], dtype=np.float32)
    t = light.clip(0, 1)
    weights = np.stack([(1 - t) ** 2, 2 * t * (1 - t), t * t])
    return np.tensordot(np.stack([dark, middle, bright], axis=1), weights, axes=1)


def _reflections(x: Array, y: Array, rng: np.random.Generator) -> Array:
    """Opacity (H, W) of small wet highlights, strewn in a few clusters."""
    clusters = rng.uniform(0.15, 0.85, size=(3, 2))
    spots = np.repeat(clusters, 4, axis=0) + rng.normal(0, 0.045, size=(12, 2))
    spots, width = spots.astype(np.float32), rng.uniform(0.005, 0.014, size=(2, 12, 1)).astype(np.float32)
    across = np.exp(-(((x - spots[:, :1]) / width[0]) ** 2))
    down = np.exp(-(((y.T - spots[:, 1:]) / width[1]) ** 2))
    return (1.4 * down.T @ across).clip(0, 1)


def _draw_polyp(image: Array, polyp: Polyp, x: Array, y: Array, rng: np.random.Generator) -> None:
    """A dome lit from the upper left, with a shadow on the wall below it and a few wet glints."""
    reach = 1.8 * polyp.radius  # the shadow's end
    rows, columns = (slice(max(int((c - reach) * x.size), 0), int((c + reach) * x.size)) for c in (polyp.y, polyp.x))
    window = (rows, columns)
    dx, dy = (x[:, columns] - polyp.x) / polyp.radius, (y[rows] - polyp.y) / polyp.radius
    distance, cosine, sine = polar(dx, dy)
    outline = round_outline(cosine, sine, rng)
    shadow = np.sqrt((dx - 0.16) ** 2 + (dy - 0.22) ** 2) / outline
    _over(image, (0.22, 0.05, 0.03), 0.62 * ramp(1.3, 0.85, shadow), window)
    q = distance / outline  # 0 at the top, 1 at the rim
    height = np.sqrt((1.02 - q * q).clip(0.02, 1))
    shade = 0.40 + 0.60 * (0.92 * height - q * (0.28 * cosine + 0.40 * sine)).clip(0, 1.15)
    grain = 0.04 * waves(dx, dy, rng, 1.8, 12)
    # Light that tissue scatters comes back redder, so shadows and the surface's pits are not grey.
    tint = np.stack([shade + 0.3 * grain, shade**1.35 + grain, shade**1.45 + grain])
    _over(image, _polyp_colour(polyp.colours, dx, dy, rng) * tint, ramp(1.0, 0.84, q), window)
    glints = rng.normal((-0.26, -0.36), 0.10, size=(3, 2)).astype(np.float32)
    for (gx, gy), width in zip(glints, (0.20, 0.13, 0.09), strict=True):
        _over(image, (1.0, 0.98, 0.94), 0.8 * ramp(width, 0.02, np.hypot(dx - gx, 1.25 * (dy - gy))), window)


def _polyp_colour(colours: tuple[str, ...], dx: Array, dy: Array, rng: np.random.Generator) -> Array:
    """Unshaded colour (3, h, w): the first at the foot, the others as caps above, off centre and softly joined.

    dx, dy: position on the polyp in radii. Each colour has a good share of the area.
    """
    turn = rng.uniform(0, 2 * np.pi)
    off_cap = np.hypot(dx - 0.3 * np.cos(turn), dy - 0.3 * np.sin(turn)) + 0.08 * waves(dx, dy, rng, 0.5)
    body = np.multiply.outer(np.array(COLOURS[colours[0]], dtype=np.float32), np.ones_like(off_cap))
    for place, colour in enumerate(colours[1:], start=1):
        rim = 0.92 * np.sqrt(1 - place / len(colours))
        _over(body, COLOURS[colour], ramp(rim + 0.16, rim - 0.16, off_cap))
    return body


def _draw_instrument(image: Array, instrument: Instrument, x: Array, y: Array) -> None:
    """A metallic tube: grey with a light line along it, a rounded tip and a dark ring behind the tip."""
    axis = np.subtract(instrument.tip, instrument.entry)
    length = float(np.hypot(*axis))
    ux, uy = axis / length
    along = (x - instrument.entry[0]) * ux + (y - instrument.entry[1]) * uy
    across = (x - instrument.entry[0]) * -uy + (y - instrument.entry[1]) * ux
    beyond = (along - (length - instrument.half_width)).clip(0, None)
    q = np.sqrt(across**2 + beyond**2) / instrument.half_width
    _over(image, (0.12, 0.03, 0.02), 0.5 * ramp(1.7, 0.9, q))
    side = across / instrument.half_width
    shade = 0.30 + 0.45 * np.sqrt((1 - side * side).clip(0, 1)) + 0.25 * ramp(0.35, 0.0, np.abs(side + 0.3))
    ring = ramp(0.014, 0.008, np.abs(along - length + 2.2 * instrument.half_width))
    shade = shade * (1 - 0.6 * ring)
    metal = np.array([0.93, 0.97, 1.0], dtype=np.float32).reshape(3, 1, 1) * shade
    _over(image, metal, ramp(1.0, 0.86, q))


def _draw_frame(image: Array, scene: ColonoscopyScene, x: Array, y: Array) -> None:
    """The endoscope's black frame: an octagon with soft edges, and less light towards it."""
    dx, dy = np.abs(x - 0.5), np.abs(y - 0.5)
    image *= 1 - 0.45 * ramp(0.12, 0.42, dx * dx + dy * dy)
    inside = ramp(0.492, 0.484, np.maximum(dx, dy)) * ramp(scene.corner + 0.005, scene.corner - 0.005, dx + dy)
    image *= inside


def _draw_box(image: Array, colour: str, x: Array, y: Array) -> None:
    """The lower left box: black, or the green ScopeGuide display with the endoscope's curve."""
    inside = ramp(BOX[0] + 0.004, BOX[0] - 0.004, x) * ramp(BOX[1] - 0.004, BOX[1] + 0.004, y)
    _over(image, (0.05, 0.40, 0.22) if colour == "green" else (0, 0, 0), inside)
    if colour == "black":
        return
    page = Image.new("L", (512, 512))
    t = np.linspace(0, 1, 40)
    curve = np.stack([87 + 45 * np.sin(2 * np.pi * t), 490 - 130 * t + 12 * np.sin(4 * np.pi * t)], axis=1)
    ImageDraw.Draw(page).line([tuple(point) for point in curve.tolist()], fill=255, width=12, joint="curve")
    _over(image, (0.84, 0.92, 0.50), _page_opacity(page, image))


def _draw_text(image: Array, lines: tuple[str, ...]) -> None:
    """Light burnt-in lines at the left margin, in PIL's bitmap font."""
    page = Image.new("L", (208, 208))
    ImageDraw.Draw(page).multiline_text((5, 62), "\n".join(lines), fill=255, font=ImageFont.load_default_imagefont())
    _over(image, (0.95, 0.95, 0.95), _page_opacity(page, image))


def _page_opacity(page: Image.Image, image: Array) -> Array:
    """A page drawn at its own fixed size as opacity (H, W) over the whole image."""
    side = image.shape[-1]
    return np.asarray(page.resize((side, side), Image.Resampling.BICUBIC), dtype=np.float32) / 255


# Prompts


def prompts(scene: ColonoscopyScene, rng: np.random.Generator) -> list[str]:
    """7 to 11 different prompts, all true of the scene, in random order; up to two true ones are left out by chance."""
    true = _statements(scene.truth())
    count = rng.integers(max(7, len(true) - 2), len(true) + 1)
    return [f"Generate an image {true[i]}." for i in rng.permutation(len(true))[:count]]


def _statements(truth: dict[str, Any]) -> list[str]:
    """All that the challenge's prompts can say of `truth`. The doubled "an an" is the challenge's own."""
    text, box = ("containing" if truth[key] else "not containing" for key in ("text", "box"))
    said = [f"{text} text", f"{box} a green/black box artefact"]
    if truth["instrument_cells"]:
        said += [
            "containing an instrument",
            f"with an an instrument located in the {_places(truth['instrument_cells'])}",
        ]
    else:
        said += ["not containing an instrument", "with no instruments"]
    count = truth["polyps"]
    if not count:
        return [*said, "with no polyps", "not containing a polyp", "with no findings", "not containing an abnormality"]
    plural = "s" if count > 1 else ""
    polyps = "polyps" if plural else "a polyp"
    return [
        *said,
        "containing a polyp",
        "containing an abnormality",
        f"with {count} polyp{plural}",
        f"with {count} finding{plural}",
        f"with {polyps} of size {_enumerate(truth['sizes'])}",
        f"with an abnormality located in the {_places(truth['polyp_cells'])}",
        f"with an abnormality with the color{'s' if len(truth['colours']) > 1 else ''} {_enumerate(truth['colours'])}",
    ]


def _enumerate(items: list[str]) -> str:
    """a; a and b; a, b and c."""
    return " and ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)


def _places(cells: list[str]) -> str:
    """a; a and b; a, b, and c: places have a comma before "and", colours and sizes do not."""
    return _enumerate(cells) if len(cells) < 3 else f"{', '.join(cells[:-1])}, and {cells[-1]}"


# Files


def write_colonoscopy(
    out: Path, images: int, seed: int, size: int = 256, progress: Callable[[int], None] | None = None
) -> bool:
    """Write `images` phantoms of `size` x `size` pixels to the folder `out`, in the layout of MEDVQA-GI 2024.

    Files: `images/phantom-000000.jpg` and so on; `prompt-gt.csv` (`Filename;Prompt`, names without extension);
    `test-prompts.csv` (`Prompt`, at most 200 different prompts of `prompt-gt.csv`, most frequent first); `truth.json`
    (a list of name, scene and truth, one picture a line); `phantom.json` (what the set was drawn from).

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
    recipe = {"phantoms": "colonoscopy", "drawing": DRAWING, "images": images, "seed": seed, "size": size}
    tables = ["prompt-gt.csv", "test-prompts.csv", "truth.json"]
    files = [*tables, *(f"images/{_name(index)}.jpg" for index in range(images))]
    return write_once(out, recipe, files, lambda folder: _write_set(folder, recipe, progress))


def _write_set(folder: Path, recipe: dict[str, Any], progress: Callable[[int], None] | None) -> None:
    (folder / "images").mkdir()
    rows, entries = [], []
    for index in range(recipe["images"]):
        rng = np.random.default_rng((recipe["seed"], index))
        scene, name = draw_scene(rng), _name(index)
        rows += [(name, prompt) for prompt in prompts(scene, rng)]
        entries.append(json.dumps({"name": name, "scene": asdict(scene), "truth": scene.truth()}))
        Image.fromarray(render(scene, recipe["size"])).save(folder / "images" / f"{name}.jpg", quality=95)
        if progress:
            progress(index + 1)
    frequent = Counter(prompt for _, prompt in rows).most_common(200)
    _write_csv(folder / "prompt-gt.csv", [("Filename", "Prompt"), *rows])
    _write_csv(folder / "test-prompts.csv", [("Prompt",), *((prompt,) for prompt, _ in frequent)])
    (folder / "truth.json").write_text("[\n" + ",\n".join(entries) + "\n]\n", encoding="utf-8")


def _name(index: int) -> str:
    return f"phantom-{index:06}"


def _write_csv(path: Path, rows: Iterable[tuple[str, ...]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=";", lineterminator="\n").writerows(rows)

"""What a colonoscopy phantom shows: its scene, drawn by chance, the truth that follows from it, and its prompts.

The prompts are worded as those of MEDVQA-GI 2024. Lengths are fractions of the picture's side, y downwards.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

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


@dataclass(frozen=True)
class Shares:
    """How often scenes show what prompts speak of; by default about as often as pictures of MEDVQA-GI do.

    polyps: probability of 0, 1, 2 and 3 of them; fewer fit where they are large. sizes: of the sizes of a polyp, in the
    order of `SIZES`. box, text, instrument: of there being one; an instrument that finds no place is left out.
    """

    polyps: tuple[float, ...] = (0.15, 0.63, 0.15, 0.07)
    sizes: tuple[float, ...] = (0.25, 0.35, 0.27, 0.13)
    box: float = 0.4
    text: float = 0.25
    instrument: float = 0.125


AS_IN_CLINIC = Shares()
EVEN = Shares(polyps=(0.4, 0.45, 0.1, 0.05), sizes=(0.1, 0.25, 0.35, 0.3), box=0.5, text=0.5, instrument=0.5)
"""Each thing about as often there as not, and polyps that a few pixels show: so that little data teaches all of it."""


def _gap(position: float, index: int) -> float:
    """Distance along one axis from `position` to the grid's interval `index`, 0 inside."""
    return max(index / 3 - position, position - (index + 1) / 3, 0.0)


# Scenes


def draw_scene(rng: np.random.Generator, shares: Shares = AS_IN_CLINIC) -> ColonoscopyScene:
    """A scene drawn by chance."""
    lumen = (rng.uniform(0.3, 0.7), rng.uniform(0.3, 0.7))
    lumen_radius, corner = rng.uniform(0.08, 0.15), rng.uniform(0.68, 0.82)
    box = [None, "green", "black"][rng.choice(3, p=[1 - shares.box, shares.box / 2, shares.box / 2])]
    polyps: tuple[Polyp, ...] = ()
    for _ in range(rng.choice(4, p=shares.polyps)):
        polyps += _place_polyp(rng, shares.sizes, polyps, lumen, lumen_radius, corner, box)
    return ColonoscopyScene(
        polyps=polyps,
        lumen=lumen,
        lumen_radius=lumen_radius,
        hue=rng.uniform(-1, 1),
        brightness=rng.uniform(0.88, 1.1),
        corner=corner,
        instrument=_place_instrument(rng, polyps, box) if rng.random() < shares.instrument else None,
        text=_text(rng) if rng.random() < shares.text else (),
        box=box,
        texture=int(rng.integers(2**31)),
    )


def _place_polyp(
    rng: np.random.Generator,
    sizes: tuple[float, ...],
    others: tuple[Polyp, ...],
    lumen: tuple[float, float],
    lumen_radius: float,
    corner: float,
    box: str | None,
) -> tuple[Polyp, ...]:
    """One polyp in full view beside `others`, or none where a hundred tries find no place."""
    radius = rng.uniform(*list(SIZES.values())[rng.choice(4, p=sizes)])
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


# Prompts


def prompts(scene: ColonoscopyScene, rng: np.random.Generator) -> list[str]:
    """7 to 11 different prompts, all true of the scene, in random order; up to two true ones are left out by chance."""
    true = _statements(scene.truth())
    count = rng.integers(max(7, len(true) - 2), len(true) + 1)
    return [f"Generate an image {true[i]}." for i in rng.permutation(len(true))[:count]]


def even_prompts(scene: ColonoscopyScene, rng: np.random.Generator) -> list[str]:
    """5 different prompts, all true of the scene: of box, text, instrument and the number of polyps one each, and one
    by chance that says something else of polyps or instrument, but not where they are."""
    truth = scene.truth()
    true = [statement for statement in _statements(truth) if "located" not in statement]
    instrument = "containing an instrument" if truth["instrument_cells"] else "not containing an instrument"
    own = [*true[:2], instrument, f"with {_polyps(truth['polyps'])}"]
    others = [statement for statement in true if statement not in own]
    return [f"Generate an image {statement}." for statement in [*own, others[rng.integers(len(others))]]]


def _polyps(count: int) -> str:
    """Their number, in words."""
    return f"{count or 'no'} polyp{'' if count == 1 else 's'}"


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
        none = ["not containing a polyp", "with no findings", "not containing an abnormality"]
        return [*said, f"with {_polyps(0)}", *none]
    plural = "s" if count > 1 else ""
    polyps = "polyps" if plural else "a polyp"
    return [
        *said,
        "containing a polyp",
        "containing an abnormality",
        f"with {_polyps(count)}",
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

"""Draws colonoscopy phantoms in the layout of MEDVQA-GI 2024: `images/*.jpg` and a `;`-separated `prompt-gt.csv`.

Each picture is a `ColonoscopyScene`, a few numbers from which both its pixels and its prompts follow. The same scene
looks the same at any size.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from datamodules.phantoms.colonoscopy_scene import (
    AS_IN_CLINIC,
    BOX,
    COLOURS,
    EVEN,
    ColonoscopyScene,
    Instrument,
    Polyp,
    draw_scene,
    even_prompts,
    prompts,
)
from datamodules.phantoms.drawing import (
    Array,
    averaged,
    check_numbers,
    phantom_name,
    pixels,
    polar,
    ramp,
    round_outline,
    triple_angle,
    waves,
    write_csv,
    write_once,
    write_truth,
)

Window = tuple[slice, slice]

DRAWING = 1
"""Raised by every change that alters a set's bytes, so that a set drawn before is not taken for one drawn after."""

# Pixels


def render(scene: ColonoscopyScene, size: int) -> NDArray[np.uint8]:
    """The scene as an RGB picture (size, size, 3); below 256 pixels drawn at twice the size and averaged."""
    rng = np.random.default_rng(scene.texture)
    finer = 2 if size < 256 else 1  # at 256 the soft edges already span pixels
    x, y = pixels(finer * size)
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
    image = averaged(image, finer).transpose(1, 2, 0)
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


# Files


def write_colonoscopy(
    out: Path,
    images: int,
    seed: int,
    size: int = 256,
    progress: Callable[[int], None] | None = None,
    even: bool = False,
) -> bool:
    """Write `images` phantoms of `size` x `size` pixels to the folder `out`, in the layout of MEDVQA-GI 2024.

    Files: `images/phantom-000000.jpg` and so on; `prompt-gt.csv` (`Filename;Prompt`, names without extension);
    `test-prompts.csv` (`Prompt`, at most 200 different prompts of `prompt-gt.csv`, most frequent first); `truth.json`
    (a list of name, scene and truth, one picture a line); `phantom.json` (what the set was drawn from).

    The same seed gives the same bytes on the same machine, and picture i is the same however many there are. The folder
    appears only when it is complete.

    Args:
        progress: called with the number of pictures drawn so far, after each.
        even: draw scenes in the shares `EVEN`, each with the five prompts of `even_prompts`, from which is learned in
            minutes; else as often as in the clinic, with seven or more.

    Returns:
        True if the set was drawn, False if `out` held this very set already and nothing was done.

    Raises:
        UserError: for numbers out of range, and where `out` holds anything else or cannot be written.
    """
    check_numbers(images, size, seed, least_size=16)
    recipe = {"phantoms": "colonoscopy", "drawing": DRAWING, "images": images, "seed": seed, "size": size}
    recipe |= {"even": True} if even else {}  # a set drawn before there was a choice names none
    tables = ["prompt-gt.csv", "test-prompts.csv", "truth.json"]
    files = [*tables, *(f"images/{phantom_name(index)}.jpg" for index in range(images))]
    return write_once(out, recipe, files, lambda folder: _write_set(folder, recipe, progress))


def _write_set(folder: Path, recipe: dict[str, Any], progress: Callable[[int], None] | None) -> None:
    (folder / "images").mkdir()
    rows, entries = [], []
    shares, said = (EVEN, even_prompts) if recipe.get("even") else (AS_IN_CLINIC, prompts)
    for index in range(recipe["images"]):
        rng = np.random.default_rng((recipe["seed"], index))
        scene, name = draw_scene(rng, shares), phantom_name(index)
        rows += [(name, prompt) for prompt in said(scene, rng)]
        entries.append({"name": name, "scene": asdict(scene), "truth": scene.truth()})
        Image.fromarray(render(scene, recipe["size"])).save(folder / "images" / f"{name}.jpg", quality=95)
        if progress:
            progress(index + 1)
    frequent = Counter(prompt for _, prompt in rows).most_common(200)
    write_csv(folder / "prompt-gt.csv", [("Filename", "Prompt"), *rows], ";")
    write_csv(folder / "test-prompts.csv", [("Prompt",), *((prompt,) for prompt, _ in frequent)], ";")
    write_truth(folder, entries)

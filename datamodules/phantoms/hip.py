"""Draws ventrodorsal canine pelvic radiographs with exact Norberg angles, in the layouts that `canine_hip` reads.

A picture is a map of attenuation: the soft tissue of trunk and thighs, and in it pelvis, spine and femora, which add up
where they overlap, through the curve of a film. It follows from a `HipScene` of a few numbers and looks the same at any
size. Lengths are fractions of the picture's side, x to the right, y downwards. The dog lies on its back with its hind
legs stretched: cranial is above, and the dog's right is on the picture's left.
"""

import json
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from datamodules.files.layout_writers import layout_writer
from datamodules.files.layouts import Entry, read_catalogue
from datamodules.phantoms.drawing import (
    Array,
    averaged,
    check_numbers,
    phantom_name,
    pixels,
    ramp,
    waves,
    write_once,
)
from datamodules.phantoms.hip_scene import SIDES, Frame, Hip, HipScene, Points, draw_scene
from medsynth.errors import UserError

DRAWING = 1
"""Raised by every change that alters a set's bytes, so that a set drawn before is not taken for one drawn after."""

# Pixels


def render(scene: HipScene, size: int) -> NDArray[np.uint8]:
    """The scene as a grey picture (size, size); below 256 pixels drawn at twice the size and averaged."""
    rng = np.random.default_rng(scene.texture)
    finer = 2 if size < 256 else 1
    side = finer * size
    x, y = pixels(side)
    frame = Frame(scene.centre, scene.scale, scene.tilt)
    soft = _soft_tissue(frame, x, y, rng)
    depth = soft + _bones(scene, frame, x, y, rng)
    image = _film(depth * scene.exposure, scene.contrast)
    if scene.marker:
        image = np.maximum(image, 0.97 * _marker(side, rng))
    image += 0.014 * _grain(side, rng) * (1.2 - image)
    return np.rint(255 * averaged(image, finer).clip(0, 1)).astype(np.uint8)


def _film(depth: Array, contrast: float) -> Array:
    """Brightness of attenuation: black where nothing lies in the beam, and saturating."""
    return (1 - np.exp(-0.85 * contrast * depth)) / (1 - np.exp(-0.85 * 2.6))


def _grain(side: int, rng: np.random.Generator) -> Array:
    """Film grain (side, side) of unit variance, a little wider than a pixel."""
    noise = rng.standard_normal((side, side), dtype=np.float32)
    noise += 0.5 * (np.roll(noise, 1, axis=0) + np.roll(noise, 1, axis=1))
    return noise / np.float32(np.sqrt(1.5))


def _soft_tissue(frame: Frame, x: Array, y: Array, rng: np.random.Generator) -> Array:
    """Attenuation (H, W) of trunk, thighs and tail base, with fat between the muscles and gas in the bowel."""
    fat, wide, spread = rng.uniform(0.8, 1.2), rng.uniform(0.92, 1.06), rng.uniform(0.0, 0.03)
    cx, cy = frame.centre
    dx, dy = np.abs(x - cx) / frame.scale, (y - cy) / frame.scale
    trunk = _bulge(dx / (0.40 * wide + 0.10 * ramp(0.0, -0.5, dy)), (dy + 0.32) / 0.62)
    axis = 0.215 + spread + 0.06 * dy
    thigh = _bulge((dx - axis) / (0.175 * wide - 0.05 * ramp(0.1, 0.7, dy)), (dy - 0.26) / 0.62)
    flesh = np.sqrt(trunk * trunk + thigh * thigh)
    mottle = waves(x, y, rng, 1.6) * 0.03 + waves(x, y, rng, 4.0, 12) * 0.015
    seams = ramp(0.16, 0.0, np.abs(waves(x, y, rng, 2.4, 6))) * 0.02 * fat
    depth = flesh * (0.62 + mottle - seams)
    for _ in range(rng.integers(1, 5)):
        gx, gy = rng.normal(0, 0.03), rng.uniform(-0.46, -0.05)
        blob = np.hypot((x - cx - gx) / rng.uniform(0.018, 0.04), (y - cy - gy) / rng.uniform(0.02, 0.06))
        depth = depth - 0.09 * flesh * ramp(1.1, 0.5, blob + 0.12 * waves(x, y, rng, 9.0, 6))
    return depth


def _bulge(across: Array, along: Array) -> Array:
    """Thickness of a rounded body of unit half axes, soft at its outline."""
    inside = (1 - across * across - along * along * along * along).clip(0, None)
    return np.sqrt(inside)


def _bones(scene: HipScene, frame: Frame, x: Array, y: Array, rng: np.random.Generator) -> Array:
    """Attenuation (H, W) of spine, pelvis and femora."""
    side = x.shape[-1]
    depth = 0.46 * _plate(_spine(frame, side, rng), 0.006) + 0.44 * _plate(_pelvis(scene, frame, side, rng), 0.008)
    depth += 0.16 * _plate(_dorsal_walls(scene, side), 0.005)
    for name, sign in SIDES.items():
        depth += _roof(getattr(scene, name), sign, x, y)
    depth += _femora(scene, frame, x, y, rng)
    return depth * (1 + 0.05 * waves(x, y, rng, 22.0, 20) + 0.05 * waves(x, y, rng, 7.0, 10))


def _plate(page: Image.Image, cortex: float) -> Array:
    """A flat bone drawn on `page`, with denser edges of about the width `cortex`."""
    inner = page.filter(ImageFilter.GaussianBlur(cortex * page.width))
    filled, blurred = (np.asarray(p, dtype=np.float32) / 255 for p in (page, inner))
    return 0.72 * filled + 1.1 * (filled - blurred).clip(0, None)


def _page(side: int) -> tuple[Image.Image, ImageDraw.ImageDraw, int]:
    """A black page to draw outlines on, four times as fine as the picture, twice where that is large."""
    fine = side * (4 if side <= 512 else 2)
    page = Image.new("L", (fine, fine))
    return page, ImageDraw.Draw(page), fine


def _shrunk(page: Image.Image, side: int) -> Image.Image:
    return page.reduce(page.width // side)


def _polygon(draw: ImageDraw.ImageDraw, points: Points, fine: int, fill: int) -> None:
    draw.polygon([tuple(point) for point in (points * fine - 0.5).tolist()], fill=fill)


def _smooth(points: ArrayLike, closed: bool = False, steps: int = 8) -> Points:
    """A Catmull-Rom curve through the points (n, 2)."""
    points = np.asarray(points, dtype=float)
    if closed:
        padded = np.concatenate([points[-1:], points, points[:2]])
    else:
        padded = np.concatenate([points[:1], points, points[-1:]])
    a, b, c, d = padded[:-3], padded[1:-2], padded[2:-1], padded[3:]
    t = (np.arange(steps) / steps)[:, None, None]
    curve = 0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3)
    curve = curve.transpose(1, 0, 2).reshape(-1, 2)
    return curve if closed else np.concatenate([curve, points[-1:]])


def _spine(frame: Frame, side: int, rng: np.random.Generator) -> Image.Image:
    """The last lumbar vertebrae, the sacrum, and the tail."""
    page, draw, fine = _page(side)
    bend = rng.normal(0, 0.012)

    def put(points: ArrayLike, fill: int) -> None:
        points = np.asarray(points, dtype=float)
        points = points + np.stack([bend * (points[:, 1] / 0.4) ** 2, np.zeros(len(points))], axis=1)
        _polygon(draw, frame.place(points), fine, fill)

    for number in range(4):  # lumbar bodies, from the last upwards, with their transverse processes
        low = -0.262 - 0.086 * number
        for sign in (-1, 1):
            process = [(0.028, low - 0.052), (0.105, low - 0.098), (0.115, low - 0.088), (0.03, low - 0.028)]
            put(_smooth([(sign * u, v) for u, v in process], closed=True), 110)
        put(_smooth(_block(0.037, low - 0.076, low, waist=0.88), closed=True), 215)
        put(_smooth([(-0.005, low - 0.07), (0.005, low - 0.07), (0.007, low - 0.01), (-0.007, low - 0.01)], True), 255)
    sacrum = [(0.040, -0.256), (0.074, -0.235), (0.070, -0.175), (0.042, -0.135), (0.027, -0.085)]
    put(_smooth([*sacrum, *((-u, v) for u, v in reversed(sacrum))], closed=True), 205)
    for v in (-0.195, -0.145):
        for sign in (-1, 1):
            put(_circle((sign * (0.028 + 0.1 * (-0.145 - v)), v), 0.006), 130)
    put(_smooth([(-0.004, -0.245), (0.004, -0.245), (0.005, -0.10), (-0.005, -0.10)], closed=True), 250)
    top = -0.079
    for number in range(9):
        length, width = 0.044 - 0.0012 * number, 0.019 - 0.0013 * number
        put(_smooth(_block(width, top, top + 0.86 * length, waist=0.72), closed=True), 170)
        top += length
    return _shrunk(page, side)


def _block(half_width: float, top: float, bottom: float, waist: float) -> list[tuple[float, float]]:
    """A vertebral body seen from the front: wide ends, a waist."""
    middle = (top + bottom) / 2
    right = [(half_width, top), (waist * half_width, middle), (half_width, bottom)]
    return [*right, *((-u, v) for u, v in reversed(right))]


def _circle(centre: tuple[float, float], radius: float) -> Points:
    turn = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    return np.stack([centre[0] + radius * np.cos(turn), centre[1] + radius * np.sin(turn)], axis=1)


def _pelvis(scene: HipScene, frame: Frame, side: int, rng: np.random.Generator) -> Image.Image:
    """Ilium, pubis and ischium of both sides around the sockets and the obturator foramina."""
    page, draw, fine = _page(side)
    wing = rng.normal(1, 0.03)
    for name, sign in SIDES.items():
        hip: Hip = getattr(scene, name)
        _polygon(draw, _hip_bone(hip, frame, sign, wing), fine, 200)
        _polygon(draw, frame.place(_smooth(_FORAMEN, closed=True), sign), fine, 40)
    draw.line([tuple(p) for p in (frame.place([(0, 0.07), (0, 0.205)]) * fine).tolist()], fill=120, width=fine // 220)
    return _shrunk(page, side)


_FORAMEN = [(0.046, 0.092), (0.075, 0.085), (0.103, 0.112), (0.104, 0.160), (0.078, 0.190), (0.050, 0.168)]
"""Outline of the obturator foramen in the pelvis, lateral and caudal."""


def _hip_bone(hip: Hip, frame: Frame, sign: int, wing: float) -> Points:
    """Outline of one hip bone: from the crest of the ilium along its outside to the rim, around the socket, back."""
    outer = [(0.078, -0.300), (0.098, -0.338), (0.135 * wing, -0.352), (0.172 * wing, -0.338), (0.192 * wing, -0.295)]
    outer += [(0.183, -0.235), (0.160, -0.175), (0.146, -0.125), (0.149, -0.088)]
    ischium = [(0.176, 0.098), (0.170, 0.150), (0.176, 0.205), (0.196, 0.250), (0.186, 0.283), (0.150, 0.290)]
    ischium += [(0.110, 0.268), (0.060, 0.232), (0.022, 0.205), (0.002, 0.212)]
    inner = [(0.002, 0.060), (0.030, 0.047), (0.066, 0.034), (0.086, 0.004), (0.090, -0.045), (0.090, -0.100)]
    inner += [(0.076, -0.150), (0.066, -0.200), (0.070, -0.255), (0.078, -0.300)]
    lateral = np.concatenate([frame.place(outer, sign), [hip.rim]])
    arc = _socket_arc(hip, sign)
    end = arc[-1]
    caudal = np.concatenate([[end], frame.place(ischium, sign)])
    return np.concatenate([_smooth(lateral), arc[1:], _smooth(caudal), _smooth(frame.place(inner, sign))])


def _socket_arc(hip: Hip, sign: int) -> Points:
    """The acetabulum's hollow, from the rim over its medial wall to the caudal end, (n, 2) in the picture."""
    dx, dy = np.subtract(hip.rim, hip.socket)
    start = np.arctan2(dy, dx)
    turn = start - sign * np.linspace(0, np.radians(205), 60)
    return np.asarray(hip.socket) + hip.socket_radius * np.stack([np.cos(turn), np.sin(turn)], axis=1)


def _dorsal_walls(scene: HipScene, side: int) -> Image.Image:
    """The dorsal walls of the sockets, which lie behind the medial part of the heads."""
    page, draw, fine = _page(side)
    for name, sign in SIDES.items():
        hip: Hip = getattr(scene, name)
        arc = _socket_arc(hip, sign)
        bulge = np.asarray(hip.socket) + 0.10 * hip.socket_radius * np.array([sign, 0.0])
        edge = _smooth(np.stack([arc[-1], bulge, hip.rim]))
        _polygon(draw, np.concatenate([arc, edge]), fine, 255)
    return _shrunk(page, side)


def _roof(hip: Hip, sign: int, x: Array, y: Array) -> Array:
    """The dense bone (H, W) under the roof of the acetabulum, a line that ends at the rim."""
    rows, columns = _window(hip.socket, 1.3 * hip.socket_radius, x.shape[-1])
    dx, dy = (x[:, columns] - hip.socket[0]) / hip.socket_radius, (y[rows] - hip.socket[1]) / hip.socket_radius
    distance = np.hypot(dx, dy)
    rx, ry = np.subtract(hip.rim, hip.socket) / hip.socket_radius
    along = (dx * rx + dy * ry) / distance.clip(1e-3, None)
    beyond = sign * (rx * dy - ry * dx)  # positive on the lateral side of the rim
    line = ramp(0.98, 1.02, distance) * ramp(1.16, 1.05, distance)
    field = np.zeros((y.shape[0], x.shape[-1]), dtype=np.float32)
    field[rows, columns] = 0.34 * line * ramp(0.1, 0.9, along) * ramp(0.03, -0.03, beyond)
    return field


def _window(centre: tuple[float, float], reach: float, side: int) -> tuple[slice, slice]:
    """Rows and columns of the pixels within `reach` of the centre."""
    first, last = (np.asarray(centre) - reach) * side, (np.asarray(centre) + reach) * side + 1
    (left, top), (right, bottom) = first.astype(int).clip(0), last.astype(int)
    return slice(top, bottom), slice(left, right)


def _femora(scene: HipScene, frame: Frame, x: Array, y: Array, rng: np.random.Generator) -> Array:
    """Attenuation (H, W) of heads, necks, trochanters and shafts; the shafts run out of the picture."""
    side = x.shape[-1]
    (long, draw_long, fine), (hollow, draw_hollow, _), (knob, draw_knob, _) = (_page(side) for _ in range(3))
    ball, disc = (np.zeros((side, side), dtype=np.float32) for _ in range(2))
    for name, sign in SIDES.items():
        hip: Hip = getattr(scene, name)
        lean = rng.normal(0.0, 0.02)
        for draw, outline in ((draw_long, _SHAFT), (draw_hollow, _MARROW), (draw_knob, _TROCHANTER)):
            points = np.array([(u + lean * v, v) for u, v in outline]) * hip.radius / frame.scale
            in_picture = frame.place(points, sign) - frame.centre + hip.head
            _polygon(draw, _smooth(in_picture, closed=True), fine, 235)
        _draw_head(hip, ball, disc, x, y)
    marrow = _shrunk(hollow, side).filter(ImageFilter.GaussianBlur(0.006 * side))
    shaft = 0.66 * _plate(_shrunk(long, side), 0.007) * (1 - 0.55 * np.asarray(marrow, dtype=np.float32) / 255)
    trochanter = 0.15 * _plate(_shrunk(knob, side), 0.008)
    return np.maximum(ball, shaft * (1 - 0.55 * disc)) + trochanter * (1 - disc)


def _draw_head(hip: Hip, ball: Array, disc: Array, x: Array, y: Array) -> None:
    """Put one femoral head into `ball`, its attenuation, and `disc`, 1 within it."""
    rows, columns = _window(hip.head, 1.1 * hip.radius, x.shape[-1])
    distance = np.hypot(x[:, columns] - hip.head[0], y[rows] - hip.head[1]) / hip.radius
    edge = 0.6 / (hip.radius * x.shape[-1])  # one pixel from inside to outside
    inside = ramp(1 + edge, 1 - edge, distance)
    depth = 0.36 + 0.24 * np.sqrt((1 - distance * distance).clip(0, 1)) + 0.13 * ramp(0.72, 0.98, distance)
    disc[rows, columns], ball[rows, columns] = inside, inside * depth


_SHAFT = [
    (0.10, -0.72), (0.80, -0.52), (1.28, -0.16), (1.62, -0.40), (2.02, -0.34), (2.28, 0.20), (2.24, 0.95),
    (2.02, 1.75), (1.86, 2.9), (1.80, 5.0), (1.82, 8.0), (1.86, 16.0), (0.72, 16.0), (0.74, 8.0), (0.76, 5.0),
    (0.74, 3.0), (0.64, 2.35), (0.42, 1.95), (0.52, 1.60), (0.70, 1.28), (0.42, 0.98), (-0.20, 0.78),
]  # fmt: skip
"""Outline of neck, trochanters and shaft in radii of the head from its centre, lateral and caudal."""

_MARROW = [
    (1.05, 1.5), (1.45, 0.9), (1.75, 1.1), (1.68, 2.2), (1.55, 3.4), (1.50, 5.0), (1.52, 8.0), (1.55, 16.2),
    (1.03, 16.2), (1.04, 8.0), (1.05, 5.0), (1.00, 3.2), (0.92, 2.2),
]  # fmt: skip
"""The marrow's outline within it."""

_TROCHANTER = [(1.40, 0.25), (1.66, -0.26), (2.02, -0.28), (2.26, 0.20), (2.20, 0.95), (1.92, 1.30), (1.55, 0.95)]
"""The greater trochanter before it."""


def _marker(side: int, rng: np.random.Generator) -> Array:
    """Opacity (H, W) of a letter of lead beside the dog's right."""
    page = Image.new("L", (24, 24))
    ImageDraw.Draw(page).text((7, 5), "R", fill=255, font=ImageFont.load_default_imagefont())
    letter = page.rotate(rng.uniform(-12, 12), Image.Resampling.BICUBIC).resize(
        (side // 6,) * 2, Image.Resampling.BICUBIC
    )
    sheet = Image.new("L", (side, side))
    sheet.paste(letter, (round(side * rng.uniform(0.0, 0.03)), round(side * rng.uniform(0.10, 0.45))))
    return np.asarray(sheet, dtype=np.float32) / 255


# Files


def write_hips(
    out: Path,
    images: int,
    seed: int,
    size: int = 256,
    layout: str = "metadata",
    progress: Callable[[int], None] | None = None,
) -> bool:
    """Write `images` phantoms of `size` x `size` pixels to the folder `out`, in one of the layouts of `layouts.py`.

    Pictures are grey PNGs `phantom-000000` and so on; captions, grades and facts are those of `HipScene`. The same seed
    gives the same bytes on the same machine, and picture i is the same however many there are and in every layout. The
    folder appears only when it is complete.

    Args:
        progress: called with the number of pictures drawn so far, after each.

    Returns:
        True if the set was drawn, False if `out` held this very set already and nothing was done.

    Raises:
        UserError: for numbers out of range, and where `out` holds anything else or cannot be written.
    """
    check_numbers(images, size, seed, least_size=16)
    recipe = {"phantoms": "hip", "drawing": DRAWING, "images": images, "seed": seed, "size": size, "layout": layout}
    drawn = write_once(out, recipe, [], lambda folder: _write_set(folder, recipe, progress))
    if not drawn and (found := sum(len(t.rows) for t in read_catalogue(out, layout).splits.values())) < images:
        raise UserError(f"{out}: holds only {found} of its {images} phantoms; remove it to draw them again")
    return drawn


def _write_set(folder: Path, recipe: dict[str, Any], progress: Callable[[int], None] | None) -> None:
    with layout_writer(folder, recipe["layout"]) as writer:
        for index in range(recipe["images"]):
            scene, key = draw_scene(np.random.default_rng((recipe["seed"], index))), phantom_name(index)
            entry = Entry(f"{key}.png", key, scene.caption(), scene.grade(), json.dumps(scene.facts()))
            writer.add(entry, _png(render(scene, recipe["size"])))
            if progress:
                progress(index + 1)


def _png(pixels: NDArray[np.uint8]) -> bytes:
    file = BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()

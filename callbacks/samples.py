"""Pictures beside the prompts they were made for."""

import textwrap
from collections.abc import Sequence
from io import BytesIO

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from metrics.images import quantise

COLUMNS = 4
"""Pictures in a row of a grid."""


def draw_grid(images: Tensor, captions: list[str], columns: int = COLUMNS, side: int = 160) -> Image.Image:
    """One picture of n pictures, each over its caption.

    images: float32 (n, 3, H, W) in [0, 1], shown `side` pixels high; of wide ones there are fewer columns. captions: n
    texts, wrapped.
    """
    height, width = images.shape[2:]
    wide, columns = round(side * width / height), -(-columns * height // width)
    font = ImageFont.load_default(size=12)
    texts = [textwrap.fill(caption or "(no prompt)", width=wide // 6) for caption in captions]
    text_height = 16 * max(text.count("\n") + 1 for text in texts) + 8
    margin, rows = 8, -(-len(images) // columns)
    size = (columns * (wide + margin) + margin, rows * (side + text_height + margin) + margin)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for i, (pixels, text) in enumerate(zip(quantise(images), texts, strict=True)):
        x = margin + i % columns * (wide + margin)
        y = margin + i // columns * (side + text_height + margin)
        picture = Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())
        sheet.paste(picture.resize((wide, side), Image.Resampling.BICUBIC), (x, y))
        draw.multiline_text((x, y + side + 4), text, fill="black", font=font, spacing=3)
    return sheet


def grid_rows(length: int, most: int, labels: Sequence[int | None] | None = None) -> tuple[list[int], int]:
    """Which of `length` samples a grid of at most `most` shows, and how many it has in a row.

    They are spread evenly. Of samples with labels of several classes, for all of which there is room, equally many are
    of each, one class a row.
    """
    classes: dict[int, list[int]] = {}
    for i, label in enumerate(labels or ()):
        if label is not None:
            classes.setdefault(label, []).append(i)
    if not 2 <= len(classes) <= most:
        return _spread(range(length), most), COLUMNS
    each = min(most // len(classes), *map(len, classes.values()))
    return [i for label in sorted(classes) for i in _spread(classes[label], each)], each


def _spread(among: Sequence[int], most: int) -> list[int]:
    count = min(most, len(among))
    return [among[i * len(among) // count] for i in range(count)]


def as_png(pixels: np.ndarray) -> bytes:
    """The file of uint8 pixels (H, W, 3)."""
    content = BytesIO()
    Image.fromarray(pixels).save(content, format="PNG")
    return content.getvalue()

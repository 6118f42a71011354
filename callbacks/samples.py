"""Pictures beside the prompts they were made for."""

import textwrap
from io import BytesIO

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from metrics.images import quantise


def draw_grid(images: Tensor, captions: list[str], columns: int = 4, side: int = 160) -> Image.Image:
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


def as_png(pixels: np.ndarray) -> bytes:
    """The file of uint8 pixels (H, W, 3)."""
    content = BytesIO()
    Image.fromarray(pixels).save(content, format="PNG")
    return content.getvalue()

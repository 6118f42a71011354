"""Small sets of class folders, as DreamBooth reads them."""

from pathlib import Path

import numpy as np
from PIL import Image


def write_pictures(folder: Path, count: int, size: tuple[int, int] = (40, 48), first: int = 0) -> None:
    """`count` pictures of noise, p0.png, p1.png, …, each other noise."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(first, first + count):
        pixels = np.random.default_rng([count, index]).integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"p{index}.png")


def write_classes(root: Path, class_pictures: int = 0) -> Path:
    """Folders `mild` of 4 and `normal` of 6 pictures; beside root that many class pictures of each."""
    for label, count in {"mild": 4, "normal": 6}.items():
        write_pictures(root / label, count)
        if class_pictures:
            write_pictures(root.with_name(f"{root.name}-class") / label, class_pictures, first=100)
    return root

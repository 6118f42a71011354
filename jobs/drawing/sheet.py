"""A contact sheet: what a call drew, each beside what steered it."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from callbacks.samples import draw_grid
from datamodules.batches import CONTROL_CHANNELS
from jobs.drawing.asked import Asked
from jobs.drawing.kept import Picture
from medsynth.errors import UserError
from medsynth.files import naming_unwritten, put_whole

MOST, COLUMNS = 64, 8
"""Pictures of a sheet, and of a row."""


def check_sheet(path: Path, out: Path) -> None:
    """Raise UserError where a sheet cannot be there."""
    if path.suffix.lower() != ".png":
        raise UserError(f"--sheet: {path} is to be a PNG file: end its name in .png")
    if out.resolve() in path.resolve().parents:
        raise UserError(f"--sheet: {path} would lie among the samples; name a file outside of {out}")
    if not path.parent.is_dir():
        raise UserError(f"--sheet: there is no folder {path.parent}")


def write_sheet(path: Path, pictures: Sequence[Picture], asked: Asked) -> int:
    """Write the first pictures with their words, each right of what steered it, of classes a row for each; returns how
    many there are."""
    shown, columns = _rows_of_classes(pictures)
    drawn = torch.stack([_pixels(picture.path) for picture in shown])
    sides = [*_steering(asked, [picture.row for picture in shown]), drawn]
    captions = [picture.texts.get("prompt", picture.texts.get("label", picture.path.stem)) for picture in shown]
    content = io.BytesIO()
    draw_grid(torch.cat(sides, dim=3), captions, columns).save(content, format="PNG")
    with naming_unwritten(f"--sheet: {path}"):
        put_whole(path, content.getvalue())
    return len(shown)


def _rows_of_classes(pictures: Sequence[Picture]) -> tuple[list[Picture], int]:
    """The pictures that are shown, and how many are in a row: of several classes equally many, each in its own row."""
    classes: dict[str | None, list[Picture]] = {}
    for picture in pictures:
        classes.setdefault(picture.texts.get("label"), []).append(picture)
    if len(classes) < 2:
        return list(pictures[:MOST]), COLUMNS
    columns = min(COLUMNS, *map(len, classes.values()))
    rows = list(classes.values())[: MOST // columns]
    return [picture for row in rows for picture in row[:columns]], columns


def _pixels(path: Path) -> Tensor:
    with Image.open(path) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1) / 255


def _steering(asked: Asked, rows: list[int]) -> list[Tensor]:
    """What steers those rows, (n, 3, R, R) each."""
    control = asked.rows(rows).control if asked.steering else None
    if control is None:
        return []
    parts = dict(
        zip(asked.controls, control.split([CONTROL_CHANNELS[kind] for kind in asked.controls], 1), strict=True)
    )
    return [parts[kind].expand(-1, 3, -1, -1) for kind in asked.steering]

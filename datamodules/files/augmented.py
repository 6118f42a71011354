"""Writes class folders again, with varied copies of their pictures until each class has as many as asked for."""

from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from datamodules.files.affine import draw_affine
from datamodules.files.detection import require_class_pictures
from datamodules.files.entries import Entry
from datamodules.files.layouts import Catalogue, read_catalogue
from datamodules.files.pictures import read_picture
from datamodules.files.raster import MOST_PIXELS
from datamodules.files.walk import stem, walk
from medsynth.errors import UserError
from medsynth.files import new_folder

GROUP = r"^(.+?)(?:\+\d+)?\.[^.]+$"
"""`data.group` of what is written: a picture and its copies, `1.png`, `1+0001.png`, …, on one side of the split."""


@dataclass(frozen=True)
class Recipe:
    """How copies are varied. per_class: pictures of each class in the end. probability: of a rotation, a flip and a
    zoom, each by itself. rotation: degrees, at most, to either side. zoom: factor, at most. seed: fixes all of it."""

    per_class: int
    probability: float = 0.5
    rotation: float = 10.0
    zoom: float = 1.5
    seed: int = 0


def augment(source: Path, out: Path, recipe: Recipe, on_progress: Callable[[int, int], None] | None = None) -> int:
    """Write the class folders `source` to the folder `out` with varied copies; returns how many those are.

    All files of `source` are there with the same bytes. A class's pictures are varied in turn: copy k of `a/1.png` is
    `a/1+000k.png`, with its caption `a/1.txt` where there is one, and follows from the seed, its name and k. Where
    there are folders of a split, only training pictures are varied. `out` appears when it is complete.

    Raises:
        UserError: `source` has no class folders, a class no picture or more than are asked for, or a picture cannot be
            read; `out` lies in `source`, is not empty or not to be written.
    """
    if source.resolve() in (out.resolve(), *out.resolve().parents):
        raise UserError(f"{out} lies in DATA, whose folders are classes: choose another OUT")
    catalogue = read_catalogue(source, "folders", texts=False, key="DATA")
    if bad := [table for table in catalogue.splits.values() if table.faults]:
        raise UserError("\n".join(table.report("mend or remove them, then augment again") for table in bad))
    plans = _plan(catalogue, source, recipe.per_class)
    files, copies = walk(source), sum(len(plan) for plan in plans.values())
    with new_folder(out, "OUT") as folder:
        for name in files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((source / name).read_bytes())
        done = 0
        for plan in plans.values():
            for name, number in plan:
                _write_copy(source, folder, name, number, recipe)
                done += 1
                if on_progress:
                    on_progress(done, copies)
    return copies


def _plan(catalogue: Catalogue, source: Path, per_class: int) -> dict[str, list[tuple[str, int]]]:
    """The copies of each class: which picture, and the number of its copy from 1."""
    table = catalogue.splits.get("train", catalogue.splits.get(""))
    entries: list[Entry] = [] if table is None else list(table.rows.values())
    classes: dict[str, list[str]] = {}
    for entry in entries:
        classes.setdefault(entry.label, []).append(entry.name)
    require_class_pictures(source, classes, "DATA")
    plans = {}
    for label, names in sorted(classes.items()):
        if len(names) > per_class:
            raise UserError(
                f"--per-class {per_class}: class {label} has {len(names)} pictures already, and all are kept: give at "
                f"least {max(map(len, classes.values()))}"
            )
        missing = per_class - len(names)
        plans[label] = [(names[i % len(names)], i // len(names) + 1) for i in range(missing)]
    return plans


def _write_copy(source: Path, folder: Path, name: str, number: int, recipe: Recipe) -> None:
    rng = np.random.default_rng([recipe.seed, number, *name.encode(errors="surrogateescape")])
    affine = draw_affine(rng, recipe.probability, recipe.rotation, recipe.zoom)
    picture = affine.apply(read_picture(source / name, MOST_PIXELS))
    place = folder / f"{stem(name)}+{number:04}.png"
    if place.exists():
        raise UserError(f"DATA: {place.relative_to(folder)} is there already, where a copy is to be: rename it")
    content = BytesIO()
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(content, format="PNG")
    place.write_bytes(content.getvalue())
    caption = source / f"{stem(name)}.txt"
    if caption.is_file():
        place.with_suffix(".txt").write_bytes(caption.read_bytes())

"""Pictures that are scored out of folders, and what is said of their sizes."""

from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.base import REFERENCE_READING, SizedDataset
from datamodules.files.images import SUFFIXES, Geometry
from datamodules.files.pictures import picture_size, read_picture
from datamodules.files.raster import MOST_PIXELS
from datamodules.files.walk import PictureFolder, not_read, walk
from datamodules.stream import PlainLoader
from jobs.drawing.listed import control_folders
from medsynth.errors import UserError
from medsynth.files import sha256_of

Sizes = Counter[tuple[int, int]]
"""How many pictures are of each width and height."""


@dataclass
class Reading:
    """How files become pictures; see `datamodules.captioned.CaptionedConfig`. resolution None: as they lie."""

    resolution: int | None = None
    square: str = "crop"
    sixteen_bit: str = "full"
    window: tuple[float, float] | None = None

    def facts(self) -> dict[str, Any]:
        """As a protocol has them."""
        return {**vars(self), "reading": REFERENCE_READING}


class ScoredFolder(SizedDataset):
    """Index -> uint8 (3, H, W) of a folder's pictures, in the order of their names."""

    def __init__(self, folder: Path, reading: Reading):
        """Find the pictures, at any depth; what steered others is left out.

        Raises:
            UserError: there is no such folder, or no picture in it.
        """
        if not folder.is_dir():
            raise UserError(f"there is no folder {folder}")
        names = walk(folder)
        found = PictureFolder(folder, dicom=True, files=names)
        steered = control_folders(folder, names)
        paths = (folder / name for name in found.names())
        self.folder, self.reading = folder, reading
        self.paths = sorted(path for path in paths if steered.isdisjoint(path.parents))
        self.notes = [f"{folder}: {note}" for note in not_read(found.others)]
        if not self.paths:
            raise UserError(f"{folder} holds no pictures ({', '.join(sorted(SUFFIXES))})")

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        how = self.reading
        picture = read_picture(self.paths[index], MOST_PIXELS, 0, how.sixteen_bit, how.window)
        return Geometry(how.resolution, how.square).apply(picture) if how.resolution else picture

    def sizes(self) -> Sizes:
        """By the headers, which also show before the work what cannot be read."""
        with ThreadPoolExecutor() as pool:
            return Counter(pool.map(lambda path: picture_size(path, MOST_PIXELS), self.paths))


def same_bytes(one: ScoredFolder, two: ScoredFolder) -> int:
    """How many files of `two` are byte for byte files of `one`; only files of one length are read."""
    lengths = {path.stat().st_size for path in one.paths}
    alike = [path for path in two.paths if path.stat().st_size in lengths]
    wanted = {path.stat().st_size for path in alike}
    digests = {sha256_of(path) for path in one.paths if path.stat().st_size in wanted}
    return sum(sha256_of(path) in digests for path in alike)


def side_of(sizes: Sizes) -> int | None:
    """The side, where all are squares of one."""
    sides = {side for size in sizes for side in size}
    return sides.pop() if len(sides) == 1 else None


def described(sizes: Sizes) -> str:
    """Sizes for people."""
    least, most = (f"{width}×{height}" for width, height in (min(sizes), max(sizes)))
    return least if len(sizes) == 1 else f"{len(sizes)} sizes from {least} to {most}"


def said_of_sizes(real: Sizes, fake: Sizes, resolution: int | None, square: str) -> list[str]:
    """What the scores depend on and a reader would not guess."""
    sizes = f"real pictures {described(real)}, generated {described(fake)}"
    if resolution is None:
        advice = "--resolution R makes all R×R, and so comparable with training's evaluation"
        return [f"{sizes}: scored as they are; {advice}"] if len(real | fake) > 1 else []
    if set(real | fake) == {(resolution, resolution)}:
        return []
    moved = f"{sizes}: all scored at {resolution}×{resolution} (--square {square})"
    also = "" if side_of(fake) == resolution else "; training's evaluation scores generated pictures as they are drawn"
    return [moved + also]


def stream(
    pictures: Dataset[Tensor], update: Callable[[Sequence[Tensor], Tensor], None], title: str, batch_size: int,
    workers: int,
) -> None:  # fmt: skip
    """Read all pictures, in order, and give them to `update` with their places, int64 (n,)."""
    total = len(pictures)  # pyrefly: ignore[bad-argument-type]  # a Dataset need not say its length; these do
    loader = PlainLoader(pictures, batch_size=batch_size, num_workers=workers, collate_fn=list)
    first = 0
    with torch.no_grad(), Progress(transient=True) as progress:
        task = progress.add_task(title, total=total)
        for batch in loader:
            update(batch, torch.arange(first, first + len(batch)))
            first += len(batch)
            progress.update(task, completed=first)

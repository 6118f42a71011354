"""The folder that a call fills: which pictures it makes, which are there, and the drawing of the others."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

from datamodules.batches import Conditions
from datamodules.stream import derive_seed
from jobs.drawing.asked import Asked
from jobs.drawing.kept import (
    Picture,
    control_path,
    control_texts,
    is_kept,
    refuse_strangers,
    write_manifest,
    write_picture,
)
from lightning_modules.base import GenerativeModule
from metrics.images import quantise


class Folder:
    """`out` as a call leaves it: pictures by the names of `asked`, what steered them beside, and the list of all."""

    def __init__(self, out: Path, asked: Asked, facts: Mapping[str, str], seed: int, seeds: int = 1):
        """facts: text fields of every picture. seed: of the call. seeds: pictures of each row."""
        self.out, self.asked, self.pictures = out, asked, list[Picture]()
        self._whole: set[Path] = set()
        for row, (name, texts) in enumerate(zip(asked.names, asked.texts, strict=True)):
            for variant in range(seeds):
                # The first of several is the one that there would be alone.
                noise_seed = derive_seed(seed, "sample", row, *([variant] if variant else []))
                own = {"seed": str(seed), "row": str(row), "noise_seed": str(noise_seed)}
                own |= {"variant": str(variant)} if seeds > 1 else {}
                path = out / (f"{name}-s{variant}.png" if seeds > 1 else f"{name}.png")
                self.pictures.append(Picture(path, {**facts, **texts, **own, "synthetic": "true"}, row, noise_seed))

    def missing(self) -> list[Picture]:
        """The pictures that are not there, or damaged.

        Raises:
            UserError: the folder holds a picture that this call does not make, or one made of something else.
        """
        beside = [control_path(self.out, kind, p.path) for p in self.pictures for kind in self.asked.steering]
        refuse_strangers(self.out, [*(picture.path for picture in self.pictures), *beside])
        self._whole = {picture.path for picture in self.pictures if self._is_kept(picture)}
        return [picture for picture in self.pictures if picture.path not in self._whole]

    def _is_kept(self, picture: Picture) -> bool:
        kinds = self.asked.steering
        beside = [(control_path(self.out, kind, picture.path), control_texts(kind, picture.texts)) for kind in kinds]
        # Each is looked at, also where one is missing: none that was made of something else is written over.
        kept = [is_kept(path, texts) for path, texts in [(picture.path, picture.texts), *beside]]
        return all(kept)

    @contextmanager
    def listing(self) -> Iterator[None]:
        """Lists what is there and whole, before and after the block, also where that is broken off."""
        self._list()
        try:
            yield
        finally:
            self._list()

    def _list(self) -> None:
        whole = [picture for picture in self.pictures if picture.path in self._whole]
        write_manifest(self.out, whole, self.asked.steering)

    def write(self, picture: Picture, pixels_HWC: Tensor, conditions: Conditions) -> None:
        """Write a picture, uint8 (R, R, 3), and before it what of its row of conditions steered it."""
        for kind, control in self.asked.control_pictures(conditions).items():
            write_picture(control_path(self.out, kind, picture.path), control, control_texts(kind, picture.texts))
        write_picture(picture.path, pixels_HWC.numpy(), picture.texts)
        self._whole.add(picture.path)


def draw(module: GenerativeModule, folder: Folder, missing: Sequence[Picture], batch_size: int, **how: Any) -> None:
    """Draw and write those pictures; how: steps and guidance."""
    chunks = [missing[i : i + batch_size] for i in range(0, len(missing), batch_size)]
    for chunk in track(chunks, "sampling", transient=True):
        conditions = folder.asked.rows([picture.row for picture in chunk])
        with torch.no_grad():
            images = module.sample(conditions.to(module.device), [picture.noise_seed for picture in chunk], **how)
        for i, pixels in enumerate(quantise(images).permute(0, 2, 3, 1).cpu()):
            folder.write(chunk[i], pixels, conditions[[i]])

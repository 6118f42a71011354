"""Canine hips: radiographs with captions that give the Norberg angles, in any of the four layouts of `layouts.py`.

The same module reads any set of pictures with one caption each, a hundred shards of them as well.
"""

import json
from dataclasses import dataclass
from io import BytesIO
from typing import Optional

from torch import Tensor

from datamodules.captioned import CaptionedConfig, CaptionedDataModule, Contents, Pair, Progress, picture_names
from datamodules.files.images import check_header, decode_rgb
from datamodules.files.layouts import LAYOUTS, SPLITS, read_catalogue
from datamodules.files.pictures import Pictures, shown_by
from datamodules.files.shards import Shards
from datamodules.files.tables import Table, drop_bad_rows
from medsynth.errors import UserError
from medsynth.ranges import choice

_HEADER = 1 << 16  # bytes in which nearly every picture's header ends


@dataclass
class CanineHipConfig(CaptionedConfig):
    """Which radiographs and captions are trained on, and how they are varied."""

    name: str = "canine_hip"
    """This data set's name."""
    layout: str = choice("auto", ("auto", *LAYOUTS))
    """metadata, folders, pairs or webdataset; `auto` looks which it is, and refuses what may be two of them."""
    caption: Optional[str] = None
    """Template of every caption, such as "ventrodorsal canine pelvic radiograph, {label}": {label} is the class,
    {norberg_left:.0f} a fact of the picture; none: each picture's own caption, in class folders the class's name."""
    square: str = "pad"
    validation_images: int = 31
    """Pictures that are held out for validation, drawn by seed; a folder `validation` takes their place."""


class CanineHip(CaptionedDataModule[CanineHipConfig]):
    """One pair a picture. Folders `train`, `validation` and `test`, where there are such, are the split.

    Of the counts that `check` gives, "test pictures" are those that neither train nor validate.
    """

    Config = CanineHipConfig

    def _read(self, on_progress: Progress | None) -> Contents:
        config = self.config
        catalogue = read_catalogue(self._root, config.layout, texts=config.caption is None)
        pictures = ShardPictures(catalogue.shards, config) if catalogue.shards else Pictures(self._root, config)
        self.reject_faults(catalogue.splits.values(), pictures, on_progress)
        if config.caption is not None:
            for table in catalogue.splits.values():
                _fill_in(config.caption, table)
        groups = self.groups(catalogue.splits.values(), lambda entry: (entry.name, entry.columns()))
        skipped = drop_bad_rows(list(catalogue.splits.values()), config.on_bad)

        pairs = {split: _pairs(table) for split, table in catalogue.splits.items()}
        train, val, test = (pairs.get(split, []) for split in SPLITS)
        if not val:
            train, val = self.split(pairs.get("", train), groups)
        summary = {
            "pictures": sum(map(len, pairs.values())),
            "captions": len({pair.prompt for split in pairs.values() for pair in split}),
            "train pictures": len(train),
            "validation pictures": len(val),
            "test pictures": len(test),
            "pictures without a row": len(catalogue.unlisted),
            "skipped samples": skipped,
        }
        notes = catalogue.notes()
        return Contents(train, val, pictures, summary, test=picture_names(test), groups=groups, notes=notes)


class ShardPictures(Pictures[CanineHipConfig]):
    """Pictures in tar shards."""

    def __init__(self, shards: Shards, config: CanineHipConfig):
        super().__init__(shards.root, config)
        self.shards = shards

    def open_picture(self, name: str, least_side: int = 0) -> Tensor:
        config, file = self.config, BytesIO(self.shards.read(name))
        show = shown_by(config.sixteen_bit, config.window)
        return decode_rgb(file, self._shown(name), config.max_pixels, least_side, show)

    def check_picture(self, name: str) -> None:
        if self.config.check == "all":
            self.open_picture(name, 2 * self.config.resolution)
            return
        try:
            check_header(BytesIO(self.shards.read(name, _HEADER)), self._shown(name), self.config.max_pixels)
        except UserError:
            check_header(BytesIO(self.shards.read(name)), self._shown(name), self.config.max_pixels)

    def length(self, name: str) -> int:
        return self.shards.size(name)

    def read(self, name: str, start: int = 0, count: int = -1) -> bytes:
        return self.shards.read(name, None if count < 0 else count, start)

    def _shown(self, name: str) -> str:
        return str(self.folder / name)


def _pairs(table: Table) -> list[Pair]:
    return [Pair(entry.name, entry.text) for entry in table.rows.values()]


def _fill_in(template: str, table: Table) -> None:
    """Make every caption from the template; an entry that lacks what it asks for is rejected."""
    for place, entry in list(table.rows.items()):
        try:
            entry.text = template.format_map({"label": entry.label} | json.loads(entry.facts or "{}"))
        except KeyError as error:
            table.reject(place, f"data.caption asks for {{{error.args[0]}}}, which {entry.name} does not have")
        except (ValueError, TypeError, IndexError, AttributeError) as error:
            raise UserError(f"data.caption={template!r} is no template for {entry.name}: {error}") from None

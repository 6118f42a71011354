"""Cytology: one folder of microscope pictures a class, with prompts from a template file.

    <root>/<class>/*.png         the pictures; a/1.txt beside a/1.png, where there is one, is its caption
    <root>/style_filewords.txt   lines such as "a stained smear of [filewords], in the style of [name]"

Folders `train`, `validation` and `test`, each with class folders, are the split.
"""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import PurePosixPath
from typing import Optional

import numpy as np

from datamodules.captioned import (
    CaptionedConfig,
    CaptionedDataModule,
    Contents,
    Pair,
    Progress,
    TrainingSet,
    picture_names,
)
from datamodules.files.affine import AffineGeometry, draw_affine
from datamodules.files.detection import require_class_pictures
from datamodules.files.layouts import SPLITS, Catalogue, Entry, read_catalogue
from datamodules.files.pictures import Pictures
from datamodules.files.tables import Table, drop_bad_rows
from datamodules.files.walk import stem
from datamodules.stream import derive_seed
from medsynth.errors import UserError, nearest
from medsynth.ranges import choice, number

_NAME, _FILEWORDS = "[name]", "[filewords]"
_PLACEHOLDER = re.compile(r"\[[^\[\]]*\]")


@dataclass
class CytologyConfig(CaptionedConfig):
    """Which pictures and prompts are trained on, and how they are varied."""

    name: str = "cytology"
    """This data set's name."""
    template: Optional[str] = "style_filewords.txt"
    """File of prompts, one a line, relative to root: [name] stands for `name_token`, [filewords] for the picture's
    caption. Training draws a line anew each pass, all else shows one line for each picture. None: the caption alone."""
    name_token: str = "cytology"
    """What [name] stands for: the word that the style is learned under."""
    filewords: str = choice("file", ("file", "class"))
    """A picture's caption: `file` takes the .txt beside it, else the words of its file's name without numbers, else its
    class; `class` always takes the class."""
    only_class: Optional[str] = None
    """The one class whose pictures train, validate and are references; none: all classes. Its label is then 0."""
    balance: bool = True
    """Show pictures of small classes more than once a pass, so that all classes have as many samples as the largest."""
    affine_probability: float = number(0.5, least=0, most=1)
    """Probability of each of the three changes of training pictures: rotation, flip, zoom."""
    rotation: float = number(10.0, least=0, most=180)
    """Largest angle of a rotation to either side, degrees; the picture grows just so far that no corner is empty."""
    zoom: float = number(1.5, least=1, most=10)
    """Largest factor of a zoom into the middle, 1 to 10."""
    flips: bool = True
    """Flip, left to right or upside down, whatever the caption: it names no places."""
    prompt_dropout: float = 0.0
    validation_images: int = 20


class Cytology(CaptionedDataModule[CytologyConfig]):
    """One pair a picture, with its class as label: the classes are numbered in the order of their names.

    The other lines of the template are the pair's paraphrases. Of the counts that `check` gives, "test pictures" are
    those that neither train nor validate.
    """

    Config = CytologyConfig

    def training_set(self) -> "CytologyTrainingSet":
        pairs = _balanced(self._contents.train) if self.config.balance else self._contents.train
        return CytologyTrainingSet(pairs, self._contents.pictures, self.config, self.seed)

    def _read(self, on_progress: Progress | None) -> Contents:
        catalogue = read_catalogue(self._root, "folders", texts=False, given=False)
        catalogue.use([self.config.template or ""])
        tables, pictures = catalogue.splits, Pictures(self._root, self.config)
        self._choose_class(catalogue)
        lines = self._template()
        for table in tables.values():
            self._caption(table, catalogue)
        self.reject_faults(tables.values(), pictures, on_progress)
        groups = self.groups(tables.values(), lambda entry: (entry.name, entry.columns()))
        skipped = drop_bad_rows(list(tables.values()), self.config.on_bad)

        classes = sorted({entry.label for table in tables.values() for entry in table.rows.values()})
        pairs = {split: self._pairs(table.rows.values(), lines, classes) for split, table in tables.items()}
        train, val, test = (pairs.get(split, []) for split in SPLITS)
        if not val:
            train, val = self.split(pairs.get("", train), groups)
        everything = [pair for split in pairs.values() for pair in split]
        members = Counter(pair.label for pair in everything)
        summary = {
            "pictures": len(everything),
            **{f"pictures of {name}": members[label] for label, name in enumerate(classes)},
            "prompts": len({prompt for pair in everything for prompt in (pair.prompt, *pair.paraphrases)}),
            "train pictures": len(picture_names(train)),
            "validation pictures": len(picture_names(val)),
            "test pictures": len(test),
            "skipped samples": skipped,
        }
        if self.config.balance and len(classes) > 1:
            summary["samples of each class a pass"] = max(Counter(pair.label for pair in train).values())
        trained = {pair.label for pair in train}
        untrained = [name for label, name in enumerate(classes) if label not in trained]
        return Contents(
            train, val, pictures, summary, classes=classes, test=picture_names(test), groups=groups,
            notes=catalogue.notes() + [f"class {name} has no picture that trains" for name in untrained],
        )  # fmt: skip

    def _choose_class(self, catalogue: Catalogue) -> None:
        """Leave the entries of `only_class` alone, where there is one."""
        tables, only = catalogue.splits.values(), self.config.only_class
        classes = {entry.label for table in tables for entry in table.rows.values()}
        if only is None:
            require_class_pictures(self._root, classes, "data.root")
            return
        if only not in classes:
            raise UserError(f"data.only_class={only}: {self._root} has no such class{nearest(only, classes)}")
        for table in tables:
            table.rows = {place: entry for place, entry in table.rows.items() if entry.label == only}

    def _caption(self, table: Table, catalogue: Catalogue) -> None:
        """Make each entry's text its caption; an entry whose .txt cannot be read is rejected."""
        if self.config.filewords == "file":
            catalogue.use(stem(entry.name) + ".txt" for entry in table.rows.values())
        for place, entry in list(table.rows.items()):
            try:
                entry.text = entry.label if self.config.filewords == "class" else self._file_words(entry)
            except (OSError, UnicodeDecodeError):
                table.reject(place, f"{stem(entry.name)}.txt is no text in UTF-8")

    def _file_words(self, entry: Entry) -> str:
        beside = self._root / f"{stem(entry.name)}.txt"
        if beside.is_file() and (caption := " ".join(beside.read_text(encoding="utf-8-sig").split())):
            return caption
        if entry.text != entry.label:  # of extra.jsonl
            return entry.text
        return " ".join(re.findall(r"[^\W\d_]+", PurePosixPath(entry.name).stem)) or entry.label

    def _template(self) -> list[str]:
        """The different lines of the template."""
        if self.config.template is None:
            return [_FILEWORDS]
        path = self._root / self.config.template
        try:
            lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
        except FileNotFoundError:
            raise UserError(
                f'data.template: {path} is missing; write lines such as "a stained smear of [filewords], [name]", or '
                "set data.template=null for the captions alone"
            ) from None
        except (OSError, UnicodeDecodeError):
            raise UserError(f"data.template: {path} is no text in UTF-8") from None
        for place, line in enumerate(lines, 1):
            if strange := [found for found in _PLACEHOLDER.findall(line) if found not in (_NAME, _FILEWORDS)]:
                raise UserError(f"{path}: line {place}: {strange[0]} is not known; use {_NAME} and {_FILEWORDS}")
        if not any(lines):
            raise UserError(f"data.template: {path} has no lines")
        return [line for line in dict.fromkeys(lines) if line]

    def _pairs(self, entries: Iterable[Entry], lines: list[str], classes: list[str]) -> list[Pair]:
        numbers, pairs = {name: number for number, name in enumerate(classes)}, []
        for entry in entries:
            prompts = list(dict.fromkeys(self._filled(line, entry.text) for line in lines))
            shown = prompts.pop(derive_seed(self.seed, "template", entry.name) % len(prompts))
            pairs.append(Pair(entry.name, shown, tuple(prompts), label=numbers[entry.label]))
        return pairs

    def _filled(self, line: str, caption: str) -> str:
        values = {_NAME: self.config.name_token, _FILEWORDS: caption}
        return _PLACEHOLDER.sub(lambda found: values[found[0]], line)


class CytologyTrainingSet(TrainingSet[CytologyConfig]):
    """A training set whose prompts are drawn from a template and whose pictures are turned, flipped and zoomed."""

    def _draw(self, pass_: int, index: int) -> tuple[str, "AffineGeometry", np.random.Generator]:
        rng, config = np.random.default_rng(derive_seed(self.seed, "augment", pass_, index)), self.config
        caption = self._draw_caption(rng, self.pairs[index])
        place = rng.random()
        affine = draw_affine(rng, config.affine_probability, config.rotation, config.zoom, config.flips)
        geometry = AffineGeometry(config.resolution, config.square, place, **vars(affine))
        return caption, geometry, rng

    def _draw_caption(self, rng: np.random.Generator, pair: Pair) -> str:
        if rng.random() < self.config.prompt_dropout:
            return ""
        prompts = (pair.prompt, *pair.paraphrases)
        return prompts[rng.integers(len(prompts))]


def _balanced(pairs: list[Pair]) -> list[Pair]:
    """The pairs, those of smaller classes again and again until each class has as many as the largest."""
    by_class: dict[int | None, list[Pair]] = {}
    for pair in pairs:
        by_class.setdefault(pair.label, []).append(pair)
    most = max(map(len, by_class.values()))
    return [pair for members in by_class.values() for pair in islice(cycle(members), most)]

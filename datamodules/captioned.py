"""What every data set of pictures with captions shares: the split, the samples, and the check of every picture.

A data set is a `CaptionedDataModule` that reads its tables (`_read`) and, where its pictures are no plain files or have
masks, a `Pictures` that opens them.
"""

import hashlib
import json
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, ClassVar, Generic, Optional, TypeVar

import numpy as np
import torch
from torch import Tensor

from datamodules.base import DataConfig, ImageDataModule, SizedDataset, TrainingSamples, ValidationSamples
from datamodules.batches import Conditions, ImageBatch, Sample
from datamodules.files.images import Geometry, jitter, random_flips
from datamodules.files.pictures import SIXTEEN_BIT, Pictures, check_window
from datamodules.files.raster import MOST_PIXELS
from datamodules.files.tables import Table
from datamodules.splits import (
    Contents,
    Groups,
    Pair,
    Progress,
    hold_out,
    picture_names,
    read_groups,
)
from datamodules.stream import SampleOrder, SampleStream, derive_seed
from medsynth.errors import UserError
from medsynth.ranges import choice, number, numbers

_BLOCK = 1024  # pictures whose check is under way at once


@dataclass
class CaptionedConfig(DataConfig):
    """How pictures are made square and varied, which are held out, and what becomes of bad ones."""

    reads_dicom: ClassVar[bool] = False

    validation_images: int = number(200, least=1)
    """Pictures, with all their prompts, that are held out for validation, drawn by seed."""
    group: Optional[str] = None
    """What belongs together (a patient, study, video) and is never split between training, validation and test: a
    column of the table, or a regular expression of a picture's name whose groups, else whole match, are the group, as
    "^([^_]+)_" for patient7_3.png; none: each picture is by itself."""
    on_duplicates: str = choice("warn", ("warn", "fail"))
    """Pictures that are the same, byte for byte, on two sides of the split: `warn` counts and names them, `fail`
    stops."""
    square: str = choice("crop", ("crop", "pad"))
    """How a picture becomes square: `crop` takes the largest square, at random along the longer side in training and
    from the centre elsewhere; `pad` keeps the whole picture between black bars."""
    brightness: float = number(0.0, least=0)
    """Strength s of the brightness jitter: a factor from U[max(0, 1 - s), 1 + s]; 0 = off."""
    contrast: float = number(0.0, least=0)
    """Strength of the contrast jitter, likewise."""
    saturation: float = number(0.0, least=0)
    """Strength of the saturation jitter, likewise. Hue is never changed: prompts speak of colours."""
    prompt_dropout: float = number(0.1, least=0, most=1)
    """Probability that a training sample's prompt is dropped, that is becomes "" and trains the unconditional model."""
    flips: bool = False
    """Flip horizontally and vertically, each with probability 0.5, the training samples whose caption is ""; never the
    others: prompts speak of places."""
    on_bad: str = choice("fail", ("fail", "skip"))
    """Bad rows: `fail` lists them and stops; `skip` trains on the others."""
    check: str = choice("all", ("all", "headers"))
    """What is looked at before training: `all` decodes every picture; `headers` reads only how large each is."""
    max_pixels: int = number(100_000_000, least=1, most=MOST_PIXELS)
    """Pixels beyond which a picture counts as damaged or hostile and is not decoded."""
    sixteen_bit: str = choice("full", SIXTEEN_BIT)
    """Pictures of more than 8 bits: `full` shows them from 0 to the greatest value of their bits, and refuses 16 bits
    that hold 12 or less, whose white is another; `range` does not refuse them; `window` shows what `window` says."""
    window: Optional[list[float]] = numbers(None, count=2)
    """Centre and width of the values that are shown, for pictures of more than 8 bits with `sixteen_bit=window`; none:
    of grey ones from the 0.5th to the 99.5th percentile of each, of colours all as with `full`."""

    def __post_init__(self):
        check_window(self.window, used=self.reads_dicom or self.sixteen_bit == "window")


CaptionedT = TypeVar("CaptionedT", bound=CaptionedConfig)


class CaptionedDataModule(ImageDataModule[CaptionedT]):
    """Pairs of picture and prompt, split by picture so that no validation picture is ever trained on."""

    Config = CaptionedConfig
    shaping: ClassVar[tuple[str, ...]] = ("resolution", "square")
    """Config keys that change what reference pictures or prompts are, and so the fingerprint."""
    shaping_since: ClassVar[dict[str, Any]] = {"sixteen_bit": "full", "window": None}
    """Keys that came later, with the value that leaves a fingerprint as it was before."""

    def __init__(self, config: CaptionedT, seed: int = 0, batch_size: int = 1, accumulate: int = 1):
        super().__init__(config, seed, batch_size, accumulate)
        self._root = Path(config.root).expanduser()
        self._found: Contents | None = None
        self._fingerprint: str | None = None

    @abstractmethod
    def _read(self, on_progress: Progress | None) -> Contents:
        """Read the tables and check every picture; `faults` and `split` do most of it.

        Raises:
            UserError: as `check`.
        """

    def setup(self, stage: str | None = None) -> None:
        self.check()

    def check(self, on_progress: Progress | None = None) -> dict[str, int]:
        """Read the tables and look at every picture once; the first call does the work, later ones remember."""
        if self._found is None:
            found = self._read(on_progress)
            found.compare_sides(self.config.on_duplicates, on_progress)
            self._found = found
        return dict(self._found.summary)

    def notes(self) -> list[str]:
        return list(self._contents.notes)

    def fingerprint(self) -> str:
        """SHA-256 of each picture's name, bytes and split, of all prompts, and of the config in `shaping`.

        Bytes are counted, not read: a picture replaced by one of equal length goes unnoticed.
        """
        if self._fingerprint is None:
            found = self._contents
            splits = {"train": found.train, "val": found.val}
            content: dict[str, Any] = {
                "pictures": {k: [(n, *found.pictures.sizes(n)) for n in picture_names(v)] for k, v in splits.items()},
                "prompts": [(p.picture, p.prompt, p.paraphrases, p.is_prior) for p in [*found.train, *found.val]],
                "evaluation": found.evaluation,
                "config": self._shape(),
            }
            if self.config.group is not None:
                content["group"] = self.config.group
            self._fingerprint = hashlib.sha256(json.dumps(content).encode()).hexdigest()
        return self._fingerprint

    def _shape(self) -> list[Any]:
        config = self.config
        later = {key: getattr(config, key) for key in self.shaping_since if key not in self.shaping}
        changed = [[key, value] for key, value in later.items() if value != self.shaping_since[key]]
        return [getattr(config, key) for key in self.shaping] + changed

    def pictures_fingerprint(self) -> str:
        return self._contents.pictures_fingerprint()

    def training_set(self) -> "TrainingSet":
        return TrainingSet(self._contents.train, self._contents.pictures, self.config, self.seed)

    def validation_set(self) -> "ValidationSet":
        return ValidationSet(self._contents.val, self._contents.pictures, self.config, self.seed)

    def reference_set(self, split: str) -> "ReferenceSet":
        """See `ImageDataModule`; class pictures of a prior are no reference."""
        pairs = {"train": self._contents.train, "val": self._contents.val}
        pairs["all"] = pairs["train"] + pairs["val"]
        names = picture_names(pair for pair in pairs[split] if not pair.is_prior)
        return ReferenceSet(names, self._contents.pictures, self.config)

    def reading(self) -> dict[str, Any]:
        window = None if self.config.window is None else tuple(self.config.window)
        own = {"square": self.config.square, "sixteen_bit": self.config.sixteen_bit, "window": window}
        return super().reading() | own

    def evaluation_conditions(self, rows: int | Sequence[int]) -> Conditions:
        """Rows of one endless order, in which every prompt comes once before any comes again.

        The prompts, and the control where there is one, are those of the validation pairs, unless there are prompts for
        evaluation alone.
        """
        found, indices = self._contents, self._asked(range(rows) if isinstance(rows, int) else rows)
        if found.evaluation:
            return Conditions(captions=[found.evaluation[index] for index in indices])
        validation = ValidationSet(found.val, found.pictures, self.config, self.seed)
        samples = [validation.without_picture(index) for index in indices]
        labels = [sample.label for sample in samples if sample.label is not None]
        controls = [sample.control for sample in samples if sample.control is not None]
        return Conditions(
            captions=[sample.caption for sample in samples],
            labels=torch.tensor(labels) if labels else None,
            control=torch.stack(controls) if controls else None,
        )

    def paired_pictures(self, rows: Sequence[int]) -> Tensor:
        found = self._contents
        if found.evaluation:
            return super().paired_pictures(rows)
        reals = ReferenceSet([found.val[index].picture for index in self._asked(rows)], found.pictures, self.config)
        return torch.stack([reals[i] for i in range(len(reals))])

    def evaluation_length(self) -> int:
        return len(self._contents.evaluation or self._contents.val)

    def _asked(self, rows: Sequence[int]) -> list[int]:
        """Which of its prompts, or else of the validation pairs, each row of evaluation's order is."""
        order = SampleStream(self.evaluation_length(), derive_seed(self.seed, "evaluation"))
        return [order(row)[1] for row in rows]

    def all_captions(self) -> list[str]:
        pairs = self._contents.train + self._contents.val
        worded = {wording for pair in pairs for wording in (pair.prompt, *pair.paraphrases)}
        return sorted(worded.union(self._contents.evaluation or (), [""]))

    def split_facts(self) -> dict[str, Any]:
        found = self._contents
        split = {"seed": self.seed, "train": picture_names(found.train), "val": picture_names(found.val)}
        split |= {"classes": found.classes} if found.classes else {}
        split |= {"mask_levels": found.mask_levels} if found.mask_levels else {}
        return split | ({"group": self.config.group} if self.config.group is not None else {})

    @property
    def _contents(self) -> Contents:
        self.check()
        assert self._found is not None
        return self._found

    def faults(self, pictures: Pictures, names: Sequence[str], on_progress: Progress | None) -> dict[str, str]:
        """What is wrong with each of the pictures that cannot be read, by name.

        `on_progress(done, total)` hears of each. Threads suffice: Pillow decodes outside the GIL.
        """

        def fault(name: str) -> str | None:
            try:
                pictures.check_picture(name)
            except UserError as error:
                return str(error).removeprefix(f"{self._root}/")
            return None

        found: dict[str, str] = {}
        with ThreadPoolExecutor() as pool:
            for first in range(0, len(names), _BLOCK):
                block = names[first : first + _BLOCK]
                for done, (name, why) in enumerate(zip(block, pool.map(fault, block), strict=True), first + 1):
                    if why:
                        found[name] = why
                    if on_progress:
                        on_progress(done, len(names))
        return found

    def reject_faults(self, tables: Iterable[Table], pictures: Pictures, on_progress: Progress | None) -> None:
        """Reject the entries (`layouts.Entry`) of the tables whose pictures cannot be read."""
        places = {entry.name: (table, place) for table in tables for place, entry in table.rows.items()}
        for name, why in self.faults(pictures, list(places), on_progress).items():
            table, place = places[name]
            table.reject(place, why)

    def groups(
        self, tables: Iterable[Table], look: Callable[[Any], tuple[str, Mapping[str, Any]]]
    ) -> dict[str, str] | None:
        """The group of each picture of the tables' rows, see `read_groups`; None where `data.group` is none."""
        return None if self.config.group is None else read_groups(self.config.group, tables, look)

    def split(
        self, pairs: list[Pair], groups: Groups | None = None, decided: dict[str, bool] | None = None
    ) -> tuple[list[Pair], list[Pair]]:
        """Pairs that train, pairs that validate, see `hold_out`. Class pictures of a prior all train.

        Raises:
            UserError: no picture is left to train on.
        """
        names, held_out = picture_names(p for p in pairs if not p.is_prior), self.config.validation_images
        if held_out >= len(names):
            raise UserError(f"data.validation_images={held_out} leaves none of the {len(names)} pictures to train on")
        val = hold_out(names, held_out, self.seed, groups, decided)
        if len(val) == len(names):
            raise UserError(f"data.group leaves none of {len(names)} pictures, such as {names[0]}, to train on")
        return [p for p in pairs if p.picture not in val], [p for p in pairs if p.picture in val]


class _CaptionedSet(Generic[CaptionedT]):
    def __init__(self, pairs: list[Pair], pictures: Pictures, config: CaptionedT, seed: int):
        self.pairs, self.pictures, self.config, self.seed = pairs, pictures, config, seed

    def __len__(self) -> int:
        return len(self.pairs)


class TrainingSet(_CaptionedSet[CaptionedT], TrainingSamples):
    """Stream position -> one augmented sample.

    Augmentation is drawn from (seed, pass, index), the noise seed from (seed, position): what a sample looks like in a
    pass does not depend on when its turn comes, so that it can be encoded beforehand.
    """

    def __init__(self, pairs: list[Pair], pictures: Pictures, config: CaptionedT, seed: int):
        super().__init__(pairs, pictures, config, seed)
        self.stream: SampleOrder = SampleStream(len(pairs), seed)

    def __getitem__(self, position: int) -> ImageBatch:
        return self.sample(*self.stream(position)).row(derive_seed(self.seed, "noise", position))

    def sample(self, pass_: int, index: int) -> Sample:
        """Sample `index` as that pass shows it."""
        pair, config = self.pairs[index], self.config
        caption, geometry, rng = self._draw(pass_, index)
        square = self.pictures.squared(pair.picture, geometry)
        control = self._control(pass_, index, geometry, lambda: square)
        picture = jitter(square.float() / 255, rng, config.brightness, config.contrast, config.saturation)
        return pair.sample(picture, caption, control)

    def without_picture(self, pass_: int, index: int) -> Sample:
        """`sample` with the picture None; it is read only where the control needs it."""
        pair = self.pairs[index]
        caption, geometry, _ = self._draw(pass_, index)
        read = cache(partial(self.pictures.squared, pair.picture, geometry))
        return pair.sample(None, caption, self._control(pass_, index, geometry, read))

    def _draw(self, pass_: int, index: int) -> tuple[str, Geometry, np.random.Generator]:
        """Caption and geometry, and the generator that draws the rest."""
        rng, config = np.random.default_rng(derive_seed(self.seed, "augment", pass_, index)), self.config
        caption = self._draw_caption(rng, self.pairs[index])
        place = rng.random()
        flips = random_flips(rng) if config.flips and not caption else ()
        return caption, Geometry(config.resolution, config.square, place, flips), rng

    def _draw_caption(self, rng: np.random.Generator, pair: Pair) -> str:
        return "" if rng.random() < self.config.prompt_dropout else pair.prompt

    def _control(self, pass_: int, index: int, geometry: Geometry, read: Callable[[], Tensor]) -> Tensor | None:
        # A generator of its own: the control is the same whether or not the picture was varied before it.
        rng = np.random.default_rng(derive_seed(self.seed, "control", pass_, index))
        return self.pictures.control(self.pairs[index].picture, geometry, read, rng)


class ValidationSet(_CaptionedSet[CaptionedConfig], ValidationSamples):
    """Index -> one sample without augmentation, with the picture's own prompt; -1 is padding."""

    def __getitem__(self, index: int) -> ImageBatch:
        return self.sample(index).row(self.noise_seed(index))

    def sample(self, index: int) -> Sample:
        """Sample `index`."""
        pair, geometry = self.pairs[index], Geometry(self.config.resolution, self.config.square)
        square = self.pictures.squared(pair.picture, geometry)
        control = self.pictures.control(pair.picture, geometry, lambda: square, None)
        return pair.sample(square.float() / 255, pair.prompt, control)

    def without_picture(self, index: int) -> Sample:
        """`sample` with the picture None; it is read only where the control needs it."""
        pair, geometry = self.pairs[index], Geometry(self.config.resolution, self.config.square)
        read = cache(partial(self.pictures.squared, pair.picture, geometry))
        control = self.pictures.control(pair.picture, geometry, read, None)
        return pair.sample(None, pair.prompt, control)

    def noise_seed(self, index: int) -> int:
        """The seed of sample `index`; -1 for padding."""
        return -1 if index < 0 else derive_seed(self.seed, "validation", index)


class ReferenceSet(SizedDataset):
    """Index -> one distinct picture, uint8 (3, R, R), made square as for validation.

    Each is decoded whole, as `medsynth evaluate` does: a JPEG decoded at a fraction, which is good for training, is
    filtered otherwise, and a score would change with the size of the files.
    """

    def __init__(self, names: list[str], pictures: Pictures, config: CaptionedConfig):
        self.names, self.pictures, self.config = names, pictures, config

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Tensor:
        geometry = Geometry(self.config.resolution, self.config.square)
        return geometry.apply(self.pictures.open_picture(self.names[index]))

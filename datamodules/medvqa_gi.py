"""MEDVQA-GI: colonoscopy pictures, each with about ten prompts (`Generate an image with 1 polyp.`).

On disk: `<root>/images/` and `<root>/prompt-gt.csv` with the columns Filename (the suffix may be left out) and Prompt,
in any order, separated by `;` or `,`; a further column Paraphrase may give another wording of the row's prompt.
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Optional

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.base import Conditions, DataConfig, ImageBatch, ImageDataModule, SampleStream, derive_seed
from datamodules.images import MOST_PIXELS, PictureFolder, crop_square, jitter, pad_square, random_flips, read_rgb
from datamodules.tables import Table, drop_bad_rows, read_table
from medsynth.errors import UserError

Progress = Callable[[int, int], None]

_CHOICES = {
    "samples": ("pairs", "images"),
    "square": ("crop", "pad"),
    "paraphrase_strategy": ("add", "replace_some", "replace_all"),
    "on_bad": ("fail", "skip"),
}


@dataclass
class MedVQAGIConfig(DataConfig):
    """Which pictures and prompts are trained on, and how they are varied."""

    name: str = "medvqa_gi"
    """This data set's name."""
    csv: str = "prompt-gt.csv"
    """CSV file of pictures and prompts, relative to root."""
    images: str = "images"
    """Folder of the pictures, relative to root."""
    samples: str = "pairs"
    """What one sample is: `pairs` a picture with one of its prompts; `images` a picture, as an autoencoder needs, whose
    caption is "" in training and the picture's first prompt in validation."""
    validation_images: int = 200
    """Pictures, with all their prompts, that are held out for validation, drawn by seed."""
    square: str = "crop"
    """How a picture becomes square: `crop` takes the largest square, at random along the longer side in training and
    from the centre elsewhere; `pad` keeps the whole picture between black bars."""
    brightness: float = 0.4
    """Strength s of the brightness jitter: a factor from U[max(0, 1 - s), 1 + s]; 0 = off."""
    contrast: float = 0.4
    """Strength of the contrast jitter, likewise."""
    saturation: float = 0.4
    """Strength of the saturation jitter, likewise. Hue is never changed: prompts speak of colours."""
    prompt_dropout: float = 0.2
    """Probability that a training sample's prompt is dropped, that is becomes "" and trains the unconditional model."""
    flips: bool = True
    """Flip horizontally and vertically, each with probability 0.5, the training samples whose caption is ""; never the
    others: prompts speak of places."""
    paraphrases: Optional[str] = None
    """CSV file with the columns Prompt and Paraphrase, one or more rows a prompt, relative to root; none: only those in
    a Paraphrase column of `csv`."""
    paraphrase_strategy: str = "add"
    """`add` trains on every paraphrase as a further pair; `replace_all` shows one of a prompt's paraphrases, drawn anew
    each time, in the prompt's place; `replace_some` does so with `paraphrase_probability`."""
    paraphrase_probability: float = 0.5
    """Probability that `replace_some` replaces the prompt of a sample."""
    test_prompts: Optional[str] = None
    """CSV file with a column Prompt, relative to root: the prompts evaluation asks for; none: those of the validation
    pictures."""
    on_bad: str = "fail"
    """Bad rows: `fail` lists them and stops; `skip` trains on the others."""
    max_pixels: int = 100_000_000
    """Pixels beyond which a picture counts as damaged or hostile and is not decoded."""

    def __post_init__(self):
        for key, choices in _CHOICES.items():
            if getattr(self, key) not in choices:
                raise UserError(f"data.{key}={getattr(self, key)}: must be one of {', '.join(choices)}")
        for key in ("prompt_dropout", "paraphrase_probability"):
            if not 0 <= getattr(self, key) <= 1:
                raise UserError(f"data.{key}={getattr(self, key)}: must lie between 0 and 1")
        for key in ("brightness", "contrast", "saturation"):
            if getattr(self, key) < 0:
                raise UserError(f"data.{key}={getattr(self, key)}: must not be negative")
        for key in ("resolution", "validation_images", "max_pixels"):
            if getattr(self, key) < 1:
                raise UserError(f"data.{key}={getattr(self, key)}: must be at least 1")
        if self.max_pixels > MOST_PIXELS:
            raise UserError(f"data.max_pixels={self.max_pixels}: must be at most {MOST_PIXELS}")


@dataclass(frozen=True)
class Pair:
    """A picture (its path below the images folder), one of its prompts, and other wordings of that prompt."""

    picture: str
    prompt: str
    paraphrases: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Contents:
    """What `check` found: pairs by split, the prompts evaluation draws from, and the counts it reports."""

    train: list[Pair]
    val: list[Pair]
    evaluation_prompts: list[str]
    summary: dict[str, int]


class MedVQAGI(ImageDataModule):
    """Pairs of picture and prompt, split by picture so that no validation picture is ever trained on."""

    Config = MedVQAGIConfig
    config: MedVQAGIConfig

    def __init__(self, config: MedVQAGIConfig, seed: int = 0, batch_size: int = 1, accumulate: int = 1):
        super().__init__(config, seed, batch_size, accumulate)
        self._root = Path(config.root).expanduser()
        self._images = self._root / config.images
        self._found: _Contents | None = None

    def setup(self, stage: str | None = None) -> None:
        self.check()

    def check(self, on_progress: Progress | None = None) -> dict[str, int]:
        """Read the CSV files and decode every picture once; the first call does the work, later ones remember.

        `on_progress(done, total)` hears of each picture. "pairs" are the good rows; those that repeat a picture's
        prompt are counted as "duplicate rows" and kept. "pictures without a row" lie in the folder unused.
        """
        if self._found is None:
            self._found = self._read(on_progress)
        return dict(self._found.summary)

    def fingerprint(self) -> str:
        """SHA-256 of each picture's name, bytes and split, of all prompts, and of the config that shapes the pictures.

        Bytes are counted, not read: a picture replaced by one of equal length goes unnoticed.
        """
        found = self._contents
        pictures = {split: _pictures(pairs) for split, pairs in (("train", found.train), ("val", found.val))}
        content = {
            "pictures": {k: [(name, (self._images / name).stat().st_size) for name in v] for k, v in pictures.items()},
            "prompts": [(p.picture, p.prompt, p.paraphrases) for p in [*found.train, *found.val]],
            "evaluation": found.evaluation_prompts,
            "config": [getattr(self.config, key) for key in ("resolution", "square", "samples", "paraphrase_strategy")],
        }
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def training_set(self) -> "TrainingSet":
        return TrainingSet(self._training_pairs(), self._images, self.config, self.seed)

    def validation_set(self) -> "ValidationSet":
        pairs = self._contents.val
        pairs = pairs if self.config.samples == "pairs" else _one_each(pairs)
        return ValidationSet(pairs, self._images, self.config, self.seed)

    def reference_set(self, split: str) -> "ReferenceSet":
        pairs = {"train": self._contents.train, "val": self._contents.val}
        pairs["all"] = pairs["train"] + pairs["val"]
        return ReferenceSet(_pictures(pairs[split]), self._images, self.config)

    def evaluation_conditions(self, count: int) -> Conditions:
        """The first `count` prompts of one fixed order, whatever the count; all come once before any comes again."""
        prompts = self._contents.evaluation_prompts
        order = SampleStream(len(prompts), derive_seed(self.seed, "evaluation"))
        return Conditions(captions=[prompts[order(i)[1]] for i in range(count)])

    def all_captions(self) -> list[str]:
        """Every caption that training, validation or evaluation can show, "" among them; sorted, each once."""
        pairs = self._contents.train + self._contents.val
        worded = {wording for pair in pairs for wording in (pair.prompt, *pair.paraphrases)}
        return sorted(worded.union(self._contents.evaluation_prompts, [""]))

    def write_split(self, run_dir: str) -> None:
        """Write `split.json`: the seed and the sorted names of the pictures that train and that validate."""
        found = self._contents
        split = {"seed": self.seed, "train": _pictures(found.train), "val": _pictures(found.val)}
        (Path(run_dir) / "split.json").write_text(json.dumps(split, indent=1) + "\n")

    @property
    def _contents(self) -> _Contents:
        self.check()
        return self._found

    def _training_pairs(self) -> list[Pair]:
        pairs = self._contents.train
        if self.config.samples == "images":
            return _one_each(pairs)
        if self.config.paraphrase_strategy == "add":
            added = [replace(pair, prompt=wording) for pair in pairs for wording in pair.paraphrases]
            return [replace(pair, paraphrases=()) for pair in [*pairs, *added]]
        return pairs

    def _read(self, on_progress: Progress | None) -> _Contents:
        if not self._images.is_dir():
            raise UserError(f"data.root: {self._images} is not a folder")
        table = read_table(self._root / self.config.csv, ("Filename", "Prompt"), "data.root")
        wordings = self._optional_table("paraphrases", ("Prompt", "Paraphrase"))
        asked = self._optional_table("test_prompts", ("Prompt",))
        unnamed = self._check_pictures(table, on_progress)
        skipped = drop_bad_rows([t for t in (table, wordings, asked) if t], self.config.on_bad)

        pairs = _pairs(table, wordings)
        train, val = self._split(pairs)
        summary = {
            "pictures": len(_pictures(pairs)),
            "pairs": len(pairs),
            "prompts": len({pair.prompt for pair in pairs}),
            "paraphrases": len({wording for pair in pairs for wording in pair.paraphrases}),
            "train pictures": len(_pictures(train)),
            "validation pictures": len(_pictures(val)),
            "pictures without a row": unnamed,
            "duplicate rows": len(pairs) - len({(pair.picture, pair.prompt) for pair in pairs}),
            "skipped rows": skipped,
        }
        prompts = [row["Prompt"] for row in asked.rows.values()] if asked else [pair.prompt for pair in val]
        return _Contents(train, val, prompts, summary)

    def _optional_table(self, key: str, columns: tuple[str, ...]) -> Table | None:
        path = getattr(self.config, key)
        return read_table(self._root / path, columns, f"data.{key}") if path else None

    def _check_pictures(self, table: Table, on_progress: Progress | None) -> int:
        """Put each picture's path in place of its row's Filename, and reject the rows without a sound picture.

        Returns how many pictures of the folder no row names.
        """
        folder = PictureFolder(self._images)
        for line, row in list(table.rows.items()):
            try:
                row["Filename"] = folder.find(row["Filename"])
            except UserError as error:
                table.reject(line, str(error))
        names = sorted({row["Filename"] for row in table.rows.values()})
        faults = self._undecodable(names, on_progress)
        for line, row in list(table.rows.items()):
            if row["Filename"] in faults:
                table.reject(line, faults[row["Filename"]])
        return len(folder) - len(names)

    def _undecodable(self, names: list[str], on_progress: Progress | None) -> dict[str, str]:
        """What is wrong with each picture that cannot be read. Threads suffice: Pillow decodes outside the GIL."""

        def fault(name: str) -> str | None:
            try:
                _read_picture(self._images, name, self.config)
            except UserError as error:
                return str(error).removeprefix(f"{self._root}/")
            return None

        faults = {}
        with ThreadPoolExecutor() as pool:
            for done, (name, why) in enumerate(zip(names, pool.map(fault, names), strict=True), 1):
                if why:
                    faults[name] = why
                if on_progress:
                    on_progress(done, len(names))
        return faults

    def _split(self, pairs: list[Pair]) -> tuple[list[Pair], list[Pair]]:
        """Pairs that train, pairs that validate. A picture's rank comes from its name alone, so that one picture more
        or less leaves nearly all others where they were."""
        names, held_out = _pictures(pairs), self.config.validation_images
        if held_out >= len(names):
            raise UserError(f"data.validation_images={held_out} leaves none of the {len(names)} pictures to train on")
        val = set(sorted(names, key=lambda name: derive_seed(self.seed, "split", name))[:held_out])
        return [p for p in pairs if p.picture not in val], [p for p in pairs if p.picture in val]


def _pairs(table: Table, wordings: Table | None) -> list[Pair]:
    """The rows as pairs, each with the paraphrase of its own row and those its prompt has in `wordings`."""
    by_prompt: dict[str, list[str]] = {}
    for row in wordings.rows.values() if wordings else ():
        by_prompt.setdefault(row["Prompt"], []).append(row["Paraphrase"])
    if wordings and not any(row["Prompt"] in by_prompt for row in table.rows.values()):
        raise UserError(f"data.paraphrases: no Prompt in {wordings.name} is a Prompt in {table.name}")
    pairs = []
    for row in table.rows.values():
        prompt = row["Prompt"]
        others = dict.fromkeys([row.get("Paraphrase", ""), *by_prompt.get(prompt, [])])
        pairs.append(Pair(row["Filename"], prompt, tuple(w for w in others if w not in ("", prompt))))
    return pairs


def _pictures(pairs: Iterable[Pair]) -> list[str]:
    return sorted({pair.picture for pair in pairs})


def _one_each(pairs: list[Pair]) -> list[Pair]:
    """The first pair of every picture, sorted by picture."""
    first = {pair.picture: pair for pair in reversed(pairs)}
    return [first[name] for name in sorted(first)]


def _read_picture(images: Path, name: str, config: MedVQAGIConfig) -> Tensor:
    return read_rgb(images / name, config.max_pixels, least_side=2 * config.resolution)


def _square(picture: Tensor, config: MedVQAGIConfig, place: float = 0.5) -> Tensor:
    """uint8 (3, H, W) -> uint8 (3, R, R)."""
    if config.square == "pad":
        return pad_square(picture, config.resolution)
    return crop_square(picture, config.resolution, place)


def _row(picture: Tensor, caption: str, seed: int) -> ImageBatch:
    """A batch of one from a float32 picture (3, R, R)."""
    return ImageBatch(
        images=picture[None],
        conditions=Conditions(captions=[caption]),
        seeds=torch.tensor([seed]),
        is_prior=torch.tensor([False]),
    )


class TrainingSet(Dataset):
    """Stream position -> one augmented sample.

    Augmentation is drawn from (seed, pass, index), the noise seed from (seed, position): what a sample looks like in a
    pass does not depend on when its turn comes, so that it can be encoded beforehand.
    """

    def __init__(self, pairs: list[Pair], images: Path, config: MedVQAGIConfig, seed: int):
        self.pairs, self.images, self.config, self.seed = pairs, images, config, seed
        self.stream = SampleStream(len(pairs), seed)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, position: int) -> ImageBatch:
        picture, caption = self.sample(*self.stream(position))
        return _row(picture, caption, derive_seed(self.seed, "noise", position))

    def caption(self, pass_: int, index: int) -> str:
        """The caption that sample `index` has in that pass, without reading its picture."""
        return self._draw_caption(self._generator(pass_, index), self.pairs[index])

    def sample(self, pass_: int, index: int) -> tuple[Tensor, str]:
        """Sample `index` as that pass shows it: a float32 picture (3, R, R) in [0, 1] and its caption."""
        rng, config = self._generator(pass_, index), self.config
        caption = self._draw_caption(rng, self.pairs[index])
        picture = _square(_read_picture(self.images, self.pairs[index].picture, config), config, rng.random())
        if config.flips and not caption:
            picture = random_flips(picture, rng)
        picture = jitter(picture.float() / 255, rng, config.brightness, config.contrast, config.saturation)
        return picture, caption

    def _generator(self, pass_: int, index: int) -> np.random.Generator:
        return np.random.default_rng(derive_seed(self.seed, "augment", pass_, index))

    def _draw_caption(self, rng: np.random.Generator, pair: Pair) -> str:
        config = self.config
        if config.samples == "images" or rng.random() < config.prompt_dropout:
            return ""
        replacing = {"add": 0.0, "replace_some": config.paraphrase_probability, "replace_all": 1.0}
        if pair.paraphrases and rng.random() < replacing[config.paraphrase_strategy]:
            return pair.paraphrases[rng.integers(len(pair.paraphrases))]
        return pair.prompt


class ValidationSet(Dataset):
    """Index -> one sample without augmentation, with the picture's own prompt; -1 is padding."""

    def __init__(self, pairs: list[Pair], images: Path, config: MedVQAGIConfig, seed: int):
        self.pairs, self.images, self.config, self.seed = pairs, images, config, seed

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> ImageBatch:
        name = self.pairs[index].picture
        picture = _square(_read_picture(self.images, name, self.config), self.config).float() / 255
        return _row(picture, self.caption(index), self.noise_seed(index))

    def caption(self, index: int) -> str:
        """The prompt of sample `index`, without reading its picture."""
        return self.pairs[index].prompt

    def noise_seed(self, index: int) -> int:
        """The seed of sample `index`; -1 for padding."""
        return -1 if index < 0 else derive_seed(self.seed, "validation", index)


class ReferenceSet(Dataset):
    """Index -> one distinct picture, uint8 (3, R, R), made square as for validation."""

    def __init__(self, pictures: list[str], images: Path, config: MedVQAGIConfig):
        self.pictures, self.images, self.config = pictures, images, config

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Tensor:
        return _square(_read_picture(self.images, self.pictures[index], self.config), self.config)

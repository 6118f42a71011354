"""MEDVQA-GI: colonoscopy pictures, each with about ten prompts (`Generate an image with 1 polyp.`).

On disk: `<root>/images/` and `<root>/prompt-gt.csv` with the columns Filename (the suffix may be left out) and Prompt,
in any order, separated by `;` or `,`; a further column Paraphrase may give another wording of the row's prompt.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Optional

import numpy as np

from datamodules.captioned import (
    CaptionedConfig,
    CaptionedDataModule,
    Contents,
    Pair,
    Progress,
    TrainingSet,
    ValidationSet,
    picture_names,
)
from datamodules.files.detection import split_not_read
from datamodules.files.pictures import Pictures
from datamodules.files.tables import Table, drop_bad_rows, read_table
from datamodules.files.walk import PictureFolder, others_in, without_row
from medsynth.errors import UserError
from medsynth.ranges import choice, number

_TEST_PROMPTS = "test-prompts.csv"  # lies beside the pictures for whoever asks for it by data.test_prompts


@dataclass
class MedVQAGIConfig(CaptionedConfig):
    """Which pictures and prompts are trained on, and how they are varied."""

    name: str = "medvqa_gi"
    """This data set's name."""
    csv: str = "prompt-gt.csv"
    """CSV file of pictures and prompts, relative to root."""
    images: str = "images"
    """Folder of the pictures, relative to root."""
    samples: str = choice("pairs", ("pairs", "images"))
    """What one sample is: `pairs` a picture with one of its prompts; `images` a picture, as an autoencoder needs, whose
    caption is "" in training and the picture's first prompt in validation."""
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    prompt_dropout: float = 0.2
    flips: bool = True
    paraphrases: Optional[str] = None
    """CSV file with the columns Prompt and Paraphrase, one or more rows a prompt, relative to root; none: only those in
    a Paraphrase column of `csv`."""
    paraphrase_strategy: str = choice("add", ("add", "replace_some", "replace_all"))
    """`add` trains on every paraphrase as a further pair; `replace_all` shows one of a prompt's paraphrases, drawn anew
    each time, in the prompt's place; `replace_some` does so with `paraphrase_probability`."""
    paraphrase_probability: float = number(0.5, least=0, most=1)
    """Probability that `replace_some` replaces the prompt of a sample."""
    test_prompts: Optional[str] = None
    """CSV file with a column Prompt, relative to root: the prompts evaluation asks for; none: those of the validation
    pictures."""


class MedVQAGI(CaptionedDataModule[MedVQAGIConfig]):
    """Pairs of picture and prompt, about ten of each picture.

    Of the counts that `check` gives, "pairs" are the good rows; those that repeat a picture's prompt are counted as
    "duplicate rows" and kept. "pictures without a row" lie in the folder unused.
    """

    Config = MedVQAGIConfig
    shaping: ClassVar[tuple[str, ...]] = (*CaptionedDataModule.shaping, "samples", "paraphrase_strategy")

    def training_set(self) -> "PromptTrainingSet":
        return PromptTrainingSet(self._training_pairs(), self._contents.pictures, self.config, self.seed)

    def validation_set(self) -> ValidationSet:
        pairs = self._contents.val
        pairs = pairs if self.config.samples == "pairs" else _one_each(pairs)
        return ValidationSet(pairs, self._contents.pictures, self.config, self.seed)

    def _training_pairs(self) -> list[Pair]:
        pairs = self._contents.train
        if self.config.samples == "images":
            return _one_each(pairs)
        if self.config.paraphrase_strategy == "add":
            added = [replace(pair, prompt=wording) for pair in pairs for wording in pair.paraphrases]
            return [replace(pair, paraphrases=()) for pair in [*pairs, *added]]
        return pairs

    def _read(self, on_progress: Progress | None) -> Contents:
        pictures = Pictures(self._root / self.config.images, self.config)
        if not pictures.folder.is_dir():
            raise UserError(f"data.root: {pictures.folder} is not a folder")
        table = read_table(self._root / self.config.csv, ("Filename", "Prompt"), "data.root", optional=("Paraphrase",))
        wordings = self._optional_table("paraphrases", ("Prompt", "Paraphrase"))
        asked = self._optional_table("test_prompts", ("Prompt",))
        folder = PictureFolder(pictures.folder)
        unnamed = self._check_pictures(table, folder, pictures, on_progress)
        groups = self.groups([table], lambda row: (row["Filename"], row))
        skipped = drop_bad_rows([t for t in (table, wordings, asked) if t], self.config.on_bad)

        pairs = _pairs(table, wordings)
        train, val = self.split(pairs, groups)
        summary = {
            "pictures": len(picture_names(pairs)),
            "pairs": len(pairs),
            "prompts": len({pair.prompt for pair in pairs}),
            "paraphrases": len({wording for pair in pairs for wording in pair.paraphrases}),
            "train pictures": len(picture_names(train)),
            "validation pictures": len(picture_names(val)),
            "pictures without a row": len(unnamed),
            "duplicate rows": len(pairs) - len({(pair.picture, pair.prompt) for pair in pairs}),
            "skipped rows": skipped,
        }
        prompts = [row["Prompt"] for row in asked.rows.values()] if asked else None
        tables = [self.config.csv, self.config.paraphrases or "", self.config.test_prompts or "", _TEST_PROMPTS]
        notes = (
            without_row(unnamed)
            + split_not_read(folder.names())
            + others_in(self._root, {self.config.images: folder.others}, tables)
        )
        return Contents(train, val, pictures, summary, prompts, groups=groups, notes=notes)

    def _optional_table(self, key: str, columns: tuple[str, ...]) -> Table | None:
        path = getattr(self.config, key)
        return read_table(self._root / path, columns, f"data.{key}") if path else None

    def _check_pictures(
        self, table: Table, folder: PictureFolder, pictures: Pictures, on_progress: Progress | None
    ) -> list[str]:
        """Put each picture's path in place of its row's Filename, and reject the rows without a sound picture.

        Returns the pictures of the folder that no row names.
        """
        for line, row in list(table.rows.items()):
            try:
                row["Filename"] = folder.find(row["Filename"])
            except UserError as error:
                table.reject(line, str(error))
        names = sorted({row["Filename"] for row in table.rows.values()})
        faults = self.faults(pictures, names, on_progress)
        for line, row in list(table.rows.items()):
            if row["Filename"] in faults:
                table.reject(line, faults[row["Filename"]])
        named = set(names)
        return [name for name in folder.names() if name not in named]


class PromptTrainingSet(TrainingSet[MedVQAGIConfig]):
    """A training set whose prompts have paraphrases."""

    def _draw_caption(self, rng: np.random.Generator, pair: Pair) -> str:
        config = self.config
        if config.samples == "images" or rng.random() < config.prompt_dropout:
            return ""
        replacing = {"add": 0.0, "replace_some": config.paraphrase_probability, "replace_all": 1.0}
        if pair.paraphrases and rng.random() < replacing[config.paraphrase_strategy]:
            return pair.paraphrases[rng.integers(len(pair.paraphrases))]
        return pair.prompt


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


def _one_each(pairs: list[Pair]) -> list[Pair]:
    """The first pair of every picture, sorted by picture."""
    first = {pair.picture: pair for pair in reversed(pairs)}
    return [first[name] for name in sorted(first)]

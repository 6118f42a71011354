"""A data set whose batches hold what frozen encoders computed once (see `files.latents`), in the place of pictures."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from datamodules.base import ImageDataModule, SizedDataset, TrainingSamples, ValidationSamples
from datamodules.batches import Conditions, Drawing, ImageBatch, Sample
from datamodules.files.control_folder import OwnControls
from datamodules.files.latents import VALIDATION, Cache, CachedText, ShardedRows, variant_part
from datamodules.stream import derive_seed

FORMAT = 1
# Keys that change no sample.
_IRRELEVANT = {"root", "workers", "latents", "on_bad", "check", "max_pixels", "test_prompts", "class_folder"}
_IRRELEVANT |= {"group", "on_duplicates"}  # the fingerprint has the split


def identity(data: ImageDataModule, digests: Mapping[str, str | None]) -> dict[str, Any]:
    """What the contents of a cache depend on, the most telling first, as JSON values.

    digests: the module's `digests()`.
    """
    config = {f"data.{key}": value for key, value in asdict(data.config).items() if key not in _IRRELEVANT}
    depends = {"format": FORMAT, **config, "seed": data.seed, **digests}
    return json.loads(json.dumps(depends | {"data": data.fingerprint()}))


class CachedLatents(ImageDataModule):
    """`source` with latents and text instead of pictures in its batches; all else is the source's own."""

    def __init__(self, source: ImageDataModule, cache: Cache, digests: Mapping[str, str | None]):
        """digests: of the encoders that training would use, see `identity`.

        Raises:
            UserError: the cache is one of other encoders, data or transform.
        """
        super().__init__(source.config, source.seed, source.batch_size, source.accumulate)
        # Lightning files a DataModule's state under its class name: so a run goes on with a cache or without.
        self.__class__ = type(type(source).__qualname__, (CachedLatents,), {})
        cache.require(identity(source, digests))
        self.source, self.cache = source, cache
        self._text = cache.text() if digests["text"] else None
        if self._text:
            self._text.require(source.all_captions())
        self._verified = False

    def setup(self, stage: str) -> None:
        """Verify every byte of the cache, once a run."""
        self.source.setup(stage)
        if not self._verified:
            self.cache.verify(*self._rank_and_world())
            self._verified = True

    def training_set(self) -> TrainingSamples:
        variants = [self.cache.part(variant_part(k)) for k in range(self.cache.variants)]
        return _CachedTraining(self.source.training_set(), variants, self._text, self.seed)

    def validation_set(self) -> ValidationSamples:
        return _CachedValidation(self.source.validation_set(), self.cache.part(VALIDATION), self._text)

    def check(self, on_progress: Callable[[int, int], None] | None = None) -> dict[str, Any]:
        return self.source.check(on_progress)

    def notes(self) -> list[str]:
        return self.source.notes()

    def fingerprint(self) -> str:
        return self.source.fingerprint()

    def pictures_fingerprint(self) -> str:
        return self.source.pictures_fingerprint()

    def reference_set(self, split: str) -> SizedDataset:
        return self.source.reference_set(split)

    def reading(self) -> dict[str, Any]:
        return self.source.reading()

    def evaluation_conditions(self, rows: int | Sequence[int]) -> Conditions:
        return self.source.evaluation_conditions(rows)

    def all_captions(self) -> list[str]:
        return self.source.all_captions()

    def paired_pictures(self, rows: Sequence[int]) -> Tensor:
        return self.source.paired_pictures(rows)

    def evaluation_length(self) -> int:
        return self.source.evaluation_length()

    def own_controls(self, folder: Path, kinds: Sequence[str], levels: Sequence[int] | None = None) -> OwnControls:
        return self.source.own_controls(folder, kinds, levels)

    def control_pictures(self, control: Tensor) -> dict[str, np.ndarray]:
        return self.source.control_pictures(control)

    def to_draw(self) -> list[Drawing]:
        return self.source.to_draw()

    def rare_words(self) -> list[str]:
        return self.source.rare_words()

    def split_facts(self) -> dict[str, Any]:
        return self.source.split_facts()


class _CachedTraining(TrainingSamples):
    def __init__(self, source: TrainingSamples, variants: list[ShardedRows], text: CachedText | None, seed: int):
        self.source, self.variants, self.text, self.seed = source, variants, text, seed
        self.stream = source.stream

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, position: int) -> ImageBatch:
        pass_, index = self.stream(position)
        variant = pass_ % len(self.variants)
        row = self.source.without_picture(variant, index).row(derive_seed(self.seed, "noise", position))
        return _filled(row, self.variants[variant].encoded(index), self.text)

    def sample(self, pass_: int, index: int) -> Sample:
        return self.source.sample(pass_, index)

    def without_picture(self, pass_: int, index: int) -> Sample:
        return self.source.without_picture(pass_, index)


class _CachedValidation(ValidationSamples):
    def __init__(self, source: ValidationSamples, latents: ShardedRows, text: CachedText | None):
        self.source, self.latents, self.text = source, latents, text

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> ImageBatch:
        row = self.source.without_picture(index).row(self.source.noise_seed(index))
        return _filled(row, self.latents.encoded(index % len(self)), self.text)

    def sample(self, index: int) -> Sample:
        return self.source.sample(index)

    def without_picture(self, index: int) -> Sample:
        return self.source.without_picture(index)

    def noise_seed(self, index: int) -> int:
        return self.source.noise_seed(index)


def _filled(row: ImageBatch, encoded: dict[str, Tensor], text: CachedText | None) -> ImageBatch:
    embeddings, mask = text(row.conditions.captions or []) if text else (None, None)
    image = encoded["image_embeddings"][None] if "image_embeddings" in encoded else None
    return replace(
        row, latents=encoded["moments"][None], image_embeddings=image, text_embeddings=embeddings, text_mask=mask
    )

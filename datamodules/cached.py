"""A data set whose pictures a frozen encoder has already turned into latents (`medsynth encode`).

    FOLDER/latents.safetensors   posterior means and log-variances, float32: `training` (K, n, 2C, h, w) of K augmented
                                 variants of n samples, `validation` (m, 2C, h, w) of m samples
    FOLDER/manifest.json         what they were made of

Variant k is the sample as pass k augments it; pass p of training reads variant p mod K. Caption and noise stay those of
the uncached stream wherever K passes suffice.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch.utils.data import Dataset

from datamodules.base import Conditions, ImageBatch, ImageDataModule, derive_seed
from medsynth.errors import UserError

LATENTS_FILE, MANIFEST_FILE = "latents.safetensors", "manifest.json"
# Keys that do not change what is encoded.
_IRRELEVANT = {"root", "workers", "latents", "on_bad", "test_prompts"}


def manifest(data: ImageDataModule, encoder: str, variants: int) -> dict[str, Any]:
    """What latents depend on: the encoder (a digest of its weights), the data, the seed and the transform."""
    config = {key: value for key, value in asdict(data.config).items() if key not in _IRRELEVANT}
    return {
        "encoder": encoder,
        "data": data.fingerprint(),
        "seed": data.seed,
        "variants": variants,
        **{f"data.{key}": value for key, value in config.items()},
    }


class CachedLatents(ImageDataModule):
    """`source` with latents instead of pictures in its batches; all else is the source's own."""

    def __init__(self, source: ImageDataModule, encoder: str):
        """encoder: digest of the weights that training would encode with.

        Raises:
            UserError: the folder `source.config.latents` holds no latents, or those of another encoder, data or
                transform.
        """
        super().__init__(source.config, source.seed, source.batch_size, source.accumulate)
        self.source, self.folder = source, Path(source.config.latents)
        self.variants = _verified_variants(self.folder, source, encoder)

    def check(self, on_progress=None) -> dict[str, Any]:
        return self.source.check(on_progress)

    def fingerprint(self) -> str:
        return self.source.fingerprint()

    def training_set(self) -> Dataset:
        return _CachedTraining(self.source.training_set(), self.folder / LATENTS_FILE, self.seed, self.variants)

    def validation_set(self) -> Dataset:
        return _CachedValidation(self.source.validation_set(), self.folder / LATENTS_FILE)

    def reference_set(self, split: str) -> Dataset:
        return self.source.reference_set(split)

    def evaluation_conditions(self, count: int) -> Conditions:
        return self.source.evaluation_conditions(count)

    def write_split(self, run_dir: str) -> None:
        self.source.write_split(run_dir)


class _LatentFile:
    """Rows of one tensor of a safetensors file, read as they are asked for; opened anew in each worker process."""

    def __init__(self, path: Path, name: str):
        self.path, self.name = path, name
        self._slice = None

    def __getitem__(self, index: tuple[int, ...]) -> torch.Tensor:
        if self._slice is None:
            self._slice = safe_open(self.path, "pt").get_slice(self.name)
        return self._slice[index]

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "name": self.name, "_slice": None}


class _CachedTraining(Dataset):
    def __init__(self, source: Dataset, path: Path, seed: int, variants: int):
        self.source, self.seed, self.variants = source, seed, variants
        self.latents = _LatentFile(path, "training")

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, position: int) -> ImageBatch:
        pass_, index = self.source.stream(position)
        variant = pass_ % self.variants
        caption = self.source.caption(variant, index)
        return _row(self.latents[variant, index], caption, derive_seed(self.seed, "noise", position))


class _CachedValidation(Dataset):
    def __init__(self, source: Dataset, path: Path):
        self.source = source
        self.latents = _LatentFile(path, "validation")

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> ImageBatch:
        latents = self.latents[index % len(self)]
        return _row(latents, self.source.caption(index), self.source.noise_seed(index))


def _row(latents: torch.Tensor, caption: str, seed: int) -> ImageBatch:
    return ImageBatch(
        images=None,
        conditions=Conditions(captions=[caption]),
        seeds=torch.tensor([seed]),
        is_prior=torch.tensor([False]),
        latents=latents[None],
    )


def _verified_variants(folder: Path, source: ImageDataModule, encoder: str) -> int:
    try:
        found = json.loads((folder / MANIFEST_FILE).read_text())
    except (OSError, ValueError):
        raise UserError(f"data.latents: {folder} holds no finished latents; run `medsynth encode CONFIG`") from None
    wanted = json.loads(json.dumps(manifest(source, encoder, found["variants"])))
    for key, value in wanted.items():
        if found.get(key) != value:
            raise UserError(
                f"data.latents: {folder} is stale: {key} was {found.get(key)} and is {value}; "
                "run `medsynth encode` again"
            )
    return found["variants"]

"""Scores generated pictures while training, on all processes at once."""

import hashlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from tqdm.auto import tqdm

from callbacks.lightning_types import data_of, generative, loggers_of
from callbacks.samples import as_png, draw_grid
from datamodules.base import REFERENCE_READING, SizedDataset
from datamodules.batches import collate
from datamodules.stream import EvaluationSampler, derive_seed
from lightning_modules.base import GenerativeModule
from medsynth.errors import UserError
from medsynth.files import put_whole
from medsynth.ranges import choice, number
from metrics.extractors import EXTRACTORS, FeatureExtractor, build_extractor
from metrics.images import are_finite, quantise
from metrics.paired import PairedSimilarity
from metrics.suite import LEAST, GenerationMetrics, score_names


@dataclass
class EvaluationConfig:
    """How generated pictures are scored while training."""

    images: int = number(2000, least=0)
    """Pictures generated for each evaluation, over all processes; 0 scores nothing."""
    every: int = number(1, least=1)
    """Validations from one evaluation, and one grid, to the next."""
    at_start: bool = False
    """Evaluate before the first step too."""
    batch_size: int = number(32, least=1)
    """Pictures a process generates at once."""
    extractor: str = choice("inception", tuple(EXTRACTORS))
    """Features: inception (of 2015-12-05, gives fid) or random (fixed seed, needs no weights, gives fd_random)."""
    weights: Optional[str] = None
    """Inception weights file; by default where torch-fidelity keeps its download."""
    reference: str = choice("all", ("train", "val", "all"))
    """Real pictures to score against: train, val or all (the papers' choice)."""
    paired: bool = False
    """Compare each generated picture with the real one whose conditions it was given too: eval/psnr (dB), eval/ssim."""
    steps: Optional[int] = number(None, least=1)
    """Denoising steps; by default the model's."""
    guidance: Optional[float] = number(None, least=0)
    """Guidance; by default the model's."""
    grid: int = number(8, least=0)
    """Validation samples of the grid, with fixed prompts and seeds; 0 draws none."""
    cache: str = "~/.cache/medsynth"
    """Folder where statistics of real pictures are kept, under a key of data, resolution and extractor."""

    def __post_init__(self):
        if 0 < self.images < LEAST:
            raise UserError(f"evaluation.images={self.images}: scores need at least {LEAST}; 0 scores nothing")

    def names(self) -> list[str]:
        """What each evaluation logs that can be compared; of the deviations, the kernel distance's may be left out."""
        if not self.images:
            return []
        scores = score_names(self.extractor, EXTRACTORS[self.extractor].classes > 0)
        scores = [name for name in scores if not name.endswith("_std")]
        return [f"eval/{name}" for name in scores + (["psnr", "ssim"] if self.paired else [])]


class _NotFinite(Exception):  # noqa: N818
    """Pictures hold NaN or infinities, in some process; raised in all of them."""


class Evaluation(L.Callback):
    """After each `every`-th validation: metrics of generated pictures as `eval/<name>`, and a grid.

    The numbers are the same for any number of processes: picture i has the i-th prompt and its own seed, whoever draws
    it, and the metrics are sums over all. Pictures that are not finite are neither shown nor scored.
    """

    def __init__(self, config: EvaluationConfig, run_dir: Path, seed: int, between: Callable[[], None] = lambda: None):
        """between: called by all processes before each batch of pictures."""
        self.config, self.run_dir, self.seed, self._between = config, Path(run_dir), seed, between
        # Now, so that absent weights are refused before training and not at its first evaluation.
        self._extractor: FeatureExtractor | None = None
        if config.images:
            self._extractor = build_extractor(config.extractor, config.weights)
        self._validations = 0
        self._unwritten: set[Path] = set()  # folders of which it was said that nothing can be written there

    def state_dict(self) -> dict[str, int]:
        return {"validations": self._validations}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self._validations = state_dict["validations"]

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        # What cannot be scored is refused now, not at the first evaluation.
        if self.config.paired:
            data_of(trainer).paired_pictures([0])
        if self.config.images and (reals := len(data_of(trainer).reference_set(self.config.reference))) < LEAST:
            raise UserError(
                f"evaluation.reference={self.config.reference}: {reals} real pictures are too few to score against, "
                f"which takes {LEAST}; set evaluation.images=0, or another reference"
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self.config.at_start or trainer.global_step:
            return
        pl_module.eval()
        values = self.evaluate(trainer, generative(pl_module))
        pl_module.train()
        for logger in trainer.loggers:
            logger.log_metrics(values, step=0)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        if (self._validations + 1) % self.config.every == 0:
            pl_module.log_dict(self.evaluate(trainer, generative(pl_module)), rank_zero_only=False)
        self._validations += 1  # now: an evaluation that is broken off is done again

    @torch.no_grad()
    def evaluate(self, trainer: L.Trainer, module: GenerativeModule) -> dict[str, float]:
        """Draw the grid and score `images` new pictures; {"eval/<name>": value}, the same on every process."""
        try:
            with trainer.precision_plugin.forward_context():
                if self.config.grid:
                    self._draw_grid(trainer, module)
                return self._score(trainer, module) if self.config.images else {}
        except _NotFinite:
            if self._extractor is not None:
                self._extractor.cpu()
            step = trainer.global_step
            rank_zero_warn(f"pictures drawn after step {step} are not finite: they are neither shown nor scored")
            return {}

    def _score(self, trainer: L.Trainer, module: GenerativeModule) -> dict[str, float]:
        total, data, extractor = self.config.images, data_of(trainer), self._required_extractor()
        reals = data.reference_set(self.config.reference)
        metrics = GenerationMetrics(extractor, len(reals), total).to(module.device)
        self._load_reference(trainer, metrics, reals)
        paired = PairedSimilarity(total).to(module.device) if self.config.paired else None
        for rows in self._turns(trainer, total, "generating"):
            indices = [max(i, 0) for i in rows]  # padding draws picture 0: a sharded model needs every process
            images = module.sample(
                data.evaluation_conditions(indices).to(module.device),
                [derive_seed(self.seed, "evaluation", i) for i in indices],
                steps=self.config.steps,
                guidance=self.config.guidance,
            )
            images = quantise(_agreed_finite(trainer, images))
            metrics.update_fake(images, torch.tensor(rows))
            if paired is not None:
                paired.update(images, data.paired_pictures(indices), torch.tensor(rows))
        values = metrics.compute() | ({} if paired is None else paired.compute())
        extractor.cpu()  # its memory is training's again
        return {f"eval/{name}": value for name, value in values.items()}

    def _load_reference(self, trainer: L.Trainer, metrics: GenerationMetrics, reals: SizedDataset) -> None:
        """Statistics of the real pictures: from disk, or computed by all processes and kept there."""
        data, features = data_of(trainer), self._required_extractor().identity
        key = (data.fingerprint(), self.config.reference, data.config.resolution, features, REFERENCE_READING)
        name = hashlib.sha256(repr(key).encode()).hexdigest()[:24]
        path = Path(self.config.cache).expanduser() / f"reference-{name}.safetensors"
        kept = _kept(path)
        # All agree: another run may be writing the file right now.
        if trainer.strategy.reduce_boolean_decision(kept is not None, all=True) and kept is not None:
            metrics.load_real_state(kept)
            return
        for rows in self._turns(trainer, len(reals), "real pictures"):
            images = torch.stack([reals[max(i, 0)] for i in rows])
            metrics.update_real(images, torch.tensor(rows))
        state = metrics.real_state()
        if trainer.is_global_zero:
            with self._dispensable(path):
                put_whole(path, save({key: value.contiguous().cpu() for key, value in state.items()}))

    def _required_extractor(self) -> FeatureExtractor:
        assert self._extractor is not None  # where pictures are scored
        return self._extractor

    def _turns(self, trainer: L.Trainer, total: int, title: str) -> Iterator[list[int]]:
        turns = EvaluationSampler(total, self.config.batch_size, trainer.global_rank, trainer.world_size)
        hidden = None if trainer.is_global_zero else True  # None: only where the output is no terminal
        for rows in tqdm(turns, desc=title, leave=False, disable=hidden, unit="batch"):
            self._between()
            yield rows

    def _draw_grid(self, trainer: L.Trainer, module: GenerativeModule) -> None:
        dataset = data_of(trainer).validation_set()
        rows = [i * len(dataset) // self.config.grid for i in range(min(self.config.grid, len(dataset)))]
        batch = collate([dataset[i] for i in rows])
        seeds = [derive_seed(self.seed, "grid", i) for i in range(len(rows))]
        images, captions = module.preview(batch.to(module.device), seeds)
        self._save_grid(trainer, _agreed_finite(trainer, images), captions)

    @rank_zero_only
    def _save_grid(self, trainer: L.Trainer, images: Tensor, captions: list[str]) -> None:
        path = self.run_dir / "grids" / f"step-{trainer.global_step:07d}.png"
        grid = np.asarray(draw_grid(images, captions))
        with self._dispensable(path):
            put_whole(path, as_png(grid))
        for logger in loggers_of(trainer):
            logger.log_image("eval/grid", grid, step=trainer.global_step)

    @contextmanager
    def _dispensable(self, path: Path) -> Iterator[None]:
        """Make the folder of a file that is written inside; where that fails training goes on, with one warning."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield
        except OSError as error:
            if path.parent not in self._unwritten:
                warnings.warn(f"{path} cannot be written: {error.strerror}. Training goes on without it")
            self._unwritten.add(path.parent)


def _agreed_finite(trainer: L.Trainer, images: Tensor) -> Tensor:
    """The pictures; raises _NotFinite in all processes where one has such as are not finite: none waits for it."""
    if not trainer.strategy.reduce_boolean_decision(are_finite(images), all=True):
        raise _NotFinite
    return images


def _kept(path: Path) -> dict[str, Tensor] | None:
    """Statistics of real pictures that an earlier run kept; None where there are none, or they cannot be read."""
    try:
        return load_file(path)
    except (OSError, SafetensorError):
        return None

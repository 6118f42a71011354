"""Scores generated pictures while training, on all processes at once."""

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from torch import Tensor

from callbacks.lightning_types import data_of, generative, loggers_of
from callbacks.protocols import PROTOCOL_TAG, PROTOCOLS, as_tag, noted_after, read_notes
from callbacks.samples import as_png, draw_grid, grid_rows
from callbacks.scoring import EvaluationConfig, Scoring
from datamodules.batches import collate
from datamodules.stream import derive_seed
from lightning_modules.base import GenerativeModule
from medsynth.errors import UserError
from medsynth.files import put_whole, write_whole
from metrics.images import are_finite
from metrics.protocol import Protocol
from metrics.suite import LEAST


class _NotFinite(Exception):  # noqa: N818
    """Pictures hold NaN or infinities, in some process; raised in all of them."""


@dataclass
class _TrainersProcesses:
    """The processes of a training, as `Scoring` asks for them."""

    trainer: L.Trainer
    _between: Callable[[], None]
    _writing: Callable[[Path], AbstractContextManager[None]]

    @property
    def rank(self) -> int:
        return self.trainer.global_rank

    @property
    def world(self) -> int:
        return self.trainer.world_size

    def all_agree(self, decision: bool) -> bool:
        return self.trainer.strategy.reduce_boolean_decision(decision, all=True)

    def writing(self, path: Path) -> AbstractContextManager[None]:
        return self._writing(path)

    def between(self) -> None:
        self._between()


class Evaluation(L.Callback):
    """After each `every`-th validation: metrics of generated pictures as `eval/<name>`, and a grid.

    The numbers are the same for any number of processes: picture i has the i-th prompt and its own seed, whoever draws
    it, and the metrics are sums over all. Pictures that are not finite are neither shown nor scored.
    """

    def __init__(self, config: EvaluationConfig, run_dir: Path, seed: int, between: Callable[[], None] = lambda: None):
        """between: called by all processes before each batch of pictures."""
        self.config, self.run_dir, self.seed, self._between = config, Path(run_dir), seed, between
        # Now, so that absent weights are refused before training and not at its first evaluation.
        self.scoring = Scoring(config, seed) if config.images else None
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
        if self.scoring is not None:
            self._note_protocol(trainer, self.scoring.protocol(data_of(trainer)))
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
                return self._score(self.scoring, trainer, module) if self.scoring else {}
        except _NotFinite:
            if self.scoring is not None:
                self.scoring.extractor.cpu()
            step = trainer.global_step
            rank_zero_warn(f"pictures drawn after step {step} are not finite: they are neither shown nor scored")
            return {}

    def _score(self, scoring: Scoring, trainer: L.Trainer, module: GenerativeModule) -> dict[str, float]:
        processes = _TrainersProcesses(trainer, self._between, self._dispensable)
        values = scoring.score(data_of(trainer), module, processes, lambda images: _agreed_finite(trainer, images))
        return {f"eval/{name}": value for name, value in values.items()}

    def _draw_grid(self, trainer: L.Trainer, module: GenerativeModule) -> None:
        dataset, labels = data_of(trainer).validation_set(), None
        if "labels" in module.supports.conditions:
            labels = [dataset.without_picture(i).label for i in range(len(dataset))]
        rows, columns = grid_rows(len(dataset), self.config.grid, labels)
        batch = collate([dataset[i] for i in rows])
        seeds = [derive_seed(self.seed, "grid", i) for i in range(len(rows))]
        images, captions = module.preview(batch.to(module.device), seeds)
        self._save_grid(trainer, _agreed_finite(trainer, images), captions, columns)

    @rank_zero_only
    def _note_protocol(self, trainer: L.Trainer, protocol: Protocol) -> None:
        """Write down by what the scores after this step are scores, for `evaluate` and `compare`."""
        path = self.run_dir / PROTOCOLS
        notes = noted_after(read_notes(path), trainer.global_step, protocol)
        with self._dispensable(path):
            write_whole(path, json.dumps([note.as_dict() for note in notes], indent=1) + "\n")
        for logger in loggers_of(trainer):
            logger.set_tags({PROTOCOL_TAG: as_tag(notes)})

    @rank_zero_only
    def _save_grid(self, trainer: L.Trainer, images: Tensor, captions: list[str], columns: int) -> None:
        path = self.run_dir / "grids" / f"step-{trainer.global_step:07d}.png"
        grid = np.asarray(draw_grid(images, captions, columns))
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

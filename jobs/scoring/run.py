"""The scores of a run, by the protocol that its training had."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from callbacks.protocols import PROTOCOLS, read_notes
from callbacks.scoring import Alone, Scoring
from datamodules.base import ImageDataModule
from jobs.run.config import instantiate
from jobs.run.folder import build_source, load_run, read_config
from jobs.scoring.claims import Claims, claim
from medsynth.errors import UserError
from metrics.intervals import interval
from metrics.paired import PAIRED
from metrics.protocol import Protocol
from metrics.suite import all_names

_MIXED = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


@dataclass
class ScoredRun:
    """A run's data and how its training scores."""

    folder: Path
    config: DictConfig
    data: ImageDataModule
    scoring: Scoring

    @property
    def protocol(self) -> Protocol:
        return self.scoring.protocol(self.data)


def open_run(run_dir: Path) -> ScoredRun:
    """A run as its training scores.

    Raises:
        UserError: this is no run directory, it scores nothing, or data, weights or code are no longer those by which it
            has scored.
    """
    config = read_config(run_dir)
    evaluation: Any = instantiate(config, "evaluation")
    if not evaluation.images:
        raise UserError(f"{run_dir} was trained with evaluation.images=0, and so has no scores of its own to go by")
    data, _ = build_source(config)
    run = ScoredRun(Path(run_dir), config, data, Scoring(evaluation, config.seed))
    notes = read_notes(Path(run_dir) / PROTOCOLS)
    if notes and (changed := run.protocol.differences(notes[-1].protocol)):
        raise UserError(f"{run_dir}: what it would be scored by now is not what its training had: {'; '.join(changed)}")
    return run


def names_of(run: ScoredRun) -> list[str]:
    """The names of all scores that `score_run` may give."""
    return [*all_names(run.scoring.extractor), *(PAIRED if run.scoring.config.paired else ())]


def score_run(run: ScoredRun, checkpoint: str, device: torch.device, intervals: bool) -> Claims:
    """Draw the pictures that training scored, with the weights of a checkpoint, and score them likewise."""
    module, config = load_run(run.folder, checkpoint, as_trained=True)
    with torch.no_grad(), _precision(config.hardware.precision, device):
        metrics, paired = run.scoring.fill(run.data, module.to(device), Alone(), keep_logits=True)
        claims = claim(metrics, intervals)
    if paired is not None:
        values, freedom = paired.compute(), run.scoring.config.images - 1
        claims.scores |= values
        errors = paired.errors() if intervals and freedom else {}
        claims.intervals |= {name: interval(values[name], error, freedom) for name, error in errors.items()}
    return claims


def _precision(name: str, device: torch.device) -> AbstractContextManager[Any]:
    """What training draws in."""
    return torch.autocast(device.type, dtype=_MIXED[name]) if name in _MIXED else nullcontext()

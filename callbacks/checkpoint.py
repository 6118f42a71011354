"""When training saves a checkpoint: every so many steps, after validations, and where a value is the best so far."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import lightning as L
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

from callbacks.divergence import is_sound
from callbacks.durable import BEST, LAST
from medsynth.errors import UserError
from medsynth.ranges import choice, number


class CheckpointUnwritten(UserWarning):
    """Training goes on although a checkpoint could not be written."""


@dataclass
class CheckpointConfig:
    """When training saves `last.ckpt` and `best.ckpt`."""

    every_steps: Optional[int] = number(1000, least=1, optional=True)
    """Optimizer steps between saves of last.ckpt; null saves it only after each validation and at the end."""
    monitor: str = "val/loss"
    """The logged value that chooses best.ckpt, for instance eval/fid; validations without it are passed over."""
    mode: str = choice("min", ("min", "max"))
    """Whether the lowest ("min") or the highest ("max") value is best."""
    on_error: str = choice("continue", ("continue", "stop"))
    """A checkpoint that cannot be written, for instance on a full disk: "continue" training and say so, or "stop"."""


def build_checkpoints(config: CheckpointConfig, directory: str | Path) -> list[L.Callback]:
    """The callbacks that save `best.ckpt` and `last.ckpt` into `directory` through the trainer's checkpoint IO."""
    # In this order last.ckpt is the newer of two saves at one step.
    return [
        BestCheckpoint(Path(directory) / BEST, config.monitor, config.mode, config.on_error),
        LastCheckpoint(Path(directory) / LAST, config.every_steps, config.on_error),
    ]


def save(trainer: L.Trainer, path: Path, on_error: str, notes: Mapping[str, Any] | None = None) -> bool:
    """Save `trainer`'s checkpoint; False where it could not be written and `on_error` is "continue".

    Also False after a step, or a validation, that was not finite: a resume is to begin before it.

    Raises:
        UserError: it could not be written and `on_error` is "stop"; in every process.
    """
    if not is_sound(trainer):
        reason = f"after step {trainer.global_step} the loss or a gradient is not finite"
        rank_zero_warn(f"{path} is not saved: {reason}; the one before is kept", category=CheckpointUnwritten)
        return False
    try:
        trainer.save_checkpoint(path, storage_options=notes)
    except UserError as error:
        if on_error == "stop":
            raise
        rank_zero_warn(f"{error}. Training goes on; the checkpoint before it is kept", category=CheckpointUnwritten)
        return False
    return True


class LastCheckpoint(Checkpoint):
    """Replaces `path` every `every_steps` steps of `trainer.global_step`, after each validation and at the end."""

    def __init__(self, path: Path, every_steps: int | None, on_error: str = "stop"):
        self.path, self.every_steps, self.on_error = path, every_steps, on_error
        self._saved = 0  # global step of the newest save that was tried
        self._failed = False  # it could not be written

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._saved = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Two optimizers move the count by two a batch, perhaps past a multiple.
        if self.every_steps and trainer.global_step // self.every_steps > self._saved // self.every_steps:
            self._save(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Also where this step is saved already: a resume has to know that its validation is done.
        if _is_fitting(trainer):
            self._save(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step > self._saved or self._failed:
            trainer.save_checkpoint(self.path)  # there is no training left to go on with: a failure ends the run

    def _save(self, trainer: L.Trainer) -> None:
        self._failed = not save(trainer, self.path, self.on_error)
        self._saved = trainer.global_step


class BestCheckpoint(Checkpoint):
    """Replaces `path` after each validation with a better value of `monitor` than all before, resumed or not.

    A value that is not finite is never better.
    """

    def __init__(self, path: Path, monitor: str, mode: str, on_error: str = "stop"):
        self.path, self.monitor, self.mode, self.on_error = path, monitor, mode, on_error
        self.value: float | None = None  # the best so far

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not _is_fitting(trainer):
            return
        metric = trainer.callback_metrics.get(self.monitor)
        # All processes save together or not at all: the first one's value decides.
        value = trainer.strategy.broadcast(None if metric is None else float(metric))
        if value is None or not self._is_better(value):
            return
        before, self.value = self.value, value
        if not save(trainer, self.path, self.on_error, {"metric": {"name": self.monitor, "value": value}}):
            self.value = before

    def state_dict(self) -> dict[str, Any]:
        return {"monitor": self.monitor, "mode": self.mode, "value": self.value}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        value = state_dict["value"]
        same = (state_dict["monitor"], state_dict["mode"]) == (self.monitor, self.mode)
        if same and value is not None and math.isfinite(value):  # earlier versions took an infinite one
            self.value = value

    def _is_better(self, value: float) -> bool:
        # Strictly better: the trainer goes on showing the value of an earlier validation, which must not win again.
        if not math.isfinite(value) or self.value is None:
            return math.isfinite(value)
        return value < self.value if self.mode == "min" else value > self.value


def _is_fitting(trainer: L.Trainer) -> bool:
    return trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking

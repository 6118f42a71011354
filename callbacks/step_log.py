"""What is logged of a training step, and under which number."""

from typing import Any

import lightning as L
import torch
from torch import Tensor

from callbacks.lightning_types import generative, loggers_of


class StepLog(L.Callback):
    """Logs every `trainer.log_every_n_steps` optimizer steps: losses as `train/<name>`, and the learning rate.

    All that is logged has the number of the step that made the weights, `trainer.global_step` as checkpoints and grids
    have it: the first step is 1, and a validation after it is logged at 1, too. A loss is the mean over the step's
    micro-batches and over all processes; it is summed on the device, and only for a step that is logged.
    """

    def __init__(self) -> None:
        self._step = 0  # the newest whole one
        self._sums: dict[str, Tensor] = {}
        self._batches = 0  # in the sums
        self._rates: dict[str, float] = {}  # of the step under way

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._step = trainer.global_step

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._is_due(trainer, self._step + 1):
            self._rates = generative(pl_module).learning_rates()  # now: after the step the schedule has moved on

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        stepped = trainer.global_step != self._step
        due = self._is_due(trainer, trainer.global_step if stepped else self._step + 1)
        if due:
            losses = generative(pl_module).step_losses
            self._sums = {name: self._sums[name] + value if self._sums else value for name, value in losses.items()}
            self._batches += 1
        if not stepped:
            return
        self._step = trainer.global_step
        _let_lightning_count(trainer)
        if due:
            self._log(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        _let_lightning_count(trainer)

    def _is_due(self, trainer: L.Trainer, step: int) -> bool:
        # pyrefly: ignore[missing-attribute]  # Lightning's logger connector sets it
        every = trainer.log_every_n_steps
        return every > 0 and step // every > self._step // every

    def _log(self, trainer: L.Trainer) -> None:
        names = sorted(self._sums)
        means = torch.stack([self._sums[name].float() for name in names]) / self._batches
        means = trainer.strategy.reduce(means, reduce_op="mean")
        self._sums, self._batches = {}, 0
        losses = {f"train/{name}": mean for name, mean in zip(names, means, strict=True)}
        trainer.callback_metrics.update(losses)  # where checkpoint.monitor looks
        values = dict(zip(losses, means.tolist(), strict=True))
        for logger in loggers_of(trainer):
            logger.log_metrics({**values, **self._rates, "epoch": trainer.current_epoch}, step=self._step)


def _let_lightning_count(trainer: L.Trainer) -> None:
    """Lightning logs what a validation gives under a count of its own, which is one behind until that is done, and
    two after a resume with other validations."""
    trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step

"""A run whose loss or gradients are no longer finite ends, and what it then holds is not saved."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

import lightning as L
import torch
from torch import Tensor

from callbacks.durable import newest_verified, read_manifest
from medsynth.errors import UserError


class Diverged(UserError):  # noqa: N818
    """Training diverged; nothing that it has become since was saved."""


class Divergence(L.Callback):
    """Ends a run, in all processes at one step, after `tolerate` optimizer steps in a row that were not finite.

    Not finite is a step whose loss, in any process, or whose gradient's norm is NaN or infinite; it changes no weights
    (`GenerativeModule.on_before_optimizer_step`). With float16 a gradient may overflow until the scaler has found its
    scale: there the loss alone counts. A run also ends so where its last step, or the validation of the weights that it
    leaves, is not finite: nobody knows then that they are sound.

    Steps in a row are counted on the device. Every so many steps the count is sent to the host, and looked at that many
    steps later: nobody waits for it, and a run ends a few steps late, half of `tolerate` at most.
    """

    def __init__(self, tolerate: int, checkpoints: Path):
        """tolerate: at least 1. checkpoints: the folder that the run saves into, to name the newest good one."""
        self.tolerate, self._checkpoints = tolerate, checkpoints
        self._every = max(1, tolerate // 4)
        self._step = 0
        self._loss: Tensor | None = None  # sum over the micro-batches of the step under way
        self._streak: Tensor | None = None  # steps in a row up to the newest; None before the first
        self._told: _Told | None = None
        self._unsound_at = -1  # step after which a validation was not finite

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._step = trainer.global_step
        self._loss = self._streak = self._told = None

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs["loss"].detach().float()
        self._loss = loss if self._loss is None else self._loss + loss
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        before = self._streak if self._streak is not None else torch.zeros_like(self._loss)
        self._streak = (before + 1) * _is_not_finite(trainer, pl_module, self._loss)
        self._loss = None
        if self._step % self._every == 0:
            told, self._told = self._told, _Told(self._step, _on_its_way(_largest(trainer, self._streak)))
            if told is not None and told.streak() >= self.tolerate:
                self._end(trainer, told.step, int(told.streak()))

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        loss = trainer.callback_metrics.get("val/loss")
        if loss is not None and not trainer.strategy.broadcast(bool(torch.isfinite(loss))):
            self._unsound_at = trainer.global_step

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Before the last checkpoint is saved: Lightning calls those callbacks after all others.
        if not self.is_sound(trainer):
            self._end(trainer, self._step, int(self._streak_now(trainer)))

    def is_sound(self, trainer: L.Trainer) -> bool:
        """Whether the newest step, and a validation after it, were finite; to be asked in all processes together."""
        return self._unsound_at != trainer.global_step and self._streak_now(trainer) == 0

    def _streak_now(self, trainer: L.Trainer) -> float:
        return 0.0 if self._streak is None else _largest(trainer, self._streak).item()

    def _end(self, trainer: L.Trainer, step: int, streak: int) -> None:
        begun = f"from step {step - streak + 1} to {step} the loss or its gradient was not finite"
        what = begun if streak else f"val/loss after step {step} is not finite"
        good = trainer.strategy.broadcast(self._newest_good() if trainer.is_global_zero else "")
        raise Diverged(
            f"training diverged: {what}. {good}. Start again with a lower model.optim.lr, with "
            "train.gradient_clip_norm, or with hardware.precision=bf16-mixed"
        )

    def _newest_good(self) -> str:
        path, _ = newest_verified(self._checkpoints)
        if path is None:
            return "There is no good checkpoint before it"
        step = read_manifest(path)["global_step"]
        return f"The last good checkpoint is {path} of step {step}, from which the next start goes on"


class _Told(NamedTuple):
    """A count on its way to the host."""

    step: int
    streak: Callable[[], float]


def is_sound(trainer: L.Trainer) -> bool:
    """Whether what the trainer would save now is known to be no divergence; in all processes together."""
    callbacks: list[L.Callback] = cast(Any, trainer).callbacks
    return all(each.is_sound(trainer) for each in callbacks if isinstance(each, Divergence))


def _is_not_finite(trainer: L.Trainer, module: L.LightningModule, loss: Tensor) -> Tensor:
    """1 or 0 on the device."""
    if getattr(trainer.precision_plugin, "scaler", None) is None:
        norm = cast("Tensor | None", getattr(module, "gradient_norm", None))
        if norm is not None:
            loss = loss + norm
        elif any(getattr(optimizer, "overflow", False) for optimizer in trainer.optimizers):  # DeepSpeed's own finding
            return torch.ones_like(loss)
    return 1 - loss.isfinite().float()


def _largest(trainer: L.Trainer, number: Tensor) -> Tensor:
    """Over all processes."""
    return trainer.strategy.reduce(number.clone(), reduce_op="max")


def _on_its_way(number: Tensor) -> Callable[[], float]:
    """Begin to copy a scalar to the host; what gives it there."""
    if number.device.type != "cuda":
        return number.item
    host = torch.empty((), dtype=number.dtype, pin_memory=True)
    host.copy_(number, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()

    def read() -> float:
        arrived.synchronize()
        return host.item()

    return read

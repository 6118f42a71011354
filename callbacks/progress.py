"""How far a run has come: pictures a second, the time that is left, and one bar over the whole run."""

import math
import time
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from callbacks.lightning_types import loggers_of


class Throughput(L.Callback):
    """Measures pictures a second of training alone, over all processes, and logs it with the losses.

    Validation, evaluation and saving are not counted.
    """

    def __init__(self, global_batch_size: int):
        self.global_batch_size = global_batch_size
        self.images_per_second = 0.0
        self._steps, self._seconds, self._seen = 0, 0.0, 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._seen = trainer.global_step

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch, batch_idx: int) -> None:
        self._started = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module, outputs, batch, batch_idx: int) -> None:
        self._seconds += time.perf_counter() - self._started
        self._steps += trainer.global_step - self._seen
        self._seen = trainer.global_step
        # pyrefly: ignore[missing-attribute]  # Lightning's logger connector sets it
        if self._steps >= max(1, trainer.log_every_n_steps):
            self.images_per_second = self._steps * self.global_batch_size / self._seconds
            name = "throughput/images_per_second"
            trainer.callback_metrics[name] = torch.tensor(self.images_per_second)  # where checkpoint.monitor looks
            for logger in loggers_of(trainer):
                logger.log_metrics({name: self.images_per_second}, step=trainer.global_step)
            self._steps, self._seconds = 0, 0.0


class TimeLeft:
    """How long a run still takes, by its pace of late.

    That is the pace of the steps in the last `window` seconds of training, and at least `least` of them, and for each
    validation that is due the mean time of the last few. The first steps of a start tell nothing: they compile, fill
    caches and find the fastest kernels.
    """

    _FIRST = 5  # steps that are passed over
    _PAUSES = 4  # validations whose mean counts

    def __init__(self, clock: Callable[[], float] = time.monotonic, window: float = 120.0, least: int = 10):
        self._clock, self._window, self._least = clock, window, least
        self._steps = 0  # since the start
        self._marks: deque[tuple[float, int]] = deque()  # seconds of training, steps
        self._paused = 0.0  # seconds so far
        self._pauses: deque[float] = deque(maxlen=self._PAUSES)
        self._pause_began: float | None = None

    def step(self, number: int = 1) -> None:
        """`number` optimizer steps are done."""
        self._steps += number
        if self._steps < self._FIRST:
            return
        self._marks.append((self._clock() - self._paused, self._steps))
        now, newest = self._marks[-1]
        while (
            len(self._marks) > 1
            and now - self._marks[1][0] >= self._window
            and (newest - self._marks[1][1] >= self._least)
        ):
            self._marks.popleft()

    def pause(self) -> None:
        """Training rests while the model is validated."""
        self._pause_began = self._clock()

    def go_on(self) -> None:
        """The validation is done."""
        if self._pause_began is not None:
            self._pauses.append(self._clock() - self._pause_began)
            self._paused += self._pauses[-1]
            self._pause_began = None

    def seconds(self, steps: int, validations: int) -> float | None:
        """For so many steps and validations; None as long as nothing can be known.

        Before the first validation it is not known how long one takes: NaN where some are due.
        """
        training = self.of_steps(steps)
        if training is None or not validations:
            return training
        return training + validations * sum(self._pauses) / len(self._pauses) if self._pauses else math.nan

    def of_steps(self, steps: int) -> float | None:
        """For the steps alone."""
        if not self._marks or self._marks[-1][1] - self._marks[0][1] < self._least:
            return None
        (began, first), (ended, last) = self._marks[0], self._marks[-1]
        return steps * (ended - began) / (last - first)


class RunProgress(ProgressBar):
    """One bar over all optimizer steps with the loss, pictures a second and the time left.

    The loss is the newest step's, a mean over its micro-batches in this process. Where the output is no terminal (a
    Slurm log) it writes a line every `seconds` instead.
    """

    def __init__(
        self, throughput: Throughput, seconds: float = 30.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__()
        self._throughput, self._interval, self._clock = throughput, seconds, clock
        self._console = Console()
        self._enabled = True

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._seen, self._total = trainer.global_step, int(trainer.estimated_stepping_batches)
        self._left, self._last_line = TimeLeft(self._clock), self._clock()
        self._loss: float | Tensor = math.nan
        self._sum: float | Tensor = 0.0  # of the step under way
        if not self._enabled or not self._console.is_terminal:
            self._bar = None
            return
        columns = (
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.4f} · {task.fields[speed]:.0f} pictures/s"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
        )
        self._bar = Progress(TextColumn("training"), *columns, console=self._console)
        fields: dict[str, Any] = {"loss": math.nan, "speed": 0.0, "left": ""}
        self._task = self._bar.add_task("", total=self._total, completed=self._seen, **fields)
        self._bar.start()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module, outputs, batch, batch_idx: int) -> None:
        if not self._enabled:
            return
        self._sum = self._sum + outputs["loss"]  # which Lightning has divided by the number of micro-batches
        if trainer.global_step == self._seen:
            return
        self._left.step(trainer.global_step - self._seen)
        self._seen, self._loss, self._sum = trainer.global_step, self._sum, 0.0
        if self._clock() - self._last_line >= (0.5 if self._bar else self._interval):
            self._show(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._enabled and hasattr(self, "_left"):
            self._left.pause()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._enabled and hasattr(self, "_left"):
            self._left.go_on()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._enabled:
            self._show(trainer)
        self._stop()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._stop()

    def _show(self, trainer: L.Trainer) -> None:
        self._last_line = self._clock()
        loss, speed, left = float(self._loss), self._throughput.images_per_second, self._time_left(trainer)
        if self._bar:
            self._bar.update(self._task, completed=self._seen, loss=loss, speed=speed, left=left)
            return
        line = f"step {self._seen}/{self._total} · loss {loss:.4f} · {speed:.0f} pictures/s"
        self._console.print(f"{line} · {left}" if left else line, highlight=False)

    def _time_left(self, trainer: L.Trainer) -> str:
        """In words; empty as long as it is not known."""
        steps = self._total - self._seen
        validations = _validations_until(trainer, self._total) - _validations_until(trainer, self._seen)
        seconds = self._left.seconds(steps, validations)
        if seconds is None:
            return ""
        if math.isnan(seconds):
            return f"{_hours(self._left.of_steps(steps) or 0.0)} left without validations"
        return f"{_hours(seconds)} left"

    def _stop(self) -> None:
        if getattr(self, "_bar", None):
            self._bar.stop()
            self._bar = None


def _hours(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def _validations_until(trainer: L.Trainer, step: int) -> int:
    """How many validations a run has had after `step` steps."""
    batches = trainer.val_check_batch
    if trainer.check_val_every_n_epoch is not None:
        batches = trainer.num_training_batches * trainer.check_val_every_n_epoch
    if not trainer.enable_validation or not batches or math.isinf(batches):
        return 0
    return int(step * trainer.accumulate_grad_batches / batches)

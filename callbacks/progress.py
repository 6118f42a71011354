"""How far a run has come: pictures a second, and one bar over the whole run."""

import time
from datetime import timedelta

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Throughput(L.Callback):
    """Measures pictures a second of training alone, over all processes, and logs it with the losses.

    Validation, evaluation and saving are not counted.
    """

    def __init__(self, global_batch_size: int):
        self.global_batch_size = global_batch_size
        self.images_per_second = 0.0
        self._steps, self._seconds, self._seen = 0, 0.0, 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._seen = _steps_done(trainer)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch, batch_idx: int) -> None:
        self._started = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module, outputs, batch, batch_idx: int) -> None:
        self._seconds += time.perf_counter() - self._started
        self._steps += _steps_done(trainer) - self._seen
        self._seen = _steps_done(trainer)
        # pyrefly: ignore[missing-attribute]  # Lightning's logger connector sets it
        if self._steps >= trainer.log_every_n_steps:
            self.images_per_second = self._steps * self.global_batch_size / self._seconds
            pl_module.log("throughput/images_per_second", self.images_per_second, rank_zero_only=True)
            self._steps, self._seconds = 0, 0.0


class RunProgress(ProgressBar):
    """One bar over all optimizer steps with the loss, pictures a second and the time left.

    Where the output is no terminal (a Slurm log) it writes a line every `seconds` instead.
    """

    def __init__(self, throughput: Throughput, seconds: float = 30.0):
        super().__init__()
        self._throughput, self._interval = throughput, seconds
        self._console = Console()
        self._enabled = True

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._first, self._total = _steps_done(trainer), int(trainer.estimated_stepping_batches)
        self._started = self._last_line = time.perf_counter()
        self._loss = float("nan")
        if not self._enabled or not self._console.is_terminal:
            self._bar = None
            return
        text = TextColumn("loss {task.fields[loss]:.4f} · {task.fields[speed]:.0f} pictures/s")
        columns = (
            BarColumn(),
            MofNCompleteColumn(),
            text,
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        self._bar = Progress(TextColumn("training"), *columns, console=self._console)
        self._task = self._bar.add_task("", total=self._total, completed=self._first, loss=float("nan"), speed=0.0)
        self._bar.start()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module, outputs, batch, batch_idx: int) -> None:
        if not self._enabled:
            return
        self._loss = outputs["loss"]
        due = time.perf_counter() - self._last_line >= (0.5 if self._bar else self._interval)
        if due:
            self._show(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._enabled:
            self._show(trainer)
        self._stop()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._stop()

    def _show(self, trainer: L.Trainer) -> None:
        self._last_line = time.perf_counter()
        done = _steps_done(trainer)
        loss = float(self._loss) * trainer.accumulate_grad_batches  # by which Lightning has divided it
        speed = self._throughput.images_per_second
        if self._bar:
            self._bar.update(self._task, completed=done, loss=loss, speed=speed)
            return
        per_step = (self._last_line - self._started) / max(1, done - self._first)
        left = timedelta(seconds=round(per_step * (self._total - done)))
        self._console.print(
            f"step {done}/{self._total} · loss {loss:.4f} · {speed:.0f} pictures/s · {left} left", highlight=False
        )

    def _stop(self) -> None:
        if getattr(self, "_bar", None):
            self._bar.stop()
            self._bar = None


def _steps_done(trainer: L.Trainer) -> int:
    """Batches after which the optimizer stepped: a GAN's two optimizers count as one step."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped

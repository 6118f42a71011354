"""Both loops in one process, in turn: ours as `medsynth train` runs it, and the plain one in its pauses."""

import contextlib
import gc
import io
import logging
import tempfile
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger

from benchmarks.cell import Batches, Cell, build
from benchmarks.flops import per_picture
from benchmarks.plain import CLIP_NORM, LOOPS, PlainLoop
from callbacks.divergence import Divergence
from callbacks.progress import RunProgress, Throughput
from callbacks.step_log import StepLog

WARM_UP = 3
"""Steps of each loop before the first is timed: memory is taken, kernels are chosen and compiled."""


@dataclass
class Measured:
    """What a cell's two loops did.

    ours, plain: seconds a step, one value a round. ours_bytes, plain_bytes: most device memory of each by itself, None
    on a CPU. flops: of a picture's share of a step.
    """

    flops: int
    ours: list[float] = field(default_factory=list)
    plain: list[float] = field(default_factory=list)
    ours_bytes: int | None = None
    plain_bytes: int | None = None


def measure(cell: Cell, rounds: int, steps: int) -> Measured:
    """Time `rounds` blocks of `steps` steps of either loop, whichever was first last in each next round.

    Raises:
        torch.OutOfMemoryError: the batch does not fit; whatever else a library raises comes through too.
    """
    with _quiet(), tempfile.TemporaryDirectory() as folder:
        return _measure(cell, rounds, steps, folder)


def _measure(cell: Cell, rounds: int, steps: int, folder: str) -> Measured:
    memory = _Memory(cell.device)
    module = build(cell)
    batches = Batches(cell, module)
    measured = Measured(per_picture(cell, module, batches))
    ours_alone = memory.taken()
    plain = LOOPS[cell.method](cell, module, batches)
    memory.others = memory.taken() - ours_alone
    if cell.compile:
        module.compile()
    turns = _Turns(cell, plain, rounds, steps, memory, measured)
    trainer = _trainer(cell, turns, folder, WARM_UP + rounds * steps)
    trainer.fit(module, datamodule=_InMemory(batches, list(getattr(module.config, "controls", []))))
    return measured


def free() -> None:
    """Give the memory of what is no longer used back, after an exception too."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class _Turns(L.Callback):
    """Times blocks of the training that it watches, from one `on_train_batch_end` to another.

    Between them it runs the plain loop. The device is waited for at the ends of blocks alone.
    """

    def __init__(self, cell: Cell, plain: PlainLoop, rounds: int, steps: int, memory: "_Memory", measured: Measured):
        self._cuda, self._plain, self._steps = cell.device == "cuda", plain, steps
        self._clock = time.process_time if cell.clock == "cpu" else time.perf_counter
        self._memory, self._measured = memory, measured
        pairs = [("ours", "plain"), ("plain", "ours")]
        self._order = [name for i in range(rounds) for name in pairs[i % 2]]
        self._left = WARM_UP
        self._started: float | None = None

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args) -> None:
        self._left -= 1
        if self._left:
            return
        if self._started is None:
            self._measured.ours_bytes = self._memory.peak()
            self._warm_up_plain()
        else:
            self._measured.ours.append((self._now() - self._started) / self._steps)
        while self._order and self._order.pop(0) == "plain":
            self._measured.plain.append(self._time_plain())
        self._left, self._started = self._steps, self._now()

    def _warm_up_plain(self) -> None:
        self._memory.others = self._memory.taken() - self._memory.others
        self._memory.reset()
        for _ in range(WARM_UP):
            self._plain.step()
        self._measured.plain_bytes = self._memory.peak()

    def _time_plain(self) -> float:
        started = self._now()
        for _ in range(self._steps):
            self._plain.step()
        return (self._now() - started) / self._steps

    def _now(self) -> float:
        if self._cuda:
            torch.cuda.synchronize()
        return self._clock()


class _Memory:
    """Device memory of one loop beside another, in bytes."""

    def __init__(self, device: str):
        self._cuda = device == "cuda"
        self.others = 0
        self.reset()

    def taken(self) -> int:
        return torch.cuda.memory_allocated() if self._cuda else 0

    def reset(self) -> None:
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int | None:
        return torch.cuda.max_memory_allocated() - self.others if self._cuda else None


class _InMemory(L.LightningDataModule):
    """Batches that lie ready, with what methods ask a data set for before they train."""

    @dataclass
    class Config:
        controls: list[str]

    def __init__(self, batches: Batches, controls: list[str]):
        super().__init__()
        self._batches, self.config = batches, self.Config(controls)

    def train_dataloader(self) -> Batches:
        return self._batches

    def rare_words(self) -> list[str]:
        return []


def _trainer(cell: Cell, turns: _Turns, folder: str, steps: int) -> L.Trainer:
    """As jobs/train.py makes it, without average, checkpoints, evaluation, and with a file in the place of MLflow."""
    throughput = Throughput(cell.batch)
    return L.Trainer(
        accelerator="gpu" if cell.device == "cuda" else "cpu",
        devices=1,
        precision=cell.precision,
        max_steps=steps,
        gradient_clip_val=CLIP_NORM,
        log_every_n_steps=50,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=[Divergence(20, Path(folder)), throughput, RunProgress(throughput), StepLog(), turns],
        logger=CSVLogger(folder),
        default_root_dir=folder,
    )


@contextlib.contextmanager
def _quiet():
    for library in ("lightning.pytorch", "diffusers", "transformers"):
        logging.getLogger(library).setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield

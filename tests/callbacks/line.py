"""The smallest method: a line that is fitted, and what trains it as `medsynth train` does, without its files."""

import csv
from dataclasses import dataclass, field
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from callbacks.durable import DurableCheckpointIO
from callbacks.step_log import StepLog
from lightning_modules.base import GenerativeModule, Supports
from lightning_modules.parts.optim import OptimConfig


@dataclass
class Numbers:
    """A batch: n inputs."""

    x: Tensor

    @property
    def seeds(self) -> Tensor:
        return torch.zeros(len(self.x), dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.x)

    def to(self, device: torch.device, non_blocking: bool = False) -> "Numbers":
        return Numbers(self.x.to(device))


@dataclass(frozen=True)
class LineConfig:
    """How the line learns."""

    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=0.01))
    """Optimizer."""


class Line(GenerativeModule):
    """Learns to give -1 at 0; at the steps in `spoilt`, from 1, its loss or its gradient is not finite."""

    Config = LineConfig
    supports = Supports(frozenset())

    def __init__(self, config: LineConfig | None = None, spoilt: dict[int, str] | None = None):
        super().__init__(config or LineConfig())
        self.spoilt = spoilt or {}
        self.after: list[list[float]] = []  # weights before each step, and in the end

    def build(self) -> None:
        torch.manual_seed(0)
        self.line = nn.Linear(1, 1)

    def trainable_modules(self) -> dict[str, nn.Module]:
        return {"line": self.line}

    def losses(self, batch: Numbers) -> dict[str, Tensor]:
        error = (self.line(batch.x[:, None]) + 1).square().mean()
        how = self.spoilt.get(self.trainer.global_step + 1) if self.training else None
        if how == "loss":
            error = error * torch.nan
        if how == "gradient":  # 0 · √0: the derivative is not finite, the value is
            error = error + (0 * self.line.bias).sqrt().sum()
        return {"loss": error, "inputs": batch.x.mean()}

    def on_train_batch_start(self, batch, batch_idx):
        self.after.append([p.item() for p in self.parameters() if not isinstance(p, DTensor) and p.numel()])

    def sample(self, conditions, seeds, *, steps=None, guidance=None):
        raise NotImplementedError

    def export(self, directory):
        raise NotImplementedError


def together_as(batches: list[Numbers]) -> Numbers:
    (batch,) = batches
    return batch


def fit(module: Line, folder: Path, *callbacks: L.Callback, inputs=None, checkpoint=None, **options) -> L.Trainer:
    """Train on batches of `inputs`, by default 12 of one number; the trainer, whose logger has what was logged."""
    batches = [Numbers(torch.tensor(x)) for x in (inputs or [[float(i)] for i in range(12)])]
    loader = DataLoader(batches, batch_size=1, collate_fn=together_as)
    options = {"max_steps": 6, "check_val_every_n_epoch": None, "val_check_interval": 100} | options
    options = {"accelerator": "cpu"} | options
    trainer = L.Trainer(
        log_every_n_steps=options.pop("log_every_n_steps", 1),
        callbacks=[*callbacks, StepLog()],
        plugins=[DurableCheckpointIO(), *options.pop("plugins", [])],
        logger=CSVLogger(folder, name=None, version="log"),
        enable_checkpointing=any("Checkpoint" in type(each).__name__ for each in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        default_root_dir=folder,
        **options,
    )
    trainer.fit(module, loader, DataLoader(batches[:1], batch_size=1, collate_fn=together_as), ckpt_path=checkpoint)
    return trainer


def logged(trainer: L.Trainer, name: str) -> dict[int, float]:
    """What the trainer logged under a name, by step."""
    with Path(trainer.logger.log_dir, "metrics.csv").open() as file:
        return {int(row["step"]): float(row[name]) for row in csv.DictReader(file) if row.get(name)}

"""Small runs of adversarial methods on batches in memory, for the tests of the family."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader

from datamodules.batches import Conditions, ImageBatch
from jobs.run.config import load_config
from jobs.run.folder import build_module
from lightning_modules.families.adversarial import Adversarial
from tests.conftest import REPOSITORY

METHODS = ("cell_gan", "dcgan", "wgan", "wgan_gp", "bgan", "began")
SIDE, CLASSES = 16, 2


def built(method: str, *settings: str) -> Adversarial:
    """The tiny preset's module, its weights fixed by a seed."""
    config = load_config([REPOSITORY / f"configs/tiny/{method}.yaml"], ["data.root=data", *settings])
    torch.manual_seed(0)
    module: Any = build_module(config)
    module.configure_model()
    return module


def batches(count: int, size: int = 6) -> list[ImageBatch]:
    """Pictures of noise with labels, each sample with a seed of its own."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for i in range(count):
        labels = torch.arange(size) % CLASSES
        pictures = torch.rand(size, 3, SIDE, SIDE, generator=generator) * (0.5 + 0.5 * labels.view(-1, 1, 1, 1))
        seeds = torch.arange(size) + size * i
        made.append(ImageBatch(pictures, Conditions(labels=labels), seeds, torch.zeros(size, dtype=torch.bool)))
    return made


def part(batch: ImageBatch, rank: int, processes: int) -> ImageBatch:
    """The rows of one of several processes."""
    size = len(batch) // processes
    return batch[slice(rank * size, (rank + 1) * size)]


def fit(module: Adversarial, given: Sequence[ImageBatch], **options: Any) -> L.Trainer:
    """Train on each batch once."""
    trainer = L.Trainer(
        **{"accelerator": "cpu", "devices": 1, "max_steps": len(given), "logger": False} | options,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(module, DataLoader(list(given), batch_size=None))
    return trainer


def with_a_nan(batch: ImageBatch) -> ImageBatch:
    """The same batch, but for one value of a picture."""
    pictures = batch.pictures().clone()
    pictures[0, 0, 0, 0] = float("nan")
    return replace(batch, images=pictures)

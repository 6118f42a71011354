"""What Lightning hands to callbacks by a type too wide, by the type that it has here."""

from typing import TYPE_CHECKING, Any, Protocol, cast

import lightning as L
import numpy as np

if TYPE_CHECKING:
    from datamodules.base import ImageDataModule
    from lightning_modules.base import GenerativeModule


class RunLogger(Protocol):
    """A logger as runs have them: Lightning's, which also takes pictures and tags."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None: ...

    def log_image(self, name: str, picture: np.ndarray, step: int) -> None: ...

    def set_tags(self, tags: dict[str, str]) -> None: ...


def data_of(trainer: L.Trainer) -> "ImageDataModule":
    """The DataModule that the trainer was given; Lightning declares no such attribute."""
    return cast(Any, trainer).datamodule


def loggers_of(trainer: L.Trainer) -> list[RunLogger]:
    """The trainer's loggers."""
    return cast(list[RunLogger], trainer.loggers)


def generative(module: L.LightningModule) -> "GenerativeModule":
    """The module that is trained."""
    return cast("GenerativeModule", module)

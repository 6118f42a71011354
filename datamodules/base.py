"""The DataModule that every data set derives from."""

import json
import math
import shutil
import signal
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Optional, TypeVar

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from datamodules.batches import Conditions, Drawing, ImageBatch, Sample
from datamodules.files.control_folder import OwnControls
from datamodules.stream import (
    EvaluationSampler,
    PlainLoader,
    SampleOrder,
    StreamBatchSampler,
    StreamLoader,
    require_sockets,
)
from medsynth.errors import UserError
from medsynth.files import write_whole
from medsynth.ranges import number


def leave_signals_to_the_parent(worker: int) -> None:
    """Begin a DataLoader's worker: a batch system signals all processes of a job, and the run still needs this one."""
    for signum in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, signal.SIG_IGN)


@dataclass
class DataConfig:
    """What every data set is configured by."""

    name: str = "???"
    """Which DataModule, by its name in jobs/run/registry.py."""
    root: str = "???"
    """Folder of the data set."""
    resolution: int = number(256, least=1)
    """Side of the square training pictures, pixels."""
    workers: int = number(4, least=0)
    """DataLoader worker processes for each training process; 0 loads in the training process."""
    latents: Optional[str] = None
    """Folder that `medsynth encode` wrote: training reads latents from it instead of pictures."""


_SHARED_MEMORY = Path("/dev/shm")

REFERENCE_READING = 2
"""Raised when the same files become other reference pictures, so that statistics kept of them are computed anew."""

ConfigT = TypeVar("ConfigT", bound=DataConfig)


class SizedDataset(Dataset[Tensor], ABC):
    """Maps an index below its length to a picture, uint8 (3, H, W)."""

    @abstractmethod
    def __len__(self) -> int: ...


class TrainingSamples(Dataset[ImageBatch], ABC):
    """Maps a stream position to one `ImageBatch` of one row.

    stream: position -> (pass, index), `length` positions a pass.
    """

    stream: SampleOrder

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, position: int) -> ImageBatch:
        """The row at that position of the stream."""

    @abstractmethod
    def sample(self, pass_: int, index: int) -> Sample:
        """Sample `index`, below the set's length, as that pass shows it."""

    @abstractmethod
    def without_picture(self, pass_: int, index: int) -> Sample:
        """`sample` with the picture None, which is read only where the control needs it."""


class ValidationSamples(Dataset[ImageBatch], ABC):
    """Maps an index to one `ImageBatch` of one row: no augmentation, fixed seed; -1 is padding, any row of seed -1."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> ImageBatch: ...

    @abstractmethod
    def sample(self, index: int) -> Sample:
        """Sample `index`."""

    @abstractmethod
    def without_picture(self, index: int) -> Sample:
        """`sample` with the picture None, which is read only where the control needs it."""

    @abstractmethod
    def noise_seed(self, index: int) -> int:
        """The seed of sample `index`; -1 for padding."""


class ImageDataModule(L.LightningDataModule, ABC, Generic[ConfigT]):
    """A data set as training batches, validation batches, reference pictures and prompts.

    A subclass gives the data sets and the prompts; the order, the sharding and the resume stand here. The trainer is
    asked for rank and world size only; without one there is a single process.
    """

    config: ConfigT

    def __init__(self, config: ConfigT, seed: int = 0, batch_size: int = 1, accumulate: int = 1):
        """Make, but do not read, the data set.

        seed: fixes split, order, augmentation and noise. batch_size: samples a device and micro-batch. accumulate:
        micro-batches an optimizer step.
        """
        super().__init__()
        self.config, self.seed, self.batch_size, self.accumulate = config, seed, batch_size, accumulate
        self._loader: StreamLoader | None = None
        self._position = 0

    @abstractmethod
    def check(self, on_progress: Callable[[int, int], None] | None = None) -> dict[str, Any]:
        """Check every row and picture; return what the run's summary shows (counts by plain names).

        `on_progress(done, total)` is told after each picture.

        Raises:
            UserError: one message that lists every bad row with its number and the mend.
        """

    def notes(self) -> list[str]:
        """What `check` found that is no fault and yet to be known, a line each."""
        return []

    @abstractmethod
    def fingerprint(self) -> str:
        """Hex digest of the pictures' names, byte sizes and split, the prompts, and the config that shapes them."""

    def pictures_fingerprint(self) -> str:
        """Hex digest of the pictures alone, the same by whatever reader or layout they come: `fingerprint`, where these
        cannot be told from all else."""
        return self.fingerprint()

    @abstractmethod
    def training_set(self) -> TrainingSamples:
        """What training reads, and a cache of latents is made of."""

    @abstractmethod
    def validation_set(self) -> ValidationSamples:
        """What validation reads, and a cache of latents is made of."""

    @abstractmethod
    def reference_set(self, split: str) -> SizedDataset:
        """The real pictures a generator is scored against: uint8 (3, H, W) at the training resolution, no augmentation.

        `split`: "train", "val" or "all".
        """

    def reading(self) -> dict[str, Any]:
        """How files become the pictures of `reference_set`, as facts of a score: resolution, square, sixteen_bit,
        window, reading."""
        return {
            "resolution": self.config.resolution, "square": "crop", "sixteen_bit": "full", "window": None,
            "reading": REFERENCE_READING,
        }  # fmt: skip

    @abstractmethod
    def evaluation_conditions(self, rows: int | Sequence[int]) -> Conditions:
        """What evaluation asks for: rows of one endless order, fixed by seed; a number n means the first n of it.

        Those with a control are best asked for by the batch: each is a picture in memory.
        """

    @abstractmethod
    def all_captions(self) -> list[str]:
        """Every caption that training, validation or evaluation can show, "" among them; sorted, each once."""

    def paired_pictures(self, rows: Sequence[int]) -> Tensor:
        """The real pictures, uint8 (n, 3, R, R), whose conditions are those rows of `evaluation_conditions`.

        Raises:
            UserError: the conditions are of no picture.
        """
        raise UserError("evaluation.paired: what evaluation asks for belongs to no real picture here; set it to false")

    def evaluation_length(self) -> int:
        """Rows of `evaluation_conditions` before the first of them comes again."""
        return len(self.validation_set())

    def own_controls(self, folder: Path, kinds: Sequence[str], levels: Sequence[int] | None = None) -> OwnControls:
        """Pictures of the user's own that are to steer a generation, read as training reads the data set's.

        folder: as `files.control_folder` says. kinds: those of `controls` that the model heeds; the channels of the
        others are 0. levels: grey values of the masks that it was trained with, where they are known and few.

        Raises:
            UserError: nothing steers here; a folder or a picture of a kind is missing.
        """
        raise UserError(f"data.name={self.config.name}: this data set has nothing that steers a generation")

    def control_pictures(self, control: Tensor) -> dict[str, np.ndarray]:
        """A control (C, R, R) as pictures (R, R) or (R, R, 3), uint8 or uint16, by kind: of masks the grey values that
        the data set's own have."""
        return {}

    def to_draw(self) -> list[Drawing]:
        """Pictures that the untrained model draws before training (class pictures of a prior-preservation loss)."""
        return []

    def rare_words(self) -> list[str]:
        """Words of the prompts that training is to give a meaning: each should be one token."""
        return []

    def split_facts(self) -> dict[str, Any]:
        """The seed, the sorted names of the pictures that train and that validate, and where there are any the classes
        and `data.group`, as JSON values; empty where there is no such choice."""
        return {}

    def write_split(self, run_dir: str) -> None:
        """Write `split_facts`, if any, to `split.json` in the run directory."""
        if split := self.split_facts():
            write_whole(Path(run_dir) / "split.json", json.dumps(split, indent=1) + "\n")

    def train_dataloader(self) -> StreamLoader:
        dataset = self.training_set()
        sampler = StreamBatchSampler(dataset.stream.length, self.batch_size, self.accumulate, *self._rank_and_world())
        sampler.position = self._position
        self._loader = StreamLoader(dataset, sampler, **self._loading())
        return self._loader

    def val_dataloader(self) -> DataLoader:
        dataset = self.validation_set()
        sampler = EvaluationSampler(len(dataset), self.batch_size, *self._rank_and_world())
        return PlainLoader(dataset, batch_sampler=sampler, **self._loading())

    def require_room(self, processes: int = 1) -> None:
        """Raise UserError where workers have no way to hand over batches, or /dev/shm no room for those that they have
        ready in all processes here: before training, not in the first validation, whose workers come on top."""
        if self.config.workers:
            require_sockets()
        if self.config.workers and _SHARED_MEMORY.is_dir():
            validation, ahead = self.validation_set(), 2 * self.config.workers  # torch's prefetch factor
            batches = ahead + min(ahead, math.ceil(len(validation) / self.batch_size))
            needed = validation[0].nbytes * self.batch_size * batches * processes
            free = shutil.disk_usage(_SHARED_MEMORY).free
            if needed > free:
                size = math.ceil(needed / 2**20)
                raise UserError(
                    f"data.workers={self.config.workers}: the batches that workers have ready take {size} MiB of "
                    f"{_SHARED_MEMORY}, which has {free // 2**20} MiB: give the container --shm-size={2 * size}m, or "
                    f"set data.workers={int(self.config.workers * free / needed)}"
                )

    def state_dict(self) -> dict[str, int]:
        position = self._loader.position if self._loader else self._position
        return {"position": position, "accumulate": self.accumulate}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self._position = state_dict["position"]
        if self._loader:  # a strategy that loads after its set-up may have had it made already
            self._loader.load_state_dict(state_dict)

    def rescale_progress(self, checkpoint: dict[str, Any]) -> None:
        """Restate a checkpoint's counts of micro-batches in those of this run, before Lightning restores them.

        Lightning takes an optimizer step where the count divides by the accumulation. A run that resumes on another
        number of processes accumulates otherwise: without this it would take its first step too early. A step that
        was open when the checkpoint was saved is taken again, as `position` has it.
        """
        before = checkpoint[type(self).__qualname__]["accumulate"]
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for counts in (progress["total"], progress["current"]):
            shift = counts["ready"] // before * self.accumulate - counts["ready"]
            counts.update({stage: count + shift for stage, count in counts.items()})

    def _loading(self) -> dict[str, Any]:
        workers = self.config.workers
        return {
            "num_workers": workers,
            "persistent_workers": workers > 0,
            "pin_memory": torch.cuda.is_available(),
            "worker_init_fn": leave_signals_to_the_parent,
        }

    def _rank_and_world(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

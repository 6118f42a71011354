"""Batches, the resumable sample stream, and the DataModule every data set derives from.

A run's order is one endless stream of samples: position p belongs to pass p // n and is the (p mod n)-th sample of
that pass's permutation. Order, augmentation and training noise are functions of (seed, position), never of the process:
whoever draws position p gets the same picture, prompt and noise, on one process or on eight, before a restart or after.
"""

import hashlib
import signal
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Optional

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from medsynth.errors import UserError

CONTROL_CHANNELS = {"canny": 1, "depth": 1, "mask": 1, "picture": 3}
"""Kinds of picture that steer a generation, and how many channels of `Conditions.control` each has."""


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that is a fixed function of `parts`, for instance `(run seed, "noise", position)`."""
    plain = tuple(part if isinstance(part, str) else int(part) for part in parts)  # NumPy's integers print otherwise
    digest = hashlib.blake2b(repr(plain).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _select(value: Any, index: slice | Sequence[int]) -> Any:
    if value is None or isinstance(value, Conditions):
        return value if value is None else value[index]
    if isinstance(value, list) and not isinstance(index, slice):
        return [value[i] for i in index]
    return value[index]


class _Rows:
    """What the batch types share: every field is None or has one row a sample."""

    def __getitem__(self, index: slice | Sequence[int] | Tensor):
        """The rows of a slice, a list of indices, or a tensor (m,) of indices or bool (n,) mask."""
        if isinstance(index, Tensor):
            index = (index.nonzero()[:, 0] if index.dtype == torch.bool else index).tolist()
        return replace(self, **{f.name: _select(getattr(self, f.name), index) for f in fields(self)})

    def to(self, device: torch.device | str, non_blocking: bool = False):
        """The same rows with every tensor on `device`."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {k: v.to(device, non_blocking=non_blocking) if hasattr(v, "to") else v for k, v in moved.items()}
        return replace(self, **moved)

    def pin_memory(self):
        """The same rows in page-locked memory, for the DataLoader."""
        pinned = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: v.pin_memory() if hasattr(v, "pin_memory") else v for k, v in pinned.items()})


@dataclass(frozen=True)
class Conditions(_Rows):
    """What a generator is asked for. Raw: the module tokenises and embeds.

    captions: n prompts; an empty string asks for an unconditional picture.
    labels: int64 (n,), class indices.
    control: float32 (n, C, H, W) in [0, 1], a picture that steers the generation.
    """

    captions: list[str] | None = None
    labels: Tensor | None = None
    control: Tensor | None = None

    def __len__(self) -> int:
        given = [v for v in (self.captions, self.labels, self.control) if v is not None]
        return len(given[0]) if given else 0


@dataclass(frozen=True)
class ImageBatch(_Rows):
    """n training samples.

    images: float32 (n, 3, H, W) in [0, 1], RGB; None where only cached latents travel.
    conditions: n rows of conditions.
    seeds: int64 (n,), always on the CPU: everything random about training on this sample (noise, time step) is drawn
        from its own seed; -1 marks padding, which no average counts.
    is_prior: bool (n,): True for class pictures of a prior-preservation loss.
    latents: float32 (n, 2C, h, w): posterior mean and log-variance of a frozen encoder, or None.
    text_embeddings: float32 (n, L, D) of a frozen text encoder, or None.
    text_mask: bool (n, L), True on the real tokens of `text_embeddings`, or None.
    """

    images: Tensor | None
    conditions: Conditions
    seeds: Tensor
    is_prior: Tensor
    latents: Tensor | None = None
    text_embeddings: Tensor | None = None
    text_mask: Tensor | None = None

    def __len__(self) -> int:
        return len(self.seeds)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "ImageBatch":
        """The same rows with every tensor but the seeds on `device`: generators are seeded from the CPU."""
        return replace(super().to(device, non_blocking), seeds=self.seeds)


@dataclass(frozen=True)
class Sample:
    """One sample as training or validation shows it; all but the noise.

    picture: float32 (3, R, R) in [0, 1], RGB; None where only the rest was asked for.
    caption: the prompt; "" is unconditional.
    control: float32 (C, R, R) in [0, 1], of the picture's own geometry, or None.
    is_prior: a class picture of a prior-preservation loss.
    label: class index, or None where the data set has no classes.
    """

    picture: Tensor | None
    caption: str
    control: Tensor | None = None
    is_prior: bool = False
    label: int | None = None

    def row(self, seed: int) -> ImageBatch:
        """A batch of this one sample, whose noise is drawn from `seed`."""
        return ImageBatch(
            images=None if self.picture is None else self.picture[None],
            conditions=Conditions(
                captions=[self.caption],
                labels=None if self.label is None else torch.tensor([self.label]),
                control=None if self.control is None else self.control[None],
            ),
            seeds=torch.tensor([seed]),
            is_prior=torch.tensor([self.is_prior]),
        )


DRAWN_FILE = "drawn.json"
"""File in a folder of drawings, written before the first of them: the prompts and what drew them."""


@dataclass(frozen=True)
class Drawing:
    """A picture that the untrained model is asked to draw, once, before training.

    path: the file to write, a PNG. caption: its prompt. seed: of its noise.
    """

    path: Path
    caption: str
    seed: int


def undrawn(drawings: list[Drawing]) -> list[Drawing]:
    """Those whose file is not there."""
    # Folders are listed: of a path that was asked for in vain, a network file system says so for a while.
    folders = {drawing.path.parent for drawing in drawings}
    there = {path for folder in folders if folder.is_dir() for path in folder.iterdir()}
    return [drawing for drawing in drawings if drawing.path not in there]


def collate(samples: list[ImageBatch]) -> ImageBatch:
    """One batch of the rows of `samples`, which all have the same fields filled."""
    return _concatenate(samples)


def _concatenate(rows: list[Any]) -> Any:
    first = rows[0]
    if first is None:
        return None
    if isinstance(first, Tensor):
        return torch.cat(rows)
    if isinstance(first, list):
        return [item for row in rows for item in row]
    return type(first)(**{f.name: _concatenate([getattr(r, f.name) for r in rows]) for f in fields(first)})


class SampleStream:
    """The endless shuffled stream over a data set of `length` samples: stream position -> (pass, index).

    Each pass is one permutation, drawn from (seed, pass), so that every index comes exactly once a pass.
    """

    def __init__(self, length: int, seed: int):
        self.length, self.seed = length, seed
        self._permutations: dict[int, Tensor] = {}

    def __call__(self, position: int) -> tuple[int, int]:
        epoch, offset = divmod(position, self.length)
        if epoch not in self._permutations:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "order", epoch))
            # A batch spans at most two passes unless the set is smaller than the batch: keep only the newest few.
            self._permutations = {e: p for e, p in self._permutations.items() if e >= epoch - 1}
            self._permutations[epoch] = torch.randperm(self.length, generator=generator)
        return epoch, int(self._permutations[epoch][offset])


class StreamBatchSampler(Sampler[list[int]]):
    """Stream positions of one process's micro-batches.

    Optimizer step s trains on positions [s·G, (s+1)·G), G = batch_size · accumulate · world_size, whatever the number
    of processes; a pass that does not divide by G runs on into the next, so no sample is dropped or repeated.
    An epoch is max(1, length // G) steps and starts at `position`.
    """

    def __init__(self, length: int, batch_size: int, accumulate: int = 1, rank: int = 0, world_size: int = 1):
        self.batch_size, self.accumulate, self.rank, self.world_size = (
            batch_size,
            accumulate,
            rank,
            world_size,
        )
        self.global_batch_size = batch_size * accumulate * world_size
        self.steps_per_epoch = max(1, length // self.global_batch_size)
        self.position = 0

    def __len__(self) -> int:
        return self.steps_per_epoch * self.accumulate

    def __iter__(self) -> Iterator[list[int]]:
        for micro in range(len(self)):
            first = self.position + (micro * self.world_size + self.rank) * self.batch_size
            yield list(range(first, first + self.batch_size))


class StreamLoader(DataLoader):
    """A DataLoader over the stream that knows how far training has come, prefetching aside."""

    def __init__(self, dataset: Dataset, sampler: StreamBatchSampler, **kwargs):
        super().__init__(dataset, batch_sampler=sampler, collate_fn=collate, **kwargs)
        self._stream = sampler
        self._taken = 0  # micro-batches handed out since `_stream.position`

    @property
    def position(self) -> int:
        """Samples of the stream that whole optimizer steps have consumed."""
        return self._stream.position + self._taken // self._stream.accumulate * self._stream.global_batch_size

    def __iter__(self):
        self._stream.position, self._taken = self.position, 0
        for batch in super().__iter__():
            self._taken += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """What tells Lightning that a resume inside an epoch is sound."""
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._stream.position, self._taken = state["position"], 0


class EvaluationSampler(Sampler[list[int]]):
    """Batches of the indices 0 … length-1 in order, dealt out to the processes in turn.

    Every process gets the same number of batches, as sharded models need. Those beyond the end hold the index -1:
    padding, which `ImageBatch.seeds` marks and no average counts.
    """

    def __init__(self, length: int, batch_size: int, rank: int = 0, world_size: int = 1):
        self.length, self.batch_size, self.rank, self.world_size = length, batch_size, rank, world_size

    def __len__(self) -> int:
        return -(-self.length // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[list[int]]:
        for turn in range(len(self)):
            first = (turn * self.world_size + self.rank) * self.batch_size
            yield list(range(first, min(first + self.batch_size, self.length))) or [-1]


def leave_signals_to_the_parent(worker: int) -> None:
    """Begin a DataLoader's worker: a batch system signals all processes of a job, and the run still needs this one."""
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


@dataclass
class DataConfig:
    """What every data set is configured by."""

    name: str = "???"
    """Which DataModule, by its name in jobs/run/registry.py."""
    root: str = "???"
    """Folder of the data set."""
    resolution: int = 256
    """Side of the square training pictures, pixels."""
    workers: int = 4
    """DataLoader worker processes for each training process; 0 loads in the training process."""
    latents: Optional[str] = None
    """Folder that `medsynth encode` wrote: training reads latents from it instead of pictures."""


class ImageDataModule(L.LightningDataModule, ABC):
    """A data set as training batches, validation batches, reference pictures and prompts.

    A subclass gives the data sets and the prompts; the order, the sharding and the resume stand here. The trainer is
    asked for rank and world size only; without one there is a single process.
    """

    config: DataConfig

    def __init__(self, config: DataConfig, seed: int = 0, batch_size: int = 1, accumulate: int = 1):
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

    @abstractmethod
    def fingerprint(self) -> str:
        """Hex digest of the pictures' names, byte sizes and split, the prompts, and the config that shapes them."""

    @abstractmethod
    def training_set(self) -> Dataset:
        """Maps a stream position to one `ImageBatch` of one row.

        It also has `stream`, the `SampleStream` or its like: position -> (pass, index), `length` positions a pass. And
        what a cache is made of: `sample(pass, index)`, the `Sample` as that pass shows it, for every index below the
        set's length; `without_picture(pass, index)`, the same with the picture None, which reads no picture unless the
        control needs it.
        """

    @abstractmethod
    def validation_set(self) -> Dataset:
        """Maps an index to one `ImageBatch` of one row: no augmentation, fixed seed.

        The index -1 is padding: any row, with seed -1. It also has `sample(index)` and `without_picture(index)`, as the
        training set has, and `noise_seed(index)`, -1 for padding.
        """

    @abstractmethod
    def reference_set(self, split: str) -> Dataset:
        """The real pictures a generator is scored against: uint8 (3, H, W) at the training resolution, no augmentation.

        `split`: "train", "val" or "all".
        """

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

    def to_draw(self) -> list[Drawing]:
        """Pictures that the untrained model draws before training (class pictures of a prior-preservation loss)."""
        return []

    def rare_words(self) -> list[str]:
        """Words of the prompts that training is to give a meaning: each should be one token."""
        return []

    def write_split(self, run_dir: str) -> None:
        """Write which pictures train and which validate to the run directory, where there is such a choice."""

    def train_dataloader(self) -> StreamLoader:
        dataset = self.training_set()
        sampler = StreamBatchSampler(dataset.stream.length, self.batch_size, self.accumulate, *self._rank_and_world())
        sampler.position = self._position
        self._loader = StreamLoader(dataset, sampler, **self._loading())
        return self._loader

    def val_dataloader(self) -> DataLoader:
        dataset = self.validation_set()
        sampler = EvaluationSampler(len(dataset), self.batch_size, *self._rank_and_world())
        return DataLoader(dataset, batch_sampler=sampler, collate_fn=collate, **self._loading())

    def state_dict(self) -> dict[str, int]:
        position = self._loader.position if self._loader else self._position
        return {"position": position, "accumulate": self.accumulate}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._position = state["position"]
        if self._loader:  # a strategy that loads after its set-up may have had it made already
            self._loader.load_state_dict(state)

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

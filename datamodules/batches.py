"""What travels between the rooms: samples, batches of them, and what a generator is asked for."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import pad

CONTROL_CHANNELS = {"canny": 1, "depth": 1, "mask": 1, "picture": 3}
"""Kinds of picture that steer a generation, and how many channels of `Conditions.control` each has."""


def _select(value: Any, index: slice | Sequence[int]) -> Any:
    if value is None or isinstance(value, Conditions):
        return value if value is None else value[index]
    if isinstance(value, list) and not isinstance(index, slice):
        return [value[i] for i in index]
    return value[index]


@dataclass(frozen=True)
class _Rows:
    """What the batch types share: every field is None or has one row a sample."""

    def __getitem__(self, index: slice | Sequence[int] | Tensor) -> Self:
        """The rows of a slice, a list of indices, or a tensor (m,) of indices or bool (n,) mask."""
        if isinstance(index, Tensor):
            index = (index.nonzero()[:, 0] if index.dtype == torch.bool else index).tolist()
        return replace(self, **{f.name: _select(getattr(self, f.name), index) for f in fields(self)})

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """The same rows with every tensor on `device`."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {k: v.to(device, non_blocking=non_blocking) if hasattr(v, "to") else v for k, v in moved.items()}
        return replace(self, **moved)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(getattr(getattr(self, f.name), "nbytes", 0) for f in fields(self))

    def pin_memory(self) -> Self:
        """The same rows in page-locked memory, for the DataLoader."""
        pinned = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: v.pin_memory() if hasattr(v, "pin_memory") else v for k, v in pinned.items()})


@dataclass(frozen=True)
class Conditions(_Rows):
    """What a generator is asked for. Raw: the module tokenises and embeds.

    captions: n prompts; an empty string asks for an unconditional picture.
    labels: int64 (n,), class indices.
    control: float32 (n, C, H, W) in [0, 1], a picture that steers the generation.
    negatives: n prompts that guidance leads away from, each in the place of the empty one; of `captions` alone, and
        only where the method's `supports.negatives`.
    """

    captions: list[str] | None = None
    labels: Tensor | None = None
    control: Tensor | None = None
    negatives: list[str] | None = None

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
    picture_ids: int64 (n,): the identity of each picture, by which samples of one picture are known, or None.
    latents: float32 (n, 2C, …): posterior mean and log-variance of a frozen encoder, or None.
    image_embeddings: float32 (n, D) that a frozen image encoder made of the same augmented pictures, or None.
    text_embeddings: float (n, L, D) of a frozen text encoder, in the type that a cache holds them in, or None.
    text_mask: bool (n, L), True on the real tokens of `text_embeddings`, or None.
    """

    images: Tensor | None
    conditions: Conditions
    seeds: Tensor
    is_prior: Tensor
    picture_ids: Tensor | None = None
    latents: Tensor | None = None
    image_embeddings: Tensor | None = None
    text_embeddings: Tensor | None = None
    text_mask: Tensor | None = None

    def __len__(self) -> int:
        return len(self.seeds)

    def pictures(self) -> Tensor:
        """`images`, where they travel.

        Raises:
            ValueError: only latents do.
        """
        if self.images is None:
            raise ValueError("the batch has latents in the place of pictures")
        return self.images

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
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
    picture_id: the picture's identity, in [0, 2^63), whatever its crop and caption; None where it is not known.
    """

    picture: Tensor | None
    caption: str
    control: Tensor | None = None
    is_prior: bool = False
    label: int | None = None
    picture_id: int | None = None

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
            picture_ids=None if self.picture_id is None else torch.tensor([self.picture_id]),
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
    """One batch of the rows of `samples`, which all have the same fields filled; texts are padded to the longest."""
    with torch.autocast("cpu", enabled=False):  # which knows no half precision on a CPU
        return _concatenate(_of_one_length(samples))


def _of_one_length(samples: list[ImageBatch]) -> list[ImageBatch]:
    """The same, texts of different lengths with zeros behind them, which the mask tells from tokens."""
    texts = [(sample.text_embeddings, sample.text_mask) for sample in samples]
    given = [(embeddings, mask) for embeddings, mask in texts if embeddings is not None and mask is not None]
    longest = max((mask.shape[1] for _, mask in given), default=0)
    if len(given) < len(samples) or all(mask.shape[1] == longest for _, mask in given):
        return samples
    padded = []
    for sample, (embeddings, mask) in zip(samples, given, strict=True):
        behind = longest - mask.shape[1]
        text = {"text_embeddings": pad(embeddings, (0, 0, 0, behind)), "text_mask": pad(mask, (0, behind))}
        padded.append(replace(sample, **text))
    return padded


def _concatenate(rows: list[Any]) -> Any:
    first = rows[0]
    if first is None:
        return None
    if isinstance(first, Tensor):
        return torch.cat(rows)
    if isinstance(first, list):
        return [item for row in rows for item in row]
    return type(first)(**{f.name: _concatenate([getattr(r, f.name) for r in rows]) for f in fields(first)})

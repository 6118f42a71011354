"""The pictures of a data set, opened by name: DICOM files and all others, shown as a config asks for."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from datamodules.files.dicom import apply_window, dicom_size, is_dicom, read_dicom, stretch
from datamodules.files.images import Geometry, read_rgb
from datamodules.files.raster import Show, show_full, show_range, upright_size
from medsynth.errors import UserError

SIXTEEN_BIT = ("full", "range", "window")
"""How 16-bit files are shown; see `datamodules.captioned.CaptionedConfig.sixteen_bit`."""


class ReadingConfig(Protocol):
    """What of a data set's config says how its pictures are read; see `datamodules.captioned.CaptionedConfig`."""

    resolution: int
    check: str
    max_pixels: int
    sixteen_bit: str
    window: list[float] | None


def read_picture(
    path: Path, max_pixels: int, least_side: int = 0, sixteen_bit: str = "full", window: Sequence[float] | None = None
) -> Tensor:
    """Any picture file as it is meant to be seen: uint8 (3, H, W).

    Args:
        least_side: of a JPEG, see `images.read_rgb`; 0 decodes all of it.
        sixteen_bit, window: how files of more than 8 bits are shown, and DICOM files that name no window.

    Raises:
        UserError: one line, which begins with `path` and says what is wrong with it.
    """
    if is_dicom(path):
        return read_dicom(path, max_pixels, window)
    return read_rgb(path, max_pixels, least_side, shown_by(sixteen_bit, window))


def picture_size(path: Path, max_pixels: int) -> tuple[int, int]:
    """(width, height) of a picture file as it is read, by its header alone.

    Raises:
        UserError: the message starts with `path`: missing, or no picture that can be read.
    """
    return dicom_size(path, max_pixels)[0] if is_dicom(path) else upright_size(path, max_pixels)


def shown_by(sixteen_bit: str, window: Sequence[float] | None) -> Show:
    """What shows values of more than 8 bits, one of `SIXTEEN_BIT`."""
    if sixteen_bit == "window":
        return partial(_show_window, window=window)
    return show_range if sixteen_bit == "range" else show_full


def check_window(window: Sequence[float] | None, used: bool) -> None:
    """Raise UserError where `data.window` is no window, or nothing is shown through it."""
    if window is not None and window[1] < 1:
        raise UserError(f"data.window={window}: must be a centre and a width of at least 1")
    if window is not None and not used:
        raise UserError(f"data.window={window}: shows nothing without data.sixteen_bit=window")


def _show_window(values: NDArray[np.uint16], white: int, window: Sequence[float] | None) -> NDArray[np.floating]:
    if window:
        return apply_window(values, window[0], window[1])
    # Percentiles are for greys: colours of all pictures would be stretched, each otherwise.
    return stretch(values) if values.ndim == 2 else show_full(values, white)


ReadingT = TypeVar("ReadingT", bound=ReadingConfig)


class Pictures(Generic[ReadingT]):
    """The pictures below one folder, opened by their relative path.

    It travels to the DataLoader's workers: a subclass that keeps files open leaves them out of its pickled state.
    """

    def __init__(self, folder: Path, config: ReadingT):
        self.folder, self.config = folder, config

    def open_picture(self, name: str, least_side: int = 0) -> Tensor:
        """uint8 (3, H, W); with `least_side` possibly at a fraction of its size, no side below it.

        Raises:
            UserError: one line, which begins with the file and says what is wrong with it.
        """
        config = self.config
        return read_picture(self.folder / name, config.max_pixels, least_side, config.sixteen_bit, config.window)

    def check_picture(self, name: str) -> None:
        """Raise the UserError of `open_picture`, as far as `data.check` looks."""
        if self.config.check == "headers":
            picture_size(self.folder / name, self.config.max_pixels)
        else:
            self.open_picture(name, 2 * self.config.resolution)

    def sizes(self, name: str) -> list[int]:
        """Bytes of each file that a sample of this picture is made of, for the fingerprint."""
        return [self.length(name)]

    def length(self, name: str) -> int:
        """Bytes of the picture's own file."""
        return self.path(name).stat().st_size

    def read(self, name: str, start: int = 0, count: int = -1) -> bytes:
        """The file's bytes from `start`: all, or `count` of them."""
        with self.path(name).open("rb") as file:
            file.seek(start)
            return file.read(count)

    def path(self, name: str) -> Path:
        """Where a picture lies; of one in a shard, what messages call it."""
        return self.folder / name

    def control(
        self, name: str, geometry: Geometry, picture: Callable[[], Tensor], rng: np.random.Generator | None
    ) -> Tensor | None:
        """What steers the generation of this picture: float32 (C, R, R) in [0, 1], or None where nothing does.

        geometry: of the picture, to `apply` to what belongs to it. picture: gives the picture, uint8 (3, R, R), after
        `geometry` and before any jitter; it is read only where this is called. rng: for what training varies; None
        where nothing is varied.
        """
        return None

    def squared(self, name: str, geometry: Geometry) -> Tensor:
        """The picture as uint8 (3, R, R)."""
        return geometry.apply(self.open_picture(name, 2 * geometry.resampled))

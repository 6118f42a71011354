"""The pictures of a data set, opened by name."""

from collections.abc import Callable
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import numpy as np
from torch import Tensor

from datamodules.files.images import Geometry, check_header, read_rgb


class ReadingConfig(Protocol):
    """What of a data set's config says how its pictures are read; see `datamodules.captioned.CaptionedConfig`."""

    resolution: int
    check: str
    max_pixels: int


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
        return read_rgb(self.folder / name, self.config.max_pixels, least_side)

    def check_picture(self, name: str) -> None:
        """Raise the UserError of `open_picture`, as far as `data.check` looks."""
        if self.config.check == "headers":
            check_header(self.folder / name, str(self.folder / name), self.config.max_pixels)
        else:
            self.open_picture(name, 2 * self.config.resolution)

    def sizes(self, name: str) -> list[int]:
        """Bytes of each file that a sample of this picture is made of, for the fingerprint."""
        return [(self.folder / name).stat().st_size]

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
        return geometry.apply(self.open_picture(name, 2 * geometry.side))

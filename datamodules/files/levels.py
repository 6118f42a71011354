"""Grey levels over a whole set of masks and depth maps: what no single file shows of how they are meant."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medsynth.errors import UserError

_GREY = 255
"""Masks whose white is less say themselves how many classes they number."""
_ALMOST_BLACK = 1 / 16


class Survey:
    """The levels of a set's masks, whose white is `mask_max`, and of its depth maps; filled by any thread."""

    def __init__(self, mask_max: int):
        self._mask_max = mask_max
        self._levels: dict[int, Path] = {}
        self._depths: dict[float, Path] = {}

    def add_mask(self, path: Path, values: NDArray) -> None:
        """values: bool (0 and white), uint8 or uint16."""
        if values.dtype != np.bool_:
            for level in np.flatnonzero(np.bincount(values.ravel())).tolist():
                self._levels[level] = min(path, self._levels.get(level, path))  # the same file at every start

    def add_depth(self, path: Path, values: NDArray, white: int) -> None:
        """values: unsigned, from 0 to `white`."""
        share = int(values.max()) / white
        self._depths[share] = min(path, self._depths.get(share, path))

    def check(self) -> None:
        """Raise UserError where what was added would steer by what is almost black, though it is not meant so."""
        self._check_masks()
        brightest = max(self._depths, default=0)
        if 0 < brightest <= _ALMOST_BLACK:
            raise UserError(
                f"data.depth: none of the depth maps goes beyond {brightest:.1%} of white ({self._depths[brightest]}): "
                "scale them to all the values that their bits can hold"
            )

    def _check_masks(self) -> None:
        most, classes = self._mask_max, numbered(self._levels, self._mask_max)
        if not classes:
            return
        last = classes[-1]
        shown = ", ".join(map(str, classes if len(classes) < 5 else (*classes[:3], "…", last)))
        found = f"data.mask_max={most}: the masks' levels are {shown} (as in {self._levels[last]})"
        if most in self._levels:
            raise UserError(
                f"{found} beside {most} (as in {self._levels[most]}): these are classes with a border, not greys; save "
                f"{most} as 0 or as a class, and set data.mask_max to the greatest class"
            )
        raise UserError(f"{found}: these are classes, not greys of {most}; set data.mask_max to the greatest class")


def numbered(levels: Iterable[int], most: int) -> list[int]:
    """The levels between 0 and `most` where they number classes, and are no greys of a scale up to `most`; else none.

    They do where all lie next to black, or follow one another closely and then leave a wide gap below `most`. Greys
    that are meant as such, soft or compressed borders too, come close to `most` or lie evenly between it and 0.
    """
    between = sorted(level for level in levels if 0 < level < most)
    if most < _GREY or not between:
        return []
    last = between[-1]
    gap, step = most - last, last / len(between)
    return between if 8 * last <= most or (4 * gap >= most and gap > 8 * step) else []

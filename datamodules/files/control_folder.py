"""A folder of the user's own pictures that are to steer a generation: what stands where, and by which names.

    FOLDER/masks/  depth/  canny/  picture/    a folder for each kind, the same file names in each
    FOLDER/                                    or, where one kind steers, its pictures themselves

Without `canny/` the edges are sought in the pictures, which may as well stand in `images/`, as in a data set.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode

from datamodules.files.control import channels
from datamodules.files.images import Geometry
from datamodules.files.pictures import Pictures, picture_size
from datamodules.files.raster import read_grey
from datamodules.files.walk import PictureFolder, is_document, listed, stem, walk
from medsynth.errors import UserError

FOLDERS = {"canny": ("canny",), "depth": ("depth",), "mask": ("masks",), "picture": ("picture", "images")}
"""Names of each kind's folder; the first is what `medsynth sample` writes."""


def kind_folders(folder: Path, kinds: Sequence[str]) -> dict[str, Path]:
    """The folder of each kind; that of the pictures in the place of `canny`'s where there are no edge maps.

    Raises:
        UserError: there is no such folder, or it lacks that of a kind.
    """
    if not folder.is_dir():
        raise UserError(f"--controls: there is no folder {folder}")
    there = {kind: found for kind in FOLDERS if (found := _kind_folder(folder, kind))}
    if not there and len(kinds) == 1:
        return {kinds[0]: folder}
    sought = "picture" in there and "canny" not in there  # edges of the pictures
    needed = dict.fromkeys("picture" if kind == "canny" and sought else kind for kind in kinds)
    if missing := [kind for kind in needed if kind not in there]:
        wanted = ", ".join(f"{FOLDERS[kind][0]}/" for kind in kinds)
        raise UserError(
            f"--controls: {folder} has no folder {FOLDERS[missing[0]][0]}/; this run is steered by {wanted}"
        )
    return {kind: there[kind] for kind in needed}


def _kind_folder(folder: Path, kind: str) -> Path | None:
    found = [folder / name for name in FOLDERS[kind] if (folder / name).is_dir()]
    if len(found) > 1:
        raise UserError(f"--controls: {found[0]} and {found[1]} both hold pictures that steer: remove one of them")
    return found[0] if found else None


def _shared(named: Mapping[Path, Mapping[str, str]]) -> list[str]:
    """The names that every folder's pictures have, sorted.

    Raises:
        UserError: there is none; a folder lacks a name that another has.
    """
    every = sorted(set().union(*named.values()))
    if not every:
        raise UserError(f"--controls: {' and '.join(map(str, named))}: there are no pictures")
    for folder, found in named.items():
        if missing := [name for name in every if name not in found]:
            raise UserError(f"--controls: {folder} has no picture called {listed(missing)}, which another folder has")
    return every


def _by_name(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """Each picture (a relative path) by its name without suffix; raises UserError where two have one."""
    found: dict[str, str] = {}
    for file in names:
        name = stem(file)
        if name in found:
            raise UserError(f"--controls: {folder}: {found[name]} and {file} have one name: keep one of them")
        found[name] = file
    return found


def _unused(root: Path, used: set[Path]) -> list[str]:
    """The files below `root` that are none of those, relative."""
    return [name for name in walk(root) if root / name not in used and not is_document(name)]


class OwnControls:
    """Pictures of the user's own that steer, by name.

    names: sorted, without suffix; folders below are part of a name. unused: what else lies there, relative paths.
    """

    def __init__(
        self, root: Path, files: Mapping[str, PictureFolder], pictures: Pictures, read: Sequence[str],
        controls: Sequence[str], square: str,
    ):  # fmt: skip
        """root: of all. files: of `kind_folders`, opened. pictures: reads the kinds `read`; edge maps are read here.
        controls: all kinds, in the order of their channels. square: as the data set's."""
        self._pictures, self._read, self._channels = pictures, read, channels(controls)
        self._geometry = Geometry(pictures.config.resolution, square)
        named = {folder.folder: _by_name(folder.folder, folder.names()) for folder in files.values()}
        self.names = _shared(named)
        self._files = {kind: named[folder.folder] for kind, folder in files.items()}
        self._folders = {kind: folder.folder for kind, folder in files.items()}
        self.unused = _unused(root, {path for name in self.names for path in self.paths(name)})

    def paths(self, name: str) -> list[Path]:
        """The files that the control of that name is made of."""
        return [self._path(kind, name) for kind in self._files]

    def _path(self, kind: str, name: str) -> Path:
        return self._folders[kind] / self._files[kind][name]

    def steering(self, name: str) -> Tensor:
        """float32 (C, R, R) in [0, 1], the channels of `data.controls`; 0 in those of kinds that do not steer.

        Raises:
            UserError: one line, which begins with the file and says what is wrong with it.
        """
        self._check_shapes(name)
        parts, geometry, most = {}, self._geometry, self._pictures.config.max_pixels
        picture = cache(lambda: self._pictures.squared(self._files["picture"][name], geometry))
        file = next(iter(self._files.values()))[name]  # what belongs to a picture has its name but for the suffix
        read = self._pictures.control(file, geometry, picture, None)
        if read is not None:
            parts = {kind: read[place] for kind, place in channels(self._read).items()}
        if "canny" in self._files:
            path = self._path("canny", name)
            parts["canny"] = edges_of(path, read_grey(path, most)[0], geometry)
        end = max(place.stop for place in self._channels.values())
        whole = torch.zeros(end, geometry.side, geometry.side)
        for kind, part in parts.items():
            whole[self._channels[kind]] = part
        return whole

    def _check_shapes(self, name: str) -> None:
        """Refuse pictures of one name that would not lie on each other."""
        most = self._pictures.config.max_pixels
        (first, (wide, high)), *others = [(path, picture_size(path, most)) for path in self.paths(name)]
        for path, (width, height) in others:
            if abs(width * high - height * wide) > max(wide, high, width, height):  # but for a rounded side
                raise UserError(
                    f"{path} is {width}x{height}, {first} {wide}x{high}, of another shape: crop one of them"
                )


def edges_of(path: Path, values: NDArray, geometry: Geometry) -> Tensor:
    """An edge map (H, W) of the user's own, white on black, as float32 (1, R, R): 1 on edges, 0 elsewhere.

    A line one pixel wide remains one, whatever the size: where the map shrinks, a pixel is an edge if any in it was.

    Raises:
        UserError: it has other values than black and white, or is mostly white.
    """
    lines = torch.from_numpy(values > 0).float()[None]
    if len(np.unique(values[values > 0])) > 1:
        raise UserError(
            f"{path} is no edge map, white lines on black: put pictures whose edges are to be sought into a folder "
            "picture/"
        )
    if lines.mean() > 0.5:
        raise UserError(f"{path} is mostly white: draw edges as white lines on black")
    extent, side = max(values.shape) if geometry.square == "pad" else min(values.shape), geometry.side
    if extent <= side:
        return geometry.apply(lines, InterpolationMode.NEAREST_EXACT)
    rows, columns = (
        replace(geometry, side=extent).apply(lines, InterpolationMode.NEAREST_EXACT)[0].nonzero(as_tuple=True)
    )
    places = ((torch.arange(extent) + 0.5) * side / extent).long()
    edges = torch.zeros(1, side, side)
    edges[0, places[rows], places[columns]] = 1
    return edges

"""Chest X-rays with masks of their nodules, and any other pictures with masks: what ControlNet learns from.

On disk, below `<root>`:

    images/      pictures of 8 or 16 bits, or DICOM (.dcm)
    masks/       a mask of each, a grey picture of the same stem and size
    depth/       a depth map of each, likewise; `medsynth prepare depth` writes them
    captions.csv Filename (the suffix may be left out) and Prompt; pictures without a row have `data.prompt`

Masks and depth maps are needed only where `data.controls` names them.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, Optional

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode

from datamodules.captioned import CaptionedConfig, CaptionedDataModule, Contents, Pair, Progress, picture_names
from datamodules.files.control import canny, channels
from datamodules.files.control_folder import OwnControls, kind_folders
from datamodules.files.depth import SOURCE_FILE
from datamodules.files.detection import split_not_read
from datamodules.files.dicom import dicom_size, is_dicom
from datamodules.files.images import Geometry
from datamodules.files.levels import Survey
from datamodules.files.pictures import Pictures, picture_size
from datamodules.files.raster import read_grey
from datamodules.files.tables import Table, drop_bad_rows, read_table
from datamodules.files.walk import PictureFolder, others_in, stem, walk
from medsynth.errors import UserError
from medsynth.ranges import number, numbers

_CAPTIONS = "captions.csv"
_SURVEYED = 100
"""Masks and depth maps that are decoded for their levels where `data.check=headers` decodes no others."""
_FOLDER_KEYS = {"depth": "depth", "mask": "masks", "picture": "images"}  # config keys of each kind's folder
_MOST_LEVELS = 32  # grey values that masks of classes have; with more they are shades, of which any may come


@dataclass
class ChestXRayConfig(CaptionedConfig):
    """Which pictures and masks are trained on, how deep pictures are shown, and what steers the generation."""

    reads_dicom: ClassVar[bool] = True

    name: str = "chest_xray"
    """This data set's name."""
    images: str = "images"
    """Folder of the pictures, relative to root."""
    masks: str = "masks"
    """Folder of the masks, relative to root."""
    depth: str = "depth"
    """Folder of the depth maps, relative to root."""
    captions: Optional[str] = None
    """CSV file with the columns Filename and Prompt, relative to root; none: captions.csv, where there is one."""
    prompt: str = "chest X-ray with lung nodules"
    """Caption of a picture without a row in `captions`."""
    controls: list[str] = field(default_factory=lambda: ["mask"])
    """What steers the generation, in the order of the channels: `canny` an edge map, `depth`, `mask` (1 channel each),
    `picture` the picture itself (3 channels)."""
    canny_low: list[float] = numbers([30.0], count=(1, 2), least=0)
    """Lower threshold of the edge map, or lowest and highest of a uniform draw in training, whose middle is taken
    elsewhere; in sums of Sobel gradients: a step by h of 255 greys has 4h. The defaults are for radiographs, whose
    edges are faint; for photographs edge-conditioned ControlNets are used to 100, 200 and no blur."""
    canny_high: list[float] = numbers([60.0], count=(1, 2), least=0)
    """Upper threshold, likewise: an edge starts above it and goes on above the lower one."""
    canny_blur: list[float] = numbers([1.5], count=(1, 2), least=0)
    """Standard deviation, pixels, of the blur before the edges are sought, likewise; 0 = none."""
    mask_max: int = number(255, least=1, most=65535)
    """Grey value of a mask that becomes 1.0: 1 for masks of 0 and 1, N - 1 for N classes as 0 … N - 1. Masks of one bit
    need none."""
    mask_resize: bool = False
    """Take masks of another size than their picture too, by nearest neighbour, where the aspect ratio agrees."""
    depth_model: Optional[str] = None
    """Depth-estimation model for `medsynth prepare depth`: a hub id or a local folder that transformers'
    AutoModelForDepthEstimation loads (DPT, Depth Anything …)."""
    window: Optional[list[float]] = numbers(None, count=2)
    """Centre and width of the values that are shown, for DICOM files that name none themselves and for pictures of more
    than 8 bits with `sixteen_bit=window`; none: of greys from the 0.5th to the 99.5th percentile of each picture."""
    sixteen_bit: str = "window"

    def __post_init__(self):
        super().__post_init__()
        channels(self.controls)
        for key in ("canny_low", "canny_high", "canny_blur"):
            values = getattr(self, key)
            if values != sorted(values):
                raise UserError(f"data.{key}={values}: must be one number, or a lowest and a highest")
        if self.canny_low[-1] > self.canny_high[0]:
            raise UserError(f"data.canny_low={self.canny_low}: must not exceed data.canny_high={self.canny_high}")


class XRayPictures(Pictures[ChestXRayConfig]):
    """Pictures of 8 or 16 bits or DICOM, with the masks and depth maps that `data.controls` asks for."""

    def __init__(self, root: Path, config: ChestXRayConfig):
        super().__init__(root / config.images, config)
        self._root = root
        folders = {"mask": config.masks, "depth": config.depth}
        self._folders = {kind: PictureFolder(root / folders[kind]) for kind in config.controls if kind in folders}
        self._survey = Survey(config.mask_max)
        self.mask_levels: set[int] = set()  # of the masks that `check_picture` has decoded

    def check_picture(self, name: str) -> None:
        """Refuse an unsound picture, and a mask or depth map that is missing, unsound or of another size."""
        super().check_picture(name)
        path, most = self.folder / name, self.config.max_pixels
        size, cells = dicom_size(path, most) if is_dicom(path) else (picture_size(path, most),) * 2
        for kind in self._folders:
            path = self._beside(kind, name)
            own = picture_size(path, most)
            if own == cells != size:
                sizes = f"{own[0]}x{own[1]}, as its picture's pixels are, which are not square"
                raise UserError(f"{path} is {sizes}: stretch it to {size[0]}x{size[1]}, as the picture is shown")
            self._check_size(kind, path, own, size)
            if self.config.check == "all":
                values, white = read_grey(path, most)
                self._add(kind, path, values, white)
                if kind == "mask":
                    self.mask_levels |= _levels(values, self.config.mask_max)

    def check_levels(self, names: Sequence[str]) -> None:
        """Refuse masks and depth maps that all of the set shows to be no greys; names: its sound pictures.

        Where `data.check` has decoded none, some of them are, spread over the set.

        Raises:
            UserError: one line, which names a key, a file and the mend.
        """
        if self.config.check == "headers":
            for name in names[:: max(1, len(names) // _SURVEYED)]:
                self._look_beside(name)
        self._survey.check()

    def _look_beside(self, name: str) -> None:
        for kind in self._folders:
            path = self._beside(kind, name)
            try:
                found = read_grey(path, self.config.max_pixels)
            except UserError:  # whoever reads it says so
                continue
            self._add(kind, path, *found)

    def _add(self, kind: str, path: Path, values: NDArray, white: int) -> None:
        if kind == "depth":
            self._survey.add_depth(path, values, white)
        else:
            self._white(kind, path, values, white)
            self._survey.add_mask(path, values)

    def unread(self, names: Iterable[str]) -> dict[str, list[str]]:
        """By its folder, what lies beside none of these pictures, and masks and depth maps that no control asks for."""
        stems, found = {stem(name) for name in names}, {self.config.masks: [], self.config.depth: []}
        for folder in self._folders.values():
            lonely = [name for name in folder.names() if stem(name) not in stems]
            own = [name for name in folder.others if name != SOURCE_FILE]
            found[folder.folder.relative_to(self._root).as_posix()] = sorted(lonely + own)
        return found

    def sizes(self, name: str) -> list[int]:
        return super().sizes(name) + [self._beside(kind, name).stat().st_size for kind in self._folders]

    def control(
        self, name: str, geometry: Geometry, picture: Callable[[], Tensor], rng: np.random.Generator | None
    ) -> Tensor | None:
        make = {
            "canny": lambda: self._edges(picture(), rng),
            "depth": lambda: geometry.apply(self._read("depth", name), InterpolationMode.BILINEAR),
            "mask": lambda: geometry.apply(self._read("mask", name), InterpolationMode.NEAREST_EXACT),
            "picture": lambda: picture().float() / 255,
        }
        made = [make[kind]() for kind in self.config.controls]
        return torch.cat(made) if made else None

    def _edges(self, picture: Tensor, rng: np.random.Generator | None) -> Tensor:
        config = self.config
        ranges = [(values[0], values[-1]) for values in (config.canny_low, config.canny_high, config.canny_blur)]
        low, high, blur = [rng.uniform(*r) if rng else sum(r) / 2 for r in ranges]
        return canny(picture, low, high, blur)

    def _beside(self, kind: str, name: str) -> Path:
        """The mask or depth map of a picture."""
        folder = self._folders[kind]
        try:
            return folder.folder / folder.find(stem(name))
        except UserError as error:
            mend = "; run `medsynth prepare depth CONFIG`" * (kind == "depth" and self.config.depth_model is not None)
            raise UserError(f"{error}{mend}") from None

    def _check_size(self, kind: str, path: Path, size: tuple[int, int], wanted: tuple[int, int]) -> None:
        if size == wanted:
            return
        sizes = f"{path} is {size[0]}x{size[1]}, its picture {wanted[0]}x{wanted[1]}"
        if kind == "depth":
            raise UserError(f"{sizes}: make it again")
        # Of one shape, to the pixel by which a side may be rounded.
        if abs(size[0] * wanted[1] - size[1] * wanted[0]) > max(wanted):
            raise UserError(f"{sizes}, of another shape: put the right mask there")
        if not self.config.mask_resize:
            raise UserError(f"{sizes}: save it at that size, or set data.mask_resize=true")

    def _read(self, kind: str, name: str) -> Tensor:
        """A mask or depth map at its own size: float32 (1, H, W) in [0, 1]."""
        path = self._beside(kind, name)
        values, white = read_grey(path, self.config.max_pixels)
        return torch.from_numpy(values.astype(np.float32) / self._white(kind, path, values, white))[None]

    def _white(self, kind: str, path: Path, values: NDArray, white: int) -> int:
        """The value that becomes 1.0; refuses a mask whose greatest value is far from it."""
        if kind == "depth" or values.dtype == np.bool_:
            return white
        highest, most = int(values.max()), self.config.mask_max
        if highest > most or 0 < 16 * highest <= most:  # classes 0, 1, 2 … as grey levels would all be next to black
            border = "; if it marks a border, save that as 0 or as a class" * (highest == 255 > most)
            raise UserError(
                f"{path} reaches {highest} where data.mask_max={most}: set it to the masks' greatest value{border}"
            )
        return most


class _OwnPictures(XRayPictures):
    """Those of a folder of the user's own, whose masks must have the greys of those that the run was trained with."""

    def __init__(self, config: ChestXRayConfig, levels: Sequence[int] | None):
        super().__init__(Path(), config)
        self._levels = levels

    def _white(self, kind: str, path: Path, values: NDArray, white: int) -> int:
        if kind == "depth":
            return super()._white(kind, path, values, white)
        try:
            most = super()._white(kind, path, values, white)
        except UserError:
            raise UserError(
                f"{path} reaches {values.max()}, and the masks that the run was trained with reach "
                f"{self.config.mask_max}: save it with the same greys"
            ) from None
        if self._levels and (strange := _levels(values, self.config.mask_max) - {*self._levels}):
            raise UserError(
                f"{path} has the grey {min(strange)}, and the masks that the run was trained with have "
                f"{', '.join(map(str, self._levels))}: save it with those"
            )
        return most


def _levels(mask: NDArray, most: int) -> set[int]:
    """The grey values of a mask, of which `most` is 1.0; white of one bit is that."""
    return set((np.unique(mask).astype(int) * (most if mask.dtype == np.bool_ else 1)).tolist())


class ChestXRay(CaptionedDataModule[ChestXRayConfig]):
    """Pairs of picture and caption, each with what steers its generation."""

    Config = ChestXRayConfig
    shaping: ClassVar[tuple[str, ...]] = (
        *CaptionedDataModule.shaping,
        *("controls", "canny_low", "canny_high", "canny_blur", "mask_max", "window", "sixteen_bit"),
    )

    def check(self, on_progress: Progress | None = None) -> dict[str, int]:
        """Read the captions and look at every picture, mask and depth map once; later calls remember.

        Without a captions file the rows of a report are the pictures in the order of their names.
        """
        return super().check(on_progress)

    def write_depth(self, model: Path, on_progress: Progress | None = None) -> int:
        """Estimate the depth of every picture that has no depth map yet, and write them; returns how many.

        `model` is the local folder of `data.depth_model`. A map is a 16-bit PNG of its picture's size, from
        that picture's least value to its greatest. `on_progress(done, total)` hears of each picture.

        Raises:
            UserError: no such model; the folder holds depth maps of another model; a picture cannot be read.
        """
        from datamodules.files.depth import write_depth_maps

        source = self.config.depth_model
        assert source is not None  # `model` is its folder
        pictures = XRayPictures(self._root, replace(self.config, controls=[]))
        names = self._folder().names()
        return write_depth_maps(
            pictures.open_picture, names, self._root / self.config.depth, source, model, on_progress
        )

    def own_controls(self, folder: Path, kinds: Sequence[str], levels: Sequence[int] | None = None) -> OwnControls:
        places = kind_folders(folder, kinds)
        files = {kind: PictureFolder(place, dicom=kind == "picture") for kind, place in places.items()}
        own: dict[str, Any] = {key: str(places[kind]) for kind, key in _FOLDER_KEYS.items() if kind in places}
        read = [kind for kind in kinds if kind != "canny" or "canny" not in places]
        pictures = _OwnPictures(replace(self.config, controls=read, **own), levels)
        return OwnControls(folder, files, pictures, read, self.config.controls, self.config.square)

    def control_pictures(self, control: Tensor) -> dict[str, np.ndarray]:
        white, pictures = {"canny": 255, "depth": 65535, "mask": self.config.mask_max, "picture": 255}, {}
        for kind, place in channels(self.config.controls).items():
            values = np.rint(control[place].cpu().numpy() * white[kind])
            values = values.astype(np.uint16 if white[kind] > 255 else np.uint8)
            pictures[kind] = values.transpose(1, 2, 0) if len(values) == 3 else values[0]
        return pictures

    def _folder(self) -> PictureFolder:
        folder = self._root / self.config.images
        if not folder.is_dir():
            raise UserError(f"data.root: {folder} is not a folder")
        beside = tuple(f"{name}/" for name in (self.config.masks, self.config.depth) if name != self.config.images)
        prefix = "" if PurePosixPath(self.config.images) == PurePosixPath() else f"{self.config.images}/"
        files = [name for name in walk(folder) if not f"{prefix}{name}".startswith(beside)]
        return PictureFolder(folder, dicom=True, files=files)

    def _read(self, on_progress: Progress | None) -> Contents:
        folder = self._folder()
        tables = self._tables(folder)
        pictures = XRayPictures(self._root, self.config)
        names = sorted({row["Filename"] for table in tables for row in table.rows.values()})
        faults = self.faults(pictures, names, on_progress)
        for table in tables:
            for line, row in list(table.rows.items()):
                if row["Filename"] in faults:
                    table.reject(line, faults[row["Filename"]])
        groups = self.groups(tables, lambda row: (row["Filename"], row))
        skipped = drop_bad_rows(tables, self.config.on_bad)
        pictures.check_levels([name for name in names if name not in faults])

        pairs = [Pair(row["Filename"], row["Prompt"]) for table in tables for row in table.rows.values()]
        train, val = self.split(pairs, groups)
        summary = {
            "pictures": len(picture_names(pairs)),
            "pairs": len(pairs),
            "prompts": len({pair.prompt for pair in pairs}),
            "train pictures": len(picture_names(train)),
            "validation pictures": len(picture_names(val)),
            "skipped rows": skipped,
        }
        beside = pictures.unread(folder.names())
        notes = split_not_read(folder.names()) + others_in(
            self._root, {self.config.images: folder.others} | beside, [self.config.captions or _CAPTIONS]
        )
        levels = sorted(pictures.mask_levels) if len(pictures.mask_levels) <= _MOST_LEVELS else None
        return Contents(train, val, pictures, summary, groups=groups, notes=notes, mask_levels=levels)

    def _tables(self, folder: PictureFolder) -> list[Table]:
        """The rows of the captions file, whose Filename becomes the picture's path, and those of all other pictures."""
        captioned = self._captions()
        for line, row in list(captioned.rows.items()):
            try:
                row["Filename"] = folder.find(row["Filename"])
            except UserError as error:
                captioned.reject(line, str(error))
        named = {row["Filename"] for row in captioned.rows.values()}
        others = Table(self.config.images)
        for line, name in enumerate(folder.names(), 1):
            if name not in named:
                others.rows[line] = {"Filename": name, "Prompt": self.config.prompt}
        return [table for table in (captioned, others) if table.rows or table.faults]

    def _captions(self) -> Table:
        path = self._root / (self.config.captions or _CAPTIONS)
        if self.config.captions is None and not path.exists():
            return Table(path.name)
        return read_table(path, ("Filename", "Prompt"), "data.captions")

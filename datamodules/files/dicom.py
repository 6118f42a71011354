"""DICOM files as a viewer shows them, and the window that brings stored values into [0, 1].

A window says which values are shown: `centre` in the middle of the greys, `width` from black to white.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms.v2.functional import resize

from datamodules.files.dicom_display import GREY, Display, Lut, read_display
from datamodules.files.dicom_header import COPY, Header, one_line, open_dicom
from datamodules.files.dicom_pixels import colours, decode
from datamodules.files.images import SUFFIXES
from medsynth.errors import UserError

DICOM_SUFFIXES = frozenset({".dcm", ".dicom", ".ima"})

PERCENTILES = (0.5, 99.5)
"""Values shown black and white where neither the file nor the config gives a window."""


def is_dicom(path: Path) -> bool:
    """Whether a file is DICOM, by its suffix, or else by its first bytes where it has no suffix of another picture.

    A file that cannot be opened is none.
    """
    suffix = path.suffix.lower()
    if suffix in DICOM_SUFFIXES or suffix in SUFFIXES:
        return suffix in DICOM_SUFFIXES
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def apply_window(values: NDArray, centre: float, width: float, function: str = "LINEAR") -> NDArray[np.float64]:
    """Values -> [0, 1] by a VOI LUT function of DICOM PS3.3 C.11.2.1: LINEAR, LINEAR_EXACT or SIGMOID.

    LINEAR reaches from centre - 1/2 - (width - 1)/2 to centre - 1/2 + (width - 1)/2, as the standard has it.
    """
    values = np.asarray(values, dtype=np.float64)
    if function == "SIGMOID":
        return 1 / (1 + np.exp((-4 * (values - centre) / width).clip(-700, 700)))
    if function == "LINEAR":
        centre, width = centre - 0.5, max(width - 1, 1e-9)  # of width 1: a threshold
    return ((values - centre) / width + 0.5).clip(0, 1)


def stretch(values: NDArray, counted: NDArray[np.bool_] | None = None) -> NDArray[np.float64]:
    """Values -> [0, 1], linear from the 0.5th to the 99.5th percentile of all or the `counted`; a constant is black."""
    low, high = np.percentile(values if counted is None else values[counted], PERCENTILES)
    return ((values - low) / max(high - low, 1e-200)).clip(0, 1)  # values of a tiny slope lie close


def to_rgb(unit: NDArray) -> Tensor:
    """Grey (H, W) in [0, 1] -> uint8 (3, H, W)."""
    return torch.from_numpy(np.rint(255 * unit).astype(np.uint8)).expand(3, -1, -1).contiguous()


def dicom_size(path: Path, max_pixels: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """(width, height) of a DICOM picture as it is shown, and of its pixels, which may not be square.

    Raises:
        UserError: what `read_dicom` would refuse, as far as the header tells.
    """
    display = read_display(open_dicom(path, pixels=False), max_pixels)
    return display.size, (display.columns, display.rows)


def read_dicom(path: Path, max_pixels: int, window: Sequence[float] | None = None) -> Tensor:
    """A single DICOM picture as it is meant to be seen: uint8 (3, H, W), bright where the display is bright.

    Grey, in order: modality LUT or rescale slope and intercept; the file's first VOI LUT, else its first window, else
    `window` (centre, width; in rescaled units), else the percentiles, pixel padding aside; MONOCHROME1 inverted;
    padding black. Colour: RGB, YBR or a palette as it is. Pixels that are not square: the picture is stretched along
    their longer side, bilinearly. Overlays are left out.

    Raises:
        UserError: the message starts with `path`: no such file, no DICOM, cut off, no pixel data, several frames,
            more than `max_pixels` pixels, a compression without a decoder, elements that are no sound display.
    """
    header = open_dicom(path)
    display = read_display(header, max_pixels)
    try:
        cells = decode(header, display)
        if display.photometric in GREY:
            picture = to_rgb(_greys(header, display, cells, window))
        else:
            unit = colours(header, display, cells)
            picture = torch.from_numpy(np.rint(255 * unit).astype(np.uint8)).permute(2, 0, 1)
    except UserError:
        raise
    except Exception as error:  # pydicom's decoders answer damaged bytes with errors of almost any kind
        raise UserError(f"{path} cannot be decoded ({one_line(error)}); {COPY}") from error
    size = list(display.size[::-1])
    return picture.contiguous() if list(picture.shape[1:]) == size else resize(picture, size, antialias=True)


def _greys(header: Header, display: Display, cells: NDArray, window: Sequence[float] | None) -> NDArray[np.float64]:
    padding, values = display.padded(cells), display.cells.values(cells)
    if padding is not None:
        values = np.where(padding, 0, values)
    if display.cells.real and not np.isfinite(values).all():
        raise header.fault(
            "has pixels that are no finite numbers: name them in FloatPixelPaddingValue, or leave it out"
        )
    values = display.rescaled(values)
    if isinstance(display.voi, Lut):
        unit = display.voi(values) / display.voi.white
    elif display.voi:
        unit = apply_window(values, display.voi.centre, display.voi.width, display.voi.function)
    elif window:
        unit = apply_window(values, window[0], window[1])
    else:
        unit = stretch(values, None if padding is None else ~padding)
    if display.inverted:
        unit = 1 - unit
    if padding is not None:
        unit[padding] = 0.0
    return unit

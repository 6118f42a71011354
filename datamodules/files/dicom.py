"""Grey pictures by their stored values: masks, and DICOM files and 16-bit PNG or TIFF brought into [0, 1] by a window.

A window says which values are shown: `centre` in the middle of the greys, `width` from black to white.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags
from torch import Tensor
from torchvision.transforms.v2.functional import resize

from datamodules.files.dicom_display import GREY, Display, Lut, read_display
from datamodules.files.dicom_header import COPY, Header, one_line, open_dicom
from datamodules.files.dicom_pixels import colours, decode
from datamodules.files.images import MOST_PIXELS, _opened
from medsynth.errors import UserError

DICOM_SUFFIXES = frozenset({".dcm", ".dicom"})

PERCENTILES = (0.5, 99.5)
"""Values shown black and white where neither the file nor the config gives a window."""


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


def read_values(path: Path, max_pixels: int) -> NDArray:
    """The stored values (H, W) of a grey picture file: bool, uint8 or uint16; of a palette, the indices.

    Raises:
        UserError: the message starts with `path`: missing, undecodable, more than `max_pixels` pixels, colour.
    """
    with _opened(path, str(path), max_pixels) as image:
        values = np.asarray(image)
    if values.ndim == 3 and values.shape[2] == 3 and (values == values[..., :1]).all():
        values = values[..., 0]
    if values.ndim != 2 or values.dtype not in (np.bool_, np.uint8, np.uint16):
        raise UserError(f"{path} is no grey picture of 1, 8 or 16 bits: save it as one")
    return values


def is_deep(path: Path) -> bool:
    """Whether a PNG or TIFF holds 16-bit grey, by its header; raises UserError where that cannot be read."""
    with _opened(path, str(path), MOST_PIXELS) as image:
        return image.mode.startswith("I;16")


def header_size(path: Path) -> tuple[int, int]:
    """(width, height), upright, of a DICOM or other picture file, by the header alone.

    Raises:
        UserError: the message starts with `path`: missing, or no picture.
    """
    if path.suffix.lower() in DICOM_SUFFIXES:
        return dicom_size(path, MOST_PIXELS)[0]
    with _opened(path, str(path), MOST_PIXELS) as image:
        # Asked for the EXIF fields of a PNG that has none yet, Pillow decodes it all to look behind the pixels.
        exif = image.getexif() if image.format != "PNG" or "exif" in image.info else {}
        return image.size[::-1] if exif.get(ExifTags.Base.Orientation, 1) >= 5 else image.size


def read_deep(path: Path, max_pixels: int, window: Sequence[float] | None) -> Tensor:
    """A 16-bit grey PNG or TIFF through `window` (centre, width) or else its percentiles: uint8 (3, H, W).

    Raises:
        UserError: as `read_values`.
    """
    values = read_values(path, max_pixels)
    return to_rgb(apply_window(values, window[0], window[1]) if window else stretch(values))


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

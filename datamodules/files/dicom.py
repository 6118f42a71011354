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
    return ((values - low) / max(high - low, 1e-9)).clip(0, 1)


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
        dataset = _open(path, stop_before_pixels=True)
        if "Rows" not in dataset or "Columns" not in dataset:
            raise UserError(f"{path} holds no picture (no Rows and Columns): leave it out")
        return int(dataset.Columns), int(dataset.Rows)
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


def read_dicom(path: Path, max_pixels: int, window: Sequence[float] | None = None) -> Tensor:
    """A single grey DICOM picture as it is meant to be seen: uint8 (3, H, W), bright where the display is bright.

    In order: modality LUT or rescale slope and intercept; the file's first VOI LUT, else its first window, else
    `window` (centre, width; in rescaled units), else the percentiles, pixel padding aside; MONOCHROME1 inverted.

    Raises:
        UserError: the message starts with `path`: no such file, no DICOM, cut off, no pixel data, several frames,
            colour, more than `max_pixels` pixels, a compression without a decoder.
    """
    dataset = _open(path)
    _check_grey(path, dataset)
    if int(dataset.Rows) * int(dataset.Columns) > max_pixels:
        raise UserError(f"{path} has more than data.max_pixels={max_pixels} pixels")
    try:
        return to_rgb(_shown(dataset, window))
    except Exception as error:  # pydicom's decoders answer damaged bytes with errors of almost any kind
        raise UserError(f"{path} cannot be decoded ({_one_line(error)}); {_mend(error)}") from error


def _open(path: Path, **options):
    import pydicom

    try:
        return pydicom.dcmread(path, **options)
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except pydicom.errors.InvalidDicomError:
        raise UserError(f"{path} is no DICOM file: give it the suffix of what it is, or leave it out") from None
    except Exception as error:  # a header that ends early or lies can fail anywhere
        raise UserError(f"{path} cannot be read ({_one_line(error)}); {_COPY}") from error


def _check_grey(path: Path, dataset) -> None:
    if any(element not in dataset for element in ("PixelData", "Rows", "Columns")):
        raise UserError(f"{path} has no pixel data: it is cut off or no picture; {_COPY} or leave it out")
    frames = int(dataset.get("NumberOfFrames") or 1)
    if frames > 1:
        raise UserError(f"{path} has {frames} frames: save the one that is meant as a file of its own")
    colours = dataset.get("PhotometricInterpretation", "MONOCHROME2")
    if colours not in ("MONOCHROME1", "MONOCHROME2"):
        raise UserError(f"{path} is a colour DICOM ({colours}): save it as a grey one, or as PNG")


def _shown(dataset, window: Sequence[float] | None) -> NDArray[np.float64]:
    from pydicom.pixels import apply_modality_lut

    stored = dataset.pixel_array
    padding = _padding(dataset, stored)
    unit = _windowed(dataset, apply_modality_lut(stored, dataset), window, ~padding)
    if dataset.get("PhotometricInterpretation") == "MONOCHROME1":
        unit = 1 - unit
    return np.where(padding, 0.0, unit)


def _padding(dataset, stored: NDArray) -> NDArray[np.bool_]:
    """Pixels outside of the picture proper, by their stored value (PS3.3 C.7.5.1.1.2)."""
    value = dataset.get("PixelPaddingValue")
    if value is None:
        return np.zeros(stored.shape, dtype=bool)
    low, high = sorted((value, dataset.get("PixelPaddingRangeLimit", value)))
    padding = (stored >= low) & (stored <= high)
    return padding if not padding.all() else np.zeros_like(padding)


def _windowed(dataset, values: NDArray, window: Sequence[float] | None, counted: NDArray) -> NDArray[np.float64]:
    if dataset.get("VOILUTSequence"):
        return _looked_up(dataset.VOILUTSequence[0], values, dataset.original_encoding[1])
    centre, width = (_first(dataset.get(key)) for key in ("WindowCenter", "WindowWidth"))
    if centre is not None and width:  # some devices write a width of 0 for none
        return apply_window(values, centre, width, dataset.get("VOILUTFunction", "LINEAR"))
    return apply_window(values, window[0], window[1]) if window else stretch(values, counted)


def _looked_up(lut, values: NDArray, little_endian: bool) -> NDArray[np.float64]:
    """Values -> [0, 1] by a VOI LUT (PS3.3 C.11.2.1.1); those beyond its ends are shown as the ends."""
    entries, first, bits = lut.LUTDescriptor
    entries, table = entries or 2**16, lut.LUTData
    if isinstance(table, bytes):
        word = "<u2" if little_endian else ">u2"
        table = np.frombuffer(table, word if len(table) >= 2 * entries else np.uint8, count=entries)
    index = (np.rint(values).astype(np.int64) - first).clip(0, entries - 1)
    return np.asarray(table, dtype=np.float64)[index] / (2**bits - 1)


def _first(value) -> float | None:
    """A number, or the first of several; None where the element is absent or empty."""
    from pydicom.multival import MultiValue

    if isinstance(value, MultiValue):
        value = value[0] if value else None
    return None if value in (None, "") else float(value)


_COPY = "copy it again from its source"


def _mend(error: Exception) -> str:
    return "pip install python-gdcm, which can" if "missing dependencies" in str(error) else _COPY


def _one_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(":") or type(error).__name__

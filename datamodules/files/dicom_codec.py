"""Which decoder takes which compression of DICOM (transfer syntax), and whether a compressed picture is whole."""

import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydicom.pixels.decoders.base import Decoder

RLE = "1.2.840.10008.1.2.5"
_EXTENDED_JPEG = "1.2.840.10008.1.2.4.51"
BYTES = ("1.2.840.10008.1.2.4.50", _EXTENDED_JPEG)
"""Syntaxes that Pillow decodes to a byte a value, also where the file has cells of 16 bits."""
_LOSSLESS_JPEG = ("1.2.840.10008.1.2.4.57", "1.2.840.10008.1.2.4.70")
_JPEG_LS = ("1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.4.81")
_JPEG_2000 = ("1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.91")
_HTJ2K = tuple(f"1.2.840.10008.1.2.4.20{kind}" for kind in (1, 2, 3))
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC} | {0xF7}
"""Markers of JPEG, and the one of JPEG-LS, before rows and columns."""
_PACKAGES = {
    _EXTENDED_JPEG: "pylibjpeg pylibjpeg-libjpeg",  # GPL: the user's choice, no dependency of this project
    **dict.fromkeys(_JPEG_LS, "pyjpegls"),
    **dict.fromkeys(_HTJ2K, "pylibjpeg pylibjpeg-openjpeg"),
}

# GDCM comes last, for lossless JPEG: some damaged pictures end its process instead of raising an error.
_PREFERENCE = ("pydicom", "pillow", "pyjpegls", "pylibjpeg", "gdcm")


def plugin(decoder: "Decoder", samples: int, stored: int) -> str | None:
    """The one plugin of pydicom's `decoder` to use for pixels of `samples` values of `stored` bits; None: none."""
    able = [name for name in _PREFERENCE if name in decoder.available_plugins]
    if stored > 8 and (decoder.UID == _EXTENDED_JPEG or (decoder.UID in _JPEG_2000 and samples > 1)):
        able = [name for name in able if name != "pillow" and (decoder.UID, name) != (_EXTENDED_JPEG, "gdcm")]
    if stored in (6, 7) and decoder.UID in _JPEG_LS:
        able = [name for name in able if name != "gdcm"]
    return able[0] if able else None


def packages(syntax: str) -> str:
    """What pip installs for it."""
    return _PACKAGES.get(syntax, "python-gdcm")


def fault(frame: bytes, syntax: str, rows: int, columns: int, samples: int) -> str | None:
    """What is wrong with a compressed picture, as far as its frame shows; None: nothing.

    Decoders fill what is missing at the end of lossless JPEG with one grey, and a damaged head ends GDCM's process.
    """
    if syntax == RLE:  # unfolded it may be 64 times as large: no more is taken than cells of 32 bits could need
        most = 64 + 5 * rows * columns * samples + 4096
        return f"its pixels are more than {columns}x{rows}" if len(frame) > most else None
    if b"\xff\xd9" not in frame[-10:]:
        return "its pixels end early"
    head = (rows, columns, samples)
    if syntax in _LOSSLESS_JPEG and _jpeg_head(frame) != head:
        return f"its pixels do not begin as lossless JPEG of {columns}x{rows}"
    found = _jpeg2000_size(frame) if syntax in (*_JPEG_2000, *_HTJ2K) else (_jpeg_head(frame) or (0, 0))[:2]
    if 0 not in found and found != (rows, columns):  # before a decoder makes room for all that it says
        return f"its pixels are {found[1]}x{found[0]} where its header says {columns}x{rows}"
    return None


def _jpeg2000_size(frame: bytes) -> tuple[int, int]:
    """(rows, columns) by the size marker of a JPEG 2000; zeros where there is none."""
    place = frame.find(b"\xff\x4f\xff\x51")
    if place < 0:
        return 0, 0
    right, bottom, left, top = struct.unpack_from(">4I", frame[place : place + 64].ljust(64, b"\0"), 8)
    return bottom - top, right - left


def _jpeg_head(frame: bytes) -> tuple[int, int, int] | None:
    """(rows, columns, samples) of a JPEG or JPEG-LS, whose segments up to the scan must follow each other."""
    found, place = None, 2
    while frame[:2] == b"\xff\xd8" and frame[place : place + 1] == b"\xff":
        kind, length = frame[place + 1], int.from_bytes(frame[place + 2 : place + 4], "big")
        if kind == 0xFF:  # a byte to fill
            place += 1
            continue
        if kind == 0xDA:
            return found
        if kind in _FRAMES:
            rows, columns = (int.from_bytes(frame[place + at : place + at + 2], "big") for at in (5, 7))
            found = rows, columns, frame[place + 9]
        place += 2 + length
    return None

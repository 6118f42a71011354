"""TIFF: what the tags say of a picture, and pixels of more than 8 bits, which Pillow halves or refuses."""

import re
import struct
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL.TiffImagePlugin import ImageFileDirectory_v2

_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _PALETTE = 0, 1, 2, 3
_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_REDUCED = 1  # bit of tag 254: a smaller copy of another page
_DEEP_BITS = (10, 12, 14, 16)
AS_TIFF = "save it as grey or RGB of 8 or 16 bits, pixel by pixel"
"""The mend of a TIFF of a kind that is not read."""


@dataclass(frozen=True)
class TiffHeader:
    """What the tags of a file's first page say, defaults of the standard filled in.

    size: (width, height) as stored. orientation: 1 to 8, of tag 274 or else of the XMP packet; `turned` where it is the
    tag's. bits: of each sample, the greatest. photometric: None where the file does not say. formats: 1 unsigned, 2
    signed, 3 floating point. extra: what samples beyond the colours are, 1 associated and 2 unassociated alpha. pages:
    pictures in the file, smaller copies aside.
    """

    size: tuple[int, int]
    orientation: int
    tagged: bool
    bits: int
    samples: int
    photometric: int | None
    planar: int
    formats: tuple[int, ...]
    extra: tuple[int, ...]
    compression: int
    palette: tuple[int, ...]
    pages: int

    @property
    def deep(self) -> bool:
        """Whether a sample has more than 8 bits."""
        return self.bits > 8

    @property
    def white(self) -> int:
        """The value of white."""
        return 2**self.bits - 1

    def check(self) -> None:
        """Raise ValueError, which says why, where it is not known what the numbers mean."""
        if self.bits > 16:
            raise ValueError(f"{self.bits}-bit pixels have no known white: save it with 8 or 16 bits")
        if 3 in self.formats:
            raise ValueError("fractions have no known white: save it with 8 or 16 bits")
        if 2 in self.formats:
            raise ValueError("values with a sign have no known black: save it with 8 or 16 bits, unsigned")
        if self.photometric is None:
            raise ValueError("it does not say whether 0 is black or white: save it again with another program")
        if self.photometric == _PALETTE and 0 < max(self.palette, default=0) < 256:
            raise ValueError("its palette has 8 bits where the format wants 16: save it again with another program")
        if self.deep:
            self._check_deep()

    def _check_deep(self) -> None:
        grey = self.photometric in (_WHITE_IS_ZERO, _BLACK_IS_ZERO) and self.samples == 1
        colours = self.photometric == _RGB and self.samples in (3, 4)
        if self.bits not in _DEEP_BITS or not (grey or (colours and self.planar == 1)):
            raise ValueError(f"{self.kind} is not read: {AS_TIFF}")

    @property
    def kind(self) -> str:
        """The file's kind in words."""
        what = {0: "grey", 1: "grey", 2: "RGB", 3: "palette", 5: "CMYK", 6: "YCbCr", 8: "L*a*b*"}
        planes = " in planes" * (self.planar == 2)
        colour = what.get(self.photometric or 0, f"photometric {self.photometric}")
        return f"TIFF of {self.samples} x {self.bits} bits, {colour}{planes}, compression {self.compression}"


def read_header(stream: BinaryIO) -> TiffHeader | None:
    """The tags of an open file; None where it is no TIFF. The stream is left at its start.

    Raises:
        ValueError: the tags cannot be read.
    """
    head = stream.read(16)
    stream.seek(0)
    if head[:4] not in _MAGIC:
        return None
    try:
        pages = _pages(stream, head)
    except struct.error:
        raise ValueError("its tags cannot be read: copy it again, or save it as an ordinary TIFF") from None
    stream.seek(0)
    if not pages or not all(isinstance(pages[0].get(tag), int) for tag in (256, 257)):
        raise ValueError("its first page has no tags or lies beyond the end of the file: copy it again")
    return _header(pages)


def _pages(stream: BinaryIO, head: bytes) -> list[dict[int, Any]]:
    """The tags that are asked for here, page by page."""
    wanted = (254, 255, 256, 257, 258, 259, 262, 270, 274, 277, 284, 320, 338, 339, 700)
    directory = ImageFileDirectory_v2(head if b"+" in head[:4] else head[:8])
    pages, seen = [], set()
    while directory.next and directory.next not in seen:
        seen.add(directory.next)
        stream.seek(directory.next)
        directory.load(stream)
        pages.append({tag: directory[tag] for tag in wanted if tag in directory})
    return pages


def _header(pages: list[dict[int, Any]]) -> TiffHeader:
    page = pages[0]
    tagged = page.get(274) in range(1, 9)
    # Compression 6, JPEG of old, has its colours from within; its tags are often wrong.
    photometric = 6 if page.get(259) == 6 else page.get(262)
    return TiffHeader(
        size=(page[256], page[257]),
        orientation=page[274] if tagged else _xmp_orientation(page.get(700)),
        tagged=tagged,
        bits=max(_each(page.get(258, 1))),
        samples=page.get(277, len(_each(page.get(258, 1)))),
        photometric=photometric,
        planar=page.get(284, 1),
        formats=_each(page.get(339, 1)),
        extra=_each(page.get(338, ())),
        compression=page.get(259, 1),
        palette=_each(page.get(320, ())),
        pages=_count(pages),
    )


def _count(pages: list[dict[int, Any]]) -> int:
    """How many pictures the pages are; ImageJ writes large stacks as one page and says their number in words."""
    slices = re.search(r"^images=(\d+)", str(pages[0].get(270, "")), re.MULTILINE)
    stack = int(slices[1]) if slices and str(pages[0][270]).startswith("ImageJ=") else 1
    copies = [page.get(254, 0) & _REDUCED or page.get(255) == 2 for page in pages]
    if copies[0]:
        return max(len(pages), stack)  # what comes first is not the picture itself
    return max(len(pages) - sum(map(bool, copies)), stack)


def _each(value: Any) -> tuple[int, ...]:
    return value if isinstance(value, tuple) else (value,)


def _xmp_orientation(packet: Any) -> int:
    packet = packet[0] if isinstance(packet, tuple) and packet else packet
    found = re.search(rb'tiff:Orientation(?:="|>)([1-8])', packet) if isinstance(packet, bytes) else None
    return int(found[1]) if found else 1


def read_deep(data: bytes, header: TiffHeader) -> NDArray[np.uint16]:
    """The values of a file of more than 8 bits, 0 black and `header.white` white, turned upright by tag 274.

    (H, W), or (H, W, 3 or 4) in the order red, green, blue, alpha. OpenCV decodes them: it knows all compressions,
    both byte orders and packed bits, gives values of less than 16 bits in the upper bits, and turns.
    """
    values = decode_whole(data) >> np.uint16(16 - header.bits)
    return np.uint16(header.white) - values if header.photometric == _WHITE_IS_ZERO else values


def decode_whole(data: bytes) -> NDArray[np.uint16]:
    """A file of more than 8 bits by OpenCV: uint16 (H, W) or (H, W, 3 or 4), red first.

    Raises:
        ValueError: it cannot be decoded to 16 bits.
    """
    import cv2

    cv2.setNumThreads(0)  # one thread a DataLoader worker; a pool does not survive the fork into one
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # else a line for each tag that it does not know
    found = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if found is None or found.dtype != np.uint16:
        raise ValueError("it is cut off, damaged or of a kind that is not read: copy it again, or save it with 8 bits")
    values: NDArray[np.uint16] = np.asarray(found, np.uint16)
    return values if values.ndim == 2 else values[..., [2, 1, 0, 3][: values.shape[2]]]

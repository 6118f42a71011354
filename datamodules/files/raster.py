"""One reader of picture files: what their numbers mean, whatever format, mode and depth, by path or as an open file.

It knows where up is (EXIF, tag 274, XMP), which end of the scale is white and how many bits it has, palettes and
transparency, and refuses in a line what has no one meaning. Pillow decodes what it decodes rightly; OpenCV TIFF of more
than 8 bits, and 16-bit colours of PNG and JPEG 2000, of which Pillow keeps half the bits.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from datamodules.files.tiff import AS_TIFF, TiffHeader, decode_whole, read_deep, read_header
from medsynth.errors import UserError

MOST_PIXELS = 178_956_970
"""Pixels beyond which Pillow itself refuses a picture."""
_FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP", "JPEG2000", "AVIF")
"""What Pillow may take a file for, MPO as JPEG, whatever its name: of others it hands some to programs (PostScript)."""
_PNG = b"\x89PNG\r\n\x1a\n"
_TWELVE_BITS = 4095
_THUMBNAILS = {"Large Thumbnail (VGA Equivalent)", "Large Thumbnail (Full HD Equivalent)", "Undefined"}

Show = Callable[[NDArray[np.uint16], int], NDArray[np.floating]]
"""What shows values of more than 8 bits: (values (H, W) or (H, W, 3), the value of white) -> [0, 1], same shape.

It raises ValueError, which says of the picture why, where they cannot be shown.
"""


def show_range(values: NDArray[np.uint16], white: int) -> NDArray[np.float64]:
    """0 is black and `white` white, whatever the picture holds."""
    return values / white


def show_full(values: NDArray[np.uint16], white: int) -> NDArray[np.float64]:
    """As `show_range`, but 16 bits that hold 12 or less are refused: their white is another, they would be black."""
    most = int(values.max())
    if white == 65535 and 0 < most <= _TWELVE_BITS:
        raise ValueError(
            f"has 16 bits but no value above {most} of 65535, which is almost black: set data.sixteen_bit=window and "
            "data.window=[2048,4096] (evaluate: --sixteen-bit, --window), or data.sixteen_bit=range if it is meant so"
        )
    return show_range(values, white)


@dataclass
class Raster:
    """An open picture file. image: not decoded yet; None where Pillow does not decode it. head: its first bytes."""

    stream: BinaryIO
    head: bytes
    tiff: TiffHeader | None
    image: Image.Image | None = None

    def size(self) -> tuple[int, int]:
        """(width, height) of the upright picture, by the header."""
        if self.tiff is not None:
            return self.tiff.size[::-1] if self.tiff.orientation >= 5 else self.tiff.size
        image = self._image
        # Pillow's own getexif of a PNG decodes it all, to look behind the pixels.
        headers = image.format == "PNG" and not self._says_more_later()
        exif = Image.Image.getexif(image) if headers else image.getexif()
        return image.size[::-1] if exif.get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8) else image.size

    @property
    def deep(self) -> bool:
        """Whether a value has more than 8 bits."""
        if self.tiff is not None:
            return self.tiff.deep
        image = self._image
        if image.format == "JPEG2000" and image.mode.startswith("RGB"):
            return self._jpeg2000_bits() == 16
        return image.mode.startswith("I;16") or (image.format == "PNG" and self.head[24] == 16)

    def values(self) -> tuple[NDArray[np.uint16], int]:
        """Of a `deep` file: the upright values, 0 black, with transparency as they come, and the value of white.

        (H, W), or (H, W, 3 or 4) in the order red, green, blue, alpha (not multiplied into the colours).
        """
        if self.tiff is None:
            return self._deep_values(), 65535
        self.stream.seek(0)
        values = read_deep(self.stream.read(), self.tiff)
        values = values if self.tiff.tagged else _turned(values, self.tiff.orientation)
        if values.ndim == 3 and self.tiff.extra and self.tiff.extra[0] != 2:
            values = values[..., :3]  # no alpha, or one that is multiplied into the colours, and so lies on black
        return values, self.tiff.white

    def decoded(self, least_side: int = 0) -> Image.Image:
        """Of a file that is not `deep`: the upright picture in the file's mode; `least_side` as for `decode_rgb`."""
        image = self._image
        if least_side:
            image.draft(None, (least_side, least_side))
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return image

    @property
    def _image(self) -> Image.Image:
        assert self.image is not None  # it is not a deep TIFF
        return self.image

    def _deep_values(self) -> NDArray[np.uint16]:
        image = self._image
        image.load()
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        if not image.mode.startswith("I;16"):  # decoded by both: Pillow also sees what is cut off
            self.stream.seek(0)
            return _turned(decode_whole(self.stream.read()), orientation)
        values = np.asarray(image).astype(np.uint16)
        if (hidden := image.info.get("transparency")) is not None:
            values[values == hidden] = 0
        return _turned(values, orientation)

    def _jpeg2000_bits(self) -> int:
        """Bits of a JPEG 2000's first colour, of the codestream's size marker; Pillow shows all but 16 rightly."""
        place = self.stream.tell()
        self.stream.seek(0)
        data = self.stream.read()
        self.stream.seek(place)
        marker = data.find(b"\xff\x4f\xff\x51")
        return (data[marker + 42] & 127) + 1 if 0 <= marker < len(data) - 42 else 8

    def _says_more_later(self) -> bool:
        """Whether a PNG has text or EXIF behind its pixels, by its chunks' heads alone."""
        place, found, pixels = self.stream.tell(), False, False
        self.stream.seek(len(_PNG))
        while not found and len(chunk := self.stream.read(8)) == 8:
            found = pixels and chunk[4:] in (b"eXIf", b"tEXt", b"zTXt", b"iTXt")
            pixels = pixels or chunk[4:] == b"IDAT"
            self.stream.seek(int.from_bytes(chunk[:4]) + 4, 1)
        self.stream.seek(place)
        return found


@contextmanager
def opened(file: Path | BinaryIO, name: str, max_pixels: int) -> Iterator[Raster]:
    """The file's header, held against what can be read; whatever is wrong until the end is a UserError of `name`.

    Raises:
        UserError: the message starts with `name`: missing, of no known format, damaged, of several pages or frames, of
            more than `max_pixels` pixels, or of numbers whose meaning is not known.
    """
    try:
        # Not by its path: Pillow would map a TIFF's pixels and exchange the sides of one that lies on its side.
        with file.open("rb") if isinstance(file, Path) else nullcontext(file) as stream:
            raster = _header(stream)
            if raster.tiff is not None:
                _check_header(raster.tiff, name, max_pixels)
            if raster.tiff is not None and raster.tiff.deep:
                yield raster
                return
            with _open(stream, raster.tiff) as raster.image:
                _check_size(raster.image.size, max_pixels)
                _check_frames(0 if raster.tiff else _frames(raster.image), "frames", name)
                yield raster
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{name} is missing") from None
    except UnidentifiedImageError:
        raise UserError(f"{name} is no picture of a known format") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise UserError(f"{name} has more than data.max_pixels={max_pixels} pixels") from None
    except Exception as error:  # Pillow's decoders answer damaged bytes with errors of almost any kind
        raise UserError(f"{name} cannot be decoded ({str(error) or type(error).__name__})") from error


def _open(stream: BinaryIO, tiff: TiffHeader | None) -> Image.Image:
    try:
        return Image.open(stream, formats=_FORMATS)
    except UnidentifiedImageError:
        if tiff is None:
            raise
        raise ValueError(f"{tiff.kind} is not read: {AS_TIFF}") from None


def _header(stream: BinaryIO) -> Raster:
    head = stream.read(32)
    stream.seek(0)
    return Raster(stream, head, read_header(stream))


def _check_header(header: TiffHeader, name: str, max_pixels: int) -> None:
    _check_size(header.size, max_pixels)
    _check_frames(header.pages, "pages", name)
    header.check()


def _check_size(size: tuple[int, int], max_pixels: int) -> None:
    if size[0] * size[1] > max_pixels:
        raise Image.DecompressionBombError


def _check_frames(count: int, noun: str, name: str) -> None:
    if count > 1:
        raise UserError(f"{name} has {count} {noun}: save the one that is meant as a file of its own")


def _frames(image: Image.Image) -> int:
    """Pictures in the file; the previews that cameras put behind a JPEG are none."""
    if image.format == "MPO":
        kinds = [entry["Attribute"]["MPType"] for entry in image.mpinfo[0xB002][1:]]  # pyrefly: ignore
        return 1 + sum(kind not in _THUMBNAILS for kind in kinds)
    return getattr(image, "n_frames", 1)


def decode_rgb(
    file: Path | BinaryIO, name: str, max_pixels: int, least_side: int = 0, show: Show = show_full
) -> NDArray[np.uint8]:
    """The picture as it is meant to be seen, (H, W, 3); see `images.read_rgb`."""
    with opened(file, name, max_pixels) as raster:
        if not raster.deep:
            return np.array(_rgb(raster.decoded(least_side)))
        values, white = raster.values()
        try:
            unit = show(_grey_where_equal(_on_black(values, white)), white)
        except ValueError as error:
            raise UserError(f"{name} {error}") from None
        shown = np.rint(255 * unit).astype(np.uint8)
        return shown if shown.ndim == 3 else np.repeat(shown[..., None], 3, axis=2)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F"):
        raise ValueError("32-bit pixels have no known white: save it with 8 or 16 bits")
    if image.mode == "LAB":
        raise ValueError("its colours are L*a*b*: save it as RGB")
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image.convert("RGBA"))
    return image.convert("RGB")


def _on_black(values: NDArray[np.uint16], white: int) -> NDArray[np.uint16]:
    if values.ndim == 2 or values.shape[2] == 3:
        return values
    return np.rint(values[..., :3] * (values[..., 3:] / white)).astype(np.uint16)


def _grey_where_equal(values: NDArray) -> NDArray:
    """(H, W, 3) -> (H, W) where all three are the same everywhere."""
    return values[..., 0] if values.ndim == 3 and (values == values[..., :1]).all() else values


def _turned(values: NDArray, orientation: int) -> NDArray:
    """Upright by the orientation of TIFF and EXIF, 1 to 8."""
    if orientation in (5, 6, 7, 8):
        values = values.swapaxes(0, 1)
    down, right = orientation in (3, 4, 7, 8), orientation in (2, 3, 6, 7)
    return np.ascontiguousarray(values[:: -1 if down else 1, :: -1 if right else 1])


def read_grey(path: Path, max_pixels: int) -> tuple[NDArray, int]:
    """The values of a mask or depth map, upright, 0 black: bool, uint8 or uint16 (H, W), and the value of white.

    Of a palette whose entries are all grey, the greys; of one with colours, the indices, which number classes.

    Raises:
        UserError: the message starts with `path`: as `opened`, or colours, or transparency that changes the greys.
    """
    with opened(path, str(path), max_pixels) as raster:
        if raster.deep:
            values, white = raster.values()
            stored = values if values.ndim == 2 else values[..., :3]
            return _one_grey(stored, _on_black(values, white), path), white
        image = raster.decoded()
        if image.mode == "1" and not image.has_transparency_data:
            return np.asarray(image), 1
        if image.mode == "P":
            return _of_palette(image, path), 255
        if image.mode not in ("1", "L", "LA", "La", "PA", "RGB", "RGBA", "RGBa"):
            raise _no_grey(path)
        seen = np.asarray(_rgb(image))
        stored = np.asarray(image.convert("LA").convert("RGB") if image.mode == "La" else image.convert("RGB"))
        return _one_grey(stored, seen, path), 255


def _one_grey(stored: NDArray, seen: NDArray, path: Path) -> NDArray:
    """The grey values of what is stored; seen: the same where it is transparent laid on black."""
    grey = _grey_where_equal(stored)
    if grey.ndim == 3:
        raise _no_grey(path)
    if seen is not stored and (_grey_where_equal(seen) != grey).any():
        raise UserError(f"{path} has greys that transparency hides: save it without an alpha channel")
    return grey


def _of_palette(image: Image.Image, path: Path) -> NDArray[np.uint8]:
    indices = np.asarray(image)
    colours = np.array(image.getpalette("RGB"), np.uint8).reshape(-1, 3)
    if (colours != colours[:, :1]).any():
        return indices
    greys, used = colours[:, 0], np.unique(indices)
    if used.max() >= len(greys) or len(np.unique(greys[used])) < len(used):
        raise UserError(f"{path} has a palette that shows several of its values in one grey: save it as a grey picture")
    grey = greys[indices]
    return _one_grey(grey, np.asarray(_rgb(image))[..., 0], path)


def _no_grey(path: Path) -> UserError:
    return UserError(f"{path} is no grey picture of 1, 8 or 16 bits: save it as one")


def upright_size(path: Path, max_pixels: int) -> tuple[int, int]:
    """(width, height) of the picture as it is read, by its header.

    Raises:
        UserError: the message starts with `path`: as `opened`.
    """
    with opened(path, str(path), max_pixels) as raster:
        return raster.size()

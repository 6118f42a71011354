"""The elements of one DICOM file, asked for by keyword; what is not what it must be is refused in one line."""

import math
import zlib
from collections.abc import MutableSequence, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from medsynth.errors import UserError

if TYPE_CHECKING:
    from pydicom.dataset import Dataset, FileDataset

PIXELS = {0x7FE00008: "FloatPixelData", 0x7FE00009: "DoubleFloatPixelData", 0x7FE00010: "PixelData"}
UNDEFINED = 0xFFFFFFFF
"""Length of pixels in fragments, of which only reading them tells how long they are."""
COPY = "copy it again from its source"

_IMPLICIT, _EXPLICIT, _BIG_ENDIAN = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2"
_DEFLATED = "1.2.840.10008.1.2.1.99"
_HEAD = 4096  # bytes in which the transfer syntax stands
_MOST_UNFOLDED = 640 << 20
"""Bytes of a deflated file's elements, at most: 100 million pixels in colours of 16 bits."""
_NUMBERS = {"DS", "IS", "US", "SS", "US or SS", "FL", "FD"}
_NEEDED = ("Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation", "BitsAllocated")


@dataclass(frozen=True)
class Header:
    """One file's elements.

    dataset: pydicom's, with the pixels or without. pixels: keyword of the pixels' element.
    held: bytes of them that the file has, `UNDEFINED` for fragments. syntax: UID of the transfer syntax.
    """

    path: Path
    dataset: "FileDataset"
    pixels: str
    held: int
    syntax: str

    @property
    def little_endian(self) -> bool:
        return self.dataset.original_encoding[1] is not False

    def fault(self, why: str) -> UserError:
        return UserError(f"{self.path} {why}")

    def scope(self, macro: str, *keywords: str) -> "Dataset":
        """Where these elements stand: the functional group `macro`, of the frame or shared, that has any, or the file.

        An enhanced object says in functional groups what others say at the top (PS3.3 C.7.6.16); of one frame, the
        first item is the frame's.
        """
        for groups in ("PerFrameFunctionalGroupsSequence", "SharedFunctionalGroupsSequence"):
            group = self.item(groups)
            item = None if group is None or not macro else self.item(macro, group)
            if item is not None and any(keyword in item for keyword in keywords):
                return item
        return self.dataset

    def item(self, keyword: str, scope: "Dataset | None" = None) -> "Dataset | None":
        """The first item of a sequence; None where it is absent or empty."""
        from pydicom.dataset import Dataset

        items = self.values(keyword, scope)
        if items and not isinstance(items[0], Dataset):
            raise self._unread(keyword, items[:1], "cannot be read")
        return items[0] if items else None

    def values(self, keyword: str, scope: "Dataset | None" = None) -> list[Any] | None:
        """The values of an element of the file or of `scope`: None where it is absent, [] where it is empty."""
        from pydicom.datadict import dictionary_VR

        dataset = self.dataset if scope is None else scope
        if keyword not in dataset:
            return None
        try:
            value = dataset[keyword].value
        except Exception:  # a value that is not of its kind can fail anywhere on its way to Python
            kind = "is no number" if dictionary_VR(keyword) in _NUMBERS else "cannot be read"
            raise self._unread(keyword, _as_written(dataset, keyword), kind) from None
        if isinstance(value, MutableSequence):
            return list(value)
        return [] if value is None or value == "" else [value]

    def numbers(self, keyword: str, scope: "Dataset | None" = None) -> list[float] | None:
        """`values` as finite numbers.

        Raises:
            UserError: one of them is none.
        """
        values = self.values(keyword, scope)
        try:
            numbers = [float(value) for value in values or []]
        except (TypeError, ValueError):
            numbers = [math.nan]
        if not all(map(math.isfinite, numbers)):
            raise self._unread(keyword, values or [], "is no number")
        return None if values is None else numbers

    def number(self, keyword: str, scope: "Dataset | None" = None) -> float | None:
        """The first of `numbers`; None where there is none.

        Raises:
            UserError: the element is there but empty.
        """
        numbers = self.numbers(keyword, scope)
        if numbers is None:
            return None
        if not numbers:
            raise self.fault(f"has an empty {keyword}: write its value, or {delete(keyword)}")
        return numbers[0]

    def whole(self, keyword: str) -> int:
        """The element's whole number; raises UserError where there is none."""
        number = self.number(keyword)
        if number is None or number % 1:
            raise self.fault(f"has no {keyword}: it is cut off or no picture; {COPY} or leave it out")
        return int(number)

    def text(self, keyword: str, scope: "Dataset | None" = None) -> str:
        """The first of the element's texts, in capitals; "" where it is absent or empty."""
        return str((self.values(keyword, scope) or [""])[0]).strip().upper()

    def _unread(self, keyword: str, values: Sequence[Any], why: str) -> UserError:
        written = "\\".join(v.decode("latin-1") if isinstance(v, bytes) else str(v) for v in values).strip("\0 ")
        return self.fault(f"has {keyword} '{printable(written)}', which {why}: correct it, or {delete(keyword)}")


def _as_written(dataset: "Dataset", keyword: str) -> list[Any]:
    try:
        return [dataset.get_item(keyword).value]
    except Exception:  # of no known kind, pydicom refuses even its bytes
        return ["?"]


def delete(*keywords: str) -> str:
    """How elements are deleted, with DCMTK's command, wherever in the file they stand."""
    return f"delete it (`dcmodify {' '.join(f'-ea {keyword}' for keyword in keywords)}`)"


def open_dicom(path: Path, pixels: bool = True) -> Header:
    """A file's elements, up to its pixels and with them or without; its 128 leading bytes and "DICM" may be missing.

    Raises:
        UserError: the message starts with `path`: missing, no DICOM, cut off, no picture.
    """
    from pydicom.filereader import read_partial

    found: dict[str, tuple[int, int]] = {}

    def at_pixels(tag, vr, length: int) -> bool:
        if tag in PIXELS:
            found[PIXELS[tag]] = (length, path.stat().st_size - file.tell())
        return tag in PIXELS and not pixels

    marked = True
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD)
            marked = head[128:132] == b"DICM"
            if _DEFLATED.encode() in head:
                _check_deflated(file, head)
            file.seek(0)
            dataset = read_partial(file, at_pixels, force=True)
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except Exception as error:  # a header that ends early or lies can fail anywhere
        raise UserError(f"{path} cannot be read ({one_line(error)}); {COPY}" if marked else _none(path)) from error
    keyword = next(iter(found), None)
    if not marked and (keyword is None or any(needed not in dataset for needed in _NEEDED)):
        raise UserError(_none(path))
    if keyword is None or (pixels and keyword not in dataset):
        raise UserError(f"{path} has no pixel data: it is cut off or no picture; {COPY} or leave it out")
    length, left = found[keyword]
    syntax = _syntax(path, dataset, length)
    whole = length == UNDEFINED or syntax == _DEFLATED  # which pydicom reads from memory, not from the file
    return Header(path, dataset, keyword, length if whole else min(length, left), syntax)


def _check_deflated(file: BinaryIO, head: bytes) -> None:
    """Raise ValueError where the elements of a deflated file, which pydicom unfolds at once, are too many."""
    if head[132:138] != b"\x02\0\0\0UL":
        raise ValueError("it does not say where its compressed elements begin")
    file.seek(144 + int.from_bytes(head[140:144], "little"))
    unfolding, length = zlib.decompressobj(-zlib.MAX_WBITS), 0
    while not unfolding.eof and (piece := unfolding.unconsumed_tail or file.read(1 << 16)):
        length += len(unfolding.decompress(piece, 1 << 20))
        if length > _MOST_UNFOLDED:
            raise ValueError(f"its compressed elements are more than {_MOST_UNFOLDED >> 20} MiB")


def _none(path: Path) -> str:
    return f"{path} is no DICOM file: give it the suffix of what it is, or leave it out"


def _syntax(path: Path, dataset: "FileDataset", length: int) -> str:
    syntax = dataset.file_meta.get("TransferSyntaxUID")
    if not syntax:  # of a file without its leading group; pydicom has found out how its elements are written
        if length == UNDEFINED:
            raise UserError(f"{path} does not say how its pixels are compressed (TransferSyntaxUID): {COPY}")
        implicit, little = dataset.original_encoding
        syntax = _IMPLICIT if implicit else _EXPLICIT if little else _BIG_ENDIAN
    return str(syntax)


def printable(text: str) -> str:
    """The beginning of what a file says, in one line."""
    return "".join(letter if letter.isprintable() else "?" for letter in text[:40])


def one_line(error: Exception) -> str:
    """An error's message, of however many lines."""
    return " ".join(str(error).split())[:200] or type(error).__name__

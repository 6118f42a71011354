"""How a DICOM header says that its picture is shown, read as a whole before any pixel is decoded.

Sections are those of the standard's part 3 (PS3.3). A picture is shown by, in this order: how its values lie in their
cells, modality (rescale or lookup table), values of interest (lookup table or window), presentation (inverted or not),
the shape of a pixel.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from datamodules.files.dicom_codec import RLE, packages, plugin
from datamodules.files.dicom_header import COPY, UNDEFINED, Header, delete, printable

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

GREY = ("MONOCHROME1", "MONOCHROME2")
PALETTE = "PALETTE COLOR"
COLOURS = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
FUNCTIONS = ("LINEAR", "LINEAR_EXACT", "SIGMOID")

_PADDING = {
    "PixelData": ("PixelPaddingValue", "PixelPaddingRangeLimit"),
    "FloatPixelData": ("FloatPixelPaddingValue", "FloatPixelPaddingRangeLimit"),
    "DoubleFloatPixelData": ("DoubleFloatPixelPaddingValue", "DoubleFloatPixelPaddingRangeLimit"),
}

Range = tuple[float, float]


@dataclass(frozen=True)
class Cells:
    """How values lie in the decoded pixels, the cells: `stored` bits up to bit `high` of `allocated`.

    native: as the file says; otherwise a decoder has brought them to the lowest bits. real: numbers of floating point.
    """

    allocated: int
    stored: int
    high: int
    signed: bool
    native: bool = True
    real: bool = False

    @property
    def range(self) -> Range:
        """Least and greatest value that can be stored."""
        if self.real:
            return -math.inf, math.inf
        return (-(2 ** (self.stored - 1)), 2 ** (self.stored - 1) - 1) if self.signed else (0, 2**self.stored - 1)

    def values(self, cells: NDArray) -> NDArray:
        """What is stored in cells of any shape; a bit above it may be anything, as that of an overlay."""
        if not self.native or self.real or self.stored == self.allocated:
            return cells
        return cells << (self.allocated - 1 - self.high) >> (self.allocated - self.stored)

    def read(self, value: float) -> float:
        """A stored value that the header names, such as the padding, with the sign that the pixels have.

        Devices write that of signed pixels as the unsigned number of the same bits, of 16 or of `stored`.
        """
        if self.real or not self.signed:
            return value if self.real else value % 2**16
        bits = value % 2**16
        for width in (self.stored, 16):
            if 2 ** (width - 1) <= bits < 2**width:
                return bits - 2**width
        return bits


@dataclass(frozen=True)
class Window:
    """Values that are shown: see `datamodules.files.dicom.apply_window`."""

    centre: float
    width: float
    function: str


@dataclass(frozen=True)
class Lut:
    """A lookup table: `table[i]` for the input `first` + i; inputs beyond its ends get what its ends get."""

    first: int
    table: NDArray[np.uint16]
    bits: int

    def __call__(self, values: NDArray) -> NDArray[np.uint16]:
        index = np.rint(np.asarray(values, dtype=np.float64)) - self.first
        return self.table[index.clip(0, len(self.table) - 1).astype(np.int64)]

    @property
    def white(self) -> int:
        """The entry that is shown white.

        Devices write the bits of an entry's cell for those of its value (16 for entries up to 4095): where the greatest
        entry needs other bits than the header says, it is the white.
        """
        most = int(self.table.max())
        return 2**self.bits - 1 if most.bit_length() == self.bits else max(most, 1)


@dataclass(frozen=True)
class Display:
    """What a header says of its picture.

    size: (width, height) as shown, with square pixels. modality: a table or slope and intercept. voi: None where the
    file leaves it open. inverted: low values are bright. padding: from, to, in stored values. palette: a table each of
    red, green and blue; None where there is none.
    """

    rows: int
    columns: int
    size: tuple[int, int]
    photometric: str
    cells: Cells
    modality: Lut | tuple[float, float]
    voi: Lut | Window | None
    inverted: bool
    padding: Range | None
    palette: tuple[Lut, ...] | None

    def padded(self, cells: NDArray) -> NDArray[np.bool_] | None:
        """Which pixels are padding; None: none, as where all would be."""
        if self.padding is None:
            return None
        low, high = self.padding
        least, most = self.cells.range
        # Some devices pad with a value that the stored bits cannot hold: it is in the whole cell.
        values = self.cells.values(cells) if least <= low and high <= most else cells
        padded = np.isnan(values) if math.isnan(low) else (values >= low) & (values <= high)
        return None if padded.all() else padded

    def rescaled(self, values: NDArray) -> NDArray:
        """Stored values as the modality means them."""
        if isinstance(self.modality, Lut):
            return self.modality(values)
        return values if self.modality == (1, 0) else values * self.modality[0] + self.modality[1]


def read_display(header: Header, max_pixels: int) -> Display:
    """What the header says, as far as it says it.

    Raises:
        UserError: the message starts with the file: more than `max_pixels` pixels, several frames, a compression
            without a decoder, elements that contradict each other or are none.
    """
    rows, columns = header.whole("Rows"), header.whole("Columns")
    if not rows * columns:
        raise header.fault(f"has Rows {rows} and Columns {columns}: it is no picture; leave it out")
    size = _size(header, rows, columns)
    if max(rows * columns, size[0] * size[1]) > max_pixels:
        raise header.fault(f"has more than data.max_pixels={max_pixels} pixels")
    frames = (header.numbers("NumberOfFrames") or [1])[0] or 1  # some write 0 for a single one
    if frames != 1:
        raise header.fault(f"has {frames:.0f} frames: save the one that is meant as a file of its own")
    _check_syntax(header)
    photometric, cells = _photometric(header), _cells(header)
    _check_decoder(header, cells, photometric)
    _check_length(header, rows * columns * samples(photometric), cells, photometric)
    modality: Lut | tuple[float, float] = (1.0, 0.0)
    voi = padding = palette = None
    inverted = False
    if photometric in GREY:
        modality = _modality(header, cells)
        voi, padding = _voi(header, modality, cells), _padding(header, cells)
        inverted = _inverted(header, photometric)
    elif photometric == PALETTE:
        palette = _palette(header, cells)
    return Display(rows, columns, size, photometric, cells, modality, voi, inverted, padding, palette)


def _size(header: Header, rows: int, columns: int) -> tuple[int, int]:
    """(width, height) with square pixels: the side along which pixels are longer grows (C.7.6.3.1.7, 10.7.1)."""
    macros = {"PixelSpacing": "PixelMeasuresSequence", "ImagerPixelSpacing": "FramePixelDataPropertiesSequence"}
    for keyword in ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing", "PixelAspectRatio"):
        pair = header.numbers(keyword, header.scope(macros.get(keyword, ""), keyword))
        if not pair:
            continue
        if len(pair) != 2 or min(pair) <= 0:
            written = "\\".join(f"{number:g}" for number in pair)
            raise header.fault(f"has {keyword} {written}, not two lengths above 0: correct it, or {delete(keyword)}")
        ratio = pair[0] / pair[1]
        longer = max(rows * ratio, columns / ratio)
        if longer > 1e9:
            raise header.fault(
                f"has pixels {ratio:g} times as high as wide ({keyword}): correct it, or {delete(keyword)}"
            )
        return (columns, round(rows * ratio)) if ratio >= 1 else (round(columns / ratio), rows)
    return columns, rows


def samples(photometric: str) -> int:
    """Values that a pixel has."""
    return 3 if photometric in COLOURS else 1


def _photometric(header: Header) -> str:
    photometric, given = header.text("PhotometricInterpretation"), header.whole("SamplesPerPixel")
    if photometric not in (*GREY, PALETTE, *COLOURS):
        raise header.fault(
            f"is of the colours {printable(photometric) or '(none)'}, which nothing here reads: save it as RGB"
        )
    if given != samples(photometric):
        raise header.fault(f"says {photometric} with {given} values a pixel (SamplesPerPixel): {COPY}")
    if header.text("PixelPresentation") in ("COLOR", "MIXED") and photometric in GREY:
        raise header.fault("shows some of its greys in colour (PixelPresentation): save it as RGB, or as grey alone")
    return photometric


def _cells(header: Header) -> Cells:
    from pydicom.uid import UID

    allocated = header.whole("BitsAllocated")
    if header.pixels != "PixelData":
        return Cells(allocated, allocated, allocated - 1, signed=False, real=True)
    syntax = UID(header.syntax)
    stored, sign = header.whole("BitsStored"), header.whole("PixelRepresentation")
    high = stored - 1 if header.values("HighBit") is None else header.whole("HighBit")
    if allocated not in (1, 8, 16, 32, 64) or not 0 < stored <= high + 1 <= allocated or sign not in (0, 1):
        said = f"BitsAllocated {allocated}, BitsStored {stored}, HighBit {high} and PixelRepresentation {sign}"
        raise header.fault(f"says {said}, which cannot be: correct them, or {COPY}")
    return Cells(allocated, stored, high, signed=sign == 1, native=not syntax.is_encapsulated or syntax == RLE)


def _check_syntax(header: Header) -> None:
    from pydicom.pixels import get_decoder
    from pydicom.uid import UID

    try:
        get_decoder(UID(header.syntax))
    except NotImplementedError:
        name = printable(UID(header.syntax).name)
        raise header.fault(f"is compressed as {name}, which nothing here reads: save it uncompressed") from None


def _check_decoder(header: Header, cells: Cells, photometric: str) -> None:
    from pydicom.pixels import get_decoder
    from pydicom.uid import UID

    syntax = UID(header.syntax)
    if syntax.is_encapsulated and not plugin(get_decoder(syntax), samples(photometric), cells.stored):
        mend = f"pip install {packages(syntax)}, which can decode it"
        raise header.fault(f"is compressed as {syntax.name} of {cells.stored} bits: {mend}")
    if not cells.native and cells.high != cells.stored - 1:
        raise header.fault(f"is compressed with HighBit {cells.high} of {cells.stored} bits: save it uncompressed")


def _check_length(header: Header, values: int, cells: Cells, photometric: str) -> None:
    """Refuse uncompressed pixels that are cut off, or are those of several frames."""
    from pydicom.uid import UID

    if UID(header.syntax).is_encapsulated:
        return
    if header.held == UNDEFINED:
        raise header.fault(f"says that its pixels are not compressed (TransferSyntaxUID), but they are: {COPY}")
    needed = math.ceil(values * cells.allocated / 8)
    if photometric == "YBR_FULL_422":
        needed = needed // 3 * 2
    if header.held < needed:
        raise header.fault(f"is cut off ({header.held} of {needed} bytes of its pixels are there): {COPY}")
    if header.held >= 2 * needed and header.held > needed + needed % 2:
        raise header.fault(f"has pixels for {header.held // needed} frames of its size: {COPY}")


def _modality(header: Header, cells: Cells) -> Lut | tuple[float, float]:
    """The modality's table, or slope and intercept (C.11.1)."""
    keys = ("RescaleSlope", "RescaleIntercept")
    scope = header.scope("PixelValueTransformationSequence", *keys)
    table = header.item("ModalityLUTSequence", scope)
    if table is not None:
        return _lut(header, table, "LUT", cells.range, "ModalityLUTSequence: ")
    slope, intercept = (header.number(key, scope) for key in keys)
    if slope == 0:
        raise header.fault(
            "has RescaleSlope 0, which makes all pixels one grey: `dcmodify -ma RescaleSlope=1` mends it"
        )
    return 1.0 if slope is None else slope, intercept or 0.0


def _voi(header: Header, modality: Lut | tuple[float, float], cells: Cells) -> Lut | Window | None:
    """The first table or else the first window (C.11.2)."""
    keys = ("WindowCenter", "WindowWidth")
    scope = header.scope("FrameVOILUTSequence", *keys, "VOILUTSequence")
    table = header.item("VOILUTSequence", scope)
    if table is not None:
        return _lut(header, table, "LUT", _reached(modality, cells), "VOILUTSequence: ")
    centres, widths = (header.numbers(key, scope) for key in keys)
    if not centres or not widths:
        return None
    function = header.text("VOILUTFunction", scope) or "LINEAR"
    if function not in FUNCTIONS:
        choices = ", ".join(FUNCTIONS)
        raise header.fault(
            f"has VOILUTFunction {printable(function)}, not one of {choices}: {delete('VOILUTFunction')}"
        )
    # LINEAR takes whole numbers, of which a window of less than 1 shows none. Where values lie closer, none of its
    # halves of one is meant.
    close = cells.real or (isinstance(modality, tuple) and abs(modality[0]) < 1)
    if function == "LINEAR" and 0 < widths[0] < 1 and close:
        function = "LINEAR_EXACT"
    if widths[0] <= 0 or (function == "LINEAR" and widths[0] < 1):
        least = "at least 1" if function == "LINEAR" else "above 0"
        raise header.fault(f"has WindowWidth {widths[0]:g}, which must be {least}: correct it, or {delete(*keys)}")
    return Window(centres[0], widths[0], function)


def _reached(modality: Lut | tuple[float, float], cells: Cells) -> Range:
    """Least and greatest value that the modality can give."""
    if isinstance(modality, Lut):
        return 0, 2**16 - 1
    slope, intercept = modality
    low, high = sorted(slope * value + intercept for value in cells.range)
    return low, high


def _lut(header: Header, scope: "Dataset", name: str, inputs: Range, where: str = "") -> Lut:
    """The table `name`Descriptor and `name`Data (C.11.1.1, C.11.2.1.1, C.7.6.3.1.5) for `inputs`, from and to."""
    descriptor = header.numbers(f"{name}Descriptor", scope) or []
    if len(descriptor) != 3 or not 1 <= descriptor[2] <= 16:
        raise header.fault(f"has no sound {where}{name}Descriptor: {COPY}")
    entries, bits = int(descriptor[0]) % 2**16 or 2**16, int(descriptor[2])
    data = header.values(f"{name}Data", scope) or []
    if data and isinstance(data[0], bytes):
        words = np.frombuffer(data[0] + b"\0" * (len(data[0]) % 2), "<u2" if header.little_endian else ">u2")
    else:
        words = np.asarray(data, dtype=np.int64) % 2**16
    words = words.astype("<u2")
    table = words.view(np.uint8) if bits <= 8 and len(words) < entries else words  # two entries a word, the low first
    if len(table) < entries:
        raise header.fault(f"has {len(table)} of the {entries} entries of its {where}{name}Data: {COPY}")
    return Lut(_first(int(descriptor[1]), entries, inputs), table[:entries].astype(np.uint16), bits)


def _first(value: int, entries: int, inputs: Range) -> int:
    """The first input of a table: signed where inputs can be below 0, unless only the other reading meets any."""
    bits = value % 2**16
    signed = bits - 2**16 if bits >= 2**15 else bits
    readings = (signed, bits) if inputs[0] < 0 else (bits, signed)
    met = (first for first in readings if first <= inputs[1] and first + entries > inputs[0])
    return next(met, readings[0])


def _palette(header: Header, cells: Cells) -> tuple[Lut, ...] | None:
    """The tables of red, green and blue; None where they lie there in segments."""
    names = [f"{colour}PaletteColorLookupTable" for colour in ("Red", "Green", "Blue")]
    if all(header.values(f"Segmented{name}Data") and header.values(f"{name}Descriptor") for name in names):
        return None
    return tuple(_lut(header, header.dataset, name, cells.range) for name in names)


def _padding(header: Header, cells: Cells) -> Range | None:
    """What lies outside of the picture proper, from and to, in stored values (C.7.5.1.1.2)."""
    ends = []
    for keyword in _PADDING[header.pixels]:
        value = header.values(keyword)
        if value and cells.real and math.isnan(float(value[0])):
            return math.nan, math.nan
        if value:
            ends.append(cells.read(header.number(keyword) or 0.0))
        elif not ends:  # a limit alone says nothing
            return None
    return min(ends), max(ends)


def _inverted(header: Header, photometric: str) -> bool:
    """Whether low values are bright. A shape of INVERSE says so of either kind of grey (C.8.11.3.1.2), not twice."""
    shape = header.text("PresentationLUTShape")
    if shape not in ("", "IDENTITY", "INVERSE"):
        raise header.fault(
            f"has PresentationLUTShape {printable(shape)}, which nothing here shows: {delete('PresentationLUTShape')}"
        )
    if shape == "IDENTITY" and photometric == "MONOCHROME1":  # viewers follow the one or the other
        said = "both that low is bright (PhotometricInterpretation) and that it is dark (PresentationLUTShape)"
        raise header.fault(f"says {said}: correct the one that is wrong (`dcmodify -m PresentationLUTShape=INVERSE`)")
    return photometric == "MONOCHROME1" or shape == "INVERSE"

"""The pixels of a DICOM file, decoded."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from datamodules.files.dicom_codec import BYTES, fault, plugin
from datamodules.files.dicom_display import COLOURS, PALETTE, Display, samples
from datamodules.files.dicom_header import COPY, Header


def decode(header: Header, display: Display) -> NDArray:
    """The pixels: (H, W), or (H, W, 3) RGB.

    Those of uncompressed and RLE files are whole cells, of which `Cells.values` takes the bits that are meant: pydicom
    takes the lowest, whatever HighBit says.

    Raises:
        UserError: more than one frame. Exception: of almost any kind, where the bytes are damaged.
    """
    from pydicom.encaps import get_frame
    from pydicom.pixels import get_decoder
    from pydicom.uid import UID

    colour, bits = display.photometric in COLOURS, display.cells
    options: dict[str, Any] = {"correct_unused_bits": not bits.native}
    decoder = get_decoder(UID(header.syntax))
    if UID(header.syntax).is_encapsulated:
        channels = samples(display.photometric)
        frame = get_frame(header.dataset.PixelData, 0, number_of_frames=1)
        if why := fault(frame, header.syntax, display.rows, display.columns, channels):
            raise header.fault(f"cannot be decoded ({why}); {COPY}")
        options["decoding_plugin"] = name = plugin(decoder, channels, bits.stored)
        if name == "pillow" and header.syntax in BYTES:
            options["bits_allocated"] = 8
        if name == "gdcm" and bits.allocated == 8:
            options["bits_stored"] = 8  # asked for fewer bits of lossless JPEG, GDCM ends its process
    cells, decoded = decoder.as_array(header.dataset, raw=not colour, **options)
    if "bits_stored" in options:
        cells = cells << (8 - bits.stored) >> (8 - bits.stored)
    if cells.shape != (display.rows, display.columns, *[3] * colour):
        raise header.fault(f"has pixels for {len(cells)} frames where its header says one: {COPY}")
    if colour and decoded["photometric_interpretation"] != "RGB":
        raise header.fault(f"decodes to the colours {decoded['photometric_interpretation']}: save it as RGB")
    return cells


def colours(header: Header, display: Display, cells: NDArray) -> NDArray[np.float64]:
    """Decoded colours or indices of a palette -> RGB (H, W, 3) in [0, 1]."""
    values = display.cells.values(cells)
    if display.photometric != PALETTE:
        return values / (2**display.cells.stored - 1)
    if display.palette is None:
        return _segmented(header, values)
    most = max(int(lut.table.max()) for lut in display.palette)
    # Some devices write bytes into cells of 16 bits.
    return np.stack([lut(values) for lut in display.palette], axis=-1) / (255 if most <= 255 else 65535)


def _segmented(header: Header, values: NDArray) -> NDArray[np.float64]:
    """By a palette in segments (C.7.9.2), which pydicom unfolds."""
    from pydicom.pixels import apply_color_lut

    entries, first, bits = (int(number) for number in header.dataset.RedPaletteColorLookupTableDescriptor)
    # What is beyond the ends would overflow in pydicom's index, which has the entries' bits.
    inside = values.astype(np.int64).clip(first, first + (entries or 2**16) - 1)
    return apply_color_lut(inside, header.dataset)[..., :3] / (2**bits - 1)

"""DICOM files to read, and what is shown of them."""

from pathlib import Path
from typing import Any

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRLittleEndian, RLELossless, SecondaryCaptureImageStorage, generate_uid

from datamodules.files.dicom import read_dicom

RAMP = np.arange(0, 4096, 16, dtype=np.uint16).reshape(8, 32)
NOISE = np.random.default_rng(0).integers(0, 4096, (24, 20), np.uint16)
SIGNED = np.random.default_rng(1).integers(-2048, 2048, (24, 20), np.int16)


def dataset(pixels: np.ndarray | None = RAMP, photometric="MONOCHROME2", bits=12, **elements: Any) -> Dataset:
    """A data set of these pixels with these elements besides, each a value, or a pair of VR and value."""
    made = Dataset()
    made.file_meta = FileMetaDataset()
    made.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    made.SOPClassUID, made.SOPInstanceUID = SecondaryCaptureImageStorage, generate_uid()
    if pixels is not None:
        made.set_pixel_data(pixels, photometric, min(bits, 8 * pixels.itemsize))
    fill(made, elements)
    return made


def fill(made: Dataset, elements: dict[str, Any]) -> None:
    for name, value in elements.items():
        if isinstance(value, tuple):
            made.add_new(name, *value)
        else:
            setattr(made, name, value)


def item(**elements: Any) -> Dataset:
    made = Dataset()
    fill(made, elements)
    return made


def group(**macros: Dataset) -> Sequence:
    """A sequence of one functional group, which has these macros."""
    return Sequence([item(**{name: Sequence([macro]) for name, macro in macros.items()})])


def dicom(path: Path, pixels: np.ndarray | None = RAMP, *arguments: Any, compress=False, **elements: Any) -> Path:
    """A file of `dataset`."""
    made = dataset(pixels, *arguments, **elements)
    if compress:
        made.compress(RLELossless)
    made.save_as(path, enforce_file_format=True)
    return path


def lut(entries, first: int, bits: int, vr="OW") -> Dataset:
    """A lookup table; entries of 8 bits lie two in a word."""
    data = np.asarray(entries)
    packed = data.astype("<u1" if bits <= 8 else "<u2").tobytes()
    return item(
        LUTDescriptor=("SS" if first < 0 else "US", [len(data) % 2**16, first, bits]),
        LUTData=(vr, packed + b"\0" * (len(packed) % 2) if vr == "OW" else data.tolist()),
    )


def level(unit: np.ndarray) -> np.ndarray:
    return np.rint(255 * unit).astype(int)


def shown(path: Path, window=None) -> np.ndarray:
    """The greys (H, W) of a file."""
    picture = read_dicom(path, 10**6, window)
    assert (picture[0] == picture[1]).all() and (picture[0] == picture[2]).all()
    return picture[0].numpy().astype(int)

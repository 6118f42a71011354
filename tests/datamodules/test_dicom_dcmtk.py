"""DICOM as DCMTK shows and compresses it.

Where DCMTK 3.6.7 differs from the standard, tests/datamodules/test_dicom_display.py has the closed form: it knows no
LINEAR_EXACT and no functional groups, rounds rescaled values of small slopes, takes the depth of a LUT as it is said,
and scales only when it is asked to.
"""

import os
import re
import shutil
import subprocess
from io import BytesIO
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.encaps import encapsulate
from pydicom.uid import JPEG2000, JPEG2000Lossless, generate_uid

from datamodules.files.dicom import dicom_size, read_dicom
from medsynth.errors import UserError
from tests.dicom_files import NOISE, SIGNED, dicom, item, lut, shown


@pytest.fixture(scope="session")
def dcmtk(once) -> None:
    """DCMTK's commands, installed where they are not."""
    if shutil.which("dcm2pnm"):
        return
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        pytest.skip("no DCMTK here, and it takes root and apt-get to install it")
    once("dcmtk-packages", lambda _: _install())


def _install() -> None:
    options = ["--quiet=2", "--option=DPkg::Lock::Timeout=300"]
    for command in (["update"], ["install", "--yes", "--no-install-recommends", "dcmtk"]):
        done = subprocess.run(["apt-get", *options, *command], capture_output=True, text=True, timeout=600)
        if done.returncode:
            pytest.skip(f"DCMTK cannot be installed here: {done.stderr.strip().splitlines()[-1:]}")


def run(*command) -> None:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


WINDOW = {"WindowCenter": 2048, "WindowWidth": 4096}
FIRST = ("+Wi", "1")
TABLE = ("+Wl", "1")
ROOT = np.rint(4095 * np.sqrt(np.arange(4096) / 4095)).astype(int)
MODALITY = {"LUTData": ("OW", ROOT.astype("<u2").tobytes()), "ModalityLUTType": "US"}
CASES = {
    "LINEAR": (NOISE, "MONOCHROME2", {"WindowCenter": 1800, "WindowWidth": 1200}, FIRST),
    "two windows": (NOISE, "MONOCHROME2", {"WindowCenter": [1800, 9], "WindowWidth": [1200, 3]}, FIRST),
    "SIGMOID": (NOISE, "MONOCHROME2", WINDOW | {"WindowWidth": 900, "VOILUTFunction": "SIGMOID"}, FIRST),
    "rescaled": (NOISE, "MONOCHROME2", {"RescaleSlope": 2, "RescaleIntercept": -1000} | WINDOW, FIRST),
    "signed": (SIGNED, "MONOCHROME2", {"WindowCenter": 40, "WindowWidth": 400}, FIRST),
    "MONOCHROME1": (NOISE, "MONOCHROME1", WINDOW, FIRST),
    "MONOCHROME1 INVERSE": (NOISE, "MONOCHROME1", WINDOW | {"PresentationLUTShape": "INVERSE"}, FIRST),
    "MONOCHROME2 INVERSE": (NOISE, "MONOCHROME2", WINDOW | {"PresentationLUTShape": "INVERSE"}, FIRST),
    "MONOCHROME2 IDENTITY": (NOISE, "MONOCHROME2", WINDOW | {"PresentationLUTShape": "IDENTITY"}, FIRST),
    "LUT of 12 bits": (NOISE, "MONOCHROME2", {"VOILUTSequence": [lut(ROOT, 0, 12)]}, TABLE),
    "LUT of bytes": (NOISE, "MONOCHROME2", {"VOILUTSequence": [lut(ROOT // 16, 0, 8)]}, TABLE),
    "LUT of 12 bits in 16": (NOISE, "MONOCHROME2", {"VOILUTSequence": [lut(ROOT, 0, 16)]}, (*TABLE, "+Mv")),
    "LUT of signed values": (SIGNED, "MONOCHROME2", {"VOILUTSequence": [lut(ROOT, -2048, 12)]}, TABLE),
    "LUT shorter than its values": (NOISE, "MONOCHROME2", {"VOILUTSequence": [lut(ROOT[1500:2500], 900, 12)]}, TABLE),
    "modality of 12 bits": (
        NOISE,
        "MONOCHROME2",
        {"ModalityLUTSequence": [item(LUTDescriptor=("US", [4096, 0, 12]), **MODALITY)]} | WINDOW,
        FIRST,
    ),
    "HighBit": (NOISE << np.uint16(4), "MONOCHROME2", {"BitsStored": 12} | WINDOW, FIRST),
    "padding": (SIGNED, "MONOCHROME2", WINDOW | {"PixelPaddingValue": ("SS", -2048), "WindowCenter": 0}, FIRST),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_greys_are_dcmtks(dcmtk, tmp_path, name):
    pixels, photometric, elements, options = CASES[name]
    path = dicom(tmp_path / "a.dcm", pixels, photometric, 16 if name == "HighBit" else 12, **elements)
    run("dcm2pnm", "-O", *options, path, tmp_path / "a.pgm")
    expected = np.asarray(Image.open(tmp_path / "a.pgm")).astype(int)
    assert np.ptp(expected) > 40 and np.abs(shown(path) - expected).max() <= 1


@pytest.mark.parametrize(
    "elements", [{"PixelAspectRatio": [2, 1]}, {"PixelSpacing": [0.5, 0.25]}, {"ImagerPixelSpacing": [0.5, 0.125]}]
)
def test_shapes_are_dcmtks(dcmtk, tmp_path, elements):
    smooth = np.add.outer(np.arange(24) * 80, np.arange(20) * 90).astype(np.uint16)
    path = dicom(tmp_path / "a.dcm", smooth, **WINDOW, **elements)
    run("dcm2pnm", *FIRST, "+Sxf", "1", "+i", "2", path, tmp_path / "a.pgm")
    expected = np.asarray(Image.open(tmp_path / "a.pgm")).astype(int)
    assert shown(path).shape == expected.shape == dicom_size(path, 10**6)[0][::-1]
    assert np.abs(shown(path) - expected)[4:-4, 4:-4].max() <= 6  # another interpolation


SMOOTH = (np.add.outer(np.arange(40), np.arange(48)) * 40 + np.arange(48) % 7).astype(np.uint16)
DEPTHS = {
    "8 bits": (SMOOTH // 16).astype(np.uint8),
    "12 bits": SMOOTH,
    "12 bits, signed": SMOOTH.astype(np.int16) - np.int16(2048),
    "16 bits": SMOOTH * np.uint16(16),
}
ENCODERS = {
    "lossless JPEG": (["dcmcjpeg", "+e1"], 0),
    "lossless JPEG, process 14": (["dcmcjpeg", "+el"], 0),
    "JPEG": (["dcmcjpeg", "+eb", "+q", "95"], 5),
    "JPEG-LS": (["dcmcjpls", "+el"], 0),
    "JPEG-LS, near": (["dcmcjpls", "+en", "+md", "2"], 3),
    "RLE": (["dcmcrle"], 0),
    "deflated": (["dcmconv", "+td"], 0),
    "big-endian": (["dcmconv", "+tb"], 0),
    "implicit": (["dcmconv", "+ti"], 0),
}


def source(path: Path, depth: str) -> Path:
    pixels = DEPTHS[depth]
    low, high = int(pixels.min()), int(pixels.max())
    window = {"WindowCenter": (low + high + 1) / 2, "WindowWidth": high - low + 1}
    identity = {"StudyInstanceUID": generate_uid(), "SeriesInstanceUID": generate_uid()}
    return dicom(path, pixels, "MONOCHROME2", int(depth.split()[0]), **window, **identity)


@pytest.mark.parametrize("depth", DEPTHS)
def test_compressions_are_dcmtks(dcmtk, tmp_path, depth):
    plain = source(tmp_path / "a.dcm", depth)
    expected = shown(plain)
    for name, (encoder, off) in ENCODERS.items():
        if "near" in name and "signed" in depth:
            continue  # DCMTK does not write it
        run(*encoder, plain, tmp_path / "b.dcm")
        assert np.abs(shown(tmp_path / "b.dcm") - expected).max() <= off, name
        assert dicom_size(tmp_path / "b.dcm", 10**6)[0] == (48, 40), name


@pytest.mark.parametrize("name", CASES)
def test_greys_are_the_same_in_other_orders_of_bytes(dcmtk, tmp_path, name):
    pixels, photometric, elements, _ = CASES[name]
    plain = dicom(tmp_path / "a.dcm", pixels, photometric, 16 if name == "HighBit" else 12, **elements)
    for syntax in ("+ti", "+tb"):  # implicit, where signs are guessed; big-endian
        run("dcmconv", syntax, plain, tmp_path / "b.dcm")
        assert (shown(tmp_path / "b.dcm") == shown(plain)).all(), syntax


def test_the_mends_are_commands(dcmtk, tmp_path):
    window = {"WindowCenter": 100, "WindowWidth": 50}
    for elements in (
        {"RescaleSlope": 0, "RescaleIntercept": 0},
        window | {"WindowWidth": 0},
        {"PixelSpacing": [0, 1]},
        {"PresentationLUTShape": "LIN OD"},
    ):
        path = dicom(tmp_path / "a.dcm", **elements)
        with pytest.raises(UserError) as error:
            shown(path)
        run(*re.findall(r"`(.*?)`", str(error.value))[0].split(), "--no-backup", path)
        assert shown(path).max() == 255


@pytest.mark.parametrize("bits", [1, 4, 6, 7])
def test_compressions_of_fewer_bits_than_a_byte(dcmtk, tmp_path, bits):
    """Of which some decoders that pydicom has end their process, and others know nothing."""
    pixels = (SMOOTH >> (12 - bits)).astype(np.uint8)
    identity = {"StudyInstanceUID": generate_uid(), "SeriesInstanceUID": generate_uid()}
    plain = dicom(tmp_path / "a.dcm", pixels, "MONOCHROME2", bits, **identity)
    for encoder in (["dcmcjpeg", "+e1"], ["dcmcjpls", "+el"]):
        run(*encoder, plain, tmp_path / "b.dcm")
        assert (shown(tmp_path / "b.dcm") == shown(plain)).all(), encoder


def test_jpeg_of_bytes_in_cells_of_16_bits(dcmtk, tmp_path):
    plain = source(tmp_path / "a.dcm", "8 bits")
    run("dcmcjpeg", "+eb", "+q", "95", plain, tmp_path / "b.dcm")
    expected = shown(tmp_path / "b.dcm")
    made = pydicom.dcmread(tmp_path / "b.dcm")
    made.BitsAllocated = 16
    made.save_as(tmp_path / "b.dcm")
    assert (shown(tmp_path / "b.dcm") == expected).all()


def test_colours_are_dcmtks(dcmtk, tmp_path):
    ramp = np.add.outer(np.arange(32) * 4, np.arange(40) * 3)
    pixels = np.stack([ramp, ramp[::-1], 255 - ramp], -1).astype(np.uint8)
    identity = {"StudyInstanceUID": generate_uid(), "SeriesInstanceUID": generate_uid()}
    plain = dicom(tmp_path / "a.dcm", pixels, "RGB", 8, **identity)
    for encoder in (["dcmcjpeg", "+e1"], ["dcmcjpeg", "+eb", "+q", "95"], ["dcmcjpls", "+el"], ["dcmcrle"]):
        run(*encoder, plain, tmp_path / "b.dcm")
        picture = read_dicom(tmp_path / "b.dcm", 10**6).permute(1, 2, 0).numpy().astype(int)
        assert np.abs(picture - pixels).max() <= (6 if "+eb" in encoder else 0), encoder


@pytest.mark.parametrize("irreversible", [False, True])
def test_jpeg_2000(tmp_path, irreversible):
    for depth in ("8 bits", "16 bits"):
        plain, data = source(tmp_path / "a.dcm", depth), BytesIO()
        Image.fromarray(DEPTHS[depth]).save(data, "JPEG2000", no_jp2=True, irreversible=irreversible)
        made = pydicom.dcmread(plain)
        made.PixelData = encapsulate([data.getvalue()])
        made["PixelData"].is_undefined_length = True
        made.file_meta.TransferSyntaxUID = JPEG2000 if irreversible else JPEG2000Lossless
        made.save_as(tmp_path / "b.dcm")
        assert np.abs(shown(tmp_path / "b.dcm") - shown(plain)).max() <= 2 * irreversible


@pytest.mark.parametrize("encoder", [["dcmcjpeg", "+e1"], ["dcmcjpeg", "+eb"], ["dcmcjpls", "+el"]])
def test_damaged_compressed_pixels_get_one_line(dcmtk, tmp_path, encoder):
    run(*encoder, source(tmp_path / "a.dcm", "12 bits"), tmp_path / "b.dcm")
    data = (tmp_path / "b.dcm").read_bytes()
    start = data.rindex(b"\xff\xd8\xff")
    cut, head = bytearray(data), bytearray(data)
    cut[start + 200 : -8] = b"\0" * len(cut[start + 200 : -8])  # all but the end of the element
    place = data.index(
        b"\xff\xf7" if encoder[0] == "dcmcjpls" else b"\xff\xc3" if "+e1" in encoder else b"\xff\xc0", start
    )
    head[place + 5 : place + 7] = (7).to_bytes(2, "big")  # rows
    for damaged in (cut, head):
        (tmp_path / "c.dcm").write_bytes(damaged)
        with pytest.raises(
            UserError, match=r"c\.dcm cannot be decoded \(.*\); copy it again from its source$"
        ) as error:
            read_dicom(tmp_path / "c.dcm", 10**6)
        assert "\n" not in str(error.value)

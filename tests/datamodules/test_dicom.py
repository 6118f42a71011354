"""Grey pictures by their stored values: windows by hand and by pydicom, and one clear line for every unsound file."""

import re
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.pixels import apply_modality_lut, apply_voi_lut

from datamodules.files.dicom import apply_window, dicom_size, read_dicom, stretch
from datamodules.files.pictures import picture_size, read_picture
from datamodules.files.raster import read_grey
from medsynth.errors import UserError
from tests.dicom_files import NOISE, RAMP, dicom, level, lut, shown

# Windows


def test_windows_by_hand():
    values = np.array([-10, 0, 49, 50, 99, 100, 200])
    # PS3.3 C.11.2.1.2.1: c = 50, w = 100: 0 up to 0, 1 from 99 on, (x - 49.5)/99 + 0.5 between.
    np.testing.assert_allclose(apply_window(values, 50, 100), [0, 0, 49 / 99, 50 / 99, 1, 1, 1], atol=1e-12)
    np.testing.assert_allclose(apply_window(values, 50, 100, "LINEAR_EXACT"), [0, 0, 0.49, 0.5, 0.99, 1, 1], atol=1e-12)
    sigmoid = 1 / (1 + np.exp(-4 * (values - 50) / 100))
    np.testing.assert_allclose(apply_window(values, 50, 100, "SIGMOID"), sigmoid, atol=1e-12)
    assert apply_window(np.array([1, 2, 3]), 2, 1).tolist() == [0, 1, 1]  # w = 1: a threshold at c - 1/2
    np.testing.assert_allclose(apply_window(np.array([-1e9, 1e9]), 0, 1, "SIGMOID"), [0, 1], atol=1e-12)


def test_stretch_by_hand():
    np.testing.assert_allclose(stretch(np.arange(201)), (np.arange(201) - 1).clip(0, 198) / 198)
    assert stretch(np.full((4, 4), 7)).tolist() == [[0] * 4] * 4
    counted = np.array([True, True, False])
    np.testing.assert_allclose(stretch(np.array([0, 100, -5000]), counted), [0, 1, 0], atol=0.01)


@pytest.mark.parametrize("function", [None, "LINEAR", "LINEAR_EXACT", "SIGMOID"])
@pytest.mark.parametrize("rescale", [(1, 0), (2, -1000)])
def test_the_files_window_is_pydicoms(tmp_path, function, rescale):
    slope, intercept = rescale
    elements = {"WindowCenter": 1800 * slope + intercept, "WindowWidth": 1200 * slope}
    elements |= {"RescaleSlope": slope, "RescaleIntercept": intercept} | (
        {"VOILUTFunction": function} if function else {}
    )
    path = dicom(tmp_path / "a.dcm", NOISE, **elements)
    dataset = pydicom.dcmread(path)
    expected = apply_voi_lut(apply_modality_lut(dataset.pixel_array, dataset), dataset)
    lowest, highest = intercept, 4095 * slope + intercept  # what pydicom takes for black and white
    assert np.abs(shown(path) - level((expected - lowest) / (highest - lowest))).max() <= 1
    assert shown(path, window=(0, 10)).tolist() == shown(path).tolist()


def test_the_first_of_several_windows_counts(tmp_path):
    several = dicom(tmp_path / "a.dcm", WindowCenter=[1000, 3000], WindowWidth=[500, 100])
    assert (shown(several) == level(apply_window(RAMP, 1000, 500))).all()


@pytest.mark.parametrize("bits", [8, 12, 16])
def test_a_lut_goes_before_a_window(tmp_path, bits):
    table = lut(np.rint((2**bits - 1) * np.sqrt(np.arange(4096) / 4095)).astype(int), 0, bits)
    path = dicom(tmp_path / "a.dcm", VOILUTSequence=[table], WindowCenter=10, WindowWidth=20)
    assert np.abs(shown(path) - level(np.sqrt(RAMP / 4095))).max() <= 1


def test_a_lut_beyond_its_ends_is_pydicoms(tmp_path):
    table = Dataset()
    table.LUTDescriptor = [1000, 500, 10]
    table.add_new("LUTData", "US", (np.arange(1000)[::-1] + 20).tolist())
    path = dicom(tmp_path / "a.dcm", NOISE, VOILUTSequence=[table])
    dataset = pydicom.dcmread(path)
    assert NOISE.min() < 500 and NOISE.max() > 1500
    assert (shown(path) == level(apply_voi_lut(dataset.pixel_array, dataset) / 1023)).all()


@pytest.mark.parametrize("elements", [{}, {"WindowCenter": None, "WindowWidth": None}, {"WindowCenter": 5}])
def test_without_a_window_the_configs_then_the_percentiles(tmp_path, elements):
    path = dicom(tmp_path / "a.dcm", RescaleSlope=1, RescaleIntercept=-1024, **elements)
    assert (shown(path, window=(500, 800)) == level(apply_window(RAMP.astype(int) - 1024, 500, 800))).all()
    low, high = np.percentile(RAMP, (0.5, 99.5))
    assert np.abs(shown(path) - level(((RAMP - low) / (high - low)).clip(0, 1))).max() <= 1


def test_monochrome1_is_inverted(tmp_path):
    window = {"WindowCenter": 2048, "WindowWidth": 4096}
    bright = shown(dicom(tmp_path / "2.dcm", **window))
    dark = shown(dicom(tmp_path / "1.dcm", photometric="MONOCHROME1", **window))
    assert (bright + dark == 255).all() and dark[0, 0] == 255


def test_signed_values(tmp_path):
    hounsfield = np.linspace(-1000, 1000, 64, dtype=np.int16).reshape(8, 8)
    path = dicom(tmp_path / "a.dcm", hounsfield, bits=16, WindowCenter=40, WindowWidth=400)
    assert (shown(path) == level(apply_window(hounsfield, 40, 400))).all()


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_padding_is_black_and_not_counted(tmp_path, photometric):
    pixels = np.where(np.arange(32) < 16, np.uint16(4000), RAMP // 40)
    padded = shown(dicom(tmp_path / "a.dcm", pixels, photometric, PixelPaddingValue=4000))
    assert (padded[:, :16] == 0).all()
    assert padded[:, 16:].min() == 0 and padded[:, 16:].max() == 255


def test_compressed_pixels(tmp_path):
    window = {"WindowCenter": 2048, "WindowWidth": 4096}
    plain, packed = dicom(tmp_path / "a.dcm", **window), dicom(tmp_path / "b.dcm", compress=True, **window)
    assert (shown(plain) == shown(packed)).all()


# 16-bit and other files


def test_16_bit_files_by_window_and_by_percentile(tmp_path):
    for name in ("a.png", "a.tif"):
        Image.fromarray(NOISE).save(tmp_path / name)
        assert picture_size(tmp_path / name, 10**6) == (20, 24)
        windowed = read_picture(tmp_path / name, 10**6, 0, "window", (2000, 1000))
        assert windowed.shape == (3, 24, 20)
        assert (windowed[2].numpy() == level(apply_window(NOISE, 2000, 1000))).all()
        stretched = read_picture(tmp_path / name, 10**6, 0, "window")
        assert (stretched[0].numpy() == level(stretch(NOISE))).all()


def test_stored_values_of_every_grey_mode(tmp_path):
    classes = np.array([[0, 1], [2, 3]], np.uint8)
    palette = Image.fromarray(classes).convert("P")
    palette.putpalette([9, 9, 9, 200, 0, 0, 0, 200, 0, 0, 0, 200])
    palette.putdata(classes.flatten().tolist())
    files = {
        "1.png": (Image.fromarray(classes > 1), classes > 1),
        "L.png": (Image.fromarray(classes), classes),
        "I16.png": (Image.fromarray(classes.astype(np.uint16) * 500), classes.astype(int) * 500),
        "P.png": (palette, classes),
        "grey-rgb.png": (Image.fromarray(classes).convert("RGB"), classes),
    }
    for name, (image, expected) in files.items():
        image.save(tmp_path / name)
        assert read_grey(tmp_path / name, 100)[0].tolist() == expected.tolist(), name


def test_the_header_tells_the_upright_size(tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("L", (30, 20)).save(tmp_path / "a.jpg", exif=turned)
    assert picture_size(tmp_path / "a.jpg", 10**6) == (20, 30)
    assert picture_size(dicom(tmp_path / "a.dcm"), 10**6) == (32, 8)


# Faults


def damaged(folder: Path) -> dict[str, tuple[Path, str]]:
    """Unsound files with what is said of each after its path."""
    sound = dicom(folder / "sound.dcm", NOISE).read_bytes()
    for name, data in {"cut.dcm": sound[:-100], "head.dcm": sound[:300], "text.dcm": b"no picture " * 40}.items():
        (folder / name).write_bytes(data)
    packed = dicom(folder / "packed.dcm", NOISE, compress=True).read_bytes()
    (folder / "packed-cut.dcm").write_bytes(packed[: len(packed) // 2])
    dicom(folder / "frames.dcm", np.stack([NOISE, NOISE]))
    dicom(folder / "colour.dcm", np.zeros((8, 8, 3), np.uint8), "RGB", bits=8, PhotometricInterpretation="HSV")
    dicom(folder / "report.dcm", None)
    dicom(folder / "large.dcm", np.zeros((40, 60), np.uint16))
    said = {
        "gone.dcm": "is missing",
        "cut.dcm": r"is cut off \(860 of 960 bytes of its pixels are there\): copy it again from its source",
        "head.dcm": "has no pixel data: it is cut off or no picture; copy it again from its source or leave it out",
        "packed-cut.dcm": "has no pixel data: it is cut off.*; copy it again from its source or leave it out",
        "text.dcm": "is no DICOM file: give it the suffix of what it is, or leave it out",
        "frames.dcm": "has 2 frames: save the one that is meant as a file of its own",
        "colour.dcm": "is of the colours HSV, which nothing here reads: save it as RGB",
        "report.dcm": "has no pixel data: .*leave it out",
        "large.dcm": "has more than data.max_pixels=1000 pixels",
    }
    return {name: (folder / name, why) for name, why in said.items()}


@pytest.mark.filterwarnings("ignore:End of file")
def test_every_unsound_dicom_gets_one_line(tmp_path):
    for path, why in damaged(tmp_path).values():
        with pytest.raises(UserError, match=f"^{re.escape(str(path))} {why}$") as error:
            read_dicom(path, 1000)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("syntax", "why"),
    [
        (
            pydicom.uid.JPEGExtended12Bit,
            "JPEG Extended .*: pip install pylibjpeg pylibjpeg-libjpeg, which can decode it",
        ),
        (
            pydicom.uid.HTJ2KLossless,
            "High-Throughput JPEG 2000 .*: pip install pylibjpeg pylibjpeg-openjpeg, which can.*",
        ),
        (pydicom.uid.MPEG2MPML, "MPEG2 .*, which nothing here reads: save it uncompressed"),
    ],
)
def test_a_compression_without_a_decoder_is_named(tmp_path, syntax, why):
    path = dicom(tmp_path / "a.dcm", compress=True)
    dataset = pydicom.dcmread(path)
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.save_as(path)
    for ask in (read_dicom, dicom_size):
        with pytest.raises(UserError, match=rf"a\.dcm is compressed as {why}$"):
            ask(path, 1000)

"""DICOM as a viewer shows it: by hand, by a closed form over whatever combines, and one line for what cannot be."""

import re
from io import BytesIO

import numpy as np
import pydicom
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ExplicitVRBigEndian, ImplicitVRLittleEndian

from datamodules.files.dicom import dicom_size, read_dicom, stretch
from medsynth.errors import UserError
from tests.dicom_files import NOISE, RAMP, dataset, dicom, group, item, level, lut, shown

FIVE = np.array([[0, 1000, 2000, 3000, 4000]], np.uint16)


def greys(path) -> list[int]:
    return shown(path).ravel().tolist()


# Modality and values of interest


def test_functional_groups_of_an_enhanced_object(tmp_path):
    rescale = item(RescaleSlope=1, RescaleIntercept=-1024, RescaleType="HU")
    window = item(WindowCenter=0, WindowWidth=2000)
    expected = [0, 125, 252, 255, 255]  # LINEAR: (x + 0.5)/1999 + 0.5 of -1024, -24, 976 …
    shared = group(PixelValueTransformationSequence=rescale, FrameVOILUTSequence=window)
    of_frame = group(FrameVOILUTSequence=window)
    for name, elements in {
        "shared": {"SharedFunctionalGroupsSequence": shared},
        "frame": {"PerFrameFunctionalGroupsSequence": shared, "NumberOfFrames": 1},
        "both": {
            "SharedFunctionalGroupsSequence": group(PixelValueTransformationSequence=rescale),
            "PerFrameFunctionalGroupsSequence": of_frame,
        },
        "frame-before-top": {"PerFrameFunctionalGroupsSequence": shared, "WindowCenter": 9, "WindowWidth": 9},
        "top": {"PerFrameFunctionalGroupsSequence": of_frame, "RescaleSlope": 1, "RescaleIntercept": -1024},
    }.items():
        assert greys(dicom(tmp_path / f"{name}.dcm", FIVE, **elements)) == expected, name


def test_windows_of_fractions(tmp_path):
    fine = {"RescaleSlope": 1e-6, "RescaleIntercept": 0, "WindowCenter": 0.002, "WindowWidth": 0.004}
    for function in ({}, {"VOILUTFunction": "LINEAR"}, {"VOILUTFunction": "LINEAR_EXACT"}):
        assert greys(dicom(tmp_path / "a.dcm", FIVE, **fine, **function)) == [0, 64, 128, 191, 255]
    for slope in (1e-6, 1e-15):
        assert greys(dicom(tmp_path / "a.dcm", FIVE, RescaleSlope=slope, RescaleIntercept=0)) == [0, 63, 128, 192, 255]
    assert np.abs(shown(dicom(tmp_path / "a.dcm", FIVE, **fine, VOILUTFunction="SIGMOID")) - level(
        1 / (1 + np.exp(-4 * (FIVE * 1e-6 - 0.002) / 0.004))
    )).max() == 0  # fmt: skip


def test_no_function_is_linear(tmp_path):
    window = {"WindowCenter": 100, "WindowWidth": 4}
    pixels = np.array([[97, 98, 99, 100, 101, 102]], np.uint16)
    for elements in (
        {},
        {"VOILUTFunction": ""},
        {"VOILUTFunction": "LINEAR"},
        {"VOILUTFunction": ["LINEAR", "SIGMOID"]},
    ):
        path = dicom(tmp_path / "a.dcm", pixels, **window, **elements)
        assert greys(path) == [0, 0, 85, 170, 255, 255]


@pytest.mark.parametrize("vr", ["OW", "US"])
def test_the_white_of_a_table_is_its_own(tmp_path, vr):
    cases = {
        "of 12 bits in 16": (4095, 16),
        "of 12 bits": (4095, 12),
        "of more bits than said": (4095, 10),
        "of no whole bits in 16": (4000, 16),
    }
    for name, (most, bits) in cases.items():
        entries = np.rint(np.linspace(0, most, 4096))
        path = dicom(tmp_path / "a.dcm", VOILUTSequence=[lut(entries.astype(int), 0, bits, vr)])
        assert np.abs(shown(path) - level(RAMP / 4095)).max() <= 1, name
    dim = lut(np.arange(4096) * 3000 // 4095, 0, 12, vr)  # of 12 bits as it says
    assert np.abs(shown(dicom(tmp_path / "a.dcm", VOILUTSequence=[dim])) - level(RAMP / 4095 * 3000 / 4095)).max() <= 1


def test_the_first_input_of_a_table_is_signed_where_inputs_can_be(tmp_path):
    table = np.arange(0, 4096)
    signed = (RAMP.astype(np.int16) - 2048).reshape(RAMP.shape)
    expected = level(RAMP / 4095)
    rescaled, high = {"RescaleSlope": 1, "RescaleIntercept": -2048}, RAMP + np.uint16(40000)
    cases = {
        "signed": (signed, lut(table, -2048, 12), {}),
        "signed, written unsigned": (signed, lut(table, 63488, 12), {}),
        "rescaled below 0": (RAMP, lut(table, -2048, 12), rescaled),
        "rescaled below 0, written unsigned": (RAMP, lut(table, 63488, 12), rescaled),
        "unsigned": (high, lut(table, 40000, 12), {}),
        "unsigned, written signed": (high, lut(table, 40000 - 2**16, 12), {}),
        "below 0 where only that meets an input": (RAMP, lut([0, *table], -1, 12), {}),
    }
    for name, (pixels, made, elements) in cases.items():
        bits = 12 if "meets" in name else 16
        path = dicom(tmp_path / "a.dcm", pixels, "MONOCHROME2", bits, VOILUTSequence=[made], **elements)
        assert np.abs(shown(path) - expected).max() <= 1, name


def test_tables_of_the_modality(tmp_path):
    """Of 12 bits, which pydicom's own takes for a dtype; of 65536 entries, said as 0; of bytes, two in a word."""
    window = {"WindowCenter": 128, "WindowWidth": 256, "VOILUTFunction": "LINEAR_EXACT"}
    square = (np.arange(4096) ** 2 // 4096).astype(int)
    path = dicom(tmp_path / "12.dcm", ModalityLUTSequence=[lut(square, 0, 12)], **window)
    assert np.abs(shown(path) - level((square[RAMP] / 256).clip(0, 1))).max() <= 1
    whole = np.arange(65536) // 256
    pixels = RAMP * np.uint16(16)
    path = dicom(tmp_path / "0.dcm", pixels, "MONOCHROME2", 16, ModalityLUTSequence=[lut(whole, 0, 16)], **window)
    assert np.abs(shown(path) - level(pixels // 256 / 256)).max() <= 1
    packed = dataset(ModalityLUTSequence=[lut(np.arange(4095) // 16, 0, 8)], **window)
    packed.save_as(tmp_path / "8.dcm", enforce_file_format=True)
    expected = level(RAMP.clip(0, 4094) // 16 / 256)
    assert np.abs(shown(tmp_path / "8.dcm") - expected).max() <= 1
    for name, syntax in {"implicit": ImplicitVRLittleEndian, "big": ExplicitVRBigEndian}.items():
        made = dataset(ModalityLUTSequence=[lut(square, 0, 12, "US")], **window)
        made.file_meta.TransferSyntaxUID = syntax
        made.PixelData = RAMP.astype(">u2" if name == "big" else "<u2").tobytes()
        made.save_as(tmp_path / "a.dcm", enforce_file_format=True)
        assert np.abs(shown(tmp_path / "a.dcm") - level((square[RAMP] / 256).clip(0, 1))).max() <= 1, name


# Cells and padding


def test_padding_has_the_sign_of_the_pixels(tmp_path):
    pixels = np.array([[-2000, -2000, -1000, 0, 1000]], np.int16)
    for padding in (("US", 63536), ("SS", -2000)):
        for photometric, expected in {"MONOCHROME2": [0, 0, 0, 128, 255], "MONOCHROME1": [0, 0, 255, 128, 0]}.items():
            path = dicom(tmp_path / "a.dcm", pixels, photometric, 16, PixelPaddingValue=padding)
            assert greys(path) == expected, (padding, photometric)
    several = np.array([[-2000, -1990, -1000, 0, 1000]], np.int16)
    limits = {"PixelPaddingValue": ("US", 63546), "PixelPaddingRangeLimit": ("US", 63536)}
    assert greys(dicom(tmp_path / "a.dcm", several, "MONOCHROME1", 16, **limits)) == [0, 0, 255, 128, 0]


def test_padding_beyond_the_stored_bits(tmp_path):
    """Some devices pad cells of 16 bits with what the 12 that they store cannot hold."""
    for kind, padding in (("<u2", 63536), ("<i2", -32768)):
        pixels = np.array([[padding, padding, 1000, 1500, 2000]], kind)
        made = dataset(np.zeros((1, 5), kind), PixelPaddingValue=("SS" if padding < 0 else "US", padding))
        made.PixelData = pixels.tobytes()
        made.save_as(tmp_path / "a.dcm", enforce_file_format=True)
        assert greys(tmp_path / "a.dcm") == [0, 0, 0, 128, 255]


@pytest.mark.parametrize("kind", [np.uint16, np.int16])
@pytest.mark.parametrize("high", [11, 13, 15])
def test_the_stored_bits_end_at_the_high_bit(tmp_path, high, kind):
    low = -2048 if kind == np.int16 else 0
    pixels = np.linspace(low, low + 4095, 40).round().astype(kind).reshape(5, 8)
    window = {"WindowCenter": low + 2048, "WindowWidth": 4096}
    expected = shown(dicom(tmp_path / "a.dcm", pixels, **window))
    noise = np.random.default_rng(0).integers(0, 2**16, pixels.shape).astype(np.uint16)
    mask = np.uint16(0xFFF << (high - 11))
    cells = ((pixels.astype(np.uint16) << np.uint16(high - 11)) & mask) | (noise & ~mask)
    for compress in (False, True):
        made = dataset(pixels, **window, HighBit=high)
        made.PixelData = cells.tobytes()
        if compress:
            made.BitsStored, made.HighBit = 16, 15
            made.compress(pydicom.uid.RLELossless)
            made.BitsStored, made.HighBit = 12, high
        made.save_as(tmp_path / "b.dcm", enforce_file_format=True)
        assert (shown(tmp_path / "b.dcm") == expected).all(), compress


def test_overlays_are_left_out(tmp_path):
    plain = shown(dicom(tmp_path / "a.dcm", WindowCenter=2048, WindowWidth=4096))
    overlay = {"OverlayRows": 8, "OverlayColumns": 32, "OverlayType": "G", "OverlayOrigin": [1, 1]}
    made = dataset(WindowCenter=2048, WindowWidth=4096)
    for offset, (name, value) in enumerate(overlay.items()):
        tag = {"OverlayRows": 0x10, "OverlayColumns": 0x11, "OverlayType": 0x40, "OverlayOrigin": 0x50}[name]
        made.add_new(0x60000000 + tag, ["US", "US", "CS", "SS"][offset], value)
    made.add_new(0x60000100, "US", 1)
    made.add_new(0x60000102, "US", 0)
    made.add_new(0x60003000, "OW", b"\xff" * 32)
    made.save_as(tmp_path / "b.dcm", enforce_file_format=True)
    assert (shown(tmp_path / "b.dcm") == plain).all()


def test_one_bit_and_real_numbers(tmp_path):
    bits = np.random.default_rng(0).integers(0, 2, (5, 9)).astype(np.uint8)
    made = dataset(bits, bits=1, BitsAllocated=1)
    made.PixelData = np.packbits(bits.ravel(), bitorder="little").tobytes()
    made.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    assert (shown(tmp_path / "a.dcm") == 255 * bits).all()
    for keyword, kind, vr in (("FloatPixelData", "<f4", "OF"), ("DoubleFloatPixelData", "<f8", "OD")):
        values = np.linspace(-0.5, 0.5, 40).reshape(5, 8).astype(kind)
        elements = {"BitsAllocated": 8 * values.itemsize, "WindowCenter": 0, "WindowWidth": 0.5}
        made = dataset(np.zeros((5, 8), np.uint16), **elements)
        for stale in ("PixelData", "BitsStored", "HighBit", "PixelRepresentation"):
            delattr(made, stale)
        made.add_new(keyword, vr, values.tobytes())
        made.save_as(tmp_path / "a.dcm", enforce_file_format=True)
        assert (shown(tmp_path / "a.dcm") == level((values.astype(float) / 0.5 + 0.5).clip(0, 1))).all()
        values[0, :2] = np.nan
        made[keyword].value = values.tobytes()
        made.save_as(tmp_path / "a.dcm", enforce_file_format=True)
        with pytest.raises(UserError, match="no finite numbers: "):
            shown(tmp_path / "a.dcm")
        made.add_new(
            keyword.replace("Data", "PaddingValue"), vr.replace("O", "F")[:1] + ("L" if vr == "OF" else "D"), np.nan
        )
        made.save_as(tmp_path / "a.dcm", enforce_file_format=True)
        assert shown(tmp_path / "a.dcm")[0, :3].tolist() == [0, 0, 0] and shown(tmp_path / "a.dcm").max() == 255


# Shape and colours


def test_pixels_that_are_not_square(tmp_path):
    pixels = np.repeat(np.arange(0, 4096, 32, dtype=np.uint16)[None], 64, 0)
    window = {"WindowCenter": 2048, "WindowWidth": 4096}
    measures = group(PixelMeasuresSequence=item(PixelSpacing=[0.6, 0.3]))
    for name, (elements, size) in {
        "ratio": ({"PixelAspectRatio": [2, 1]}, (128, 128)),
        "wide": ({"PixelAspectRatio": [1, 2]}, (64, 256)),
        "spacing": ({"PixelSpacing": [0.5, 0.25]}, (128, 128)),
        "imager": ({"ImagerPixelSpacing": [0.2, 0.1]}, (128, 128)),
        "scanned": ({"NominalScannedPixelSpacing": [0.2, 0.1]}, (128, 128)),
        "group": ({"SharedFunctionalGroupsSequence": measures}, (128, 128)),
        "spacing first": ({"PixelSpacing": [1, 1], "PixelAspectRatio": [2, 1]}, (64, 128)),
        "nearly square": ({"PixelSpacing": [0.1432, 0.1433]}, (64, 128)),
        "empty": ({"PixelSpacing": None}, (64, 128)),
    }.items():
        path = dicom(tmp_path / "a.dcm", pixels, **window, **elements)
        assert shown(path).shape == size, name
        assert dicom_size(path, 10**6) == (size[::-1], (128, 64)), name
    tall = shown(dicom(tmp_path / "a.dcm", pixels, **window, PixelAspectRatio=[2, 1]))
    assert (tall == shown(dicom(tmp_path / "b.dcm", pixels, **window))[:1]).all()  # rows alike stay alike
    with pytest.raises(UserError, match="more than data.max_pixels=10000 pixels"):
        dicom_size(tmp_path / "a.dcm", 10_000)


RGB = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)


def test_colours(tmp_path):
    def colours(path) -> np.ndarray:
        return read_dicom(path, 10**6).permute(1, 2, 0).numpy().astype(int)

    assert (colours(dicom(tmp_path / "a.dcm", RGB, "RGB", 8)) == RGB).all()
    made = dataset(RGB, "RGB", 8, PlanarConfiguration=1)
    made.PixelData = RGB.transpose(2, 0, 1).tobytes()
    made.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    assert (colours(tmp_path / "a.dcm") == RGB).all()
    luminance, blue, red = RGB[..., 0].astype(float), RGB[..., 1] - 128.0, RGB[..., 2] - 128.0
    # ITU-R BT.601, as C.7.6.3.1.2 has it.
    converted = [luminance + 1.402 * red, luminance - 0.344136 * blue - 0.714136 * red, luminance + 1.772 * blue]
    expected = np.stack(converted, -1).clip(0, 255)
    assert np.abs(colours(dicom(tmp_path / "a.dcm", RGB, "YBR_FULL", 8)) - expected).max() <= 1
    halved = RGB.copy()
    halved[:, 1::2, 1:] = halved[:, ::2, 1:]
    full = colours(dicom(tmp_path / "a.dcm", halved, "YBR_FULL", 8))
    assert (colours(dicom(tmp_path / "b.dcm", halved, "YBR_FULL_422", 8)) == full).all()
    deep = RGB.astype(np.uint16) * 257
    assert (colours(dicom(tmp_path / "a.dcm", deep, "RGB", 16)) == RGB).all()


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("big", [False, True])
def test_palettes(tmp_path, bits, big):
    """Pixels of 12 bits with a table of 300 entries: more than pydicom's index of a table of bytes can hold."""
    rng = np.random.default_rng(0)
    tables = rng.integers(0, 2**bits, (3, 300)).astype(np.uint16)
    pixels = rng.integers(0, 600, (6, 8)).astype(np.uint16)
    made = dataset(pixels, "PALETTE COLOR")
    for table, colour in zip(tables, ("Red", "Green", "Blue"), strict=True):
        made.add_new(f"{colour}PaletteColorLookupTableDescriptor", "US", [300, 100, bits])
        words = table.astype("<u1").view("<u2") if bits == 8 else table
        made.add_new(f"{colour}PaletteColorLookupTableData", "OW", words.astype(">u2" if big else "<u2").tobytes())
    if big:
        made.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
        made.PixelData = pixels.astype(">u2").tobytes()
    made.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    expected = tables[:, (pixels.astype(int) - 100).clip(0, 299)] / (2**bits - 1)
    assert (read_dicom(tmp_path / "a.dcm", 10**6).numpy() == level(expected)).all()


def test_a_palette_in_segments(tmp_path):
    made = dataset(np.arange(64, dtype=np.uint8).reshape(8, 8) * 4, "PALETTE COLOR", 8)
    for colour in ("Red", "Green", "Blue"):
        made.add_new(f"{colour}PaletteColorLookupTableDescriptor", "US", [256, 0, 16])
        segments = np.array([0, 1, 0, 1, 255, 65535], "<u2")  # one entry of 0, then linearly to 65535
        made.add_new(f"Segmented{colour}PaletteColorLookupTableData", "OW", segments.tobytes())
    made.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    assert np.abs(shown(tmp_path / "a.dcm") - np.arange(64).reshape(8, 8) * 4).max() <= 1


# Files


def test_without_a_preamble(tmp_path):
    whole = dicom(tmp_path / "a.dcm", WindowCenter=2048, WindowWidth=4096)
    expected = shown(whole)
    data = whole.read_bytes()
    (tmp_path / "group.dcm").write_bytes(data[132:])  # without the 128 bytes and "DICM"
    explicit, implicit = tmp_path / "explicit.dcm", tmp_path / "implicit.dcm"
    start = 132 + 12 + int.from_bytes(data[140:144], "little")
    explicit.write_bytes(data[start:])  # without the file's own group besides
    made = pydicom.dcmread(whole)
    made.file_meta, made.preamble = FileMetaDataset(), None
    made.save_as(implicit, implicit_vr=True, little_endian=True)
    assert implicit.read_bytes()[128:132] != b"DICM"
    (tmp_path / "unsaid.dcm").write_bytes(data[:132] + data[start:])
    for path in (tmp_path / "group.dcm", explicit, implicit, tmp_path / "unsaid.dcm"):
        assert (shown(path) == expected).all() and dicom_size(path, 10**6)[0] == (32, 8), path
    dicom(tmp_path / "packed.dcm", compress=True)
    data = (tmp_path / "packed.dcm").read_bytes()
    (tmp_path / "packed.dcm").write_bytes(data[132 + 12 + int.from_bytes(data[140:144], "little") :])
    with pytest.raises(UserError, match="packed.dcm does not say how its pixels are compressed"):
        shown(tmp_path / "packed.dcm")


# Whatever combines


@st.composite
def displays(draw):
    bits = draw(st.integers(1, 16))
    signed = draw(st.booleans())
    low = -(2 ** (bits - 1)) if signed else 0
    allocated = 8 if bits <= 8 and draw(st.booleans()) else 16
    slope = draw(st.sampled_from([None, 1.0, -1.0, 2.0, 0.25, 1e-5]))
    intercept = 0.0 if slope is None else draw(st.sampled_from([0.0, -1024.0, 3.5]))
    centre = draw(st.integers(low, low + 2**bits - 1)) * (slope or 1.0) + intercept
    function = draw(st.sampled_from([None, "LINEAR", "LINEAR_EXACT", "SIGMOID"]))
    width = draw(st.integers(1, 2**bits)) * abs(slope or 1.0)
    return {
        "kind": f"{'i' if signed else 'u'}{allocated // 8}",
        "bits": bits,
        "high": draw(st.integers(bits - 1, allocated - 1)),
        "low": low,
        "photometric": draw(st.sampled_from(["MONOCHROME1", "MONOCHROME2"])),
        "rescale": None if slope is None else (slope, intercept),
        "window": draw(st.sampled_from([None, (function, float(f"{centre:.9g}"), float(f"{width:.9g}"))])),
        "padding": draw(st.none() | st.integers(low, low + 2**bits - 1)),
        "seed": draw(st.integers(0, 99)),
    }


def closed_form(values: np.ndarray, padded: np.ndarray, display: dict) -> np.ndarray:
    """The standard's formulas of C.11.1 and C.11.2.1.2 to C.11.2.1.3, case by case."""
    slope, intercept = display["rescale"] or (1.0, 0.0)
    x = values.astype(np.float64) * slope + intercept
    if display["window"] is None:
        unit = stretch(x, ~padded)
    else:
        function, c, w = display["window"]
        if function == "SIGMOID":
            unit = 1 / (1 + np.exp((-4 * (x - c) / w).clip(-700, 700)))
        elif function == "LINEAR_EXACT" or w < 1:
            unit = np.select([x <= c - w / 2, x > c + w / 2], [0, 1], (x - c) / w + 0.5)
        else:
            ends = [x <= c - 0.5 - (w - 1) / 2, x > c - 0.5 + (w - 1) / 2]
            unit = np.select(ends, [0, 1], (x - (c - 0.5)) / max(w - 1, 1e-300) + 0.5)
    return np.where(padded, 0, 1 - unit if display["photometric"] == "MONOCHROME1" else unit)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(display=displays())
def test_any_display_is_the_standards(tmp_path, display):
    rng = np.random.default_rng(display["seed"])
    bits, kind, low = display["bits"], np.dtype(display["kind"]), display["low"]
    values = rng.integers(low, low + 2**bits, (4, 6)).astype(kind)
    elements = {"HighBit": display["high"]}
    padded = np.zeros(values.shape, bool)
    if display["padding"] is not None:
        values[0, :3] = display["padding"]
        padded = values == display["padding"]
        padded &= not padded.all()
        elements["PixelPaddingValue"] = ("US", display["padding"] % 2**16)
    if display["rescale"]:
        elements |= dict(zip(("RescaleSlope", "RescaleIntercept"), display["rescale"], strict=True))
    if display["window"]:
        function, centre, width = display["window"]
        elements |= {"WindowCenter": centre, "WindowWidth": width} | ({"VOILUTFunction": function} if function else {})
    made = dataset(values, display["photometric"], bits, **elements)
    plain = values.view(f"u{kind.itemsize}") & (2**bits - 1)
    data = (plain << (display["high"] + 1 - bits)).astype(f"u{kind.itemsize}").tobytes()
    made.PixelData = data
    path = tmp_path / "a.dcm"
    made.save_as(path, enforce_file_format=True)
    assert np.abs(shown(path) - level(closed_form(values, padded, display))).max() <= 1
    assert dicom_size(path, 24) == ((6, 4), (6, 4))


# Faults


def test_what_cannot_be_shown_gets_one_line(tmp_path):
    """Told by the header alone, and by the whole file alike."""
    window = {"WindowCenter": 100, "WindowWidth": 50}
    short = item(LUTDescriptor=("US", [4096, 0, 12]), LUTData=("OW", bytes(20)))
    cases = {
        "slope-0": ({"RescaleSlope": 0, "RescaleIntercept": 0}, "has RescaleSlope 0, .*`dcmodify -ma RescaleSlope=1`"),
        "slope-empty": ({"RescaleSlope": None, "RescaleIntercept": 0}, "has an empty RescaleSlope: write its value"),
        "slope-text": ({"RescaleSlope": ("LO", "one"), "RescaleIntercept": 0}, "has RescaleSlope 'one', which is no"),
        "intercept": ({"RescaleSlope": 1, "RescaleIntercept": ("LO", "nan")}, "has RescaleIntercept 'nan', which"),
        "width-0": (window | {"WindowWidth": 0}, "has WindowWidth 0, which must be at least 1: correct it"),
        "width-below-0": (window | {"WindowWidth": -5, "VOILUTFunction": "SIGMOID"}, "has WindowWidth -5, .* above 0"),
        "width-below-1": (window | {"WindowWidth": 0.5}, "has WindowWidth 0.5, which must be at least 1"),
        "function": (window | {"VOILUTFunction": "GAMMA"}, "has VOILUTFunction GAMMA, not one of LINEAR, "),
        "high": ({"HighBit": 16}, "says BitsAllocated 16, .*, HighBit 16 .*, which cannot be"),
        "low": ({"HighBit": 10}, "says BitsAllocated 16, BitsStored 12, HighBit 10 .*which cannot be"),
        "stored": ({"BitsStored": 17, "HighBit": 16}, "says BitsAllocated 16, BitsStored 17,"),
        "allocated": ({"BitsAllocated": 12}, "says BitsAllocated 12,"),
        "sign": ({"PixelRepresentation": 2}, "says .*PixelRepresentation 2, which cannot be"),
        "spacing-0": ({"PixelSpacing": [0, 0.1]}, r"has PixelSpacing 0\\0.1, not two lengths above 0: correct"),
        "spacing-1": ({"PixelSpacing": [0.1]}, "has PixelSpacing 0.1, not two lengths above 0"),
        "samples": ({"SamplesPerPixel": 3}, "says MONOCHROME2 with 3 values"),
        "colours": ({"PhotometricInterpretation": "CMYK"}, "is of the colours CMYK, .*: save it as RGB"),
        "shape": ({"PresentationLUTShape": "LIN OD"}, "has PresentationLUTShape LIN OD, .*: delete it"),
        "both": ({"PhotometricInterpretation": "MONOCHROME1", "PresentationLUTShape": "IDENTITY"}, "says both that"),
        "mixed": ({"PixelPresentation": "MIXED"}, r"shows some of its greys in colour \(PixelPresentation\)"),
        "lut-short": ({"VOILUTSequence": [short]}, "has 10 of the 4096 entries of its VOILUTSequence: LUTData"),
        "lut-bits": ({"ModalityLUTSequence": [lut(np.arange(9), 0, 17)]}, "has no sound ModalityLUT.*LUTDescriptor"),
        "rows-2": ({"Rows": 4}, "has pixels for 2 frames of its size"),
        "rows-16": ({"Rows": 16}, r"is cut off \(512 of 1024 bytes"),
        "rows-0": ({"Rows": 0}, "has Rows 0"),
    }  # fmt: skip
    for name, (elements, why) in cases.items():
        path = dicom(tmp_path / f"{name}.dcm", **elements)
        for ask in (lambda path: dicom_size(path, 10**6), lambda path: read_dicom(path, 10**6)):
            with pytest.raises(UserError, match=f"^{re.escape(str(path))} {why}") as error:
                ask(path)
            assert "\n" not in str(error.value)


@pytest.mark.parametrize("keyword", ["Rows", "BitsAllocated", "BitsStored", "PixelRepresentation", "SamplesPerPixel"])
def test_what_is_missing_is_named(tmp_path, keyword):
    made = dataset()
    delattr(made, keyword)
    made.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    for ask in (dicom_size, read_dicom):
        with pytest.raises(UserError, match=f"has no {keyword}: it is cut off or no picture; copy it again"):
            ask(tmp_path / "a.dcm", 10**6)


def test_numbers_that_are_none_are_told_as_they_stand_there(tmp_path):
    made = dataset(NOISE, RescaleIntercept=0, RescaleSlope=("LO", "0,5"))
    made.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian  # whose reader knows it for a number
    made.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    with pytest.raises(UserError, match="a.dcm has RescaleSlope '0,5', which is no number: correct it, or delete it"):
        read_dicom(tmp_path / "a.dcm", 10**6)


@pytest.fixture(scope="module")
def whole() -> list[bytes]:
    """Files of all that a header may say."""
    rescale = item(RescaleSlope=2, RescaleIntercept=-1024, RescaleType="HU")
    groups = group(
        PixelValueTransformationSequence=rescale,
        FrameVOILUTSequence=item(WindowCenter=0, WindowWidth=2000),
        PixelMeasuresSequence=item(PixelSpacing=[0.5, 0.4]),
    )
    tables = {"VOILUTSequence": [lut(np.arange(100), 5, 12)], "ModalityLUTSequence": [lut(np.arange(50), 5, 8)]}
    top = {"WindowCenter": [1, 2], "WindowWidth": [10, 20], "VOILUTFunction": "LINEAR", "PixelPaddingValue": 3}
    files = []
    for made in (
        dataset(**top),
        dataset(**tables),
        dataset(SharedFunctionalGroupsSequence=groups),
        dataset(RGB, "RGB", 8),
    ):
        made.save_as(file := BytesIO(), enforce_file_format=True)
        files.append(file.getvalue())
    return files


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    index=st.integers(0, 3), places=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=3)
)
def test_damaged_headers_are_read_or_get_one_line(tmp_path, whole, index, places):
    data = bytearray(whole[index])
    for place, byte in places:
        data[128 + int(place * (min(len(data), 1100) - 129))] = byte
    path = tmp_path / "a.dcm"
    path.write_bytes(data)
    for ask in (dicom_size, read_dicom):
        try:
            ask(path, 10**6)
        except UserError as error:
            assert str(error).startswith(f"{path} ") and "\n" not in str(error)

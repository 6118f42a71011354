"""Every kind of picture file against pixels that were made without the reader, by path and out of an open file."""

import io
import re
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from datamodules.files.images import check_header, decode_rgb, read_rgb
from datamodules.files.raster import read_grey, show_range, upright_size
from medsynth.errors import UserError

LEVELS = np.arange(32, dtype="u1").reshape(4, 8) * 8
"""`a` of the tables of troubles: 4 rows, 8 columns."""


# Writing, without the reader


def laid(upright: np.ndarray, orientation: int) -> np.ndarray:
    """How a file of that orientation stores a picture: by the sides of its first row and column (TIFF 6, tag 274)."""
    across = upright if orientation <= 4 else upright.swapaxes(0, 1)
    backwards = {2: (1, -1), 3: (-1, -1), 4: (-1, 1), 6: (-1, 1), 7: (-1, -1), 8: (1, -1)}
    rows, columns = backwards.get(orientation, (1, 1))
    return np.ascontiguousarray(across[::rows, ::columns])


def exif(orientation: int) -> bytes:
    found = Image.Exif()
    found[0x0112] = orientation
    return found.tobytes()


def packed_tiff(values: np.ndarray, bits: int, order="<", photometric=1, orientation=1, deflate=False, **tags) -> bytes:
    """A grey TIFF of any bits a value, written bit by bit after the standard."""
    digits = (values.astype(int)[..., None] >> np.arange(bits - 1, -1, -1)) & 1
    if bits == 16 and order == "<":
        rows = [row.astype("<u2").tobytes() for row in values]
    else:
        rows = [np.packbits(row.ravel()).tobytes() for row in digits]
    pixels = zlib.compress(b"".join(rows)) if deflate else b"".join(rows)
    height, width = values.shape
    entries = {256: width, 257: height, 258: bits, 259: 8 if deflate else 1, 262: photometric, 273: 8, 274: orientation}
    entries |= {277: 1, 278: height, 279: len(pixels)} | {int(tag[1:]): value for tag, value in tags.items()}
    head = {"<": b"II", ">": b"MM"}[order] + struct.pack(order + "HI", 42, 8 + len(pixels))
    directory = struct.pack(order + "H", len(entries))
    for tag, value in sorted(entries.items()):
        if tag in (273, 279):
            directory += struct.pack(order + "HHII", tag, 4, 1, value)
        else:
            directory += struct.pack(order + "HHIHH", tag, 3, 1, value, 0)
    return head + pixels + directory + bytes(4)


def with_chunk(png: bytes, kind: bytes, data: bytes, late: bool) -> bytes:
    """A PNG with one more chunk before or behind its pixels."""
    place = png.rindex(b"IEND") - 4 if late else 33
    chunk = struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return png[:place] + chunk + png[place:]


def saved(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@dataclass
class Drawn:
    """A file, its suffix, what it shows (uint8 (H, W, 3)) and to how many levels, and its greys with their white."""

    data: bytes
    suffix: str
    shown: np.ndarray
    within: int = 0
    grey: np.ndarray | None = None
    white: int = 255


def png(values: np.ndarray, bits: int, *chunks: tuple[bytes, bytes, bool]) -> bytes:
    """A PNG of samples (H, W, channels), written after the standard; chunks: (kind, data, if behind the pixels)."""
    height, width, channels = values.shape
    colour = 3 if any(kind == b"PLTE" for kind, _, _ in chunks) else {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    digits = (values.astype(int)[..., None] >> np.arange(bits - 1, -1, -1)) & 1
    rows = b"".join(b"\0" + np.packbits(row.ravel()).tobytes() for row in digits)
    whole = b"\x89PNG\r\n\x1a\n"
    head = (b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    before, behind = ([chunk[:2] for chunk in chunks if chunk[2] == late] for late in (False, True))
    for kind, data in (head, *before, (b"IDAT", zlib.compress(rows)), *behind, (b"IEND", b"")):
        whole += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return whole


# What is drawn


def shades(upright: np.ndarray, white: int) -> np.ndarray:
    """Greys (H, W) or colours (H, W, 3) from 0 to `white` as 8-bit RGB."""
    shown = np.rint(upright * (255 / white)).astype(np.uint8)
    return shown if shown.ndim == 3 else shown[..., None].repeat(3, axis=2)


def pixels(draw, channels: int, white: int) -> np.ndarray:
    """Samples (H, W, channels) of all values up to `white`, which is among them."""
    height, width = draw(st.integers(1, 9)), draw(st.integers(2, 9))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    found = rng.integers(0, white + 1, (height, width, channels))
    found[0, -1] = white
    return found


def seen(upright: np.ndarray, white: int) -> np.ndarray:
    """Samples (H, W, 1 to 4) as 8-bit RGB; the last of two or four is how opaque they are, over black."""
    if upright.shape[2] in (2, 4):
        upright = upright[..., :-1] * (upright[..., -1:] / white)
    return shades(upright if upright.shape[2] == 3 else upright[..., 0], white)


@st.composite
def pngs(draw) -> Drawn:
    shallow, deep = ((1, bits) for bits in (1, 2, 4)), ((n, bits) for n in range(1, 5) for bits in (8, 16))
    channels, bits = draw(st.sampled_from([*shallow, *deep]))
    orientation, late = draw(st.integers(1, 8)), draw(st.booleans())
    white = 2**bits - 1
    upright = pixels(draw, channels, white)
    data = png(laid(upright, orientation), bits, (b"eXIf", exif(orientation)[6:], late))
    shown = seen(upright, white)
    if channels != 1:
        return Drawn(data, ".png", shown, within=channels in (2, 4))
    grey = upright[..., 0]
    kept = grey.astype(bool) if bits == 1 else grey if bits > 8 else grey * (255 // white)
    return Drawn(data, ".png", shown, grey=kept, white={1: 1, 16: 65535}.get(bits, 255))


@st.composite
def palettes(draw) -> Drawn:
    """PNG of 8 or 4 bits with a palette: of greys, whose greys count, or of colours, whose indices do."""
    bits, orientation, grey = draw(st.sampled_from([4, 8])), draw(st.integers(1, 8)), draw(st.booleans())
    upright = pixels(draw, 1, 2**bits - 1)
    rng = np.random.default_rng(draw(st.integers(0, 9)))
    table = rng.permutation(256)[: 2**bits, None].repeat(3, axis=1) if grey else rng.integers(0, 256, (2**bits, 3))
    plte, turn = (b"PLTE", table.astype(np.uint8).tobytes(), False), (b"eXIf", exif(orientation)[6:], False)
    shown = table[upright[..., 0]].astype(np.uint8)
    counted = shown if grey else upright
    return Drawn(png(laid(upright, orientation), bits, plte, turn), ".png", shown, grey=counted[..., 0])


@st.composite
def grey_tiffs(draw) -> Drawn:
    """Any number of bits, byte order, end of the scale and orientation."""
    bits = draw(st.sampled_from([1, 2, 4, 8, 10, 12, 14, 16]))
    orientation, photometric = draw(st.integers(1, 8)), draw(st.integers(0, 1))
    white = 2**bits - 1
    upright = pixels(draw, 1, white)[..., 0]
    stored = laid(upright if photometric else white - upright, orientation)
    data = packed_tiff(stored, bits, draw(st.sampled_from("<>")), photometric, orientation, draw(st.booleans()))
    kept = upright.astype(bool) if bits == 1 else upright if bits > 8 else upright * (255 // white)
    return Drawn(data, ".tif", shades(upright, white), grey=kept, white=1 if bits == 1 else max(white, 255))


@st.composite
def tifffiles(draw) -> Drawn:
    """What tifffile writes: grey, RGB and RGBA of 8 and 16 bits, in strips or tiles, raw or deflated."""
    channels, deep, orientation = draw(st.sampled_from([1, 3, 4])), draw(st.booleans()), draw(st.integers(1, 8))
    white, dtype = (65535, np.uint16) if deep else (255, np.uint8)
    upright = pixels(draw, channels, white).repeat(draw(st.integers(1, 5)), axis=0).repeat(3, axis=1)
    stored, file = laid(upright, orientation).astype(dtype), io.BytesIO()
    kind = draw(st.sampled_from(["minisblack", "miniswhite"])) if channels == 1 else "rgb"
    tifffile.imwrite(
        file,
        (white - stored if kind == "miniswhite" else stored).squeeze(2) if channels == 1 else stored,
        byteorder=draw(st.sampled_from("<>")),
        photometric=kind,
        tile=draw(st.sampled_from([None, (16, 16)])),
        rowsperstrip=draw(st.sampled_from([1, 3, 64])),
        compression=draw(st.sampled_from([None, "zlib"])),
        extratags=[(274, 3, 1, orientation, True)],
        extrasamples=["unassalpha"] if channels == 4 else None,
        metadata=None,
    )
    shown = seen(upright, white)
    grey = upright[..., 0] if channels == 1 else None
    return Drawn(file.getvalue(), ".tif", shown, within=channels == 4, grey=grey, white=white)


@st.composite
def others(draw) -> Drawn:
    """What Pillow writes truly: TIFF by LZW, packbits and raw, BMP, WebP without loss, JPEG of flat colours."""
    kind = draw(st.sampled_from(["tiff_lzw", "packbits", "raw", "BMP", "WEBP", "JPEG"]))
    mode, orientation = draw(st.sampled_from(["L", "RGB", "I;16"])), draw(st.integers(1, 8))
    deep = mode == "I;16"
    assume(not deep or kind in ("tiff_lzw", "packbits", "raw"))
    upright = pixels(draw, 3 if mode == "RGB" else 1, 65535 if deep else 255)
    if kind == "JPEG":
        upright = np.full_like(upright, upright[0, 0])
    upright = upright if mode == "RGB" else upright[..., 0]
    stored = Image.fromarray(laid(upright, 1 if kind == "BMP" else orientation).astype(np.uint16 if deep else np.uint8))
    grey = upright if mode != "RGB" and kind != "WEBP" else None
    shown, white = shades(upright, 65535 if deep else 255), 65535 if deep else 255
    if kind == "JPEG":
        return Drawn(saved(stored, kind, quality=100, exif=exif(orientation)), ".jpg", shown, within=3)
    if kind in ("BMP", "WEBP"):
        options = {"lossless": True, "exif": exif(orientation)} if kind == "WEBP" else {}
        return Drawn(saved(stored, kind, **options), f".{kind.lower()}", shown, grey=grey)
    data = saved(stored, "TIFF", compression=kind, tiffinfo={274: orientation})
    return Drawn(data, ".tif", shown, grey=grey, white=white)


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(drawn=st.one_of(pngs(), palettes(), grey_tiffs(), tifffiles(), others()))
def test_every_file_shows_what_was_drawn(tmp_path_factory, drawn):
    path = tmp_path_factory.getbasetemp() / f"drawn{drawn.suffix}"
    path.write_bytes(drawn.data)
    found = read_rgb(path, 10**4)
    assert found.numpy().tobytes() == decode_rgb(io.BytesIO(drawn.data), "x", 10**4).numpy().tobytes()
    found = found.permute(1, 2, 0).numpy().astype(int)
    assert found.shape == drawn.shown.shape
    assert np.abs(found - drawn.shown).max() <= drawn.within
    assert upright_size(path, 10**4) == drawn.shown.shape[1::-1]
    check_header(io.BytesIO(drawn.data), "x", 10**4)
    if drawn.grey is not None:
        values, white = read_grey(path, 10**4)
        assert white == drawn.white and values.dtype.isnative and (values.dtype == bool) == (white == 1)
        assert np.array_equal(values, drawn.grey)


# Rows of the tables of troubles, with the values that are right


@pytest.mark.parametrize("stored", [LEVELS, LEVELS.astype("u2") * 257, np.dstack([LEVELS] * 3 + [LEVELS | 255])])
def test_an_uncompressed_tiff_on_its_side_by_path(tmp_path, stored):
    Image.fromarray(stored).save(tmp_path / "r.tif", tiffinfo={274: 6})
    found = read_rgb(tmp_path / "r.tif", 1000)
    assert found.shape == (3, 8, 4) and found[0, 0].tolist() == [192, 128, 64, 0]
    assert upright_size(tmp_path / "r.tif", 1000) == (4, 8)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_16_bits_are_turned_as_8_are(tmp_path, orientation):
    for name, values in (("8.png", LEVELS), ("16.png", LEVELS.astype("u2") * 257)):
        Image.fromarray(values).save(tmp_path / name, exif=exif(orientation))
    assert (read_rgb(tmp_path / "8.png", 1000) == read_rgb(tmp_path / "16.png", 1000)).all()
    (narrow, _), (wide, _) = (read_grey(tmp_path / name, 1000) for name in ("8.png", "16.png"))
    assert np.array_equal(wide, narrow.astype("u2") * 257)
    assert upright_size(tmp_path / "16.png", 1000) == upright_size(tmp_path / "8.png", 1000) == narrow.shape[::-1]


@pytest.mark.parametrize("values", [LEVELS, LEVELS.astype("u2") * 257])
def test_xmp_says_what_is_up_where_exif_does_not(tmp_path, values):
    packet = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    tifffile.imwrite(tmp_path / "a.tif", values, extratags=[(700, 1, len(packet), packet, True)], metadata=None)
    text = b"XML:com.adobe.xmp\0\0\0\0\0" + packet
    for late in (False, True):
        (tmp_path / f"{late}.png").write_bytes(png(values[..., None], 8 * values.itemsize, (b"iTXt", text, late)))
    for name in ("a.tif", "False.png", "True.png"):
        assert read_rgb(tmp_path / name, 1000)[0, 0].tolist() == [192, 128, 64, 0], name
        assert upright_size(tmp_path / name, 1000) == (4, 8), name


def test_the_end_of_the_scale_and_the_bits_say_what_is_white(tmp_path):
    (tmp_path / "a.tif").write_bytes(packed_tiff(np.array([[0, 65535, 30000]]), 16, photometric=0))
    assert read_rgb(tmp_path / "a.tif", 1000)[0].tolist() == [[255, 0, 255 - 117]]
    (tmp_path / "b.tif").write_bytes(packed_tiff(np.array([[0, 4095, 2048]]), 12))
    assert read_rgb(tmp_path / "b.tif", 1000)[0].tolist() == [[0, 255, 128]]
    (tmp_path / "c.tif").write_bytes(packed_tiff(np.array([[0, 1023, 512]]), 10, ">"))
    assert read_rgb(tmp_path / "c.tif", 1000)[0].tolist() == [[0, 255, 128]]


@pytest.mark.parametrize("channels", [1, 3])
def test_12_bits_in_16_are_not_shown_almost_black(tmp_path, channels):
    values = np.array([[0, 4095, 2000]], np.uint16)[..., None].repeat(channels, axis=2)
    (tmp_path / "a.png").write_bytes(png(values, 16))
    with pytest.raises(UserError, match=r"a\.png has 16 bits but no value above 4095 of 65535.*data\.sixteen_bit"):
        read_rgb(tmp_path / "a.png", 1000)
    assert read_rgb(tmp_path / "a.png", 1000, show=show_range)[0].tolist() == [[0, 16, 8]]
    (tmp_path / "black.png").write_bytes(png(0 * values, 16))
    assert read_rgb(tmp_path / "black.png", 1000).max() == 0
    values[0, 0] = 4096
    (tmp_path / "dark.png").write_bytes(png(values, 16))
    assert read_rgb(tmp_path / "dark.png", 1000).max() == 16


def test_16_bit_colours_of_jpeg_2000(tmp_path):
    values = (np.arange(5760).reshape(40, 48, 3) * 11).astype(np.uint16)
    for name, stored in (("a.jp2", values), ("dark.jp2", values // 16)):
        cv2.imwrite(str(tmp_path / name), stored[..., ::-1], [cv2.IMWRITE_JPEG2000_COMPRESSION_X1000, 1000])
    shown = read_rgb(tmp_path / "a.jp2", 10**4).permute(1, 2, 0).numpy()
    assert np.array_equal(shown, shades(values, 65535))
    with pytest.raises(UserError, match=r"dark\.jp2 has 16 bits but no value above 3959 of 65535"):
        read_rgb(tmp_path / "dark.jp2", 10**4)
    Image.fromarray(values[..., 0]).save(tmp_path / "grey.jp2", irreversible=False)
    assert np.array_equal(read_rgb(tmp_path / "grey.jp2", 10**4)[0], shades(values[..., 0], 65535)[..., 0])


def several(folder: Path) -> dict[str, str]:
    """Files of more than one picture, with what is said of each."""
    first, second = Image.fromarray(LEVELS), Image.fromarray(255 - LEVELS)
    for name in ("a.tif", "b.png", "c.webp", "d.gif"):
        first.save(folder / name, save_all=True, append_images=[second, first])
    tifffile.imwrite(folder / "e.tif", np.stack([LEVELS.astype("u2")] * 4), photometric="minisblack", metadata=None)
    (folder / "f.tif").write_bytes(saved(first, "TIFF", tiffinfo={270: "ImageJ=1.53t\nimages=9\nslices=9\n"}))
    frames = dict.fromkeys(("b.png", "c.webp", "d.gif"), "3 frames")
    return {"a.tif": "3 pages", **frames, "e.tif": "4 pages", "f.tif": "9 pages"}


def test_several_pictures_in_a_file_are_refused(tmp_path):
    for name, count in several(tmp_path).items():
        data = (tmp_path / name).read_bytes()
        for read in (
            lambda path=tmp_path / name: read_rgb(path, 1000),
            lambda path=tmp_path / name: read_grey(path, 1000),
            lambda path=tmp_path / name: upright_size(path, 1000),
            lambda path=tmp_path / name, data=data: check_header(io.BytesIO(data), str(path), 1000),
        ):
            with pytest.raises(UserError) as error:
                read()
            said = f"{tmp_path / name} has {count}: save the one that is meant as a file of its own"
            assert str(error.value) == said


def test_a_smaller_copy_is_no_second_picture(tmp_path):
    with tifffile.TiffWriter(tmp_path / "pyramid.tif") as file:
        file.write(LEVELS, metadata=None)
        file.write(LEVELS[::2, ::2], subfiletype=1, metadata=None)
    assert read_rgb(tmp_path / "pyramid.tif", 1000)[0].tolist() == LEVELS.tolist()
    with tifffile.TiffWriter(tmp_path / "preview.tif") as file:
        file.write(LEVELS[::2, ::2], subfiletype=1, metadata=None)
        file.write(LEVELS, metadata=None)
    with pytest.raises(UserError, match="2 pages"):
        read_rgb(tmp_path / "preview.tif", 1000)
    Image.fromarray(LEVELS).save(tmp_path / "camera.jpg", "MPO", save_all=True, append_images=[Image.new("L", (2, 2))])
    assert read_rgb(tmp_path / "camera.jpg", 1000).shape == (3, 4, 8)


def with_palette(indices: np.ndarray, colours: list[int], **options) -> bytes:
    image = Image.fromarray(indices.astype(np.uint8)).convert("P")
    image.putpalette(colours)
    image.putdata(indices.ravel().tolist())
    return saved(image, "PNG", **options)


def test_palettes_of_masks(tmp_path):
    path, index = tmp_path / "m.png", np.array([[0, 1, 1]])
    path.write_bytes(with_palette(index, [255] * 3 + [0] * 3))
    assert read_grey(path, 1000)[0].tolist() == [[255, 0, 0]]
    many = np.arange(64)[None]
    path.write_bytes(with_palette(many, [level for i in range(64) for level in [252 - 4 * i] * 3]))
    assert read_grey(path, 1000)[0].tolist() == [(252 - 4 * many[0]).tolist()]
    path.write_bytes(with_palette(index, [0, 0, 0, 128, 0, 0], transparency=0))
    assert read_grey(path, 1000)[0].tolist() == index.tolist()
    path.write_bytes(with_palette(index, [0] * 6))
    with pytest.raises(UserError, match=r"m\.png has a palette that shows several of its values in one grey"):
        read_grey(path, 1000)
    path.write_bytes(with_palette(index, [255] * 3 + [0] * 3, transparency=0))
    with pytest.raises(UserError, match=r"m\.png has greys that transparency hides"):
        read_grey(path, 1000)


@pytest.mark.parametrize("bits", [8, 16])
def test_transparency_of_masks(tmp_path, bits):
    white = 2**bits - 1
    opaque = np.array([[[0, white], [white, white]]])
    (tmp_path / "opaque.png").write_bytes(png(opaque, bits))
    assert read_grey(tmp_path / "opaque.png", 1000)[0].tolist() == [[0, white]]
    (tmp_path / "hidden.png").write_bytes(png(opaque[..., ::-1], bits))
    with pytest.raises(UserError, match=r"hidden\.png has greys that transparency hides: save it without an alpha"):
        read_grey(tmp_path / "hidden.png", 1000)


def unknown(folder: Path) -> dict[str, str]:
    """Files whose numbers have no meaning that is known, with what is said of each."""
    wide = np.arange(48, dtype=np.uint16).reshape(4, 4, 3)
    tifffile.imwrite(folder / "float.tif", np.ones((4, 4), np.float32))
    tifffile.imwrite(folder / "int32.tif", np.ones((4, 4), np.int32))
    tifffile.imwrite(folder / "half.tif", np.ones((4, 4), np.float16))
    tifffile.imwrite(folder / "signed.tif", np.ones((4, 4), np.int16))
    tifffile.imwrite(folder / "small.tif", np.ones((4, 4), np.int8))
    tifffile.imwrite(folder / "planes.tif", wide.transpose(2, 0, 1), photometric="rgb", planarconfig="separate")
    tifffile.imwrite(folder / "ink.tif", np.dstack([wide, wide[..., :1]]), photometric="separated")
    Image.new("LAB", (4, 4)).save(folder / "lab.tif")
    (folder / "eleven.tif").write_bytes(packed_tiff(np.ones((4, 4)), 11))
    (folder / "three.tif").write_bytes(packed_tiff(np.ones((4, 4)), 3))
    narrow = np.arange(256, dtype=np.uint16)[None].repeat(3, axis=0)
    tifffile.imwrite(folder / "palette.tif", np.ones((4, 4), np.uint8), photometric="palette", colormap=narrow)
    whole = packed_tiff(np.arange(4096).reshape(64, 64), 16)
    (folder / "end.tif").write_bytes(whole[:2000])
    (folder / "head.tif").write_bytes(whole[:4])
    return {
        "float.tif": "32-bit pixels have no known white: save it with 8 or 16 bits",
        "int32.tif": "32-bit pixels have no known white: save it with 8 or 16 bits",
        "half.tif": "fractions have no known white: save it with 8 or 16 bits",
        "signed.tif": "values with a sign have no known black: save it with 8 or 16 bits, unsigned",
        "small.tif": "values with a sign have no known black: save it with 8 or 16 bits, unsigned",
        "planes.tif": "TIFF of 3 x 16 bits, RGB in planes, compression 1 is not read: save it as grey or RGB",
        "ink.tif": "TIFF of 4 x 16 bits, CMYK, compression 1 is not read: save it as grey or RGB",
        "lab.tif": r"its colours are L\*a\*b\*: save it as RGB",
        "eleven.tif": "TIFF of 1 x 11 bits, grey, compression 1 is not read",
        "three.tif": "TIFF of 1 x 3 bits, grey, compression 1 is not read",
        "palette.tif": "its palette has 8 bits where the format wants 16",
        "head.tif": "its tags cannot be read: copy it again, or save it as an ordinary TIFF",
        "end.tif": "its first page has no tags or lies beyond the end of the file: copy it again",
    }


@pytest.mark.filterwarnings("ignore")
def test_what_has_no_known_meaning_is_refused_in_a_line(tmp_path):
    for name, why in unknown(tmp_path).items():
        with pytest.raises(UserError, match=f"^{re.escape(str(tmp_path / name))} cannot be decoded \\({why}") as error:
            read_rgb(tmp_path / name, 10**6)
        assert "\n" not in str(error.value)


def test_a_deep_tiff_cut_short_is_refused(tmp_path, capfd):
    """And with no other line than the one: the decoder's own words go nowhere."""
    file = io.BytesIO()
    tifffile.imwrite(file, np.random.default_rng(0).integers(0, 65536, (64, 64)).astype(np.uint16), imagej=True)
    whole = file.getvalue()
    for kept in (len(whole) - 1, len(whole) - 3000, 600):
        (tmp_path / "cut.tif").write_bytes(whole[:kept])
        with pytest.raises(UserError, match=r"cut\.tif cannot be decoded \("):
            read_rgb(tmp_path / "cut.tif", 10**6)
    (tmp_path / "whole.tif").write_bytes(whole)
    assert read_rgb(tmp_path / "whole.tif", 10**6).shape == (3, 64, 64)
    assert capfd.readouterr() == ("", "")

"""Files from strangers: none runs code, leaves its folder, or unfolds to more than a machine has."""

import ast
import io
import json
import os
import pickle
import resource
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydicom.encaps import encapsulate
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLSLossless,
    RLELossless,
)
from safetensors.torch import save_file

from callbacks.durable import DurableCheckpointIO, newest_verified
from callbacks.manifest import listed, write_manifest
from datamodules.files import dicom_header
from datamodules.files.depth import depth_estimator
from datamodules.files.layouts import read_catalogue
from datamodules.files.pictures import picture_size, read_picture
from datamodules.files.raster import MOST_PIXELS
from datamodules.files.shards import Shards
from jobs.run.sources import read_file, read_setting
from lightning_modules.parts.text import TextEncoder, TextEncoderConfig
from medsynth.errors import UserError
from medsynth.pickled import read_pickled
from metrics.extractors import InceptionExtractor
from tests.conftest import REPOSITORY
from tests.dicom_files import dataset, dicom
from tests.processes import FORK
from tests.test_architecture import SOURCES

PARSERS = {"medsynth/files.py", "datamodules/files/tables.py", "datamodules/files/entries.py"}
"""They answer JSON that is nested too deeply as any other that is none."""
YAML = {"yaml.load", "yaml.compose", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load"}
ROOM = 256 << 20  # bytes that a reader may take beyond what the process has


def refused(read: Callable[[], Any]) -> str:
    """The one line of a UserError, by a process that can take no more than `ROOM`."""
    receiver, sender = FORK.Pipe(duplex=False)

    def child() -> None:
        has = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (has + ROOM, resource.RLIM_INFINITY))
        try:
            sender.send(f"nothing, but gave {read()!r:.200}")
        except UserError as error:
            sender.send(str(error))
        except BaseException as error:
            sender.send(f"a traceback: {error!r:.500}")
        os._exit(0)

    process = FORK.Process(target=child)
    process.start()
    assert receiver.poll(60), "it takes for ever"
    said = receiver.recv()
    process.join()
    assert not said.startswith(("nothing", "a traceback")), said
    assert "\n" not in said and "memory" not in said.lower(), said
    return said


# Code


def test_nothing_is_read_in_a_way_that_could_run_it():
    for path in SOURCES:
        nodes = list(ast.walk(ast.parse((REPOSITORY / path).read_text())))
        imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        assert not imported & {"pickle", "dill", "joblib", "marshal", "shelve", "cloudpickle"}, path
        for call in (ast.unparse(node) for node in nodes if isinstance(node, ast.Call)):
            assert is_harmless(call, str(path)), f"{path}: {call}"


def is_harmless(call: str, path: str) -> bool:
    name = call.partition("(")[0]
    if name == "torch.load":
        return path == "medsynth/pickled.py" and "weights_only=True" in call
    if name.startswith("Auto") and name.endswith("from_pretrained"):  # else it asks at the keyboard
        return "trust_remote_code=False" in call
    if name in ("json.loads", "json.load"):  # of text that is not this project's own
        return path in PARSERS or "facts" in call or "json.dumps" in call or "shapes[" in call
    if name in ("eval", "exec", "os.system", "np.load") or (name in YAML and "SafeLoader" not in call):
        return False
    return not any(word in call for word in ("allow_pickle=True", "trust_remote_code=True", "shell=True"))


class Code:
    """Once unpickled, there is a file `ran`."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return (Path.touch, (self.folder / "ran",))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    TextEncoder(TextEncoderConfig("random", width=32, layers=1, heads=2)).save_pretrained(folder)
    return folder


def copied(folder: Path, to: Path) -> Path:
    for file in folder.rglob("*"):
        if file.is_file():
            (to / file.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
            (to / file.relative_to(folder)).write_bytes(file.read_bytes())
    return to


def load_encoder(folder: Path) -> TextEncoder:
    return TextEncoder(TextEncoderConfig(str(folder), width=32, layers=1, heads=2))


def checkpoint(folder: Path, state: Any) -> Path:
    """One whose manifest is in order, whatever it holds."""
    path = folder / "last.ckpt"
    path.mkdir()
    torch.save(state, path / "state.pt")
    save_file({"w": torch.zeros(2)}, path / "weights.safetensors")
    write_manifest(path, {"global_step": 1, "epoch": 0, "finite": True}, listed(sorted(path.iterdir())))
    return path


@pytest.mark.parametrize("form", ["old", "zip"])
def test_a_pickle_that_holds_code_is_refused_and_never_run(form, tmp_path, encoder):
    code = Code(tmp_path)
    save = torch.save if form == "zip" else lambda value, file: file.write_bytes(pickle.dumps(value))
    folder = copied(encoder, tmp_path / "encoder")
    (folder / "text_encoder/model.safetensors").unlink()
    for file in (folder / "text_encoder/pytorch_model.bin", tmp_path / "weights.pth"):
        save({"a": code}, file)
    path = checkpoint(tmp_path, {"a": code})
    file = str(tmp_path / "weights.pth")
    told = [
        refused(lambda: load_encoder(folder)),
        refused(lambda: DurableCheckpointIO().load_checkpoint(path)),
    ]
    assert all("which could run code when it is read" in line for line in told)
    assert not any("weights_only" in line for line in told), "no advice to run it after all"
    assert "not the weights of Inception" in refused(lambda: InceptionExtractor(file))
    assert not (tmp_path / "ran").exists()


def describe(file: Path, **facts: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | facts))


def test_code_that_a_config_names_is_neither_run_nor_asked_about(tmp_path, encoder, capsys):
    """A folder's own module, and a compiled kernel from the hub."""
    evil = f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\nclass C: pass\n"
    folder = copied(encoder, tmp_path / "own")
    describe(
        folder / "tokenizer/tokenizer_config.json", tokenizer_class="C", auto_map={"AutoTokenizer": ["e.C", "e.C"]}
    )
    (folder / "tokenizer/e.py").write_text(evil)
    assert "holds no tokenizer" in refused(lambda: load_encoder(folder))

    model = tmp_path / "depth"
    model.mkdir()
    mapped = {"AutoConfig": "e.C", "AutoModelForDepthEstimation": "e.C", "AutoImageProcessor": "e.C"}
    (model / "config.json").write_text(json.dumps({"model_type": "new", "auto_map": mapped}))
    (model / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "C", "auto_map": mapped}))
    (model / "e.py").write_text(evil)
    assert "holds no depth-estimation model" in refused(lambda: depth_estimator(model))

    kernel = copied(encoder, tmp_path / "kernel")
    describe(kernel / "text_encoder/config.json", _attn_implementation="someone/kernel")
    assert "asks for the program someone/kernel" in refused(lambda: load_encoder(kernel))
    assert "[y/N]" not in capsys.readouterr().out and not (tmp_path / "ran").exists()


def test_a_config_does_not_choose_the_type_of_numbers(tmp_path, encoder):
    folder = copied(encoder, tmp_path / "half")
    describe(folder / "text_encoder/config.json", torch_dtype="float16", dtype="float16")
    assert load_encoder(folder).model.dtype == torch.float32


def test_yaml_makes_no_objects(tmp_path):
    (tmp_path / "a.yaml").write_text(f'a: !!python/object/apply:pathlib.Path.touch ["{tmp_path}/ran"]\n')
    assert "a config takes no tag:yaml.org,2002:python" in refused(lambda: read_file(tmp_path / "a.yaml"))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "manifest",
    ["[" * 100_000, {}, {"files": []}, {"files": {}}, {"files": {"../../state.pt": {}}}, {"files": {"a": 1}}],
)
def test_a_manifest_of_no_checkpoint_is_passed_over(tmp_path, manifest):
    path = tmp_path / "last.ckpt"
    path.mkdir()
    if isinstance(manifest, str):
        (path / "manifest.json").write_text(manifest)
    else:
        write_manifest(path, {"global_step": 1} if manifest else {}, manifest.get("files", {}))
    found, ((_, reason),) = newest_verified(tmp_path)
    assert found is None and reason.startswith("manifest.json is ")


def test_a_pipe_in_a_checkpoint_is_not_waited_for(tmp_path):
    path = tmp_path / "last.ckpt"
    path.mkdir()
    os.mkfifo(path / "state.pt")
    write_manifest(path, {"global_step": 1}, {"state.pt": {"bytes": 0, "sha256": ""}})
    assert "state.pt is no file" in refused(lambda: DurableCheckpointIO().load_checkpoint(path))


# Folders


def png(size: tuple[int, int] = (16, 16)) -> bytes:
    content = io.BytesIO()
    Image.new("L", size).save(content, "PNG")
    return content.getvalue()


def shard(folder: Path, *members: tuple[str, bytes, dict[str, Any]]) -> bytes:
    """`a.tar` of a good sample and these members: name, content, further facts of the header."""
    folder.mkdir(exist_ok=True)
    good = [("good.png", png(), {}), ("good.txt", b"good", {})]
    with tarfile.TarFile(folder / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for name, content, facts in (*good, *members):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            for key, value in facts.items():
                setattr(member, key, value)
            tar.addfile(member, io.BytesIO(content) if member.isreg() else None)
    return (folder / "a.tar").read_bytes()


def faults(folder: Path) -> dict[str, str]:
    (table,) = read_catalogue(folder, "webdataset").splits.values()
    assert list(table.rows) == ["a.tar/good.png"], "the good sample is read nonetheless"
    return table.faults


LINKS = [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE]


@pytest.mark.parametrize("name", ["../x.png", "/etc/x.png", "a/../../x.png", "a\n\x1b[31m.png", *LINKS])
def test_no_member_of_a_shard_leaves_its_folder_or_is_anything_but_a_file(name, tmp_path):
    kind = {"type": name, "linkname": "/etc/passwd"} if name in LINKS else {}
    shard(tmp_path, ("link.png" if kind else name, b"" if kind else png(), kind))
    found = faults(tmp_path)
    assert "link or special file" in found["a.tar/link.png"] if kind else len(found) == 1
    assert all(place.isprintable() for place in found)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar"]


def test_a_member_that_is_there_twice_or_has_a_very_long_name(tmp_path):
    shard(tmp_path, ("good.png", png(), {}), ("n" * 5000 + ".cls", b"1", {}))
    assert faults(tmp_path) == {"a.tar/good.png": "two samples have the key good"}


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    return member.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_header_that_claims_a_terabyte_costs_nothing(kind, tmp_path):
    good = shard(tmp_path)[:2048]  # without its end
    (tmp_path / "a.tar").write_bytes(good + header("x.png", 1 << 40, kind) + bytes(2048))
    assert "is cut off, damaged or compressed after 1 samples" in faults(tmp_path)["a.tar"]
    (tmp_path / "a.tar").write_bytes(good + (header("x", 9, kind) + b"9 a=b\n".ljust(512, b"\0")) * 3000 + bytes(1024))
    found, unread = dict[str, str](), list[str]()
    Shards(tmp_path).index("a.tar", found, unread)
    assert kind == tarfile.REGTYPE or "is cut off, damaged or compressed after 1 samples" in found["a.tar"]


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "a/../../x.png"])
def test_no_table_names_a_file_outside_of_its_folder(name, tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "metadata.csv").write_text(f"file_name,text\na.png,good\n{name},bad\n")
    (table,) = read_catalogue(tmp_path, "metadata").splits.values()
    assert [entry.name for entry in table.rows.values()] == ["a.png"]
    assert "leads out of the folder" in table.faults[3]


def test_a_label_as_a_folder_s_name_stays_within(tmp_path):
    from datamodules.files.layout_writers import convert

    (tmp_path / "set").mkdir()
    (tmp_path / "set/a.png").write_bytes(png())
    (tmp_path / "set/metadata.csv").write_text("file_name,text,label\na.png,good,../../evil/../x\n")
    for layout in ("folders", "webdataset"):
        convert(tmp_path / "set", tmp_path / layout, layout)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folders", "set", "webdataset"]


# Bombs


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_of(width: int, height: int, *, before: bytes = b"", after: bytes = b"") -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    rows = chunk(b"IDAT", zlib.compress(bytes(64 * 65)))
    return b"\x89PNG\r\n\x1a\n" + head + before + rows + after + chunk(b"IEND", b"")


def encoded(form: str, **options: Any) -> bytes:
    content = io.BytesIO()
    Image.new("L", (64, 64)).save(content, form, **options)
    return content.getvalue()


def patched(content: bytes, *places: tuple[bytes, int, bytes]) -> bytes:
    """With other bytes so many behind a mark."""
    changed = bytearray(content)
    for mark, behind, value in places:
        start = content.index(mark) + behind
        changed[start : start + len(value)] = value
    return bytes(changed)


SIDE = 60_000
FOLDED = zlib.compress(bytes(1 << 28), 9)  # a quarter of a GiB in 256 KiB
LONG_SIDE = struct.pack("<I", SIDE)
TWO_SIDES = struct.pack(">II", SIDE, SIDE)
PICTURES = {
    "big.png": lambda: png_of(SIDE, SIDE),
    "text.png": lambda: png_of(64, 64, before=chunk(b"zTXt", b"a\0\0" + FOLDED)),
    "later.png": lambda: png_of(64, 64, after=chunk(b"zTXt", b"a\0\0" + FOLDED)),
    "utf8.png": lambda: png_of(64, 64, before=chunk(b"iTXt", b"a\0\1\0\0\0" + FOLDED)),
    "profile.png": lambda: png_of(64, 64, before=chunk(b"iCCP", b"a\0\0" + FOLDED)),
    "big.bmp": lambda: patched(encoded("BMP"), (b"BM", 18, struct.pack("<ii", SIDE, SIDE))),
    "big.gif": lambda: patched(encoded("GIF"), (b"GIF", 6, struct.pack("<HH", SIDE, SIDE))),
    "frame.gif": lambda: patched(encoded("GIF"), (b",\0\0\0\0", 5, struct.pack("<HH", SIDE, SIDE))),
    "big.jpg": lambda: patched(encoded("JPEG"), (b"\xff\xc0", 5, struct.pack(">HH", SIDE, SIDE))),
    "big.jp2": lambda: patched(encoded("JPEG2000"), (b"ihdr", 4, TWO_SIDES), (b"\xff\x4f\xff\x51", 8, TWO_SIDES)),
    "big.tif": lambda: patched(encoded("TIFF"), (b"\0\1\4\0", 8, LONG_SIDE), (b"\1\1\4\0", 8, LONG_SIDE)),
    "script.png": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n%%EOF\n",
}  # fmt: skip


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_that_unfolds_to_gigabytes_is_one_line(name, tmp_path):
    """What Pillow would hand to another program, PostScript, is no picture either."""
    (tmp_path / name).write_bytes(PICTURES[name]())
    said = refused(lambda: read_picture(tmp_path / name, MOST_PIXELS))
    assert said.startswith(str(tmp_path / name)) and "Ghostscript" not in said
    if name.startswith("big"):
        assert "has more than data.max_pixels" in said == refused(lambda: picture_size(tmp_path / name, MOST_PIXELS))


def compressed(path: Path, pixels: bytes, syntax: str) -> Path:
    made = dataset(np.zeros((64, 64), np.uint8), bits=8)
    made.file_meta.TransferSyntaxUID = syntax
    made.PixelData = encapsulate([pixels])
    made["PixelData"].is_undefined_length = True
    made.save_as(path, enforce_file_format=True)
    return path


def test_dicom_that_unfolds_to_gigabytes_is_one_line(tmp_path):
    lossless = b"\xff\xd8\xff\xf7\0\x0b\x08\xff\xff\xff\xff\x01\x01\x11\0\xff\xda\0\x08\x01\x01\0\0\0\0\0\xff\xd9"
    jpeg = patched(encoded("JPEG"), (b"\xff\xc0", 5, struct.pack(">HH", SIDE, SIDE)))
    plain = patched(encoded("JPEG2000", no_jp2=True), (b"\xff\x4f\xff\x51", 8, TWO_SIDES))
    files = {
        "more than data.max_pixels": dicom(tmp_path / "rows.dcm", Rows=SIDE, Columns=SIDE),
        "pixels are 60000x60000 where its header says 64x64": compressed(tmp_path / "a.dcm", jpeg, JPEGBaseline8Bit),
        "pixels are 60000x60000 where": compressed(tmp_path / "b.dcm", plain, JPEG2000Lossless),
        "pixels are 65535x65535 where": compressed(tmp_path / "c.dcm", lossless, JPEGLSLossless),
        "pixels are more than 64x64": compressed(
            tmp_path / "d.dcm", struct.pack("<16I", 1, 64, *[0] * 14) + b"\x81\0" * (1 << 22), RLELossless
        ),
    }
    for said, path in files.items():
        assert said in refused(lambda path=path: read_picture(path, MOST_PIXELS))


def test_deflated_dicom_is_unfolded_no_further_than_a_picture_can_be(tmp_path, monkeypatch):
    made = dataset()
    made.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    made.save_as(tmp_path / "good.dcm", enforce_file_format=True)
    assert read_picture(tmp_path / "good.dcm", MOST_PIXELS).shape == (3, 8, 32)
    content = (tmp_path / "good.dcm").read_bytes()
    start = 144 + struct.unpack("<I", content[140:144])[0]
    folding = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    folded = folding.compress(b"\x09\0\x10\0OB\0\0" + struct.pack("<I", 1 << 25))
    folded += b"".join(folding.compress(bytes(1 << 24)) for _ in range(2)) + folding.flush()
    (tmp_path / "bomb.dcm").write_bytes(content[:start] + folded)
    monkeypatch.setattr(dicom_header, "_MOST_UNFOLDED", 8 << 20)
    assert "elements are more than 8 MiB" in refused(lambda: read_picture(tmp_path / "bomb.dcm", MOST_PIXELS))


def test_aliases_of_yaml_that_would_be_billions(tmp_path):
    tenfold = [(i, ", ".join([f"*a{i - 1}"] * 10)) for i in range(1, 10)]
    laughs = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{aliases}]\n" for i, aliases in tenfold)
    merged = "a0: &a0 {k: v}\n" + "".join(f"a{i}: &a{i}\n  <<: [{aliases}]\n" for i, aliases in tenfold)
    for text in (laughs, merged):
        (tmp_path / "a.yaml").write_text(text)
        assert "its aliases make more than 100,000 values" in refused(lambda: read_file(tmp_path / "a.yaml"))
    for text in ("a: &a [*a]\n", "a: " + "[" * 1500):
        (tmp_path / "a.yaml").write_text(text)
        assert "is no YAML" in refused(lambda: read_file(tmp_path / "a.yaml"))
    assert "takes YAML" in refused(lambda: read_setting("data.x=" + "[" * 1500, {}))


def safetensors(head: Any, length: int | None = None, tail: int = 0) -> bytes:
    text = json.dumps(head).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(tail)


def f32(*offsets: int, shape: int = 4) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [shape], "data_offsets": offsets}


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("text_encoder/model.safetensors", safetensors({}, 1 << 40), "header too large"),
        ("text_encoder/model.safetensors", safetensors({"a": f32(0, 16), "b": f32(8, 24)}, tail=24), "invalid offset"),
        ("text_encoder/model.safetensors", safetensors({"a": f32(0, 1 << 42, shape=1 << 40)}), "not fully covered"),
        ("text_encoder/config.json", b"[" * 100_000, "cannot be loaded"),
        ("text_encoder/config.json", b'{"num_hidden_layers": 100000000}', "says num_hidden_layers=100000000"),
        ("tokenizer/tokenizer_config.json", b"[" * 100_000, "holds no tokenizer"),
        ("text_encoder/model.safetensors.index.json", b"[" * 100_000, "nested too deeply"),
        ("text_encoder/model.safetensors.index.json", b'{"weight_map": {"a": "../b"}}', "files of other folders"),
    ],
)
def test_a_pretrained_folder_that_claims_too_much_is_one_line(file, content, said, tmp_path, encoder):
    folder = copied(encoder, tmp_path / "encoder")
    if "index" in file:
        (folder / "text_encoder/model.safetensors").unlink()
    (folder / file).write_bytes(content)
    assert said in refused(lambda: load_encoder(folder))


def test_compressed_weights_are_not_unfolded(tmp_path):
    torch.save({"a": torch.zeros(10)}, tmp_path / "good.pt")
    with (
        zipfile.ZipFile(tmp_path / "good.pt") as good,
        zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for part in good.infolist():
            bomb.writestr(part.filename, bytes(1 << 24) if part.filename.endswith("data/0") else good.read(part))
    assert read_pickled(tmp_path / "good.pt")["a"].shape == (10,)
    with pytest.raises(ValueError, match="compressed"):
        read_pickled(tmp_path / "bomb.pt")


def test_json_that_is_too_deep_or_too_large_a_number_is_a_bad_row(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    rows = ["[" * 100_000, '{"file_name": "a.png", "text": "x", "n": 1e999}', '{"file_name": "a.png", "text": "good"}']
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    (table,) = read_catalogue(tmp_path, "metadata").splits.values()
    assert list(table.rows) == [3]
    assert table.faults == {1: "is no JSON object", 2: "has the number 1e999, which is too large: leave the key out"}

"""What lies in a folder: all of it is found, whatever links lead there, and what is no picture is known or named."""

import os
import socket
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image, features

from datamodules.chest_xray import ChestXRay, ChestXRayConfig
from datamodules.cytology import Cytology, CytologyConfig
from datamodules.files.layout_writers import convert
from datamodules.files.walk import PictureFolder, others_in, walk
from datamodules.medvqa_gi import MedVQAGI, MedVQAGIConfig
from datamodules.phantoms.chest import write_dicom
from jobs.evaluate import main as evaluate
from jobs.scoring.folders import Reading, ScoredFolder
from medsynth.errors import UserError
from tests.class_folders import write_classes


def draw(path: Path, value: int = 0, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(value).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return path


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")


def medvqa(root: Path, rows: list[str], **config) -> MedVQAGI:
    (root / "prompt-gt.csv").write_text("\n".join(["Filename;Prompt", *(f"{row};x" for row in rows)]) + "\n")
    config = {"resolution": 8, "workers": 0, "validation_images": 1, **config}
    return MedVQAGI(MedVQAGIConfig(root=str(root), **config))


# Links


def test_linked_folders_and_files_are_followed(tmp_path):
    write_classes(tmp_path / "pool")
    root = tmp_path / "set"
    root.mkdir()
    (root / "mild").symlink_to(tmp_path / "pool/mild")
    (root / "normal").mkdir()
    for index in range(2):
        (root / f"normal/q{index}.png").symlink_to(tmp_path / f"pool/normal/p{index}.png")
    names = [*(f"mild/p{i}.png" for i in range(4)), "normal/q0.png", "normal/q1.png"]
    assert walk(root) == names == PictureFolder(root).names()
    assert [str(path.relative_to(root)) for path in ScoredFolder(root, Reading()).paths] == names, "evaluate's own"


@pytest.mark.parametrize("target", [".", "..", "../../set", "loop"])
def test_a_circle_is_refused(tmp_path, target):
    draw(tmp_path / "set/mild/p.png")
    (tmp_path / "set/mild/loop").symlink_to(target)
    with pytest.raises(UserError, match=r"/mild/loop.* (in a circle|cannot be followed \(.*\)): remove that link$"):
        walk(tmp_path / "set")


def test_one_folder_linked_twice_is_no_circle(tmp_path):
    draw(tmp_path / "set/a/p.png")
    (tmp_path / "set/b").symlink_to("a")
    assert walk(tmp_path / "set") == ["a/p.png", "b/p.png"]


def test_a_link_to_nothing_is_a_missing_picture(tmp_path):
    draw(tmp_path / "images/p0.png")
    draw(tmp_path / "images/p1.png", 1)
    (tmp_path / "images/p2.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(UserError, match=r"row 4: images/p2\.png is missing"):
        medvqa(tmp_path, ["p0", "p1", "p2"]).check()


def test_what_cannot_be_read_is_said(tmp_path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "p.png"))
        with pytest.raises(UserError, match=r"p\.png is a pipe, socket or device and no file: move it away"):
            walk(tmp_path)
    assert walk(tmp_path / "nowhere") == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_folder_that_may_not_be_listed(tmp_path):
    (tmp_path / "secret").mkdir(mode=0)
    with pytest.raises(UserError, match=r"secret cannot be listed \(Permission denied\)"):
        walk(tmp_path)


# Hidden names


def test_hidden_names_are_no_data(tmp_path):
    draw(tmp_path / "p0.png")
    touch(tmp_path, ".ipynb_checkpoints/p0-checkpoint.png", "@eaDir/p0.png/SYNOPHOTO_THUMB_M.jpg", "._p0.png")
    touch(tmp_path, ".DS_Store", "Thumbs.db", "a/__MACOSX/p0.png", "lost+found/p1.png", "a/desktop.ini", "~$list.csv")
    assert walk(tmp_path) == ["p0.png"] == PictureFolder(tmp_path).names()
    assert ScoredFolder(tmp_path, Reading()).paths == [tmp_path / "p0.png"]
    with pytest.raises(UserError, match=r"/\._p0\.png has a hidden name, which is no data: rename it"):
        PictureFolder(tmp_path).find("._p0.png")


def test_a_hidden_root_is_read(tmp_path):
    draw(tmp_path / ".cache/set/p.png")
    assert walk(tmp_path / ".cache/set") == ["p.png"]


# Names that a table asks for


def test_a_name_whose_file_is_not_read_is_not_called_missing(tmp_path):
    touch(tmp_path, "q0.heic", "q1.nii.gz", "README.md")
    draw(tmp_path / "P2.png")
    draw(tmp_path / "caf\u0065\u0301.png")
    folder = PictureFolder(tmp_path)
    for asked in ("q0", "q0.heic", "Q0.HEIC"):
        with pytest.raises(UserError, match=r"/q0\.heic is there, but a file of its kind is not read here: save it as"):
            folder.find(asked)
    with pytest.raises(UserError, match=r"/p2\.png is missing; there is P2\.png: write it so$"):
        folder.find("p2.png")
    with pytest.raises(UserError, match=r"/p2\.\* is missing; there is P2\.png: write it so$"):
        folder.find("p2")
    with pytest.raises(UserError, match=r"/gone\.\* is missing$"):
        folder.find("gone")
    assert folder.find("caf\u00e9") == folder.find("caf\u00e9.png") == "caf\u0065\u0301.png", "as macOS writes é"
    assert folder.others == ["q0.heic", "q1.nii.gz"]


# Formats


@pytest.mark.parametrize("suffix", [".jfif", ".jpe", ".gif", ".jp2", ".avif"])
def test_further_formats_are_read(tmp_path, suffix):
    needed = {".jp2": "jpg_2000", ".avif": "avif"}.get(suffix)
    if needed and not features.check(needed):
        pytest.skip(f"this Pillow has no {needed}")
    names = [f"p{i}{suffix}" for i in range(3)]
    for index, name in enumerate(names):
        draw(tmp_path / "images" / name, index, **({"format": "JPEG"} if suffix == ".jfif" else {}))
    data = medvqa(tmp_path, [name.removesuffix(suffix) for name in names])
    assert data.check()["pictures"] == 3 and data.notes() == []
    assert data.training_set()[0].images.shape == (1, 3, 8, 8)


def test_dicom_is_known_by_its_first_bytes(tmp_path):
    values = np.arange(32 * 32, dtype=np.uint16).reshape(32, 32)
    names = ["IM000001", "1.2.840.10008.5", "a.IMA", "b.dcm", "deep/c.v2"]
    for name in names:
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        write_dicom(tmp_path / "images" / name, values, identity=name)
        mask = tmp_path / "masks" / f"{name.removesuffix('.IMA').removesuffix('.dcm')}.png"
        mask.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (32, 32), 255).save(mask)
    touch(tmp_path, "images/DICOMDIR", "images/notes.bin", "masks/lonely.txt", "other.csv", "README.txt")
    (tmp_path / "test").mkdir()
    Image.new("L", (32, 32), 255).save(tmp_path / "masks/nobody.png")
    config = {"resolution": 8, "workers": 0, "validation_images": 1}
    data = ChestXRay(ChestXRayConfig(root=str(tmp_path), **config))
    assert data.check()["pictures"] == len(names)
    assert data.notes() == [
        "5 files are not read: images/notes.bin, masks/lonely.txt, masks/nobody.png, other.csv, test/"
    ]
    whole = data.training_set().pairs + data.validation_set().pairs
    assert sorted(pair.picture for pair in whole) == sorted(names)
    assert {tuple(data.training_set().pictures.open_picture(name).shape) for name in names} == {(3, 32, 32)}


# What is said of the rest


def test_what_is_not_read_is_counted_and_named(tmp_path):
    for index in range(3):
        draw(tmp_path / f"images/p{index}.png", index)
    touch(tmp_path, "images/q0.heic", "images/q1.svg", "images/LICENSE", "val/p9.png", "masks/p0.png", "phantom.json")
    data = medvqa(tmp_path, ["p0", "p1"])
    counts = data.check()
    assert counts["pictures without a row"] == 1
    assert data.notes() == [
        "1 picture has no row in the table: p2.png",
        "3 files are not read: images/q0.heic, images/q1.svg, val/",
    ]
    with pytest.raises(UserError, match=r"row 2: images/q0\.heic is there, but a file of its kind is not read here"):
        medvqa(tmp_path, ["q0", "p1", "p2"]).check()
    touch(tmp_path, *(f"images/r{i}.svg" for i in range(9)))
    assert others_in(tmp_path, {"images": PictureFolder(tmp_path / "images").others}, ["prompt-gt.csv"]) == [
        "12 files are not read: images/q0.heic, images/q1.svg, images/r0.svg, images/r1.svg, images/r2.svg and 7 more"
    ]


def test_evaluate_says_what_it_does_not_read(tmp_path):
    for side in ("real", "fake"):
        for index in range(4):
            draw(tmp_path / side / f"p{index}.png", index)
    touch(tmp_path, "real/q.heic", "real/.ipynb_checkpoints/p0.png", "real/README")
    arguments = ["--real", "real", "--fake", "fake", "--extractor", "random", "--workers", "0", "--device", "cpu"]
    arguments = [str(tmp_path / a) if a in ("real", "fake") else a for a in arguments]
    told = CliRunner().invoke(evaluate, arguments, catch_exceptions=False).output
    assert f"{tmp_path}/real: 1 file is not read: q.heic" in told and "fake: " not in told


def test_what_lies_in_one_folder_is_told_apart(tmp_path):
    """Masks below the folder of the pictures are no pictures, the table there is no rest."""
    for index in range(3):
        draw(tmp_path / f"train/p{index}.png", index)
        (tmp_path / "masks/train").mkdir(parents=True, exist_ok=True)
        Image.new("L", (16, 12), 255).save(tmp_path / f"masks/train/p{index}.png")
    draw(tmp_path / "val/p3.png", 3)
    Image.new("L", (16, 12), 255).save(draw(tmp_path / "masks/val/p3.png"))
    touch(tmp_path, "q.heic")
    (tmp_path / "captions.csv").write_text("Filename,Prompt\ntrain/p0,x\n")
    config = {"resolution": 8, "workers": 0, "validation_images": 1}
    data = ChestXRay(ChestXRayConfig(root=str(tmp_path), images=".", **config))
    assert data.check()["pictures"] == 4
    assert data.notes() == [
        "the folders train, val are read as one: which pictures validate is drawn by seed",
        "1 file is not read: q.heic",
    ]


def test_names_that_are_not_utf8_are_read_where_they_are_no_text(tmp_path):
    root = write_classes(tmp_path / "classes")
    latin = os.fsdecode(b"p\xe4.png")
    (root / "mild/p0.png").rename(root / "mild" / latin)
    assert f"mild/{latin}" in walk(root)
    Cytology(CytologyConfig(root=str(root), resolution=32, template=None, validation_images=2)).check()
    with pytest.raises(UserError, match="its name is not UTF-8: rename it"):
        convert(root, tmp_path / "out", "metadata")
    (root / "mild").rename(root / os.fsdecode(b"m\xe4ld"))
    with pytest.raises(UserError, match=r"4 bad samples(.|\n)*its name is not UTF-8: rename it"):
        Cytology(CytologyConfig(root=str(root), resolution=32, template=None, validation_images=2)).check()

"""Copies of pictures, written beside the originals until each class has as many as asked for."""

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from datamodules.cytology import Cytology, CytologyConfig
from datamodules.files.affine import Affine, draw_affine
from datamodules.files.augmented import GROUP, Recipe, augment
from jobs.prepare import main as prepare
from medsynth.errors import UserError
from tests.class_folders import write_classes, write_pictures


@pytest.fixture
def source(tmp_path) -> Path:
    """`mild` of 4 and `normal` of 6 pictures, a caption and a template."""
    root = write_classes(tmp_path / "smears")
    (root / "mild/p1.txt").write_text("two round cells", encoding="utf-8")
    (root / "style_filewords.txt").write_text("[filewords]\n", encoding="utf-8")
    return root


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_each_class_has_as_many_and_the_originals_are_kept(source, tmp_path):
    assert augment(source, tmp_path / "out", Recipe(per_class=9)) == 5 + 3
    before, after = files(source), files(tmp_path / "out")
    assert all(after[name] == content for name, content in before.items())
    pictures = [name for name in after if name.endswith(".png")]
    assert Counter(name.partition("/")[0] for name in pictures) == {"mild": 9, "normal": 9}
    copies = sorted(set(pictures) - set(before))
    assert copies == [
        *("mild/p0+0001.png", "mild/p0+0002.png", "mild/p1+0001.png", "mild/p2+0001.png", "mild/p3+0001.png"),
        *("normal/p0+0001.png", "normal/p1+0001.png", "normal/p2+0001.png"),
    ]
    assert after["mild/p1+0001.txt"] == b"two round cells"
    assert len(after) == len(before) + len(copies) + 1
    for name in copies:
        with Image.open(tmp_path / "out" / name) as picture:
            assert picture.size == (48, 40)
    assert sum(after[name] not in before.values() for name in copies) > 4


def test_the_same_seed_gives_the_same_bytes_and_more_copies_change_none(source, tmp_path):
    for name, recipe in {"a": Recipe(8), "b": Recipe(8), "more": Recipe(12), "other": Recipe(8, seed=1)}.items():
        augment(source, tmp_path / name, recipe)
    first, more = files(tmp_path / "a"), files(tmp_path / "more")
    assert first == files(tmp_path / "b")
    assert all(more[name] == content for name, content in first.items())
    assert files(tmp_path / "other") != first


def test_each_change_comes_at_its_probability():
    drawn = [draw_affine(np.random.default_rng(i), 0.5, 10, 1.5) for i in range(1000)]
    for changed in ([a.angle != 0 for a in drawn], [a.zoom != 1 for a in drawn], [a.flips != () for a in drawn]):
        assert sum(changed) / 1000 == pytest.approx(0.5, abs=0.06)
    assert all(draw_affine(np.random.default_rng(i), 0.0, 10, 1.5) == Affine() for i in range(20))


def test_a_change_leaves_no_empty_corner_and_keeps_the_size():
    white = torch.full((3, 40, 90), 255, dtype=torch.uint8)
    for angle in (0, 5, -30, 45, 90, 180):
        changed = Affine(angle=angle).apply(white)
        assert changed.shape == white.shape
        assert changed.min() >= 254
    picture = torch.arange(2 * 5, dtype=torch.uint8).view(1, 2, 5)
    assert torch.equal(Affine().apply(picture), picture)
    assert torch.equal(Affine(flips=(-1,)).apply(picture), picture.flip(-1))
    zoomed = Affine(zoom=2).apply(torch.nn.functional.pad(white[:, :20, :40], (25, 25, 10, 10)))
    assert (zoomed[:, 4:-4, 8:-8] == 255).all()  # the middle half, twice as large


def test_only_pictures_that_train_are_varied(tmp_path):
    for split in ("train", "validation"):
        write_classes(tmp_path / "set" / split)
    assert augment(tmp_path / "set", tmp_path / "out", Recipe(7)) == 3 + 1
    copies = set(files(tmp_path / "out")) - set(files(tmp_path / "set"))
    assert copies and all(name.startswith("train/") for name in copies)


def test_copies_stay_on_their_pictures_side_of_the_split(source, tmp_path):
    augment(source, tmp_path / "out", Recipe(12))
    data = Cytology(CytologyConfig(root=str(tmp_path / "out"), resolution=16, validation_images=6, group=GROUP))
    found = data.check()
    assert (found["pictures"], found["groups"]) == (24, 10)
    sides = [{pair.picture[: pair.picture.index("/") + 3] for pair in pairs} for pairs in (
        data.training_set().pairs, data.validation_set().pairs
    )]  # fmt: skip
    assert sides[0].isdisjoint(sides[1])
    assert {"p", "two round cells"} <= set(data.all_captions())  # the copy's name is no caption


def test_the_command(source, tmp_path):
    arguments = ["augment", str(source), str(tmp_path / "out"), "--per-class", "7", "--zoom", "1.2", "--seed", "3"]
    result = CliRunner().invoke(prepare, arguments, catch_exceptions=False)
    assert f"4 copies beside the originals in {tmp_path / 'out'}: 7 pictures of each class" in result.output
    assert f"data.group='{GROUP}'" in result.output


def refused(source: Path, out: Path, per_class: int = 7) -> str:
    with pytest.raises(UserError) as error:
        augment(source, out, Recipe(per_class))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_mistakes_are_one_line_and_leave_nothing(source, tmp_path):
    out = tmp_path / "out"
    told = refused(source, out, 5)
    assert told == "--per-class 5: class normal has 6 pictures already, and all are kept: give at least 6"
    assert "lies in DATA" in refused(source, source / "more")
    assert refused(tmp_path / "none", out) == f"DATA: {tmp_path / 'none'} is not a folder"
    (source / "severe").mkdir()
    assert refused(source, out).endswith("severe is the folder of a class and has no picture; add some, or remove it")
    (source / "severe").rmdir()
    write_pictures(source / "severe", 1)
    (source / "severe/p0.png").write_bytes(b"\x89PNG no more")
    assert "severe/p0.png is no picture of a known format" in refused(source, out)
    shutil.rmtree(source / "severe")
    write_pictures(source / "mild", 1, first=7)
    (source / "mild/p7.png").rename(source / "mild/p0+0001.png")
    assert "mild/p0+0001.png is there already, where a copy is to be" in refused(source, out, 12)
    out.mkdir()
    (out / "mine.txt").write_text("kept")
    assert "is there already; choose another OUT, or remove it" in refused(source, out)
    assert files(out) == {"mine.txt": b"kept"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "smears"]

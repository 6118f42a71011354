"""Groups stay on one side of every split, and pictures that are the same on two sides are named."""

import hashlib
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from datamodules.canine_hip import CanineHip, CanineHipConfig
from datamodules.chest_xray import ChestXRay, ChestXRayConfig
from datamodules.dreambooth import DreamBoothConfig, DreamBoothData
from datamodules.files.layout_writers import convert
from datamodules.files.layouts import LAYOUTS
from datamodules.files.pictures import Pictures
from datamodules.medvqa_gi import MedVQAGI, MedVQAGIConfig
from datamodules.splits import hold_out, same_pictures
from datamodules.stream import derive_seed
from medsynth.errors import UserError

SMALL = {"resolution": 8, "workers": 0}


def draw(path: Path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(value).integers(0, 256, (10, 10, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def write_patients(root: Path, table: bool = True) -> Path:
    """Patients 0 to 5 of 1 to 6 pictures, 21 in all: patient3_0.png …"""
    rows = ["file_name,text,label,patient"]
    for patient in range(6):
        for index in range(patient + 1):
            draw(root / f"patient{patient}_{index}.png", 10 * patient + index)
            rows.append(f"patient{patient}_{index}.png,hip {index},{'mild' if index % 2 else 'normal'},{patient}")
    if table:
        (root / "metadata.csv").write_text("\n".join(rows) + "\n")
    return root


def hips(root: Path, seed=0, **config) -> CanineHip:
    return CanineHip(CanineHipConfig(root=str(root), **{**SMALL, "validation_images": 5, **config}), seed)


def patients(names) -> set[str]:
    return {name.rpartition("/")[2].partition("_")[0] for name in names}


def split_of(data, folder: Path) -> dict:
    data.write_split(str(folder))
    return json.loads((folder / "split.json").read_text())


# Groups


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=2, max_size=14), st.floats(0.02, 0.98), st.integers(0, 2**31))
def test_no_group_is_on_both_sides_and_sizes_are_near(sizes, share, seed):
    groups = {f"{group}/{index}": str(group) for group, size in enumerate(sizes) for index in range(size)}
    count = max(1, min(round(share * len(groups)), len(groups) - 1))
    held = hold_out(list(groups), count, seed, groups)
    assert not {groups[name] for name in held} & {groups[name] for name in groups.keys() - held}
    assert 0 < len(held) < len(groups)
    assert abs(len(held) - count) <= max(sizes), "one group more or less is all that it may miss by"
    if max(sizes) == 1:
        assert len(held) == count
    assert held == hold_out(list(reversed(groups)), count, seed, groups), "whatever the order"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 5), min_size=2, max_size=8), min_size=1, max_size=4), st.integers(0, 99))
def test_classes_that_share_groups_are_split_together(classes, seed):
    """As DreamBooth splits each class by itself."""
    decided: dict[str, bool] = {}
    sides: dict[str, set[bool]] = {}
    for label, members in enumerate(classes):
        groups = {f"{label}/{index}": str(group) for index, group in enumerate(members)}
        if len(set(members)) == 1 and not decided:
            continue
        held = hold_out(list(groups), 1, seed, groups, decided)
        for name, group in groups.items():
            sides.setdefault(group, set()).add(name in held)
    assert all(len(found) == 1 for found in sides.values())


def test_without_groups_the_split_is_that_of_before(tmp_path):
    names = [f"p{i}.png" for i in range(20)]
    before = set(sorted(names, key=lambda name: derive_seed(7, "split", name))[:6])
    assert hold_out(names, 6, 7) == before
    data = hips(write_patients(tmp_path / "set"))
    split = split_of(data, tmp_path)
    assert set(split) == {"seed", "train", "val"} and "groups" not in data.check()
    pairs = [*data.training_set().pairs, *data.validation_set().pairs]
    content = {
        "pictures": {s: [(n, (tmp_path / "set" / n).stat().st_size) for n in split[s]] for s in ("train", "val")},
        "prompts": [(pair.picture, pair.prompt, (), False) for pair in pairs],
        "evaluation": None,
        "config": [8, "pad"],
    }
    assert data.fingerprint() == hashlib.sha256(json.dumps(content).encode()).hexdigest(), "caches of before fit"


@pytest.mark.parametrize("group", ["patient", r"^(patient\d+)_", r"patient\d+"])
def test_a_column_or_a_pattern_of_the_name(tmp_path, group):
    data = hips(write_patients(tmp_path / "set"), group=group)
    counts, split = data.check(), split_of(data, tmp_path)
    assert not patients(split["train"]) & patients(split["val"])
    assert counts["groups"] == 6 and counts["train groups"] == len(patients(split["train"]))
    assert counts["validation groups"] == len(patients(split["val"]))
    assert (counts["train pictures"], counts["validation pictures"]) == (16, 5)
    assert split["group"] == group
    assert data.fingerprint() != hips(tmp_path / "set").fingerprint()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_fact_of_any_layout(tmp_path, layout):
    write_patients(tmp_path / "set")
    convert(tmp_path / "set", tmp_path / layout, layout)
    split = split_of(hips(tmp_path / layout, group="patient"), tmp_path)
    assert not patients(split["train"]) & patients(split["val"]) and len(split["val"]) == 5


def test_a_column_of_rows_with_several_prompts(tmp_path):
    rows = ["Filename;Prompt;Video"]
    for index in range(12):
        draw(tmp_path / f"images/p{index}.png", index)
        rows += [f"p{index};one;v{index % 4}", f"p{index};two;v{index % 4}"]

    def polyps(**config) -> MedVQAGI:
        return MedVQAGI(
            MedVQAGIConfig(root=str(tmp_path), **{**SMALL, "validation_images": 3, "group": "Video", **config})
        )

    (tmp_path / "prompt-gt.csv").write_text("\n".join(rows))
    split = split_of(polyps(), tmp_path)
    assert len({int(name[1:-4]) % 4 for name in split["val"]}) == 1 and len(split["val"]) == 3
    (tmp_path / "prompt-gt.csv").write_text("\n".join([*rows, "p1;three;v3", "p2;four;", "p3;five;nan"]))
    with pytest.raises(UserError) as refused:
        polyps().check()
    assert str(refused.value).splitlines()[1:] == [
        "  row 26: p1.png has Video v3 here and v1 in another row",
        "  row 27: has no Video for data.group",
        "  row 28: has no Video for data.group",
    ]


def test_pictures_without_a_group_are_bad_rows(tmp_path):
    write_patients(tmp_path)
    draw(tmp_path / "stray.png", 99)
    with (tmp_path / "metadata.csv").open("a") as file:
        file.write("stray.png,a stray,mild,\n")
    with pytest.raises(UserError, match=r"row 23: data\.group=patient\(\\d\) is not in its name"):
        hips(tmp_path, group=r"patient(\d)").check()
    with pytest.raises(UserError, match=r"row 23: has no patient for data\.group"):
        hips(tmp_path, group="patient").check()
    assert hips(tmp_path, group="patient", on_bad="skip").check()["pictures"] == 21


@pytest.mark.parametrize(
    ("group", "why"),
    [
        (
            "Patient",
            r"data\.group=Patient is no column \(label, patient\) and, as a regular expression, is in no picture",
        ),
        ("(", r"data\.group=\( is no column \(label, patient\) and no regular expression \(missing \)"),
        ("png", r"data\.group: all 21 pictures are of the group png: none can be held out"),
    ],
)
def test_a_group_that_is_none(tmp_path, group, why):
    with pytest.raises(UserError, match=why):
        hips(write_patients(tmp_path), group=group).check()


def test_a_given_split_that_parts_a_group_is_refused(tmp_path):
    for split, first in (("train", 0), ("val", 3), ("Testing", 5)):
        for patient in range(first, first + 3 if split == "train" else first + 2 - (split == "Testing")):
            for index in range(2):
                draw(tmp_path / split / f"patient{patient}_{index}.png", 10 * patient + index)
                (tmp_path / split / f"patient{patient}_{index}.txt").write_text("a hip")
    counts = hips(tmp_path, group=r"patient\d").check()
    names = ("train groups", "validation groups", "test groups")
    assert [counts[name] for name in names] == [3, 2, 1]
    for suffix in (".png", ".txt"):
        shutil.copy(tmp_path / f"train/patient1_0{suffix}", tmp_path / f"Testing/patient1_7{suffix}")
    with pytest.raises(
        UserError, match=r"the split part the group patient1, train/patient1_0\.png \(train\) and Testing/"
    ):
        hips(tmp_path, group=r"patient\d").check()
    assert len(hips(tmp_path).notes()) == 1, "without data.group the copy is named as one"


def test_dreambooth_keeps_a_group_of_two_classes_together(tmp_path):
    for label, patients_ in {"mild": (0, 1, 2), "severe": (1, 2, 3)}.items():
        for patient in patients_:
            for index in range(2):
                draw(tmp_path / label / f"patient{patient}_{index}.png", 100 * len(label) + 10 * patient + index)
    for seed in range(4):
        config = DreamBoothConfig(
            root=str(tmp_path), class_pictures=0, validation_images=2, group=r"patient\d", **SMALL
        )
        split = split_of(DreamBoothData(config, seed), tmp_path)
        assert not patients(split["train"]) & patients(split["val"]) and split["val"]
        assert {name.partition("/")[0] for name in split["train"]} == {"mild", "severe"}


# Pictures that are the same


def test_the_same_picture_on_two_sides_is_named(tmp_path):
    root = write_patients(tmp_path / "set")
    data = hips(root, group="patient")
    split = split_of(data, tmp_path)
    assert data.notes() == []
    (root / split["val"][0]).write_bytes((root / split["train"][0]).read_bytes())
    note = (
        "1 picture is on two sides of the split, byte for byte: "
        f"{split['train'][0]} (train) = {split['val'][0]} (validation)"
    )
    assert hips(root, group="patient").notes() == [note]
    with pytest.raises(
        UserError, match=r"data\.on_duplicates=fail: 1 picture is on two sides of the split, .*; remove"
    ):
        hips(root, group="patient", on_duplicates="fail").check()
    (root / split["train"][1]).write_bytes((root / split["train"][0]).read_bytes())
    assert len(hips(root, group="patient").notes()) == 1, "twice on one side is no matter"


def test_a_picture_in_two_shards_is_named(tmp_path):
    write_patients(tmp_path / "set/train")
    (tmp_path / "set/validation").mkdir()
    shutil.copy(tmp_path / "set/train/patient0_0.png", tmp_path / "set/validation/other.png")
    (tmp_path / "set/validation/metadata.csv").write_text("file_name,text\nother.png,x\n")
    convert(tmp_path / "set", tmp_path / "shards", "webdataset")
    (note,) = hips(tmp_path / "shards").notes()
    assert "patient0_0.png (train) = validation/000000.tar/other.png (validation)" in note


class Counted(Pictures):
    """Counts what is read."""

    bytes_read: Counter

    def read(self, name, start=0, count=-1):
        data = super().read(name, start, count)
        self.bytes_read[name] += len(data)
        return data


def test_files_are_opened_only_where_their_lengths_are_the_same(tmp_path):
    """Uncompressed pictures are all of one length: pieces tell them apart."""
    names = [f"p{i}.bmp" for i in range(40)]
    for index, name in enumerate(names):
        pixels = np.random.default_rng(index).integers(0, 256, (200, 200, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / name)
    shutil.copy(tmp_path / "p0.bmp", tmp_path / "p39.bmp")
    Image.new("RGB", (9, 9)).save(tmp_path / "lonely.bmp")
    pictures = Counted(tmp_path, MedVQAGIConfig(root=str(tmp_path)))
    pictures.bytes_read = Counter()
    sides = {"train": [*names[:20], "lonely.bmp"], "validation": names[20:], "test": []}
    assert same_pictures(sides, pictures) == [("p0.bmp (train)", "p39.bmp (validation)")]
    size = (tmp_path / "p0.bmp").stat().st_size
    assert pictures.bytes_read["lonely.bmp"] == 0
    assert pictures.bytes_read["p0.bmp"] == pictures.bytes_read["p39.bmp"] == size + 3 * 4096
    assert {pictures.bytes_read[name] for name in names[1:-1]} == {3 * 4096}


def test_many_suspects_are_worth_a_progress_bar(tmp_path, monkeypatch):
    monkeypatch.setattr("datamodules.splits._MANY", 3)
    for index in range(3):
        draw(tmp_path / f"a{index}.png", index)
        shutil.copy(tmp_path / f"a{index}.png", tmp_path / f"b{index}.png")
    heard: list[tuple[int, int]] = []
    sides = {"train": [f"a{i}.png" for i in range(3)], "validation": [f"b{i}.png" for i in range(3)]}
    found = same_pictures(sides, Pictures(tmp_path, MedVQAGIConfig(root="x")), lambda *both: heard.append(both))
    assert len(found) == 3 and heard[-1] == (6, 6)


def test_chest_pictures_are_split_by_group(tmp_path):
    for patient in range(4):
        for index in range(3):
            draw(tmp_path / f"images/patient{patient}/{index}.png", 10 * patient + index)
    config = ChestXRayConfig(root=str(tmp_path), controls=[], validation_images=3, group=r"^(patient\d)/", **SMALL)
    split = split_of(ChestXRay(config), tmp_path)
    assert {name.partition("/")[0] for name in split["val"]}.isdisjoint(n.partition("/")[0] for n in split["train"])
    assert len(split["val"]) == 3


def test_the_same_pictures_have_one_fingerprint_by_any_reader(tmp_path):
    """What `medsynth compare` shows: the data sets' own fingerprints also tell prompts and sizes apart."""
    for split, first in (("train", 0), ("validation", 6)):
        for index in range(first, first + 6 - first // 2):
            draw(tmp_path / "set" / split / f"mild/p{index}.png", index)
    seen = []
    for layout in LAYOUTS:
        convert(tmp_path / "set", tmp_path / layout, layout, source_layout="folders")
        data = hips(tmp_path / layout, resolution=16 if layout == "pairs" else 8)
        seen.append((data.pictures_fingerprint(), data.fingerprint()))
    assert len({pictures for pictures, _ in seen}) == 1 and len({whole for _, whole in seen}) > 1
    one, two = tmp_path / "one", tmp_path / "two"
    for root in (one, two):
        shutil.copytree(tmp_path / "set/train/mild", root / "images")
        (root / "prompt-gt.csv").write_text("Filename,Prompt\n" + "".join(f"p{i},x\n" for i in range(6)))
    same = {**SMALL, "validation_images": 2}
    readers = [
        MedVQAGI(MedVQAGIConfig(root=str(one), **same)),
        ChestXRay(ChestXRayConfig(root=str(one), controls=[], captions="prompt-gt.csv", **same)),
    ]
    assert len({data.pictures_fingerprint() for data in readers}) == 1
    assert len({data.fingerprint() for data in readers}) == 2
    with (two / "images/p0.png").open("ab") as file:
        file.write(b"more")
    assert MedVQAGI(MedVQAGIConfig(root=str(two), **same)).pictures_fingerprint() != readers[0].pictures_fingerprint()

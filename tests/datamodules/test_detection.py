"""`layout: auto` finds what is meant, or says in one line what speaks against it; rows, members and cells likewise."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from datamodules.canine_hip import CanineHip, CanineHipConfig
from datamodules.cytology import Cytology, CytologyConfig
from datamodules.dreambooth import DreamBoothConfig, DreamBoothData
from datamodules.files.layout_writers import convert, layout_writer
from datamodules.files.layouts import LAYOUTS, Entry, read_catalogue
from jobs.prepare import main as prepare
from medsynth.errors import UserError
from tests.datamodules.test_layouts import GOOD, contents, faults, pack, picture

PNG = picture(0, ".png")
DOTS = ": pack it again without dots in the keys"


def put(root: Path, *names: str, **texts: str) -> Path:
    """Pictures of these names, and texts by theirs, in which `__` is a dot."""
    for name in (*names, *texts):
        path = root / name.replace("__", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(texts[name].encode() if name in texts else PNG)
    return root


def said(root: Path, layout: str = "auto") -> str:
    with pytest.raises(UserError) as refused:
        read_catalogue(root, layout)
    message = str(refused.value)
    assert "\n" not in message and message.startswith("data.root: ")
    return message


def rows(root: Path, layout: str = "auto", **options) -> dict[str, list[tuple[str, str, str]]]:
    """Name, caption and class of each picture, by split."""
    catalogue = read_catalogue(root, layout, **options)
    assert not any(table.faults for table in catalogue.splits.values())
    return {
        split: sorted((e.name, e.text, e.label) for e in table.rows.values())
        for split, table in catalogue.splits.items()
    }


# Layouts of others


def test_lines_of_json_as_hugging_faces_imagefolder_has_them(tmp_path):
    lines = [
        {"file_name": "a.png", "text": "left 101", "label": "mild", "angles": [101.5, 99], "side": None},
        {"file_name": "deep/b.png", "text": "nan", "label": 3, "site": "NA"},
    ]
    put(tmp_path, "a.png", "deep/b.png", "c.png")
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + "\n")
    assert rows(tmp_path) == {"": [("a.png", "left 101", "mild"), ("deep/b.png", "nan", "3")]}
    catalogue = read_catalogue(tmp_path)
    assert [json.loads(e.facts) for e in catalogue.splits[""].rows.values()] == [
        {"angles": [101.5, 99], "side": None},
        {"site": "NA"},
    ]
    assert catalogue.notes() == ["1 picture has no row in the table: c.png"]
    convert(tmp_path, tmp_path / "out", "webdataset")
    assert {e[:4] for e in contents(tmp_path / "out")} == {
        ("a", PNG, "left 101", "mild"), ("deep/b", PNG, "nan", "3")
    }  # fmt: skip


def test_bad_lines_of_json(tmp_path):
    lines = [
        '{"file_name": "a.png", "text": "x"}', "[]", "{", '{"file_name": "a.png"}', '{"file_name": "b.png", "text": 3}',
        '{"file_name": "b.png", "text": "x", "label": null}', '{"file_name": "b.png", "text": "x", "text": "y"}',
        '{"file_name": "c.png", "text": "x", "angle": NaN}', '{"file_name": "a.png", "text": "x"}',
    ]  # fmt: skip
    put(tmp_path, "a.png", "b.png", "c.png")
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    assert faults(tmp_path) == {
        2: "is no JSON object",
        3: "is no JSON object",
        4: "has no text as text",
        5: "has no text as text",
        6: "its label is null: write the class as text, or leave label out",
        7: "has the key text twice: remove one",
        8: "has the number NaN, which JSON does not know: leave the key out",
        9: "a.png is in row 1 already",
    }
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,x\n")
    assert said(tmp_path).endswith("has metadata.csv and metadata.jsonl: remove one of them")


@pytest.mark.parametrize("names", [("train", "val", "test"), ("Training", "Validation", "Testing"), ("TRAIN", "dev")])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_folders_of_a_split_are_never_classes(tmp_path, names, layout):
    for name in names:
        put(tmp_path / name / "x", f"mild/{name}.png", **{f"mild/{name}__txt": f"of {name}"})
        convert(tmp_path / name / "x", tmp_path / "set" / name, layout, source_layout="pairs")
    found = rows(tmp_path / "set")
    assert list(found) == ["train", "validation", "test"][: len(names)]
    assert [[row[1] for row in split] for split in found.values()] == [[f"of {name}"] for name in names]


def test_one_table_above_the_folders_of_a_split(tmp_path):
    root = put(tmp_path / "set", "train/a.png", "val/b.png")
    put(root, metadata__csv="file_name,text\ntrain/a.png,x\nval/b.png,y\n")
    assert rows(root) == {"train": [("train/a.png", "x", "")], "validation": [("val/b.png", "y", "")]}
    convert(root, tmp_path / "out", "pairs")
    assert rows(tmp_path / "out")["validation"] == [("validation/b.png", "y", "")]
    put(root, "c.png", metadata__csv="file_name,text\ntrain/a.png,x\nc.png,y\n")
    assert read_catalogue(root).splits["train"].faults == {3: "c.png is in none of the splits train, val"}


def test_shards_named_after_a_split(tmp_path):
    for number, name in enumerate(("train-000000", "train-000001", "val-000000")):
        pack(tmp_path / f"{name}.tar", {f"{number}.png": PNG, f"{number}.txt": b"x"})
    found = rows(tmp_path)
    assert {split: [row[0] for row in part] for split, part in found.items()} == {
        "train": ["train-000000.tar/0.png", "train-000001.tar/1.png"], "validation": ["val-000000.tar/2.png"]
    }  # fmt: skip
    assert {row[2] for part in found.values() for row in part} == {""}, "no class"
    (tmp_path / "train-000000.tar").rename(tmp_path / "mild-000000.tar")
    (table, _) = read_catalogue(tmp_path).splits.values()
    assert list(table.faults.values()) == [
        "mild-000000.tar/0.png is in none of the splits " + "train-000001.tar, val-000000.tar"
    ]


@pytest.mark.parametrize(
    ("files", "why"),
    [
        (("val/a.png", "mild/b.png"), "has the folder val of a split and no folder train beside it: put what"),
        (("train/m/a.png", "val/m/b.png", "valid/m/c.png"), "has the folders val and valid for one split: join them"),
        (("mild/train/a.png", "mild/val/b.png"), "mild/train is a split inside of another folder: put it outside"),
        (("images/a.png", "images/b.png"), "the folder images would be a class of that name: give data.root="),
        (("images/a.png", "masks/a.png"), "the folder images would be a class of that name: give data.root="),
        (("10_word class/a.png",), "the folder '10_word class' is named as kohya's scripts have it"),
        (("mild/a.png", "severe-000000.tar"), "has severe-000000.tar (webdataset) and mild/a.png (folders): say"),
        (("a.png", "severe-000000.tar"), "has severe-000000.tar (webdataset) and a.png (pairs): say with data.layout"),
        (("mild/a.png", "captions.csv"), "has class folders and the table captions.csv, which is not read"),
        (("mild/a.png", "labels.xlsx"), "has class folders and the table labels.xlsx, which is not read"),
        (("a.zip", "README.md"), "one folder of pictures a class; unpack a.zip"),
    ],
)  # fmt: skip
def test_what_contradicts_the_guess(tmp_path, files, why):
    assert why in said(put(tmp_path, *files))
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError):
        convert(tmp_path, tmp_path / "out", "pairs")


def test_two_tables_of_captions(tmp_path):
    put(tmp_path, "a.png", metadata__csv="file_name,text\na.png,x\n", a__txt="y")
    assert said(tmp_path).endswith("has metadata.csv (metadata) and a.txt (pairs): say with data.layout which is meant")
    assert rows(tmp_path, "metadata") == {"": [("a.png", "x", "")]} and rows(tmp_path, "pairs") == {
        "": [("a.png", "y", "")]
    }
    assert read_catalogue(tmp_path, "metadata").notes() == ["1 file is not read: a.txt"]


def test_who_names_the_layout_has_it(tmp_path):
    put(tmp_path, "images/a.png", "10_word class/b.png", "c.tar", captions__csv="x\n")
    assert {row[2] for row in rows(tmp_path, "folders")[""]} == {"images", "10_word class"}
    assert read_catalogue(tmp_path, "folders").notes() == ["2 files are not read: c.tar, captions.csv"]


def test_kohyas_captions_are_read(tmp_path):
    put(tmp_path, "a.png", "b.png", "c.png", a__caption="one\n", b__txt="two", c__txt="three", c__caption="four")
    catalogue = read_catalogue(tmp_path)
    assert [entry.text for entry in catalogue.splits[""].rows.values()] == ["one", "two"]
    assert catalogue.splits[""].faults == {"c.png": "c.txt and c.caption say different things: remove one"}


@pytest.mark.parametrize("folder", ["images", "10_sks dog", "val"])
def test_data_sets_of_class_folders_refuse_what_is_no_class(tmp_path, folder):
    put(tmp_path, f"{folder}/a.png", f"{folder}/b.png", "mild/c.png")
    sets = [
        DreamBoothData(DreamBoothConfig(root=str(tmp_path), class_pictures=0)),
        Cytology(CytologyConfig(root=str(tmp_path), template=None)),
    ]
    for data in sets:
        with pytest.raises(UserError, match=folder) as refused:
            data.check()
        assert "data.layout" not in str(refused.value), "which these have not"


# What is not read


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_not_read_is_named_and_convert_says_so(tmp_path, layout):
    with layout_writer(put(tmp_path / "set", "LICENSE"), layout) as writer:
        for name in "ab":
            writer.add(Entry(f"{name}.png", name, f"text {name}", "mild"), PNG)
    put(tmp_path / "set", "mild/q0.heic", "mild/._a.png", "@eaDir/a.png", ".ipynb_checkpoints/b.png", "q1.nii")
    assert len(rows(tmp_path / "set")[""]) == 2
    config = CanineHipConfig(root=str(tmp_path / "set"), resolution=8, workers=0, validation_images=1)
    data = CanineHip(config)
    assert data.check()["pictures"] == 2
    assert [note for note in data.notes() if "not read" in note] == ["2 files are not read: mild/q0.heic, q1.nii"]
    arguments = ["convert", tmp_path / "set", "--to", "pairs", "--out", tmp_path / "out"]
    told = CliRunner().invoke(prepare, [str(a) for a in arguments], catch_exceptions=False).output
    assert "2 files are not read: mild/q0.heic, q1.nii\n2 pictures in" in told


def test_cytology_reads_what_lies_beside_its_pictures(tmp_path):
    put(tmp_path, "mild/a.png", "mild/b.png", "mild/c.png", **{"mild/a__txt": "a cell", "mild/lonely__txt": "x"})
    put(tmp_path, style_filewords__txt="[filewords]\n", notes__md="x")
    data = Cytology(CytologyConfig(root=str(tmp_path), resolution=8, workers=0, validation_images=1))
    data.check()
    assert [n for n in data.notes() if "not read" in n] == ["2 files are not read: mild/lonely.txt, notes.md"]


# Cells and members


@pytest.mark.parametrize("cell", ["nan", "NaN", "None", "NA", "N/A", "<NA>"])
@pytest.mark.parametrize("column", ["text", "label", "angle"])
def test_a_cell_without_a_value_is_a_fault(tmp_path, cell, column):
    cells = {"text": "x", "label": "mild", "angle": "103"} | {column: cell}
    put(tmp_path, "a.png", metadata__csv=f"file_name,{','.join(cells)}\na.png,{','.join(cells.values())}\n")
    why = f"{column} is {cell}, which programs write for an empty cell: give it a value, or leave it empty"
    assert faults(tmp_path) == {2: why}
    assert column != "angle" or read_catalogue(tmp_path).notes() == [], "its row tells of the picture"


def test_a_column_there_twice_is_refused(tmp_path):
    put(tmp_path, "a.png", metadata__csv="file_name,text,label, text \na.png,x,mild,y\n")
    with pytest.raises(UserError, match=r"metadata\.csv: the header has the column text twice: remove or rename one$"):
        read_catalogue(tmp_path)


def test_words_without_a_value_come_back_where_they_are_meant(tmp_path):
    """A class called NA and facts called None are what they are, from every layout into every other."""
    for layout in LAYOUTS:
        (tmp_path / layout).mkdir()
        with layout_writer(tmp_path / layout, layout) as writer:
            for name, label in (("a", "NA"), ("b", "train"), ("c", "images"), ("d", "10_word class"), ("e", ".hidden")):
                writer.add(Entry(f"{name}.png", name, "x", label, '{"note": "None", "inf": "Infinity"}'), PNG)
            writer.add(Entry("f.png", "@eaDir/.f", "x", "mild"), PNG)
        found = {(e[0], e[3], e[4]) for e in contents(tmp_path / layout)}
        notes = '{"inf": "Infinity", "note": "None"}'
        assert found == {
            ("a", "NA", notes), ("b", "train", notes), ("c", "images", notes), ("d", "10_word class", notes),
            ("e", ".hidden", notes), ("@eaDir/.f", "mild", "{}"),
        }  # fmt: skip


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        (
            {"1.2.840.0.png": PNG, "1.2.840.0.txt": b"x", "1.2.840.1.png": PNG, "1.2.840.1.txt": b"x"},
            dict.fromkeys(
                [f"s.tar/1.2.840.{i}.{kind}" for i in (0, 1) for kind in ("png", "txt")],
                "its key ends at the first dot of the name, as 1" + DOTS,
            ),
        ),
        (
            {"b.input.png": PNG, "b.txt": b"x"},
            {"s.tar/b.input.png": "its key ends at the first dot of the name, as b" + DOTS},
        ),
        ({"b.json": b"{}"}, {"s.tar/b": "has no picture"}),
        *(
            (
                {"b.png": PNG, "b.txt": b"x", "b.json": f'{{"label": {label}}}'.encode()},
                {"s.tar/b.png": f"its label is {label}: write the class as text, or leave label out"},
            )
            for label in ("null", "true", '["mild"]')
        ),
        (
            {"b.png": PNG, "b.txt": b"x", "b.json": b'{"label": "a", "label": "b"}'},
            {"s.tar/b.png": "its .json has the key label twice: remove one"},
        ),
        (
            {"b.png": PNG, "b.txt": b"x", "b.json": b'{"angle": NaN}'},
            {"s.tar/b.png": "its .json has the number NaN, which JSON does not know: leave the key out"},
        ),
        (
            {"b.png": PNG, "b.txt": b"x", "b.json": b'{"original_key": null}'},
            {"s.tar/b.png": 'its "original_key" is null and no text'},
        ),
    ],
)
def test_members_that_would_be_lost(tmp_path, members, expected):
    pack(tmp_path / "s.tar", {**GOOD, **members})
    catalogue = read_catalogue(tmp_path)
    assert catalogue.splits[""].faults == expected and list(catalogue.splits[""].rows) == ["s.tar/a.png"]


def test_members_that_are_no_samples_are_named(tmp_path):
    pack(tmp_path / "s.tar", {**GOOD, "a.seg.png": b"x", "a.cls": b"3", "._a.png": b"x", "README": b"x", "odd": b"x"})
    assert read_catalogue(tmp_path).notes() == ["3 files are not read: s.tar/a.seg.png, s.tar/a.cls, s.tar/odd"]


def test_a_line_of_extra_there_twice(tmp_path):
    line = '{"file_name": "mild/a.png", "text": "x"}\n'
    put(tmp_path, "mild/a.png", extra__jsonl=line + line)
    with pytest.raises(UserError, match=r"extra\.jsonl: line 2: mild/a\.png has a line already: remove one of them"):
        read_catalogue(tmp_path)

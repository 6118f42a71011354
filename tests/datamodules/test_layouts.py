"""The four layouts: each holds the same pictures, captions, classes and facts, and says what is wrong with itself."""

import io
import json
import pickle
import tarfile
from concurrent.futures import ThreadPoolExecutor
from itertools import permutations
from pathlib import Path

import pytest
import webdataset
from click.testing import CliRunner
from PIL import Image

from datamodules.files.layout_writers import convert, layout_writer
from datamodules.files.layouts import LAYOUTS, Entry, read_catalogue
from jobs.prepare import main
from medsynth.errors import UserError

FACTS = [
    {"norberg_left": 103.5, "heads": {"left": [0.25, 0.5]}, "grade": "2", "note": 'a "quoted", cell; of\ntwo lines'},
    {"norberg_left": 90.0, "side": "", "known": None, "text": "a fact of a reserved name", " odd ,": [1, 2]},
    {},
    {"label": 7} | {"list": [1, 2.5, "x"], "file_name": "f", "true": True, "word": "true", "spaced": " x "},
]
# key, suffix, caption, class, facts
SAMPLES = [
    ("p0", ".png", "left 103, right 98", "mild", FACTS[0]),
    ("deep/er/p1", ".jpg", 'said "so",\nin two lines; Ō', "mild", FACTS[1]),
    ("mild/p2.v2", ".PNG", "a third", "mild", FACTS[2]),
    ("p3", ".jpeg", "mild", "hip/dysplasia: severe", {k: v for k, v in FACTS[3].items() if k != "label"}),
    ("severe/p4", ".png", "no class", "", FACTS[0]),
    ("..p5", ".webp", "odd name", "..", {}),
    ("p6", ".bmp", "123", "123", {"n": 1}),
]


def picture(index: int, suffix: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8 + index), (index * 30, 0, 0)).save(file, Image.registered_extensions()[suffix.lower()])
    return file.getvalue()


@pytest.fixture
def sets(tmp_path) -> dict[str, Path]:
    """The same samples in each layout."""
    for layout in LAYOUTS:
        (tmp_path / layout).mkdir()
        with layout_writer(tmp_path / layout, layout, shard_size=2) as writer:
            for index, (key, suffix, text, label, facts) in enumerate(SAMPLES):
                entry = Entry(key + suffix, key, text, label, json.dumps(facts) if facts else "")
                writer.add(entry, picture(index, suffix))
    return {layout: tmp_path / layout for layout in LAYOUTS}


def contents(root: Path, split: str = "") -> set[tuple[str, bytes, str, str, str]]:
    """All that a data set holds, whatever its layout."""
    catalogue = read_catalogue(root)
    table = catalogue.splits[split]
    assert not table.faults
    return {
        (e.key, catalogue.read(e.name), e.text, e.label, json.dumps(json.loads(e.facts or "{}"), sort_keys=True))
        for e in table.rows.values()
    }


def expected() -> set[tuple[str, bytes, str, str, str]]:
    return {
        (key, picture(index, suffix), text, label, json.dumps(facts, sort_keys=True))
        for index, (key, suffix, text, label, facts) in enumerate(SAMPLES)
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_is_recognised_and_holds_everything(sets, layout):
    assert read_catalogue(sets[layout]).layout == layout
    assert contents(sets[layout]) == expected()


@pytest.mark.parametrize(("first", "second"), permutations(LAYOUTS, 2))
def test_every_conversion_and_its_way_back(sets, tmp_path, first, second):
    assert convert(sets[first], tmp_path / "there", second, shard_size=2) == len(SAMPLES)
    assert read_catalogue(tmp_path / "there").layout == second
    assert contents(tmp_path / "there") == expected()
    convert(tmp_path / "there", tmp_path / "back", first, shard_size=2)
    assert contents(tmp_path / "back") == expected()


def test_the_layouts_are_those_that_others_read(sets):
    lines = (sets["metadata"] / "metadata.csv").read_text().splitlines()
    assert lines[0].startswith("file_name,text,label,norberg_left") and lines[1].startswith(
        'p0.png,"left 103, right 98"'
    )
    assert (sets["pairs"] / "p0.txt").read_text() == "left 103, right 98\n"
    assert (sets["folders"] / "mild/p0.png").is_file() and (sets["folders"] / "mild/p2.v2.PNG").is_file()
    names = {path.name for path in sets["webdataset"].glob("*")}
    assert {"mild-000000.tar", "mild-000001.tar", "000000.tar"} < names


def test_webdataset_reads_the_shards(sets):
    shards = sorted(str(path) for path in sets["webdataset"].glob("*.tar"))
    read = list(webdataset.WebDataset(shards, shardshuffle=False, empty_check=False))
    assert len(read) == len(SAMPLES)
    found = {(sample["txt"].decode(), json.loads(sample["json"]).get("label", "")) for sample in read}
    assert found == {(text, label) for _, _, text, label, _ in SAMPLES}
    assert next(s for s in read if s["__key__"] == "p0")["png"] == picture(0, ".png")


def test_shards_that_webdataset_writes(tmp_path):
    with webdataset.ShardWriter(str(tmp_path / "mild-%06d.tar"), maxcount=2, verbose=0) as writer:
        for index in range(5):
            sample = {"png": picture(index, ".png"), "txt": f"text {index}", "json": {"norberg_left": index}}
            writer.write({"__key__": f"a/{index}", **sample})
    assert {(e[0], e[1], e[2], e[3]) for e in contents(tmp_path)} == {
        (f"a/{index}", picture(index, ".png"), f"text {index}", "mild") for index in range(5)
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_split_folders_are_kept(sets, tmp_path, layout):
    root = tmp_path / "split"
    root.mkdir()
    for split in ("train", "validation", "test"):
        convert(sets[layout], root / split, layout)
    for target in LAYOUTS:
        convert(root, tmp_path / f"to-{target}", target)
        catalogue = read_catalogue(tmp_path / f"to-{target}")
        assert (catalogue.layout, list(catalogue.splits)) == (target, ["train", "validation", "test"])
        assert contents(tmp_path / f"to-{target}", "test") == expected()


def test_class_folders_without_more_have_their_class_as_caption(tmp_path):
    for label in ("mild", "severe"):
        (tmp_path / "set" / label).mkdir(parents=True)
        (tmp_path / "set" / label / "1.png").write_bytes(picture(1, ".png"))
    convert(tmp_path / "set", tmp_path / "pairs", "pairs")
    assert (tmp_path / "pairs/mild/1.txt").read_text() == "mild\n"
    convert(tmp_path / "pairs", tmp_path / "back", "folders")
    files = {path.relative_to(tmp_path / "back").as_posix() for path in (tmp_path / "back").rglob("*.*")}
    assert files == {"mild/1.png", "severe/1.png"}, "nothing that a class folder holds already lies beside it"


def test_keys_that_shards_repeat_are_told_apart(tmp_path):
    for label in ("mild", "severe"):
        pack(tmp_path / f"set/{label}-000000.tar", {"0.png": picture(0, ".png"), "0.txt": label.encode()})
    convert(tmp_path / "set", tmp_path / "pairs", "pairs")
    assert (tmp_path / "pairs/mild-000000/0.txt").read_text() == "mild\n"
    assert (tmp_path / "pairs/severe-000000/0.png").read_bytes() == picture(0, ".png")


def test_a_shard_is_read_by_many_threads_and_after_pickling(tmp_path):
    for shard in range(3):
        members = {f"{index}.png": bytes([shard, index]) * (index + 1) for index in range(20)}
        pack(tmp_path / f"{shard}.tar", members)
    catalogue = read_catalogue(tmp_path, texts=False)
    shards = pickle.loads(pickle.dumps(catalogue.shards))
    names = list(catalogue.splits[""].rows) * 20
    with ThreadPoolExecutor(8) as pool:
        for name, data in zip(names, pool.map(shards.read, names), strict=True):
            shard, index = int(name[0]), int(name.split("/")[1].removesuffix(".png"))
            assert data == bytes([shard, index]) * (index + 1)
            assert (shards.size(name), shards.read(name, 3)) == (len(data), data[:3])


def test_the_commands(tmp_path):
    def prepare(*arguments) -> str:
        return CliRunner().invoke(main, [str(a) for a in arguments], catch_exceptions=False).output

    hips, shards = tmp_path / "hips", tmp_path / "shards"
    phantom = ("phantom", "hip", "--out", hips, "--images", 5, "--size", 32, "--seed", 4, "--layout", "pairs")
    assert f"5 pictures and their prompts in {hips}" in prepare(*phantom)
    assert f"{hips} holds these 5 pictures already" in prepare(*phantom)
    told = prepare("convert", hips, "--to", "webdataset", "--out", shards, "--shard-size", 2)
    assert f"5 pictures in {shards}, in the layout webdataset" in told
    assert contents(shards) == contents(hips) and len(list(shards.glob("*.tar"))) >= 3
    with pytest.raises(UserError, match="5 bad samples"):
        prepare("convert", hips, "--from", "folders", "--to", "pairs", "--out", tmp_path / "x")


# What is wrong


def pack(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def faults(root: Path) -> dict:
    """What is wrong with the only table."""
    (table,) = read_catalogue(root).splits.values()
    return table.faults


def test_bad_rows(tmp_path):
    (tmp_path / "p.png").write_bytes(picture(0, ".png"))
    rows = ["p.png,fine", "gone.png,x", "../p.png,x", "p.png", "p.png,", "p.png,again"]
    (tmp_path / "metadata.csv").write_text("\n".join(["file_name,text", *rows]))
    assert faults(tmp_path) == {
        3: f"{tmp_path.name}/gone.png is missing",
        4: f"../p.png leads out of the folder {tmp_path.name}",
        5: "1 instead of 2 fields",
        6: "empty text",
        7: "p.png is in row 2 already",
    }
    with pytest.raises(
        UserError, match=r"metadata\.csv: 5 bad rows \(mend or remove them, then convert again\)\n  row 3"
    ):
        convert(tmp_path, tmp_path / "out", "pairs")
    assert not (tmp_path / "out").exists()


def test_bad_pairs(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.png").write_bytes(picture(0, ".png"))
    (tmp_path / "a.txt").write_text("fine")
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\xfa")
    missing = "has no caption: its .txt is missing or empty"
    assert faults(tmp_path) == {"b.png": "its .txt is not UTF-8", "c.png": missing}
    with pytest.raises(
        UserError, match=rf"{tmp_path.name}: 2 bad samples \(mend.*\n  b\.png: its \.txt is not UTF-8\n"
    ):
        convert(tmp_path, tmp_path / "out", "metadata")


def test_a_picture_outside_of_the_class_folders(tmp_path):
    (tmp_path / "set/mild").mkdir(parents=True)
    for name in ("mild/a.png", "b.png"):
        (tmp_path / "set" / name).write_bytes(picture(0, ".png"))
    assert faults(tmp_path / "set") == {"b.png": "lies in no class's folder"}


GOOD = {"a.png": picture(0, ".png"), "a.txt": b"a", "a.json": b"{}"}


@pytest.mark.parametrize(
    ("members", "where", "why"),
    [
        ({**GOOD, "a.jpg": b"x"}, "s.tar/a.jpg", "two samples have the key a"),
        ({**GOOD, "../b.png": b"x"}, "s.tar/../b.png", "leads out of the shard: pack it again with relative names"),
        ({**GOOD, "/etc/b.png": b"x"}, "s.tar//etc/b.png", "leads out of the shard: pack it again with relative names"),
        ({**GOOD, "b.txt": b"x"}, "s.tar/b", "has no picture"),
        ({**GOOD, "b.png": b"x"}, "s.tar/b.png", "has no caption: its .txt is missing or empty"),
        ({**GOOD, "b.png": b"x", "b.txt": b"\xff"}, "s.tar/b.png", "its .txt is not UTF-8"),
        ({**GOOD, "b.png": b"x", "b.json": b"[]"}, "s.tar/b.png", "its .json is no JSON object"),
        ({**GOOD, "b.png": b"x", "b.json": b"{"}, "s.tar/b.png", "its .json is no JSON object"),
        ({**GOOD, "b.png": b"x", "b.json": b"[" * 2**20}, "s.tar/b.png", "its .json is no JSON object"),
        ({**GOOD, "b.txt": bytes(2**20 + 1)}, "s.tar/b.txt", "is larger than 1048576 bytes"),
        (
            {**GOOD, "b.png": b"x", "b.txt": b"b", "b.json": b'{"original_key": "../b"}'},
            "s.tar/b.png",
            "its key ../b leads out of the folder",
        ),
    ],
)
def test_bad_members(tmp_path, members, where, why):
    pack(tmp_path / "s.tar", members)
    assert faults(tmp_path) == {where: why}
    assert list(read_catalogue(tmp_path).splits[""].rows) == ["s.tar/a.png"], "the good sample stays"


def test_members_that_are_no_samples_are_left_alone(tmp_path):
    pack(tmp_path / "s.tar", {**GOOD, "README": b"x", "._a.png": b"x", "a.seg.png": b"x", "a.cls": b"3"})
    assert contents(tmp_path) == {("a", GOOD["a.png"], "a", "", "{}")}


def test_a_link_in_a_shard(tmp_path):
    pack(tmp_path / "s.tar", GOOD)
    with tarfile.open(tmp_path / "s.tar", "a") as tar:
        member = tarfile.TarInfo("b.png")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(member)
    assert faults(tmp_path) == {"s.tar/b.png": "is a link or special file: pack it again with the file itself"}


@pytest.mark.parametrize("rest", ["half a picture", "half a header", "no end mark", "garbage"])
def test_a_shard_that_is_cut_off(tmp_path, rest):
    pack(tmp_path / "s.tar", GOOD | {"b.png": bytes(2000), "b.txt": b"b"})
    whole, start = (tmp_path / "s.tar").read_bytes(), 512 * 6  # behind the three members of a
    kept = {"half a picture": start + 900, "half a header": start + 100, "no end mark": start, "garbage": start}[rest]
    (tmp_path / "s.tar").write_bytes(whole[:kept] + b"garbage" * 100 * (rest == "garbage"))
    found = faults(tmp_path)
    assert "s.tar" in found and found["s.tar"].startswith("is cut off, damaged or compressed after ")
    assert "s.tar/a.png" in read_catalogue(tmp_path).splits[""].rows


def test_a_compressed_shard(tmp_path):
    with tarfile.open(tmp_path / "s.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.png"))
    assert faults(tmp_path)["s.tar"].startswith("is cut off, damaged or compressed after 0 samples")


def test_a_shard_that_vanishes_later(tmp_path):
    pack(tmp_path / "s.tar", GOOD)
    catalogue = read_catalogue(tmp_path)
    (tmp_path / "s.tar").unlink()
    with pytest.raises(UserError, match=r"s\.tar cannot be read \(No such file"):
        catalogue.read("s.tar/a.png")


def test_two_pictures_of_one_name(tmp_path):
    for suffix in (".png", ".jpg"):
        (tmp_path / f"a{suffix}").write_bytes(picture(0, suffix))
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,x\na.jpg,y\n")
    with pytest.raises(UserError, match=r"a\.jpg and a\.png would both be a: rename one of them"):
        convert(tmp_path, tmp_path / "out", "webdataset")


@pytest.mark.parametrize("layout", ["folders", "pairs"])
def test_a_folder_that_would_be_taken_for_a_split(tmp_path, layout):
    pack(tmp_path / "set/train-000000.tar", {f"train/{name}": data for name, data in GOOD.items()})
    assert convert(tmp_path / "set", tmp_path / "metadata", "metadata") == 1
    with pytest.raises(UserError, match=r"train/a\.png: a folder train would be taken for a split: rename it"):
        convert(tmp_path / "set", tmp_path / "out", layout)


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        '{"text": "of no picture"}',
        '{"file_name": "a.png", "key": "../a"}',
        '{"file_name": "a.png", "label": 3}',
        '{"file_name": "a.png", "facts": []}',
    ],
)
def test_a_bad_line_beside_a_layout(sets, line):
    with (sets["folders"] / "extra.jsonl").open("a") as file:
        file.write(line)
    with pytest.raises(
        UserError, match=r"extra\.jsonl: line 8 is no JSON object of file_name, text, label, facts, key"
    ):
        read_catalogue(sets["folders"])


def test_there_must_be_a_data_set(tmp_path):
    with pytest.raises(UserError, match=r"data\.root: .*/nowhere is not a folder"):
        read_catalogue(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"SOURCE: .* has none of the known layouts: metadata\.csv, \.tar shards, pict"):
        convert(tmp_path, tmp_path / "out", "pairs")
    with pytest.raises(UserError, match=r"data\.root: .* holds no pictures in the layout folders"):
        read_catalogue(tmp_path, "folders")


def test_what_is_there_is_not_overwritten(sets, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine")
    with pytest.raises(UserError, match=r"out is there already; choose another --out, or remove it"):
        convert(sets["pairs"], tmp_path / "out", "folders")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_a_conversion_that_fails_leaves_nothing(sets, tmp_path):
    heard = []

    def fail(done: int, total: int) -> None:
        heard.append((done, total, (tmp_path / "out").exists()))
        if done == 3:
            raise KeyboardInterrupt

    before = set(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt):
        convert(sets["pairs"], tmp_path / "out", "webdataset", on_progress=fail)
    assert heard == [(1, 7, False), (2, 7, False), (3, 7, False)]
    assert set(tmp_path.iterdir()) == before

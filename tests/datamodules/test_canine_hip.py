"""Canine hips: the same samples from every layout, the split folders, caption templates, and what is wrong."""

import json
import tarfile
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from datamodules.canine_hip import CanineHip, CanineHipConfig
from datamodules.files.layout_writers import convert
from datamodules.files.layouts import LAYOUTS
from datamodules.phantoms.hip import write_hips
from jobs.run.registry import data_class
from medsynth.errors import UserError

COUNT = 24


@pytest.fixture(scope="module")
def layouts(tmp_path_factory) -> dict[str, Path]:
    """The same phantoms in every layout."""
    folder = tmp_path_factory.mktemp("hips")
    write_hips(folder / "metadata", COUNT, seed=3, size=32, layout="metadata")
    for layout in LAYOUTS[1:]:
        convert(folder / "metadata", folder / layout, layout, shard_size=3)
    return {layout: folder / layout for layout in LAYOUTS}


def hips(root: Path, seed=0, batch_size=1, **config) -> CanineHip:
    config = {"resolution": 16, "workers": 0, "validation_images": 4, **config}
    return CanineHip(CanineHipConfig(root=str(root), **config), seed, batch_size)


def seen(dataset) -> dict[str, torch.Tensor]:
    """Pictures by caption, whatever their order."""
    samples = [dataset[i] for i in range(len(dataset))]
    return {sample.conditions.captions[0]: sample.images[0] for sample in samples}


def test_it_is_in_the_registry():
    assert data_class("canine_hip") is CanineHip
    assert OmegaConf.to_object(OmegaConf.structured(CanineHipConfig(root="x"))).name == "canine_hip"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_samples(layouts, layout):
    facts = json.loads((layouts["pairs"] / "extra.jsonl").read_text().splitlines()[0])["facts"]
    whole = {"caption": "dog {norberg_left} {norberg_right}", "prompt_dropout": 0.0}
    first, second = hips(layouts["metadata"], **whole), hips(layouts[layout], **whole, layout=layout)
    counts = second.check()
    assert counts["pictures"] == COUNT and counts["train pictures"] == COUNT - 4 and counts["test pictures"] == 0
    a, b = (
        {c: r for d in (data.training_set(), data.validation_set()) for c, r in seen(d).items()}
        for data in (first, second)
    )
    assert a.keys() == b.keys() and len(a) == COUNT
    assert f"dog {facts['norberg_left']} {facts['norberg_right']}" in a
    assert all(torch.equal(a[caption], b[caption]) for caption in a)


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_are_trained_on_and_resumed(layouts, workers):
    def data():
        return hips(layouts["webdataset"], batch_size=2, workers=workers)

    undisturbed = list(data().train_dataloader())
    stopped, resumed = data(), data()
    loader = iter(stopped.train_dataloader())
    taken = [next(loader) for _ in range(3)]
    resumed.load_state_dict(stopped.state_dict())
    taken += list(resumed.train_dataloader())[:7]
    assert len(undisturbed) == 10
    for a, b in zip(taken, undisturbed, strict=True):
        assert torch.equal(a.images, b.images) and a.conditions.captions == b.conditions.captions
        assert torch.equal(a.seeds, b.seeds)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_split_folders_are_the_split(layouts, tmp_path, layout):
    for split, seed in (("train", 1), ("validation", 2), ("test", 3)):
        write_hips(tmp_path / split, 3 + seed, seed, size=32, layout=layout)
    data = hips(tmp_path)
    counts = data.check()
    assert [counts[f"{split} pictures"] for split in ("train", "validation", "test")] == [4, 5, 6]
    data.write_split(tmp_path)
    split = json.loads((tmp_path / "split.json").read_text())
    assert all(name.startswith("train/") for name in split["train"]) and len(split["train"]) == 4
    assert all(name.startswith("validation/") for name in split["val"]) and len(split["val"]) == 5
    assert [len(data.reference_set(s)) for s in ("train", "val", "all")] == [4, 5, 9]


def test_train_and_test_folders_alone_split_the_training_pictures(tmp_path):
    for split in ("train", "test"):
        write_hips(tmp_path / split, 6, seed=len(split), size=32, layout="pairs")
    counts = hips(tmp_path).check()
    assert [counts[f"{split} pictures"] for split in ("train", "validation", "test")] == [2, 4, 6]


def test_captions_are_the_pictures_own_unless_there_is_a_template(layouts):
    own = hips(layouts["webdataset"]).all_captions()
    assert any(caption.startswith("ventrodorsal canine pelvic radiograph, left Norberg angle ") for caption in own)
    worded = hips(layouts["folders"], caption="a ventrodorsal pelvic radiograph of a dog, {label}").all_captions()
    assert "a ventrodorsal pelvic radiograph of a dog, normal" in worded
    whole = hips(layouts["pairs"], caption="left {norberg_left:.0f}").all_captions()
    assert all(caption[5:].isdigit() for caption in whole if caption)


def test_a_template_asks_for_what_there_is(layouts):
    with pytest.raises(
        UserError, match=r"24 bad rows.*\n  row 2: data\.caption asks for \{breed\}, which .*\.png does"
    ):
        hips(layouts["metadata"], caption="{breed}").check()
    for template in ("{", "{norberg_left:d}", "{norberg_left.x}", "{}"):
        with pytest.raises(UserError, match=r"data\.caption='.*' is no template for .*\.png: "):
            hips(layouts["metadata"], caption=template).check()


def test_radiographs_are_kept_whole_and_upright(layouts):
    config = CanineHipConfig(root="x")
    assert (config.square, config.flips, config.validation_images) == ("pad", False, 31)


@pytest.mark.parametrize("check", ["all", "headers"])
@pytest.mark.parametrize("layout", ["metadata", "webdataset"])
def test_headers_alone_find_less(layouts, tmp_path, layout, check):
    """A picture whose end is missing has a sound header; one that is no picture has not."""
    for name, keep in (("short", 400), ("none", 4)):
        convert(layouts["pairs"], tmp_path / "pairs" / name, "pairs")
        path = next((tmp_path / "pairs" / name).glob("*.png"))
        path.write_bytes(path.read_bytes()[:keep])
    roots = {name: tmp_path / layout / name for name in ("short", "none")}
    for name, root in roots.items():
        convert(tmp_path / "pairs" / name, root, layout)
    if check == "headers":
        assert hips(roots["short"], check=check).check()["pictures"] == COUNT
    else:
        with pytest.raises(UserError, match=r"1 bad (row|sample) .*\n  .*\.png cannot be decoded"):
            hips(roots["short"], check=check).check()
    with pytest.raises(UserError, match=r"1 bad (row|sample) .*\n  .*\.png is no picture of a known format"):
        hips(roots["none"], check=check).check()
    assert hips(roots["none"], check=check, on_bad="skip").check()["skipped samples"] == 1


def test_a_header_beyond_the_first_bytes_is_found(layouts, tmp_path):
    """A PNG may say much before its pixels."""
    from PIL import Image, PngImagePlugin

    convert(layouts["pairs"], tmp_path / "pairs", "pairs")
    path, notes = next((tmp_path / "pairs").glob("*.png")), PngImagePlugin.PngInfo()
    notes.add_text("notes", "x" * 100_000)
    Image.open(path).save(path, pnginfo=notes)
    convert(tmp_path / "pairs", tmp_path / "shards", "webdataset")
    assert hips(tmp_path / "shards", check="headers").check()["pictures"] == COUNT


def test_skipping_trains_on_what_comes_before_a_cut(layouts, tmp_path):
    convert(layouts["metadata"], tmp_path / "set", "webdataset")
    shard = max((tmp_path / "set").glob("*.tar"), key=lambda path: path.stat().st_size)
    with tarfile.open(shard) as tar:
        middle = tar.getmembers()[len(tar.getmembers()) // 2].offset_data
        before = sum(m.name.endswith(".json") and m.offset_data < middle for m in tar.getmembers())
    shard.write_bytes(shard.read_bytes()[: middle + 1])
    with pytest.raises(UserError, match=rf"set: \d bad samples? .*\n(.*\n)?  {shard.name}: is cut off"):
        hips(tmp_path / "set").check()
    counts = hips(tmp_path / "set", on_bad="skip").check()
    assert before <= counts["pictures"] < COUNT and counts["skipped samples"] >= 1


def test_fingerprint_counts_the_bytes_in_shards(layouts, tmp_path):
    convert(layouts["webdataset"], tmp_path / "pairs", "pairs")
    for path in (tmp_path / "pairs").glob("*.png"):
        path.write_bytes(path.read_bytes() + b"more")
    convert(tmp_path / "pairs", tmp_path / "shards", "webdataset", shard_size=3)
    before, after = hips(layouts["webdataset"]), hips(tmp_path / "shards")
    assert before.check() == after.check() and before.all_captions() == after.all_captions()
    assert before.fingerprint() != after.fingerprint()


def test_fingerprint(layouts):
    prints = {layout: hips(root).fingerprint() for layout, root in layouts.items()}
    assert len({prints["metadata"], prints["folders"], prints["webdataset"]}) == 3, "names differ between layouts"
    assert prints["metadata"] == prints["pairs"], "the same files with the same captions"
    assert hips(layouts["webdataset"]).fingerprint() == prints["webdataset"]
    assert hips(layouts["webdataset"], caption="{label}").fingerprint() != prints["webdataset"]
    assert hips(layouts["webdataset"], square="crop").fingerprint() != prints["webdataset"]

"""Cytology phantoms: cells whose nuclei and cytoplasm are where the truth says, on the disk once and whole."""

import json
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from datamodules.cytology import Cytology, CytologyConfig
from datamodules.phantoms.cytology import render, write_cytology
from datamodules.phantoms.cytology_scene import CLASSES, CYTOPLASM, NUCLEUS, CytologyScene, draw_scene
from jobs.prepare import main as prepare
from medsynth.errors import UserError


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("phantoms") / "set"
    assert write_cytology(out, images=12, seed=3, size=64)
    return out


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def scenes(label: str, count: int = 6) -> list[CytologyScene]:
    return [draw_scene(label, np.random.default_rng((9, index))) for index in range(count)]


# What is drawn


def test_no_two_classes_share_a_ratio_of_nucleus_and_cell():
    bounds = sorted(kind.ratio for kind in CLASSES.values())
    assert all(one[1] < other[0] for one, other in pairwise(bounds))
    for label, kind in CLASSES.items():
        for scene in scenes(label):
            assert all(kind.ratio[0] <= cell.ratio <= kind.ratio[1] for cell in scene.cells)


@pytest.mark.parametrize("label", CLASSES)
def test_the_mask_tells_the_class_by_the_areas_of_a_whole_cell(label):
    for scene in scenes(label):
        alone = CytologyScene(label, scene.cells[:1], 1, 0, 1, 0).mask(256)  # the first lies in the middle
        nucleus, cell = (alone == NUCLEUS).sum(), (alone > 0).sum()
        # The outline's harmonics add a little to the area of a circle.
        assert np.sqrt(nucleus / cell) == pytest.approx(scene.cells[0].ratio, rel=0.08)


@pytest.mark.parametrize("label", CLASSES)
def test_nuclei_and_cytoplasm_are_seen_where_the_mask_has_them(label):
    for scene in scenes(label, 3):
        picture, mask = render(scene, 128).astype(float), scene.mask(128)
        inside = {value: picture[mask == value].mean(axis=0) for value in (0, CYTOPLASM, NUCLEUS)}
        assert (inside[0] > 200).all()
        assert inside[0][1] - inside[CYTOPLASM][1] > 40  # eosin takes green
        assert inside[CYTOPLASM][0] - inside[NUCLEUS][0] > 60  # the nuclei's stain takes red
        seen = picture[..., 0] < (inside[CYTOPLASM][0] + inside[NUCLEUS][0]) / 2
        overlap = (seen & (mask == NUCLEUS)).sum() / (seen | (mask == NUCLEUS)).sum()
        assert overlap > 0.8


def test_a_picture_shows_the_same_at_another_size():
    scene = scenes("atypia", 1)[0]
    large = torch.from_numpy(render(scene, 256)).permute(2, 0, 1).float()[None]
    small = torch.from_numpy(render(scene, 64)).permute(2, 0, 1).float()[None]
    assert (torch.nn.functional.avg_pool2d(large, 4) - small).abs().mean() < 6


# The set


def test_the_set_has_what_its_description_says(written: Path):
    names = [f"{label}/{label}-{index:06}.png" for index, label in enumerate([*CLASSES] * 3)]
    assert set(files(written)) == {*names, "style_filewords.txt", "truth.json", "phantom.json"}
    truth = json.loads((written / "truth.json").read_text())
    assert [entry["name"] for entry in truth] == names
    scene = draw_scene("atypia", np.random.default_rng((3, 0)))
    assert truth[0]["truth"] == scene.truth(64)
    mask = scene.mask(64)
    assert truth[0]["truth"]["nucleus"] == (mask == NUCLEUS).mean()
    assert truth[0]["truth"]["cytoplasm"] == (mask == CYTOPLASM).mean()
    with Image.open(written / names[0]) as picture:
        assert np.array_equal(np.asarray(picture), render(scene, 64))


def test_it_is_a_data_set_of_four_classes(written: Path):
    data = Cytology(CytologyConfig(root=str(written), resolution=32, validation_images=4, workers=0))
    found = data.check()
    assert [found[f"pictures of {label}"] for label in CLASSES] == [3, 3, 3, 3]
    assert data.split_facts()["classes"] == list(CLASSES)
    assert data.notes() == [note for note in data.notes() if note.endswith("has no picture that trains")]
    training = data.training_set()
    labels = Counter(training.sample(0, index).label for index in range(len(training)))
    assert len(set(labels.values())) == 1
    assert "a stained smear of carcinoma, cytology" in data.all_captions()


def test_same_seed_gives_the_same_bytes_however_many_there_are(written: Path, tmp_path: Path):
    write_cytology(tmp_path / "few", images=5, seed=3, size=64)
    many, few = files(written), files(tmp_path / "few")
    assert len(few) == 8
    assert all(few[name] == many[name] for name in few if name.endswith(".png"))
    write_cytology(tmp_path / "other", images=5, seed=4, size=64)
    assert all(content != many[name] for name, content in files(tmp_path / "other").items() if name.endswith(".png"))


def test_the_very_same_set_is_left_as_it_is_and_no_other_is_written_over(written: Path):
    before = files(written)
    assert write_cytology(written, images=12, seed=3, size=64) is False
    for change in ({"images": 11}, {"seed": 4}, {"size": 65}):
        with pytest.raises(UserError, match=f"{re.escape(str(written))}: holds something other.*choose another --out"):
            write_cytology(written, **({"images": 12, "seed": 3, "size": 64} | change))
    assert files(written) == before


def test_the_command(tmp_path: Path):
    arguments = ["phantom", "cytology", "--out", str(tmp_path / "set"), "--images", "4", "--size", "32"]
    printed = [CliRunner().invoke(prepare, arguments, catch_exceptions=False).output for _ in range(2)]
    assert "4 pictures and their prompts in" in printed[0]
    assert "holds these 4 pictures already" in printed[1]

"""Chest phantoms: the files, and that captions and masks are true of the scenes and the pixels."""

import csv
import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datamodules.chest_xray import ChestXRay, ChestXRayConfig
from datamodules.files.dicom import read_dicom
from datamodules.phantoms.chest import render, write_chest
from datamodules.phantoms.chest_scene import RADII, ChestScene, Nodule, draw_scene
from medsynth.errors import UserError


def scenes(count: int, seed: int = 7) -> list[ChestScene]:
    return [draw_scene(np.random.default_rng((seed, index))) for index in range(count)]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("phantoms") / "deeper" / "set"
    assert write_chest(out, images=12, seed=3, size=64, dicom=True)
    return out


# Files


def test_layout(written: Path):
    names = [f"phantom-{index:06}" for index in range(12)]
    with (written / "captions.csv").open(newline="", encoding="utf-8") as file:
        assert [row["Filename"] for row in csv.DictReader(file)] == names
    suffixes = Counter(path.suffix for path in (written / "images").iterdir())
    assert suffixes == {".png": 8, ".dcm": 4}
    modes = Counter(Image.open(path).mode for path in (written / "images").glob("*.png"))
    assert modes == {"L": 4, "I;16": 4}
    for name in names:
        with Image.open(written / "masks" / f"{name}.png") as mask:
            assert (mask.mode, mask.size) == ("L", (64, 64)) and set(np.unique(mask)) <= {0, 255}


def test_it_is_a_data_set(written: Path):
    config = ChestXRayConfig(root=str(written), resolution=32, validation_images=2, workers=0, controls=["mask"])
    data = ChestXRay(config)
    assert data.check()["pictures"] == 12
    row = data.training_set()[0]
    assert row.images.shape == (1, 3, 32, 32) and row.conditions.control.shape == (1, 1, 32, 32)


def test_dicom_files_show_the_rendered_scene(written: Path):
    for index in (2, 5):  # the second is MONOCHROME1
        grey = render(draw_scene(np.random.default_rng((3, index))), 64)
        shown = read_dicom(written / "images" / f"phantom-{index:06}.dcm", 10**6)[0].numpy()
        assert np.abs(shown - 255 * grey).max() <= 1
    assert b"MONOCHROME1" in (written / "images" / "phantom-000005.dcm").read_bytes()


def test_same_seed_gives_the_same_bytes(written: Path, tmp_path: Path):
    write_chest(tmp_path / "again", images=12, seed=3, size=64, dicom=True)
    assert files(tmp_path / "again") == files(written)


def test_a_picture_does_not_depend_on_how_many_there_are(written: Path, tmp_path: Path):
    write_chest(tmp_path / "few", images=6, seed=3, size=64, dicom=True)
    many, few = files(written), files(tmp_path / "few")
    pictures = [name for name in few if "/" in name]
    assert len(pictures) == 12 and all(few[name] == many[name] for name in pictures)
    assert many["captions.csv"].startswith(few["captions.csv"])


def test_another_seed_gives_other_pictures(written: Path, tmp_path: Path):
    write_chest(tmp_path / "other", images=3, seed=4, size=64, dicom=True)
    many, other = files(written), files(tmp_path / "other")
    assert all(other[name] != many[name] for name in other if name.startswith("images/"))


def test_the_very_same_set_is_left_as_it_is(written: Path):
    before, drawn = files(written), []
    assert write_chest(written, images=12, seed=3, size=64, dicom=True, progress=drawn.append) is False
    assert drawn == [] and files(written) == before


@pytest.mark.parametrize("change", [{"images": 11}, {"seed": 4}, {"size": 65}, {"dicom": False}])
def test_another_set_is_not_overwritten(written: Path, change: dict):
    message = f"{re.escape(str(written))}: holds something other.*choose another --out, or remove"
    with pytest.raises(UserError, match=message):
        write_chest(written, **({"images": 12, "seed": 3, "size": 64, "dicom": True} | change))


def test_a_set_with_a_missing_file_is_named(tmp_path: Path):
    write_chest(tmp_path / "set", images=2, seed=0, size=48)
    (tmp_path / "set" / "masks" / "phantom-000001.png").unlink()
    with pytest.raises(UserError, match=r"masks/phantom-000001.png is missing.*remove it to draw the phantoms again"):
        write_chest(tmp_path / "set", images=2, seed=0, size=48)


def test_an_interrupted_call_leaves_nothing(tmp_path: Path):
    def interrupt(done: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_chest(tmp_path / "set", images=3, seed=0, size=48, progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/set: cannot be read or written .*choose another --out"):
        write_chest(tmp_path / "file" / "set", images=1, seed=0, size=48)


@pytest.mark.parametrize("wrong", [{"images": 0}, {"seed": -1}, {"size": 47}])
def test_numbers_out_of_range_are_refused(tmp_path: Path, wrong: dict[str, int]):
    with pytest.raises(UserError, match="give images >= 1, size >= 48 and seed >= 0"):
        write_chest(tmp_path / "set", **({"images": 1, "seed": 0, "size": 48} | wrong))


# Captions


def test_captions_say_number_and_sides():
    scene = scenes(1)[0]

    def caption(*places: float) -> str:
        return replace(scene, nodules=tuple(Nodule(x, 0.4, 0.03, 0.3, 0) for x in places)).caption()

    assert caption() == "chest X-ray without lung nodules"
    assert caption(0.3) == "chest X-ray with 1 lung nodule in the right lung"
    assert caption(0.7, 0.8) == "chest X-ray with 2 lung nodules in the left lung"
    assert caption(0.7, 0.3, 0.8) == "chest X-ray with 3 lung nodules, 1 in the right lung and 2 in the left lung"


def test_captions_are_true_of_the_masks(written: Path):
    """Nodules counted as the connected parts of the mask, sides by where these lie."""
    from scipy.ndimage import center_of_mass, label

    for entry in json.loads((written / "truth.json").read_text()):
        parts, count = label(np.asarray(Image.open(written / "masks" / f"{entry['name']}.png")))
        left = sum(x > 31.5 for _, x in center_of_mass(parts, parts, range(1, count + 1))) if count else 0
        said = [int(n) for n in re.findall(r"\d+", entry["caption"])]
        if not count:
            assert entry["caption"] == "chest X-ray without lung nodules"
        elif 0 < left < count:
            assert said == [count, count - left, left]
        else:
            assert said == [count] and f"in the {'left' if left else 'right'} lung" in entry["caption"]


def test_what_is_drawn_is_as_common_as_documented():
    drawn = scenes(600)
    counts = Counter(len(scene.nodules) for scene in drawn)
    shares = {count: counts[count] / 600 for count in range(4)}
    assert shares == pytest.approx({0: 0.20, 1: 0.45, 2: 0.23, 3: 0.12}, abs=0.06)
    assert np.mean([scene.breast > 0 for scene in drawn]) == pytest.approx(0.4, abs=0.06)
    assert {nodule.side for scene in drawn for nodule in scene.nodules} == {"left", "right"}


# Pixels


@pytest.mark.parametrize("size", [64, 256])
def test_the_mask_is_where_the_picture_changes(size: int):
    """The same scene without its nodules differs inside the mask, and within a pixel of it at most."""
    from scipy.ndimage import binary_dilation

    for scene in [s for s in scenes(12) if s.nodules][: 640 // size]:
        change = render(scene, size) - render(replace(scene, nodules=()), size)
        mask = scene.mask(size) > 0
        assert np.abs(change[~binary_dilation(mask, np.ones((3, 3)))]).max() < 1e-6
        assert (change[mask] > 0).mean() > 0.97 and change[mask].mean() > 0.03
        for nodule in scene.nodules:
            one = replace(scene, nodules=(nodule,)).mask(size) > 0
            assert one.any() and change[one].max() > 0.08


def test_no_nodule_is_too_small_for_a_pixel():
    smallest = [Nodule(0.3 + 0.0007 * i, 0.4 + 0.0003 * i, RADII[0], 0.3, i) for i in range(300)]
    scene = scenes(1)[0]
    assert all(replace(scene, nodules=(nodule,)).mask(48).any() for nodule in smallest)


def test_nodules_lie_in_the_lungs_apart_from_each_other():
    for scene in scenes(30):
        bare = render(replace(scene, nodules=(), contrast=1.0, exposure=0.0), 64)
        for i, nodule in enumerate(scene.nodules):
            around = replace(scene, nodules=(replace(nodule, radius=1.2 * nodule.radius),)).mask(64) > 0
            assert bare[around].mean() < 0.6  # air is dark, all else is above
            assert all(np.hypot(nodule.x - o.x, nodule.y - o.y) > nodule.radius + o.radius for o in scene.nodules[:i])


def test_anatomy():
    """Lungs are darker than heart, spine and liver; the background is black; the heart lies to the patient's left."""
    for scene in scenes(8):
        picture = render(replace(scene, nodules=(), contrast=1.0, exposure=0.0), 128)

        def mean(x: float, y: float, picture=picture) -> float:
            row, column = round(128 * y), round(128 * x)
            return picture[row - 3 : row + 4, column - 3 : column + 4].mean()

        lungs = [mean(0.25, 0.5), mean(0.78, 0.45)]
        dense = [mean(0.5, 0.55), mean(0.5 + 0.07 * scene.heart, scene.dome - 0.105), mean(0.3, 0.95)]
        assert max(lungs) + 0.15 < min(dense)
        assert mean(0.05, 0.03) < 0.15 and mean(0.95, 0.03) < 0.15
        row = picture[round(128 * (scene.dome - 0.105))]
        assert row[70:85].mean() > row[43:58].mean() - 0.1 and row[76:86].mean() > row[42:52].mean()


@pytest.mark.parametrize("size", [48, 65, 300])
def test_render_is_grey_in_range_and_repeats(size: int):
    scene = scenes(1)[0]
    picture = render(scene, size)
    assert picture.shape == (size, size) and picture.dtype == np.float32
    assert 0 <= picture.min() < 0.2 and 0.7 < picture.max() <= 1
    assert np.array_equal(picture, render(scene, size))


def test_a_scene_looks_the_same_at_any_size():
    for scene in scenes(3):
        small, large = render(scene, 64), render(scene, 256).reshape(64, 4, 64, 4).mean(axis=(1, 3))
        assert np.abs(small - large).mean() < 0.03

"""Pictures with masks: what lies beside them stays aligned, and every fault has its line."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torchvision.transforms.v2 import functional as F

from datamodules.canine_hip import CanineHip, CanineHipConfig
from datamodules.chest_xray import ChestXRay, ChestXRayConfig
from datamodules.files.control import canny
from datamodules.files.depth import depth_estimator
from datamodules.files.dicom import stretch
from datamodules.files.images import Geometry, crop_square, read_rgb
from datamodules.files.layout_writers import convert
from datamodules.phantoms.chest import write_chest, write_dicom
from jobs.scoring.folders import Reading, ScoredFolder
from medsynth.errors import UserError
from tests.dicom_files import dicom

DATA = Path(__file__).parents[3] / "shared" / "data"
ALL = ["canny", "depth", "mask", "picture"]


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def blobs(index: int, height: int, width: int) -> np.ndarray:
    """Smooth noise of full contrast, uint8 (height, width)."""
    coarse = np.random.default_rng(index).uniform(0, 1, (6, 9)).astype(np.float32)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    return np.rint(255 * (smooth - smooth.min()) / np.ptp(smooth)).astype(np.uint8)


def write_set(root: Path, pictures=5, height=40, width=64, captions=None) -> Path:
    """Pictures p0.png …, each with the mask of its pixels above 127 and its inverse as depth map."""
    for index in range(pictures):
        pixels = blobs(index, height, width)
        save(root / "images" / f"p{index}.png", pixels)
        save(root / "masks" / f"p{index}.png", np.where(pixels > 127, 255, 0).astype(np.uint8))
        save(root / "depth" / f"p{index}.png", (65535 - 257 * pixels.astype(np.uint16)).astype(np.uint16))
    if captions:
        (root / "captions.csv").write_text("\n".join(["Filename,Prompt", *captions]) + "\n")
    return root


def chest(root: Path, seed=0, batch_size=1, **config) -> ChestXRay:
    config = {"resolution": 32, "workers": 0, "validation_images": 1, "prompt_dropout": 0.0, **config}
    return ChestXRay(ChestXRayConfig(root=str(root), **config), seed, batch_size)


def equal(first, second) -> bool:
    return (
        torch.equal(first.images, second.images)
        and torch.equal(first.conditions.control, second.conditions.control)
        and first.conditions.captions == second.conditions.captions
        and torch.equal(first.seeds, second.seeds)
    )


# Samples


@pytest.mark.parametrize(("square", "resolution", "slack"), [("crop", 40, 0.0), ("crop", 32, 0.15), ("pad", 32, 0.2)])
def test_what_lies_beside_a_picture_stays_aligned(tmp_path, square, resolution, slack):
    """Under random crops and flips the mask is still the picture's threshold, the depth its inverse.

    At 40, the pictures' height, nothing is resampled and all is exact.
    """
    config = {"resolution": resolution, "square": square, "prompt_dropout": 1.0, "flips": True}
    data = chest(write_set(tmp_path), controls=ALL, **config)
    samples, views = data.training_set(), set()
    for position in range(60):
        row = samples[position]
        picture, control = row.images[0], row.conditions.control[0]
        edges, depth, mask, itself = control.split([1, 1, 1, 3])
        grey, inside = picture[:1], slice(6, 26) if square == "pad" else slice(None)  # between the black bars
        clear = ((grey - 0.5).abs() >= slack)[:, inside]
        assert clear.float().mean() > 0.3
        assert torch.equal((grey > 0.5)[:, inside][clear], (mask > 0.5)[:, inside][clear])
        assert (1 - depth - grey)[:, inside].abs().max() < 1e-6 + slack / 2
        assert torch.equal(itself, picture)
        assert torch.equal(edges, canny((picture * 255).round().byte(), 30, 60, 1.5))
        views.add(tuple(mask.flatten().tolist()))
    assert len(views) > 12  # 4 pictures, 4 flips, and places


def test_jitter_leaves_the_control_as_it_is(tmp_path):
    write_set(tmp_path)
    still = chest(tmp_path, controls=ALL).training_set()
    varied = chest(tmp_path, controls=ALL, brightness=0.5, contrast=0.5).training_set()
    for position in range(8):
        assert not torch.equal(still[position].images, varied[position].images)
        assert torch.equal(still[position].conditions.control, varied[position].conditions.control)


def test_a_sample_is_a_function_of_seed_pass_and_index(tmp_path):
    config = {"controls": ["canny", "mask"], "canny_low": [20, 60], "canny_high": [80, 300], "canny_blur": [0, 2]}
    root = write_set(tmp_path, height=40, width=40)  # square: passes differ by what the edges' ranges draw alone
    samples, again = chest(root, seed=3, **config).training_set(), chest(root, seed=3, **config).training_set()
    other = chest(root, seed=4, **config).training_set()
    assert all(equal(samples[p], again[p]) for p in reversed(range(12)))
    assert not any(torch.equal(samples[p].conditions.control, other[p].conditions.control) for p in range(12))
    for pass_, index in ((0, 2), (3, 1)):
        whole, rest = samples.sample(pass_, index), samples.without_picture(pass_, index)
        assert rest.picture is None and torch.equal(whole.control, rest.control)
    edges = {tuple(samples.sample(pass_, 0).control[0].flatten().tolist()) for pass_ in range(6)}
    assert len(edges) == 6


def test_workers_read_the_same(tmp_path):
    write_set(tmp_path)
    alone, shared = (list(chest(tmp_path, controls=ALL, workers=w).train_dataloader()) for w in (0, 1))
    assert len(alone) == 4 and all(equal(a, b) for a, b in zip(alone, shared, strict=True))


def test_a_mask_alone_reads_no_picture(tmp_path):
    data = chest(write_set(tmp_path))
    samples, validation = data.training_set(), data.validation_set()
    for path in (tmp_path / "images").iterdir():
        path.write_bytes(b"")
    assert samples.without_picture(0, 0).control.shape == (1, 32, 32)
    assert validation.without_picture(0).control.shape == (1, 32, 32)


def test_edges_outside_of_training_take_the_middle_of_their_ranges(tmp_path):
    data = chest(write_set(tmp_path), controls=["canny"], canny_low=[50, 150], canny_high=[150, 250], canny_blur=[0, 2])
    row = data.validation_set()[0]
    assert torch.equal(row.conditions.control[0], canny((row.images[0] * 255).round().byte(), 100, 200, 1.0))


def test_grey_levels_of_classes_stay(tmp_path):
    write_set(tmp_path)
    levels = np.array([0, 85, 170, 255], np.uint8).repeat(16)[None].repeat(40, axis=0)
    for name in (f"p{i}.png" for i in range(5)):
        save(tmp_path / "masks" / name, levels)
    mask = chest(tmp_path, resolution=29).training_set()[0].conditions.control
    assert set(mask.unique().tolist()) <= set((torch.arange(4) / 3).tolist())
    for name in (f"p{i}.png" for i in range(5)):
        save(tmp_path / "masks" / name, levels // 85)
    assert torch.equal(chest(tmp_path, resolution=29, mask_max=3).training_set()[0].conditions.control, mask)


def test_an_empty_mask_is_a_mask(tmp_path):
    write_set(tmp_path)
    save(tmp_path / "masks" / "p0.png", np.zeros((40, 64), bool))
    data = chest(tmp_path)
    assert data.check()["pictures"] == 5
    assert any(data.training_set().sample(0, i).control.sum() == 0 for i in range(4))


def test_evaluation_asks_with_the_masks_of_the_validation_pictures(tmp_path):
    captions = [f"p{index},picture {index}" for index in range(5)]
    data = chest(write_set(tmp_path, captions=captions), validation_images=2, controls=["canny", "mask"])
    asked, rows = data.evaluation_conditions(4), list(data.val_dataloader())
    known = {row.conditions.captions[0]: row.conditions.control[0] for row in rows}
    assert asked.control.shape == (4, 2, 32, 32) and set(asked.captions) == set(known)
    assert all(torch.equal(known[c], control) for c, control in zip(asked.captions, asked.control, strict=True))
    reference = data.reference_set("val")
    assert all(torch.equal((row.images[0] * 255).round().byte(), reference[i]) for i, row in enumerate(rows))


def test_captions_and_the_default(tmp_path):
    write_set(tmp_path, captions=["p0,first", "p0.png,second", "p3,third"])
    data = chest(tmp_path)
    counts = data.check()
    assert (counts["pictures"], counts["pairs"], counts["prompts"]) == (5, 6, 4)
    assert data.all_captions() == ["", "chest X-ray with lung nodules", "first", "second", "third"]
    (tmp_path / "captions.csv").rename(tmp_path / "other.csv")
    assert chest(tmp_path, prompt="a shadow").all_captions() == ["", "a shadow"]
    assert chest(tmp_path, captions="other.csv").all_captions() == data.all_captions()


def test_without_controls_there_are_no_masks_to_miss(tmp_path):
    for path in (write_set(tmp_path) / "masks").iterdir():
        path.unlink()
    assert chest(tmp_path, controls=[]).training_set()[0].conditions.control is None
    assert chest(tmp_path, controls=["canny"]).check()["pictures"] == 5


# Deep pictures


def test_deep_pictures(tmp_path):
    write_set(tmp_path, 3)
    values = (300 + 10 * blobs(7, 40, 64).astype(np.uint16)).astype(np.uint16)
    for index in range(3):
        (tmp_path / "images" / f"p{index}.png").unlink()
        save(tmp_path / "images" / f"p{index}.tif", values)

    def reference(**config):
        return chest(tmp_path, resolution=40, **config).reference_set("all")[0][0]

    centre = slice(12, 52)
    assert torch.equal(reference(), torch.from_numpy(np.rint(255 * stretch(values)).astype(np.uint8))[:, centre])
    windowed = ((values[:, centre] - 1499.5) / 2399 + 0.5).clip(0, 1)
    assert torch.equal(reference(window=[1500, 2400]), torch.from_numpy(np.rint(255 * windowed).astype(np.uint8)))
    ranged = np.round(values[:, centre] / 257).astype(np.uint8)
    assert torch.equal(reference(sixteen_bit="range"), torch.from_numpy(ranged))
    for index in range(3):
        (tmp_path / "images" / f"p{index}.tif").unlink()
        write_dicom(tmp_path / "images" / f"p{index}.dcm", values, str(index), inverted=index == 1)
    data = chest(tmp_path, resolution=40)
    shown = torch.from_numpy(np.rint(255 * ((values[:, centre] - 300.0) / 3400)).astype(np.uint8))
    assert all((r[0].int() - shown).abs().max() <= 1 for r in (data.reference_set("all")[i] for i in range(3)))
    assert chest(tmp_path, check="headers").check()["pictures"] == 3


@pytest.mark.parametrize("byteorder", ["<", ">"])
def test_16_bit_tiff_of_either_byte_order_is_mask_picture_and_depth(tmp_path, byteorder):
    """As ImageJ writes them, big-endian."""
    write_set(tmp_path, 3)
    for index in range(3):
        pixels = blobs(index, 40, 64).astype(np.uint16)
        files = {"images": 257 * pixels, "masks": np.where(pixels > 127, 65535, 0), "depth": 65535 - 257 * pixels}
        for folder, values in files.items():
            (tmp_path / folder / f"p{index}.png").unlink()
            file = tmp_path / folder / f"p{index}.tif"
            tifffile.imwrite(file, values.astype(np.uint16), byteorder=byteorder, metadata=None)
    data = chest(tmp_path, resolution=40, controls=["depth", "mask"], sixteen_bit="full", mask_max=65535)
    row = data.validation_set()[0]
    grey, (depth, mask) = row.images[0, 0], row.conditions.control[0]
    assert torch.equal(grey > 0.5, mask == 1) and (1 - depth - grey).abs().max() < 1e-6


def shown(data: ChestXRay, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    pictures, geometry = data._contents.pictures, Geometry(32)
    return pictures.squared(name, geometry), pictures.control(name, geometry, lambda: None, None)


@pytest.mark.parametrize("check", ["all", "headers"])
def test_pictures_masks_and_depth_maps_on_their_side(tmp_path, check):
    """What stands upright and what lies on its side are the same samples, whatever the format and the depth."""
    write_set(tmp_path / "upright", 3)
    turned = Image.Exif()
    turned[0x0112] = 6
    for path in sorted((tmp_path / "upright").rglob("*.png")):
        lying = tmp_path / "lying" / path.relative_to(tmp_path / "upright")
        lying.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(np.rot90(np.asarray(Image.open(path))).copy())
        if lying.parent.name == "images":
            image.save(lying.with_suffix(".tif"), tiffinfo={274: 6})
        else:
            image.save(lying, exif=turned)
    config = {"controls": ["depth", "mask"], "check": check}
    sets = [chest(tmp_path / folder, **config) for folder in ("upright", "lying")]
    for names in zip(*(data.reference_set("all").names for data in sets), strict=True):
        (picture, control), other = (shown(data, name) for data, name in zip(sets, names, strict=True))
        assert torch.equal(picture, other[0]) and torch.equal(control, other[1])
    sideways = np.asarray(Image.open(tmp_path / "upright/masks/p0.png")).T
    save(tmp_path / "lying/masks/p0.png", sideways.copy())
    said = faults(chest(tmp_path / "lying", **config))[1]
    assert "masks/p0.png is 40x64, its picture 64x40, of another shape" in said


@pytest.mark.parametrize("check", ["all", "headers"])
@pytest.mark.parametrize("border", [False, True])
def test_classes_are_not_taken_for_greys(tmp_path, check, border):
    write_set(tmp_path)
    classes = (np.arange(40 * 64) % 21).astype(np.uint8).reshape(40, 64)
    if border:
        classes[0] = 255
    for index in range(5):
        save(tmp_path / "masks" / f"p{index}.png", classes)
    found = faults(chest(tmp_path, check=check))
    said = f"data.mask_max=255: the masks' levels are 1, 2, 3, …, 20 (as in {tmp_path}/masks/p0.png)"
    said += f" beside 255 (as in {tmp_path}/masks/p0.png): these are classes with a border" * border
    assert len(found) == 1 and found[0].startswith(said)
    for index in range(5):
        save(tmp_path / "masks" / f"p{index}.png", classes % 255)
    control = chest(tmp_path, check=check, mask_max=20).training_set()[0].conditions.control
    assert control.max() == 1
    if border:
        save(tmp_path / "masks" / "p0.png", classes)
        said = "reaches 255 where data.mask_max=20: set it to the masks' greatest value; if it marks a border"
        assert said in faults(chest(tmp_path, mask_max=20))[1]


def test_a_score_and_training_each_read_a_large_jpeg_their_way(tmp_path):
    """References are decoded whole, as `medsynth evaluate` reads them; training takes what a fraction gives."""
    for index in range(2):
        (tmp_path / "images").mkdir(exist_ok=True)
        coarse = np.random.default_rng(index).integers(0, 256, (64, 64, 3), np.uint8)
        Image.fromarray(coarse).resize((512, 512)).save(tmp_path / "images" / f"p{index}.jpg", quality=95)
    data = chest(tmp_path, controls=[])
    whole = [crop_square(read_rgb(tmp_path / f"images/p{i}.jpg", 10**6), 32) for i in range(2)]
    references, real = data.reference_set("all"), ScoredFolder(tmp_path / "images", Reading(32))
    assert all(torch.equal(references[i], whole[i]) and torch.equal(real[i], whole[i]) for i in range(2))
    small = data.validation_set()[0].images[0] * 255
    index = int(data.validation_set().pairs[0].picture[1])
    assert (small - whole[index]).abs().max() > 1 and (small - whole[index]).abs().mean() < 2


def test_evaluate_reads_a_chest_set_as_the_data_set_does(tmp_path):
    write_chest(tmp_path / "set", images=12, seed=0, size=48, dicom=True)
    data = chest(tmp_path / "set", resolution=48)
    references = data.reference_set("all")
    found = ScoredFolder(tmp_path / "set" / "images", Reading(sixteen_bit="window"))
    assert len(found) == len(references) == 12
    assert all(torch.equal(found[i], references[i]) for i in range(12))
    plain = ScoredFolder(tmp_path / "set" / "images", Reading())
    said = []
    for index in range(12):
        try:
            plain[index]
        except UserError as error:
            said.append(str(error))
    assert len(said) == 4, "16-bit files of 12 bits; DICOM says itself what it shows"
    assert re.search(r"phantom-0+\d\.png has 16 bits but no value above \d+ of 65535, .*--sixteen-bit", said[0])


def test_a_window_is_of_colours_too_percentiles_are_not(tmp_path):
    colours = np.stack([np.arange(64), np.arange(64) * 10, np.full(64, 4095)], axis=1).astype(np.uint16)
    (tmp_path / "images").mkdir()
    for index in range(2):
        tifffile.imwrite(tmp_path / f"images/p{index}.tif", colours.reshape(8, 8, 3), photometric="rgb")
    assert "has 16 bits but no value above 4095" in faults(chest(tmp_path, controls=[]))[1]
    picture = chest(tmp_path, controls=[], window=[2048, 4096], resolution=8).reference_set("all")[0]
    assert np.array_equal(picture.permute(1, 2, 0), np.rint(colours / 4095 * 255).astype(np.uint8).reshape(8, 8, 3))


@pytest.mark.parametrize(("config", "grey"), [({"sixteen_bit": "range"}, 16), ({"window": [2048, 4096]}, 255)])
def test_every_data_set_says_how_its_16_bits_are_shown(tmp_path, config, grey):
    """Out of files and out of shards."""
    values = np.array([[0, 4095], [0, 4095]], np.uint16)
    for index in range(3):
        save(tmp_path / "files" / f"p{index}.png", values)
        (tmp_path / "files" / f"p{index}.txt").write_text(f"picture {index}")
    convert(tmp_path / "files", tmp_path / "shards", "webdataset")
    usual = {"square": "crop", "resolution": 2, "validation_images": 1, "workers": 0}
    for folder in ("files", "shards"):
        usual["root"] = str(tmp_path / folder)
        data = CanineHip(CanineHipConfig(**usual, **{"sixteen_bit": "window", **config}))
        assert data.reference_set("all")[0].unique().tolist() == [0, grey]
        with pytest.raises(UserError, match=r"p0\.png has 16 bits but no value above 4095.*data\.sixteen_bit=window"):
            CanineHip(CanineHipConfig(**usual)).check()
    with pytest.raises(UserError, match=r"^data\.window=\[5\.0, 9\.0\]: shows nothing without data\.sixteen_bit"):
        CanineHipConfig(window=[5.0, 9.0])


@pytest.mark.parametrize("check", ["all", "headers"])
def test_dicom_is_checked_as_it_is_shown(tmp_path, check):
    """By the header alone, too; where pixels are not square, a mask has the shape that is shown."""
    values = np.arange(40 * 64, dtype=np.uint16).reshape(40, 64)
    (tmp_path / "images").mkdir()
    for name, elements in {"good": {}, "high": {"PixelSpacing": [0.2, 0.1]}, "width": {"WindowWidth": 0}}.items():
        window = {"WindowCenter": 1000, "WindowWidth": 2000}
        dicom(tmp_path / "images" / f"{name}.dcm", values, **window | elements)
        save(tmp_path / "masks" / f"{name}.png", np.zeros((40, 64), np.uint8))
    with pytest.raises(UserError) as error:
        chest(tmp_path, check=check).check()
    assert [line.partition(": ")[2].removeprefix(f"{tmp_path}/") for line in str(error.value).splitlines()[1:3]] == [
        "masks/high.png is 64x40, as its picture's pixels are, which are not square: stretch it to 64x80, as the "
        "picture is shown",
        "images/width.dcm has WindowWidth 0, which must be at least 1: correct it, or delete it (`dcmodify "
        "-ea WindowCenter -ea WindowWidth`)",
    ]
    save(tmp_path / "masks" / "high.png", np.zeros((80, 64), np.uint8))
    assert chest(tmp_path, check=check, on_bad="skip").check()["pictures"] == 2


# Faults


def faults(data: ChestXRay) -> list[str]:
    with pytest.raises(UserError) as error:
        data.check()
    return str(error.value).splitlines()


def test_one_message_lists_every_fault(tmp_path):
    write_set(tmp_path, 9, captions=["p0,x", "gone,x", "p1,"])
    (tmp_path / "masks" / "p2.png").unlink()
    save(tmp_path / "masks" / "p3.png", np.zeros((20, 32), np.uint8))
    save(tmp_path / "masks" / "p4.png", np.zeros((40, 40), np.uint8))
    save(tmp_path / "masks" / "p5.png", blobs(0, 40, 64)[..., None] * np.array([1, 0, 1], np.uint8))
    save(tmp_path / "masks" / "p6.png", np.eye(40, 64, dtype=np.uint8))
    (tmp_path / "images" / "p7.png").write_bytes(b"nothing")
    assert faults(chest(tmp_path)) == [
        "captions.csv: 2 bad rows (data.on_bad=skip trains on the rest)",
        "  row 3: images/gone.* is missing",
        "  row 4: empty Prompt",
        "images: 6 bad rows (data.on_bad=skip trains on the rest)",
        "  row 3: masks/p2.* is missing",
        "  row 4: masks/p3.png is 32x20, its picture 64x40: save it at that size, or set data.mask_resize=true",
        "  row 5: masks/p4.png is 40x40, its picture 64x40, of another shape: put the right mask there",
        "  row 6: masks/p5.png is no grey picture of 1, 8 or 16 bits: save it as one",
        "  row 7: masks/p6.png reaches 1 where data.mask_max=255: set it to the masks' greatest value",
        "  row 8: images/p7.png is no picture of a known format",
    ]
    counts = chest(tmp_path, on_bad="skip").check()
    assert (counts["pictures"], counts["skipped rows"]) == (3, 8)


def test_a_mask_of_another_size_is_resized_where_that_is_asked_for(tmp_path):
    write_set(tmp_path)
    whole = chest(tmp_path).training_set()
    for path in (tmp_path / "masks").iterdir():
        mask = np.asarray(Image.open(path))
        save(path, mask.repeat(3, axis=0).repeat(3, axis=1))
    tripled = chest(tmp_path, mask_resize=True).training_set()
    assert all((whole[p].conditions.control != tripled[p].conditions.control).float().mean() < 0.05 for p in range(4))
    save(tmp_path / "masks" / "p0.png", np.zeros((40, 40), np.uint8))
    assert "of another shape" in faults(chest(tmp_path, mask_resize=True))[1]


def test_other_faults_of_masks_and_depth(tmp_path):
    write_set(tmp_path)
    save(tmp_path / "masks" / "p0.png", np.full((40, 64), 7, np.uint16))
    assert "reaches 7 where data.mask_max=6" in faults(chest(tmp_path, mask_max=6))[1]
    save(tmp_path / "depth" / "p1.png", np.zeros((20, 32), np.uint16))
    assert faults(chest(tmp_path, controls=["depth"]))[1] == (
        "  row 2: depth/p1.png is 32x20, its picture 64x40: make it again"
    )
    (tmp_path / "depth" / "p1.png").unlink()
    missing = "  row 2: depth/p1.* is missing"
    assert faults(chest(tmp_path, controls=["depth"]))[1] == missing
    mend = "; run `medsynth prepare depth CONFIG`"
    assert faults(chest(tmp_path, controls=["depth"], depth_model="some/model"))[1] == missing + mend


def test_headers_see_sizes_but_no_pixels(tmp_path):
    write_set(tmp_path)
    whole = (tmp_path / "masks" / "p0.png").read_bytes()
    (tmp_path / "masks" / "p0.png").write_bytes(whole[:-40])
    assert chest(tmp_path, check="headers").check()["pictures"] == 5
    assert "masks/p0.png cannot be decoded" in faults(chest(tmp_path))[1]
    save(tmp_path / "masks" / "p0.png", np.zeros((20, 32), np.uint8))
    assert "is 32x20" in faults(chest(tmp_path, check="headers"))[1]
    for index in range(5):
        save(tmp_path / "masks" / f"p{index}.png", np.eye(40, 64, dtype=np.uint8))
    said = "masks/p0.png reaches 1 where data.mask_max=255: set it to the masks' greatest value"
    assert faults(chest(tmp_path, check="headers")) == [f"{tmp_path}/{said}"], "some masks are looked at all the same"


def test_missing_folders_and_tables_name_their_key(tmp_path):
    with pytest.raises(UserError, match=r"data\.root: .*/images is not a folder"):
        chest(tmp_path).check()
    with pytest.raises(UserError, match=r"data\.captions: .*/mine\.csv is missing"):
        chest(write_set(tmp_path), captions="mine.csv").check()


@pytest.mark.parametrize(
    "config",
    [
        {"controls": ["masks"]},
        {"controls": ["mask", "mask"]},
        {"canny_high": [300.0, 200.0]},
        {"canny_low": [50.0, 250.0]},
        {"window": [5.0, 0.0]},
    ],
)
def test_config_refuses_what_it_cannot_do(config):
    with pytest.raises(UserError, match=rf"^data\.{next(iter(config))}"):
        ChestXRayConfig(**config)


def test_fingerprint(tmp_path):
    first = chest(write_set(tmp_path)).fingerprint()
    assert chest(tmp_path, workers=3, brightness=0.2).fingerprint() == first
    changed = {chest(tmp_path, controls=["depth"]).fingerprint(), chest(tmp_path, window=[1, 2]).fingerprint()}
    save(tmp_path / "masks" / "p0.png", np.zeros((40, 64), bool))
    changed.add(chest(tmp_path).fingerprint())
    assert len(changed | {first}) == 4


# Depth


@pytest.fixture(scope="module")
def depth_model(tmp_path_factory) -> Path:
    """A DPT of random weights in the hub's layout."""
    from transformers import DPTConfig, DPTForDepthEstimation, DPTImageProcessor

    folder = tmp_path_factory.mktemp("weights") / "dpt"
    widths = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
    necks = {"neck_hidden_sizes": [8] * 4, "fusion_hidden_size": 8, "backbone_out_indices": [0, 1, 2, 3]}
    torch.manual_seed(0)
    DPTForDepthEstimation(DPTConfig(image_size=32, patch_size=8, **widths, **necks)).save_pretrained(folder)
    DPTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def test_depth_is_the_models_scaled_to_the_picture(depth_model):
    from transformers import AutoImageProcessor, AutoModelForDepthEstimation

    picture = torch.from_numpy(blobs(1, 40, 64)).expand(3, -1, -1)
    inputs = AutoImageProcessor.from_pretrained(depth_model)(images=picture, return_tensors="pt")
    with torch.no_grad():
        raw = AutoModelForDepthEstimation.from_pretrained(depth_model)(**inputs).predicted_depth
    raw = torch.nn.functional.interpolate(raw[:, None], (40, 64), mode="bicubic", align_corners=False)[0, 0]
    expected = (raw - raw.min()) / (raw.max() - raw.min())
    depth = depth_estimator(depth_model)(picture)
    assert depth.min() == 0 and depth.max() == 1
    np.testing.assert_allclose(depth, expected.numpy(), atol=1e-5)


def test_depth_maps_are_written_once_and_read_in_training(tmp_path, depth_model):
    write_set(tmp_path, 3)
    for path in (tmp_path / "depth").iterdir():
        path.unlink()
    data, heard = chest(tmp_path, controls=["depth", "mask"], depth_model="some/model"), []
    assert data.write_depth(depth_model, lambda done, total: heard.append((done, total))) == 3
    assert heard == [(1, 3), (2, 3), (3, 3)]
    with Image.open(tmp_path / "depth" / "p1.png") as depth:
        assert (depth.size, depth.mode, depth.getextrema()) == ((64, 40), "I;16", (0, 65535))
    assert sorted(path.name for path in (tmp_path / "depth").iterdir()) == [
        "depth-model.txt",
        *(f"p{i}.png" for i in range(3)),
    ]
    (tmp_path / "depth" / "p1.png").unlink()
    assert (data.write_depth(depth_model), data.write_depth(depth_model)) == (1, 0)
    control = data.training_set()[0].conditions.control
    assert control.shape == (1, 2, 32, 32) and 0 <= control.min() < control.max() <= 1
    mine = chest(tmp_path, depth_model="another/model")
    with pytest.raises(UserError, match="depth holds depth maps that another/model did not make; remove it, or give"):
        mine.write_depth(depth_model)


def test_a_depth_model_that_lacks_a_weight_is_refused_unless_no_depth_goes_through_it(depth_model, tmp_path):
    folder = shutil.copytree(depth_model, tmp_path / "dpt")
    whole = {name: value.clone() for name, value in load_file(folder / "model.safetensors").items()}
    picture = torch.from_numpy(blobs(1, 40, 64)).expand(3, -1, -1)
    unused = "fusion_stage.layers.0.residual_layer1."  # published models leave these out
    save_file({k: v for k, v in whole.items() if unused not in k}, folder / "model.safetensors", {"format": "pt"})
    np.testing.assert_array_equal(depth_estimator(folder)(picture), depth_estimator(depth_model)(picture))
    for state, said in (
        ({k: v for k, v in whole.items() if "head.head.0.weight" not in k}, "dpt lacks 1 of its weights, the first is"),
        ({k: v[:1] if "head.head.0.bias" in k else v for k, v in whole.items()}, "dpt has head.head.0.bias of shape"),
    ):
        save_file(state, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(UserError, match=said):
            depth_estimator(folder)
    save_file({k: v * float("nan") for k, v in whole.items()}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="estimates depths that are no finite numbers"):
        depth_estimator(folder)(picture)


def test_a_folder_without_a_depth_model_is_named(tmp_path):
    write_set(tmp_path, 2)
    (tmp_path / "empty").mkdir()
    data = chest(tmp_path, depth="mine", depth_model="x")
    with pytest.raises(UserError, match=rf"data\.depth_model: {re.escape(str(tmp_path))}/empty holds no depth-estim"):
        data.write_depth(tmp_path / "empty")


# Real pictures


@pytest.mark.skipif(not DATA.is_dir(), reason="needs the real pictures")
@pytest.mark.parametrize(
    ("folder", "config", "pictures", "pairs"),
    [("lung-nodules", {"prompt": "a CT patch"}, 260, 260), ("colonoscopy", {"captions": "prompt-gt.csv"}, 900, 4500)],
)
def test_real_pictures_with_masks(folder, config, pictures, pairs):
    data = chest(DATA / folder, resolution=64, validation_images=40, controls=["mask", "canny"], **config)
    counts = data.check()
    assert (counts["pictures"], counts["pairs"], counts["skipped rows"]) == (pictures, pairs, 0)
    control = data.evaluation_conditions(20).control
    assert control.shape == (20, 2, 64, 64) and set(control.unique().tolist()) == {0.0, 1.0}
    name = data.reference_set("val").names[0]
    with Image.open(DATA / folder / "masks" / Path(name).with_suffix(".png")) as mask:
        whole = F.pil_to_tensor(mask.convert("L")).float() / 255
    row = next(r for r in data.val_dataloader() if r.conditions.control is not None)
    assert abs(float(row.conditions.control[0, 0].mean()) - float(whole.mean())) < 0.02

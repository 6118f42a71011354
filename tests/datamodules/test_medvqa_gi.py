"""MEDVQA-GI: the layouts it may lie in, what its samples are, and what it says about bad rows."""

import binascii
import json
import re
import struct
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as F

from datamodules.files.images import crop_square, jitter, pad_square, read_rgb
from datamodules.files.tables import read_table
from datamodules.medvqa_gi import MedVQAGI, MedVQAGIConfig
from datamodules.stream import StreamBatchSampler, StreamLoader
from medsynth.errors import UserError

COLONOSCOPY = Path(__file__).parents[3] / "shared" / "data" / "colonoscopy"
RNG = np.random.default_rng(0)


def save_picture(path: Path, size=(16, 16), value=None) -> None:
    """A picture of one value, or of noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = RNG.integers(0, 256, (size[1], size[0], 3)) if value is None else np.full((size[1], size[0], 3), value)
    Image.fromarray(pixels.astype(np.uint8)).save(path)


def write_set(root: Path, pictures=6, prompts=2, lines=None, pixels=None) -> Path:
    """A data set of `pictures` pictures p0.png, p1.png … with `prompts` prompts each, or with these lines of CSV."""
    for index in range(pictures):
        if pixels is None:
            save_picture(root / "images" / f"p{index}.png", value=index * 10)
        else:
            (root / "images").mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(root / "images" / f"p{index}.png")
    lines = lines or [
        "Filename;Prompt",
        *(f"p{index};prompt {index} {n}" for index in range(pictures) for n in range(prompts)),
    ]
    (root / "prompt-gt.csv").write_text("\n".join(lines) + "\n")
    return root


def medvqa(root: Path, seed=0, batch_size=1, accumulate=1, **config) -> MedVQAGI:
    config = {"resolution": 8, "workers": 0, "validation_images": 1, **config}
    return MedVQAGI(MedVQAGIConfig(root=str(root), **config), seed, batch_size, accumulate)


def still(**config) -> dict:
    """Config that leaves pictures and prompts as they are."""
    return {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "prompt_dropout": 0.0, **config}


def training_captions(data: MedVQAGI, passes=1) -> list[str]:
    samples = data.training_set()
    return [samples.without_picture(pass_, index).caption for pass_ in range(passes) for index in range(len(samples))]


def equal(first, second) -> bool:
    return (
        torch.equal(first.images, second.images)
        and first.conditions.captions == second.conditions.captions
        and torch.equal(first.seeds, second.seeds)
    )


# Layouts


@pytest.mark.parametrize("separator", [";", ","])
@pytest.mark.parametrize("suffix", ["", ".jpg"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("columns", [("Filename", "Prompt"), ("Prompt", "Filename"), ("Prompt", "Centre", "Filename")])
def test_layouts(tmp_path, separator, suffix, encoding, columns):
    for name in "abc":
        save_picture(tmp_path / "images" / f"{name}.jpg")
    rows = [{"Filename": f"{name}{suffix}", "Prompt": f"a sight of Ō {name}", "Centre": "x"} for name in "abc"]
    lines = [separator.join(columns), *(separator.join(row[column] for column in columns) for row in rows)]
    (tmp_path / "prompt-gt.csv").write_bytes("\r\n".join([*lines, "", ""]).encode(encoding))
    data = medvqa(tmp_path)
    counts = data.check()
    assert (counts["pictures"], counts["pairs"], counts["prompts"], counts["skipped rows"]) == (3, 3, 3, 0)
    assert data.all_captions() == ["", *(f"a sight of Ō {name}" for name in "abc")]
    data.write_split(tmp_path)
    split = json.loads((tmp_path / "split.json").read_text())
    assert sorted(split["train"] + split["val"]) == ["a.jpg", "b.jpg", "c.jpg"]


def test_commas_in_prompts(tmp_path):
    prompt = "in the upper-right, lower-right, and center-right"
    data = medvqa(write_set(tmp_path, 2, lines=["Filename,Prompt", f'p0,"{prompt}"', "p1,other"]), test_prompts="t.csv")
    (tmp_path / "t.csv").write_text(f"Prompt\n{prompt}\n")
    assert data.evaluation_conditions(1).captions == [prompt]
    assert prompt in data.all_captions()


def test_pictures_in_folders_and_of_all_suffixes(tmp_path):
    names = ["a/p.jpeg", "b/p.png", "c.TIF", "d.tiff", "e.bmp", "f.webp", "g.v2.JPG"]
    for name in names:
        save_picture(tmp_path / "images" / name)
    (tmp_path / "images" / "notes.txt").write_text("not a picture")
    (tmp_path / "prompt-gt.csv").write_text(
        "\n".join(["Filename;Prompt", *(f"{n.rpartition('.')[0]};x" for n in names)])
    )
    assert medvqa(tmp_path).check()["pictures"] == len(names)


# Reading


def modes(folder: Path) -> dict[str, tuple[Path, np.ndarray]]:
    """Files of every mode, left half darker than the right, with the RGB values their (left, right) halves mean."""
    halves = np.repeat([[50, 200]], 8, axis=1).repeat(16, axis=0).astype(np.uint8)
    grey = Image.fromarray(halves)
    rgb = Image.merge("RGB", [grey, grey, grey.point(lambda v: 255 - v)])
    alpha = Image.fromarray(np.repeat([[255, 0]], 8, axis=1).repeat(16, axis=0).astype(np.uint8))
    deep = Image.fromarray(halves.astype(np.uint16) * 257)
    keyed = Image.new("P", (16, 16), 0)
    keyed.putpalette([10, 20, 30, 40, 50, 60])
    keyed.paste(1, (8, 0, 16, 16))
    rotated = Image.Exif()
    rotated[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    coloured = ([50, 50, 205], [200, 200, 55])
    files = {
        "L.png": (grey, {}, ([50] * 3, [200] * 3)),
        "1.png": (grey.point(lambda v: 255 * (v > 100)).convert("1"), {}, ([0] * 3, [255] * 3)),
        "I16.png": (deep, {}, ([50] * 3, [200] * 3)),
        "I16.tif": (deep, {}, ([50] * 3, [200] * 3)),
        "RGB.png": (rgb, {}, coloured),
        "P.png": (keyed, {}, ([10, 20, 30], [40, 50, 60])),
        "P-keyed.png": (keyed, {"transparency": 1}, ([10, 20, 30], [0, 0, 0])),
        "RGBA.png": (Image.merge("RGBA", [*rgb.split(), alpha]), {}, (coloured[0], [0, 0, 0])),
        "LA.png": (Image.merge("LA", [grey, alpha]), {}, ([50] * 3, [0] * 3)),
        "CMYK.jpg": (rgb.convert("CMYK"), {"quality": 100, "subsampling": 0}, coloured),
        "upright.jpg": (rgb.transpose(Image.Transpose.ROTATE_90), {"exif": rotated, "quality": 100}, coloured),
    }
    for name, (image, options, _) in files.items():
        image.save(folder / name, **options)
    return {name: (folder / name, np.array(values)) for name, (_, _, values) in files.items()}


def test_every_mode_reads_as_rgb(tmp_path):
    for name, (path, (left, right)) in modes(tmp_path).items():
        image = read_rgb(path, max_pixels=1000)
        assert image.shape == (3, 16, 16) and image.dtype == torch.uint8, name
        assert np.abs(image[:, :, :7].permute(1, 2, 0).numpy().astype(int) - left).max() <= 4, name
        assert np.abs(image[:, :, 9:].permute(1, 2, 0).numpy().astype(int) - right).max() <= 4, name


def test_16_bits_are_scaled_by_their_range(tmp_path):
    Image.fromarray(np.array([[0, 256, 30000, 60000]], np.uint16)).save(tmp_path / "a.png")
    assert read_rgb(tmp_path / "a.png", 100)[0].tolist() == [[0, 1, 117, 233]]


def test_32_bits_have_no_white(tmp_path):
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(UserError, match=r"a\.tif cannot be decoded \(32-bit pixels.*save it with 8 or 16 bits"):
        read_rgb(tmp_path / "a.tif", 100)


def test_a_jpeg_is_decoded_small_but_not_too_small(tmp_path):
    Image.linear_gradient("L").resize((512, 256)).convert("RGB").save(tmp_path / "a.jpg", quality=95)
    whole, small = read_rgb(tmp_path / "a.jpg", 10**6), read_rgb(tmp_path / "a.jpg", 10**6, least_side=64)
    assert whole.shape == (3, 256, 512) and small.shape == (3, 64, 128)
    assert read_rgb(tmp_path / "a.jpg", 10**6, least_side=65).shape == (3, 128, 256)
    assert (crop_square(small, 32).int() - crop_square(whole, 32).int()).abs().max() <= 3


def test_crop_takes_the_largest_square_at_its_place():
    columns = torch.arange(24, dtype=torch.uint8).expand(3, 8, 24)
    for place, first in ((0.0, 0), (0.5, 8), (1.0, 16)):
        assert torch.equal(crop_square(columns, 8, place), columns[:, :, first : first + 8])
        assert torch.equal(crop_square(columns.mT, 8, place), columns[:, :, first : first + 8].mT)
    assert crop_square(columns, 20).shape == (3, 20, 20)


def test_pad_keeps_the_whole_picture():
    padded = pad_square(torch.full((3, 8, 16), 200, dtype=torch.uint8), 8)
    assert padded[0].tolist() == [[0] * 8] * 2 + [[200] * 8] * 4 + [[0] * 8] * 2
    assert pad_square(torch.full((3, 1000, 2), 9, dtype=torch.uint8), 8).sum() == 3 * 8 * 9


def test_resize_does_not_alias():
    noise = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (3, 128, 128), np.uint8))
    assert noise.float().std() > 70
    for square in (crop_square, pad_square):
        assert square(noise, 16).float().std() < 15


def test_jitter_is_torchvisions_and_stays_in_range():
    image = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))
    adjustments = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation)
    for which, adjust in enumerate(adjustments):
        strengths = [0.4 * (i == which) for i in range(3)]
        factor = np.random.default_rng(5).uniform(0.6, 1.4, 3)[which]
        torch.testing.assert_close(jitter(image, np.random.default_rng(5), *strengths), adjust(image, factor))
    rng = np.random.default_rng(0)
    strong = torch.stack([jitter(image, rng, 2.0, 2.0, 2.0) for _ in range(20)])
    assert strong.min() >= 0 and strong.max() <= 1 and strong.dtype == torch.float32
    assert len({tuple(s.flatten().tolist()) for s in strong}) == 20
    assert torch.equal(jitter(image, rng, 0, 0, 0), image)


# Samples


@pytest.mark.parametrize("square", ["crop", "pad"])
def test_samples_are_pictures_in_range_with_their_prompt(tmp_path, square):
    for index, size in enumerate([(16, 16), (40, 12), (9, 31), (5, 5)]):
        save_picture(tmp_path / "images" / f"p{index}.png", size)
    data = medvqa(write_set(tmp_path, 0, lines=["Filename;Prompt", *(f"p{i};x{i}" for i in range(4))]), square=square)
    for sample in (data.training_set()[5], data.validation_set()[0]):
        assert sample.images.shape == (1, 3, 8, 8) and sample.images.dtype == torch.float32
        assert 0 <= sample.images.min() < sample.images.max() <= 1
        assert sample.is_prior.tolist() == [False] and sample.seeds.dtype == torch.int64
    assert data.reference_set("all")[0].shape == (3, 8, 8) and data.reference_set("all")[0].dtype == torch.uint8


def test_a_sample_is_a_function_of_seed_and_position(tmp_path):
    root = write_set(tmp_path, pixels=RNG.integers(0, 256, (8, 20, 3)).astype(np.uint8))
    samples, again = medvqa(root, seed=3).training_set(), medvqa(root, seed=3).training_set()
    assert all(equal(samples[p], again[p]) for p in reversed(range(25)))
    other = medvqa(root, seed=4).training_set()
    assert not any(torch.equal(samples[p].images, other[p].images) for p in range(25))
    assert len({int(samples[p].seeds) for p in range(25)}) == 25


def test_augmentation_belongs_to_pass_and_index(tmp_path):
    samples = medvqa(write_set(tmp_path, pixels=RNG.integers(0, 256, (8, 20, 3)).astype(np.uint8))).training_set()
    for position in range(25):
        sample = samples.sample(*samples.stream(position))
        rest = samples.without_picture(*samples.stream(position))
        assert torch.equal(samples[position].images[0], sample.picture) and rest.picture is None
        assert samples[position].conditions.captions == [sample.caption] == [rest.caption]
    assert not torch.equal(samples.sample(0, 3).picture, samples.sample(1, 3).picture)


def test_random_crops_reach_both_ends(tmp_path):
    ramp = np.tile(np.arange(0, 240, 10, dtype=np.uint8)[None, :, None], (8, 1, 3))
    samples = medvqa(write_set(tmp_path, pixels=ramp), **still(flips=False)).training_set()
    lefts = Counter(round(float(samples[p].images[0, 0, 0, 0]) * 25.5) for p in range(300))
    assert set(lefts) == set(range(17))


def test_flips_only_without_a_prompt(tmp_path):
    corner = np.zeros((8, 8, 3), np.uint8)
    corner[:4, :4] = 255
    data = medvqa(write_set(tmp_path, pixels=corner), **still(prompt_dropout=0.5))
    samples, upright = data.training_set(), torch.zeros(8, 8)
    upright[:4, :4] = 1
    views = [upright, upright.flip(-1), upright.flip(-2), upright.flip(-1, -2)]
    seen = {True: Counter(), False: Counter()}
    for position in range(400):
        sample = samples[position]
        view = next(i for i, v in enumerate(views) if torch.equal(sample.images[0, 0], v))
        seen[sample.conditions.captions == [""]][view] += 1
    assert set(seen[False]) == {0}
    assert set(seen[True]) == {0, 1, 2, 3} and min(seen[True].values()) > 25  # 50 each are expected
    fixed = medvqa(tmp_path, **still(prompt_dropout=1.0, flips=False)).training_set()
    assert all(torch.equal(fixed[p].images[0, 0], upright) for p in range(50))


@pytest.mark.parametrize("rate", [0.0, 0.2, 1.0])
def test_prompts_are_dropped_at_their_rate(tmp_path, rate):
    captions = training_captions(medvqa(write_set(tmp_path, 21, 5), prompt_dropout=rate), passes=30)
    assert abs(captions.count("") - 3000 * rate) <= 4 * (3000 * rate * (1 - rate)) ** 0.5


def test_images_mode_has_one_sample_a_picture_without_a_caption(tmp_path):
    data = medvqa(write_set(tmp_path, 6, 3), samples="images", validation_images=2)
    assert len(data.training_set()) == 4 and len(data.validation_set()) == 2
    assert set(training_captions(data, passes=3)) == {""}
    validation = data.validation_set()
    data.write_split(tmp_path)
    names = json.loads((tmp_path / "split.json").read_text())["val"]
    assert [validation[i].conditions.captions[0] for i in range(2)] == [f"prompt {n[1]} 0" for n in names]
    assert [round(float(validation[i].images.mean()) * 255) for i in range(2)] == [int(n[1]) * 10 for n in names]


def test_validation_is_fixed_and_marks_padding(tmp_path):
    data = medvqa(write_set(tmp_path), batch_size=3, validation_images=2)
    first, second = list(data.val_dataloader()), list(data.val_dataloader())
    assert all(equal(a, b) for a, b in zip(first, second, strict=True))
    assert [len(batch) for batch in first] == [3, 1]
    assert len({int(seed) for batch in first for seed in batch.seeds}) == 4
    assert all("" not in batch.conditions.captions and (batch.seeds >= 0).all() for batch in first)
    padding = data.validation_set()[-1]
    assert padding.seeds.tolist() == [-1] and padding.images.shape == (1, 3, 8, 8)


def test_split_is_by_picture_and_fixed_by_seed(tmp_path):
    root = write_set(tmp_path, 20, 3)

    def split(seed):
        data = medvqa(root, seed=seed, validation_images=6)
        data.write_split(tmp_path)
        return data, json.loads((tmp_path / "split.json").read_text())

    data, first = split(1)
    assert first["seed"] == 1 and len(first["val"]) == 6 and len(first["train"]) == 14
    assert not set(first["train"]) & set(first["val"])
    assert split(1)[1] == first and split(2)[1]["val"] != first["val"]
    owners = {caption.split()[1] for caption in training_captions(data, passes=5) if caption}
    assert owners == {name[1:].removesuffix(".png") for name in first["train"]}
    validation = data.validation_set()
    captions = [validation[i].conditions.captions[0] for i in range(len(validation))]
    assert len(captions) == 18
    assert {c.split()[1] for c in captions} == {name[1:].removesuffix(".png") for name in first["val"]}
    assert [len(data.reference_set(s)) for s in ("train", "val", "all")] == [14, 6, 20]


def test_one_picture_less_hardly_moves_the_split(tmp_path):
    root = write_set(tmp_path, 20, 1)
    data = medvqa(root, validation_images=6)
    data.write_split(tmp_path)
    before = json.loads((tmp_path / "split.json").read_text())
    (root / "images" / before["train"][0]).unlink()
    data = medvqa(root, validation_images=6, on_bad="skip")
    data.write_split(tmp_path)
    assert json.loads((tmp_path / "split.json").read_text())["val"] == before["val"]


def test_reference_pictures_are_the_distinct_pictures(tmp_path):
    data = medvqa(write_set(tmp_path, 6, 2))
    reference = data.reference_set("all")
    assert [int(reference[i].float().mean()) for i in range(6)] == [0, 10, 20, 30, 40, 50]


def test_evaluation_prompts_repeat_only_when_all_have_come(tmp_path):
    data = medvqa(write_set(tmp_path, 6, 3), validation_images=2)
    validation = data.validation_set()
    prompts = sorted(validation[i].conditions.captions[0] for i in range(6))
    captions = data.evaluation_conditions(15).captions
    assert sorted(captions[:6]) == prompts == sorted(captions[6:12]) and len(set(captions[12:])) == 3
    assert data.evaluation_conditions(4).captions == captions[:4]
    assert medvqa(tmp_path, seed=1, validation_images=2).evaluation_conditions(15).captions != captions


def test_evaluation_prompts_of_their_own(tmp_path):
    data = medvqa(write_set(tmp_path), test_prompts="test.csv")
    (tmp_path / "test.csv").write_text("Prompt\nfirst\nsecond\n")
    assert sorted(data.evaluation_conditions(2).captions) == ["first", "second"]
    assert {"first", "second", "prompt 0 0", ""} <= set(data.all_captions())


# Paraphrases


@pytest.fixture
def paraphrased(tmp_path):
    """Four pictures, one of which validates, with the prompts `even` (two paraphrases) and `odd` (none)."""
    write_set(tmp_path, 4, lines=["Filename;Prompt", *(f"p{i};{p}" for i in range(4) for p in ("even", "odd"))])
    (tmp_path / "words.csv").write_text("Prompt,Paraphrase\neven,level\neven,flat\nunheard,of\n")
    return lambda **config: medvqa(tmp_path, paraphrases="words.csv", **still(**config))


def test_paraphrases_added(paraphrased):
    data = paraphrased(paraphrase_strategy="add")
    assert len(data.training_set()) == 3 * 4
    expected = Counter(even=3, level=3, flat=3, odd=3)
    assert Counter(training_captions(data)) == expected
    assert Counter(training_captions(data, passes=2)) == expected + expected
    assert data.check()["paraphrases"] == 2 and data.check()["pairs"] == 8


def test_paraphrases_replace_all(paraphrased):
    data = paraphrased(paraphrase_strategy="replace_all")
    seen = Counter(training_captions(data, passes=100))
    assert set(seen) == {"level", "flat", "odd"} and seen["odd"] == 300
    assert 100 < seen["level"] < 200
    assert data.all_captions() == ["", "even", "flat", "level", "odd"]


def test_paraphrases_replace_some(paraphrased):
    seen = Counter(training_captions(paraphrased(paraphrase_strategy="replace_some"), passes=100))
    assert seen["odd"] == 300 and 100 < seen["even"] < 200 and min(seen["level"], seen["flat"]) > 40
    never = paraphrased(paraphrase_strategy="replace_some", paraphrase_probability=0.0)
    assert set(training_captions(never, passes=10)) == {"even", "odd"}


@pytest.mark.parametrize("strategy", ["add", "replace_some", "replace_all"])
def test_validation_keeps_the_prompts(paraphrased, strategy):
    data = paraphrased(paraphrase_strategy=strategy)
    validation = data.validation_set()
    assert [validation[i].conditions.captions for i in range(len(validation))] == [["even"], ["odd"]]
    assert set(data.evaluation_conditions(10).captions) == {"even", "odd"}


def test_a_paraphrase_column_belongs_to_its_row(tmp_path):
    lines = ["Filename;Prompt;Paraphrase", "p0;x;x0", "p1;x;x1", "p2;x;", "p3;x;x"]
    samples = medvqa(write_set(tmp_path, 4, lines=lines), **still()).training_set()
    words = {(pair.picture, pair.prompt) for pair in samples.pairs}
    expected = {("p0.png", "x"), ("p0.png", "x0"), ("p1.png", "x"), ("p1.png", "x1"), ("p2.png", "x"), ("p3.png", "x")}
    held_out = expected - words
    assert words < expected and len({picture for picture, _ in held_out}) == 1 and len(samples) == len(words)


def test_paraphrases_of_other_prompts_are_a_mistake(paraphrased, tmp_path):
    (tmp_path / "words.csv").write_text("Prompt;Paraphrase\nother;another\n")
    with pytest.raises(UserError, match=r"data\.paraphrases: no Prompt in words\.csv is a Prompt in prompt-gt\.csv"):
        paraphrased().check()


# Bad rows


def png_claiming(path: Path, width: int, height: int) -> None:
    """A PNG file of some bytes whose header says that it is width x height."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"IDAT" + b"\x78\x9c\x63\x00\x00\x00\x01\x00\x01"
    chunks = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", binascii.crc32(c)) for c in (header, data, b"IEND")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))


@pytest.fixture
def spoilt(tmp_path):
    """A data set with one bad row of every kind and six good ones; the message it gives."""
    images = tmp_path / "images"
    lines = ["Filename;Prompt", *(f"p{i};fine" for i in range(6))]
    lines += ["gone.jpg;x", "gone;x", "p1;  ", "../p1;x", "/etc/p1.png;x", "p1;x;y", "p1", "twin;x"]
    lines += ["text.jpg;x", "short.jpg;x", "bomb.png;x", "large.png;x", ";x", "empty.png;x"]
    write_set(tmp_path, 6, lines=lines)
    save_picture(images / "twin.png")
    save_picture(images / "twin.jpg")
    (images / "text.jpg").write_text("no picture")
    save_picture(images / "short.jpg", (64, 64))
    (images / "short.jpg").write_bytes((images / "short.jpg").read_bytes()[:-200])
    png_claiming(images / "bomb.png", 60_000, 60_000)
    save_picture(images / "large.png", (101, 100))
    (images / "empty.png").touch()
    return tmp_path


def test_one_message_lists_every_bad_row(spoilt):
    with pytest.raises(UserError) as error:
        medvqa(spoilt, max_pixels=10_000).check()
    lines = str(error.value).splitlines()
    truncated = lines.pop(10)
    assert truncated.startswith("  row 17: images/short.jpg cannot be decoded (image file is truncated")
    assert lines == [
        "prompt-gt.csv: 14 bad rows (data.on_bad=skip trains on the rest)",
        "  row 8: images/gone.jpg is missing",
        "  row 9: images/gone.* is missing",
        "  row 10: empty Prompt",
        "  row 11: ../p1 leads out of the folder images",
        "  row 12: /etc/p1.png leads out of the folder images",
        "  row 13: 3 instead of 2 fields (quote a value that holds a ;)",
        "  row 14: 1 instead of 2 fields",
        "  row 15: twin may be twin.jpg or twin.png: write the suffix",
        "  row 16: images/text.jpg is no picture of a known format",
        "  row 18: images/bomb.png has more than data.max_pixels=10000 pixels",
        "  row 19: images/large.png has more than data.max_pixels=10000 pixels",
        "  row 20: empty Filename",
        "  row 21: images/empty.png is no picture of a known format",
    ]


def test_skip_trains_on_the_rest(spoilt):
    data = medvqa(spoilt, max_pixels=10_000, on_bad="skip")
    counts = data.check()
    assert (counts["pictures"], counts["pairs"], counts["skipped rows"]) == (6, 6, 14)
    assert (counts["train pictures"], counts["validation pictures"]) == (5, 1)
    assert len(list(data.train_dataloader())) == 5


def test_a_bomb_within_pillows_own_limit(tmp_path):
    write_set(tmp_path, 2)
    png_claiming(tmp_path / "images" / "p1.png", 9_500, 10_000)  # Pillow only warns of this one
    with pytest.raises(UserError, match=r"row 4: images/p1\.png has more than data\.max_pixels=90000000 pixels"):
        medvqa(tmp_path, max_pixels=90_000_000).check()


def test_long_lists_are_cut(tmp_path):
    lines = ["Filename;Prompt", *(f"gone{i}.jpg;x" for i in range(25))]
    with pytest.raises(UserError) as error:
        medvqa(write_set(tmp_path, 2, lines=lines)).check()
    shown = str(error.value).splitlines()
    assert shown[0].startswith("prompt-gt.csv: 25 bad rows") and len(shown) == 22
    assert shown[20:] == ["  row 21: images/gone19.jpg is missing", "  and 5 more"]


def test_one_bad_row_of_several_files(tmp_path):
    (write_set(tmp_path, 2) / "words.csv").write_text("Prompt;Paraphrase\nprompt 0 0;\n")
    (tmp_path / "images" / "p1.png").unlink()
    (tmp_path / "prompt-gt.csv").write_text("Filename;Prompt\np0;x\np1;x\n")
    with pytest.raises(UserError) as error:
        medvqa(tmp_path, paraphrases="words.csv").check()
    assert str(error.value).splitlines() == [
        "prompt-gt.csv: 1 bad row (data.on_bad=skip trains on the rest)",
        "  row 3: images/p1.* is missing",
        "words.csv: 1 bad row (data.on_bad=skip trains on the rest)",
        "  row 2: empty Paraphrase",
    ]


def test_no_good_row_is_left(tmp_path):
    data = medvqa(write_set(tmp_path, 2, lines=["Filename;Prompt", "gone;x"]), on_bad="skip")
    with pytest.raises(UserError, match=r"no good row is left\nprompt-gt\.csv: 1 bad row "):
        data.check()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"prompt-gt\.csv: no column Filename or Prompt in the header ''"),
        (b"Filename;Prompt\n\n", r"prompt-gt\.csv has no rows below its header"),
        (b"filename;Prompt\np0;x\n", r"no column Filename in the header 'filename;Prompt'"),
        ("Filename;Prompt\np0;é\n".encode("latin-1"), r"prompt-gt\.csv is not UTF-8"),
        (b'Filename;Prompt\np0;x\np1;"open\nand so on\n', r"prompt-gt\.csv: row 3: .*quote left open"),
    ],
)
def test_unreadable_tables(tmp_path, content, message):
    (write_set(tmp_path) / "prompt-gt.csv").write_bytes(content)
    with pytest.raises(UserError, match=message):
        medvqa(tmp_path).check()


def test_a_header_may_hold_the_other_separator(tmp_path):
    (tmp_path / "t.csv").write_text("Prompt;Notes, if any\nleft, right;none\n")
    assert read_table(tmp_path / "t.csv", ("Prompt",), "data.root").rows[2]["Prompt"] == "left, right"


def test_rows_are_numbered_by_line(tmp_path):
    (tmp_path / "t.csv").write_text('Filename;Prompt\n\np0;"over\ntwo lines"\np1;x\n')
    assert read_table(tmp_path / "t.csv", ("Prompt",), "data.root").rows == {
        3: {"Filename": "p0", "Prompt": "over\ntwo lines"},
        5: {"Filename": "p1", "Prompt": "x"},
    }


def test_missing_files_name_their_key(tmp_path):
    with pytest.raises(UserError, match=r"data\.root: .*/images is not a folder"):
        medvqa(tmp_path / "nowhere").check()
    write_set(tmp_path)
    with pytest.raises(UserError, match=r"data\.paraphrases: .*/words\.csv is missing"):
        medvqa(tmp_path, paraphrases="words.csv").check()
    (tmp_path / "prompt-gt.csv").unlink()
    with pytest.raises(UserError, match=r"data\.root: .*/prompt-gt\.csv is missing"):
        medvqa(tmp_path).setup()


def test_something_must_be_left_to_train_on(tmp_path):
    write_set(tmp_path, 3)
    assert medvqa(tmp_path, validation_images=2).check()["train pictures"] == 1
    with pytest.raises(UserError, match=r"data\.validation_images=3 leaves none of the 3 pictures"):
        medvqa(tmp_path, validation_images=3).check()


def test_duplicates_and_unused_pictures_are_counted(tmp_path):
    lines = ["Filename;Prompt", "p0;x", "p0;x", "p0.png;x", "p1;x"]
    counts = medvqa(write_set(tmp_path, 4, lines=lines)).check()
    assert counts["duplicate rows"] == 2 and counts["pairs"] == 4 and counts["pictures without a row"] == 2


def test_check_reports_progress_once(tmp_path):
    data, heard = medvqa(write_set(tmp_path)), []
    counts = data.check(lambda done, total: heard.append((done, total)))
    assert heard == [(done, 6) for done in range(1, 7)]
    assert data.check(lambda done, total: heard.append("again")) == counts and len(heard) == 6


def test_a_picture_that_vanishes_later_is_named(tmp_path):
    data = medvqa(write_set(tmp_path))
    samples = data.training_set()
    for path in (tmp_path / "images").iterdir():
        path.unlink()
    with pytest.raises(UserError, match=r"/images/p\d\.png is missing"):
        samples[0]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_cut_short_is_one_line_whoever_reads_it(tmp_path, workers):
    root = write_set(tmp_path, pixels=RNG.integers(0, 256, (64, 64, 3)).astype(np.uint8))
    for path in (tmp_path / "images").iterdir():
        path.write_bytes(path.read_bytes()[:-2000])
    data = medvqa(root, workers=workers, check="headers")
    for loader in (data.train_dataloader(), data.val_dataloader()):
        with pytest.raises(UserError) as refused:
            list(loader)
        line = str(refused.value)
        assert re.fullmatch(r"/.*/images/p\d\.png cannot be decoded \(image file is truncated.*\)", line)


def test_fingerprint(tmp_path):
    def fingerprint(**config):
        return medvqa(tmp_path, **config).fingerprint()

    write_set(tmp_path)
    first = fingerprint()
    assert len(first) == 64 and fingerprint(workers=2, prompt_dropout=0.5, brightness=0.1) == first
    changed = {
        fingerprint(resolution=16),
        fingerprint(square="pad"),
        fingerprint(samples="images"),
        fingerprint(seed=1),
    }
    save_picture(tmp_path / "images" / "p0.png")
    changed.add(fingerprint())
    with (tmp_path / "prompt-gt.csv").open("a") as file:
        file.write("p0;one more\n")
    changed.add(fingerprint())
    assert len(changed | {first}) == 7


# The stream


def batches(root, count, world=1, **layout):
    """The first `count` global batches, sorted by seed, of `world` processes."""
    steps: dict[int, list] = {}
    for rank in range(world):
        data = medvqa(root, seed=7, **layout)
        samples = data.training_set()
        sampler = StreamBatchSampler(len(samples), data.batch_size, data.accumulate, rank, world)
        for micro, batch in enumerate(StreamLoader(samples, sampler)):
            steps.setdefault(micro // data.accumulate, []).extend(batch[[i]] for i in range(len(batch)))
    return [sorted(steps[step], key=lambda row: int(row.seeds)) for step in range(count)]


def test_any_number_of_processes_trains_on_the_same_samples(tmp_path):
    write_set(tmp_path, 11, 3, pixels=RNG.integers(0, 256, (8, 20, 3)).astype(np.uint8))
    alone = batches(tmp_path, 5, world=1, batch_size=6)
    for world, batch_size, accumulate in ((1, 2, 3), (2, 3, 1), (3, 1, 2), (3, 2, 1)):
        other = batches(tmp_path, 5, world, batch_size=batch_size, accumulate=accumulate)
        assert all(equal(a, b) for s, t in zip(alone, other, strict=True) for a, b in zip(s, t, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_repeats_nothing_and_skips_nothing(tmp_path, workers):
    write_set(tmp_path, 6, 3)
    undisturbed = list(medvqa(tmp_path, batch_size=2).train_dataloader())
    data = medvqa(tmp_path, batch_size=2, workers=workers)
    loader = iter(data.train_dataloader())
    taken = [next(loader) for _ in range(3)]
    resumed = medvqa(tmp_path, batch_size=2, workers=workers)
    resumed.load_state_dict(data.state_dict())
    rest = iter(resumed.train_dataloader())
    taken += [next(rest) for _ in range(4)]
    assert len(undisturbed) == 7
    assert all(equal(a, b) for a, b in zip(taken, undisturbed, strict=True))


# Real pictures


@pytest.mark.skipif(not COLONOSCOPY.is_dir(), reason="needs the colonoscopy pictures")
def test_colonoscopy():
    data = medvqa(COLONOSCOPY, resolution=64, validation_images=200)
    counts = data.check()
    assert (counts["pictures"], counts["pairs"], counts["prompts"]) == (900, 4500, 45)
    assert (counts["train pictures"], counts["validation pictures"], counts["duplicate rows"]) == (700, 200, 0)
    assert len(data.training_set()) == 3500 and len(data.reference_set("val")) == 200
    sample = data.training_set()[0]
    assert sample.images.shape == (1, 3, 64, 64) and 0.05 < sample.images.mean() < 0.95

"""Cytology: class folders, template prompts, the affine augmentation, and what is said about bad files."""

import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import InterpolationMode

from datamodules.captioned import TrainingSet
from datamodules.cytology import AffineGeometry, Cytology, CytologyConfig
from datamodules.files.images import Geometry
from datamodules.files.pictures import Pictures
from datamodules.stream import StreamBatchSampler, StreamLoader
from medsynth.errors import UserError

BLOOD_CELLS = Path(__file__).parents[3] / "shared" / "data" / "blood-cells"
LINES = ["a smear of [filewords], by [name]", "[name]: [filewords]", "[filewords]"]
COUNTS = {"benign": 3, "malignant": 8, "normal": 1}


def save(path: Path, value: int = 128, size: tuple[int, int] = (12, 10)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, value, value)).save(path)


@pytest.fixture
def root(tmp_path) -> Path:
    for number, (name, count) in enumerate(COUNTS.items()):
        for index in range(count):
            save(tmp_path / name / f"{index:03}.png", value=80 * number + index)
    (tmp_path / "style_filewords.txt").write_text("\n".join([LINES[0], "", *LINES[1:], LINES[0]]) + "\n")
    return tmp_path


def cytology(root: Path, seed: int = 0, **config) -> Cytology:
    return Cytology(CytologyConfig(**{"root": str(root), "resolution": 8, "validation_images": 2} | config), seed)


def captions(dataset: TrainingSet, passes: int) -> list[str]:
    return [dataset.sample(p, i).caption for p in range(passes) for i in range(len(dataset))]


# Prompts


def test_prompts_are_the_templates_lines_filled_in(root):
    data = cytology(root, name_token="sks")
    expected = {text.format(w) for w in COUNTS for text in ("a smear of {}, by sks", "sks: {}", "{}")}
    assert set(captions(data.training_set(), 20)) | {""} <= set(data.all_captions())
    assert set(data.all_captions()) == expected | {""}
    assert data.check()["prompts"] == 9


def test_a_line_is_drawn_for_each_sample_and_pass(root):
    training = cytology(root).training_set()
    shown = Counter(training.sample(pass_, 0).caption for pass_ in range(300))
    assert len(shown) == 3
    assert min(shown.values()) > 60  # of 100 each
    assert [training.sample(7, i).caption for i in range(9)] == [
        training.without_picture(7, i).caption for i in range(9)
    ]
    again = cytology(root).training_set()
    assert [again.sample(3, i).caption for i in range(9)] == [training.sample(3, i).caption for i in range(9)]


def test_validation_shows_one_line_and_evaluation_asks_for_it(root):
    data = cytology(root, validation_images=6)
    validation = data.validation_set()
    first = [validation.sample(i) for i in range(6)]
    assert [validation.sample(i).caption for i in range(6)] == [sample.caption for sample in first]
    asked = data.evaluation_conditions(6)
    assert Counter(zip(asked.captions, asked.labels.tolist(), strict=True)) == Counter(
        (sample.caption, sample.label) for sample in first
    )
    many = cytology(root, validation_images=11).validation_set()
    lines = {many.sample(i).caption.replace(name, "X") for i in range(11) for name in COUNTS}
    assert {"a smear of X, by cytology", "cytology: X", "X"} <= lines


def test_prompts_are_dropped_when_asked(root):
    dropped = captions(cytology(root, prompt_dropout=0.3).training_set(), 60).count("")
    assert dropped / (60 * len(cytology(root).training_set())) == pytest.approx(0.3, abs=0.05)
    assert "" not in captions(cytology(root).training_set(), 20)


def test_a_caption_is_the_text_beside_or_words_of_the_name_or_the_class(root):
    save(root / "normal" / "12_round-cells 3.png")
    save(root / "normal" / "b1.v2.png")
    (root / "normal" / "b1.v2.txt").write_text("\ufeffa [rare]  cell,\nin mitosis\n", encoding="utf-8")
    (root / "benign" / "000.txt").write_text(" \n")
    words = set(cytology(root, template=None).all_captions())
    assert words == {"", "benign", "malignant", "normal", "round cells", "a [rare] cell, in mitosis"}
    assert set(cytology(root, template=None, filewords="class").all_captions()) == {"", *COUNTS}
    assert "cytology: a [rare] cell, in mitosis" in cytology(root).all_captions()


# Classes


def test_labels_are_the_classes_in_order(root):
    data = cytology(root)
    training = data.training_set()
    for index in range(len(training)):
        sample = training.sample(0, index)
        assert list(COUNTS)[sample.label] in sample.caption
    batch = next(iter(StreamLoader(training, StreamBatchSampler(len(training), 5))))
    assert batch.conditions.labels.dtype == torch.int64
    assert batch.conditions.labels.shape == (5,)
    assert [data.check()[f"pictures of {name}"] for name in COUNTS] == [3, 8, 1]


def test_small_classes_come_again_until_all_are_as_large(root):
    data = cytology(root, validation_images=1)
    pairs, plain = data.training_set().pairs, cytology(root, validation_images=1, balance=False).training_set().pairs
    counts, largest = Counter(pair.label for pair in pairs), max(Counter(p.label for p in plain).values())
    assert set(counts.values()) == {largest}
    assert {pair.picture for pair in pairs} == {pair.picture for pair in plain}
    repeats = Counter(pair.picture for pair in pairs)
    for label in counts:
        times = [repeats[pair.picture] for pair in plain if pair.label == label]
        assert max(times) - min(times) <= 1
    assert len(plain) == 11
    validation = {pair.picture for pair in data.validation_set().pairs}
    assert not validation & set(repeats)


def test_the_summary_tells_how_the_classes_are_balanced(root):
    data = cytology(root, validation_images=1)
    largest = max(Counter(pair.label for pair in data.training_set().pairs).values())
    assert data.check()["samples of each class a pass"] == largest
    assert "samples of each class a pass" not in cytology(root, balance=False).check()


def test_each_class_comes_equally_often_in_each_pass_of_the_stream(root):
    """Exactly so, wherever a pass begins and however many processes share it."""
    training = cytology(root, validation_images=1).training_set()
    for pass_ in range(3):
        positions = range(pass_ * len(training), (pass_ + 1) * len(training))
        labels = Counter(int(training[position].conditions.labels) for position in positions)
        assert set(labels.values()) == {len(training) // 3}


def test_one_class_alone(root):
    (root / "benign" / "000.png").write_bytes(b"no picture of the class that is asked for")
    data = cytology(root, only_class="malignant")
    found = data.check()
    assert (found["pictures"], found["pictures of malignant"], found["prompts"]) == (8, 8, 3)
    assert data.split_facts()["classes"] == ["malignant"]
    assert {pair.label for pair in data.training_set().pairs} == {0}
    everything = [*data.training_set().pairs, *data.validation_set().pairs]
    assert all(pair.picture.startswith("malignant/") for pair in everything)
    assert not any("benign" in caption for caption in data.all_captions())
    assert all(name.startswith("malignant/") for name in data.reference_set("all").names)
    assert not data.notes()


def test_folders_of_splits_are_the_split(root):
    for split in ("train", "validation", "test"):
        for name in COUNTS:
            save(root / split / name / f"{split}.png")
    data = cytology(root, filewords="class")
    found = data.check()
    assert [found[f"{split} pictures"] for split in ("train", "validation", "test")] == [3, 3, 3]
    assert {pair.picture for pair in data.validation_set().pairs} == {f"validation/{n}/validation.png" for n in COUNTS}
    assert [data.validation_set().sample(i).label for i in range(3)] == [0, 1, 2]


# The affine augmentation


def pattern(side: int = 40) -> torch.Tensor:
    """A smooth picture without symmetry."""
    y, x = torch.meshgrid(torch.linspace(0, 1, side), torch.linspace(0, 1, side), indexing="ij")
    return torch.stack([x, y, (x + 2 * y) / 3]).mul(200).add(20).round().to(torch.uint8)


def test_without_angle_and_zoom_it_is_the_plain_geometry():
    image = pattern()
    for flips in ((), (-1,), (-2,)):
        plain = Geometry(16, place=0.3, flips=flips).apply(image)
        assert torch.equal(AffineGeometry(16, place=0.3, flips=flips).apply(image), plain)


@pytest.mark.parametrize("angle", [-180, -90, -33, -10, 3, 10, 45, 90, 133])
def test_no_corner_is_empty(angle):
    white = torch.full((3, 50, 60), 255, dtype=torch.uint8)
    for side in (8, 15, 32):
        assert (AffineGeometry(side, angle=angle, zoom=1.2).apply(white) == 255).all()
        assert (AffineGeometry(side, angle=angle).apply(white) >= 254).all()


@pytest.mark.parametrize(("angle", "zoom"), [(0, 1.5), (10, 1.0), (-25, 1.3), (180, 2.0)])
def test_pixels_come_from_where_rotation_and_zoom_say(angle, zoom):
    """The red and green of `pattern` are a pixel's own place."""
    side, radians = 64, np.deg2rad(angle)
    found = AffineGeometry(side, angle=angle, zoom=zoom).apply(pattern(256)).double()
    scale = zoom * (abs(np.cos(radians)) + abs(np.sin(radians)))
    y, x = (np.mgrid[:side, :side] + 0.5) / side - 0.5
    # Anticlockwise on a screen, whose y points down.
    from_x = (x * np.cos(radians) - y * np.sin(radians)) / scale + 0.5
    from_y = (x * np.sin(radians) + y * np.cos(radians)) / scale + 0.5
    for channel, place in ((0, from_x), (1, from_y)):
        error = (found[channel].numpy() - 20) / 200 - place
        assert np.abs(error).max() < 0.02


def test_a_mask_keeps_its_classes():
    mask = (pattern() > 120).to(torch.uint8)[:1] * 128
    turned = AffineGeometry(16, angle=10, zoom=1.4).apply(mask, InterpolationMode.NEAREST_EXACT)
    assert set(turned.unique().tolist()) == {0, 128}


def test_each_change_comes_at_its_rate_and_within_its_bounds(root):
    training = cytology(root, balance=False).training_set()
    drawn = [training._draw(pass_, 0)[1] for pass_ in range(1000)]
    for changed in ([g.angle != 0 for g in drawn], [g.zoom != 1 for g in drawn], [g.flips != () for g in drawn]):
        assert sum(changed) / 1000 == pytest.approx(0.5, abs=0.06)
    angles, zooms = [g.angle for g in drawn if g.angle], [g.zoom for g in drawn if g.zoom != 1]
    assert -10 <= min(angles) < -9.5 and 9.5 < max(angles) <= 10
    assert 1 < min(zooms) < 1.05 and 1.45 < max(zooms) <= 1.5
    flips = Counter(g.flips for g in drawn)
    assert set(flips) == {(), (-1,), (-2,)}
    assert flips[(-1,)] / (flips[(-1,)] + flips[(-2,)]) == pytest.approx(0.5, abs=0.08)
    together = sum(g.angle != 0 and g.zoom != 1 and g.flips != () for g in drawn) / 1000
    assert together == pytest.approx(1 / 8, abs=0.04)  # each by itself


def test_nothing_is_changed_when_all_is_off(root):
    Image.fromarray(pattern(10).permute(1, 2, 0).numpy()).save(root / "normal" / "000.png")
    off = [{"affine_probability": 0}, {"rotation": 0, "zoom": 1, "flips": False}]
    for config in off:
        training = cytology(root, balance=False, validation_images=1, **config).training_set()
        for index, pair in enumerate(training.pairs):
            plain = training.pictures.squared(pair.picture, training._draw(0, index)[1])
            still = training.pictures.squared(pair.picture, Geometry(8, place=training._draw(0, index)[1].place))
            assert torch.equal(plain, still)


def test_validation_and_reference_are_not_changed(root):
    Image.fromarray(pattern(10).permute(1, 2, 0).numpy()).save(root / "normal" / "000.png")
    data = cytology(root, affine_probability=1.0, validation_images=11)
    reference, validation = data.reference_set("all"), data.validation_set()
    index = reference.names.index("normal/000.png")
    still = Geometry(8).apply(pattern(10))
    assert torch.equal(reference[index], still)
    shown = [
        validation.sample(i).picture for i, pair in enumerate(validation.pairs) if pair.picture == "normal/000.png"
    ]
    assert all(torch.equal(picture, still.float() / 255) for picture in shown)


def test_a_sample_is_a_function_of_pass_and_index(root):
    training, again = cytology(root).training_set(), cytology(root).training_set()
    for pass_, index in ((0, 0), (5, 3)):
        first, second = training.sample(pass_, index), again.sample(pass_, index)
        assert torch.equal(first.picture, second.picture)
        assert (first.caption, first.label) == (second.caption, second.label)
    other = cytology(root, seed=1).training_set()
    assert [other._draw(0, i)[1] for i in range(5)] != [training._draw(0, i)[1] for i in range(5)]


# Large pictures


def microscope_picture(path: Path) -> None:
    """A smooth picture of 3264×2448 with fine grain, as a JPEG."""
    rng = np.random.default_rng(0)
    coarse = rng.uniform(0, 255, (20, 27, 3)).astype(np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((3264, 2448), Image.Resampling.BICUBIC), dtype=np.float32)
    noisy = smooth + rng.normal(0, 8, (2448, 3264, 1)).astype(np.float32)
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, quality=90)


def test_a_large_jpeg_is_decoded_at_a_fraction_and_is_the_same_picture(tmp_path):
    """At 1/8 of its size: a fraction of the time, and within two levels on average of all of it resized."""
    microscope_picture(tmp_path / "large.jpg")
    pictures, geometry, took = Pictures(tmp_path, CytologyConfig(root=str(tmp_path), resolution=64)), Geometry(64), []
    for least_side in (0, 128):
        begun = time.process_time()
        decoded = pictures.open_picture("large.jpg", least_side)
        took.append((time.process_time() - begun, decoded.shape, geometry.apply(decoded).float()))
    (whole_s, whole, expected), (part_s, part, found) = took
    assert (whole, part) == ((3, 2448, 3264), (3, 306, 408))
    print(f"all of it {1e3 * whole_s:.0f} ms, at 1/8 {1e3 * part_s:.0f} ms: {whole_s / part_s:.1f} times as fast")
    assert whole_s / part_s > 2
    difference = (found - expected).abs()
    print(f"differs by {difference.mean():.2f} levels on average, {difference.max():.0f} at most")
    assert difference.mean() < 2
    assert difference.max() <= 12
    assert torch.equal(pictures.squared("large.jpg", geometry).float(), found)


def test_a_zoom_reads_as_many_pixels_as_it_shows(tmp_path):
    microscope_picture(tmp_path / "large.jpg")
    pictures = Pictures(tmp_path, CytologyConfig(root=str(tmp_path), resolution=64))
    for zoom, scale in ((1.0, 8), (2.5, 4), (10.0, 1)):
        geometry = AffineGeometry(64, zoom=zoom)
        expected = geometry.apply(pictures.open_picture("large.jpg", 2448 // scale))
        assert torch.equal(pictures.squared("large.jpg", geometry), expected)


# Mistakes


def said(root: Path, **config) -> str:
    with pytest.raises(UserError) as refused:
        cytology(root, **config).check()
    return str(refused.value)


def test_a_bad_template_is_one_clear_line(root):
    file = root / "style_filewords.txt"
    file.write_text("good [filewords]\nwith [file words] or [Name]\n")
    assert said(root).endswith("style_filewords.txt: line 2: [file words] is not known; use [name] and [filewords]")
    file.write_text("\n \n")
    assert said(root).endswith("style_filewords.txt has no lines")
    file.write_bytes(b"caf\xe9 [filewords]\n")
    assert said(root).endswith("style_filewords.txt is no text in UTF-8")
    file.unlink()
    assert "style_filewords.txt is missing; write lines such as" in said(root)
    assert cytology(root, template=None).check()["prompts"] == 3


def test_bad_pictures_and_texts_are_listed_or_skipped(root):
    (root / "benign" / "000.png").write_bytes(b"\x89PNG no more")
    (root / "malignant" / "003.txt").write_bytes(b"\xff\xfe\x00")
    save(root / "stray.png")
    message = said(root)
    assert "3 bad samples" in message
    assert "benign/000.png is no picture of a known format" in message
    assert "malignant/003.txt is no text in UTF-8" in message
    assert "stray.png: lies in no class's folder" in message
    found = cytology(root, on_bad="skip").check()
    assert (found["pictures"], found["skipped samples"]) == (10, 3)


def test_a_class_that_is_not_there_is_one_line(root):
    assert said(root, only_class="bening").endswith("has no such class; did you mean benign?")
    assert said(root, only_class="x").endswith("has no such class; there are benign, malignant, normal")
    assert "leaves none of the 1 pictures to train on" in said(root, only_class="normal", validation_images=1)


def test_a_class_without_pictures_is_one_line(root):
    (root / "atypical").mkdir()
    assert said(root).endswith("atypical is the folder of a class and has no picture; add some, or remove it")
    assert cytology(root, only_class="benign").check()["pictures"] == 3
    (root / "atypical").rmdir()
    (root / ".atypical").mkdir()
    assert cytology(root).check()["pictures"] == 12
    for name in COUNTS:
        save(root / "train" / name / "0.png")
        save(root / "validation" / name / "0.png")
    (root / "validation" / "atypical").mkdir()
    assert "validation/atypical is the folder of a class and has no picture" in said(root)


def test_a_class_that_only_validates_is_told(root):
    notes = {images: cytology(root, validation_images=images).notes() for images in (1, 11)}
    assert notes[1] == []
    assert len(notes[11]) == 2
    assert all(note.endswith("has no picture that trains") for note in notes[11])


def test_a_folder_without_classes_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "style_filewords.txt").write_text("[filewords]\n")
    assert "holds no pictures in the layout folders" in said(tmp_path)
    assert "is not a folder" in said(tmp_path / "absent")


# Real pictures


@pytest.mark.skipif(not BLOOD_CELLS.is_dir(), reason="needs ../shared/data")
def test_blood_cells(tmp_path):
    (tmp_path / "words.txt").write_text("a stained smear of a [filewords], [name]\n")
    data = cytology(BLOOD_CELLS, template=str(tmp_path / "words.txt"), resolution=64, validation_images=40)
    found = data.check()
    names = ("eosinophil", "lymphocyte", "monocyte", "neutrophil")
    assert [found[f"pictures of {name}"] for name in names] == [22, 53, 48, 176]
    assert (found["train pictures"], found["validation pictures"], found["prompts"]) == (259, 40, 4)
    training = data.training_set()
    assert len(set(Counter(pair.label for pair in training.pairs).values())) == 1
    sample = training.sample(0, 0)
    assert sample.caption == f"a stained smear of a {names[sample.label]}, cytology"
    assert sample.picture.shape == (3, 64, 64)
    assert 0 <= sample.picture.min() < sample.picture.max() <= 1

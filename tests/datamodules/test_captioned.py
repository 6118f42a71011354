"""What all data sets with captions share, on one whose pictures have a control and some of which are a prior's."""

import pickle
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import InterpolationMode

from datamodules.batches import Sample, collate
from datamodules.captioned import CaptionedConfig, CaptionedDataModule, Contents, Pair
from datamodules.files.images import Geometry, random_flips
from datamodules.files.pictures import Pictures
from medsynth.errors import UserError


class Marked(Pictures):
    """The control is what is bright, and how bright the picture is at all where `reads`."""

    reads = False
    opened: list[str] = []

    def open_picture(self, name, least_side=0):
        self.opened.append(name)
        return super().open_picture(name, least_side)

    def control(self, name, geometry, picture, rng):
        with Image.open(self.folder / name.replace("picture", "mask")) as mask:
            mask = torch.from_numpy(np.array(mask))[None]
        mask = geometry.apply(mask, InterpolationMode.NEAREST_EXACT).float() / 255
        noise = torch.full_like(mask, 0.5 if rng is None else rng.random())
        return torch.cat([mask, noise, *([picture().float()[:1] / 255] if self.reads else [])])


class MarkedData(CaptionedDataModule):
    pictures_class: type[Pictures] = Marked

    def _read(self, on_progress):
        pictures = self.pictures_class(self._root, self.config)
        names = sorted(path.name for path in self._root.glob("picture*"))
        faults = self.faults(pictures, names, on_progress)
        pairs = [Pair(name, f"caption {name}", is_prior="prior" in name) for name in names if name not in faults]
        return Contents(*self.split(pairs), pictures, {"pictures": len(pairs), "faults": len(faults)})


@pytest.fixture
def root(tmp_path) -> Path:
    """Nine wide pictures, one of them a prior's, whose masks are their bright halves."""
    rng = np.random.default_rng(0)
    for index in range(9):
        mask = (rng.random((6, 12)) < 0.5).repeat(8, axis=0).repeat(8, axis=1)
        name = f"{index}.png" if index else "prior.png"
        Image.fromarray(np.where(mask, 220, 30).astype(np.uint8)).save(tmp_path / f"picture-{name}")
        Image.fromarray(255 * mask.astype(np.uint8)).save(tmp_path / f"mask-{name}")
    Marked.opened.clear()
    return tmp_path


def marked(root: Path, seed=0, **config) -> MarkedData:
    config = {"resolution": 24, "workers": 0, "validation_images": 3, **config}
    return MarkedData(CaptionedConfig(root=str(root), **config), seed)


def agreement(sample: Sample) -> float:
    """Share of pixels where picture and mask say the same."""
    return float(((sample.picture[0] > 0.5) == (sample.control[0] > 0.5)).float().mean())


@pytest.mark.parametrize("square", ["crop", "pad"])
def test_picture_and_control_have_one_geometry(root, square):
    data = marked(root, square=square, flips=True, prompt_dropout=1.0)
    training, validation = data.training_set(), data.validation_set()
    views = [training.sample(pass_, 0) for pass_ in range(40)]
    assert min(map(agreement, views)) > 0.9, "edges aside"
    assert len({view.control[0].numpy().tobytes() for view in views}) > 3, "crops and flips differ"
    assert all(agreement(validation.sample(index)) > 0.9 for index in range(3))


def test_geometry():
    picture = torch.arange(3 * 4 * 8, dtype=torch.uint8).reshape(3, 4, 8)
    crop = Geometry(4, "crop", 1.0)
    assert torch.equal(crop.apply(picture), picture[:, :, 4:])
    assert torch.equal(Geometry(4, "crop", 1.0, (-1,)).apply(picture), picture[:, :, 4:].flip(-1))
    assert torch.equal(Geometry(4, "crop", 0.0, (-2, -1)).apply(picture), picture[:, :, :4].flip(-1, -2))
    assert torch.equal(Geometry(8, "pad").apply(picture)[:, 2:6], picture)
    classes = torch.tensor([[[0, 128], [255, 7]]], dtype=torch.uint8)
    large = Geometry(6).apply(classes, InterpolationMode.NEAREST_EXACT)
    assert set(large.unique().tolist()) == {0, 7, 128, 255}, "classes stay what they are"
    rng = np.random.default_rng(0)
    drawn = [random_flips(rng) for _ in range(400)]
    assert all(70 < drawn.count(flips) < 130 for flips in ((), (-1,), (-2,), (-1, -2)))


def test_without_picture_is_the_sample_without_its_picture(root):
    config = {"flips": True, "prompt_dropout": 0.5, "brightness": 0.4, "contrast": 0.4}
    data = marked(root, **config)
    training, validation = data.training_set(), data.validation_set()
    for pass_ in range(6):
        for index in range(len(training)):
            whole, rest = training.sample(pass_, index), training.without_picture(pass_, index)
            assert rest.picture is None and whole.picture.shape == (3, 24, 24) and whole.picture.min() >= 0
            assert (whole.caption, whole.is_prior) == (rest.caption, rest.is_prior)
            assert torch.equal(whole.control, rest.control)
    whole, rest = validation.sample(1), validation.without_picture(1)
    assert rest.picture is None and whole.caption == rest.caption and torch.equal(whole.control, rest.control)
    assert float(rest.control[1, 0, 0]) == 0.5, "nothing is drawn in validation"


def test_without_picture_reads_the_picture_only_for_the_control(root, monkeypatch):
    data = marked(root)
    data.check()
    Marked.opened.clear()
    data.training_set().without_picture(0, 0)
    data.validation_set().without_picture(0)
    data.evaluation_conditions(3)
    assert Marked.opened == []
    monkeypatch.setattr(Marked, "reads", True)
    training = data.training_set()
    rest = training.without_picture(0, 1)
    assert Marked.opened == [training.pairs[1].picture]
    assert torch.equal(rest.control, training.sample(0, 1).control) and rest.control.shape == (3, 24, 24)
    assert Marked.opened == [training.pairs[1].picture] * 2, "one reading serves picture and control"


def test_rows(root):
    training = marked(root).training_set()
    batch = collate([training[position] for position in range(4)])
    sample = training.sample(*training.stream(2))
    assert torch.equal(batch.images[2], sample.picture) and torch.equal(batch.conditions.control[2], sample.control)
    assert batch.conditions.control.dtype == torch.float32 and batch.conditions.control.shape == (4, 2, 24, 24)
    row = Sample(None, "x", is_prior=True).row(5)
    assert row.images is None and row.conditions.control is None
    assert (row.conditions.captions, row.seeds.tolist(), row.is_prior.tolist()) == (["x"], [5], [True])


def test_a_priors_pictures_train_and_are_no_reference(root):
    data = marked(root, validation_images=7)
    data.check()
    training = data.training_set()
    assert sorted(pair.is_prior for pair in training.pairs) == [False, True]
    assert [training.sample(0, i).is_prior for i in range(2)] == [pair.is_prior for pair in training.pairs]
    assert [len(data.reference_set(split)) for split in ("train", "val", "all")] == [1, 7, 8]
    with pytest.raises(UserError, match=r"data\.validation_images=8 leaves none of the 8 pictures to train on"):
        marked(root, validation_images=8).check()


def test_evaluation_has_the_controls_of_the_validation_samples(root):
    data = marked(root)
    validation = data.validation_set()
    controls = {validation[i].conditions.captions[0]: validation[i].conditions.control[0] for i in range(3)}
    asked = data.evaluation_conditions(7)
    assert len(asked.captions) == 7 and asked.control.shape == (7, 2, 24, 24) and set(asked.captions) == set(controls)
    for caption, control in zip(asked.captions, asked.control, strict=True):
        assert torch.equal(control, controls[caption])
    some = data.evaluation_conditions([5, 0])
    assert some.captions == [asked.captions[5], asked.captions[0]]
    assert torch.equal(some.control, asked.control[[5, 0]])


def test_workers_make_the_same_batches(root):
    alone, many = (list(marked(root, workers=workers).train_dataloader()) for workers in (0, 2))
    assert len(alone) == 6
    for a, b in zip(alone, many, strict=True):
        assert torch.equal(a.images, b.images) and torch.equal(a.conditions.control, b.conditions.control)
    assert len(pickle.loads(pickle.dumps(marked(root).training_set()))) == 6


def test_faults_are_reported_by_picture_and_progress(root):
    (root / "picture-2.png").write_bytes((root / "picture-2.png").read_bytes()[:100])
    (root / "picture-3.png").write_text("no picture")
    heard: list[tuple[int, int]] = []
    data = marked(root)
    names = sorted(path.name for path in root.glob("picture*"))
    found = data.faults(Marked(root, data.config), names, lambda done, total: heard.append((done, total)))
    assert heard == [(done, 9) for done in range(1, 10)]
    assert found["picture-2.png"].startswith("picture-2.png cannot be decoded")
    assert found.keys() == {"picture-2.png", "picture-3.png"}
    assert data.check() == {"pictures": 7, "faults": 2}
    headers = marked(root, check="headers")
    assert headers.check() == {"pictures": 8, "faults": 1}, "the cut picture has a sound header"
    assert marked(root, check="headers", max_pixels=100).config.check == "headers"


def test_headers_tell_how_large_a_picture_is(root):
    data = marked(root, check="headers", max_pixels=100)
    with pytest.raises(UserError, match=r"picture-1\.png has more than data\.max_pixels=100 pixels"):
        Marked(root, data.config).check_picture("picture-1.png")
    with pytest.raises(UserError, match=r"gone\.png is missing"):
        Marked(root, data.config).check_picture("gone.png")


def test_many_pictures_are_checked_block_by_block(root, monkeypatch):
    monkeypatch.setattr("datamodules.captioned._BLOCK", 2)
    (root / "picture-8.png").unlink()
    data, heard = marked(root), []
    names = [f"picture-{index}.png" for index in range(1, 9)]
    found = data.faults(Marked(root, data.config), names, lambda done, total: heard.append(done))
    assert list(found) == ["picture-8.png"] and heard == list(range(1, 9))


def test_fingerprint_counts_every_file_of_a_sample(root):
    class Both(Marked):
        def sizes(self, name):
            return [*super().sizes(name), (self.folder / name.replace("picture", "mask")).stat().st_size]

    class BothData(MarkedData):
        pictures_class = Both

    def fingerprint(**config) -> str:
        return BothData(CaptionedConfig(root=str(root), validation_images=3, **config)).fingerprint()

    first = fingerprint()
    assert fingerprint(brightness=0.3, workers=2, check="headers") == first != fingerprint(square="pad")
    with (root / "mask-4.png").open("ab") as file:
        file.write(b"more")
    assert fingerprint() != first


def test_a_subclass_changes_defaults_and_keeps_their_meaning_and_range():
    from jobs.run.keys import describe

    @dataclass
    class Config(CaptionedConfig):
        """One field."""

        brightness: float = 0.3

    assert Config(root="x").brightness == 0.3
    (brightness,) = [key for key in describe(Config(root="x")) if key.name == "brightness"]
    assert brightness.range == "≥ 0"
    assert brightness.meaning.startswith("Strength s")

"""DreamBooth's data: the layouts, the words, the turns of subject and class pictures, and what is refused."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from datamodules.batches import DRAWN_FILE, collate, undrawn
from datamodules.dreambooth import AlternatingStream, DreamBoothConfig, DreamBoothData
from datamodules.stream import StreamBatchSampler
from medsynth.errors import UserError
from tests.class_folders import write_classes, write_pictures

TOKENS = {"mild": "ohwx"}


def dreambooth(root: Path, seed: int = 0, **config) -> DreamBoothData:
    config = {"resolution": 8, "workers": 0, "class_pictures": 3, **config}
    return DreamBoothData(DreamBoothConfig(root=str(root), **config), seed)


def draw(data: DreamBoothData) -> None:
    """What a model would do, in one colour."""
    for number, drawing in enumerate(data.to_draw()):
        drawing.path.parent.mkdir(parents=True, exist_ok=True)
        (drawing.path.parent / DRAWN_FILE).write_text("{}")
        Image.new("RGB", (8, 8), (number, 0, 0)).save(drawing.path)


def shown(data: DreamBoothData, positions) -> list[tuple[str, bool]]:
    training = data.training_set()
    samples = [training.without_picture(*training.stream(position)) for position in positions]
    return [(sample.caption, sample.is_prior) for sample in samples]


# Layouts and words


def test_class_folders(tmp_path):
    data = dreambooth(write_classes(tmp_path / "hips"), tokens=TOKENS, instance_prompt="{label}, {token}")
    assert data.check() == {
        "classes": 2,
        "pictures": 10,
        "train pictures": 10,
        "validation pictures": 0,
        "test pictures": 0,
        "class pictures": 0,
        "class pictures to draw": 6,
        "skipped samples": 0,
    }
    assert data.all_captions() == ["", "a photo of mild", "a photo of normal", "mild, ohwx", "normal, sks"]
    assert data.rare_words() == ["ohwx", "sks"]


def test_a_flat_folder_is_one_class(tmp_path):
    write_pictures(tmp_path / "polyp", 3)
    data = dreambooth(tmp_path / "polyp", class_pictures=0)
    assert data.check()["classes"] == 1
    assert data.all_captions() == ["", "a photo of sks polyp"]


def test_folders_of_a_split(tmp_path):
    for split in ("train", "validation", "test"):
        write_classes(tmp_path / split)
    counts = dreambooth(tmp_path, class_pictures=0).check()
    names = ("pictures", "train pictures", "validation pictures", "test pictures")
    assert [counts[name] for name in names] == [30, 10, 10, 10]


def test_captions_of_single_pictures(tmp_path):
    root = write_classes(tmp_path / "hips")
    (root / "extra.jsonl").write_text('{"file_name": "mild/p0.png", "text": "left 101"}\n')
    data = dreambooth(root, instance_prompt="{token} {label}: {text}", class_pictures=0)
    assert data.all_captions() == ["", "sks mild: left 101", "sks mild: mild", "sks normal: normal"]


# The stream


@pytest.mark.parametrize("subject, prior", [(3, 8), (5, 2), (1, 1)])
def test_every_other_position_is_a_class_picture_in_an_order_of_its_own(subject, prior):
    stream = AlternatingStream(subject, prior, seed=4)
    taken = [stream(position) for position in range(4 * subject * prior)]
    own, others = taken[::2], [(pass_, index - subject) for pass_, index in taken[1::2]]
    for kind, length in ((own, subject), (others, prior)):
        passes = [kind[first : first + length] for first in range(0, len(kind), length)]
        for number, entries in enumerate(passes):
            assert {pass_ for pass_, _ in entries} == {number}
            assert sorted(index for _, index in entries) == list(range(length))
    assert stream.length == 2 * subject


@pytest.mark.parametrize("world, accumulate", [(1, 1), (2, 1), (3, 2)])
def test_micro_batches_of_even_size_are_half_and_half(tmp_path, world, accumulate):
    data = dreambooth(write_classes(tmp_path / "hips"))
    draw(data)
    training = data.training_set()
    for rank in range(world):
        sampler = StreamBatchSampler(training.stream.length, 4, accumulate, rank, world)
        for positions in sampler:
            assert collate([training[position] for position in positions]).is_prior.tolist() == [False, True] * 2


def test_a_pass_shows_each_picture_of_the_subject_once(tmp_path):
    data = dreambooth(write_classes(tmp_path / "hips"), class_pictures=20)
    loader = data.train_dataloader()
    assert len(loader) == 20  # 10 of the subject, 10 of 40 class pictures, one at a time
    captions = [caption for caption, is_prior in shown(data, range(20)) if not is_prior]
    assert sorted(captions) == ["a photo of sks mild"] * 4 + ["a photo of sks normal"] * 6
    assert len(data.training_set()) == 50


def test_without_a_prior_only_the_subject_is_shown(tmp_path):
    data = dreambooth(write_classes(tmp_path / "hips"), class_pictures=0)
    assert data.to_draw() == []
    assert {is_prior for _, is_prior in shown(data, range(20))} == {False}
    assert len(data.train_dataloader()) == 10


# Class pictures


def test_class_pictures_are_the_same_for_every_run_and_any_number(tmp_path):
    root = write_classes(tmp_path / "hips")
    few, many = dreambooth(root, seed=1).to_draw(), dreambooth(root, seed=2, class_pictures=5).to_draw()
    assert set(few) < set(many)
    assert len({drawing.seed for drawing in many}) == len({drawing.path for drawing in many}) == 10
    assert {(drawing.path.parent, drawing.caption) for drawing in many} == {
        (tmp_path / "hips-class" / label, f"a photo of {label}") for label in ("mild", "normal")
    }


def test_they_are_looked_at_once_they_are_drawn(tmp_path):
    data = dreambooth(write_classes(tmp_path / "hips"))
    before = data.fingerprint()
    assert data.check()["class pictures to draw"] == 6
    draw(data)
    counts = data.check()
    assert (counts["class pictures"], counts["class pictures to draw"]) == (6, 0)
    assert undrawn(data.to_draw()) == []
    assert data.fingerprint() != before
    again = dreambooth(tmp_path / "hips")
    assert again.fingerprint() == data.fingerprint()
    rows = collate([data.training_set()[position] for position in range(12)])
    reds = [(255 * image[0, 0, 0]).round().int().item() for image in rows.images[rows.is_prior]]
    assert sorted(reds) == list(range(6))


def test_the_fingerprint_does_not_depend_on_where_the_class_folder_is(tmp_path):
    root, elsewhere = write_classes(tmp_path / "hips"), tmp_path / "elsewhere"
    data = dreambooth(root)
    draw(data)
    moved = dreambooth(root, class_folder=str(elsewhere))
    draw(moved)
    assert moved.fingerprint() == data.fingerprint()
    Image.new("RGB", (32, 32)).save(elsewhere / "mild" / "00000.png")
    assert dreambooth(root, class_folder=str(elsewhere)).fingerprint() != data.fingerprint()


def test_pictures_of_ones_own_are_used(tmp_path):
    root = write_classes(tmp_path / "hips", class_pictures=4)
    for path in (tmp_path / "hips-class").rglob("*.png"):
        Image.new("RGB", (50, 40), (51, 0, 255)).save(path)
    data = dreambooth(root, class_pictures=4)
    assert data.to_draw() == []
    assert data.check()["class pictures"] == 8
    batch = collate([data.training_set()[position] for position in range(4)])
    torch.testing.assert_close(batch.images[batch.is_prior].mean((0, 2, 3)), torch.tensor([0.2, 0.0, 1.0]))
    with pytest.raises(UserError, match=r"data.class_pictures=5: .*mild has only 4 pictures of your own"):
        dreambooth(root, class_pictures=5).check()


def test_they_are_no_reference_and_no_prompt_of_evaluation(tmp_path):
    data = dreambooth(write_classes(tmp_path / "hips", class_pictures=3))
    assert [len(data.reference_set(split)) for split in ("train", "val", "all")] == [10, 10, 10]
    asked = data.evaluation_conditions(10).captions
    assert sorted(asked) == ["a photo of sks mild"] * 4 + ["a photo of sks normal"] * 6


# Validation


def test_none_held_out_validates_on_what_is_trained(tmp_path):
    data = dreambooth(write_classes(tmp_path / "hips", class_pictures=3))
    validation = data.validation_set()
    rows = collate([validation[index] for index in range(len(validation))])
    assert rows.is_prior.tolist() == [False] * 10 + [True] * 10
    assert set(rows.conditions.captions[10:]) == {"a photo of mild", "a photo of normal"}
    assert torch.equal(rows.images[0], validation.sample(0).picture)
    assert [validation.without_picture(i).is_prior for i in (0, 19)] == [False, True]


def test_some_of_each_class_are_held_out(tmp_path):
    data = dreambooth(write_classes(tmp_path / "hips"), validation_images=2, class_pictures=0)
    captions = [data.validation_set().without_picture(index).caption for index in range(4)]
    assert sorted(captions) == ["a photo of sks mild"] * 2 + ["a photo of sks normal"] * 2
    assert data.check()["train pictures"] == 6
    with pytest.raises(UserError, match="leaves none of the 4 pictures"):
        dreambooth(tmp_path / "hips", validation_images=4, class_pictures=0).check()


# What is refused


def test_damaged_pictures_of_the_subject(tmp_path):
    root = write_classes(tmp_path / "hips")
    (root / "mild" / "p0.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"mild/p0.png: mild/p0.png is no picture of a known format"):
        dreambooth(root).check()
    assert dreambooth(root, on_bad="skip").check()["skipped samples"] == 1


def test_damaged_class_pictures(tmp_path):
    data = dreambooth(write_classes(tmp_path / "hips"))
    draw(data)
    path = data.to_draw()[0].path
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(
        UserError, match=r"1 bad class picture \(remove them: what is missing is drawn\)(.|\n)*00000.png"
    ):
        dreambooth(tmp_path / "hips", on_bad="skip").check()
    path.unlink()
    assert dreambooth(tmp_path / "hips").check()["class pictures to draw"] == 1


@pytest.mark.parametrize(
    "config, message",
    [
        ({"tokens": {"severe": "ohwx"}}, "data.tokens: there is no class severe; there are mild, normal"),
        ({"instance_prompt": "a photo of {label}"}, "both say 'a photo of mild': they must differ"),
        (
            {"class_prompt": "a photo of {token}"},
            r"data.class_prompt='a photo of \{token\}' is no template of \{label\}",
        ),
        (
            {"instance_prompt": "{token"},
            r"data.instance_prompt='\{token' is no template of \{token\}, \{label\}, \{text\}",
        ),
    ],
)
def test_wrong_config(tmp_path, config, message):
    write_classes(tmp_path / "hips")
    with pytest.raises(UserError, match=message):
        dreambooth(tmp_path / "hips", **config).check()


def test_wrong_folders(tmp_path):
    root = write_classes(tmp_path / "hips")
    with pytest.raises(UserError, match=r"data.class_folder: .* lies in data.root"):
        dreambooth(root, class_folder=str(root / "class"))
    with pytest.raises(UserError, match="data.root: .*nowhere is not a folder"):
        dreambooth(tmp_path / "nowhere").check()
    (root / "extra.jsonl").write_text('{"file_name": "mild/p0.png", "label": "../mild"}\n')
    with pytest.raises(UserError, match=r"data.root: '../mild' is no name of a class"):
        dreambooth(root).check()

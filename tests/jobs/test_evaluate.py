"""`medsynth evaluate`: its scores are training's, sizes are said, and what would fail late is refused at once."""

import json

import lightning as L
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch import Tensor
from torchvision.utils import save_image

from callbacks.evaluation import Evaluation, EvaluationConfig
from datamodules.chest_xray import ChestXRay, ChestXRayConfig
from datamodules.stream import derive_seed
from jobs import cli
from medsynth.errors import UserError
from metrics.images import quantise

SIDE = 32


def evaluate(real, fake, *arguments) -> str:
    return evaluated("--real", real, "--fake", fake, "--extractor", "random", "--workers", 0, *arguments)


def evaluated(*arguments) -> str:
    """What the command prints; raises what it raises."""
    result = CliRunner().invoke(cli.main, ["evaluate", *(str(a) for a in arguments)], standalone_mode=False)
    if result.exception:
        raise result.exception
    return result.output


def pictures(folder, count: int, *sizes: tuple[int, int], seed: int = 0):
    """`count` pictures in a new folder, of these (width, height) in turn: coarse noise, bright at one end."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for i in range(count):
        ramp = np.linspace(0, 150, 64)[:, None, None] + rng.integers(0, 100, (64, 64, 3))
        Image.fromarray(ramp.astype(np.uint8)).resize(sizes[i % len(sizes)]).save(folder / f"{i}.png")
    return folder


def drawn(seeds: list[int]) -> Tensor:
    return torch.stack([torch.rand(3, SIDE, SIDE, generator=torch.Generator().manual_seed(s % 997)) for s in seeds])


class Drawer(L.LightningModule):
    def sample(self, conditions, seeds, *, steps=None, guidance=None) -> Tensor:
        return drawn(seeds)

    def validation_step(self, batch, batch_idx) -> None:
        pass


def trained_scores(root, folder, square: str) -> dict[str, float]:
    config = ChestXRayConfig(root=str(root), resolution=SIDE, validation_images=4, workers=0, square=square)
    config.prompt, config.controls = "an X-ray", ["picture"]
    evaluation = EvaluationConfig(images=9, batch_size=4, extractor="random", grid=0, cache=str(folder / "cache"))
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, callbacks=[Evaluation(evaluation, folder, seed=5)],
        use_distributed_sampler=False,
    )  # fmt: skip
    trainer.validate(Drawer(), datamodule=ChestXRay(config, seed=3), verbose=False)
    return {name.removeprefix("eval/"): value.item() for name, value in trainer.callback_metrics.items()}


@pytest.mark.parametrize("square", ["crop", "pad"])
def test_the_scores_of_folders_are_training_s_of_the_same_pictures(tmp_path, square):
    """The real pictures as they lie, of other sizes and no squares; the generated ones as files."""
    reals = pictures(tmp_path / "set/images", 13, (90, 64), (64, 64), (50, 120))
    (tmp_path / "fake").mkdir()
    for i, image in enumerate(quantise(drawn([derive_seed(5, "evaluation", i) for i in range(9)]))):
        save_image(image / 255, tmp_path / f"fake/{i}.png")
    printed = evaluate(reals, tmp_path / "fake", "--square", square, "--out", tmp_path / "scores.json")
    report = json.loads((tmp_path / "scores.json").read_text())
    assert report["scores"] == pytest.approx(trained_scores(tmp_path / "set", tmp_path, square), rel=1e-6)
    assert (report["resolution"], report["square"]) == (SIDE, square)
    said = f"real pictures 3 sizes from 50×120 to 90×64, generated 32×32: all scored at 32×32 (--square {square})"
    assert said in printed.replace("\n", " ")


@pytest.mark.parametrize(
    ("real", "fake", "arguments", "said", "resolution"),
    [
        ([(32, 32)], [(32, 32)], (), None, 32),
        ([(32, 32)], [(32, 32)], ("--resolution", 32), None, 32),
        ([(48, 48)], [(32, 32)], ("--resolution", 16), "generated 32×32: all scored at 16×16 (--square crop); ", 16),
        ([(40, 30)], [(40, 30)], (), None, None),
        ([(40, 30)], [(40, 32)], (), "real pictures 40×30, generated 40×32: scored as they are; --resolution R", None),
        ([(32, 32)], [(32, 32), (16, 16)], (), "generated 2 sizes from 16×16 to 32×32: scored as they are", None),
    ],
)
def test_sizes_that_differ_are_said(tmp_path, real, fake, arguments, said, resolution):
    sides = pictures(tmp_path / "real", 6, *real), pictures(tmp_path / "fake", 5, *fake, seed=1)
    printed = evaluate(*sides, *arguments, "--out", tmp_path / "scores.json")
    assert said in printed if said else "scored" not in printed
    assert json.loads((tmp_path / "scores.json").read_text())["resolution"] == resolution


def test_one_subset_has_no_deviation_in_the_report(tmp_path):
    real, fake = pictures(tmp_path / "real", 6, (32, 32)), pictures(tmp_path / "fake", 6, (32, 32), seed=1)
    evaluate(real, fake, "--out", tmp_path / "scores.json")
    scores = json.loads((tmp_path / "scores.json").read_text())["scores"]
    kinds = ("fd", "kd", "kd_full", "precision", "recall", "f1", "density", "coverage")
    assert set(scores) == {f"{kind}_random" for kind in kinds}
    # Nor can a checkpoint be chosen by it.
    assert set(EvaluationConfig(extractor="random").names()) == {f"eval/{name}" for name in scores}


@pytest.mark.parametrize(
    ("out", "said"),
    [
        ("none/scores.json", "there is no folder .*none; make it"),
        ("real", "real is a folder: name a file in it"),
        ("real/0.png/scores.json", "there is no folder .*0.png"),
        ("/proc/scores.json", "nothing can be written there"),
    ],
)
def test_a_report_that_cannot_be_written_is_refused_before_anything_is_scored(tmp_path, monkeypatch, out, said):
    real = pictures(tmp_path / "real", 4, (32, 32))
    monkeypatch.setattr("jobs.scoring.folders.stream", lambda *args: pytest.fail("scored before it was refused"))
    with pytest.raises(UserError, match=f"^--out .*{said}"):
        evaluate(real, real, "--out", tmp_path / out)


def test_a_picture_whose_header_is_broken_is_refused_before_anything_is_scored(tmp_path, monkeypatch):
    real, fake = pictures(tmp_path / "real", 4, (32, 32)), pictures(tmp_path / "fake", 4, (32, 32))
    (fake / "3.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    monkeypatch.setattr("jobs.scoring.folders.stream", lambda *args: pytest.fail("scored before it was refused"))
    with pytest.raises(UserError, match=r"fake/3\.png"):
        evaluate(real, fake)


def test_what_is_advised_are_options_of_evaluate(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    real = pictures(tmp_path / "real", 4, (32, 32))
    with pytest.raises(UserError, match=r"give --weights PATH or --extractor random$") as missing:
        evaluate(real, real, "--extractor", "inception")
    with pytest.raises(UserError, match=r"takes no weights: leave out w\.pth") as unused:
        evaluate(real, real, "--weights", "w.pth")
    assert "evaluation." not in f"{missing.value}{unused.value}"

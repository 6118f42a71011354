"""`medsynth evaluate RUN` and `--like RUN`: the numbers that training logged, by the same protocol, or a refusal."""

import csv
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from callbacks.protocols import PROTOCOLS, read_notes
from callbacks.scoring import Scoring
from jobs.run.config import load_config
from jobs.run.folder import load_run
from jobs.scoring.run import open_run
from jobs.train import train
from medsynth.errors import UserError
from metrics.images import quantise
from tests.conftest import REPOSITORY
from tests.jobs.test_evaluate import evaluated


@pytest.fixture(scope="module")
def run(tmp_path_factory, phantom) -> tuple[Path, dict[str, float]]:
    """A run of two steps, and the scores that it logged of the second."""
    folder = tmp_path_factory.mktemp("scored")
    settings = ["evaluation.grid=0", "evaluation.reference=val", "hardware.threads=1", "evaluation.paired=true"]
    settings += [f"tracking.uri=sqlite:///{folder}/mlruns.db", f"evaluation.cache={folder}/cache"]
    settings += [f"data.root={phantom}", f"run_dir={folder}/run", "data.square=pad", "ema.decay=0.5"]
    trainer = train(load_config([REPOSITORY / "configs/tiny/msdm.yaml"], settings))
    logged = {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("eval/")}
    return folder / "run", {name.removeprefix("eval/"): value for name, value in logged.items()}


def test_a_run_s_scores_are_those_that_its_training_logged(run, tmp_path):
    folder, logged = run
    printed = evaluated(folder, "--out", tmp_path / "scores.json")
    report = json.loads((tmp_path / "scores.json").read_text())
    assert report["scores"] == pytest.approx(logged, rel=1e-6) and set(logged) >= {"fd_random", "psnr", "ssim"}
    assert report["step"] == 2 and "weights of step 2" in printed
    [note] = read_notes(folder / PROTOCOLS)
    assert note.protocol.as_dict() == report["protocol"] and note.after == 0
    told = {name: report["protocol"][name] for name in ("square", "reference", "split_seed", "real", "fake")}
    assert told == {"square": "pad", "reference": "val", "split_seed": 0, "real": 8, "fake": 6}
    assert f"protocol {note.protocol.digest}: random" in printed and "torch" in report["protocol"]["versions"]


def test_pictures_that_are_there_are_scored_as_training_scores(run, tmp_path):
    folder, logged = run
    opened = open_run(folder)
    module, _ = load_run(folder, as_trained=True)
    with torch.no_grad():
        images = torch.cat([opened.scoring.draw(opened.data, module, rows) for rows in ([0, 1, 2, 3], [4, 5])])
    for i, image in enumerate(quantise(images)):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"{i}.png")
    printed = evaluated("--like", folder, "--fake", tmp_path, "--workers", 0, "--out", tmp_path / "scores.csv")
    rows = list(csv.DictReader((tmp_path / "scores.csv").open()))
    scores = {row["score"]: float(row["value"]) for row in rows}
    assert scores == pytest.approx({name: logged[name] for name in scores}, rel=1e-6) and "fd_random" in scores
    assert {row["protocol.digest"] for row in rows} == {open_run(folder).protocol.digest}
    assert torch.__version__.startswith(rows[0]["version.torch"]) and "not comparable" not in printed

    (tmp_path / "5.png").unlink()
    assert "not comparable with the scores that" in (few := evaluated("--like", folder, "--fake", tmp_path))
    assert "fake 5, not 6" in few.replace("\n", " ")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["RUN", "--fake", "x"], "RUN draws and scores its own pictures; for pictures that are there give --like RUN"),
        (["RUN", "--resolution", "8", "--weights", "w"], "--resolution, --weights: the protocol is the run's"),
        (["--like", "RUN", "--fake", "x", "--square", "crop"], "--square: the protocol is the run's"),
        ([], "give RUN, or --real FOLDER --fake FOLDER"),
        (["--real", "x"], "give RUN, or --real FOLDER --fake FOLDER"),
        (["none"], "none is no run directory"),
    ],
)
def test_options_that_contradict_a_run_are_refused(run, arguments, said):
    with pytest.raises(UserError, match=said):
        evaluated(*(run[0] if argument == "RUN" else argument for argument in arguments))


def test_a_run_whose_protocol_is_no_longer_what_it_was_is_refused(run, monkeypatch):
    class Other(Scoring):
        def __init__(self, config, seed):
            super().__init__(config, seed)
            self.extractor.identity = "random-0"

    monkeypatch.setattr("jobs.scoring.run.Scoring", Other)
    with pytest.raises(UserError, match=r"not what its training had: weights random-0, not random-[0-9a-f]{64}$"):
        evaluated(run[0])


def test_a_run_without_scores_is_refused(run, tmp_path):
    config = (run[0] / "config.yaml").read_text().replace("images: 6", "images: 0")
    (tmp_path / "config.yaml").write_text(config.replace("eval/fd_random", "val/loss"))
    with pytest.raises(UserError, match=r"trained with evaluation\.images=0, and so has no scores of its own"):
        open_run(tmp_path)

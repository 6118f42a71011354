"""Run folders of earlier versions go on: tests/data/ has one that version 0.1.0 made before its files were moved.

It is configs/tiny/stable_diffusion_lora.yaml on a phantom set after two of four steps, and what `medsynth sample` drew
of it then.
"""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from jobs.run.config import load_config
from jobs.sample import main as sample
from jobs.train import train

EARLIER = Path(__file__).parent / "data/run-before-the-rooms.tar.gz"
LOSSES_OF_STEPS_3_AND_4 = [1.0765461921691895, 1.0876997709274292]
"""Of the same version's undisturbed run."""


@pytest.fixture
def earlier(here) -> Path:
    """The folder of `run` and `pictures`, and the working directory."""
    with tarfile.open(EARLIER) as archive:
        archive.extractall(here, filter="data")
    return here


def test_it_resumes_and_learns_what_it_would_have_learned(earlier, phantom):
    trainer = train(load_config(["run/config.yaml"], [f"data.root={phantom}", "train.max_steps=4"]))
    assert trainer.global_step == 4
    events = (json.loads(line) for line in Path("run/tracking/events.jsonl").read_text().splitlines())
    losses = {e["step"]: e["values"]["train/loss"] for e in events if "train/loss" in e.get("values", ())}
    assert list(losses) == [0, 1, 3, 4]  # that version logged the first step as 0
    assert [losses[3], losses[4]] == pytest.approx(LOSSES_OF_STEPS_3_AND_4, rel=1e-5)


def test_it_draws_what_it_drew(earlier):
    arguments = ["run", "--prompt", "Generate an image with 1 polyp.", "--count", "2", "--out", "again"]
    result = CliRunner().invoke(sample, [*arguments, "--checkpoint", "last", "--device", "cpu"])
    assert result.exception is None, result.output
    for name in ("000000.png", "000001.png"):
        before, now = (np.asarray(Image.open(earlier / folder / name)).astype(int) for folder in ("pictures", "again"))
        assert np.abs(before - now).max() <= 1
    result = CliRunner().invoke(sample, [*arguments[:-1], "pictures", "--checkpoint", "last", "--device", "cpu"])
    assert "pictures/000000.png was made by an earlier version" in str(result.exception)

"""The commands where a container or a login gives little: one training of a real process, and what is made of it."""

import csv
import os
import shutil
import subprocess
import sys

import pytest
from PIL import Image

from jobs.encode import encode
from jobs.run.config import load_config
from jobs.tracking.server import mlflow_client
from jobs.tracking.spool import read_run_id
from medsynth.errors import UserError
from tests.conftest import REPOSITORY
from tests.jobs.test_commands import medsynth

TINY = REPOSITORY / "configs/tiny/msdm.yaml"
ODD = "w rün = #1, $HOME 50% 'q' {x};&"
"""A folder's name in which a shell, YAML, a URI and SQLite each see something of their own."""
BARE = {
    "PATH": os.environ["PATH"],
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(REPOSITORY),
    **{"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"},
    **{"HOME": "/dev/null", "TMPDIR": "/no/such/folder"},
    **{"RANK": "3", "LOCAL_RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "10.255.255.1", "MASTER_PORT": "29500"},
    **{"SLURM_JOB_ID": "17", "SLURM_NTASKS": "4", "SLURM_JOB_NAME": "work", "SLURM_PROCID": "0"},
}


def contents(folder):
    return {path.relative_to(folder): path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}


@pytest.fixture(scope="module")
def place(tmp_path_factory, phantom):
    """A folder of an odd name, in which a process has trained from a config of Windows, with all names relative."""
    here = tmp_path_factory.mktemp("work") / ODD
    here.mkdir()
    shutil.copytree(phantom, here / "dätä")
    before = contents(here / "dätä")
    text = TINY.read_text().replace("experiment", "")
    text += "tracking:\n  experiment: Prüfung 日本\n  run_name: 'größe=2 % # x'\n"
    (here / "größe = 1.yaml").write_bytes(text.replace("\n", "\r\n").encode("utf-8-sig"))
    settings = ["data.root=dätä", "run_dir=läufe/a=b #1", "evaluation.images=0", "checkpoint.monitor=val/loss"]
    child = subprocess.run(
        [sys.executable, "-m", "jobs.train", "größe = 1.yaml", *settings, "data.workers=1"],
        cwd=here, env=BARE, capture_output=True, timeout=600,
    )  # fmt: skip
    (here / "said").write_bytes(child.stdout + b"\n--\n" + child.stderr)
    assert child.returncode == 0, child.stderr.decode()
    assert contents(here / "dätä") == before, "nothing is written beside the data"
    return here


def test_a_training_in_all_of_them_at_once_is_a_whole_one(place, monkeypatch):
    said = (place / "said").read_text(encoding="utf-8")
    left = [line for line in said.splitlines() if line.startswith("medsynth:")]
    assert len(left) == 1 and left[0].endswith("left by another launch, and ignored; this run is one process")
    run = place / "läufe/a=b #1"
    assert (run / "export/unet").is_dir()
    monkeypatch.chdir(place)
    client = mlflow_client(f"sqlite:///{place}/mlruns.db")
    record = client.get_run(read_run_id(run))
    assert (record.info.status, record.info.run_name) == ("FINISHED", "größe=2 % # x")
    assert client.get_experiment(record.info.experiment_id).name == "Prüfung 日本"
    assert record.data.params["data.root"] == "dätä"
    assert "config.yaml" in [item.path for item in client.list_artifacts(record.info.run_id)]
    assert "train/loss" in record.data.metrics, "the first process logs, and it is the first"
    config = load_config([run / "config.yaml"])
    assert (config.run_dir, config.tracking.run_name) == ("läufe/a=b #1", "größe=2 % # x")


def test_what_is_drawn_of_it_has_the_prompts_as_they_were_written(place, monkeypatch):
    monkeypatch.chdir(place)
    prompts = ["ein Bild mit ß", "一个息肉", "a = b # c, 50% {x} $y"]
    lines = ["Prompt", *(f'"{prompt}"' for prompt in prompts)]
    (place / "wörter.csv").write_bytes("\r\n".join(lines).encode("utf-8-sig"))
    medsynth("sample", "läufe/a=b #1", "--prompts", "wörter.csv", "--out", "bilder #1")
    assert [Image.open(path).info["prompt"] for path in sorted((place / "bilder #1").glob("*.png"))] == prompts
    with (place / "bilder #1/manifest.csv").open(encoding="utf-8", newline="") as file:
        assert [row["prompt"] for row in csv.DictReader(file)] == prompts
    (place / "utf-16.csv").write_text("Prompt\nß\n", encoding="utf-16")
    with pytest.raises(UserError, match=r"utf-16.csv is not UTF-8: save it again as UTF-8"):
        medsynth("sample", "läufe/a=b #1", "--prompts", "utf-16.csv", "--out", "andere")


def test_its_latents_are_cached_beside_it(place, monkeypatch):
    monkeypatch.chdir(place)
    before = contents(place / "dätä")
    config = load_config(["läufe/a=b #1/config.yaml"], ["run_dir=läufe/zwei", "data.workers=0"])
    encode(config, place / "latente = #1")
    again = load_config(["läufe/a=b #1/config.yaml"], ["data.latents=latente = #1"])
    from jobs.run.folder import build_data, build_module

    data, _ = build_data(again, build_module(again))
    assert data.training_set()[0].latents is not None
    assert contents(place / "dätä") == before

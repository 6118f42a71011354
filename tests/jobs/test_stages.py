"""Stages of one job: one file, several trainings, in the processes of one launch."""

import os
import time
from pathlib import Path

import kubernetes_validate
import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file

from callbacks.durable import read_manifest
from callbacks.preemption import DifferentCheckpoints
from jobs import cli
from jobs.run.config import load_config
from jobs.study.job import read_job, train_job
from jobs.submit import load_for_job
from jobs.tracking.spool import read_events
from jobs.train import train
from medsynth.errors import UserError
from tests.conftest import REPOSITORY
from tests.processes import begin, together

TINY = REPOSITORY / "configs/tiny"
STEPS = 10
STAGES = f"""
set:
  data.root: DATA
  tracking.uri: sqlite:///mlruns.db
  tracking.timeout_seconds: 0
  train.max_steps: {STEPS}
  train.validate_every_steps: {STEPS}
  checkpoint.every_steps: 1
  checkpoint.monitor: val/loss
  evaluation.images: 0
  evaluation.grid: 0
stages:
  vae:
    config: {TINY}/msdm_vae.yaml
  msdm:
    config: {TINY}/msdm.yaml
    set: {{model.vae: "${{best.vae.export}}/vae"}}
"""
TWO_PROCESSES = ["hardware.devices=2", "hardware.strategy=ddp", "train.device_batch_size=2"]


def train_stages(rank: int, folder: Path, *arguments: str) -> None:
    """One process of a job, in `folder`."""
    os.chdir(folder)
    train_job(read_job(["stages.yaml", *TWO_PROCESSES, *arguments]), train)


def train_one(rank: int, folder: Path, config: str, *settings: str) -> None:
    os.chdir(folder)
    train(load_config([config], [*settings]))


def step(run: Path) -> int:
    try:
        return read_manifest(run / "checkpoints/last.ckpt")["global_step"]
    except UserError:
        return 0


def starts(run: Path) -> int:
    return sum(event["kind"] == "status" and event["status"] == "RUNNING" for event in read_events(run))


@pytest.fixture
def place(here, phantom) -> Path:
    (here / "stages.yaml").write_text(STAGES.replace("DATA", str(phantom)))
    return here


def medsynth(*arguments: object) -> str:
    result = CliRunner().invoke(cli.main, list(map(str, arguments)), standalone_mode=False)
    if result.exception:
        raise result.exception
    return result.output


def test_two_processes_killed_in_each_stage_end_as_two_runs_by_hand(place):
    """All lost at once in each stage, as with a node; the weights are those of two trainings apart."""
    for stage in ("vae", "msdm"):
        children = begin(2, train_stages, place, log=place / f"log-{stage}")
        end = time.monotonic() + 300
        while step(place / f"runs/stages/{stage}") < 3:
            assert all(child.is_alive() for child in children) and time.monotonic() < end, read(place / f"log-{stage}")
            time.sleep(0.02)
        for child in children:
            child.kill()
            child.join()
        assert step(place / f"runs/stages/{stage}") < STEPS
    together(2, train_stages, place, log=place / "log", seconds=300)
    assert {stage: starts(place / f"runs/stages/{stage}") for stage in ("vae", "msdm")} == {"vae": 2, "msdm": 2}

    alone = yaml.safe_load(read_job(["stages.yaml", *TWO_PROCESSES]).to_yaml())["stages"]
    for stage, settings in (("vae", []), ("msdm", ["model.vae=runs/alone/vae/export/vae"])):
        (place / f"{stage}.yaml").write_text(yaml.safe_dump(alone[stage]["config"]))
        settings = [*settings, f"run_dir=runs/alone/{stage}"]
        together(2, train_one, place, f"{stage}.yaml", *settings, log=place / f"log-alone-{stage}", seconds=300)
        ours, theirs = (
            load_file(place / f"runs/{job}/{stage}/checkpoints/last.ckpt/weights.safetensors")
            for job in ("stages", "alone")
        )
        assert ours.keys() == theirs.keys()
        assert not [key for key in ours if not torch.equal(ours[key], theirs[key])], stage


def read(log: Path) -> str:
    return "".join(path.read_text()[-3000:] for path in log.parent.glob(f"{log.name}.*"))


def test_two_processes_go_from_one_strategy_to_another(place):
    """Their group is of the whole job: the second stage shards what the first had whole."""
    text = (place / "stages.yaml").read_text().replace(f": {STEPS}", ": 2")
    text = text.replace("msdm_vae.yaml\n", "msdm_vae.yaml\n    set: {hardware.strategy: ddp}\n")
    (place / "stages.yaml").write_text(text.replace('/vae"}', '/vae", hardware.strategy: fsdp}'))
    arguments = [argument for argument in TWO_PROCESSES if "strategy" not in argument]
    together(2, train_with, place, arguments, log=place / "log", seconds=300)
    assert [step(place / f"runs/stages/{stage}") for stage in ("vae", "msdm")] == [2, 2]
    assert list((place / "runs/stages/msdm/checkpoints/last.ckpt").glob("shard-*"))
    assert (place / "runs/stages/msdm/export/unet").is_dir()


def train_with(rank: int, folder: Path, arguments: list[str]) -> None:
    os.chdir(folder)
    train_job(read_job(["stages.yaml", *arguments]), train)


def test_processes_at_different_stages_are_refused_before_they_wait_for_each_other(place):
    """As where a file system still shows one of them that a stage is not done."""
    children = begin(2, train_apart, place, log=place / "log")
    for child in children:
        child.join(200)
    assert [child.exitcode for child in children] == [1, 1], read(place / "log")
    for rank in range(2):
        assert "rank 0 goes on with another run than rank 1" in (place / f"refused-{rank}").read_text()


def train_apart(rank: int, folder: Path) -> None:
    """Each process another stage; the second is of a vae that was not trained, and waits for none."""
    os.chdir(folder)
    (_, first), (_, second) = read_job(["stages.yaml", *TWO_PROCESSES]).stages
    second.model.vae = "random"
    try:
        train(second if rank else first)
    except DifferentCheckpoints as error:
        Path(f"refused-{rank}").write_text(str(error))
        raise


def test_one_file_repeats_the_job(place):
    (place / "whole.yaml").write_text(medsynth("train", "stages.yaml", "run_dir=runs/mine", "--print"))
    assert "${" not in (place / "whole.yaml").read_text()
    assert medsynth("train", "whole.yaml", "--print") == (place / "whole.yaml").read_text()
    job = read_job(["whole.yaml", "train.max_steps=3"])
    assert [(name, config.run_dir, config.train.max_steps) for name, config in job.stages] == [
        ("vae", "runs/mine/vae", 3), ("msdm", "runs/mine/msdm", 3)
    ]  # fmt: skip
    assert job.stages[1][1].model.vae == "runs/mine/vae/export/vae"
    assert not (place / "runs").exists()


def test_the_shipped_job_is_read(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    for path in (REPOSITORY / "configs/stages").glob("*.yaml"):
        job = read_job([str(path), "configs/hardware/a100x8.yaml"])
        assert len(job.stages) > 1
        assert job.launched.hardware.devices == 8


@pytest.mark.parametrize(
    ("change", "arguments", "said"),
    [
        (("msdm_vae.yaml", "msdm_vae.yaml\n    grid: {seed: [0, 1]}\n    choose: {metric: val/loss, mode: min}"), [],
         "stage vae has 2 runs, and one job trains one a stage; medsynth sweep stages.yaml trains them all"),
        (("msdm_vae.yaml", "msdm_vae.yaml\n    set: {hardware.devices: 2, hardware.strategy: ddp, "
          "train.device_batch_size: 2}"), [],
         "stage msdm: hardware.devices=1, and that of stage vae is 2"),
        (("", ""), ["stages.yaml"], "both have stages"),
        (("", ""), ["seed=x"], "stage vae: seed=x: seed takes int"),
        (("", ""), ["--keys"], "--keys lists those of one run"),
        (("", ""), ["none.yaml"], "there is no config file none.yaml"),
        (("stages:", "satges:"), [], "there is no key"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(place, change, arguments, said):
    (place / "stages.yaml").write_text((place / "stages.yaml").read_text().replace(*change))
    with pytest.raises(UserError) as caught:
        medsynth("train", "stages.yaml", *arguments)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (place / "runs").exists()


def test_a_stage_that_is_done_with_another_config_is_refused(place):
    (place / "stages.yaml").write_text((place / "stages.yaml").read_text().replace(f": {STEPS}", ": 2"))
    medsynth("train", "stages.yaml")
    assert "is done" in medsynth("train", "stages.yaml")
    with pytest.raises(UserError, match="runs/stages/vae was trained with model.codec.widths="):
        medsynth("train", "stages.yaml", "model.codec.widths=[8,8,16]")


def test_a_job_of_stages_goes_where_a_run_goes(place):
    """Slurm's file of whole configs, and a manifest whose pods train it."""
    settings = ["hardware.strategy=ddp", "hardware.precision=32-true", "train.global_batch_size=8"]
    arguments = ["stages.yaml", *settings, "train.device_batch_size=2"]
    submission = load_for_job("slurm", arguments, 2, 2, on_cpus=True)
    assert submission.config.run_dir == "runs/stages"
    assert [run.hardware.nodes * run.hardware.devices for run in submission.runs] == [4, 4]
    (place / "travels.yaml").write_text(submission.text)
    assert read_job(["travels.yaml"]).configs == submission.runs
    printed = medsynth("submit", *arguments, "--cluster", "kubernetes", "--nodes", 2, "--gpus", 2, "--dry-run")
    found = [item for item in yaml.safe_load_all(printed) if item]
    for item in found:
        kubernetes_validate.validate(item, "1.33", strict=True)
    (job,) = [item for item in found if item["kind"] == "Job"]
    assert (job["metadata"]["name"], job["spec"]["completions"]) == ("stages-train", 2)
    (text,) = [item["data"]["config.yaml"] for item in found if item["kind"] == "ConfigMap"]
    (place / "pods.yaml").write_text(text)
    assert [c.preemption.grace_seconds for c in read_job(["pods.yaml"]).configs] == [540, 540]
    with pytest.raises(UserError, match="stage vae: train.global_batch_size=8 is no multiple"):
        load_for_job("slurm", arguments, 1, 8)

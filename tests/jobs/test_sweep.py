"""Whole sweeps of tiny runs on the CPU: stages that build on each other, killed in each of them and begun again."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import kubernetes_validate
import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file

from callbacks.durable import read_manifest
from jobs import cli
from jobs.report.runs import load_runs
from jobs.run.config import load_config
from jobs.study import local
from jobs.study.plan import all_runs
from jobs.study.read import read_study
from jobs.study.record import read_record
from jobs.tracking.server import mlflow_client
from jobs.tracking.spool import read_events, read_run_id
from jobs.train import train
from medsynth.errors import UserError
from tests.conftest import REPOSITORY
from tests.processes import FORK

TINY = REPOSITORY / "configs/tiny"
STEPS = 10
SWEEP = f"""
folder: study
set:
  data.root: DATA
  evaluation.cache: cache
  tracking.uri: sqlite:///mlruns.db
  train.max_steps: {STEPS}
  train.validate_every_steps: {STEPS}
  checkpoint.every_steps: 1
report: [eval/fd_random, eval/precision_random, eval/recall_random, val/loss]
stages:
  vae:
    config: {TINY}/msdm_vae.yaml
    grid: {{model.optim.lr: [1e-5, 1e-3]}}
    choose: {{metric: val/loss, mode: min}}
  msdm:
    config: {TINY}/msdm.yaml
    set: {{model.vae: "${{best.vae.export}}/vae"}}
    grid: {{seed: [0, 1]}}
    choose: {{metric: eval/fd_random, mode: max}}
    paper: [{{seed: 1, fd_random: 12.5}}]
  again:
    config: {TINY}/msdm.yaml
    set: {{model.vae: "${{best.msdm.model.vae}}", seed: "${{best.msdm.seed}}", train.max_steps: 4,
           train.validate_every_steps: 4}}
"""
RUNS = ["vae/lr-1e-05", "vae/lr-0.001", "msdm/seed-0", "msdm/seed-1", "again"]


def train_here(config: Path, again: bool) -> int:
    """What a process of its own would end with, in this one: python need not import all of it once more."""
    try:
        train(load_config([config]))
    except UserError as error:
        return error.exit_code
    except SystemExit as ending:
        return ending.code
    return 0


def medsynth(*arguments: object) -> str:
    result = CliRunner().invoke(cli.main, ["sweep", *map(str, arguments)], standalone_mode=False)
    if result.exception:
        raise result.exception
    return result.output


def begin(folder: Path, *arguments: str) -> FORK.Process:
    """`medsynth sweep sweep.yaml` in a fork, whose runs are trained in that process; it says so in `log`."""

    def child() -> None:
        os.chdir(folder)
        log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for number in (1, 2):
            os.dup2(log, number)
        sys.stdout, sys.stderr = os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)
        local.launch = train_here
        sys.argv = ["sweep", "sweep.yaml", *arguments]
        try:
            cli.run("sweep")
        except SystemExit as ending:
            os._exit(ending.code or 0)
        os._exit(0)

    process = FORK.Process(target=child)
    process.start()
    return process


def step(run: Path) -> int:
    try:
        return read_manifest(run / "checkpoints/last.ckpt")["global_step"]
    except UserError:  # just being replaced, or none yet
        return 0


def starts(run: Path) -> int:
    return sum(event["kind"] == "status" and event["status"] == "RUNNING" for event in read_events(run))


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints/last.ckpt/weights.safetensors")


def wait_for(condition, process: FORK.Process, folder: Path, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.is_alive() and time.monotonic() < end, (folder / "log").read_text()[-4000:]
        time.sleep(0.02)


@pytest.fixture(scope="module")
def killed(tmp_path_factory, phantom) -> Path:
    """The folder of a sweep whose process was killed in the second run of each of two stages, and came to its end."""
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "sweep.yaml").write_text(SWEEP.replace("DATA", str(phantom)))
    for run in ("vae/lr-0.001", "msdm/seed-1"):
        process = begin(folder)
        wait_for(lambda run=run: step(folder / "study" / run) >= 3, process, folder)
        process.kill()
        process.join()
        assert step(folder / "study" / run) < STEPS
    last = begin(folder)
    last.join(300)
    assert last.exitcode == 0, (folder / "log").read_text()[-4000:]
    return folder


def test_a_sweep_killed_in_each_stage_trains_each_run_once(killed):
    done = {run: starts(killed / "study" / run) for run in RUNS}
    assert done == {"vae/lr-1e-05": 1, "vae/lr-0.001": 2, "msdm/seed-0": 1, "msdm/seed-1": 2, "again": 1}
    for run in RUNS:
        assert step(killed / "study" / run) == (4 if run == "again" else STEPS), run
        steps = Counter(e["step"] for e in read_events(killed / "study" / run) if "train/loss" in e.get("values", ()))
        assert set(steps) == set(range(1, step(killed / "study" / run) + 1))
    said = (killed / "log").read_text()
    assert said.count("vae/lr-1e-05: begins") == 1 and said.count("vae/lr-1e-05: is done") == 2
    assert "stage 1 of 3, vae · run 2 of 2, vae/lr-0.001: goes on; about 0:" in said


def test_its_runs_are_those_of_train_alone(killed, here):
    """The second run of stage 2, which was killed, against one that `medsynth train` makes of the same config."""
    alone = load_config([killed / "study/msdm/seed-1/sweep.yaml"], ["run_dir=alone", f"model.vae={vae(killed)}"])
    alone.tracking.parent = None
    train(alone)
    ours, theirs = weights(killed / "study/msdm/seed-1"), weights(Path("alone"))
    assert ours.keys() == theirs.keys()
    assert not [key for key in ours if not torch.equal(ours[key], theirs[key])]


def vae(folder: Path) -> Path:
    return folder / load_config([folder / "study/msdm/seed-0/config.yaml"]).model.vae


def test_later_stages_build_on_the_best_before_them(killed):
    losses = {run: last(killed / "study" / run, "val/loss") for run in RUNS[:2]}
    best = min(losses, key=losses.get)
    assert vae(killed) == killed / "study" / best / "export/vae"
    distances = {run: last(killed / "study" / run, "eval/fd_random") for run in RUNS[2:4]}
    worst = max(distances, key=distances.get)  # as the file asks
    again = load_config([killed / "study/again/config.yaml"])
    assert again.seed == int(worst[-1])
    assert killed / again.model.vae == vae(killed)


def last(run: Path, metric: str) -> float:
    return [event["values"][metric] for event in read_events(run) if metric in event.get("values", ())][-1]


def test_mlflow_has_one_run_above_all_others(killed):
    client = mlflow_client(f"sqlite:///{killed}/mlruns.db")
    (experiment,) = [item for item in client.search_experiments() if item.name == "medsynth"]
    records = {record.info.run_name: record for record in client.search_runs([experiment.experiment_id])}
    parent = records.pop("sweep")
    assert parent.info.run_id == read_run_id(killed / "study")
    assert parent.info.status == "FINISHED"
    assert set(records) == set(RUNS)
    assert {record.data.tags["mlflow.parentRunId"] for record in records.values()} == {parent.info.run_id}
    assert {record.info.status for record in records.values()} == {"FINISHED"}
    compared = load_runs(client, experiment.experiment_id, "medsynth", (), training=False)
    assert {run.name for run in compared} == set(RUNS), "medsynth compare leaves the study's own out"
    logged = {item.path for item in client.list_artifacts(parent.info.run_id)}
    assert {"sweep.yaml", "report.md", "report.csv", "report.png"} <= logged


def test_its_report_has_the_numbers_that_mlflow_has(killed):
    client = mlflow_client(f"sqlite:///{killed}/mlruns.db")
    header, *lines = (line.split(",") for line in (killed / "study/report.csv").read_text().splitlines())
    rows = {line[header.index("run")]: dict(zip(header, line, strict=True)) for line in lines}
    assert set(rows) == set(RUNS)
    study = read_study(killed / "sweep.yaml", folder=killed / "study")
    by_record = {run.label: read_record(run) for run in all_runs(study)}
    for run in RUNS[2:]:
        metrics = client.get_run(read_run_id(killed / "study" / run)).data.metrics
        for metric in ("eval/fd_random", "eval/precision_random", "eval/recall_random", "val/loss"):
            assert float(rows[run][metric]) == metrics[metric] == by_record[run].score(metric), (run, metric)
    assert (rows["msdm/seed-1"]["paper eval/fd_random"], rows["msdm/seed-0"]["paper eval/fd_random"]) == ("12.5", "")
    assert (killed / "study/report.png").read_bytes().startswith(b"\x89PNG")
    assert sum(row["best"] == "yes" for row in rows.values()) == 3


@pytest.fixture
def finished(killed, monkeypatch) -> Path:
    monkeypatch.chdir(killed)
    monkeypatch.setattr(local, "launch", lambda config, again: pytest.fail(f"{config} is trained again"))
    return killed


def test_what_is_done_is_not_trained_again(finished):
    said = medsynth("sweep.yaml")
    assert said.count(": is done") == 5
    assert medsynth("sweep.yaml", "--only", "msdm/seed-1").count(": is done") == 1


def test_the_plan_says_how_far_each_run_is(finished):
    before = sorted(finished.rglob("*"))
    said = medsynth("sweep.yaml", "--dry-run")
    assert said.count(": done\n") == 5
    assert f"model.vae={vae(finished).relative_to(finished)}" in said
    assert sorted(finished.rglob("*")) == before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ((f"max_steps: {STEPS}", "max_steps: 99"), f"vae/lr-1e-05 was trained with train.max_steps={STEPS}, and"),
        (("mode: max", "mode: min"), "study/again was trained with seed="),
        (
            ("metric: val/loss, mode: min", "metric: val/loss, mode: max"),
            "study/msdm/seed-0 was trained with model.vae=",
        ),
        (("folder: study", "folder: study/vae/lr-0.001"), "study/vae/lr-0.001 is the folder of a run"),
    ],
)
def test_a_file_that_contradicts_what_ran_is_refused(finished, change, said):
    (finished / "sweep.yaml.new").write_text((finished / "sweep.yaml").read_text().replace(*change))
    folder = finished / "changed"
    folder.mkdir(exist_ok=True)
    (finished / "sweep.yaml.new").rename(folder / "sweep.yaml")
    with pytest.raises(UserError) as caught:
        medsynth("changed/sweep.yaml")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_sweep_in_its_folder_is_refused(finished):
    (finished / "other.yaml").write_text((finished / "sweep.yaml").read_text())
    with pytest.raises(UserError, match="study belongs to the sweep sweep; choose another folder for other.yaml"):
        medsynth("other.yaml")


def test_only_takes_what_is_there(finished):
    with pytest.raises(UserError, match="--only msdm/sed-1: there is no such run; did you mean msdm/seed-1?"):
        medsynth("sweep.yaml", "--only", "msdm/sed-1")


# Runs that fail, without a run that is trained for long


@pytest.fixture
def failing(here, phantom, monkeypatch) -> Path:
    """A stage of a run that diverges and a sound one, and a stage after it."""
    text = f"""
folder: study
set: {{data.root: {phantom}, tracking.uri: "sqlite:///mlruns.db", evaluation.cache: cache}}
stages:
  vae:
    config: {TINY}/msdm_vae.yaml
    list:
      - {{name: mad, model.optim.lr: 1e30, train.max_steps: 8, train.tolerate_nonfinite: 1}}
      - {{name: sound, model.optim.lr: 1e-4}}
    choose: {{metric: val/loss, mode: min}}
  msdm:
    config: {TINY}/msdm.yaml
    set: {{model.vae: "${{best.vae.export}}/vae"}}
"""
    (here / "sweep.yaml").write_text(text)
    monkeypatch.setattr(local, "launch", train_here)
    return here


def test_a_run_that_diverges_is_told_of_and_left_out_where_that_is_asked_for(failing, monkeypatch):
    with pytest.raises(UserError) as caught:
        medsynth("sweep.yaml", "--only", "msdm")
    assert "the best of stage vae is not known yet: vae/mad, vae/sound not done" in str(caught.value)
    with pytest.raises(UserError) as caught:
        medsynth("sweep.yaml")
    assert "stage vae: 1 of 2 runs failed (vae/mad; vae/mad: training diverged" in str(caught.value)
    assert "--skip-failed" in str(caught.value)
    assert not Path("study/msdm").exists()
    assert "vae/mad failed: training diverged" in Path("study/report.md").read_text()
    said = medsynth("sweep.yaml", "--skip-failed")
    assert "vae/mad: failed and is left out (training diverged" in said
    assert "best of vae: study/vae/sound" in said
    assert load_config(["study/msdm/config.yaml"]).model.vae == "study/vae/sound/export/vae"
    assert starts(Path("study/vae/mad")) == 1
    client = mlflow_client("sqlite:///mlruns.db")
    assert client.get_run(read_run_id("study/vae/mad")).data.tags["failure"].startswith("training diverged")


# The command itself, in a process of its own, as are its runs


def test_a_sweep_that_is_asked_to_leave_or_killed_goes_on(here, phantom):
    """Killed alone, it takes its run with it, which saves: the next start finds it left, or waits for its end."""
    text = SWEEP.replace("DATA", str(phantom)).partition("  msdm:\n")[0].replace("[1e-5, 1e-3]", "[1e-4]")
    (here / "sweep.yaml").write_text(text.replace(f": {STEPS}", ": 60"))
    mlflow_client(f"sqlite:///{here}/mlruns.db")
    run, before = here / "study/vae/lr-0.0001", 0
    for number, code in ((signal.SIGTERM, 75), (signal.SIGKILL, -9)):
        process = sweep(here)
        end = time.monotonic() + 300
        while step(run) < before + 2:
            assert process.poll() is None and time.monotonic() < end, (here / "log").read_text()
            time.sleep(0.02)
        process.send_signal(number)
        assert process.wait(120) == code, (here / "log").read_text()
        before = step(run)
        assert before < 60
    assert sweep(here).wait(300) == 0, (here / "log").read_text()
    assert (here / "log").read_text().count("resuming from study/vae/lr-0.0001/checkpoints/last.ckpt") == 2
    assert step(run) == 60
    assert json.loads((run / "sweep.json").read_text())["seconds"] > 0


def sweep(folder: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "jobs.sweep", "sweep.yaml"]
    with (folder / "log").open("a") as log:
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
        return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)


# What clusters are given once a stage is done


@pytest.fixture
def after_one_stage(killed, here) -> Path:
    """The sweep's folder where its first stage alone has been trained."""
    shutil.copytree(killed / "study/vae", "study/vae")
    shutil.copy(killed / "sweep.yaml", here)
    (here / "slurm").mkdir()
    for preset in ("msdm_vae", "msdm"):
        (here / f"slurm/{preset}.sh").write_text(f'launch {TINY}/{preset}.yaml -- "$@"')
    return here


def test_the_choosing_step_writes_what_the_next_array_trains(after_one_stage):
    with pytest.raises(UserError, match="seed=3: the runs of msdm differ by it"):
        medsynth("sweep.yaml", "seed=3", "--tables=runs/slurm/t")
    asked = medsynth("sweep.yaml", "--tables=runs/slurm/t")
    lines = [line.split("\t") for line in asked.splitlines() if "\t" in line]
    assert lines == [
        ["vae", "slurm/msdm_vae.sh", "-", "runs/slurm/t-vae.tsv", "choose"],
        ["msdm", "slurm/msdm.sh", "1-2", "runs/slurm/t-msdm.tsv", "choose"],
        ["again", "slurm/msdm.sh", "1", "runs/slurm/t-again.tsv", "choose"],
    ]
    Path("runs/slurm/t-msdm.tsv").unlink()
    assert "best of vae: study/vae/lr-0.001" in medsynth("sweep.yaml", "--tables=runs/slurm/t", "--choose=vae")
    preset, *runs = (line.split("\t") for line in Path("runs/slurm/t-msdm.tsv").read_text().splitlines())
    assert preset == [f"{TINY}/msdm.yaml"]
    assert [run[-2:] for run in runs] == [[f"seed={n}", f"run_dir=study/msdm/seed-{n}"] for n in (0, 1)]
    assert all("model.vae=study/vae/lr-0.001/export/vae" in run for run in runs)
    assert not Path("runs/slurm/t-again.tsv").exists()
    with pytest.raises(UserError, match="best of stage msdm is not known yet: msdm/seed-0, msdm/seed-1 not done"):
        medsynth("sweep.yaml", "--tables=runs/slurm/t", "--choose=msdm")


def test_manifests_are_of_the_runs_that_can_begin(after_one_stage):
    settings = ["hardware.precision=32-true", "hardware.accelerator=cpu"]
    printed = medsynth("sweep.yaml", *settings, "--manifests", "--gpus", 1, "--image", "registry/medsynth:1")
    objects = [item for item in yaml.safe_load_all(printed.partition("\n2 runs to train")[0]) if item]
    for item in objects:
        kubernetes_validate.validate(item, "1.33", strict=True)
    jobs = {item["metadata"]["name"]: item for item in objects if item["kind"] == "Job"}
    assert list(jobs) == ["sweep-msdm-seed-0-train", "sweep-msdm-seed-1-train"]
    (container,) = jobs["sweep-msdm-seed-0-train"]["spec"]["template"]["spec"]["containers"]
    assert container["image"] == "registry/medsynth:1"
    configs = [yaml.safe_load(i["data"]["config.yaml"]) for i in objects if i["kind"] == "ConfigMap"]
    assert [config["model"]["vae"] for config in configs] == ["study/vae/lr-0.001/export/vae"] * 2
    assert [config["hardware"]["devices"] for config in configs] == [1, 1]
    assert [config["tracking"]["parent"] for config in configs] == ["study", "study"]
    with pytest.raises(UserError, match="--gpus go with --manifests"):
        medsynth("sweep.yaml", "--gpus", 2)

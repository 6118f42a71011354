"""Stages on a real Slurm of two nodes: a sweep's arrays, which wait for each other's choice, and stages of one job."""

import csv
from pathlib import Path

import yaml

from jobs.study.record import is_finished
from tests.cluster.cluster import ALLOCATION, SETTINGS, Slurm, log, step, wait_for

STAGES = {
    "vae": {
        "config": ["configs/msdm_vae.yaml", "configs/tiny/msdm_vae.yaml"],
        "grid": {"model.optim.lr": [1e-5, 1e-3]},
        "choose": {"metric": "val/loss", "mode": "min"},
    },
    "msdm": {
        "config": ["configs/msdm.yaml", "configs/tiny/msdm.yaml"],
        "set": {"model.vae": "${best.vae.export}/vae"},
    },
}
SHORT = [*SETTINGS[1:], "train.max_steps=12", "train.validate_every_steps=12"]


def requeue_after_a_step(slurm: Slurm, folder: Path, job: str, run: str) -> None:
    wait_for(lambda: step(folder, run) > 0, f"a step of {run}, {log(folder, job)}", 300)
    slurm.call("scontrol", "requeue", job)


def test_a_sweep_whose_stages_wait_for_each_other(slurm, folders):
    folder = folders("stages")
    (folder / "two.yaml").write_text(yaml.safe_dump({"stages": STAGES}, sort_keys=False))
    said = slurm.call("slurm/sweep.sh", "two.yaml", *ALLOCATION, *SHORT, cwd=folder)
    array, choice, second, last = (line.split(" job ")[1].split()[0] for line in said.splitlines())
    assert slurm.job(second)["Dependency"].startswith(f"afterok:{choice}")
    requeue_after_a_step(slurm, folder, f"{array}_2", "runs/two/vae/lr-0.001")
    for job in (f"{array}_1", f"{array}_2", choice, second, last):
        assert slurm.end(job, seconds=900)["JobState"] == "COMPLETED", log(folder, job)
    with (folder / "runs/two/report.csv").open() as file:
        rows = {row["run"]: row for row in csv.DictReader(file)}
    assert {run: row["state"] for run, row in rows.items()} == {
        "vae/lr-1e-05": "done", "vae/lr-0.001": "done", "msdm": "done"
    }  # fmt: skip
    losses = {run: float(row["val/loss"]) for run, row in rows.items() if row["val/loss"] and run != "msdm"}
    best = min(losses, key=losses.get)
    assert rows[best]["best"] == "yes"
    config = yaml.safe_load((folder / "runs/two/msdm/config.yaml").read_text())
    assert config["model"]["vae"] == f"runs/two/{best}/export/vae"


def test_stages_after_one_whose_runs_failed_are_taken_back(slurm, folders):
    folder = folders("stages-failed")
    stages = {name: dict(stage) for name, stage in STAGES.items()}
    stages["vae"]["set"] = {"data.root": "nowhere"}
    (folder / "two.yaml").write_text(yaml.safe_dump({"stages": stages}, sort_keys=False))
    settings = [setting for setting in SHORT if not setting.startswith("data.root")]
    said = slurm.call("slurm/sweep.sh", "two.yaml", *ALLOCATION, *settings, cwd=folder)
    array, choice, second, last = (line.split(" job ")[1].split()[0] for line in said.splitlines())
    assert slurm.end(f"{array}_1", seconds=600)["JobState"] == "FAILED"
    assert slurm.end(choice, seconds=600)["JobState"] == "FAILED"
    assert slurm.end(second)["JobState"] == "CANCELLED"
    assert slurm.end(last, seconds=600)["JobState"] == "FAILED", "it comes after whatever end, and reports"


def test_stages_of_one_job_go_on_in_the_stage_where_they_were(slurm, folders):
    folder = folders("job")
    vae = {key: value for key, value in STAGES["vae"].items() if key == "config"}
    (folder / "both.yaml").write_text(yaml.safe_dump({"stages": STAGES | {"vae": vae}}, sort_keys=False))
    job = slurm.call("sbatch", "--parsable", *ALLOCATION, "slurm/stages.sh", "both.yaml", *SHORT, cwd=folder)
    for stage in ("vae", "msdm"):
        requeue_after_a_step(slurm, folder, job, f"runs/both/{stage}")
    fields = slurm.end(job, seconds=900)
    assert (fields["JobState"], fields["Restarts"]) == ("COMPLETED", "2"), log(folder, job)
    assert all(is_finished(folder / f"runs/both/{stage}") for stage in ("vae", "msdm"))
    assert log(folder, job).count("stage 1 of 2, vae: is done") == 1

"""`medsynth submit` on a real Slurm and on this machine."""

import os
import signal

import pytest
from omegaconf import OmegaConf

from tests.cluster.cluster import (
    RUN,
    SubmittedTraining,
    assert_same_run,
    call_submit,
    job_of,
    start,
    step,
    wait_for,
    watched,
)


def test_a_run_through_everything_that_slurm_does_is_watched_to_its_end(slurm, folders, undisturbed, whole_matrix):
    folder = folders("submitted")
    options = ["--cluster=slurm", "--nodes=2", "--gpus=1", "--time=1:00:00"]
    process = start(slurm, folder, *options)
    training = SubmittedTraining(slurm, folder, job_of(folder))
    disturbances = [
        training.requeue,
        training.kill_a_rank,
        training.make_room,
        training.terminate_the_ranks,
        training.stop_the_first_rank,
    ]
    if whole_matrix:
        disturbances += [training.warn, training.lose_a_node, training.warn_during_a_save]
        disturbances += [training.warn_twice, training.stop_a_rank]
    training.survive(disturbances)
    training.warn_before_a_step()
    assert process.wait(600) == 0, watched(folder)
    fields = slurm.end(training.job)
    assert (fields["JobState"], fields["Restarts"]) == ("COMPLETED", str(len(disturbances) + 1)), training.log()[-4000:]
    assert fields["TimeLimit"] == "01:00:00"
    assert_same_run(folder, undisturbed)
    assert "MLflow: medsynth ui" in watched(folder)
    assert "resuming from" in watched(folder)


def test_a_submitted_run_that_its_owner_cancels_stays_cancelled(slurm, folders):
    folder = folders("cancelled")
    process = start(slurm, folder, "--cluster=slurm", "--nodes=1", "--gpus=1", "train.device_batch_size=4")
    job = job_of(folder)
    wait_for(lambda: step(folder) > 0, f"a step: {watched(folder)}", 180)
    slurm.call("scancel", job)
    fields = slurm.end(job)
    assert (fields["JobState"], fields["Restarts"]) == ("CANCELLED", "0"), watched(folder)
    assert process.wait(60) != 0


def test_a_local_run_goes_on_after_a_preemption(slurm, folders, undisturbed):
    folder = folders("local")
    grace = "preemption.grace_seconds=60"  # who leaves before MLflow has all of it is not started again
    process = start(slurm, folder, "--cluster=local", "--gpus=2", "hardware.strategy=ddp", grace)
    job = job_of(folder)
    wait_for(lambda: step(folder) > 0, f"a step: {watched(folder)}", 180)
    os.kill(int(job), signal.SIGTERM)  # its controller passes it on
    assert process.wait(600) == 0, watched(folder)
    assert "resuming from" in watched(folder)
    assert_same_run(folder, undisturbed)


def test_what_the_job_ends_with_is_what_watch_ends_with(slurm, folders):
    folder = folders("refused")
    process = start(slurm, folder, "--cluster=local", "train.device_batch_size=4", "data.root=nowhere")
    assert process.wait(180) == 2
    assert "nowhere" in watched(folder)


def test_a_mistake_that_every_process_finds_ends_the_job(slurm, folders):
    folder = folders("refused")
    process = start(slurm, folder, "--cluster=slurm", "--nodes=1", "--gpus=2", "data.root=nowhere")
    assert process.wait(180) == 2, watched(folder)
    fields = slurm.end(job_of(folder))
    assert (fields["JobState"], fields["ExitCode"], fields["Restarts"]) == ("FAILED", "2:0", "0"), watched(folder)
    assert "nowhere" in watched(folder)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--cluster=slurm", "model.optim.rate=1"], "there is no key model.optim.rate"),
        (["--cluster=local", "--nodes=2", "hardware.strategy=ddp"], "--cluster local is this machine alone"),
        (["--cluster=slurm", "--time=1h"], "give [DAYS-]HOURS:MINUTES:SECONDS"),
        (["--cluster=slurm", "--gpus=1", "--nodes=2", "hardware.strategy=dpp"], "hardware.strategy=dpp"),
    ],
)
def test_a_mistake_is_refused_before_anything_is_submitted(slurm, folders, options, said):
    folder = folders("mistake")
    result = call_submit(slurm, folder, *options)
    assert (result.returncode, result.stdout) == (2, "")
    assert said in result.stderr
    assert not (folder / "runs/tiny-msdm").exists()


def test_without_a_site_there_is_one_line(slurm, folders):
    folder = folders("nosite")
    (folder / "slurm/site.env").unlink()
    result = call_submit(slurm, folder, "--cluster=slurm")
    assert result.returncode == 2
    assert result.stderr == "medsynth: slurm/site.env is missing; copy slurm/site.env.example and fill it in\n"


def test_dry_run_shows_what_would_be_submitted(slurm, folders):
    folder = folders("dry")
    options = ["--cluster=slurm", "--nodes=2", "--gpus=1", "--time=2-00:00:00", "--dry-run"]
    result = call_submit(slurm, folder, *options)
    assert result.returncode == 0, result.stderr
    printed = result.stdout
    for line in ("#SBATCH --nodes=2", "#SBATCH --ntasks-per-node=1", "#SBATCH --time=2880", "#SBATCH --requeue"):
        assert line in printed.splitlines()
    assert "#SBATCH --signal=B:USR1@300" in printed.splitlines()
    config = OmegaConf.create(printed[printed.index("method: msdm") :])
    assert config.hardware.nodes == 2
    assert not (folder / RUN).exists()

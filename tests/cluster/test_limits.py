"""A time limit that strikes, for a job of sbatch and one of `medsynth submit`, which wait side by side."""

import signal

from tests.cluster.cluster import (
    BatchTraining,
    SubmittedTraining,
    assert_same_run,
    job_of,
    start,
    submit,
    wait_for,
    watched,
)


def test_a_time_limit_that_strikes(slurm, folders, undisturbed):
    """The first start is warned and saves; all ranks of the second hang to its end; the third has the time it needs.

    The limit of ten minutes is shortened once the ranks, stopped, wait for it: however long they took to start.
    """
    batch, submitted = folders("limit-sbatch"), folders("limit-submit")
    process = start(slurm, submitted, "--cluster=slurm", "--nodes=2", "--gpus=1", "--time=0:10:00")
    both = [
        BatchTraining(slurm, batch, submit(slurm, batch, options=["--time=10"])),
        SubmittedTraining(slurm, submitted, job_of(submitted)),
    ]
    for training in both:
        training.wait_for_a_step()
        training.send(signal.SIGSTOP)
        assert not training.hold_a_warning()
        training.shorten(120)
    for training in both:
        wait_for(training.hold_a_warning, f"Slurm's warning, {training.log()}")
        training.limit(10)  # of the next start
        training.send(signal.SIGCONT)
    for training in both:
        training.wait_for_restart(1, "warned")
        assert "SIGUSR1: saving at the end of this step" in training.log()
        assert "has not ended in time" not in training.log()

    for training in both:
        training.wait_for_a_step()
        training.send(signal.SIGSTOP)
        training.shorten(45)
    for training in both:
        training.wait_for_restart(2, "hanging", 240)
        assert "slurm: a process has not ended in time; the job is requeued" in training.log()
        training.limit(60)

    for training in both:
        fields = slurm.end(training.job, seconds=600)
        assert (fields["JobState"], fields["Restarts"]) == ("COMPLETED", "2"), training.log()
        assert_same_run(training.folder, undisturbed)
    assert process.wait(60) == 0, watched(submitted)

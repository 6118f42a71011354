"""Training on a real Slurm of two nodes, disturbed in every way Slurm knows: the weights of a run left alone."""

import os
import signal
from contextlib import suppress
from pathlib import Path

from tests.cluster.cluster import RUN, Slurm, assert_same_run, log, step, submit, wait_for


class Disturbances:
    """What happens to the job whose run is in `folder`, and whose ranks are processes of this machine."""

    def __init__(self, slurm: Slurm, folder: Path, job: str):
        self.slurm, self.folder, self.job = slurm, folder, job

    def requeue(self) -> None:
        self.slurm.call("scontrol", "requeue", self.job)

    def lose_a_node(self) -> None:
        self.slurm.lose_node(self.job)

    def kill_a_rank(self) -> None:
        """As the kernel does where memory runs out."""
        os.kill(self.ranks()[1], signal.SIGKILL)

    def signal(self) -> None:
        """What --signal=B:USR1@… does ahead of the time limit."""
        self.slurm.call("scancel", "--batch", "--signal=USR1", self.job)

    def signal_twice(self) -> None:
        self.signal()
        self.signal()

    def signal_during_a_save(self) -> None:
        checkpoints = self.folder / RUN / "checkpoints"
        wait_for(lambda: list(checkpoints.glob(".last.ckpt.tmp-*")), "a save", pause=0.001)
        self.signal()

    def terminate_the_ranks(self) -> None:
        self.slurm.call("scancel", "--signal=TERM", self.job)

    def stop_a_rank(self) -> None:
        """The other one must not wait for it longer than the grace."""
        os.kill(self.ranks()[1], signal.SIGSTOP)
        self.signal()

    def ranks(self) -> dict[int, int]:
        """Process id of each rank."""
        found = {}
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError, UnicodeDecodeError):
                variables = dict(item.partition("=")[::2] for item in (process / "environ").read_text().split("\0"))
                python = "-m\0jobs.train" in (process / "cmdline").read_text() and "SLURM_PROCID" in variables
                if python and (process / "cwd").resolve() == self.folder:
                    found[int(variables["SLURM_PROCID"])] = int(process.name)
        return found


def test_a_run_through_everything_that_slurm_does(slurm, folders, undisturbed):
    folder = folders("disturbed")
    job = submit(slurm, folder)
    happens = Disturbances(slurm, folder, job)
    disturbances = [
        happens.signal,
        happens.requeue,
        happens.lose_a_node,
        happens.kill_a_rank,
        happens.signal_during_a_save,
        happens.terminate_the_ranks,
        happens.signal_twice,
        happens.stop_a_rank,
    ]
    for restarts, disturb in enumerate(disturbances, start=1):
        before = step(folder)
        wait_for(lambda s=before: step(folder) > s, f"a step of start {restarts}, {log(folder, job)}", 180)
        disturb()
        wait_for(lambda n=restarts: slurm.job(job)["Restarts"] == str(n), f"{disturb.__name__}, {log(folder, job)}")
        wait_for(lambda n=restarts: begun(folder, job) > n, f"start {restarts + 1}, {log(folder, job)}")
    # Before the first step; srun loses what comes while it is still starting the processes.
    wait_for(lambda: len(happens.ranks()) == 2, "two processes", 60)
    happens.signal()
    fields = slurm.end(job, seconds=300)
    assert (fields["JobState"], fields["Restarts"]) == ("COMPLETED", str(len(disturbances) + 1)), log(folder, job)
    assert_same_run(folder, undisturbed)


def begun(folder: Path, job: str) -> int:
    """How often the batch script has."""
    return (folder / f"slurm/logs/msdm-{job}.log").read_text().count("log: ")

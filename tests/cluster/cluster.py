"""A real Slurm of two virtual nodes, and a run on it that is short and the same bit for bit."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from callbacks.durable import read_manifest
from jobs.cli import run
from jobs.tracking.server import mlflow_client
from jobs.tracking.spool import read_run_id
from medsynth.errors import UserError
from tests.conftest import REPOSITORY
from tests.processes import FORK

STEPS = 80  # each start that is disturbed makes three, rarely five, and there are twelve at the most
RUN = "runs/tiny-msdm"
ALLOCATION = ["--nodes=2", "--gpus-per-node=1", "--cpus-per-gpu=1"]
SETTINGS = [
    "configs/tiny/msdm.yaml",
    "data.root=phantom",
    "data.validation_images=2",
    "train.device_batch_size=2",
    f"train.max_steps={STEPS}",
    f"train.validate_every_steps={STEPS}",
    "checkpoint.every_steps=1",
    "checkpoint.monitor=val/loss",
    "evaluation.images=0",
    "evaluation.grid=0",
    "hardware.threads=1",
    "preemption.grace_seconds=10",
]

SUBMIT = [sys.executable, "-m", "jobs.submit", "configs/msdm.yaml", *SETTINGS]


def wait_for(condition: Callable[[], object], what: str, seconds: float = 240, pause: float = 0.1):
    """The first true value of `condition`, asked every `pause` seconds."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"{what}: not within {seconds} s"
        time.sleep(pause)
    return value


@dataclass
class Slurm:
    """The running cluster; its commands find it by the environment."""

    folder: Path
    environment: dict[str, str]

    def run(self, *command: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        """A command that speaks to this cluster."""
        words = [str(word) for word in command]
        return subprocess.run(words, cwd=cwd, env=self.environment, capture_output=True, text=True, timeout=300)

    def call(self, *command: object, cwd: Path | None = None) -> str:
        """What a command prints that must succeed."""
        result = self.run(*command, cwd=cwd)
        assert result.returncode == 0, f"{command}: {result.stdout}{result.stderr}"
        return result.stdout.strip()

    def job(self, job: str) -> dict[str, str]:
        """The fields of `scontrol show job`, for instance JobState, ExitCode, Restarts."""
        fields = self.call("scontrol", "show", "job", "--oneliner", job).split()
        return dict(field.partition("=")[::2] for field in fields)

    def wait(self, job: str, *states: str, seconds: float = 120) -> dict[str, str]:
        """The job's fields once it is in one of `states`."""

        def reached() -> dict[str, str] | None:
            fields = self.job(job)
            return fields if fields["JobState"] in states else None

        return wait_for(reached, f"job {job} {' or '.join(states)}; it is {self.job(job)}", seconds)

    def end(self, job: str, seconds: float = 120) -> dict[str, str]:
        """The job's fields once it has ended for good."""
        return self.wait(job, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", seconds=seconds)

    def lose_node(self, job: str) -> None:
        """Set n2 DOWN, and back once `job`, which was running there, waits again."""
        node = ("scontrol", "update", "nodename=n2")
        self.call(*node, "state=down", "reason=test")
        self.wait(job, "PENDING")
        wait_for(lambda: self.run(*node, "state=resume").returncode == 0, "n2 back")


def clone(folder: Path) -> Path:
    """What of the repository the scripts need, unmodified, in `folder`, which has room for what they make."""
    for part in ("slurm", "configs"):
        shutil.copytree(REPOSITORY / part, folder / part, ignore=shutil.ignore_patterns("site.env", "*.log"))
    return folder


def write_site(clone: Path, venv: Path = Path(sys.prefix), **facts: str) -> None:
    """slurm/site.env of a cluster of CPUs."""
    lines = {"VENV": venv, "CPU": "1", "GLOO_SOCKET_IFNAME": "lo"} | facts
    (clone / "slurm/site.env").write_text("".join(f"export {key}={value}\n" for key, value in lines.items()))


def submit(slurm: Slurm, folder: Path, *settings: str, options: Sequence[str] = ()) -> str:
    """The id of the job of slurm/msdm.sh, two nodes with a process each."""
    return slurm.call("sbatch", "--parsable", *ALLOCATION, *options, "slurm/msdm.sh", *SETTINGS, *settings, cwd=folder)


def start(slurm: Slurm, folder: Path, *options: str) -> subprocess.Popen[str]:
    """`medsynth submit … --watch`, which prints into watched.log."""
    command = [*SUBMIT, *options, "--watch"]
    out = (folder / "watched.log").open("w")
    return subprocess.Popen(command, cwd=folder, env=slurm.environment, stdout=out, stderr=subprocess.STDOUT, text=True)


def call_submit(slurm: Slurm, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """`medsynth submit …` to its end, in a fork of this process: python need not import all of it once more."""
    out, err = folder / "submit.out", folder / "submit.err"

    def child() -> None:
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(slurm.environment)
        for number, path in ((1, out), (2, err)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        sys.argv = [*SUBMIT[2:], *options]
        run("submit")

    process = FORK.Process(target=child)
    process.start()
    process.join(300)
    process.kill()
    return subprocess.CompletedProcess([*SUBMIT, *options], process.exitcode, out.read_text(), err.read_text())


def job_of(folder: Path) -> str:
    """The id that `medsynth submit` has printed."""
    lines = wait_for(lambda: watched(folder).splitlines(), "a job", 180)
    assert lines[0].startswith("job "), lines
    return lines[0].split()[1]


def watched(folder: Path) -> str:
    return (folder / "watched.log").read_text()


def log(folder: Path, job: str) -> str:
    return "".join(path.read_text() for path in folder.glob(f"**/*{job}*.*o*[gt]"))[-6000:]


def step(folder: Path, run: str = RUN) -> int:
    """The global step of the last checkpoint, 0 where there is none."""
    try:
        return read_manifest(folder / run / "checkpoints/last.ckpt")["global_step"]
    except UserError:  # just being replaced, or none yet
        return 0


class Training:
    """The job that trains in `folder`, whose ranks are processes of this machine, and what can happen to it."""

    def __init__(self, slurm: Slurm, folder: Path, job: str):
        self.slurm, self.folder, self.job = slurm, folder, job

    def requeue(self) -> None:
        self.slurm.call("scontrol", "requeue", self.job)

    def lose_a_node(self) -> None:
        self.slurm.lose_node(self.job)

    def make_room(self) -> None:
        """For a more urgent job: Slurm's own preemption."""
        options = ["--parsable", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null"]
        urgent = self.slurm.call("sbatch", *options, "--wrap=sleep 1", cwd=self.folder)
        assert self.slurm.end(urgent)["JobState"] == "COMPLETED"

    def kill_a_rank(self) -> None:
        """As the kernel does where memory runs out."""
        os.kill(self.ranks()[1], signal.SIGKILL)

    def warn(self) -> None:
        """What --signal=B:USR1@… does ahead of the time limit."""
        self.slurm.call("scancel", "--batch", "--signal=USR1", self.job)

    def warn_twice(self) -> None:
        self.warn()
        self.warn()

    def warn_before_a_step(self) -> None:
        """Held until both ranks have it: srun loses what comes while it still starts them."""
        self.wait_for_ranks()
        self.send(signal.SIGSTOP)

        wait_for(lambda: self.hold_a_warning() or self.warn(), f"a warning, {self.log()}", pause=1)
        self.send(signal.SIGCONT)

    def warn_during_a_save(self) -> None:
        checkpoints = self.folder / RUN / "checkpoints"
        wait_for(lambda: list(checkpoints.glob(".last.ckpt.tmp-*")), "a save", pause=0.001)
        self.warn()

    def terminate_the_ranks(self) -> None:
        self.slurm.call("scancel", "--signal=TERM", self.job)

    def stop_a_rank(self, rank: int = 1) -> None:
        """The other one must not wait for it longer than the grace."""
        os.kill(self.ranks()[rank], signal.SIGSTOP)
        self.warn()

    def stop_the_first_rank(self) -> None:
        self.stop_a_rank(0)

    def send(self, number: signal.Signals) -> None:
        """A signal to both ranks, past Slurm."""
        for process in self.ranks().values():
            os.kill(process, number)

    def hold_a_warning(self) -> bool:
        """Whether both ranks, which are stopped, have been sent SIGUSR1."""
        return all(pending(process, signal.SIGUSR1) for process in self.ranks().values())

    def shorten(self, seconds: int) -> None:
        """Move the time limit, which is in minutes, to `seconds` from now or up to a minute later."""
        hours, minutes, past = (int(part) for part in self.slurm.job(self.job)["RunTime"].split(":"))
        self.limit(hours * 60 + minutes + (past + seconds) // 60 + 1)

    def limit(self, minutes: int) -> None:
        self.slurm.call("scontrol", "update", f"jobid={self.job}", f"timelimit={minutes}")

    def survive(self, disturbances: Sequence[Callable[[], None]]) -> None:
        """Let each happen to a start of the job once it has made a step; Slurm starts it again each time."""
        before = int(self.slurm.job(self.job)["Restarts"])
        for restarts, disturb in enumerate(disturbances, start=before + 1):
            self.wait_for_a_step()
            disturb()
            self.wait_for_restart(restarts, disturb.__name__)

    def wait_for_a_step(self) -> None:
        before = step(self.folder)
        wait_for(lambda: step(self.folder) > before, f"a step: {self.log()}", 300)

    def wait_for_restart(self, restarts: int, why: str, seconds: float = 240) -> None:
        """Until the job's script has begun anew that often."""
        wait_for(lambda: self.slurm.job(self.job)["Restarts"] == str(restarts), f"{why}, {self.log()}", seconds)
        wait_for(lambda: self.starts() > restarts, f"start {restarts + 1}, {self.log()}")

    def wait_for_ranks(self) -> dict[int, int]:
        """`ranks`, once both are there."""
        return wait_for(lambda: len(found := self.ranks()) == 2 and found, f"two processes: {self.log()}", 240, 0.02)

    def ranks(self) -> dict[int, int]:
        """Process id of each rank."""
        found = {}
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError, UnicodeDecodeError):
                variables = dict(item.partition("=")[::2] for item in (process / "environ").read_text().split("\0"))
                words = (process / "cmdline").read_text().split("\0")
                rank = words[0].endswith("python") and self.module in words and "SLURM_PROCID" in variables
                if rank and (process / "cwd").resolve() == self.folder:
                    found[int(variables["SLURM_PROCID"])] = int(process.name)
        return found

    def starts(self) -> int:
        """How often the batch script has begun."""
        raise NotImplementedError

    def log(self) -> str:
        return log(self.folder, self.job)


def pending(process: int, number: signal.Signals) -> bool:
    """Whether the process has been sent a signal that it has not yet taken."""
    status = Path(f"/proc/{process}/status").read_text()
    (mask,) = [line.split()[1] for line in status.splitlines() if line.startswith("ShdPnd")]
    return bool(int(mask, 16) >> (number - 1) & 1)


class BatchTraining(Training):
    """Begun by sbatch."""

    module = "jobs.train"

    def starts(self) -> int:
        return (self.folder / f"slurm/logs/msdm-{self.job}.log").read_text().count("log: ")


class SubmittedTraining(Training):
    """Begun by `medsynth submit`."""

    module = "submitit.core._submit"

    def starts(self) -> int:
        return self.log().count("Starting with")

    def log(self) -> str:
        path = self.folder / RUN / f"submit/{self.job}_0_log.out"
        return path.read_text() if path.exists() else ""


def assert_same_run(folder: Path, undisturbed: Path, run: str = RUN, runs: int = 1) -> None:
    """Bit for bit the same weights and averages, and one MLflow run, of `runs`, where no step comes twice or back."""
    assert step(folder, run) == STEPS
    for file in ("weights", "ema"):
        path = f"checkpoints/last.ckpt/{file}.safetensors"
        one, other = load_file(undisturbed / path), load_file(folder / run / path)
        assert one.keys() == other.keys()
        assert not [key for key in one if not torch.equal(one[key], other[key])], file
    client = mlflow_client(f"sqlite:///{folder}/mlruns.db")
    (experiment,) = [item for item in client.search_experiments() if item.name == "medsynth"]
    tracked = {item.info.run_id: item for item in client.search_runs([experiment.experiment_id])}
    assert len(tracked) == runs
    (info,) = [item.info for key, item in tracked.items() if key == read_run_id(folder / run)]
    assert info.status == "FINISHED"
    steps = [point.step for point in client.get_metric_history(info.run_id, "train/loss")]
    assert steps == sorted(set(steps))  # a step that was saved when its process was killed may not have been logged
    assert steps[-1] == STEPS

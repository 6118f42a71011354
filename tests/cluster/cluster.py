"""A real Slurm of two virtual nodes, and a run on it that is short and the same bit for bit."""

import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from callbacks.checkpoint import read_manifest
from jobs.tracking import mlflow_client, read_run_id
from medsynth.errors import UserError
from tests.conftest import REPOSITORY

STEPS = 120
RUN = "runs/tiny-msdm"
SETTINGS = [
    "configs/tiny/msdm.yaml",
    "data.root=phantom",
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


def wait_for(condition: Callable[[], object], what: str, seconds: float = 120, pause: float = 0.1):
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


def submit(slurm: Slurm, folder: Path, *settings: str) -> str:
    options = ["--parsable", "--nodes=2", "--gpus-per-node=1", "--cpus-per-gpu=1"]
    return slurm.call("sbatch", *options, "slurm/msdm.sh", *SETTINGS, *settings, cwd=folder)


def log(folder: Path, job: str) -> str:
    return "".join(path.read_text() for path in folder.glob(f"**/*{job}*.*o*[gt]"))[-6000:]


def step(folder: Path) -> int:
    """The global step of the last checkpoint, 0 where there is none."""
    try:
        return read_manifest(folder / RUN / "checkpoints/last.ckpt")["global_step"]
    except UserError:  # just being replaced, or none yet
        return 0


def assert_same_run(folder: Path, undisturbed: Path) -> None:
    """Bit for bit the same weights and averages, and one MLflow run in which no step comes twice or back."""
    assert step(folder) == STEPS
    for file in ("weights", "ema"):
        path = f"checkpoints/last.ckpt/{file}.safetensors"
        one, other = load_file(undisturbed / path), load_file(folder / RUN / path)
        assert one.keys() == other.keys()
        assert not [key for key in one if not torch.equal(one[key], other[key])], file
    client = mlflow_client(f"sqlite:///{folder}/mlruns.db")
    (experiment,) = [item for item in client.search_experiments() if item.name == "medsynth"]
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_id == read_run_id(folder / RUN)
    assert run.info.status == "FINISHED"
    steps = [point.step for point in client.get_metric_history(run.info.run_id, "train/loss")]
    assert steps == sorted(set(steps))  # a step that was saved when its process was killed may not have been logged
    assert steps[-1] == STEPS - 1

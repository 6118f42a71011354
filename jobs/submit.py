"""`medsynth submit`: a run on a cluster, or on this machine in the background.

The resolved config is what travels. `--cluster slurm` and `local` go through submitit and write

    RUN/submit/<date>.yaml            the config that the job trains
    RUN/submit/<job>_<rank>_log.out   what each process prints
    RUN/submit/<job>_exit_code        what the job has ended with, where another start would change nothing

A job that was preempted saves and is started again under the same id: on Slurm by slurm/common.sh, as those of sbatch,
here by submitit through `checkpoint()`.
"""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from medsynth.errors import UserError
from medsynth.exit_codes import NO_PROGRESS, PREEMPTED, USER_ERROR
from medsynth.files import naming_unwritten, write_whole

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from submitit import Executor, Job, JobEnvironment
    from submitit.helpers import DelayedSubmission

    from jobs.study.submission import Submission

_ENDED = re.compile("COMPLETED|FAILED|CANCELLED|TIMEOUT|NODE_FAIL|OUT_OF_MEMORY|BOOT_FAIL|DEADLINE|PREEMPTED|FORGOTTEN")
SIGNAL_SECONDS = 300
"""Ahead of its time limit a run is asked to leave, or at half of a limit below ten minutes."""
# How often a job may be requeued is not submitit's to say: training ends by itself where it makes no progress.
_REQUEUES = 1_000_000
_CPUS_PER_GPU = 8


@click.command()
@click.argument("config", nargs=-1, required=True, metavar="CONFIG... [KEY=VALUE]...")
@click.option("--cluster", type=click.Choice(["slurm", "local", "kubernetes"]), required=True, help="Where to.")
@click.option("--nodes", type=click.IntRange(1), help="Machines; by default those of CONFIG, or 1.")
@click.option("--gpus", type=click.IntRange(1), help="GPUs a machine; by default those of CONFIG, or up to 8.")
@click.option(
    "--time", "limit", default="24:00:00", metavar="[D-]H:M:S", help="Time limit, after which it is requeued."
)
@click.option("--image", help="Container image of the pods, for kubernetes.")
@click.option("--watch", is_flag=True, help="Follow the log to the end, and end with the job's exit code.")
@click.option("--dry-run", is_flag=True, help="Print what would be submitted, and stop.")
def main(
    config: tuple[str, ...],
    cluster: str,
    nodes: int | None,
    gpus: int | None,
    limit: str,
    image: str | None,
    watch: bool,
    dry_run: bool,
) -> None:
    """Train a method on a cluster.

    CONFIG and KEY=VALUE are those of `medsynth train`. For slurm, slurm/site.env gives partition, account and the like;
    kubernetes has its manifest applied by kubectl.
    """
    if cluster == "kubernetes":
        _submit_to_kubernetes(load_for_job(cluster, config, nodes, gpus), image, watch, dry_run)
        return
    if image:
        raise UserError("--image is for kubernetes; the image of Slurm's jobs stands in slurm/site.env")
    site = read_site() if cluster == "slurm" else {}
    minutes = parse_minutes(limit)
    submission = load_for_job(cluster, config, nodes, gpus, on_cpus=site.get("CPU") == "1")
    os.environ |= site  # sbatch reads SBATCH_… there, and hands all of it to the job
    executor = make_executor(cluster, submission.config, minutes, site)
    if dry_run:
        _print_submission(executor, submission.text)
        return
    sys.exit(submit(executor, submission, watch))


def load_for_job(
    cluster: str, arguments: Sequence[str], nodes: int | None, gpus: int | None, on_cpus: bool = False
) -> "Submission":
    """The resolved config of `arguments`, or stages, on that many machines and processes a machine.

    Raises:
        UserError: as `jobs.run.config.load_config`, or the method does not train so.
    """
    from jobs.study.submission import load_submission

    submission = load_submission(cluster, arguments, nodes, gpus, on_cpus)
    from jobs.run.folder import build_module  # after the config, whose mistakes need no torch
    from jobs.train import check_support

    for config in submission.runs:
        check_support(config, build_module(config))
    return submission


def read_site() -> dict[str, str]:
    """The environment with what slurm/site.env exports; the shell of the scripts reads it, and checks it.

    Raises:
        UserError: it is missing, or says what cannot be; or this is not the repository's root.
    """
    if not Path("slurm/common.sh").is_file():
        raise UserError("there is no slurm/common.sh here; call medsynth in the repository's root")
    script = ". slurm/common.sh && read_site && env --null"
    result = subprocess.run(["bash", "-c", script], capture_output=True, encoding="utf-8", errors="surrogateescape")
    if result.returncode:
        raise UserError(result.stderr.strip().removeprefix("slurm: "))
    return {name: value for name, _, value in (line.partition("=") for line in result.stdout.split("\0") if line)}


def parse_minutes(limit: str) -> int:
    """Minutes of a time limit as sbatch writes it, [D-]H:M:S; raises UserError for another form."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)", limit)
    if match is None:
        raise UserError(f"--time {limit}: give [DAYS-]HOURS:MINUTES:SECONDS, for instance 24:00:00")
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return max(1, (days * 24 + hours) * 60 + minutes + (seconds > 0))


def make_executor(cluster: str, config: "DictConfig", minutes: int, site: dict[str, str]) -> "Executor":
    """submitit's executor for the run, one task a process of training.

    Raises:
        UserError: the run does not go there; `site` (see `read_site`) trains in a container.
    """
    os.environ["SUBMITIT_PREEMPT_SIGNAL"] = "USR1"  # read when submitit is imported, here and in the job
    make = _make_local_executor if cluster == "local" else _make_slurm_executor
    executor = make(config.hardware, Path(config.run_dir).absolute() / "submit", site)
    executor.update_parameters(stderr_to_stdout=True)
    warning = min(SIGNAL_SECONDS, minutes * 30)
    if cluster == "local":
        executor.update_parameters(timeout_min=minutes, signal_delay_s=warning)
    else:
        options = {"requeue": True, "signal": f"B:USR1@{warning}"}
        executor.update_parameters(time=minutes, job_name=Path(config.run_dir).name, additional_parameters=options)
    return executor


def _make_local_executor(hardware: Any, folder: Path, site: dict[str, str]) -> "Executor":
    import submitit

    if hardware.nodes > 1:
        raise UserError(f"hardware.nodes={hardware.nodes}: --cluster local is this machine alone")
    visible = _visible_gpus() if _gpus(hardware) else []
    if visible and hardware.devices > len(visible):
        raise UserError(f"hardware.devices={hardware.devices}: CUDA_VISIBLE_DEVICES names {len(visible)} GPUs")
    executor = submitit.LocalExecutor(folder, max_num_timeout=_REQUEUES)
    executor.update_parameters(
        tasks_per_node=hardware.devices, gpus_per_node=_gpus(hardware), visible_gpus=visible[: hardware.devices]
    )
    return executor


def _visible_gpus() -> list[int]:
    """Those that CUDA_VISIBLE_DEVICES names by their numbers; submitit would take the first of all."""
    names = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return [int(name) for name in names if name.strip().isdigit()]


def _make_slurm_executor(hardware: Any, folder: Path, site: dict[str, str]) -> "Executor":
    import submitit
    from submitit.core.utils import JobPaths

    if "VENV" not in site:
        raise UserError("slurm/site.env trains in a container; type sbatch slurm/PRESET.sh for that")
    if set(str(folder)) & set("%\\\n"):
        raise UserError(
            f"run_dir={str(folder.parent)!r}: in the path of a log Slurm takes % and \\ for more; choose another"
        )
    cpus = _CPUS_PER_GPU if _gpus(hardware) else hardware.threads or 1
    log = shlex.quote(str(JobPaths(folder).stdout))
    options = f"--unbuffered --output={log} --open-mode=append --cpus-per-task={cpus} --kill-on-bad-exit=1"
    try:  # in place of python: what slurm/common.sh starts it with
        executor = submitit.SlurmExecutor(folder, python=f"train in_step {options} --")
    except RuntimeError:
        raise UserError("there is no srun here; --cluster slurm is called where sbatch is") from None
    executor.update_parameters(
        nodes=hardware.nodes,
        ntasks_per_node=hardware.devices,
        gpus_per_node=_gpus(hardware) or None,
        cpus_per_task=cpus,
        setup=[". slurm/common.sh", "begin", "read_site"],
        use_srun=False,
    )
    return executor


def _gpus(hardware: Any) -> int:
    return 0 if hardware.accelerator == "cpu" else hardware.devices


def submit(executor: "Executor", submission: "Submission", watch: bool) -> int:
    """Submit the run, say where it is, and with `watch` follow it; the exit code, 0 for a job that was left alone."""
    from submitit.core.utils import FailedJobError

    from jobs.run.folder import write_config
    from jobs.tracking.server import ui_command

    for run in submission.runs:
        write_config(run)  # refuses a run_dir that holds another run
    config, path = submission.config, _write_submission(submission)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # a local job outlives the terminal, as one of Slurm does
    try:
        job = executor.submit(TrainJob(path))
    except FailedJobError as error:
        raise UserError(f"sbatch refused the job: {' '.join(str(error).split())}") from None
    click.echo(f"job {job.job_id}")
    click.echo(f"config {path}")
    click.echo(f"log {job.paths.stdout}")
    click.echo(f"MLflow: {ui_command(config.tracking.uri, config.tracking.experiment)}")
    job.cancel_at_deletion(False)
    _exit_code_file(job).unlink(missing_ok=True)  # of an earlier job of this number
    return _follow(job) if watch else 0


def _write_submission(submission: "Submission") -> Path:
    path = Path(submission.config.run_dir).absolute() / f"submit/{datetime.now():%Y%m%d-%H%M%S-%f}.yaml"
    with naming_unwritten(path):
        path.parent.mkdir(exist_ok=True)
        write_whole(path, submission.text)
    return path


class TrainJob:
    """What submitit runs in every process of the job: training, and after a preemption its own `checkpoint`."""

    def __init__(self, config: Path):
        self.config = config

    def __call__(self) -> None:
        """Train; leaves by SystemExit with the exit code of `medsynth train`."""
        import submitit

        job = submitit.JobEnvironment()
        requeue = signal.getsignal(signal.SIGUSR1)
        if job.cluster == "local":
            _join_local_processes(job)
            _handle(_leave_unbegun)
        else:
            _handle(signal.SIG_DFL)  # slurm/common.sh knows of the signal, and what it has ended
        code = self._train()
        _handle(signal.SIG_IGN)  # srun sends SIGTERM to all when the first has failed, and rank 0 is still to speak
        if job.global_rank == 0:
            if code in (0, USER_ERROR, NO_PROGRESS):
                write_whole(_exit_code_file(job), str(code))
            elif code == PREEMPTED and job.cluster == "local":
                assert callable(requeue), "submitit listens to the signal in every job"
                requeue(signal.SIGUSR1, None)
        sys.exit(code)

    def checkpoint(self) -> "DelayedSubmission":
        """The submission that goes on: the same, for the run directory holds what was reached."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)

    def _train(self) -> int:
        try:  # a signal may come while these are imported
            from jobs.train import train_file

            train_file(self.config)
        except UserError as error:
            click.echo(f"medsynth: {error}", err=True)
            return error.exit_code
        except SystemExit as ending:
            return ending.code if isinstance(ending.code, int) else 1
        return 0


def _handle(handler: Callable[[int, FrameType | None], Any] | signal.Handlers) -> None:
    """Set what becomes of the signals that ask a run to leave, where training does not listen itself."""
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, handler)


def _leave_unbegun(number: int, frame: FrameType | None) -> None:
    """There is nothing to save while python still imports."""
    sys.exit(PREEMPTED)


def _join_local_processes(job: "JobEnvironment") -> None:
    """Tell Lightning of the processes that submitit has started, as torchrun would."""
    from jobs.run.launch import join_on_this_machine

    join_on_this_machine(job.local_rank, port=15000 + int(job.job_id) % 10000)


def _slurm_state(job_id: str) -> str:
    """JobState of `scontrol show job`; "FORGOTTEN" some minutes after its end, "" where slurmctld does not answer."""
    result = subprocess.run(
        ["scontrol", "show", "job", "--oneliner", job_id], capture_output=True, encoding="utf-8", errors="replace"
    )
    if "Invalid job id" in result.stderr:
        return "FORGOTTEN"
    match = re.search(r"\bJobState=(\S+)", result.stdout)
    return match[1] if match else ""


def _exit_code_file(job: "Job[Any] | JobEnvironment") -> Path:
    """Of a submitit job, seen from outside or from inside."""
    return job.paths.folder / f"{job.job_id}_exit_code"


def _follow(job: "Job[Any]") -> int:
    """Print the log of rank 0 as it grows until the job has ended; its exit code, 1 where it crashed or was ended."""
    code, log, position = _exit_code_file(job), job.paths.stdout, 0
    while True:
        ended = code.exists() or _has_ended(job)
        if log.exists():
            with log.open(encoding="utf-8", errors="replace") as file:
                file.seek(position)
                click.echo(file.read(), nl=False)
                position = file.tell()
        if ended:
            return int(code.read_text(encoding="utf-8")) if code.exists() else 1
        time.sleep(1)


def _has_ended(job: "Job[Any]") -> bool:
    import submitit

    if isinstance(job, submitit.LocalJob):
        return job.done()
    return _ENDED.fullmatch(_slurm_state(job.job_id)) is not None


def _print_submission(executor: "Executor", text: str) -> None:
    import submitit

    if isinstance(executor, submitit.SlurmExecutor):
        click.echo(executor._make_submission_file_text(executor._submitit_command_str, "CONFIG"))
    click.echo(text, nl=False)


def _submit_to_kubernetes(submission: "Submission", image: str | None, watch: bool, dry_run: bool) -> None:
    from jobs.cluster.kubernetes import IMAGE, apply, render

    if watch:
        raise UserError("--watch: kubectl logs --follow does that for --cluster kubernetes")
    manifest = render(submission.config, image=image or IMAGE, text=submission.text, runs=submission.runs)
    if dry_run:
        click.echo(manifest, nl=False)
    else:
        apply(manifest)


if __name__ == "__main__":
    from jobs.cli import run

    run("submit")

"""`medsynth submit`: a run on a cluster, or on this machine in the background.

The resolved config is what travels. `--cluster slurm` and `local` go through submitit and write

    RUN/submit/<date>.yaml            the config that the job trains
    RUN/submit/<job>_<rank>_log.out   what each process prints
    RUN/submit/<job>_exit_code        what the job has ended with, once it has

A job that was preempted saves and is requeued through submitit's `checkpoint()`, under the same id.
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import click

from medsynth.errors import UserError
from medsynth.exit_codes import PREEMPTED

_ENDED = re.compile("COMPLETED|FAILED|CANCELLED|TIMEOUT|NODE_FAIL|OUT_OF_MEMORY|BOOT_FAIL|DEADLINE|PREEMPTED")
# How often a job may be requeued is not submitit's to say: training ends by itself where it makes no progress.
_REQUEUES = 1_000_000
_SIGNAL_SECONDS = 300
_CPUS_PER_GPU = 8


@click.command()
@click.argument("config", nargs=-1, required=True, metavar="CONFIG... [KEY=VALUE]...")
@click.option("--cluster", type=click.Choice(["slurm", "local", "kubernetes"]), required=True, help="Where to.")
@click.option("--nodes", type=click.IntRange(1), help="Machines; by default 1.")
@click.option("--gpus", type=click.IntRange(1), help="GPUs a machine; by default 8, or what the batch allows.")
@click.option(
    "--time", "limit", default="24:00:00", metavar="[D-]H:M:S", help="Time limit, after which it is requeued."
)
@click.option("--image", help="Container image of the pods, for kubernetes.")
@click.option("--watch", is_flag=True, help="Follow the log to the end, and end with the job's exit code.")
@click.option("--dry-run", is_flag=True, help="Print what would be submitted, and stop.")
def main(config, cluster: str, nodes, gpus, limit: str, image: str | None, watch: bool, dry_run: bool) -> None:
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
    resolved = load_for_job(cluster, config, nodes, gpus, on_cpus=site.get("CPU") == "1")
    os.environ |= site  # sbatch reads SBATCH_… there, and hands all of it to the job
    executor = make_executor(cluster, resolved, minutes, site)
    if dry_run:
        _print_submission(executor, resolved)
        return
    sys.exit(submit(executor, resolved, watch))


def load_for_job(cluster: str, arguments: Sequence[str], nodes: int | None, gpus: int | None, on_cpus: bool = False):
    """The resolved config of `arguments` on that many machines and processes a machine.

    Raises:
        UserError: as `jobs.config.load_config`, or the method does not train so.
    """
    from jobs.config import load_arguments
    from jobs.kubernetes import load_for_pods
    from jobs.runs import build_module
    from jobs.train import check_support

    if cluster == "local":
        given = {"nodes": nodes, "devices": gpus}
        settings = [f"hardware.{key}={value}" for key, value in given.items() if value is not None]
        config = load_arguments([*arguments, *settings])
    else:
        settings = ["hardware.accelerator=cpu", "hardware.precision=32-true"] if on_cpus else []
        config = load_for_pods([*arguments, *settings], nodes or 1, gpus)
    check_support(config, build_module(config))
    return config


def read_site() -> dict[str, str]:
    """The environment with what slurm/site.env exports; the shell of the scripts reads it, and checks it.

    Raises:
        UserError: it is missing, or says what cannot be; or this is not the repository's root.
    """
    if not Path("slurm/common.sh").is_file():
        raise UserError("there is no slurm/common.sh here; call medsynth in the repository's root")
    script = ". slurm/common.sh && read_site && env --null"
    result = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    if result.returncode:
        raise UserError(result.stderr.strip().removeprefix("slurm: "))
    return dict(line.partition("=")[::2] for line in result.stdout.split("\0") if line)


def parse_minutes(limit: str) -> int:
    """Minutes of a time limit as sbatch writes it, [D-]H:M:S; raises UserError for another form."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)", limit)
    if match is None:
        raise UserError(f"--time {limit}: give [DAYS-]HOURS:MINUTES:SECONDS, for instance 24:00:00")
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return max(1, (days * 24 + hours) * 60 + minutes + (seconds > 0))


def make_executor(cluster: str, config, minutes: int, site: dict[str, str]):
    """submitit's executor for the run, one task a process of training.

    Raises:
        UserError: the run does not go there; `site` (see `read_site`) trains in a container.
    """
    os.environ["SUBMITIT_PREEMPT_SIGNAL"] = "USR1"  # read when submitit is imported, here and in the job
    make = _make_local_executor if cluster == "local" else _make_slurm_executor
    executor = make(config.hardware, Path(config.run_dir).absolute() / "submit", site)
    executor.update_parameters(signal_delay_s=_SIGNAL_SECONDS, stderr_to_stdout=True)
    if cluster == "local":
        executor.update_parameters(timeout_min=minutes)
    else:
        executor.update_parameters(time=minutes, job_name=Path(config.run_dir).name)
    return executor


def _make_local_executor(hardware, folder: Path, site: dict[str, str]):
    import submitit

    if hardware.nodes > 1:
        raise UserError(f"hardware.nodes={hardware.nodes}: --cluster local is this machine alone")
    executor = submitit.LocalExecutor(folder, max_num_timeout=_REQUEUES)
    executor.update_parameters(tasks_per_node=hardware.devices, gpus_per_node=_gpus(hardware))
    return executor


def _make_slurm_executor(hardware, folder: Path, site: dict[str, str]):
    import submitit

    if "VENV" not in site:  # the process that requeues calls scontrol, which no container has
        raise UserError("slurm/site.env trains in a container; type sbatch slurm/PRESET.sh for that")
    try:
        executor = submitit.SlurmExecutor(folder, max_num_timeout=_REQUEUES, python=f"{site['VENV']}/bin/python")
    except RuntimeError:
        raise UserError("there is no srun here; --cluster slurm is called where sbatch is") from None
    cpus = _CPUS_PER_GPU if _gpus(hardware) else hardware.threads or 1
    executor.update_parameters(
        nodes=hardware.nodes,
        ntasks_per_node=hardware.devices,
        gpus_per_node=_gpus(hardware) or None,
        cpus_per_task=cpus,
        setup=["export MASTER_ADDR=$(hostname)"],  # the batch script runs on the first node, where rank 0 is
        srun_args=[f"--cpus-per-task={cpus}", "--open-mode=append"],
        additional_parameters={"requeue": True},
    )
    return executor


def _gpus(hardware) -> int:
    return 0 if hardware.accelerator == "cpu" else hardware.devices


def submit(executor, config, watch: bool) -> int:
    """Submit the run, say where it is, and with `watch` follow it; the exit code, 0 for a job that was left alone."""
    from submitit.core.utils import FailedJobError

    from jobs.runs import write_config
    from jobs.tracking import ui_command

    write_config(config)  # refuses a run_dir that holds another run
    path = _write_submission(config)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # a local job outlives the terminal, as one of Slurm does
    try:
        job = executor.submit(TrainJob(path))
    except FailedJobError as error:
        raise UserError(f"sbatch refused the job: {' '.join(str(error).split())}") from None
    click.echo(f"job {job.job_id}")
    click.echo(f"config {path}")
    click.echo(f"log {job.paths.stdout}")
    click.echo(f"MLflow: {ui_command(config.tracking.uri)}")
    job.cancel_at_deletion(False)
    return _follow(job) if watch else 0


def _write_submission(config) -> Path:
    from jobs.config import to_yaml

    path = Path(config.run_dir).absolute() / f"submit/{datetime.now():%Y%m%d-%H%M%S-%f}.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(to_yaml(config))
    return path


class TrainJob:
    """What submitit runs in every process of the job: training, and after a preemption its own `checkpoint`."""

    def __init__(self, config: Path):
        self.config = config

    def __call__(self) -> None:
        """Train; leaves by SystemExit with the exit code of `medsynth train`."""
        import submitit

        job = submitit.JobEnvironment()
        # While python still imports, the handler of submitit requeues at once: there is nothing to save.
        requeue = signal.getsignal(signal.SIGUSR1)
        if job.cluster == "local":
            _join_local_processes(job)
        code = self._train()
        if job.global_rank == 0:
            if code == PREEMPTED and (job.cluster == "local" or _slurm_lets_run(job.job_id)):
                requeue(signal.SIGUSR1, None)
            _exit_code_file(job).write_text(str(code))
        sys.exit(code)

    def checkpoint(self):
        """The submission that goes on: the same, for the run directory holds what was reached."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)

    def _train(self) -> int:
        from jobs.config import load_config
        from jobs.train import train

        try:
            train(load_config([self.config]))
        except UserError as error:
            click.echo(f"medsynth: {error}", err=True)
            return error.exit_code
        except SystemExit as ending:
            return ending.code if isinstance(ending.code, int) else 1
        return 0


def _join_local_processes(job) -> None:
    """Tell Lightning of the processes that submitit has started, as torchrun would."""
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        del os.environ[name]  # of an allocation in which this is called: it is not what trains here
    port = 15000 + int(job.job_id) % 10000
    os.environ |= {"LOCAL_RANK": str(job.local_rank), "NODE_RANK": "0"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def _slurm_lets_run(job_id: str) -> bool:
    """Whether Slurm is not itself ending the job: a job that its owner cancelled would rise again by a requeue."""
    return _slurm_state(job_id) == "RUNNING"


def _slurm_state(job_id: str) -> str:
    """JobState of `scontrol show job`; "" where Slurm has forgotten the job."""
    result = subprocess.run(["scontrol", "show", "job", "--oneliner", job_id], capture_output=True, text=True)
    match = re.search(r"\bJobState=(\S+)", result.stdout)
    return match[1] if match else ""


def _exit_code_file(job) -> Path:
    """Of a submitit job, seen from outside or from inside."""
    return job.paths.folder / f"{job.job_id}_exit_code"


def _follow(job) -> int:
    """Print the log of rank 0 as it grows until the job has ended; its exit code, 1 where it crashed or was ended."""
    code, log, position = _exit_code_file(job), job.paths.stdout, 0
    while True:
        ended = code.exists() or _has_ended(job)
        if log.exists():
            with log.open(errors="replace") as file:
                file.seek(position)
                click.echo(file.read(), nl=False)
                position = file.tell()
        if ended:
            return int(code.read_text()) if code.exists() else 1
        time.sleep(1)


def _has_ended(job) -> bool:
    import submitit

    if isinstance(job, submitit.LocalJob):
        return job.done()
    state = _slurm_state(job.job_id)
    return not state or _ENDED.fullmatch(state) is not None


def _print_submission(executor, config) -> None:
    import submitit

    from jobs.config import to_yaml

    if isinstance(executor, submitit.SlurmExecutor):
        click.echo(executor._make_submission_file_text(executor._submitit_command_str, "CONFIG"))
    click.echo(to_yaml(config), nl=False)


def _submit_to_kubernetes(config, image: str | None, watch: bool, dry_run: bool) -> None:
    from jobs.kubernetes import IMAGE, apply, render

    if watch:
        raise UserError("--watch: kubectl logs --follow does that for --cluster kubernetes")
    manifest = render(config, image=image or IMAGE)
    if dry_run:
        click.echo(manifest, nl=False)
    else:
        apply(manifest)


if __name__ == "__main__":
    from jobs.cli import run

    run("submit")

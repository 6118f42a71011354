"""Stages of one job: runs one after the other in the same processes, however these were started.

Each stage is one run, whose folder is known before it begins; so all that later stages refer to is resolved at once,
and one file of whole configs is what a cluster is given. The processes meet at the first stage and stay a group to the
end.
"""

import gc
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from callbacks.preemption import DifferentCheckpoints
from jobs.run.sources import is_setting, is_staged
from jobs.study.plan import load_run_config, refuse_contradiction, runs_of
from jobs.study.read import Study, read_study
from jobs.study.record import is_finished
from medsynth.errors import UserError

_EXPORT = timedelta(days=1)  # that a stage may take to write its weights
_LATE_SECONDS = 120.0  # that a shared file system may be late


class Job(NamedTuple):
    """The stages of one job, in order: their names, and their configs with nothing left to resolve."""

    path: Path
    folder: Path
    stages: list[tuple[str, DictConfig]]

    def to_yaml(self) -> str:
        """The same job as one file, which needs no other."""
        stages = {name: {"config": OmegaConf.to_container(config, resolve=True)} for name, config in self.stages}
        return OmegaConf.to_yaml(OmegaConf.create({"folder": str(self.folder), "stages": stages}))

    @property
    def launched(self) -> DictConfig:
        """What says to a launcher how many processes there are, where their run lies and where it is logged: the first
        stage's config, with the folder of all as its own."""
        return DictConfig({**self.stages[0][1], "run_dir": str(self.folder)})

    @property
    def configs(self) -> list[DictConfig]:
        return [config for _, config in self.stages]


def read_job(arguments: Sequence[str], under: Sequence[str] = ()) -> Job:
    """The job of a command's arguments, of which one file has `stages` (`has_stages`).

    The other files and settings hold for all stages; run_dir=FOLDER is where all of it lies. under: files that lie
    under the configs of all stages.

    Raises:
        UserError: a stage is no single run, or cannot be trained in the processes of the others; else as `read_study`
            and `load_run_config`.
    """
    files = [Path(argument) for argument in arguments if not is_setting(argument)]
    studies = [path for path in files if is_staged(path)]
    if len(studies) > 1:
        raise UserError(f"{studies[0]} and {studies[1]} both have stages; give one of them")
    rest = [argument for argument in arguments if argument != str(studies[0])]
    folders = [Path(argument.partition("=")[2]) for argument in rest if argument.startswith("run_dir=")]
    rest = [argument for argument in rest if not argument.startswith("run_dir=")]
    study = read_study(studies[0], [*rest, "tracking.parent=null"], folders[-1] if folders else None, under)
    return Job(study.path, study.folder, _load_stages(study))


def _load_stages(study: Study) -> list[tuple[str, DictConfig]]:
    configs: dict[str, DictConfig] = {}
    for stage in study.stages:
        if len(stage.points) > 1:
            raise UserError(
                f"{study.path}: stage {stage.name} has {len(stage.points)} runs, and one job trains one a stage; "
                f"medsynth sweep {study.path} trains them all"
            )
        (run,) = runs_of(study, stage)
        configs[stage.name] = load_run_config(study, run, configs)
        if is_finished(run.run_dir):
            refuse_contradiction(run, configs[stage.name])
    first, *others = configs.items()
    for name, config in others:
        for key in ("accelerator", "devices", "nodes"):
            ours, theirs = config.hardware[key], first[1].hardware[key]
            if ours != theirs:
                raise UserError(
                    f"stage {name}: hardware.{key}={ours}, and that of stage {first[0]} is {theirs}: one job has the "
                    f"same processes throughout; give hardware.{key} for all"
                )
    return list(configs.items())


def train_job(job: Job, train: Callable[[DictConfig], Any]) -> None:
    """Train the stages that are not done, each to its end; `train` is that of one run, and its trainer what it returns.

    In every process of the job alike.

    Raises:
        UserError: as `train`; DifferentCheckpoints where a process does not see what the first has exported.
    """
    for number, (name, config) in enumerate(job.stages, 1):
        title = f"stage {number} of {len(job.stages)}, {name}"
        if is_finished(config.run_dir):
            _say(f"{title}: is done, {config.run_dir}")
            continue
        _say(title)
        trainer = train(config)
        if trainer.world_size > 1:
            _meet(Path(config.run_dir))
        del trainer
        gc.collect()  # a trainer and its parts refer to each other
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _meet(run_dir: Path) -> None:
    """Wait until the first process has exported the stage's weights, and this one sees it."""
    group: Any = torch.distributed.new_group(backend="gloo", timeout=_EXPORT)
    torch.distributed.barrier(group)
    torch.distributed.destroy_process_group(group)
    deadline = time.monotonic() + _LATE_SECONDS
    while not is_finished(run_dir):
        if time.monotonic() > deadline:
            raise DifferentCheckpoints(
                f"{run_dir} is done, and this process does not see it: run_dir must be one folder for all machines. If "
                "it is, start again: a shared file system may show a change late"
            )
        time.sleep(0.5)


@rank_zero_only
def _say(line: str) -> None:
    click.secho(line, bold=True)

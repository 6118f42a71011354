"""`medsynth train`: one run from its config, begun or resumed."""

import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from jobs.run.sources import has_stages, is_staged
from medsynth.errors import UserError, naming_lost_workers
from medsynth.loading import one_line

if TYPE_CHECKING:
    from lightning.pytorch import Callback, Trainer
    from omegaconf import DictConfig

    from callbacks.evaluation import Evaluation
    from callbacks.preemption import Preemption, StopRequest
    from datamodules.base import ImageDataModule
    from datamodules.batches import Sample
    from jobs.tracking.logger import RunTracker
    from lightning_modules.base import GenerativeModule


class _Command(click.Command):
    """`--keys` alone asks for the table; click would take the CONFIG that follows for its value."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, ["--keys=table" if arg == "--keys" else arg for arg in args])


@click.command(cls=_Command)
@click.argument("config", nargs=-1, required=True, metavar="CONFIG... [KEY=VALUE]...")
@click.option("--print", "print_only", is_flag=True, help="Print the resolved YAML and stop.")
@click.option(
    "--keys",
    type=click.Choice(["table", "json"]),
    metavar="[=json]",
    help="List every KEY of this run with type, value and meaning, and stop.",
)
def main(config: tuple[str, ...], print_only: bool, keys: str | None) -> None:
    """Train a method.

    CONFIG are YAML files, merged in order; KEY=VALUE settings come last, for instance train.max_steps=1000. The same
    run_dir again resumes the run where it was left. A file with `stages` trains its stages one after the other.
    """
    if has_stages(config):
        if keys:
            raise UserError("--keys lists those of one run: give it the config of a stage")
        _train_stages(config, print_only)
        return
    from jobs.run.checks import check_monitor
    from jobs.run.config import load_arguments, to_yaml

    resolved = load_arguments(config)
    check_monitor(resolved)
    if print_only:
        click.echo(to_yaml(resolved), nl=False)
    elif keys:
        _list_keys(resolved, keys)
    else:
        train(resolved)


def train_file(path: Path) -> None:
    """Train what one file says, a run or a job of stages; as `train`."""
    from jobs.run.config import load_config

    if is_staged(path):
        _train_stages([str(path)], print_only=False)
    else:
        train(load_config([path]))


def _train_stages(arguments: Sequence[str], print_only: bool) -> None:
    from jobs.study.job import read_job, train_job

    job = read_job(arguments)
    if print_only:
        click.echo(job.to_yaml(), nl=False)
    else:
        train_job(job, train)


def _list_keys(config: "DictConfig", form: str) -> None:
    from omegaconf import OmegaConf

    from jobs.run.keys import as_json, as_table, describe

    keys = describe(OmegaConf.to_object(config))
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    for line in [as_json(keys)] if form == "json" else as_table(keys, width):
        click.echo(line)


def train(config: "DictConfig") -> "Trainer":
    """Run `config` to its end and return the Lightning trainer.

    Raises:
        UserError: before the first step, where config, data, weights and machine do not go together.
        Preempted: SIGUSR1 or SIGTERM came; the run is saved.
        WorkerLost: a process that reads data was killed.
    """
    from callbacks.preemption import StopRequest

    with naming_lost_workers(), StopRequest(config.preemption.grace_seconds).listening() as request:
        return _train(config, request)


def _train(config: "DictConfig", request: "StopRequest") -> "Trainer":
    from callbacks.divergence import Divergence
    from jobs.run.config import instantiate
    from jobs.run.export import export_best
    from jobs.run.folder import (
        build_data,
        refuse_another_run,
        require_same_classes,
        require_same_split,
        write_config,
        write_split,
    )
    from jobs.run.pretrained import record
    from jobs.run.process import set_up_process
    from jobs.tracking.facts import run_facts
    from jobs.tracking.logger import RunTracker
    from medsynth.owner import Owner

    set_up_process(config.hardware)
    module = _plan_module(config)
    run_dir = Path(config.run_dir)
    evaluation, preemption = _make_callbacks(config, request)
    divergence = Divergence(config.train.tolerate_nonfinite, run_dir / "checkpoints")
    tracker = RunTracker(run_dir, instantiate(config, "tracking"), config.tracking.run_name or run_dir.name)
    trainer = _build_trainer(config, module, [divergence, evaluation], preemption, tracker)
    with Owner(run_dir, "run_dir", trainer.is_global_zero) as owner:
        refuse_another_run(config)
        _make_networks(config, module)
        data, counts = build_data(config, module)
        module.check_samples(_first_pass(data))
        if config.hardware.compile:
            module.compile()
        if trainer.is_global_zero:
            _announce(config, module, data, counts)

        owner.claim()
        require_same_split(data, run_dir)
        if "labels" in module.supports.conditions:
            require_same_classes(data, run_dir)
        write_config(config)
        write_split(data, run_dir)
        checkpoint = _newest_checkpoint(run_dir, trainer.is_global_zero)
        _log_run(tracker, config, module, data, run_facts() | record(run_dir, module))
        with _ending(tracker), _without_orphans(trainer, request), tracker.unfinished():
            trainer.fit(module, datamodule=data, ckpt_path=checkpoint)
            if trainer.is_global_zero:
                export_best(module, trainer, config, tracker)
        tracker.finalize("success")
    return trainer


def _plan_module(config: "DictConfig") -> "GenerativeModule":
    """The method before it has networks; refused where it cannot train so, or weights are missing."""
    from jobs.run.folder import build_module
    from lightning_modules.base import frozen_dtype

    module = build_module(config)
    check_support(config, module)
    for weights in module.required_weights():
        weights.require()
    module.gradient_clip_norm = config.train.gradient_clip_norm or None
    module.frozen_dtype = frozen_dtype(config.hardware.precision)
    return module


def _make_networks(config: "DictConfig", module: "GenerativeModule") -> None:
    """Fill in the networks; weights that learn from nothing are fixed by the seed.

    Refused where pretrained weights are not those that the run began with.
    """
    import lightning as L

    from jobs.run.folder import use_cache
    from jobs.run.pretrained import hold

    hold(config.run_dir, module)
    L.seed_everything(config.seed, workers=True, verbose=False)
    use_cache(config, module)
    module.configure_model()


def _first_pass(data: "ImageDataModule") -> "Iterator[Sample]":
    """The training samples, without pictures, as the first pass shows them."""
    training = data.training_set()
    for index in range(len(training)):
        yield training.without_picture(0, index)


def _announce(
    config: "DictConfig", module: "GenerativeModule", data: "ImageDataModule", counts: dict[str, int]
) -> None:
    """Say what is about to be done; refused where nothing would choose the best checkpoint."""
    from callbacks.retrieval import logged_by
    from jobs.run.checks import check_monitor
    from jobs.run.summary import print_summary, try_picture
    from jobs.tracking.server import ui_command
    from lightning_modules.base import GenerativeModule

    data.require_room(config.hardware.devices)
    trial = try_picture(module, data)
    steps_by_itself = type(module).learn is not GenerativeModule.learn  # and names what it has done as it likes
    check_monitor(config, trial.losses, any_of_training=steps_by_itself, validated=logged_by(module))
    print_summary(config, module, trial, counts, data.notes())
    click.echo(f"MLflow: {ui_command(config.tracking.uri, config.tracking.experiment)}")


def _make_callbacks(config: "DictConfig", request: "StopRequest") -> "tuple[Evaluation, Preemption]":
    """Evaluation and preemption, which ask each other."""
    from callbacks.durable import LAST
    from callbacks.evaluation import Evaluation
    from callbacks.preemption import Preemption
    from jobs.run.config import instantiate

    run_dir = Path(config.run_dir)
    last, on_error = run_dir / "checkpoints" / LAST, config.checkpoint.on_error
    preemption = Preemption(instantiate(config, "preemption"), request, run_dir, last, on_error)
    evaluation = Evaluation(instantiate(config, "evaluation"), run_dir, config.seed, preemption.leave_if_asked)
    return evaluation, preemption


def _newest_checkpoint(run_dir: Path, says: bool) -> Path | None:
    """What the run goes on from, None for a new one; one process says so, and which checkpoints are damaged."""
    from callbacks.durable import newest_verified

    checkpoint, skipped = newest_verified(run_dir / "checkpoints")
    if says:
        for path, reason in skipped:
            click.echo(f"skipped checkpoint {path}: {reason}")
        if checkpoint:
            click.echo(f"resuming from {checkpoint}")
    return checkpoint


@contextmanager
def _ending(tracker: "RunTracker") -> Iterator[None]:
    """Tell MLflow how a run ended that did not come to its end."""
    try:
        yield
    except SystemExit:  # Lightning's answer to Ctrl-C, and Preempted
        tracker.finalize("interrupted")
        raise
    except BaseException as error:
        tracker.set_tags({"failure": one_line(error)})
        tracker.finalize("failed")
        raise


@contextmanager
def _without_orphans(trainer: "Trainer", request: "StopRequest") -> Iterator[None]:
    """End the processes that Lightning has started with this one where Ctrl-C ends it before they train together."""
    try:
        yield
    except SystemExit:
        launcher = trainer.strategy.launcher
        if request.interrupted and not request.training and launcher is not None:
            launcher.kill(signal.SIGINT)
        raise


def check_support(config: "DictConfig", module: "GenerativeModule") -> None:
    """Raises UserError where the method does not train with the configured strategy, batch or accumulation, or the run
    logs nothing by the name that chooses its best checkpoint."""
    from jobs.run.checks import accumulation, check_monitor

    check_monitor(config)
    strategy = config.hardware.strategy
    if strategy not in module.supports.strategies:
        known = ", ".join(sorted(module.supports.strategies))
        raise UserError(f"hardware.strategy={strategy}: {config.method} trains with {known}")
    if accumulation(config) > 1 and not module.accumulates:
        train, processes = config.train, config.hardware.devices * config.hardware.nodes
        raise UserError(
            f"train.device_batch_size={train.device_batch_size}: {config.method} takes each step over one batch, "
            f"micro-batches do not add up to it; set {train.global_batch_size // processes}"
        )
    if config.train.global_batch_size == 1 and not module.loss_is_a_mean:
        raise UserError(
            f"train.global_batch_size=1: {config.method} learns by comparing the samples of a batch; set 2 or more"
        )


def _build_trainer(
    config: "DictConfig",
    module: "GenerativeModule",
    watching: "list[Callback]",
    preemption: "Preemption",
    tracker: "RunTracker",
) -> "Trainer":
    import lightning as L
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    from callbacks.checkpoint import build_checkpoints
    from callbacks.class_pictures import ClassPictures
    from callbacks.durable import DurableCheckpointIO
    from callbacks.ema import EMA
    from callbacks.progress import RunProgress, Throughput
    from callbacks.retrieval import Retrieval
    from callbacks.step_log import StepLog
    from jobs.run.checks import accumulation
    from jobs.run.config import instantiate
    from jobs.run.launch import cluster_environment
    from jobs.run.strategies import trainer_options

    train, hardware = config.train, config.hardware
    throughput = Throughput(train.global_batch_size)
    callbacks: list[L.Callback] = [throughput, RunProgress(throughput), StepLog(), Retrieval(), *watching]
    callbacks.append(ClassPictures(config.evaluation.batch_size))
    if config.ema.decay:
        callbacks.insert(0, EMA(instantiate(config, "ema")))
    callbacks += build_checkpoints(instantiate(config, "checkpoint"), Path(config.run_dir) / "checkpoints")
    callbacks.append(preemption)
    by_steps = train.validate_every_steps is not None
    micro_batches = accumulation(config)
    plugins = [DurableCheckpointIO(), cluster_environment(hardware)]
    options = trainer_options(hardware, plugins, find_unused=not module.uses_all_weights)
    options |= {
        "max_steps": train.max_steps or -1,
        "max_epochs": train.max_epochs if train.max_epochs else -1,
        "accumulate_grad_batches": micro_batches,
        "gradient_clip_val": module.gradient_clip_norm if module.automatic_optimization else None,
        "val_check_interval": train.validate_every_steps * micro_batches if by_steps else 1.0,
        "check_val_every_n_epoch": None if by_steps else train.validate_every_epochs,
        "log_every_n_steps": train.log_every_steps,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,  # the DataModules deal the samples out themselves
        "callbacks": callbacks,
        "logger": tracker,
        "enable_model_summary": False,
        "default_root_dir": config.run_dir,
    }
    try:
        return L.Trainer(**options)
    except (MisconfigurationException, ValueError) as error:
        raise UserError(f"hardware: {str(error).strip().splitlines()[0]}") from None


def _log_run(
    tracker: "RunTracker",
    config: "DictConfig",
    module: "GenerativeModule",
    data: "ImageDataModule",
    facts: dict[str, str],
) -> None:
    from omegaconf import OmegaConf

    from jobs.run.folder import CONFIG_FILE
    from jobs.run.registry import METHODS
    from lightning_modules.base import count_parameters

    trained, frozen = count_parameters(module)
    params = OmegaConf.to_container(config, resolve=True)
    assert isinstance(params, dict), "a config is one of keys"
    tracker.log_hyperparams({str(key): value for key, value in params.items()})
    tracker.log_artifact(Path(config.run_dir) / CONFIG_FILE)
    tracker.set_tags(
        facts
        | {
            "method": config.method,
            "paper": METHODS[config.method].paper,
            "data.fingerprint": data.fingerprint(),
            "data.pictures": data.pictures_fingerprint(),
            "extractor": config.evaluation.extractor if config.evaluation.images else "none",
            "parameters.trained": str(trained),
            "parameters.frozen": str(frozen),
        }
    )


if __name__ == "__main__":
    from jobs.cli import run

    run("train")

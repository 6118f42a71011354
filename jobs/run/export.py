"""RUN/export: the weights of a finished run as other libraries read them."""

from pathlib import Path

import click
import lightning as L
from omegaconf import DictConfig

from jobs.run.folder import build_module, find_checkpoint, load_weights
from jobs.run.pretrained import hold
from jobs.run.strategies import is_sharded
from jobs.tracking.logger import RunTracker
from lightning_modules.base import GenerativeModule
from medsynth.errors import UserError
from medsynth.files import disk_fault, whole_folder


def export_best(module: GenerativeModule, trainer: L.Trainer, config: DictConfig, tracker: RunTracker) -> None:
    """Write the best checkpoint's weights; for one process. Another start in the run directory does it again.

    Raises:
        UserError: the folder cannot be written; what was exported before stays whole.
    """
    run_dir = Path(config.run_dir)
    module = _whole(module, trainer, config)
    hold(run_dir, module)  # what did not learn is exported as it lies there now
    best, out = find_checkpoint(run_dir, "best"), run_dir / "export"
    load_weights(module.cpu(), best)
    try:
        with whole_folder(out) as folder:
            module.export(folder)
    except Exception as error:  # libraries answer a full disk with errors of their own
        reason = disk_fault(error) or (error.strerror if isinstance(error, OSError) else None)
        if reason is None:
            raise
        mend = "the training is whole in checkpoints/; make room, and start the run once more, which exports it"
        raise UserError(f"{out} cannot be written: {reason}; {mend}") from error
    tracker.set_tags({"checkpoint.best": str(best), "export": str(out)})
    click.echo(f"best checkpoint {best}, exported to {out}")


def _whole(module: GenerativeModule, trainer: L.Trainer, config: DictConfig) -> GenerativeModule:
    """A module that can hold all weights: this process's own holds a part of them where the strategy shards them."""
    if is_sharded(trainer.strategy):
        module = build_module(config)
        module.configure_model()
    return module

"""What a config cannot be, told when it is loaded: values out of their range, and values that do not go together.

What depends on the machine is for `jobs/run/strategies.py`, what depends on data and weights for those who read them.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from jobs.run.keys import places
from jobs.run.registry import nearest
from medsynth.errors import UserError

PRECISIONS = {
    "auto": ("32-true", "bf16-mixed", "16-mixed"),
    "ddp": ("32-true", "bf16-mixed", "16-mixed"),
    "fsdp": ("32-true", "bf16-mixed", "16-mixed"),
    "deepspeed2": ("32-true", "bf16-mixed"),
    "deepspeed3": ("32-true", "bf16-mixed"),
}
"""The strategies, and the precisions that each trains with; weights that learn are float32 in all of them."""


def check_ranges(config: DictConfig) -> None:
    """Raise UserError for the first value, of a resolved config, that is not what its field may be."""
    for name, _, allowed in places(config):
        value = OmegaConf.select(config, name)
        value = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
        if allowed is not None and (fault := allowed.fault(value)):
            raise UserError(f"{name}={'null' if value is None else value}{fault}")


def check_together(config: DictConfig) -> None:
    """Raise UserError where values that are each in their range do not go together."""
    for key in ("run_dir", "data.root"):
        if not OmegaConf.select(config, key).strip():
            raise UserError(f"{key} is empty; name a folder")
    if Path(config.run_dir).is_file():
        raise UserError(f"run_dir={config.run_dir} is a file; name a folder")
    if config.train.max_steps is None and config.train.max_epochs is None:
        raise UserError("the run has no end: give train.max_steps or train.max_epochs")
    _check_hardware(config)
    for key in sorted(config.model.keys() & config.data.keys()):
        ours, theirs = config.model[key], config.data[key]
        if not OmegaConf.is_config(ours) and ours != theirs:
            raise UserError(f"model.{key}={ours} and data.{key}={theirs} must be the same")
    accumulation(config)
    check_steps(config, "evaluation.steps", config.evaluation.steps)


def check_steps(config: DictConfig, key: str, steps: int | None) -> None:
    """Raise UserError, which names `key`, where the model has no room for that many denoising steps; None: its own."""
    require = getattr(OmegaConf.to_object(config.model), "require_steps", None)  # of a model that denoises
    if require is not None and steps is not None:
        require(key, steps)


def check_monitor(
    config: DictConfig, losses: Sequence[str] = (), any_of_training: bool = False, validated: Sequence[str] = ()
) -> None:
    """Raise UserError where the run will log no value of the name `checkpoint.monitor`.

    losses: their names, once they are known; until then any passes. any_of_training: training logs others besides.
    validated: whole names of what validation logs beside the losses.
    """
    check_logged(config, "checkpoint.monitor", config.checkpoint.monitor, losses, any_of_training, validated)


def check_logged(
    config: DictConfig,
    key: str,
    metric: str,
    losses: Sequence[str] = (),
    any_of_training: bool = False,
    validated: Sequence[str] = (),
) -> None:
    """`check_monitor` of a value that `key` names."""
    kind = metric.partition("/")[0]
    if (kind in ("train", "val") and not losses) or (kind == "train" and any_of_training):
        return
    known = [f"{kind}/{name}" for kind in ("val", "train") for name in losses or ["loss"]] + [*validated]
    evaluation: Any = OmegaConf.to_object(config.evaluation)
    known += [*evaluation.names(), "throughput/images_per_second"]
    if metric not in known:
        scored = "" if config.evaluation.images else " with evaluation.images=0"
        raise UserError(f"{key}={metric}: this run logs no such value{scored}{nearest(metric, known)}")


def accumulation(config: DictConfig) -> int:
    """Micro-batches an optimizer step; raises UserError where the global batch does not divide."""
    train, hardware = config.train, config.hardware
    at_once = train.device_batch_size * hardware.devices * hardware.nodes
    if train.global_batch_size % at_once:
        lower = max(1, train.global_batch_size // at_once) * at_once
        raise UserError(
            f"train.global_batch_size={train.global_batch_size} is no multiple of train.device_batch_size="
            f"{train.device_batch_size} × {hardware.devices * hardware.nodes} processes; {lower} would be"
        )
    return train.global_batch_size // at_once


def _check_hardware(config: DictConfig) -> None:
    hardware = config.hardware
    if hardware.devices * hardware.nodes > 1 and hardware.strategy == "auto":
        raise UserError("more than one process needs hardware.strategy=ddp, fsdp, deepspeed2 or deepspeed3")
    if hardware.precision not in PRECISIONS[hardware.strategy]:
        known = "; ".join(f"{name} with {', '.join(precisions)}" for name, precisions in PRECISIONS.items())
        raise UserError(
            f"hardware.strategy={hardware.strategy} hardware.precision={hardware.precision}: there are {known}"
        )
    if hardware.compile and hardware.strategy.startswith("deepspeed"):
        raise UserError(f"hardware.compile: not with hardware.strategy={hardware.strategy}; take ddp or fsdp")

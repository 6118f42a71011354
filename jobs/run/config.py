"""One run as one YAML: typed defaults, config files in order, then `key=value` arguments.

The classes of `data` and `model` are chosen by their names before anything is merged, so that a wrong key or type is
refused with the nearest right one. They bring torch, which takes seconds to import: what can be refused without them is
refused before.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Optional

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from jobs.run.checks import PRECISIONS, check_ranges, check_together
from jobs.run.keys import places, text_keys, type_name
from jobs.run.registry import data_class, known_data, known_method, load_class, method_class, nearest
from jobs.run.sources import is_setting, read_file, read_setting
from medsynth.errors import UserError
from medsynth.ranges import choice, number
from medsynth.secrets import has_secret

ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps")
GPU_NODE = Path(__file__).parents[2] / "configs/hardware/a100x8.yaml"
"""What lies under the config of a run on a cluster that says nothing of its hardware."""


_SINGLE_KEYS = {"method", "run_dir", "seed"}  # at the top of a config; all else there are sections


@dataclass
class TrainConfig:
    """How long and in which batches a run trains."""

    global_batch_size: int = number(32, least=1)
    """Samples an optimizer step, over all processes; micro-batches to accumulate follow from it."""
    device_batch_size: int = number(32, least=1)
    """Samples a process holds at once."""
    max_steps: Optional[int] = number(None, least=1)
    """Optimizer steps; whichever of steps and epochs comes first ends the run."""
    max_epochs: Optional[int] = number(None, least=1)
    """Passes over the data."""
    gradient_clip_norm: Optional[float] = number(None, least=0)
    """Longest gradient, L2 norm; longer ones are scaled down. null or 0: none is."""
    tolerate_nonfinite: int = number(20, least=1)
    """Optimizer steps in a row whose loss or gradient is not finite after which the run ends; such steps change no
    weights."""
    validate_every_epochs: int = number(1, least=1)
    """Passes over the data from one validation to the next."""
    validate_every_steps: Optional[int] = number(None, least=1)
    """Optimizer steps from one validation to the next, instead of passes."""
    log_every_steps: int = number(50, least=1)
    """Optimizer steps from one logged loss to the next."""


@dataclass
class HardwareConfig:
    """What a run trains on; configs/hardware/ sets nothing else."""

    accelerator: str = choice("auto", ACCELERATORS)
    """cpu, gpu (cuda, or mps on a Mac), or auto: a GPU if there is one."""
    devices: int = number(1, least=1)
    """Processes a node, one a GPU."""
    nodes: int = number(1, least=1)
    """Machines."""
    strategy: str = choice("auto", tuple(PRECISIONS))
    """auto (one process), ddp, fsdp (FSDP2), deepspeed2 or deepspeed3 (ZeRO's stages)."""
    precision: str = choice("32-true", PRECISIONS["auto"])
    """Lightning's name: 32-true, bf16-mixed, 16-mixed."""
    threads: Optional[int] = number(None, least=1)
    """CPU threads a process computes with; by default torch's choice."""
    compile: bool = False
    """torch.compile the networks: the first steps take minutes, the others are faster."""


@dataclass
class RunConfig:
    """A whole run. Classes that bring torch stand here as "module:Class", imported when the config is merged."""

    method: str = "???"
    """Which method, by its name in jobs/run/registry.py."""
    run_dir: str = "???"
    """Folder of everything the run makes; the same folder again resumes the run."""
    seed: int = number(0, least=0, most=2**32 - 1)
    """Fixes weights, split, order, augmentation and noise."""
    data: Any = "???"
    """The data set: `name`, and that DataModule's own keys."""
    model: Any = "???"
    """The method's own keys."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Length and batches."""
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    """Devices, strategy, precision."""
    ema: Any = field(default="???", metadata={"class": "callbacks.ema:EMAConfig"})
    """Averaging of the trained weights."""
    checkpoint: Any = field(default="???", metadata={"class": "callbacks.checkpoint:CheckpointConfig"})
    """What is saved when."""
    preemption: Any = field(default="???", metadata={"class": "callbacks.preemption:PreemptionConfig"})
    """What becomes of a run that is asked to leave."""
    evaluation: Any = field(default="???", metadata={"class": "callbacks.evaluation:EvaluationConfig"})
    """How the pictures are scored while training."""
    tracking: Any = field(default="???", metadata={"class": "jobs.tracking.logger:TrackingConfig"})
    """Where MLflow is."""


def load_config(files: Sequence[str | Path], overrides: Sequence[str] = ()) -> DictConfig:
    """Merge `files` in order, then `overrides` ("train.max_steps=100"), over the typed defaults.

    Raises:
        UserError: a file is missing or no YAML; a key is not known (the nearest is named); a value has the wrong type;
            a required value is missing; a value is out of its range, or does not go with another.
    """
    sources = [(str(file), read_file(Path(file))) for file in files]
    untyped = sources + [(override, read_setting(override)) for override in overrides]
    for name, source in untyped:
        _check_sections(name, source)
    config = _schema(*_names(_merge(*(source for _, source in untyped))))
    texts = text_keys(config)
    sources += [(override, read_setting(override, texts)) for override in overrides]
    for name, source in sources:
        try:
            config = _merge(config, source)
        except (ConfigKeyError, ConfigAttributeError) as error:
            raise UserError(_unknown_key(name, error, config)) from None
        except OmegaConfBaseException as error:
            raise UserError(f"{name}: {_wrong_type(error, config)}") from None
        _check_switches(name, source, config)
    return _checked(config)


def load_arguments(arguments: Sequence[str]) -> DictConfig:
    """`load_config` of a command line: config files, and settings, which hold a "="."""
    files = [argument for argument in arguments if not is_setting(argument)]
    return load_config(files, [argument for argument in arguments if is_setting(argument)])


def load_for_nodes(arguments: Sequence[str], nodes: int | None = None, processes: int | None = None) -> DictConfig:
    """`load_arguments` over `GPU_NODE`, for a run on `nodes` machines of `processes` each.

    nodes, processes: by default what ARGUMENTS say; where they are silent 1, and 8 or the half of it and so on that the
    global batch can be divided among.

    Raises:
        UserError: as `load_config`, and where the batch cannot be divided so.
    """
    over = [str(GPU_NODE), *arguments]
    nodes = nodes or _given(arguments, "hardware.nodes")
    nodes = 1 if nodes is None else nodes
    processes = processes or _given(arguments, "hardware.devices")
    if processes is None and nodes > 0:
        alone = load_arguments([*over, "hardware.nodes=1", "hardware.devices=1"])
        batches = alone.train.global_batch_size // alone.train.device_batch_size
        processes = next((most for most in (8, 4, 2) if batches % (most * nodes) == 0), 1)
    return load_arguments([*over, f"hardware.nodes={nodes}", f"hardware.devices={processes or 1}"])


def _given(arguments: Sequence[str], key: str) -> int | None:
    """The number that a command line gives a key, or None; the defaults say nothing."""
    sources = (read_setting(argument) if is_setting(argument) else read_file(Path(argument)) for argument in arguments)
    value = OmegaConf.select(_merge(*sources), key)
    try:
        return None if value is None else int(value)
    except (TypeError, ValueError):
        raise UserError(f"{key}={value}: must be a whole number") from None


def _merge(*sources: DictConfig) -> DictConfig:
    merged = OmegaConf.merge(*sources)
    assert isinstance(merged, DictConfig), "as every source is"
    return merged


def instantiate(config: DictConfig, section: str) -> Any:
    """The section's dataclass object; raises UserError where a value is not allowed."""
    return OmegaConf.to_object(config[section])


def to_yaml(config: DictConfig) -> str:
    """The resolved config; running it again repeats the run."""
    return OmegaConf.to_yaml(config, resolve=True)


def _check_sections(source: str, settings: DictConfig) -> None:
    """Refuse a misspelt section, and a value in a section's place.

    A key that resembles no section may be one of a section's own, written without it: for `_unknown_key` to say.
    """
    sections = {field_.name for field_ in fields(RunConfig)} - _SINGLE_KEYS
    for key in map(str, settings):
        close = nearest(key, sections | _SINGLE_KEYS)
        if key in sections and not isinstance(settings._get_node(key), DictConfig):
            raise UserError(f"{source}: {key} is a section: give its keys, {key}.KEY=VALUE")
        if key not in sections | _SINGLE_KEYS and "did you mean" in close:
            raise UserError(f"{source}: there is no key {key}{close}")


def _check_switches(source: str, settings: DictConfig, config: DictConfig) -> None:
    """Refuse a number other than 0 and 1 where a key is true or false: OmegaConf takes every other one for true."""
    for place in places(config):
        if place.field.type in (bool, Optional[bool]):
            said = OmegaConf.select(settings, place.name, throw_on_resolution_failure=False)
            if isinstance(said, str) and re.fullmatch(r"[+-]?\d+", said.strip()) and int(said) not in (0, 1):
                raise UserError(f"{source}: {place.name} takes {type_name(place.field.type)}, true or false")


def _names(untyped: DictConfig) -> tuple[str, str]:
    """The method's and the data set's, which are known ones."""
    method, data = OmegaConf.select(untyped, "method"), OmegaConf.select(untyped, "data.name")
    if method is None:
        raise UserError("no config file names a method (method: msdm)")
    if data is None:
        raise UserError("no config file names a data set (data: {name: medvqa_gi})")
    known_method(method)
    known_data(data)
    return method, data


def _schema(method: str, data: str) -> DictConfig:
    config = OmegaConf.structured(RunConfig)
    for field_ in fields(RunConfig):
        if "class" in field_.metadata:
            config[field_.name] = OmegaConf.structured(load_class(field_.metadata["class"]))
    config.model = OmegaConf.structured(method_class(method).Config)
    config.data = OmegaConf.structured(data_class(data).Config)
    _make_writable(config)
    return config


def _make_writable(node: DictConfig) -> None:
    """OmegaConf makes frozen dataclasses read-only; they are frozen again as objects."""
    OmegaConf.set_readonly(node, False)
    for key in node:
        if not OmegaConf.is_missing(node, key) and isinstance(child := node._get_node(key), DictConfig):
            _make_writable(child)


def _checked(config: DictConfig) -> DictConfig:
    try:
        missing = sorted(OmegaConf.missing_keys(config))
        if missing:
            raise UserError(f"{missing[0]} is missing; give it in a config file or as {missing[0]}=VALUE")
        OmegaConf.resolve(config)
        check_ranges(config)
        for field_ in fields(RunConfig):
            if OmegaConf.is_config(config[field_.name]):
                instantiate(config, field_.name)
    except UserError:
        raise
    except OmegaConfBaseException as error:
        key = f"{error.full_key}: " if error.full_key else ""
        raise UserError(f"{key}{_first_line(error)}") from None
    _refuse_secrets(config)
    check_together(config)
    config.run_dir = str(Path(config.run_dir).expanduser())
    return config


def _refuse_secrets(config: DictConfig) -> None:
    """The run folder, MLflow and the list of processes show a config to all who look there."""
    for key in _all_keys(config):
        if has_secret(str(OmegaConf.select(config, key))):
            mend = "take it out, and give a local path"
            if key == "tracking.uri":
                mend = "take it out, and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD in the environment"
            raise UserError(f"{key} holds a password or token, which every copy of the config would show: {mend}")


def _wrong_type(error: OmegaConfBaseException, config: DictConfig) -> str:
    key = str(error.full_key).partition("[")[0]
    for place in places(config):
        if key == place.name or key.startswith(f"{place.name}."):
            allowed = f", {place.range}" if place.range else ""
            return f"{place.name} takes {type_name(place.field.type)}{allowed}"
    return f"{error.full_key or error}: {_first_line(error)}"


def _unknown_key(source: str, error: OmegaConfBaseException, config: DictConfig) -> str:
    full_key = str(error.full_key)
    parent, _, key = full_key.rpartition(".")
    siblings = [str(k) for k in (OmegaConf.select(config, parent) if parent else config)]
    close = nearest(key, siblings)
    everywhere = nearest(full_key, _all_keys(config))
    return f"{source}: there is no key {full_key}{close if 'did you mean' in close else everywhere}"


def _all_keys(config: DictConfig, prefix: str = "") -> list[str]:
    keys = []
    for key in config:
        child = None if OmegaConf.is_missing(config, key) else config._get_node(key)
        nested = isinstance(child, DictConfig) and not child._is_none()
        keys += _all_keys(child, f"{prefix}{key}.") if nested else [f"{prefix}{key}"]
    return keys


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]

"""One run as one YAML: typed defaults, config files in order, then `key=value` arguments.

The classes of `data` and `model` are chosen by their names before anything is merged, so that a wrong key or type is
refused with the nearest right one. They bring torch, which takes seconds to import: what can be refused without them is
refused before.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Optional

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from jobs.run.registry import data_class, known_data, known_method, load_class, method_class, nearest
from medsynth.errors import UserError

PRECISIONS = {
    "auto": ("32-true", "bf16-mixed", "16-mixed"),
    "ddp": ("32-true", "bf16-mixed", "16-mixed"),
    "fsdp": ("32-true", "bf16-mixed", "16-mixed"),
    "deepspeed2": ("32-true", "bf16-mixed"),
    "deepspeed3": ("32-true", "bf16-mixed"),
}
"""The strategies, and the precisions that each trains with; weights that learn are float32 in all of them."""
GPU_NODE = Path(__file__).parents[2] / "configs/hardware/a100x8.yaml"
"""What lies under the config of a run on a cluster that says nothing of its hardware."""


_SINGLE_KEYS = {"method", "run_dir", "seed"}  # at the top of a config; all else there are sections


@dataclass
class TrainConfig:
    """How long and in which batches a run trains."""

    global_batch_size: int = 32
    """Samples an optimizer step, over all processes; micro-batches to accumulate follow from it."""
    device_batch_size: int = 32
    """Samples a process holds at once."""
    max_steps: Optional[int] = None
    """Optimizer steps; whichever of steps and epochs comes first ends the run."""
    max_epochs: Optional[int] = None
    """Passes over the data."""
    gradient_clip_norm: Optional[float] = None
    """Longest gradient, L2 norm; longer ones are scaled down."""
    validate_every_epochs: int = 1
    """Passes over the data from one validation to the next."""
    validate_every_steps: Optional[int] = None
    """Optimizer steps from one validation to the next, instead of passes."""
    log_every_steps: int = 50
    """Optimizer steps from one logged loss to the next."""


@dataclass
class HardwareConfig:
    """What a run trains on; configs/hardware/ sets nothing else."""

    accelerator: str = "auto"
    """cpu, gpu or auto."""
    devices: int = 1
    """Processes a node, one a GPU."""
    nodes: int = 1
    """Machines."""
    strategy: str = "auto"
    """auto (one process), ddp, fsdp (FSDP2), deepspeed2 or deepspeed3 (ZeRO's stages)."""
    precision: str = "32-true"
    """Lightning's name: 32-true, bf16-mixed, 16-mixed."""
    threads: Optional[int] = None
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
    seed: int = 0
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
            a required value is missing.
    """
    sources = [(str(file), _read(Path(file))) for file in files]
    sources += [(override, _parse(override)) for override in overrides]
    for name, source in sources:
        _check_sections(name, source)
    config = _schema(*_names(_merge(*(source for _, source in sources))))
    for name, source in sources:
        try:
            config = _merge(config, source)
        except (ConfigKeyError, ConfigAttributeError) as error:
            raise UserError(_unknown_key(name, error, config)) from None
        except OmegaConfBaseException as error:
            raise UserError(f"{name}: {error.full_key or error}: {_first_line(error)}") from None
    return _checked(config)


def load_arguments(arguments: Sequence[str]) -> DictConfig:
    """`load_config` of a command line: config files, and settings, which hold a "="."""
    files = [argument for argument in arguments if "=" not in argument]
    return load_config(files, [argument for argument in arguments if "=" in argument])


def load_for_nodes(arguments: Sequence[str], nodes: int | None = None, processes: int | None = None) -> DictConfig:
    """`load_arguments` over `GPU_NODE`, for a run on `nodes` machines of `processes` each.

    nodes, processes: by default what ARGUMENTS say; where they are silent 1, and 8 or the half of it and so on that the
    global batch can be divided among.

    Raises:
        UserError: as `load_config`, and where the batch cannot be divided so.
    """
    over = [str(GPU_NODE), *arguments]
    nodes = nodes or _given(arguments, "hardware.nodes") or 1
    processes = processes or _given(arguments, "hardware.devices")
    if processes is None:
        alone = load_arguments([*over, "hardware.nodes=1", "hardware.devices=1"])
        batches = alone.train.global_batch_size // alone.train.device_batch_size
        processes = next((most for most in (8, 4, 2) if batches % (most * nodes) == 0), 1)
    return load_arguments([*over, f"hardware.nodes={nodes}", f"hardware.devices={processes}"])


def _given(arguments: Sequence[str], key: str) -> Any:
    """What a command line says of a key, or None; the defaults say nothing."""
    sources = (_parse(argument) if "=" in argument else _read(Path(argument)) for argument in arguments)
    return OmegaConf.select(_merge(*sources), key)


def _merge(*sources: DictConfig) -> DictConfig:
    merged = OmegaConf.merge(*sources)
    assert isinstance(merged, DictConfig), "as every source is"
    return merged


def instantiate(config: DictConfig, section: str) -> Any:
    """The section's dataclass object; raises UserError where a value is not allowed."""
    return OmegaConf.to_object(config[section])


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


def to_yaml(config: DictConfig) -> str:
    """The resolved config; running it again repeats the run."""
    return OmegaConf.to_yaml(config, resolve=True)


def _read(path: Path) -> DictConfig:
    try:
        source = OmegaConf.load(path)
    except FileNotFoundError:
        raise UserError(f"there is no config file {path}") from None
    except Exception as error:  # yaml's errors are many; all mean the same to the user
        raise UserError(f"{path} is no YAML: {_first_line(error)}") from None
    if not isinstance(source, DictConfig):
        raise UserError(f"{path} holds no keys")
    return source


def _parse(override: str) -> DictConfig:
    key, separator, _ = override.partition("=")
    if not separator or not key:
        raise UserError(f"{override}: a config file ends in .yaml, a setting is key=value")
    return OmegaConf.from_dotlist([override])


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
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise UserError(f"{missing[0]} is missing; give it in a config file or as {missing[0]}=VALUE")
    try:
        OmegaConf.resolve(config)
        for field_ in fields(RunConfig):
            if OmegaConf.is_config(config[field_.name]):
                instantiate(config, field_.name)
    except UserError:
        raise
    except OmegaConfBaseException as error:
        raise UserError(_first_line(error)) from None
    if config.train.max_steps is None and config.train.max_epochs is None:
        raise UserError("the run has no end: give train.max_steps or train.max_epochs")
    hardware = config.hardware
    if hardware.devices * hardware.nodes > 1 and hardware.strategy == "auto":
        raise UserError("more than one process needs hardware.strategy=ddp, fsdp, deepspeed2 or deepspeed3")
    if hardware.precision not in PRECISIONS.get(hardware.strategy, ()):
        known = "; ".join(f"{name} with {', '.join(precisions)}" for name, precisions in PRECISIONS.items())
        raise UserError(
            f"hardware.strategy={hardware.strategy} hardware.precision={hardware.precision}: there are {known}"
        )
    if hardware.compile and hardware.strategy.startswith("deepspeed"):
        raise UserError(f"hardware.compile: not with hardware.strategy={hardware.strategy}; take ddp or fsdp")
    for key in sorted(config.model.keys() & config.data.keys()):
        ours, theirs = config.model[key], config.data[key]
        if not OmegaConf.is_config(ours) and ours != theirs:
            raise UserError(f"model.{key}={ours} and data.{key}={theirs} must be the same")
    accumulation(config)
    return config


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

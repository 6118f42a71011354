"""A run directory: what `medsynth train` writes and the other commands read.

RUN/config.yaml        the resolved config: training it again resumes the run
RUN/pretrained.json    digests of the weights from outside that it began with
RUN/split.json         which pictures train and which validate, and what keeps them together
RUN/checkpoints/       best.ckpt and last.ckpt
RUN/grids/             pictures beside their prompts, one file an evaluation
RUN/export/            the trained weights in the ecosystem's layout
RUN/tracking/          what MLflow has been sent and what not yet
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from rich.progress import Progress

from callbacks.durable import DurableCheckpointIO, newest_verified
from callbacks.ema import load_ema_weights
from callbacks.finite import first_not_finite
from datamodules.base import ImageDataModule
from datamodules.cached import CachedLatents
from datamodules.files.latents import Cache
from datamodules.files.walk import listed
from jobs.run.checks import accumulation
from jobs.run.config import instantiate, load_config, to_yaml
from jobs.run.pretrained import hold
from jobs.run.registry import data_class, method_class
from lightning_modules.base import GenerativeModule, frozen_dtype
from lightning_modules.families.latent_diffusion import LatentDiffusion
from medsynth.errors import UserError
from medsynth.files import naming_unwritten, read_object, write_whole

CONFIG_FILE = "config.yaml"
SPLIT_FILE = "split.json"
# Another value here makes other weights: the run directory cannot go on with it. How they are stepped may change.
_IDENTITY = ("method", "model", "seed")
_STEPPING = "optim"  # of the model


def build_module(config: DictConfig) -> GenerativeModule:
    """The configured method, its networks not yet made."""
    return method_class(config.method)(instantiate(config, "model"))


def build_source(config: DictConfig) -> tuple[ImageDataModule, dict[str, int]]:
    """The configured DataModule over pictures, every row checked, and its counts."""
    data = data_class(config.data.name)(
        instantiate(config, "data"), config.seed, config.train.device_batch_size, accumulation(config)
    )
    with Progress(transient=True) as progress:
        task = progress.add_task("checking data", total=None)
        counts = data.check(lambda done, total: progress.update(task, completed=done, total=total))
    return data, counts


def build_data(config: DictConfig, module: GenerativeModule) -> tuple[ImageDataModule, dict[str, int]]:
    """What training reads: pictures, or the latents that `data.latents` names; and the counts."""
    source, counts = build_source(config)
    if config.data.latents is None:
        return source, counts
    latent, cache = _open_cache(config, module)
    return CachedLatents(source, cache, latent.digests()), counts


def use_cache(config: DictConfig, module: GenerativeModule) -> None:
    """Where `data.latents` names a cache, let the module, which is not yet built, do without its encoders.

    For training alone: what is drawn of other prompts later needs the text encoder.

    Raises:
        UserError: there is no whole cache. Whether it fits is for `build_data` to say.
    """
    if config.data.latents is not None:
        latent, cache = _open_cache(config, module)
        latent.use_cache(None if latent.text_digest() is None else cache.text())


def write_config(config: DictConfig) -> None:
    """Write the resolved config into the run directory.

    Raises:
        UserError: the directory holds a run of another method, model or seed, or it cannot be written.
    """
    refuse_another_run(config)
    run_dir = Path(config.run_dir)
    with _written(run_dir):
        write_whole(run_dir / CONFIG_FILE, to_yaml(config))


def write_split(data: ImageDataModule, run_dir: Path) -> None:
    """Write down which pictures train and which validate; raises UserError where it cannot be written."""
    with _written(run_dir):
        data.write_split(str(run_dir))


@contextmanager
def _written(run_dir: Path) -> Iterator[None]:
    with naming_unwritten(f"run_dir={run_dir}"):
        run_dir.mkdir(parents=True, exist_ok=True)
        yield


def require_same_split(data: ImageDataModule, run_dir: Path) -> None:
    """Refuse to go on with a run whose training pictures would now validate.

    Raises:
        UserError: so it is, by the run's `split.json`.
    """
    try:
        before = read_object(run_dir / SPLIT_FILE)
    except (OSError, ValueError):
        return
    now = data.split_facts()
    trained, validate = (set(split.get(side, ())) for split, side in ((before, "train"), (now, "val")))
    if moved := sorted(trained.difference(before.get("val", ())) & validate.difference(now.get("train", ()))):
        raise UserError(
            f"run_dir={run_dir}: {listed(moved)} trained in this run and would now validate: set the split as it was "
            f"(data.group, data.validation_images, the pictures themselves), or choose another run_dir"
        )


def require_same_classes(data: ImageDataModule, run_dir: Path) -> None:
    """Refuse data whose labels mean other classes than those of a run that draws for labels.

    Raises:
        UserError: so it is, by the run's `split.json`.
    """
    try:
        before = read_object(run_dir / SPLIT_FILE).get("classes")
    except (OSError, ValueError):
        return
    now = data.split_facts().get("classes")
    if before is not None and now is not None and before != now:
        strange = ", ".join(sorted(set(before) ^ set(now))) or "in another order"
        raise UserError(
            f"run_dir={run_dir}: the run has the classes {', '.join(before)}, and {data.config.root} has "
            f"{', '.join(now)}: not in both: {strange}; give it the folders that it was trained with"
        )


def load_run(run_dir: Path, checkpoint: str = "best", as_trained: bool = False) -> tuple[GenerativeModule, DictConfig]:
    """The trained model of a run with its averaged weights, in evaluation mode on the CPU, and the run's config.

    checkpoint: "best" or "last"; where there is no best one, the newest that verifies. as_trained: hold frozen weights
    in the type that training held them in.

    Raises:
        UserError: this is no run directory, it holds no sound checkpoint, or its pretrained weights have changed.
    """
    config = read_config(run_dir)
    module = build_module(config)
    hold(run_dir, module)
    dtype = frozen_dtype(config.hardware.precision) if as_trained else torch.float32
    module.frozen_dtype = dtype
    module.configure_model()
    load_weights(module, find_checkpoint(run_dir, checkpoint))
    module.hold_frozen(dtype)
    return module.eval(), config


def read_config(run_dir: Path) -> DictConfig:
    """The resolved config of a run; raises UserError where this is no run directory."""
    path = Path(run_dir) / CONFIG_FILE
    if not path.is_file():
        raise UserError(f"{run_dir} is no run directory: it has no {CONFIG_FILE}")
    return load_config([path])


def mask_levels(run_dir: Path) -> list[int] | None:
    """The grey values of the masks that a run was trained with; None where they were many, or nobody noted them."""
    try:
        return read_object(Path(run_dir) / SPLIT_FILE).get("mask_levels")
    except (OSError, ValueError):
        return None


def class_names(run_dir: Path) -> list[str]:
    """The name of each class, by label, as the run's split has them.

    Raises:
        UserError: the run was trained on data without classes.
    """
    try:
        return read_object(Path(run_dir) / SPLIT_FILE)["classes"]
    except (OSError, ValueError, KeyError):
        raise UserError(f"{run_dir}: split.json names no classes; train on a data set that has some") from None


def find_checkpoint(run_dir: Path, name: str) -> Path:
    """The named checkpoint, or the newest that verifies where there is none of that name."""
    folder = Path(run_dir) / "checkpoints"
    if (named := folder / f"{name}.ckpt").exists():
        return named
    newest, skipped = newest_verified(folder)
    if newest is None:
        reasons = "".join(f"; {path.name}: {reason}" for path, reason in skipped)
        raise UserError(f"{run_dir} has no checkpoint yet{reasons}; train it first")
    return newest


def load_weights(module: GenerativeModule, checkpoint: Path) -> None:
    """Put a checkpoint's weights, the averaged ones where there are any, into a built module.

    Raises:
        UserError: it is damaged, does not fit, or holds weights that are not finite.
    """
    state = DurableCheckpointIO().load_checkpoint(checkpoint, map_location=torch.device("cpu"))
    if unfit := first_not_finite(state):
        raise UserError(f"checkpoint {checkpoint}: {unfit} is not finite, training had diverged; use another one")
    module.on_load_checkpoint(state)
    module.load_state_dict(state["state_dict"], strict=False)
    if "EMA" in state["callbacks"]:
        load_ema_weights(module, state["callbacks"]["EMA"])


def pick_device(name: str) -> torch.device:
    """The torch device of that name, "auto" a GPU if there is one; raises UserError where there is no such device."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from None


def _open_cache(config: DictConfig, module: GenerativeModule) -> tuple[LatentDiffusion, Cache]:
    """The module as what can learn from latents, and these."""
    if not isinstance(module, LatentDiffusion):
        raise UserError(f"data.latents: method={config.method} learns from pictures; leave the key out")
    return module, Cache(Path(config.data.latents))


def refuse_another_run(config: DictConfig) -> None:
    """Raise UserError where the run directory holds a run of another method, model, seed or `data.group`."""
    run_dir = Path(config.run_dir)
    if not (run_dir / CONFIG_FILE).is_file():
        return
    old = load_config([run_dir / CONFIG_FILE])
    resolved = OmegaConf.to_container(config, resolve=True)
    before = OmegaConf.to_container(old, resolve=True)  # loaded, so that keys which came later have their defaults
    assert isinstance(resolved, dict) and isinstance(before, dict), "a config is one of keys"
    for each in (resolved, before):
        each["model"].pop(_STEPPING, None)
    for section in _IDENTITY:
        if resolved[section] != before[section]:
            raise UserError(
                f"run_dir={run_dir} holds a run with another `{section}`; choose another run_dir, or remove that folder"
            )
    group = [part["data"].get("group") for part in (resolved, before)]
    if group[0] != group[1]:
        raise UserError(
            f"run_dir={run_dir} holds a run with data.group={group[1]}, and so another split: choose another run_dir"
        )

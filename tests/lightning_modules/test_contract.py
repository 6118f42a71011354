"""What every method keeps, on its tiny config."""

import dataclasses
import json
from pathlib import Path

import diffusers
import lightning as L
import pytest
import torch
import transformers
from omegaconf import OmegaConf
from safetensors.torch import load_file

from callbacks.ema import EMA, EMAConfig
from datamodules.batches import Conditions, ImageBatch, collate
from jobs.run.config import load_config
from jobs.run.folder import build_data, build_module, load_weights
from jobs.train import train
from lightning_modules.base import GenerativeModule, count_parameters
from tests.conftest import REPOSITORY

# Presets of one method that differ in what learns have each a tiny twin.
METHOD = pytest.mark.parametrize("method", sorted(path.stem for path in (REPOSITORY / "configs/tiny").glob("*.yaml")))


def tiny(method: str, phantoms, *settings: str):
    """The tiny config on phantom data."""
    path = REPOSITORY / f"configs/tiny/{method}.yaml"
    name = OmegaConf.load(path).data.name
    config = load_config([path], [f"data.root={phantoms[name]}", *settings])
    config.data.validation_images = min(config.data.validation_images, 2)  # some have nine prompts each
    return config


def built(config) -> GenerativeModule:
    torch.manual_seed(0)
    module = build_module(config)
    module.configure_model()
    for parameter in module.parameters():
        if parameter.ndim > 1 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)  # zero-initialised outputs would hide everything behind them
    return module.eval()


def rows(config, module, count: int = 4) -> ImageBatch:
    data, _ = build_data(config, module)
    training = data.training_set()
    return collate([training[i] for i in range(count)])


def asked(config, module, count: int = 3) -> Conditions:
    """What an evaluation would ask for, one of it without words."""
    data, _ = build_data(config, module)
    conditions = data.evaluation_conditions(count)
    return dataclasses.replace(conditions, captions=[*conditions.captions[:-1], ""])


@METHOD
def test_losses_are_finite_scalars_that_reach_only_the_trained_weights(method, phantoms):
    config = tiny(method, phantoms)
    module = built(config)
    losses = module.losses(rows(config, module))
    assert "loss" in losses
    assert all(value.ndim == 0 and value.isfinite() for value in losses.values())
    losses["loss"].backward()
    trained = {id(p) for m in module.trainable_modules().values() for p in m.parameters() if p.requires_grad}
    wrong = [name for name, p in module.named_parameters() if (p.grad is not None) != (id(p) in trained)]
    assert trained
    assert not wrong


@METHOD
def test_losses_are_a_function_of_weights_and_batch(method, phantoms):
    config = tiny(method, phantoms)
    module = built(config)
    batch = rows(config, module)
    torch.manual_seed(1)
    first = module.losses(batch)["loss"]
    torch.manual_seed(2)
    assert torch.equal(first, module.losses(batch)["loss"])


@METHOD
def test_a_loss_is_the_mean_over_samples_however_they_are_batched(method, phantoms):
    """So that one process or three, with or without accumulation, follow the same gradient; or the method says it is
    none, and takes no step over several micro-batches."""
    config = tiny(method, phantoms)
    module = built(config)
    batch = rows(config, module)
    whole = module.losses(batch)["loss"]
    parts = torch.stack([module.losses(batch[[i]])["loss"] for i in range(len(batch))])
    assert torch.allclose(parts.mean(), whole, rtol=1e-5, atol=1e-6) == module.loss_is_a_mean
    assert module.loss_is_a_mean or not module.accumulates


@METHOD
def test_sample_gives_pictures_in_range(method, phantoms):
    config = tiny(method, phantoms)
    module = built(config)
    images = module.sample(asked(config, module), [1, 2, 3])
    side = config.data.resolution
    assert images.shape == (3, 3, side, side)
    assert images.dtype == torch.float32
    assert images.min() >= 0
    assert images.max() <= 1
    assert images.std() > 1e-4, "all one colour: nothing was drawn"
    assert not torch.allclose(images[0], images[1])
    if module.supports.negatives:
        away = dataclasses.replace(asked(config, module), negatives=["blurred", "", ""])
        led = module.sample(away, [1, 2, 3])
        assert not torch.equal(led[0], images[0])
        torch.testing.assert_close(led[1:], images[1:], atol=1e-5, rtol=0)


@METHOD
def test_a_picture_does_not_depend_on_its_batch(method, phantoms):
    config = tiny(method, phantoms)
    module = built(config)
    conditions = asked(config, module)
    together = module.sample(conditions, [11, 12, 13])
    alone = torch.cat([module.sample(conditions[[i]], [11 + i]) for i in range(3)])
    torch.testing.assert_close(alone, together, atol=1e-5, rtol=0)


@METHOD
def test_the_average_and_the_checkpoint_hold_the_trained_weights_only(method, phantoms, here):
    trainer = train(tiny(method, phantoms, "run_dir=run"))
    saved = torch.load("run/checkpoints/last.ckpt/state.pt", weights_only=True)
    assert saved["config"] == dataclasses.asdict(trainer.lightning_module.config)
    module = trainer.lightning_module
    assert set(load_file("run/checkpoints/last.ckpt/weights.safetensors")) == module.saved_names()
    average = set(load_file("run/checkpoints/last.ckpt/ema.safetensors"))
    learning = {name for name, p in module.named_parameters() if p.requires_grad}
    assert learning
    assert learning <= average <= module.saved_names()


@METHOD
def test_a_resumed_run_equals_the_undisturbed_one(method, phantoms, here):
    """Weights, average and everything else, bit for bit."""
    settings = [
        "train.max_steps=4",
        "train.validate_every_steps=4",
        "evaluation.images=0",
        "checkpoint.monitor=val/loss",
        "evaluation.grid=0",
    ]
    train(tiny(method, phantoms, "run_dir=whole", *settings))
    train(tiny(method, phantoms, "run_dir=halves", *settings, "train.max_steps=2"))
    trainer = train(tiny(method, phantoms, "run_dir=halves", *settings))
    assert trainer.global_step == 4
    whole, halves = (built(tiny(method, phantoms)) for _ in range(2))
    for module, run in ((whole, "whole"), (halves, "halves")):
        load_weights(module, here / run / "checkpoints/last.ckpt")
    for (name, a), b in zip(whole.state_dict().items(), halves.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@METHOD
def test_what_is_exported_comes_back(method, phantoms, tmp_path):
    module = built(tiny(method, phantoms))
    module.export(tmp_path)
    files = list(tmp_path.rglob("*.safetensors"))
    assert files
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".pt", ".bin", ".ckpt", ".pkl")]
    for folder in tmp_path.rglob("config.json"):
        assert_the_library_finds_every_weight(folder)
    exported = {fingerprint(value) for file in files for value in load_file(file).values()}
    for name, parameter in module.named_parameters():
        assert not parameter.requires_grad or fingerprint(computed_with(module, name, parameter)) in exported, name


def computed_with(module: GenerativeModule, name: str, parameter: torch.Tensor) -> torch.Tensor:
    """The weight that a layer makes of the trained one, where it makes one: spectral norm is of training alone."""
    owner, found, rest = name.partition(".parametrizations.")
    return getattr(module.get_submodule(owner), rest.partition(".")[0]) if found else parameter


def assert_the_library_finds_every_weight(config: Path) -> None:
    """A network that says which class of diffusers or transformers it is: all its keys are there, and no other."""
    described = json.loads(config.read_text())
    library, name = diffusers, described.get("_class_name")
    if "architectures" in described:
        library, name = transformers, described["architectures"][0]
    if name is not None:
        _, report = getattr(library, name).from_pretrained(config.parent, output_loading_info=True)
        assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), config


def fingerprint(tensor: torch.Tensor) -> bytes:
    """The values, whatever their name and shape: ecosystems have their own names."""
    return tensor.detach().cpu().contiguous().numpy().tobytes()


@METHOD
def test_two_steps_move_only_the_trained_weights(method, phantoms):
    config = tiny(method, phantoms)
    module = build_module(config)
    module.configure_model()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    data, _ = build_data(config, module)
    ema = EMA(EMAConfig(decay=0.9))
    trainer = L.Trainer(
        accelerator="cpu", max_steps=2, callbacks=[ema], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    moved = {key for key, value in module.state_dict().items() if not torch.equal(value, before[key])}
    assert moved
    assert moved <= module.saved_names()
    trained, frozen = count_parameters(module)
    assert trained == sum(v.numel() for v in module.parameters() if v.requires_grad)
    assert trained + frozen == sum(p.numel() for p in module.parameters())

"""What every method of the registry keeps, on its tiny config."""

import dataclasses

import lightning as L
import pytest
import torch

from callbacks.ema import EMA, EMAConfig
from datamodules.base import Conditions, ImageBatch, collate
from jobs.config import load_config
from jobs.registry import METHODS
from jobs.runs import build_data, build_module, load_weights
from jobs.train import train
from lightning_modules.base import GenerativeModule, count_parameters
from tests.conftest import REPOSITORY

METHOD = pytest.mark.parametrize("method", METHODS)


def tiny(method: str, phantom, *settings: str):
    """The tiny config on phantom data."""
    return load_config([REPOSITORY / f"configs/tiny/{method}.yaml"], [f"data.root={phantom}", *settings])


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


@METHOD
def test_losses_are_finite_scalars_that_reach_only_the_trained_weights(method, phantom):
    config = tiny(method, phantom)
    module = built(config)
    losses = module.losses(rows(config, module))
    assert "loss" in losses
    assert all(value.ndim == 0 and value.isfinite() for value in losses.values())
    losses["loss"].backward()
    trained = {id(p) for m in module.trainable_modules().values() for p in m.parameters()}
    assert all((p.grad is not None) == (id(p) in trained) for p in module.parameters())


@METHOD
def test_losses_are_a_function_of_weights_and_batch(method, phantom):
    config = tiny(method, phantom)
    module = built(config)
    batch = rows(config, module)
    torch.manual_seed(1)
    first = module.losses(batch)["loss"]
    torch.manual_seed(2)
    assert torch.equal(first, module.losses(batch)["loss"])


@METHOD
def test_a_loss_is_the_mean_over_samples_however_they_are_batched(method, phantom):
    """So that one process or three, with or without accumulation, follow the same gradient."""
    config = tiny(method, phantom)
    module = built(config)
    batch = rows(config, module)
    whole = module.losses(batch)["loss"]
    parts = torch.stack([module.losses(batch[[i]])["loss"] for i in range(len(batch))])
    torch.testing.assert_close(parts.mean(), whole, rtol=1e-5, atol=1e-6)


@METHOD
def test_sample_gives_pictures_in_range(method, phantom):
    config = tiny(method, phantom)
    module = built(config)
    images = module.sample(Conditions(captions=["Generate an image with 1 polyp."] * 3), [1, 2, 3])
    side = config.data.resolution
    assert images.shape == (3, 3, side, side)
    assert images.dtype == torch.float32
    assert images.min() >= 0
    assert images.max() <= 1
    assert images.std() > 1e-4, "all one colour: nothing was drawn"
    assert not torch.allclose(images[0], images[1])


@METHOD
def test_a_picture_does_not_depend_on_its_batch(method, phantom):
    module = built(tiny(method, phantom))
    conditions = Conditions(captions=["Generate an image with 1 polyp.", "", "Generate an image containing text."])
    together = module.sample(conditions, [11, 12, 13])
    alone = torch.cat([module.sample(conditions[[i]], [11 + i]) for i in range(3)])
    torch.testing.assert_close(alone, together, atol=1e-5, rtol=0)


@METHOD
def test_the_average_and_the_checkpoint_hold_the_trained_weights_only(method, phantom, here):
    trainer = train(tiny(method, phantom, "run_dir=run"))
    saved = torch.load("run/checkpoints/last.ckpt/state.pt", weights_only=True)
    assert saved["config"] == dataclasses.asdict(trainer.lightning_module.config)
    from safetensors.torch import load_file

    names = tuple(f"{name}." for name in trainer.lightning_module.trainable_modules())
    for file in ("weights", "ema"):
        keys = load_file(f"run/checkpoints/last.ckpt/{file}.safetensors")
        assert keys
        assert all(key.startswith(names) for key in keys), file


@METHOD
def test_a_resumed_run_equals_the_undisturbed_one(method, phantom, here):
    """Weights, average and everything else, bit for bit."""
    settings = ["train.max_steps=4", "train.validate_every_steps=4", "evaluation.images=0", "evaluation.grid=0"]
    train(tiny(method, phantom, "run_dir=whole", *settings))
    train(tiny(method, phantom, "run_dir=halves", *settings, "train.max_steps=2"))
    trainer = train(tiny(method, phantom, "run_dir=halves", *settings))
    assert trainer.global_step == 4
    whole, halves = (built(tiny(method, phantom)) for _ in range(2))
    for module, run in ((whole, "whole"), (halves, "halves")):
        load_weights(module, here / run / "checkpoints/last.ckpt")
    for (name, a), b in zip(whole.state_dict().items(), halves.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@METHOD
def test_what_is_exported_comes_back(method, phantom, tmp_path):
    module = built(tiny(method, phantom))
    module.export(tmp_path)
    files = list(tmp_path.rglob("*.safetensors"))
    assert files
    assert not list(tmp_path.rglob("*.pt"))
    from safetensors.torch import load_file

    exported = {key: value for file in files for key, value in load_file(file).items()}
    for trained in module.trainable_modules().values():
        for key, value in trained.state_dict().items():
            assert torch.equal(exported[key], value), key


@METHOD
def test_two_steps_move_only_the_trained_weights(method, phantom):
    config = tiny(method, phantom)
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
    names = tuple(f"{name}." for name in module.trainable_modules())
    moved = {key for key, value in module.state_dict().items() if not torch.equal(value, before[key])}
    assert moved
    assert all(key.startswith(names) for key in moved)
    trained, frozen = count_parameters(module)
    assert trained == sum(v.numel() for k, v in module.named_parameters() if k.startswith(names))
    assert trained + frozen == sum(p.numel() for p in module.parameters())

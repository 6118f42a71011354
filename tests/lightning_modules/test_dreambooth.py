"""DreamBooth: its loss against diffusers' arithmetic, and class pictures drawn by one process or two, again or anew."""

import json
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from PIL import Image
from safetensors.torch import load_file

from callbacks.class_pictures import draw_missing
from datamodules.batches import DRAWN_FILE, Conditions, Drawing, ImageBatch
from datamodules.stream import derive_seed
from jobs.encode import encode
from jobs.run.config import load_arguments, load_config
from jobs.run.folder import build_data, build_module, build_source
from jobs.train import train
from lightning_modules.base import GenerativeModule
from lightning_modules.maths.diffusion import SampleRandom
from medsynth.errors import UserError
from tests.class_folders import write_classes
from tests.conftest import REPOSITORY
from tests.processes import together
from tests.sd_folder import write_pipeline

FAST = ["evaluation.images=0", "evaluation.grid=0", "checkpoint.monitor=val/loss"]


def configured(root: Path, *settings: str, method: str = "dreambooth_lora"):
    return load_config([REPOSITORY / f"configs/tiny/{method}.yaml"], [f"data.root={root}", *settings])


def built(config) -> GenerativeModule:
    module = build_module(config)
    module.configure_model()
    return module.eval()


def tiny(method: str = "dreambooth_lora", *settings: str) -> GenerativeModule:
    return built(configured(Path("nowhere"), *settings, method=method))


def batch(count: int = 6) -> ImageBatch:
    """Subject and class pictures in turn."""
    generator = torch.Generator().manual_seed(5)
    captions = ["a photo of sks polyp", "a photo of polyp"] * (count // 2)
    return ImageBatch(
        images=torch.rand(count, 3, 32, 32, generator=generator),
        conditions=Conditions(captions=captions),
        seeds=torch.tensor([derive_seed(index) for index in range(count)]),
        is_prior=torch.tensor([False, True] * (count // 2)),
    )


def drawings(folder: Path, count: int = 5) -> list[Drawing]:
    return [
        Drawing(folder / label / f"{i}.png", f"a photo of {label}", derive_seed(label, i))
        for label in ("mild", "normal")
        for i in range(count)
    ]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*.png"))}


def pixels(folder: Path) -> dict[str, np.ndarray]:
    """int (H, W, 3) of each picture."""
    return {name: np.asarray(Image.open(folder / name)).astype(int) for name in contents(folder)}


# The loss


def diffusers_loss(module: GenerativeModule, rows: ImageBatch, prior_weight: float) -> torch.Tensor:
    """As diffusers' example has it: the subject's rows first, the two halves apart, and their means added."""
    order = torch.argsort(rows.is_prior.int(), stable=True)
    rows = rows[order]
    random = SampleRandom(rows.seeds)
    latents = module.vae.encode(rows.images * 2 - 1).latent_dist
    drawn = latents.mean + latents.std * random.normal(*latents.mean.shape[1:])
    z_0 = drawn * module.vae.config.scaling_factor
    noise, t = random.normal(*z_0.shape[1:]), random.integers(1000)
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    text = module.text_encoder(rows.conditions.captions)[0]
    output = module.unet(scheduler.add_noise(z_0, noise, t), t, encoder_hidden_states=text).sample
    (own, prior), (own_noise, prior_noise) = output.chunk(2), noise.chunk(2)
    return F.mse_loss(own, own_noise) + prior_weight * F.mse_loss(prior, prior_noise)


@pytest.mark.parametrize("prior_weight", [1.0, 0.3])
def test_the_loss_is_that_of_diffusers(prior_weight):
    module = tiny("dreambooth", "data.class_pictures=3", f"model.prior_weight={prior_weight}")
    rows = batch()
    with torch.no_grad():
        loss = module.losses(rows)["loss"]
        torch.testing.assert_close(loss, diffusers_loss(module, rows, prior_weight), rtol=1e-5, atol=0)
        thirds = torch.stack([module.losses(rows[[i, i + 1, i + 2]])["loss"] for i in (0, 3)])
    torch.testing.assert_close(thirds.mean(), loss, rtol=1e-5, atol=0)


def test_the_gradient_is_that_of_diffusers():
    module = tiny("dreambooth", "model.prior_weight=0.3")
    gradients = []
    for loss in (lambda: module.losses(batch())["loss"], lambda: diffusers_loss(module, batch(), 0.3)):
        module.zero_grad()
        loss().backward()
        gradients.append([p.grad.clone() for p in module.parameters() if p.requires_grad])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_without_a_prior_the_loss_is_the_plain_one():
    module = tiny("dreambooth", "data.class_pictures=0")
    plain = built(load_config([REPOSITORY / "configs/tiny/stable_diffusion.yaml"]))
    rows = batch()
    with torch.no_grad():
        assert torch.equal(module.losses(rows)["loss"], plain.losses(rows)["loss"])


# Class pictures


def test_a_picture_is_what_the_untrained_model_samples(tmp_path):
    module, wanted = tiny(), drawings(tmp_path, 1)
    draw_missing(module, wanted)
    expected = module.sample(Conditions(captions=["a photo of normal"]), [wanted[1].seed])[0]
    found = torch.frombuffer(bytearray(Image.open(wanted[1].path).tobytes()), dtype=torch.uint8)
    torch.testing.assert_close(found.reshape(32, 32, 3).permute(2, 0, 1).float(), (expected * 255).round())


def test_adapters_that_have_learned_nothing_draw_the_pretrained_models_pictures(tmp_path):
    for method, rank in (("dreambooth", 0), ("dreambooth_lora", 2)):
        draw_missing(tiny(method, f"model.adapter.rank={rank}"), drawings(tmp_path / method, 2))
    assert contents(tmp_path / "dreambooth") == contents(tmp_path / "dreambooth_lora")


@pytest.mark.parametrize("world_size", [2, 3])
def test_any_number_of_processes_draw_the_same(tmp_path, world_size):
    module = tiny()
    draw_missing(module, drawings(tmp_path / "one"), batch_size=2)
    for rank in range(world_size):
        draw_missing(module, drawings(tmp_path / "many"), rank, world_size, batch_size=2)
    assert contents(tmp_path / "many") == contents(tmp_path / "one")
    assert len(set(contents(tmp_path / "one").values())) == 10


def test_an_interrupted_drawing_goes_on(tmp_path):
    module, wanted = tiny(), drawings(tmp_path / "again")
    draw_missing(module, drawings(tmp_path / "whole"))

    def interrupt(done: int, total: int) -> None:
        assert total == 10
        if done >= 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw_missing(module, wanted, batch_size=2, on_progress=interrupt)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "again").rglob("*.png")}
    assert len(kept) == 4
    for rank in range(2):
        draw_missing(module, wanted, rank, 2)
    again, whole = pixels(tmp_path / "again"), pixels(tmp_path / "whole")
    assert again.keys() == whole.keys()
    # Some processors sum batches of other sizes in another order, which may move a rounded value.
    assert max(np.abs(again[name] - whole[name]).max() for name in whole) <= 1
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert not list(tmp_path.rglob(".*")), "something half written is left"


def test_pictures_drawn_otherwise_are_refused(tmp_path):
    draw_missing(tiny(), drawings(tmp_path / "drawn", 1))
    before = contents(tmp_path)
    other = [Drawing(d.path, f"{d.caption}!", d.seed) for d in drawings(tmp_path / "drawn", 2)]
    pipeline = write_pipeline(tmp_path / "sd")
    for module, wanted, reason in (
        (tiny("dreambooth", "model.sampler.steps=4"), drawings(tmp_path / "drawn", 2), "sampler was"),
        (tiny("dreambooth", "model.sampler.guidance=3"), drawings(tmp_path / "drawn", 2), "sampler was"),
        (tiny("dreambooth", "data.resolution=16"), drawings(tmp_path / "drawn", 2), "resolution was 32 and is 16"),
        (tiny("dreambooth", f"model.pretrained={pipeline}"), drawings(tmp_path / "drawn", 2), "weights was random"),
        (tiny(), other, "prompts was .'a photo of mild'. and is .'a photo of mild!'."),
    ):
        with pytest.raises(UserError, match=rf"data.class_folder: .*mild holds pictures drawn otherwise: {reason}"):
            draw_missing(module, wanted)
    assert contents(tmp_path) == before


def test_other_weights_in_the_same_folder_are_noticed(tmp_path):
    pipeline = write_pipeline(tmp_path / "sd")
    draw_missing(tiny("dreambooth", f"model.pretrained={pipeline}"), drawings(tmp_path / "drawn", 1))
    weights = pipeline / "unet" / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UserError, match="drawn otherwise: weights was"):
        draw_missing(tiny("dreambooth", f"model.pretrained={pipeline}"), drawings(tmp_path / "drawn", 1))


def test_faults_of_the_class_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"data.class_folder: .*drawn.json cannot be written: Not a directory"):
        draw_missing(tiny(), drawings(tmp_path / "file"))
    (tmp_path / "drawn" / "mild").mkdir(parents=True)
    (tmp_path / "drawn" / "mild" / DRAWN_FILE).write_text("{")
    with pytest.raises(UserError, match="drawn.json is damaged: remove its folder"):
        draw_missing(tiny(), drawings(tmp_path / "drawn"))


def test_a_method_that_begins_untrained_has_no_class_pictures(tmp_path):
    settings = [f"data.root={write_classes(tmp_path / 'hips')}", "data.name=dreambooth", f"run_dir={tmp_path}/run"]
    config = load_config([REPOSITORY / "configs/tiny/msdm.yaml"], [*settings, "data.validation_images=1"])
    with pytest.raises(UserError, match="MSDM can draw nothing before it is trained; set data.class_pictures=0"):
        train(config)


# Whole runs


def test_a_resumed_run_draws_what_is_missing_with_untrained_weights(here):
    root = write_classes(here / "hips")
    settings = [*FAST, "run_dir=run", "model.optim.lr=0.1"]
    train(configured(root, *settings))
    before = contents(here / "hips-class")
    assert len(before) == 6
    (here / "hips-class/mild/00001.png").unlink()
    trainer = train(configured(root, *settings, "train.max_steps=4"))
    assert trainer.global_step == 4
    assert contents(here / "hips-class") == before
    module, missing = trainer.lightning_module, [Drawing(here / "later/0.png", "a photo of mild", 7)]
    draw_missing(module, missing)
    draw_missing(tiny(), [Drawing(here / "untrained/0.png", "a photo of mild", 7)])
    assert contents(here / "later") != contents(here / "untrained"), "training changes nothing: the test shows nothing"


def test_the_fingerprint_that_is_tracked_is_that_of_the_drawn_pictures(here):
    from jobs.tracking.server import mlflow_client
    from jobs.tracking.spool import read_run_id

    root = write_classes(here / "hips")
    tags = []
    for run in ("first", "second"):
        train(configured(root, *FAST, f"run_dir={run}", f"tracking.uri=sqlite:///{here}/mlruns.db"))
        run_tags = mlflow_client(f"sqlite:///{here}/mlruns.db").get_run(read_run_id(here / run)).data.tags
        tags.append(run_tags["data.fingerprint"])
    data, _ = build_source(configured(root))
    assert tags == [data.fingerprint()] * 2


def test_batches_of_a_run_are_half_and_half(here):
    config = configured(write_classes(here / "hips", class_pictures=3))
    data, counts = build_data(config, tiny())
    assert counts["class pictures"] == 6
    for rows in data.train_dataloader():
        assert rows.is_prior.tolist() == [False, True, False, True]
        for caption, is_prior in zip(rows.conditions.captions, rows.is_prior, strict=True):
            assert ("sks" in caption) != is_prior


def test_a_cache_holds_class_pictures_drawn_for_it(here):
    root = write_classes(here / "hips")
    encode(configured(root), here / "latents")
    assert len(contents(here / "hips-class")) == 6
    module = tiny()
    plain, _ = build_data(configured(root), module)
    cached, _ = build_data(configured(root, f"data.latents={here}/latents"), module)
    assert len(cached.train_dataloader()) == len(plain.train_dataloader()) == 5
    for rows, expected in zip(cached.train_dataloader(), plain.train_dataloader(), strict=True):
        assert rows.is_prior.tolist() == [False, True, False, True]
        with torch.no_grad():
            torch.testing.assert_close(rows.latents, module.encode_moments(expected.images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("token, pieces", [("sks", 3), ("k", 1)])
def test_a_rare_word_that_is_split_gets_a_warning(here, token, pieces):
    root = write_classes(here / "hips", class_pictures=3)
    pipeline = write_pipeline(here / "sd")  # its tokenizer knows letters
    config = configured(root, *FAST, f"model.pretrained={pipeline}", f"data.token={token}", "run_dir=run")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(config)
    said = [str(warning.message) for warning in caught if "splits" in str(warning.message)]
    assert [f"splits 'sks' into {pieces} pieces" in text for text in said] == [True] * (pieces > 1)


SETTINGS = [
    *["evaluation.images=0", "evaluation.grid=0", "checkpoint.monitor=val/loss", "model.train_text_encoder=false"],
    *["train.global_batch_size=12", "train.max_steps=3", "train.validate_every_steps=3", "ema.decay=0"],
]


def launch(processes: int, device_batch_size: int, root: Path, folder: Path) -> Path:
    """Train the tiny dreambooth with `processes`, each run with class pictures of its own; gives the run directory."""
    run = folder / f"run-{processes}"
    arguments = [str(REPOSITORY / "configs/tiny/dreambooth.yaml"), f"data.root={root}", f"run_dir={run}", *SETTINGS]
    arguments += [f"data.class_folder={run}-class", f"train.device_batch_size={device_batch_size}"]
    if processes > 1:
        arguments += [f"hardware.devices={processes}", "hardware.strategy=ddp"]

    def learn(_: int) -> None:
        os.chdir(folder)
        train(load_arguments(arguments))

    together(processes, learn, log=folder / f"log-{processes}")
    return run


def test_two_processes_draw_and_learn_what_one_does(tmp_path):
    """With two, micro-batches of three: halves only come about over the whole step."""
    root = write_classes(tmp_path / "hips")
    one, two = launch(1, 12, root, tmp_path), launch(2, 3, root, tmp_path)
    assert contents(Path(f"{two}-class")) == contents(Path(f"{one}-class"))
    assert len(contents(Path(f"{one}-class"))) == 6
    assert json.loads(Path(f"{two}-class/mild/{DRAWN_FILE}").read_text())["prompts"] == ["a photo of mild"]
    a, b = (load_file(run / "checkpoints/last.ckpt/weights.safetensors") for run in (one, two))
    for key, value in a.items():
        torch.testing.assert_close(b[key], value, rtol=1e-3, atol=2e-5, msg=lambda m, k=key: f"{k}: {m}")

"""Kandinsky 2.2's decoder against diffusers on the same small weights: latents, loss, each step; and its cache."""

import json
import shutil

import pytest
import torch
from diffusers import DDPMScheduler, KandinskyV22Pipeline
from diffusers.training_utils import compute_snr

from datamodules.cached import CachedLatents
from jobs.encode import encode
from jobs.run.config import load_config
from jobs.run.folder import build_data, build_module, use_cache
from jobs.train import train
from lightning_modules.maths.diffusion import SampleRandom
from medsynth.errors import UserError
from tests.conftest import REPOSITORY
from tests.lightning_modules.test_kandinsky22 import CONDITIONS, built, folders, pipelines
from tests.lightning_modules.test_kandinsky22_prior import batch, embedded

__all__ = ["folders"]  # a fixture


@pytest.fixture(scope="module")
def both(folders):
    return pipelines(**folders)


def test_latents_are_movqs_own_and_go_past_its_codebook(folders, both):
    module, movq, images = built("decoder", folders), both[1].movq, batch().images
    assert movq.config.scaling_factor != 1
    latents = movq.encode(images * 2 - 1).latents
    ours = module.latents(batch(), SampleRandom([1, 2]))
    torch.testing.assert_close(ours, latents, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        module.decode(ours), movq.decode(latents, force_not_quantize=True).sample, rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("gamma", [None, 5.0])
def test_the_loss_is_that_of_diffusers_training_example(folders, both, gamma):
    module = built("decoder", folders, f"model.min_snr_gamma={'null' if gamma is None else gamma}")
    (prior, decoder), rows = both, batch()
    random = SampleRandom(rows.seeds)
    latents = decoder.movq.encode(rows.images * 2 - 1).latents
    random.normal(4, 16, 16)  # the posterior's, of an encoder that has no spread
    noise, t = random.normal(4, 16, 16), random.integers(1000)
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="linear")
    told = {"image_embeds": embedded(prior, rows.images)}
    output = decoder.unet(
        scheduler.add_noise(latents, noise, t), t, encoder_hidden_states=None, added_cond_kwargs=told
    ).sample
    error = (output[:, :4] - noise).square().mean(dim=(1, 2, 3))
    if gamma is not None:
        snr = compute_snr(scheduler, t)
        error = error * snr.clamp(max=gamma) / snr
    torch.testing.assert_close(module.losses(rows)["loss"], error.mean(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_each_step_is_the_pipelines(folders, both, sampler, guidance, tmp_path):
    """Latents after every step, with the scheduler that is exported; ddpm with the predicted variance."""
    module = built("decoder", folders, f"model.sampler.name={sampler}")
    module.export(tmp_path)
    decoder = KandinskyV22Pipeline.from_pretrained(tmp_path)
    decoder.set_progress_bar_config(disable=True)
    assert (getattr(decoder.scheduler.config, "variance_type", None) == "learned_range") == (sampler == "ddpm")
    embeddings = embedded(both[0], batch().images)
    ours, denoise = [], module.denoise
    module.denoise = lambda z_t, *rest: ours.append(z_t) or denoise(z_t, *rest)
    context = module.told(embeddings)
    context = context if guidance == 1 else module.embed(["", ""]).followed_by(context)
    ours.append(module.draw(context, [7, 8], steps=5, guidance=guidance))
    theirs: list[torch.Tensor] = []

    def keep(pipeline, i, t, kept):
        theirs.append(kept["latents"])
        return {"latents": ours[i + 1]}  # so that each step is compared by itself

    decoder(
        image_embeds=embeddings, negative_image_embeds=both[0].get_zero_embed(2), height=32, width=32,
        num_inference_steps=5, guidance_scale=guidance, output_type="latent", callback_on_step_end=keep,
        generator=[torch.Generator().manual_seed(seed) for seed in (7, 8)],
    )  # fmt: skip
    assert len(theirs) == 5
    for t, z, expected in zip(decoder.scheduler.timesteps, ours[1:], theirs, strict=True):
        torch.testing.assert_close(z, expected, rtol=0, atol=2e-5, msg=lambda text, t=t: f"step {t}: {text}")


def test_bounds_of_z_0_are_the_folders(folders):
    scheduler = built("decoder", folders).scheduler()
    assert (scheduler.config.clip_sample, scheduler.config.clip_sample_range) == (True, 2.0)


def test_the_predicted_variance_learns_nothing(folders):
    module = built("decoder", folders)
    module.losses(batch())["loss"].backward()
    gradient = module.unet.conv_out.weight.grad
    assert gradient[:4].abs().sum() > 0 and not gradient[4:].any()


def test_gradient_checkpointing_changes_no_gradient(folders):
    gradients = []
    for setting in ("true", "false"):
        module = built("decoder", folders, f"model.gradient_checkpointing={setting}").train()
        module.losses(batch())["loss"].backward()
        gradients.append(module.unet.conv_in.weight.grad)
    assert module.unet.is_gradient_checkpointing is False
    torch.testing.assert_close(*gradients)


# The cache


def settings_of(phantom, folders) -> list[str]:
    paths = [f"model.pretrained={folders['decoder']}", f"model.prior={folders['prior']}", f"data.root={phantom}"]
    return [*paths, "data.brightness=0.3", "evaluation.images=0", "evaluation.grid=2", "checkpoint.monitor=val/loss"]


@pytest.fixture(scope="module")
def cache(folders, phantom, tmp_path_factory):
    """Two variants of latents and image embeddings of the phantom set, whose pictures are jittered."""
    folder = tmp_path_factory.mktemp("cache") / "latents"
    path = REPOSITORY / "configs/tiny/kandinsky22_decoder.yaml"
    run = folder.with_name("run")
    encode(load_config([path], [*settings_of(phantom, folders), f"run_dir={run}"]), folder, variants=2)
    return folder


def test_a_cache_holds_latents_and_embeddings_of_the_same_picture(folders, phantom, cache):
    """And training from it neither encoder, to the same losses."""
    path = REPOSITORY / "configs/tiny/kandinsky22_decoder.yaml"
    modules, batches = [], []
    for latents in ("null", cache):
        config = load_config([path], [*settings_of(phantom, folders), f"data.latents={latents}"])
        module = build_module(config)
        use_cache(config, module)
        module.configure_model()
        data, _ = build_data(config, module)
        modules.append(module.eval())
        batches.append([data.training_set()[i] for i in (0, 3)] + [data.validation_set()[1]])
    whole, lean = modules
    assert whole.movq.encoder is not None and whole.prior.image_encoder is not None
    assert lean.movq.encoder is None and lean.movq.quant_conv is None and lean.prior.image_encoder is None
    for plain, kept in zip(*batches, strict=True):
        assert kept.images is None and kept.text_embeddings is None
        moments, embeddings = whole.encode_moments(plain.images), whole.embed_images(plain.images)
        torch.testing.assert_close(kept.latents, moments, rtol=0, atol=1e-4)
        torch.testing.assert_close(kept.image_embeddings, embeddings, rtol=0, atol=1e-5)
        torch.testing.assert_close(lean.losses(kept)["loss"], whole.losses(plain)["loss"], rtol=1e-4, atol=0)
    torch.testing.assert_close(lean.sample(CONDITIONS, [7, 8]), whole.sample(CONDITIONS, [7, 8]), rtol=0, atol=1e-5)


def test_a_run_from_the_cache(folders, phantom, cache, here):
    path = REPOSITORY / "configs/tiny/kandinsky22_decoder.yaml"
    extra = [f"data.latents={cache}", "run_dir=run", "hardware.precision=bf16-mixed"]
    trainer = train(load_config([path], [*settings_of(phantom, folders), *extra]))
    assert trainer.global_step == 2
    assert list((here / "run/grids").glob("*.png"))


def test_a_cache_without_image_embeddings_is_refused(folders, phantom, cache, tmp_path):
    """As one of another method would be, whose encoder happens to be the same."""
    path = REPOSITORY / "configs/tiny/kandinsky22_decoder.yaml"
    config = load_config([path], [*settings_of(phantom, folders), f"data.latents={cache}"])
    module = build_module(config)
    data, _ = build_data(config, module)
    assert isinstance(data, CachedLatents)
    data.cache.manifest = {key: value for key, value in data.cache.manifest.items() if key != "image"}
    with pytest.raises(UserError, match="is stale: it holds no image embeddings; encode into another folder"):
        CachedLatents(data.source, data.cache, module.digests())
    other = shutil.copytree(folders["prior"], tmp_path / "prior")
    processor = other / "image_processor/preprocessor_config.json"
    processor.write_text(
        json.dumps(json.loads(processor.read_text(encoding="utf-8")) | {"image_std": [0.2, 0.2, 0.2]}), encoding="utf-8"
    )
    with pytest.raises(UserError, match="is stale: the image encoder has changed"):
        build_data(config, build_module(load_config([path], [*settings_of(phantom, folders), f"model.prior={other}"])))

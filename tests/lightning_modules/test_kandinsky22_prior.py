"""Kandinsky 2.2's prior against diffusers on the same small weights: text, pictures as embeddings, loss, each step."""

import json

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, KandinskyV22PriorPipeline
from diffusers.training_utils import compute_snr
from torch import Tensor

from datamodules.batches import ImageBatch
from datamodules.stream import derive_seed
from jobs.encode import encode
from jobs.run.config import load_config
from jobs.run.folder import build_data, build_module, use_cache
from jobs.train import train
from lightning_modules.maths.diffusion import SampleRandom
from tests.conftest import REPOSITORY
from tests.lightning_modules.test_kandinsky22 import CONDITIONS, PROMPTS, STEPS, built, folders, pipelines

__all__ = ["folders"]  # a fixture


@pytest.fixture(scope="module")
def pipeline(folders) -> KandinskyV22PriorPipeline:
    return pipelines(**folders)[0]


def batch(side: int = 32) -> ImageBatch:
    images = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(5))
    return ImageBatch(images, CONDITIONS, torch.tensor([derive_seed(i) for i in range(2)]), torch.zeros(2).bool())


def embedded(pipeline, images: Tensor) -> Tensor:
    """What the pipeline's image encoder gives, with its processor's own numbers."""
    resized = F.interpolate(images, (16, 16), mode="bicubic", antialias=True).clamp(0, 1)
    mean, std = (torch.tensor(values)[:, None, None] for values in
                 (pipeline.image_processor.image_mean, pipeline.image_processor.image_std))  # fmt: skip
    return pipeline.image_encoder((resized - mean) / std).image_embeds


def test_text_is_embedded_as_the_pipeline_does(folders, pipeline):
    captions = [*PROMPTS, ""]
    caption, words, mask = pipeline._encode_prompt(captions, "cpu", 1, False)
    context = built("prior", folders).embed(captions)
    torch.testing.assert_close(context.embeddings, torch.cat([words, caption[:, None]], dim=1), rtol=0, atol=1e-6)
    assert torch.equal(context.mask[:, :-1], mask)


def test_a_picture_is_seen_as_the_image_processor_shows_it(folders, pipeline):
    """At the side that the encoder takes; otherwise Pillow resizes there and torch here."""
    levels = torch.randint(256, (2, 3, 16, 16), generator=torch.Generator().manual_seed(5), dtype=torch.uint8)
    shown = pipeline.image_processor(list(levels), return_tensors="pt").pixel_values
    expected = pipeline.image_encoder(shown).image_embeds
    module = built("prior", folders)
    torch.testing.assert_close(module.embed_pictures(levels / 255), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(module.nothing, pipeline.get_zero_embed(1), rtol=0, atol=0)


@pytest.mark.parametrize("gamma", [None, 5.0])
def test_the_loss_is_that_of_diffusers_training_example(folders, pipeline, gamma):
    module = built("prior", folders, f"model.min_snr_gamma={'null' if gamma is None else gamma}")
    rows, prior = batch(), pipeline.prior
    random = SampleRandom(rows.seeds)
    embeddings = embedded(pipeline, rows.images)
    x = (embeddings - prior.clip_mean) / prior.clip_std
    random.normal(16)  # the posterior's, of an encoder that has no spread
    noise, t = random.normal(16), random.integers(1000)
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="sample")
    caption, words, mask = pipeline._encode_prompt(PROMPTS, "cpu", 1, False)
    output = prior(
        scheduler.add_noise(x, noise, t), timestep=t, proj_embedding=caption, encoder_hidden_states=words,
        attention_mask=mask,
    ).predicted_image_embedding  # fmt: skip
    error = (output - x).square().mean(1)
    if gamma is not None:
        error = error * compute_snr(scheduler, t).clamp(max=gamma)
    losses = module.losses(rows)
    torch.testing.assert_close(losses["loss"], error.mean(), rtol=1e-5, atol=1e-7)
    cosine = F.cosine_similarity(prior.post_process_latents(output), embeddings).mean()
    torch.testing.assert_close(losses["embedding_cosine"], cosine, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("steps", [2, 25, 150])
def test_each_step_is_the_pipelines(folders, pipeline, steps):
    """The pipeline tells its scheduler which step comes next; ours finds that by itself."""
    scheduler = built("prior", folders).scheduler()
    theirs = pipeline.scheduler
    for each in (scheduler, theirs):
        each.set_timesteps(steps)
    assert torch.equal(scheduler.timesteps, theirs.timesteps)
    assert (theirs.config.clip_sample_range, scheduler.config.clip_sample_range) == (5.0, 5.0)
    z, answer = torch.randn(2, 2, 16, generator=torch.Generator().manual_seed(1))
    for t, following in zip(theirs.timesteps, [*theirs.timesteps[1:], None], strict=True):
        drawn = [
            scheduler.step(answer, t, z, generator=torch.Generator().manual_seed(2)),
            theirs.step(answer, t, z, prev_timestep=following, generator=torch.Generator().manual_seed(2)),
        ]
        assert torch.equal(drawn[0].prev_sample, drawn[1].prev_sample), t


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_embeddings_are_drawn_as_the_pipeline_does(folders, pipeline, guidance):
    module = built("prior", folders)
    expected = pipeline(
        PROMPTS, num_inference_steps=STEPS, guidance_scale=guidance,
        generator=[torch.Generator().manual_seed(seed) for seed in (7, 8)],
    ).image_embeds  # fmt: skip
    drawn = module.draw(module.guided_context(CONDITIONS, guidance), [7, 8], guidance=guidance)
    torch.testing.assert_close(module.decode(drawn), expected, rtol=0, atol=2e-6)


def test_statistics_of_embeddings_are_no_weights(folders):
    """Half precision would round them, and an optimizer, which decays weights, move them."""
    module = built("prior", folders)
    names = {name for name, _ in module.named_parameters()}
    assert not {"prior.clip_mean", "prior.clip_std"} & names
    assert {"prior.clip_mean", "prior.clip_std"} <= module.state_dict().keys()


def test_a_run_logs_the_cosine_of_embeddings(phantom, here):
    """In mixed precision, in which the frozen networks are bfloat16 and what learns float32."""
    path = REPOSITORY / "configs/tiny/kandinsky22_prior.yaml"
    settings = [f"data.root={phantom}", "run_dir=run", "hardware.precision=bf16-mixed"]
    module = train(load_config([path], settings)).lightning_module
    dtypes = {(p.requires_grad, p.dtype) for p in module.parameters()}
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}
    assert module.prior.clip_std.dtype == torch.float32
    events = [
        json.loads(line) for line in (here / "run/tracking/events.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    values = {name: value for event in events for name, value in event.get("values", {}).items()}
    assert -1 <= values["val/embedding_cosine"] <= 1
    assert "eval/fd_random" in values, "scores while training are of pictures"


def test_training_from_a_cache_holds_neither_encoder(folders, phantom, tmp_path):
    """And has the losses and pictures of an uncached run; the cache is of embeddings and text."""
    path = REPOSITORY / "configs/tiny/kandinsky22_prior.yaml"
    paths = [f"model.pretrained={folders['prior']}", f"model.decoder={folders['decoder']}", f"data.root={phantom}"]
    encode(load_config([path], [*paths, f"run_dir={tmp_path}/run"]), tmp_path / "latents")
    modules, batches = [], []
    for latents in ("null", tmp_path / "latents"):
        config = load_config([path], [*paths, f"data.latents={latents}"])
        module = build_module(config)
        use_cache(config, module)
        module.configure_model()
        data, _ = build_data(config, module)
        modules.append(module.eval())
        batches.append([data.training_set()[3], data.validation_set()[1]])
        conditions = data.evaluation_conditions(2)
    whole, lean = modules
    assert lean.image_encoder is None and not isinstance(lean.text_encoder, torch.nn.Module)
    for plain, kept in zip(*batches, strict=True):
        assert kept.images is None and kept.latents.shape == (1, 32) and kept.text_embeddings.shape == (1, 78, 16)
        for name, loss in whole.losses(plain).items():
            torch.testing.assert_close(lean.losses(kept)[name], loss, rtol=1e-4, atol=0)
    torch.testing.assert_close(lean.sample(conditions, [7, 8]), whole.sample(conditions, [7, 8]), rtol=0, atol=2e-5)

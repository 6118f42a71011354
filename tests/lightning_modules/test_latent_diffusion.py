"""What latent diffusion gives its methods: schedules, schedulers, draws of any shape, stages, embeddings in a cache."""

import pytest
import torch
from diffusers import DDPMScheduler

from datamodules.batches import Conditions, collate
from datamodules.stream import derive_seed
from jobs.encode import encode
from jobs.run.config import load_config
from jobs.run.folder import build_data, build_module, use_cache
from jobs.run.registry import METHODS, Method
from jobs.train import train
from lightning_modules.families.latent_diffusion import NoiseConfig, SamplerConfig
from lightning_modules.maths.diffusion import SCHEDULES, SampleRandom, alphas_cumprod
from medsynth.errors import UserError
from tests.lightning_modules.small_methods import WIDTH, Decoder, SmallConfig, VectorPrior, ZeroPrior, pooled

NAMES = {"scaled_linear": "scaled_linear", "linear": "linear", "cosine": "squaredcos_cap_v2"}
ASKED = Conditions(captions=["a polyp", "", "an instrument in the upper left"])


def built(method: type, **config):
    torch.manual_seed(0)
    module = method(SmallConfig(**config))
    module.configure_model()
    return module.eval()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("zero", [False, True])
def test_every_schedule_is_diffusers(schedule, zero):
    noise = NoiseConfig(schedule=schedule, steps=200, beta_start=0.001, beta_end=0.03, zero_terminal_snr=zero)
    theirs = DDPMScheduler(
        num_train_timesteps=200, beta_start=0.001, beta_end=0.03, beta_schedule=NAMES[schedule],
        rescale_betas_zero_snr=zero,
    )  # fmt: skip
    # Diffusers accumulates in float32, and keeps the last of a rescaled schedule off zero.
    torch.testing.assert_close(alphas_cumprod(noise.betas()), theirs.alphas_cumprod, rtol=2e-4, atol=1e-6)


def test_a_method_says_what_its_scheduler_needs():
    config = built(VectorPrior).scheduler().config
    assert config.variance_type == "fixed_small_log"
    assert (config.timestep_spacing, config.clip_sample_range) == ("linspace", 2.0)
    assert (config.beta_schedule, config.prediction_type) == ("squaredcos_cap_v2", "sample")


def test_vectors_are_drawn_as_diffusers_steps_them():
    module = built(VectorPrior)
    seeds = [3, 4, 5]
    context = module.guided_context(ASKED)
    drawn = module.draw(context, seeds)
    assert drawn.shape == (3, WIDTH)
    scheduler = DDPMScheduler(
        num_train_timesteps=100, beta_schedule="squaredcos_cap_v2", prediction_type="sample", clip_sample=True,
        clip_sample_range=2.0, variance_type="fixed_small_log", timestep_spacing="linspace",
    )  # fmt: skip
    scheduler.set_timesteps(4)
    for row, seed in enumerate(seeds):
        generator = torch.Generator().manual_seed(seed)
        z = torch.randn(1, WIDTH, generator=generator)
        told, nothing = module.embed([ASKED.captions[row]]), module.embed([""])
        for step in scheduler.timesteps:
            t = step.expand(1)
            with torch.no_grad():
                u, c = module.predict(z, t, nothing), module.predict(z, t, told)
            z = scheduler.step(u + 3.0 * (c - u), step, z, generator=generator).prev_sample
        torch.testing.assert_close(drawn[[row]], z, rtol=1e-5, atol=1e-6)


def test_a_draw_is_a_function_of_its_own_row_and_seed():
    module = built(VectorPrior)
    together = module.draw(module.guided_context(ASKED), [3, 4, 5])
    alone = module.draw(module.guided_context(ASKED[[1]]), [4])
    torch.testing.assert_close(alone, together[[1]])


def test_what_guidance_leads_away_from_is_the_method_s_own():
    """One step of DDIM from the last gives the guided prediction itself: u + g (c - u), u of an embedding of zeros."""
    module = built(ZeroPrior, sampler=SamplerConfig(name="ddim", steps=1, guidance=3.0))
    context = module.guided_context(ASKED)
    assert not context.mask[:3].any() and context.mask[3:].all()
    module.scheduler_options = lambda: {"timestep_spacing": "trailing", "clip_sample": False}
    drawn = module.draw(context, [1, 2, 3])
    noise = torch.stack([torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2, 3)])
    t, told = torch.full((3,), 99), module.embed(ASKED.captions)
    with torch.no_grad():
        u = module.predict(noise, t, told._replace(embeddings=torch.zeros_like(told.embeddings)))
        c = module.predict(noise, t, told)
    torch.testing.assert_close(drawn, u + 3.0 * (c - u), rtol=1e-4, atol=1e-5)


def test_without_a_say_guidance_leads_away_from_no_words_with_the_same_control():
    module, told = built(VectorPrior), Conditions(captions=["a", "bc"], control=torch.rand(2, 1, 4, 4))
    context = module.guided_context(told)
    assert torch.equal(context.embeddings, module.embed(["", "", "a", "bc"]).embeddings)
    assert torch.equal(context.control, torch.cat([told.control] * 2))
    assert torch.equal(module.guided_context(told, 1).embeddings, module.embed(["a", "bc"]).embeddings)


def test_negative_prompts_are_refused_where_nothing_is_led_away_from_them():
    told = Conditions(captions=["a"], negatives=["b"])
    for module, guidance in ((built(ZeroPrior), 3.0), (built(VectorPrior), 3.0)):
        with pytest.raises(UserError, match="negative prompts need a method that leads away from words"):
            module.sample(told, [1], guidance=guidance)


def test_two_stages_draw_with_noise_of_their_own():
    module = built(Decoder)
    images = module.sample(ASKED, [1, 2, 3])
    assert images.shape == (3, 3, 32, 32)
    torch.testing.assert_close(module.sample(ASKED[[2]], [3]), images[[2]])
    first = torch.randn(WIDTH, generator=torch.Generator().manual_seed(1))
    second = torch.randn(WIDTH, generator=torch.Generator().manual_seed(derive_seed(1, "decoder")))
    assert not torch.allclose(first, second)


def test_integers_of_any_shape_are_each_sample_s_own():
    random = SampleRandom([1, 2])
    draws = random.integers(10, 3, 4)
    assert draws.shape == (2, 3, 4)
    assert draws.dtype == torch.int64
    assert torch.equal(SampleRandom([2]).integers(10, 3, 4)[0], draws[1])


@pytest.fixture
def config(monkeypatch, here, phantom):
    """Of a run of `Decoder`, which the registry knows meanwhile."""
    monkeypatch.setitem(METHODS, "small", Method("tests.lightning_modules.small_methods:Decoder", "test", "Decoder"))
    (here / "small.yaml").write_text(
        "{method: small, run_dir: run, data: {name: medvqa_gi, resolution: 32, workers: 0, validation_images: 8},"
        " train: {global_batch_size: 4, device_batch_size: 4, max_steps: 3, log_every_steps: 1},"
        " hardware: {accelerator: cpu}, evaluation: {images: 0, grid: 4, batch_size: 4}}"
    )
    return load_config(["small.yaml"], [f"data.root={phantom}"])


def test_image_embeddings_travel_through_the_cache_with_their_pictures(config, here, monkeypatch):
    encode(config, here / "latents", variants=2)
    source, _ = build_data(config, build_module(config))
    pictures = collate([source.training_set()[i] for i in range(4)])
    config.data.latents = str(here / "latents")
    module = build_module(config)
    use_cache(config, module)
    module.configure_model()
    data, _ = build_data(config, module)
    cached = collate([data.training_set()[i] for i in range(4)])
    assert cached.images is None
    torch.testing.assert_close(cached.image_embeddings, pooled(pictures.images))
    assert torch.equal(cached.picture_ids, pictures.picture_ids)
    torch.testing.assert_close(module.losses(cached)["loss"], module.losses(pictures)["loss"])
    train(config)
    assert (here / "run/export/net.safetensors").is_file()

    monkeypatch.setattr(Decoder, "image_digest", lambda self: "another")
    with pytest.raises(UserError, match="is stale: the image encoder has changed"):
        build_data(config, module)


def test_a_cache_without_image_embeddings_says_so(config, here, monkeypatch):
    with monkeypatch.context() as before:
        before.setattr(Decoder, "image_digest", lambda self: None)
        before.setattr(Decoder, "embed_images", lambda self, images: None)
        encode(config, here / "latents")
    config.data.latents = str(here / "latents")
    with pytest.raises(UserError, match="is stale: it holds no image embeddings"):
        build_data(config, build_module(config))


def test_a_picture_is_known_whatever_its_crop_and_prompt(phantom, config):
    source, _ = build_data(config, build_module(config))
    training = source.training_set()
    ids = {}
    for index, pair in enumerate(training.pairs):
        for pass_ in (0, 1):
            ids.setdefault(pair.picture, set()).add(training.sample(pass_, index).picture_id)
    assert all(len(known) == 1 for known in ids.values())
    assert len(set.union(*ids.values())) == len(ids) > 1

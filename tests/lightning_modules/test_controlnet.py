"""ControlNet against diffusers and transformers on the same small weights; its auxiliary terms; and what is refused."""

import dataclasses
import warnings

import pytest
import torch
import torch.nn.functional as F
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionModelWithProjection,
)

from callbacks.samples import draw_grid
from datamodules.batches import Conditions, ImageBatch
from datamodules.phantoms.chest import write_chest
from datamodules.stream import derive_seed
from jobs.run.config import load_config
from jobs.train import train
from lightning_modules.base import to_image_range
from lightning_modules.controlnet import ControlNet, ControlNetConfig
from lightning_modules.families.latent_diffusion import SamplerConfig
from lightning_modules.maths.diffusion import SampleRandom, to_original
from lightning_modules.nets.patch_discriminator import PatchDiscriminator, adversarial_terms, smallest_side
from lightning_modules.parts.image_prompt import ImagePrompt, load_image_encoder
from medsynth.errors import UserError
from tests.conftest import REPOSITORY
from tests.sd_folder import write_pipeline

PROMPTS = ["chest x-ray with 1 nodule", "chest x-ray"]
SIDE = 32
TERMS = {
    "adversarial_weight": 0.5,
    "feature_matching_weight": 2.0,
    "perceptual_weight": 0.7,
    "perceptual_weights": "random",
    "discriminator_widths": [16, 16],
    "auxiliary_below": 500,
}


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("pipelines")
    return {
        "sd1": write_pipeline(base / "sd1"),
        "sd2": write_pipeline(base / "sd2", prediction="v_prediction", version=2),
    }


@pytest.fixture(scope="session")
def chest(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chest") / "phantom"
    write_chest(folder, images=12, seed=1, size=64)
    return folder


def configured(folder, controls=None, **changes) -> ControlNetConfig:
    config = ControlNetConfig(
        pretrained=str(folder),
        resolution=SIDE,
        controls=controls or {"mask": 1.0, "canny": 0.5},
        conditioning_widths=[8, 8, 16],
        image_encoder="random",
        sampler=SamplerConfig(steps=4, guidance=3.0),
    )
    return dataclasses.replace(config, **changes)


def built(folder, controls=None, *, moved: bool = True, **changes) -> ControlNet:
    """The model, `moved` with other weights than the first, as training would leave them."""
    torch.manual_seed(0)
    module = ControlNet(configured(folder, controls, **changes))
    module.configure_model()
    with torch.no_grad():
        for parameter in module.parameters():
            if moved and parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return module.eval()


def conditions(channels: int, count: int = 2) -> Conditions:
    control = torch.rand(count, channels, SIDE, SIDE, generator=torch.Generator().manual_seed(4))
    return Conditions(captions=(PROMPTS * count)[:count], control=control)


def batch(channels: int = 2, count: int = 2) -> ImageBatch:
    images = torch.rand(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(5))
    seeds = torch.tensor([derive_seed(i) for i in range(count)])
    return ImageBatch(images, conditions(channels, count), seeds, torch.zeros(count, dtype=torch.bool))


def steps_of(rows: ImageBatch) -> Tensor:
    """The time steps that training draws for these seeds."""
    random = SampleRandom(rows.seeds)
    random.normal(4, 8, 8)
    random.normal(4, 8, 8)
    return random.integers(1000)


def gradients(network) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in network.parameters() if parameter.requires_grad]


# Against diffusers


def test_residuals_are_summed_as_diffusers_sums_those_of_several_controlnets(folders):
    module = built(folders["sd1"])
    z, t, asked = torch.randn(2, 4, 8, 8), torch.tensor([3, 900]), conditions(2)
    context = module.condition(asked)
    down, middle = [], 0
    for channel, weight in ((0, 1.0), (1, 0.5)):
        net, picture = module.controlnet.nets[channel], asked.control[:, [channel] * 3]
        residuals = net(z, t, context.embeddings, picture)
        down.append([weight * r for r in residuals.down_block_res_samples])
        middle = middle + weight * residuals.mid_block_res_sample
    expected = module.unet(
        z, t, context.embeddings, mid_block_additional_residual=middle,
        down_block_additional_residuals=[a + b for a, b in zip(*down, strict=True)],
    ).sample  # fmt: skip
    ours = module.predict(z, t, context)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    assert (ours - module.unet(z, t, context.embeddings).sample).abs().max() > 1e-2, "the controls do nothing"


def test_a_fresh_controlnet_is_the_encoder_of_the_u_net_and_changes_nothing(folders):
    module = built(folders["sd1"], moved=False)
    for net in module.controlnet.nets:
        for part in ("conv_in", "time_embedding", "down_blocks", "mid_block"):
            theirs = getattr(module.unet, part).state_dict()
            for name, value in getattr(net, part).state_dict().items():
                assert torch.equal(value, theirs[name]), name
    pipeline = StableDiffusionPipeline.from_pretrained(folders["sd1"], safety_checker=None)
    pipeline.scheduler = module.scheduler()
    pipeline.set_progress_bar_config(disable=True)
    plain = pipeline(
        PROMPTS, height=SIDE, width=SIDE, num_inference_steps=4, guidance_scale=3.0, output_type="pt",
        generator=[torch.Generator().manual_seed(seed) for seed in (7, 8)],
    ).images  # fmt: skip
    torch.testing.assert_close(module.sample(conditions(2), [7, 8]), plain, rtol=0, atol=2e-5)


@pytest.mark.parametrize("version", ["sd1", "sd2"])
@pytest.mark.parametrize("controls", [{"mask": 0.8}, {"mask": 1.0, "canny": 0.5}], ids=["one", "several"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_exported_controlnets_draw_the_same_pictures_in_plain_diffusers(folders, tmp_path, version, controls, guidance):
    module = built(folders[version], controls)
    module.export(tmp_path)
    asked = conditions(len(controls))
    ours = module.sample(asked, [7, 8], guidance=guidance)
    assert (ours - built(folders[version], controls, moved=False).sample(asked, [7, 8])).abs().max() > 1e-2
    theirs = drawn(folders[version], tmp_path, controls, asked, guidance, prompt=PROMPTS)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=5e-5)


def drawn(folder, exported, controls, asked: Conditions, guidance: float, **prompt) -> Tensor:
    """What plain diffusers draws with an export, float32 (n, 3, H, W)."""
    nets = [ControlNetModel.from_pretrained(exported / "controlnet" / name) for name in controls]
    pictures = [asked.control[:, [i] * 3] for i in range(len(nets))]
    weights = list(controls.values())
    if len(nets) == 1:
        nets, pictures, weights = nets[0], pictures[0], weights[0]
    pipeline = StableDiffusionControlNetPipeline.from_pretrained(folder, controlnet=nets, safety_checker=None)
    pipeline.scheduler = type(pipeline.scheduler).from_pretrained(exported / "scheduler")
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in (7, 8)]
    return pipeline(
        **prompt, image=pictures, num_inference_steps=4, guidance_scale=guidance, generator=generators,
        controlnet_conditioning_scale=weights, output_type="pt",
    ).images  # fmt: skip


def test_the_picture_s_tokens_draw_the_same_pictures_in_plain_diffusers(folders, tmp_path):
    module = built(folders["sd1"], {"mask": 1.0, "picture": 0.7})
    module.export(tmp_path)
    asked = conditions(4)
    pipeline = StableDiffusionPipeline.from_pretrained(folders["sd1"], safety_checker=None)
    words, no_words = pipeline.encode_prompt(PROMPTS, "cpu", 1, True)
    with torch.no_grad():
        tokens = ImagePrompt.from_pretrained(tmp_path / "image_prompt")(asked.control[:, 1:])
    assert tokens.shape == (2, 4, 16)
    theirs = drawn(
        folders["sd1"], tmp_path, {"mask": 1.0}, asked, 3.0,
        prompt_embeds=torch.cat([words, tokens], dim=1), negative_prompt_embeds=torch.cat([no_words, tokens], dim=1),
    )  # fmt: skip
    ours = module.sample(asked, [7, 8])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=5e-5)
    asked.control[:, 1:] = 0
    assert (module.sample(asked, [7, 8]) - ours).abs().max() > 1e-3, "the picture does nothing"


# The picture as words


def test_a_picture_is_embedded_as_transformers_embeds_it(tmp_path):
    """From a folder of a whole CLIP, with its own mean and deviation, at another size than the encoder's."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {**shape, "image_size": 24, "patch_size": 8, "projection_dim": 12}
    CLIPModel(CLIPConfig(text_config=shape, vision_config=vision, projection_dim=12)).save_pretrained(tmp_path)
    size = {"size": {"shortest_edge": 24}, "crop_size": 24}
    processor = CLIPImageProcessor(image_mean=[0.3, 0.4, 0.5], image_std=[0.2, 0.3, 0.4], **size)
    processor.save_pretrained(tmp_path)
    prompt = ImagePrompt(*load_image_encoder(str(tmp_path), "key"), text_width=16, tokens=3, weight=0.5)

    pixels = torch.randint(0, 256, (1, 3, 96, 96), dtype=torch.uint8)
    picture = Image.fromarray(pixels[0].permute(1, 2, 0).numpy())
    reference = CLIPVisionModelWithProjection.from_pretrained(tmp_path)
    with torch.no_grad():
        expected = reference(processor(picture, return_tensors="pt").pixel_values).image_embeds
        tokens = prompt(pixels.float() / 255)
        linear = F.linear(expected, prompt.projection.image_embeds.weight, prompt.projection.image_embeds.bias)
        normed = F.layer_norm(linear.reshape(1, 3, 16), (16,))
    torch.testing.assert_close(tokens, 0.5 * normed, rtol=0, atol=2e-2)
    assert not any(parameter.requires_grad for parameter in prompt.encoder.parameters())


def test_the_tokens_follow_the_text_s_and_are_made_once_a_sample(folders, monkeypatch):
    module = built(folders["sd1"], {"picture": 1.0})
    assert set(module.trainable_modules()) == {"image_prompt"}
    asked = conditions(3)
    context, text = module.condition(asked), module.embed(asked.captions)
    assert torch.equal(context.embeddings[:, :77], text.embeddings)
    assert torch.equal(context.embeddings[:, 77:], module.image_prompt(asked.control))
    assert torch.equal(context.mask, F.pad(text.mask, (0, 4), value=True))
    calls = []
    forward = module.image_prompt.forward
    monkeypatch.setattr(module.image_prompt, "forward", lambda pictures: calls.append(pictures) or forward(pictures))
    module.sample(asked, [1, 2], steps=3)
    (pictures,) = calls
    assert torch.equal(pictures, torch.cat([asked.control] * 2)), "both halves of guidance see the picture"


def test_the_image_encoder_is_exported_as_it_was_loaded_and_never_trained(folders, tmp_path):
    module = built(folders["sd1"], {"picture": 1.0})
    pictures = conditions(3).control
    with torch.no_grad():
        expected = module.image_prompt(pictures)
    for parameter in module.image_prompt.encoder.parameters():
        parameter.data = parameter.data.bfloat16()  # as mixed precision holds it
    module.export(tmp_path)
    with torch.no_grad():
        assert torch.equal(ImagePrompt.from_pretrained(tmp_path / "image_prompt")(pictures), expected)
    module.train()
    assert module.image_prompt.projection.training
    assert not module.image_prompt.encoder.training


def test_image_encoders_that_are_none_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"model\.image_encoder: no/such is not on this machine"):
        load_image_encoder("no/such", "model.image_encoder")
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    CLIPTextModel(CLIPTextConfig(**shape, vocab_size=40)).save_pretrained(tmp_path / "text")
    with pytest.raises(UserError, match=r"model\.image_encoder: .*text"):
        load_image_encoder(str(tmp_path / "text"), "model.image_encoder")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"model\.image_encoder: .* cannot be loaded"):
        load_image_encoder(str(tmp_path), "model.image_encoder")
    with pytest.raises(UserError, match="holds no image prompt"):
        ImagePrompt.from_pretrained(tmp_path)


# The auxiliary terms


def test_a_patch_is_70_pixels_wide():
    net = PatchDiscriminator()
    for layer in net.layers[1:-1]:
        layer[1] = torch.nn.Identity()  # the norm sees the whole picture, faintly
    picture = torch.rand(1, 3, 128, 128, requires_grad=True)
    logits = net(picture)[-1]
    logits[0, 0, 6, 6].backward()
    rows = picture.grad.abs().sum(dim=(0, 1, 3)).nonzero().flatten()
    assert int(rows[-1] - rows[0]) + 1 == 70
    for widths in ([16, 16], [16, 16, 16, 16]):
        side = smallest_side(widths)
        assert PatchDiscriminator(tuple(widths))(torch.rand(1, 3, side, side))[-1].shape == (1, 1, 1, 1)
        with pytest.raises(RuntimeError, match="Kernel size"):
            PatchDiscriminator(tuple(widths))(torch.rand(1, 3, side - 1, side - 1))


def test_one_backward_gives_generator_and_discriminator_each_its_own_gradient():
    """As two backward passes with two optimizers would: hinge loss against -D(fake) and matched features."""
    torch.manual_seed(0)
    net, real = PatchDiscriminator((16, 16)), torch.rand(2, 3, 32, 32)
    source = torch.rand(2, 3, 32, 32, requires_grad=True)
    terms = adversarial_terms(net, source * 2 - 1, real)
    (3 * terms["adversarial"] + 5 * terms["feature_matching"] + terms["discriminator"]).backward()
    together, fake_gradient = gradients(net), source.grad.clone()

    net.zero_grad()
    fake = (source * 2 - 1).detach()
    hinge = (1 - net(real)[-1]).clamp(min=0).mean() + (1 + net(fake)[-1]).clamp(min=0).mean()
    hinge.backward()
    for ours, theirs in zip(together, gradients(net), strict=True):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(terms["discriminator"], hinge)

    source.grad = None
    features, targets = net(source * 2 - 1), net(real)
    matched = sum((a - b).abs().mean() for a, b in zip(features[:-1], targets[:-1], strict=True)) / 2
    (-3 * features[-1].mean() + 5 * matched).backward()
    torch.testing.assert_close(fake_gradient, source.grad)


def test_the_terms_compare_the_decoded_prediction_with_the_decoded_latent(folders):
    rows = batch(count=8)
    limit = int(steps_of(rows).sort().values[4])  # one sample's own step, which is not below it
    module = built(folders["sd1"], **(TERMS | {"auxiliary_below": limit}))
    losses = module.losses(rows)
    random = SampleRandom(rows.seeds)
    z = module.latents(rows, random)
    noise, t = random.normal(4, 8, 8), random.integers(1000)
    below = t < limit
    assert below.sum() == 4
    scheduler = module.scheduler()
    noisy = scheduler.add_noise(z, noise, t)
    output = module.predict(noisy, t, module.condition(rows.conditions))
    steps = [scheduler_original(scheduler, output[[i]], int(t[i]), noisy[[i]]) for i in range(8)]
    scale = module.vae.config.scaling_factor
    fake, real = (module.vae.decode(x[below] / scale).sample for x in (torch.cat(steps), z))
    expected = adversarial_terms(module.discriminator, fake, real) | {"perceptual": module.perceptual(fake, real)}
    denoising = F.mse_loss(output, noise)
    total = denoising
    for name, weight in {"adversarial": 0.5, "feature_matching": 2.0, "perceptual": 0.7, "discriminator": 1.0}.items():
        term = expected[name] * below.sum() / 8
        torch.testing.assert_close(losses[name], term, rtol=1e-3, atol=1e-5)
        assert term.abs() > 1e-4, name
        total = total + weight * term
    torch.testing.assert_close(losses["denoising"], denoising)
    torch.testing.assert_close(losses["loss"], total, rtol=1e-3, atol=1e-5)


def scheduler_original(scheduler, output: Tensor, t: int, noisy: Tensor) -> Tensor:
    scheduler.set_timesteps(1000)
    return scheduler.step(output, t, noisy).pred_original_sample


def test_the_terms_are_means_over_the_samples_however_they_are_batched(folders):
    module, rows = built(folders["sd1"], **TERMS), batch(count=6)
    with torch.no_grad():
        whole = module.losses(rows)
        parts = [module.losses(rows[[i]]) for i in range(6)]
    assert {"denoising", "adversarial", "feature_matching", "perceptual", "discriminator", "loss"} == set(whole)
    for name, value in whole.items():
        torch.testing.assert_close(torch.stack([part[name] for part in parts]).mean(), value, rtol=1e-4, atol=1e-5)


def test_every_network_takes_part_where_no_sample_has_little_noise(folders):
    """As several processes need it: each waits for the gradients of all."""
    module, rows = built(folders["sd1"], **(TERMS | {"auxiliary_below": 1})), batch(count=3)
    assert steps_of(rows).min() >= 1
    losses = module.losses(rows)
    losses["loss"].backward()
    assert torch.equal(losses["loss"], losses["denoising"])
    assert losses["discriminator"] == 0
    assert all(not gradient.any() for gradient in gradients(module.discriminator))
    assert any(gradient.any() for gradient in gradients(module.controlnet))


def test_each_network_gets_its_gradient_from_its_own_terms(folders):
    rows = batch(count=4)
    both = built(folders["sd1"], **TERMS)
    both.losses(rows)["loss"].backward()
    alone = built(folders["sd1"], **TERMS)
    alone.losses(rows)["discriminator"].backward()
    for ours, theirs in zip(gradients(both.discriminator), gradients(alone.discriminator), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert all(parameter.grad is None for parameter in alone.controlnet.parameters())
    plain = built(folders["sd1"])
    plain.losses(rows)["loss"].backward()
    pairs = zip(gradients(both.controlnet), gradients(plain.controlnet), strict=True)
    assert any((a - b).abs().max() > 1e-6 for a, b in pairs), "the terms do not reach the ControlNets"


def test_by_default_no_network_of_the_terms_is_made(folders):
    module = built(folders["sd1"])
    assert module.discriminator is None
    assert module.perceptual is None
    assert set(module.trainable_modules()) == {"controlnet"}
    assert set(module.losses(batch())) == {"loss"}
    assert [w.key for w in module.required_weights()] == ["model.pretrained"]
    asking = configured(folders["sd1"], {"picture": 1.0}, perceptual_weight=1.0, image_encoder="a/b")
    keys = [w.key for w in ControlNet(asking).required_weights()]
    assert keys == ["model.pretrained", "model.image_encoder", "model.perceptual_weights"]
    leaving = dataclasses.replace(asking, controls={"mask": 1.0, "picture": 0.0}, perceptual_weight=0.0)
    assert [w.key for w in ControlNet(leaving).required_weights()] == ["model.pretrained"]


def test_the_discriminator_is_saved_and_not_exported(folders, tmp_path):
    module = built(folders["sd1"], {"mask": 1.0}, **TERMS)
    assert any(name.startswith("discriminator.") for name in module.saved_names())
    assert not any(name.startswith(("perceptual.", "unet.", "vae.")) for name in module.saved_names())
    module.export(tmp_path)
    (file,) = tmp_path.rglob("*.safetensors")
    assert file == tmp_path / "controlnet/mask/diffusion_pytorch_model.safetensors"
    assert set(load_file(file)) == set(module.controlnet.nets[0].state_dict())


# What else is shared with Stable Diffusion


def test_a_weight_of_zero_leaves_a_control_out(folders):
    module = built(folders["sd1"], {"canny": 0.0, "mask": 1.0, "picture": 0.0})
    assert len(module.controlnet.nets) == 1
    assert module.image_prompt is None
    asked = conditions(5)
    changed = asked.control.clone()
    changed[:, [0, 2, 3, 4]] = 0
    pictures = module.sample(asked, [1, 2])
    assert torch.equal(module.sample(dataclasses.replace(asked, control=changed), [1, 2]), pictures)
    changed[:, 1] = 0
    assert not torch.equal(module.sample(dataclasses.replace(asked, control=changed), [1, 2]), pictures)


def test_cached_latents_and_text_give_the_same_loss(folders):
    controls = {"mask": 1.0, "picture": 1.0}
    module, rows = built(folders["sd1"], controls, **TERMS), batch(channels=4, count=3)
    text = module.embed(rows.conditions.captions)
    with torch.no_grad():
        moments = module.encode_moments(rows.images)
        expected = module.losses(rows)["loss"]
    cached = ControlNet(configured(folders["sd1"], controls, **TERMS))
    cached.use_cache(lambda captions: module.text_encoder(captions))
    cached.configure_model()
    assert cached.vae.encoder is None
    cached.load_state_dict(module.state_dict(), strict=False)
    stored = dataclasses.replace(
        rows, images=None, latents=moments, text_embeddings=text.embeddings, text_mask=text.mask
    )
    torch.testing.assert_close(cached.eval().losses(stored)["loss"], expected, rtol=0, atol=1e-5)
    shown, _ = cached.preview(stored, [1, 2, 3])
    latents = module.latents(rows, SampleRandom(rows.seeds))
    with torch.no_grad():
        decoded = to_image_range(module.decode(latents))
    torch.testing.assert_close(shown[..., :SIDE], decoded, rtol=0, atol=1e-5)


def test_gradient_checkpointing_changes_no_gradient(folders):
    rows = batch(count=2)
    rows = dataclasses.replace(rows, seeds=torch.tensor([derive_seed(2), derive_seed(5)]))
    plain, saving = (built(folders["sd1"], gradient_checkpointing=on, **TERMS) for on in (False, True))
    for module in (plain, saving):
        module.train()
        module.losses(rows)["loss"].backward()
    assert all(net.down_blocks[0].gradient_checkpointing for net in saving.controlnet.nets)
    for name in ("controlnet", "discriminator"):
        for a, b in zip(gradients(getattr(plain, name)), gradients(getattr(saving, name)), strict=True):
            torch.testing.assert_close(a, b)


def test_the_preview_shows_real_control_and_generated_side_by_side(folders):
    module, rows = built(folders["sd1"], {"mask": 1.0, "picture": 1.0, "canny": 0.5}), batch(channels=5)
    pictures, captions = module.preview(rows, [1, 2])
    real, mask, edges, drawn = pictures.split(SIDE, dim=3)
    assert torch.equal(real, rows.images)
    assert torch.equal(mask, rows.conditions.control[:, [0, 0, 0]])
    assert torch.equal(edges, rows.conditions.control[:, [4, 4, 4]])
    assert torch.equal(drawn, module.sample(rows.conditions, [1, 2]))
    assert captions[0] == f"real | mask | canny | generated: {PROMPTS[0]}"
    sheet = draw_grid(pictures, captions, side=80)
    assert sheet.width == 8 + 4 * 80 + 8
    assert draw_grid(pictures[..., :SIDE], captions, side=80).width == 4 * (80 + 8) + 8


def test_original_of_the_prediction_follows_the_model_s_kind(folders):
    """A v-model's terms must not read its output as noise."""
    module, rows = built(folders["sd2"], **(TERMS | {"auxiliary_below": 1000})), batch(count=2)
    assert module.prediction == "v_prediction"
    seen = []
    decode = module.decode
    module.decode = lambda z: seen.append(z) or decode(z)
    module.losses(rows)
    random = SampleRandom(rows.seeds)
    z = module.latents(rows, random)
    noise, t = random.normal(4, 8, 8), random.integers(1000)
    noisy = module.scheduler().add_noise(z, noise, t)
    output = module.predict(noisy, t, module.condition(rows.conditions))
    torch.testing.assert_close(seen[0], to_original("v_prediction", output, noisy, t, module.alpha_bar))
    torch.testing.assert_close(seen[1], z)


# What is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"controls": {}}, r"model\.controls=\{\}: give at least one"),
        ({"controls": {"mask": 0.0}}, "give at least one a weight above 0"),
        ({"controls": {"masks": 1.0}}, r"model\.controls: masks is not one of canny, depth, mask, picture"),
        ({"discriminator_widths": [64, 100]}, r"model\.discriminator_widths=\[64, 100\]"),
    ],
)
def test_values_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(configured("random"), **changes)


def test_networks_that_do_not_fit_are_refused(folders):
    with pytest.raises(UserError, match=r"model\.conditioning_widths=.* has 3 levels, give 3 widths"):
        built(folders["sd1"], conditioning_widths=[16, 32, 96, 256])
    with pytest.raises(UserError, match=r"model\.resolution=16: this discriminator needs at least 24 pixels"):
        built(folders["sd1"], resolution=16, adversarial_weight=1.0)


@pytest.mark.parametrize("given", [None, torch.rand(2, 1, SIDE, SIDE), torch.rand(2, 2, 16, 16)])
def test_a_missing_or_strange_control_is_refused(folders, given):
    module = built(folders["sd1"])
    with pytest.raises(
        UserError, match=r"for a control of shape \(2, 32, 32\) \(mask, canny\), and was given (none|one)"
    ):
        module.sample(Conditions(captions=PROMPTS, control=given), [1, 2])


# Whole runs


def tiny(chest, *settings: str):
    return load_config([REPOSITORY / "configs/tiny/controlnet.yaml"], [f"data.root={chest}", *settings])


def test_data_with_other_controls_is_refused_before_the_first_step(chest, here):
    config = tiny(
        chest,
        "data.controls=[canny,mask,picture]",
        "data.validation_images=4",
        "evaluation.images=0",
        "checkpoint.monitor=val/loss",
    )
    with pytest.raises(UserError, match=r"names mask, canny, picture, data\.controls canny, mask, picture: give"):
        train(config)
    assert not list(here.rglob("*.ckpt"))


def test_the_presets_share_their_controls_with_the_data():
    for name in ("configs/controlnet.yaml", "configs/tiny/controlnet.yaml"):
        config = load_config([REPOSITORY / name], ["model.controls.depth=0.5"])
        assert list(config.data.controls) == list(config.model.controls)
        assert "depth" in config.data.controls


def test_a_run_draws_the_same_masks_at_growing_steps_and_scores_them(chest, here):
    settings = ["data.validation_images=4", "run_dir=run", "evaluation.grid=2", "evaluation.at_start=true"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = train(tiny(chest, *settings, *(f"model.{k}={v}" for k, v in TERMS.items())))
    assert [path.name for path in sorted((here / "run/grids").iterdir())] == ["step-0000000.png", "step-0000002.png"]
    assert {"eval/psnr", "eval/ssim", "val/adversarial", "val/loss"} <= set(trainer.callback_metrics)
    assert (here / "run/export/image_prompt/config.json").is_file()
    assert (here / "run/export/controlnet/canny/config.json").is_file()

"""MSDM against the paper, closed forms and diffusers."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMScheduler
from safetensors.torch import load_file

from datamodules.batches import Conditions, ImageBatch
from lightning_modules.families.latent_diffusion import NoiseConfig, SamplerConfig
from lightning_modules.maths import diffusion
from lightning_modules.msdm import MSDM, MSDMConfig, UNetConfig
from lightning_modules.msdm_vae import LatentCodec, LatentCodecConfig, MSDMVAEConfig, MSDMVAEModule
from lightning_modules.parts.text import TextEncoder, TextEncoderConfig
from medsynth.errors import UserError

CODEC = LatentCodecConfig(latent_channels=4, widths=[8, 16], norm_groups=4)
TINY = MSDMConfig(
    resolution=16,
    vae="random",
    codec=CODEC,
    text_encoder=TextEncoderConfig(source="random", max_tokens=32, width=16, layers=1, heads=2, vocabulary=1000),
    unet=UNetConfig(widths=[8, 8, 16], res_blocks=1, heads=2, pool_head_dim=8, time_dim=16, norm_groups=4, dropout=0.0),
    sampler=SamplerConfig(steps=4, guidance=2.0),
)


def tiny_msdm(**changes) -> MSDM:
    torch.manual_seed(0)
    module = MSDM(dataclasses.replace(TINY, **changes))
    module.configure_model()
    for parameter in [*module.unet.parameters(), *module.codec.parameters()]:
        torch.nn.init.normal_(parameter, std=0.1)
    return module.eval()


def batch(captions: list[str], seeds: list[int] | None = None) -> ImageBatch:
    count = len(captions)
    images = torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    seeds = torch.tensor(seeds or [2**62 + i for i in range(count)])
    return ImageBatch(images, Conditions(captions), seeds, torch.zeros(count, dtype=torch.bool))


def test_the_paper_s_parameter_counts():
    """326 M in the U-Net, 463 M in all with CLIP ViT-L/14 and the autoencoder, within 3 %."""
    with torch.device("meta"):
        module = MSDM(
            dataclasses.replace(
                MSDMConfig(), vae="random", text_encoder=TextEncoderConfig(source="random", max_tokens=64)
            )
        )
        module.configure_model()
    millions = {name: sum(p.numel() for p in child.parameters()) / 1e6 for name, child in module.named_children()}
    assert millions["unet"] == pytest.approx(326, rel=0.03)
    assert millions["text_encoder"] == pytest.approx(123.06, rel=1e-3)
    assert sum(millions.values()) == pytest.approx(463, rel=0.03)


def test_the_noise_schedule_is_diffusers():
    reference = DDPMScheduler(1000, 0.002, 0.02, beta_schedule="scaled_linear")
    betas = diffusion.scaled_linear_betas(0.002, 0.02, 1000)
    torch.testing.assert_close(betas, reference.betas, rtol=1e-5, atol=0)
    torch.testing.assert_close(diffusion.alphas_cumprod(betas), reference.alphas_cumprod, rtol=1e-4, atol=0)


def test_noising_and_its_inverse_are_diffusers():
    reference = DDPMScheduler(1000, 0.002, 0.02, beta_schedule="scaled_linear")
    x, noise, t = torch.randn(5, 4, 8, 8), torch.randn(5, 4, 8, 8), torch.tensor([0, 1, 10, 500, 999])
    alpha_bar = reference.alphas_cumprod
    x_t = diffusion.add_noise(x, noise, t, alpha_bar)
    torch.testing.assert_close(x_t, reference.add_noise(x, noise, t), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(diffusion.predicted_original(x_t, noise, t, alpha_bar)[:4], x[:4], rtol=1e-3, atol=1e-3)


def test_the_posterior_is_diffusers():
    reference = DDPMScheduler(
        1000, 0.002, 0.02, beta_schedule="scaled_linear", clip_sample=False, prediction_type="sample"
    )
    betas = diffusion.scaled_linear_betas(0.002, 0.02, 1000)
    x_0, x_t = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
    for t in (1, 10, 500, 999):
        step = reference.step(x_0, t, x_t, generator=torch.Generator().manual_seed(0))
        noise = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(0))
        steps = torch.tensor([t])
        mean = diffusion.posterior_mean(x_0, x_t, steps, betas)
        std = (0.5 * diffusion.posterior_log_variance(steps, betas, 4)).exp()
        torch.testing.assert_close(mean + std * noise, step.prev_sample, rtol=1e-4, atol=1e-4)


def test_the_interpolated_variance_is_diffusers():
    reference = DDPMScheduler(1000, 0.002, 0.02, beta_schedule="scaled_linear", variance_type="learned_range")
    betas = diffusion.scaled_linear_betas(0.002, 0.02, 1000)
    output = torch.rand(1, 4, 8, 8) * 2 - 1
    for t in (1, 300, 999):
        ours = diffusion.interpolated_log_variance(output, torch.tensor([t]), betas)
        theirs = reference._get_variance(t, predicted_variance=output)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_kl_of_gaussians_is_torch_s():
    a = torch.distributions.Normal(torch.randn(9), torch.rand(9) + 0.1)
    b = torch.distributions.Normal(torch.randn(9), torch.rand(9) + 0.1)
    ours = diffusion.gaussian_kl(a.mean, a.variance.log(), b.mean, b.variance.log())
    torch.testing.assert_close(ours, torch.distributions.kl_divergence(a, b))


def test_guidance_of_one_is_the_conditional_prediction():
    module = tiny_msdm()
    conditions = Conditions(["Generate an image with 1 polyp."])
    plain = module.sample(conditions, [5], guidance=1)
    nearly = module.sample(conditions, [5], guidance=1 + 1e-6)
    torch.testing.assert_close(plain, nearly, atol=1e-4, rtol=0)
    assert not torch.allclose(plain, module.sample(conditions, [5], guidance=4), atol=1e-4)


def test_a_dropped_prompt_is_the_empty_prompt_for_the_network(monkeypatch):
    """The authors' code nulls the token ids after embedding them, so that its unconditional branch saw the prompt."""
    module = tiny_msdm()
    seen = []
    forward = module.unet.forward
    monkeypatch.setattr(module.unet, "forward", lambda *a: seen.append(a[2:4]) or forward(*a))
    module.losses(batch(["Generate an image with 1 polyp.", ""], seeds=[2**62 + 1, 2**62 + 2]))
    text, mask = seen[-1]
    empty, empty_mask = module.text_encoder([""])
    assert torch.equal(text[1], empty[0])
    assert torch.equal(mask[1], empty_mask[0])
    assert not torch.allclose(text[0], empty[0])
    module.sample(Conditions(["Generate an image with 1 polyp."]), [1], steps=1)
    assert torch.equal(seen[-1][0][0], empty[0]), "the unconditional branch of guidance"


def test_a_dropped_prompt_changes_the_loss():
    module = tiny_msdm()
    with_prompt = module.losses(batch(["Generate an image with 1 polyp."]))["loss"]
    assert with_prompt != module.losses(batch([""]))["loss"]


def test_self_conditioning_feeds_back_the_estimate(monkeypatch):
    module = tiny_msdm()
    calls = []
    forward = module.unet.forward
    monkeypatch.setattr(module.unet, "forward", lambda *a: calls.append(a) or forward(*a))
    # A seed below 2^62 chooses self-conditioning at a share of one half.
    module.losses(batch(["a", "b"], seeds=[1, 2**62 + 1]))
    first, second = calls
    assert len(first[0]) == 1, "only the chosen sample is estimated first"
    estimate = second[4]
    assert estimate[1].abs().max() == 0
    noise = forward(*first)[0]
    expected = diffusion.predicted_original(first[0], noise, first[1], module.alpha_bar).clamp(-4, 4)
    torch.testing.assert_close(estimate[:1], expected)
    calls.clear()
    module.sample(Conditions(["a"]), [1], steps=2, guidance=1)
    assert calls[0][4].abs().max() == 0
    assert calls[1][4].abs().max() > 0


@pytest.mark.parametrize("prediction", diffusion.PREDICTION_TYPES)
@pytest.mark.parametrize("name", ["ddpm", "ddim", "dpm++"])
def test_samplers_recover_a_known_picture(name, prediction):
    """With what is to be predicted of one z_0 as the network, every sampler ends at that z_0."""
    sampler = SamplerConfig(name=name, steps=50, guidance=1.0)
    module = tiny_msdm(sampler=sampler, self_conditioning=0.0, prediction=prediction)
    target = torch.randn(1, *module.latent_shape())

    def exact(z_t, t, *_):
        a = diffusion.at(module.alpha_bar, t, 4)
        noise = (z_t - a.sqrt() * target) / (1 - a).sqrt()
        v = a.sqrt() * noise - (1 - a).sqrt() * target
        return {"epsilon": noise, "v_prediction": v, "sample": target}[prediction], []

    module.unet.forward = exact
    decoded = {}
    module.decode = lambda z: decoded.setdefault("z", z)
    module.sample(Conditions(["a"]), [7])
    torch.testing.assert_close(decoded["z"], target, atol=2e-2, rtol=0)


def test_learned_variance_trains_the_variance_alone():
    module = tiny_msdm(learned_variance=True)
    losses = module.losses(batch(["a", "b"]))
    losses["variance"].backward()
    weight = module.unet.out_conv.weight.grad
    assert weight[:4].abs().max() == 0, "the mean is the noise loss's business"
    assert weight[4:].abs().max() > 0
    images = tiny_msdm(learned_variance=True, sampler=SamplerConfig("ddpm", 4, 2.0)).sample(Conditions(["a"]), [1])
    assert images.isfinite().all()


def test_deep_supervision_weighs_each_resolution_half():
    module = tiny_msdm(deep_supervision=1, self_conditioning=0.0)
    captured = {}
    forward = module.unet.forward
    module.unet.forward = lambda *a: captured.setdefault("out", forward(*a))
    one = batch(["a"])
    loss = module.losses(one)["loss"]
    random = diffusion.SampleRandom(one.seeds)
    moments = module.encode_moments(one.images)
    random.normal(moments.shape[1] // 2, *moments.shape[2:])
    noise = random.normal(*module.latent_shape())
    out, (coarse,) = captured["out"]
    expected = 2 / 3 * F.l1_loss(out, noise) + 1 / 3 * F.l1_loss(coarse, F.avg_pool2d(noise, 2))
    torch.testing.assert_close(loss, expected)


def test_v_is_diffusers_velocity_and_its_estimate_gives_back_the_latents():
    module = tiny_msdm(prediction="v_prediction", loss="l2")
    seen = []
    forward = module.unet.forward
    module.unet.forward = lambda *a: seen.append((a, forward(*a)[0])) or (seen[-1][1], [])
    one = batch(["a"], seeds=[1])  # below 2^62: estimated first
    loss = module.losses(one)["loss"]
    (first, guess), (second, output) = seen
    random = diffusion.SampleRandom(one.seeds)
    z_0 = module.latents(one, random)
    noise = random.normal(*module.latent_shape())
    velocity = module.scheduler().get_velocity(z_0, noise, first[1])
    torch.testing.assert_close(loss, F.mse_loss(output, velocity))
    scheduler = module.scheduler()
    scheduler.set_timesteps(1000)
    step = scheduler.step(guess, int(first[1]), first[0])
    torch.testing.assert_close(second[4], step.pred_original_sample.clamp(-4, 4), atol=1e-4, rtol=1e-4)


def test_a_network_that_predicts_noise_is_refused_where_the_last_step_is_nothing_else():
    noise = NoiseConfig(zero_terminal_snr=True)
    with pytest.raises(UserError, match="set model.prediction=v_prediction"):
        dataclasses.replace(TINY, noise=noise)
    module = tiny_msdm(noise=noise, prediction="v_prediction", sampler=SamplerConfig("ddim", 4, 2.0))
    assert module.sample(Conditions(["a"]), [1]).isfinite().all()


@pytest.mark.parametrize("loss", ["l1", "l2"])
def test_min_snr_weighs_each_sample_by_diffusers_signal_to_noise_ratio(loss):
    from diffusers.training_utils import compute_snr

    module = tiny_msdm(loss=loss, min_snr_gamma=0.2, deep_supervision=1, self_conditioning=0.0)
    captured = {}
    forward = module.unet.forward

    def recording(z_t, t, *others):
        captured.update(t=t, out=forward(z_t, t, *others))
        return captured["out"]

    module.unet.forward = recording
    some = batch(["a"] * 6, seeds=list(range(6)))
    found = module.losses(some)["loss"]
    snr = compute_snr(module.scheduler(), captured["t"])
    weight = snr.clamp(max=0.2) / snr
    assert weight.min() < 0.1 and weight.max() == 1, "steps of little and of much noise are among them"
    power = {"l1": 1, "l2": 2}[loss]
    random = diffusion.SampleRandom(some.seeds)
    moments = module.encode_moments(some.images)
    random.normal(moments.shape[1] // 2, *moments.shape[2:])
    noise = random.normal(*module.latent_shape())
    out, (coarse,) = captured["out"]
    fine, rough = (
        (weight ** (power / 2) * (ours - theirs).abs().pow(power).mean((1, 2, 3))).mean()
        for ours, theirs in ((out, noise), (coarse, F.avg_pool2d(noise, 2)))
    )
    torch.testing.assert_close(found, 2 / 3 * fine + 1 / 3 * rough)


def test_an_export_loads_with_the_public_libraries_and_draws_the_same_pictures(tmp_path):
    codec = tiny_msdm().codec
    codec.save(tmp_path / "stage1")
    module = tiny_msdm(vae=str(tmp_path / "stage1"))
    module.codec.load_state_dict(codec.state_dict())
    module.export(tmp_path)
    scheduler = DDIMScheduler.from_pretrained(tmp_path / "scheduler")
    torch.testing.assert_close(scheduler.alphas_cumprod, module.alpha_bar, rtol=1e-4, atol=0)
    text_encoder = dataclasses.replace(TINY.text_encoder, source=str(tmp_path))
    again = MSDM(dataclasses.replace(TINY, vae=str(tmp_path / "vae"), text_encoder=text_encoder))
    again.configure_model()
    again.unet.load_state_dict(load_file(tmp_path / "unet/diffusion_pytorch_model.safetensors"))
    conditions = Conditions(["Generate an image with 1 polyp."])
    torch.testing.assert_close(again.eval().sample(conditions, [3]), module.sample(conditions, [3]))


def test_a_wrong_text_encoder_is_named(tmp_path):
    with pytest.raises(UserError, match="is not on this machine"):
        TextEncoder(dataclasses.replace(TINY.text_encoder, source="no/such-encoder"))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(
        UserError, match="model.text_encoder.source: .* cannot be loaded: it has neither safetensors nor .bin"
    ):
        TextEncoder(dataclasses.replace(TINY.text_encoder, source=str(tmp_path)))
    tiny_msdm().export(tmp_path / "export")
    with pytest.raises(UserError, match="width 16, model.text_encoder.width says 32"):
        TextEncoder(dataclasses.replace(TINY.text_encoder, source=str(tmp_path / "export"), width=32))


def test_a_long_prompt_is_cut_with_a_warning():
    encoder = TextEncoder(TINY.text_encoder)
    with pytest.warns(UserWarning, match="cut to 32 tokens"):
        embeddings, mask = encoder(["Generate an image with 1 polyp. " * 20])
    assert embeddings.shape == (1, 32, 16)
    assert mask.all()


def test_a_caption_s_embedding_does_not_depend_on_when_it_is_asked_for():
    encoder = TextEncoder(TINY.text_encoder)
    first, _ = encoder(["Generate an image with 1 polyp."])
    encoder([f"Generate an image with {i} polyps." for i in range(1100)])  # more than it remembers
    later, _ = encoder(["", "Generate an image with 1 polyp."])
    torch.testing.assert_close(later[1], first[0])


def test_a_missing_first_stage_is_named():
    module = MSDM(dataclasses.replace(TINY, vae="no/such/folder"))
    with pytest.raises(UserError, match="train the first stage"):
        module.configure_model()


# The first stage


def vae(**changes) -> MSDMVAEModule:
    torch.manual_seed(0)
    module = MSDMVAEModule(MSDMVAEConfig(resolution=32, perceptual_weight=0.0, codec=CODEC, **changes))
    module.configure_model()
    for parameter in module.codec.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return module


def pictures(count: int = 2) -> ImageBatch:
    images = torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return ImageBatch(images, Conditions([""] * count), torch.arange(count), torch.zeros(count, dtype=torch.bool))


def test_the_objective_is_the_authors_over_the_number_of_values():
    """Their sum over pixels and outputs of L2 + (1 - SSIM) + 1e-6·KL, computed here step by step."""
    module, one = vae().eval(), pictures(1)
    x = one.images * 2 - 1
    mean, log_variance = module.codec.net.encode(x)
    z = mean + (0.5 * log_variance).exp() * diffusion.SampleRandom(one.seeds).normal(*mean.shape[1:])
    total = 1e-6 * 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).sum()
    from torchmetrics.functional.image import structural_similarity_index_measure as ssim

    for y in module.codec.net.decode_all(z):
        target = F.interpolate(x, size=y.shape[2:], mode="nearest-exact")
        similarity = ssim((y / 2 + 0.5).clamp(0, 1), target / 2 + 0.5, data_range=1.0).clamp_min(0)
        total = total + ((y - target) ** 2 + (1 - similarity)).sum()
    torch.testing.assert_close(module.losses(one)["loss"], total / x.numel(), rtol=1e-4, atol=1e-6)


def test_perceptual_loss_is_lpips_with_the_given_vgg(tmp_path):
    """The same weights file in ours and in torchmetrics' LPIPS."""
    from torchmetrics.functional.image.lpips import _LPIPS
    from torchvision.models import vgg16

    from lightning_modules.parts.perceptual import PerceptualLoss

    torch.manual_seed(0)
    net = vgg16(weights=None)
    torch.save(net.state_dict(), tmp_path / "vgg.pth")
    ours = PerceptualLoss(str(tmp_path / "vgg.pth"))
    theirs = _LPIPS(pretrained=True, net="vgg", pnet_rand=True)
    theirs.net.load_state_dict(ours.net.net.state_dict())
    x, y = torch.rand(2, 3, 32, 32) * 2 - 1, torch.rand(2, 3, 32, 32) * 2 - 1
    torch.testing.assert_close(ours(x, y), theirs(x, y).mean(), rtol=1e-5, atol=1e-7)
    (tmp_path / "vgg.pth").write_bytes(b"no weights")
    with pytest.raises(UserError, match="is no VGG-16"):
        PerceptualLoss(str(tmp_path / "vgg.pth"))


def test_normalised_latents_have_unit_variance_and_go_back():
    module = vae()
    module.train()
    for seed in range(60):
        images = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
        module.losses(dataclasses.replace(pictures(8), images=images, seeds=torch.arange(8) + 8 * seed))
    module.eval()
    codec = module.codec
    images = torch.rand(64, 3, 32, 32) * 2 - 1
    moments = codec.moments(images)
    noise = torch.randn(64, 4, 16, 16)
    z = codec.normalised(moments, noise)
    assert z.mean().abs() < 0.2
    assert z.std().item() == pytest.approx(1, abs=0.1)
    mean, log_variance = moments.chunk(2, dim=1)
    raw = mean + (0.5 * log_variance).exp() * noise
    torch.testing.assert_close(codec.decode_normalised(z), codec.net.decode(raw), rtol=1e-3, atol=1e-4)


def test_the_vq_variant_learns_and_encodes_without_noise():
    module = vae(pixel_loss="l1")
    module = MSDMVAEModule(
        dataclasses.replace(module.config, codec=dataclasses.replace(CODEC, quantised=True, codes=16))
    )
    module.configure_model()
    losses = module.losses(pictures())
    assert {"codebook", "loss"} <= set(losses)
    assert "kl" not in losses
    losses["loss"].backward()
    assert module.codec.net.quantize.codebook.weight.grad.abs().max() > 0
    moments = module.codec.moments(pictures().images)
    a = module.codec.normalised(moments, torch.randn(2, 4, 16, 16))
    torch.testing.assert_close(a, module.codec.normalised(moments, torch.zeros(2, 4, 16, 16)), atol=1e-5, rtol=0)


def test_a_codec_comes_back_whole_and_damage_is_named(tmp_path):
    codec = vae().codec
    codec.save(tmp_path)
    again = LatentCodec.load(tmp_path, "model.vae")
    assert again.config == codec.config
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in codec.state_dict().items())
    weights, config = tmp_path / "diffusion_pytorch_model.safetensors", tmp_path / "config.json"
    for damaged, content in ((weights, weights.read_bytes()[:1000]), (config, b"{}"), (config, b"no json")):
        damaged.write_bytes(content)
        with pytest.raises(UserError, match="model.vae: .* holds no autoencoder"):
            LatentCodec.load(tmp_path, "model.vae")


def test_psnr_is_what_its_name_says():
    module, one = vae().eval(), pictures(1)
    x = one.images * 2 - 1
    mean, log_variance = module.codec.net.encode(x)
    z = mean + (0.5 * log_variance).exp() * diffusion.SampleRandom(one.seeds).normal(*mean.shape[1:])
    y = (module.codec.net.decode(z) / 2 + 0.5).clamp(0, 1)
    expected = -10 * math.log10(F.mse_loss(y, one.images).item())
    assert module.losses(one)["psnr"].item() == pytest.approx(expected, rel=1e-5)

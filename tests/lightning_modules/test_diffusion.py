"""Targets, weights and schedules of diffusion against diffusers and closed forms."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
from diffusers.training_utils import compute_snr

from lightning_modules.maths import diffusion
from lightning_modules.maths.diffusion import PREDICTION_TYPES

# Stable Diffusion's schedule.
NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
T_B = torch.tensor([0, 1, 17, 250, 500, 981, 999])
GAMMA = 5.0


def tensors(count: int) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(len(T_B), 4, 3, 5) for _ in range(count)]


def zero_terminal_alpha_bar() -> torch.Tensor:
    return diffusion.alphas_cumprod(diffusion.zero_terminal_snr(DDPMScheduler(**NOISE).betas))


def test_the_target_of_v_prediction_is_diffusers_velocity():
    reference = DDPMScheduler(**NOISE)
    x_0, noise = tensors(2)
    target = diffusion.training_target("v_prediction", x_0, noise, T_B, reference.alphas_cumprod)
    torch.testing.assert_close(target, reference.get_velocity(x_0, noise, T_B), rtol=1e-6, atol=1e-6)


def test_the_targets_of_epsilon_and_sample_are_noise_and_picture():
    x_0, noise = tensors(2)
    alpha_bar = DDPMScheduler(**NOISE).alphas_cumprod
    assert diffusion.training_target("epsilon", x_0, noise, T_B, alpha_bar) is noise
    assert diffusion.training_target("sample", x_0, noise, T_B, alpha_bar) is x_0


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_a_perfect_output_gives_back_picture_and_noise(kind):
    x_0, noise = (x.double() for x in tensors(2))
    alpha_bar = DDPMScheduler(**NOISE).alphas_cumprod.double()
    x_t = diffusion.add_noise(x_0, noise, T_B, alpha_bar)
    output = diffusion.training_target(kind, x_0, noise, T_B, alpha_bar)
    torch.testing.assert_close(diffusion.to_original(kind, output, x_t, T_B, alpha_bar), x_0)
    torch.testing.assert_close(diffusion.to_noise(kind, output, x_t, T_B, alpha_bar), noise)


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("t", [981, 501, 21])
def test_any_output_means_what_it_means_to_diffusers(kind, t):
    reference = DDIMScheduler(**NOISE, prediction_type=kind, clip_sample=False)
    reference.set_timesteps(50)
    alpha_bar = reference.alphas_cumprod
    output, x_t = tensors(2)
    t_B = torch.full((len(x_t),), t)
    x_0 = diffusion.to_original(kind, output, x_t, t_B, alpha_bar)
    noise = diffusion.to_noise(kind, output, x_t, t_B, alpha_bar)
    expected = reference.step(output, t, x_t)
    torch.testing.assert_close(x_0, expected.pred_original_sample, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        diffusion.add_noise(x_0, noise, t_B - 20, alpha_bar), expected.prev_sample, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_at_zero_snr_the_picture_is_the_output(kind):
    output, x_t = tensors(2)
    t_B = torch.full((len(x_t),), 999)
    alpha_bar = zero_terminal_alpha_bar()
    sign = -1 if kind == "v_prediction" else 1
    assert torch.equal(diffusion.to_original(kind, output, x_t, t_B, alpha_bar), sign * output)
    assert torch.equal(diffusion.to_noise(kind, output, x_t, t_B, alpha_bar), x_t)


def test_unknown_prediction_types_are_refused():
    x, y = tensors(2)
    alpha_bar = DDPMScheduler(**NOISE).alphas_cumprod
    for function in (diffusion.training_target, diffusion.to_original, diffusion.to_noise):
        with pytest.raises(ValueError, match="eps is no prediction type; use one of epsilon, v_prediction, sample"):
            function("eps", x, y, T_B, alpha_bar)
    with pytest.raises(ValueError, match="v is no prediction type"):
        diffusion.min_snr_weight("v", T_B, alpha_bar, GAMMA)


def test_the_signal_to_noise_ratio_is_diffusers():
    reference = DDPMScheduler(**NOISE)
    expected = compute_snr(reference, T_B)
    assert expected.max() > 1000
    assert expected.min() < 0.01
    torch.testing.assert_close(diffusion.snr(T_B, reference.alphas_cumprod), expected)


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_min_snr_weights_are_the_paper_s(kind):
    reference = DDPMScheduler(**NOISE)
    snr = compute_snr(reference, T_B)
    divisor = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones(len(T_B))}[kind]
    weight = diffusion.min_snr_weight(kind, T_B, reference.alphas_cumprod, GAMMA)
    torch.testing.assert_close(weight, snr.clamp(max=GAMMA) / divisor)


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_min_snr_weighting_is_one_loss_of_the_picture_whatever_is_predicted(kind):
    """min(SNR, gamma) times the squared error of x_0: what the weights are derived from."""
    x_0, noise, error = (x.double() for x in tensors(3))
    alpha_bar = DDPMScheduler(**NOISE).alphas_cumprod.double()
    x_t = diffusion.add_noise(x_0, noise, T_B, alpha_bar)
    wrong_noise = diffusion.to_noise("sample", x_0 + error, x_t, T_B, alpha_bar)
    target = diffusion.training_target(kind, x_0, noise, T_B, alpha_bar)
    output = diffusion.training_target(kind, x_0 + error, wrong_noise, T_B, alpha_bar)
    loss = diffusion.min_snr_weight(kind, T_B, alpha_bar, GAMMA) * (output - target).square().mean((1, 2, 3))
    torch.testing.assert_close(loss, diffusion.snr(T_B, alpha_bar).clamp(max=GAMMA) * error.square().mean((1, 2, 3)))


@pytest.mark.parametrize(("kind", "at_the_end"), [("epsilon", 1), ("v_prediction", 0), ("sample", 0)])
def test_min_snr_weights_at_zero_snr(kind, at_the_end):
    weight = diffusion.min_snr_weight(kind, torch.arange(1000), zero_terminal_alpha_bar(), GAMMA)
    assert weight.isfinite().all()
    assert weight[-1] == at_the_end


def test_zero_terminal_snr_is_diffusers():
    betas = DDPMScheduler(**NOISE).betas
    rescaled = diffusion.zero_terminal_snr(betas)
    torch.testing.assert_close(rescaled, rescale_zero_terminal_snr(betas), rtol=1e-3, atol=1e-6)
    exported = DDPMScheduler(**NOISE, rescale_betas_zero_snr=True)
    torch.testing.assert_close(diffusion.alphas_cumprod(rescaled), exported.alphas_cumprod, rtol=1e-3, atol=1e-6)


def test_zero_terminal_snr_ends_in_pure_noise_and_begins_as_before():
    betas = DDPMScheduler(**NOISE).betas
    rescaled, alpha_bar = diffusion.zero_terminal_snr(betas), zero_terminal_alpha_bar()
    assert rescaled.dtype == torch.float32
    assert rescaled[-1] == 1
    assert alpha_bar[-1] == 0
    assert (alpha_bar[:-1] > alpha_bar[1:]).all()
    torch.testing.assert_close(rescaled[0], betas[0], rtol=1e-5, atol=0)


def test_offset_noise_moves_each_channel_of_each_sample_as_a_whole():
    (noise,) = tensors(1)
    offsets = torch.randn(len(T_B), 4)
    moved = diffusion.offset_noise(noise, offsets, 0.1)
    for b in range(len(T_B)):
        for c in range(4):
            torch.testing.assert_close(moved[b, c], noise[b, c] + 0.1 * offsets[b, c], rtol=0, atol=0)
    assert torch.equal(diffusion.offset_noise(noise, offsets, 0.0), noise)

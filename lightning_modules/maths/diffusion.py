"""The mathematics of diffusion: schedules, targets, weights, guidance. Pure functions of tensors.

Shapes: x_BCHW a picture or latent, t_B integer time steps, 0 the least noisy. alpha_bar is the cumulative product of
1 - beta (Ho et al. 2020, eq. 4), so that x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps.
"""

import torch
from torch import Tensor

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
SCHEDULES = ("scaled_linear", "linear", "cosine")


class SampleRandom:
    """Random numbers drawn for each sample from its own seed, so that they do not depend on the batch it sits in.

    Draws come in the order they are asked for; the same seeds and the same order of calls give the same numbers.
    """

    def __init__(self, seeds: Tensor | list[int], device: torch.device | str = "cpu"):
        """seeds: n integers (int64 (n,) tensor or list), negative ones (padding) count as 0."""
        seeds = seeds.tolist() if isinstance(seeds, Tensor) else seeds
        self.device = torch.device(device)
        self._generators = [torch.Generator(self.device).manual_seed(max(0, int(seed))) for seed in seeds]

    def normal(self, *shape: int) -> Tensor:
        """float32 (n, *shape), standard normal."""
        return torch.stack([torch.randn(shape, generator=g, device=self.device) for g in self._generators])

    def uniform(self, *shape: int) -> Tensor:
        """float32 (n, *shape) in [0, 1)."""
        return torch.stack([torch.rand(shape, generator=g, device=self.device) for g in self._generators])

    def integers(self, high: int, *shape: int) -> Tensor:
        """int64 (n, *shape) in [0, high)."""
        draws = [torch.randint(high, shape, generator=g, device=self.device) for g in self._generators]
        return torch.stack(draws)


def scaled_linear_betas(start: float, end: float, steps: int) -> Tensor:
    """float32 (steps,): linear in sqrt(beta), the schedule of latent diffusion (Rombach et al. 2022)."""
    return torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64).square().float()


def linear_betas(start: float, end: float, steps: int) -> Tensor:
    """float32 (steps,): linear in beta, the schedule of Ho et al. 2020."""
    return torch.linspace(start, end, steps, dtype=torch.float64).float()


def cosine_betas(steps: int) -> Tensor:
    """float32 (steps,): those of alpha_bar(u) = cos²((u + 0.008) / 1.008 · π/2), u = t / steps, none above 0.999.

    Improved DDPM (Nichol & Dhariwal 2021, eq. 17).
    """
    u = torch.arange(steps + 1, dtype=torch.float64) / steps
    alpha_bar = ((u + 0.008) / 1.008 * torch.pi / 2).cos().square()
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999).float()


def betas_of(schedule: str, start: float, end: float, steps: int) -> Tensor:
    """float32 (steps,): the betas of a schedule of `SCHEDULES`; cosine has no start and no end of its own.

    Raises:
        ValueError: any other schedule.
    """
    match schedule:
        case "scaled_linear":
            return scaled_linear_betas(start, end, steps)
        case "linear":
            return linear_betas(start, end, steps)
        case "cosine":
            return cosine_betas(steps)
    raise ValueError(f"{schedule} is no noise schedule; use one of {', '.join(SCHEDULES)}")


def alphas_cumprod(betas: Tensor) -> Tensor:
    """float32 (steps,): alpha_bar_t = prod_{s<=t} (1 - beta_s), accumulated in float64."""
    return (1 - betas.double()).cumprod(0).float()


def at(values: Tensor, t_B: Tensor, ndim: int) -> Tensor:
    """values[t] shaped (B, 1, …) to multiply a tensor of `ndim` dimensions."""
    return values.to(t_B.device)[t_B].reshape(-1, *[1] * (ndim - 1))


def add_noise(x_BCHW: Tensor, noise_BCHW: Tensor, t_B: Tensor, alpha_bar: Tensor) -> Tensor:
    """x_t given x_0 and the noise (Ho et al. 2020, eq. 4)."""
    a = at(alpha_bar, t_B, x_BCHW.ndim)
    return a.sqrt() * x_BCHW + (1 - a).sqrt() * noise_BCHW


def predicted_original(x_t_BCHW: Tensor, noise_BCHW: Tensor, t_B: Tensor, alpha_bar: Tensor) -> Tensor:
    """x_0 that the predicted noise implies (Ho et al. 2020, eq. 15)."""
    a = at(alpha_bar, t_B, x_t_BCHW.ndim)
    return (x_t_BCHW - (1 - a).sqrt() * noise_BCHW) / a.sqrt()


def guide(unconditional: Tensor, conditional: Tensor, scale: float | Tensor) -> Tensor:
    """Classifier-free guidance, u + scale·(c - u): 1 is the plain conditional prediction (Ho & Salimans 2022)."""
    return unconditional + scale * (conditional - unconditional)


def posterior_mean(x_0_BCHW: Tensor, x_t_BCHW: Tensor, t_B: Tensor, betas: Tensor) -> Tensor:
    """Mean of q(x_{t-1} | x_t, x_0) (Ho et al. 2020, eq. 7)."""
    alpha_bar, previous = _alpha_bars(betas)
    coefficient_0 = betas.double() * previous.sqrt() / (1 - alpha_bar)
    coefficient_t = (1 - previous) * (1 - betas.double()).sqrt() / (1 - alpha_bar)
    ndim = x_t_BCHW.ndim
    return at(coefficient_0.float(), t_B, ndim) * x_0_BCHW + at(coefficient_t.float(), t_B, ndim) * x_t_BCHW


def posterior_log_variance(t_B: Tensor, betas: Tensor, ndim: int) -> Tensor:
    """log of the variance of q(x_{t-1} | x_t, x_0), (B, 1, …); at t = 0, where it is 0, the value of t = 1."""
    alpha_bar, previous = _alpha_bars(betas)
    variance = betas.double() * (1 - previous) / (1 - alpha_bar)
    variance[0] = variance[1]
    return at(variance.log().float(), t_B, ndim)


def interpolated_log_variance(output: Tensor, t_B: Tensor, betas: Tensor) -> Tensor:
    """A network's variance output, meant in [-1, 1], as a log-variance between the posterior's and beta's.

    Improved DDPM (Nichol & Dhariwal 2021, eq. 15).
    """
    low, high = posterior_log_variance(t_B, betas, output.ndim), at(betas.log(), t_B, output.ndim)
    share = (output + 1) / 2
    return share * high + (1 - share) * low


def gaussian_kl(mean_1: Tensor, log_variance_1: Tensor, mean_2: Tensor, log_variance_2: Tensor) -> Tensor:
    """KL(N(mean_1, e^log_variance_1) || N(mean_2, e^log_variance_2)) of each element, in nats."""
    ratio = (log_variance_1 - log_variance_2).exp()
    distance = (mean_1 - mean_2).square() * (-log_variance_2).exp()
    return 0.5 * (log_variance_2 - log_variance_1 + ratio + distance - 1)


def zero_terminal_snr(betas: Tensor) -> Tensor:
    """The schedule shifted and scaled so that its last step is pure noise (Lin et al. 2023, algorithm 1).

    float32 (steps,), the last exactly 1; the first keeps its value. Noise alone does not tell the picture at the last
    step, so predict `v_prediction` or `sample`.
    """
    root = (1 - betas.double()).cumprod(0).sqrt()
    alpha_bar = ((root - root[-1]) * root[0] / (root[0] - root[-1])).square()
    return (1 - alpha_bar / torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])).float()


def offset_noise(noise_BCHW: Tensor, offsets_BC: Tensor, strength: float) -> Tensor:
    """Noise with an offset for each sample and channel, so that a model learns to move a picture's mean brightness.

    offsets_BC ~ N(0, 1); strength is their standard deviation, usually 0.1 (Guttenberg 2023, "Diffusion with offset
    noise").
    """
    return noise_BCHW + strength * offsets_BC[:, :, None, None]


def training_target(kind: str, x_0_BCHW: Tensor, noise_BCHW: Tensor, t_B: Tensor, alpha_bar: Tensor) -> Tensor:
    """What a network of prediction type `kind` learns to give at x_t (Salimans & Ho 2022, section 4).

    kind: epsilon (the noise), sample (x_0) or v_prediction, sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) x_0; any other
    is a ValueError, here and below.
    """
    match kind:
        case "epsilon":
            return noise_BCHW
        case "sample":
            return x_0_BCHW
        case "v_prediction":
            a = at(alpha_bar, t_B, x_0_BCHW.ndim)
            return a.sqrt() * noise_BCHW - (1 - a).sqrt() * x_0_BCHW
    raise _unknown(kind)


def to_original(kind: str, output_BCHW: Tensor, x_t_BCHW: Tensor, t_B: Tensor, alpha_bar: Tensor) -> Tensor:
    """x_0 that a network's output implies; not finite for epsilon where alpha_bar is 0."""
    match kind:
        case "epsilon":
            return predicted_original(x_t_BCHW, output_BCHW, t_B, alpha_bar)
        case "sample":
            return output_BCHW
        case "v_prediction":
            a = at(alpha_bar, t_B, x_t_BCHW.ndim)
            return a.sqrt() * x_t_BCHW - (1 - a).sqrt() * output_BCHW
    raise _unknown(kind)


def to_noise(kind: str, output_BCHW: Tensor, x_t_BCHW: Tensor, t_B: Tensor, alpha_bar: Tensor) -> Tensor:
    """The noise in x_t that a network's output implies."""
    a = at(alpha_bar, t_B, x_t_BCHW.ndim)
    match kind:
        case "epsilon":
            return output_BCHW
        case "sample":
            return (x_t_BCHW - a.sqrt() * output_BCHW) / (1 - a).sqrt()
        case "v_prediction":
            return a.sqrt() * output_BCHW + (1 - a).sqrt() * x_t_BCHW
    raise _unknown(kind)


def snr(t_B: Tensor, alpha_bar: Tensor) -> Tensor:
    """Signal-to-noise ratio alpha_bar / (1 - alpha_bar) of each sample's step, (B,)."""
    a = at(alpha_bar, t_B, 1)
    return a / (1 - a)


def min_snr_weight(kind: str, t_B: Tensor, alpha_bar: Tensor, gamma: float) -> Tensor:
    """Weight (B,) of each sample's squared error in its own target (Hang et al. 2023).

    It is min(SNR, gamma) on the error of x_0, so for epsilon that over SNR, for v over SNR + 1. gamma > 0, usually 5.
    At SNR 0 epsilon has its limit, 1.
    """
    ratio = snr(t_B, alpha_bar)
    match kind:
        case "epsilon":
            return gamma / ratio.clamp(min=gamma)
        case "sample":
            return ratio.clamp(max=gamma)
        case "v_prediction":
            return ratio.clamp(max=gamma) / (ratio + 1)
    raise _unknown(kind)


def _unknown(kind: str) -> ValueError:
    return ValueError(f"{kind} is no prediction type; use one of {', '.join(PREDICTION_TYPES)}")


def _alpha_bars(betas: Tensor) -> tuple[Tensor, Tensor]:
    alpha_bar = (1 - betas.double()).cumprod(0)
    return alpha_bar, torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])

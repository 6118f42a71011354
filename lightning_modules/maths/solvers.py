"""The mathematics of consistency distillation: scalings, guidance embedding, distance, and steps of the teacher's ODE.

A step goes along the probability-flow ODE from time steps t_B to earlier ones. alpha_bar is the schedule, as in
`lightning_modules.maths.diffusion`; alpha = sqrt(alpha_bar), sigma = sqrt(1 - alpha_bar), z_t = alpha z_0 + sigma eps.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_modules.maths.diffusion import add_noise, at, training_target

Predict = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(z_t_BCHW, t_B) -> the z_0 and noise, like z_t, that the guided teacher sees in it."""


def boundary_scalings(t_B: Tensor, sigma_data: float = 0.5, timestep_scaling: float = 10.0) -> tuple[Tensor, Tensor]:
    """c_skip and c_out (B,) of the consistency function c_skip z_t + c_out z_0(z_t), which is z_t itself at t = 0.

    LLCM, eq. 4, with the constants of LCM (Luo et al. 2023), which diffusers' LCMScheduler has too.
    """
    scaled = timestep_scaling * t_B
    variance = scaled**2 + sigma_data**2
    return sigma_data**2 / variance, scaled / variance.sqrt()


def guidance_embedding(w_B: Tensor, dim: int, scale: float = 1000.0) -> Tensor:
    """Sinusoidal embedding of guidance w, which is u + (1 + w)(c - u): float32 (B, dim); dim even, at least 4.

    Sines, then cosines, at dim/2 frequencies from 1 down to 1/10000. Angles reach 10^4 radians, where float32 keeps
    three decimals, so the operations come in the order of diffusers' LCM pipelines, to the last bit.
    """
    half = dim // 2
    rate = torch.tensor(10000.0, device=w_B.device).log() / (half - 1)
    frequencies = (torch.arange(half, dtype=torch.float32, device=w_B.device) * -rate).exp()
    angles = (scale * w_B.float())[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def huber(a_BCHW: Tensor, b_BCHW: Tensor, c: float) -> Tensor:
    """Pseudo-Huber distance of each sample, mean of sqrt((a - b)^2 + c^2) - c: float32 (B,); c > 0."""
    squares = (a_BCHW.float() - b_BCHW.float()).square().flatten(1)
    # The same without the difference of two near numbers.
    return (squares / ((squares + c**2).sqrt() + c)).mean(1)


def ddim_step(predict: Predict, z_t_BCHW: Tensor, t_B: Tensor, previous_B: Tensor, alpha_bar: Tensor) -> Tensor:
    """z at time steps previous_B <= t_B, int64, by DDIM: first order (Song et al. 2021, eq. 12 with sigma 0)."""
    z_0, noise = predict(z_t_BCHW, t_B)
    return add_noise(z_0, noise, previous_B, alpha_bar)


def leapfrog_step(
    predict: Predict, z_t_BCHW: Tensor, t_B: Tensor, previous_B: Tensor, alpha_bar: Tensor, *, h: float = 0.5
) -> Tensor:
    """LLCM's step as published (eq. 9), arguments as in `ddim_step`.

    With h = 0.5 it is the DDIM step, to the last bit. Any other h scales the noise by 2h at each step, so that the
    error grows with the number of steps.
    """
    z_0, noise = predict(z_t_BCHW, t_B)
    a = at(alpha_bar, previous_B, z_t_BCHW.ndim)
    position, velocity = a.sqrt() * z_0, (1 - a).sqrt() * noise
    half_step_velocity = 2 * velocity
    return position + h * half_step_velocity


def midpoint_step(predict: Predict, z_t_BCHW: Tensor, t_B: Tensor, previous_B: Tensor, alpha_bar: Tensor) -> Tensor:
    """Explicit midpoint: second order for one more prediction, at a step between; arguments as in `ddim_step`.

    In the angle phi = arctan(sigma / alpha) the ODE is dz/dphi = v = alpha eps - sigma z_0 (Salimans & Ho 2022,
    appendix D). DDIM turns z as if z_0 and eps stayed; the change of v that it neglects is measured at phi_m and
    integrated as one that grows linearly. The angle is finite also at zero terminal SNR, where sigma / alpha is not.

    The time step m is the one nearest to the middle angle, and its true angle is used, so that the order does not
    suffer from rounding; where there is none between, m is previous_B (Heun's method).
    """
    angles = torch.atan2((1 - alpha_bar).sqrt(), alpha_bar.sqrt()).to(t_B.device)
    m_B = _step_between(angles, t_B, previous_B)
    start, middle, end = (at(angles, step_B, z_t_BCHW.ndim) for step_B in (t_B, m_B, previous_B))
    z_0, noise = predict(z_t_BCHW, t_B)
    z_0_m, noise_m = predict(add_noise(z_0, noise, m_B, alpha_bar), m_B)
    neglected = training_target("v_prediction", z_0_m - z_0, noise_m - noise, m_B, alpha_bar)
    # 0 / 0 where previous_B is t_B, and nothing is neglected.
    share = ((middle - start) / (end - start)).nan_to_num(1)
    return add_noise(z_0, noise, previous_B, alpha_bar) + (end - start).sin() / (2 * share) * neglected


def _step_between(angles: Tensor, t_B: Tensor, previous_B: Tensor) -> Tensor:
    """The time step before t_B, previous_B at the earliest, whose angle is nearest to the middle of theirs."""
    middle = (angles[t_B] + angles[previous_B]) / 2
    # Between neighbours the middle is the bound itself, and the earlier one is taken.
    return torch.bucketize(middle, (angles[1:] + angles[:-1]) / 2)


Step = Callable[[Predict, Tensor, Tensor, Tensor, Tensor], Tensor]
SOLVERS: dict[str, Step] = {"leapfrog": leapfrog_step, "ddim": ddim_step, "midpoint": midpoint_step}
"""Steps by name, all called as step(predict, z_t, t, previous, alpha_bar); leapfrog has h besides."""

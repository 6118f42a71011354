"""What all methods with a frozen picture encoder, a frozen text encoder and a trained denoiser share."""

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from datamodules.base import Conditions, ImageBatch
from lightning_modules.base import GenerativeModule, to_image_range
from lightning_modules.diffusion import SampleRandom, add_noise, alphas_cumprod, guide, scaled_linear_betas
from medsynth.errors import UserError

SAMPLERS = {"ddpm": DDPMScheduler, "ddim": DDIMScheduler, "dpm++": DPMSolverMultistepScheduler}


@dataclass(frozen=True)
class NoiseConfig:
    """The forward process: betas linear in their square root."""

    steps: int = 1000
    """Time steps of the forward process."""
    beta_start: float = 0.002
    """Variance added at the first step."""
    beta_end: float = 0.02
    """Variance added at the last step."""


@dataclass(frozen=True)
class SamplerConfig:
    """How pictures are drawn unless the caller says otherwise."""

    name: str = "ddim"
    """ddpm, ddim or dpm++ (second-order multistep), all from diffusers."""
    steps: int = 150
    """Denoising steps."""
    guidance: float = 4.5
    """Classifier-free guidance u + g·(c - u); 1 is none."""

    def __post_init__(self):
        if self.name not in SAMPLERS:
            raise UserError(f"model.sampler.name={self.name} is not known; use one of {', '.join(SAMPLERS)}")


@dataclass(frozen=True)
class LatentDiffusionConfig:
    """What every latent diffusion method is configured by."""

    noise: NoiseConfig = field(default_factory=NoiseConfig)
    """The forward process."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    """The reverse process."""


class Context(NamedTuple):
    """Text for the denoiser: embeddings (n, L, D) and mask bool (n, L), True on real tokens."""

    embeddings: Tensor
    mask: Tensor


class Denoised(NamedTuple):
    """A denoiser's answer.

    model_output: (n, C, h, w), or (n, 2C, h, w) with the variance: what diffusers' schedulers step with.
    original: the z_0 it implies, (n, C, h, w), for self-conditioning.
    """

    model_output: Tensor
    original: Tensor


class LatentDiffusion(GenerativeModule):
    """Frozen encoders and a denoiser. A subclass builds the networks and says how they encode, decode and denoise.

    z_BChw are latents normalised for the denoiser; pictures stay in [0, 1].
    """

    def __init__(self, config: LatentDiffusionConfig):
        super().__init__(config)
        noise = config.noise
        betas = scaled_linear_betas(noise.beta_start, noise.beta_end, noise.steps)
        self.register_buffer("betas", betas, persistent=False)
        self.register_buffer("alpha_bar", alphas_cumprod(betas), persistent=False)

    @abstractmethod
    def encode_moments(self, images: Tensor) -> Tensor:
        """Posterior mean and log-variance (n, 2C, h, w) of pictures (n, 3, H, W) in [0, 1]; what a cache stores."""

    @abstractmethod
    def normalise(self, moments: Tensor, noise: Tensor) -> Tensor:
        """Latents (n, C, h, w) for the denoiser: the posterior's sample that `noise` ~ N(0, 1) picks, normalised."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Pictures in about [-1, 1] from normalised latents."""

    @abstractmethod
    def embed(self, captions: list[str]) -> Context:
        """Text for the denoiser; an empty caption is the unconditional one."""

    @abstractmethod
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of the latents that `sample` starts from."""

    @abstractmethod
    def denoising_losses(
        self, z_t: Tensor, noise: Tensor, t: Tensor, z_0: Tensor, context: Context, seeds: Tensor
    ) -> dict[str, Tensor]:
        """The losses of one denoising step; see `losses`."""

    @abstractmethod
    def denoise(
        self, z_t: Tensor, t: Tensor, context: Context, self_condition: Tensor | None, guidance: float
    ) -> Denoised:
        """Predict the noise in z_t at steps t (n,).

        With guidance ≠ 1, `context` holds the n unconditional rows before the n conditional ones. `self_condition` is
        the `original` of the step before, None at the first.
        """

    @abstractmethod
    def encoder_digest(self) -> str:
        """Digest of the weights that `encode_moments` uses, as a cache of latents is known by."""

    def losses(self, batch: ImageBatch) -> dict[str, Tensor]:
        random = SampleRandom(batch.seeds, self.device)
        with torch.no_grad():
            moments = batch.latents if batch.latents is not None else self.encode_moments(batch.images)
            z_0 = self.normalise(moments, random.normal(moments.shape[1] // 2, *moments.shape[2:]))
            context = self.embed(batch.conditions.captions)
        noise = random.normal(*z_0.shape[1:])
        t = random.integers(len(self.betas))
        z_t = add_noise(z_0, noise, t, self.alpha_bar)
        return self.denoising_losses(z_t, noise, t, z_0, context, batch.seeds)

    @torch.no_grad()
    def sample(
        self, conditions: Conditions, seeds: list[int], *, steps: int | None = None, guidance: float | None = None
    ) -> Tensor:
        guidance = self.config.sampler.guidance if guidance is None else guidance
        scheduler = self.scheduler()
        scheduler.set_timesteps(steps or self.config.sampler.steps, device=self.device)
        captions = conditions.captions or [""] * len(seeds)
        context = self.embed(captions if guidance == 1 else [""] * len(seeds) + captions)
        # One generator an image, on the CPU, so that a picture depends on neither batch nor device.
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        z = randn_tensor((len(seeds), *self.latent_shape()), generator=generators, device=self.device)
        original = None
        for step in scheduler.timesteps:
            t = step.expand(len(seeds)).to(self.device)
            prediction = self.denoise(scheduler.scale_model_input(z, step), t, context, original, guidance)
            original = prediction.original
            z = scheduler.step(prediction.model_output, step, z, generator=generators).prev_sample
        return to_image_range(self.decode(z))

    def scheduler(self):
        """The diffusers scheduler that samples this model's reverse process."""
        noise, name = self.config.noise, self.config.sampler.name
        # Trailing steps start at the noisiest one (Lin et al. 2023, "Common diffusion noise schedules are flawed").
        common = {"beta_start": noise.beta_start, "beta_end": noise.beta_end, "num_train_timesteps": noise.steps}
        common |= {"beta_schedule": "scaled_linear", "timestep_spacing": "trailing"}
        own = {"ddpm": {"clip_sample": False}, "ddim": {"clip_sample": False}, "dpm++": {}}[name]
        return SAMPLERS[name](**common, **own)


def guided(prediction: Tensor, guidance: float) -> Tensor:
    """Combine a prediction whose first half of rows is unconditional; as it is where there is no guidance."""
    if guidance == 1:
        return prediction
    unconditional, conditional = prediction.chunk(2)
    return guide(unconditional, conditional, guidance)

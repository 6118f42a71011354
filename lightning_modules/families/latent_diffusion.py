"""What all methods with a frozen picture encoder, a text encoder and a trained denoiser share."""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Self

import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, LCMScheduler, SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from datamodules.batches import Conditions, ImageBatch
from lightning_modules.base import GenerativeModule, to_image_range
from lightning_modules.maths.diffusion import (
    SCHEDULES,
    SampleRandom,
    add_noise,
    alphas_cumprod,
    betas_of,
    guide,
    zero_terminal_snr,
)
from medsynth.errors import UserError
from medsynth.ranges import choice, number

DIFFUSERS_SCHEDULES = {"scaled_linear": "scaled_linear", "linear": "linear", "cosine": "squaredcos_cap_v2"}
"""Diffusers' name of each noise schedule."""
# Keys of model.noise by those of a diffusers scheduler.
_NOISE_KEYS = {
    "steps": "num_train_timesteps",
    "beta_start": "beta_start",
    "beta_end": "beta_end",
    "zero_terminal_snr": "rescale_betas_zero_snr",
}
CachedText = Callable[[list[str]], tuple[Tensor, Tensor]]

SAMPLERS = {
    "ddpm": DDPMScheduler,
    "ddim": DDIMScheduler,
    "dpm++": DPMSolverMultistepScheduler,
    "lcm": LCMScheduler,
}


@dataclass(frozen=True)
class NoiseConfig:
    """The forward process: how much noise each of its steps adds."""

    schedule: str = choice("scaled_linear", SCHEDULES)
    """How the betas grow: scaled_linear (linear in their square root), linear, or cosine (Nichol & Dhariwal 2021)."""
    steps: int = number(1000, least=1)
    """Time steps of the forward process."""
    beta_start: float = number(0.002, above=0, below=1)
    """Variance added at the first step; cosine has its own."""
    beta_end: float = number(0.02, above=0, below=1)
    """Variance added at the last step; cosine has its own."""
    zero_terminal_snr: bool = False
    """Rescale the betas so that the last step is pure noise (Lin et al. 2023); predict v or the sample then."""

    def __post_init__(self):
        if self.beta_start > self.beta_end:
            raise UserError(f"model.noise.beta_start={self.beta_start}: must not exceed beta_end={self.beta_end}")

    def betas(self) -> Tensor:
        """float32 (steps,): the variance that each step adds."""
        betas = betas_of(self.schedule, self.beta_start, self.beta_end, self.steps)
        return zero_terminal_snr(betas) if self.zero_terminal_snr else betas

    def leaves(self, learned: Tensor) -> bool:
        """Whether a pretrained network's alpha_bar (steps,) is this one's, before zero_terminal_snr if it is on; the
        whole schedule is compared, whatever it was made from."""
        for ours in (self, replace(self, zero_terminal_snr=False)):
            alpha_bar = alphas_cumprod(ours.betas())
            # diffusers' Euler keeps 2⁻²⁴ at the last step of a zero terminal SNR, so as not to divide by zero.
            if alpha_bar.shape == learned.shape and torch.allclose(alpha_bar, learned, rtol=1e-4, atol=1e-7):
                return True
        return False

    def require_learned(self, scheduler: Any, where: str) -> None:
        """Raise UserError unless a pretrained folder's scheduler `leaves` this signal. where: begins the line."""
        if self.leaves(scheduler.alphas_cumprod):
            return
        described = scheduler.config
        theirs = {key: described[name] for key, name in _NOISE_KEYS.items() if described.get(name) is not None}
        schedules = {name: ours for ours, name in DIFFUSERS_SCHEDULES.items()}
        theirs["schedule"] = schedules.get(described["beta_schedule"])
        if described.get("trained_betas") is not None or theirs["schedule"] is None:
            raise UserError(f"{where} was trained with betas of its own, which model.noise cannot say")
        mend = " ".join(f"model.noise.{key}={str(value).lower()}" for key, value in theirs.items())
        raise UserError(f"{where} was trained with other noise; set {mend}")


@dataclass(frozen=True)
class SamplerConfig:
    """How pictures are drawn unless the caller says otherwise."""

    name: str = choice("ddim", tuple(SAMPLERS))
    """ddpm, ddim, dpm++ (second-order multistep), or lcm for a consistency model; all from diffusers."""
    steps: int = number(150, least=1)
    """Denoising steps."""
    guidance: float = number(4.5, least=0)
    """Classifier-free guidance u + g·(c - u); 1 is none."""


@dataclass(frozen=True)
class LatentDiffusionConfig:
    """What every latent diffusion method is configured by."""

    noise: NoiseConfig = field(default_factory=NoiseConfig)
    """The forward process."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    """The reverse process."""

    def __post_init__(self):
        self.require_steps("model.sampler.steps", self.sampler.steps)

    @property
    def most_steps(self) -> int:
        """Denoising steps that the reverse process has room for."""
        return self.noise.steps

    def require_steps(self, key: str, steps: int) -> None:
        """Raise UserError, which names `key`, unless the reverse process has room for that many steps."""
        if not 1 <= steps <= self.most_steps:
            raise UserError(f"{key}={steps}: pictures are drawn in 1 to {self.most_steps} steps here")


class Context(NamedTuple):
    """What the denoiser is told beside the latents.

    embeddings: (n, L, D) of the text. mask: bool (n, L), True on real tokens. control: (n, C, H, W) in [0, 1], or None.
    """

    embeddings: Tensor
    mask: Tensor
    control: Tensor | None = None

    def followed_by(self, other: Self) -> Self:
        """Its rows, then those of `other`."""
        control = None
        if self.control is not None and other.control is not None:
            control = torch.cat([self.control, other.control])
        return type(self)(torch.cat([self.embeddings, other.embeddings]), torch.cat([self.mask, other.mask]), control)


class Noised(NamedTuple):
    """Latents on their way: z_t (n, C, …) is z_0 with `noise` added up to the steps t, int64 (n,)."""

    z_t: Tensor
    t: Tensor
    noise: Tensor
    z_0: Tensor


class Denoised(NamedTuple):
    """A denoiser's answer.

    model_output: (n, C, …), or (n, 2C, …) with the variance: what diffusers' schedulers step with.
    original: the z_0 it implies, (n, C, …), for self-conditioning.
    """

    model_output: Tensor
    original: Tensor


class LatentDiffusion(GenerativeModule):
    """Frozen encoders and a denoiser. A subclass builds the networks and says how they encode, decode and denoise.

    Latents (n, C, …) are normalised for the denoiser: feature maps (n, C, h, w), or vectors (n, C) as an image
    embedding is. Pictures stay in [0, 1].
    """

    prediction = "epsilon"  # what the denoiser predicts: epsilon, v_prediction or sample (diffusers' names)
    cached = False  # whether training reads latents from a cache
    guidance_is_input = False  # whether the denoiser takes the guidance itself, and needs no unconditional half
    # Where the denoiser reads real tokens alone: the type that a cache holds them in, each text at its own length.
    kept_tokens: torch.dtype | None = None

    def __init__(self, config: LatentDiffusionConfig):
        super().__init__(config)
        betas = config.noise.betas()
        self.register_buffer("betas", betas, persistent=False)
        self.register_buffer("alpha_bar", alphas_cumprod(betas), persistent=False)
        self.cached_text: CachedText | None = None

    def use_cache(self, text: CachedText | None) -> None:
        """Before `build`: training reads latents, so that no picture encoder is kept; and text, where there is some.

        text: the embeddings and masks of captions, on the CPU, in the text encoder's place.
        """
        self.cached = True
        self.cached_text = text

    @abstractmethod
    def encode_moments(self, images: Tensor) -> Tensor:
        """Posterior mean and log-variance (n, 2C, …) of pictures (n, 3, H, W) in [0, 1]; what a cache stores."""

    @abstractmethod
    def normalise(self, moments: Tensor, noise: Tensor) -> Tensor:
        """Latents (n, C, …) for the denoiser: the posterior's sample that `noise` ~ N(0, 1) picks, normalised."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Pictures in about [-1, 1] from normalised latents; of a stage that draws for another, what that is told."""

    @abstractmethod
    def embed(self, captions: list[str]) -> Context:
        """Text for the denoiser, on the module's device; an empty caption is the unconditional one."""

    @abstractmethod
    def latent_shape(self) -> tuple[int, ...]:
        """(C, …) of the latents that `draw` starts from."""

    @abstractmethod
    def latent_losses(self, z_0: Tensor, random: SampleRandom, batch: ImageBatch) -> dict[str, Tensor]:
        """The losses (see `losses`) of latents (n, C, …), with the batch's own random numbers."""

    @abstractmethod
    def denoise(
        self, z_t: Tensor, t: Tensor, context: Context, self_condition: Tensor | None, guidance: float
    ) -> Denoised:
        """The denoiser's answer to z_t at steps t (n,), as the scheduler takes it.

        With guidance ≠ 1, `context` holds the n unconditional rows before the n conditional ones. `self_condition` is
        the `original` of the step before, None at the first.
        """

    @abstractmethod
    def encoder_digest(self) -> str:
        """Digest of what `encode_moments` computes with, by which a cache knows its latents; needs no `build`."""

    @abstractmethod
    def text_digest(self) -> str | None:
        """Digest of what `embed` computes with, likewise; None where the text encoder learns."""

    def embed_images(self, images: Tensor) -> Tensor | None:
        """Embeddings (n, D) that the denoiser is told of pictures (n, 3, H, W) in [0, 1], kept in a cache beside their
        latents; None where it is told none."""
        return None

    def image_digest(self) -> str | None:
        """Digest of what `embed_images` computes with, likewise; None where it gives none."""
        return None

    def digests(self) -> dict[str, str | None]:
        """What a cache of this method's latents is known by: the digests of encoder, text and, where told, image."""
        image = self.image_digest()
        return {"encoder": self.encoder_digest(), "text": self.text_digest()} | ({"image": image} if image else {})

    def losses(self, batch: ImageBatch) -> dict[str, Tensor]:
        random = SampleRandom(batch.seeds, self.device)
        return self.latent_losses(self.latents(batch, random), random, batch)

    @torch.no_grad()
    def latents(self, batch: ImageBatch, random: SampleRandom) -> Tensor:
        """z_0 (n, C, …): the posterior of pictures, or of their cached moments, sampled anew."""
        moments = batch.latents if batch.latents is not None else self.encode_moments(batch.pictures())
        return self.normalise(moments, random.normal(moments.shape[1] // 2, *moments.shape[2:]))

    def diffuse(self, z_0: Tensor, random: SampleRandom) -> Noised:
        """Latents with noise of a random step added to each."""
        noise = random.normal(*z_0.shape[1:])
        t = random.integers(len(self.betas))
        return Noised(add_noise(z_0, noise, t, self.alpha_bar), t, noise, z_0)

    def context_of(self, batch: ImageBatch) -> Context:
        """What the denoiser is told of a training batch, its text from the cache where it travels along."""
        if batch.text_embeddings is None or batch.text_mask is None:
            return self.condition(batch.conditions)
        return self.steer(Context(batch.text_embeddings.float(), batch.text_mask), batch.conditions)

    def condition(self, conditions: Conditions) -> Context:
        """What the denoiser is told for these conditions; where there are no captions, no words."""
        return self.steer(self.embed(conditions.captions or [""] * len(conditions)), conditions)

    def with_unconditional(self, conditions: Conditions) -> Context:
        """What the denoiser is told under guidance: n rows that it leads away from, before the n of the conditions.

        Those are told no words or the negative ones, but have the same control; a method that is told something else
        says so here, and in `supports.negatives` whether the caller's words can stand in its place.
        """
        rows, words = len(conditions), conditions.captions or [""] * len(conditions)
        twice = conditions[[*range(rows), *range(rows)]]
        return self.condition(replace(twice, captions=(conditions.negatives or [""] * rows) + words))

    def steer(self, text: Context, conditions: Conditions) -> Context:
        """The text's context with all else that the conditions say."""
        return text._replace(control=conditions.control)

    @torch.no_grad()
    def sample(
        self, conditions: Conditions, seeds: list[int], *, steps: int | None = None, guidance: float | None = None
    ) -> Tensor:
        conditions = replace(conditions, captions=conditions.captions or [""] * len(seeds))
        context = self.guided_context(conditions, guidance)
        return to_image_range(self.decode(self.draw(context, seeds, steps=steps, guidance=guidance)))

    def sampling(self, steps: int | None = None, guidance: float | None = None) -> dict[str, Any]:
        sampler = self.config.sampler
        if steps is not None:
            self.config.require_steps("--steps", steps)
        return {"sampler": sampler.name, "steps": steps or sampler.steps, "guidance": self._guidance(guidance)}

    def guided_context(self, conditions: Conditions, guidance: float | None = None) -> Context:
        """What `draw` is told for these conditions; with guidance, the unconditional rows stand before the others.

        Raises:
            UserError: there are negative prompts, and nothing is led away from them.
        """
        if conditions.negatives and not (self.supports.negatives and self._guidance(guidance) != 1):
            raise UserError("negative prompts need a method that leads away from words, and guidance other than 1")
        if self._guidance(guidance) == 1 or self.guidance_is_input:
            return self.condition(conditions)
        return self.with_unconditional(conditions)

    @torch.no_grad()
    def draw(
        self, context: Context, seeds: list[int], *, steps: int | None = None, guidance: float | None = None
    ) -> Tensor:
        """Normalised latents (n, C, …) that the reverse process ends at, one for each seed, each a function of its own
        rows of the context and its seed.

        context: of `guided_context`, with the same guidance. A stage that draws for another's latents takes seeds of
        its own, `derive_seed(seed, "decoder")`, since equal seeds are equal noise.
        """
        scheduler = self.scheduler()
        scheduler.set_timesteps(steps or self.config.sampler.steps, device=self.device)
        # One generator an image, on the CPU, so that a picture depends on neither batch nor device.
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        z = randn_tensor((len(seeds), *self.latent_shape()), generator=generators, device=self.device)
        original = None
        for step in scheduler.timesteps:
            t = step.expand(len(seeds)).to(self.device)
            z_t = scheduler.scale_model_input(z, step)
            prediction = self.denoise(z_t, t, context, original, self._guidance(guidance))
            original = prediction.original
            z = scheduler.step(prediction.model_output, step, z, generator=generators).prev_sample
        return z

    def scheduler(self) -> SchedulerMixin:
        """The diffusers scheduler that samples this model's reverse process."""
        noise = self.config.noise
        process = {"beta_start": noise.beta_start, "beta_end": noise.beta_end, "num_train_timesteps": noise.steps}
        process |= {
            "beta_schedule": DIFFUSERS_SCHEDULES[noise.schedule],
            "rescale_betas_zero_snr": noise.zero_terminal_snr,
        }
        options = {"prediction_type": self.prediction, **self.scheduler_options()}
        return SAMPLERS[self.config.sampler.name](**process, **options)

    def scheduler_options(self) -> dict[str, Any]:
        """What diffusers' scheduler takes beside the noise and the prediction: spacing, clipping, kind of variance."""
        # Trailing steps start at the noisiest one (Lin et al. 2023, "Common diffusion noise schedules are flawed").
        clip = {} if self.config.sampler.name == "dpm++" else {"clip_sample": False}
        return {"timestep_spacing": "trailing", **clip}

    def _guidance(self, guidance: float | None) -> float:
        return self.config.sampler.guidance if guidance is None else guidance


def guided(prediction: Tensor, guidance: float) -> Tensor:
    """Combine a prediction whose first half of rows is unconditional; as it is where there is no guidance."""
    if guidance == 1:
        return prediction
    unconditional, conditional = prediction.chunk(2)
    return guide(unconditional, conditional, guidance)

"""What the Stable Diffusion family shares: its networks in diffusers' layout, its latents, its text, its loss."""

import json
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Optional

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from datamodules.batches import ImageBatch
from lightning_modules.base import to_model_range
from lightning_modules.families.latent_diffusion import (
    Context,
    Denoised,
    LatentDiffusion,
    LatentDiffusionConfig,
    NoiseConfig,
    Noised,
    SamplerConfig,
    guided,
)
from lightning_modules.maths.diffusion import (
    PREDICTION_TYPES,
    SampleRandom,
    add_noise,
    min_snr_weight,
    offset_noise,
    to_original,
    training_target,
)
from lightning_modules.parts.architecture import ArchitectureConfig, random_unet, random_vae
from lightning_modules.parts.optim import OptimConfig
from lightning_modules.parts.pipeline_folder import PARTS, PipelineFolder
from lightning_modules.parts.text import TextEncoder, TextEncoderConfig
from lightning_modules.parts.weights import RANDOM, Weights
from medsynth.errors import UserError
from medsynth.ranges import choice, number

KEY = "model.pretrained"
# What a folder's scheduler may do to a prediction and this project's never does.
_CLIPPING = ("clip_sample", "thresholding")


@dataclass(frozen=True)
class StableDiffusionBaseConfig(LatentDiffusionConfig):
    """What every method on Stable Diffusion is configured by."""

    pretrained: str = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    """Hub id or local folder of a Stable Diffusion 1.x or 2.x pipeline in diffusers' layout; "random" makes one."""
    architecture: ArchitectureConfig = field(default_factory=ArchitectureConfig)
    """Shape of random networks."""
    resolution: int = number(512, least=1)
    """Side of the square pictures, pixels."""
    noise: NoiseConfig = field(default_factory=lambda: NoiseConfig(beta_start=0.00085, beta_end=0.012))
    """The forward process; must be the one that the pretrained U-Net has learned, but for zero_terminal_snr."""
    sampler: SamplerConfig = field(default_factory=lambda: SamplerConfig(steps=50, guidance=7.5))
    """The reverse process."""
    prompt_chunks: int = number(1, least=1)
    """Windows of 75 words or word pieces that a prompt may fill; what goes beyond is cut with a warning."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, about a third more time."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-5))
    """Optimizer."""


@dataclass(frozen=True)
class DenoisingConfig(StableDiffusionBaseConfig):
    """What methods that learn by the denoising loss add."""

    prediction: Optional[str] = choice(None, PREDICTION_TYPES)
    """What the U-Net predicts: epsilon, v_prediction or sample; by default what the pretrained one has learned."""
    min_snr_gamma: Optional[float] = number(None, above=0)
    """Clip the loss weight at this signal-to-noise ratio (Hang et al. 2023 use 5); none weighs all steps alike."""
    noise_offset: float = number(0.0, least=0)
    """Strength of noise that is constant over a channel: lets the model learn very dark and very bright pictures."""


class StableDiffusionBase(LatentDiffusion):
    """Autoencoder, text encoder and U-Net of a Stable Diffusion pipeline. A subclass says what learns, and how."""

    config: StableDiffusionBaseConfig

    def __init__(self, config: Any, key: str = KEY):
        """key: the config key of the run that names the pretrained pipeline."""
        super().__init__(config)
        self.key = key

    def build(self) -> None:
        config = self.config
        if not self._random:
            self._folder.check()
            self._check_scheduler()
        self.unet = self.load_unet()
        self._check_resolution()
        if config.gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
        self.vae = self.load_vae()
        if self.cached:
            self.vae.encoder = self.vae.quant_conv = None  # sampling decodes, nothing encodes
        self.text_encoder = self.cached_text or self.load_text_encoder()
        self.prediction = self._prediction()
        if config.noise.zero_terminal_snr and self.prediction == "epsilon":
            raise UserError(
                "model.noise.zero_terminal_snr: the last step is pure noise, of which epsilon says nothing; "
                "set model.prediction=v_prediction"
            )

    def required_weights(self) -> list[Weights]:
        return [] if self._random else [self._weights]

    @property
    def own_text_encoder(self) -> TextEncoder:
        """The text encoder, where no cache stands in its place."""
        assert isinstance(self.text_encoder, TextEncoder), "a cache has taken its place"
        return self.text_encoder

    # The parts, as they were before training

    def load_unet(self) -> UNet2DConditionModel:
        """The pretrained U-Net, float32."""
        if not self._random:
            return self._folder.load("unet")
        return random_unet(self.config.architecture, self.config.resolution)

    def load_vae(self) -> AutoencoderKL:
        """The pretrained autoencoder, float32."""
        if not self._random:
            return self._folder.load("vae")
        return random_vae(self.config.architecture, self.config.resolution)

    def load_text_encoder(self) -> TextEncoder:
        """The pretrained text encoder with its tokenizer."""
        shape = self.config.architecture
        width = shape.text_width if self._random else self._folder.text_width
        return TextEncoder(
            TextEncoderConfig(
                source=self.config.pretrained,
                chunks=self.config.prompt_chunks,
                width=width,
                layers=shape.text_layers,
                heads=shape.text_heads,
                vocabulary=shape.vocabulary,
            ),
            key=self.key,
            attend_padding=True,  # Stable Diffusion was trained without a mask
        )

    # What LatentDiffusion asks for

    def encode_moments(self, images: Tensor) -> Tensor:
        posterior: DiagonalGaussianDistribution = self.vae.encode(to_model_range(images)).latent_dist
        return torch.cat([posterior.mean, posterior.logvar], dim=1)

    def normalise(self, moments: Tensor, noise: Tensor) -> Tensor:
        mean, log_variance = moments.chunk(2, dim=1)
        return (mean + (0.5 * log_variance).exp() * noise) * self.vae.config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents / self.vae.config.scaling_factor).sample

    def embed(self, captions: list[str]) -> Context:
        return Context(*(part.to(self.device) for part in self.text_encoder(captions)))

    def encoder_digest(self) -> str:
        digest = self._weights.digest("vae")
        return f"{digest} {self._shape()}" if self._random else digest

    def text_digest(self) -> str | None:
        digest = self._weights.digest("text_encoder", "tokenizer")
        digest = f"{digest} {self._shape()}" if self._random else digest
        return f"{digest} chunks={self.config.prompt_chunks}"

    def drawing_facts(self) -> dict[str, Any]:
        digest = self._weights.digest("unet", "vae", "text_encoder", "tokenizer")
        return {
            "weights": f"{digest} {self._shape()}" if self._random else digest,
            "prediction": self.prediction,
            "resolution": self.config.resolution,
            "prompt_chunks": self.config.prompt_chunks,
            "noise": _facts(self.config.noise),
            "sampler": asdict(self.config.sampler),
        }

    def latent_shape(self) -> tuple[int, int, int]:
        side = self.config.resolution // 2 ** (len(self.vae.config.block_out_channels) - 1)
        return self.vae.config.latent_channels, side, side

    def denoise(
        self, z_t: Tensor, t: Tensor, context: Context, self_condition: Tensor | None, guidance: float
    ) -> Denoised:
        copies = 1 if guidance == 1 else 2
        output = self.predict(torch.cat([z_t] * copies), torch.cat([t] * copies), context)
        output = guided(output.float(), guidance)
        return Denoised(output, to_original(self.prediction, output, z_t, t, self.alpha_bar))

    def predict(self, z_t: Tensor, t: Tensor, context: Context) -> Tensor:
        """The U-Net's output (n, C, h, w)."""
        return self.unet(z_t, t, encoder_hidden_states=context.embeddings).sample

    # What methods save

    def export_pipeline(self, directory: Path, **parts: Any) -> None:
        """Write a folder that diffusers' `StableDiffusionPipeline.from_pretrained` reads.

        parts: networks that have changed, by their name in the pipeline; the others are loaded anew, since here they
        may hold an adapter or half precision.
        """
        text = self.load_text_encoder()
        untouched = {"unet": self.load_unet, "vae": self.load_vae, "text_encoder": lambda: text.model}
        pipeline = StableDiffusionPipeline(
            **{name: parts[name] if name in parts else load() for name, load in untouched.items()},
            tokenizer=text.tokenizer,
            scheduler=self.scheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.save_pretrained(directory)

    # Within

    @property
    def _random(self) -> bool:
        return self.config.pretrained == RANDOM

    @property
    def _weights(self) -> Weights:
        return Weights(self.key, self.config.pretrained, PARTS)

    @cached_property
    def _folder(self) -> PipelineFolder:
        return PipelineFolder(self._weights)

    def _shape(self) -> str:
        return json.dumps(asdict(self.config.architecture), sort_keys=True)

    def _check_scheduler(self) -> None:
        """Raise UserError unless the folder's signal at each step is the model's, before zero_terminal_snr if it is on.

        How to step is the method's to say.
        """
        folder = self._folder
        described = folder.scheduler.config
        if clipping := [name for name in _CLIPPING if described.get(name)]:
            rank_zero_warn(
                f"{self.key}: {folder.path}/scheduler says {clipping[0]}; pictures are drawn here without, and the "
                "scheduler that is exported says so"
            )
        self.config.noise.require_learned(folder.scheduler, f"{self.key}: {folder.path}")

    def _check_resolution(self) -> None:
        shape = self.config.architecture
        vae_widths = shape.vae_widths if self._random else self._folder.config("vae")["block_out_channels"]
        factor = 2 ** (len(vae_widths) - 1 + len(self.unet.config.block_out_channels) - 1)
        side = self.config.resolution
        if side < factor or side % factor:
            near = max(factor, round(side / factor) * factor)
            raise UserError(f"model.resolution={side}: must be a multiple of {factor}, for instance {near}")

    def _prediction(self) -> str:
        """What the pretrained U-Net predicts, as its folder says it."""
        if self._random:
            return "epsilon"
        return self._folder.scheduler.config.prediction_type


class Denoising(StableDiffusionBase):
    """The denoising loss: mean squared error of the prediction, each step weighed by its signal-to-noise ratio."""

    config: DenoisingConfig

    def latent_losses(self, z_0: Tensor, random: SampleRandom, batch: ImageBatch) -> dict[str, Tensor]:
        return self.denoising_losses(self.diffuse(z_0, random), self.context_of(batch), batch)

    def denoising_losses(self, noised: Noised, context: Context, batch: ImageBatch) -> dict[str, Tensor]:
        """The losses (see `losses`) of noised latents."""
        return self.output_losses(self.predict(noised.z_t, noised.t, context).float(), noised, batch)

    def output_losses(self, output: Tensor, noised: Noised, batch: ImageBatch) -> dict[str, Tensor]:
        """The losses of the U-Net's output (n, C, h, w), float32."""
        target = training_target(self.prediction, noised.z_0, noised.noise, noised.t, self.alpha_bar)
        error_B = F.mse_loss(output, target, reduction="none").flatten(1).mean(1)
        if self.config.min_snr_gamma is not None:
            error_B = error_B * min_snr_weight(self.prediction, noised.t, self.alpha_bar, self.config.min_snr_gamma)
        return {"loss": (error_B * self.sample_weights(batch)).mean()}

    def sample_weights(self, batch: ImageBatch) -> Tensor | float:
        """Weight (n,) of each sample in the loss."""
        return 1.0

    def diffuse(self, z_0: Tensor, random: SampleRandom) -> Noised:
        noised = super().diffuse(z_0, random)
        strength = self.config.noise_offset
        if not strength:
            return noised
        noise = offset_noise(noised.noise, random.normal(z_0.shape[1]), strength)
        return noised._replace(noise=noise, z_t=add_noise(z_0, noise, noised.t, self.alpha_bar))

    def _prediction(self) -> str:
        return self.config.prediction or super()._prediction()


def _facts(noise: NoiseConfig) -> dict[str, Any]:
    """The noise as folders of class pictures say it; those drawn before there was a choice name no schedule."""
    facts = asdict(noise)
    return {key: value for key, value in facts.items() if (key, value) != ("schedule", "scaled_linear")}

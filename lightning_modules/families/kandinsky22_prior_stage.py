"""The first stage of Kandinsky 2.2: from text to the embedding of a picture."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import KandinskyV22PriorPipeline, PriorTransformer, UnCLIPScheduler
from torch import Tensor, nn
from transformers import CLIPImageProcessor

from datamodules.batches import ImageBatch
from lightning_modules.families.kandinsky import KEY
from lightning_modules.families.kandinsky22 import Kandinsky22, Kandinsky22Config, paper_sampler
from lightning_modules.families.latent_diffusion import Context, Denoised, NoiseConfig, SamplerConfig, guided
from lightning_modules.maths.diffusion import SampleRandom
from lightning_modules.parts.image_prompt import ImageEncoder
from lightning_modules.parts.kandinsky22_folder import PriorFolder
from lightning_modules.parts.kandinsky22_shape import random_image_encoder, random_prior
from lightning_modules.parts.text import TextEncoder, TextEncoderConfig
from medsynth.errors import UserError

_RANDOM_CLIP_RANGE = 10.0  # of a random prior's z_0


@dataclass(frozen=True)
class PriorStageConfig(Kandinsky22Config):
    """The prior, alone."""

    pretrained: str = "kandinsky-community/kandinsky-2-2-prior"
    """Hub id or local folder of a Kandinsky 2.2 prior in diffusers' layout, or a run's export; "random" makes one."""
    noise: NoiseConfig = field(default_factory=lambda: NoiseConfig(schedule="cosine"))
    """The forward process; must be the one that the pretrained prior has learned."""
    sampler: SamplerConfig = field(default_factory=paper_sampler)
    """The reverse process of embeddings; ddpm."""

    def __post_init__(self):
        super().__post_init__()
        if self.noise.schedule != "cosine":
            raise UserError(f"model.noise.schedule={self.noise.schedule}: Kandinsky's prior has cosine betas")
        require_prior_sampler("model.sampler", self.sampler)

    def require_steps(self, key: str, steps: int) -> None:
        super().require_steps(key, steps)
        if steps < 2:
            raise UserError(f"{key}={steps}: a prior's steps go from the noisiest to the cleanest, 2 or more")


def require_prior_sampler(key: str, sampler: SamplerConfig) -> None:
    """Raise UserError, which names `key`, unless a prior can be drawn from so, and its pipeline does the same."""
    if sampler.name != "ddpm":
        raise UserError(f"{key}.name={sampler.name}: Kandinsky's prior is drawn from with ddpm")


class PriorStage(Kandinsky22):
    """From text to the embedding of a picture: a transformer that predicts the clean embedding, z_0.

    Latents are embeddings (n, D) of CLIP's image encoder, not normalised to a length, less their mean and over their
    standard deviation, which the pretrained prior knows.
    """

    config: PriorStageConfig
    prediction = "sample"
    part = "prior"
    Folder: ClassVar[type[PriorFolder]] = PriorFolder

    def build(self) -> None:
        self.check_folder()
        self.prior = _with_statistics_as_buffers(self.load_part() if self.key == KEY else self._frozen_prior())
        self.text_encoder = self.cached_text or self.load_text_encoder(self.frozen_dtype)
        self.image_encoder = self.load_image_encoder(self.frozen_dtype)
        self.nothing = self.image_encoder.of_nothing()
        if self.cached:
            self.image_encoder = None

    def load_part(self) -> PriorTransformer:
        return random_prior(self.config.architecture) if self.is_random else self.folder.load_prior()

    def load_image_encoder(self, dtype: torch.dtype = torch.float32) -> ImageEncoder:
        """The image encoder, frozen."""
        if not self.is_random:
            return ImageEncoder(self.folder.load_image_encoder(dtype), self._image_processor())
        encoder: Any = random_image_encoder(self.config.architecture)  # transformers' `to` has no type
        return ImageEncoder(encoder.to(dtype), self._image_processor())

    def load_text_encoder(self, dtype: torch.dtype = torch.float32) -> TextEncoder:
        """The text encoder with its tokenizer, frozen."""
        config = self.config.architecture.text()
        if not self.is_random:
            tokens = self.folder.config("prior")["num_embeddings"]
            config = TextEncoderConfig(source=self.source, max_tokens=tokens, width=self.width)
        # The encoder reads the padding as Kandinsky's always has; only the prior is given the mask.
        return TextEncoder(config, key=self.key, attend_padding=True, pooled=True, dtype=dtype)

    def encode_moments(self, images: Tensor) -> Tensor:
        mean = self.embed_pictures(images)
        return torch.cat([mean, torch.full_like(mean, -torch.inf)], dim=1)  # an encoder without spread

    def embed_pictures(self, images: Tensor) -> Tensor:
        """Embeddings (n, D) of pictures (n, 3, H, W) in [0, 1], where no cache has the image encoder's place."""
        assert self.image_encoder is not None, "a cache has taken its place"
        return self.image_encoder(images)

    def normalise(self, moments: Tensor, noise: Tensor) -> Tensor:
        embeddings, _ = moments.chunk(2, dim=1)
        return (embeddings - self.prior.clip_mean) / self.prior.clip_std

    def decode(self, latents: Tensor) -> Tensor:
        """Embeddings (n, D) as the image encoder gives them, which a decoder is told."""
        return self.prior.post_process_latents(latents)

    def embed(self, captions: list[str]) -> Context:
        """The words, and in the last row the projected embedding of the whole caption."""
        embeddings, mask = self.text_encoder(captions)
        return Context(embeddings.to(self.device, torch.float32), mask.to(self.device))

    def encoder_digest(self) -> str:
        return self.described(self.weights.digest("image_encoder", "image_processor"))

    def text_digest(self) -> str | None:
        return self.described(self.weights.digest("text_encoder", "tokenizer"))

    def latent_shape(self) -> tuple[int, ...]:
        return (self.width,)

    def latent_losses(self, z_0: Tensor, random: SampleRandom, batch: ImageBatch) -> dict[str, Tensor]:
        """The loss, and the mean cosine of predicted and true embeddings, which is not minimised."""
        noised = self.diffuse(z_0, random)
        output = self.predict(noised.z_t, noised.t, self.context_of(batch)).float()
        with torch.no_grad():
            cosine = torch.cosine_similarity(self.decode(output), self.decode(z_0)).mean()
        return {"loss": self.weighted(output, z_0, noised.t), "embedding_cosine": cosine}

    def denoise(
        self, z_t: Tensor, t: Tensor, context: Context, self_condition: Tensor | None, guidance: float
    ) -> Denoised:
        copies = 1 if guidance == 1 else 2
        output = guided(self.predict(torch.cat([z_t] * copies), torch.cat([t] * copies), context).float(), guidance)
        return Denoised(output, output)

    def predict(self, z_t: Tensor, t: Tensor, context: Context) -> Tensor:
        """The clean embeddings (n, D), normalised as z_t (n, D) is."""
        words, caption = context.embeddings[:, :-1], context.embeddings[:, -1]
        return self.prior(
            z_t, t, proj_embedding=caption, encoder_hidden_states=words, attention_mask=context.mask[:, :-1]
        ).predicted_image_embedding

    def scheduler(self) -> UnCLIPScheduler:
        """The only kind that diffusers' prior pipeline steps with: ddpm with its own rounding near both ends."""
        return _UnCLIP(**self._process())

    def pipeline_scheduler(self) -> UnCLIPScheduler:
        return UnCLIPScheduler(**self._process())

    def export_pipeline(self, directory: Path, network: nn.Module) -> None:
        text = self.load_text_encoder()
        KandinskyV22PriorPipeline(
            prior=network,
            image_encoder=self.load_image_encoder().encoder,
            image_processor=self._image_processor(),
            text_encoder=text.model,
            tokenizer=text.tokenizer,
            scheduler=self.pipeline_scheduler(),
        ).save_pretrained(directory)

    def _process(self) -> dict[str, Any]:
        """The reverse process, in the words of diffusers' UnCLIPScheduler."""
        clipping = {"clip_sample": True, "clip_sample_range": _RANDOM_CLIP_RANGE} | self.clipping()
        process = {name: clipping[name] for name in ("clip_sample", "clip_sample_range")}
        process |= {"num_train_timesteps": self.config.noise.steps, "prediction_type": self.prediction}
        return process | {"variance_type": "fixed_small_log"}

    def _frozen_prior(self) -> PriorTransformer:
        if self.is_random:
            return random_prior(self.config.architecture)
        return self.folder.load_prior(self.frozen_dtype)

    def _image_processor(self) -> CLIPImageProcessor:
        side = self.config.architecture.vision_side
        return CLIPImageProcessor(size=side, crop_size=side) if self.is_random else self.folder.image_processor


class _UnCLIP(UnCLIPScheduler):
    """Told the next step by its own list of steps, as other schedulers are, and not by the caller."""

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, generator: Any = None, **options: Any) -> Any:
        place = int((self.timesteps == timestep).nonzero()[0, 0]) + 1
        following = self.timesteps[place] if place < len(self.timesteps) else None
        return super().step(model_output, timestep, sample, following, generator, **options)


def _with_statistics_as_buffers(prior: PriorTransformer) -> PriorTransformer:
    """The same with mean and standard deviation of embeddings as buffers: no weights, and never in half precision."""
    for name in ("clip_mean", "clip_std"):
        value = getattr(prior, name).detach()
        delattr(prior, name)
        prior.register_buffer(name, value)
    return prior

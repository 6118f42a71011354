"""The second stage of Kandinsky 2.2: from the embedding of a picture to the picture. And both stages together."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from diffusers import KandinskyV22Pipeline
from diffusers.models import UNet2DConditionModel
from torch import Tensor, nn

from datamodules.batches import Conditions, ImageBatch
from lightning_modules.base import to_image_range
from lightning_modules.families.kandinsky import KEY, MovqLatents
from lightning_modules.families.kandinsky22 import Kandinsky22, Kandinsky22Config, paper_sampler
from lightning_modules.families.kandinsky22_prior_stage import PriorStage
from lightning_modules.families.latent_diffusion import Context, Denoised, NoiseConfig, SamplerConfig, guided
from lightning_modules.maths.diffusion import SampleRandom, to_original
from lightning_modules.parts.kandinsky22_folder import DecoderFolder
from lightning_modules.parts.kandinsky22_shape import random_unet
from medsynth.errors import UserError


@dataclass(frozen=True)
class DecoderStageConfig(Kandinsky22Config):
    """The decoder, alone."""

    pretrained: str = "kandinsky-community/kandinsky-2-2-decoder"
    """Hub id or local folder of a Kandinsky 2.2 decoder in diffusers' layout, or a run's export; "random" makes one."""
    noise: NoiseConfig = field(
        default_factory=lambda: NoiseConfig(schedule="linear", beta_start=0.00085, beta_end=0.012)
    )
    """The forward process; must be the one that the pretrained decoder has learned."""
    sampler: SamplerConfig = field(default_factory=paper_sampler)
    """The reverse process; ddpm takes the variance that the decoder predicts, ddim and dpm++ none."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, about a third more time."""

    def __post_init__(self):
        super().__post_init__()
        require_decoder_sampler("model.sampler", self.sampler)


def require_decoder_sampler(key: str, sampler: SamplerConfig) -> None:
    """Raise UserError, which names `key`, unless a decoder can be drawn from so."""
    if sampler.name == "lcm":
        raise UserError(f"{key}.name=lcm: Kandinsky's decoder is no consistency model; take ddpm, ddim or dpm++")


class DecoderStage(MovqLatents, Kandinsky22):
    """From the embedding of a picture to the picture: a U-Net that predicts noise and variance in MoVQ's latents."""

    config: DecoderStageConfig
    Folder: ClassVar[type[DecoderFolder]] = DecoderFolder

    def build(self) -> None:
        self.check_folder()
        self.check_resolution(self.factor)  # the pipeline makes latents of no other sides
        if self.is_random or self.key == KEY:
            self.unet = self.load_part()
        else:
            self.unet = self.folder.load("unet", self.frozen_dtype)
        if self.config.gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
        self.take_movq()

    def load_part(self) -> UNet2DConditionModel:
        if self.is_random:
            return random_unet(self.config.architecture, self.config.resolution // self.factor)
        return self.folder.load("unet")

    def embed(self, captions: list[str]) -> Context:
        """What the U-Net is told without a picture; of words it is told nothing."""
        return self.told(self.nothing.expand(len(captions), -1))

    def told(self, embeddings: Tensor) -> Context:
        """Embeddings (n, D) of pictures as the U-Net is told them."""
        mask = torch.ones(len(embeddings), 1, dtype=torch.bool, device=embeddings.device)
        return Context(embeddings[:, None], mask)

    def embeddings_of(self, batch: ImageBatch) -> Tensor:
        """What the U-Net is told of a training batch, from the cache where it travels along."""
        embeddings = batch.image_embeddings
        if embeddings is None:
            embeddings = self.embed_images(batch.pictures())
        assert embeddings is not None, "only a stage that has an image encoder learns"
        return embeddings

    def text_digest(self) -> str | None:
        return None  # a cache need hold no text: training reads none

    def latent_losses(self, z_0: Tensor, random: SampleRandom, batch: ImageBatch) -> dict[str, Tensor]:
        """The error of the predicted noise; the predicted variance is left as it was learned."""
        noised = self.diffuse(z_0, random)
        output = self.predict(noised.z_t, noised.t, self.told(self.embeddings_of(batch))).float()
        return {"loss": self.weighted(output.chunk(2, dim=1)[0], noised.noise, noised.t)}

    def denoise(
        self, z_t: Tensor, t: Tensor, context: Context, self_condition: Tensor | None, guidance: float
    ) -> Denoised:
        copies = 1 if guidance == 1 else 2
        output = self.predict(torch.cat([z_t] * copies), torch.cat([t] * copies), context).float()
        noise, variance = output.chunk(2, dim=1)
        noise = guided(noise, guidance)
        original = to_original(self.prediction, noise, z_t, t, self.alpha_bar)
        if self.config.sampler.name == "ddpm":  # with the conditional rows' own variance
            return Denoised(torch.cat([noise, variance[-len(z_t) :]], dim=1), original)
        return Denoised(noise, original)

    def predict(self, z_t: Tensor, t: Tensor, context: Context) -> Tensor:
        """Noise and variance (n, 2C, h, w)."""
        told = {"image_embeds": context.embeddings[:, 0]}
        return self.unet(z_t, t, encoder_hidden_states=None, added_cond_kwargs=told).sample

    def scheduler_options(self) -> dict[str, Any]:
        learned = {"variance_type": "learned_range"} if self.config.sampler.name == "ddpm" else {}
        return super().scheduler_options() | learned

    def export_pipeline(self, directory: Path, network: nn.Module) -> None:
        pipeline = KandinskyV22Pipeline(unet=network, movq=self.load_movq(), scheduler=self.scheduler())
        pipeline.save_pretrained(directory)


def require_same_width(prior: PriorStage, decoder: DecoderStage) -> None:
    """Raise UserError unless the one draws embeddings that the other can be told; both are checked."""
    for stage in (prior, decoder):
        stage.check_folder()
    if prior.width != decoder.width:
        raise UserError(
            f"{decoder.key}: {decoder.source} is told image embeddings of width {decoder.width}, the prior "
            f"{prior.source} ({prior.key}) draws width {prior.width}; they are not of one Kandinsky"
        )


class Drawn(NamedTuple):
    """How one of the stages is to draw: None for what its config says."""

    seeds: list[int]
    steps: int | None = None
    guidance: float | None = None


@torch.no_grad()
def draw_pictures(
    prior: PriorStage, decoder: DecoderStage, conditions: Conditions, of_prior: Drawn, of_decoder: Drawn
) -> Tensor:
    """Pictures float32 (n, 3, H, W) in [0, 1] for captions: the prior's embeddings, and what the decoder makes of them.

    The seeds of the two differ, since equal seeds are equal noise.
    """
    captions = conditions.captions or [""] * len(of_prior.seeds)
    text = prior.guided_context(replace(conditions, captions=captions), of_prior.guidance)
    latents = prior.draw(text, of_prior.seeds, steps=of_prior.steps, guidance=of_prior.guidance)
    context = decoder.told(prior.decode(latents))
    guidance = decoder.config.sampler.guidance if of_decoder.guidance is None else of_decoder.guidance
    if guidance != 1:
        context = decoder.embed(captions).followed_by(context)
    pictures = decoder.draw(context, of_decoder.seeds, steps=of_decoder.steps, guidance=guidance)
    return to_image_range(decoder.decode(pictures))

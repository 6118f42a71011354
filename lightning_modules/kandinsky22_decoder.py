"""Kandinsky 2.2's decoder fine-tuned on pictures (MMCP at MEDVQA-GI 2024, section 4.1).

The decoder draws a picture for the embedding of one; a prior, frozen here, draws that embedding for a text.
"""

from dataclasses import dataclass, field

from torch import Tensor

from datamodules.batches import Conditions
from datamodules.stream import derive_seed
from lightning_modules.families.kandinsky22 import paper_sampler
from lightning_modules.families.kandinsky22_decoder_stage import (
    DecoderStage,
    DecoderStageConfig,
    Drawn,
    draw_pictures,
    require_same_width,
)
from lightning_modules.families.kandinsky22_prior_stage import PriorStage, PriorStageConfig, require_prior_sampler
from lightning_modules.families.latent_diffusion import SamplerConfig
from lightning_modules.parts.weights import Weights


@dataclass(frozen=True)
class Kandinsky22DecoderConfig(DecoderStageConfig):
    """The decoder that learns, and the prior that its embeddings come from."""

    prior: str = "kandinsky-community/kandinsky-2-2-prior"
    """Hub id or local folder of the prior: its image encoder says what the decoder is told of a picture, and it draws
    that for a text; a run's export (of low-rank updates, export/merged); "random" makes one."""
    prior_sampler: SamplerConfig = field(default_factory=paper_sampler)
    """How the prior draws; `sampler` is the decoder's, which alone the caller's steps and guidance change."""

    def __post_init__(self):
        super().__post_init__()
        PriorStageConfig().require_steps("model.prior_sampler.steps", self.prior_sampler.steps)
        require_prior_sampler("model.prior_sampler", self.prior_sampler)

    def prior_stage(self) -> PriorStageConfig:
        """What the prior is made by."""
        return PriorStageConfig(
            pretrained=self.prior,
            architecture=self.architecture,
            resolution=self.resolution,
            sampler=self.prior_sampler,
        )


class Kandinsky22Decoder(DecoderStage):
    """The decoder; pictures are drawn in two stages."""

    Config = Kandinsky22DecoderConfig
    config: Kandinsky22DecoderConfig

    def __init__(self, config: Kandinsky22DecoderConfig):
        super().__init__(config)
        self.prior = PriorStage(config.prior_stage(), "model.prior")

    def build(self) -> None:
        require_same_width(self.prior, self)
        super().build()
        self.adapt()
        self.prior.frozen_dtype, self.prior.cached = self.frozen_dtype, self.cached
        self.prior.build()
        self.nothing = self.prior.nothing

    def required_weights(self) -> list[Weights]:
        return super().required_weights() + self.prior.required_weights()

    def embed_images(self, images: Tensor) -> Tensor:
        return self.prior.embed_pictures(images)

    def image_digest(self) -> str:
        return self.prior.encoder_digest()

    def sample(
        self, conditions: Conditions, seeds: list[int], *, steps: int | None = None, guidance: float | None = None
    ) -> Tensor:
        own = Drawn([derive_seed(seed, "decoder") for seed in seeds], steps, guidance)
        return draw_pictures(self.prior, self, conditions, Drawn(seeds), own)

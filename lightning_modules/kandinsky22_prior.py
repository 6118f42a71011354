"""Kandinsky 2.2's prior fine-tuned on pictures and captions (MMCP at MEDVQA-GI 2024, section 4.1).

The prior draws the embedding of a picture for a text; a decoder, frozen here, makes the picture of it.
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
    require_decoder_sampler,
    require_same_width,
)
from lightning_modules.families.kandinsky22_prior_stage import PriorStage, PriorStageConfig
from lightning_modules.families.latent_diffusion import SamplerConfig
from lightning_modules.parts.weights import Weights


@dataclass(frozen=True)
class Kandinsky22PriorConfig(PriorStageConfig):
    """The prior that learns, and the decoder that its pictures are drawn with."""

    decoder: str = "kandinsky-community/kandinsky-2-2-decoder"
    """Hub id or local folder of the decoder, for pictures alone: a run's export (of low-rank updates, export/merged);
    "random" makes one."""
    decoder_sampler: SamplerConfig = field(default_factory=paper_sampler)
    """How the decoder draws; `sampler` is the prior's, which alone the caller's steps and guidance change."""

    def __post_init__(self):
        super().__post_init__()
        DecoderStageConfig().require_steps("model.decoder_sampler.steps", self.decoder_sampler.steps)
        require_decoder_sampler("model.decoder_sampler", self.decoder_sampler)

    def decoder_stage(self) -> DecoderStageConfig:
        """What the decoder is made by."""
        return DecoderStageConfig(
            pretrained=self.decoder,
            architecture=self.architecture,
            resolution=self.resolution,
            sampler=self.decoder_sampler,
        )


class Kandinsky22Prior(PriorStage):
    """The prior; pictures are drawn in two stages."""

    Config = Kandinsky22PriorConfig
    config: Kandinsky22PriorConfig

    def __init__(self, config: Kandinsky22PriorConfig):
        super().__init__(config)
        self.decoder = DecoderStage(config.decoder_stage(), "model.decoder")

    def build(self) -> None:
        require_same_width(self, self.decoder)
        super().build()
        self.adapt()
        self.decoder.frozen_dtype, self.decoder.cached = self.frozen_dtype, True  # it decodes alone
        self.decoder.build()
        self.decoder.nothing = self.nothing

    def required_weights(self) -> list[Weights]:
        return super().required_weights() + self.decoder.required_weights()

    def sample(
        self, conditions: Conditions, seeds: list[int], *, steps: int | None = None, guidance: float | None = None
    ) -> Tensor:
        own = Drawn([derive_seed(seed, "decoder") for seed in seeds])
        return draw_pictures(self, self.decoder, conditions, Drawn(seeds, steps, guidance), own)

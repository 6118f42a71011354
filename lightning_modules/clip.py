"""CLIP fine-tuned on pairs of picture and prompt, and drawing that it guides.

Morgan State at MEDVQA-GI 2024 (section 4.2); the loss of Radford et al. 2021, "Learning transferable visual models from
natural language supervision", with what repeats in a batch as positives; guidance of Crowson 2021.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from datamodules.batches import Conditions, ImageBatch, Sample
from datamodules.stream import derive_seed
from lightning_modules.base import GenerativeModule, JointEmbedding, Supports
from lightning_modules.families.guided_diffusion import Distance, GuidedDiffusion, cutouts
from lightning_modules.families.latent_diffusion import LatentDiffusionConfig, NoiseConfig, SamplerConfig
from lightning_modules.families.stable_diffusion import StableDiffusionBaseConfig
from lightning_modules.maths.contrastive import LOGIT_SCALE, contrastive_loss, matches, spherical_distance
from lightning_modules.maths.diffusion import SampleRandom
from lightning_modules.parts.adapters import AdapterConfig, attach, merged, save_for_peft
from lightning_modules.parts.architecture import ArchitectureConfig
from lightning_modules.parts.clip import CLIPShapeConfig, load_clip, save_clip
from lightning_modules.parts.gathering import gather_rows
from lightning_modules.parts.optim import OptimConfig
from lightning_modules.parts.weights import RANDOM, Weights
from medsynth.errors import UserError
from medsynth.ranges import number

KEY, GENERATOR = "model.pretrained", "model.generator"


@dataclass(frozen=True)
class CLIPConfig(LatentDiffusionConfig):
    """What learns, and the generator that it guides."""

    pretrained: str = "openai/clip-vit-large-patch14"
    """Hub id or local folder of a whole CLIP in transformers' layout; "random" makes one."""
    clip: CLIPShapeConfig = field(default_factory=CLIPShapeConfig)
    """Shape of a random CLIP."""
    adapter: AdapterConfig = field(
        default_factory=lambda: AdapterConfig(targets=["q_proj", "k_proj", "v_proj", "out_proj"])
    )
    """Low-rank update of both encoders, all else frozen, the logit scale too; with rank 0 CLIP learns whole."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, about a third more time."""
    generator: str = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    """Hub id or local folder of the Stable Diffusion that pictures are drawn with, in diffusers' layout, a run's export
    for instance; "random" makes one. It does not learn."""
    architecture: ArchitectureConfig = field(default_factory=ArchitectureConfig)
    """Shape of a random generator."""
    resolution: int = number(512, least=1)
    """Side of the square pictures, pixels; CLIP sees them at its own."""
    guidance_scale: float = number(100.0, least=0)
    """Strength of CLIP's guidance of the generator; 0 leaves it alone. Guidance by the prompt is `sampler.guidance`."""
    cutouts: int = number(4, least=0)
    """Parts of a picture that CLIP sees at each step, of random size and place; 0: the whole picture."""
    noise: NoiseConfig = field(default_factory=lambda: NoiseConfig(beta_start=0.00085, beta_end=0.012))
    """The generator's forward process; must be the one that it has learned."""
    sampler: SamplerConfig = field(default_factory=lambda: SamplerConfig(steps=50, guidance=7.5))
    """The generator's reverse process."""
    prompt_chunks: int = number(1, least=1)
    """Windows of 75 words or word pieces that a prompt may fill for the generator; CLIP has one."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-5))
    """Optimizer."""

    def __post_init__(self):
        super().__post_init__()
        if self.noise.zero_terminal_snr and self.guidance_scale:
            raise UserError(
                "model.noise.zero_terminal_snr: guidance by CLIP changes the noise, from which no picture follows "
                "where there is nothing else; set it to false, or model.guidance_scale=0"
            )
        if self.sampler.name == "lcm":
            raise UserError("model.sampler.name=lcm: the generator is no consistency model; take ddpm, ddim or dpm++")

    def of_generator(self) -> StableDiffusionBaseConfig:
        """What the generator is made by."""
        return StableDiffusionBaseConfig(
            pretrained=self.generator,
            architecture=self.architecture,
            resolution=self.resolution,
            noise=self.noise,
            sampler=self.sampler,
            prompt_chunks=self.prompt_chunks,
        )


class CLIP(GenerativeModule, JointEmbedding):
    """Both encoders learn to tell which picture belongs to which prompt, among those of all processes."""

    Config = CLIPConfig
    config: CLIPConfig
    # FSDP2 takes no scalar weight, as the logit scale is, and DeepSpeed would step a copy of it that nobody clamps.
    supports = Supports(frozenset({"captions"}), negatives=True)
    loss_is_a_mean = False

    def __init__(self, config: CLIPConfig):
        super().__init__(config)
        self.generator = GuidedDiffusion(config.of_generator(), GENERATOR)

    def build(self) -> None:
        self.clip = load_clip(self.config.pretrained, self.config.clip, KEY)
        if self.config.adapter.rank:
            attach(self.clip.network, self.config.adapter, "model.adapter")
        if self.config.gradient_checkpointing:
            self.clip.network.gradient_checkpointing_enable()
        self.generator.build()

    def trainable_modules(self) -> dict[str, nn.Module]:
        return {"clip": self.clip}

    def required_weights(self) -> list[Weights]:
        own = [] if self.config.pretrained == RANDOM else [Weights(KEY, self.config.pretrained)]
        return own + self.generator.required_weights()

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """See `GenerativeModule`; a step calls the two encoders, not the network around them."""
        for encoder in (self.clip.network.text_model, self.clip.network.vision_model):
            encoder.compile(*args, **kwargs)

    def check_samples(self, samples: Iterable[Sample]) -> None:
        captions, pictures = set(), set()
        for number_, sample in enumerate(samples):
            if sample.caption:
                captions.add(sample.caption)
                pictures.add(number_ if sample.picture_id is None else sample.picture_id)
            if len(captions) > 1 and len(pictures) > 1:  # then some picture and some caption are no pair
                return
        if not captions:
            raise UserError("no training sample has a caption: clip learns which caption is of which picture")
        one = f"caption, {min(captions)!r}" if len(captions) == 1 else "picture"
        raise UserError(f"all training samples have one {one}: there is nothing to contrast; give them others")

    # Learning

    def losses(self, batch: ImageBatch) -> dict[str, Tensor]:
        """The contrastive loss over the pictures of all processes; rows without words, and padding, are left out."""
        captions = batch.conditions.captions or [""] * len(batch)
        rows = [i for i, caption in enumerate(captions) if caption and batch.seeds[i] >= 0]
        pictures, texts = self.clip.pictures(batch.pictures()), self.clip.captions(captions)
        kept = torch.tensor(rows, device=pictures.device, dtype=torch.long)
        identities = batch.seeds if batch.picture_ids is None else batch.picture_ids
        caption_ids = torch.tensor([derive_seed("caption", caption) for caption in captions])
        belong = matches(*(gather_rows(ids.to(kept.device)[kept]) for ids in (caption_ids, identities)))
        scale = self.clip.network.logit_scale.float()
        with torch.autocast(pictures.device.type, enabled=False):
            loss = contrastive_loss(gather_rows(pictures[kept]), gather_rows(texts[kept]), scale, belong)
        return {"loss": loss, "logit_scale": scale.exp().detach()}

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """The step, after which the logit scale is brought back into its range."""
        super().optimizer_step(*args, **kwargs)
        with torch.no_grad():
            self.clip.network.logit_scale.clamp_(*LOGIT_SCALE)

    def picture_embeddings(self, pictures: Tensor) -> Tensor:
        return self.clip.pictures(pictures)

    def caption_embeddings(self, captions: list[str]) -> Tensor:
        return self.clip.captions(captions)

    # Drawing

    @torch.no_grad()
    def sample(
        self, conditions: Conditions, seeds: list[int], *, steps: int | None = None, guidance: float | None = None
    ) -> Tensor:
        """See `GenerativeModule`. CLIP leads to the caption; a picture without words is the generator's own."""
        if not self.config.guidance_scale:
            return self.generator.sample(conditions, seeds, steps=steps, guidance=guidance)
        captions = conditions.captions or [""] * len(seeds)
        with self.generator.led(self._distance_to(captions, seeds)):
            return self.generator.sample(conditions, seeds, steps=steps, guidance=guidance)

    def sampling(self, steps: int | None = None, guidance: float | None = None) -> dict[str, Any]:
        return self.generator.sampling(steps, guidance)

    def _distance_to(self, captions: list[str], seeds: list[int]) -> Distance:
        """How far pictures are from the captions, times the scale; parts of a picture count as their mean."""
        with torch.inference_mode(False), torch.no_grad():
            targets = self.clip.captions(captions)
            worded = torch.tensor([float(bool(caption)) for caption in captions], device=targets.device)
        # Another stream of numbers than the noise's, whose seeds these are.
        random = SampleRandom([derive_seed(seed, "cutouts") for seed in seeds], "cpu")
        count = self.config.cutouts

        def distance(pictures: Tensor) -> Tensor:
            if count:
                pictures = cutouts(pictures, self.clip.side, random.uniform(count, 3))
            seen = self.clip.pictures(pictures).view(len(seeds), max(count, 1), -1)
            return self.config.guidance_scale * worded * spherical_distance(seen, targets[:, None]).mean(1)

        return distance

    # Saving

    def export(self, directory: Path) -> None:
        """Write `clip/`, for transformers' `CLIPModel`, `CLIPTokenizer` and `CLIPImageProcessor`; of a low-rank update
        with it added, and beside it `adapter/`, for `PeftModel.from_pretrained` on the CLIP that it was made for."""
        network, config = self.clip.network, self.config.adapter
        if config.rank:
            save_for_peft(network, config, directory / "adapter", self.config.pretrained)
            network = merged(load_clip(self.config.pretrained, self.config.clip, KEY).network, network, config)
        save_clip(directory / "clip", network, self.clip)

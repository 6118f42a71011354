"""Kandinsky 3 fine-tuned on pictures and captions (MMCP at MEDVQA-GI 2024, section 4.1; Arkhipkin et al. 2023).

A U-Net in MoVQ's latents, told what a T5 encoder makes of the caption.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import Kandinsky3Pipeline, Kandinsky3UNet
from diffusers.models import VQModel
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import T5Config, T5EncoderModel

from datamodules.batches import ImageBatch
from lightning_modules.families.kandinsky import KEY, KandinskyConfig, MovqLatents
from lightning_modules.families.latent_diffusion import Context, Denoised, NoiseConfig, SamplerConfig, guided
from lightning_modules.maths.diffusion import SampleRandom, to_original
from lightning_modules.parts.adapters import save_for_peft
from lightning_modules.parts.kandinsky3_folder import Kandinsky3Folder
from lightning_modules.parts.kandinsky3_shape import Kandinsky3Shape, random_text_encoder, random_unet, word_tokenizer
from lightning_modules.parts.kandinsky3_unet import prepare
from lightning_modules.parts.t5 import T5Text, load_text, load_tokenizer
from medsynth.errors import UserError

_PIPELINE_MULTIPLE = 8  # sides of the latents that diffusers' pipeline makes


@dataclass(frozen=True)
class Kandinsky3Config(KandinskyConfig):
    """What learns, and how pictures are drawn."""

    which = "Kandinsky 3"
    pretrained: str = "kandinsky-community/kandinsky-3"
    """Hub id or local folder of a Kandinsky 3 pipeline in diffusers' layout, or a run's export; "random" makes one."""
    architecture: Kandinsky3Shape = field(default_factory=Kandinsky3Shape)
    """Shape of random networks."""
    noise: NoiseConfig = field(default_factory=lambda: NoiseConfig(schedule="cosine"))
    """The forward process; must be the one that the pretrained U-Net has learned."""
    sampler: SamplerConfig = field(default_factory=lambda: SamplerConfig(name="ddpm", steps=150, guidance=4.5))
    """The reverse process. Guidance is u + g·(c - u): one more than the pipeline's `guidance_scale`."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, about a third more time."""

    def __post_init__(self):
        super().__post_init__()
        if self.sampler.name == "lcm":
            raise UserError("model.sampler.name=lcm: Kandinsky 3 is no consistency model; take ddpm, ddim or dpm++")


class Kandinsky3(MovqLatents):
    """The U-Net learns, whole or by low-rank updates; MoVQ and the text encoder are frozen."""

    Config = Kandinsky3Config
    config: Kandinsky3Config
    Folder: ClassVar[type[Kandinsky3Folder]] = Kandinsky3Folder
    kept_tokens = torch.float16

    def build(self) -> None:
        self.check_folder()
        self.check_resolution(_PIPELINE_MULTIPLE)
        dtype = self.frozen_dtype if self.config.adapter.rank else torch.float32
        self.unet = prepare(self.load_part(dtype), self.config.gradient_checkpointing)
        self.adapt()
        self.take_movq()
        self.text_encoder = self.cached_text or self.load_text_encoder(self.frozen_dtype)

    def load_part(self, dtype: torch.dtype = torch.float32) -> Kandinsky3UNet:
        """The U-Net as it was before training, held in `dtype`."""
        if self.is_random:
            return random_unet(self.config.architecture).type(dtype)
        return self.folder.load("unet", dtype)

    def load_text_encoder(self, dtype: torch.dtype = torch.float32) -> T5Text:
        """The text encoder with its tokenizer, frozen; held in bfloat16 in the place of float16, which T5 overflows."""
        dtype = torch.bfloat16 if dtype == torch.float16 else dtype
        if self.is_random:
            model: Any = random_text_encoder(self.config.architecture)  # transformers' `to` has no type
            return T5Text(model.to(dtype), word_tokenizer())
        return load_text(self.folder.path, KEY, dtype)

    def held_as_loaded(self) -> list[nn.Module]:
        return [self.text_encoder] if isinstance(self.text_encoder, nn.Module) else []

    def embed(self, captions: list[str]) -> Context:
        """The caption's tokens; the empty one has none, which is what the pipeline tells the unconditional half."""
        embeddings, mask = self.text_encoder(captions)
        return Context(embeddings.to(self.device, torch.float32), mask.to(self.device))

    def text_digest(self) -> str | None:
        return self.described(self.weights.digest("text_encoder", "tokenizer"))

    def latent_losses(self, z_0: Tensor, random: SampleRandom, batch: ImageBatch) -> dict[str, Tensor]:
        noised = self.diffuse(z_0, random)
        output = self.predict(noised.z_t, noised.t, self.context_of(batch)).float()
        return {"loss": self.weighted(output, noised.noise, noised.t)}

    def denoise(
        self, z_t: Tensor, t: Tensor, context: Context, self_condition: Tensor | None, guidance: float
    ) -> Denoised:
        copies = 1 if guidance == 1 else 2
        output = guided(self.predict(torch.cat([z_t] * copies), torch.cat([t] * copies), context).float(), guidance)
        return Denoised(output, to_original(self.prediction, output, z_t, t, self.alpha_bar))

    def predict(self, z_t: Tensor, t: Tensor, context: Context) -> Tensor:
        """The noise (n, C, h, w)."""
        dtype = self.unet.conv_in.weight.dtype
        # A row of padding behind the longest text, as the pipeline has it: it takes part in the mean of all tokens.
        embeddings, mask = pad(context.embeddings, (0, 0, 0, 1)), pad(context.mask, (0, 1))
        told = {"encoder_hidden_states": embeddings.to(dtype), "encoder_attention_mask": mask}
        return self.unet(z_t.to(dtype), t, **told).sample

    def clipping(self) -> dict[str, Any]:
        # At the noisiest of the cosine betas an estimate is 20,000 times what a network errs by.
        return {"clip_sample": True, "clip_sample_range": 1.0} if self.is_random else super().clipping()

    def scheduler_options(self) -> dict[str, Any]:
        options = super().scheduler_options()
        if self.config.sampler.name == "ddpm" and not self.is_random:
            options["variance_type"] = self.folder.variance
        return options

    def export_update(self, directory: Path) -> None:
        """Write it for peft: diffusers has no loader of updates for this U-Net."""
        save_for_peft(self.network, self.config.adapter, directory, self.source)

    def export_pipeline(self, directory: Path, network: nn.Module) -> None:
        """Write the folder; the text encoder's 8.7 billion weights are copied as files where they can be."""
        written: dict[str, Any] = {"unet": network, "scheduler": self.pipeline_scheduler()}
        if self.is_random or not self.folder.can_copy("movq"):
            written["movq"] = self.load_movq()
        if self.is_random or not self.folder.can_copy("text_encoder"):
            text = self.load_text_encoder()
            written |= {"text_encoder": text.model, "tokenizer": text.tokenizer}
        for part, whole in written.items():
            whole.save_pretrained(directory / part)
        if not self.is_random:
            written = self._without_weights() | written
        Kandinsky3Pipeline(**written).save_config(directory)

    def _without_weights(self) -> dict[str, Any]:
        """The parts that are copied as files, of whose networks only the classes are asked."""
        folder = self.folder
        with torch.device("meta"):
            text = T5EncoderModel(T5Config.from_pretrained(folder.path / "text_encoder", local_files_only=True))
            movq = VQModel.from_config(folder.config("movq"))
        return {"text_encoder": text, "movq": movq, "tokenizer": load_tokenizer(folder.path / "tokenizer", KEY)}

"""One cell of the table: what is trained, in which shape, on what; its module, and its batches in memory."""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from itertools import count
from typing import Any

import torch
from torch import Tensor

from datamodules.batches import Conditions, ImageBatch
from jobs.run.registry import method_class
from lightning_modules.families.latent_diffusion import LatentDiffusion
from lightning_modules.parts.adapters import AdapterConfig
from lightning_modules.parts.architecture import ArchitectureConfig
from lightning_modules.parts.image_prompt import ImageEncoder
from lightning_modules.parts.kandinsky22_shape import Kandinsky22Shape
from lightning_modules.parts.weights import RANDOM
from medsynth.errors import UserError

STABLE_DIFFUSION, KANDINSKY = "sd15", "kandinsky22"
SHAPES = {
    "tiny": {
        STABLE_DIFFUSION: ArchitectureConfig(
            widths=[8, 16],
            layers=1,
            heads=2,
            norm_groups=4,
            vae_widths=[8, 8, 16],
            vae_layers=1,
            text_width=16,
            text_layers=1,
            text_heads=2,
            vocabulary=1000,
        ),
        KANDINSKY: Kandinsky22Shape(
            width=16,
            prior_layers=1,
            prior_heads=2,
            prior_head_width=8,
            unet_widths=[8, 16],
            unet_layers=1,
            unet_head_width=8,
            cross_width=16,
            norm_groups=4,
            movq_widths=[32, 32],
            movq_layers=1,
            movq_codes=16,
            text_layers=1,
            text_heads=2,
            vocabulary=1000,
            vision_width=16,
            vision_layers=1,
            vision_heads=2,
            vision_feed_forward=32,
            vision_side=16,
            vision_patch=8,
        ),
    },
    STABLE_DIFFUSION: {STABLE_DIFFUSION: ArchitectureConfig()},
    KANDINSKY: {KANDINSKY: Kandinsky22Shape()},
}
"""Networks of each family by the name of their shape: of configs/tiny/, and the published ones; weights are random."""

METHODS = {
    "stable_diffusion": STABLE_DIFFUSION,
    "stable_diffusion_lora": STABLE_DIFFUSION,
    "controlnet": STABLE_DIFFUSION,
    "llcm": STABLE_DIFFUSION,
    "hypernetwork": STABLE_DIFFUSION,
    "dreambooth": STABLE_DIFFUSION,
    "kandinsky22_prior_lora": KANDINSKY,
    "kandinsky22_decoder_lora": KANDINSKY,
}
"""Each method's published networks."""
DIFFERENT = 2
"""Different batches that lie in memory and come round again."""
TOKENS = 77
"""Tokens of a prompt."""


@dataclass(frozen=True)
class Cell:
    """What one row of the table is measured for."""

    method: str
    """One of METHODS."""
    shape: str = "tiny"
    """One of SHAPES."""
    resolution: int = 32
    """Side of the pictures, pixels."""
    batch: int = 4
    """Pictures a step."""
    precision: str = "32-true"
    """Lightning's name: 32-true or bf16-mixed."""
    device: str = "cpu"
    """cpu or cuda."""
    cached: bool = False
    """Both read posterior means and log-variances and text embeddings instead of pictures and tokens."""
    compile: bool = False
    """Ours with torch.compile; the plain loop stays plain."""
    checkpointing: bool = False
    """Both compute activations again in the backward pass."""
    clock: str = "wall"
    """wall, or cpu: processor time of one thread, which other work on the machine hardly lengthens."""

    def __post_init__(self):
        if self.method == "dreambooth" and self.batch % 2:
            raise UserError(f"--batch {self.batch}: half of a batch of dreambooth are class pictures; give an even one")
        if METHODS[self.method] not in SHAPES[self.shape]:
            raise UserError(f"--shape {self.shape}: {self.method} has the shapes tiny and {METHODS[self.method]}")

    @property
    def architecture(self) -> Any:
        """The networks' shape, of the method's family."""
        return SHAPES[self.shape][METHODS[self.method]]

    @property
    def dtype(self) -> torch.dtype:
        """What frozen networks are held in, and what matrices are multiplied in."""
        return torch.bfloat16 if self.precision == "bf16-mixed" else torch.float32


def build(cell: Cell) -> LatentDiffusion:
    """The method's module with random weights on the cell's device, built, as training finds it before `setup`."""
    Method = method_class(cell.method.removesuffix("_lora"))
    again = {"gradient_checkpointing": True} if cell.checkpointing else {}
    if again and not any(field.name in again for field in fields(Method.Config)):
        raise UserError(f"--checkpointing: {cell.method} cannot compute activations again")
    config = Method.Config(
        pretrained=RANDOM, architecture=cell.architecture, resolution=cell.resolution, **again, **_settings(cell)
    )
    module: LatentDiffusion = Method(config)
    if cell.cached:
        module.use_cache(lambda captions: _random_text(cell, len(captions)))
    with torch.device(cell.device):
        module.configure_model()
    return module.to(cell.device)


class Batches:
    """Batches in memory, page-locked where there is a GPU, so that the step is measured and not the disk.

    What ours and the plain loop read are the same pictures, prompts, latents, embeddings and controls.
    """

    def __init__(self, cell: Cell, module: LatentDiffusion):
        self.cell = cell
        generator = torch.Generator().manual_seed(0)
        self._batches = [_batch(cell, module.latent_shape(), i, generator) for i in range(DIFFERENT)]
        self._plain = [_plain(batch, module) for batch in self._batches]
        if cell.device == "cuda":
            self._batches = [batch.pin_memory() for batch in self._batches]
            self._plain = [{name: value.pin_memory() for name, value in batch.items()} for batch in self._plain]

    def __getitem__(self, i: int) -> ImageBatch:
        """The i-th batch of an endless row: pictures come round again, prompts and seeds do not.

        A frozen text encoder remembers prompts; here it never meets one twice, so that both loops do the same work.
        """
        batch, n = self._batches[i % DIFFERENT], self.cell.batch
        seeds = torch.arange(i * n, (i + 1) * n)
        return replace(batch, conditions=replace(batch.conditions, captions=_captions(i, n)), seeds=seeds)

    def __iter__(self) -> Iterator[ImageBatch]:
        return map(self.__getitem__, count())

    def plain(self, i: int) -> dict[str, Tensor]:
        """The i-th batch as an example script's loader gives it: tensors by name, tokenised beforehand."""
        return self._plain[i % DIFFERENT]


def _settings(cell: Cell) -> dict[str, Any]:
    """The method's own keys, as its preset has them."""
    shape = cell.architecture
    match cell.method:
        case "stable_diffusion_lora":
            return {"adapter": AdapterConfig(rank=16)}
        case "kandinsky22_prior_lora":
            return {"adapter": AdapterConfig(rank=128), "decoder": RANDOM}
        case "kandinsky22_decoder_lora":
            return {"adapter": AdapterConfig(rank=128), "prior": RANDOM}
        case "controlnet":
            widths = {"tiny": [8, 8, 16], "sd15": [16, 32, 96, 256]}[cell.shape]
            return {"controls": {"mask": 1.0}, "conditioning_widths": widths}
        case "hypernetwork":
            return {"widths": sorted({shape.text_width, *shape.widths})}
        case "dreambooth":
            return {"class_pictures": 200}
    return {}


def _batch(cell: Cell, latent_shape: tuple[int, ...], i: int, generator: torch.Generator) -> ImageBatch:
    n, side = cell.batch, cell.resolution
    images = torch.rand(n, 3, side, side, generator=generator)
    control = None
    if cell.method == "controlnet":
        control = (torch.rand(n, 1, side, side, generator=generator) > 0.5).float()
    cached = {}
    if cell.cached:
        mean = torch.randn(n, *latent_shape, generator=generator)
        embeddings, mask = _random_text(cell, n)
        cached = {"latents": torch.cat([mean, mean - 5], 1), "text_embeddings": embeddings, "text_mask": mask}
        if cell.method == "kandinsky22_decoder_lora":
            cached["image_embeddings"] = torch.randn(n, cell.architecture.width, generator=generator)
    return ImageBatch(
        images=None if cell.cached else images,
        conditions=Conditions(captions=_captions(i, n), control=control),
        seeds=torch.arange(n),
        is_prior=torch.arange(n) >= n // 2 if cell.method == "dreambooth" else torch.zeros(n, dtype=torch.bool),
        **cached,
    )


def _plain(batch: ImageBatch, module: Any) -> dict[str, Tensor]:
    tensors = {}
    if batch.images is not None:
        tensors["pixel_values"] = batch.images * 2 - 1
        for owner in (module, getattr(module, "prior", None)):  # a decoder's is its prior's
            if isinstance(encoder := getattr(owner, "image_encoder", None), ImageEncoder):
                tensors["clip_pixel_values"] = encoder.normalised(batch.images.to(module.device)).cpu()
        if hasattr(module, "text_encoder"):
            tokens = module.text_encoder.tokenizer(
                batch.conditions.captions, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt"
            )
            tensors |= {"input_ids": tokens.input_ids, "attention_mask": tokens.attention_mask}
    else:
        cached = {"moments": batch.latents, "prompt_embeds": batch.text_embeddings}
        cached |= {"attention_mask": batch.text_mask, "image_embeds": batch.image_embeddings}
        tensors |= {name: value for name, value in cached.items() if value is not None}
    if batch.conditions.control is not None:
        tensors["conditioning_pixel_values"] = batch.conditions.control.expand(-1, 3, -1, -1).contiguous()
    return tensors


def _captions(i: int, n: int) -> list[str]:
    return [f"generate an image with {i * n + j} polyps" for j in range(n)]


def _random_text(cell: Cell, n: int) -> tuple[Tensor, Tensor]:
    """Embeddings (n, L, D) and mask (n, L) that stand for a cache's: the same for each prompt."""
    shape = cell.architecture
    rows, width = (TOKENS + 1, shape.width) if METHODS[cell.method] == KANDINSKY else (TOKENS, shape.text_width)
    embedding = torch.randn(1, rows, width, generator=torch.Generator().manual_seed(1))
    return embedding.repeat(n, 1, 1), torch.ones(n, rows, dtype=torch.bool)

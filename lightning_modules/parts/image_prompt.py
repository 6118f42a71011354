"""A picture as words: its CLIP embedding, projected to tokens beside those of the text."""

import json
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import ImageProjection
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from lightning_modules.parts.pretrained import fill, load_network
from lightning_modules.parts.weights import RANDOM, Weights, made_here
from medsynth.errors import UserError
from medsynth.files import read_object
from medsynth.loading import one_line

_ENCODER, _CONFIG, _WEIGHTS = "image_encoder", "config.json", "diffusion_pytorch_model.safetensors"
# What a whole CLIP has beside its image encoder: no picture's embedding goes through it. Positions are counted anew.
_NO_PICTURES = r"^(text_model\.|text_projection\.|logit_scale$)|position_ids$"


class ImagePrompt(nn.Module):
    """A frozen CLIP image encoder and a trained projection of its embedding (linear, then layer norm).

    The tokens follow those of the text in the U-Net's context, each multiplied by `weight`.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        encoder: CLIPVisionModelWithProjection,
        processor: CLIPImageProcessor,
        *,
        text_width: int,
        tokens: int,
        weight: float,
    ):
        """processor: gives the mean and standard deviation of the pictures that the encoder has learned."""
        super().__init__()
        self.encoder, self.weight = encoder.requires_grad_(False), weight
        self.projection = ImageProjection(encoder.config.projection_dim, text_width, tokens)
        for name, values in (("mean", processor.image_mean), ("std", processor.image_std)):
            self.register_buffer(name, torch.tensor(values).reshape(1, 3, 1, 1), persistent=False)

    def forward(self, pictures: Tensor) -> Tensor:
        """Tokens (n, tokens, text width) of pictures, float32 (n, 3, H, W) in [0, 1]."""
        side: Any = self.encoder.config.image_size
        with torch.no_grad():
            embeddings = self.encoder((resized(pictures, side) - self.mean) / self.std).image_embeds
        return self.weight * self.projection(embeddings)

    def train(self, mode: bool = True) -> Self:
        """Switch the projection; the encoder stays in evaluation mode."""
        super().train(mode)
        self.encoder.eval()
        return self

    def save_pretrained(
        self, directory: Path, encoder: CLIPVisionModelWithProjection, processor: CLIPImageProcessor
    ) -> None:
        """Write what `from_pretrained` reads; the encoder as transformers lays it out.

        encoder, processor: as they were loaded, since mixed precision holds its own encoder in half.
        """
        directory.mkdir(parents=True, exist_ok=True)
        linear = self.projection.image_embeds
        described = {
            "tokens": self.projection.num_image_text_embeds,
            "text_width": linear.out_features // self.projection.num_image_text_embeds,
            "weight": self.weight,
        }
        (directory / _CONFIG).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
        weights = {name: value.detach().contiguous() for name, value in self.projection.state_dict().items()}
        save_file(weights, directory / _WEIGHTS)
        encoder.save_pretrained(directory / _ENCODER)
        processor.save_pretrained(directory / _ENCODER)

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> Self:
        """What `save_pretrained` wrote, in evaluation mode on the CPU.

        Its tokens belong after the text's embeddings, the negative prompt's too, of a diffusers pipeline:
        `prompt_embeds=torch.cat([embeddings, prompt(pictures)], dim=1)`.

        Raises:
            UserError: the folder holds no image prompt.
        """
        directory = Path(directory)
        try:
            described = read_object(directory / _CONFIG)
            if not (directory / _ENCODER).is_dir():
                raise ValueError(f"there is no folder {_ENCODER}")
            prompt = cls(*load_image_encoder(str(directory / _ENCODER), _ENCODER), **described)
            fill(prompt.projection, load_file(directory / _WEIGHTS), "projection", directory / _WEIGHTS)
        except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
            raise UserError(f"{directory} holds no image prompt: {one_line(error)}") from error
        return prompt.eval()


class ImageEncoder(nn.Module):
    """A frozen CLIP image encoder, as it is asked for the embeddings of pictures."""

    mean: Tensor
    std: Tensor

    def __init__(self, encoder: CLIPVisionModelWithProjection, processor: CLIPImageProcessor):
        """processor: gives the mean and standard deviation of the pictures that the encoder has learned."""
        super().__init__()
        self.encoder = encoder.requires_grad_(False).eval()
        for name, values in (("mean", processor.image_mean), ("std", processor.image_std)):
            self.register_buffer(name, torch.tensor(values).reshape(1, 3, 1, 1), persistent=False)

    @torch.no_grad()
    def forward(self, pictures: Tensor) -> Tensor:
        """Projected embeddings float32 (n, D), of no particular length, of pictures (n, 3, H, W) in [0, 1]."""
        return self._embed(self.normalised(pictures))

    def normalised(self, pictures: Tensor) -> Tensor:
        """Pictures (n, 3, H, W) in [0, 1] as the encoder takes them."""
        return (resized(pictures.float(), self._side) - self.mean) / self.std

    @torch.no_grad()
    def of_nothing(self) -> Tensor:
        """The embedding (1, D) of zeros in the place of a normalised picture: what stands for no picture."""
        return self._embed(torch.zeros(1, 3, self._side, self._side, device=self.mean.device))

    @property
    def _side(self) -> Any:
        return self.encoder.config.image_size

    def _embed(self, normalised: Tensor) -> Tensor:
        return self.encoder(normalised.to(self.encoder.dtype)).image_embeds.float()


def resized(pictures: Tensor, side: int) -> Tensor:
    """Pictures (n, 3, H, W) in [0, 1] at the side that an encoder takes, bicubic with antialiasing."""
    return F.interpolate(pictures, (side, side), mode="bicubic", antialias=True).clamp(0, 1)


def load_image_encoder(source: str, key: str) -> tuple[CLIPVisionModelWithProjection, CLIPImageProcessor]:
    """A CLIP image encoder and how its pictures are normalised.

    source: hub id or local folder in transformers' layout, of a whole CLIP or of its image side; "random" makes a small
    fixed one. key: the config key that named it.

    Raises:
        UserError: it is absent, or no CLIP image encoder.
    """
    if source == RANDOM:
        return _random_encoder(), CLIPImageProcessor()
    folder = Weights(key, source).require()
    encoder = load_network(CLIPVisionModelWithProjection, folder, key, spare=_NO_PICTURES)
    return encoder, load_processor(folder, key)


def load_processor(folder: Path, key: str) -> CLIPImageProcessor:
    """How pictures are normalised for a CLIP; where the folder says nothing of it, by CLIP's own mean and deviation.

    Raises:
        UserError: what it says cannot be read; `key` is named.
    """
    try:
        known = (folder / "preprocessor_config.json").is_file()
        return CLIPImageProcessor.from_pretrained(folder, local_files_only=True) if known else CLIPImageProcessor()
    except Exception as error:  # the library raises of many kinds; all mean that the file is not what it says
        raise UserError(f"{key}: {folder}/preprocessor_config.json cannot be read: {one_line(error)}") from error


def _random_encoder() -> CLIPVisionModelWithProjection:
    shape: dict[str, Any] = {"image_size": 32, "patch_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    with made_here():
        config = CLIPVisionConfig(hidden_size=32, intermediate_size=64, projection_dim=16, **shape)
        return CLIPVisionModelWithProjection(config)

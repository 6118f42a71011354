"""A whole CLIP: both encoders with projections into one space, its tokenizer, and how its pictures are normalised."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from lightning_modules.parts.image_prompt import load_processor, resized
from lightning_modules.parts.pretrained import load_network
from lightning_modules.parts.text import load_tokenizer, word_tokenizer
from lightning_modules.parts.weights import RANDOM, Weights, made_here
from medsynth.errors import UserError
from medsynth.files import read_object
from medsynth.ranges import number

_SPARE = r"position_ids$"  # counted anew
# What stands where a whole CLIP is due, by its model_type.
_HALVES = {"clip_text_model": "the text side of a CLIP alone", "clip_vision_model": "the image side of a CLIP alone"}


@dataclass(frozen=True)
class CLIPShapeConfig:
    """Shape of a random CLIP, for tests; a pretrained one brings its own. Defaults: ViT-L/14."""

    text_width: int = number(768, least=1)
    """Width of the text encoder."""
    text_layers: int = number(12, least=1)
    """Transformer layers of the text encoder."""
    text_heads: int = number(12, least=1)
    """Attention heads of the text encoder."""
    image_width: int = number(1024, least=1)
    """Width of the image encoder."""
    image_layers: int = number(24, least=1)
    """Transformer layers of the image encoder."""
    image_heads: int = number(16, least=1)
    """Attention heads of the image encoder."""
    image_size: int = number(224, least=1)
    """Side of the pictures that the image encoder takes, pixels."""
    patch_size: int = number(14, least=1)
    """Side of its patches, pixels."""
    projection: int = number(768, least=1)
    """Width of the embeddings."""
    vocabulary: int = number(49408, least=1)
    """Rows of the token table."""

    def __post_init__(self):
        for side in ("text", "image"):
            width, heads = getattr(self, f"{side}_width"), getattr(self, f"{side}_heads")
            if width % heads:
                raise UserError(f"model.clip.{side}_heads={heads}: must divide {side}_width={width}")
        if self.patch_size > self.image_size:
            raise UserError(f"model.clip.patch_size={self.patch_size}: exceeds image_size={self.image_size}")


class CLIP(nn.Module):
    """What `network`, a transformers `CLIPModel`, makes of pictures and captions: embeddings float32 of length 1.

    A submodule holds the network, so that it can be adapted and trained in place.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: CLIPModel, tokenizer: Any, processor: CLIPImageProcessor):
        super().__init__()
        self.network, self.tokenizer, self.processor = network, tokenizer, processor
        for name, values in (("mean", processor.image_mean), ("std", processor.image_std)):
            self.register_buffer(name, torch.tensor(values).reshape(1, 3, 1, 1), persistent=False)

    @property
    def side(self) -> int:
        """Side of the pictures that the image encoder takes, pixels."""
        vision: Any = self.network.config.vision_config
        return vision.image_size

    def pictures(self, pictures: Tensor) -> Tensor:
        """Embeddings (n, D) of pictures (n, 3, H, W) in [0, 1]."""
        normalised = (resized(pictures.float(), self.side) - self.mean) / self.std
        dtype = self.network.visual_projection.weight.dtype
        return F.normalize(self.network.get_image_features(normalised.to(dtype)).pooler_output.float(), dim=-1)

    def captions(self, captions: list[str]) -> Tensor:
        """Embeddings (n, D) of n captions; what a caption has beyond the encoder's positions is cut with a warning."""
        ids = self.tokens(captions).to(self.mean.device)
        return F.normalize(self.network.get_text_features(ids).pooler_output.float(), dim=-1)

    def tokens(self, captions: list[str]) -> Tensor:
        """int64 (n, L): start, words, end, padding. Attention looks back alone, so that padding needs no mask."""
        text: Any = self.network.config.text_config
        room = text.max_position_embeddings - 2
        own = self.tokenizer(captions, add_special_tokens=False, verbose=False).input_ids
        for caption, words in zip(captions, own, strict=True):
            if len(words) > room:
                warnings.warn(f"cut to {room + 2} tokens: {caption!r}", stacklevel=4)
        start, end = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        rows = [[start, *words[:room], end] for words in own]
        longest = max(map(len, rows))
        return torch.tensor([row + [self.tokenizer.pad_token_id] * (longest - len(row)) for row in rows])


def load_clip(source: str, shape: CLIPShapeConfig, key: str) -> CLIP:
    """A whole CLIP, float32, in evaluation mode.

    source: hub id or local folder in transformers' layout; "random" makes a fixed one of `shape`. key: the config key
    that named it.

    Raises:
        UserError: it is absent, or no whole CLIP with its own tokenizer.
    """
    if source == RANDOM:
        return _random(shape)
    folder = Weights(key, source).require()
    _check_kind(folder, key)
    network = load_network(CLIPModel, folder, key, _SPARE)
    text = network.config.text_config
    tokenizer = load_tokenizer(folder, text, key)
    # Where the config says 2, as the first folders did, transformers looks for the greatest id instead.
    looked_for = len(tokenizer) - 1 if text.eos_token_id == 2 else text.eos_token_id
    if tokenizer.eos_token_id != looked_for:
        raise UserError(
            f"{key}: {folder} has a text encoder that looks for the end of a text at token {looked_for}, and a "
            f"tokenizer that ends it with {tokenizer.eos_token_id}; they are not of one CLIP"
        )
    return CLIP(network, tokenizer, load_processor(folder, key))


def save_clip(directory: Path, network: Any, clip: CLIP) -> None:
    """Write for transformers' `from_pretrained` `network`, a `CLIPModel`, and what `clip` prepares its input by."""
    for half in (network.config.text_config, network.config.vision_config):
        half.projection_dim = network.config.projection_dim  # where one encoder is read alone it looks for it there
    network.save_pretrained(directory)
    clip.tokenizer.save_pretrained(directory)
    clip.processor.save_pretrained(directory)


def _check_kind(folder: Path, key: str) -> None:
    """Raise UserError unless the folder's config says that it is a whole CLIP."""
    if (folder / "model_index.json").is_file():
        raise UserError(f"{key}: {folder} is a pipeline of diffusers, not a CLIP; name a folder that CLIPModel reads")
    try:
        kind = read_object(folder / "config.json").get("model_type")
    except (OSError, ValueError) as error:
        raise UserError(f"{key}: {folder} is no CLIP: its config.json cannot be read: {error}") from None
    if kind != "clip":
        raise UserError(f"{key}: {folder} is {_HALVES.get(str(kind), f'of the kind {kind}')}; name a whole CLIP")


def _random(shape: CLIPShapeConfig) -> CLIP:
    tokenizer = word_tokenizer()
    text = {
        "hidden_size": shape.text_width,
        "intermediate_size": 4 * shape.text_width,
        "num_hidden_layers": shape.text_layers,
        "num_attention_heads": shape.text_heads,
        "vocab_size": shape.vocabulary,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "hidden_size": shape.image_width,
        "intermediate_size": 4 * shape.image_width,
        "num_hidden_layers": shape.image_layers,
        "num_attention_heads": shape.image_heads,
        "image_size": shape.image_size,
        "patch_size": shape.patch_size,
    }
    with made_here():
        network = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=shape.projection))
    side = {"height": shape.image_size, "width": shape.image_size}
    processor = CLIPImageProcessor(size={"shortest_edge": shape.image_size}, crop_size=side)
    return CLIP(network.eval(), tokenizer, processor)

"""Random networks of Kandinsky 3's kind, from a described shape and a fixed seed."""

from dataclasses import dataclass
from typing import Any

from diffusers import Kandinsky3UNet
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from lightning_modules.parts.movq import MovqShape
from lightning_modules.parts.weights import made_here
from medsynth.errors import UserError
from medsynth.ranges import number, numbers

# Pieces of the prompts that the data sets use; all else is spelt in letters.
_WORDS = (
    "generate an image with containing not a no polyp polyps finding findings abnormality instrument located in the of "
    "size colors pink red white and text green black box artefact small medium large lower upper center left right"
)
_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,;:!?<>()/'-"


@dataclass(frozen=True)
class Kandinsky3Shape(MovqShape):
    """Shape of random networks, for tests; pretrained ones bring their own. Defaults: the published networks."""

    movq_widths: list[int] = numbers([256, 512, 512, 1024], count=(2, None), least=1)
    """MoVQ: channels of each level, multiples of 32; each but the first halves the picture."""
    unet_widths: list[int] = numbers([384, 768, 1536, 3072], count=4, least=1)
    """U-Net: channels of each level; all but the first have attention, each but the last halves the latent."""
    unet_layers: int = number(3, least=2)
    """U-Net: pairs of residual blocks a level."""
    unet_head_width: int = number(64, least=1)
    """U-Net: channels of each attention head."""
    time_width: int = number(1536, least=1)
    """U-Net: width of the embedding of time."""
    cross_width: int = number(4096, least=1)
    """U-Net: width of the tokens of text after their projection."""
    norm_groups: int = number(32, least=1)
    """U-Net: groups of each group norm."""
    text_width: int = number(4096, least=1)
    """Text encoder: width of its tokens."""
    text_layers: int = number(32, least=1)
    """Text encoder: transformer layers."""
    text_heads: int = number(16, least=1)
    """Text encoder: attention heads."""
    text_head_width: int = number(256, least=1)
    """Text encoder: channels of each attention head."""
    text_feed_forward: int = number(16384, least=1)
    """Text encoder: width within each feed-forward layer."""
    vocabulary: int = number(32128, least=200)
    """Text encoder: rows of the token table."""

    def __post_init__(self):
        super().__post_init__()
        narrowest = [self.unet_widths[0] // 2, *(width // 2 for width in self.unet_widths)]
        divides = [(width, self.norm_groups, "norm_groups") for width in narrowest]
        attended = [*self.unet_widths[1:], self.time_width]
        divides += [(width, self.unet_head_width, "unet_head_width") for width in attended]
        for width, divisor, name in divides:
            if width % divisor:
                raise UserError(f"model.architecture.{name}={divisor}: must divide the width {width}")


def random_unet(shape: Kandinsky3Shape) -> Kandinsky3UNet:
    """A U-Net of that shape, the same weights each time."""
    with made_here():
        return Kandinsky3UNet(
            in_channels=shape.latent_channels,
            time_embedding_dim=shape.time_width,
            groups=shape.norm_groups,
            attention_head_dim=shape.unet_head_width,
            layers_per_block=shape.unet_layers,
            block_out_channels=tuple(shape.unet_widths),
            cross_attention_dim=shape.cross_width,
            encoder_hid_dim=shape.text_width,
        )


def random_text_encoder(shape: Kandinsky3Shape) -> T5EncoderModel:
    """A T5 encoder of that shape, likewise."""
    with made_here():
        return T5EncoderModel(
            T5Config(
                vocab_size=shape.vocabulary,
                d_model=shape.text_width,
                d_kv=shape.text_head_width,
                d_ff=shape.text_feed_forward,
                num_layers=shape.text_layers,
                num_heads=shape.text_heads,
                feed_forward_proj="gated-silu",
            )
        )


def word_tokenizer() -> Any:
    """A T5 tokenizer of letters and a few words."""
    words = sorted({f"▁{word}" for word in _WORDS.split()})
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(letter, -4.0) for letter in _LETTERS] + [(word, -3.0) for word in words]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)

"""Random networks of Kandinsky 2.2's kind, from a described shape and a fixed seed."""

from dataclasses import dataclass

import torch
from diffusers import PriorTransformer, UNet2DConditionModel
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from lightning_modules.parts.movq import MovqShape
from lightning_modules.parts.text import TextEncoderConfig
from lightning_modules.parts.weights import RANDOM, made_here
from medsynth.errors import UserError
from medsynth.ranges import number, numbers

TOKENS = 77
"""Tokens of a prompt."""


@dataclass(frozen=True)
class Kandinsky22Shape(MovqShape):
    """Shape of random networks, for tests; pretrained ones bring their own. Defaults: the published networks."""

    width: int = number(1280, least=1)
    """Width of the embeddings of pictures and text."""
    prior_layers: int = number(20, least=1)
    """Prior: transformer layers."""
    prior_heads: int = number(32, least=1)
    """Prior: attention heads."""
    prior_head_width: int = number(64, least=1)
    """Prior: channels of each head."""
    unet_widths: list[int] = numbers([384, 768, 1152, 1536], count=(2, None), least=1)
    """Decoder: channels of each level; all but the first have attention, each but the last halves the latent."""
    unet_layers: int = number(3, least=1)
    """Decoder: residual blocks a level."""
    unet_head_width: int = number(64, least=1)
    """Decoder: channels of each attention head."""
    cross_width: int = number(768, least=1)
    """Decoder: width of the tokens that an image embedding becomes."""
    norm_groups: int = number(32, least=1)
    """Decoder: groups of each group norm."""
    text_layers: int = number(32, least=0)
    """Text encoder: transformer layers."""
    text_heads: int = number(20, least=1)
    """Text encoder: attention heads."""
    vocabulary: int = number(49408, least=1)
    """Text encoder: rows of the token table."""
    vision_width: int = number(1664, least=1)
    """Image encoder: width of its tokens."""
    vision_layers: int = number(48, least=1)
    """Image encoder: transformer layers."""
    vision_heads: int = number(16, least=1)
    """Image encoder: attention heads."""
    vision_feed_forward: int = number(8192, least=1)
    """Image encoder: width within each feed-forward layer."""
    vision_side: int = number(224, least=1)
    """Image encoder: side of the pictures it takes, pixels."""
    vision_patch: int = number(14, least=1)
    """Image encoder: side of a patch, pixels."""

    def __post_init__(self):
        super().__post_init__()
        divides = [(width, self.norm_groups, "norm_groups") for width in self.unet_widths]
        divides += [(width, self.unet_head_width, "unet_head_width") for width in self.unet_widths[1:]]
        divides += [(self.width, self.text_heads, "text_heads"), (self.vision_width, self.vision_heads, "vision_heads")]
        for width, divisor, name in divides:
            if width % divisor:
                raise UserError(f"model.architecture.{name}={divisor}: must divide the width {width}")

    def text(self) -> TextEncoderConfig:
        """A random text encoder of this shape."""
        return TextEncoderConfig(
            source=RANDOM,
            max_tokens=TOKENS,
            width=self.width,
            layers=self.text_layers,
            heads=self.text_heads,
            vocabulary=self.vocabulary,
        )


def random_prior(shape: Kandinsky22Shape) -> PriorTransformer:
    """A prior of that shape, the same weights each time; embeddings have mean 0 and standard deviation 1."""
    with made_here():
        prior = PriorTransformer(
            num_attention_heads=shape.prior_heads,
            attention_head_dim=shape.prior_head_width,
            num_layers=shape.prior_layers,
            embedding_dim=shape.width,
            num_embeddings=TOKENS,
            additional_embeddings=4,  # text, time, the noised embedding and the one that is asked for
        )
    torch.nn.init.ones_(prior.clip_std)
    return prior


def random_unet(shape: Kandinsky22Shape, sample_size: int) -> UNet2DConditionModel:
    """A decoder's U-Net of that shape for latents of `sample_size` a side, likewise."""
    attended = len(shape.unet_widths) - 1
    with made_here():
        return UNet2DConditionModel(
            sample_size=sample_size,
            in_channels=shape.latent_channels,
            out_channels=2 * shape.latent_channels,
            block_out_channels=tuple(shape.unet_widths),
            layers_per_block=shape.unet_layers,
            norm_num_groups=shape.norm_groups,
            attention_head_dim=shape.unet_head_width,
            cross_attention_dim=shape.cross_width,
            encoder_hid_dim=shape.width,
            encoder_hid_dim_type="image_proj",
            addition_embed_type="image",
            resnet_time_scale_shift="scale_shift",
            down_block_types=("ResnetDownsampleBlock2D",) + ("SimpleCrossAttnDownBlock2D",) * attended,
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            up_block_types=("SimpleCrossAttnUpBlock2D",) * attended + ("ResnetUpsampleBlock2D",),
        )


def random_image_encoder(shape: Kandinsky22Shape) -> CLIPVisionModelWithProjection:
    """An image encoder of that shape, likewise."""
    with made_here():
        return CLIPVisionModelWithProjection(
            CLIPVisionConfig(
                hidden_size=shape.vision_width,
                intermediate_size=shape.vision_feed_forward,
                num_hidden_layers=shape.vision_layers,
                num_attention_heads=shape.vision_heads,
                image_size=shape.vision_side,
                patch_size=shape.vision_patch,
                projection_dim=shape.width,
            )
        )

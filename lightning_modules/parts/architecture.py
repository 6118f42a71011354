"""Random networks of Stable Diffusion's kind, from a described shape and a fixed seed."""

from dataclasses import dataclass

from diffusers import AutoencoderKL, UNet2DConditionModel

from lightning_modules.parts.weights import made_here
from medsynth.errors import UserError
from medsynth.ranges import number, numbers


@dataclass(frozen=True)
class ArchitectureConfig:
    """Shape of random networks, for tests and benchmarks; pretrained ones bring their own. Defaults: SD 1.x."""

    widths: list[int] = numbers([320, 640, 1280, 1280], least=1)
    """U-Net: channels of each level; all but the last have cross-attention, each but the last halves the latent."""
    layers: int = number(2, least=1)
    """U-Net: residual blocks a level."""
    heads: int = number(8, least=1)
    """U-Net: attention heads."""
    norm_groups: int = number(32, least=1)
    """Groups of each group norm, of U-Net and autoencoder."""
    vae_widths: list[int] = numbers([128, 256, 512, 512], least=1)
    """Autoencoder: channels of each level; each but the first halves the picture."""
    vae_layers: int = number(2, least=1)
    """Autoencoder: residual blocks a level."""
    latent_channels: int = number(4, least=1)
    """Channels of the latents."""
    text_width: int = number(768, least=1)
    """Text encoder: width of the embeddings."""
    text_layers: int = number(12, least=0)
    """Text encoder: transformer layers."""
    text_heads: int = number(12, least=1)
    """Text encoder: attention heads."""
    vocabulary: int = number(49408, least=1)
    """Text encoder: rows of the token table."""

    def __post_init__(self):
        for width in (*self.widths, *self.vae_widths):
            if width % self.norm_groups:
                raise UserError(f"model.architecture.norm_groups={self.norm_groups}: must divide the width {width}")
        if self.text_width % self.text_heads:
            raise UserError(
                f"model.architecture.text_heads={self.text_heads}: must divide text_width={self.text_width}"
            )


def random_unet(shape: ArchitectureConfig, resolution: int) -> UNet2DConditionModel:
    """A U-Net of that shape for pictures of `resolution` pixels a side, the same weights each time."""
    levels = len(shape.widths)
    with made_here():
        return UNet2DConditionModel(
            sample_size=resolution // 2 ** (len(shape.vae_widths) - 1),
            in_channels=shape.latent_channels,
            out_channels=shape.latent_channels,
            block_out_channels=tuple(shape.widths),
            layers_per_block=shape.layers,
            attention_head_dim=shape.heads,  # diffusers' name for the number of heads
            norm_num_groups=shape.norm_groups,
            cross_attention_dim=shape.text_width,
            down_block_types=("CrossAttnDownBlock2D",) * (levels - 1) + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (levels - 1),
        )


def random_vae(shape: ArchitectureConfig, resolution: int) -> AutoencoderKL:
    """An autoencoder of that shape, likewise."""
    levels = len(shape.vae_widths)
    with made_here():
        return AutoencoderKL(
            latent_channels=shape.latent_channels,
            block_out_channels=tuple(shape.vae_widths),
            layers_per_block=shape.vae_layers,
            norm_num_groups=shape.norm_groups,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            sample_size=resolution,
        )

"""Random networks of Stable Diffusion's kind, from a described shape and a fixed seed."""

from dataclasses import dataclass, field

from diffusers import AutoencoderKL, UNet2DConditionModel

from lightning_modules.parts.weights import made_here


@dataclass(frozen=True)
class ArchitectureConfig:
    """Shape of random networks, for tests and benchmarks; pretrained ones bring their own. Defaults: SD 1.x."""

    widths: list[int] = field(default_factory=lambda: [320, 640, 1280, 1280])
    """U-Net: channels of each level; all but the last have cross-attention, each but the last halves the latent."""
    layers: int = 2
    """U-Net: residual blocks a level."""
    heads: int = 8
    """U-Net: attention heads."""
    norm_groups: int = 32
    """Groups of each group norm, of U-Net and autoencoder."""
    vae_widths: list[int] = field(default_factory=lambda: [128, 256, 512, 512])
    """Autoencoder: channels of each level; each but the first halves the picture."""
    vae_layers: int = 2
    """Autoencoder: residual blocks a level."""
    latent_channels: int = 4
    """Channels of the latents."""
    text_width: int = 768
    """Text encoder: width of the embeddings."""
    text_layers: int = 12
    """Text encoder: transformer layers."""
    text_heads: int = 12
    """Text encoder: attention heads."""
    vocabulary: int = 49408
    """Text encoder: rows of the token table."""


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

"""MoVQ, the autoencoder of Kandinsky's pipelines: random ones, from a described shape and a fixed seed."""

from dataclasses import dataclass

from diffusers import VQModel

from lightning_modules.parts.weights import made_here
from medsynth.errors import UserError
from medsynth.ranges import number, numbers

_GROUPS = 32  # of each norm in MoVQ's decoder, fixed in diffusers


@dataclass(frozen=True)
class MovqShape:
    """Shape of a random MoVQ. Defaults: Kandinsky 2.2's."""

    movq_widths: list[int] = numbers([128, 256, 256, 512], count=(2, None), least=1)
    """MoVQ: channels of each level, multiples of 32; each but the first halves the picture."""
    movq_layers: int = number(2, least=1)
    """MoVQ: residual blocks a level."""
    movq_codes: int = number(16384, least=1)
    """MoVQ: vectors of the codebook, through which a denoiser's latents do not go."""
    latent_channels: int = number(4, least=1)
    """MoVQ: channels of the latents."""

    def __post_init__(self):
        if any(width % _GROUPS for width in self.movq_widths):
            raise UserError(f"model.architecture.movq_widths={self.movq_widths}: must be multiples of {_GROUPS}")


def random_movq(shape: MovqShape) -> VQModel:
    """A MoVQ of that shape, the same weights each time."""
    plain = len(shape.movq_widths) - 1
    with made_here():
        return VQModel(
            latent_channels=shape.latent_channels,
            vq_embed_dim=shape.latent_channels,
            num_vq_embeddings=shape.movq_codes,
            block_out_channels=tuple(shape.movq_widths),
            layers_per_block=shape.movq_layers,
            norm_type="spatial",
            down_block_types=("DownEncoderBlock2D",) * plain + ("AttnDownEncoderBlock2D",),
            up_block_types=("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * plain,
        )

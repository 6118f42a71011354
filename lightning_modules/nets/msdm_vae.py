"""The autoencoders of MSDM: pictures to latents of 1/8 of the resolution and back, Gaussian or vector-quantised.

Convolutional, after Medfusion (Müller-Franzes et al. 2023), without attention.

Dimensions: B batch, C channels, H height, W width (of the picture), h and w (of the latent).
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_modules.nets.blocks import ResBlock, Upsample, check_divides, check_size, downsample, zero_init
from medsynth.errors import UserError


class Encoder(nn.Module):
    """Residual block, then at each further width a halving and a residual block."""

    def __init__(self, in_channels: int, widths: tuple[int, ...], norm_groups: int):
        super().__init__()
        layers = [ResBlock(in_channels, widths[0], norm_groups)]
        for narrow, wide in pairwise(widths):
            layers += [downsample(narrow, wide), ResBlock(wide, wide, norm_groups)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, in_channels, H, W) to (B, widths[-1], h, w)."""
        return self.layers(x_BCHW)


class Decoder(nn.Module):
    """Mirror of the encoder, with `deep_supervision` extra pictures at 1/2, 1/4, … of the resolution."""

    def __init__(
        self, latent_channels: int, out_channels: int, widths: tuple[int, ...], norm_groups: int, deep_supervision: int
    ):
        super().__init__()
        self.in_block = ResBlock(latent_channels, widths[-1], norm_groups)
        self.levels = nn.ModuleList(
            nn.Sequential(Upsample(widths[i + 1], widths[i]), ResBlock(widths[i], widths[i], norm_groups))
            for i in range(len(widths) - 2, -1, -1)
        )
        # Finest first: out_convs[i] reads the features of width widths[i], at 1/2^i of the resolution.
        self.out_convs = nn.ModuleList(
            zero_init(nn.Conv2d(width, out_channels, 1)) for width in widths[: deep_supervision + 1]
        )

    def forward(self, z_BChw: Tensor) -> list[Tensor]:
        """(B, latent_channels, h, w) to pictures (B, out_channels, H, W), (B, out_channels, H/2, W/2), …"""
        features = [self.in_block(z_BChw)]
        for level in self.levels:
            features.append(level(features[-1]))
        return [conv(h) for conv, h in zip(self.out_convs, reversed(features), strict=False)]


class _Autoencoder(nn.Module):
    """What both autoencoders share: the trunk and `decode`."""

    def __init__(
        self, in_channels: int, latent_channels: int, widths: tuple[int, ...], norm_groups: int, deep_supervision: int
    ):
        super().__init__()
        check_divides("norm_groups", norm_groups, widths)
        if not 0 <= deep_supervision < len(widths):
            raise UserError(f"deep_supervision={deep_supervision} must be from 0 to {len(widths) - 1}, see widths")
        self.downsampling_factor = 2 ** (len(widths) - 1)
        self.encoder = Encoder(in_channels, widths, norm_groups)
        self.decoder = Decoder(latent_channels, in_channels, widths, norm_groups, deep_supervision)

    def _features(self, x_BCHW: Tensor) -> Tensor:
        check_size(x_BCHW, self.downsampling_factor)
        return self.encoder(x_BCHW)

    def decode_all(self, z_BChw: Tensor) -> list[Tensor]:
        """The picture of `decode`, then the `deep_supervision` ones of H/2 × W/2, H/4 × W/4, …"""
        return self.decoder(z_BChw)

    def decode(self, z_BChw: Tensor) -> Tensor:
        """Latent (B, latent_channels, h, w) to picture (B, in_channels, H, W), about [-1, 1], not clamped."""
        return self.decode_all(z_BChw)[0]


class MSDMVAE(_Autoencoder):
    """Autoencoder with a Gaussian posterior.

    in_channels: channels of the picture.
    latent_channels: channels of the latent.
    widths: one width a resolution; the latent is 1/2^(len(widths)-1) of the picture, `downsampling_factor`.
    norm_groups: groups of every GroupNorm; divides every width.
    deep_supervision: number of extra pictures of lower resolution, less than len(widths).

    Raises UserError where these do not fit together.
    """

    def __init__(
        self,
        in_channels: int = 3,
        latent_channels: int = 8,
        widths: tuple[int, ...] = (64, 128, 256, 512),
        norm_groups: int = 8,
        deep_supervision: int = 1,
    ):
        super().__init__(in_channels, latent_channels, widths, norm_groups, deep_supervision)
        self.to_moments = nn.Sequential(
            nn.Conv2d(widths[-1], 2 * latent_channels, 3, padding=1),
            nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1),
        )

    def encode(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Picture (B, in_channels, H, W) in [-1, 1] to the posterior's mean and log-variance.

        Both are (B, latent_channels, h, w), the log-variance clamped to [-30, 20].
        Raises UserError unless H and W are multiples of `downsampling_factor`.
        """
        mean, logvar = self.to_moments(self._features(x_BCHW)).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)


class VectorQuantizer(nn.Module):
    """The nearest of `codes` learned vectors in place of each latent vector (van den Oord et al. 2017, section 3.2).

    codes: number of vectors. channels: their length. beta: weight of the commitment term.
    """

    def __init__(self, codes: int = 8192, channels: int = 4, beta: float = 1.0):
        super().__init__()
        self.beta = beta
        self.codebook = nn.Embedding(codes, channels)
        nn.init.uniform_(self.codebook.weight, -1 / codes, 1 / codes)

    def forward(self, z_BChw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z (B, channels, h, w) to its quantisation, the scalar float32 codebook loss and int64 indices (B, h, w).

        The quantisation passes its gradient straight to z; only the loss moves the codebook.
        """
        # Reduced precision would choose other codes.
        with torch.autocast(z_BChw.device.type, enabled=False):
            z_BhwC = z_BChw.permute(0, 2, 3, 1).float()
            indices_Bhw = self._nearest(z_BhwC.detach())
            q_BhwC = self.codebook(indices_Bhw).float()
            # Equation 3: codebook term + beta × commitment term.
            loss = F.mse_loss(q_BhwC, z_BhwC.detach()) + self.beta * F.mse_loss(z_BhwC, q_BhwC.detach())
            straight_through = z_BhwC + (q_BhwC - z_BhwC).detach()
        return straight_through.permute(0, 3, 1, 2).to(z_BChw.dtype), loss, indices_Bhw

    @torch.no_grad()
    def _nearest(self, z_BhwC: Tensor) -> Tensor:
        # argmin |z - e|² = argmin |e|² - 2 z·e: leaving out |z|² saves memory and keeps the digits that decide.
        codes = self.codebook.weight.float()
        scores = torch.addmm(codes.square().sum(dim=1), z_BhwC.flatten(0, 2), codes.T, alpha=-2)
        return scores.argmin(dim=1).view(z_BhwC.shape[:3])


class MSDMVQVAE(_Autoencoder):
    """Autoencoder with a vector-quantised latent. Diffusion runs on the latent before quantisation.

    codes, beta: see VectorQuantizer. The other arguments, and errors, are those of MSDMVAE.
    """

    def __init__(
        self,
        in_channels: int = 3,
        latent_channels: int = 4,
        widths: tuple[int, ...] = (64, 128, 256, 512),
        norm_groups: int = 8,
        deep_supervision: int = 1,
        codes: int = 8192,
        beta: float = 1.0,
    ):
        super().__init__(in_channels, latent_channels, widths, norm_groups, deep_supervision)
        self.to_latent = nn.Conv2d(widths[-1], latent_channels, 1)
        self.quantize = VectorQuantizer(codes, latent_channels, beta)

    def encode(self, x_BCHW: Tensor) -> Tensor:
        """Picture (B, in_channels, H, W) in [-1, 1] to the latent before quantisation (B, latent_channels, h, w).

        Raises UserError unless H and W are multiples of `downsampling_factor`.
        """
        return self.to_latent(self._features(x_BCHW))

    def decode_all(self, z_BChw: Tensor) -> list[Tensor]:
        """The same of an unquantised latent. Training, which quantises for the loss, calls `decoder` on the result."""
        return self.decoder(self.quantize(z_BChw)[0])

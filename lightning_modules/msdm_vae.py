"""MSDM, first stage: the autoencoder whose latents the second stage learns (MMCP at MEDVQA-GI 2024, section 4.2)."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchmetrics.functional.image import structural_similarity_index_measure as ssim

from datamodules.batches import Conditions, ImageBatch
from lightning_modules.base import GenerativeModule, Supports, to_image_range, to_model_range
from lightning_modules.maths.diffusion import SampleRandom
from lightning_modules.nets.msdm_vae import MSDMVAE, MSDMVQVAE
from lightning_modules.parts.optim import OptimConfig
from lightning_modules.parts.perceptual import PerceptualLoss, vgg_source
from lightning_modules.parts.pretrained import fill
from lightning_modules.parts.weights import RANDOM, Weights
from medsynth.errors import UserError
from medsynth.files import read_object
from medsynth.loading import one_line
from medsynth.ranges import choice, number, numbers


@dataclass(frozen=True)
class LatentCodecConfig:
    """The autoencoder's architecture."""

    quantised: bool = False
    """False: Gaussian latents. True: the VQ variant."""
    latent_channels: int = number(8, least=1)
    """Channels of the latent; the VQ variant uses 4."""
    widths: list[int] = numbers([64, 128, 256, 512], least=1)
    """Channels of each level; each but the first halves the resolution."""
    norm_groups: int = number(8, least=1)
    """Groups of each group norm."""
    deep_supervision: int = number(1, least=0)
    """Extra outputs at 1/2, 1/4 … of the resolution that also have to match the picture."""
    codes: int = number(8192, least=1)
    """Entries of the VQ variant's codebook."""
    beta: float = number(1.0, least=0)
    """Weight of the VQ variant's commitment to its codes."""


@dataclass(frozen=True)
class MSDMVAEConfig:
    """MSDM's first stage. Defaults: the authors' code, full size."""

    resolution: int = number(256, least=1)
    """Side of the square pictures, pixels."""
    codec: LatentCodecConfig = field(default_factory=LatentCodecConfig)
    """Architecture."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(name="adam", lr=1e-4, weight_decay=0.0))
    """Optimizer."""
    pixel_loss: str = choice("l2", ("l1", "l2"))
    """l2, or l1 as the VQ variant has it."""
    perceptual_weight: float = number(1.0, least=0)
    """Weight of LPIPS (VGG-16); 0 leaves it out and needs no weights."""
    perceptual_weights: str = "torchvision"
    """VGG-16 for LPIPS: torchvision's ImageNet weights, a local file of them, or "random"."""
    ssim_weight: float = number(1.0, least=0)
    """Weight of 1 - SSIM; 0 leaves it out."""
    kl_weight: float = number(1e-6, least=0)
    """Weight of the KL divergence summed over latents, against a reconstruction loss summed over pixels."""
    codebook_weight: float = number(1.0, least=0)
    """Weight of the VQ variant's codebook loss."""


class LatentCodec(nn.Module):
    """The autoencoder and the statistics of its latents: what the second stage needs of the first."""

    def __init__(self, config: LatentCodecConfig):
        super().__init__()
        self.config = config
        shared = {
            "latent_channels": config.latent_channels,
            "widths": tuple(config.widths),
            "norm_groups": config.norm_groups,
            "deep_supervision": config.deep_supervision,
        }
        quantiser = {"codes": config.codes, "beta": config.beta}
        self.net = MSDMVQVAE(**shared, **quantiser) if config.quantised else MSDMVAE(**shared)
        # Running mean and variance of each latent channel; its output is never used in training.
        self.statistics = nn.BatchNorm2d(config.latent_channels, affine=False, momentum=0.01)

    @property
    def factor(self) -> int:
        """Picture side over latent side."""
        return self.net.downsampling_factor

    def moments(self, x_BCHW: Tensor) -> Tensor:
        """Posterior mean and log-variance (B, 2C, h, w) of pictures in [-1, 1]; the VQ variant's variance is nil."""
        if isinstance(self.net, MSDMVQVAE):
            z = self.net.encode(x_BCHW)
            return torch.cat([z, torch.full_like(z, -30.0)], dim=1)
        return torch.cat(self.net.encode(x_BCHW), dim=1)

    def normalised(self, moments: Tensor, noise: Tensor) -> Tensor:
        """The posterior's sample, each channel brought to mean 0 and variance 1 over the data."""
        mean, log_variance = moments.chunk(2, dim=1)
        z = mean + (0.5 * log_variance).exp() * noise
        shift, scale = self._shift_and_scale()
        return (z - shift) / scale

    def decode_normalised(self, z_BChw: Tensor) -> Tensor:
        """Pictures in about [-1, 1] of latents as `normalised` gives them."""
        shift, scale = self._shift_and_scale()
        return self.net.decode(z_BChw * scale + shift)

    def drop_encoder(self) -> None:
        """Keep only what normalises and decodes."""
        for name in ("encoder", "to_latent" if self.config.quantised else "to_moments"):
            setattr(self.net, name, None)

    def save(self, directory: Path) -> None:
        """Write `config.json` and `diffusion_pytorch_model.safetensors`."""
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.json").write_text(json.dumps(asdict(self.config), indent=2) + "\n", encoding="utf-8")
        save_file(
            {k: v.contiguous() for k, v in self.state_dict().items()}, directory / "diffusion_pytorch_model.safetensors"
        )

    @classmethod
    def load(cls, directory: Path, key: str) -> "LatentCodec":
        """Read what `save` wrote; raises UserError that names `key` where it is absent or does not fit."""
        try:
            codec = cls(LatentCodecConfig(**read_object(directory / "config.json")))
            weights = directory / "diffusion_pytorch_model.safetensors"
            fill(codec, load_file(weights), key, weights)
        except UserError:
            raise
        except Exception as error:  # a config that makes no network fails in as many ways as there are layers
            reason = one_line(error)
            raise UserError(f"{key}: {directory} holds no autoencoder that msdm_vae exported: {reason}") from error
        return codec

    def _shift_and_scale(self) -> tuple[Tensor, Tensor]:
        shape = (1, -1, 1, 1)
        mean, variance = self.statistics.running_mean, self.statistics.running_var
        assert mean is not None and variance is not None, "the statistics are tracked"
        return mean.view(shape), variance.sqrt().view(shape)


class MSDMVAEModule(GenerativeModule):
    """Learns to encode and decode pictures.

    The objective is the authors', divided by the number of values of a picture, P = 3·H·W: the sum over the outputs of
    L2 + LPIPS + (1 - SSIM), each weighed by its share of P, + kl_weight · KL / P.
    """

    Config = MSDMVAEConfig
    supports = Supports(conditions=frozenset())

    def build(self) -> None:
        config: MSDMVAEConfig = self.config
        self.codec = LatentCodec(config.codec)
        self.perceptual = None
        if config.perceptual_weight:
            self.perceptual = PerceptualLoss(vgg_source(self.config.perceptual_weights))

    def required_weights(self) -> list[Weights]:
        source = vgg_source(self.config.perceptual_weights)
        needed = self.config.perceptual_weight and source != RANDOM
        return [Weights("model.perceptual_weights", source)] if needed else []

    def trainable_modules(self) -> dict[str, nn.Module]:
        return {"codec": self.codec}

    def sharded_networks(self) -> list[nn.Module]:
        """The autoencoder's parts: it is never called as a whole."""
        return [part for part in self.codec.net.children() if any(True for _ in part.parameters())]

    def losses(self, batch: ImageBatch) -> dict[str, Tensor]:
        x = to_model_range(batch.pictures())
        random = SampleRandom(batch.seeds, self.device)
        z, losses = self._encode(x, random)
        outputs = self.codec.net.decoder(z)
        terms = zip(*(self._reconstruction(y, x) for y in outputs), strict=True)
        losses |= dict(
            zip(
                ("pixel", "perceptual", "structural"), (sum(term, start=x.new_zeros(())) for term in terms), strict=True
            )
        )
        config: MSDMVAEConfig = self.config
        weights = {"pixel": 1.0, "perceptual": config.perceptual_weight, "structural": config.ssim_weight}
        weights |= {"kl": config.kl_weight, "codebook": config.codebook_weight}
        total = sum((weights[name] * value for name, value in losses.items()), start=x.new_zeros(()))
        with torch.no_grad():
            error_B = (to_image_range(outputs[0]) - batch.pictures()).square().flatten(1).mean(1)
            losses["psnr"] = (-10 * error_B.clamp_min(1e-10).log10()).mean()
        return losses | {"loss": total}

    @torch.no_grad()
    def sample(
        self, conditions: Conditions, seeds: list[int], *, steps: int | None = None, guidance: float | None = None
    ) -> Tensor:
        """Pictures decoded from independent normal latents: no generator, but a look at the latent space."""
        side = self.config.resolution // self.codec.factor
        z = SampleRandom(seeds, self.device).normal(self.config.codec.latent_channels, side, side)
        return to_image_range(self.codec.decode_normalised(z))

    @torch.no_grad()
    def preview(self, batch: ImageBatch, seeds: list[int]) -> tuple[Tensor, list[str]]:
        """Pictures, each followed by its reconstruction."""
        mean = self.codec.moments(to_model_range(batch.pictures())).chunk(2, dim=1)[0]
        pairs = torch.stack([batch.pictures(), to_image_range(self.codec.net.decode(mean))], dim=1)
        return pairs.flatten(0, 1), ["picture", "reconstruction"] * len(batch)

    def export(self, directory: Path) -> None:
        self.codec.save(directory / "vae")

    def _encode(self, x: Tensor, random: SampleRandom) -> tuple[Tensor, dict[str, Tensor]]:
        net = self.codec.net
        if isinstance(net, MSDMVQVAE):
            continuous = net.encode(x)
            z, codebook, _ = net.quantize(continuous)
            self._track(continuous)
            return z, {"codebook": codebook}
        mean, log_variance = net.encode(x)
        z = mean + (0.5 * log_variance).exp() * random.normal(*mean.shape[1:])
        self._track(z)
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)
        return z, {"kl": kl.sum() / x.numel()}

    @torch.no_grad()
    def _track(self, z: Tensor) -> None:
        """Take latents into the running statistics; not such as are not finite, which would never leave them again."""
        if not self.training:
            return
        statistics = [b for b in self.codec.statistics.buffers() if b.is_floating_point()]
        before, finite = [buffer.clone() for buffer in statistics], z.isfinite().all()
        self.codec.statistics(z.float())
        for buffer, old in zip(statistics, before, strict=True):
            buffer.copy_(torch.where(finite, buffer, old))

    def _reconstruction(self, y: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pixel loss, LPIPS and 1 - SSIM of one output against the picture at its resolution, times its share of P."""
        target = x if y.shape == x.shape else F.interpolate(x, size=y.shape[2:], mode="nearest-exact")
        pixel = F.l1_loss(y, target) if self.config.pixel_loss == "l1" else F.mse_loss(y, target)
        absent = y.new_zeros(())
        perceptual = absent if self.perceptual is None else self.perceptual(y, target)
        structural = _dissimilarity(y, target) if self.config.ssim_weight else absent
        share = y.numel() / x.numel()
        return share * pixel, share * perceptual, share * structural


def _dissimilarity(y_BCHW: Tensor, x_BCHW: Tensor) -> Tensor:
    """Mean 1 - SSIM of pictures in [-1, 1], each in [0, 1]."""
    similarity: Any = ssim(to_image_range(y_BCHW), to_image_range(x_BCHW), data_range=1.0, reduction="none")
    return 1 - similarity.clamp_min(0).mean()

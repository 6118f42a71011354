"""MSDM, second stage: text-conditioned diffusion in the latents of msdm_vae (MMCP at MEDVQA-GI 2024, section 4.2)."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Optional

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from datamodules.batches import ImageBatch
from lightning_modules.base import STRATEGIES, Supports, to_model_range
from lightning_modules.families.latent_diffusion import (
    Context,
    Denoised,
    LatentDiffusion,
    LatentDiffusionConfig,
    guided,
)
from lightning_modules.maths.diffusion import (
    PREDICTION_TYPES,
    SampleRandom,
    gaussian_kl,
    interpolated_log_variance,
    min_snr_weight,
    posterior_log_variance,
    posterior_mean,
    to_original,
    training_target,
)
from lightning_modules.msdm_vae import LatentCodec, LatentCodecConfig
from lightning_modules.nets.msdm_unet import MSDMUNet
from lightning_modules.parts.optim import OptimConfig
from lightning_modules.parts.text import TextEncoder, TextEncoderConfig, text_weights
from lightning_modules.parts.weights import RANDOM, Weights, made_here
from medsynth.errors import UserError
from medsynth.ranges import choice, number, numbers

_TEXT = "model.text_encoder.source"


@dataclass(frozen=True)
class UNetConfig:
    """MSDM's denoiser. Defaults: full size, 326 M weights."""

    widths: list[int] = numbers([256, 256, 512, 1024], count=(2, None), least=1)
    """Channels: of the input convolution, then of each level."""
    res_blocks: int = number(2, least=1)
    """Residual blocks a level, each followed by cross-attention and feed-forward."""
    heads: int = number(8, least=1)
    """Attention heads."""
    pool_head_dim: int = number(64, least=1)
    """Channels of each head that pools the text into the time embedding."""
    time_dim: int = number(1024, least=4)
    """Width of the time embedding and of the projected text."""
    norm_groups: int = number(32, least=1)
    """Groups of each group norm."""
    dropout: float = number(0.1, least=0, below=1)
    """Dropout in residual blocks and attention (paper, 5.1.4)."""


@dataclass(frozen=True)
class MSDMConfig(LatentDiffusionConfig):
    """MSDM's second stage. Defaults: the paper, and the authors' code where the paper is silent."""

    resolution: int = number(256, least=1)
    """Side of the square pictures, pixels."""
    vae: str = "runs/msdm_vae/export/vae"
    """Folder of the first stage's export; "random" makes an untrained one of `codec`."""
    codec: LatentCodecConfig = field(default_factory=LatentCodecConfig)
    """Architecture of a random first stage; a trained one brings its own."""
    text_encoder: TextEncoderConfig = field(default_factory=lambda: TextEncoderConfig(max_tokens=64))
    """CLIP ViT-L/14, prompts cut to 64 tokens."""
    unet: UNetConfig = field(default_factory=UNetConfig)
    """Architecture of the denoiser."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """AdamW with torch's defaults at 1e-4 (paper, 5.1.1)."""
    loss: str = choice("l1", ("l1", "l2"))
    """Distance of what the network predicts from its truth: l1 (the authors' code) or l2."""
    prediction: str = choice("epsilon", PREDICTION_TYPES)
    """What the network predicts: epsilon, the noise (paper); v_prediction, sqrt(alpha_bar) noise - sqrt(1 - alpha_bar)
    z_0, whose error counts as much in the steps of most noise, where a prompt decides; or sample, z_0 itself."""
    min_snr_gamma: Optional[float] = number(None, above=0)
    """Weigh each sample's loss by min(SNR, γ) / SNR (Hang et al. 2023), for l1 by its root; none weighs all alike.
    Below 1 it favours the steps of much noise, in which a prompt decides what there will be."""
    self_conditioning: float = number(0.5, least=0, most=1)
    """Share of samples that see the model's own first estimate of z_0; 0 builds the network without."""
    learned_variance: bool = False
    """Let the network also predict the reverse process's variance; then sample with ddpm."""
    deep_supervision: int = number(0, least=0)
    """Lower resolutions at which the network also predicts the noise."""

    def __post_init__(self):
        super().__post_init__()
        if self.noise.zero_terminal_snr and self.prediction == "epsilon":
            raise UserError(
                "model.noise.zero_terminal_snr: the last step is pure noise, of which epsilon says nothing; "
                "set model.prediction=v_prediction"
            )


class MSDM(LatentDiffusion):
    """A U-Net with text cross-attention that denoises the latents of a frozen autoencoder."""

    Config = MSDMConfig
    supports = Supports(frozenset({"captions"}), STRATEGIES, negatives=True)

    def build(self) -> None:
        config: MSDMConfig = self.config
        self.prediction = config.prediction
        self.codec = self._codec()
        if self.cached:
            self.codec.drop_encoder()  # sampling decodes, nothing encodes
        self.text_encoder = self.cached_text or TextEncoder(config.text_encoder)
        self.unet = MSDMUNet(
            in_channels=self.codec.config.latent_channels,
            widths=tuple(config.unet.widths),
            res_blocks=config.unet.res_blocks,
            heads=config.unet.heads,
            pool_head_dim=config.unet.pool_head_dim,
            time_dim=config.unet.time_dim,
            text_dim=config.text_encoder.width,
            norm_groups=config.unet.norm_groups,
            dropout=config.unet.dropout,
            self_conditioning=config.self_conditioning > 0,
            learned_variance=config.learned_variance,
            deep_supervision=config.deep_supervision,
        )

    def required_weights(self) -> list[Weights]:
        source = self.config.text_encoder.source
        return [] if source == RANDOM else [text_weights(_TEXT, source)]

    def read_weights(self) -> list[Weights]:
        first_stage = [] if self.config.vae == RANDOM else [Weights("model.vae", self.config.vae)]
        return super().read_weights() + first_stage

    def trainable_modules(self) -> dict[str, nn.Module]:
        return {"unet": self.unet}

    def encode_moments(self, images: Tensor) -> Tensor:
        return self.codec.moments(to_model_range(images))

    def normalise(self, moments: Tensor, noise: Tensor) -> Tensor:
        return self.codec.normalised(moments, noise)

    def decode(self, latents: Tensor) -> Tensor:
        return self.codec.decode_normalised(latents)

    def embed(self, captions: list[str]) -> Context:
        return Context(*(part.to(self.device) for part in self.text_encoder(captions)))

    def encoder_digest(self) -> str:
        digest = Weights("model.vae", self.config.vae).digest()
        return f"{digest} {self.config.codec}" if digest == RANDOM else digest

    def text_digest(self) -> str:
        return f"{text_weights(_TEXT, self.config.text_encoder.source).digest()} {self.config.text_encoder}"

    def latent_shape(self) -> tuple[int, int, int]:
        side = self.config.resolution // self.codec.factor
        return self.codec.config.latent_channels, side, side

    def latent_losses(self, z_0: Tensor, random: SampleRandom, batch: ImageBatch) -> dict[str, Tensor]:
        z_t, t, noise, _ = self.diffuse(z_0, random)
        context = self.context_of(batch)
        estimate = self._first_estimate(z_t, t, context, batch.seeds)
        output, coarse = self.unet(z_t, t, context.embeddings, context.mask, estimate)
        predicted, variance = self._split(output)
        # Halved at each lower resolution, summing to one.
        weights = torch.tensor([0.5**i for i in range(1 + len(coarse))])
        target = training_target(self.prediction, z_0, noise, t, self.alpha_bar)
        targets = [target, *(F.interpolate(target, size=c.shape[2:], mode="area") for c in coarse)]
        terms = [self._distance(p, target, t) for p, target in zip([predicted, *coarse], targets, strict=True)]
        shares = zip((weights / weights.sum()).tolist(), terms, strict=True)
        losses = {"noise": sum((w * term for w, term in shares), start=noise.new_zeros(()))}
        if variance is not None:
            losses["variance"] = self._variance_loss(predicted.detach(), variance, z_t, z_0, t)
        return losses | {"loss": sum(losses.values(), start=noise.new_zeros(()))}

    def denoise(
        self, z_t: Tensor, t: Tensor, context: Context, self_condition: Tensor | None, guidance: float
    ) -> Denoised:
        copies = 1 if guidance == 1 else 2
        condition = None
        if self.config.self_conditioning:
            condition = torch.zeros_like(z_t) if self_condition is None else self_condition
            condition = torch.cat([condition] * copies)
        output, _ = self.unet(
            torch.cat([z_t] * copies), torch.cat([t] * copies), context.embeddings, context.mask, condition
        )
        predicted, variance = self._split(output)
        predicted = guided(predicted, guidance)
        model_output = predicted
        if variance is not None and self.config.sampler.name == "ddpm":
            # The conditional rows' own, within what the interpolation means (Nichol & Dhariwal 2021, eq. 15).
            model_output = torch.cat([predicted, variance[-len(z_t) :].clamp(-1, 1)], dim=1)
        return Denoised(model_output, self._estimate(z_t, predicted, t))

    def scheduler_options(self) -> dict[str, Any]:
        learned = self.config.learned_variance and self.config.sampler.name == "ddpm"
        return super().scheduler_options() | ({"variance_type": "learned_range"} if learned else {})

    def export(self, directory: Path) -> None:
        self._codec().save(directory / "vae")
        TextEncoder(self.config.text_encoder).save_pretrained(directory)
        self.scheduler().save_pretrained(directory / "scheduler")
        unet = directory / "unet"
        unet.mkdir(parents=True, exist_ok=True)
        (unet / "config.json").write_text(json.dumps(asdict(self.config), indent=2) + "\n", encoding="utf-8")
        weights = {k: v.contiguous() for k, v in self.unet.state_dict().items()}
        save_file(weights, unet / "diffusion_pytorch_model.safetensors")

    def _codec(self) -> LatentCodec:
        if self.config.vae == RANDOM:
            with made_here():
                return LatentCodec(self.config.codec)
        folder = Path(self.config.vae)
        if not folder.is_dir():
            raise UserError(
                f"model.vae: there is no folder {folder}; train the first stage (configs/msdm_vae.yaml) and name its "
                "export, RUN/export/vae"
            )
        return LatentCodec.load(folder, "model.vae")

    def _distance(self, predicted: Tensor, target: Tensor, t: Tensor) -> Tensor:
        """Weighted mean distance of the prediction from its target (n, C, h, w) at the steps t (n,), a scalar."""
        distance = F.l1_loss if self.config.loss == "l1" else F.mse_loss
        gamma = self.config.min_snr_gamma
        if gamma is None:
            return distance(predicted, target)
        weight_B = min_snr_weight(self.prediction, t, self.alpha_bar, gamma)
        if self.config.loss == "l1":
            weight_B = weight_B.sqrt()
        return (weight_B * distance(predicted, target, reduction="none").flatten(1).mean(1)).mean()

    def _split(self, output: Tensor) -> tuple[Tensor, Tensor | None]:
        if not self.config.learned_variance:
            return output, None
        predicted, variance = output.chunk(2, dim=1)
        return predicted, variance

    def _first_estimate(self, z_t: Tensor, t: Tensor, context: Context, seeds: Tensor) -> Tensor | None:
        """The model's own z_0 for the chosen share of samples, zeros for the others (Chen et al. 2022, 3.2)."""
        share = self.config.self_conditioning
        if share == 0:
            return None
        estimate = torch.zeros_like(z_t)
        # The seeds are uniform in [0, 2^63): a sample's choice is its own, whatever its batch.
        chosen = (seeds.double() / 2**63 < share).nonzero().flatten().to(z_t.device)
        # Where the processes hold the weights in parts, all must run the network equally often: if need be in vain.
        asked = chosen if len(chosen) else chosen.new_zeros(1)
        with torch.no_grad():
            rows = Context(context.embeddings[asked], context.mask[asked])
            output, _ = self.unet(z_t[asked], t[asked], rows.embeddings, rows.mask, estimate[asked])
            predicted, _ = self._split(output)
            guess = self._estimate(z_t[asked], predicted, t[asked]).to(estimate.dtype)
        estimate[chosen] = guess[: len(chosen)]
        return estimate

    def _estimate(self, z_t: Tensor, predicted: Tensor, t: Tensor) -> Tensor:
        """z_0 for self-conditioning, held within 4 standard deviations: at large t any error in the noise explodes."""
        return to_original(self.prediction, predicted, z_t, t, self.alpha_bar).clamp(-4, 4)

    def _variance_loss(self, predicted: Tensor, variance: Tensor, z_t: Tensor, z_0: Tensor, t: Tensor) -> Tensor:
        """The variational bound's term at t, mean over dimensions, nats; it trains the variance only.

        Improved DDPM (Nichol & Dhariwal 2021, 3.1): T · 0.001 · L_t, which is L_t for T = 1000.
        """
        log_variance = interpolated_log_variance(variance, t, self.betas)
        original = to_original(self.prediction, predicted, z_t, t, self.alpha_bar)
        mean = posterior_mean(original, z_t, t, self.betas)
        true_mean = posterior_mean(z_0, z_t, t, self.betas)
        kl = (
            gaussian_kl(true_mean, posterior_log_variance(t, self.betas, z_t.ndim), mean, log_variance)
            .flatten(1)
            .mean(1)
        )
        likelihood = F.gaussian_nll_loss(mean, z_0, log_variance.exp(), full=True, reduction="none").flatten(1).mean(1)
        bound = torch.where(t == 0, likelihood, kl).mean()
        return bound * len(self.betas) / 1000

"""ControlNet on Stable Diffusion: pictures that follow edges, depth, masks and CLIP embeddings of another picture.

Zhang et al. 2023, "Adding conditional control to text-to-image diffusion models"; on chest X-rays Fang, "Conditional
diffusion model for X-ray segmentation data generation".
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel, MultiControlNetModel
from torch import Tensor, nn
from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

from datamodules.batches import CONTROL_CHANNELS, Conditions, ImageBatch
from lightning_modules.base import STRATEGIES, Supports, to_image_range
from lightning_modules.families.latent_diffusion import Context, Noised
from lightning_modules.families.stable_diffusion import Denoising, DenoisingConfig
from lightning_modules.maths.diffusion import SampleRandom, to_original
from lightning_modules.nets.patch_discriminator import PatchDiscriminator, adversarial_terms, smallest_side
from lightning_modules.parts.image_prompt import ImagePrompt, load_image_encoder
from lightning_modules.parts.perceptual import PerceptualLoss, vgg_source
from lightning_modules.parts.weights import RANDOM, Weights
from medsynth.errors import UserError
from medsynth.ranges import number, numbers

_ENCODER, _PERCEPTUAL = "model.image_encoder", "model.perceptual_weights"
_TERMS = ("adversarial", "feature_matching", "perceptual")


@dataclass(frozen=True)
class ControlNetConfig(DenoisingConfig):
    """What steers, and what the steering networks learn by."""

    controls: dict[str, float] = numbers({}, count=(0, None), least=0)
    """Weight of each control in data.controls, in that order: canny, depth, mask (each has a ControlNet, whose
    residuals are multiplied by it) and picture (tokens beside the text's, likewise); 0 leaves one out."""
    conditioning_widths: list[int] = numbers([16, 32, 96, 256], least=1)
    """Channels of the encoder that brings a control to the latents' size: as many as levels of the autoencoder."""
    image_encoder: str = "openai/clip-vit-large-patch14"
    """CLIP that embeds the control `picture`: hub id, local folder, or "random"."""
    picture_tokens: int = number(4, least=1)
    """Tokens that the embedding becomes."""
    adversarial_weight: float = number(0.0, least=0)
    """Weight of a patch discriminator's verdict on the predicted picture."""
    feature_matching_weight: float = number(0.0, least=0)
    """Weight of the difference to the real picture in the discriminator's features."""
    perceptual_weight: float = number(0.0, least=0)
    """Weight of LPIPS (VGG-16) between predicted and real picture."""
    perceptual_weights: str = "torchvision"
    """VGG-16 for LPIPS: torchvision's ImageNet weights, a local file of them, or "random"."""
    auxiliary_below: int = number(200, least=1)
    """Time steps below which these three terms see a sample. With more noise the best prediction is a mean of many
    pictures, a blur, which no model could help; at 200 of Stable Diffusion's 1000 signal to noise is 3."""
    discriminator_widths: list[int] = numbers([64, 128, 256, 512], count=(2, None), least=16)
    """Channels of the discriminator's layers."""

    def __post_init__(self):
        super().__post_init__()
        for name in self.controls:
            if name not in CONTROL_CHANNELS:
                raise UserError(f"model.controls: {name} is not one of {', '.join(CONTROL_CHANNELS)}")
        if not any(self.controls.values()):
            raise UserError(f"model.controls={self.controls}: give at least one a weight above 0")
        widths = self.discriminator_widths
        if any(width % 16 for width in widths):
            raise UserError(f"model.discriminator_widths={widths}: give multiples of 16")

    def term_weight(self, term: str) -> float:
        """Weight of the auxiliary term of that name."""
        return getattr(self, f"{term}_weight")

    @property
    def discriminates(self) -> bool:
        """Whether a term needs the discriminator."""
        return self.adversarial_weight > 0 or self.feature_matching_weight > 0

    @property
    def spatial(self) -> dict[str, float]:
        """The controls that have a ControlNet each, and their weights."""
        return {name: weight for name, weight in self.controls.items() if weight and name != "picture"}


class ControlNet(Denoising):
    """A frozen Stable Diffusion, steered by trained copies of its U-Net's encoder and by tokens of a picture.

    The auxiliary terms compare the decoded prediction of z_0 with the decoded z_0: both come from one decoder, so that
    they judge the prediction and not the autoencoder, and cached latents need no pictures. Discriminator and generator
    share one backward and one optimizer; `adversarial_terms` keeps their gradients apart.
    """

    Config = ControlNetConfig
    config: ControlNetConfig
    supports = Supports(frozenset({"captions", "control"}), STRATEGIES, negatives=True)

    def __init__(self, config: ControlNetConfig):
        super().__init__(config)
        if config.discriminates:  # `adversarial_terms` calls it with its weights detached, which must be whole for that
            self.supports = replace(self.supports, strategies=frozenset({"auto", "ddp", "deepspeed2"}))

    def build(self) -> None:
        super().build()
        config = self.config
        self._check_shapes()
        self.controlnet = MultiControlNetModel([self._copy() for _ in config.spatial]) if config.spatial else None
        self.image_prompt = None
        if config.controls.get("picture"):
            self.image_prompt = ImagePrompt(
                *self._image_encoder(),
                text_width=self.unet.config.cross_attention_dim,
                tokens=config.picture_tokens,
                weight=config.controls["picture"],
            )
        self.discriminator = PatchDiscriminator(tuple(config.discriminator_widths)) if config.discriminates else None
        self.perceptual = (
            PerceptualLoss(vgg_source(self.config.perceptual_weights)) if config.perceptual_weight else None
        )
        if config.gradient_checkpointing and self._judges_pictures():
            self.vae.enable_gradient_checkpointing()

    def setup(self, stage: str) -> None:
        """Raises UserError where the data set's controls are not the model's."""
        data, ours = self.datamodule, list(self.config.controls)
        theirs = ours if data is None else list(getattr(data.config, "controls", []))
        if ours != theirs:
            raise UserError(
                f"model.controls names {', '.join(ours)}, data.controls {', '.join(theirs) or 'nothing'}: give "
                "the same names in the same order (data.controls: ${oc.dict.keys:model.controls})"
            )
        super().setup(stage)

    def required_weights(self) -> list[Weights]:
        config, needed = self.config, super().required_weights()
        if config.controls.get("picture") and config.image_encoder != RANDOM:
            needed.append(Weights(_ENCODER, config.image_encoder))
        if config.perceptual_weight and config.perceptual_weights != RANDOM:
            needed.append(Weights(_PERCEPTUAL, vgg_source(self.config.perceptual_weights)))
        return needed

    def trainable_modules(self) -> dict[str, nn.Module]:
        networks = {name: getattr(self, name) for name in ("controlnet", "image_prompt", "discriminator")}
        return {name: network for name, network in networks.items() if network is not None}

    def steered_by(self) -> list[str]:
        return [name for name, weight in self.config.controls.items() if weight]

    def compile(self, *args: Any, **kwargs: Any) -> None:
        super().compile(*args, **kwargs)
        self.unet.compile(*args, **kwargs)  # frozen, but run and differentiated at each step

    def steer(self, text: Context, conditions: Conditions) -> Context:
        control = self._checked(conditions.control)
        context = text._replace(control=control)
        if self.image_prompt is None:
            return context
        tokens = self.image_prompt(self._split(control)["picture"])
        real = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        return context._replace(
            embeddings=torch.cat([text.embeddings, tokens], dim=1), mask=torch.cat([text.mask, real], dim=1)
        )

    def predict(self, z_t: Tensor, t: Tensor, context: Context) -> Tensor:
        residuals = {}
        if self.controlnet is not None:
            controls, spatial = self._split(context.control), self.config.spatial
            down, middle = self.controlnet(
                z_t, t, context.embeddings, [_rgb(controls[name]) for name in spatial], list(spatial.values()),
                return_dict=False,
            )  # fmt: skip
            residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        return self.unet(z_t, t, encoder_hidden_states=context.embeddings, **residuals).sample

    def output_losses(self, output: Tensor, noised: Noised, batch: ImageBatch) -> dict[str, Tensor]:
        losses = super().output_losses(output, noised, batch)
        if not self._judges_pictures():
            return losses
        terms = self._picture_terms(output, noised)
        weighted = [self.config.term_weight(name) * terms[name] for name in _TERMS if name in terms]
        total = sum(weighted, losses["loss"]) + terms.get("discriminator", 0)
        return {"denoising": losses["loss"], **terms, "loss": total}

    def preview(self, batch: ImageBatch, seeds: list[int]) -> tuple[Tensor, list[str]]:
        """Real picture, spatial controls and generated picture side by side, (n, 3, H, (2 + controls) · W)."""
        real = batch.images
        if real is None:
            real = to_image_range(self.decode(self.latents(batch, SampleRandom(batch.seeds, self.device))))
        controls = self._split(self._checked(batch.conditions.control))
        shown = [_rgb(controls[name]) for name in self.config.spatial]
        rows = torch.cat([real, *shown, self.sample(batch.conditions, seeds)], dim=3)
        title = " | ".join(["real", *self.config.spatial, "generated"])
        return rows, [f"{title}: {caption}" for caption in batch.conditions.captions or [""] * len(batch)]

    def export(self, directory: Path) -> None:
        """Write what diffusers adds to the untouched pipeline.

        `controlnet/<name>/` for `ControlNetModel.from_pretrained`; `image_prompt/` for `ImagePrompt.from_pretrained`;
        `scheduler/`. A discriminator draws nothing and stays in the checkpoint.
        """
        networks = [] if self.controlnet is None else self.controlnet.nets
        for name, network in zip(self.config.spatial, networks, strict=True):
            network.save_pretrained(directory / "controlnet" / name)
        if self.image_prompt is not None:
            self.image_prompt.save_pretrained(directory / "image_prompt", *self._image_encoder())
        self.scheduler().save_pretrained(directory / "scheduler")

    # Within

    def _copy(self) -> ControlNetModel:
        """The U-Net's encoder as it is now, joined by convolutions that are zero: at first it changes nothing."""
        copy = ControlNetModel.from_unet(
            self.unet, conditioning_embedding_out_channels=tuple(self.config.conditioning_widths)
        )
        if self.config.gradient_checkpointing:
            copy.enable_gradient_checkpointing()
        return copy

    def _checked(self, control: Tensor | None) -> Tensor:
        """The control on the model's device; raises UserError where it is missing or of another shape."""
        side, names = self.config.resolution, list(self.config.controls)
        due = (sum(CONTROL_CHANNELS[name] for name in names), side, side)
        if control is None or control.shape[1:] != due:
            given = "none" if control is None else f"one of shape {tuple(control.shape[1:])}"
            raise UserError(
                f"this model draws for a control of shape {due} ({', '.join(names)}), and was given {given}"
            )
        return control.to(self.device)

    def _split(self, control: Tensor | None) -> dict[str, Tensor]:
        """Each control by its name, (n, 1 or 3, R, R)."""
        assert control is not None, "`steer` has checked it"
        names = list(self.config.controls)
        return dict(zip(names, control.split([CONTROL_CHANNELS[name] for name in names], dim=1), strict=True))

    def _judges_pictures(self) -> bool:
        return self.discriminator is not None or self.perceptual is not None

    def _picture_terms(self, output: Tensor, noised: Noised) -> dict[str, Tensor]:
        """Auxiliary terms, as a mean over all samples: those with more noise count as 0 and are not decoded.

        Where no sample has so little noise, those with the least are decoded and counted 0 times, so that in each
        process every network takes part in the backward pass.
        """
        limit = self.config.auxiliary_below
        rows = noised.t < noised.t.min().clamp(min=limit - 1) + 1
        share = (noised.t < limit).float().mean()
        z_t, t, _, z_0 = (values[rows] for values in noised)
        fake = self.decode(to_original(self.prediction, output[rows], z_t, t, self.alpha_bar)).float()
        with torch.no_grad():
            real = self.decode(z_0).float()
        terms = {}
        if self.discriminator is not None:
            terms |= adversarial_terms(self.discriminator, fake, real)
        if self.perceptual is not None:
            terms["perceptual"] = self.perceptual(fake, real)
        return {name: share * term for name, term in terms.items()}

    def _check_shapes(self) -> None:
        config, levels = self.config, len(self.vae.config.block_out_channels)
        if len(config.conditioning_widths) != levels:
            raise UserError(
                f"model.conditioning_widths={config.conditioning_widths}: this autoencoder has {levels} levels, "
                f"give {levels} widths"
            )
        least = smallest_side(config.discriminator_widths)
        if config.discriminates and config.resolution < least:
            raise UserError(f"model.resolution={config.resolution}: this discriminator needs at least {least} pixels")

    def _image_encoder(self) -> tuple[CLIPVisionModelWithProjection, CLIPImageProcessor]:
        return load_image_encoder(self.config.image_encoder, _ENCODER)


def _rgb(control: Tensor) -> Tensor:
    """Three equal channels: what published ControlNets take."""
    return control.expand(-1, 3, -1, -1)

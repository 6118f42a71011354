"""What all methods on Kandinsky share: which network learns, what is exported of it, and the latents of MoVQ."""

import inspect
import json
import math
from abc import abstractmethod
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Optional

import torch
from diffusers.models import VQModel
from torch import Tensor, nn

from lightning_modules.base import STRATEGIES, Supports, to_model_range
from lightning_modules.families.latent_diffusion import SAMPLERS, LatentDiffusion, LatentDiffusionConfig
from lightning_modules.maths.diffusion import min_snr_weight
from lightning_modules.parts.adapters import AdapterConfig, attach, merged
from lightning_modules.parts.kandinsky_folder import KandinskyFolder
from lightning_modules.parts.movq import random_movq
from lightning_modules.parts.optim import OptimConfig
from lightning_modules.parts.weights import RANDOM, Weights
from medsynth.errors import UserError
from medsynth.ranges import number

KEY = "model.pretrained"


@dataclass(frozen=True)
class KandinskyConfig(LatentDiffusionConfig):
    """What all are configured by. Defaults: the paper (MMCP at MEDVQA-GI 2024), and the authors' code."""

    which: ClassVar[str]
    """Name of the published model."""

    resolution: int = number(256, least=1)
    """Side of the square pictures, pixels."""
    min_snr_gamma: Optional[float] = number(5.0, above=0, optional=True)
    """Clip the loss weight at this signal-to-noise ratio (Hang et al. 2023); null weighs all steps alike."""
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    """Low-rank update of the network that learns; with rank 0 it learns whole."""
    export_merged: bool = False
    """Beside the weights of an adapter also export the whole pipeline with the update added, as `merged/`."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """AdamW at 1e-4."""

    def __post_init__(self):
        super().__post_init__()
        if self.noise.zero_terminal_snr:
            raise UserError(f"model.noise.zero_terminal_snr: {self.which} was trained without; leave the key out")


class Kandinsky(LatentDiffusion):
    """One network of a pipeline. It learns where `key` is `KEY`, and is frozen where it draws for another."""

    config: Any  # a KandinskyConfig with the fields `pretrained` and `architecture`
    supports = Supports(frozenset({"captions"}), STRATEGIES)
    part: ClassVar[str]
    """The network that learns, by its name in the pipeline and here."""
    Folder: ClassVar[type[KandinskyFolder]]

    def __init__(self, config: Any, key: str = KEY):
        """key: the config key that names the pipeline's folder."""
        super().__init__(config)
        self.key = key
        self.source: str = config.pretrained
        """Hub id or folder of the pipeline, or "random"."""

    @abstractmethod
    def load_part(self) -> nn.Module:
        """The network that learns as it was before training, float32."""

    @abstractmethod
    def export_pipeline(self, directory: Path, network: nn.Module) -> None:
        """Write a folder that diffusers' pipeline reads, with `network` for the one that learned; the others are loaded
        anew, since here they may be in half precision or gone."""

    @abstractmethod
    def export_update(self, directory: Path) -> None:
        """Write the weights of the low-rank update, as a public library reads them."""

    def adapt(self) -> None:
        """Put the update beside the layers of the network that learns, where one is asked for."""
        if self.config.adapter.rank:
            attach(self.network, self.config.adapter, "model.adapter")

    @property
    def network(self) -> nn.Module:
        """The network that learns."""
        return getattr(self, self.part)

    def trainable_modules(self) -> dict[str, nn.Module]:
        return {self.part: self.network}

    def required_weights(self) -> list[Weights]:
        return [] if self.is_random else [self.weights]

    def weighted(self, output: Tensor, target: Tensor, t: Tensor) -> Tensor:
        """Mean squared error of (n, C, …), each row weighed by the signal-to-noise ratio at its step t (n,)."""
        error_B = (output - target).square().flatten(1).mean(1)
        if self.config.min_snr_gamma is not None:
            error_B = error_B * min_snr_weight(self.prediction, t, self.alpha_bar, self.config.min_snr_gamma)
        return error_B.mean()

    def export(self, directory: Path) -> None:
        """Write an update with the scheduler that draws as here, or the pipeline of a network that learned whole."""
        config = self.config.adapter
        if not config.rank:
            self._export_whole(directory, self.network)
            return
        self.pipeline_scheduler().save_pretrained(directory / "scheduler")
        self.export_update(directory)
        if self.config.export_merged:
            self._export_whole(directory / "merged", merged(self.load_part(), self.network, config))

    def _export_whole(self, directory: Path, network: nn.Module) -> None:
        self.export_pipeline(directory, network)
        if not self.is_random:
            for part in set(self.Folder.parts) - {self.part, "scheduler"}:
                self.folder.copy(part, directory)

    def pipeline_scheduler(self) -> Any:
        """The scheduler with which the pipeline draws as here."""
        return self.scheduler()

    def clipping(self) -> dict[str, Any]:
        """How an estimated z_0 is held within bounds, as the folder's scheduler says it."""
        return {} if self.is_random else self.folder.clipping

    def check_folder(self) -> None:
        """Raise UserError unless the folder is of this pipeline, and its noise the configured one."""
        if self.is_random:
            return
        folder = self.folder
        folder.check()
        if self.key == KEY:
            self.config.noise.require_learned(folder.scheduler, f"{KEY}: {folder.path}")
        elif not self.config.noise.leaves(folder.scheduler.alphas_cumprod):
            raise folder.fault("scheduler", f"adds other noise than {self.config.which}")

    def described(self, digest: str) -> str:
        """A digest of weights, with the shape where they are random ones."""
        return f"{digest} {json.dumps(asdict(self.config.architecture), sort_keys=True)}" if self.is_random else digest

    @property
    def is_random(self) -> bool:
        return self.source == RANDOM

    @property
    def weights(self) -> Weights:
        return Weights(self.key, self.source, self.Folder.parts)

    @cached_property
    def folder(self) -> Any:
        return self.Folder(self.weights)


class MovqLatents(Kandinsky):
    """A U-Net in MoVQ's own latents (n, C, H/f, W/f), before its codebook and not scaled, whatever its config's
    `scaling_factor` says."""

    part = "unet"
    movq: VQModel

    def take_movq(self) -> None:
        """Load MoVQ; where latents are cached, what decodes alone."""
        self.movq = self.load_movq(self.frozen_dtype)
        if self.cached:
            self.movq.encoder = self.movq.quant_conv = None  # sampling decodes, nothing encodes

    def load_movq(self, dtype: torch.dtype = torch.float32) -> VQModel:
        """MoVQ, frozen."""
        return random_movq(self.config.architecture).type(dtype) if self.is_random else self.folder.load("movq", dtype)

    def encode_moments(self, images: Tensor) -> Tensor:
        mean = self.movq.encode(to_model_range(images).to(self.movq.dtype)).latents.float()
        return torch.cat([mean, torch.full_like(mean, -torch.inf)], dim=1)  # an encoder without spread

    def normalise(self, moments: Tensor, noise: Tensor) -> Tensor:
        return moments.chunk(2, dim=1)[0]

    def decode(self, latents: Tensor) -> Tensor:
        return self.movq.decode(latents.to(self.movq.dtype), force_not_quantize=True).sample

    def encoder_digest(self) -> str:
        return self.described(self.weights.digest("movq"))

    def latent_shape(self) -> tuple[int, ...]:
        side = self.config.resolution // self.factor
        return self.movq.config.latent_channels, side, side

    def scheduler_options(self) -> dict[str, Any]:
        taken = inspect.signature(SAMPLERS[self.config.sampler.name].__init__).parameters
        return super().scheduler_options() | {key: value for key, value in self.clipping().items() if key in taken}

    @property
    def factor(self) -> int:
        """Pixels of a latent's side."""
        return 2 ** (len(self._widths("movq")) - 1)

    def check_resolution(self, multiple: int) -> None:
        """Raise UserError unless the U-Net can halve the latents' side, and it is a multiple of `multiple`, as
        diffusers' pipeline makes it."""
        factor = self.factor * math.lcm(2 ** (len(self._widths("unet")) - 1), multiple)
        side = self.config.resolution
        if side < factor or side % factor:
            near = max(factor, round(side / factor) * factor)
            raise UserError(f"model.resolution={side}: must be a multiple of {factor}, for instance {near}")

    def _widths(self, part: str) -> list[int]:
        """Channels of each level of a network."""
        if self.is_random:
            return getattr(self.config.architecture, f"{part}_widths")
        return self.folder.config(part)["block_out_channels"]

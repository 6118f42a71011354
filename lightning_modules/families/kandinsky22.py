"""What both stages of Kandinsky 2.2 share: where their networks come from, how one learns, and what is exported.

The prior draws the embedding of a picture for a text, the decoder a picture for an embedding.
"""

import json
from abc import abstractmethod
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Optional

from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_modules.base import STRATEGIES, Supports
from lightning_modules.families.latent_diffusion import LatentDiffusion, LatentDiffusionConfig, SamplerConfig
from lightning_modules.maths.diffusion import min_snr_weight
from lightning_modules.parts.adapters import AdapterConfig, adapter_metadata, adapter_state, attach, merged
from lightning_modules.parts.kandinsky22_folder import ADAPTER_FILE, Kandinsky22Folder
from lightning_modules.parts.kandinsky22_shape import Kandinsky22Shape
from lightning_modules.parts.optim import OptimConfig
from lightning_modules.parts.weights import RANDOM, Weights
from medsynth.errors import UserError
from medsynth.ranges import number

KEY = "model.pretrained"


def paper_sampler() -> SamplerConfig:
    """150 steps and guidance 3.5, of either stage."""
    return SamplerConfig(name="ddpm", steps=150, guidance=3.5)


@dataclass(frozen=True)
class Kandinsky22Config(LatentDiffusionConfig):
    """What both stages are configured by. Defaults: the paper (MMCP at MEDVQA-GI 2024), and the authors' code."""

    architecture: Kandinsky22Shape = field(default_factory=Kandinsky22Shape)
    """Shape of random networks."""
    resolution: int = number(256, least=1)
    """Side of the square pictures, pixels."""
    min_snr_gamma: Optional[float] = number(5.0, above=0, optional=True)
    """Clip the loss weight at this signal-to-noise ratio (Hang et al. 2023); null weighs all steps alike."""
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    """Low-rank update of the network that learns; with rank 0 it learns whole."""
    export_merged: bool = False
    """Beside the weights of an adapter also export the whole pipeline with the update added, as `merged/`: what the
    other stage is given."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """AdamW at 1e-4."""

    def __post_init__(self):
        super().__post_init__()
        if self.noise.zero_terminal_snr:
            raise UserError("model.noise.zero_terminal_snr: Kandinsky 2.2 was trained without; leave the key out")


class Kandinsky22(LatentDiffusion):
    """One stage. It learns where it stands alone (`key` is `KEY`), and is frozen where it draws for the other one."""

    config: Kandinsky22Config
    supports = Supports(frozenset({"captions"}), STRATEGIES)
    part: ClassVar[str]
    """The network that learns, by its name in the pipeline and here."""
    Folder: ClassVar[type[Kandinsky22Folder]]

    nothing: Tensor
    """What a decoder is told of no picture, (1, D), as the prior's image encoder gives it."""

    def __init__(self, config: Any, key: str = KEY):
        """key: the config key that names the stage's folder."""
        super().__init__(config)
        self.key = key
        self.source: str = config.pretrained
        """Hub id or folder of the stage's pipeline, or "random"."""
        self.register_buffer("nothing", None, persistent=False)

    @property
    def width(self) -> int:
        """Of the embeddings of pictures."""
        return self.config.architecture.width if self.is_random else self.folder.width

    @abstractmethod
    def load_part(self) -> nn.Module:
        """The network that learns as it was before training, float32."""

    @abstractmethod
    def export_pipeline(self, directory: Path, network: nn.Module) -> None:
        """Write a folder that diffusers' pipeline of the stage reads, with `network` for the one that learned; the
        others are loaded anew, since here they may be in half precision or gone."""

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
        """Write an update as `pytorch_lora_weights.safetensors`, for diffusers' `load_lora_adapter`, with the scheduler
        that draws as here; a network that learned whole in its pipeline's folder."""
        config = self.config.adapter
        if not config.rank:
            self._export_whole(directory, self.network)
            return
        self.pipeline_scheduler().save_pretrained(directory / "scheduler")
        # The loader takes rank, alpha and kind from here, and without it alpha for the rank.
        described = {"format": "pt", "lora_adapter_metadata": json.dumps(adapter_metadata(config), sort_keys=True)}
        save_file(adapter_state(self.network), directory / ADAPTER_FILE, described)
        if self.config.export_merged:
            self._export_whole(directory / "merged", merged(self.load_part(), self.network, config))

    def _export_whole(self, directory: Path, network: nn.Module) -> None:
        self.export_pipeline(directory, network)
        if not self.is_random:
            for part in set(self.Folder.parts) - {self.part, "scheduler"}:
                self.folder.copy(part, directory)

    def pipeline_scheduler(self) -> Any:
        """The scheduler with which the stage's pipeline draws as here."""
        return self.scheduler()

    def clipping(self) -> dict[str, Any]:
        """How an estimated z_0 is held within bounds, as the folder's scheduler says it."""
        return {} if self.is_random else self.folder.clipping

    def check_folder(self) -> None:
        """Raise UserError unless the folder is this stage's, and its noise the configured one."""
        if self.is_random:
            return
        folder = self.folder
        folder.check()
        if self.key == KEY:
            self.config.noise.require_learned(folder.scheduler, f"{KEY}: {folder.path}")
        elif not self.config.noise.leaves(folder.scheduler.alphas_cumprod):
            raise folder.fault("scheduler", "adds other noise than Kandinsky 2.2")

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

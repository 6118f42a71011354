"""What both stages of Kandinsky 2.2 share: where their networks come from, how one learns, and what is exported.

The prior draws the embedding of a picture for a text, the decoder a picture for an embedding.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from lightning_modules.families.kandinsky import KEY, Kandinsky, KandinskyConfig
from lightning_modules.families.latent_diffusion import SamplerConfig
from lightning_modules.parts.adapters import save_for_diffusers
from lightning_modules.parts.kandinsky22_folder import Kandinsky22Folder
from lightning_modules.parts.kandinsky22_shape import Kandinsky22Shape


def paper_sampler() -> SamplerConfig:
    """150 steps and guidance 3.5, of either stage."""
    return SamplerConfig(name="ddpm", steps=150, guidance=3.5)


@dataclass(frozen=True)
class Kandinsky22Config(KandinskyConfig):
    """What both stages are configured by; `merged/` is what the other stage is given."""

    which = "Kandinsky 2.2"
    architecture: Kandinsky22Shape = field(default_factory=Kandinsky22Shape)
    """Shape of random networks."""


class Kandinsky22(Kandinsky):
    """One stage. It learns where it stands alone, and is frozen where it draws for the other one."""

    config: Kandinsky22Config
    Folder: ClassVar[type[Kandinsky22Folder]]

    nothing: Tensor
    """What a decoder is told of no picture, (1, D), as the prior's image encoder gives it."""

    def __init__(self, config: Any, key: str = KEY):
        super().__init__(config, key)
        self.register_buffer("nothing", None, persistent=False)

    @property
    def width(self) -> int:
        """Of the embeddings of pictures."""
        return self.config.architecture.width if self.is_random else self.folder.width

    def export_update(self, directory: Path) -> None:
        """Write it for diffusers' `load_lora_adapter`."""
        save_for_diffusers(self.network, self.config.adapter, directory)

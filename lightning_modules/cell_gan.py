"""Cell GAN (Berezsky et al. 2024, section 5): a conditional GAN of cells with self-attention, under the hinge loss."""

from dataclasses import dataclass, field, fields
from typing import Any, Optional

from torch import Tensor, nn

from lightning_modules.base import Supports
from lightning_modules.families.adversarial import Adversarial, AdversarialConfig
from lightning_modules.maths.adversarial import hinge_discriminator, raise_scores
from lightning_modules.nets.cell_gan import Discriminator, Generator, check_resolution
from lightning_modules.nets.cells import CELL_D, CELL_G
from lightning_modules.parts.optim import OptimConfig
from medsynth.ranges import number, numbers


@dataclass(frozen=True)
class GeneratorConfig:
    """Table 1."""

    widths: list[int] = numbers([1024, 1024, 512, 256, 128], count=(2, None), least=1)
    """Channels of the maps of 4×4, 8×8, …, up to the picture's size."""
    attention: list[int] = numbers([16, 32], count=(0, None), least=1)
    """Sides of the maps with self-attention, pixels; not the picture's."""
    cell: list[str] = field(default_factory=lambda: list(CELL_G))
    """Nodes of each cell, a line of text a node (`lightning_modules/nets/cells.py`)."""


@dataclass(frozen=True)
class DiscriminatorConfig:
    """Table 3."""

    widths: list[int] = numbers([64, 128, 256, 512, 1024], count=(2, None), least=1)
    """Channels of the maps of the picture's size, half of it, …, down to 4×4."""
    attention: list[int] = numbers([64, 32], count=(0, None), least=1)
    """Sides of the maps with self-attention, pixels; not 4."""
    cell: list[str] = field(default_factory=lambda: list(CELL_D))
    """Nodes of each cell, a line of text a node (`lightning_modules/nets/cells.py`)."""


@dataclass(frozen=True)
class CellGANConfig(AdversarialConfig):
    """Networks of the cell GAN, and how they learn."""

    latent: int = 128
    classes: int = number(4, least=1)
    """Classes of the data set."""
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    """The generator's shape."""
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    """The discriminator's shape."""
    discriminator_lr: Optional[float] = 4e-4
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(name="adam", lr=1e-4, betas=[0.5, 0.999], weight_decay=0.0)
    )
    """Optimizer of both players, each of which has its own."""


class CellGAN(Adversarial):
    """Draws for classes; the discriminator judges a picture as one of its class."""

    Config = CellGANConfig
    config: CellGANConfig
    supports = Supports(frozenset({"labels"}))

    def build(self) -> None:
        for shape in (self.config.generator, self.config.discriminator):
            check_resolution(self.config.resolution, shape.widths)
        super().build()

    def make_generator(self) -> nn.Module:
        return Generator(self.config.classes, **_shape(self.config.generator), latent=self.config.latent)

    def make_discriminator(self) -> nn.Module:
        return Discriminator(self.config.classes, **_shape(self.config.discriminator))

    def discriminator_loss(self, real_B: Tensor, fake_B: Tensor) -> Tensor:
        return hinge_discriminator(real_B, fake_B)

    def generator_loss(self, fake_B: Tensor) -> Tensor:
        return raise_scores(fake_B)


def _shape(config: GeneratorConfig | DiscriminatorConfig) -> dict[str, Any]:
    return {each.name: getattr(config, each.name) for each in fields(config)}

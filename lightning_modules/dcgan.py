"""DCGAN (Radford et al. 2016): convolutional players, cross-entropy, the non-saturating generator."""

from dataclasses import dataclass, field

from torch import Tensor

from lightning_modules.families.convolutional import Convolutional, ConvolutionalConfig
from lightning_modules.maths.adversarial import cross_entropy_discriminator, non_saturating_generator
from lightning_modules.parts.optim import OptimConfig


@dataclass(frozen=True)
class DCGANConfig(ConvolutionalConfig):
    """Networks of DCGAN, and how they learn."""

    noise: str = "uniform"
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(name="adam", lr=2e-4, betas=[0.5, 0.999], weight_decay=0.0)
    )
    """Optimizer of both players, each of which has its own."""


class DCGAN(Convolutional):
    """The losses of Goodfellow et al. 2014."""

    Config = DCGANConfig

    def discriminator_loss(self, real_B: Tensor, fake_B: Tensor) -> Tensor:
        return cross_entropy_discriminator(real_B, fake_B)

    def generator_loss(self, fake_B: Tensor) -> Tensor:
        return non_saturating_generator(fake_B)

"""Adversarial methods whose networks are DCGAN's."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_modules.families.adversarial import Adversarial, AdversarialConfig
from lightning_modules.nets.dcgan import DCGANDiscriminator, DCGANGenerator
from medsynth.ranges import number


@dataclass(frozen=True)
class ConvolutionalConfig(AdversarialConfig):
    """The networks' shape."""

    width: int = number(128, least=1)
    """Channels of the largest maps, of both networks; each halving of the side doubles them."""
    kernel: int = number(5, least=4, most=5)
    """Side of the convolutions: 5, as the code of DCGAN's authors has it, or 4, as later ones do."""


class Convolutional(Adversarial):
    """What a method adds are the losses."""

    Config = ConvolutionalConfig
    config: Any

    def make_generator(self) -> nn.Module:
        config = self.config
        return DCGANGenerator(config.latent, config.width, config.resolution, config.kernel)

    def make_discriminator(self) -> nn.Module:
        return DCGANDiscriminator(self.config.width, self.config.resolution, self.config.kernel)

"""WGAN (Arjovsky et al. 2017): a critic whose clipped weights keep it Lipschitz estimates the Wasserstein distance."""

from dataclasses import dataclass, field

from torch import Tensor

from lightning_modules.families.convolutional import Convolutional, ConvolutionalConfig
from lightning_modules.maths.adversarial import Turns, clip_weights, raise_scores, wasserstein_critic
from lightning_modules.maths.diffusion import SampleRandom
from lightning_modules.parts.optim import OptimConfig
from medsynth.ranges import number


@dataclass(frozen=True)
class WGANConfig(ConvolutionalConfig):
    """Networks of WGAN, and how they learn."""

    width: int = 64
    kernel: int = 4
    clip: float = number(0.01, above=0)
    """The critic's weights stay within ± this."""
    discriminator_steps: int = 5
    longer_steps: int = number(100, least=1)
    """Steps of the critic in the place of `discriminator_steps`, where it is to be near its best."""
    longer_first: int = number(25, least=0)
    """How many of the generator's first steps follow so many."""
    longer_every: int = number(500, least=0)
    """And of the later ones each so many-th; 0 for none."""
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(name="rmsprop", lr=5e-5, betas=[0.0, 0.99], weight_decay=0.0)
    )
    """Optimizer of both players, each of which has its own."""


class WGAN(Convolutional):
    """Its critic's scores have no scale: on which side of 0 they are says nothing."""

    Config = WGANConfig
    gives_logits = False

    def turns(self) -> Turns:
        config = self.config
        return Turns(config.discriminator_steps, config.longer_steps, config.longer_first, config.longer_every)

    def discriminator_terms(
        self, real: Tensor, fake: Tensor, labels: Tensor | None, random: SampleRandom
    ) -> dict[str, Tensor]:
        loss = wasserstein_critic(self.judge(real, labels), self.judge(fake, labels))
        return {"discriminator": loss, "distance": -loss.detach()}

    def generator_loss(self, fake_B: Tensor) -> Tensor:
        return raise_scores(fake_B)

    def bound(self) -> None:
        clip_weights(self.discriminator.parameters(), self.config.clip)

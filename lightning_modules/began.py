"""BEGAN (Berthelot et al. 2017): the discriminator is an autoencoder, and an equilibrium weighs the players."""

from dataclasses import dataclass, field

from torch import Tensor, nn

from lightning_modules.families.adversarial import Adversarial, AdversarialConfig
from lightning_modules.maths.adversarial import (
    convergence,
    equilibrium_discriminator,
    next_balance,
    reconstruction_error,
)
from lightning_modules.maths.diffusion import SampleRandom
from lightning_modules.nets.began import AutoencodingDiscriminator, Decoder
from lightning_modules.parts.optim import OptimConfig
from medsynth.ranges import number


@dataclass(frozen=True)
class BEGANConfig(AdversarialConfig):
    """Networks of BEGAN, and how they learn."""

    latent: int = 64
    """Numbers that a picture is drawn from, and that the discriminator encodes one as."""
    noise: str = "uniform"
    width: int = number(128, least=1)
    """Channels of the decoders; the encoder has so many more at each size."""
    gamma: float = number(0.5, least=0, most=1)
    """Diversity γ: E L(G(z)) / E L(x) at equilibrium, where L is the error of reconstruction."""
    balance_rate: float = number(0.001, least=0)
    """By how much a step moves k, the weight of generated pictures for the discriminator (λ_k)."""
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(
            name="adam", lr=8e-5, betas=[0.5, 0.999], weight_decay=0.0, schedule="halving", halve_every_steps=100_000
        )
    )
    """Optimizer of both players, each of which has its own."""


class BEGAN(Adversarial):
    """Its discriminator gives pictures, not scores."""

    Config = BEGANConfig
    config: BEGANConfig
    gives_logits = False

    def make_generator(self) -> nn.Module:
        return Decoder(self.config.latent, self.config.width, self.config.resolution)

    def make_discriminator(self) -> nn.Module:
        return AutoencodingDiscriminator(self.config.latent, self.config.width, self.config.resolution)

    def scalars_at_start(self) -> dict[str, float]:
        return {"k": 0.0}

    def discriminator_terms(
        self, real: Tensor, fake: Tensor, labels: Tensor | None, random: SampleRandom
    ) -> dict[str, Tensor]:
        k = self.scalars.get_buffer("k")
        of_real, of_fake = self._error(real), self._error(fake)
        loss = equilibrium_discriminator(of_real, of_fake, k)
        told = {"reconstruction": of_real.detach(), "reconstruction_generated": of_fake.detach(), "k": k.clone()}
        told["convergence"] = convergence(of_real.detach(), of_fake.detach(), self.config.gamma)
        return {"discriminator": loss, **told}

    def generator_terms(self, fake: Tensor, labels: Tensor | None) -> dict[str, Tensor]:
        return {"generator": self._error(fake)}

    def settle(self, terms: dict[str, Tensor]) -> None:
        """k moves by the errors of all processes' pictures."""
        real, fake = (self.over_processes(terms[f"reconstruction{which}"]).mean() for which in ("", "_generated"))
        k = self.scalars.get_buffer("k")
        k.copy_(next_balance(k, real, fake, self.config.gamma, self.config.balance_rate))

    def _error(self, pictures: Tensor) -> Tensor:
        return reconstruction_error(pictures, self.discriminator(pictures).float())

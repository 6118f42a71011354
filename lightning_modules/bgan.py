"""BGAN (Hjelm et al. 2018): the generator seeks the discriminator's decision boundary."""

from dataclasses import dataclass, field

from torch import Tensor

from lightning_modules.families.convolutional import Convolutional, ConvolutionalConfig
from lightning_modules.maths.adversarial import (
    boundary_seeking_generator,
    cross_entropy_discriminator,
    log_mean_exp,
    running,
)
from lightning_modules.maths.diffusion import SampleRandom
from lightning_modules.parts.optim import OptimConfig
from medsynth.ranges import number


@dataclass(frozen=True)
class BGANConfig(ConvolutionalConfig):
    """Networks of BGAN, and how they learn."""

    noise: str = "uniform"
    log_z_decay: float = number(0.995, least=0, most=1)
    """Share of the old estimate of log Z in each step's new one; 1 keeps it at 0, which is the paper's equation."""
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(name="adam", lr=1e-4, betas=[0.5, 0.999], weight_decay=0.0)
    )
    """Optimizer of both players, each of which has its own."""


class BGAN(Convolutional):
    """Its generator minimises a squared logit, from which log Z, a running estimate, is taken."""

    Config = BGANConfig

    def scalars_at_start(self) -> dict[str, float]:
        return {"log_z": 0.0}

    def discriminator_terms(
        self, real: Tensor, fake: Tensor, labels: Tensor | None, random: SampleRandom
    ) -> dict[str, Tensor]:
        scores = self.judge(real, labels), self.judge(fake, labels)
        terms = {"discriminator": cross_entropy_discriminator(*scores), **self.told(*scores)}
        return {**terms, "log_z_of_batch": log_mean_exp(scores[1].detach())}

    def generator_loss(self, fake_B: Tensor) -> Tensor:
        return boundary_seeking_generator(fake_B, self.scalars.get_buffer("log_z"))

    def settle(self, terms: dict[str, Tensor]) -> None:
        """log Z follows the estimate from all processes' pictures."""
        log_z, new = self.scalars.get_buffer("log_z"), log_mean_exp(self.over_processes(terms["log_z_of_batch"]))
        log_z.copy_(running(log_z, new, self.config.log_z_decay))
        terms["log_z"] = log_z.clone()

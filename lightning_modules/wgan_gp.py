"""WGAN-GP (Gulrajani et al. 2017): a penalty on the critic's gradient in the place of clipped weights."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_modules.families.adversarial import Adversarial, AdversarialConfig
from lightning_modules.maths.adversarial import gradient_penalty, raise_scores, wasserstein_critic
from lightning_modules.maths.diffusion import SampleRandom
from lightning_modules.nets.cells import full_precision
from lightning_modules.nets.wgan_gp import ResidualCritic, ResidualGenerator
from lightning_modules.parts.optim import OptimConfig
from medsynth.ranges import number


@dataclass(frozen=True)
class WGANGPConfig(AdversarialConfig):
    """Networks of WGAN-GP, and how they learn."""

    latent: int = 128
    width: int = number(64, least=1)
    """Channels of the largest maps, of both networks; each halving of the side doubles them, up to eightfold."""
    penalty: float = number(10.0, least=0)
    """Weight λ of the gradient penalty."""
    discriminator_steps: int = 5
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(name="adam", lr=1e-4, betas=[0.0, 0.9], weight_decay=0.0)
    )
    """Optimizer of both players, each of which has its own."""


class WGANGP(Adversarial):
    """Its critic's scores have no scale: on which side of 0 they are says nothing."""

    Config = WGANGPConfig
    config: WGANGPConfig
    gives_logits = False

    def make_generator(self) -> nn.Module:
        return ResidualGenerator(self.config.latent, self.config.width, self.config.resolution)

    def make_discriminator(self) -> nn.Module:
        return ResidualCritic(self.config.width, self.config.resolution)

    def discriminator_terms(
        self, real: Tensor, fake: Tensor, labels: Tensor | None, random: SampleRandom
    ) -> dict[str, Tensor]:
        distance = wasserstein_critic(self.judge(real, labels), self.judge(fake, labels))
        penalty = self._penalty(real, fake, labels, random.uniform())
        loss = distance + self.config.penalty * penalty
        return {"discriminator": loss, "distance": -distance.detach(), "penalty": penalty.detach()}

    def generator_loss(self, fake_B: Tensor) -> Tensor:
        return raise_scores(fake_B)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """The generator alone: torch.compile cannot differentiate a gradient."""
        self.generator.compile(*args, **kwargs)

    def _penalty(self, real: Tensor, fake: Tensor, labels: Tensor | None, share_B: Tensor) -> Tensor:
        """In float32, whose range a gradient of float16 would leave; also in a validation, which has no gradients."""
        learning = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.enable_grad(), full_precision(real):
            # Clones, since what is made in inference mode takes part in no gradient.
            critic = partial(self.judge, labels=None if labels is None else labels.clone())
            penalty = gradient_penalty(critic, real.clone(), fake.clone(), share_B.clone())
        return penalty if learning else penalty.detach()

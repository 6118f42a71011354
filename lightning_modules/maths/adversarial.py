"""The losses of adversarial training. Pure functions of tensors.

Scores are what a discriminator or critic says of n pictures, float32 (n,): logits s, where D = sigmoid(s) is the
probability that a picture is real, or numbers without a scale. Each loss is a mean over pictures and is minimised.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


def hinge_discriminator(real_B: Tensor, fake_B: Tensor) -> Tensor:
    """E max(0, 1 − s(x)) + E max(0, 1 + s(G(z))) (Lim & Ye 2017)."""
    return F.relu(1 - real_B).mean() + F.relu(1 + fake_B).mean()


def raise_scores(fake_B: Tensor) -> Tensor:
    """−E s(G(z)): the generator's part of the hinge and of the Wasserstein loss."""
    return -fake_B.mean()


def cross_entropy_discriminator(real_B: Tensor, fake_B: Tensor) -> Tensor:
    """−E log D(x) − E log(1 − D(G(z))) of logits (Goodfellow et al. 2014, eq. 1)."""
    return F.softplus(-real_B).mean() + F.softplus(fake_B).mean()


def non_saturating_generator(fake_B: Tensor) -> Tensor:
    """−E log D(G(z)) of logits (Goodfellow et al. 2014, section 3)."""
    return F.softplus(-fake_B).mean()


def wasserstein_critic(real_B: Tensor, fake_B: Tensor) -> Tensor:
    """E s(G(z)) − E s(x): minus the estimate of the Wasserstein distance (Arjovsky et al. 2017, algorithm 1)."""
    return fake_B.mean() - real_B.mean()


@torch.no_grad()
def clip_weights(weights: Iterable[Tensor], limit: float) -> None:
    """Move each weight, in place, into [−limit, limit] (Arjovsky et al. 2017, algorithm 1)."""
    # Not by `_foreach_clamp_*`: those let a NaN become a limit.
    for weight in weights:
        weight.clamp_(-limit, limit)


def gradient_penalty(
    critic: Callable[[Tensor], Tensor], real_BCHW: Tensor, fake_BCHW: Tensor, share_B: Tensor
) -> Tensor:
    """E (‖∇s(x̂)‖ − 1)², x̂ = εx + (1 − ε)G(z), the norm over a picture's values (Gulrajani et al. 2017, algorithm 1).

    critic: pictures to scores (n,), each of its own picture alone. share_B: ε in [0, 1), one a picture. The result can
    be differentiated for the critic's weights.
    """
    share = share_B.view(-1, 1, 1, 1)
    between = (share * real_BCHW + (1 - share) * fake_BCHW).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
    return (gradient.flatten(1).norm(dim=1) - 1).square().mean()


def boundary_seeking_generator(fake_B: Tensor, log_z: Tensor | float = 0.0) -> Tensor:
    """½ E (s(G(z)) − log Z)²; with log Z = 0 the paper's ½ E (log D − log(1 − D))² (Hjelm et al. 2018, eq. 14).

    Of logits: log D − log(1 − D) is s, which no rounding of D near 0 or 1 touches.
    """
    return 0.5 * (fake_B - log_z).square().mean()


def log_mean_exp(values_B: Tensor) -> Tensor:
    """log E exp(s), a scalar: of a discriminator's logits on generated pictures the estimate of log Z."""
    return values_B.logsumexp(dim=0) - torch.tensor(float(len(values_B))).log()


def running(before: Tensor, new: Tensor, decay: float) -> Tensor:
    """decay · before + (1 − decay) · new."""
    return decay * before + (1 - decay) * new


def reconstruction_error(pictures_BCHW: Tensor, decoded_BCHW: Tensor) -> Tensor:
    """L(v) = |v − AE(v)|, its mean over all values (Berthelot et al. 2017, eq. 1 with η = 1)."""
    return (pictures_BCHW - decoded_BCHW).abs().mean()


def equilibrium_discriminator(real: Tensor, fake: Tensor, k: Tensor) -> Tensor:
    """L(x) − k·L(G(z)) of reconstruction errors (Berthelot et al. 2017, section 3.4)."""
    return real - k * fake


def next_balance(k: Tensor, real: Tensor, fake: Tensor, gamma: float, rate: float) -> Tensor:
    """k + rate·(γL(x) − L(G(z))), in [0, 1] (Berthelot et al. 2017, section 3.4)."""
    return (k + rate * (gamma * real - fake)).clamp(0, 1)


def convergence(real: Tensor, fake: Tensor, gamma: float) -> Tensor:
    """M = L(x) + |γL(x) − L(G(z))| (Berthelot et al. 2017, section 3.4.1)."""
    return real + (gamma * real - fake).abs()


@dataclass(frozen=True)
class Turns:
    """Which steps of the discriminator a step of the generator follows: a function of the step alone.

    Generator step i, from 0, comes after `critic` further steps of the discriminator; after `longer` where i < `first`
    or `every` divides i (of `every` = 0 none).
    """

    critic: int = 1
    longer: int = 0
    first: int = 0
    every: int = 0

    def generator_moves(self, step: int) -> bool:
        """Whether the generator moves with the discriminator's step `step`, the first of which is 1."""
        moves = bisect_left(range(step + 1), step, key=self.before)
        return self.before(moves) == step

    def before(self, moves: int) -> int:
        """Steps of the discriminator up to the generator's step number `moves`; 0 before its first."""
        long = min(moves, self.first)
        if self.every and moves > long:  # multiples of `every` among long, …, moves − 1
            long += (moves - 1) // self.every - (long - 1) // self.every
        return self.critic * moves + (self.longer - self.critic) * long

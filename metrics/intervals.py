"""How far a score may be trusted: intervals by a jackknife, the Fréchet distance of infinitely many pictures."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from scipy.stats import norm as normal
from scipy.stats import t as student
from torch import Tensor

from metrics.frechet import frechet_distance

GROUPS = 20
"""Groups that are left out in turn."""
LEAST_FOR_INTERVALS = 2 * GROUPS
"""Pictures of a side below which there are no intervals."""
_LEVEL = 0.95
_POINTS = 15  # sizes that are extrapolated from


@dataclass(frozen=True)
class Interval:
    """Of a score: where it lies with a probability of 95 %, and its standard error."""

    low: float
    high: float
    error: float


def jackknife(
    score: Callable[[Tensor, Tensor], dict[str, float]], value: dict[str, float], real: int, fake: int, seed: int = 2020
) -> dict[str, Interval]:
    """Intervals of all scores by leaving out groups of pictures, first of one side and then of the other.

    SE² = Σ_sides (G - 1)/G Σ_g (θ_g - mean θ)² over G = 20 groups; the interval is θ ± t(G - 1) SE. No picture comes
    twice, as in a bootstrap, where it would be its own nearest neighbour and raise the Fréchet distance's bias.

    Args:
        score: the scores of those pictures, int64 rows of the real and of the generated ones.
        value: the scores of all. real, fake: how many pictures there are; at least `LEAST_FOR_INTERVALS` each.
        seed: of the groups.
    """
    counts = (real, fake)
    generator = torch.Generator().manual_seed(seed)
    groups = [torch.randperm(count, generator=generator) % GROUPS for count in counts]
    everything = [torch.arange(count) for count in counts]
    variances = dict.fromkeys(value, 0.0)
    for side in (0, 1):
        left = []
        for group in range(GROUPS):
            rows = list(everything)
            rows[side] = everything[side][groups[side] != group]
            left.append(score(*rows))
        for name in variances:
            values = torch.tensor([scores.get(name, math.nan) for scores in left], dtype=torch.float64)
            variances[name] += ((GROUPS - 1) * values.var(correction=0)).item()
    return {name: interval(value[name], math.sqrt(variances[name])) for name in value if math.isfinite(variances[name])}


def interval(value: float, error: float, freedom: int = GROUPS - 1) -> Interval:
    """The interval of a score with that standard error, of so many degrees of freedom."""
    reach = float(student.ppf((1 + _LEVEL) / 2, freedom)) * error
    return Interval(value - reach, value + reach, error)


def share_interval(share: float, count: int) -> Interval:
    """The interval of a share of so many pictures (Wilson 1927), which is also right where none or all have it."""
    z2 = float(normal.ppf((1 + _LEVEL) / 2)) ** 2
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    reach = math.sqrt(z2 * (share * (1 - share) / count + z2 / (4 * count**2))) / (1 + z2 / count)
    return Interval(max(0.0, middle - reach), min(1.0, middle + reach), math.sqrt(share * (1 - share) / count))


def frechet_at_infinity(real: Tensor, fake: Tensor, seed: int = 2020) -> float:
    """FD∞ (Chong and Forsyth 2020, "Effectively unbiased FID"): where the Fréchet distance goes with more pictures.

    Features `real` (n, d) and `fake` (m, d). The distance of `fake`'s first half to all of a shuffled order, at 15
    sizes, is a line in 1 / size, whose value at 0 it is. What the real pictures' own number adds stays in it. It may
    come out below 0.
    """
    mean, covariance = real.double().mean(dim=0), torch.cov(real.double().T)
    order = torch.randperm(len(fake), generator=torch.Generator().manual_seed(seed))
    sizes = sorted({max(2, round(float(size))) for size in torch.linspace(len(fake) / 2, len(fake), _POINTS)})
    shuffled = fake.double().cpu()[order]
    distances = [
        frechet_distance(mean, covariance, part.mean(dim=0), torch.cov(part.T))
        for part in (shuffled[:n] for n in sizes)
    ]
    inverse = torch.tensor([1 / n for n in sizes], dtype=torch.float64)
    design = torch.stack([torch.ones_like(inverse), inverse], dim=1)
    return torch.linalg.lstsq(design, torch.tensor(distances, dtype=torch.float64)[:, None]).solution[0].item()


def unsupported(real: int, fake: int, features: int) -> list[str]:
    """What the counts of pictures do not bear, a line each."""
    said = []
    for count, kind in ((real, "real"), (fake, "generated")):
        if count < features:
            said.append(
                f"{count} {kind} pictures for {features} features: their covariance is not of full rank, and the "
                "Fréchet distance far above that of many pictures; compare equal counts alone, or fewer features"
            )
        if count < LEAST_FOR_INTERVALS:
            said.append(f"{count} {kind} pictures are too few for intervals, which take {LEAST_FOR_INTERVALS}")
    return said

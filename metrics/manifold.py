"""Precision and recall (Kynkäänniemi et al. 2019, section 2), density and coverage (Naeem et al. 2020, section 3)."""

import torch
from torch import Tensor

from medsynth.errors import UserError

_BLOCK = 1024  # rows of the distance matrix in memory at once


def precision_recall(real: Tensor, fake: Tensor, neighbours: int = 3) -> tuple[float, float, float]:
    """Precision, recall and their harmonic mean F1, each in [0, 1], of features `real` (n, d) and `fake` (m, d).

    Precision is the share of generated pictures within the real manifold, recall that of real pictures within the
    generated one; a manifold is the union of balls that reach from each of its pictures to its `neighbours`-th nearest
    other (equations 1, 2).

    Raises:
        UserError: a set has no more pictures than `neighbours`.
    """
    if min(len(real), len(fake)) <= neighbours:
        raise UserError(
            f"Precision and recall look at the {neighbours} nearest other pictures: score at least {neighbours + 1} of "
            f"each set, not {min(len(real), len(fake))}"
        )
    real, fake = real.double(), fake.double()
    precision, recall = _share_within(fake, real, neighbours), _share_within(real, fake, neighbours)
    return precision, recall, 2 * precision * recall / max(precision + recall, 1e-5)


def density_coverage(real: Tensor, fake: Tensor, neighbours: int = 5) -> tuple[float, float]:
    """Density, 0 or more, and coverage, in [0, 1], of features `real` (n, d) and `fake` (m, d).

    Density is how many balls of real pictures a generated one lies in, over `neighbours`: 1 where both sets are alike,
    more where the generated pictures keep to where real ones are dense. Coverage is the share of real pictures in
    whose ball a generated one lies. A ball reaches to the picture's `neighbours`-th nearest other, border excluded.
    One outlier among the real pictures, which may make precision 1, changes little.

    Raises:
        UserError: there are no more real pictures than `neighbours`.
    """
    if len(real) <= neighbours:
        raise UserError(
            f"Density and coverage look at the {neighbours} nearest other pictures: score against at least "
            f"{neighbours + 1}, not {len(real)}"
        )
    real, fake = real.double(), fake.double()
    inside, covered = 0, 0
    for block in real.split(_BLOCK):
        radii = torch.cdist(block, real).kthvalue(neighbours + 1, dim=1).values
        within = torch.cdist(block, fake) < radii[:, None]
        inside += int(within.sum())
        covered += int(within.any(dim=1).sum())
    return inside / (neighbours * len(fake)), covered / len(real)


def _share_within(queries: Tensor, centres: Tensor, neighbours: int) -> float:
    """The share of `queries` that lie in some ball of the manifold of `centres`."""
    # The nearest to each centre is the centre itself.
    radii = torch.cat([torch.cdist(c, centres).kthvalue(neighbours + 1).values for c in centres.split(_BLOCK)])
    within = torch.cat([(torch.cdist(q, centres) <= radii).any(dim=1) for q in queries.split(_BLOCK)])
    return within.double().mean().item()

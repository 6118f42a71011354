"""Fréchet distance of two Gaussians (Heusel et al. 2017, "GANs trained by a two time-scale update rule …")."""

from typing import NamedTuple

import torch
from scipy.linalg.lapack import dpstrf  # pyrefly: ignore[missing-module-attribute]  # made when it is imported
from torch import Tensor

_BLOCK = 256  # rows of a triangular product that are taken together


def frechet_distance(mean1: Tensor, covariance1: Tensor, mean2: Tensor, covariance2: Tensor) -> float:
    """d² = |μ1 - μ2|² + tr(Σ1 + Σ2 - 2 (Σ1 Σ2)^½), of means (d,) and covariances (d, d), float64; 0 or more.

    With Σi = Li Liᵀ the last trace is the sum of the singular values of L1ᵀ L2. That holds for covariances of any rank,
    and keeps the digits which roots of the eigenvalues of Σ1 Σ2 lose. Computed on the CPU, the same on every device.

    Raises:
        ValueError: a mean or a covariance is not finite.
    """
    moments = [t.double().cpu() for t in (mean1, covariance1, mean2, covariance2)]
    if not all(moment.isfinite().all() for moment in moments):
        raise ValueError("the Fréchet distance is of finite means and covariances")
    mean1, covariance1, mean2, covariance2 = moments
    overlap = _overlap(_factor(covariance1), _factor(covariance2))
    distance = (mean1 - mean2).square().sum() + covariance1.trace() + covariance2.trace() - 2 * overlap
    return distance.clamp(min=0).item()


class _Factor(NamedTuple):
    """`root`, L (d, rank) with L Lᵀ = Σ; triangular: whether it is (d, d) and lower triangular."""

    root: Tensor
    triangular: bool


def _factor(covariance: Tensor) -> _Factor:
    """Cholesky's factor; where pictures are fewer than features, or features depend on each other, a pivoted one."""
    diagonal = covariance.diagonal()
    rounding = len(diagonal) * torch.finfo(torch.float64).eps * diagonal.max().item()
    root, failed = torch.linalg.cholesky_ex(covariance)
    # A pivot that is no more than rounding would bring its root, eight digits larger, into the distance.
    if not failed and root.diagonal().square().min() > rounding:
        return _Factor(root, True)
    packed, pivots, rank, _ = dpstrf(covariance.numpy().T, tol=rounding, lower=1)
    root = torch.zeros(len(diagonal), int(rank), dtype=torch.float64)
    root[torch.from_numpy(pivots).long() - 1] = torch.from_numpy(packed).tril()[:, :rank]
    return _Factor(root, False)


def _overlap(one: _Factor, two: _Factor) -> Tensor:
    """The sum of the singular values of L1ᵀ L2."""
    if not (one.triangular and two.triangular):
        return torch.linalg.svdvals(one.root.T @ two.root).sum()
    # Their squares are the eigenvalues of the product with its transpose, of which only the lower half is looked at.
    return torch.linalg.eigvalsh(_lower_gram(_upper_times_lower(one.root, two.root))).clamp(min=0).sqrt().sum()


def _upper_times_lower(lower1: Tensor, lower2: Tensor) -> Tensor:
    """L1ᵀ L2 of lower triangular (d, d), in a third of a full product's operations."""
    product = torch.zeros_like(lower1)
    for first in range(0, len(lower1), _BLOCK):
        last = first + _BLOCK  # beyond it these rows are zero
        product[:last, :last].addmm_(lower1[first:last, :last].T, lower2[first:last, :last])
    return product


def _lower_gram(matrix: Tensor) -> Tensor:
    """M Mᵀ of (d, d) in its lower triangle; above it some entries are left 0."""
    gram = torch.zeros_like(matrix)
    for first in range(0, len(matrix), _BLOCK):
        last = first + _BLOCK
        gram[first:last, :last] = matrix[first:last] @ matrix[:last].T
    return gram

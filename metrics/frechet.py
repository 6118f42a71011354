"""Fréchet distance of two Gaussians (Heusel et al. 2017, "GANs trained by a two time-scale update rule …")."""

import torch
from torch import Tensor


def frechet_distance(mean1: Tensor, covariance1: Tensor, mean2: Tensor, covariance2: Tensor) -> float:
    """d² = |μ1 - μ2|² + tr(Σ1 + Σ2 - 2 (Σ1 Σ2)^½), of means (d,) and covariances (d, d), float64; 0 or more.

    With Σi = Li Liᵀ the last trace is the sum of the singular values of L1ᵀ L2. That holds for covariances of any rank,
    and keeps the digits which roots of the eigenvalues of Σ1 Σ2 lose. Computed on the CPU, the same on every device.
    """
    mean1, covariance1, mean2, covariance2 = (t.double().cpu() for t in (mean1, covariance1, mean2, covariance2))
    overlap = torch.linalg.svdvals(_root(covariance1).T @ _root(covariance2)).sum()
    distance = (mean1 - mean2).square().sum() + covariance1.trace() + covariance2.trace() - 2 * overlap
    return distance.clamp(min=0).item()


def _root(covariance: Tensor) -> Tensor:
    """L (d, rank) with L Lᵀ = covariance."""
    eigenvalues, eigenvectors = torch.linalg.eigh(covariance)
    rounding = len(covariance) * torch.finfo(torch.float64).eps * eigenvalues[-1]
    ranked = eigenvalues > rounding
    return eigenvectors[:, ranked] * eigenvalues[ranked].sqrt()

"""Kernel distance (KID of Bińkowski et al. 2018, "Demystifying MMD GANs", section 4)."""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from medsynth.errors import UserError

_BLOCK = 1024  # rows of the kernel matrix in memory at once
_SUBSETS, _SUBSET_SIZE, _SEED = 100, 1000, 2020
SUBSETS = f"{_SUBSETS} subsets of {_SUBSET_SIZE}, seed {_SEED}"
"""The subsets that are drawn, in the words of a protocol."""


def kernel_distance(
    real: Tensor, fake: Tensor, subsets: int = _SUBSETS, subset_size: int = _SUBSET_SIZE, seed: int = _SEED
) -> tuple[float, float | None]:
    """Mean and standard deviation, over random subsets, of the squared MMD of `real` (n, d) and `fake` (m, d).

    The estimate is unbiased and may come out below 0. The subsets are those torch-fidelity draws for `fake` as its
    first input and the same seed. Where a set has fewer pictures than `subset_size`, subsets have the size of the
    smaller set. Where every subset would be the whole of both sets, one does, and there is no deviation: None.

    Raises:
        UserError: a set has fewer than 2 pictures.
    """
    size = min(subset_size, len(real), len(fake))
    if size < 2:
        raise UserError(f"The kernel distance needs at least 2 pictures of each set, not {size}")
    varies = size < max(len(real), len(fake))
    subsets = subsets if varies else 1
    rng = np.random.RandomState(seed)
    # A subset of the generated pictures, then one of the real ones, and so on: the order in which the draws are made.
    draws = [rng.choice(len(side), size, replace=False) for _ in range(subsets) for side in (fake, real)]
    x, y = fake.double(), real.double()
    in_x, in_y = _membership(draws[::2], x), _membership(draws[1::2], y)
    within = _within(x, in_x) + _within(y, in_y)
    distances = within / (size * (size - 1)) - 2 * _between(x, y, in_x, in_y) / size**2
    return distances.mean().item(), distances.std(correction=0).item() if varies else None


def full_kernel_distance(real: Tensor, fake: Tensor) -> float:
    """The unbiased estimate of the squared MMD from all pairs of `real` (n, d) and `fake` (m, d): no subset is drawn.

    What the mean over subsets estimates with more spread: the same number where sets are no larger than a subset.

    Raises:
        UserError: a set has fewer than 2 pictures.
    """
    n, m = len(real), len(fake)
    if min(n, m) < 2:
        raise UserError(f"The kernel distance needs at least 2 pictures of each set, not {min(n, m)}")
    x, y = real.double(), fake.double()
    in_x, in_y = x.new_ones(n, 1), y.new_ones(m, 1)
    within = _within(x, in_x) / (n * (n - 1)) + _within(y, in_y) / (m * (m - 1))
    return (within - 2 * _between(x, y, in_x, in_y) / (n * m)).item()


_SIGMA, _SCALE = 10.0, 1000.0


def cmmd(real: Tensor, fake: Tensor) -> float:
    """CMMD (Jayasumana et al. 2024, "Rethinking FID"): 1000 times the squared MMD of CLIP embeddings by the Gaussian
    kernel exp(-|a - b|² / 2σ²), σ = 10, with the pairs of a picture with itself, as the authors estimate it.

    `real` (n, d) and `fake` (m, d) are brought to length 1 first. 0 or more, but for rounding.
    """
    x, y = (F.normalize(features.double(), dim=1) for features in (real, fake))
    means = [_mean_gaussian(a, b) for a, b in ((x, x), (y, y), (x, y))]
    return _SCALE * (means[0] + means[1] - 2 * means[2])


def _mean_gaussian(x: Tensor, y: Tensor) -> float:
    # Of the exponential less 1: all kernels lie near 1, where the difference of the means would lose digits.
    total = sum(
        torch.expm1(-torch.cdist(block, y).square() / (2 * _SIGMA**2)).sum().item() for block in x.split(_BLOCK)
    )
    return total / (len(x) * len(y))


def _membership(draws: list[np.ndarray], features: Tensor) -> Tensor:
    """(n, subsets), 1 where a picture is in a subset, 0 elsewhere."""
    rows = torch.from_numpy(np.stack(draws, axis=1)).to(features.device)
    return features.new_zeros(len(features), len(draws)).scatter_(0, rows, 1)


def _within(x: Tensor, in_x: Tensor) -> Tensor:
    """(subsets,): Σ k(a, b) over the pairs a ≠ b of each subset. All subsets share one pass over the kernel matrix."""
    itself = (x.square().mean(dim=1) + 1) ** 3
    return _between(x, x, in_x, in_x) - itself @ in_x


def _between(x: Tensor, y: Tensor, in_x: Tensor, in_y: Tensor) -> Tensor:
    """(subsets,): Σ k(a, b) over a of x and b of y in each subset, where k(a, b) = (aᵀb / d + 1)³."""
    sums = torch.zeros_like(in_x[0])
    for block, members in zip(x.split(_BLOCK), in_x.split(_BLOCK), strict=True):
        kernel = (block @ y.T / x.shape[1] + 1) ** 3
        sums += (members * (kernel @ in_y)).sum(dim=0)
    return sums

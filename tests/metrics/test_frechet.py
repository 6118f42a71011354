"""The Fréchet distance against torch-fidelity and against the nuclear norm, of covariances of any rank."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from metrics.frechet import frechet_distance


def draw(count: int, dim: int, seed: int, decay: float = 1.0) -> Tensor:
    """float64 (count, dim): spectrum from 1 to 10^-decay of standard deviation in a basis of the seed's own."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64)).Q
    scales = torch.logspace(0, -decay, dim, dtype=torch.float64)
    return torch.randn(count, dim, generator=generator, dtype=torch.float64) * scales @ basis + 0.3


def distance(x: Tensor, y: Tensor) -> float:
    one, two = (torch.cov(f.T).reshape(f.shape[1], f.shape[1]) for f in (x, y))  # of one feature, cov is a scalar
    return frechet_distance(x.mean(dim=0), one, y.mean(dim=0), two)


def by_nuclear_norm(x: Tensor, y: Tensor) -> tuple[float, float]:
    """The distance without a covariance, and the trace of both: with Σ = XᵀX, tr (Σ1 Σ2)^½ = ‖X1 X2ᵀ‖*."""
    one, two = ((f - f.mean(dim=0)) / (len(f) - 1) ** 0.5 for f in (x, y))
    trace = one.square().sum() + two.square().sum()
    means = (x.mean(dim=0) - y.mean(dim=0)).square().sum()
    return (means + trace - 2 * torch.linalg.matrix_norm(one @ two.T, "nuc")).item(), trace.item()


@pytest.mark.parametrize("counts", [(700, 640), (700, 90), (90, 60)], ids=["full", "one deficient", "both deficient"])
def test_it_is_torch_fidelity_s_on_the_same_features(counts):
    x, y = (draw(n, 300, seed).float() for seed, n in enumerate(counts))
    outside = fid_statistics_to_metric(fid_features_to_statistics(x), fid_features_to_statistics(y), verbose=False)
    ours = distance(x.double(), y.double())
    assert ours == pytest.approx(outside["frechet_inception_distance"], rel=1e-6)


@settings(max_examples=20, deadline=None)
@given(
    dim=st.sampled_from([1, 2, 17, 256, 257]),
    counts=st.tuples(st.sampled_from([2, 9, 60, 300, 700]), st.sampled_from([2, 9, 60, 300, 700])),
    decay=st.sampled_from([0.0, 2.0, 4.0]),
    same_basis=st.booleans(),
)
def test_it_is_the_nuclear_norm_s_for_any_rank_and_spectrum(dim, counts, decay, same_basis):
    x, y = draw(counts[0], dim, seed=3, decay=decay), draw(counts[1], dim, seed=3 if same_basis else 4, decay=decay)
    expected, trace = by_nuclear_norm(x, y)
    assert distance(x, y) == pytest.approx(expected, rel=0, abs=1e-9 * trace)


def test_of_full_rank_no_digit_is_lost():
    x, y = draw(900, 300, seed=1, decay=2.0), draw(900, 300, seed=2, decay=2.0)
    roots = [torch.linalg.cholesky(torch.cov(f.T)) for f in (x, y)]
    cross = torch.linalg.svdvals(roots[0].T @ roots[1]).sum().item()
    trace = sum(root.square().sum().item() for root in roots)
    expected = (x.mean(dim=0) - y.mean(dim=0)).square().sum().item() + trace - 2 * cross
    assert distance(x, y) == pytest.approx(expected, rel=0, abs=1.5e-15 * trace)


@pytest.mark.parametrize("name", ["constant", "repeated"])
def test_features_that_say_nothing_of_their_own_change_nothing(name):
    """A feature that never fires, or says what another says, makes the covariance deficient however many pictures."""
    x, y = draw(500, 40, seed=1), draw(450, 40, seed=2)
    more = (lambda f: torch.cat([f, torch.full_like(f[:, :3], 0.5)], dim=1)) if name == "constant" else twice_the_first
    # A pair of equal features is one feature of √2 its size.
    scale = torch.ones(40, dtype=torch.float64)
    scale[0] = 2**0.5 if name == "repeated" else 1
    assert distance(more(x), more(y)) == pytest.approx(distance(x * scale, y * scale), rel=1e-9)


def twice_the_first(features: Tensor) -> Tensor:
    return torch.cat([features, features[:, :1]], dim=1)


def test_2048_features_of_300_pictures():
    x, y = torch.rand(300, 2048, dtype=torch.float64), torch.rand(280, 2048, dtype=torch.float64) ** 2
    assert distance(x, y) == pytest.approx(by_nuclear_norm(x, y)[0], rel=1e-12)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_moments_that_are_not_finite_are_refused(value):
    mean, covariance = torch.zeros(3), torch.eye(3)
    broken = covariance.clone()
    broken[1, 2] = value
    with pytest.raises(ValueError, match="finite"):
        frechet_distance(mean, covariance, mean, broken)
    with pytest.raises(ValueError, match="finite"):
        frechet_distance(mean + value, covariance, mean, covariance)

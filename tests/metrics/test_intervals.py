"""Intervals hold what they promise on Gaussians, and the Fréchet distance's bias is extrapolated away."""

import pytest
import torch
from scipy.stats import binomtest
from torch import Tensor

from metrics.frechet import frechet_distance
from metrics.intervals import GROUPS, frechet_at_infinity, interval, jackknife, share_interval, unsupported
from metrics.kernel import full_kernel_distance


def distance(x: Tensor, y: Tensor) -> float:
    return frechet_distance(x.mean(dim=0), torch.cov(x.T), y.mean(dim=0), torch.cov(y.T))


def draw(generator: torch.Generator, count: int, dim: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(count, dim, generator=generator, dtype=torch.float64)


def test_the_error_is_the_spread_over_many_draws():
    """Of the mean's difference, the Fréchet and the kernel distance of two Gaussians, 120 pictures against 80."""
    generator = torch.Generator().manual_seed(0)
    values: dict[str, list[float]] = {"mean": [], "fd": [], "kd": []}
    errors: dict[str, list[float]] = {"mean": [], "fd": [], "kd": []}
    covered = 0
    for _ in range(60):
        x, y = draw(generator, 120, 3), draw(generator, 80, 3, 1.5) + 0.5

        def score(rows_x: Tensor, rows_y: Tensor, x=x, y=y) -> dict[str, float]:
            a, b = x[rows_x], y[rows_y]
            mean = (b.mean() - a.mean()).item()
            return {"mean": mean, "fd": distance(a, b), "kd": full_kernel_distance(a, b)}

        value = score(torch.arange(120), torch.arange(80))
        found = jackknife(score, value, 120, 80)
        for name in values:
            values[name].append(value[name])
            errors[name].append(found[name].error)
        covered += found["mean"].low <= 0.5 <= found["mean"].high
    for name, drawn in values.items():
        spread = torch.tensor(drawn).std().item()
        assert torch.tensor(errors[name]).mean().item() == pytest.approx(spread, rel=0.3), name
    assert covered >= 52, "of 60 at 95 %"


def test_an_interval_is_student_s():
    found = interval(2.0, 1.0)
    assert (found.low, found.high) == pytest.approx((2 - 2.0930, 2 + 2.0930), abs=1e-4) and GROUPS == 20


@pytest.mark.parametrize("having, count", [(0, 30), (3, 50), (200, 200)])
def test_a_share_s_interval_is_scipy_s(having, count):
    outside = binomtest(having, count).proportion_ci(method="wilson")
    found = share_interval(having / count, count)
    assert (found.low, found.high) == pytest.approx((outside.low, outside.high), abs=1e-12)


def test_what_more_pictures_would_take_off_the_distance_is_taken_off():
    """Both sets of one distribution: the truth is 0, what 300 pictures give far above it."""
    generator = torch.Generator().manual_seed(0)
    real = draw(generator, 40_000, 16)
    few = [draw(generator, 300, 16) for _ in range(8)]
    plain = [distance(real, fake) for fake in few]
    extrapolated = [frechet_at_infinity(real, fake) for fake in few]
    assert min(plain) > 0.15
    assert abs(sum(extrapolated) / 8) < 0.2 * sum(plain) / 8
    away = frechet_at_infinity(real, draw(generator, 300, 16) + 1)
    assert away == pytest.approx(16, rel=0.1), "|μ1 - μ2|² of a step of 1 in each of 16"


def test_counts_that_bear_no_claim_are_said():
    assert unsupported(5000, 3000, 2048) == []
    [deficient] = unsupported(5000, 600, 2048)
    assert deficient.startswith("600 generated pictures for 2048 features")
    assert [line.split(":")[0] for line in unsupported(30, 5000, 8)] == [
        "30 real pictures are too few for intervals, which take 40"
    ]

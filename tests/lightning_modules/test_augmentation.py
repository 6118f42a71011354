"""Differentiable augmentation: what each change does, its gradient, and that it does not leak; ADA's probability."""

import math

import pytest
import torch

from lightning_modules.maths.augmentation import (
    DRAWS,
    POLICIES,
    adapted_probability,
    brightness,
    contrast,
    cutout,
    diff_augment,
    overfitting,
    saturation,
    translation,
)


def pictures(n: int = 4, side: int = 16, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(0), dtype=dtype) * 2 - 1


def draws(n: int = 4, seed: int = 1) -> torch.Tensor:
    return torch.rand(n, DRAWS, generator=torch.Generator().manual_seed(seed))


def each(value: float, n: int = 4) -> torch.Tensor:
    return torch.full((n,), value)


# What each change does


def test_colours_change_as_the_paper_says():
    x = pictures()
    torch.testing.assert_close(brightness(x, each(0.9)), x + 0.4)
    grey = x.mean(dim=1, keepdim=True)
    torch.testing.assert_close(saturation(x, each(0.0)), grey.expand_as(x))
    torch.testing.assert_close(saturation(x, each(0.5)), x)
    torch.testing.assert_close(contrast(x, each(0.5)), x)
    flat = contrast(x, each(0.0)) - x.mean(dim=(1, 2, 3), keepdim=True)
    torch.testing.assert_close(flat, 0.5 * (x - x.mean(dim=(1, 2, 3), keepdim=True)))


@pytest.mark.parametrize(("u", "v", "down", "right"), [(0.0, 0.5, -2, 0), (0.999, 0.0, 2, -2), (0.5, 0.7, 0, 1)])
def test_a_picture_is_moved_and_grey_comes_in(u, v, down, right):
    x = pictures() + 3  # nothing of it is 0
    expected = torch.zeros_like(x)
    rows, columns = (slice(max(0, by), 16 + min(0, by)) for by in (down, right))
    rows_from, columns_from = (slice(max(0, -by), 16 + min(0, -by)) for by in (down, right))
    expected[:, :, rows, columns] = x[:, :, rows_from, columns_from]
    assert torch.equal(translation(x, each(u), each(v)), expected)


def test_a_square_of_half_the_side_is_cut_out():
    x = pictures() + 3
    cut = cutout(x, each(0.5), each(0.5))
    assert torch.equal(cut[:, :, 4:12, 4:12], torch.zeros(4, 3, 8, 8))
    assert (cut == 0).sum() == 4 * 3 * 64
    corner = cutout(x, each(0.0), each(0.999999))
    assert torch.equal(corner[:, :, :4, 12:], torch.zeros(4, 3, 4, 4))
    assert (corner == 0).sum() == 4 * 3 * 16


# All together


def test_at_no_probability_nothing_is_changed_and_at_one_everything():
    x = pictures()
    assert torch.equal(diff_augment(x, draws(), p=0.0), x)
    assert torch.equal(diff_augment(x, draws(), ()), x)
    for policy in ("color", "cutout"):
        assert (diff_augment(x, draws(), (policy,)) != x).flatten(1).any(dim=1).all()
    assert (diff_augment(x, draws(), ("translation",)) != x).any()  # some may be moved by nothing


def test_a_picture_is_varied_by_its_own_numbers_alone():
    x, numbers = pictures(), draws()
    whole = diff_augment(x, numbers, p=0.7)
    assert torch.equal(whole, diff_augment(x, numbers, p=torch.tensor(0.7)))
    for i in range(4):
        torch.testing.assert_close(diff_augment(x[i : i + 1], numbers[i : i + 1], p=0.7), whole[i : i + 1])
    assert not torch.equal(diff_augment(x, draws(seed=2), p=0.7), whole)


def test_each_change_comes_at_the_probability_and_by_itself():
    x, n = pictures(1).expand(4000, -1, -1, -1), 4000
    numbers = draws(n)
    changed = {policy: (diff_augment(x, numbers, (policy,), 0.3) != x).flatten(1).any(dim=1) for policy in POLICIES}
    assert changed["color"].float().mean() == pytest.approx(1 - 0.7**3, abs=0.03)
    assert changed["cutout"].float().mean() == pytest.approx(0.3, abs=0.03)
    moved = 0.3 * (1 - 1 / 25)  # of 5 × 5 places one is where it was
    assert changed["translation"].float().mean() == pytest.approx(moved, abs=0.03)
    assert (changed["cutout"] & changed["translation"]).float().mean() == pytest.approx(0.3 * moved, abs=0.02)


def test_the_gradient_reaches_the_picture():
    x = pictures(2, side=4, dtype=torch.float64).requires_grad_()
    numbers = draws(2)
    assert torch.autograd.gradcheck(lambda given: diff_augment(given, numbers), x)
    diff_augment(x, numbers, p=0.0).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


def test_the_dtype_is_kept():
    assert diff_augment(pictures().bfloat16(), draws()).dtype == torch.bfloat16


# Leaks


def characteristic(pictures: torch.Tensor, frequency: float) -> float:
    """E cos(2πf v) over the means v of the pictures: of values that lie evenly about 0, the characteristic function."""
    return float((2 * math.pi * frequency * pictures.mean(dim=(1, 2, 3))).cos().mean())


@pytest.mark.parametrize("p", [0.3, 0.6, 0.8])
def test_what_is_varied_tells_what_is_not_below_a_probability_of_four_fifths(p):
    """Brightness adds a number of U(−½, ½), so that at frequency f the characteristic function becomes
    1 − p + p·sin(πf)/(πf) times itself. That factor is never 0 where p < 0.82: divided by it, the varied pictures give
    the others' function back, and a generator that matches the one matches the other. At p = 1 and f = 1 it is 0:
    pictures of grey and of black and white look the same."""
    n = 40_000
    for x in (torch.zeros(n, 1, 1, 1), torch.tensor([-0.5, 0.5]).repeat(n // 2).view(n, 1, 1, 1)):
        # Contrast and saturation leave a picture of one grey alone.
        varied = diff_augment(x, draws(n), ("color",), p)
        for frequency in (0.5, 1.0):
            factor = 1 - p + p * math.sin(math.pi * frequency) / (math.pi * frequency)
            recovered = characteristic(varied, frequency) / factor
            assert recovered == pytest.approx(characteristic(x, frequency), abs=0.02 / abs(factor))


def test_always_varied_pictures_hide_what_they_were():
    n = 40_000
    black_and_white = torch.tensor([-0.5, 0.5]).repeat(n // 2).view(n, 1, 1, 1)
    for x in (torch.zeros(n, 1, 1, 1), black_and_white):
        assert characteristic(diff_augment(x, draws(n), ("color",), 1.0), 1.0) == pytest.approx(0, abs=0.02)


# ADA


def test_overfitting_is_the_mean_sign_of_real_logits():
    assert overfitting(torch.tensor([0.2, 5.0, -1.0, 3.0])) == 0.5
    assert overfitting(-torch.rand(7) - 1e-3) == -1


def test_the_probability_follows_the_target_and_stays_in_its_bounds():
    p = torch.tensor(0.0)
    for _ in range(100):
        p = adapted_probability(p, torch.tensor(0.9), pictures=1000)
    assert p == pytest.approx(100 * 1000 / 500_000)
    assert adapted_probability(p, torch.tensor(0.3), pictures=1000) == pytest.approx(0.198)
    assert adapted_probability(p, torch.tensor(0.6), pictures=1000) == p
    assert adapted_probability(p, torch.tensor(1.0), pictures=10**6) == pytest.approx(0.8)
    assert adapted_probability(p, torch.tensor(-1.0), pictures=10**6) == 0


def test_the_probability_settles_where_the_target_is():
    """Against a discriminator that overfits less the more is varied: r = 1 − p."""
    p = torch.tensor(0.0)
    for _ in range(400):
        p = adapted_probability(p, 1 - p, pictures=1000, target=0.6)
    assert p == pytest.approx(0.4, abs=0.005)

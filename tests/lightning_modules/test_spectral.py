"""Spectral norm on weights that were put in place at once, against singular values."""

import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from lightning_modules.nets.spectral import fit_vectors, normalised, without_spectral_norm


def network() -> nn.Module:
    """Of layers of each kind, whose weights are new while the vectors belong to others."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 64, 3), nn.ConvTranspose2d(64, 24, 4), nn.Conv2d(24, 5, 1), nn.Flatten(), nn.LazyLinear(1)]
    made = nn.Sequential(*layers).eval()
    made(torch.zeros(1, 3, 5, 5))
    for i in (0, 1, 2, 4):
        spectral_norm(made[i])
    with torch.no_grad():
        for _, _, weight in normalised(made):
            weight.normal_()
    return made


def sigmas(made: nn.Module) -> list[float]:
    """The largest singular value of each weight as it is computed with."""
    found = []
    for i in (0, 1, 2, 4):
        weight = made[i].weight.detach()
        matrix = weight.transpose(0, 1) if isinstance(made[i], nn.ConvTranspose2d) else weight
        found.append(float(torch.linalg.matrix_norm(matrix.flatten(1), 2)))
    return found


def test_sigma_is_one_for_weights_put_in_place_at_once():
    made = network()
    assert max(sigmas(made)) > 1.1, "the vectors do not fit yet"
    before = [weight.clone() for _, _, weight in normalised(made)]
    fit_vectors(made)
    assert all(abs(sigma - 1) < 1e-4 for sigma in sigmas(made)), sigmas(made)
    assert all(torch.equal(a, b) for a, (_, _, b) in zip(before, normalised(made), strict=True))
    assert [name for name, _, _ in normalised(made)] == ["0", "1", "2", "4"]


def test_a_weight_of_zeros_stays_finite():
    made = nn.Sequential(spectral_norm(nn.Linear(4, 3))).eval()
    with torch.no_grad():
        made[0].parametrizations.weight.original.zero_()
    fit_vectors(made)
    assert all(buffer.isfinite().all() for buffer in made.buffers())


def test_a_copy_without_spectral_norm_is_plain_and_computes_the_same():
    made = network().train()
    fit_vectors(made)
    layers = [nn.Conv2d(3, 64, 3), nn.ConvTranspose2d(64, 24, 4), nn.Conv2d(24, 5, 1), nn.Flatten(), nn.Linear(180, 1)]
    plain, x, before = nn.Sequential(*layers), torch.randn(2, 3, 5, 5), list(made.state_dict())
    plain.load_state_dict(without_spectral_norm(made).state_dict())
    torch.testing.assert_close(plain(x), made.eval()(x), atol=1e-6, rtol=1e-6)
    assert list(made.state_dict()) == before

"""The losses of adversarial training against closed forms, torch's own, and the algorithms written out."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_modules.maths import adversarial as maths

REAL, FAKE = torch.tensor([-2.0, 0.5, 3.0]), torch.tensor([-3.0, -0.25, 1.0])


def test_hinge_and_wasserstein_are_their_sums():
    assert maths.hinge_discriminator(REAL, FAKE).item() == pytest.approx((3 + 0.5 + 0) / 3 + (0 + 0.75 + 2) / 3)
    assert maths.raise_scores(FAKE).item() == pytest.approx(2.25 / 3)
    assert maths.wasserstein_critic(REAL, FAKE).item() == pytest.approx(-2.25 / 3 - 1.5 / 3)


def test_cross_entropies_are_torchs_and_finite_where_a_sigmoid_is_exactly_0_or_1():
    ones, zeros = torch.ones(3), torch.zeros(3)
    both = F.binary_cross_entropy_with_logits(REAL, ones) + F.binary_cross_entropy_with_logits(FAKE, zeros)
    torch.testing.assert_close(maths.cross_entropy_discriminator(REAL, FAKE), both)
    alone = F.binary_cross_entropy_with_logits(FAKE, ones)
    torch.testing.assert_close(maths.non_saturating_generator(FAKE), alone)
    far = torch.tensor([-200.0, 200.0], requires_grad=True)
    loss = maths.non_saturating_generator(far)
    loss.backward()
    assert loss.item() == pytest.approx(100)
    assert far.grad.tolist() == pytest.approx([-0.5, 0.0])


def test_weights_are_clipped_in_place_and_a_nan_stays_one():
    weights = [torch.tensor([-1.0, 0.005, 1.0]), torch.tensor([float("nan")])]
    maths.clip_weights(weights, 0.01)
    torch.testing.assert_close(weights[0], torch.tensor([-0.01, 0.005, 0.01]))
    assert weights[1].isnan()


def test_the_penalty_of_a_linear_critic_is_closed_and_differentiable():
    """s(x) = w·x has the gradient w everywhere: (‖w‖ − 1)², whose derivative is 2(‖w‖ − 1) w/‖w‖."""
    weight = torch.randn(12, generator=torch.Generator().manual_seed(0), requires_grad=True)
    real, fake = torch.rand(2, 5, 3, 2, 2)
    penalty = maths.gradient_penalty(lambda x: x.flatten(1) @ weight, real, fake, torch.rand(5))
    norm = weight.detach().norm()
    torch.testing.assert_close(penalty, (norm - 1) ** 2)
    penalty.backward()
    torch.testing.assert_close(weight.grad, 2 * (norm - 1) * weight.detach() / norm)


def test_the_penalty_is_taken_between_the_pictures_and_is_autograds():
    """Against gradients by hand: s(x) = Σ v·tanh(x), ∂s/∂x = v(1 − tanh²x)."""
    generator = torch.Generator().manual_seed(1)
    real, fake = torch.randn(2, 4, 3, 2, 2, generator=generator)
    scale, share = torch.randn(3, 2, 2, generator=generator, requires_grad=True), torch.rand(4, generator=generator)
    penalty = maths.gradient_penalty(lambda x: (scale * x.tanh()).flatten(1).sum(1), real, fake, share)
    between = torch.stack([e * x + (1 - e) * y for e, x, y in zip(share, real, fake, strict=True)])
    by_hand = scale * (1 - between.tanh().square())
    expected = torch.stack([(each.norm() - 1) ** 2 for each in by_hand]).mean()
    torch.testing.assert_close(penalty, expected)
    found, wanted = (torch.autograd.grad(value, scale)[0] for value in (penalty, expected))
    torch.testing.assert_close(found, wanted)


def test_boundary_seeking_is_the_papers_square_of_log_odds():
    d = FAKE.double().sigmoid()
    expected = 0.5 * (d.log() - (1 - d).log()).square().mean()
    torch.testing.assert_close(maths.boundary_seeking_generator(FAKE).double(), expected, rtol=1e-6, atol=0)
    centred = maths.boundary_seeking_generator(FAKE, torch.tensor(0.7))
    assert centred.item() == pytest.approx(sum((s - 0.7) ** 2 for s in FAKE.tolist()) / 6)
    assert maths.boundary_seeking_generator(torch.tensor([60.0])).item() == 1800, "not through the sigmoid"


def test_log_z_is_the_log_of_the_mean_of_d_over_one_minus_d():
    assert maths.log_mean_exp(FAKE).item() == pytest.approx(math.log(sum(map(math.exp, FAKE.tolist())) / 3))
    assert maths.log_mean_exp(torch.tensor([500.0, 500.0])).item() == pytest.approx(500)
    assert maths.running(torch.tensor(2.0), torch.tensor(4.0), 0.995).item() == pytest.approx(2.01)


def test_the_balance_of_began_follows_its_equations_and_stays_in_its_range():
    generator, k, by_hand = torch.Generator().manual_seed(2), torch.tensor(0.0), 0.0
    for _ in range(200):
        real, fake = torch.rand(2, generator=generator)
        by_hand = min(max(by_hand + 0.1 * (0.5 * real.item() - fake.item()), 0.0), 1.0)
        k = maths.next_balance(k, real, fake, gamma=0.5, rate=0.1)
        assert k.item() == pytest.approx(by_hand, abs=1e-5)
        assert maths.equilibrium_discriminator(real, fake, k).item() == pytest.approx(
            real.item() - by_hand * fake.item(), abs=1e-5
        )
    assert maths.next_balance(torch.tensor(0.99), torch.tensor(9.0), torch.tensor(0.0), 0.5, 1.0) == 1
    assert maths.convergence(torch.tensor(0.4), torch.tensor(0.1), 0.5).item() == pytest.approx(0.4 + 0.1)
    pictures = torch.rand(2, 3, 4, 4)
    torch.testing.assert_close(maths.reconstruction_error(pictures, pictures + 0.25), torch.tensor(0.25))


@pytest.mark.parametrize(
    "turns",
    [
        maths.Turns(),
        maths.Turns(critic=5),
        maths.Turns(critic=5, longer=100, first=25, every=500),
        maths.Turns(critic=2, longer=3, first=0, every=4),
        maths.Turns(critic=2, longer=7, first=9, every=4),
        maths.Turns(critic=3, longer=4, first=5),
    ],
)
def test_turns_are_those_of_the_loop_written_out(turns):
    """As the authors' loop takes them: the critic's steps for each of the generator's, one after the other."""
    moved, step, i = set(), 0, 0
    while step < 9000:
        long = i < turns.first or (turns.every and i % turns.every == 0)
        step += turns.longer if long else turns.critic
        moved.add(step)
        i += 1
    assert {step for step in range(1, 9001) if turns.generator_moves(step)} == {s for s in moved if s <= 9000}


def test_the_penalty_reaches_a_networks_weights():
    torch.manual_seed(0)
    critic = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.GroupNorm(1, 4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 1))
    real, fake = torch.rand(2, 3, 3, 4, 4)
    maths.gradient_penalty(lambda x: critic(x)[:, 0], real, fake, torch.rand(3)).backward()
    grads = {name: p.grad for name, p in critic.named_parameters()}
    assert all(grads[name].abs().max() > 0 for name in ("0.weight", "1.weight", "4.weight"))
    assert grads["4.bias"] is None or not grads["4.bias"].any()

"""The mathematics of consistency distillation against diffusers and an ODE with known solution."""

import importlib.util
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, LatentConsistencyModelPipeline, LCMScheduler

from lightning_modules.maths.diffusion import (
    alphas_cumprod,
    scaled_linear_betas,
    to_noise,
    to_original,
    zero_terminal_snr,
)
from lightning_modules.maths.solvers import (
    SOLVERS,
    boundary_scalings,
    ddim_step,
    guidance_embedding,
    huber,
    leapfrog_step,
    midpoint_step,
)
from tests.conftest import REPOSITORY

BETAS = scaled_linear_betas(0.00085, 0.012, 1000)
ALPHA_BAR = alphas_cumprod(BETAS)
# LLCM's k = 20, down to step 0.
PUBLISHED_TIMES = [*range(999, 0, -20), 0]
STEPS = [16, 32, 64, 128, 256]


@pytest.fixture(scope="module")
def plot():
    """docs/plot_solvers.py, where the ODE with known solution is: what the picture shows is what is tested."""
    spec = importlib.util.spec_from_file_location("plot_solvers", REPOSITORY / "docs/plot_solvers.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def latents(rows: int = 4) -> torch.Tensor:
    return torch.randn(rows, 4, 6, 6, generator=torch.Generator().manual_seed(0))


def teacher(z_t: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A smooth function of both arguments, as an epsilon network."""
    noise = torch.sin(2 * z_t + t.reshape(-1, 1, 1, 1) / 300)
    return to_original("epsilon", noise, z_t, t, ALPHA_BAR), noise


def errors(plot, step, ticks: int) -> list[float]:
    """Of STEPS solver steps, each `ticks` integer time steps long."""
    return [plot.NormalMixture(plot.even_angles(n * ticks)).error(step, plot.even_times(n * ticks, n)) for n in STEPS]


@pytest.mark.parametrize("timestep_scaling", [10.0, 3.0])
def test_boundary_scalings_are_diffusers(timestep_scaling):
    reference = LCMScheduler(timestep_scaling=timestep_scaling)
    steps = [0, 1, 19, 499, 999]
    expected = [reference.get_scalings_for_boundary_condition_discrete(t) for t in steps]
    scalings = boundary_scalings(torch.tensor(steps), timestep_scaling=timestep_scaling)
    torch.testing.assert_close(torch.stack(scalings, dim=1), torch.tensor(expected), rtol=1e-6, atol=0)


def test_the_consistency_function_is_the_identity_at_step_zero():
    c_skip, c_out = boundary_scalings(torch.tensor([0, 1]), sigma_data=2.0, timestep_scaling=1.0)
    assert c_skip.tolist() == pytest.approx([1, 4 / 5])
    assert c_out.tolist() == pytest.approx([0, 1 / 5**0.5])


def test_guidance_embedding_is_diffusers_to_the_last_bit():
    w = 15 * torch.rand(50)
    expected = LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, w, 256)
    assert torch.equal(guidance_embedding(w, 256), expected)
    assert not torch.allclose(guidance_embedding(w, 256, scale=500.0), expected, atol=0.1)


def test_huber_is_its_definition_for_each_sample():
    a, b = latents(), latents().flip(0)
    for c in (0.001, 0.5):
        expected = ((a.double() - b.double()).square() + c**2).sqrt() - c
        torch.testing.assert_close(huber(a, b, c), expected.mean((1, 2, 3)).float(), rtol=1e-5, atol=0)


def test_huber_is_absolute_far_and_quadratic_near():
    a = latents()
    far, near = huber(a, torch.zeros_like(a), 1e-6), huber(1e-4 * a, torch.zeros_like(a), 10.0)
    torch.testing.assert_close(far, a.abs().mean((1, 2, 3)), rtol=1e-5, atol=0)
    torch.testing.assert_close(near, (1e-4 * a).square().mean((1, 2, 3)) / 20, rtol=1e-5, atol=0)


def test_huber_of_half_precision_is_taken_in_float32_and_has_a_gradient_at_zero():
    a = latents().half().requires_grad_()
    # In float16 c squared is less than the smallest number.
    distance = huber(a, torch.zeros_like(a), 1e-4)
    assert distance.dtype == torch.float32
    torch.testing.assert_close(distance, huber(a.float(), torch.zeros_like(a).float(), 1e-4))
    huber(a, a.detach(), 0.001).sum().backward()
    assert (a.grad == 0).all()


def test_published_leapfrog_is_the_ddim_step_to_the_last_bit():
    t, previous = torch.tensor([999, 519, 39, 19]), torch.tensor([979, 499, 19, 0])
    ddim = ddim_step(teacher, latents(), t, previous, ALPHA_BAR)
    assert torch.equal(leapfrog_step(teacher, latents(), t, previous, ALPHA_BAR), ddim)
    assert not torch.equal(leapfrog_step(teacher, latents(), t, previous, ALPHA_BAR, h=0.501), ddim)


def test_leapfrog_moves_by_h_times_twice_the_velocity():
    t, previous = torch.tensor([519] * 4), torch.tensor([499] * 4)
    z_0, noise = teacher(latents(), t)
    expected = ALPHA_BAR[499].sqrt() * z_0 + 0.3 * 2 * (1 - ALPHA_BAR[499]).sqrt() * noise
    torch.testing.assert_close(leapfrog_step(teacher, latents(), t, previous, ALPHA_BAR, h=0.3), expected)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("t", [999, 499, 19])
def test_ddim_step_is_diffusers(kind, t):
    options = {"clip_sample": False, "set_alpha_to_one": False, "timestep_spacing": "trailing"}
    reference = DDIMScheduler(trained_betas=BETAS.numpy(), prediction_type=kind, **options)
    reference.set_timesteps(50)
    output = latents().flip(0)

    def predict(z_t, t_B):
        return tuple(f(kind, output, z_t, t_B, ALPHA_BAR) for f in (to_original, to_noise))

    t_B = torch.full((4,), t)
    z = ddim_step(predict, latents(), t_B, (t_B - 20).clamp(min=0), ALPHA_BAR)
    torch.testing.assert_close(z, reference.step(output, t, latents()).prev_sample, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SOLVERS)
def test_every_row_goes_its_own_way_in_time(name):
    t, previous = torch.tensor([999, 519, 40, 1]), torch.tensor([979, 420, 39, 0])
    together = SOLVERS[name](teacher, latents(), t, previous, ALPHA_BAR)
    assert together.dtype == torch.float32
    for i in range(4):
        row = slice(i, i + 1)
        alone = SOLVERS[name](teacher, latents()[row], t[row], previous[row], ALPHA_BAR)
        torch.testing.assert_close(together[row], alone)


@pytest.mark.parametrize("name", ["ddim", "leapfrog"])
def test_ddim_and_published_leapfrog_are_of_first_order(plot, name):
    assert plot.order(STEPS, errors(plot, SOLVERS[name], ticks=4)) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("ticks", [1, 2, 3, 4])
def test_midpoint_is_of_second_order_also_where_the_step_between_is_not_in_the_middle(plot, ticks):
    measured = errors(plot, midpoint_step, ticks)
    assert plot.order(STEPS, measured) == pytest.approx(2, abs=0.1)
    assert measured[-1] < 3e-5


@pytest.mark.parametrize("h", [0.48, 0.52])
def test_leapfrog_with_another_h_does_not_converge(plot, h):
    measured = errors(plot, partial(leapfrog_step, h=h), ticks=1)
    assert measured == sorted(measured)
    assert measured[-1] > 0.5


@pytest.mark.parametrize("name", SOLVERS)
def test_a_step_of_no_length_stays(name):
    t = torch.tensor([0, 0, 500, 999])
    torch.testing.assert_close(SOLVERS[name](teacher, latents(), t, t, ALPHA_BAR), latents(), rtol=1e-4, atol=1e-4)


def middle_of(t: int, previous: int) -> int:
    """The time step before t whose angle is nearest to the middle."""
    angles = ((1 - ALPHA_BAR) / ALPHA_BAR).sqrt().arctan()
    return previous + int((angles[previous:t] - (angles[t] + angles[previous]) / 2).abs().argmin())


def test_midpoint_asks_twice_the_second_time_at_the_middle_of_the_angle():
    asked = []

    def predict(z_t, t_B):
        asked.append(t_B.tolist())
        return teacher(z_t, t_B)

    t, previous = [999, 519, 20, 3], [600, 499, 0, 2]
    midpoint_step(predict, latents(), torch.tensor(t), torch.tensor(previous), ALPHA_BAR)
    assert asked == [t, [middle_of(*pair) for pair in zip(t, previous, strict=True)]]


def test_midpoint_is_its_formula_on_the_circle():
    """Written with z and v = dz/dphi alone, as DDIM is in Salimans & Ho 2022, appendix D."""
    t, previous = 519, 320
    m = middle_of(t, previous)
    phi = ALPHA_BAR.double().sqrt().arccos()
    half, whole = phi[m] - phi[t], phi[previous] - phi[t]

    def velocity(z, step):
        z_0, noise = teacher(z, torch.full((4,), step))
        return phi[step].cos() * noise - phi[step].sin() * z_0

    z = latents().double()
    v = velocity(z, t)
    v_of_ddim = half.cos() * v - half.sin() * z
    growth = (velocity(half.cos() * z + half.sin() * v, m) - v_of_ddim) / half
    expected = whole.cos() * z + whole.sin() * (v + growth * whole / 2)
    t_B, previous_B = torch.full((4,), t), torch.full((4,), previous)
    stepped = midpoint_step(teacher, z, t_B, previous_B, ALPHA_BAR.double())
    # The teacher's schedule is float32.
    torch.testing.assert_close(stepped, expected, rtol=1e-5, atol=1e-5)


def test_on_stable_diffusion_s_time_steps_midpoint_is_nearer_at_equal_cost(plot):
    data = plot.NormalMixture(ALPHA_BAR.double())
    ddim = data.error(ddim_step, PUBLISHED_TIMES)
    assert data.error(midpoint_step, [*range(999, 0, -40), 0]) < ddim / 10
    assert data.error(midpoint_step, PUBLISHED_TIMES) < ddim / 40


def test_zero_terminal_snr_is_no_special_case(plot):
    data = plot.NormalMixture(alphas_cumprod(zero_terminal_snr(BETAS)).double())
    assert data.error(midpoint_step, PUBLISHED_TIMES) < data.error(ddim_step, PUBLISHED_TIMES) / 40


def test_half_precision_predictions_do_not_lower_the_precision_of_the_latents():
    def predict(z_t, t_B):
        return tuple(x.bfloat16() for x in teacher(z_t, t_B))

    t, previous = torch.tensor([519] * 4), torch.tensor([499] * 4)
    for step in SOLVERS.values():
        z = step(predict, latents(), t, previous, ALPHA_BAR)
        assert z.dtype == torch.float32
        assert F.l1_loss(z, step(teacher, latents(), t, previous, ALPHA_BAR)) < 0.01

"""Measure the solvers of LLCM on an ODE with known solution and draw their errors: `python docs/plot_solvers.py`."""

from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import click
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from lightning_modules.maths.diffusion import alphas_cumprod, scaled_linear_betas
from lightning_modules.maths.solvers import Step, ddim_step, leapfrog_step, midpoint_step

STEPS = [8, 16, 32, 64, 128, 256, 512, 1024]
_WEIGHTS, _MEANS, _DEVIATIONS = torch.tensor([[0.3, 0.7], [-1.0, 0.6], [0.2, 0.4]], dtype=torch.float64)
_STYLES = {
    "leapfrog, h = 0.52": (partial(leapfrog_step, h=0.52), {"color": "#b8412f", "linestyle": ":", "marker": "^"}),
    "leapfrog, h = 0.48": (partial(leapfrog_step, h=0.48), {"color": "#d9822b", "linestyle": ":", "marker": "v"}),
    "ddim": (ddim_step, {"color": "#2f6db8", "linewidth": 5, "alpha": 0.4}),
    "leapfrog, h = 0.5": (leapfrog_step, {"color": "#16324f", "linestyle": "--", "marker": "o"}),
    "midpoint": (midpoint_step, {"color": "#2b8a5a", "marker": "s"}),
}


@dataclass(frozen=True)
class NormalMixture:
    """Numbers from a mixture of two normal distributions: best prediction and probability flow are known exactly.

    In one dimension the flow keeps the order of the samples, so that each stays at its quantile.
    """

    alpha_bar: Tensor
    """float64 (T,), the schedule."""

    def predict(self, z_t_B: Tensor, t_B: Tensor) -> tuple[Tensor, Tensor]:
        """E[z_0 | z_t] and E[eps | z_t]."""
        a = self.alpha_bar[t_B, None]
        means, deviations = self._marginal(t_B)
        normalised = (z_t_B[:, None] - means) / deviations
        shares = (_WEIGHTS.log() - deviations.log() - normalised.square() / 2).softmax(1)
        z_0 = _MEANS + a.sqrt() * _DEVIATIONS.square() / deviations * normalised
        noise = (1 - a).sqrt() / deviations * normalised
        return (shares * z_0).sum(1), (shares * noise).sum(1)

    def quantiles(self, t: int) -> Tensor:
        """float64 (256,): z_t at evenly spaced probabilities, by bisection."""
        probability = (torch.arange(256, dtype=torch.float64) + 0.5) / 256
        means, deviations = self._marginal(torch.tensor([t]))
        low, high = torch.full_like(probability, -10), torch.full_like(probability, 10)
        for _ in range(60):
            middle = (low + high) / 2
            below = torch.special.ndtr((middle[:, None] - means) / deviations) @ _WEIGHTS < probability
            low, high = middle.where(below, low), high.where(below, middle)
        return low

    def error(self, step: Step, times: list[int]) -> float:
        """Root mean square error at the last of `times`, integer steps from the noisiest on."""
        z = self.quantiles(times[0])
        for pair in pairwise(times):
            t_B, previous_B = (torch.full((len(z),), time) for time in pair)
            z = step(self.predict, z, t_B, previous_B, self.alpha_bar)
        return (z - self.quantiles(times[-1])).square().mean().sqrt().item()

    def _marginal(self, t_B: Tensor) -> tuple[Tensor, Tensor]:
        """Means and standard deviations (B, 2) of the two parts of z_t."""
        a = self.alpha_bar[t_B, None]
        return a.sqrt() * _MEANS, (a * _DEVIATIONS.square() + 1 - a).sqrt()


def even_angles(last: int) -> Tensor:
    """float64 (last + 1,): alpha_bar of time steps evenly spaced in arctan(sigma / alpha), from 0.03 to 1.54."""
    return torch.linspace(0.03, 1.54, last + 1, dtype=torch.float64).cos().square()


def even_times(last: int, steps: int) -> list[int]:
    """steps + 1 time steps from `last` to 0, rounded to integers."""
    return np.linspace(last, 0, steps + 1).round().astype(int).tolist()


def order(steps: list[int], errors: list[float]) -> float:
    """The power of the step that the error goes with, fitted to the finer half."""
    half = len(steps) // 2
    return -float(np.polyfit(np.log(steps[half:]), np.log(errors[half:]), 1)[0])


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default="docs/images/solvers.png", help="PNG file to write.")
def main(out: Path) -> None:
    """Left: the order of convergence. Right: the error on Stable Diffusion's time steps at equal cost."""
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    _draw_orders(left)
    _draw_costs(right)
    for axes in (left, right):
        axes.set(xscale="log", yscale="log", ylim=(1e-7, 3))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(fontsize=8.5, frameon=False, loc="lower left")
    figure.savefig(out, dpi=130)


def _draw_orders(axes) -> None:
    data = NormalMixture(even_angles(STEPS[-1] * 8))
    for name, (step, style) in _STYLES.items():
        errors = [data.error(step, even_times(len(data.alpha_bar) - 1, n)) for n in STEPS]
        fitted = order(STEPS, errors)
        meaning = f"order {fitted:.2f}" if fitted > 0.5 else "does not converge"
        axes.plot(STEPS, errors, label=f"{name}: {meaning}", markersize=4, **style)
    axes.set_title("Order: steps even in arctan(σ/α)", fontsize=10)
    axes.set_xlabel("solver steps")
    axes.set_ylabel("root mean square error of z₀")


def _draw_costs(axes) -> None:
    data = NormalMixture(alphas_cumprod(scaled_linear_betas(0.00085, 0.012, 1000)).double())
    counts = [5, 10, 20, 50, 100, 200, 500]
    for name, (step, style) in _STYLES.items():
        evaluations = [n * (2 if name == "midpoint" else 1) for n in counts]
        errors = [data.error(step, even_times(999, n)) for n in counts]
        axes.plot(evaluations, errors, markersize=4, **style)
    axes.axvline(50, color="#888888", linewidth=0.8)
    axes.text(52, 1.5e-7, "50 DDIM steps:\nk = 20, as published", fontsize=8.5, color="#555555")
    axes.set_title("Cost: Stable Diffusion's 1,000 time steps", fontsize=10)
    axes.set_xlabel("predictions of the teacher")


if __name__ == "__main__":
    main()

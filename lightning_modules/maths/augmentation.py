"""Augmentation of all that a discriminator sees, through which the generator's gradient flows; and how much of it.

DiffAugment (Zhao et al. 2020) varies real and generated pictures alike; ADA (Karras et al. 2020) does so with a
probability p that follows how far the discriminator overfits. Below p = 0.8 the distribution of the varied pictures
still tells that of the others, so that the generator does not learn to draw varied ones (ADA, appendix C).

Shapes: x_BCHW pictures in [-1, 1], grey 0; what is varied may leave that range. Random numbers come from the caller,
float (B, DRAWS) in [0, 1): a picture is varied alike in any batch.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

DRAWS = 12
"""Random numbers that a picture takes, whatever is done to it."""

POLICIES = ("color", "translation", "cutout")
"""What can be done: `color` is brightness, saturation and contrast."""


def diff_augment(
    x_BCHW: Tensor, draws_BK: Tensor, policies: Sequence[str] = POLICIES, p: float | Tensor = 1.0
) -> Tensor:
    """The pictures varied by each of `policies` (of `POLICIES`, in the order given there), shape and dtype as x.

    p: probability of each change, by itself, for each picture; 1 is DiffAugment, 0 changes nothing.
    """
    gates_BK, values_BK = draws_BK.to(x_BCHW.device).split([5, DRAWS - 5], dim=1)
    steps = [step for policy in POLICIES if policy in policies for step in _STEPS[policy]]
    for change, gate, values in steps:
        applied_B = gates_BK[:, gate] < p
        varied_BCHW = change(x_BCHW, *values_BK[:, values].unbind(1))
        x_BCHW = torch.where(applied_B[:, None, None, None], varied_BCHW, x_BCHW)
    return x_BCHW


def brightness(x_BCHW: Tensor, u_B: Tensor) -> Tensor:
    """x + u − ½."""
    return x_BCHW + _maps(u_B - 0.5, x_BCHW)


def saturation(x_BCHW: Tensor, u_B: Tensor) -> Tensor:
    """2u times as far from each pixel's mean over the colours."""
    mean_B1HW = x_BCHW.mean(dim=1, keepdim=True)
    return mean_B1HW + (x_BCHW - mean_B1HW) * _maps(2 * u_B, x_BCHW)


def contrast(x_BCHW: Tensor, u_B: Tensor) -> Tensor:
    """u + ½ times as far from the picture's mean."""
    mean_B111 = x_BCHW.mean(dim=(1, 2, 3), keepdim=True)
    return mean_B111 + (x_BCHW - mean_B111) * _maps(u_B + 0.5, x_BCHW)


def translation(x_BCHW: Tensor, u_B: Tensor, v_B: Tensor, share: float = 0.125) -> Tensor:
    """Moved by whole pixels, down and right by evenly up to `share` of the side to either side; grey comes in."""
    for dim, draw_B in ((2, u_B), (3, v_B)):
        side = x_BCHW.shape[dim]
        most = int(side * share + 0.5)
        moved_B = _integers(draw_B, 2 * most + 1) - most
        place_BS = torch.arange(side, device=x_BCHW.device) - moved_B[:, None]
        inside_BS = (place_BS >= 0) & (place_BS < side)
        shape = [len(x_BCHW), 1, 1, 1]
        shape[dim] = side
        index = place_BS.clamp(0, side - 1).view(shape).expand_as(x_BCHW)
        x_BCHW = x_BCHW.gather(dim, index) * inside_BS.view(shape)
    return x_BCHW


def cutout(x_BCHW: Tensor, u_B: Tensor, v_B: Tensor, share: float = 0.5) -> Tensor:
    """Grey in a square of `share` of the side, whose centre lies evenly anywhere in the picture."""
    covered = x_BCHW.new_ones(len(x_BCHW), 1, 1, 1, dtype=torch.bool)
    for dim, draw_B in ((2, u_B), (3, v_B)):
        side = x_BCHW.shape[dim]
        extent = int(side * share + 0.5)
        first_B = _integers(draw_B, side + 1 - extent % 2) - extent // 2
        place = torch.arange(side, device=x_BCHW.device)
        shape = [len(x_BCHW), 1, 1, 1]
        shape[dim] = side
        covered = covered & ((place >= first_B[:, None]) & (place < first_B[:, None] + extent)).view(shape)
    return x_BCHW * ~covered


def overfitting(real_B: Tensor) -> Tensor:
    """r_t = E sign(D(x)), a scalar in [-1, 1], of logits of real pictures: 0 is none, 1 all (ADA, eq. 1)."""
    return real_B.detach().float().sign().mean()


def adapted_probability(
    p: Tensor, overfit: Tensor, pictures: int, target: float = 0.6, ramp: int = 500_000, most: float = 0.8
) -> Tensor:
    """p after `pictures` more real ones: up where r_t is above the target, down where below, within [0, most].

    overfit: mean r_t of these pictures, over all processes. ramp: pictures that take p from 0 to 1 (ADA, section 3.1).
    most: beyond about 0.8 the augmentation would show in what is generated.
    """
    return (p + (overfit - target).sign() * (pictures / ramp)).clamp(0, most)


Change = Callable[..., Tensor]
# Of each policy: its changes, and which of the draws are its gate and its values.
_STEPS: dict[str, list[tuple[Change, int, slice]]] = {
    "color": [(brightness, 0, slice(0, 1)), (saturation, 1, slice(1, 2)), (contrast, 2, slice(2, 3))],
    "translation": [(translation, 3, slice(3, 5))],
    "cutout": [(cutout, 4, slice(5, 7))],
}


def _integers(u_B: Tensor, high: int) -> Tensor:
    """int64 (B,) evenly in [0, high), of u in [0, 1)."""
    return (u_B.double() * high).long().clamp(max=high - 1)


def _maps(values_B: Tensor, x_BCHW: Tensor) -> Tensor:
    """One value a picture, in the dtype of x, as it meets (B, C, H, W)."""
    return values_B.to(x_BCHW.dtype)[:, None, None, None]

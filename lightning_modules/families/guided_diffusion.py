"""A frozen Stable Diffusion whose pictures another network leads: the gradient of a distance is added to its noise."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from datamodules.batches import ImageBatch
from lightning_modules.base import Supports
from lightning_modules.families.latent_diffusion import Context, Denoised
from lightning_modules.families.stable_diffusion import StableDiffusionBase, StableDiffusionBaseConfig
from lightning_modules.maths.diffusion import (
    SampleRandom,
    at,
    guide,
    predicted_original,
    to_noise,
    to_original,
    training_target,
)

Distance = Callable[[Tensor], Tensor]
"""Pictures (n, 3, H, W) in [0, 1], still noisy, to how far (n,) each is from where it is to be led; differentiable."""


class GuidedDiffusion(StableDiffusionBase):
    """Stable Diffusion as a generator that does not learn; `led` says what its pictures are led by.

    Each step adds to the noise that is predicted (with classifier-free guidance, as ever) the gradient of the distance
    of a picture between the one the conditional prediction implies and the noisy one (Crowson 2021, CLIP-guided
    diffusion, in latent space),

        x̂_0 from ε(z, c),    s = √(1 − ᾱ)·x̂_0 + (1 − √(1 − ᾱ))·z,    ε ← ε + √(1 − ᾱ)·∇_z distance(decode(s)),

    through decoder and U-Net. Distances are summed over the samples, so that each is led by its own alone.
    """

    config: StableDiffusionBaseConfig
    supports = Supports(frozenset({"captions"}), negatives=True)
    _distance: Distance | None = None

    def trainable_modules(self) -> dict[str, nn.Module]:
        return {}

    @contextmanager
    def led(self, distance: Distance) -> Iterator[None]:
        """Inside, what is drawn is led; `distance` is asked once a step, of all pictures of the call of `draw`."""
        self._distance = distance
        try:
            yield
        finally:
            self._distance = None

    def denoise(
        self, z_t: Tensor, t: Tensor, context: Context, self_condition: Tensor | None, guidance: float
    ) -> Denoised:
        if self._distance is None:
            return super().denoise(z_t, t, context, self_condition, guidance)
        rows = len(z_t)
        # Evaluation runs in inference mode, whose tensors no graph takes: copies made outside it are plain ones.
        with torch.inference_mode(False), torch.enable_grad():
            z, steps = z_t.clone().requires_grad_(), t.clone()
            conditional = self.predict(z, steps, _of(context, slice(-rows, None))).float()
            share = (1 - at(self.alpha_bar, steps, z.ndim)).sqrt()
            mixed = share * to_original(self.prediction, conditional, z, steps, self.alpha_bar) + (1 - share) * z
            pictures = (self.decode(mixed).float() / 2 + 0.5).clamp(0, 1)
            (slope,) = torch.autograd.grad(self._distance(pictures).sum(), z)
        output = conditional.detach()
        if guidance != 1:
            output = guide(self.predict(z_t, t, _of(context, slice(0, rows))).float(), output, guidance)
        noise = to_noise(self.prediction, output, z_t, t, self.alpha_bar) + share.detach() * slope
        original = predicted_original(z_t, noise, t, self.alpha_bar)
        return Denoised(training_target(self.prediction, original, noise, t, self.alpha_bar), original)

    def latent_losses(self, z_0: Tensor, random: SampleRandom, batch: ImageBatch) -> dict[str, Tensor]:
        raise NotImplementedError("this generator does not learn")

    def export(self, directory: Path) -> None:
        raise NotImplementedError("this generator is the folder that it was loaded from")


def cutouts(pictures: Tensor, side: int, places: Tensor) -> Tensor:
    """Square parts of pictures (n, 3, R, R) in [0, 1], each brought to `side` pixels.

    places: (n, k, 3) in [0, 1): of each part the size, from `side` (or R, where that is less) to R, and the place
    across and down. Returns (n · k, 3, side, side), the parts of a picture together.
    """
    whole = pictures.shape[-1]
    least = min(side, whole)
    parts = []
    for picture, own in zip(pictures, places.tolist(), strict=True):
        for size_share, across, down in own:
            size = least + int(size_share * (whole - least + 1))
            left, top = (int(share * (whole - size + 1)) for share in (across, down))
            part = picture[None, :, top : top + size, left : left + size]
            parts.append(nn.functional.interpolate(part, (side, side), mode="bicubic", antialias=True))
    return torch.cat(parts).clamp(0, 1)


def _of(context: Context, rows: slice) -> Context:
    """A copy of rows of what the U-Net is told."""
    return Context(context.embeddings[rows].clone(), context.mask[rows].clone())

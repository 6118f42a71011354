"""How near generated pictures come to the real ones that they were asked to repeat."""

import math

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from medsynth.errors import UserError
from metrics.sync import all_reduce

PAIRED = ("psnr", "psnr_pooled", "ssim", "ssim_whole")
"""The names of the scores."""
_MARGIN = 5  # pixels of a window beside its middle


class PairedSimilarity(Metric):
    """PSNR and SSIM (Wang et al. 2004) of pictures against their counterparts.

    PSNR is the mean over the pictures and, pooled, that of the mean error of all. SSIM has Gaussian windows of 11
    pixels, standard deviation 1.5: at every pixel, borders mirrored, and only where the whole window lies in the
    picture, as the paper defines it; both are means over the pictures.

    States: `sums` and `squares` (4,), float64, over the pictures, of PSNR, SSIM, SSIM of whole windows and mean squared
    error, and of their squares; `seen` (total,), int32, how often each picture came.
    """

    full_state_update = False

    def __init__(self, total: int):
        """`total` pairs over all processes."""
        super().__init__(dist_sync_fn=all_reduce)
        self.add_state("sums", torch.zeros(4, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("squares", torch.zeros(4, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("seen", torch.zeros(total, dtype=torch.int32), dist_reduce_fx="sum")

    def update(self, images: Tensor, reals: Tensor, indices: Tensor) -> None:
        """Add pairs, uint8 (n, 3, H, W) each, at least 11 pixels a side.

        `indices`, int64 (n,), are the pairs' places in the whole set, 0 … total-1, each seen once over all processes;
        -1 marks padding, which is not scored.

        Raises:
            UserError: the pictures are smaller than a window.
        """
        if min(images.shape[-2:]) < 2 * _MARGIN + 1:
            raise UserError(
                f"SSIM looks through windows of 11 pixels: pairs of {tuple(images.shape[-2:])} have no room"
            )
        indices = indices.to(self.device)
        scored = indices >= 0
        if not scored.any():
            return
        # float64: a convolution's rounding differs with the size of the batch.
        ours, theirs = (pictures.to(self.device)[scored].double() / 255 for pictures in (images, reals))
        psnr = peak_signal_noise_ratio(ours, theirs, data_range=1.0, reduction="none", dim=(1, 2, 3))
        ssim, everywhere = structural_similarity_index_measure(
            ours, theirs, data_range=1.0, reduction="none", return_full_image=True
        )
        whole = everywhere[..., _MARGIN:-_MARGIN, _MARGIN:-_MARGIN].mean(dim=(1, 2, 3))
        error = (ours - theirs).square().mean(dim=(1, 2, 3))
        # Nothing in place: a state made under inference_mode could not be changed outside it.
        values = torch.stack([psnr, ssim, whole, error])
        self.sums, self.squares = self.sums + values.sum(dim=1), self.squares + values.square().sum(dim=1)
        ones = torch.ones_like(indices[scored], dtype=torch.int32)
        self.seen = self.seen.index_add(0, indices[scored], ones)

    def compute(self) -> dict[str, float]:
        """`PAIRED`, by name: `psnr` and `psnr_pooled`, dB, infinite where a picture, or each, is repeated exactly;
        `ssim` and `ssim_whole`, at most 1. All processes call it together.

        Raises:
            ValueError: some pair is missing or came twice.
        """
        if not (self.seen == 1).all():
            missing, repeated = int((self.seen == 0).sum()), int((self.seen > 1).sum())
            raise ValueError(f"of {len(self.seen)} pairs to score, {missing} never came and {repeated} more than once")
        psnr, ssim, whole, error = (self.sums / len(self.seen)).tolist()
        pooled = -10 * math.log10(error) if error else math.inf
        return dict(zip(PAIRED, (psnr, pooled, ssim, whole), strict=True))

    def errors(self) -> dict[str, float]:
        """The standard errors of the finite scores: deviation over the pictures / √n; of pooled PSNR to first order.

        For one process, with pairs that have all come.
        """
        n = len(self.seen)
        mean = self.sums / n
        psnr, ssim, whole, error = ((self.squares / n - mean.square()).clamp(min=0) / max(n - 1, 1)).sqrt().tolist()
        pooled = 10 / math.log(10) * error / mean[3].item() if mean[3] else math.nan
        found = dict(zip(PAIRED, (psnr, pooled, ssim, whole), strict=True))
        return {name: value for name, value in found.items() if math.isfinite(value)}

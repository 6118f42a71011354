"""How near generated pictures come to the real ones that they were asked to repeat."""

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from metrics.sync import all_reduce


class PairedSimilarity(Metric):
    """PSNR and SSIM (Wang et al. 2004) of pictures against their counterparts, each the mean over the pictures.

    SSIM has Gaussian windows of 11 pixels, standard deviation 1.5, at every pixel: borders are mirrored.

    States: `sums` (2,), float64, of both over the pictures; `seen` (total,), int32, how often each picture came.
    """

    full_state_update = False

    def __init__(self, total: int):
        """`total` pairs over all processes."""
        super().__init__(dist_sync_fn=all_reduce)
        self.add_state("sums", torch.zeros(2, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("seen", torch.zeros(total, dtype=torch.int32), dist_reduce_fx="sum")

    def update(self, images: Tensor, reals: Tensor, indices: Tensor) -> None:
        """Add pairs, uint8 (n, 3, H, W) each, at least 6 pixels a side.

        `indices`, int64 (n,), are the pairs' places in the whole set, 0 … total-1, each seen once over all processes;
        -1 marks padding, which is not scored.
        """
        indices = indices.to(self.device)
        scored = indices >= 0
        if not scored.any():
            return
        # float64: a convolution's rounding differs with the size of the batch.
        ours, theirs = (pictures.to(self.device)[scored].double() / 255 for pictures in (images, reals))
        psnr = peak_signal_noise_ratio(ours, theirs, data_range=1.0, reduction="none", dim=(1, 2, 3))
        ssim = structural_similarity_index_measure(ours, theirs, data_range=1.0, reduction="none")
        assert isinstance(ssim, Tensor)  # a tuple only where the full picture of it is asked for
        # Nothing in place: a state made under inference_mode could not be changed outside it.
        self.sums = self.sums + torch.stack([psnr.sum(), ssim.sum()])
        ones = torch.ones_like(indices[scored], dtype=torch.int32)
        self.seen = self.seen.index_add(0, indices[scored], ones)

    def compute(self) -> dict[str, float]:
        """`psnr`, dB, infinite where a picture is repeated exactly; `ssim`, at most 1. All processes call it together.

        Raises:
            ValueError: some pair is missing or came twice.
        """
        if not (self.seen == 1).all():
            missing, repeated = int((self.seen == 0).sum()), int((self.seen > 1).sum())
            raise ValueError(f"of {len(self.seen)} pairs to score, {missing} never came and {repeated} more than once")
        psnr, ssim = (self.sums / len(self.seen)).tolist()
        return {"psnr": psnr, "ssim": ssim}

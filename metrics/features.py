"""What the distances need to know of one set of pictures, gathered over batches and processes."""

import torch
from torch import Tensor
from torchmetrics import Metric

from medsynth.errors import UserError
from metrics.sync import all_reduce


class FeatureStatistics(Metric):
    """Moments of the features of all pictures of a set, and the features themselves of at most `max_bank` of them.

    Which pictures the bank keeps is a fixed pseudo-random subset of 0 … total-1, so that it does not depend on how the
    set was dealt out; each has its row, which one process fills and the others leave zero. So every state is a plain
    sum over the processes: no process waits for another's lists, and one without pictures adds nothing.

    States: `moment1` (dim,) and `moment2` (dim, dim), float64, sums of x and x xᵀ over the pictures; `bank` (m, dim),
    float32, m = min(total, max_bank); `seen` (total,), int32, how often each picture came; `broken` (), int64, pictures
    whose features are not finite.
    """

    full_state_update = False

    def __init__(self, dim: int, total: int, max_bank: int = 10_000, kind: str = "pictures"):
        """`dim` features a picture, `total` pictures over all processes, which messages call `kind`.

        Raises:
            UserError: fewer than two pictures, which have no covariance.
        """
        if total < 2:
            raise UserError(f"Scores need at least 2 {kind}, not {total}")
        super().__init__(dist_sync_fn=all_reduce, compute_with_cache=False)
        self.total, self.kind = total, kind
        banked = torch.randperm(total, generator=torch.Generator().manual_seed(0))[:max_bank].sort().values
        rows = torch.full((total,), -1).index_copy(0, banked, torch.arange(len(banked)))
        self.register_buffer("rows", rows, persistent=False)
        self.add_state("moment1", torch.zeros(dim, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("moment2", torch.zeros(dim, dim, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("bank", torch.zeros(len(banked), dim), dist_reduce_fx="sum")
        self.add_state("seen", torch.zeros(total, dtype=torch.int32), dist_reduce_fx="sum")
        self.add_state("broken", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, features: Tensor, indices: Tensor) -> None:
        """Add `features`, float32 (n, dim), of the pictures `indices`, int64 (n,) in 0 … total-1, each once in all."""
        exact = features.double()
        rows = self.rows[indices]
        banked = rows >= 0
        # In place: a copy of the second moments at each call would take longer than the moments.
        self.moment1 = _writable(self.moment1).add_(exact.sum(dim=0))
        self.moment2 = _writable(self.moment2).addmm_(exact.T, exact)
        self.bank = _writable(self.bank).index_copy_(0, rows[banked], features[banked])
        self.seen = _writable(self.seen).index_add_(0, indices, torch.ones_like(indices, dtype=torch.int32))
        self.broken = _writable(self.broken).add_((~features.isfinite().all(dim=1)).sum())

    def compute(self) -> dict[str, Tensor]:
        """`mean` (dim,) and unbiased `covariance` (dim, dim), float64, of the `count`, int64 (), pictures, and the
        banked `features`, float32 (m, dim), in the order of the pictures' indices.

        Raises:
            ValueError: some picture is missing or came twice.
            UserError: features of some picture are not finite.
        """
        if not (self.seen == 1).all():
            missing, repeated = int((self.seen == 0).sum()), int((self.seen > 1).sum())
            raise ValueError(f"of {self.total} pictures to score, {missing} never came and {repeated} more than once")
        if self.broken:
            raise UserError(
                f"{int(self.broken)} of {self.total} {self.kind} have features that are not finite (NaN, infinite), so "
                "that nothing can be scored: look at these pictures and at the extractor's weights"
            )
        mean = self.moment1 / self.total
        covariance = (self.moment2 - self.total * torch.outer(mean, mean)) / (self.total - 1)
        return {"count": self.seen.sum(), "mean": mean, "covariance": covariance, "features": self.bank}


def _writable(state: Tensor) -> Tensor:
    """`state`, or a copy where it was made under inference_mode and cannot be changed outside it."""
    return state.clone() if state.is_inference() and not torch.is_inference_mode_enabled() else state

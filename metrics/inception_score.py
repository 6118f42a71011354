"""Inception Score (Salimans et al. 2016, "Improved techniques for training GANs", section 4)."""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric

from medsynth.errors import UserError
from metrics.sync import all_reduce


class InceptionScore(Metric):
    """exp E KL(p(y|x) ‖ p(y)): mean and standard deviation over random parts of the set, each score in [1, classes].

    A picture's part follows from its index and `total` alone, and is the one torch-fidelity's shuffle puts it in; each
    part is kept as sums over its pictures: `probability` (splits, classes) and `negentropy` (splits,), float64;
    `counts` (splits,), int64.
    """

    full_state_update = False

    def __init__(self, total: int, classes: int, splits: int = 10, seed: int = 2020):
        """`total` pictures over all processes, `classes` logits each.

        Raises:
            UserError: fewer pictures than splits.
        """
        if total < splits:
            raise UserError(
                f"The Inception Score is taken over {splits} parts: score at least {splits} pictures, not {total}"
            )
        super().__init__(dist_sync_fn=all_reduce)
        self.splits = splits
        bounds = np.arange(splits + 1) * total // splits
        parts = np.empty(total, dtype=np.int64)
        # Part i holds the pictures at the places bounds[i] … bounds[i+1]-1 of the shuffled set.
        parts[np.random.RandomState(seed).permutation(total)] = np.repeat(np.arange(splits), np.diff(bounds))
        self.register_buffer("parts", torch.from_numpy(parts), persistent=False)
        self.register_buffer("sizes", torch.from_numpy(np.diff(bounds)), persistent=False)
        self.add_state("probability", torch.zeros(splits, classes, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("negentropy", torch.zeros(splits, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(splits, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, indices: Tensor) -> None:
        """Add `logits` (n, classes) of the pictures `indices`, int64 (n,) in 0 … total-1, each once in all."""
        log_p = logits.double().log_softmax(dim=1)
        p = log_p.exp()
        membership = F.one_hot(self.parts[indices], self.splits)
        # Nothing in place: a state made under inference_mode could not be changed outside it.
        self.probability = self.probability + membership.double().T @ p
        self.negentropy = self.negentropy + membership.double().T @ (p * log_p).sum(dim=1)
        self.counts = self.counts + membership.sum(dim=0)

    def compute(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, float64 scalars.

        Raises:
            ValueError: some picture is missing or came twice.
        """
        if not torch.equal(self.counts, self.sizes):
            raise ValueError(
                f"{int(self.counts.sum())} pictures were scored where each of {len(self.parts)} is due once"
            )
        marginal = self.probability / self.counts[:, None]
        # E KL(p ‖ q) = E Σ p log p - Σ q log q, for q = E p.
        scores = (self.negentropy / self.counts - torch.xlogy(marginal, marginal).sum(dim=1)).exp()
        return scores.mean(), scores.std(correction=0)

"""Recall of pictures for prompts, of prompts for pictures, and zero-shot accuracy, out of embeddings in one space."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

RANKS = (1, 5, 10)
_DECIMALS = 5  # of a cosine: what an embedding in float32 is good for, whatever batch it was computed in


def score_names() -> list[str]:
    """What `RetrievalScores.compute` names its scores, in its order."""
    ways = [f"{way}_recall_{rank}" for way in ("text_to_image", "image_to_text") for rank in RANKS]
    return [*ways, "zero_shot_accuracy"]


def recall_at(rank: int, scores: Tensor, relevant: Tensor) -> Tensor:
    """Probability, float64 (q,), that a relevant one is among the `rank` best of each query; ties in random order.

    Let a be the candidates above the best relevant one, m those that tie with it and r the relevant among these. With
    k = rank - a places left for the m,

        P = 0 if k <= 0,    1 if k > m - r,    else 1 - C(m - r, k) / C(m, k).

    So scores that are all alike have the recall of chance, and not that of whatever order the sort leaves.

    Args:
        scores: float64 (q, n). relevant: bool (q, n), at least one in each row.
    """
    best = scores.masked_fill(~relevant, -torch.inf).amax(1, keepdim=True)
    above, level = (scores > best).sum(1).double(), scores == best
    tied, hits = level.sum(1).double(), (level & relevant).sum(1).double()
    places = (rank - above).clamp(min=0)
    missed = torch.exp(_log_choose(tied - hits, places) - _log_choose(tied, places))
    return torch.where(places > tied - hits, 1.0, 1.0 - missed)


def _log_choose(n: Tensor, k: Tensor) -> Tensor:
    """log C(n, k); where k exceeds n some finite number, which nobody looks at."""
    k = torch.minimum(k, n)
    return torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)


class RetrievalScores(Metric):
    """How well each of a set of pictures and their prompts finds the other among all of them.

    `text_to_image_recall_K`, for K of `RANKS`: the share of prompts that have a picture of theirs among the K nearest
    pictures. `image_to_text_recall_K`: the share of pictures that have a prompt of theirs among the K nearest prompts;
    candidates are the prompts of these pictures. `zero_shot_accuracy`: the share of pictures whose nearest prompt is
    one of theirs, among all prompts that there are. A picture with ten prompts counts once, and so does a prompt of
    many pictures; equal similarities count as if in random order.

    States: a row for each pair that was seen, `pictures` (n, D) float32, `picture_ids` and `prompts` (n,) int64. The
    order of the rows, and so the number of processes and the size of the batches, change nothing.
    """

    full_state_update = False
    pictures: list[Tensor]
    picture_ids: list[Tensor]
    prompts: list[Tensor]

    def __init__(self, **kwargs: Any):
        """kwargs: torchmetrics' own."""
        super().__init__(**kwargs)
        for name in ("pictures", "picture_ids", "prompts"):
            self.add_state(name, [], dist_reduce_fx="cat")
        self.known: Tensor | None = None

    def update(self, pictures: Tensor, picture_ids: Tensor, prompts: Tensor) -> None:
        """Add pairs: embeddings (n, D) of length 1, the identity (n,) of each picture, and the row (n,) of each prompt
        among all of them. All processes call it at least once, with n = 0 where they have none."""
        self.pictures.append(pictures.float())
        self.picture_ids.append(picture_ids)
        self.prompts.append(prompts)

    def compare_with(self, prompts: Tensor) -> None:
        """The embeddings (m, D), of length 1, of all prompts: of the pairs' own, and of others that zero-shot accuracy
        has as candidates. The same in each process, before `compute`."""
        self.known = prompts

    def compute(self) -> dict[str, float]:
        """Every score by its name, in [0, 1]; {} where no pair was seen. All processes call it together."""
        assert self.known is not None, "`compare_with` comes first"
        pictures, picture_ids, prompts = (
            torch.cat(rows) if isinstance(rows, list) else rows
            for rows in (self.pictures, self.picture_ids, self.prompts)
        )
        if not len(pictures):
            return {}
        ids, rows = picture_ids.unique(return_inverse=True)
        known = self.known.double()
        means = known.new_zeros(len(ids), known.shape[1]).index_add_(0, rows, pictures.double())
        means = means / rows.bincount()[:, None]
        similarity = (means @ known.T).round(decimals=_DECIMALS)
        relevant = torch.zeros_like(similarity, dtype=torch.bool)
        relevant[rows, prompts] = True
        asked = relevant.any(0)
        within, own = similarity[:, asked], relevant[:, asked]
        values = [recall_at(rank, within.T, own.T) for rank in RANKS]
        values += [recall_at(rank, within, own) for rank in RANKS]
        values.append(recall_at(1, similarity, relevant))
        return {name: value.mean().item() for name, value in zip(score_names(), values, strict=True)}

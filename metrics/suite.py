"""All scores of a set of generated pictures against a set of real ones."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from medsynth.errors import UserError
from metrics.extractors import FeatureExtractor
from metrics.features import FeatureStatistics
from metrics.frechet import frechet_distance
from metrics.kernel import cmmd, full_kernel_distance, kernel_distance
from metrics.manifold import density_coverage, precision_recall

_NEIGHBOURS = 5  # of density and coverage
LEAST = 4
"""Pictures of a set that can be scored: precision and recall look at the third nearest other."""
_PUBLISHED = {"inception": "", "clean_inception": "clean_"}
"""Extractors whose scores have names of their own, and how these begin."""
MAX_BANK = 10_000
"""Pictures of a set whose features are kept."""


def score_names(extractor: str, has_logits: bool) -> list[str]:
    """What `GenerationMetrics.compute` names its scores with an extractor of that name, in its order."""
    if extractor in _PUBLISHED:
        before, behind, fd, kd = _PUBLISHED[extractor], "", "fid", "kid"
    else:
        before, behind, fd, kd = "", f"_{extractor}", "fd", "kd"
    kinds = [fd, kd, f"{kd}_std", f"{kd}_full", "precision", "recall", "f1", "density", "coverage"]
    kinds += ["cmmd"] if is_clip(extractor) else []
    kinds += ["isc", "isc_std"] if has_logits else []
    named = [(kind.removesuffix("_std"), "_std" if kind.endswith("_std") else "") for kind in kinds]
    names = [f"{before}{name}{behind}{spread}" for name, spread in named]
    if extractor != "clef":
        return names
    theirs = {"fd_clef": "clef_fid", "isc_clef": "clef_is", "isc_clef_std": "clef_is_std"}
    return [*(theirs.get(name, name) for name in names), "clef_is_median"]


def infinity_name(extractor: str) -> str:
    """The name of the extrapolated Fréchet distance with an extractor of that name."""
    name = score_names(extractor, False)[0]
    return name.replace("fd_", "fd_inf_", 1) if name.startswith("fd_") else f"{name}_inf"


def all_names(extractor: FeatureExtractor) -> list[str]:
    """The names of all that can be computed with an extractor."""
    return [*score_names(extractor.name, extractor.has_logits), infinity_name(extractor.name)]


def is_clip(extractor: str) -> bool:
    """Whether an extractor of that name gives embeddings of CLIP, by which CMMD compares."""
    return extractor.partition("_")[0] == "clip"


class GenerationMetrics(nn.Module):
    """Fréchet and kernel distance, precision, recall and F1, density and coverage, and the Inception Score where the
    extractor has logits.

    Every process updates it with its own share of the pictures, however uneven; `compute` gives the same numbers on
    each, and for any number of processes. Fréchet distance and Inception Score take in all pictures; the others
    at most `max_bank` of each set, chosen by their indices alone. Each set takes about
    16 dim² + 8 max_bank dim bytes.

    With extractor "inception" the scores are named fid, kid, kid_std, kid_full, precision, recall, f1, density,
    coverage, isc, isc_std; with any other, say "random", fd_random, kd_random, kd_random_std, kd_full_random,
    precision_random … The kernel distance is the mean over subsets, and over all pairs at once with "full"; its
    deviation is over subsets, and left out where every subset would be the whole of both sets. Density and coverage are
    left out of fewer than 6 real pictures.
    """

    def __init__(
        self,
        extractor: FeatureExtractor,
        total_real: int,
        total_fake: int,
        max_bank: int = MAX_BANK,
        keep_logits: bool = False,
    ):
        """`total_real` and `total_fake` pictures over all processes.

        keep_logits: keep those of each generated picture for `part`, 4 bytes each; of one process alone.

        Raises:
            UserError: too few pictures to score.
        """
        super().__init__()
        for kind, number in (("real pictures", total_real), ("generated pictures", total_fake), ("banked", max_bank)):
            if number < LEAST:
                raise UserError(f"Scores need at least {LEAST} {kind}, not {number}")
        self.extractor = extractor
        self.real = FeatureStatistics(extractor.dim, total_real, max_bank, "real pictures")
        self.fake = FeatureStatistics(extractor.dim, total_fake, max_bank, "generated pictures")
        self.class_score = extractor.class_score(total_fake)
        self._real_state: dict[str, Tensor] | None = None
        self._logits = torch.zeros(total_fake, extractor.classes) if keep_logits and extractor.has_logits else None

    def update_real(self, images: Tensor | Sequence[Tensor], indices: Tensor) -> None:
        """Add real pictures, uint8 (n, 3, H, W), or n of (3, H, W) where their sizes differ.

        `indices`, int64 (n,), are the pictures' places in the whole set, 0 … total_real-1, each seen once over all
        processes; -1 marks padding, which is not scored.

        Raises:
            RuntimeError: the real set is already complete, by `real_state` or `load_real_state`.
        """
        if self._real_state is not None:
            raise RuntimeError("the real pictures are complete: build new metrics to score against others")
        self._update(self.real, None, images, indices)

    def update_fake(self, images: Tensor | Sequence[Tensor], indices: Tensor) -> None:
        """Add generated pictures, likewise, with `indices` as in `update_real`, 0 … total_fake-1."""
        self._update(self.fake, self.class_score, images, indices)

    def _update(
        self,
        statistics: FeatureStatistics,
        score: Metric | None,
        images: Tensor | Sequence[Tensor],
        indices: Tensor,
    ) -> None:
        if not isinstance(images, Tensor):
            for rows in by_size(images):
                self._update(statistics, score, torch.stack([images[i] for i in rows]), indices[rows])
            return
        indices = indices.to(statistics.device)
        scored = indices >= 0
        if not scored.any():
            return
        features = self.extractor(images.to(statistics.device)[scored])
        statistics.update(features.pool, indices[scored])
        if score is not None:
            score.update(features.logits, indices[scored])
            if self._logits is not None and features.logits is not None:
                self._logits[indices[scored].cpu()] = features.logits.cpu()

    def compute(self) -> dict[str, float]:
        """Every score by its name, each finite. All processes call it together.

        Raises:
            ValueError: some picture is missing or came twice.
            UserError: features of some picture, or a score, are not finite.
        """
        real, fake = self.real_state(), self.fake.compute()
        real_features = real["features"].to(fake["features"].device)
        distance = frechet_distance(real["mean"], real["covariance"], fake["mean"], fake["covariance"])
        kernel, kernel_std = kernel_distance(real_features, fake["features"])
        full = full_kernel_distance(real_features, fake["features"])
        enough = len(real_features) > _NEIGHBOURS
        spread = density_coverage(real_features, fake["features"], _NEIGHBOURS) if enough else (None, None)
        values = [distance, kernel, kernel_std, full, *precision_recall(real_features, fake["features"]), *spread]
        values += [cmmd(real_features, fake["features"])] if is_clip(self.extractor.name) else []
        if self.class_score is not None:
            values += [score.item() for score in self.class_score.compute()]
        names = score_names(self.extractor.name, self.class_score is not None)
        scores = {name: value for name, value in zip(names, values, strict=True) if value is not None}
        if unknown := [name for name, value in scores.items() if not math.isfinite(value)]:
            raise UserError(f"{', '.join(unknown)} came out as no finite number: look at the extractor's weights")
        return scores

    def banks(self) -> tuple[Tensor, Tensor]:
        """Features of the real and of the generated pictures, float32 (n, dim): of as many as the bank holds."""
        return self.real_state()["features"], self.fake.compute()["features"]

    def whole(self) -> bool:
        """Whether the bank holds all pictures of both sides."""
        return all(len(bank) == side.total for bank, side in zip(self.banks(), (self.real, self.fake), strict=True))

    def part(self, real: Tensor, fake: Tensor) -> dict[str, float]:
        """The scores of some of the pictures, by int64 rows of each side; the bank holds them all, and their logits.

        Raises:
            UserError: these are too few to score.
        """
        pools = [bank[rows] for bank, rows in zip(self.banks(), (real, fake), strict=True)]
        metrics = GenerationMetrics(self.extractor, len(real), len(fake))
        for side, pool in zip((metrics.real, metrics.fake), pools, strict=True):
            side.to(pool.device).update(pool, torch.arange(len(pool), device=pool.device))
        if metrics.class_score is not None and self._logits is not None:
            metrics.class_score.update(self._logits[fake], torch.arange(len(fake)))
        else:
            metrics.class_score = None
        return metrics.compute()

    def reset_fake(self) -> None:
        """Forget the generated pictures; the real ones stay."""
        self.fake.reset()
        if self.class_score is not None:
            self.class_score.reset()

    def real_state(self) -> dict[str, Tensor]:
        """All that is known of the real set over all processes, as `FeatureStatistics.compute` gives it, for a file.

        The first call is made by all processes together.

        Raises:
            ValueError, UserError: as `FeatureStatistics.compute`.
        """
        if self._real_state is None:
            self._real_state = self.real.compute()
        return self._real_state

    def load_real_state(self, state: dict[str, Tensor]) -> None:
        """Take the real set from `real_state()` of an earlier run, on every process, in place of `update_real`.

        Raises:
            ValueError: the state is of another number of pictures, extractor or bank; compute it anew.
            UserError: it holds numbers that are not finite.
        """
        moments, bank = self.real.moment2, self.real.bank
        due = {"count": (), "mean": moments[0].shape, "covariance": moments.shape, "features": bank.shape}
        if {name: value.shape for name, value in state.items()} != due or state["count"] != self.real.total:
            raise ValueError(
                f"not statistics of {self.real.total} pictures with a bank of {tuple(bank.shape)} features"
            )
        if not all(value.isfinite().all() for value in state.values()):
            raise UserError(
                "the kept statistics of the real pictures hold numbers that are not finite: empty evaluation.cache, so "
                "that they are computed anew"
            )
        self._real_state = {name: value.to(self.real.device) for name, value in state.items()}


def by_size(images: Sequence[Tensor]) -> list[list[int]]:
    """The places of pictures that can be stacked, size by size."""
    rows: dict[tuple[int, ...], list[int]] = {}
    for i, image in enumerate(images):
        rows.setdefault(tuple(image.shape), []).append(i)
    return list(rows.values())

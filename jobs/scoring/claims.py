"""What is said of scores beside their values: intervals, extrapolation, what the counts bear, and scores by group."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from rich.progress import Progress
from torch import Tensor

from metrics.intervals import LEAST_FOR_INTERVALS, Interval, frechet_at_infinity, jackknife, unsupported
from metrics.suite import LEAST, GenerationMetrics, infinity_name

OF_A_CLASS = 200
"""Pictures of a group, of either side, below which its scores are said to be of few."""


@dataclass
class Claims:
    """Scores, their intervals by name where there are any, and lines that belong to them."""

    scores: dict[str, float]
    intervals: dict[str, Interval] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    groups: dict[str, dict[str, float]] = field(default_factory=dict)
    """Scores of the groups, with `real` and `fake`, how many pictures they have."""


def claim(metrics: GenerationMetrics, wanted: bool) -> Claims:
    """The scores of all pictures; with `wanted` their intervals, and the Fréchet distance of infinitely many."""
    claims = Claims(metrics.compute())
    counts = metrics.real.total, metrics.fake.total
    claims.notes = unsupported(*counts, metrics.extractor.dim)
    if not wanted or min(counts) < LEAST_FOR_INTERVALS:
        return claims
    if not metrics.whole():
        claims.notes.append("no intervals: they take the features of all pictures, of which the bank holds a part")
        return claims
    value = dict(claims.scores)
    claims.scores[infinity_name(metrics.extractor.name)] = frechet_at_infinity(*metrics.banks())
    with Progress(transient=True) as progress:
        task = progress.add_task("intervals", total=None)

        def part(real: Tensor, fake: Tensor) -> dict[str, float]:
            progress.advance(task)
            return metrics.part(real, fake)

        claims.intervals = jackknife(part, value, *counts)
    return claims


def add_groups(
    claims: Claims, metrics: GenerationMetrics, real: Sequence[str | None], fake: Sequence[str | None]
) -> None:
    """Score each group of both sides by itself, out of the features that are there.

    real, fake: the group of each picture; None leaves it out.
    """
    for name in sorted({group for group in (*real, *fake) if group is not None}):
        rows = [torch.tensor([i for i, group in enumerate(side) if group == name]) for side in (real, fake)]
        counts = [len(each) for each in rows]
        if min(counts) < LEAST:
            claims.notes.append(f"{name}: {counts[0]} real and {counts[1]} generated pictures cannot be scored")
            continue
        if min(counts) < OF_A_CLASS:
            claims.notes.append(f"{name}: {counts[0]} real and {counts[1]} generated pictures, fewer than {OF_A_CLASS}")
        found = metrics.part(rows[0].long(), rows[1].long())
        claims.groups[name] = {"real": counts[0], "fake": counts[1]} | found


def as_values(intervals: Mapping[str, Interval]) -> dict[str, list[float]]:
    """Low, high and standard error by score, for a report."""
    return {name: [found.low, found.high, found.error] for name, found in intervals.items()}

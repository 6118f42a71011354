"""Copies of training pictures among the generated ones: the pictures of all sides, what is said, and the sheet."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from callbacks.samples import draw_grid
from datamodules.base import SizedDataset
from datamodules.files.images import Geometry
from jobs.scoring.claims import Claims
from jobs.scoring.folders import ScoredFolder, stream
from medsynth.errors import UserError
from medsynth.files import naming_unwritten, put_whole
from metrics.extractors import FeatureExtractor
from metrics.intervals import share_interval
from metrics.memorisation import FALSE_ALARM, LEAST_HELD_OUT, Copies, Seen, find_copies, grey_pictures
from metrics.suite import by_size

SCORES = ("memorisation", "authenticity")
"""The names of what is scored here."""
_MOST = 24  # pairs of a sheet
_SIDE = 128  # pixels of each picture there


@dataclass(frozen=True)
class Search:
    """What copies are told by: pictures that were trained on, and real ones that nobody trained on."""

    training: SizedDataset
    held_out: SizedDataset
    sheet: Path | None = None


def check_sheet(sheet: Path | None) -> None:
    """Raise UserError where a sheet cannot be there."""
    if sheet is not None and (sheet.suffix.lower() != ".png" or not sheet.parent.is_dir()):
        raise UserError(f"--copies {sheet}: name a PNG file in a folder that is there")


def add_copies(
    claims: Claims, search: Search, fake: ScoredFolder, extractor: FeatureExtractor, batch_size: int, workers: int
) -> Copies:
    """Look for copies, add their share and the authenticity to the scores, and write the sheet."""
    sides = (("training", search.training), ("held out", search.held_out), ("generated", fake))
    seen = [_see(pictures, extractor, title, batch_size, workers) for title, pictures in sides]
    found = find_copies(*seen)
    for name, value in zip(SCORES, (found.share, found.authenticity), strict=True):
        claims.scores[name] = value
        claims.intervals[name] = share_interval(value, len(fake))
    alarms = int((found.held_out < found.threshold).sum())
    claims.notes.append(
        f"memorisation: {int(found.copied.sum())} of {len(fake)} generated pictures lie nearer to training pictures "
        f"than {alarms} of {len(found.held_out)} held-out ones do"
    )
    if len(found.held_out) < LEAST_HELD_OUT:
        claims.notes.append(
            f"memorisation: of {len(found.held_out)} held-out pictures a share of {FALSE_ALARM:.0%} cannot be told: "
            f"what counts is nearer than all of them; hold out {LEAST_HELD_OUT}"
        )
    if search.sheet is not None:
        _write_sheet(search.sheet, found, search.training, fake)
    return found


def _see(pictures: SizedDataset, extractor: FeatureExtractor, title: str, batch_size: int, workers: int) -> Seen:
    count = len(pictures)
    seen = Seen(torch.zeros(count, extractor.dim), torch.zeros(count, extractor.dim), torch.zeros(count, 64, 64).byte())
    device = next(iter(extractor.parameters())).device

    def update(images: Sequence[Tensor], indices: Tensor) -> None:
        for rows in by_size(images):
            stacked = torch.stack([images[i] for i in rows]).to(device)
            places = indices[rows]
            seen.features[places] = extractor(stacked).pool.cpu()
            seen.mirrored[places] = extractor(stacked.flip(-1)).pool.cpu()
            seen.grey[places] = grey_pictures(stacked).cpu()

    stream(pictures, update, title, batch_size, workers)
    for features in seen[:2]:
        if not features.isfinite().all():
            raise UserError(f"{title} pictures have features that are not finite: look at the extractor's weights")
    return seen


def _write_sheet(path: Path, found: Copies, training: SizedDataset, fake: ScoredFolder) -> None:
    """The nearest pairs, generated pictures on the left, training pictures on the right."""
    worst = found.nearness.argsort()[:_MOST].tolist()
    whole = Geometry(_SIDE, "pad")
    pairs = [torch.cat([whole.apply(fake[i]), whole.apply(training[int(found.rows[i])])], dim=2) for i in worst]
    captions = [f"{fake.paths[i].name}{' COPY' if found.copied[i] else ''}" for i in worst]
    content = io.BytesIO()
    draw_grid(torch.stack(pairs).float() / 255, captions, columns=8).save(content, format="PNG")
    with naming_unwritten(f"--copies {path}"):
        put_whole(path, content.getvalue())

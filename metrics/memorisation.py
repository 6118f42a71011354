"""Whether generated pictures are copies of training pictures: nearer to them than pictures that nobody trained on.

Each picture's nearest training picture is looked for in two spaces, as it is and mirrored: the extractor's features,
and small grey pictures of mean 0 and length 1, which light and contrast leave alone. Of the nearest few, parts of the
training picture are laid over it: the best SSIM is a third distance. What is near is said by held-out real pictures,
which go the same way.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.image import structural_similarity_index_measure

from medsynth.errors import UserError

FALSE_ALARM = 0.01
"""Share of held-out pictures that may be called copies."""
LEAST_HELD_OUT = round(1 / FALSE_ALARM)
"""Held-out pictures below which that share cannot be told."""
_SIDE, _SMALL = 64, 32  # pixels of what is kept of a picture, and of what is compared
_CANDIDATES = 4  # nearest training pictures, of each space
_SCALES = (1.0, 0.9, 0.8, 0.7)  # sides of the parts that are laid over
_OVERLAID = 3  # parts whose SSIM is taken, of those that correlate best
_BLOCK = 512


class Seen(NamedTuple):
    """What is kept of n pictures: `features` and those of their mirror images, float32 (n, dim); `grey`, uint8
    (n, 64, 64). In all 8 dim + 4,096 bytes each."""

    features: Tensor
    mirrored: Tensor
    grey: Tensor


class Nearest(NamedTuple):
    """Of n pictures, `distances` (n, 3), float64, in features, as small pictures and by 1 - SSIM; `rows` (n,), int64,
    the training picture that is nearest by SSIM."""

    distances: Tensor
    rows: Tensor


@dataclass(frozen=True)
class Copies:
    """What was found.

    nearness: float64 (m,), of each generated picture, see `nearness`; `copied`, bool (m,), those below `threshold`;
    rows: int64 (m,), its nearest training picture. share: of copies. authenticity: see `authenticity`. held_out:
    float64 (h,), the nearness of the held-out pictures.
    """

    nearness: Tensor
    threshold: float
    copied: Tensor
    rows: Tensor
    share: float
    authenticity: float
    held_out: Tensor


def grey_pictures(images: Tensor) -> Tensor:
    """Pictures, uint8 (n, 3, H, W), to uint8 (n, 64, 64)."""
    weights = torch.tensor([0.299, 0.587, 0.114], device=images.device)
    grey = (images.float() * weights[:, None, None]).sum(dim=1, keepdim=True)
    return F.interpolate(grey, (_SIDE, _SIDE), mode="bilinear", antialias=True)[:, 0].round().clamp(0, 255).byte()


def find_copies(training: Seen, held_out: Seen, generated: Seen) -> Copies:
    """Look for copies of training pictures among the generated ones.

    Raises:
        UserError: there are too few pictures to tell.
    """
    if len(training.grey) < 2 or len(held_out.grey) < 2:
        raise UserError("copies are told by at least 2 training pictures and 2 real ones that nobody trained on")
    known, asked = nearest(training, held_out), nearest(training, generated)
    scale = _scale(known.distances)
    near_known, near_asked = nearness(known.distances, scale), nearness(asked.distances, scale)
    allowed = math.floor(FALSE_ALARM * len(near_known))
    threshold = near_known.sort().values[allowed].item()  # so many lie below it
    copied = near_asked < threshold
    share = copied.double().mean().item()
    authentic = authenticity(training.features, generated.features)
    return Copies(near_asked, threshold, copied, asked.rows, share, authentic, near_known)


def nearness(distances: Tensor, scale: tuple[Tensor, Tensor]) -> Tensor:
    """(n,) of `distances` (n, 3): the least logarithm, in spreads from the median of the held-out pictures'."""
    middle, spread = scale
    return ((_logarithm(distances) - middle) / spread).min(dim=1).values


def _scale(distances: Tensor) -> tuple[Tensor, Tensor]:
    logarithms = _logarithm(distances)
    middle = logarithms.median(dim=0).values
    spread = (logarithms - middle).abs().median(dim=0).values.clamp(min=1e-3)
    return middle, spread


def _logarithm(distances: Tensor) -> Tensor:
    return (distances + 1e-4).log()  # an exact copy is at 0


def authenticity(training: Tensor, generated: Tensor) -> float:
    """Share of `generated` (m, d) that is farther from its nearest training picture than that is from its own nearest
    other (Alaa et al. 2022, section 3); about a half for new pictures of the training's distribution, 0 for copies."""
    x, y = training.double(), generated.double()
    own = torch.cat([torch.cdist(block, x).kthvalue(2, dim=1).values for block in x.split(_BLOCK)])
    found = [torch.cdist(block, x).min(dim=1) for block in y.split(_BLOCK)]
    away, rows = (torch.cat(parts) for parts in zip(*found, strict=True))
    return (away > own[rows]).double().mean().item()


def nearest(training: Seen, asked: Seen) -> Nearest:
    """The nearest training pictures of those that are asked about; each picture goes by itself."""
    small = _normed(_resized(training.grey))
    features = training.features.double()
    scale = features.var(dim=0).sum().sqrt().clamp(min=1e-12)
    distances, rows = [], []
    for i in range(len(asked.grey)):
        as_features = torch.stack([asked.features[i], asked.mirrored[i]]).double()
        ours = _resized(asked.grey[i : i + 1])
        as_small = _normed(torch.cat([ours, ours.flip(-1)]))
        by_features = (torch.cdist(as_features, features) / scale).min(dim=0).values
        by_small = torch.cdist(as_small, small).min(dim=0).values
        count = min(_CANDIDATES, len(small))
        best = torch.cat([by.topk(count, largest=False).indices for by in (by_features, by_small)]).unique()
        overlaid = _overlaid(ours, training.grey[best])
        distances.append(torch.stack([by_features.min(), by_small.min().double(), overlaid.min().double()]))
        rows.append(best[overlaid.argmin()])
    return Nearest(torch.stack(distances), torch.stack(rows))


def _overlaid(ours: Tensor, theirs: Tensor) -> Tensor:
    """(c,): 1 - SSIM of one picture (1, 32, 32) with the best part of each of `theirs`, uint8 (c, 64, 64)."""
    views = torch.stack(
        [view for part in _parts(theirs) for view in (part, part.flip(-1))], dim=1
    )  # (c, views, 32, 32)
    normed = _normed(views.flatten(0, 1)).unflatten(0, views.shape[:2])
    best = (normed @ _normed(ours)[0]).topk(_OVERLAID, dim=1).indices
    chosen = torch.gather(views, 1, best[..., None, None].expand(-1, -1, _SMALL, _SMALL)).flatten(0, 1)
    alike = structural_similarity_index_measure(
        _stretched(ours).expand(len(chosen), -1, -1)[:, None], _stretched(chosen)[:, None], data_range=6.0,
        reduction="none",
    )  # fmt: skip
    assert isinstance(alike, Tensor)  # a tuple only where the full picture of it is asked for
    return 1 - alike.unflatten(0, best.shape).max(dim=1).values


def _parts(grey: Tensor) -> list[Tensor]:
    """Squares of the pictures (c, 64, 64), each (c, 32, 32): the whole, and of each smaller side nine places."""
    found = []
    for scale in _SCALES:
        side = round(scale * _SIDE)
        places = sorted({0, (_SIDE - side) // 2, _SIDE - side})
        found += [_resized(grey[:, top : top + side, left : left + side]) for top in places for left in places]
    return found


def _resized(grey: Tensor) -> Tensor:
    """(n, h, w) to float32 (n, 32, 32)."""
    return F.interpolate(grey[:, None].float(), (_SMALL, _SMALL), mode="bilinear", antialias=True)[:, 0]


def _stretched(pictures: Tensor) -> Tensor:
    """Pictures (n, 32, 32) with mean 0 and deviation 1; flat ones are 0."""
    centred = pictures - pictures.mean(dim=(1, 2), keepdim=True)
    return centred / centred.square().mean(dim=(1, 2), keepdim=True).sqrt().clamp(min=1e-6)


def _normed(pictures: Tensor) -> Tensor:
    """(n, 1024), each of mean 0 and length 1."""
    return _stretched(pictures).flatten(1) / _SMALL

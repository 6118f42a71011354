"""Planted copies are found, new pictures are not called so, and authenticity is what it is where it is known."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from datamodules.phantoms.colonoscopy import write_colonoscopy
from medsynth.errors import UserError
from metrics.extractors import RandomConvExtractor
from metrics.memorisation import Seen, authenticity, find_copies, grey_pictures

EACH = 8  # copies of a kind


def seen(images: Tensor) -> Seen:
    extractor = RandomConvExtractor()
    return Seen(extractor(images).pool, extractor(images.flip(-1)).pool, grey_pictures(images))


def recoded(image: Tensor) -> Tensor:
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "jpeg", quality=60)
    return torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)


def cropped(image: Tensor) -> Tensor:
    part = image[None, :, 2:58, 3:59].float()
    return F.interpolate(part, (64, 64), mode="bicubic", antialias=True)[0].clamp(0, 255).round().byte()


COPIES = {
    "exact": lambda image: image,
    "flipped": lambda image: image.flip(-1),
    "re-encoded": recoded,
    "cropped": cropped,
    "brighter": lambda image: (image.float() * 1.25 + 10).clamp(0, 255).byte(),
}


@pytest.fixture(scope="module")
def sets(once) -> tuple[Tensor, Tensor, Tensor]:
    """Phantoms: 80 to train on, 100 held out, 40 that are new."""
    folder = once("copies", lambda path: write_colonoscopy(path / "set", images=220, seed=4, size=64)) / "set"
    files = sorted(folder.rglob("*.jpg"))
    images = torch.stack(
        [torch.from_numpy(np.array(Image.open(file).convert("RGB"))).permute(2, 0, 1) for file in files]
    )
    return images[:80], images[80:180], images[180:]


@pytest.fixture(scope="module")
def looked(sets):
    training, held_out, new = sets
    planted = [copy(training[EACH * k + i]) for k, copy in enumerate(COPIES.values()) for i in range(EACH)]
    generated = torch.cat([new, torch.stack(planted)])
    return find_copies(seen(training), seen(held_out), seen(generated)), len(new)


def test_planted_copies_are_found_and_new_pictures_are_not(looked):
    found, new = looked
    planted = found.copied[new:]
    by_kind = {kind: int(planted[EACH * k : EACH * (k + 1)].sum()) for k, kind in enumerate(COPIES)}
    assert planted.double().mean() >= 0.95, by_kind
    assert found.copied[:new].double().mean() <= 0.05
    assert found.share == pytest.approx(found.copied.double().mean().item())


def test_a_copy_is_traced_to_its_picture(looked):
    found, new = looked
    assert (found.rows[new:] == torch.arange(EACH * len(COPIES))).double().mean() >= 0.95


def test_no_more_held_out_pictures_than_said_are_called_copies(looked):
    found, _ = looked
    assert (found.held_out < found.threshold).sum() == 1 and len(found.held_out) == 100


def test_authenticity_where_it_is_known():
    line = torch.arange(0.0, 40, 2)[:, None]  # each 2 from its neighbours
    assert authenticity(line, line) == 0
    assert authenticity(line, line + 0.5) == 0, "nearer than any other"
    assert authenticity(line, line + torch.tensor([[1000.0]])) == 1
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 800, 3, generator=generator)
    assert authenticity(x, y) == pytest.approx(0.5, abs=0.08)


def test_too_few_pictures_tell_nothing(sets):
    few = seen(sets[0][:1])
    with pytest.raises(UserError, match="at least 2 training pictures"):
        find_copies(few, few, few)

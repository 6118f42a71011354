"""A probe learns what pictures show, and tells it of pictures that it has not seen."""

import pytest
import torch
from torch import Tensor

from metrics.probe import Probe, train_probe


def pictures(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noise (n, 3, 24, 24) with none, one or two bright spots of 3 pixels: is there one, are there two?"""
    chance = torch.Generator().manual_seed(seed)
    images = torch.randint(60, 120, (count, 3, 24, 24), generator=chance, dtype=torch.uint8)
    spots = torch.randint(0, 3, (count,), generator=chance)
    for image, number in zip(images, spots.tolist(), strict=True):
        for half in range(number):
            y, x = torch.randint(0, 9, (2,), generator=chance).tolist()
            image[:, y + 12 * half : y + 12 * half + 3, x : x + 3] = 250
    return images, torch.stack([spots > 0, spots > 1], dim=1)


@pytest.fixture(scope="module")
def probe() -> Probe:
    return train_probe(*pictures(400, seed=0), steps=120, seed=3)


def test_what_is_small_and_how_many_there_are_is_seen_in_pictures_of_another_seed(probe):
    images, truth = pictures(300, seed=1)
    right = (probe.answers(images) == truth).float().mean(dim=0)
    assert right.min() >= 0.97, right


def test_an_answer_is_of_a_picture_not_of_those_beside_it(probe):
    images, _ = pictures(260, seed=2)  # more than are looked at at once
    together = probe.answers(images)
    assert together.shape == (260, 2) and together.dtype == torch.bool
    assert torch.equal(together[255:257], probe.answers(images[255:257]))


def test_the_same_seed_gives_the_same_probe_and_leaves_other_chance_alone():
    images, truth = pictures(40, seed=0)
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    steps: list[int] = []
    first, second = (train_probe(images, truth, steps=3, seed=1, progress=steps.append) for _ in range(2))
    assert steps == [1, 2, 3] * 2
    assert torch.equal(torch.rand(2), expected)
    for ours, theirs in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)

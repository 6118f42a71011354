"""Controls: where their channels stand, and edge maps against the reference library and against arithmetic."""

import cv2
import numpy as np
import pytest
import torch

import datamodules.files.control
from datamodules.batches import CONTROL_CHANNELS
from datamodules.files.control import canny, channels
from medsynth.errors import UserError


def step(height: int, side: int = 16) -> torch.Tensor:
    """A grey picture whose right half is `height` levels brighter."""
    picture = torch.full((3, side, side), 100, dtype=torch.uint8)
    picture[:, :, side // 2 :] += height
    return picture


def test_channels_stand_in_the_order_of_their_kinds():
    assert channels(["picture", "mask", "canny", "depth"]) == {
        "picture": slice(0, 3),
        "mask": slice(3, 4),
        "canny": slice(4, 5),
        "depth": slice(5, 6),
    }
    assert channels([]) == {} and set(CONTROL_CHANNELS) == {"canny", "depth", "mask", "picture"}


@pytest.mark.parametrize(("controls", "why"), [(["edges"], "edges is not one of canny"), (["mask"] * 2, "twice")])
def test_channels_refuse_what_is_no_control(controls, why):
    with pytest.raises(UserError, match=f"data.controls: mask stands there {why}|data.controls: {why}"):
        channels(controls)


@pytest.mark.parametrize("blur", [0.0, 1.5])
@pytest.mark.parametrize(("low", "high"), [(100, 200), (20, 60)])
def test_canny_is_the_reference_librarys_on_an_rgb_picture(low, high, blur):
    colours = np.random.default_rng(0).integers(0, 256, (12, 12, 3), np.uint8).repeat(8, axis=0).repeat(8, axis=1)
    grey = np.rint(colours @ np.array([0.299, 0.587, 0.114])).astype(np.uint8)  # ITU-R BT.601 luma
    if blur:
        grey = cv2.GaussianBlur(grey, (0, 0), blur)
    expected = cv2.Canny(grey, low, high, apertureSize=3, L2gradient=False)
    edges = canny(torch.from_numpy(colours).permute(2, 0, 1), low, high, blur)
    assert edges.shape == (1, 96, 96) and edges.dtype == torch.float32
    assert set(edges.unique().tolist()) == {0.0, 1.0}
    assert (edges[0].numpy() != expected / 255).mean() < 0.002  # OpenCV's luma is in fixed point
    assert 0.02 < edges.mean() < 0.5


def test_a_step_is_an_edge_where_four_times_its_height_exceeds_the_threshold():
    """The Sobel sum over a step by h is (1 + 2 + 1) h."""
    assert canny(step(25), 100, 100).sum() == 0
    edges = canny(step(26), 100, 100)
    assert edges[0].sum(dim=0).nonzero().flatten().tolist() in ([7], [8])
    assert edges.sum() == 16


def test_a_weak_edge_counts_only_where_it_goes_on_from_a_strong_one():
    picture = step(30)
    picture[:, :8, 8:] += 30  # 240 above, 120 below
    assert canny(picture, 100, 200)[0, 10:].sum() > 0
    assert canny(step(30), 100, 200).sum() == 0


def test_blur_takes_small_things_away():
    picture = torch.zeros(3, 32, 32, dtype=torch.uint8)
    picture[:, 16, 16] = 255
    assert canny(picture, 100, 200).sum() > 0 and canny(picture, 100, 200, blur=2.0).sum() == 0


def test_the_layout_of_the_channels_needs_no_other_library():
    assert not {"cv2", "PIL", "torchvision"} & set(vars(datamodules.files.control))

"""Which levels number classes, and which are greys."""

import numpy as np
import pytest

from datamodules.files.levels import Survey, numbered
from medsynth.errors import UserError

CITY = [7, 8, 11, 12, 13, 17, *range(19, 29), 31, 32, 33]


@pytest.mark.parametrize(
    ("levels", "most", "classes"),
    [
        (range(21), 255, range(1, 21)),
        ([*range(21), 255], 255, range(1, 21)),
        ([0, 1, 255], 255, [1]),
        ([0, 5, 12, 255], 255, [5, 12]),
        ([0, *CITY, 255], 255, CITY),
        ([*range(151), 255], 255, range(1, 151)),
        (range(151), 255, range(1, 151)),
        ([0, 300, 900], 65535, [300, 900]),
    ],
)
def test_classes(levels, most, classes):
    assert numbered(levels, most) == list(classes)


@pytest.mark.parametrize(
    ("levels", "most"),
    [
        ([], 255),
        ([0], 255),
        ([0, 255], 255),
        ([0, 128, 255], 255),
        ([0, 85, 170, 255], 255),
        ([0, 64, 128, 192], 255),
        (range(0, 256, 17), 255),
        (range(256), 255),
        (range(230), 255),  # soft, and never quite white
        ([*range(13), *range(243, 256)], 255),  # black and white, as JPEG keeps them
        ([0, 1, 2, 20], 20),  # the user has said how many classes there are
        ([0, 32768, 65535], 65535),
    ],
)
def test_greys(levels, most):
    assert numbered(levels, most) == []


def test_a_survey_names_the_key_a_file_and_the_mend(tmp_path):
    survey = Survey(255)
    survey.add_mask(tmp_path / "binary.png", np.array([[0, 255]], np.uint8))
    survey.add_mask(tmp_path / "bits.png", np.array([[False, True]]))
    survey.check()
    survey.add_mask(tmp_path / "classes.png", np.arange(21, dtype=np.uint8))
    with pytest.raises(UserError) as error:
        survey.check()
    assert str(error.value) == (
        f"data.mask_max=255: the masks' levels are 1, 2, 3, …, 20 (as in {tmp_path}/classes.png) beside 255 (as in "
        f"{tmp_path}/binary.png): these are classes with a border, not greys; save 255 as 0 or as a class, and set "
        "data.mask_max to the greatest class"
    )
    survey = Survey(255)
    survey.add_mask(tmp_path / "few.png", np.array([[0, 3, 20]], np.uint16))
    with pytest.raises(UserError, match=r"levels are 3, 20 \(as in .*/few\.png\): these are classes, not greys of"):
        survey.check()


def test_depth_maps_that_stay_almost_black(tmp_path):
    survey = Survey(255)
    survey.add_depth(tmp_path / "a.png", np.array([[0, 4000]], np.uint16), 65535)
    with pytest.raises(UserError, match=r"data\.depth: none of the depth maps goes beyond 6\.1% of white \(.*/a\.p"):
        survey.check()
    survey.add_depth(tmp_path / "b.png", np.array([[0, 40000]], np.uint16), 65535)
    survey.check()

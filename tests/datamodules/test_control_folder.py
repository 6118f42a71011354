"""Edge maps of one's own: what becomes of a line when its picture changes size."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.files.control_folder import edges_of
from datamodules.files.images import Geometry
from medsynth.errors import UserError


@settings(max_examples=60, deadline=None)
@given(side=st.integers(16, 200), place=st.floats(0, 1), upright=st.booleans(), square=st.sampled_from(["crop", "pad"]))
def test_a_line_one_pixel_wide_remains_one_wherever_it_lies(side, place, upright, square):
    """Grown it is as wide as it was drawn, to a pixel."""
    values, row = np.zeros((side, side), np.uint8), int(place * (side - 1))
    values[row] = 255
    edges = edges_of(Path("a.png"), values if upright else values.T, Geometry(32, square))[0]
    lines = (edges if upright else edges.T).sum(0)
    assert set(edges.unique().tolist()) <= {0.0, 1.0}
    assert lines.min() == lines.max()
    assert 1 <= lines[0] < 32 / side + 1 if side < 32 else lines[0] == 1


def test_a_map_of_the_model_s_size_is_taken_as_it_is():
    values = np.random.default_rng(0).random((32, 32)) < 0.2
    for kind in (values, values.astype(np.uint8), values.astype(np.uint8) * 255, values.astype(np.uint16) * 65535):
        assert torch.equal(edges_of(Path("a.png"), kind, Geometry(32))[0], torch.from_numpy(values).float())


@pytest.mark.parametrize(("values", "said"), [(np.arange(64), "is no edge map"), (np.full(64, 255), "mostly white")])
def test_what_is_no_edge_map_is_refused(values, said):
    with pytest.raises(UserError, match=f"a.png .*{said}|a.png {said}"):
        edges_of(Path("a.png"), values.reshape(8, 8).astype(np.uint8), Geometry(8))

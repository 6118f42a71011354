"""The first losses of every tiny preset are those of tests/traces.json."""

import json

import pytest
from omegaconf import OmegaConf

from tests.conftest import REPOSITORY
from tests.traces import FILE, STEPS, TINY, trace

GOLDEN = json.loads(FILE.read_text())


@pytest.mark.parametrize("preset", TINY)
def test_the_first_losses_are_as_before(preset, phantoms, tmp_path):
    """A change that is meant to change them says so, and writes the file anew: `make traces`."""
    name = OmegaConf.load(REPOSITORY / f"configs/tiny/{preset}.yaml").data.name
    losses = trace(preset, phantoms[name], tmp_path / "run")
    assert len(losses) == STEPS
    assert losses == pytest.approx(GOLDEN[preset], rel=1e-5)

"""Fixtures that several test files share."""

import os

# Before torch is imported. One thread: tests are small, and those with several processes share two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from pathlib import Path

import pytest

from datamodules.phantoms import write_colonoscopy

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def phantom(tmp_path_factory) -> Path:
    """A phantom colonoscopy set: 40 pictures of 64×64 with prompts."""
    folder = tmp_path_factory.mktemp("data") / "phantom"
    write_colonoscopy(folder, images=40, seed=1, size=64)
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty working directory, so that runs and mlruns.db land in it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path

"""Fixtures that several test files share."""

import os

# Before torch is imported. One thread: tests are small, and those with several processes share two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from pathlib import Path

import pytest

from datamodules.phantoms.chest import write_chest
from datamodules.phantoms.colonoscopy import write_colonoscopy
from datamodules.phantoms.hip import write_hips
from tests.class_folders import write_classes

REPOSITORY = Path(__file__).parent.parent


class Phantoms(dict):
    """A small phantom set of each data set, by its name in the registry, drawn when it is asked for."""

    def __init__(self, folder: Path):
        super().__init__()
        self.folder = folder

    def __missing__(self, name: str) -> Path:
        out = self.folder / name
        write = {
            "medvqa_gi": lambda: write_colonoscopy(out, images=40, seed=1, size=64),
            "canine_hip": lambda: write_hips(out, images=24, seed=1, size=64),
            "chest_xray": lambda: write_chest(out, images=24, seed=1, size=64),
            "dreambooth": lambda: write_classes(out, class_pictures=3),
            "cytology": lambda: write_classes(out),
        }
        write[name]()
        return self.setdefault(name, out)


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory) -> Phantoms:
    """`phantoms["chest_xray"]` is the folder of a phantom set of that kind."""
    return Phantoms(tmp_path_factory.mktemp("phantoms"))


@pytest.fixture(scope="session")
def phantom(phantoms) -> Path:
    """A phantom colonoscopy set: 40 pictures of 64×64 with prompts."""
    return phantoms["medvqa_gi"]


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty working directory, so that runs and mlruns.db land in it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path

"""Fixtures that several test files share."""

import os

# Before torch is imported. One thread: tests are small, and those with several processes share two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import fcntl
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from datamodules.phantoms.chest import write_chest
from datamodules.phantoms.colonoscopy import write_colonoscopy
from datamodules.phantoms.hip import write_hips
from jobs.tracking import server
from tests.class_folders import write_classes

REPOSITORY = Path(__file__).parent.parent

# What a shell starts in the background ignores Ctrl-C, and so would all that is started here and asked to leave by it.
if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)


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
def once(tmp_path_factory) -> Callable[[str, Callable[[Path], object]], Path]:
    """`once(name, make)` is the folder that `make(folder)` has filled, for all processes of pytest-xdist together.

    For what takes long and is only read. Where `make` fails, the next process that asks tries it again.
    """
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent

    def get(name: str, make: Callable[[Path], object]) -> Path:
        folder = shared / "once" / name
        folder.parent.mkdir(exist_ok=True)
        with folder.with_name(f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.exists():
                unfinished = tmp_path_factory.mktemp(name)
                make(unfinished)
                unfinished.rename(folder)
        return folder

    return get


@pytest.fixture(scope="module", autouse=True)
def quick_mlflow(once) -> Iterator[None]:
    """MLflow's tables in a new SQLite file are copied: to make them takes more than a second of every training."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server, "_make_database", lambda path: _make_database_from_a_copy(path, once))
        yield


_make_database = server._make_database


def _make_database_from_a_copy(path: Path, once) -> None:
    from mlflow.db import upgrade

    new = once("mlflow", lambda folder: _make_database(folder / "mlruns.db")) / "mlruns.db"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(upgrade, "callback", lambda uri: shutil.copy(new, server.sqlite_path(uri)))
        _make_database(path)


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
